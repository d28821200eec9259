"""Whether a capture fits the disk, asked before it begins and after its first shard."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from pipeline import preflight, volume
from pipeline.config import CaptureConfig, Codec, Store
from pipeline.ffn import DenseFFN
from pipeline.preflight import size


def check_room(
    folder: Path,
    rows: Mapping[str, int],
    ffns: Mapping[int, DenseFFN],
    cfg: CaptureConfig,
    *,
    store: Store,
    dtype: torch.dtype,
    sequence_length: int,
    apart: bool = False,
) -> None:
    """Refuse a capture that does not fit the disk, less what of it lies in `folder` already.

    At the compression ratio of the shards that are there, or else a usual one (`volume.RATIO`).

    Args:
        apart: the shards go to an object store, and take no room here.

    Raises:
        ResourceError: says how much is needed, and what would make it less.
    """
    name, d_model = str(dtype).removeprefix("torch."), next(iter(ffns.values())).d_model
    there = _sizes(folder)
    weights = [t.nbytes for ffn in ffns.values() for t in ffn.tensors().values()]
    measured = volume.measured_ratios(folder, cfg.codec, name)

    def need(layers: int, share: float = 1.0, *, store: Store = store, codec: Codec) -> int:
        one = volume.volume(
            {split: max(1, round(share * n)) for split, n in rows.items()},
            d_model=d_model,
            dtype=name,
            store=store,
            codec=codec,
            layout=volume.row_layout(
                sequence_length, d_model * dtype.itemsize, cfg.chunk_mb, cfg.shard_mb
            ),
            ratios=measured if codec is cfg.codec else {},
            apart=apart,
        )
        files = layers * one.files + len(ffns) - len(there)
        stored = layers * one.bytes + sum(weights) - sum(there)
        return max(0, stored) + volume.BLOCK * max(0, files)

    codec, n = cfg.codec, len(ffns)
    levers = {"half of data.tokens.train": need(n, 0.5, codec=codec)}
    if n > 1:
        levers["half of model.layers"] = need(n // 2, codec=codec)
    if store is not Store.input:
        levers["capture.store=input"] = need(n, store=Store.input, codec=codec)
    if codec is not Codec.compact:
        levers["capture.codec=compact"] = need(n, codec=Codec.compact)
    told = [f"{lever} {size(bytes_)}" for lever, bytes_ in levers.items()]
    preflight.check_disk("the activations", folder, need(n, codec=codec), told)


def _sizes(folder: Path) -> list[int]:
    """Of every file there, but for those that others rename meanwhile."""
    sizes = []
    for place, _, names in os.walk(folder):  # `rglob` fails where a folder goes
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                sizes.append(Path(place, name).stat().st_size)
    return sizes
