"""The sizes of a sparse layer: what is refused, with which remedy, and what follows from them."""

import dataclasses
import json
import subprocess
import sys

import pytest

from pipeline.errors import ConfigError
from pipeline.shape import (
    MoEShape,
    check_dynamic,
    check_start,
    resolve_d_ff_expert,
    resolve_init,
    resolve_shared_expert,
)


def shape(**changes) -> MoEShape:
    sizes = {"d_model": 256, "d_ff": 768, "d_ff_expert": 96, "n_experts": 16, "top_k": 4}
    kind = {"activation": "silu", "gated": True, "bias": False, "router_function": "softmax_topk"}
    return MoEShape(**(sizes | kind | changes))


@pytest.mark.parametrize(
    ("value", "width"),
    [(None, 768), (1.0, 768), (0.125, 96), (1 / 3, 256), (0.7, 7), (8, 8), (2048, 2048)],
)
def test_d_ff_expert_takes_null_a_fraction_or_neurons(value, width):
    assert resolve_d_ff_expert(value, 10 if value == 0.7 else 768) == width


@pytest.mark.parametrize(
    ("value", "nearest"),
    [
        (0.3, "moe.d_ff_expert=230 or moe.d_ff_expert=231"),
        (2048.0, "moe.d_ff_expert=2048"),
        (1.5, "moe.d_ff_expert=8"),
        (1, "moe.d_ff_expert=8"),
        (0, "moe.d_ff_expert=8 or moe.d_ff_expert=768"),
        (-0.5, "moe.d_ff_expert=8 or moe.d_ff_expert=768"),
        (1e-4, "moe.d_ff_expert=8"),
    ],
)
def test_d_ff_expert_refuses_the_rest_naming_the_nearest_valid(value, nearest):
    with pytest.raises(ConfigError) as refusal:
        resolve_d_ff_expert(value, 768)
    assert refusal.value.exit_code == 2
    assert refusal.value.value == value
    assert refusal.value.remedy == f"the nearest valid: {nearest}"


def test_init_auto_copies_equal_widths_and_slices_others():
    assert resolve_init("auto", True, 768, 768) == "copy"
    assert resolve_init("auto", True, 768, 96) == "slice"
    assert resolve_init("random", True, 768, 96) == "random"


def test_init_without_the_dense_ffn_is_random():
    assert resolve_init("copy", False, 768, 768) == "random"


@pytest.mark.parametrize(
    ("changes", "init", "remedy"),
    [
        ({"n_experts": 20}, "slice", "moe.n_experts=16 or moe.n_experts=24"),
        ({"n_experts": 6}, "slice", "moe.n_experts=8"),
        ({"d_ff_expert": 100}, "slice", "moe.d_ff_expert=96 or moe.d_ff_expert=128"),
        ({}, "copy", "moe.d_ff_expert=null"),
    ],
)
def test_start_refuses_sizes_that_do_not_fit_naming_the_nearest_valid(changes, init, remedy):
    with pytest.raises(ConfigError) as refusal:
        check_start(shape(**changes), init)
    assert refusal.value.exit_code == 2
    assert remedy in refusal.value.remedy


@pytest.mark.parametrize(
    ("changes", "init"),
    [
        ({"n_experts": 8}, "slice"),
        ({"n_experts": 24}, "slice"),
        ({"d_ff_expert": 768, "n_experts": 3, "top_k": 1}, "slice"),
        ({"d_ff_expert": 1000, "n_experts": 3, "top_k": 1}, "slice"),
        ({"d_ff_expert": 768}, "copy"),
        ({"d_ff_expert": 100, "n_experts": 7}, "random"),
    ],
)
def test_start_takes_whole_groups_and_any_random_sizes(changes, init):
    check_start(shape(**changes), init)


def test_shape_figures_follow_the_definitions():
    of = shape()
    assert (of.groups, of.replicas) == (8, 2)
    assert of.expert_parameters == 3 * 256 * 96
    assert of.dense_parameters == 3 * 256 * 768
    assert of.total_parameters == 16 * 3 * 256 * 96 + 16 * 256
    assert of.active_parameters == 4 * 3 * 256 * 96 + 16 * 256
    assert of.active_ffn_fraction == 0.5
    dense_flops = 2 * 3 * 256 * 768
    active_flops = 4 * 2 * 3 * 256 * 96 + 2 * 16 * 256
    assert of.active_flops_fraction == pytest.approx(active_flops / dense_flops)


