"""A trained layer on disk: `layer_K/{layer.safetensors, config.json, history.csv}`.

`config.json` holds all that is needed to build the layer again and to export it: its index, its
shape, the dtype of its weights, the host that it was trained for, and how training went.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline import workdir
from pipeline.errors import ArtifactError, InputError
from pipeline.moe import SparseMoE
from pipeline.record import CONFIG, WEIGHTS
from pipeline.shape import MoEShape

HISTORY = "history.csv"


def layer_folders(folder: Path) -> dict[int, Path]:
    """Every `layer_K` in `folder`, by K; `InputError` when there is none."""
    named = {p.name.removeprefix("layer_"): p for p in folder.glob("layer_*")}
    found = {int(k): p for k, p in named.items() if k.isdigit()}
    if not found:
        raise InputError(
            "There are no trained layers.",
            value=folder.absolute(),
            rule="a folder that holds layer_0, layer_1, ...",
            remedy="name the folder that `train` wrote, stages/train",
        )
    return dict(sorted(found.items()))


def save_layer(moe: SparseMoE, folder: Path, record: Mapping[str, Any]) -> None:
    """Write the layer; `record` holds at least `layer` and `host`."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in moe.state_dict().items()}
    save_file(tensors, folder / WEIGHTS)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    shape = asdict(moe.shape)
    workdir.write_json(folder / CONFIG, {**record, "shape": shape, "dtype": dtype})


def is_complete(folder: Path) -> bool:
    """Whether `save_layer` has ended there; its record is the last that it writes."""
    return (folder / CONFIG).is_file()


def load_layer(folder: Path) -> tuple[SparseMoE, dict[str, Any]]:
    """The layer on the CPU in evaluation mode, and its record.

    Raises:
        ArtifactError: a file is missing or damaged, or the tensors are not those of the shape.
    """
    record = workdir.read_json(folder / CONFIG)
    try:
        tensors = load_file(folder / WEIGHTS)
        moe = SparseMoE(MoEShape(**record["shape"]))
    except (OSError, SafetensorError) as error:
        raise _unusable(folder, str(error)) from None
    except (KeyError, TypeError):
        raise _unusable(folder, f"{CONFIG} holds no shape of a sparse layer") from None
    wanted = {name: tuple(t.shape) for name, t in moe.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if wanted != found:
        differing = sorted(wanted.items() ^ found.items())
        raise _unusable(folder, f"its tensors are not those of its shape: {differing}")
    moe.load_state_dict(tensors)
    return moe.eval(), record


def write_history(folder: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """One row per validation; the start's has no training losses."""
    names = {name: None for row in reversed(rows) for name in row}
    with (folder / HISTORY).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_history(folder: Path) -> list[dict[str, float]]:
    with (folder / HISTORY).open(encoding="utf-8", newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def _unusable(folder: Path, why: str) -> ArtifactError:
    return ArtifactError(
        "A trained layer cannot be used.",
        value=f"{folder.absolute()}: {why}",
        rule=f"{WEIGHTS} and {CONFIG} as `train` wrote them",
        remedy="remove the folder and run `dvc repro`",
    )
