"""What a dense model holds, told from its `config.json` alone: no weight, torch or transformers.

The same fields as `dense.describe` gives, for the families below; another is found by `dense`,
which builds it, and what that recorded is used here once it is there. `tests/test_plan.py` holds
every family against the model that transformers builds.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import artifacts, record
from pipeline.config import Config as Settings
from pipeline.config import EmbeddedModelConfig, select
from pipeline.errors import InputError

CONFIG = "config.json"
DENSE_PARAMS = ("model.id", "model.revision", "model.dtype", "model.embedded")
"""Settings that say which model `stages/dense` recorded."""

Config = Mapping[str, Any]
Rule = Callable[[Config], bool]

NAMES = {
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "activation": "hidden_act",
}
"""Our names for the keys of most families."""

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "quick_gelu": "quick_gelu",
}


def _never(config: Config) -> bool:
    return False


def _always(config: Config) -> bool:
    return True


def _says(key: str) -> Rule:
    return lambda config: bool(config.get(key, False))


@dataclass(frozen=True)
class Family:
    """How the parameters of a decoder or an encoder follow from its configuration."""

    names: Mapping[str, str] = field(default_factory=dict)  # keys other than `NAMES`
    gated: bool = True
    ffn_bias: Rule = _never
    qkv_bias: Rule = _never
    o_bias: Rule = _never
    norms: int = 2  # vectors of d_model per layer
    last_norms: int = 1  # the same behind the layers
    head_norms: str = ""  # of queries and keys: "head" or "width"
    tied: bool = False  # where the configuration does not say
    head_dim: int | None = None  # where the configuration does not say; null = d_model / n_heads
    extra: Callable[[Config, int], int] = lambda config, d_model: 0  # parameters besides
    language_model: bool = True  # it has a head over the vocabulary


def _bert_extra(config: Config, d_model: int) -> int:
    rows = config["max_position_embeddings"] + config["type_vocab_size"]
    return (rows + 2 + d_model + 1) * d_model  # embeddings, their norm, the pooler


GPT2_NAMES = {"d_model": "n_embd", "d_ff": "n_inner", "n_layers": "n_layer", "n_heads": "n_head"}
_BERT = Family(
    gated=False,
    ffn_bias=_always,
    qkv_bias=_always,
    o_bias=_always,
    norms=4,
    last_norms=0,
    tied=True,
    extra=_bert_extra,
    language_model=False,
)

FAMILIES: dict[str, Family] = {
    "llama": Family(
        ffn_bias=_says("mlp_bias"), qkv_bias=_says("attention_bias"), o_bias=_says("attention_bias")
    ),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=_always),
    "qwen3": Family(
        qkv_bias=_says("attention_bias"),
        o_bias=_says("attention_bias"),
        head_norms="head",
        head_dim=128,
    ),
    "phi3": Family(),
    "olmo": Family(
        qkv_bias=_says("attention_bias"), o_bias=_says("attention_bias"), norms=0, last_norms=0
    ),
    "olmo2": Family(
        qkv_bias=_says("attention_bias"), o_bias=_says("attention_bias"), head_norms="width"
    ),
    "granite": Family(
        ffn_bias=_says("mlp_bias"), qkv_bias=_says("attention_bias"), o_bias=_says("attention_bias")
    ),
    "smollm3": Family(
        ffn_bias=_says("mlp_bias"),
        qkv_bias=_says("attention_bias"),
        o_bias=_says("attention_bias"),
        tied=True,
    ),
    "gemma": Family(
        qkv_bias=_says("attention_bias"), o_bias=_says("attention_bias"), tied=True, head_dim=256
    ),
    "gemma2": Family(
        names={"activation": "hidden_activation"},
        qkv_bias=_says("attention_bias"),
        o_bias=_says("attention_bias"),
        norms=4,
        tied=True,
        head_dim=256,
    ),
    "gemma3_text": Family(
        names={"activation": "hidden_activation"},
        qkv_bias=_says("attention_bias"),
        o_bias=_says("attention_bias"),
        norms=4,
        head_norms="head",
        tied=True,
        head_dim=256,
    ),
    "starcoder2": Family(
        gated=False,
        ffn_bias=_says("use_bias"),
        qkv_bias=_says("use_bias"),
        o_bias=_says("use_bias"),
        norms=4,
        last_norms=2,
        tied=True,
    ),
    "gpt2": Family(
        names={**GPT2_NAMES, "activation": "activation_function"},
        gated=False,
        ffn_bias=_always,
        qkv_bias=_always,
        o_bias=_always,
        norms=4,
        last_norms=2,
        tied=True,
        extra=lambda config, d_model: config["n_positions"] * d_model,
    ),
    "gpt_neox": Family(
        gated=False,
        ffn_bias=_always,
        qkv_bias=_says("attention_bias"),
        o_bias=_says("attention_bias"),
        norms=4,
        last_norms=2,
    ),
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
}


def record_of(cfg: Settings, dense: Path, *, online: bool = True) -> dict[str, Any]:
    """The dense model of a configuration, as `stages/dense` recorded it or as its config says.

    Args:
        dense: where the stage's output would lie.
        online: whether the hub may be asked.

    Raises:
        InputError: there is no `config.json`, or it is of a family that is not known here.
    """
    manifest = dense / artifacts.MANIFEST
    if manifest.is_file() and (dense / record.RECORD).is_file():
        wanted = select(cfg, DENSE_PARAMS)
        settings = artifacts.read_json(manifest).get("settings", {})
        if wanted.items() <= settings.items():
            return artifacts.read_json(dense / record.RECORD)
    if cfg.model.embedded:
        return outline(embedded(cfg.model.embedded))
    assert cfg.model.id
    return outline(read_config(cfg.model.id, cfg.model.revision, online=online))


def embedded(cfg: EmbeddedModelConfig) -> dict[str, Any]:
    """The configuration of the model that `dense` trains."""
    return {
        "model_type": "llama",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_ff,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
    }


def is_here(model_id: str, revision: str | None) -> bool:
    """Whether a model's weights need not be downloaded."""
    place = record.located(model_id)
    if Path(place).is_dir():
        return True
    from huggingface_hub import try_to_load_from_cache

    names = ("model.safetensors", "model.safetensors.index.json")
    found = (try_to_load_from_cache(place, name, revision=revision) for name in names)
    return any(isinstance(path, str) for path in found)


