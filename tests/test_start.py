"""A sparse layer begins exactly at the dense FFN where it can, at its best scale elsewhere."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import (
    Codec,
    DynamicConfig,
    Growth,
    Host,
    Init,
    MoEConfig,
    Router,
    RouterInit,
    Routing,
)
from pipeline.ffn import DenseFFN
from pipeline.fit import refit_down
from pipeline.moe import SparseMoE, fit_scale
from pipeline.router import TokenChoice, routing_statistics
from pipeline.shape import MoEShape
from pipeline.start import LOGIT_STD, ROUTER_STD, start_layer
from pipeline.store import LayerReader
from pipeline.store_writer import LayerWriter

D, F = 16, 64
ROWS = {"train": 512, "validation": 256}
DYNAMIC = DynamicConfig(
    enabled=False,
    reallocate_every_n_steps=5,
    n_reallocated=2,
    growth_factor=1.25,
    shrink_factor=0.8,
    min_d_ff=8,
    max_d_ff=64,
    growth=Growth.split,
)
PLAIN = MoEConfig(
    n_experts=8,
    top_k=2,
    d_ff_expert=0.25,
    shared_expert=0,
    init_from_dense=True,
    init=Init.auto,
    init_noise=0.0,
    virtual_groups=False,
    refit=False,
    mean_compensation=False,
    router_init=RouterInit.ridge,
    host=Host.auto,
    routing=Routing.token_choice,
    capacity_factor=1.25,
    router=Router.linear,
    router_width=8,
    balance_bias=False,
    per_layer=[],
    dynamic=DYNAMIC,
)
FAMILIES = [(True, False), (True, True), (False, False), (False, True)]  # gated, bias


def dense_ffn(gated: bool = True, bias: bool = False) -> DenseFFN:
    """Random, with inner rows that lean to one direction per 8 neurons, as trained ones do."""
    g = torch.Generator().manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g) * size[-1] ** -0.5

    lean = 2 * normal(F // 8, D).repeat_interleave(8, dim=0)
    return DenseFFN(
        up_proj=normal(F, D) + (0 if gated else lean),
        down_proj=normal(D, F),
        gate_proj=normal(F, D) + lean if gated else None,
        up_bias=normal(F) if bias else None,
        down_bias=normal(D) if bias else None,
        gate_bias=normal(F) if bias and gated else None,
        activation="silu" if gated else "gelu_tanh",
    )


def write_store(
    path: Path,
    ffn: DenseFFN,
    *,
    target: Tensor | None = None,
    rows: dict[str, int] | None = None,
    mean: Tensor | float = 0.0,
    std: Tensor | float = 1.0,
) -> LayerReader:
    """A float32 store of 8 rows to a chunk; of more rows, the first are the same.

    `target` (D,) stands in for every output; `mean` and `std` (D,) are of the inputs' channels.
    """
    writer = LayerWriter.open(
        path,
        rows=rows or ROWS,
        d_model=D,
        dtype=torch.float32,
        sequence_length=8,
        codec=Codec.none,
        chunk_mb=8 * D * 4 / 1e6,
        shard_mb=1,
        attributes={},
    )
    for seed, (split, n) in enumerate(writer.layout.rows.items()):
        x = torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) * std + mean
        y = ffn(x) if target is None else target.expand(n, D).contiguous()
        for k in range(writer.n_shards[split]):
            part = slice(k * writer.shard_rows, (k + 1) * writer.shard_rows)
            writer.write_shard(split, k, x[part], y[part])
    return LayerReader(path)


def plan_of(
    ffn: DenseFFN,
    d_ff_expert: int,
    n_experts: int,
    top_k: int,
    init: str = "slice",
    d_ff_shared: int = 0,
) -> dict[str, Any]:
    """What the `budget` stage writes for one layer."""
    gated, bias = ffn.gate_proj is not None, ffn.down_bias is not None
    shape = MoEShape(
        D, F, d_ff_expert, n_experts, top_k, ffn.activation, gated, bias, "softmax_topk"
    )
    shape = replace(shape, d_ff_shared=d_ff_shared)
    return {"layer": 3, "shape": asdict(shape), "init": init, "host": "mixtral"}


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda p: f"gated={p[0]},bias={p[1]}")
def family(request, tmp_path_factory) -> tuple[DenseFFN, LayerReader]:
    ffn = dense_ffn(*request.param)
    return ffn, write_store(tmp_path_factory.mktemp("family") / "layer_3.zarr", ffn)


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> tuple[DenseFFN, LayerReader]:
    ffn = dense_ffn()
    return ffn, write_store(tmp_path_factory.mktemp("stored") / "layer_3.zarr", ffn)


def begin(
    stored: tuple[DenseFFN, LayerReader],
    d_ff_expert: int,
    n_experts: int,
    top_k: int,
    init: str = "slice",
    *,
    seed: int = 0,
    d_ff_shared: int = 0,
    **changed: Any,
) -> SparseMoE:
    ffn, reader = stored
    plan = plan_of(ffn, d_ff_expert, n_experts, top_k, init, d_ff_shared)
    return start_layer(ffn, plan, replace(PLAIN, **changed), reader, seed=seed)


@torch.no_grad()
def error(moe: SparseMoE, reader: LayerReader, split: str = "validation") -> float:
    """MSE over a split, relative to the target's power."""
    x, y = reader.read(split)
    return float((moe(x) - y).double().square().sum() / y.double().square().sum())


