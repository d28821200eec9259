"""Writes one layer's store, shard by shard; the format and its guarantees are told in `store.py`.

Checksums are taken while the bytes are written: nothing is read again for them.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import commits, hierarchy, objects
from pipeline.artifacts import file_digest
from pipeline.commits import Commit, Layout
from pipeline.config import Codec
from pipeline.durable import remove_partials, write_bytes
from pipeline.errors import ArtifactError
from pipeline.objects import Objects
from pipeline.shard_writer import ShardWriter
from pipeline.shards import Files
from pipeline.volume import row_layout


class LayerWriter:
    """Writes one layer's store shard by shard, in any order; a killed one is opened again."""

    def __init__(self, path: Path, layout: Layout, place: Files | Objects) -> None:
        self.path, self.layout, self.place = path, layout, place
        self.shard_rows = layout.shard_rows
        self.n_shards = {split: layout.n_shards(split) for split in layout.rows}

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        rows: dict[str, int],
        d_model: int,
        dtype: torch.dtype,
        sequence_length: int,
        codec: Codec,
        shard_mb: float,
        chunk_mb: float,
        attributes: dict[str, Any],
        outputs_from: Path | None = None,
        alone: bool = True,
        store_url: str | None = None,
    ) -> "LayerWriter":
        """Create the store, or go on with what an interrupted run left of it.

        Args:
            rows: tokens per split.
            dtype: bfloat16, float16 or float32.
            sequence_length: tokens; a shard holds a whole number of sequences.
            shard_mb, chunk_mb: wanted raw megabytes per array.
            attributes: JSON values that say what the store was made from.
            outputs_from: a `DenseFFN` saved beside the store, which then holds inputs alone; null
                = it holds both.
            alone: no other process writes shards of the store at this time; what is half-written
                there goes.
            store_url: the object store that takes the shards; null = this folder does.

        Raises:
            ArtifactError: the store there was begun with other settings; they are named.
            ResourceError: the object store does not answer, or denies access.
        """
        assert min(rows.values()) > 0, "every split holds something"
        row_bytes = d_model * dtype.itemsize
        chunk_rows, shard_rows = row_layout(sequence_length, row_bytes, chunk_mb, shard_mb)
        named = outputs_from and (outputs_from.name, file_digest(outputs_from))
        layout = Layout(rows, d_model, dtype, sequence_length, codec, chunk_rows, shard_rows, named)
        metadata = hierarchy.metadata(layout, attributes)
        kept = metadata if store_url is None else metadata | objects.apart(path)
        if not path.exists():
            hierarchy.create(path, kept)
        hierarchy.check(path, kept)
        place = objects.place_of(path, store_url, create=True)
        if isinstance(place, Objects):
            hierarchy.create_objects(place, metadata)
        if alone:
            remove_partials(path)
            remove_partials(path.parent, f"{path.name}.*.partial")
        return cls(path, layout, place)

    @classmethod
    def reopen(cls, path: Path, store_url: str | None = None) -> "LayerWriter":
        """That of a store as it was begun, to ask which of its shards are `committed`.

        Raises:
            ArtifactError: no store was begun there.
        """
        layout, _ = commits.read_attributes(path)
        return cls(path, layout, objects.place_of(path, store_url))

    def committed(self, split: str, among: Iterable[int] | None = None) -> set[int]:
        """Shards that need not be written: every byte is read and verified.

        On an object store also those that another machine has committed there.

        Args:
            among: only these are looked at; null = all.
        """
        numbers = range(self.n_shards[split]) if among is None else among
        return {k for k in numbers if self._is_intact(split, k)}

    def _is_intact(self, split: str, k: int) -> bool:
        path = commits.commit_path(self.path, split, k)
        try:
            commit = commits.read_commit(path) if path.exists() else self._commit_there(split, k)
            if commit is None:
                return False
            commits.check_commit(path, commit, self.layout, split, k)
            for key, recorded in commit["objects"].items():
                there = self.place if key in self.layout.shard_files(split, k) else Files(self.path)
                commits.check_object(there, key, recorded)
        except ArtifactError:
            return False
        if isinstance(self.place, Objects):
            self._write_commit(split, k, commit)
        return True

    def _commit_there(self, split: str, k: int) -> commits.Commit | None:
        """That of the object store, where another machine wrote it or this one lost its own."""
        key = commits.commit_key(split, k)
        if not isinstance(self.place, Objects) or self.place.size(key) is None:
            return None
        return commits.parse_commit(self.place.content(key).tobytes(), self.place, key)

    def _write_commit(self, split: str, k: int, commit: commits.Commit) -> None:
        """On the object store and here, wherever it is not there yet."""
        path, key = commits.commit_path(self.path, split, k), commits.commit_key(split, k)
        written = commits.encode(commit)
        if isinstance(self.place, Objects) and self.place.size(key) != len(written):
            self.place.put(key, written)
        if not path.exists():
            write_bytes(path, written)

    def begin(self, split: str, k: int) -> ShardWriter:
        """Write shard k while its rows arrive."""

        def commit(shards: Mapping[str, Commit]) -> None:
            made = commits.make_commit(self.path, self.layout, split, k, shards)
            self._write_commit(split, k, made)

        return ShardWriter(self.path, self.layout, self.place, split, k, commit)

    def write_shard(self, split: str, k: int, ffn_input: Tensor, ffn_output: Tensor) -> None:
        """Write rows `shard_range(k)` of every array; durable and committed on return.

        Args:
            ffn_input, ffn_output: CPU tensors (rows of the shard, d_model) of the store's dtype.

        Raises:
            InputError: a value is NaN or infinite.
        """
        start, stop = self.layout.shard_range(split, k)
        sides = (ffn_input, ffn_output)
        assert all(len(rows) == stop - start for rows in sides), (start, stop)
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            shard = self.begin(split, k)
            with ThreadPoolExecutor(len(sides)) as pool:
                list(pool.map(shard.add, range(len(sides)), sides, [threads] * len(sides)))
                list(pool.map(shard.close, range(len(sides))))
