"""One array of the store, read straight from its shard files, wherever they lie.

A shard is a file of independently compressed chunks, each followed by its crc32c, and an index of
(offset, length) pairs, also with its crc32c (Zarr v3, sharding codec). A read is one `pread`, one
checksum and one decompression into the caller's memory: 1.3 to 2.4 times as fast as zarr's own
path, which is the reference in the tests. Every chunk is also held against the checksum that its
commit recorded, so a shard that is whole but lies in another's place is refused too.
"""

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numcodecs.blosc
import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from pipeline.artifacts import expose
from pipeline.durable import NewFile
from pipeline.errors import ArtifactError

# Blosc's own threads are global and not safe under ours; zarr switches them off as well.
numcodecs.blosc.use_threads = False

Bytes = NDArray[np.uint8]

INDEX_ENTRY = 16  # bytes: offset and length, little-endian uint64
CRC = 4
ABSENT = np.uint64(2**64 - 1)  # offset of a chunk that was not written
READ_BLOCK = 1 << 20  # stays in the cache between the read and its checksum


def shard_key(k: int) -> str:
    """File of shard k in its array's folder."""
    return f"c.{k}.0"


def sound_chunks(content: Bytes, chunks_per_shard: int) -> list[int | None]:
    """The crc32c that follows each chunk of a whole shard; None for an absent chunk.

    Empty where the index of the shard is damaged, or there is none.
    """
    size = INDEX_ENTRY * chunks_per_shard + CRC
    if not chunks_per_shard or len(content) < size:
        return []
    index = _parse_index(content[-size:])
    if index is None:
        return []
    ends = [None if offset == ABSENT else int(offset + length) for offset, length in index]
    return [None if end is None else _parse_crc(content[end - CRC : end]) for end in ends]


def file_checksum(path: Path) -> int:
    """crc32c of a file's bytes."""
    crc = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(READ_BLOCK):
            crc = crc32c(block, crc)
    return crc


def damaged(path: Path, why: str) -> ArtifactError:
    expose(path)
    return ArtifactError(
        "An activation store is damaged or incomplete.",
        value=f"{path.absolute()}: {why}",
        rule="every shard lies where its commit says, with the bytes that were committed",
        remedy="run `dvc repro capture`: it writes again what is damaged",
    )


class Place(Protocol):
    """Where the files of a store lie, each under its key: a folder, or an object store."""

    in_flight: int | None
    """Reads at a time that pay; null = as many as there are threads."""

    def size(self, key: str) -> int | None:
        """Bytes; null where there is no such file."""
        ...

    def read(self, key: str, offset: int, *into: Bytes) -> None:
        """Fill the buffers from `offset` on, one behind the other; raises what `damaged` makes."""
        ...

    def checksums(self, key: str, n_chunks: int) -> tuple[int, list[int | None]]:
        """crc32c of the whole file, and those of its chunks where it is sound and has some."""
        ...

    def damaged(self, key: str, why: str) -> ArtifactError:
        """The refusal of one file."""
        ...


class Files:
    """A store's files in its own folder."""

    in_flight: int | None = None

    def __init__(self, root: Path) -> None:
        self.root = root

    def size(self, key: str) -> int | None:
        path = self.root / key
        return path.stat().st_size if path.is_file() else None

    def read(self, key: str, offset: int, *into: Bytes) -> None:
        _pread(self.root / key, offset, *into)

    def checksums(self, key: str, n_chunks: int) -> tuple[int, list[int | None]]:
        path = self.root / key
        empty = not n_chunks or not path.stat().st_size
        content = np.empty(0, np.uint8) if empty else np.memmap(path, np.uint8, "r")
        return file_checksum(path), sound_chunks(content, n_chunks)

    def create(self, key: str) -> NewFile:
        return NewFile(self.root / key)

    def delete(self, key: str) -> None:
        (self.root / key).unlink(missing_ok=True)

    def damaged(self, key: str, why: str) -> ArtifactError:
        return damaged(self.root / key, why)


@dataclass(frozen=True)
class Shard:
    """What a commit recorded of one shard file."""

    size: int  # bytes
    chunks: list[int | None]  # crc32c of each chunk; None beyond the last row


