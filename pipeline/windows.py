"""Layers fitted behind layers that are sparse already, to make up for what those lose.

A layer that is fitted alone learns from the dense model's activations, and meets others when it
runs. With `train.window` the first so many layers are fitted as ever; then the model runs with them
in place, and the next ones are fitted to the inputs that they will meet and to the output that
leads the residual stream back to where the dense model has it behind that layer:

    y = dense_ffn(x) + (stream of the dense model - stream with the earlier layers sparse) / gain

`gain` is 1, or the factor by which a model adds its FFNs' outputs (Granite's residual multiplier).
A model that does something else with them is refused. What comes of it, layer by layer and against
other targets, is in `docs/log.md`.

Shapes: B sequences, S tokens of each, D d_model.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.activations import record_ffn
from pipeline.assembly import shared_copy
from pipeline.discovery import FFNSlot, find_ffns
from pipeline.errors import ConfigError
from pipeline.moe import SparseMoE
from pipeline.passes import Forward

TOLERANCE = 0.02
"""Largest share of a probe that may be missing behind the layer; bf16 rounds that much away."""


def forward_behind(
    model: PreTrainedModel, sparse: Mapping[int, SparseMoE], probe: Tensor
) -> Forward:
    """A pass for `capture.capture_activations` that gives the rows of layers behind sparse ones.

    Args:
        model: the dense model; it stays as it is, and the sparse one shares its weights.
        sparse: the layers in place, before all of those that are asked for.
        probe: (1, S) token ids by which the model's gain is measured, whichever batch is first.

    Raises:
        ConfigError: the model does not add its FFNs' outputs to a residual stream.
    """
    other = shared_copy(model)
    slots, found = find_ffns(model), find_ffns(other)
    for k, moe in sparse.items():
        like = slots[k].weights().up_proj
        found[k].replace(moe.to(like.device, like.dtype).eval())
    gains: dict[int, float] = {}

    def forward(batch: Tensor, layers: Collection[int]) -> dict[int, tuple[Tensor, Tensor]]:
        for k in layers:
            gains[k] = gains.get(k) or _gain(model, slots[k], probe.to(batch.device))
        with _record_streams(model, slots, layers) as wanted:
            model(input_ids=batch, use_cache=False)
        own = {k: found[k] for k in layers}
        with _record_streams(other, found, layers) as streams, record_ffn(own) as recorded:
            other(input_ids=batch, use_cache=False)
        return {k: (x, y + (wanted[k] - streams[k]) / gains[k]) for k, (x, y) in recorded.items()}

    return forward


@contextmanager
def _record_streams(
    model: nn.Module, slots: Sequence[FFNSlot], layers: Collection[int]
) -> Iterator[dict[int, Tensor]]:
    """Yields layer -> (B S, D), the residual stream behind it at the last forward pass."""
    streams: dict[int, Tensor] = {}

    def hook(k: int):
        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            stream = output if isinstance(output, Tensor) else output[0]
            streams[k] = stream.detach().flatten(0, 1)

        return keep

    with ExitStack() as stack:
        for k in layers:
            layer = model.get_submodule(_layer_path(slots[k].path))
            stack.callback(layer.register_forward_hook(hook(k)).remove)
        yield streams


def _layer_path(ffn_path: str) -> str:
    """`model.layers.3` of `model.layers.3.mlp`."""
    found = re.match(r".*?\.\d+(?=\.)", ffn_path)
    assert found, ffn_path
    return found[0]


@torch.no_grad()
def _gain(model: PreTrainedModel, slot: FFNSlot, batch: Tensor) -> float:
    """What becomes, behind the layer, of one more unit in its FFN's output."""
    k, generator = slot.index, torch.Generator().manual_seed(0)
    with _record_streams(model, {k: slot}, [k]) as streams:  # pyright: ignore[reportArgumentType]
        model(input_ids=batch, use_cache=False)
        before = streams[k].float()
        probe = torch.randn(before.shape, generator=generator) * float(before.std())
        probe = probe.to(before.device)

        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + probe.view_as(output).to(output.dtype)

        handle = slot.module.register_forward_hook(add)
        try:
            model(input_ids=batch, use_cache=False)
        finally:
            handle.remove()
    moved = streams[k].float() - before
    gain = float((moved * probe).sum() / probe.square().sum())
    if float((moved - gain * probe).norm()) > TOLERANCE * float(moved.norm()):
        raise ConfigError(
            "The layers cannot be fitted in windows.",
            value=f"{type(model).__name__}, {slot.path}",
            rule="the FFN's output is added to the residual stream, times a constant at most",
            remedy="set train.window=null",
        )
    return gain
