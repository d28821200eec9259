"""The starts of the experts. The exact ones reproduce the dense FFN."""

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.experts import group_contributions, slice_partition, start_experts
from pipeline.ffn import DenseFFN
from pipeline.moe import SparseMoE, fit_scale
from pipeline.shape import MoEShape

D, F = 24, 64
FAMILIES = [(True, False), (True, True), (False, False), (False, True)]  # gated, bias


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense_ffn(gated: bool = True, bias: bool = False, dtype=torch.float64) -> DenseFFN:
    g = generator(1)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g, dtype=dtype) * size[-1] ** -0.5

    return DenseFFN(
        up_proj=normal(F, D),
        down_proj=normal(D, F),
        gate_proj=normal(F, D) if gated else None,
        up_bias=normal(F) if bias else None,
        down_bias=normal(D) if bias else None,
        gate_bias=normal(F) if bias and gated else None,
        activation="silu" if gated else "gelu_tanh",
    )


def shape_of(dense: DenseFFN, d_ff_expert: int, n_experts: int, top_k: int) -> MoEShape:
    gated, bias = dense.gate_proj is not None, dense.down_bias is not None
    activation = dense.activation
    return MoEShape(D, F, d_ff_expert, n_experts, top_k, activation, gated, bias, "softmax_topk")


def start(
    dense: DenseFFN,
    shape: MoEShape,
    init: str = "slice",
    *,
    router: torch.Tensor | None = None,
    noise: float = 0.0,
    partition: torch.Tensor | None = None,
) -> SparseMoE:
    moe = SparseMoE(shape).double()
    experts = start_experts(
        dense, shape, init, init_noise=noise, generator=generator(), partition=partition
    )
    rows = torch.zeros(shape.n_experts, D) if router is None else router
    moe.load_state_dict({**experts, "router.weight": rows})
    return moe


def inputs(rows: int = 33) -> torch.Tensor:
    return torch.randn(rows, D, generator=generator(2), dtype=torch.float64)


