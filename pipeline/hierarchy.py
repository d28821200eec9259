"""The Zarr side of a store: its groups and arrays, their codecs, and files that survive a crash.

Whole shards only, into arrays of their final size. Each file is flushed before it gets its name,
and checksummed on the way; zarr's local store does neither. An object store is written through
zarr's own pipeline, a folder by `encoding.py`: the same bytes.
"""

import asyncio
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from crc32c import crc32c
from torch import Tensor
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore, ObjectStore

from pipeline.artifacts import read_json
from pipeline.commits import FOLDER, Commit, Layout
from pipeline.config import Codec
from pipeline.durable import fsync, unique_partial
from pipeline.encoding import BLOSC, Encoder
from pipeline.errors import ArtifactError
from pipeline.objects import Objects
from pipeline.shards import Bytes, Files, chunk_checksums, damaged, shard_key

STORED = {torch.bfloat16: "uint16", torch.float16: "float16", torch.float32: "float32"}


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
    """An empty store, put in place by one rename; of several at once the first one's stays."""
    partial = unique_partial(path)
    (partial / FOLDER).mkdir(parents=True)
    for key, content in metadata.items():
        (partial / key).parent.mkdir(exist_ok=True)
        _write(partial / key, [content])
    for folder in (partial, *(p for p in partial.rglob("*") if p.is_dir())):
        fsync(folder)
    try:
        partial.rename(path)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        shutil.rmtree(partial)
    fsync(path.parent)


def create_objects(place: Objects, metadata: dict[str, bytes]) -> None:
    """The same on an object store; refuses one that was begun with other settings."""
    if place.size("zarr.json") is not None:
        try:
            found = json.loads(place.content("zarr.json").tobytes())
        except ValueError:
            raise place.damaged("zarr.json", "it is no JSON") from None
        _check_root(place.url, found, json.loads(metadata["zarr.json"]))
    for key, content in metadata.items():
        if place.size(key) != len(content):
            place.put(key, content)


def check(path: Path, metadata: dict[str, bytes]) -> None:
    """Refuse a store that was begun with other settings, naming those that differ."""
    for key, content in metadata.items():
        found, expected = read_json(path / key), json.loads(content)
        if found == expected:
            continue
        if key != "zarr.json":
            raise damaged(path / key, "it does not follow from the settings of the store")
        _check_root(path.absolute(), found, expected)


def _check_root(where: object, found: Any, expected: Any) -> None:
    if found != expected:
        raise ArtifactError(
            "An activation store was begun with other settings.",
            value=f"{where}: {'; '.join(_differences(found, expected))}",
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
    place: Files | Objects,
    layout: Layout,
    array: str,
    start: int,
    rows: Tensor,
    threads: int | None = None,
) -> dict[str, Commit]:
    """Write the whole shard of `array` that begins at row `start`; durable on return.

    Args:
        threads: that encode for a folder; null = as many as torch's.

    Returns:
        The shard's key in `place`, with its size, its crc32c and those of its chunks.
    """
    if isinstance(place, Objects):
        with place.told(array):
            return _put_rows(_Objects(place, layout.chunks_per_shard), array, start, rows)
    key = f"{array}/{shard_key(start // layout.shard_rows)}"
    encoder = Encoder(layout.codec, layout.chunk_rows, layout.chunks_per_shard, threads)
    _write(place.root / key, encoder.pieces(_to_numpy(rows)))
    fsync(place.root / array)
    return {key: encoder.described()}


def _put_rows(store: "_Objects", array: str, start: int, rows: Tensor) -> dict[str, Commit]:
    # A chunk of zeros is data: only what is damaged may be absent. (`open_array(config=...)` is
    # ignored for an array that exists.)
    opened = zarr.open_array(store, path=array, mode="r+")
    opened = opened.with_config({"write_empty_chunks": True})
    opened[start : start + len(rows)] = _to_numpy(rows)
    assert store.described, "zarr's default pipeline writes through the store"
    return store.described


def _to_numpy(rows: Tensor) -> np.ndarray:
    """The stored form: bfloat16 as its bits, which numpy and zarr cannot name."""
    rows = rows.contiguous()
    return (rows.view(torch.uint16) if rows.dtype is torch.bfloat16 else rows).numpy()


class _Objects(ObjectStore):
    """Describes each file as it passes to an object store, where a PUT is durable and atomic."""

    def __init__(self, place: Objects, chunks_per_shard: int) -> None:
        super().__init__(place.store)
        self.place, self.chunks_per_shard = place, chunks_per_shard
        self.described: dict[str, Commit] = {}

    async def set(self, key: str, value: Buffer) -> None:
        await asyncio.to_thread(self._put, key, value.as_numpy_array())

    def _put(self, key: str, value: Bytes) -> None:
        self.place.put(key, value)
        self.described[key] = _describe(value, self.chunks_per_shard)


def _describe(shard: Bytes, chunks_per_shard: int) -> Commit:
    return {
        "size": shard.nbytes,
        "crc32c": crc32c(shard.data),
        "chunks": chunk_checksums(shard, chunks_per_shard),
    }


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Durable under its name; the name itself once the folder is."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
