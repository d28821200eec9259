"""Checkpoints to continue from: one safetensors file each, replaced by a rename.

safetensors has no checksum of its own, so that the file carries one: a damaged state would be
trained on as if it were right.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline import preflight
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
    metadata = {"kept": json.dumps(kept)}
    save_file(detached, partial, metadata=metadata | {"digest": digest(detached, metadata)})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of everything that a checkpoint restores."""
    sha = hashlib.sha256(metadata.get("kept", "").encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


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
            metadata = file.metadata() or {}
        if metadata.get("digest") != digest(tensors, metadata):
            raise ValueError("it does not match its own digest")
        kept = json.loads(metadata["kept"])
    except (SafetensorError, OSError, ValueError) as error:
        preflight.let_through(error)
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
