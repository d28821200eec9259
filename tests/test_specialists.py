"""Specialists: pruned and refitted for their own tokens, and better the more of them there are."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from test_fit import Given
from torch import Tensor

from pipeline import specialists
from pipeline.errors import ConfigError
from pipeline.ffn import DenseFFN
from pipeline.fit import Normal, validation_error
from pipeline.moe import SparseMoE
from pipeline.router import TokenChoice, routing_statistics
from pipeline.shape import MoEShape
from pipeline.specialists import HiddenRows, errors, fit_router, prune, start_specialists

D, F = 12, 32
FAMILIES = [(True, False), (True, True), (False, False), (False, True)]  # gated, bias
families = pytest.mark.parametrize(("gated", "bias"), FAMILIES)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("pipeline.specialists.ROUNDS", 2)
    monkeypatch.setattr("pipeline.specialists.ROUTER_STEPS", 60)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=generator(seed))


def dense_ffn(gated: bool = True, bias: bool = False, topics: int = 4) -> DenseFFN:
    """Of every topic's neurons, most are asleep where the input has another one's direction."""
    up = normal(F, D, seed=1) * D**-0.5
    lean = 4 * torch.eye(D)[torch.arange(F) % topics]
    return DenseFFN(
        up_proj=up + (0 if gated else lean),
        down_proj=normal(D, F, seed=2) * F**-0.5,
        gate_proj=normal(F, D, seed=3) * D**-0.5 + lean if gated else None,
        up_bias=normal(F, seed=4) if bias else None,
        down_bias=normal(D, seed=5) if bias else None,
        gate_bias=normal(F, seed=6) if gated and bias else None,
        activation="silu" if gated else "relu",
    )


def rows_of(dense: DenseFFN, train: int = 1500, topics: int = 4) -> Given:
    splits = {}
    for seed, (split, n) in enumerate({"train": train, "validation": 400}.items()):
        topic = torch.randint(topics, (n,), generator=generator(seed))
        x = (
            normal(n, D, seed=10 + seed)
            + 3 * torch.eye(D)[topic]
            - 1.5 * (torch.arange(D) < topics)
        )
        splits[split] = (x, dense(x))
    return Given(**splits)


def shape_of(dense: DenseFFN, width: int, n_experts: int, top_k: int = 1) -> MoEShape:
    gated, bias = dense.gate_proj is not None, dense.down_bias is not None
    return MoEShape(D, F, width, n_experts, top_k, dense.activation, gated, bias, "softmax_topk")


def start(dense: DenseFFN, shape: MoEShape, rows: Given, seed: int = 0) -> SparseMoE:
    moe = SparseMoE(shape).eval()
    moe.load_state_dict(start_specialists(dense, shape, rows, generator(seed)))
    return moe


@families
def test_one_specialist_is_a_pruned_and_refitted_ffn(gated, bias):
    """And as wide as the dense FFN it is the dense FFN."""
    dense = dense_ffn(gated, bias)
    rows = rows_of(dense)
    shape = shape_of(dense, F // 2, 1)
    moe = start(dense, shape, rows)
    inner = moe.get_parameter("gate_up_proj" if gated else "up_proj")[0]
    up = inner.chunk(2)[1] if gated else inner
    kept = [(dense.up_proj == row).all(dim=1).nonzero().item() for row in up.detach()]
    assert len(set(kept)) == F // 2 and kept == sorted(kept)
    x, y = rows.read("train")
    hidden = dense.hidden(x)[:, kept]
    if bias:
        hidden = torch.cat([hidden, torch.ones(len(x), 1)], dim=1)
    best = torch.linalg.lstsq(hidden.double(), y.double()).solution
    least = float((hidden.double() @ best - y.double()).square().sum())
    assert float((moe(x) - y).detach().double().square().sum()) < 1.05 * least
    assert validation_error(start(dense, shape_of(dense, F, 1), rows), rows) < 1e-6


@families
def test_an_ffn_none_of_whose_neurons_is_active_has_a_start(gated, bias):
    dense = dense_ffn(gated, bias)
    dead = {"up_proj": torch.zeros_like(dense.up_proj)}
    dead |= {"up_bias": torch.zeros_like(dense.up_bias)} if dense.up_bias is not None else {}
    dense = replace(dense, **dead)
    rows = rows_of(dense)
    for n_experts in (1, 4):
        moe = start(dense, shape_of(dense, F // 2, n_experts), rows)
        assert torch.isfinite(moe(rows.read("validation")[0])).all()


@families
def test_more_specialists_serve_better(gated, bias):
    dense = dense_ffn(gated, bias)
    rows = rows_of(dense)
    one, two, four = (
        validation_error(start(dense, shape_of(dense, F // 4, n), rows), rows) for n in (1, 2, 4)
    )
    assert four < 0.95 * two and two < 0.95 * one


def test_specialists_are_used_and_nearly_as_good_as_the_best_for_each_token():
    dense = dense_ffn()
    rows = rows_of(dense)
    moe = start(dense, shape_of(dense, F // 4, 4), rows)
    x, y = rows.read("validation")
    routing = moe.route(x)
    assert isinstance(routing, TokenChoice)
    assert routing_statistics(routing.taken_TE())["dead_experts"] == 0
    weights = torch.ones(len(x), 1)
    alone = []
    for e in range(4):
        one = SparseMoE(replace(moe.shape, n_experts=1)).eval()
        tensors = {name: t[e : e + 1] for name, t in moe.state_dict().items()}
        one.load_state_dict(tensors)
        alone.append((one(x) - y).square().sum(dim=1))
    error_TE = torch.stack(alone, dim=1)
    ours = float(error_TE.gather(1, routing.expert_ids).sum())
    assert torch.equal(routing.expert_weights, weights)
    assert ours < 0.5 * float(error_TE.mean(dim=1).sum())
    assert ours < 1.5 * float(error_TE.min(dim=1).values.sum())


def test_later_rounds_improve_on_the_first(monkeypatch):
    dense = dense_ffn(topics=8)
    rows = rows_of(dense, topics=8)
    shape = shape_of(dense, F // 4, 4)
    errors_at = []
    for rounds in (0, 4):
        monkeypatch.setattr("pipeline.specialists.ROUNDS", rounds)
        errors_at.append(validation_error(start(dense, shape, rows), rows))
    assert errors_at[1] < 0.85 * errors_at[0]


@families
@pytest.mark.parametrize("top_k", [2, 4])
def test_experts_of_a_team_are_one_specialist(gated, bias, top_k):
    """Chosen together at even weights, they give what one expert of their width gives."""
    dense = dense_ffn(gated, bias)
    rows = rows_of(dense)
    whole = start(dense, shape_of(dense, F // 2, 3), rows)
    team = start(dense, shape_of(dense, F // 2 // top_k, 3 * top_k, top_k), rows)
    x = rows.read("validation")[0]
    routing = team.route(x)
    assert isinstance(routing, TokenChoice)
    assert (routing.expert_ids // top_k == whole.route(x).taken_TE().int().argmax(1)[:, None]).all()
    torch.testing.assert_close(routing.expert_weights, torch.full((len(x), top_k), 1 / top_k))
    torch.testing.assert_close(team(x), whole(x), rtol=1e-4, atol=1e-5)


def test_teams_that_do_not_come_out_even_are_refused():
    dense = dense_ffn()
    with pytest.raises(ConfigError, match=r"whole specialists[\s\S]*moe.n_experts=4 or"):
        start(dense, shape_of(dense, 8, 5, 2), rows_of(dense, 100))


def test_specialists_wider_than_the_ffn_are_padded():
    dense = dense_ffn()
    rows = rows_of(dense)
    assert validation_error(start(dense, shape_of(dense, F + 8, 2), rows), rows) < 1e-6
    team = start(dense, shape_of(dense, F // 2 + 8, 4, 2), rows)
    assert validation_error(team, rows) < 1e-6


def test_start_repeats_with_its_seed_and_changes_with_it():
    dense = dense_ffn()
    rows = rows_of(dense, 500)
    shape = shape_of(dense, F // 4, 4)
    one, two, other = (start(dense, shape, rows, seed).router.weight for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_a_bounded_number_of_training_rows_is_looked_at(monkeypatch):
    dense = dense_ffn()
    rows = rows_of(dense)
    few = Given(train=rows.read("train", 0, 300), validation=rows.read("validation"))
    wanted = start(dense, shape_of(dense, F // 4, 2), few)
    monkeypatch.setattr("pipeline.specialists.MAX_ROWS", 300)
    found = start(dense, shape_of(dense, F // 4, 2), rows)
    assert torch.equal(found.down_proj, wanted.down_proj)


def test_fewer_rows_than_neurons_still_make_a_start():
    """Specialists without tokens of their own are fitted to all."""
    dense = dense_ffn()
    full = rows_of(dense)
    rows = Given(train=full.read("train", 0, 20), validation=full.read("validation", 0, 3))
    moe = start(dense, shape_of(dense, F // 4, 8), rows)
    assert all(weight.isfinite().all() for weight in moe.parameters())
    assert validation_error(moe, full) < 2


def test_half_precision_weights_and_rows_start_in_float32():
    dense = dense_ffn().to("cpu", torch.bfloat16)
    whole = rows_of(dense_ffn())
    rows = Given(
        **{s: tuple(side.bfloat16() for side in whole.read(s)) for s in ("train", "validation")}  # type: ignore[arg-type]
    )
    moe = start(dense, shape_of(dense, F // 2, 2), rows)
    assert {weight.dtype for weight in moe.parameters()} == {torch.float32}
    assert validation_error(moe, whole) < 0.2


def test_the_round_of_the_least_error_is_kept(monkeypatch):
    """The last one's router is spoilt."""
    calls = []

    def spoilt(*given):
        calls.append(fit_router(*given))
        return torch.zeros_like(calls[-1]) if len(calls) == 3 else calls[-1]

    monkeypatch.setattr(specialists, "ROUNDS", 2)
    monkeypatch.setattr(specialists, "fit_router", spoilt)
    dense = dense_ffn()
    assert start(dense, shape_of(dense, F // 4, 4), rows_of(dense)).router.weight.count_nonzero()


def fitted(dense: DenseFFN, n: int, router: Tensor, train: Tensor, validation: Tensor) -> list:
    rows = [HiddenRows(dense, x, dense(x)) for x in (train, validation)]
    every = torch.ones(F, dtype=torch.bool)
    return specialists._fit_all(dense, shape_of(dense, F // 4, n), every, router, *rows)


def test_a_specialist_of_too_few_tokens_is_fitted_to_all():
    dense = dense_ffn()
    train, validation = (rows_of(dense).read(s)[0].clone() for s in ("train", "validation"))
    for x in (train, validation):
        x[:, 0] = -x[:, 0].abs() - 0.1
    train[:5, 0] *= -1
    router = torch.zeros(2, D)
    router[1, 0] = 1
    few = fitted(dense, 2, router, train, validation)[1]
    every = fitted(dense, 1, router[:1], train, validation)[0]
    assert torch.equal(few[0], every[0]) and torch.equal(few[1], every[1])


def test_each_specialist_is_judged_on_the_validation_rows_of_its_own(monkeypatch):
    powers, best = [], specialists.best_ridge

    def watched(normal, judge, prior):
        powers.append(judge.power)
        return best(normal, judge, prior)

    monkeypatch.setattr(specialists, "best_ridge", watched)
    dense = dense_ffn()
    (x, _), (x_validation, y_validation) = map(rows_of(dense).read, ("train", "validation"))
    fitted(dense, 3, torch.randn(3, D, generator=generator(0)), x, x_validation)
    assert sum(powers) == pytest.approx(float(y_validation.double().square().sum()))


def test_the_last_fit_is_to_all_rows(monkeypatch):
    monkeypatch.setattr(specialists, "ROUND_ROWS", 300)
    monkeypatch.setattr(specialists, "ROUNDS", 0)
    dense = dense_ffn()
    rows, shape = rows_of(dense), shape_of(dense, F // 2, 2)
    few = Given(train=rows.read("train", 0, 300), validation=rows.read("validation"))
    one, other = start(dense, shape, rows), start(dense, shape, few)
    assert torch.equal(one.router.weight, other.router.weight)
    assert not torch.equal(one.down_proj, other.down_proj)


# Pruning


def sums(x: Tensor, y: Tensor) -> Normal:
    normal = Normal(x.shape[1], y.shape[1])
    normal.add(x, y)
    return normal


def refitted_error(x: Tensor, y: Tensor, kept: Tensor) -> float:
    solution = torch.linalg.lstsq(x[:, kept], y).solution
    return float((x[:, kept] @ solution - y).square().sum())


def test_pruning_takes_out_what_costs_least_after_a_refit(monkeypatch):
    """Each removal is the best of all single ones, by the definition."""
    monkeypatch.setattr("pipeline.specialists.PRUNING_RIDGE", 1e-10)
    x = normal(200, 9).double() @ (torch.eye(9) + 0.5 * normal(9, 9, seed=1)).double()
    y = x @ normal(9, 4, seed=2).double()
    kept = torch.arange(9)
    for keep in (8, 7, 6, 5):
        options = [torch.cat([kept[:i], kept[i + 1 :]]) for i in range(len(kept))]
        kept = min(options, key=lambda option: refitted_error(x, y, option))
        assert torch.equal(
            prune(sums(x, y), torch.zeros(9, 4).double(), torch.ones(9).bool(), keep), kept
        )


def test_of_two_equal_neurons_one_goes_before_any_other():
    """Though both are the largest: the other makes up for it."""
    x = normal(300, 6).double()
    x[:, 0] *= 5
    x[:, 4] = x[:, 0]
    y = x @ normal(6, 3, seed=2).double()
    kept = prune(sums(x, y), torch.zeros(6, 3).double(), torch.ones(6).bool(), 5).tolist()
    assert kept in ([0, 1, 2, 3, 5], [1, 2, 3, 4, 5])


def test_pruning_comes_close_to_the_best_choice_and_keeps_the_constant():
    x = torch.cat(
        [normal(300, 10) @ (torch.eye(10) + 0.3 * normal(10, 10, seed=1)), torch.ones(300, 1)], 1
    )
    x = x.double()
    y = x[:, :10].square() @ normal(10, 3, seed=2).double() + 3
    kept = prune(sums(x, y), torch.zeros(11, 3).double(), torch.arange(11) < 10, 5)
    best = min(
        refitted_error(x, y, torch.tensor([*choice, 10])) for choice in combinations(range(10), 5)
    )
    assert len(kept) == 5 and kept.max() < 10
    assert refitted_error(x, y, torch.cat([kept, torch.tensor([10])])) < 1.1 * best


def test_many_neurons_go_in_a_bounded_number_of_steps(monkeypatch):
    """Several at a time are nearly as good a choice as one."""
    x = normal(400, 40).double() @ (torch.eye(40) + 0.2 * normal(40, 40, seed=1)).double()
    y = x @ normal(40, 6, seed=2).double()
    found = []
    for steps in (30, 6):
        monkeypatch.setattr("pipeline.specialists.PRUNING_STEPS", steps)
        kept = prune(sums(x, y), torch.zeros(40, 6).double(), torch.ones(40).bool(), 10)
        assert len(kept) == 10
        found.append(refitted_error(x, y, kept))
    assert found[1] < 1.3 * found[0]


@pytest.mark.parametrize(("dense", "kept"), [([1, 5, 0.1], [0, 1]), ([1, 0.1, 5], [0, 2])])
def test_of_neurons_that_no_row_wakes_the_one_of_larger_dense_weight_stays(dense, kept):
    x = torch.zeros(20, 3).double()
    x[:, 0] = 1
    normal = Normal(3, 1)
    normal.add(x, x[:, :1])
    weight = torch.tensor(dense).double()[:, None]
    assert prune(normal, weight, torch.ones(3).bool(), 2).tolist() == kept


# The router


def test_router_learns_what_is_linear_whatever_the_size_of_the_channels(monkeypatch):
    monkeypatch.setattr("pipeline.specialists.ROUTER_STEPS", 300)
    scale = torch.logspace(-3, 3, D)
    x, rows = normal(2000, D) * scale, normal(3, D, seed=1) / scale
    sent = (x @ rows.T).argmax(dim=1)
    found = fit_router(x, sent, torch.zeros(3, D), generator())
    assert ((x @ found.T).argmax(dim=1) == sent).float().mean() > 0.97


def test_errors_are_those_of_the_specialists():
    dense = dense_ffn(bias=True)
    x, y = rows_of(dense).read("train", 0, 50)
    neurons = torch.arange(0, F, 2)
    weight = normal(len(neurons) + 1, D)
    wanted = (dense.hidden(x)[:, neurons] @ weight[:-1] + weight[-1] - y).square().sum(dim=1)
    torch.testing.assert_close(errors([(neurons, weight)], HiddenRows(dense, x, y))[:, 0], wanted)
