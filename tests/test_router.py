"""Who works on which token, and with what weight: both choices, both kinds of router."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from pipeline.moe import SparseMoE, fit_thresholds
from pipeline.router import (
    ROUTER_FUNCTIONS,
    ExpertChoice,
    capacity,
    choose_experts,
    choose_tokens,
    choose_tokens_alone,
    load_balance_loss,
    routing_statistics,
    thresholds,
)
from pipeline.shape import MoEShape

TOKEN_CHOICE = MoEShape(16, 64, 24, 6, 2, "silu", True, False, "softmax_topk")
EXPERT_CHOICE = replace(TOKEN_CHOICE, routing="expert_choice", capacity_factor=1.25)


def layer(shape: MoEShape) -> SparseMoE:
    moe, generator = SparseMoE(shape, "loop"), torch.Generator().manual_seed(0)
    for parameter in moe.parameters():
        parameter.data.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    return moe


def tokens(n: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, 16, generator=torch.Generator().manual_seed(seed))


def logits(n: int = 96) -> torch.Tensor:
    return layer(TOKEN_CHOICE).router(tokens(n)).detach() * 2


def every_expert(moe: SparseMoE, x: torch.Tensor) -> torch.Tensor:
    """(T, E, D): what each expert alone gives."""
    experts = moe.experts(x.dtype)
    inner = torch.einsum("td,eud->teu", x, experts.inner_EUD)
    if experts.inner_bias_EU is not None:
        inner = inner + experts.inner_bias_EU
    out = torch.einsum("teh,edh->ted", experts.hidden(inner), experts.down_EDH)
    return out if experts.down_bias_ED is None else out + experts.down_bias_ED


# Token choice


@pytest.mark.parametrize("function", ROUTER_FUNCTIONS)
def test_balance_bias_selects_and_never_weighs(function: str):
    found, bias = logits(), torch.tensor([0.0, 0.0, 9.0, 0.0, -9.0, 0.0])
    plain = choose_experts(found, 2, function)
    biased = choose_experts(found, 2, function, bias)
    assert (biased.expert_ids == 2).any(dim=1).all() and not (biased.expert_ids == 4).any()
    score, weigh = ROUTER_FUNCTIONS[function]
    expected = weigh(score(found).gather(1, biased.expert_ids))
    assert torch.equal(biased.expert_weights, expected)
    alike = (plain.taken_TE() == biased.taken_TE()).all(dim=1)
    assert alike.any() and torch.allclose(plain.weights_TE()[alike], biased.weights_TE()[alike])


def test_balance_bias_follows_the_load_of_the_batch():
    moe = layer(replace(TOKEN_CHOICE, balance_bias=True))
    moe.router.weight.data[0] += 0.15  # a favourite
    x = tokens(512) + 1.0
    before = routing_statistics(moe.route(x).taken_TE())["load_max_over_mean"]
    for _ in range(200):
        moe.router.adjust_balance_bias(moe.route(x), rate=0.05)
    after = routing_statistics(moe.route(x).taken_TE())["load_max_over_mean"]
    assert isinstance(before, float) and isinstance(after, float)
    assert after < 1.1 < 1.5 < before


# Expert choice


def test_expert_choice_gives_each_expert_its_best_tokens_of_the_batch():
    """The definition, spelled out: Zhou et al. (2022), section 3.2."""
    found = logits()
    routing = choose_tokens(found, 1.25)
    scores = found.softmax(dim=-1)
    for e in range(6):
        best = sorted(range(96), key=lambda t: -float(scores[t, e]))[: capacity(96, 1.25, 6)]
        assert routing.token_ids[e].tolist() == best
        assert torch.equal(routing.expert_weights[e], scores[best, e])


@pytest.mark.parametrize(
    ("n", "factor", "experts", "each"), [(96, 1.25, 6, 20), (1, 1.25, 6, 1), (7, 6.0, 6, 7)]
)
def test_capacity_is_a_share_of_the_batch(n: int, factor: float, experts: int, each: int):
    assert capacity(n, factor, experts) == each


def test_capacity_factor_sets_the_experts_per_token():
    for factor in (0.5, 1.25, 3.0):
        statistics = routing_statistics(choose_tokens(logits(), factor).taken_TE())
        assert statistics["experts_per_token"] == pytest.approx(factor, rel=0.05)


def test_tokens_that_no_expert_takes_get_zero_and_are_counted():
    moe, x = layer(EXPERT_CHOICE), tokens(96)
    y, routing = moe.forward_routed(x)
    unserved = ~routing.taken_TE().any(dim=1)
    assert 0 < unserved.sum() < 96 and (y[unserved] == 0).all() and (y[~unserved] != 0).any()
    share = routing_statistics(routing.taken_TE())["unserved_tokens"]
    assert share == pytest.approx(float(unserved.sum()) / 96)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("gated", "bias"), [(True, False), (True, True), (False, True)])
def test_expert_choice_is_the_weighted_sum_of_the_experts_that_took_the_token(
    training: bool, gated: bool, bias: bool
):
    moe, x = layer(replace(EXPERT_CHOICE, gated=gated, bias=bias)).double(), tokens(96).double()
    fit_thresholds(moe, tokens(400, seed=2).double())
    moe.train(training)
    y, routing = moe.forward_routed(x)
    expected = (every_expert(moe, x) * routing.weights_TE()[:, :, None]).sum(dim=1)
    torch.testing.assert_close(y, expected)
    wanted = torch.autograd.grad(expected.square().sum(), list(moe.parameters()))
    found = torch.autograd.grad(moe(x).square().sum(), list(moe.parameters()))
    torch.testing.assert_close(found, wanted)


def test_at_inference_each_token_is_decided_alone():
    """Neither the tokens after it nor another sequence of the batch change what it gets."""
    moe, x = layer(EXPERT_CHOICE), tokens(64)
    assert not torch.allclose(moe(x)[:16], moe(x[:16]))  # in training they do
    fit_thresholds(moe, tokens(400, seed=2))
    moe.eval()
    torch.testing.assert_close(moe(x)[:16], moe(x[:16]))
    torch.testing.assert_close(moe(x)[5], moe(x[5]))


def test_thresholds_take_of_their_own_rows_what_training_would():
    found = logits()
    alone = choose_tokens_alone(found, thresholds(found, 1.25))
    assert torch.equal(alone.taken_TE(), choose_tokens(found, 1.25).taken_TE())
    assert torch.equal(alone.weights_TE(), choose_tokens(found, 1.25).weights_TE())


def test_experts_that_would_take_every_token_take_those_of_other_rows_too():
    found = choose_tokens_alone(logits(), thresholds(logits()[:8], 6.0))
    assert found.taken_TE().all()


def test_no_expert_takes_a_token_below_its_threshold():
    alone = choose_tokens_alone(logits(), torch.full((6,), 2.0))
    assert isinstance(alone, ExpertChoice) and not alone.taken_TE().any()


def test_expert_choice_needs_no_balance_loss():
    assert load_balance_loss(choose_tokens(logits(), 1.25)) == 0
    assert load_balance_loss(choose_experts(logits(), 2, "softmax_topk")) > 0.9


# Linear and MLP


def test_mlp_router_adds_a_network_to_the_linear_one():
    shape = replace(TOKEN_CHOICE, router_width=5)
    router, x = layer(shape).router, tokens(32)
    expected = x @ router.weight.T + F.silu(x @ router.hidden_proj.T) @ router.output_proj.T
    torch.testing.assert_close(router(x), expected)
    router.output_proj.data.zero_()
    torch.testing.assert_close(router(x), x @ router.weight.T)
    added = shape.router_parameters - TOKEN_CHOICE.router_parameters
    assert added == router.hidden_proj.numel() + router.output_proj.numel()


def test_router_computes_in_float32_whatever_the_layer_has():
    moe = layer(replace(TOKEN_CHOICE, router_width=5)).bfloat16()
    assert moe.router(tokens(8).bfloat16()).dtype == torch.float32


# Statistics


def test_statistics_count_each_choice_and_name_the_dead():
    taken = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    statistics = routing_statistics(taken)
    assert statistics["load"] == [0.75, 0.25, 0, 0]
    assert statistics["load_max_over_mean"] == 3.0
    assert (statistics["dead_experts"], statistics["unserved_tokens"]) == (2, 0.25)
    assert statistics["experts_per_token"] == 1.0
    even = routing_statistics(torch.ones(5, 4).bool())
    assert even["load_entropy"] == pytest.approx(1.0) and even["load_max_over_mean"] == 1.0
