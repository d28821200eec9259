"""Bytes and files of an activation store, from sizes alone or from what lies there already.

    bytes = tokens x layers x arrays x d_model x itemsize / ratio

and what describes it: one commit per shard, one `zarr.json` per group and array. Imports no torch.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import CAPTURED_SPLITS, CaptureConfig, Codec, Config, Store

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
RATIO = {
    Codec.compact: {"bfloat16": 1.45, "float16": 1.16, "float32": 1.18},
    Codec.fast: {"bfloat16": 1.33, "float16": 1.1, "float32": 1.1},
}
"""Raw bytes over those of the store, to plan with; none is 1."""

BLOCK = 4096
"""Bytes that a file fills up to on disk, and a folder takes."""

APART = "shards.json"
"""The file of a store whose shards lie on an object store: it says below what prefix."""

MARKER = 60  # its bytes

RING, RING_MB = 16, 256.0
"""Buffers that rows pass through on their way to the stores, and their size in all [MB]."""

AT_ONCE = 4
"""Of them, whose rows are written at the same time: some are compressed while others wait for the
disk."""

READ_COMMITS = 256  # of a store, to learn its ratio from


@dataclass(frozen=True)
class Volume:
    """Of one layer's store."""

    bytes: int
    files: int
    shard_bytes: int  # of one shard of all arrays


def row_layout(
    sequence_length: int, row_bytes: int, chunk_mb: float, shard_mb: float
) -> tuple[int, int]:
    """(chunk_rows, shard_rows) nearest to the wanted raw megabytes.

    A chunk is a whole number of sequences, or a whole fraction of one; a shard is a whole number
    of both. A sequence whose length has no useful divisor becomes one chunk however long it is.
    """
    wanted = max(1.0, chunk_mb * 1e6 / row_bytes)
    if wanted >= sequence_length:
        chunk_rows = int(wanted // sequence_length) * sequence_length
    else:
        divisors = [n for n in range(1, sequence_length + 1) if sequence_length % n == 0]
        chunk_rows = min(divisors, key=lambda n: abs(math.log(n / wanted)))
    unit = max(chunk_rows, sequence_length)
    return chunk_rows, max(1, int(shard_mb * 1e6 / row_bytes / unit)) * unit


def arrays(store: Store) -> tuple[str, ...]:
    """The arrays of a store."""
    return ("input",) if store is Store.input else ("input", "output")


def stored_dtype(cfg: CaptureConfig, model_dtype: str) -> str:
    """Name of the dtype that `capture.dtype` stands for."""
    if cfg.dtype.name != "auto":
        return cfg.dtype.name
    return "float16" if model_dtype == "float16" else "bfloat16"


def captured_rows(cfg: Config) -> dict[str, int]:
    """Tokens per split, in whole blocks; a corpus may hold fewer."""
    length = cfg.data.sequence_length
    tokens = {split: getattr(cfg.data.tokens, split) for split in CAPTURED_SPLITS}
    tokens["heldout"] = min(tokens["heldout"], max(length, cfg.capture.heldout_tokens))
    return {split: max(1, n // length) * length for split, n in tokens.items()}


def volume(
    rows: Mapping[str, int],
    *,
    d_model: int,
    dtype: str,
    store: Store,
    codec: Codec,
    layout: tuple[int, int],
    ratios: Mapping[str, float],
    apart: bool = False,
) -> Volume:
    """Of one layer's store.

    Args:
        rows: tokens per split.
        layout: rows of a chunk and of a shard (`row_layout`).
        ratios: by array, raw bytes over those stored; what is missing is as `RATIO` has it.
        apart: its shards lie on an object store: only what describes them is counted.
    """
    row_bytes = d_model * ITEMSIZE[dtype]
    chunk_rows, shard_rows = layout
    planned = RATIO.get(codec, {}).get(dtype, 1.0)
    names, total, files = arrays(store), 600 + MARKER * apart, 1 + apart
    for n in rows.values():
        n_shards, n_chunks = -(-n // shard_rows), -(-n // chunk_rows)
        files += 1 + len(names) + n_shards * (1 if apart else len(names) + 1)
        kept = n_chunks * chunk_rows if codec is Codec.none else n
        for name in names:
            total += 1400
            if not apart:
                total += round(kept * row_bytes / ratios.get(name, planned))
                total += 4 * n_chunks + n_shards * (16 * (shard_rows // chunk_rows) + 4)  # sums
        total += 70 + n_shards * (160 + len(names) * (200 + 14 * (shard_rows // chunk_rows)))
    shard = min(shard_rows, max(rows.values())) * row_bytes
    return Volume(total, files, sum(round(shard / ratios.get(name, planned)) for name in names))


def measured_ratios(folder: Path, codec: Codec, dtype: str) -> dict[str, float]:
    """By array, raw bytes over those stored, of the stores of layers in `folder`.

    Empty where there is none of this dtype and codec.
    """
    raw: dict[str, int] = {}
    stored: dict[str, int] = {}
    for path in sorted(folder.glob("layer_*.zarr"))[:READ_COMMITS]:
        try:
            about = json.loads((path / "zarr.json").read_text(encoding="utf-8"))["attributes"]
        except (OSError, ValueError, KeyError):  # not written yet: nothing to learn from
            continue
        if (about["codec"], about["logical_dtype"]) != (codec.name, dtype):
            continue
        row_bytes = about["d_model"] * ITEMSIZE[dtype]
        for commit_path in sorted((path / "commits").glob("*.json"))[:READ_COMMITS]:
            try:
                commit = json.loads(commit_path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            first, last = commit["rows"]
            for key, described in commit["objects"].items():
                if "chunks" in described:
                    name = key.split("/")[1]
                    raw[name] = raw.get(name, 0) + (last - first) * row_bytes
                    stored[name] = stored.get(name, 0) + described["size"]
    return {name: raw[name] / stored[name] for name in raw}
