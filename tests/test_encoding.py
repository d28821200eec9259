"""A shard is encoded to the bytes that zarr's own pipeline writes."""

from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from pipeline import hierarchy
from pipeline.commits import Layout
from pipeline.config import Codec
from pipeline.shards import Files, shard_key

D, CHUNK, SHARD = 24, 8, 24
ROWS = {"whole shards": 48, "a ragged chunk": 45, "a ragged shard": 40, "one short chunk": 3}


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_shard_has_the_bytes_of_zarrs_own_pipeline(
    tmp_path: Path, dtype: torch.dtype, codec: Codec, rows: int, zeros: bool
):
    """A chunk of zeros is written too; a chunk beyond the last row is absent."""
    layout = Layout({"train": rows}, D, dtype, CHUNK, codec, CHUNK, SHARD)
    given = torch.randn(rows, D, generator=torch.Generator().manual_seed(rows)) * (not zeros)
    given = given.to(dtype)
    for name in ("ours", "zarrs"):
        hierarchy.create(tmp_path / name, hierarchy.metadata(layout, {}))
    array = zarr.open_array(tmp_path / "zarrs", path="train/input", mode="r+")
    array = array.with_config({"write_empty_chunks": True})
    stored = given.view(torch.uint16) if dtype is torch.bfloat16 else given
    for k in range(layout.n_shards("train")):
        start, stop = layout.shard_range("train", k)
        array[start:stop] = stored[start:stop].numpy()
        place = Files(tmp_path / "ours")
        described = hierarchy.write_rows(place, layout, "train/input", start, given[start:stop])
        key = f"train/input/{shard_key(k)}"
        content = (tmp_path / "zarrs" / key).read_bytes()
        assert (tmp_path / "ours" / key).read_bytes() == content
        shard = np.frombuffer(content, np.uint8)
        assert described == {key: hierarchy._describe(shard, SHARD // CHUNK)}
    assert np.array_equal(
        zarr.open_array(tmp_path / "ours", path="train/input", mode="r")[:], stored.numpy()
    )


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_a_shard(tmp_path: Path, threads: int):
    from pipeline.encoding import Encoder

    rows = np.random.default_rng(0).normal(size=(64, D)).astype("<f4")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = b"".join(bytes(p) for p in Encoder(Codec.fast, CHUNK, 8).pieces(rows))
    finally:
        torch.set_num_threads(before)
    assert found == b"".join(bytes(p) for p in Encoder(Codec.fast, CHUNK, 8).pieces(rows))
