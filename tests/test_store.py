"""What is written is read again, bit for bit, in order or shuffled; and by zarr itself."""

import math
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import pytest
import torch
import zarr
from torch import Tensor

from pipeline.config import Codec
from pipeline.errors import ArtifactError, InputError
from pipeline.store import LayerReader
from pipeline.store_writer import LayerWriter
from pipeline.volume import row_layout

Data = dict[str, tuple[Tensor, Tensor]]

# Chunks of 8 rows, shards of 24: `train` has a last shard of 13 rows and a last chunk of 5.
SETTINGS: dict[str, Any] = {
    "rows": {"train": 61, "validation": 24},
    "d_model": 16,
    "dtype": torch.bfloat16,
    "sequence_length": 8,
    "codec": Codec.compact,
    "chunk_mb": 0.0003,
    "shard_mb": 0.001,
    "attributes": {"model": "m", "tokens": {"train": "t"}},
}


def activations(settings: dict[str, Any], seed: int = 0) -> Data:
    """Channels of unlike scales, as activations have them; the same at every call."""
    rng = torch.Generator().manual_seed(seed)
    scale = torch.randn(settings["d_model"], generator=rng).exp()

    def draw(rows: int) -> Tensor:
        values = torch.randn(rows, settings["d_model"], generator=rng) * scale
        return values.to(settings["dtype"])

    return {split: (draw(n), draw(n)) for split, n in settings["rows"].items()}


def write(path: Path, data: Data | None = None, **changed: Any) -> LayerReader:
    settings = SETTINGS | changed
    writer = LayerWriter.open(path, **settings)
    fill(writer, data or activations(settings))
    return LayerReader(path)


def fill(writer: LayerWriter, data: Data) -> None:
    """Write what is not committed yet."""
    for split, (x, y) in data.items():
        for k in sorted(set(range(writer.n_shards[split])) - writer.committed(split)):
            rows = slice(k * writer.shard_rows, (k + 1) * writer.shard_rows)
            writer.write_shard(split, k, x[rows], y[rows])


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def bits(rows: Tensor) -> Tensor:
    return rows.contiguous().view(torch.uint8)


def test_checksums_are_computed_by_the_hardware():
    assert crc32c.hardware_based


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_store_returns_the_bits_it_was_given(tmp_path, dtype, codec):
    settings = SETTINGS | {"dtype": dtype, "rows": {"train": 61, "validation": 24, "heldout": 1}}
    data = activations(settings)
    data["train"][0][0, :3] = torch.tensor([-0.0, torch.finfo(dtype).tiny / 2, 0.0])
    reader = write(tmp_path / "layer_0.zarr", data, codec=codec, dtype=dtype, rows=settings["rows"])
    for split, pair in data.items():
        for found, wanted in zip(reader.read(split), pair, strict=True):
            assert found.dtype == dtype
            assert bits(found).equal(bits(wanted))


def test_reader_says_what_is_stored(tmp_path):
    reader = write(tmp_path / "layer_0.zarr")
    assert reader.rows == SETTINGS["rows"]
    assert (reader.d_model, reader.dtype, reader.sequence_length) == (16, torch.bfloat16, 8)
    assert reader.attributes == SETTINGS["attributes"]


@pytest.mark.parametrize("codec", Codec)
def test_read_returns_any_range_as_zarr_does(tmp_path, codec):
    path = tmp_path / "layer_0.zarr"
    reader = write(path, codec=codec)
    group = zarr.open_group(path / "train", mode="r")
    for start, stop in [(0, 61), (0, 8), (7, 9), (23, 25), (30, 30), (48, 61), (60, 61)]:
        for found, name in zip(reader.read("train", start, stop), ("input", "output"), strict=True):
            array = group[name]
            assert isinstance(array, zarr.Array)
            assert np.array_equal(found.view(torch.uint16).numpy(), array[start:stop])


