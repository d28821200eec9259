"""What a layer's store has to hold, and the commits that prove that it does.

A commit is written when every array of a shard is durable. It records the rows of the shard, and
size and crc32c of everything that those rows are read by: the shard files and the `zarr.json`
above them. It carries its own checksum. So a store is complete when every shard has a commit, and
a byte that changes anywhere below it is found.

The chunks' own checksums are recorded too: data followed by its crc32c always leaves the same
remainder, so that of a whole shard depends on the lengths of its chunks and not on what is in
them. It finds a damaged shard, but not a sound one in another's place.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from crc32c import crc32c

from pipeline.artifacts import read_json
from pipeline.config import Codec
from pipeline.durable import json_bytes
from pipeline.errors import ArtifactError
from pipeline.shards import Files, Place, damaged, file_checksum, shard_key

FORMAT_VERSION = 1
ARRAYS = ("input", "output")
FOLDER = "commits"

Commit = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """The settings of a store, and every file that follows from them."""

    rows: dict[str, int]  # tokens per split
    d_model: int
    dtype: torch.dtype
    sequence_length: int
    codec: Codec
    chunk_rows: int
    shard_rows: int
    outputs_from: tuple[str, str] | None = None  # file beside a store of inputs alone, SHA-256

    @property
    def arrays(self) -> tuple[str, ...]:
        """Which of `ARRAYS` it holds."""
        return ARRAYS if self.outputs_from is None else ARRAYS[:1]

    @property
    def row_bytes(self) -> int:
        return self.d_model * self.dtype.itemsize

    def n_chunks(self, split: str) -> int:
        return -(-self.rows[split] // self.chunk_rows)

    def n_shards(self, split: str) -> int:
        return -(-self.rows[split] // self.shard_rows)

    def shard_range(self, split: str, k: int) -> tuple[int, int]:
        """First row of shard k, and the one after its last; the last shard may be short."""
        return k * self.shard_rows, min((k + 1) * self.shard_rows, self.rows[split])

    @property
    def chunks_per_shard(self) -> int:
        return self.shard_rows // self.chunk_rows

    def shard_files(self, split: str, k: int) -> list[str]:
        return [f"{split}/{array}/{shard_key(k)}" for array in self.arrays]

    def metadata_files(self, split: str) -> list[str]:
        arrays = [f"{split}/{array}/zarr.json" for array in self.arrays]
        return ["zarr.json", f"{split}/zarr.json", *arrays]

    def attributes(self, capture: dict[str, Any]) -> dict[str, Any]:
        """Attributes of the root group; `capture` is the caller's part."""
        outputs_from = {"outputs_from": list(self.outputs_from)} if self.outputs_from else {}
        return {
            **outputs_from,
            "format_version": FORMAT_VERSION,
            "logical_dtype": str(self.dtype).removeprefix("torch."),
            "d_model": self.d_model,
            "sequence_length": self.sequence_length,
            "codec": self.codec.name,
            "chunk_rows": self.chunk_rows,
            "shard_rows": self.shard_rows,
            "rows": dict(sorted(self.rows.items())),
            "capture": json.loads(json.dumps(capture, sort_keys=True, allow_nan=False)),
        }

    @classmethod
    def from_attributes(cls, found: dict[str, Any]) -> "Layout":
        """The inverse of `attributes`, for attributes that a commit vouches for."""
        return cls(
            rows=found["rows"],
            d_model=found["d_model"],
            dtype=getattr(torch, found["logical_dtype"]),
            sequence_length=found["sequence_length"],
            codec=Codec[found["codec"]],
            chunk_rows=found["chunk_rows"],
            shard_rows=found["shard_rows"],
            outputs_from=tuple(found["outputs_from"]) if "outputs_from" in found else None,
        )


def commit_key(split: str, k: int) -> str:
    return f"{FOLDER}/{split}_{k:05d}.json"


def commit_path(root: Path, split: str, k: int) -> Path:
    return root / commit_key(split, k)


def make_commit(
    root: Path, layout: Layout, split: str, k: int, shards: Mapping[str, Commit]
) -> Commit:
    """What vouches for shard k; `shards` describes its files, which are durable already."""
    metadata = {key: describe_file(root / key) for key in layout.metadata_files(split)}
    return {**_identity(layout, split, k), "objects": {**metadata, **shards}}


def encode(commit: Commit) -> bytes:
    """What lies on disk, with its own checksum."""
    return json_bytes({**commit, "crc32c": _checksum(commit)})


def read_complete(
    root: Path, shards: Place | None
) -> tuple[Layout, dict[str, Any], dict[Path, Commit]]:
    """Layout, the caller's attributes and every commit of a store that lacks nothing.

    Shard files are checked for their presence and size only: their bytes when they are read.

    Args:
        shards: where the shard files lie; null = they are not looked at.

    Raises:
        ArtifactError: something is missing, damaged or another's; the file is named.
    """
    found = {path: read_commit(path) for path in sorted((root / FOLDER).glob("*.json"))}
    if not found:
        raise damaged(root / FOLDER, "it holds no commit")
    for path, commit in found.items():
        if "zarr.json" not in commit["objects"]:
            raise damaged(path, "it does not vouch for zarr.json")
        check_object(Files(root), "zarr.json", commit["objects"]["zarr.json"])
    layout, capture = read_attributes(root)
    numbers = {split: layout.n_shards(split) for split in layout.rows}
    if sum(numbers.values()) > 10 * len(found) + 100_000:  # no list is made of what nobody wrote
        raise damaged(root / "zarr.json", f"{len(found)} shards are there, of {numbers}")
    every = [(split, k) for split, n in numbers.items() for k in range(n)]
    expected = {commit_path(root, split, k): (split, k) for split, k in every}
    for path in sorted(found.keys() | expected.keys()):
        if path not in found:
            raise damaged(path, "it is missing: the store is not complete")
        if path not in expected:
            raise damaged(path, "the store has no such shard")
        check_commit(path, found[path], layout, *expected[path])
        for key, recorded in found[path]["objects"].items():
            if key.endswith("zarr.json"):
                check_object(Files(root), key, recorded)
            elif shards:
                check_object(shards, key, recorded, deep=False)
    return layout, capture, found


