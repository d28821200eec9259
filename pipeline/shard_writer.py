"""Writes one shard of a layer's store while its rows arrive: committed when it has them all."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline import commits
from pipeline.commits import ARRAYS, Commit, Layout
from pipeline.encoding import Encoder
from pipeline.errors import InputError
from pipeline.objects import Objects
from pipeline.shards import Files


class ShardWriter:
    """Both sides of an FFN may be added to at the same time, each by one thread.

    What was there is removed with the first rows. The output is held against the same rules where
    it is not kept.

    Args:
        path: of the layer's store.
        place: where its shards lie.
        split, k: which shard.
        commit: is given what the files are, by key, when all are durable.
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        place: Files | Objects,
        split: str,
        k: int,
        commit: Callable[[Mapping[str, Commit]], None],
    ) -> None:
        self._path, self._layout, self._place = path, layout, place
        self._split, self._k, self._commit = split, k, commit
        self._start, stop = layout.shard_range(split, k)
        self._rows = stop - self._start
        self._keys = layout.shard_files(split, k)
        self._arrays = [_Array(layout, place, key) for key in self._keys]
        self._taken = [0 for _ in ARRAYS]
        self._lock, self._begun, self._left = threading.Lock(), False, len(ARRAYS)
        self.committed = False

    def add(self, side: int, rows: Tensor, threads: Executor) -> None:
        """Take the next rows of `ARRAYS[side]`: CPU, (rows, d_model) of the store's dtype.

        Args:
            threads: that encode; none of them may wait for this one.

        Raises:
            InputError: a value is NaN or infinite.
        """
        assert rows.shape[1:] == (self._layout.d_model,), rows.shape
        assert rows.dtype == self._layout.dtype, rows.dtype
        self._check_finite(rows, side)
        self._begin()
        self._taken[side] += len(rows)
        assert self._taken[side] <= self._rows, self._taken
        if side < len(self._arrays):
            self._arrays[side].add(rows, threads)

    def is_whole(self, side: int) -> bool:
        """Whether a side has all of its rows."""
        return self._taken[side] == self._rows

    def close(self, side: int) -> None:
        """Make a side that is whole durable; the shard is committed when both are."""
        assert self.is_whole(side), self._taken
        if side < len(self._arrays):
            self._arrays[side].close()
        with self._lock:
            self._left -= 1
            if not self._left:
                made = {k: a.described() for k, a in zip(self._keys, self._arrays, strict=True)}
                self._commit(made)
                self.committed = True

    def _begin(self) -> None:
        with self._lock:
            if self._begun:
                return
            # An existing file may be a hard link: nothing is written into it.
            commits.commit_path(self._path, self._split, self._k).unlink(missing_ok=True)
            for key in (commits.commit_key(self._split, self._k), *self._keys):
                if self._place.size(key) is not None:
                    self._place.delete(key)
            self._begun = True

    def _check_finite(self, rows: Tensor, side: int) -> None:
        # 40 and 20 times as fast as isfinite().all(): one pass, no mask. A sum keeps what is not
        # finite, and NaN goes through to both ends; finite rows may overflow a sum of float16.
        if rows.sum().isfinite() or all(end.isfinite() for end in rows.aminmax()):
            return
        row, channel = (~rows.isfinite()).nonzero()[0].tolist()
        token = self._start + self._taken[side] + row
        remedy = "remove the text that causes it, or load the dense model with model.dtype=float32"
        if self._layout.dtype is torch.float16:
            remedy = "set capture.dtype=bfloat16, which has the range of float32"
        raise InputError(
            f"An activation cannot be stored in {self._path.name}.",
            value=f"{rows[row, channel].item()} in split {self._split}, shard {self._k}, "
            f"array {ARRAYS[side]}, at token {token}, channel {channel}",
            rule=f"every activation is a finite {str(self._layout.dtype).removeprefix('torch.')}",
            remedy=remedy,
        )


class _Array:
    """One file of a shard."""

    def __init__(self, layout: Layout, place: Files | Objects, key: str) -> None:
        self._file = place.create(key)
        self._encoder = Encoder(layout.codec, layout.chunk_rows, layout.chunks_per_shard)

    def add(self, rows: Tensor, threads: Executor) -> None:
        self._file.write(self._encoder.add(_to_numpy(rows), threads))

    def close(self) -> None:
        self._file.write(self._encoder.end())
        self._file.close()

    def described(self) -> Commit:
        return self._encoder.described()


def _to_numpy(rows: Tensor) -> np.ndarray:
    """The stored form: bfloat16 as its bits, which numpy and zarr cannot name."""
    rows = rows.contiguous()
    return (rows.view(torch.uint16) if rows.dtype is torch.bfloat16 else rows).numpy()
