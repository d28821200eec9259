"""Hooks that give each layer's FFN input and output while a model runs."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from pipeline.discovery import FFNSlot


@contextmanager
def record_ffn(
    places: Mapping[int, FFNSlot | nn.Module],
) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Hook `places` (layer -> its FFN); yields layer -> (ffn_input, ffn_output).

    A slot is recorded, be its FFN dense or replaced. Both are (tokens, d_model), detached, on
    the model's device, in the order of the batch's tokens, and replaced at each forward pass. The
    hooks are gone when the context ends, however it ends.
    """
    recorded: dict[int, tuple[Tensor, Tensor]] = {}
    given: dict[int, Tensor] = {}

    def enter(layer: int):
        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            given[layer] = _rows(inputs[0])

        return keep

    def leave(layer: int):
        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            recorded[layer] = (given.pop(layer), _rows(output))

        return keep

    with ExitStack() as stack:
        for layer, place in places.items():
            slot = isinstance(place, FFNSlot)
            first, last = (place.entry, place.module) if slot else (place, place)
            stack.callback(first.register_forward_pre_hook(enter(layer)).remove)
            stack.callback(last.register_forward_hook(leave(layer)).remove)
        yield recorded


def _rows(states: Tensor) -> Tensor:
    """(..., D) -> (T, D), copied: Falcon adds to its FFN's output in place."""
    return states.detach().clone().reshape(-1, states.shape[-1])