def digest(commits: dict[Path, Commit]) -> str:
    """SHA-256 of what they record: equal for equal stores, wherever these lie."""
    recorded = {path.name: commit for path, commit in commits.items()}
    return hashlib.sha256(json.dumps(recorded, sort_keys=True).encode()).hexdigest()


def read_attributes(root: Path) -> tuple[Layout, dict[str, Any]]:
    """Layout and the caller's attributes, as they stand there; a commit vouches for them."""
    try:
        attributes = read_json(root / "zarr.json")["attributes"]
        version, capture = attributes["format_version"], attributes["capture"]
        layout = Layout.from_attributes(attributes) if version == FORMAT_VERSION else None
    except (LookupError, TypeError, AttributeError) as error:
        raise damaged(root / "zarr.json", f"it describes no store ({error!r})") from None
    if layout is None:
        raise damaged(root, f"format_version {version}, not {FORMAT_VERSION}")
    sizes = [layout.d_model, layout.sequence_length, layout.chunk_rows, layout.shard_rows]
    rows = list(layout.rows.values()) if isinstance(layout.rows, dict) else [None]
    if not all(type(n) is int and n > 0 for n in [*sizes, *rows]):
        raise damaged(root / "zarr.json", "a size in it is none")
    if layout.shard_rows % layout.chunk_rows:
        raise damaged(root / "zarr.json", "its shards hold no whole number of chunks")
    return layout, capture


def read_commit(path: Path) -> Commit:
    """A commit whose own checksum is right; `ArtifactError` names any other."""
    return _checked(read_json(path), lambda why: damaged(path, why))


def parse_commit(written: bytes, place: Place, key: str) -> Commit:
    """As `read_commit`, of what was read of `place` already."""
    try:
        commit = json.loads(written)
    except ValueError:
        raise place.damaged(key, "it is no JSON") from None
    return _checked(commit, lambda why: place.damaged(key, why))


def _checked(commit: Any, refuse: Callable[[str], ArtifactError]) -> Commit:
    if not isinstance(commit, dict) or commit.pop("crc32c", None) != _checksum(commit):
        raise refuse("it does not match its own checksum")
    objects = commit.get("objects")
    if not isinstance(objects, dict) or not all(map(_is_described, objects.values())):
        raise refuse("it does not say what its files hold")
    return commit


def _is_described(recorded: Any) -> bool:
    """Whether an entry has the size and the checksums of a file."""
    if not isinstance(recorded, dict):
        return False
    chunks = recorded.get("chunks", [])
    numbers = [recorded.get("size"), recorded.get("crc32c")]
    sums = [crc for crc in chunks if crc is not None] if isinstance(chunks, list) else [None]
    return all(type(n) is int and n >= 0 for n in [*numbers, *sums])


def check_commit(path: Path, commit: Commit, layout: Layout, split: str, k: int) -> None:
    """Refuse a commit that is not that of shard k of `split`."""
    expected = _identity(layout, split, k)
    files = [*layout.metadata_files(split), *layout.shard_files(split, k)]
    found = {key: commit.get(key) for key in expected}
    if found != expected or commit["objects"].keys() != set(files):
        raise damaged(path, f"it commits {found}, where {expected} was expected")
    chunks = layout.chunks_per_shard
    for key in layout.shard_files(split, k):
        if len(commit["objects"][key].get("chunks", [])) != chunks:
            raise damaged(path, f"it does not say what the {chunks} chunks of {key} hold")


def check_object(place: Place, key: str, recorded: Commit, *, deep: bool = True) -> None:
    """Refuse a file whose size, and if `deep` whose checksums, are not as recorded."""
    size = place.size(key)
    if size is None:
        raise place.damaged(key, "it is missing")
    if size != recorded["size"]:
        raise place.damaged(key, f"it has {size} bytes, {recorded['size']} were committed")
    if not deep:
        return
    chunks = recorded.get("chunks") or []
    whole, found = place.checksums(key, len(chunks))
    if whole != recorded["crc32c"]:
        raise place.damaged(key, "it does not match the checksum in its commit")
    if found != chunks:
        raise place.damaged(key, "it holds the rows of another shard")


def describe_file(path: Path) -> Commit:
    return {"size": path.stat().st_size, "crc32c": file_checksum(path)}


def _identity(layout: Layout, split: str, k: int) -> Commit:
    return {"split": split, "shard": k, "rows": list(layout.shard_range(split, k))}


def _checksum(content: Commit) -> int:
    return crc32c(json.dumps(content, sort_keys=True).encode())
