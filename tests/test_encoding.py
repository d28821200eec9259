"""A shard is encoded to the bytes that zarr's own pipeline writes."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from crc32c import crc32c

from pipeline import hierarchy
from pipeline.commits import Layout
from pipeline.config import Codec
from pipeline.encoding import Encoder
from pipeline.shards import shard_key, sound_chunks

D, CHUNK, SHARD = 24, 8, 24
ROWS = {"whole shards": 48, "a ragged chunk": 45, "a ragged shard": 40, "one short chunk": 3}


@pytest.mark.parametrize("pieces", [SHARD, 3, 11])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_shard_has_the_bytes_of_zarrs_own_pipeline(
    tmp_path: Path, dtype: torch.dtype, codec: Codec, rows: int, zeros: bool, pieces: int
):
    """A chunk of zeros is written too; a chunk beyond the last row is absent.

    In however many rows at a time they come.
    """
    tmp_path /= "store"
    layout = Layout({"train": rows}, D, dtype, CHUNK, codec, CHUNK, SHARD)
    given = torch.randn(rows, D, generator=torch.Generator().manual_seed(rows)) * (not zeros)
    given = given.to(dtype)
    hierarchy.create(tmp_path, hierarchy.metadata(layout, {}))
    array = zarr.open_array(tmp_path, path="train/input", mode="r+")
    array = array.with_config({"write_empty_chunks": True})
    stored = given.view(torch.uint16) if dtype is torch.bfloat16 else given
    for k in range(layout.n_shards("train")):
        start, stop = layout.shard_range("train", k)
        array[start:stop] = stored[start:stop].numpy()
        encoder = Encoder(codec, CHUNK, SHARD // CHUNK)
        rows_of = stored[start:stop].numpy()
        found = encoded(encoder, [rows_of[i : i + pieces] for i in range(0, len(rows_of), pieces)])
        content = (tmp_path / "train/input" / shard_key(k)).read_bytes()
        assert found == content
        chunks = sound_chunks(np.frombuffer(content, np.uint8), SHARD // CHUNK)
        recorded = {"size": len(content), "crc32c": crc32c(content), "chunks": chunks}
        assert encoder.described() == recorded


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_a_shard(threads: int):
    rows = np.random.default_rng(0).normal(size=(64, D)).astype("<f4")
    found = encoded(Encoder(Codec.fast, CHUNK, 8), [rows], threads)
    assert found == encoded(Encoder(Codec.fast, CHUNK, 8), [rows])


def encoded(encoder: Encoder, pieces: list[np.ndarray], threads: int = 2) -> bytes:
    with ThreadPoolExecutor(threads) as pool:
        parts = [bytes(p) for rows in pieces for p in encoder.add(rows, pool)]
    return b"".join([*parts, *map(bytes, encoder.end())])
