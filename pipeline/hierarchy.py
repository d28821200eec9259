"""The Zarr side of a store: its groups and arrays, their codecs, and files that survive a crash.

Arrays have their final size from the beginning; `shard_writer.py` fills them, whole shards only.
"""

import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from pipeline.artifacts import read_json
from pipeline.commits import FOLDER, Layout
from pipeline.config import Codec
from pipeline.durable import fsync, unique_partial
from pipeline.encoding import BLOSC
from pipeline.errors import ArtifactError
from pipeline.objects import Objects
from pipeline.shards import damaged

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
        (partial / key).write_bytes(content)
        fsync(partial / key)
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
        if place.size(key) != len(content) or place.content(key).tobytes() != content:
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
