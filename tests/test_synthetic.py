"""Rows that were never captured have the captured ones' mean and covariance, and nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline import synthetic
from pipeline.config import Codec
from pipeline.ffn import DenseFFN
from pipeline.store import LayerReader
from pipeline.store_writer import LayerWriter
from pipeline.synthetic import SyntheticRows

D, F = 16, 24
ROWS = {"train": 3000, "validation": 64, "heldout": 32}
BATCH = 256


def dense_ffn() -> DenseFFN:
    generator = torch.Generator().manual_seed(5)
    up, gate = (torch.randn(F, D, generator=generator) for _ in range(2))
    return DenseFFN(up, torch.randn(D, F, generator=generator), gate)


def inputs(rows: int, seed: int) -> Tensor:
    """Correlated channels of unlike scales, one far from zero and one that is always zero."""
    mix = torch.randn(D, D, generator=torch.Generator().manual_seed(7))
    mix = mix * torch.logspace(-2, 1, D)
    mix[:, 3] = 0
    mean = torch.linspace(-1, 1, D)
    mean[3], mean[5] = 0, 50
    return mean + torch.randn(rows, D, generator=torch.Generator().manual_seed(seed)) @ mix


def store(path: Path, dtype: torch.dtype = torch.float32, **rows: int) -> LayerReader:
    split_rows = ROWS | rows
    settings: dict[str, Any] = {"codec": Codec.none, "shard_mb": 0.1, "chunk_mb": 0.01}
    settings |= {"sequence_length": 8, "attributes": {}, "d_model": D, "dtype": dtype}
    writer = LayerWriter.open(path, rows=split_rows, **settings)
    for seed, (split, n) in enumerate(split_rows.items()):
        x = inputs(n, seed).to(dtype)
        y = dense_ffn()(x.float()).to(dtype)
        for k in range(writer.n_shards[split]):
            shard = slice(k * writer.shard_rows, (k + 1) * writer.shard_rows)
            writer.write_shard(split, k, x[shard], y[shard])
    return LayerReader(path)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> LayerReader:
    return store(tmp_path_factory.mktemp("store") / "layer_0.zarr")


@pytest.fixture(scope="module")
def rows(reader: LayerReader) -> SyntheticRows:
    return SyntheticRows(reader, dense_ffn(), seed=3)


def epoch(rows: SyntheticRows, number: int, **order: Any) -> list[tuple[Tensor, Tensor]]:
    return list(rows.batches("train", BATCH, **{"seed": 3, "epoch": number} | order))


def drawn(rows: SyntheticRows, epochs: int) -> Tensor:
    """(rows, D) inputs of whole epochs, float64."""
    return torch.cat([x for k in range(epochs) for x, _ in epoch(rows, k)]).double()


def test_synthetic_rows_have_the_mean_and_the_covariance_of_the_captured_ones(reader, rows):
    real, made = reader.read("train")[0].double(), drawn(rows, 20)
    n, spread = len(made), real.std(dim=0)
    assert ((made.mean(dim=0) - real.mean(dim=0)).abs() <= 5 * spread / n**0.5 + 1e-5).all()
    scale = torch.outer(spread, spread) + 1e-9
    difference = (made.T.cov() - real.T.cov(correction=0)) / scale
    assert difference.abs().max() < 5 * (2 / n) ** 0.5
    # The bound is one that independent channels break.
    independent = (torch.diag(spread.square()) - real.T.cov()) / scale
    assert independent.abs().max() > 0.3


def test_synthetic_outputs_are_the_dense_ffns_of_their_inputs(rows):
    ffn = dense_ffn()
    for x, y in [*epoch(rows, 0), rows.read("train", 5, 2000)]:
        torch.testing.assert_close(y, ffn(x))


def test_synthetic_rows_are_of_the_stores_dtype_and_number(tmp_path: Path):
    rows = SyntheticRows(store(tmp_path / "a.zarr", torch.bfloat16), dense_ffn(), seed=0)
    made = epoch(rows, 0)
    assert len(made) == ROWS["train"] // BATCH
    for x, y in made:
        assert x.shape == y.shape == (BATCH, D) and x.dtype == y.dtype == torch.bfloat16
        # of the rounded input, so that the pair is one that a capture could hold
        assert torch.equal(dense_ffn()(x.float()).bfloat16(), y)


def test_synthetic_batches_go_on_from_any_one_with_the_same_bits(reader, rows):
    whole = epoch(rows, 1)
    again = SyntheticRows(reader, dense_ffn(), seed=3)
    for skip in (0, 1, 7, len(whole), len(whole) + 1):
        rest = epoch(again, 1, skip=skip, in_memory=False)
        assert len(rest) == max(0, len(whole) - skip)
        for made, wanted in zip(rest, whole[skip:], strict=True):
            assert torch.equal(torch.stack(made), torch.stack(wanted))


def test_synthetic_rows_are_new_in_every_batch_epoch_and_seed(rows):
    made = [epoch(rows, 0), epoch(rows, 1), epoch(rows, 0, seed=4)]
    firsts = [x[0].tolist() for batches in made for x, _ in batches]
    firsts += [rows.read("train", 0, 1)[0][0].tolist()]
    assert len({tuple(row) for row in firsts}) == len(firsts)


def test_no_captured_training_row_comes_out(reader, rows):
    captured = {tuple(row) for row in reader.read("train")[0].tolist()}
    made = torch.cat([drawn(rows, 3).float(), rows.read("train")[0]])
    assert len(captured) == ROWS["train"]
    assert not captured & {tuple(row) for row in made.tolist()}


def test_synthetic_read_gives_the_same_rows_whatever_is_asked_for(rows):
    whole = rows.read("train")
    assert len(whole[0]) == ROWS["train"]
    edge = synthetic.READ_ROWS
    for start, stop in ((0, 10), (edge - 3, edge + 3), (2990, 9999), (edge, edge), (-5, None)):
        for found, side in zip(rows.read("train", start, stop), whole, strict=True):
            assert torch.equal(found, side[start:stop])


@pytest.mark.parametrize("split", ["validation", "heldout"])
def test_rows_that_judge_are_the_captured_ones(reader, rows, split: str):
    for found, wanted in zip(rows.read(split, 3, 20), reader.read(split, 3, 20), strict=True):
        assert torch.equal(found, wanted)
    order: dict[str, Any] = {"seed": 1, "epoch": 2, "skip": 1, "in_memory": False}
    batches = zip(rows.batches(split, 8, **order), reader.batches(split, 8, **order), strict=True)
    for found, wanted in batches:
        assert torch.equal(torch.stack(found), torch.stack(wanted))


def test_fewer_rows_than_channels_are_enough(tmp_path: Path):
    """A covariance of rank 7: drawn rows lie where the captured ones do."""
    reader = store(tmp_path / "a.zarr", train=8)
    rows = SyntheticRows(reader, dense_ffn(), seed=0)
    real, (x, _) = reader.read("train")[0].double(), next(rows.batches("train", 8, seed=0, epoch=0))
    centred = real - real.mean(dim=0)
    away = x.double() - real.mean(dim=0)
    away = away - away @ torch.linalg.pinv(centred) @ centred
    assert away.abs().max() < 1e-4 * centred.abs().max()


def test_statistics_do_not_depend_on_how_many_rows_are_summed_at_a_time(reader, monkeypatch):
    real = reader.read("train")[0].double()
    for rows in (100, 100_000):
        monkeypatch.setattr(synthetic, "SUM_ROWS", rows)
        mean, covariance = synthetic._statistics(reader)
        torch.testing.assert_close(mean, real.mean(dim=0))
        torch.testing.assert_close(covariance, real.T.cov(correction=0), rtol=1e-9, atol=1e-9)