def read_config(model_id: str, revision: str | None, *, online: bool = True) -> dict[str, Any]:
    """`config.json` of a folder, of the hub's cache, or of the hub; asked once, in seconds."""
    place = record.located(model_id)
    if Path(place).is_dir():
        path = Path(place) / CONFIG
        return _parsed(path.read_bytes() if path.is_file() else b"", path.absolute())
    from huggingface_hub import hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    cached = try_to_load_from_cache(place, CONFIG, revision=revision)
    if isinstance(cached, str):
        return _parsed(Path(cached).read_bytes(), cached)
    try:
        if not online:
            raise OSError("it is not in the hub's cache")
        url = hf_hub_url(place, CONFIG, revision=revision)
        answer = get_session().get(
            url, headers=build_hf_headers(), timeout=10, follow_redirects=True
        )
        hf_raise_for_status(answer)
        return _parsed(answer.content, url)
    except Exception as error:  # of whatever the hub's client is built on
        if isinstance(error, InputError):
            raise
        first = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise InputError(
            "The dense model's configuration cannot be read.",
            value=f"{model_id}: {first.strip()[:200]}",
            rule="a folder with config.json, or a model of the hub that is cached or reachable",
            remedy="check the name; a gated model needs `hf auth login` or HF_TOKEN; "
            "HF_HUB_OFFLINE=1 finds only what is cached",
        ) from None


def _parsed(content: bytes, place: object) -> dict[str, Any]:
    try:
        config = json.loads(content)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise InputError(
            "The dense model's configuration cannot be read.",
            value=place,
            rule="a config.json as transformers writes it",
            remedy="name a folder or a model of the hub that has one",
        )
    return config


def outline(config: Config) -> dict[str, Any]:
    """The record of a dense model: `family`, `d_model`, `n_layers`, `vocab_size`, `dtype`,
    `parameters`, `layers` (`index`, `d_ff`, `gated`, `activation`, `bias`), `config`.

    Raises:
        InputError: a family that is not known here, or a key of it that is missing.
    """
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise _unknown(f"model_type {kind}")
    family = FAMILIES[kind]
    found = {ours: config.get(family.names.get(ours, key)) for ours, key in NAMES.items()}
    if kind == "gemma":
        found["activation"] = config.get("hidden_activation") or found["activation"]
    if kind == "gpt2" and found["d_ff"] is None and found["d_model"]:
        found["d_ff"] = 4 * found["d_model"]
    missing = [family.names.get(ours, NAMES[ours]) for ours in NAMES if found[ours] is None]
    if missing:
        raise _unknown(f"model_type {kind}, whose configuration lacks {', '.join(missing)}")
    if found["activation"] not in ACTIVATIONS:
        raise _unknown(f"model_type {kind} with {found['activation']}")
    d_model, d_ff, n_layers = (int(found[key] or 0) for key in ("d_model", "d_ff", "n_layers"))
    return {
        "family": kind,
        "d_model": d_model,
        "n_layers": n_layers,
        "vocab_size": found["vocab_size"],
        "dtype": config.get("dtype") or config.get("torch_dtype") or "float32",
        "parameters": _parameters(family, config, found),
        "layers": [
            {"index": k, "d_ff": d_ff, "gated": family.gated}
            | {"activation": ACTIVATIONS[found["activation"]], "bias": family.ffn_bias(config)}
            for k in range(n_layers)
        ],
        "config": dict(config),
    }


def _parameters(family: Family, config: Config, found: Mapping[str, Any]) -> int:
    d_model, d_ff, n_heads = found["d_model"], found["d_ff"], found["n_heads"]
    head = config.get("head_dim") or family.head_dim or d_model // n_heads
    queries = n_heads * head
    keys = (config.get("num_key_value_heads") or n_heads) * head
    attention = d_model * (2 * queries + 2 * keys)
    attention += family.qkv_bias(config) * (queries + 2 * keys) + family.o_bias(config) * d_model
    inner = 2 if family.gated else 1
    ffn = (inner + 1) * d_model * d_ff + family.ffn_bias(config) * (inner * d_ff + d_model)
    norms = family.norms * d_model
    if family.head_norms:
        norms += 2 * head if family.head_norms == "head" else queries + keys
    embeddings = found["vocab_size"] * d_model
    tied = config.get("tie_word_embeddings", family.tied) or not family.language_model
    return (
        found["n_layers"] * (attention + ffn + norms)
        + family.last_norms * d_model
        + embeddings * (1 if tied else 2)
        + family.extra(config, d_model)
    )


def _unknown(what: str) -> InputError:
    return InputError(
        "The dense model cannot be planned for from its configuration.",
        value=what,
        rule=f"one of {', '.join(FAMILIES)}, with the keys that transformers writes",
        remedy="run `dvc repro dense`: it builds the model, and plan reads what it recorded",
    )