def test_store_is_plain_zarr_with_nothing_foreign_in_a_split(tmp_path):
    path = tmp_path / "layer_0.zarr"
    write(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        members = dict(zarr.open_group(path / "train", mode="r").members())
    assert sorted(members) == ["input", "output"]
    for array in members.values():
        assert array.attrs["logical_dtype"] == "bfloat16"
        assert array.metadata.dimension_names == ("token", "channel")


@pytest.mark.parametrize("codec", Codec)
def test_zeros_are_data(tmp_path, codec: Codec):
    """zarr leaves out chunks of zeros by default; here an absent chunk is damage."""
    settings = SETTINGS | {"codec": codec}
    data = {split: (torch.zeros_like(x), y) for split, (x, y) in activations(settings).items()}
    x, y = write(tmp_path / "layer_0.zarr", data, codec=codec).read("train")
    assert x.count_nonzero() == 0
    assert y.equal(data["train"][1])


def test_equal_data_gives_equal_bytes_and_digests(tmp_path):
    """Whatever the order of the shards, of the splits and of the attributes."""
    data = activations(SETTINGS)
    one = write(tmp_path / "layer_0.zarr", data)
    writer = LayerWriter.open(
        tmp_path / "elsewhere",
        **SETTINGS
        | {"attributes": {"tokens": {"train": "t"}, "model": "m"}}
        | {"rows": {"validation": 24, "train": 61}},
    )
    for split, k in [("validation", 0), ("train", 2), ("train", 0), ("train", 1)]:
        x, y = (side[k * 24 : (k + 1) * 24] for side in data[split])
        writer.write_shard(split, k, x, y)
    assert tree(tmp_path / "layer_0.zarr") == tree(tmp_path / "elsewhere")
    assert LayerReader(tmp_path / "elsewhere").digest() == one.digest()


def test_digest_changes_with_contents_and_settings(tmp_path):
    data = activations(SETTINGS)
    changed = {split: (x.clone(), y) for split, (x, y) in data.items()}
    changed["validation"][0][-1, -1] *= 2
    readers = [
        write(tmp_path / "a", data),
        write(tmp_path / "b", changed),
        write(tmp_path / "c", data, attributes={"model": "other"}),
        write(tmp_path / "d", data, codec=Codec.fast),
        write(tmp_path / "e", data, sequence_length=4),
    ]
    assert len({reader.digest() for reader in readers}) == len(readers)


@pytest.mark.parametrize(("codec", "ratio"), [(Codec.compact, 1.40), (Codec.fast, 1.12)])
def test_codec_saves_what_the_plan_counts_on(tmp_path, codec, ratio):
    """Gaussian channels whose scales spread over a factor of 20; real activations do better."""
    big = {"rows": {"train": 4096}, "d_model": 256, "chunk_mb": 1, "shard_mb": 2, "codec": codec}
    settings = SETTINGS | big
    write(tmp_path / "layer_0.zarr", activations(settings), **big)
    stored = sum(len(content) for content in tree(tmp_path / "layer_0.zarr").values())
    assert 2 * 4096 * 256 * 2 / stored > ratio


@pytest.mark.parametrize("sequence_length", [1, 96, 127, 1000, 1021, 2048])
@pytest.mark.parametrize("d_model", [256, 768, 4096])
def test_layout_keeps_whole_chunks_and_whole_sequences(sequence_length, d_model):
    row_bytes = 2 * d_model
    chunk_rows, shard_rows = row_layout(sequence_length, row_bytes, chunk_mb=2, shard_mb=64)
    assert shard_rows % chunk_rows == shard_rows % sequence_length == 0
    assert 0.5 < chunk_rows * row_bytes / 2e6 < 2 or sequence_length in (127, 1021)
    assert shard_rows * row_bytes <= 64e6 or shard_rows == max(chunk_rows, sequence_length)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_writer_refuses_what_is_not_finite(tmp_path, value, side):
    writer = LayerWriter.open(tmp_path / "layer_3.zarr", **SETTINGS)
    pair = [rows[24:48].clone() for rows in activations(SETTINGS)["train"]]
    pair[side][5, 2] = value
    with pytest.raises(InputError) as caught:
        writer.write_shard("train", 1, pair[0], pair[1])
    name = ("input", "output")[side]
    place = f"{value} in split train, shard 1, array {name}, at token 29, channel 2"
    assert place in str(caught.value) and "layer_3.zarr" in str(caught.value)
    assert writer.committed("train") == set()


def test_writer_refuses_infinities_that_cancel_each_other(tmp_path):
    writer = LayerWriter.open(tmp_path / "layer_0.zarr", **SETTINGS)
    pair = [rows[:24].clone() for rows in activations(SETTINGS)["train"]]
    pair[0][3, 1], pair[0][4, 1] = math.inf, -math.inf
    with pytest.raises(InputError, match="at token 3, channel 1"):
        writer.write_shard("train", 0, *pair)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_finite_rows_whose_sum_overflows_are_stored(tmp_path, dtype):
    x = torch.full((8, 16), torch.finfo(dtype).max, dtype=dtype)
    assert x.sum().isinf()
    reader = write(tmp_path / "layer_0.zarr", {"train": (x, -x)}, rows={"train": 8}, dtype=dtype)
    assert all(map(torch.equal, reader.read("train"), (x, -x)))


def test_overflow_in_float16_proposes_bfloat16(tmp_path):
    settings = SETTINGS | {"dtype": torch.float16, "rows": {"train": 8}}
    writer = LayerWriter.open(tmp_path / "layer_0.zarr", **settings)
    x = torch.full((8, 16), 7e4).to(torch.float16)
    with pytest.raises(InputError, match=r"capture\.dtype=bfloat16"):
        writer.write_shard("train", 0, x, x)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("codec", Codec.fast, "codec is compact there and fast here"),
        ("dtype", torch.float16, "logical_dtype is bfloat16 there and float16 here"),
        ("d_model", 32, "d_model is 16 there and 32 here"),
        ("sequence_length", 4, "sequence_length is 8 there and 4 here"),
        ("shard_mb", 0.01, "shard_rows is 24 there and"),
        ("rows", {"train": 62, "validation": 24}, "rows.train is 61 there and 62 here"),
        ("rows", {"train": 61}, "rows.validation is 24 there and None here"),
        ("attributes", {"model": "n"}, "capture.model is m there and n here"),
    ],
)
def test_writer_refuses_a_store_of_other_settings(tmp_path, field, value, named):
    write(tmp_path / "layer_0.zarr")
    before = tree(tmp_path / "layer_0.zarr")
    with pytest.raises(ArtifactError) as caught:
        LayerWriter.open(tmp_path / "layer_0.zarr", **SETTINGS | {field: value})
    assert named in str(caught.value)
    assert tree(tmp_path / "layer_0.zarr") == before


