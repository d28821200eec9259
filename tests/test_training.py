"""Training one layer: it learns, resumes exactly, and never ends worse than it began."""

import math
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from test_start import PLAIN as RIDGE
from test_start import D, F, dense_ffn, plan_of, write_store
from torch import Tensor

from pipeline import preflight, training
from pipeline.config import Dtype, Kernel, MoEConfig, RouterInit, Schedule, TrainConfig
from pipeline.errors import ArtifactError, InputError
from pipeline.ffn import DenseFFN
from pipeline.layers import HISTORY, load_layer, read_history
from pipeline.moe import SparseMoE
from pipeline.record import WEIGHTS
from pipeline.resume import CHECKPOINT
from pipeline.start import start_layer
from pipeline.store import LayerReader
from pipeline.training import Objective, fit_layer, rate, step

PLAIN = TrainConfig(
    epochs=2,
    batch_size=32,  # 16 steps an epoch
    learning_rate=3e-3,
    router_learning_rate=None,
    weight_decay=0.01,
    warmup_steps=4,
    schedule=Schedule.cosine,
    grad_clip=1.0,
    normalize_mse=True,
    use_cosine_loss=True,
    cosine_loss_weight=0.1,
    load_balance_coef=0.01,
    router_z_coef=0.001,
    balance_bias_rate=0.01,
    data_free=False,
    evaluate_every=8,
    patience=0,
    checkpoint_every=6,
    stream=False,
    dtype=Dtype.float32,
    kernel=Kernel.auto,
)
MOE = replace(RIDGE, router_init=RouterInit.random)  # far from the target: much to learn
Stored = tuple[DenseFFN, LayerReader]


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Stored:
    ffn = dense_ffn()
    return ffn, write_store(tmp_path_factory.mktemp("stored") / "layer_3.zarr", ffn)


