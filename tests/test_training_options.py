"""What a layer can be trained as besides the default: experts that choose, grow, are balanced."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_start import D, F, dense_ffn, plan_of, write_store
from test_training import MOE, PLAIN, Stored, assert_equal, column, states, weights

from pipeline import training
from pipeline.config import Growth, RouterInit
from pipeline.layers import load_layer, read_history
from pipeline.moe import SparseMoE
from pipeline.resume import CHECKPOINT
from pipeline.router import routing_statistics
from pipeline.shape import MoEShape
from pipeline.training import fit_layer

DYNAMIC = replace(MOE, dynamic=replace(MOE.dynamic, enabled=True))
EXPERT_CHOICE = {"routing": "expert_choice", "capacity_factor": 1.25}


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Stored:
    ffn = dense_ffn()
    return ffn, write_store(tmp_path_factory.mktemp("stored") / "layer_3.zarr", ffn)


class Killed(BaseException):
    pass


def fit(
    stored: Stored,
    folder: Path,
    *,
    moe_cfg: Any = MOE,
    shape: dict[str, Any] | None = None,
    init: str = "slice",
    killed_at: int | None = None,
    **changed: Any,
) -> SparseMoE:
    ffn, reader = stored
    folder.mkdir(exist_ok=True)
    plan = plan_of(ffn, F // 4, 8, 2, init)
    plan["shape"] |= shape or {}

    def progress(done: int, total: int, note: str) -> None:
        if done == killed_at:
            raise Killed

    return fit_layer(
        reader,
        ffn,
        plan,
        folder,
        moe_cfg=moe_cfg,
        cfg=replace(PLAIN, **changed),
        seed=0,
        device=torch.device("cpu"),
        dtype=torch.float32,
        progress=progress,
    )


def sizes(folder: Path) -> list[list[int]]:
    return [entry["widths"] for entry in load_layer(folder)[1]["training"]["sizes"]]


def warnings(folder: Path) -> str:
    return "\n".join(load_layer(folder)[1]["training"]["warnings"])


# Dynamic experts


def test_dynamic_experts_change_their_widths_and_hold_their_sum(stored, tmp_path):
    moe = fit(stored, tmp_path, moe_cfg=DYNAMIC)
    record = load_layer(tmp_path)[1]
    steps = [entry["step"] for entry in record["training"]["sizes"]]
    assert steps == [0, 5, 10, 15, 20, 25, 30]
    assert sizes(tmp_path)[0] == [16] * 8 and sizes(tmp_path)[-1] != [16] * 8
    assert all(sum(widths) == 128 for widths in sizes(tmp_path))
    assert all(8 <= w <= 64 and w % 8 == 0 for widths in sizes(tmp_path) for w in widths)
    assert record["shape"]["expert_widths"] == list(moe.shape.widths) in sizes(tmp_path)
    assert record["shape"]["d_ff_expert"] == max(moe.shape.widths)
    assert column(tmp_path, "validation_loss")[-1] < column(tmp_path, "validation_loss")[0]


def test_dynamic_layer_opens_as_it_was_saved(stored, tmp_path):
    moe = fit(stored, tmp_path, moe_cfg=DYNAMIC)
    opened, _ = load_layer(tmp_path)
    assert opened.shape == moe.shape
    x = stored[1].read("validation")[0]
    opened.kernel = moe.kernel
    assert torch.equal(opened(x), moe(x))


def test_dynamic_experts_keep_the_best_state_with_the_widths_that_it_had(stored, tmp_path):
    """A learning rate that grows past what is stable: the best lies before the last sizes."""
    wild = {"learning_rate": 0.6, "warmup_steps": 64, "epochs": 3, "evaluate_every": 1}
    moe = fit(stored, tmp_path, moe_cfg=DYNAMIC, **wild)
    record = load_layer(tmp_path)[1]
    best = record["training"]["best_step"]
    history = record["training"]["sizes"]
    then = [entry["widths"] for entry in history if entry["step"] <= best][-1]
    assert list(moe.shape.widths) == then != history[-1]["widths"]
    x, y = stored[1].read("validation")
    with torch.no_grad():
        relative_mse = float((moe(x) - y).square().sum() / y.square().sum())
    assert relative_mse == pytest.approx(min(column(tmp_path, "validation_relative_mse")), rel=1e-3)


@pytest.mark.parametrize("killed_at", [9, 14, 28])
def test_dynamic_training_resumes_bit_for_bit(stored, tmp_path, killed_at):
    """Checkpoints lie at 6, 12, 18, 24; sizes change at 5, 10, ... with what was counted since."""
    fit(stored, tmp_path / "whole", moe_cfg=DYNAMIC)
    with pytest.raises(Killed):
        fit(stored, tmp_path / "killed", moe_cfg=DYNAMIC, killed_at=killed_at)
    assert (tmp_path / "killed" / CHECKPOINT).exists()
    fit(stored, tmp_path / "killed", moe_cfg=DYNAMIC)
    for name in ("layer.safetensors", "config.json", "history.csv"):
        one, two = ((tmp_path / run / name).read_bytes() for run in ("whole", "killed"))
        assert one == two, name


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("enabled", False),
        ("reallocate_every_n_steps", 11),
        ("n_reallocated", 1),
        ("growth_factor", 2.0),
        ("shrink_factor", 0.3),
        ("min_d_ff", 16),
        ("max_d_ff", 24),
        ("growth", Growth.interpolate),
    ],
)
def test_every_setting_of_dynamic_experts_changes_the_layer(stored, tmp_path, key, value):
    plain = replace(DYNAMIC.dynamic, growth_factor=1.5, shrink_factor=0.5)
    if key == "shrink_factor":  # a narrow expert can give no more than down to its bound
        plain = replace(plain, growth_factor=3.0)
    for name, dynamic in (("0", plain), ("1", replace(plain, **{key: value}))):
        wide = {"d_ff_expert": 32} if key == "shrink_factor" else {}
        init = {"init": "random"} if wide else {}
        moe_cfg = replace(DYNAMIC, dynamic=dynamic)
        assert not init or wide
        fit(stored, tmp_path / name, moe_cfg=moe_cfg, shape=wide)
    assert weights(tmp_path / "0") != weights(tmp_path / "1")


def test_each_reallocation_is_by_the_losses_since_the_last(stored, tmp_path, monkeypatch):
    counted, reallocate = [], training._reallocate

    def watched(fit: Any) -> None:
        counted.append(float(fit.losses.count_E.sum()))
        reallocate(fit)

    monkeypatch.setattr(training, "_reallocate", watched)
    fit(stored, tmp_path, moe_cfg=DYNAMIC)
    assert len(counted) == 6 and len(set(counted)) == 1


def test_no_sizes_change_after_the_last_step(stored, tmp_path):
    halves = replace(DYNAMIC, dynamic=replace(DYNAMIC.dynamic, reallocate_every_n_steps=16))
    fit(stored, tmp_path, moe_cfg=halves)
    told = load_layer(tmp_path)[1]["training"]
    assert told["steps"] == 32 and [entry["step"] for entry in told["sizes"]] == [0, 16]


# Experts that choose


def test_expert_choice_learns_and_says_what_it_leaves_out(stored, tmp_path, capsys):
    fit(stored, tmp_path, shape=EXPERT_CHOICE, epochs=6)
    relative = column(tmp_path, "validation_relative_mse")
    assert relative[-1] < 0.9 * relative[0]
    unserved = column(tmp_path, "unserved_tokens")
    assert all(0 < share < 1 for share in unserved)
    assert "taken by no expert" in warnings(tmp_path)
    assert "token_choice is recommended" in capsys.readouterr().err


def test_expert_choice_is_judged_by_the_rule_that_it_will_run_with(stored, tmp_path):
    """The saved layer, tokens one by one, gives the figures of its history."""
    fit(stored, tmp_path, shape=EXPERT_CHOICE)
    moe, record = load_layer(tmp_path)
    x, y = stored[1].read("validation")
    with torch.no_grad():
        alone = torch.cat([moe(row) for row in x.split(1)])
    relative_mse = float((alone - y).square().sum() / y.square().sum())
    wanted = record["training"]["validation"]["validation_relative_mse"]
    assert relative_mse == pytest.approx(wanted, rel=1e-4)
    share = routing_statistics(moe.route(x).taken_TE())["experts_per_token"]
    assert share == pytest.approx(1.25, rel=0.05)


def test_capacity_factor_changes_the_layer(stored, tmp_path):
    for factor in (1.25, 2.5):
        fit(stored, tmp_path / str(factor), shape=EXPERT_CHOICE | {"capacity_factor": factor})
    few, many = (column(tmp_path / run, "unserved_tokens")[0] for run in ("1.25", "2.5"))
    assert many < few


# Routers


def test_mlp_router_starts_as_the_linear_one_and_learns(stored, tmp_path):
    shape = {"router_width": 8}
    start = fit(stored, tmp_path / "start", shape=shape, epochs=0)
    linear = fit(stored, tmp_path / "linear", epochs=0)
    x = stored[1].read("validation")[0]
    assert torch.equal(start.router(x), linear.router(x))
    moe = fit(stored, tmp_path / "mlp", shape=shape)
    for name in ("hidden_proj", "output_proj"):
        assert not torch.equal(moe.router.get_parameter(name), start.router.get_parameter(name))
    assert_equal(load_layer(tmp_path / "mlp")[0], moe)


def test_router_width_changes_the_layer(stored, tmp_path):
    for width in (4, 8):
        moe = fit(stored, tmp_path / str(width), shape={"router_width": width})
        assert moe.router.hidden_proj.shape == (width, D)


def skewed(folder: Path) -> Stored:
    """Inputs that a random router sends to few experts."""
    ffn, mean = dense_ffn(), torch.zeros(D)
    mean[3] = 20.0
    return ffn, write_store(folder / "layer_3.zarr", ffn, mean=mean)


def test_balance_bias_evens_the_load_without_a_loss(tmp_path):
    stored = skewed(tmp_path)
    alone = {"load_balance_coef": 0.0, "epochs": 20, "learning_rate": 1e-4}
    fit(stored, tmp_path / "without", **alone)
    for rate in (0.0, 0.01):
        shape = {"balance_bias": True}
        moe = fit(stored, tmp_path / str(rate), shape=shape, balance_bias_rate=rate, **alone)
    assert moe.router.balance_bias.abs().max() > 0
    loads = {run: column(tmp_path / run, "load_max_over_mean")[-1] for run in ("0.0", "0.01")}
    assert loads["0.01"] < 0.5 * loads["0.0"]
    assert loads["0.0"] == column(tmp_path / "without", "load_max_over_mean")[-1]


def test_training_warns_of_dead_experts_and_of_collapse(tmp_path, capsys):
    fit(skewed(tmp_path), tmp_path / "out", learning_rate=0.0, epochs=1)
    said = capsys.readouterr().err
    assert said.count("experts get no token") == 1 and said.count("routing collapses") == 1
    assert "layer 3, step 0" in said
    assert "experts get no token" in warnings(tmp_path / "out")
    row = read_history(tmp_path / "out")[0]
    assert row["dead_experts"] > 0 and row["load_max_over_mean"] > 2.5


def test_training_of_an_even_layer_warns_of_nothing(stored, tmp_path, capsys):
    fit(stored, tmp_path, moe_cfg=replace(MOE, router_init=RouterInit.ridge))
    assert "warning" not in capsys.readouterr().err and warnings(tmp_path) == ""


def test_per_token_losses_have_the_mean_of_the_loss(stored):
    from pipeline.training import Objective

    x, y = stored[1].read("validation")
    for use_cosine in (True, False):
        cfg = replace(PLAIN, use_cosine_loss=use_cosine)
        objective = Objective(stored[1], cfg, torch.device("cpu"), torch.float32)
        total = float(sum(objective.reconstruction(x, y)))
        assert float(objective.losses(x, y).mean()) == pytest.approx(total, rel=1e-5)


def test_a_balance_bias_moves_by_its_rate_at_every_step(stored, tmp_path):
    """Whatever the schedule of the learning rate."""
    moe = fit(stored, tmp_path, shape={"balance_bias": True}, balance_bias_rate=2.0**-6)
    steps = moe.router.balance_bias * 2**6
    assert steps.count_nonzero() and torch.equal(steps, steps.round())


# Without the captured rows


def test_data_free_training_sees_no_captured_row_and_learns_less(stored, tmp_path):
    fit(stored, tmp_path / "captured", epochs=4)
    fit(stored, tmp_path / "free", epochs=4, data_free=True)
    captured, free = (
        column(tmp_path / run, "validation_relative_mse") for run in ("captured", "free")
    )
    assert free[-1] < free[0] and weights(tmp_path / "captured") != weights(tmp_path / "free")
    assert captured[-1] < 1.05 * free[-1]


def test_data_free_training_resumes_bit_for_bit(stored, tmp_path):
    fit(stored, tmp_path / "whole", data_free=True)
    with pytest.raises(Killed):
        fit(stored, tmp_path / "killed", data_free=True, killed_at=22)
    fit(stored, tmp_path / "killed", data_free=True)
    assert weights(tmp_path / "whole") == weights(tmp_path / "killed")


def test_shape_of_a_layer_survives_json(stored, tmp_path):
    fit(stored, tmp_path, moe_cfg=DYNAMIC)
    record = load_layer(tmp_path)[1]
    shape = MoEShape(**record["shape"])
    assert asdict(shape)["expert_widths"] == tuple(record["shape"]["expert_widths"])
    neurons = sum(shape.widths)
    assert shape.active_ffn_fraction == pytest.approx(2 * neurons / 8 / F)
    assert math.isclose(shape.total_parameters, 3 * D * neurons + 8 * D)
    assert states(load_layer(tmp_path)[0])["down_proj"].shape[2] == max(shape.widths)


@pytest.mark.parametrize(("top_k", "held"), [(1, True), (2, False)])
def test_router_of_specialists_is_held_where_each_token_takes_one(stored, tmp_path, top_k, held):
    """Its weights are then always 1, and balance alone would move it."""
    given = {"init": "specialist", "shape": {"n_experts": 4, "top_k": top_k}}
    start = fit(stored, tmp_path / "start", epochs=0, **given)
    moe = fit(stored, tmp_path / "fitted", **given)
    assert torch.equal(moe.router.weight, start.router.weight) == held
    assert not torch.equal(moe.down_proj, start.down_proj)
    assert (set(column(tmp_path / "fitted", "load_balance")) == {0.0}) == held


@pytest.mark.parametrize("router_init", [RouterInit.ridge, RouterInit.random])
def test_fitted_router_of_other_starts_is_held_too(stored, tmp_path, router_init):
    """One that nothing has fitted learns what the balance terms teach."""
    moe_cfg = replace(MOE, router_init=router_init)
    given = {"moe_cfg": moe_cfg, "init": "cluster", "shape": {"n_experts": 4, "top_k": 1}}
    given |= {"load_balance_coef": 1.0}
    start = fit(stored, tmp_path / "start", epochs=0, **given)
    fit(stored, tmp_path / "fitted", **given)
    held = router_init is RouterInit.ridge
    assert (set(column(tmp_path / "fitted", "load_balance")) == {0.0}) == held
    moe = load_layer(tmp_path / "fitted")[0]
    assert torch.equal(moe.router.weight, start.router.weight) == held
    assert not torch.equal(moe.down_proj, start.down_proj)


@pytest.mark.parametrize("virtual", [True, False])
def test_slices_of_a_replica_share_their_router_row_while_it_learns(stored, tmp_path, virtual):
    moe_cfg = replace(MOE, virtual_groups=virtual, init_noise=0.1)
    given = {"moe_cfg": moe_cfg, "shape": {"n_experts": 12, "top_k": 4}}
    start = fit(stored, tmp_path / "start", epochs=0, **given)
    moe = fit(stored, tmp_path / "fitted", **given)
    rows_RSD = moe.router.weight.unflatten(0, (3, 4))
    assert torch.equal(rows_RSD, rows_RSD[:, :1].expand_as(rows_RSD)) == virtual
    assert not torch.equal(moe.router.weight, start.router.weight)
    chosen = moe.route(stored[1].read("validation")[0]).expert_ids // 4
    assert bool((chosen == chosen[:, :1]).all()) == virtual


@pytest.mark.parametrize("static_control", [True, False])
def test_stage_fits_the_static_control_where_it_is_asked_for(
    project, static_control: bool, stored: Stored
):
    from pipeline import artifacts, compose, durable
    from pipeline.stages import CAPTURE, train

    CAPTURE.mkdir(parents=True)
    ffn = stored[0]
    write_store(CAPTURE / "layer_3.zarr", ffn)
    ffn.save(CAPTURE / "ffn_3.safetensors")
    budget = project / "budget"
    budget.mkdir()
    durable.write_json(budget / "layer_3.json", plan_of(ffn, F // 4, 8, 2))
    for folder in (CAPTURE, budget):
        artifacts.write_manifest(folder, {})
    options = ["train.batch_size=64", f"train.static_control={str(static_control).lower()}"]
    train.run(compose.load(["experiment=pico", *options]), 3, budget=budget)
    folder = project / "stages/train/layer_3"
    assert load_layer(folder)[0].shape.n_experts == 8
    assert (folder / "static").exists() == static_control
    if static_control:
        assert load_layer(folder / "static")[0].shape.widths == (2 * F // 4,)


# Early stop


def test_training_stops_after_as_many_validations_without_a_better_one(stored, tmp_path):
    """At a rate that only spoils the start is the best; a killed run stops at the same step."""
    spoilt = {"learning_rate": 0.5, "warmup_steps": 0, "evaluate_every": 2, "checkpoint_every": 1}
    fit(stored, tmp_path / "stopped", patience=3, **spoilt)
    fit(stored, tmp_path / "never", patience=0, **spoilt)
    with pytest.raises(Killed):
        fit(stored, tmp_path / "killed", patience=3, killed_at=5, **spoilt)
    fit(stored, tmp_path / "killed", patience=3, **spoilt)
    stopped, never, killed = (
        load_layer(tmp_path / name)[1]["training"] for name in ("stopped", "never", "killed")
    )
    assert stopped["best_step"] == 0 and stopped["steps"] == 6 < never["steps"]
    assert killed == stopped
    assert column(tmp_path / "stopped", "step") == [0, 2, 4, 6]
