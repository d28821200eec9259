"""Rows on their way from a model's hooks to the stores, written while the model goes on.

They pass through a ring of buffers: a hook waits where none is free. So what is held in memory
depends neither on the number of layers nor on the size of a batch or a shard. On a GPU the buffers
are pinned, and filled by a stream of their own.

Who writes takes what time the model leaves of the cores. At the same priority each thread that
compresses holds up one thread of the model, and so, at the end of each product, all of them.
"""

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from types import TracebackType

import torch
from torch import Tensor

from pipeline.shard_writer import ShardWriter
from pipeline.transfer import Transfer
from pipeline.volume import AT_ONCE, RING, RING_MB

PATIENCE = 1.0
"""Seconds that a hook waits for a buffer before rows are written at the model's own priority: on
cores that others keep busy, what is left of them is nothing."""


class Behind:
    """Writes rows in the order in which it is given them, of each array; several at once.

    Left without an exception, all is written; left with one, what was begun is abandoned.

    Args:
        device: that rows come from.
        d_model: of the rows.
        dtype: of the stores.
        tokens: of the largest batch.
    """

    def __init__(self, device: torch.device, d_model: int, dtype: torch.dtype, tokens: int) -> None:
        self._rows = max(1, min(tokens, int(RING_MB * 1e6 / RING / (d_model * dtype.itemsize))))
        self._transfer = Transfer()
        pinned = device.type == "cuda"  # or a GPU's copies wait for each other
        self._free: SimpleQueue[Tensor] = SimpleQueue()
        for _ in range(RING):
            size = (self._rows, d_model)
            self._free.put(torch.empty(size, dtype=dtype, pin_memory=pinned))
        self._pools = [_Threads(_give_way)]
        self._tasks: dict[object, Future[None]] = {}
        self._shards: set[ShardWriter] = set()
        self.committed = 0
        """Shards of layers, as of the last `check`."""

    def write(self, shard: ShardWriter, side: int, rows: Tensor) -> None:
        """Add `rows`, (T, d_model) on any device, to a side of a shard; they may change after.

        Waits for a free buffer.
        """
        self._shards.add(shard)
        for piece in rows.split(self._rows):
            buffer = self._buffer()
            ready = self._transfer(buffer[: len(piece)], piece)
            before, threads = self._tasks.pop((shard, side), None), self._pools[-1]
            self._tasks[shard, side] = threads.writers.submit(
                self._add, shard, side, buffer, len(piece), ready, before, threads
            )

    def submit(self, work: Callable[[], None]) -> None:
        """Do other work beside it."""
        self._tasks[work] = self._pools[-1].writers.submit(work)

    def check(self) -> None:
        """Raise what went wrong since, if anything did."""
        for key, task in [*self._tasks.items()]:
            if task.done():
                task.result()
                del self._tasks[key]
        done = {shard for shard in self._shards if shard.committed}
        self._shards -= done
        self.committed += len(done)

    def __enter__(self) -> "Behind":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for threads in self._pools:
            threads.writers.shutdown()
            threads.encoders.shutdown()
        for shard in self._shards:
            shard.abandon()
        if error is None:
            self.check()

    def _buffer(self) -> Tensor:
        try:
            return self._free.get(timeout=PATIENCE)
        except Empty:
            if len(self._pools) == 1:
                self._pools.append(_Threads(_nothing))
            return self._free.get()

    def _add(
        self,
        shard: ShardWriter,
        side: int,
        buffer: Tensor,
        rows: int,
        ready: Callable[[], None],
        before: Future[None] | None,
        threads: "_Threads",
    ) -> None:
        try:
            if before:
                before.result()
            ready()
            shard.add(side, buffer[:rows], threads.encoders)
        finally:
            self._free.put(buffer)
        if shard.is_whole(side):
            shard.close(side)


class _Threads:
    """Those that write pieces, and those that encode their chunks."""

    def __init__(self, begin: Callable[[], None]) -> None:
        self.writers = ThreadPoolExecutor(AT_ONCE, "write", begin)
        self.encoders = ThreadPoolExecutor(torch.get_num_threads(), "encode", begin)


def _give_way() -> None:
    """Give this thread, and what it starts, only time that no other wants."""
    if hasattr(os, "SCHED_IDLE"):  # on Linux, where threads are scheduled apart
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            thread = threading.get_native_id()
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))


def _nothing() -> None:
    pass
