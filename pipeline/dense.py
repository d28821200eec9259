"""The dense model: load it, describe it, choose among its layers.

Where its FFNs lie is found in `pipeline/discovery.py`.
"""

import fnmatch
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipeline import artifacts, modeling, record, runtime
from pipeline.config import ModelConfig
from pipeline.discovery import find_ffns, text_config
from pipeline.errors import InputError
from pipeline.pretrained import check_source, explained

RECORDED = (".json", ".safetensors", ".model", ".txt", ".jinja", ".py")
"""Files of a model that decide what it computes, code included."""
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
    check_source(source, revision, trust_remote_code)
    with explained(source):
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
        remedy = "fetch the model again: what is missing would be filled with random numbers"
        if all("pooler" in str(key) for keys in wrong.values() for key in keys):
            remedy = "give an encoder with its pooler: one that predicts masked tokens has none"
        raise InputError(
            "The dense model lacks weights.",
            value=f"{source}: " + "; ".join(f"{k} {sorted(map(str, v))}" for k, v in wrong.items()),
            rule="every tensor that the configuration asks for is there, in its shape",
            remedy=remedy,
        )
    return model.eval() if device_map else model.eval().to(device)  # pyright: ignore


def load_recorded(
    cfg: ModelConfig, folder: Path, device: torch.device, *, in_float32: bool = False
) -> PreTrainedModel:
    """The dense model that an artefact records; raises as `load_model` and `record.source`.

    Args:
        in_float32: whatever `model.dtype` says, and on one device, to be differentiated.
    """
    source, revision = record.source(cfg, folder)
    how: dict[str, Any] = {"dtype": "float32"}
    if not in_float32:
        how = {"dtype": cfg.dtype.name, "device_map": cfg.device_map}
    trusted = cfg.trust_remote_code
    model = load_model(source, revision=revision, device=device, trust_remote_code=trusted, **how)
    runtime.warn_of_emulation(model.dtype, model.device)
    return model


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
    with explained(source):
        folder = Path(source if commit is None else snapshot_download(source, revision=commit))
    files = sorted(p for p in folder.iterdir() if p.suffix in RECORDED)
    digests = zip((p.name for p in files), artifacts.file_digests(files), strict=True)
    return {"digests": dict(digests), **described}


def inspect(
    source: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """`describe` and the pinned revision, from the configuration alone: no weight is read."""
    how = {"revision": revision, "trust_remote_code": trust_remote_code}
    model = skeleton(source, dtype=dtype, **how)
    commit = None if Path(source).is_dir() else model.config._commit_hash
    return {"revision": commit, **describe(model)}


def skeleton(
    source: str, *, revision: str | None, dtype: str, trust_remote_code: bool
) -> PreTrainedModel:
    """The model on the meta device: its modules, no weights; raises as `load_model`."""
    check_source(source, revision, trust_remote_code)
    with explained(source):
        config = _config(source, revision, trust_remote_code)
        stored = config.dtype or torch.float32
        with torch.device("meta"):
            return auto_class(config).from_config(
                config,
                dtype=stored if dtype == "auto" else getattr(torch, dtype),
                trust_remote_code=trust_remote_code,
            )


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """What a model holds, as JSON values: family, sizes, each layer's FFN, its configuration."""
    slots, text = find_ffns(model), text_config(model)
    written = json.loads(model.config.to_json_string(use_diff=False))
    return {
        "family": model.config.model_type,
        "d_model": slots[0].d_model,
        "n_layers": len(slots),
        "vocab_size": getattr(text, "vocab_size", None),  # a vision model has none
        "causal": auto_class(model.config) is AutoModelForCausalLM,
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
