"""Sparse layers and healed norms take their places in a dense model, in memory."""

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline import preflight
from pipeline.discovery import find_ffns
from pipeline.errors import ArtifactError, InputError
from pipeline.moe import SparseMoE
from pipeline.record import check_layers

ModelT = TypeVar("ModelT", bound=nn.Module)

NORMS = "norms.safetensors"
"""Beside the layers that were healed with them: the model's norms, by the dense model's names."""


def replace_ffns(
    model: nn.Module, layers: Mapping[int, SparseMoE], float32_routers: Collection[int] = ()
) -> dict[int, str]:
    """Put the layers in, all or none; returns where each lies in the model (`FFNSlot.path`).

    Args:
        float32_routers: layers whose router keeps its precision, whatever the FFN's dtype. A
            rounded threshold or balance bias would send tokens elsewhere.

    Raises:
        InputError: the layers belong to another model.
    """
    slots = find_ffns(model)
    check_layers(list(layers), len(slots))
    for k, moe in layers.items():
        slot = slots[k]
        here, there = (slot.d_model, slot.d_ff), (moe.shape.d_model, moe.shape.d_ff)
        if here != there:
            raise InputError(
                f"Layer {k} was trained for another dense model.",
                value=f"d_model, d_ff {there}; the model has {here}",
                rule="a layer replaces an FFN of the sizes that it was trained on",
                remedy="give the dense model that was captured",
            )
    for k, moe in layers.items():
        like = slots[k].weights().up_proj
        router = copy.deepcopy(moe.router)
        moe.to(like.device, like.dtype)
        if k in float32_routers:
            moe.router = router.to(like.device, torch.float32)
        slots[k].replace(moe.eval())
    return {k: slots[k].path for k in layers}


def shared_copy(model: ModelT) -> ModelT:
    """Modules of its own, the same weights and buffers: one can have modules replaced alone."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)  # pyright: ignore[reportArgumentType]


def find_norms(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of every norm of a model, those inside attention too, by name."""
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False)
    }


def read_norms(folder: Path) -> dict[str, Tensor]:
    """The healed norms that lie beside layers; none where they were not healed.

    Raises:
        ArtifactError: the file is damaged.
    """
    path = folder / NORMS
    if not path.exists():
        return {}
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        preflight.let_through(error)
        raise ArtifactError(
            "The healed norms cannot be read.",
            value=f"{path.absolute()}: {error}",
            rule="a safetensors file, as `heal` wrote it",
            remedy="remove the folder and run `dvc repro`",
        ) from None


@torch.no_grad()
def set_norms(model: nn.Module, norms: Mapping[str, Tensor]) -> None:
    """Give the model these norms, in its own dtypes; all or none.

    Raises:
        InputError: they belong to another model.
    """
    own = find_norms(model)
    foreign = [k for k, t in norms.items() if k not in own or own[k].shape != t.shape]
    if foreign:
        raise InputError(
            "The healed norms belong to another dense model.",
            value=", ".join(foreign),
            rule="every norm has its name and size in the model",
            remedy="give the dense model that the layers were healed in",
        )
    for name, tensor in norms.items():
        own[name].copy_(tensor)
