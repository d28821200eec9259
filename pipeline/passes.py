"""Forward passes of the dense model that give both sides of its FFNs while they run.

A pass ends behind the last FFN that is wanted: no logits are computed.
"""

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence

from torch import Tensor, nn

from pipeline.activations import OUTPUT, Keep, hook_ffn
from pipeline.discovery import FFNSlot

Forward = Callable[[Tensor, Collection[int]], Mapping[int, tuple[Tensor, Tensor]]]
"""(B, S) token ids and layers -> each layer's FFN input and output, (B S, D) each."""

Record = Callable[[Tensor, Collection[int], Keep], object]
"""(B, S) token ids and layers: gives both sides of each layer's FFN while it runs."""


class _EndError(Exception):
    """Nothing is wanted of the rest of a forward pass."""


def of_model(model: nn.Module, slots: Sequence[FFNSlot]) -> Record:
    """The model's own pass, as far as it is needed."""

    def record(batch: Tensor, layers: Collection[int], keep: Keep) -> None:
        wanted = set(layers)

        def take(layer: int, side: int, rows: Tensor) -> None:
            keep(layer, side, rows)
            if side == OUTPUT:
                wanted.discard(layer)
            if not wanted:
                raise _EndError

        places = {layer: slots[layer] for layer in layers}
        with contextlib.suppress(_EndError), hook_ffn(places, take):
            model(input_ids=batch, use_cache=False)

    return record


def of_forward(forward: Forward) -> Record:
    """A pass that gives all of it in the end."""

    def record(batch: Tensor, layers: Collection[int], keep: Keep) -> None:
        for layer, pair in forward(batch, layers).items():
            for side, rows in enumerate(pair):
                keep(layer, side, rows)

    return record