def assert_exact(moe: SparseMoE, dense: DenseFFN) -> None:
    x = inputs()
    torch.testing.assert_close(moe(x), dense(x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("gated", "bias"), FAMILIES)
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_carve_with_all_experts_active_and_a_zero_router_is_the_dense_ffn(gated, bias, groups):
    dense = dense_ffn(gated, bias)
    assert_exact(start(dense, shape_of(dense, F // groups, groups, groups)), dense)


@pytest.mark.parametrize(("gated", "bias"), FAMILIES)
@pytest.mark.parametrize("replicas", [1, 2, 5])
def test_virtual_groups_are_the_dense_ffn_for_any_number_of_replicas(gated, bias, replicas):
    dense, groups = dense_ffn(gated, bias), 4
    rows = torch.randn(replicas, D, generator=generator(3)).repeat_interleave(groups, 0)
    moe = start(dense, shape_of(dense, F // groups, groups * replicas, groups), router=rows)
    assert_exact(moe, dense)


@pytest.mark.parametrize(("gated", "bias"), FAMILIES)
@pytest.mark.parametrize("top_k", [1, 3])
def test_copies_are_the_dense_ffn_under_any_router(gated, bias, top_k):
    dense = dense_ffn(gated, bias)
    router = torch.randn(5, D, generator=generator(3))
    assert_exact(start(dense, shape_of(dense, F, 5, top_k), "copy", router=router), dense)


@pytest.mark.parametrize(("gated", "bias"), FAMILIES)
def test_experts_wider_than_the_dense_ffn_are_padded_exactly(gated, bias):
    dense = dense_ffn(gated, bias)
    router = torch.randn(3, D, generator=generator(3))
    assert_exact(start(dense, shape_of(dense, F + 16, 3, 2), router=router), dense)


def test_any_partition_of_the_neurons_carves_exactly():
    dense = dense_ffn()
    shuffled = torch.randperm(F, generator=generator()).view(4, -1)
    assert_exact(start(dense, shape_of(dense, F // 4, 4, 4), partition=shuffled), dense)


def test_expert_e_is_replica_e_div_g_of_group_e_mod_g():
    dense, groups, replicas = dense_ffn(), 4, 3
    moe = start(dense, shape_of(dense, F // groups, groups * replicas, groups))
    partition = slice_partition(F, groups)
    for e in range(groups * replicas):
        neurons = partition[e % groups]
        gate, up = moe.get_parameter("gate_up_proj")[e].chunk(2)
        assert dense.gate_proj is not None
        assert torch.equal(gate, dense.gate_proj[neurons])
        assert torch.equal(up, dense.up_proj[neurons])
        assert torch.equal(moe.down_proj[e], dense.down_proj[:, neurons] * groups)


def test_noise_is_relative_to_the_weights_and_parts_the_replicas():
    dense = dense_ffn()
    shape = shape_of(dense, F // 2, 64, 2)
    plain, noisy = start(dense, shape), start(dense, shape, noise=0.01)
    for name in ("gate_up_proj", "down_proj"):
        weight = plain.get_parameter(name)
        added = noisy.get_parameter(name) - weight
        assert added.std().item() == pytest.approx(0.01 * weight.std().item(), rel=0.02)
        assert not torch.equal(added[0], added[2])


def test_noise_leaves_experts_without_a_replica_alone():
    dense = dense_ffn()
    assert_exact(start(dense, shape_of(dense, F // 4, 4, 4), noise=0.5), dense)


def test_noise_repeats_with_its_seed():
    dense = dense_ffn()
    shape = shape_of(dense, F // 2, 8, 2)
    first, second = (start(dense, shape, noise=0.1) for _ in range(2))
    assert torch.equal(first.down_proj, second.down_proj)


@pytest.mark.parametrize(("gated", "bias"), FAMILIES)
@pytest.mark.parametrize("top_k", [1, 4])
def test_random_start_has_about_the_dense_output_variance(gated, bias, top_k):
    dense = dense_ffn(gated, bias)
    router = torch.randn(32, D, generator=generator(3)) * 0.02
    moe = start(dense, shape_of(dense, 40, 32, top_k), "random", router=router)
    x = inputs(2000)
    assert 0.5 < (moe(x).var(0).mean() / dense(x).var(0).mean()).item() < 2


def test_half_precision_weights_start_in_float32():
    dense = dense_ffn(dtype=torch.bfloat16)
    shape = shape_of(dense, F // 2, 4, 2)
    experts = start_experts(dense, shape, "slice", init_noise=0.1, generator=generator())
    assert {weight.dtype for weight in experts.values()} == {torch.float32}


def test_sizes_that_do_not_fit_are_refused():
    dense = dense_ffn()
    with pytest.raises(ConfigError):
        start(dense, shape_of(dense, F // 4, 6, 2))


def test_contributions_are_the_norms_of_the_groups_outputs():
    dense, x = dense_ffn(), inputs()
    partition = torch.randperm(F, generator=generator()).view(4, -1)
    norms = group_contributions(dense, x, partition)
    for g, neurons in enumerate(partition):
        alone = dense.hidden(x)[:, neurons] @ dense.down_proj[:, neurons].T
        torch.testing.assert_close(norms[:, g], alone.norm(dim=-1))


@pytest.mark.parametrize("bias", [False, True])
def test_fitted_scale_is_the_best_one(bias):
    dense, x = dense_ffn(bias=bias), inputs(200)
    moe = start(dense, shape_of(dense, F // 4, 8, 2), router=torch.randn(8, D) * 0.1)
    before = moe.down_proj.detach().clone()
    scale = fit_scale(moe, x, dense(x))
    torch.testing.assert_close(moe.down_proj.detach(), before * scale)
    best = (moe(x) - dense(x)).square().sum()
    for factor in (0.98, 1.02):
        with torch.no_grad():
            moe.down_proj.copy_(before * scale * factor)
        assert (moe(x) - dense(x)).square().sum() > best


@pytest.mark.parametrize("bias", [False, True])
def test_fitted_scale_of_an_exact_start_is_one(bias):
    dense, x = dense_ffn(bias=bias), inputs()
    moe = start(dense, shape_of(dense, F // 4, 4, 4))
    assert fit_scale(moe, x, dense(x)) == pytest.approx(1.0)