def test_shape_counts_every_parameter_that_the_layer_has():
    from pipeline.moe import SparseMoE

    for gated in (True, False):
        for bias in (True, False):
            for shared in (0, 8):
                of = shape(d_model=12, d_ff=32, d_ff_expert=16, gated=gated, bias=bias)
                of = dataclasses.replace(of, d_ff_shared=shared)
                assert of.total_parameters == sum(p.numel() for p in SparseMoE(of).parameters())


def test_shape_survives_json():
    of = shape()
    assert MoEShape(**json.loads(json.dumps(dataclasses.asdict(of)))) == of


def test_shape_imports_no_torch():
    code = "import sys, pipeline.shape; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_experts_that_choose_run_capacity_factor_of_them_per_token():
    chosen = shape(routing="expert_choice", capacity_factor=1.25)
    assert chosen.active_ffn_fraction == 1.25 * 96 / 768
    experts = chosen.active_parameters - chosen.router_parameters
    assert experts == 1.25 * chosen.expert_parameters
    assert chosen.total_parameters == shape().total_parameters


def test_true_widths_count_and_not_the_padding():
    uneven = shape(d_ff_expert=160, expert_widths=[160, 32] * 8)  # a list, as JSON gives it
    assert uneven.widths == (160, 32) * 8 and shape().widths == (96,) * 16
    assert uneven.total_parameters == shape().total_parameters
    assert uneven.active_parameters == shape().active_parameters
    assert uneven.active_ffn_fraction == shape().active_ffn_fraction
    assert MoEShape(**json.loads(json.dumps(dataclasses.asdict(uneven)))) == uneven


def test_a_shared_expert_counts_for_every_token_and_leaves_the_rest_to_the_others():
    of = shape(d_ff_shared=192, n_experts=6, top_k=2)
    assert (of.d_ff_routed, of.groups, of.replicas) == (576, 6, 1)
    assert of.active_ffn_fraction == (192 + 2 * 96) / 768
    assert of.total_parameters == 3 * 256 * 768 + 6 * 256
    assert of.active_parameters == 3 * 256 * (192 + 2 * 96) + 6 * 256
    check_start(of, "slice")


@pytest.mark.parametrize(("value", "width"), [(0, 0), (0.25, 192), (8, 8), (760, 760)])
def test_shared_expert_takes_nothing_a_fraction_or_neurons(value, width):
    assert resolve_shared_expert(value, 768) == width


@pytest.mark.parametrize("value", [0.3, 1.0, 7, 768, 0.001])
def test_shared_expert_refuses_the_rest_naming_a_valid_width(value):
    with pytest.raises(ConfigError) as caught:
        resolve_shared_expert(value, 768)
    named = int(caught.value.remedy.rsplit("=", 1)[1])
    assert resolve_shared_expert(named, 768) == named


def test_mlp_router_and_balance_bias_count():
    added = shape(router_width=32).total_parameters - shape().total_parameters
    assert added == 32 * 256 + 16 * 32
    assert shape(balance_bias=True).total_parameters - shape().total_parameters == 16
    assert shape(router_width=32).active_flops_fraction > shape().active_flops_fraction


@pytest.mark.parametrize(
    ("width", "bounds", "remedy"),
    [(96, (256, 8192), 256), (96, (8, 64), 64), (100, (8, 512), 96), (12, (8, 512), 8)],
)
def test_dynamic_experts_start_within_their_bounds_at_a_multiple_of_8(width, bounds, remedy):
    with pytest.raises(ConfigError) as refusal:
        check_dynamic(shape(d_ff_expert=width), *bounds)
    assert f"width {width}" in str(refusal.value)
    assert f"moe.d_ff_expert={remedy}" in refusal.value.remedy
    check_dynamic(shape(d_ff_expert=96), 96, 96)
