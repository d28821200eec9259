"""Writing the activation store beside the Arrow cache that trainers of sparse autoencoders keep.

The rows are normal numbers with a scale of their own per channel, in bfloat16. Our writes are made
durable (fsync), the Arrow cache's are not: it is written in a process of its own, as its users
write it, and once more in ours, which keeps freed memory and has huge pages (`runtime.configure`).

`python -m benchmarks.store FOLDER TOKENS D_MODEL` writes that cache once for each line it is given.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from datasets import Array2D, Dataset, Features, disable_progress_bars
from torch import Tensor

from benchmarks import measure
from benchmarks.measure import Row
from pipeline.config import Codec
from pipeline.store_writer import LayerWriter

SEQUENCE = 512
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
    writes: dict[str, Callable[[], object]] = {
        codec.name: partial(write, folder / codec.name, codec, x, y)
        for codec in (Codec.compact, Codec.fast, Codec.none)
    }
    writes["arrow_here"] = partial(write_arrow, folder / "arrow_here", x, y)
    with _arrow_users(folder / "arrow", tokens, d_model) as write_theirs:
        seconds = measure.turns(
            {**writes, "arrow": write_theirs},
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


def activations(tokens: int, d_model: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale_D = torch.randn(d_model, generator=generator).exp()
    return (torch.randn(tokens, d_model, generator=generator) * scale_D).bfloat16()


def write(
    path: Path,
    codec: Codec,
    x: Tensor,
    y: Tensor,
    shard_mb: float = SHARD_MB,
    store_url: str | None = None,
) -> None:
    writer = LayerWriter.open(
        path,
        rows={"train": len(x)},
        d_model=x.shape[1],
        dtype=x.dtype,
        sequence_length=SEQUENCE,
        codec=codec,
        shard_mb=shard_mb,
        chunk_mb=CHUNK_MB,
        attributes={},
        store_url=store_url,
    )
    for k in range(writer.n_shards["train"]):
        part = slice(*writer.layout.shard_range("train", k))
        writer.write_shard("train", k, x[part], y[part])


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

        def write_theirs() -> None:
            given.write("write\n")
            wait_for("written")

        wait_for("ready")
        yield write_theirs


def main() -> None:
    path, tokens, d_model = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    x, y = activations(tokens, d_model, seed=0), activations(tokens, d_model, seed=1)
    print("ready", flush=True)
    for _ in sys.stdin:
        write_arrow(path, x, y)
        print("written", flush=True)


if __name__ == "__main__":
    main()
