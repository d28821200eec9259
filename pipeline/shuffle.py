"""Shuffled batches of rows: seeded, and resumable at any batch without reading what came before.

The epoch's rows are cut into windows and every window is permuted as a whole. One window that
holds everything is a full permutation; many are a mix of that many randomly chosen chunks. A
batch may span windows, so the batches depend on the windows and never on where one resumed.
Permutations come from Philox under a SHA-256 of what they are for: the same everywhere.
"""

import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
T = TypeVar("T")


def permutation(n: int, *purpose: object) -> Tensor:
    """A permutation of range(n), int64, determined by n and `purpose`."""
    return torch.from_numpy(generator(*purpose).permutation(n))


def generator(*purpose: object) -> np.random.Generator:
    """Random numbers determined by `purpose`."""
    key = hashlib.sha256(repr(purpose).encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def locate(sizes: Sequence[int], row: int) -> tuple[int, int]:
    """(window, row within it) of a row of the epoch; (len(sizes), ...) when it lies beyond."""
    for window, size in enumerate(sizes):
        if row < size:
            return window, row
        row -= size
    return len(sizes), row


def prefetch(load: Callable[[int], T], items: Sequence[int]) -> Generator[T, None, None]:
    """`load` of each item in order, the next one loading in a thread while one is used."""
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(load, items[0])
        for item in items[1:]:
            ready, ahead = ahead.result(), thread.submit(load, item)
            yield ready
        yield ahead.result()


def batches(windows: Iterable[tuple[Tensor, Pair]], batch_size: int) -> Iterator[Pair]:
    """Batches over windows of (row order, (input, output)); the ragged last one is dropped.

    A window's tensors are read before the next window is asked for, and never after.
    """
    pieces: list[Pair] = []
    missing = batch_size
    for order, (x, y) in windows:
        for rows in _cut(order, missing, batch_size):
            pieces.append((_gather(x, rows), _gather(y, rows)))
            missing -= len(rows)
            if not missing:
                yield pieces[0] if len(pieces) == 1 else _join(pieces)
                pieces, missing = [], batch_size


def _gather(rows_TD: Tensor, order: Tensor) -> Tensor:
    """The rows of `order`, as bits: gathering bfloat16 itself took a third longer on a CPU."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[rows_TD.dtype.itemsize]
    return rows_TD.view(bits).index_select(0, order).view(rows_TD.dtype)


def _cut(order: Tensor, first: int, size: int) -> list[Tensor]:
    """`order` in pieces: one of `first` rows, the rest of `size`, the last what is left."""
    head, tail = order[:first], order[first:]
    return [piece for piece in (head, *tail.split(size)) if len(piece)]


def _join(pieces: list[Pair]) -> Pair:
    inputs, outputs = zip(*pieces, strict=True)
    return torch.cat(inputs), torch.cat(outputs)
