"""Checkpoints to continue from: one safetensors file each, replaced by a rename."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import ArtifactError

CHECKPOINT = "checkpoint.safetensors"
OPTIMIZER = "optimizer"


def save(
    path: Path,
    states: Mapping[str, Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    kept: Mapping[str, Any],
) -> None:
    """Write durably: `states` by name, the optimizer's moments, and JSON values."""
    tensors = {f"{name}/{key}": t for name, state in states.items() for key, t in state.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"{OPTIMIZER}/{index}/{name}": t for name, t in moments.items()}
    detached = {key: t.detach().cpu().clone() for key, t in tensors.items()}
    partial = path.with_suffix(".partial")
    save_file(detached, partial, metadata={"kept": json.dumps(kept)})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def restore(
    path: Path, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The states and values that `save` was given; the optimizer is set to its moments.

    Raises:
        ArtifactError: the file is damaged.
    """
    states: dict[str, dict[str, Tensor]] = {}
    moments: dict[int, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            kept = json.loads(file.metadata()["kept"])
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            "A checkpoint to continue from is damaged.",
            value=f"{path.absolute()}: {error}",
            rule="a whole safetensors file, as this command wrote it",
            remedy="remove the file and run the same command again: it begins anew",
        ) from None
    for name, tensor in tensors.items():
        state, _, key = name.partition("/")
        if state == OPTIMIZER:
            index, moment = key.split("/")
            moments.setdefault(int(index), {})[moment] = tensor
        else:
            states.setdefault(state, {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    return states, kept
