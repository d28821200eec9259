"""Reading the activation store beside zarr's own path and a raw memmap.

A read is an epoch: every row once, shuffled, in batches; ours checks every byte that comes from a
file, and zarr its own checksums. Files are in the page cache. They are written by another process:
a reader does not have the memory that a writer leaves behind, of small pages.
"""

import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import zarr
from torch import Tensor

from benchmarks import measure
from benchmarks.measure import Row
from benchmarks.store import SIZES, TINY, activations, write
from pipeline import shuffle
from pipeline.config import Codec
from pipeline.shards import file_checksum
from pipeline.store import MIX_CHUNKS, LayerReader

BATCH = 2048


def rows(quick: bool) -> Iterator[Row]:
    for d_model, tokens in TINY if quick else SIZES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            other = multiprocessing.get_context("spawn").Process(
                target=prepare, args=(folder, tokens, d_model)
            )
            other.start()
            other.join()
            if other.exitcode:
                raise RuntimeError(f"what writes the stores ended with {other.exitcode}")
            yield from _rows(folder, tokens, d_model)


def prepare(folder: Path, tokens: int, d_model: int) -> None:
    """The same rows as stores and as one raw file."""
    x, y = activations(tokens, d_model, seed=0), activations(tokens, d_model, seed=1)
    for codec in (Codec.compact, Codec.none):
        write(folder / codec.name, codec, x, y)
    np.stack([_bits(x), _bits(y)]).tofile(folder / "raw")


def _rows(folder: Path, tokens: int, d_model: int) -> Iterator[Row]:
    raw = np.memmap(folder / "raw", np.uint16, "c", shape=(2, tokens, d_model))
    readers = {codec: LayerReader(folder / codec) for codec in ("compact", "none")}
    ways: dict[str, Callable[[], object]] = {
        "compact": lambda: read_ours(readers["compact"]),
        "none": lambda: read_ours(readers["none"]),
        "kept": lambda: read_ours(readers["none"], in_memory=True),
        "checked": lambda: check(folder / "none"),
        "zarr": lambda: read_zarr(folder / "compact", tokens),
        "memmap": lambda: read_memmap(raw, tokens),
    }
    seconds = measure.turns(ways, 2 * measure.repeats - 1)
    wide = d_model == 3072
    for ours, words, reference, goal in (
        ("compact", "store read, shuffled, checksummed, streamed, codec compact", "zarr", ">= 2"),
        ("kept", "store read, shuffled, kept in memory, codec none", "memmap", ">= 1.0"),
        ("none", "store read, shuffled, checksummed, streamed, codec none", "memmap", ">= 1.0"),
        ("checked", "its files read and checksummed in order, nothing else", "memmap", ""),
    ):
        yield measure.compare(
            f"{words} / {reference}",
            seconds[ours],
            seconds[reference],
            size=f"{tokens} x {d_model}, bf16",
            unit="rows/s",
            work=tokens,
            reach=goal if wide else "",
        )


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


def check(path: Path) -> None:
    """What a checked read cannot do without: each byte copied from the page cache and summed."""
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(file_checksum, (path / "train").rglob("c.*")))


def _bits(rows_: Tensor) -> np.ndarray:
    return rows_.view(torch.uint16).numpy()