def assert_exact(moe: SparseMoE, reader: LayerReader) -> None:
    for split in ROWS:
        assert error(moe, reader, split) < 1e-11


def same(a: SparseMoE, b: SparseMoE) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# Exact starts


@pytest.mark.parametrize("router_init", RouterInit)
@pytest.mark.parametrize("top_k", [1, 3])
def test_copies_are_the_dense_ffn_whatever_the_router(family, top_k, router_init):
    moe = begin(family, F, 4, top_k, "copy", router_init=router_init)
    assert_exact(moe, family[1])


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_carve_with_every_expert_active_and_a_zero_router_is_the_dense_ffn(family, groups):
    moe = begin(family, F // groups, groups, groups, router_init=RouterInit.zero)
    assert_exact(moe, family[1])


@pytest.mark.parametrize("router_init", [RouterInit.random, RouterInit.ridge])
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_virtual_groups_with_one_replica_active_are_the_dense_ffn(family, replicas, router_init):
    groups = 4
    settings = {"virtual_groups": True, "router_init": router_init}
    moe = begin(family, F // groups, groups * replicas, groups, **settings)
    assert_exact(moe, family[1])


def test_virtual_groups_send_tokens_to_every_replica(stored):
    """Else the replicas beyond the first would be dead weight."""
    reader = stored[1]
    for router_init in (RouterInit.random, RouterInit.ridge):
        moe = begin(stored, F // 4, 12, 4, virtual_groups=True, router_init=router_init)
        routing = moe.route(reader.read("validation")[0])
        ids = routing.expert_ids
        assert torch.equal(ids.sort(dim=1).values % 4, torch.arange(4).expand_as(ids))
        assert routing_statistics(routing.taken_TE())["dead_experts"] == 0


@pytest.mark.parametrize("router_init", [RouterInit.random, RouterInit.ridge])
def test_carve_without_virtual_groups_is_not_exact_with_other_routers(stored, router_init):
    """So the zero router of the exact carve is needed."""
    assert error(begin(stored, F // 4, 4, 4, router_init=router_init), stored[1]) > 1e-9


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_carve_by_clusters_is_as_exact_as_one_by_slices(family, groups):
    settings = {"router_init": RouterInit.zero}
    moe = begin(family, F // groups, groups, groups, "cluster", **settings)
    assert_exact(moe, family[1])


@pytest.mark.parametrize("init", ["slice", "cluster"])
def test_exact_starts_are_not_refitted(stored, init):
    exact = [
        ((F, 4, 2, "copy"), {}),
        ((F // 4, 4, 4, init), {"router_init": RouterInit.zero}),
        ((F // 4, 8, 4, init), {"virtual_groups": True}),
    ]
    for sizes, settings in exact:
        one, two = (begin(stored, *sizes, **settings, refit=refit) for refit in (False, True))
        assert same(one, two)


def test_exact_starts_are_not_scaled(stored):
    """With noise neither: it is wanted, and a scale would only hide a part of it."""
    ffn, reader = stored
    moe = begin(stored, F // 2, 2, 2, router_init=RouterInit.zero)
    left, right = ffn.down_proj.chunk(2, dim=1)
    assert torch.equal(moe.down_proj, torch.stack([left, right]) * 2)
    noisy = begin(stored, F, 4, 1, "copy", init_noise=0.5)
    assert not 0.99 < fit_scale(noisy, *reader.read("validation")) < 1.01


# Other starts


@pytest.mark.parametrize("router_init", RouterInit)
@pytest.mark.parametrize(("init", "width"), [("slice", F // 4), ("random", F // 4), ("random", F)])
def test_other_starts_have_the_best_scale_for_validation(stored, init, width, router_init):
    moe = begin(stored, width, 8, 2, init, router_init=router_init)
    best = error(moe, stored[1])
    assert best < 1
    for factor in (0.9, 1.1):
        other = begin(stored, width, 8, 2, init, router_init=router_init)
        with torch.no_grad():
            other.down_proj.mul_(factor)
        assert error(other, stored[1]) > best


def test_fitted_scale_beats_the_carve_as_it_is(stored):
    """Unscaled, `down_proj` is that of the dense FFN times the number of groups."""
    ffn, reader = stored
    moe = begin(stored, F // 4, 4, 2)
    fitted = error(moe, reader)
    scale = moe.down_proj[0].detach() / (4 * ffn.down_proj[:, : F // 4])
    factor = float(scale.mean())
    torch.testing.assert_close(scale, torch.full_like(scale, factor))
    assert 0.1 < factor < 0.95
    with torch.no_grad():
        moe.down_proj.div_(factor)
    assert error(moe, reader) > fitted
    assert fit_scale(moe, *reader.read("validation")) == pytest.approx(factor)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_ridge_routing_beats_random_and_zero_routing_of_a_carve(family, top_k):
    ridge, random, zero = (
        error(begin(family, F // 8, 8, top_k, router_init=router_init), family[1])
        for router_init in (RouterInit.ridge, RouterInit.random, RouterInit.zero)
    )
    assert ridge < 0.6 * min(random, zero)


def test_ridge_routing_takes_different_groups_where_there_are_replicas(stored):
    """Two replicas of one group add nothing to each other while they are alike."""
    moe = begin(stored, F // 4, 16, 4)
    routing = moe.route(stored[1].read("validation")[0])
    assert isinstance(routing, TokenChoice)
    ids = routing.expert_ids
    distinct = torch.nn.functional.one_hot(ids % 4, 4).amax(dim=1).sum(dim=1).float().mean()
    assert distinct > 3.3  # 2.9 by random rows
    assert routing_statistics(routing.taken_TE())["dead_experts"] == 0


def test_ridge_logits_begin_nearly_even(stored):
    """A spread of `LOGIT_STD` per part: no expert outweighs another before it has learnt to."""
    x = stored[1].read("train")[0]
    carve = begin(stored, F // 4, 4, 2).route(x).router_logits
    assert 0.3 * LOGIT_STD < carve.std() < 1.1 * LOGIT_STD
    replicated = begin(stored, F // 4, 16, 4).route(x)
    assert replicated.expert_weights.std() < 0.05


@pytest.mark.parametrize(
    ("width", "n_experts", "init"), [(F // 4, 4, "slice"), (F // 4, 12, "slice"), (F, 3, "copy")]
)
def test_ridge_rows_sum_to_nothing(stored, width, n_experts, init):
    """What all experts had in common would choose none of them."""
    rows = begin(stored, width, n_experts, 2, init).router.weight.detach()
    assert rows.sum(dim=0).abs().max() < 1e-5 < 1e-3 < rows.abs().max()


def test_ridge_routing_is_even_where_inputs_are_far_from_zero(tmp_path):
    """A channel that is always large must not send every token to one replica."""
    ffn, mean = dense_ffn(), torch.zeros(D)
    mean[3] = 20.0
    reader = write_store(tmp_path / "layer_3.zarr", ffn, mean=mean)
    moe = begin((ffn, reader), F, 4, 1, "copy")
    load = routing_statistics(moe.route(reader.read("validation")[0]).taken_TE())
    assert load["load_max_over_mean"] < 1.5


def test_ridge_routing_bears_channels_that_are_always_zero(tmp_path):
    """Nothing can be learnt of them, and their rows stay at zero."""
    ffn, std = dense_ffn(), torch.ones(D)
    std[5] = 0.0
    moe = begin((ffn, write_store(tmp_path / "layer_3.zarr", ffn, std=std)), F // 4, 8, 2)
    rows = moe.router.weight.detach()
    assert rows.isfinite().all() and rows.abs().max() < 1
    assert rows[:, 5].count_nonzero() == 0


def test_random_experts_have_random_rows_in_place_of_ridge(stored):
    """They contribute nothing yet that a regression could find."""
    ridge, random = (
        begin(stored, F // 4, 8, 2, "random", router_init=router_init)
        for router_init in (RouterInit.ridge, RouterInit.random)
    )
    assert same(ridge, random)


def test_ridge_looks_at_a_bounded_number_of_training_rows(stored, tmp_path, monkeypatch):
    ffn, reader = stored
    few = write_store(tmp_path / "few", ffn, rows={"train": 64, "validation": 256})
    assert few.read("train")[0].equal(reader.read("train", 0, 64)[0])
    wanted, everything = begin((ffn, few), F // 4, 8, 2), begin(stored, F // 4, 8, 2)
    monkeypatch.setattr("pipeline.start.RIDGE_ROWS", 64)
    assert same(begin(stored, F // 4, 8, 2), wanted) and not same(everything, wanted)


def test_random_router_rows_have_their_standard_deviation(stored):
    rows = begin(stored, 8, 64, 2, router_init=RouterInit.random).router.weight
    assert float(rows.detach().std()) == pytest.approx(ROUTER_STD, rel=0.1)


def test_router_rows_are_shared_by_the_groups_of_a_replica_and_by_no_others(stored):
    for router_init in (RouterInit.random, RouterInit.ridge):
        settings = {"virtual_groups": True, "router_init": router_init}
        rows = begin(stored, F // 4, 8, 4, **settings).router.weight.detach()
        torch.testing.assert_close(rows[:4], rows[:1].expand(4, D))
        torch.testing.assert_close(rows[4:], rows[4:5].expand(4, D))
        assert (rows[0] - rows[4]).abs().max() > 1e-3


@pytest.mark.parametrize("init", ["slice", "random"])
def test_zero_router_gives_zero_rows(stored, init):
    moe = begin(stored, F // 4, 8, 2, init, router_init=RouterInit.zero)
    assert moe.router.weight.count_nonzero() == 0


# Clusters, specialists and refits


def shuffled(ffn: DenseFFN) -> DenseFFN:
    """The same function, its neurons in mixed order."""
    order = torch.randperm(F, generator=torch.Generator().manual_seed(3))
    assert ffn.gate_proj is not None
    return DenseFFN(ffn.up_proj[order], ffn.down_proj[:, order], ffn.gate_proj[order])


def test_clusters_find_what_slices_miss(stored):
    """Neurons that lean one way are found again, and the router predicts just these groups."""
    ffn, reader = shuffled(stored[0]), stored[1]
    sizes = (F // 8, 8, 2)
    clusters, slices = (
        error(begin((ffn, reader), *sizes, i), reader) for i in ("cluster", "slice")
    )
    assert clusters < 0.85 * slices
    in_order = error(begin(stored, *sizes, "slice"), reader)
    assert clusters < 1.1 * in_order


@pytest.mark.parametrize("router_init", RouterInit)
@pytest.mark.parametrize("init", ["slice", "cluster", "random"])
def test_refit_improves_starts_that_are_not_exact(stored, init, router_init):
    settings = {"router_init": router_init}
    plain, refitted = (
        begin(stored, F // 4, 8, 2, init, **settings, refit=refit) for refit in (False, True)
    )
    assert error(refitted, stored[1]) < error(plain, stored[1])
    for name in ("gate_up_proj", "router.weight"):
        assert torch.equal(plain.get_parameter(name), refitted.get_parameter(name))


@pytest.mark.parametrize(("init", "top_k"), [("slice", 1), ("cluster", 2)])
def test_mean_compensation_gives_what_the_tokens_of_an_expert_lack_on_average(stored, init, top_k):
    ffn, reader = stored
    plan = plan_of(ffn, F // 4, 4, top_k, init)
    plan["shape"]["bias"] = True
    without, moe = (
        start_layer(ffn, plan, replace(PLAIN, mean_compensation=on), reader, seed=0)
        for on in (False, True)
    )
    assert error(moe, reader, "train") < error(without, reader, "train")
    x, y = reader.read("validation")
    y_hat, routing = moe.forward_routed(x)
    taken_TE = routing.weights_TE() > 0
    if top_k == 1:
        for e in range(4):
            lacking = (y - y_hat)[taken_TE[:, e]].mean(dim=0)
            torch.testing.assert_close(lacking, torch.zeros(D), atol=1e-4, rtol=0)


def test_refit_is_under_the_thresholds_of_experts_that_choose(stored):
    ffn, reader = stored
    plan = plan_of(ffn, F // 4, 8, 2)
    plan["shape"] |= {"routing": "expert_choice", "capacity_factor": 2.0}
    plain, refitted = (
        start_layer(ffn, plan, replace(PLAIN, refit=refit), reader, seed=0)
        for refit in (False, True)
    )
    assert error(refitted, reader) < error(plain, reader)


@pytest.mark.parametrize("init", ["slice", "cluster"])
def test_specialists_start_better_than_any_carve_of_their_size(stored, init):
    carved = begin(stored, F // 4, 4, 1, init, refit=True)
    specialists = begin(stored, F // 4, 4, 1, "specialist")
    assert error(specialists, stored[1]) < error(carved, stored[1])


# A shared expert


@pytest.mark.parametrize("init", ["slice", "cluster"])
def test_a_carve_beside_a_shared_expert_with_every_expert_active_is_exact(family, init):
    moe = begin(family, F // 4, 3, 3, init, d_ff_shared=F // 4, router_init=RouterInit.zero)
    assert_exact(moe, family[1])


def test_copies_of_the_rest_beside_a_shared_expert_are_exact(family):
    assert_exact(begin(family, 3 * F // 4, 4, 1, "copy", d_ff_shared=F // 4), family[1])


def test_the_shared_expert_has_the_neurons_that_contribute_most(stored):
    ffn, reader = stored
    loud = torch.tensor([3, 17, 20, 40, 41, 50, 51, 63])
    down = ffn.down_proj.clone()
    down[:, loud] *= 20
    ffn = replace(ffn, down_proj=down)
    moe = begin((ffn, reader), 7, 8, 8, d_ff_shared=8)
    shared = moe.get_parameter("shared_expert.gate_up_proj")
    assert ffn.gate_proj is not None
    assert torch.equal(shared, torch.cat([ffn.gate_proj[loud], ffn.up_proj[loud]]))


def test_specialists_beside_a_shared_expert_are_fitted_together(stored):
    """Better than plain pruning to what they run, and no single step of them all is left."""
    reader = stored[1]
    moe = begin(stored, F // 8, 6, 1, "specialist", d_ff_shared=F // 8)
    assert error(moe, reader) < error(begin(stored, F // 4, 1, 1, "specialist"), reader)
    before, after = refit_down(moe, reader)
    assert after == pytest.approx(before, rel=0.02)


def test_specialists_need_no_multiple_of_the_groups(stored):
    moe = begin(stored, 24, 5, 1, "specialist")
    routing = moe.route(stored[1].read("validation")[0])
    assert routing_statistics(routing.taken_TE())["dead_experts"] == 0


# Settings


@pytest.mark.parametrize("router_init", RouterInit)
@pytest.mark.parametrize("init", ["slice", "random"])
def test_start_repeats_with_its_arguments(stored, init, router_init):
    settings = {"router_init": router_init, "init_noise": 0.1}
    assert same(*(begin(stored, F // 4, 8, 2, init, **settings) for _ in range(2)))


def test_start_depends_on_seed_and_layer(stored):
    ffn, reader = stored
    plan, cfg = plan_of(ffn, F // 4, 8, 2), replace(PLAIN, init_noise=0.1)
    starts = [
        start_layer(ffn, {**plan, "layer": layer}, cfg, reader, seed=seed)
        for layer, seed in [(0, 0), (1, 0), (0, 1)]
    ]
    assert not any(same(a, b) for a, b in zip(starts, starts[1:] + starts[:1], strict=True))


def test_init_noise_parts_the_replicas(stored):
    """Relative to each weight's spread, and small in the output."""
    alike = begin(stored, F // 4, 8, 4, virtual_groups=True)
    parted = begin(stored, F // 4, 8, 4, virtual_groups=True, init_noise=0.01)
    for name in ("gate_up_proj", "down_proj"):
        one, two = (m.get_parameter(name).detach() for m in (alike, parted))
        assert torch.equal(one[:4], one[4:])
        assert not torch.equal(two[:4], two[4:])
        assert float((two - one).std() / one.std()) == pytest.approx(0.01, rel=0.1)
    assert 0 < error(parted, stored[1]) < 1e-3


@pytest.mark.parametrize(
    "changed",
    [
        {"router_init": RouterInit.zero},
        {"router_init": RouterInit.random},
        {"init_noise": 0.1},
        {"virtual_groups": True},
        {"init": "random"},
        {"init": "cluster"},
        {"init": "specialist"},
        {"refit": True},
        {"d_ff_shared": F // 4},
        {"seed": 1},
    ],
    ids=str,
)
def test_every_setting_of_the_start_changes_it(stored, changed):
    assert not same(begin(stored, F // 4, 12, 4), begin(stored, F // 4, 12, 4, **changed))


def test_copies_differ_from_slices_in_what_an_expert_holds(stored):
    ffn, _ = stored
    copied = begin(stored, F, 4, 2, "copy")
    gate, up = copied.get_parameter("gate_up_proj")[2].chunk(2)
    assert ffn.gate_proj is not None
    assert torch.equal(gate, ffn.gate_proj) and torch.equal(up, ffn.up_proj)
    assert torch.equal(copied.down_proj[2], ffn.down_proj)


def test_half_precision_weights_and_stores_start_in_float32(stored):
    ffn, reader = stored
    half = ffn.to("cpu", torch.bfloat16)
    for router_init in RouterInit:
        moe = begin((half, reader), F // 4, 8, 2, router_init=router_init)
        assert {weight.dtype for weight in moe.parameters()} == {torch.float32}