def test_reader_refuses_another_format(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.commits.FORMAT_VERSION", 2)
        write(tmp_path / "layer_0.zarr")
    with pytest.raises(ArtifactError, match="format_version 2"):
        LayerReader(tmp_path / "layer_0.zarr")


# Shuffled batches. Row i of the input is i everywhere, and that of the output -i.

BATCH = 7


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> Iterator[LayerReader]:
    """600 rows in 75 chunks: three windows, the last of them short."""
    rows = torch.arange(600.0)[:, None].expand(-1, 16).contiguous()
    settings = {"rows": {"train": 600, "validation": 600}, "dtype": torch.float32}
    sizes = {"chunk_mb": 0.0006, "shard_mb": 0.002}
    path = tmp_path_factory.mktemp("numbered") / "layer_0.zarr"
    yield write(path, {"train": (rows, -rows), "validation": (rows, -rows)}, **settings, **sizes)


def order(reader: LayerReader, in_memory: bool, split: str = "train", **at: int) -> list[int]:
    found: list[int] = []
    for x, y in list(
        reader.batches(split, BATCH, **{"seed": 0, "epoch": 0} | at, in_memory=in_memory)
    ):
        assert x.shape == y.shape == (BATCH, 16)
        assert x.equal(-y) and x.equal(x[:, :1].expand(-1, 16))
        found += x[:, 0].int().tolist()
    return found


@pytest.mark.parametrize("in_memory", [True, False])
def test_batches_visit_every_row_once_but_the_ragged_end(numbered, in_memory):
    found = order(numbered, in_memory)
    assert len(found) == 600 // BATCH * BATCH
    assert len(set(found)) == len(found) and set(found) <= set(range(600))
    assert found != sorted(found)


@pytest.mark.parametrize("in_memory", [True, False])
def test_batches_depend_on_seed_epoch_and_split_alone(numbered, in_memory):
    first = order(numbered, in_memory)
    assert order(LayerReader(numbered.path), in_memory) == first
    others = [{"epoch": 1}, {"seed": 1}, {"split": "validation"}]
    assert all(order(numbered, in_memory, **other) != first for other in others)


@pytest.mark.parametrize("in_memory", [True, False])
def test_batches_resume_at_any_batch(numbered, in_memory):
    everything = order(numbered, in_memory)
    for skip in range(0, 600 // BATCH + 3):
        assert order(numbered, in_memory, skip=skip) == everything[skip * BATCH :]


def test_batches_from_disk_mix_chunks_of_the_whole_split(numbered):
    """Of 8 rows a chunk, 200 in a row are drawn from 32 chunks, from all over the split."""
    head = order(numbered, in_memory=False)[:196]
    chunks = {row // 8 for row in head}
    assert len(chunks) > 28
    assert min(chunks) < 15 and max(chunks) > 60


def test_batches_from_disk_leave_out_what_was_consumed(numbered, monkeypatch):
    read: list[int] = []
    original = LayerReader._read_chunk

    def counted(self, split, chunk, pair, first=0):
        read.append(chunk)
        original(self, split, chunk, pair, first)

    monkeypatch.setattr(LayerReader, "_read_chunk", counted)
    order(numbered, in_memory=False, skip=600 // BATCH - 1)
    assert len(read) == 75 - 2 * 32


def test_a_split_kept_in_memory_is_read_once(numbered, monkeypatch):
    reader = LayerReader(numbered.path)
    first = order(reader, in_memory=True)
    monkeypatch.setattr(LayerReader, "read", None)
    assert order(reader, in_memory=True) == first


def test_reader_epochs_that_are_streamed_by_turns_do_not_mix(tmp_path):
    write(tmp_path / "layer_0.zarr", activations(SETTINGS))
    reader = LayerReader(tmp_path / "layer_0.zarr")

    def epoch(k: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return reader.batches("train", 4, seed=0, epoch=k, in_memory=False)

    apart = [list(epoch(k)) for k in (0, 1)]
    by_turns = list(zip(epoch(0), epoch(1), strict=True))
    for k, alone in enumerate(apart):
        for expected, found in zip(alone, (turn[k] for turn in by_turns), strict=True):
            assert all(map(torch.equal, expected, found))


def in_one_shard(folder: Path, rows: int) -> LayerWriter:
    """In chunks of 8 rows."""
    return LayerWriter.open(
        folder / "layer_0.zarr",
        rows={"train": rows},
        d_model=4,
        dtype=torch.float32,
        sequence_length=8,
        codec=Codec.none,
        shard_mb=1,
        chunk_mb=8 * 4 * 4 / 1e6,
        attributes={},
    )


def test_other_chunks_are_mixed_together_in_another_epoch(tmp_path):
    writer = in_one_shard(tmp_path, 1600)
    writer.write_shard("train", 0, torch.zeros(1600, 4), torch.zeros(1600, 4))
    reader = LayerReader(tmp_path / "layer_0.zarr")
    plans = [reader._plan("train", 0, epoch, False) for epoch in (0, 1, 0)]
    assert plans[0] == plans[2] != plans[1]


def test_a_refusal_names_the_token_of_rows_that_come_in_pieces(tmp_path):
    writer = in_one_shard(tmp_path, 64)
    shard, x = writer.begin("train", 0), torch.zeros(24, 4)
    with ThreadPoolExecutor(1) as threads:
        shard.add(0, x, threads)
        bad = x.clone()
        bad[5, 1] = math.nan
        with pytest.raises(InputError, match="at token 29, channel 1"):
            shard.add(0, bad, threads)