def fit(
    stored: Stored,
    folder: Path,
    *,
    moe_cfg: MoEConfig = MOE,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    progress: Any = None,
    **changed: Any,
) -> SparseMoE:
    ffn, reader = stored
    folder.mkdir(exist_ok=True)
    return fit_layer(
        reader,
        ffn,
        plan_of(ffn, F // 4, 8, 2),
        folder,
        moe_cfg=moe_cfg,
        cfg=replace(PLAIN, **changed),
        seed=seed,
        device=torch.device("cpu"),
        dtype=dtype,
        **({"progress": progress} if progress else {}),
    )


def begin(stored: Stored) -> SparseMoE:
    """The layer as `fit` starts it."""
    ffn, reader = stored
    return start_layer(ffn, plan_of(ffn, F // 4, 8, 2), MOE, reader, seed=0)


def weights(folder: Path) -> bytes:
    return (folder / WEIGHTS).read_bytes()


def states(moe: SparseMoE) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in moe.state_dict().items()}


def assert_equal(one: SparseMoE, two: SparseMoE) -> None:
    torch.testing.assert_close(states(one), states(two), rtol=0, atol=0)


def column(folder: Path, name: str) -> list[float]:
    return [row[name] for row in read_history(folder) if name in row]


# It learns


def test_training_lowers_the_loss_and_improves_on_the_start(stored, tmp_path):
    fit(stored, tmp_path, epochs=8)
    loss = column(tmp_path, "loss")
    assert sum(loss[-3:]) < 0.75 * sum(loss[:3])
    for name in ("validation_loss", "validation_relative_mse"):
        assert column(tmp_path, name)[-1] < 0.7 * column(tmp_path, name)[0]
    cosine = column(tmp_path, "validation_cosine_sim")
    assert cosine[0] < cosine[-1] < 1


def test_validation_figures_are_those_of_the_saved_layer(stored, tmp_path):
    """Over the whole split, its ragged last batch of 256 - 5 x 48 rows included."""
    x, y = stored[1].read("validation")
    fit(stored, tmp_path, batch_size=48)
    moe, record = load_layer(tmp_path)
    trained = record["training"]
    y_hat = moe(x).detach()
    relative_mse = float((y_hat - y).square().sum() / y.square().sum())
    cosine_sim = float(torch.nn.functional.cosine_similarity(y_hat, y, dim=-1).mean())
    mse = float((y_hat - y).square().mean() / y.var(dim=0, unbiased=False).mean())
    assert trained["validation"]["validation_relative_mse"] == pytest.approx(relative_mse, rel=1e-4)
    assert trained["validation"]["validation_cosine_sim"] == pytest.approx(cosine_sim, rel=1e-4)
    wanted = mse + 0.1 * (1 - cosine_sim)
    assert trained["validation"]["validation_loss"] == pytest.approx(wanted, rel=1e-4)
    assert trained["steps"] == 2 * (512 // 48)


def test_training_says_what_it_was_told_and_how_it_went(stored, tmp_path):
    calls: list[tuple[int, int, str]] = []
    fit(stored, tmp_path, progress=lambda *call: calls.append(call))
    assert [call[:2] for call in calls] == [(step, 32) for step in range(1, 33)]
    assert all("validation cosine 0." in note for _, _, note in calls)
    assert column(tmp_path, "step") == [0, 8, 16, 24, 32]
    _, record = load_layer(tmp_path)
    plan = plan_of(stored[0], F // 4, 8, 2)
    assert {key: record[key] for key in plan} == plan
    assert record["training"]["best_step"] == 32


def test_training_without_epochs_keeps_the_start(stored, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "check_checkpoints", None)  # there will be none
    moe = fit(stored, tmp_path, epochs=0)
    assert_equal(moe, begin(stored))
    assert_equal(load_layer(tmp_path)[0], moe)
    assert [row["step"] for row in read_history(tmp_path)] == [0]
    assert load_layer(tmp_path)[1]["training"]["steps"] == 0


def test_training_never_ends_worse_than_it_began(stored, tmp_path):
    """At an absurd learning rate every later state is worse, so the start is what is saved."""
    fit(stored, tmp_path, learning_rate=100.0, warmup_steps=0)
    losses = column(tmp_path, "validation_loss")
    assert min(losses[1:]) > 10 * losses[0]
    moe, record = load_layer(tmp_path)
    assert_equal(moe, begin(stored))
    assert record["training"]["best_step"] == 0


def test_training_keeps_the_best_state_and_not_the_last(stored, tmp_path):
    """A learning rate that grows past what is stable: the best lies in between."""
    changed = {"learning_rate": 0.6, "warmup_steps": 64, "schedule": Schedule.constant, "epochs": 3}
    moe = fit(stored, tmp_path, evaluate_every=1, **changed)
    losses = column(tmp_path, "validation_loss")
    best = losses.index(min(losses))
    assert 0 < best < len(losses) - 1 and losses[-1] > 1.5 * losses[best]
    record = load_layer(tmp_path)[1]["training"]
    assert record["best_step"] == best
    assert record["validation"]["validation_loss"] == losses[best]
    x, y = stored[1].read("validation")
    with torch.no_grad():
        relative_mse = float((moe(x) - y).square().sum() / y.square().sum())
    assert relative_mse == pytest.approx(column(tmp_path, "validation_relative_mse")[best])


@pytest.mark.parametrize("value", [0.0, 0.3])
@pytest.mark.parametrize("normalize_mse", [True, False])
def test_training_on_a_constant_target_stays_finite(tmp_path, value, normalize_mse):
    """Its variance is zero, and in the first case its norm as well."""
    ffn = dense_ffn()
    target = torch.full((D,), value)
    reader = write_store(tmp_path / "layer_3.zarr", ffn, target=target)
    fit((ffn, reader), tmp_path / "out", normalize_mse=normalize_mse)
    rows = read_history(tmp_path / "out")
    assert all(math.isfinite(figure) for row in rows for figure in row.values())
    assert rows[-1]["validation_loss"] <= rows[0]["validation_loss"] < 10


# It refuses


def test_training_names_the_step_at_which_a_loss_is_not_finite(stored, tmp_path):
    with pytest.raises(ArtifactError, match=r"diverged at step 1\b") as caught:
        fit(stored, tmp_path, learning_rate=1e30, warmup_steps=0, evaluate_every=1)
    assert "validation_loss=" in str(caught.value) and "train.learning_rate" in str(caught.value)
    assert not (tmp_path / WEIGHTS).exists()


def test_training_that_diverged_leaves_only_finite_checkpoints(stored, tmp_path):
    """Between validations too: the loss of the step is looked at before its state is kept."""
    often = {"evaluate_every": 1000, "checkpoint_every": 1}
    with pytest.raises(ArtifactError, match=r"diverged at step \d+\."):
        fit(stored, tmp_path, learning_rate=1e30, warmup_steps=0, **often)
    with safe_open(tmp_path / CHECKPOINT, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            assert file.get_tensor(name).isfinite().all(), name


def test_training_needs_one_whole_batch(stored, tmp_path):
    with pytest.raises(InputError) as caught:
        fit(stored, tmp_path, batch_size=513)
    assert "512 tokens, train.batch_size=513" in str(caught.value)
    assert not any(tmp_path.iterdir())
    fit(stored, tmp_path, batch_size=513, epochs=0)
    fit(stored, tmp_path, batch_size=512)


# Every setting

CHANGED: dict[str, Any] = {
    "learning_rate": 1e-3,
    "router_learning_rate": 1e-2,
    "weight_decay": 1.0,
    "warmup_steps": 0,
    "schedule": Schedule.constant,
    "grad_clip": 0.01,
    "normalize_mse": False,
    "use_cosine_loss": False,
    "cosine_loss_weight": 0.3,
    "load_balance_coef": 0.3,
    "router_z_coef": 0.3,
    "batch_size": 64,
    "epochs": 3,
    "stream": True,
}
ELSEWHERE = {"evaluate_every", "checkpoint_every", "dtype", "kernel"}
ELSEWHERE |= {"balance_bias_rate", "data_free", "static_control", "patience", "window"}
"""They have tests of their own."""


@pytest.fixture(scope="module")
def plain(stored: Stored, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    fit(stored, folder)
    return folder


def test_training_repeats_bit_for_bit(stored, plain, tmp_path):
    fit(stored, tmp_path)
    assert weights(tmp_path) == weights(plain)
    assert (tmp_path / HISTORY).read_bytes() == (plain / HISTORY).read_bytes()


@pytest.mark.parametrize("name", CHANGED)
def test_every_setting_of_the_training_changes_the_layer(stored, plain, tmp_path, name):
    fit(stored, tmp_path, **{name: CHANGED[name]})
    assert load_layer(tmp_path)[1]["training"]["best_step"] > 0
    assert weights(tmp_path) != weights(plain)


def test_every_setting_of_the_training_is_tried():
    assert CHANGED.keys() | ELSEWHERE == {field.name for field in fields(TrainConfig)}


def test_start_of_the_layer_changes_it(stored, plain, tmp_path):
    fit(stored, tmp_path, moe_cfg=RIDGE)
    assert weights(tmp_path) != weights(plain)


def test_order_of_the_rows_depends_on_seed_and_epoch(stored, tmp_path):
    """At a learning rate of zero, from a start without chance, the losses tell the batches."""
    still = {"learning_rate": 0.0, "evaluate_every": 1}
    still["moe_cfg"] = replace(MOE, router_init=RouterInit.zero)
    fit(stored, tmp_path / "0", **still)
    fit(stored, tmp_path / "1", seed=1, **still)
    one, two = (column(tmp_path / seed, "loss") for seed in ("0", "1"))
    assert not set(one[:16]) & set(one[16:]) and not set(one) & set(two)
    assert sum(one[:16]) / 16 == pytest.approx(sum(two[16:]) / 16, rel=0.02)


def test_grad_clip_of_zero_clips_nothing(stored, tmp_path):
    for grad_clip in (0.0, 1e6):
        fit(stored, tmp_path / str(grad_clip), grad_clip=grad_clip)
    assert weights(tmp_path / "0.0") == weights(tmp_path / "1000000.0")


def test_evaluate_every_sets_the_rows_of_the_history_and_no_weight(stored, tmp_path):
    """Plus the start and the last step."""
    for every in (5, 16):
        folder = tmp_path / str(every)
        fit(stored, folder, evaluate_every=every)
        assert column(folder, "step") == sorted({*range(0, 33, every), 32})
    assert weights(tmp_path / "5") == weights(tmp_path / "16")


def test_checkpoint_every_sets_when_a_checkpoint_is_written(stored, tmp_path):
    seen: list[tuple[int, int]] = []

    def watch(done: int, total: int, note: str) -> None:
        path = tmp_path / CHECKPOINT
        if path.exists():
            with safe_open(path, framework="pt") as file:
                seen.append((done, int(file.get_tensor("optimizer/0/step"))))

    fit(stored, tmp_path, evaluate_every=1, checkpoint_every=12, progress=watch)
    wanted = [(step, step // 12 * 12) for step in range(12, 33)]
    assert seen == wanted


@pytest.mark.parametrize("kernel", [Kernel.padded, Kernel.grouped])
def test_kernels_train_alike(stored, tmp_path, kernel):
    """Up to rounding, beside the way that the weights went in 32 steps."""
    reference = fit(stored, tmp_path / "loop", kernel=Kernel.loop)
    found = fit(stored, tmp_path / kernel.name, kernel=kernel)
    assert (reference.kernel, found.kernel) == ("loop", kernel.name)
    start, end, other = (states(moe) for moe in (begin(stored), reference, found))
    for name, weight in end.items():
        assert (other[name] - weight).norm() < 0.01 * (weight - start[name]).norm(), name
    losses = [column(tmp_path / name, "validation_loss") for name in ("loop", kernel.name)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_training_in_bfloat16_keeps_float32_weights_and_learns_alike(stored, plain, tmp_path):
    moe = fit(stored, tmp_path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in moe.parameters()} == {torch.float32}
    assert weights(tmp_path) != weights(plain)
    half, full = (column(folder, "validation_loss") for folder in (tmp_path, plain))
    assert half == pytest.approx(full, rel=0.1) and half[0] != full[0]
    assert half[-1] < 0.9 * half[0]


def test_gradients_of_float16_products_do_not_vanish(tmp_path):
    """Of a layer whose outputs are large: those by the output are below the least float16."""
    ffn = dense_ffn()
    ffn = replace(ffn, down_proj=1000 * ffn.down_proj)
    reader = write_store(tmp_path / "layer_3.zarr", ffn)
    plan = plan_of(ffn, F // 4, 8, 2)
    found = {}
    for dtype in (torch.float32, torch.float16):
        objective = Objective(reader, PLAIN, torch.device("cpu"), dtype)
        one = training.begin(reader, ffn, plan, objective, moe_cfg=MOE, seed=0, total=1)
        step(one, objective, *reader.read("train"))
        found[dtype] = [p.grad.flatten() for p in one.moe.parameters() if p.grad is not None]
    for half, full in zip(*found.values(), strict=True):
        assert torch.nn.functional.cosine_similarity(half, full, dim=0) > 0.999


def test_training_in_float16_resumes_bit_for_bit(stored, tmp_path, monkeypatch):
    """With the scale of its loss, which falls in the first steps from what is far too much."""
    scaler = partial(torch.amp.GradScaler, "cpu", init_scale=2.0**40)
    monkeypatch.setattr(training, "loss_scaler", lambda *_: scaler())
    fit(stored, tmp_path / "whole", dtype=torch.float16)

    def progress(done: int, total: int, note: str) -> None:
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(stored, tmp_path / "killed", dtype=torch.float16, progress=progress)
    fit(stored, tmp_path / "killed", dtype=torch.float16)
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    losses = column(tmp_path / "whole", "validation_loss")
    assert losses[0] == losses[1] > losses[-1], "steps were passed over at first"


# The loss


@torch.no_grad()
def by_hand(moe: SparseMoE, x: Tensor, y: Tensor, cfg: TrainConfig, variance: float) -> dict:
    """Every term in float64, written out over tokens and experts."""
    moe = moe.double()
    x, y = x.double(), y.double()
    logits = x @ moe.router.weight.T
    probability = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    chosen = torch.zeros_like(logits)
    y_hat = torch.zeros_like(y)
    for t in range(len(x)):
        best = sorted(range(8), key=lambda e, t=t: -float(logits[t, e]))[:2]
        shares = [math.exp(float(logits[t, e])) for e in best]
        for e, share in zip(best, shares, strict=True):
            gate, up = moe.get_parameter("gate_up_proj")[e].chunk(2)
            hidden = torch.nn.functional.silu(gate @ x[t]) * (up @ x[t])
            y_hat[t] += share / sum(shares) * (moe.down_proj[e] @ hidden)
            chosen[t, e] = 1
    norms = y_hat.norm(dim=1) * y.norm(dim=1)
    cosine = float(((y_hat * y).sum(dim=1) / norms).mean())
    balance = 8 * float((chosen.mean(dim=0) / 2 * probability.mean(dim=0)).sum())
    z = float(logits.exp().sum(dim=1).log().square().mean())
    return {
        "mse": float((y_hat - y).square().mean()) / variance,
        "cosine": cfg.cosine_loss_weight * (1 - cosine) if cfg.use_cosine_loss else 0.0,
        "load_balance": cfg.load_balance_coef * balance,
        "router_z": cfg.router_z_coef * z,
    }


@pytest.mark.parametrize(
    "changed",
    [{"normalize_mse": False}, {"normalize_mse": True}, {"use_cosine_loss": False}],
    ids=str,
)
def test_loss_is_the_formula_written_out(stored, tmp_path, changed):
    """Of all rows in one batch: the training loss at the start, and its validation loss.

    Without `normalize_mse` the first two terms are the seed's `MSE + weight x (1 - cosine)`.
    """
    changed = {"epochs": 1, "batch_size": 512, "cosine_loss_weight": 0.7} | changed
    cfg = replace(PLAIN, **changed)
    reader = stored[1]
    y = reader.read("validation")[1].double()
    variance = float((y - y.mean(dim=0)).square().mean()) if cfg.normalize_mse else 1.0
    fit(stored, tmp_path, **changed)
    before, after = read_history(tmp_path)
    terms = by_hand(begin(stored), *reader.read("train"), cfg, variance)
    for name, wanted in terms.items():
        assert after[name] == pytest.approx(wanted, rel=1e-4), name
    assert after["loss"] == pytest.approx(sum(terms.values()), rel=1e-4)
    terms = by_hand(begin(stored), *reader.read("validation"), cfg, variance)
    wanted = terms["mse"] + terms["cosine"]
    assert before["validation_loss"] == pytest.approx(wanted, rel=1e-4)


def test_loss_of_half_precision_tensors_is_taken_in_float32(stored):
    x, y = (rows.bfloat16() for rows in stored[1].read("validation"))
    objective = Objective(stored[1], PLAIN, torch.device("cpu"), torch.bfloat16)
    found, wanted = objective.reconstruction(x, y), objective.reconstruction(x.float(), y.float())
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


# The learning rate


def test_rate_warms_up_in_equal_steps_and_then_stays():
    cfg = replace(PLAIN, schedule=Schedule.constant, warmup_steps=4)
    assert [rate(step, 100, cfg) for step in (0, 1, 2, 3, 4, 99)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert rate(0, 100, replace(cfg, warmup_steps=0)) == 1


def test_rate_falls_by_half_a_cosine():
    cfg = replace(PLAIN, warmup_steps=0)
    wanted = {0: 1, 25: 0.5 + 0.125**0.5, 50: 0.5, 75: 0.5 - 0.125**0.5}
    assert {step: rate(step, 100, cfg) for step in wanted} == pytest.approx(wanted)
    assert 0 < rate(99, 100, cfg) < 3e-4
    assert rate(1, 4, replace(cfg, warmup_steps=4)) == pytest.approx(0.5 * (0.5 + 0.125**0.5))


def moved(stored: Stored, folder: Path, **changed: Any) -> dict[str, float]:
    """How far the first step of AdamW moves a weight at most: by its learning rate."""
    still = {"weight_decay": 0.0, "schedule": Schedule.constant, "warmup_steps": 10}
    after = states(fit(stored, folder, epochs=1, batch_size=512, **still | changed))
    assert load_layer(folder)[1]["training"]["best_step"] == 1
    before = states(begin(stored))
    return {name: float((after[name] - before[name]).abs().max()) for name in before}


def test_first_step_moves_weights_by_the_scheduled_rate(stored, tmp_path):
    distance = moved(stored, tmp_path, learning_rate=1e-3)
    assert distance == pytest.approx(dict.fromkeys(distance, 1e-4), rel=0.01)


@pytest.mark.parametrize("router_rate", [0.0, 3e-3])
def test_router_has_its_own_learning_rate(stored, tmp_path, router_rate):
    """Zero included: it holds the router still."""
    distance = moved(stored, tmp_path, learning_rate=1e-3, router_learning_rate=router_rate)
    assert distance.pop("router.weight") == pytest.approx(0.1 * router_rate, rel=0.01)
    assert distance == pytest.approx(dict.fromkeys(distance, 1e-4), rel=0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_ragged_end_of_an_epoch_is_left_out(stored, tmp_path, stream):
    fit(stored, tmp_path, batch_size=200, epochs=3, stream=stream)
    assert load_layer(tmp_path)[1]["training"]["steps"] == 3 * 2
