"""The sparse layer: its kernels are equal to a plain loop in outputs and in every gradient."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline import kernels
from pipeline.errors import ConfigError
from pipeline.kernels import KERNELS, RUN, lay_out, pick_kernel
from pipeline.moe import SparseMoE, fit_bias, fit_scale
from pipeline.shape import MoEShape

FAMILIES = [(True, False), (True, True), (False, False), (False, True)]  # gated, bias


def shape_of(
    n_experts=6, top_k=2, *, d_model=16, d_ff_expert=8, gated=True, bias=False
) -> MoEShape:
    activation = "silu" if gated else "relu2"
    return MoEShape(
        d_model, 64, d_ff_expert, n_experts, top_k, activation, gated, bias, "softmax_topk"
    )


def layer(shape: MoEShape, kernel: str, dtype=torch.float32) -> SparseMoE:
    generator = torch.Generator().manual_seed(0)
    moe = SparseMoE(shape, kernel).to(dtype)
    with torch.no_grad():
        for weight in moe.parameters():
            std = weight.shape[-1] ** -0.5
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)
    return moe


def inputs(tokens: int, d_model: int, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tokens, d_model, generator=generator).to(dtype)


def outputs_and_gradients(moe: SparseMoE, x: torch.Tensor, autocast=False) -> dict:
    """y, and the gradients of a loss that weighs every element of y differently."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = moe(x)
    (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    gradients = {name: p.grad for name, p in moe.named_parameters()}
    return {"y": y.detach(), "x": x.grad} | gradients


def assert_equal_to_loop(shape, kernel, x, dtype, rtol, atol) -> None:
    reference = outputs_and_gradients(layer(shape, "loop", dtype), x)
    found = outputs_and_gradients(layer(shape, kernel, dtype), x)
    assert found.keys() == reference.keys()
    for name, expected in reference.items():
        torch.testing.assert_close(
            found[name], expected, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize(("gated", "bias"), FAMILIES)
@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("tokens", [1, 7, 37])
def test_padded_equals_the_loop_at_odd_sizes(gated, bias, top_k, tokens):
    shape = shape_of(5, top_k, d_model=13, d_ff_expert=9, gated=gated, bias=bias)
    x = inputs(tokens, 13, torch.float64)
    assert_equal_to_loop(shape, "padded", x, torch.float64, 1e-11, 1e-13)


@pytest.mark.parametrize(("gated", "bias"), FAMILIES)
@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("tokens", [1, 7, 37])
def test_grouped_equals_the_loop(gated, bias, top_k, tokens):
    shape = shape_of(5, top_k, d_model=12, d_ff_expert=20, gated=gated, bias=bias)
    assert_equal_to_loop(shape, "grouped", inputs(tokens, 12), torch.float32, 2e-5, 1e-6)


@pytest.mark.parametrize("kernel", ["padded", "grouped"])
@pytest.mark.parametrize("bias", [False, True])
def test_kernels_equal_the_loop_where_experts_stay_empty(kernel, bias):
    shape = shape_of(8, 1, bias=bias)
    x = inputs(40, 16)
    x = x[layer(shape, "loop").route(x).expert_ids[:, 0] == 3]  # seven experts without a token
    assert len(x) > 1
    assert_equal_to_loop(shape, kernel, x, torch.float32, 2e-5, 1e-6)


@pytest.mark.parametrize(("gated", "bias"), FAMILIES)
def test_loop_is_the_weighted_sum_of_the_chosen_experts(gated, bias):
    moe = layer(shape_of(gated=gated, bias=bias), "loop", torch.float64)
    x = inputs(9, 16, torch.float64)
    routing = moe.route(x)
    experts = moe.experts(torch.float64)
    for t, row in enumerate(x):
        expected = torch.zeros(16, dtype=torch.float64)
        for weight, e in zip(routing.expert_weights[t], routing.expert_ids[t], strict=True):
            inner = experts.inner_EUD[e] @ row
            if experts.inner_bias_EU is not None:
                inner = inner + experts.inner_bias_EU[e]
            if gated:
                hidden = torch.nn.functional.silu(inner[:8]) * inner[8:]
            else:
                hidden = inner.clamp(min=0) ** 2
            out = experts.down_EDH[e] @ hidden
            if experts.down_bias_ED is not None:
                out = out + experts.down_bias_ED[e]
            expected = expected + weight * out
        torch.testing.assert_close(moe(x)[t], expected)


@pytest.mark.parametrize("kernel", ["padded", "grouped"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_stays_near_float32_in_outputs_and_every_gradient(kernel, autocast):
    shape = shape_of(6, 3, d_model=32, d_ff_expert=16)
    x = inputs(100, 32)
    reference = layer(shape, "loop")
    moe = layer(shape, kernel)
    if not autocast:
        moe = moe.bfloat16()
        reference.load_state_dict({n: w.float() for n, w in moe.state_dict().items()})
        x = x.bfloat16()
    found = outputs_and_gradients(moe, x, autocast)
    expected = outputs_and_gradients(reference, x.float())
    assert found["y"].dtype == torch.bfloat16
    for name, gradient in found.items():
        assert relative_error(gradient, expected[name]) < 0.02, name


def test_autocast_keeps_the_master_gradients_and_the_router_in_float32():
    moe = layer(shape_of(), "grouped")
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = moe.forward_routed(inputs(20, 16).bfloat16())
    y.float().sum().backward()
    assert routing.router_logits.dtype == torch.float32
    assert {p.grad.dtype for p in moe.parameters() if p.grad is not None} == {torch.float32}
    assert all(p.grad is not None for p in moe.parameters())


def test_router_of_a_bf16_layer_computes_in_float32():
    moe = layer(shape_of(), "padded").bfloat16()
    x = inputs(20, 16).bfloat16()
    expected = x.float() @ moe.router.weight.float().T
    torch.testing.assert_close(moe.route(x).router_logits, expected)


def test_float32_weights_take_bf16_inputs_at_full_precision():
    moe, x = layer(shape_of(), "padded"), inputs(20, 16).bfloat16()
    assert torch.equal(moe(x), moe(x.float()))


@pytest.mark.parametrize("kernel", ["loop", "padded"])  # the third has no float64
@pytest.mark.parametrize(("gated", "bias"), FAMILIES)
def test_a_shared_expert_adds_what_its_neurons_give_to_every_token(kernel, gated, bias):
    shape = replace(shape_of(gated=gated, bias=bias), d_ff_shared=24)
    moe, x = layer(shape, kernel, torch.float64), inputs(20, 16, torch.float64)
    without = SparseMoE(replace(shape, d_ff_shared=0), kernel).double()
    without.load_state_dict(moe.state_dict(), strict=False)
    inner = torch.nn.functional.linear(
        x,
        moe.get_parameter(f"shared_expert.{moe.inner}_proj"),
        moe.get_parameter(f"shared_expert.{moe.inner}_bias") if bias else None,
    )
    hidden = torch.relu(inner).square()
    if gated:
        hidden = torch.nn.functional.silu(inner[:, :24]) * inner[:, 24:]
    shared = hidden @ moe.get_parameter("shared_expert.down_proj").T
    torch.testing.assert_close(moe(x), without(x) + shared)
    gradients = outputs_and_gradients(moe, x)
    assert all(float(g.abs().max()) > 0 for n, g in gradients.items() if "shared" in n)


def random_double(**changes: object) -> tuple[SparseMoE, torch.Generator]:
    shape = MoEShape(
        16, 64, 16, 4, 2, "silu", True, bool(changes.pop("bias", False)), "softmax_topk"
    )
    moe, generator = SparseMoE(replace(shape, **changes)).double(), torch.Generator().manual_seed(0)
    for parameter in moe.parameters():
        parameter.data.normal_(generator=generator)
    return moe, generator


def test_scale_and_bias_do_not_depend_on_the_rows_at_once():
    found = []
    for at_once in (None, 16):
        moe, generator = random_double(bias=True)
        x, y = (torch.randn(50, 16, generator=generator).double() for _ in range(2))
        scale = fit_scale(moe, x, y, at_once)
        fit_bias(moe, x, y, at_once)
        found.append((scale, moe.get_parameter("down_bias").detach()))
    torch.testing.assert_close(found[0], found[1])


def test_the_fitted_scale_leaves_the_shared_expert_out():
    moe, generator = random_double(d_ff_shared=16)
    x = torch.randn(50, 16, generator=generator).double()
    with torch.no_grad():
        y = moe(x)
        moe.down_proj.mul_(0.5)
    assert fit_scale(moe, x, y) == pytest.approx(2)


def test_output_has_the_shape_of_the_input():
    moe, x = layer(shape_of(), "grouped"), inputs(12, 16)
    torch.testing.assert_close(moe(x.view(3, 4, 16)), moe(x).view(3, 4, 16))


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_a_step_repeats_bit_for_bit(kernel):
    runs = [outputs_and_gradients(layer(shape_of(8, 3), kernel), inputs(200, 16)) for _ in "ab"]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("kernel", ["padded", "grouped"])
def test_kernels_take_the_expanded_gradient_of_a_plain_sum(kernel):
    moe, reference = layer(shape_of(), kernel), layer(shape_of(), "loop")
    for each in (moe, reference):
        each(inputs(30, 16)).sum().backward()
    torch.testing.assert_close(moe.down_proj.grad, reference.down_proj.grad)


@pytest.mark.parametrize(("align", "run"), list(itertools.product([1, 4, 32], [1, 3, 7])))
def test_layout_gives_each_choice_one_row_among_its_experts(align, run):
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(50, 7, generator=generator).topk(3).indices
    ids[ids == 5] = 2  # an expert without a token
    rows = lay_out(ids, 7, align=align, run=run)
    assert len(rows.row_TK.unique()) == 150
    assert torch.equal(rows.token_N[rows.row_TK], torch.arange(50)[:, None].expand(50, 3))
    expert_N = torch.searchsorted(rows.end_E, torch.arange(len(rows.token_N)), right=True)
    assert torch.equal(expert_N[rows.row_TK], ids)
    room = rows.end_E.diff(prepend=rows.end_E.new_zeros(1)).tolist()
    loads = ids.flatten().bincount(minlength=7).tolist()
    for first in range(0, 7, run):
        fullest = max(loads[first : first + run])
        together = room[first : first + run]
        assert together == [-(-fullest // align) * align] * len(together)


def test_experts_that_none_of_a_run_serves_take_no_rows_and_a_zero_gradient():
    shape = shape_of(2 * RUN + 1, 1)
    moe, x = layer(shape, "padded"), inputs(400, 16)
    ids = moe.route(x).expert_ids[:, 0]
    moe(x[(ids < RUN) | (ids == 2 * RUN)]).sum().backward()
    gradient = moe.down_proj.grad.flatten(1).norm(dim=1)
    assert all(gradient[RUN : 2 * RUN] == 0)
    assert all(gradient[:RUN] > 0)
    assert gradient[2 * RUN] > 0


@pytest.mark.parametrize("frozen", [False, True])
def test_padded_gives_gradients_only_where_they_are_asked_for(frozen):
    """A layer's own training asks for none of its input: one product of six."""
    products = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            products.append(function.overloadpacket is torch.ops.aten.bmm)
            return function(*args, **(kwargs or {}))

    moe, x = layer(shape_of(RUN, 2), "padded"), inputs(50, 16).requires_grad_()
    for name in ("down_proj", f"{moe.inner}_proj"):
        moe.get_parameter(name).requires_grad_(not frozen)
    with Count():
        moe(x if frozen else x.detach()).sum().backward()
    # forward 2; of the two products' inputs and weights 2 or 1, and 0 or 2
    assert sum(products) == (2 + 2 if frozen else 2 + 1 + 2)


def test_kernel_is_picked_by_hardware_dtype_and_widths(monkeypatch):
    fits = shape_of(d_model=256, d_ff_expert=96)
    for units, kernel in ((True, "padded"), (False, "grouped")):
        monkeypatch.setattr(kernels, "has_bf16_units", lambda units=units: units)
        assert pick_kernel("cpu", torch.bfloat16, fits)[0] == kernel
        assert pick_kernel("cpu", torch.float32, fits)[0] == "grouped"
        assert pick_kernel("cuda", torch.bfloat16, fits)[0] == "grouped"
        assert pick_kernel("cpu", torch.float64, fits)[0] == "padded"
    odd = shape_of(d_model=256, d_ff_expert=12)
    assert pick_kernel("cpu", torch.float32, odd)[0] == "grouped"
    name, reason = pick_kernel("cpu", torch.bfloat16, odd)
    assert name == "padded"
    assert "d_ff_expert of 12" in reason


def test_configured_kernel_is_kept_or_refused():
    odd = shape_of(d_ff_expert=9)
    assert pick_kernel("cpu", torch.float32, odd, "loop") == ("loop", "configured")
    with pytest.raises(ConfigError) as refusal:
        pick_kernel("cpu", torch.float32, odd, "grouped")
    assert refusal.value.value == "d_ff_expert of 9 in float32"
