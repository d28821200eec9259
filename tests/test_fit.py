"""The closed-form refit is the least-squares solution, never worse, in blocks or at once."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline import fit
from pipeline.fit import (
    BLOCK_FEATURES,
    MIXTURES,
    Normal,
    best_ridge,
    refit_down,
    validation_error,
)
from pipeline.moe import SparseMoE, fit_thresholds
from pipeline.shape import MoEShape

D, H, E = 12, 8, 6
PLAIN = MoEShape(D, 32, H, E, 2, "silu", True, False, "softmax_topk")
KINDS = {
    "top-1": replace(PLAIN, top_k=1),
    "top-2": PLAIN,
    "every expert": replace(PLAIN, top_k=E),
    "bias": replace(PLAIN, bias=True),
    "plain": replace(PLAIN, gated=False, activation="gelu_tanh"),
    "plain with bias": replace(PLAIN, gated=False, activation="gelu_tanh", bias=True),
    "balance bias": replace(PLAIN, balance_bias=True),
    "mlp router": replace(PLAIN, router_width=4),
    "other router function": replace(PLAIN, router_function="softmax"),
    "shared": replace(PLAIN, d_ff_shared=8),
    "shared and top-1": replace(PLAIN, top_k=1, d_ff_shared=12),
    "shared, plain with bias": replace(
        PLAIN, gated=False, activation="gelu_tanh", bias=True, d_ff_shared=8
    ),
    "expert choice": replace(PLAIN, routing="expert_choice", capacity_factor=2.0),
}
kinds = pytest.mark.parametrize("shape", KINDS.values(), ids=KINDS)


class Given:
    """Rows in memory: what a `LayerReader` is to the fits."""

    def __init__(self, **splits: tuple[Tensor, Tensor]) -> None:
        self._splits, self.d_model = splits, D
        self.rows = {name: len(pair[0]) for name, pair in splits.items()}

    def read(self, split: str, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        x, y = self._splits[split]
        return x[start:stop], y[start:stop]

    def batches(self, *_: object, **__: object) -> Iterator[tuple[Tensor, Tensor]]:
        raise AssertionError("a fit reads in order")


def layer(shape: MoEShape, seed: int = 0) -> SparseMoE:
    moe, g = SparseMoE(shape).double().eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in moe.parameters():
            weight.copy_(torch.randn(weight.shape, generator=g, dtype=weight.dtype))
    if shape.balance_bias:
        moe.router.balance_bias.copy_(torch.linspace(-2, 2, E))
    fit_thresholds(moe, inputs(400, 9))
    return moe


def inputs(rows: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, D, generator=g, dtype=torch.float64)


@torch.no_grad()
def rows_of(moe: SparseMoE, noise: float = 0.0, train: int = 600) -> Given:
    """What another `down_proj` under the same routing gives, and noise."""
    g, before = torch.Generator().manual_seed(5), moe.down_proj.detach().clone()
    moe.down_proj += torch.randn(before.shape, generator=g, dtype=before.dtype)
    splits = {}
    for seed, (split, n) in enumerate({"train": train, "validation": 200}.items()):
        x = inputs(n, seed)
        y = moe(x)
        splits[split] = (x, y + noise * torch.randn(y.shape, generator=g, dtype=y.dtype))
    moe.down_proj.copy_(before)
    return Given(**splits)


def explicit(moe: SparseMoE, x_TD: Tensor) -> Tensor:
    """(T, S + E (H + bias)): the features, one token and expert after the other."""
    weights_TE, experts = moe.route(x_TD).weights_TE(), moe.experts(torch.float64)
    columns = [moe.shared_expert.hidden(x_TD)] if moe.shape.d_ff_shared else []
    for e in range(E):
        inner = x_TD @ experts.inner_EUD[e].T
        if experts.inner_bias_EU is not None:
            inner = inner + experts.inner_bias_EU[e]
        hidden = experts.hidden(inner)
        if moe.shape.bias:
            hidden = torch.cat([hidden, torch.ones(len(x_TD), 1, dtype=x_TD.dtype)], dim=1)
        columns.append(weights_TE[:, e, None] * hidden)
    return torch.cat(columns, dim=1).detach()


def weights(moe: SparseMoE) -> Tensor:
    """(S + E (H + bias), D)"""
    down = moe.down_proj.detach().transpose(1, 2)
    if moe.shape.bias:
        down = torch.cat([down, moe.get_parameter("down_bias").detach()[:, None]], dim=1)
    shared = [moe.shared_expert.down_proj.detach().T] if moe.shape.d_ff_shared else []
    return torch.cat([*shared, down.flatten(0, 1)])


def ridge_solution(moe: SparseMoE, rows: Given, ridge: float) -> Tensor:
    """What the refit must give, from the definition: top-1 experts have a strength of their own."""
    (x, y), prior = rows.read("train"), weights(moe)
    features = explicit(moe, x)
    power = features.square().sum(dim=0)
    apart = moe.shape.top_k == 1 and not moe.shape.d_ff_shared
    if apart:
        power = power.view(E, -1).mean(dim=1, keepdim=True).expand(E, len(prior) // E).flatten()
    root = (ridge * power if apart else ridge * power.mean().expand_as(power)).sqrt()
    held = torch.cat([features, root.diag()])
    return torch.linalg.lstsq(held, torch.cat([y, root[:, None] * prior])).solution


@kinds
def test_refit_finds_the_weights_that_made_the_rows(shape):
    moe = layer(shape)
    rows = rows_of(moe)
    before, after = refit_down(moe, rows, ridges=(1e-9,))
    assert before > 0.1 and after < 1e-8
    assert after == pytest.approx(validation_error(moe, rows))


@kinds
def test_refit_is_the_ridge_solution_towards_the_present_weights(shape):
    moe = layer(shape)
    rows = rows_of(moe, noise=0.5)
    wanted = ridge_solution(moe, rows, 0.05)
    refit_down(moe, rows, ridges=(0.05,))
    torch.testing.assert_close(weights(moe), wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    "kind", ["top-2", "every expert", "bias", "expert choice", "shared and top-1"]
)
def test_blocks_converge_to_the_joint_solution(kind, size):
    """Within what `MOVING` allows; separate fits, one round, are far from it."""
    shape = KINDS[kind]
    joint, blocks, once = (layer(shape) for _ in range(3))
    rows = rows_of(joint, noise=0.5)
    start, features = weights(joint), shape.d_ff_shared + size * (H + shape.bias)
    refit_down(joint, rows, ridges=(1e-6,))
    refit_down(blocks, rows, ridges=(1e-6,), block_features=features)
    way = float((weights(joint) - start).norm())
    assert float((weights(blocks) - weights(joint)).norm()) < 0.02 * way
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.fit.ROUNDS", 1)
        refit_down(once, rows, ridges=(1e-6,), block_features=features)
    assert float((weights(once) - weights(joint)).norm()) > 0.05 * way


def test_experts_that_never_meet_are_fitted_in_one_round(monkeypatch):
    monkeypatch.setattr("pipeline.fit.ROUNDS", 1)
    shape = KINDS["top-1"]
    moe, small = layer(shape), layer(shape)
    rows = rows_of(moe, noise=0.5)
    refit_down(moe, rows)
    refit_down(small, rows, block_features=H)
    torch.testing.assert_close(weights(small), weights(moe))


@kinds
def test_refit_makes_validation_no_worse(shape):
    """Even where the training rows are few and tell of other weights."""
    moe = layer(shape)
    good, bad = rows_of(moe, noise=0.1), rows_of(moe, noise=50.0, train=30)
    rows = Given(train=bad.read("train"), validation=good.read("validation"))
    for block_features in (BLOCK_FEATURES, H + shape.bias):
        before = validation_error(moe, rows)
        told = refit_down(moe, rows, ridges=(1e-6, 1.0), block_features=block_features)
        assert told[0] == pytest.approx(before) and told[1] <= told[0]
        assert validation_error(moe, rows) == pytest.approx(told[1])


def test_weights_that_already_fit_stay_as_they_are():
    moe = layer(PLAIN)
    x = {"train": inputs(300, 0), "validation": inputs(100, 1)}
    with torch.no_grad():
        rows = Given(**{name: (rows, moe(rows)) for name, rows in x.items()})
    before = weights(moe).clone()
    refit_down(moe, rows)
    torch.testing.assert_close(weights(moe), before)


def test_the_strength_is_the_best_on_validation():
    moe = layer(PLAIN)
    rows = rows_of(moe, noise=20.0, train=100)
    ridges, errors = (1e-6, 1e-2, 1.0, 100.0), []
    for ridge in ridges:
        one = layer(PLAIN)
        errors.append(refit_down(one, rows, ridges=(ridge,))[1])
    assert refit_down(moe, rows, ridges=ridges)[1] == pytest.approx(min(errors))
    assert errors.index(min(errors)) not in (0, len(errors) - 1)


@pytest.mark.parametrize("seed", range(4))
def test_the_ridge_that_mixtures_of_many_channels_choose_is_as_good_as_the_best(seed: int):
    """Its weights are those of every channel; a ridge at either end is worse by far more."""
    g = torch.Generator().manual_seed(seed)
    n_features, d_model = 40, 3 * MIXTURES
    true = torch.randn(n_features, d_model, generator=g, dtype=torch.float64)
    train, validation = Normal(n_features, d_model), Normal(n_features, d_model)
    for normal, n in ((train, 50), (validation, 400)):
        x = torch.randn(n, n_features, generator=g, dtype=torch.float64)
        noise = 4 * torch.randn(n, d_model, generator=g, dtype=torch.float64)
        normal.add(x, x @ true + noise)
    prior, ridges = torch.zeros_like(true), (1e-4, 1e-2, 1e-1, 1.0, 10.0, 1000.0)
    errors = {r: validation.error(train.solve(r, prior)) for r in ridges}
    weight, chosen = best_ridge(train, validation, prior, ridges)
    assert chosen is not None and torch.equal(weight, train.solve(chosen, prior))
    assert errors[chosen] < 1.01 * min(errors.values()) < 0.9 * min(errors[1e-4], errors[1000.0])


def test_validation_error_of_a_candidate_is_that_of_its_weights():
    g = torch.Generator().manual_seed(0)
    train, validation = Normal(5, 3), Normal(5, 3)
    for normal, n in ((train, 40), (validation, 20)):
        x = torch.randn(n, 5, generator=g, dtype=torch.float64)
        y = torch.randn(n, 3, generator=g, dtype=torch.float64)
        normal.add(x[:7], y[:7])
        normal.add(x[7:], y[7:])
    weight, _ = best_ridge(train, validation, torch.zeros(5, 3, dtype=torch.float64), (0.1,))
    assert validation.error(weight) == pytest.approx(float((y - x @ weight).square().sum()))


def test_padding_of_narrower_experts_stays_zero():
    shape = replace(PLAIN, expert_widths=(8, 4, 8, 6, 8, 2))
    moe = layer(shape)
    with torch.no_grad():
        for e, width in enumerate(shape.widths):
            moe.down_proj[e, :, width:] = 0
            moe.get_parameter("gate_up_proj")[e].view(2, H, D)[:, width:] = 0
    rows = rows_of(layer(PLAIN), noise=0.5)
    before, after = refit_down(moe, rows)
    assert after < before
    for e, width in enumerate(shape.widths):
        assert moe.down_proj[e, :, width:].count_nonzero() == 0


def test_only_the_first_rows_are_read_where_they_are_bounded():
    first, bounded = layer(PLAIN), layer(PLAIN)
    rows = rows_of(first, noise=0.5)
    x, y = rows.read("train", 0, 100)
    refit_down(first, Given(train=(x, y), validation=rows.read("validation")))
    refit_down(bounded, rows, max_rows=100)
    assert torch.equal(weights(first), weights(bounded))


def test_float32_layers_and_bfloat16_rows_are_fitted_in_float32():
    moe = layer(PLAIN).float()
    rows = rows_of(layer(PLAIN))
    half = Given(
        **{s: tuple(side.bfloat16() for side in rows.read(s)) for s in ("train", "validation")}  # type: ignore[arg-type]
    )
    before, after = refit_down(moe, half)
    assert moe.down_proj.dtype is torch.float32 and after < 1e-2 * before


def test_a_refit_by_blocks_that_made_validation_worse_is_undone():
    """Its training rows are few and noisy."""
    moe = layer(PLAIN, 7)
    good, bad = rows_of(moe, noise=0.1), rows_of(moe, noise=8.0, train=40)
    rows = Given(train=bad.read("train"), validation=good.read("validation"))
    before = weights(moe).clone()
    told = refit_down(moe, rows, ridges=(1e-3,), block_features=H)
    assert told[1] == told[0] == validation_error(moe, rows)
    assert torch.equal(weights(moe), before)


def test_each_block_keeps_the_strength_that_was_chosen_for_it(monkeypatch):
    first: list[float | None] = []
    later: list[float] = []
    solve = Normal.solve

    def choose(*given):
        weight, ridge = best_ridge(*given)
        first.append(ridge)
        return weight, ridge

    def solve_with(self: Normal, ridge: float, prior: Tensor) -> Tensor:
        later.append(ridge)
        return solve(self, ridge, prior)

    monkeypatch.setattr(fit, "best_ridge", choose)
    monkeypatch.setattr(Normal, "solve", solve_with)
    moe = layer(PLAIN)
    refit_down(moe, rows_of(moe, noise=20.0, train=100), block_features=H)
    chosen = [ridge for ridge in first if ridge is not None]
    assert len(set(chosen)) > 1 and later[: len(chosen)] == chosen
