"""A trained layer on disk: `layer_K/{layer.safetensors, config.json, history.csv}`.

`config.json` holds all that is needed to build the layer again and to export it: its index, its
shape, the dtype and the digest of its weights, the host that it was trained for, and how training
went. It vouches for itself and for the weights, wherever the folder lies.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline import artifacts, durable, preflight
from pipeline.errors import ArtifactError, InputError
from pipeline.ffn import ACTIVATIONS
from pipeline.moe import SparseMoE
from pipeline.record import CONFIG, WEIGHTS
from pipeline.router import ROUTER_FUNCTIONS
from pipeline.shape import MoEShape

HISTORY = "history.csv"
NO_SHAPE = (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError, AttributeError)
"""What a record raises that holds no shape of a layer, or one that cannot be built."""


def layer_folders(folder: Path) -> dict[int, Path]:
    """Every `layer_K` in `folder`, by K; `InputError` when there is none, or one is a link out."""
    named = {p.name.removeprefix("layer_"): p for p in folder.glob("layer_*")}
    found = {int(k): p for k, p in named.items() if k.isdecimal()}
    for path in found.values():
        if artifacts.leads_out(path, folder):
            raise InputError(
                "A trained layer lies outside its folder.",
                value=f"{path.absolute()} -> {path.resolve()}",
                rule="layer_K is a folder and no link out of the folder that holds the layers",
                remedy="copy the layer into the folder",
            )
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
    for name in (WEIGHTS, HISTORY):  # durable before the record that says that they are there
        if (folder / name).exists():
            durable.fsync(folder / name)
    written = {
        "shape": asdict(moe.shape),
        "dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch."),
        "weights": artifacts.file_digest(folder / WEIGHTS),
    }
    artifacts.write_sealed(folder / CONFIG, {**record, **written})


def is_complete(folder: Path) -> bool:
    """Whether `save_layer` has ended there and all is sound; its record is the last it writes."""
    if not (folder / CONFIG).is_file():
        return False
    try:
        check_weights(folder)
        read_history(folder)
    except ArtifactError as error:
        print(f"a finished layer is damaged and is made again: {error}", flush=True)
        (folder / CONFIG).unlink()
        return False
    return True


def load_layer(folder: Path, *, mapped: bool = False) -> tuple[SparseMoE, dict[str, Any]]:
    """The layer on the CPU in evaluation mode, and its record.

    Args:
        mapped: the weights stay in their file until they are read, once and by rows; what
            `check_weights` says of them is left to the caller.

    Raises:
        ArtifactError: a file is missing or damaged, or the tensors are not those of the shape.
    """
    shape, record = read_shape(folder)
    if not mapped:
        check_weights(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
        with torch.device("meta"):
            empty = SparseMoE(shape).to(getattr(torch, record["dtype"])).state_dict()
    except (OSError, SafetensorError) as error:
        preflight.let_through(error)
        raise _unusable(folder, str(error)) from None
    except NO_SHAPE as error:
        preflight.let_through(error)
        raise _unusable(folder, f"{CONFIG} holds no shape of a sparse layer") from None
    wanted, found = _described(empty), _described(tensors)
    if wanted != found:
        differing = sorted(wanted.items() ^ found.items())
        raise _unusable(folder, f"its tensors are not those of its shape: {differing}")
    with torch.device("meta" if mapped else "cpu"):
        moe = SparseMoE(shape)
    if mapped:
        like = moe.state_dict()
        tensors = {name: tensor.to(like[name].dtype) for name, tensor in tensors.items()}
    moe.load_state_dict(tensors, assign=mapped)
    return moe.eval(), record


def read_shape(folder: Path) -> tuple[MoEShape, dict[str, Any]]:
    """Shape and record of a layer, whose weights are not read; `ArtifactError` as `load_layer`."""
    record = artifacts.read_sealed(folder / CONFIG)
    try:
        return _sound(MoEShape(**record["shape"])), record
    except NO_SHAPE:
        raise _unusable(folder, f"{CONFIG} holds no shape of a sparse layer") from None


def check_weights(folder: Path) -> None:
    """Refuse weights that are not those that the layer's record vouches for: `ArtifactError`."""
    record = artifacts.read_sealed(folder / CONFIG)
    if artifacts.file_digest(folder / WEIGHTS) != record.get("weights"):
        raise _unusable(folder, f"{WEIGHTS} has not the SHA-256 that {CONFIG} records")


def _sound(shape: MoEShape) -> MoEShape:
    """The shape; `ValueError` where no layer has it, whatever its tensors are."""
    sizes = [shape.d_model, shape.d_ff, shape.d_ff_expert, shape.n_experts, shape.top_k]
    whole = [*sizes, *shape.widths, shape.router_width, shape.d_ff_shared]
    factor, chooses = shape.capacity_factor, shape.routing == "expert_choice"
    sound = (
        all(type(n) is int and n >= 0 for n in whole)
        and min(sizes) > 0
        and shape.top_k <= shape.n_experts == len(shape.widths)
        and max(shape.widths) <= shape.d_ff_expert
        and all(type(b) is bool for b in (shape.gated, shape.bias, shape.balance_bias))
        and (chooses or shape.routing == "token_choice")
        and (isinstance(factor, int | float) and factor > 0 if chooses else factor is None)
        and shape.activation in ACTIVATIONS
        and shape.router_function in ROUTER_FUNCTIONS
    )
    if not sound:
        raise ValueError(shape)
    return shape


def _described(tensors: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each, by name."""
    return {name: (tuple(t.shape), str(t.dtype)) for name, t in tensors.items()}


def write_history(folder: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """One row per validation; the start's has no training losses."""
    names = {name: None for row in reversed(rows) for name in row}
    with (folder / HISTORY).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_history(folder: Path) -> list[dict[str, float]]:
    """What `write_history` was given; `ArtifactError` where a row is no row of numbers."""
    try:
        with (folder / HISTORY).open(encoding="utf-8", newline="") as file:
            rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise _unusable(folder, f"{HISTORY}: {error}") from None
    if not all(math.isfinite(x) for row in rows for x in row.values()):
        raise _unusable(folder, f"{HISTORY} holds what is no number")
    return rows


def _unusable(folder: Path, why: str) -> ArtifactError:
    return ArtifactError(
        "A trained layer cannot be used.",
        value=f"{folder.absolute()}: {why}",
        rule=f"{WEIGHTS} and {CONFIG} as `train` wrote them",
        remedy=artifacts.how_to_redo(folder),
    )
