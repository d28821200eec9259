"""The two controls: plain pruning of equal active size, and routing that knows the answer."""

from dataclasses import asdict, replace
from itertools import combinations

import pytest
import torch
from test_start import dense_ffn

from pipeline.controls import OracleMoE, gap_recovery, static_plan, unpruned
from pipeline.ffn import DenseFFN
from pipeline.moe import SparseMoE
from pipeline.shape import MoEShape

D = 16
SHAPE = MoEShape(D, 64, 16, 6, 2, "silu", True, False, "softmax_topk")


def layer(shape: MoEShape = SHAPE) -> SparseMoE:
    moe, generator = SparseMoE(shape, "loop"), torch.Generator().manual_seed(0)
    for parameter in moe.parameters():
        parameter.data.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    return moe.eval()


def tokens(n: int = 40) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(1))


def by_ids(moe: SparseMoE, x: torch.Tensor, ids: tuple[int, ...]) -> torch.Tensor:
    """Every token sent to these experts, at the router's weights."""
    logits = moe.router(x)[:, list(ids)]
    weights = {
        "softmax_topk": logits.softmax(dim=-1),
        "softmax": moe.router(x).softmax(dim=-1)[:, list(ids)],
        "sigmoid": logits.sigmoid() / logits.sigmoid().sum(dim=-1, keepdim=True),
    }[moe.shape.router_function]
    experts = moe.experts(x.dtype)
    out = torch.zeros_like(x)
    for weight, e in zip(weights.T, ids, strict=True):
        inner = x @ experts.inner_EUD[e].T
        if experts.inner_bias_EU is not None:
            inner = inner + experts.inner_bias_EU[e]
        expert = experts.hidden(inner) @ experts.down_EDH[e].T
        if experts.down_bias_ED is not None:
            expert = expert + experts.down_bias_ED[e]
        out = out + weight[:, None] * expert
    return out


