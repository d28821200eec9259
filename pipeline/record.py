"""Records that are read without torch or transformers.

`stages/dense/dense.json` says what the dense model is and where its weights lie: the resolved
revision, the digest of every file and a description; never a copy of somebody else's weights. A
trained layer's `config.json` may name the layers that it was fitted behind.
"""

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.config import ModelConfig
from pipeline.errors import ArtifactError, InputError

PACKAGE = "package:"
RECORD, EMBEDDED = "dense.json", "model"
WEIGHTS, CONFIG = "layer.safetensors", "config.json"  # of a trained layer


def read(folder: Path) -> dict[str, Any]:
    """The record in the verified artefact `folder`."""
    artifacts.verify(folder)
    return artifacts.read_json(folder / RECORD)


def located(model_id: str) -> str:
    """A hub id or a folder as it is; of `package:<name>/<folder>` where that folder is installed.

    The package is found and not imported: none of its code runs.

    Raises:
        InputError: it is not installed.
    """
    if not model_id.startswith(PACKAGE):
        return model_id
    name, _, below = model_id.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    roots = list(spec.submodule_search_locations or []) if spec else []
    folders = [Path(root) / below for root in roots if (Path(root) / below).is_dir()]
    if not folders:
        raise InputError(
            "The package that holds the model is not installed.",
            value=model_id,
            rule="package:<name>/<folder>, of a package that Python can import here",
            remedy=f"pip install {name.replace('_', '-')}",
        )
    return str(folders[0])


def source(model: ModelConfig, folder: Path) -> tuple[str, str | None]:
    """Hub id or folder of the dense model, and its pinned revision.

    Raises:
        ArtifactError: a local model's files are not the ones that were recorded.
    """
    record = read(folder)
    if model.id is None:
        return str(folder / EMBEDDED), None
    place = located(model.id)
    local = Path(place)
    if local.is_dir():
        digests = artifacts.file_digests(local / name for name in record["digests"])
        for (name, recorded), found in zip(record["digests"].items(), digests, strict=True):
            if found != recorded:
                raise ArtifactError(
                    "The dense model changed after it was recorded.",
                    value=local.absolute() / name,
                    rule="every file has the SHA-256 that stages/dense/dense.json recorded",
                    remedy="restore the file, or remove stages/dense and run `dvc repro`",
                )
    return place, record["revision"]


def check_layers(layers: list[int], n_layers: int) -> None:
    """Raise `InputError` when the model does not have one of `layers`."""
    beyond = [k for k in layers if k >= n_layers]
    if beyond:
        raise InputError(
            "The model does not have these layers.",
            value=f"model.layers={layers}",
            rule=f"the model has {n_layers} layers: 0 to {n_layers - 1}",
            remedy=f"remove {beyond} from model.layers",
        )


def check_behind(folders: Mapping[int, Path]) -> None:
    """Refuse a trained layer that was fitted behind others than these (`train.window`).

    Raises:
        ArtifactError: names the layer, and what to run.
    """
    for k, folder in folders.items():
        record = artifacts.read_sealed(folder / CONFIG)
        fitted = {} if "healing" in record else record.get("behind", {})
        for j, digest in fitted.items():
            there = folders.get(int(j))
            if there is None or artifacts.file_digest(there / WEIGHTS) != digest:
                raise ArtifactError(
                    f"Layer {k} was fitted to make up for another layer {j}.",
                    value=f"layer {j} is {there.absolute() if there else 'left dense'}",
                    rule="with train.window a layer runs behind those that it was fitted behind",
                    remedy="run `python -m pipeline prefill` with this configuration, then "
                    f"`dvc repro -f -s train@{k}` and `dvc repro`",
                )


def spans(indices: Iterable[int]) -> str:
    """`0-3, 5` for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
