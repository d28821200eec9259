"""The Zarr side of a store: its groups and arrays, their codecs, and files that survive a crash.

Whole shards only, through zarr's own pipeline, into arrays of their final size. Each file is
flushed before it gets its name, and checksummed on the way; zarr's local store does neither.
"""

import asyncio
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
import zarr
from torch import Tensor
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore, MemoryStore

from pipeline.commits import FOLDER, Commit, Layout
from pipeline.config import Codec
from pipeline.errors import ArtifactError
from pipeline.shards import Bytes, chunk_checksums, damaged
from pipeline.workdir import fsync, read_json

STORED = {torch.bfloat16: "uint16", torch.float16: "float16", torch.float32: "float32"}

# The explicit block sizes alone give 15 % in ratio and 3 times the decoding speed.
BLOSC: dict[Codec, dict[str, Any]] = {
    Codec.compact: {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": 1 << 20},
    Codec.fast: {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 1 << 18},
}


def metadata(layout: Layout, capture: dict[str, Any]) -> dict[str, bytes]:
    """Every `zarr.json` of a store by its path, as zarr itself writes it."""
    files: dict[str, Buffer] = {}
    attributes = layout.attributes(capture)
    root = zarr.create_group(MemoryStore(files), attributes=attributes)
    for split, rows in layout.rows.items():
        group = root.create_group(split)
        for name in layout.arrays:
            group.create_array(
                name,
                shape=(rows, layout.d_model),
                dtype=STORED[layout.dtype],
                chunks=(layout.chunk_rows, layout.d_model),
                shards=(layout.shard_rows, layout.d_model),
                filters=None,
                compressors=_compressors(layout),
                fill_value=0,
                attributes={"logical_dtype": attributes["logical_dtype"]},
                dimension_names=("token", "channel"),
                chunk_key_encoding={"name": "default", "separator": "."},
            )
    return {key: content.to_bytes() for key, content in files.items()}


def _compressors(layout: Layout) -> list[BloscCodec | Crc32cCodec]:
    if layout.codec is Codec.none:
        return [Crc32cCodec()]
    return [BloscCodec(typesize=layout.dtype.itemsize, **BLOSC[layout.codec]), Crc32cCodec()]


def create(path: Path, metadata: dict[str, bytes]) -> None:
    """An empty store, put in place by one rename."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / FOLDER).mkdir(parents=True)
    for key, content in metadata.items():
        (partial / key).parent.mkdir(exist_ok=True)
        _write(partial / key, content)
    for folder in (partial, *(p for p in partial.rglob("*") if p.is_dir())):
        fsync(folder)
    partial.rename(path)
    fsync(path.parent)


def check(path: Path, metadata: dict[str, bytes]) -> None:
    """Refuse a store that was begun with other settings, naming those that differ."""
    for key, content in metadata.items():
        found, expected = read_json(path / key), json.loads(content)
        if found == expected:
            continue
        if key != "zarr.json":
            raise damaged(path / key, "it does not follow from the settings of the store")
        raise ArtifactError(
            "An activation store was begun with other settings.",
            value=f"{path.absolute()}: {'; '.join(_differences(found, expected))}",
            rule="one store, one configuration, one model and one set of tokens",
            remedy="remove the folder, or go back to the settings that it was begun with",
        )


def _differences(found: Any, expected: Any, name: str = "") -> Iterator[str]:
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted(found.keys() | expected.keys()):
            yield from _differences(found.get(key), expected.get(key), f"{name}.{key}")
    elif found != expected:
        yield f"{name.removeprefix('.attributes.')} is {found} there and {expected} here"


def write_rows(
    root: Path, array: str, start: int, rows: Tensor, chunks_per_shard: int
) -> dict[str, Commit]:
    """Write the whole shard of `array` that begins at row `start`; durable on return.

    Returns:
        The shard's path below `root`, with its size, its crc32c and those of its chunks.
    """
    store = _DurableStore(root, chunks_per_shard)
    # A chunk of zeros is data: only what is damaged may be absent. (`open_array(config=...)` is
    # ignored for an array that exists.)
    opened = zarr.open_array(store, path=array, mode="r+")
    opened = opened.with_config({"write_empty_chunks": True})
    opened[start : start + len(rows)] = _to_numpy(rows)
    assert store.described, "zarr's default pipeline writes through the store"
    fsync(root / array)
    return store.described


def _to_numpy(rows: Tensor) -> np.ndarray:
    """The stored form: bfloat16 as its bits, which numpy and zarr cannot name."""
    rows = rows.contiguous()
    return (rows.view(torch.uint16) if rows.dtype is torch.bfloat16 else rows).numpy()


class _DurableStore(LocalStore):
    """Makes each file durable before it gets its name, and describes it as it passes."""

    def __init__(self, root: Path, chunks_per_shard: int) -> None:
        super().__init__(root)
        self.chunks_per_shard = chunks_per_shard
        self.described: dict[str, Commit] = {}

    async def set(self, key: str, value: Buffer) -> None:
        await asyncio.to_thread(self._put, key, value.as_numpy_array())

    def _put(self, key: str, value: Bytes) -> None:
        _write(self.root / key, value.data)
        self.described[key] = {
            "size": value.nbytes,
            "crc32c": google_crc32c.value(value),
            "chunks": chunk_checksums(value, self.chunks_per_shard),
        }


def _write(path: Path, content: bytes | memoryview) -> None:
    """Durable under its name; the name itself once the folder is."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
