"""The activation store on an object store, beside the same store in a folder.

The object store is moto's server on loopback, written in Python on the cores of this very machine:
it is slower than any that is worth the name, and what it can do at all stands beside (`plain`: the
same objects, put and got by obstore alone). `file://` goes through obstore too. Writes are durable:
fsync here, in the memory of the server there. A read is an epoch: every row once, shuffled, in
batches, every byte checked; from the page cache here.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import obstore
from obstore.store import from_url
from torch import Tensor

from benchmarks import measure, s3
from benchmarks.measure import Row
from benchmarks.reading import read_ours
from benchmarks.store import activations, write
from pipeline.config import Codec
from pipeline.store import LayerReader

SIZES = ((3072, 8192),)  # d_model, tokens
TINY = ((64, 2048),)
SHARD_MB = 16.0  # as conf/capture has it


def rows(quick: bool) -> Iterator[Row]:
    with s3.serve("bucket") as environment:
        os.environ.update(environment)
        for d_model, tokens in TINY if quick else SIZES:
            with tempfile.TemporaryDirectory() as name:
                yield from _rows(Path(name), d_model, tokens)


def _rows(folder: Path, d_model: int, tokens: int) -> Iterator[Row]:
    x, y = activations(tokens, d_model, seed=0), activations(tokens, d_model, seed=1)
    size, raw_mb = f"{tokens} x {d_model}, bf16", (x.nbytes + y.nbytes) / 1e6
    urls = {"folder": None, "file": f"file://{folder}/objects", "s3": f"s3://bucket/{tokens}"}
    paths: dict[str, Path] = {}
    ways = {
        name: lambda name=name, url=url: paths.update({name: _write(folder, name, url, x, y)})
        for name, url in urls.items()
    }
    seconds = measure.turns({**ways, "plain": lambda: _put_plain(paths["folder"])})
    stored_mb = sum(p.stat().st_size for p in paths["folder"].rglob("c.*")) / 1e6
    for name in ("file", "s3"):
        yield measure.compare(
            f"objects write, {name} / folder",
            seconds[name],
            seconds["folder"],
            size=size,
            unit="MB/s",
            work=raw_mb,
        )
    yield measure.compare(
        "objects write, s3 / plain puts of the same objects",
        seconds["s3"],
        seconds["plain"],
        size=size,
        unit="MB/s stored",
        work=stored_mb,
    )
    readers = {name: LayerReader(paths[name], store_url=url) for name, url in urls.items()}
    reads: dict[str, Callable[[], object]] = {
        name: lambda name=name: read_ours(readers[name]) for name in urls
    }
    seconds = measure.turns({**reads, "plain": lambda: _get_plain(paths["folder"])})
    for name in ("file", "s3"):
        yield measure.compare(
            f"objects read, shuffled, checksummed, {name} / folder",
            seconds[name],
            seconds["folder"],
            size=size,
            unit="rows/s",
            work=tokens,
        )
    yield measure.compare(
        "objects read, s3 / plain gets of the same objects",
        seconds["s3"],
        seconds["plain"],
        size=size,
        unit="MB/s stored",
        work=stored_mb,
    )


def _write(folder: Path, name: str, url: str | None, x: Tensor, y: Tensor) -> Path:
    """A store in a place of its own, where nothing lies yet."""
    path = Path(tempfile.mkdtemp(prefix=name, dir=folder)) / "layer_0.zarr"
    write(path, Codec.compact, x, y, SHARD_MB, url)
    return path


def _put_plain(folder: Path) -> None:
    """One object after the other, as a capture writes them."""
    store = _plain()
    for path in sorted(folder.rglob("c.*")):
        obstore.put(store, str(path.relative_to(folder)), path)


def _get_plain(folder: Path) -> None:
    """Whole objects, several at once, as far as the server goes."""
    store = _plain()
    keys = [str(path.relative_to(folder)) for path in folder.rglob("c.*")]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda key: obstore.get(store, key).bytes(), keys))


def _plain() -> Any:
    return from_url("s3://bucket/plain")
