"""Forward passes of the dense model that fill buffers with both sides of its FFNs.

The hooks copy rows straight to where a shard is written from, in the dtype of the store. A pass
ends behind the last FFN that is wanted: no logits are computed.
"""

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from pipeline.activations import OUTPUT, Keep, hook_ffn
from pipeline.discovery import FFNSlot
from pipeline.transfer import Transfer

Forward = Callable[[Tensor, Collection[int]], Mapping[int, tuple[Tensor, Tensor]]]
"""(B, S) token ids and layers -> each layer's FFN input and output, (B S, D) each."""

Record = Callable[[Tensor, Collection[int], Keep], object]
"""(B, S) token ids and layers: gives both sides of each layer's FFN while it runs."""

Rows = dict[int, tuple[Tensor, Tensor]]
"""Layer -> its FFN's input and output, (T, D) each, on the CPU in the dtype of the store."""


class Passes:
    """Runs a model over a shard's sequences at a time, into two sets of buffers by turns.

    Args:
        device: that batches are given to.
        record: runs the model over a batch.
        batch_size: of a pass [sequences].
        d_model: of each layer whose rows are wanted.
        tokens: of the largest shard.
        dtype: of the store.
    """

    def __init__(
        self,
        device: torch.device,
        record: Record,
        batch_size: int,
        d_model: Mapping[int, int],
        tokens: int,
        dtype: torch.dtype,
    ) -> None:
        self._device, self._record, self._batch_size = device, record, batch_size
        self._transfer = Transfer()
        pinned = device.type == "cuda"  # or a GPU's copies wait for each other

        def buffers() -> Rows:
            made = {
                (k, side): torch.empty((tokens, d), dtype=dtype, pin_memory=pinned)
                for k, d in d_model.items()
                for side in (0, 1)
            }
            return {k: (made[k, 0], made[k, 1]) for k in d_model}

        self._buffers = buffers(), buffers()
        self._turn = 0

    @torch.inference_mode()
    def rows(self, sequences: Tensor, layers: Collection[int]) -> Rows:
        """Both sides of `layers`; good until the call after the next."""
        self._turn = 1 - self._turn
        buffers, at = self._buffers[self._turn], 0
        for batch in sequences.split(self._batch_size):
            part = slice(at, at + batch.numel())
            self._transfer.wait()  # no more than one batch's rows wait on a GPU
            self._run(batch, {k: (buffers[k][0][part], buffers[k][1][part]) for k in layers})
            at = part.stop
        self._transfer.wait()
        return {k: (buffers[k][0][:at], buffers[k][1][:at]) for k in layers}

    def _run(self, batch: Tensor, targets: Rows) -> None:
        given: set[tuple[int, int]] = set()

        def keep(layer: int, side: int, rows: Tensor) -> None:
            self._transfer(targets[layer][side], rows)
            given.add((layer, side))

        self._record(batch.to(self._device), targets.keys(), keep)
        assert len(given) == 2 * len(targets), "an FFN was not run"


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
