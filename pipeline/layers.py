"""A trained layer on disk: `layer_K/{layer.safetensors, config.json, history.csv}`.

`config.json` holds all that is needed to build the layer again and to export it: its index, its
shape, the dtype of its weights, the host that it was trained for, and how training went.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline import workdir
from pipeline.errors import ArtifactError
from pipeline.moe import SparseMoE
from pipeline.shape import MoEShape

WEIGHTS, CONFIG = "layer.safetensors", "config.json"


def save_layer(moe: SparseMoE, folder: Path, record: Mapping[str, Any]) -> None:
    """Write the layer; `record` holds at least `layer` and `host`."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in moe.state_dict().items()}
    save_file(tensors, folder / WEIGHTS)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    shape = asdict(moe.shape)
    workdir.write_json(folder / CONFIG, {**record, "shape": shape, "dtype": dtype})


def load_layer(folder: Path) -> tuple[SparseMoE, dict[str, Any]]:
    """The layer on the CPU, and its record.

    Raises:
        ArtifactError: a file is missing or damaged, or the tensors are not those of the shape.
    """
    record = workdir.read_json(folder / CONFIG)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise _unusable(folder, str(error)) from None
    moe = SparseMoE(MoEShape(**record["shape"]))
    wanted = {name: tuple(t.shape) for name, t in moe.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if wanted != found:
        differing = sorted(wanted.items() ^ found.items())
        raise _unusable(folder, f"its tensors are not those of its shape: {differing}")
    moe.load_state_dict(tensors)
    return moe, record


def _unusable(folder: Path, why: str) -> ArtifactError:
    return ArtifactError(
        "A trained layer cannot be used.",
        value=f"{folder.absolute()}: {why}",
        rule=f"{WEIGHTS} and {CONFIG} as `train` wrote them",
        remedy="remove the folder and run `dvc repro`",
    )