class ShardedArray:
    """The rows of one array, decoded chunk by chunk into the caller's memory.

    Safe to use from several threads at once.

    Args:
        place: holds the shard files below the key `folder`.
    """

    def __init__(
        self,
        place: Place,
        folder: str,
        shards: Sequence[Shard],
        *,
        row_bytes: int,
        chunk_rows: int,
        shard_rows: int,
        compressed: bool,
    ) -> None:
        self.place, self.folder, self.shards = place, folder, shards
        self.row_bytes, self.chunk_rows, self.compressed = row_bytes, chunk_rows, compressed
        self.chunks_per_shard = shard_rows // chunk_rows
        self._indices: dict[int, NDArray[np.uint64]] = {}
        self._reading = [threading.Lock() for _ in shards]  # an index, once

    def read_rows(self, chunk: int, out: Bytes, first: int = 0) -> None:
        """Fill `out` (rows, row_bytes) with the rows of `chunk` from its row `first` on.

        Raises:
            ArtifactError: the chunk is missing, or its bytes are not those committed.
        """
        whole = len(out) == self.chunk_rows
        if whole and not self.compressed:
            self._read(chunk, out.reshape(-1))
            return
        stored = self._read(chunk)
        try:
            if not self.compressed:
                begin = first * self.row_bytes
                out[:] = stored[begin : begin + out.size].reshape(out.shape)
            elif whole:
                numcodecs.blosc.decompress(stored, out)
            else:
                rows = np.empty((self.chunk_rows, self.row_bytes), np.uint8)
                numcodecs.blosc.decompress(stored, rows)
                out[:] = rows[first : first + len(out)]
        except (ValueError, RuntimeError) as error:  # sound, and of another width
            k, local = divmod(chunk, self.chunks_per_shard)
            raise self.place.damaged(self._key(k), f"chunk {local}: {error}") from None

    def _read(self, chunk: int, into: Bytes | None = None) -> Bytes:
        """The stored bytes of a chunk, checked; without `into` good until this thread's next."""
        k, local = divmod(chunk, self.chunks_per_shard)
        key = self._key(k)
        offset, length = map(int, self._index(k, key)[local])
        stored = _scratch.of(length - CRC) if into is None else into
        checksum = np.empty(CRC, np.uint8)
        self.place.read(key, offset, stored, checksum)
        if not crc32c(stored.data) == _parse_crc(checksum) == self.shards[k].chunks[local]:
            raise self.place.damaged(key, f"chunk {local} does not match its checksum")
        return stored

    def _key(self, k: int) -> str:
        return f"{self.folder}/{shard_key(k)}"

    def _index(self, k: int, key: str) -> NDArray[np.uint64]:
        if k in self._indices:
            return self._indices[k]
        with self._reading[k]:
            if k not in self._indices:
                size = INDEX_ENTRY * self.chunks_per_shard + CRC
                tail = np.empty(size, np.uint8)
                self.place.read(key, self.shards[k].size - size, tail)
                index = _parse_index(tail)
                if index is None:
                    raise self.place.damaged(key, "its index does not match its checksum")
                self._indices[k] = index
        return self._indices[k]


class _Scratch(threading.local):
    """Memory for stored bytes, kept: fresh pages cost as much as reading into them."""

    memory = np.empty(0, np.uint8)

    def of(self, size: int) -> Bytes:
        if len(self.memory) < size:
            self.memory = np.empty(size, np.uint8)
        return self.memory[:size]


_scratch = _Scratch()


def _pread(path: Path, offset: int, *into: Bytes) -> None:
    """Fill the buffers from a file, one behind the other."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise damaged(path, "it is missing") from None
    try:
        read = os.preadv(descriptor, [part.data for part in into], offset)
    finally:
        os.close(descriptor)
    if read != sum(map(len, into)):
        raise damaged(path, "it ends early")


def _parse_index(tail: Bytes) -> NDArray[np.uint64] | None:
    """The (offset, length) pairs at the end of a shard; None when their checksum is wrong."""
    if crc32c(tail[:-CRC].data) != _parse_crc(tail[-CRC:]):
        return None
    return tail[:-CRC].view("<u8").reshape(-1, 2)


def _parse_crc(stored: Bytes) -> int:
    return int.from_bytes(stored.tobytes(), "little")