def errors(y_hat: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (y_hat - y).square().sum(dim=1)


@torch.no_grad()
@pytest.mark.parametrize("gated_bias", [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("function", ["softmax_topk", "softmax", "sigmoid"])
def test_oracle_of_one_expert_is_the_best_there_is(gated_bias, function):
    gated, bias = gated_bias
    ffn, x = dense_ffn(gated, bias), tokens()
    shape = replace(SHAPE, top_k=1, gated=gated, bias=bias, router_function=function)
    shape = replace(shape, activation=ffn.activation)
    moe = layer(shape)
    y_hat, routing = OracleMoE(moe, ffn).forward_routed(x)
    each = torch.stack([errors(by_ids(moe, x, (e,)), ffn(x)) for e in range(6)])
    torch.testing.assert_close(errors(y_hat, ffn(x)), each.min(dim=0).values)
    assert torch.equal(routing.expert_ids[:, 0], each.argmin(dim=0))


@torch.no_grad()
def test_oracle_of_one_expert_beside_a_shared_one_is_the_best_there_is():
    moe, ffn, x = layer(replace(SHAPE, top_k=1, d_ff_shared=16)), dense_ffn(), tokens()
    y_hat, _ = OracleMoE(moe, ffn).forward_routed(x)
    shared = moe.shared_expert(x)
    each = torch.stack([errors(by_ids(moe, x, (e,)) + shared, ffn(x)) for e in range(6)])
    torch.testing.assert_close(errors(y_hat, ffn(x)), each.min(dim=0).values)


@torch.no_grad()
def test_oracle_adds_the_expert_that_leaves_the_least_error():
    """Greedy: the first alone is the best, and the second the best beside it; or the router's."""
    moe, ffn, x = layer(), dense_ffn(), tokens()
    routed = moe.route(x).expert_ids.sort(dim=1).values.tolist()
    y_hat, routing = OracleMoE(moe, ffn).forward_routed(x)
    y = ffn(x)
    singles = torch.stack([errors(by_ids(moe, x, (e,)), y) for e in range(6)])
    pairs = {ids: errors(by_ids(moe, x, ids), y) for ids in combinations(range(6), 2)}
    for t in range(len(x)):
        first = int(singles[:, t].argmin())
        beside = {ids: e[t] for ids, e in pairs.items() if first in ids}
        beside[tuple(routed[t])] = pairs[tuple(routed[t])][t]
        assert set(routing.expert_ids[t].tolist()) == set(min(beside, key=lambda i: beside[i]))
        assert errors(y_hat, y)[t] == pytest.approx(float(min(beside.values())), rel=1e-4)
    assert errors(y_hat, y).sum() < errors(moe(x), y).sum()


@torch.no_grad()
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("function", ["softmax_topk", "softmax", "sigmoid"])
def test_oracle_is_no_worse_than_a_router_that_is_certain(function, top_k):
    """Of experts that it would never take the share is 0 in float32, and no 0 / 0."""
    moe = layer(replace(SHAPE, top_k=top_k, router_function=function))
    moe.router.weight.mul_(1000)
    ffn, x = dense_ffn(), tokens()
    ours, oracle = errors(moe(x), ffn(x)), errors(OracleMoE(moe, ffn)(x), ffn(x))
    assert oracle.isfinite().all() and (oracle <= ours * 1.0001 + 1e-9).all()
    assert oracle.sum() < ours.sum()


@torch.no_grad()
def test_oracle_knows_what_a_router_chooses_by_its_balance_bias():
    """Two halves that are exact together, which its greedy choice, of the best alone, misses."""
    ffn, x = dense_ffn(), tokens().abs()
    assert ffn.gate_proj is not None
    moe = SparseMoE(replace(SHAPE, d_ff_expert=ffn.d_ff, balance_bias=True), "loop").eval()
    moe.get_parameter("gate_up_proj").copy_(torch.cat([ffn.gate_proj, ffn.up_proj]))
    first, second = ffn.down_proj.clone(), ffn.down_proj.clone()
    first[:, ffn.d_ff // 2 :] = second[:, : ffn.d_ff // 2] = 0
    moe.down_proj[0], moe.down_proj[1], moe.down_proj[2] = (
        2 * first,
        2 * second,
        0.9 * ffn.down_proj,
    )
    moe.router.weight[3:5] = 0.1  # without its bias it would take these, which give nothing
    moe.router.balance_bias[:2] = 1e3
    torch.testing.assert_close(moe(x), ffn(x))
    torch.testing.assert_close(OracleMoE(moe, ffn)(x), ffn(x))


@torch.no_grad()
@pytest.mark.parametrize(("gated", "bias"), [(True, False), (True, True), (False, True)])
def test_an_unpruned_control_is_the_dense_ffn(gated: bool, bias: bool):
    ffn, x = dense_ffn(gated, bias), tokens()
    found = unpruned(ffn)
    torch.testing.assert_close(found(x), ffn(x))
    assert found.shape.active_ffn_fraction == 1


@torch.no_grad()
def test_oracle_keeps_the_shape_of_its_input():
    oracle, x = OracleMoE(layer(), dense_ffn()), tokens(600)
    whole = oracle(x)
    torch.testing.assert_close(oracle(x.view(3, 200, D)), whole.view(3, 200, D))


def test_static_plan_is_one_expert_as_wide_as_what_a_token_runs():
    plan = {"layer": 3, "shape": asdict(SHAPE), "init": "slice", "host": "mixtral"}
    static = static_plan(plan)
    assert static is not None and static["init"] == "specialist" and static["layer"] == 3
    shape = MoEShape(**static["shape"])
    assert (shape.n_experts, shape.top_k, shape.d_ff_expert, shape.bias) == (1, 1, 32, True)
    assert shape.active_ffn_fraction == SHAPE.active_ffn_fraction


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({"routing": "expert_choice", "capacity_factor": 1.5}, 24),
        ({"expert_widths": (8, 8, 16, 16, 24, 24), "d_ff_expert": 24}, 32),
        ({"router_width": 4, "balance_bias": True}, 32),
    ],
)
def test_static_plan_follows_the_active_size_of_every_kind(changes, width):
    static = static_plan({"shape": asdict(replace(SHAPE, **changes))})
    assert static is not None
    shape = MoEShape(**static["shape"])
    assert shape.d_ff_expert == width
    assert shape.capacity_factor is None and shape.router_width == 0 and not shape.balance_bias


def test_there_is_no_static_control_where_as_much_is_run_as_in_the_dense_ffn():
    assert static_plan({"shape": asdict(replace(SHAPE, top_k=4))}) is None


@pytest.mark.parametrize(
    ("errors", "recovered"),
    [
        ((0.2, 0.3, 0.1), 0.5),
        ((0.4, 0.3, 0.1), -0.5),
        ((0.1, 0.3, 0.3), None),
        ((None, 0.3, 0.1), None),
    ],
)
def test_gap_recovery_is_the_share_of_what_routing_can_win(errors, recovered):
    found = gap_recovery(*errors)
    assert found == (None if recovered is None else pytest.approx(recovered))


def test_oracle_computes_in_the_layers_dtype():
    moe = layer().bfloat16()
    ffn: DenseFFN = dense_ffn()
    assert OracleMoE(moe, ffn)(tokens().bfloat16()).dtype == torch.bfloat16


def test_oracle_goes_to_the_dtype_of_the_model_that_it_stands_in():
    """With its dense FFN, which it asks for each token's output: most models are in bfloat16."""
    oracle = OracleMoE(layer(), dense_ffn())
    exact = oracle(tokens()).detach()
    half = oracle.to(torch.bfloat16)
    found = half(tokens().bfloat16()).detach()
    assert found.dtype is torch.bfloat16 and oracle.ffn.up_proj.dtype is torch.bfloat16
    assert float(errors(found.float(), exact).mean() / exact.square().sum(dim=1).mean()) < 0.01
