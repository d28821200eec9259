"""The activation store beside zarr's own path, a raw memmap, and the Arrow cache that trainers of
sparse autoencoders keep.

The rows are normal numbers with a scale of their own per channel, in bfloat16. A read is an epoch:
every row once, shuffled, in batches. Files are in the page cache. Our writes are made durable
(fsync), the Arrow cache's are not: it is written in a process of its own, as its users write it,
and once more in ours, which keeps freed memory and has huge pages (`runtime.configure`).

`python -m benchmarks.store FOLDER TOKENS D_MODEL` writes that cache once for each line it is given.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import zarr
from datasets import Array2D, Dataset, Features, disable_progress_bars
from torch import Tensor

from benchmarks import measure
from benchmarks.measure import Row
from pipeline import shuffle
from pipeline.config import Codec
from pipeline.store import MIX_CHUNKS, LayerReader
from pipeline.store_writer import LayerWriter

SEQUENCE = 512
BATCH = 2048
SHARD_MB, CHUNK_MB = 100.0, 2.0
SIZES = ((1024, 16384), (3072, 32768))  # d_model, tokens
TINY = ((64, 2048),)


def rows(quick: bool) -> Iterator[Row]:
    for d_model, tokens in TINY if quick else SIZES:
        with tempfile.TemporaryDirectory() as name:
            yield from _rows(Path(name), d_model, tokens)


def _rows(folder: Path, d_model: int, tokens: int) -> Iterator[Row]:
    x, y = activations(tokens, d_model, seed=0), activations(tokens, d_model, seed=1)
    size = f"{tokens} x {d_model}, bf16"
    raw_mb = (x.nbytes + y.nbytes) / 1e6
    writes = {
        codec.name: _writer(folder / codec.name, codec, x, y)
        for codec in (Codec.compact, Codec.fast, Codec.none)
    }
    writes["arrow_here"] = lambda: write_arrow(folder / "arrow_here", x, y)
    with _arrow_users(folder / "arrow", tokens, d_model) as write:
        seconds = measure.turns(
            {**writes, "arrow": write},
            before=lambda name: shutil.rmtree(folder / name, ignore_errors=True),
        )
    for codec, other, goal in (
        ("compact", "arrow", ""),
        ("fast", "arrow", ">= 2"),
        ("none", "arrow", ""),
        ("fast", "arrow_here", ""),
    ):
        also = ", with our memory settings" * (other == "arrow_here")
        yield measure.compare(
            f"store write, {codec} / Arrow cache of the same bytes{also}",
            seconds[codec],
            seconds[other],
            size=size,
            unit="MB/s",
            work=raw_mb,
            reach=goal,
        )
    for codec, goal in (("compact", "<= 0.69"), ("fast", "")):
        taken = sum(p.stat().st_size for p in (folder / codec).rglob("*") if p.is_file()) / 1e6
        yield Row(
            f"store size, {codec} / raw", size, "MB", taken, raw_mb, taken / raw_mb,
            (taken / raw_mb,) * 2, goal,
        )  # fmt: skip
    np.stack([_bits(x), _bits(y)]).tofile(folder / "raw")
    raw = np.memmap(folder / "raw", np.uint16, "r", shape=(2, tokens, d_model))
    readers = {codec: LayerReader(folder / codec) for codec in ("compact", "none")}
    reads: dict[str, Callable[[], object]] = {
        "compact": lambda: read_ours(readers["compact"]),
        "none": lambda: read_ours(readers["none"]),
        "kept": lambda: read_ours(readers["none"], in_memory=True),
        "zarr": lambda: read_zarr(folder / "compact", tokens),
        "memmap": lambda: read_memmap(raw, tokens),
    }
    seconds = measure.turns(reads)
    wide = d_model == 3072
    for ours, words, reference, goal in (
        ("compact", "codec compact", "zarr", ">= 2"),
        ("none", "codec none", "memmap", ">= 1.0"),
        ("kept", "codec none, split kept in memory", "memmap", ">= 1.0"),
    ):
        yield measure.compare(
            f"store read, shuffled, checksummed, {words} / {reference}",
            seconds[ours],
            seconds[reference],
            size=size,
            unit="rows/s",
            work=tokens,
            reach=goal if wide else "",
        )


def activations(tokens: int, d_model: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale_D = torch.randn(d_model, generator=generator).exp()
    return (torch.randn(tokens, d_model, generator=generator) * scale_D).bfloat16()


def _writer(path: Path, codec: Codec, x: Tensor, y: Tensor) -> Callable[[], None]:
    def write() -> None:
        writer = LayerWriter.open(
            path,
            rows={"train": len(x)},
            d_model=x.shape[1],
            dtype=x.dtype,
            sequence_length=SEQUENCE,
            codec=codec,
            shard_mb=SHARD_MB,
            chunk_mb=CHUNK_MB,
            attributes={},
        )
        for k in range(writer.n_shards["train"]):
            part = slice(*writer.layout.shard_range("train", k))
            writer.write_shard("train", k, x[part], y[part])

    return write


def write_arrow(path: Path, x: Tensor, y: Tensor) -> None:
    """As SAELens caches activations: a Dataset of tensors of whole sequences, saved to disk."""
    shape = (SEQUENCE, x.shape[1])
    kind = Array2D(shape=shape, dtype="float16")  # Arrow has no bfloat16: the same bits
    columns = {
        name: rows.view(torch.float16).reshape(-1, *shape)
        for name, rows in (("input", x), ("output", y))
    }
    features = Features(dict.fromkeys(columns, kind))
    disable_progress_bars()
    Dataset.from_dict(columns, features=features).save_to_disk(str(path))


@contextlib.contextmanager
def _arrow_users(path: Path, tokens: int, d_model: int) -> Iterator[Callable[[], None]]:
    """Writes the cache in a process whose memory is managed as by default."""
    line = [sys.executable, "-m", "benchmarks.store", str(path), str(tokens), str(d_model)]
    environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen(line, env=environment, **pipes) as process:
        given, told = process.stdin, process.stdout
        assert given and told

        def wait_for(word: str) -> None:
            if told.readline() != f"{word}\n":
                raise RuntimeError(f"ended before it was {word}: {' '.join(line)}")

        def write() -> None:
            given.write("write\n")
            wait_for("written")

        wait_for("ready")
        yield write


def read_ours(reader: LayerReader, *, in_memory: bool = False) -> None:
    for _ in reader.batches("train", BATCH, seed=0, epoch=0, in_memory=in_memory):
        pass


def read_zarr(path: Path, tokens: int) -> None:
    """The same chunks in the same order, decoded by zarr and gathered alike."""
    arrays = [zarr.open_array(str(path / "train" / name), mode="r") for name in ("input", "output")]
    size = arrays[0].chunks[0]
    order = shuffle.permutation(-(-tokens // size), 0, 0, "train", "chunks").tolist()

    def windows() -> Iterator[tuple[Tensor, shuffle.Pair]]:
        for w in range(0, len(order), MIX_CHUNKS):
            picked = order[w : w + MIX_CHUNKS]
            pair = tuple(
                torch.from_numpy(np.concatenate([a[c * size : (c + 1) * size] for c in picked]))
                for a in arrays
            )
            yield shuffle.permutation(len(pair[0]), 0, 0, "train", w), pair

    for _ in shuffle.batches(windows(), BATCH):
        pass


def read_memmap(raw: np.memmap, tokens: int) -> None:
    """Rows in random order straight out of the page cache, both sides at hand; nothing is checked.

    A batch is held until there is a next one, as a loop over ours holds it.
    """
    arrays = [torch.from_numpy(part.view(np.int16)) for part in np.asarray(raw)]
    order = shuffle.permutation(tokens, 0, 0)
    batch = None
    for rows_ in order.split(BATCH):
        batch = [array.index_select(0, rows_) for array in arrays]
    del batch


def _bits(rows_: Tensor) -> np.ndarray:
    return rows_.view(torch.uint16).numpy()


def main() -> None:
    path, tokens, d_model = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    x, y = activations(tokens, d_model, seed=0), activations(tokens, d_model, seed=1)
    print("ready", flush=True)
    for _ in sys.stdin:
        write_arrow(path, x, y)
        print("written", flush=True)


if __name__ == "__main__":
    main()
