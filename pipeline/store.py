"""One layer's activations: a compressed Zarr v3 group that is complete or refused.

`layer_K.zarr/<split>/{input,output}` are arrays of (tokens, d_model) in token-stream order, which
any Zarr reader opens; bfloat16 lies there as uint16, and says so. With `capture.store=input` there
is no `output`: the dense FFN beside the store, which its metadata names with its SHA-256, computes
it again. Shard k of a split is a fixed range of its tokens, written whole and made durable before
its commit is (`commits.py`, `store_writer.py`). That is needed because zarr reads a missing or
empty shard as zeros, without an error, and never calls fsync.

bf16 takes 0.69 of its raw size with the compact codec (zstd after a byte shuffle; the order-0
entropy allows 0.66 to 0.68) and 0.75 with the fast one (lz4 after a bit shuffle). Nothing on disk
depends on time, path or threads: equal data and settings give equal bytes.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pipeline import commits, objects, shuffle
from pipeline.artifacts import file_digest
from pipeline.config import Codec
from pipeline.ffn import DenseFFN
from pipeline.objects import Objects
from pipeline.shards import Files, Shard, ShardedArray, damaged, shard_key
from pipeline.shuffle import Pair
from pipeline.volume import APART

MIX_CHUNKS = 32
"""Chunks that are permuted together when a split does not stay in memory: twice this many of each
array are held, one half in use and one being read."""


class Rows(Protocol):
    """What a layer is fitted to: a `LayerReader`, or what stands in for one."""

    rows: dict[str, int]
    d_model: int

    def read(
        self, split: str, start: int = 0, stop: int | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        skip: int = 0,
        in_memory: bool = True,
    ) -> Iterator[tuple[Tensor, Tensor]]: ...


def digest(path: Path) -> str:
    """That of `LayerReader`, without a look at shards that lie on an object store."""
    place = None if objects.is_apart(path) else Files(path)
    return commits.digest(commits.read_complete(path, place)[2])


def verify_apart(folder: Path, store_url: str | None) -> int:
    """Read again every byte that the stores of layers in `folder` have on an object store.

    Returns how many of them have.

    Raises:
        ArtifactError: an object is missing or damaged; it is named.
    """
    found = [path for path in sorted(folder.glob("layer_*.zarr")) if objects.is_apart(path)]
    for path in found:
        LayerReader(path, store_url=store_url).verify()
    return len(found)


class LayerReader:
    """Reads a complete store; everything that it yields has been checked against its commit.

    Of a store of inputs the outputs are computed by the dense FFN, in its own dtype, and rounded as
    stored ones are: chunk by chunk, so that a row's output does not depend on what is read with it.

    Args:
        device: where outputs are computed; all rows are given on the CPU.
        store_url: the object store, for a store that has its shards there.

    Raises:
        ArtifactError: a commit or a file is missing, damaged, or another's; it is named.
        ConfigError: the shards lie on an object store, and it is not said on which.
        ResourceError: the object store does not answer, or denies access.
    """

    def __init__(
        self, path: Path, device: torch.device | str = "cpu", store_url: str | None = None
    ) -> None:
        self.path, self._device = path, device
        self._place = objects.place_of(path, store_url)
        self._layout, self.attributes, self._commits = commits.read_complete(path, self._place)
        self.d_model, self.dtype = self._layout.d_model, self._layout.dtype
        self.sequence_length, self.rows = self._layout.sequence_length, self._layout.rows
        arrays = self._layout.arrays
        self._arrays = {split: [self._array(split, a) for a in arrays] for split in self.rows}
        self._kept: dict[str, Pair] = {}
        self._spare: dict[str, list[tuple[Pair, Pair]]] = {}
        self._read_ffn: DenseFFN | None = None

    def digest(self) -> str:
        """SHA-256 of what the commits record: equal for equal stores, wherever they lie."""
        return commits.digest(self._commits)

    def stored_bytes(self) -> int:
        """Of all its files, wherever they lie."""
        described = [commit["objects"] for commit in self._commits.values()]
        sizes = {key: of[key]["size"] for of in described for key in of}
        return sum(sizes.values()) + sum(path.stat().st_size for path in self._commits)

    def read(self, split: str, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Rows [start, stop) in order: (input, output), each (rows, d_model), on the CPU."""
        start, stop, _ = slice(start, stop).indices(self.rows[split])
        size = self._layout.chunk_rows
        pair = self._empty(stop - start)

        def part(chunk: int) -> tuple[Pair, int]:
            first, last = max(start, chunk * size), min(stop, (chunk + 1) * size)
            x, y = (rows[first - start : last - start] for rows in pair)
            return (x, y), first - chunk * size

        chunks = range(start // size, -(-stop // size))
        with self._threads() as threads:
            list(threads.map(lambda chunk: self._read_chunk(split, chunk, *part(chunk)), chunks))
        for chunk in chunks:
            self._compute_outputs(split, chunk, *part(chunk))
        return pair

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        skip: int = 0,
        in_memory: bool = True,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled (input, output) batches, each (batch_size, d_model); the ragged last is dropped.

        The order depends on (split, seed, epoch) and on `in_memory`, nothing else: true is a full
        permutation of a split that is read once and kept; false reads chunks in random order and
        permutes `MIX_CHUNKS` of them at a time. `skip` batches are left out without being read.
        """
        windows = self._plan(split, seed, epoch, in_memory)
        sizes = [sum(self._chunk_rows(split, chunk) for chunk in window) for window in windows]
        first, unread = shuffle.locate(sizes, skip * batch_size)
        left = range(first, len(windows))
        if not left:
            return
        orders = (
            shuffle.permutation(sizes[w], seed, epoch, split, w)[unread if w == first else 0 :]
            for w in left
        )
        pairs = self._keep(split) if in_memory else self._stream(split, windows, left)
        yield from shuffle.batches(zip(orders, pairs, strict=True), batch_size)

    def verify(self) -> None:
        """Read every byte again; `ArtifactError` names what is damaged, or not of this store."""
        described = {k: v for c in self._commits.values() for k, v in c["objects"].items()}
        written = {f"{commits.FOLDER}/{path.name}": path for path in self._commits}
        known = {*described, *written}
        for key, recorded in described.items():
            commits.check_object(self._place, key, recorded)
        if isinstance(self._place, Objects):
            for key, path in written.items():
                if self._place.content(key).tobytes() != path.read_bytes():
                    raise self._place.damaged(key, "it is not the commit of this store")
            for key in self._place.sizes().keys() - known:
                raise self._place.damaged(key, "no commit knows it")
            known = {key for key in known if key.endswith(".json")} | {APART}
        if self._layout.outputs_from:
            self._ffn()
        for path in sorted(self.path.rglob("*")):
            if path.is_file() and str(path.relative_to(self.path)) not in known:
                raise damaged(path, "no commit knows it")

    def _threads(self) -> ThreadPoolExecutor:
        """What reads and decodes chunks: more of them where each read waits for an answer."""
        return ThreadPoolExecutor(self._place.in_flight or torch.get_num_threads())

    def _array(self, split: str, name: str) -> ShardedArray:
        shards = []
        for k in range(self._layout.n_shards(split)):
            commit = self._commits[commits.commit_path(self.path, split, k)]
            recorded = commit["objects"][f"{split}/{name}/{shard_key(k)}"]
            shards.append(Shard(recorded["size"], recorded["chunks"]))
        return ShardedArray(
            self._place,
            f"{split}/{name}",
            shards,
            row_bytes=self._layout.row_bytes,
            chunk_rows=self._layout.chunk_rows,
            shard_rows=self._layout.shard_rows,
            compressed=self._layout.codec is not Codec.none,
        )

    def _plan(self, split: str, seed: int, epoch: int, in_memory: bool) -> list[list[int]]:
        """The chunks of each window that is permuted as a whole."""
        n_chunks = self._layout.n_chunks(split)
        if in_memory:
            return [list(range(n_chunks))]
        mixed = shuffle.permutation(n_chunks, seed, epoch, split, "chunks").tolist()
        return [mixed[i : i + MIX_CHUNKS] for i in range(0, n_chunks, MIX_CHUNKS)]

    def _keep(self, split: str) -> Iterator[Pair]:
        if split not in self._kept:
            self._kept[split] = self.read(split)
        yield self._kept[split]

    def _stream(self, split: str, windows: list[list[int]], left: range) -> Iterator[Pair]:
        """The windows of `left`, read ahead into two buffers by turns.

        Buffers are kept for the next epoch: fresh pages cost as much as reading into them.
        """
        rows = min(MIX_CHUNKS * self._layout.chunk_rows, self.rows[split])
        spare = self._spare.setdefault(split, [])
        buffers = spare.pop() if spare else (self._empty(rows), self._empty(rows))

        def load(w: int) -> Pair:
            x, y = buffers[w % 2]
            sizes = [self._chunk_rows(split, chunk) for chunk in windows[w]]
            end = sum(sizes)
            parts = list(zip(x[:end].split(sizes), y[:end].split(sizes), strict=True))
            list(threads.map(lambda c, part: self._read_chunk(split, c, part), windows[w], parts))
            for chunk, part in zip(windows[w], parts, strict=True):
                self._compute_outputs(split, chunk, part)
            return x[:end], y[:end]

        with self._threads() as threads:
            yield from shuffle.prefetch(load, left)
        spare.append(buffers)

    def _chunk_rows(self, split: str, chunk: int) -> int:
        return min(self._layout.chunk_rows, self.rows[split] - chunk * self._layout.chunk_rows)

    def _read_chunk(self, split: str, chunk: int, pair: Pair, first: int = 0) -> None:
        """Fill what is stored of `pair` with the rows of a chunk from its row `first` on."""
        for array, rows in zip(self._arrays[split], pair, strict=False):
            array.read_rows(chunk, rows.view(torch.uint8).numpy(), first)

    @torch.no_grad()
    def _compute_outputs(self, split: str, chunk: int, pair: Pair, first: int = 0) -> None:
        """Fill the outputs of `pair` where they are not stored."""
        if self._layout.outputs_from is None:
            return
        x_TD, y_TD = pair
        if len(x_TD) < self._chunk_rows(split, chunk):  # a product depends on how many rows it has
            x_TD = self._empty(self._chunk_rows(split, chunk))[0]
            self._arrays[split][0].read_rows(chunk, x_TD.view(torch.uint8).numpy())
        ffn = self._ffn()
        given_TD = ffn(x_TD.to(ffn.up_proj.device, ffn.up_proj.dtype))
        y_TD.copy_(given_TD[first : first + len(y_TD)])

    def _ffn(self) -> DenseFFN:
        """What gives the outputs of a store that has none; read once."""
        if self._read_ffn is None:
            assert self._layout.outputs_from
            name, digest = self._layout.outputs_from
            path = self.path.parent / Path(name).name
            if file_digest(path) != digest:
                raise damaged(path, "it is not the FFN whose inputs were captured")
            ffn = DenseFFN.load(path)
            self._read_ffn = ffn.to(self._device, ffn.up_proj.dtype)
        return self._read_ffn

    def _empty(self, rows: int) -> Pair:
        shape = (rows, self.d_model)
        return torch.empty(shape, dtype=self.dtype), torch.empty(shape, dtype=self.dtype)
