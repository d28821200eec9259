"""Rows from where the model runs into memory of the host, beside the computation."""

from collections.abc import Callable

import torch
from torch import Tensor


class Transfer:
    """Copies into tensors on the CPU, in their dtype.

    From a GPU through a stream of its own, into pinned memory: the rows are put aside there in the
    dtype of their target, which is a fast copy and leaves the model free to overwrite them, and are
    fetched while the model goes on. From a CPU it is a copy.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __call__(self, target: Tensor, rows: Tensor) -> Callable[[], None]:
        """Copy `rows` (T, D) to `target` (T, D).

        Returns:
            Waits until they are there; in any thread.
        """
        assert target.shape == rows.shape, (target.shape, rows.shape)
        if rows.device.type != "cuda":
            target.copy_(rows)
            return _there
        aside = rows.to(target.dtype, copy=True)
        stream = self._streams.get(rows.device)
        if stream is None:
            stream = self._streams[rows.device] = torch.cuda.Stream(rows.device)
        stream.wait_stream(torch.cuda.current_stream(rows.device))
        with torch.cuda.stream(stream):
            target.copy_(aside, non_blocking=True)
            fetched = torch.cuda.Event(blocking=True)  # or the wait would take a core
            fetched.record(stream)
        aside.record_stream(stream)
        return fetched.synchronize


def _there() -> None:
    pass
