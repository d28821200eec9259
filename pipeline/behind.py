"""Rows on their way from a model's hooks to the stores, in a ring of buffers.

A hook waits where none is free. So what is held of rows does not grow with the number of layers,
nor with a batch or a shard, but for a chunk of each array whose rows have not all come, and for
compressed shards where an object store takes them whole. On a GPU the buffers are pinned, and
filled by a stream of their own.

Rows are written while the model goes on, where it leaves a core to do it. Where it takes all of
them, model and writers take turns whenever the ring is full: each thread that compressed beside it
would hold up one of the model's, and so, at the end of each product, all of them.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from threading import Semaphore
from types import TracebackType

import torch
from torch import Tensor

from pipeline import runtime
from pipeline.shard_writer import ShardWriter
from pipeline.transfer import Transfer
from pipeline.volume import AT_ONCE, RING, RING_MB


class Behind:
    """Writes rows in the order in which it is given them, of each array; several at once.

    When it is left, what it was given is written; where no exception was raised, every shard has
    all of its rows and is committed.

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
        threads = torch.get_num_threads()
        self._beside = device.type != "cpu" or threads < runtime.cores()
        self._given: list[tuple[ShardWriter, int, Tensor, int, Callable[[], None]]] = []
        self._writers, self._closers = ThreadPoolExecutor(AT_ONCE), ThreadPoolExecutor(AT_ONCE)
        self._unclosed = Semaphore(AT_ONCE)  # a store may be slower than the model
        self._encoders = ThreadPoolExecutor(threads)
        self._tasks: dict[object, Future[None]] = {}
        self._shards: set[ShardWriter] = set()
        self.committed = 0
        """Shards of layers, as of the last `check`."""

    def write(self, shard: ShardWriter, side: int, rows: Tensor) -> None:
        """Add `rows`, (T, d_model) on any device, to a side of a shard; they may change after.

        Waits for a free buffer, or for all of them.
        """
        self._shards.add(shard)
        for piece in rows.split(self._rows):
            if self._free.empty() and not self._beside:
                self._take_turn()
            buffer = self._free.get()
            ready = self._transfer(buffer[: len(piece)], piece)
            self._given.append((shard, side, buffer, len(piece), ready))
            if self._beside:
                self._begin()

    def submit(self, work: Callable[[], None]) -> None:
        """Do other work beside it."""
        self._tasks[work] = self._writers.submit(work)

    def check(self) -> None:
        """Raise what went wrong since, if anything did: of what was given first."""
        tasks = self._tasks.copy()  # writers add to it
        done = {key: task for key, task in tasks.items() if task.done()}
        if any(task.exception() for task in done.values()):
            for task in tasks.values():
                task.result()
        for key in done:
            del self._tasks[key]
        committed = {shard for shard in self._shards if shard.committed}
        self._shards -= committed
        self.committed += len(committed)

    def __enter__(self) -> "Behind":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._begin()
        for pool in (self._writers, self._encoders, self._closers):
            pool.shutdown()
        if error is None:
            self.check()
            assert not self._shards, "a shard did not get all of its rows"

    def _begin(self) -> None:
        """Have written what was given, each piece once however this ends."""
        given, self._given = self._given, []
        for shard, side, *rows in given:
            before = self._tasks.pop((shard, side), None)
            task = self._writers.submit(self._add, shard, side, *rows, before)  # pyright: ignore
            self._tasks[shard, side] = task

    def _take_turn(self) -> None:
        """Wait until all rows that were given are written; they may not be durable then."""
        self._begin()
        for buffer in [self._free.get() for _ in range(RING)]:
            self._free.put(buffer)

    def _add(
        self,
        shard: ShardWriter,
        side: int,
        buffer: Tensor,
        rows: int,
        ready: Callable[[], None],
        before: Future[None] | None,
    ) -> None:
        try:
            ready()  # before anything fails: the buffer is filled anew
            if before:
                before.result()
            shard.add(side, buffer[:rows], self._encoders)
            if shard.is_whole(side):  # others wait for the disk
                self._unclosed.acquire()
                self._tasks[shard, side, "close"] = self._closers.submit(self._close, shard, side)
        finally:
            self._free.put(buffer)

    def _close(self, shard: ShardWriter, side: int) -> None:
        try:
            shard.close(side)
        finally:
            self._unclosed.release()
