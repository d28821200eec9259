"""Dynamic experts: their sum is held, splitting changes no output, the optimizer follows."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from pipeline.config import DynamicConfig, Growth
from pipeline.moe import SparseMoE
from pipeline.reallocation import ExpertLosses, plan_widths, resize_experts
from pipeline.router import TokenChoice
from pipeline.shape import MoEShape

D, H, E = 16, 32, 4
CFG = DynamicConfig(
    enabled=True,
    reallocate_every_n_steps=5,
    n_reallocated=1,
    growth_factor=1.25,
    shrink_factor=0.8,
    min_d_ff=16,
    max_d_ff=64,
    growth=Growth.split,
)
FAMILIES = [(True, False), (True, True), (False, False), (False, True)]  # gated, bias


def layer(gated: bool = True, bias: bool = False) -> tuple[SparseMoE, torch.optim.AdamW]:
    """Random, after three steps of its optimizer."""
    moe = SparseMoE(MoEShape(D, 64, H, E, 2, "silu", gated, bias, "softmax_topk"), "loop")
    generator = torch.Generator().manual_seed(0)
    for parameter in moe.parameters():
        parameter.data.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-3, weight_decay=0.01)
    steps(moe, optimizer, 3)
    return moe, optimizer


def tokens(n: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def steps(moe: SparseMoE, optimizer: torch.optim.Optimizer, n: int) -> None:
    for i in range(n):
        optimizer.zero_grad()
        (moe(tokens(seed=i)) - tokens(seed=i)).square().mean().backward()
        optimizer.step()


def resize(moe: SparseMoE, optimizer, widths: list[int], growth: Growth = Growth.split) -> None:
    resize_experts(moe, optimizer, widths, growth, torch.Generator().manual_seed(1))


# Which


def test_the_expert_of_highest_loss_grows_by_what_the_lowest_gives():
    assert plan_widths([40, 40, 40, 40], [3.0, 1.0, 4.0, 2.0], CFG) == (40, 32, 48, 40)


def test_the_side_that_wants_more_is_trimmed_its_least_extreme_expert_first():
    two = replace(CFG, n_reallocated=2)
    # 3 and 2 want 16 and 16 more; 0 offers 16 and 1 has nothing to give.
    assert plan_widths([64, 16, 48, 48], [1.0, 2.0, 3.0, 4.0], two) == (48, 16, 48, 64)


def test_the_lowest_loss_gives_first_where_more_is_offered_than_wanted():
    cfg = replace(CFG, n_reallocated=2, growth_factor=1.2)
    assert plan_widths([64, 64, 40, 40], [1.0, 2.0, 3.0, 4.0], cfg) == (48, 64, 48, 48)


def test_nothing_moves_where_the_bounds_leave_no_room():
    assert plan_widths([64, 64, 16, 16], [1.0, 0.9, 0.1, 0.2], CFG) == (64, 64, 16, 16)


def test_a_single_expert_keeps_its_width():
    assert plan_widths([32], [1.0], CFG) == (32,)


@given(st.data())
def test_widths_stay_within_bounds_and_their_sum_is_held(data):
    n = data.draw(st.integers(1, 12))
    widths = data.draw(st.lists(st.integers(2, 8).map(lambda x: 8 * x), min_size=n, max_size=n))
    losses = data.draw(st.lists(st.floats(0, 10), min_size=n, max_size=n))
    factors = data.draw(st.tuples(st.floats(1, 3), st.floats(0.1, 1)))
    cfg = replace(CFG, n_reallocated=data.draw(st.integers(1, 8)))
    cfg = replace(cfg, growth_factor=factors[0], shrink_factor=factors[1])
    new = plan_widths(widths, losses, cfg)
    assert sum(new) == sum(widths)
    assert all(w % 8 == 0 and 16 <= w <= 64 for w in new)
    grew = [loss for w, v, loss in zip(widths, new, losses, strict=True) if v > w]
    shrank = [loss for w, v, loss in zip(widths, new, losses, strict=True) if v < w]
    assert not grew or min(grew) >= max(shrank)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("n_reallocated", 2, (32, 32, 40, 56)),
        ("growth_factor", 1.0, (40, 40, 40, 40)),
        ("shrink_factor", 0.5, (24, 40, 40, 56)),
        ("max_d_ff", 40, (40, 40, 40, 40)),
        ("min_d_ff", 40, (40, 40, 40, 40)),
    ],
)
def test_every_setting_changes_the_plan(key, value, expected):
    cfg = replace(CFG, growth_factor=1.4)
    losses = [1.0, 2.0, 3.0, 4.0]
    assert plan_widths([40] * 4, losses, cfg) == (32, 40, 40, 48)
    assert plan_widths([40] * 4, losses, replace(cfg, **{key: value})) == expected


def test_loss_of_an_expert_is_the_mean_over_the_tokens_it_worked_on():
    losses = ExpertLosses(3)
    ids = torch.tensor([[0, 1], [0, 2], [0, 1]])
    routing = TokenChoice(torch.zeros(3, 3), torch.full((3, 2), 0.5), ids)
    losses.add(routing, torch.tensor([1.0, 2.0, 3.0]))
    losses.add(routing, torch.tensor([1.0, 2.0, 3.0]))
    assert losses.mean() == [2.0, 2.0, 2.0]
    losses.reset()
    losses.add(TokenChoice(torch.zeros(1, 3), torch.ones(1, 1), ids[:1, :1]), torch.tensor([5.0]))
    assert losses.mean() == [5.0, 0.0, 0.0]  # who has no token has nothing to lose


# How


@pytest.mark.parametrize(("gated", "bias"), FAMILIES)
def test_growth_by_splitting_changes_no_output(gated, bias):
    moe, optimizer = layer(gated, bias)
    before = moe(tokens())
    resize(moe, optimizer, [40, 32, 88, 32])  # a neuron may be split more than once
    assert moe.shape.widths == (40, 32, 88, 32) and moe.shape.d_ff_expert == 88
    torch.testing.assert_close(moe(tokens()), before, rtol=1e-5, atol=1e-6)


def test_the_halves_of_a_split_neuron_part_ways():
    moe, optimizer = layer()
    resize(moe, optimizer, [40, 32, 32, 32])
    gate_up = moe.get_parameter("gate_up_proj")
    new = gate_up[0].unflatten(0, (2, 40))[0, 32:]
    old = gate_up[0].unflatten(0, (2, 40))[0, :32]
    twins = torch.cdist(new, old).argmin(dim=1)
    assert torch.equal(old[twins], new)
    steps(moe, optimizer, 3)
    rows = moe.get_parameter("gate_up_proj")[0].unflatten(0, (2, 40))[0]
    assert ((rows[32:] - rows[twins]).norm(dim=1) > 1e-4).all()


@pytest.mark.parametrize(("gated", "bias"), FAMILIES)
def test_shrinking_keeps_the_neurons_of_largest_norm(gated, bias):
    moe, optimizer = layer(gated, bias)
    small = torch.arange(0, 32, 4)
    parts = 2 if gated else 1
    with torch.no_grad():
        inner = moe.get_parameter(f"{moe.inner}_proj")
        inner[1].unflatten(0, (parts, H))[:, small] *= 1e-4
        moe.down_proj[1][:, small] *= 1e-4
        kept = [k for k in range(32) if k % 4]
        wanted = moe.down_proj[1][:, kept].clone()
    before = moe(tokens())
    resize(moe, optimizer, [32, 24, 32, 32])
    assert torch.equal(moe.down_proj[1][:, :24], wanted)
    torch.testing.assert_close(moe(tokens()), before, rtol=1e-3, atol=1e-3)


def test_growth_by_interpolation_is_bilinear_with_the_rescale():
    moe, optimizer = layer()
    gate = moe.get_parameter("gate_up_proj")[2, :H].detach().clone()
    down = moe.down_proj[2].detach().clone()
    resize(moe, optimizer, [32, 32, 40, 32], Growth.interpolate)

    def bilinear(weight: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return F.interpolate(weight[None, None], size=size, mode="bilinear")[0, 0]

    found = moe.get_parameter("gate_up_proj")[2].unflatten(0, (2, 40))[0]
    torch.testing.assert_close(found, bilinear(gate, (40, D)))
    torch.testing.assert_close(moe.down_proj[2], bilinear(down, (D, 40)) * (32 / 40) ** 0.5)


@pytest.mark.parametrize("growth", Growth)
@pytest.mark.parametrize(("gated", "bias"), FAMILIES)
def test_the_optimizer_follows_its_neurons(gated, bias, growth):
    """Unchanged experts keep their moments, a shrunk one those of the kept, and steps go on."""
    moe, optimizer = layer(gated, bias)
    parameter = moe.down_proj
    first = optimizer.state[parameter]["exp_avg"].clone()
    kept = (
        (
            moe.get_parameter(f"{moe.inner}_proj")[1].unflatten(0, (-1, H)).norm(dim=-1).sum(0)
            + parameter[1].norm(dim=0)
        )
        .argsort(descending=True)[:24]
        .sort()
        .values
    )
    resize(moe, optimizer, [40, 24, 32, 32], growth)
    moved = optimizer.state[parameter]["exp_avg"]
    assert moe.down_proj is parameter and moved.shape == parameter.shape
    assert torch.equal(moved[2][:, :32], first[2])
    assert torch.equal(moved[1][:, :24], first[1][:, kept])
    assert (optimizer.state[parameter]["exp_avg_sq"] >= 0).all()
    before = [p.detach().clone() for p in moe.parameters()]
    steps(moe, optimizer, 1)
    assert all((p != b).any() for p, b in zip(moe.parameters(), before, strict=True))


@pytest.mark.parametrize(("gated", "bias"), FAMILIES)
def test_padding_stays_zero_through_training(gated, bias):
    """So that the narrow experts are what the record says, and the padding is exact."""
    moe, optimizer = layer(gated, bias)
    resize(moe, optimizer, [40, 24, 32, 32])
    steps(moe, optimizer, 20)
    inner = moe.get_parameter(f"{moe.inner}_proj").unflatten(1, (-1, 40))
    for e, width in enumerate(moe.shape.widths):
        assert (inner[e, :, width:] == 0).all() and (moe.down_proj[e][:, width:] == 0).all()
        assert (inner[e, :, :width] != 0).any(dim=-1).all()
