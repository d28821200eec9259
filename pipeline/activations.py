"""Hooks that give each layer's FFN input and output while a model runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from pipeline.discovery import FFNSlot

INPUT, OUTPUT = 0, 1
"""The sides of an FFN."""

Keep = Callable[[int, int, Tensor], object]
"""Called with (layer, side, rows). The rows, (tokens, d_model), detached and on the model's device,
in the order of the batch's tokens, are the model's own: Falcon adds to its FFN's output in place,
so who wants them later copies them."""


@contextmanager
def hook_ffn(places: Mapping[int, FFNSlot | nn.Module], keep: Keep) -> Iterator[None]:
    """Give `keep` both sides of the FFNs at `places` (layer -> its FFN) at each forward pass.

    A slot is hooked, be its FFN dense or replaced. The hooks are gone when the context ends,
    however it ends.
    """

    def enter(layer: int):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            keep(layer, INPUT, _rows(inputs[0]))

        return hook

    def leave(layer: int):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            keep(layer, OUTPUT, _rows(output))

        return hook

    with ExitStack() as stack:
        for layer, place in places.items():
            slot = isinstance(place, FFNSlot)
            first, last = (place.entry, place.module) if slot else (place, place)
            stack.callback(first.register_forward_pre_hook(enter(layer)).remove)
            stack.callback(last.register_forward_hook(leave(layer)).remove)
        yield


@contextmanager
def record_ffn(
    places: Mapping[int, FFNSlot | nn.Module],
) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Hook `places`; yields layer -> (ffn_input, ffn_output), copies, replaced at each pass."""
    recorded: dict[int, tuple[Tensor, Tensor]] = {}
    given: dict[int, Tensor] = {}

    def keep(layer: int, side: int, rows: Tensor) -> None:
        if side == INPUT:
            given[layer] = rows.clone()
        else:
            recorded[layer] = (given.pop(layer), rows.clone())

    with hook_ffn(places, keep):
        yield recorded


def _rows(states: Tensor) -> Tensor:
    """(..., D) -> (T, D)."""
    return states.detach().reshape(-1, states.shape[-1])
