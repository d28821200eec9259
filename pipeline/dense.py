"""The dense model: load it, describe it, choose among its layers.

Where its FFNs lie is found in `pipeline/discovery.py`.
"""

import contextlib
import fnmatch
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipeline import modeling, record, workdir
from pipeline.discovery import find_ffns, text_config
from pipeline.errors import ConfigError, InputError

INDEX = "model.safetensors.index.json"
modeling.register()  # a converted model can be opened here too, with no code of its folder

# Loading


def load_model(
    source: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A model from a local folder or the hub, in evaluation mode, from safetensors only.

    A causal LM where its configuration names one, else the model without a head: an encoder.

    Args:
        device: where it goes, unless `device_map` spreads it as transformers does.

    Raises:
        ConfigError: remote code without a pinned revision.
        InputError: the model is missing, gated or unusable; one line says why.
    """
    _check_source(source, revision, trust_remote_code)
    with _explained(source):
        config = _config(source, revision, trust_remote_code)
        loaded = auto_class(config).from_pretrained(
            source,
            config=config,
            revision=revision,
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # named below, as what is missing is
        )
    model, info = loaded  # type: ignore[misc]
    wrong = {kind: info[kind] for kind in ("missing_keys", "mismatched_keys") if info[kind]}
    if wrong:
        raise InputError(
            "The dense model lacks weights.",
            value=f"{source}: " + "; ".join(f"{k} {sorted(map(str, v))}" for k, v in wrong.items()),
            rule="every tensor that the configuration asks for is there, in its shape",
            remedy="fetch the model again: what is missing would be filled with random numbers",
        )
    return model.eval() if device_map else model.eval().to(device)  # pyright: ignore


def load_tokenizer(
    source: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; `InputError` when there is none."""
    _check_source(source, revision, trust_remote_code)
    with _explained(source):
        return AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )


def resolve(
    source: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """The record of a dense model: pinned revision, SHA-256 of its files, `describe`.

    Reads every byte of the files once.
    """
    described = inspect(source, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)
    commit = described["revision"]
    with _explained(source):
        folder = Path(source if commit is None else snapshot_download(source, revision=commit))
    files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".model"))
    return {"digests": {p.name: workdir.file_digest(p) for p in files}, **described}


def inspect(
    source: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """`describe` and the pinned revision, from the configuration alone: no weight is read."""
    _check_source(source, revision, trust_remote_code)
    with _explained(source):
        config = _config(source, revision, trust_remote_code)
        with torch.device("meta"):
            stored = config.dtype or torch.float32
            model = auto_class(config).from_config(
                config,
                dtype=stored if dtype == "auto" else getattr(torch, dtype),
                trust_remote_code=trust_remote_code,
            )
    return {
        "revision": None if Path(source).is_dir() else config._commit_hash,
        **describe(model),
    }


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """What a model holds, as JSON values: family, sizes, each layer's FFN, its configuration."""
    slots, text = find_ffns(model), text_config(model)
    written = json.loads(model.config.to_json_string(use_diff=False))
    return {
        "family": model.config.model_type,
        "d_model": slots[0].d_model,
        "n_layers": len(slots),
        "vocab_size": getattr(text, "vocab_size", None),  # a vision model has none
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": [
            {"index": s.index, "path": s.path, "d_ff": s.d_ff}
            | {"gated": s.formula.gate is not None}
            | {"activation": s.formula.activation, "bias": s.has_bias}
            | ({"bypassed": list(s.bypassed)} if s.bypassed else {})
            for s in slots
        ],
        "config": {k: v for k, v in written.items() if k != "_name_or_path"},
    }


def _config(source: str, revision: str | None, trust_remote_code: bool) -> PreTrainedConfig:
    return AutoConfig.from_pretrained(
        source, revision=revision, trust_remote_code=trust_remote_code
    )


def auto_class(config: PreTrainedConfig) -> Any:
    """What opens the model: its architecture decides, where the configuration names one."""
    causal, named = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, config.architectures
    if named:
        is_causal = any(a in causal.values() or a.endswith("ForCausalLM") for a in named)
    else:
        is_causal = config.model_type in causal
    return AutoModelForCausalLM if is_causal else AutoModel


def _check_source(source: str, revision: str | None, trust_remote_code: bool) -> None:
    if trust_remote_code and revision is None and not Path(source).is_dir():
        raise ConfigError(
            "Remote code is asked for without saying which.",
            value=f"{source}, revision null",
            rule="code of the hub runs only from a pinned commit",
            remedy="set model.revision to a commit, or model.trust_remote_code=false",
        )
    folder = Path(source)
    if not folder.is_dir():
        return
    names = {p.name for p in folder.glob("*.safetensors")}
    if (folder / INDEX).is_file():
        names |= set(workdir.read_json(folder / INDEX)["weight_map"].values())
    for name in sorted(names):
        inside = (folder / name).resolve().parent == folder.resolve()
        if Path(name).name != name or not inside:
            raise InputError(
                "The model's weights lie outside its folder.",
                value=f"{name} -> {(folder / name).resolve()}",
                rule="weight files are plain names of files in the model's folder",
                remedy="copy the file into the folder, or do not use this model",
            )


@contextlib.contextmanager
def _explained(source: str) -> Iterator[None]:
    """transformers' many ways to fail on a missing or gated model, as one `InputError`."""
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise InputError(
            "The dense model cannot be loaded.",
            value=f"{source}: {first.strip()[:300]}",
            rule="a hub id, or a folder with config.json, safetensors and a tokenizer",
            remedy="check the name; a gated model needs `hf auth login` or HF_TOKEN; "
            "HF_HUB_OFFLINE=1 finds only what is cached",
        ) from None


# Choosing layers


def select_layers(paths: Sequence[str], which: Iterable[int | str] | None) -> list[int]:
    """Indices of the layers that are meant, ascending and each once.

    Args:
        paths: of each layer's FFN, as `find_ffns` gives them.
        which: indices, and patterns of `fnmatch` over the whole path (`*.1?.mlp`); None = all.

    Raises:
        InputError: an index that the model does not have, or a pattern that matches no path.
    """
    chosen: set[int] = set()
    for wanted in range(len(paths)) if which is None else which:
        if isinstance(wanted, int):
            found = [wanted] if 0 <= wanted < len(paths) else []
        else:
            found = [k for k, path in enumerate(paths) if fnmatch.fnmatchcase(path, wanted)]
        if not found:
            raise InputError(
                "The model does not have this layer.",
                value=wanted,
                rule=f"an index from 0 to {len(paths) - 1}, or a pattern over the FFNs' paths: "
                + path_pattern(paths),
                remedy="name a layer that is there; `*` stands for anything, dots too",
            )
        chosen.update(found)
    return sorted(chosen)


def path_pattern(paths: Sequence[str]) -> str:
    """The layers' paths in short: `model.layers.{0-3}.mlp`, numbered as they are in the model."""
    alike: dict[tuple[str, str], list[int]] = {}
    for path in paths:
        head, number, tail = re.split(r"((?<=\.)\d+)(?=\.|$)", path, maxsplit=1)
        alike.setdefault((head, tail), []).append(int(number))
    return ", ".join(f"{h}{{{record.spans(indices)}}}{t}" for (h, t), indices in alike.items())
