"""The plan of every layer: its own shape, its start, and the one host of them all."""

import dataclasses
import json

import pytest

from pipeline import budget
from pipeline.config import Host, Init, MoEConfig, RouterInit
from pipeline.errors import ConfigError, InputError
from pipeline.hosts import HOSTS
from pipeline.shape import MoEShape

HALF = MoEConfig(
    n_experts=16,
    top_k=4,
    d_ff_expert=0.125,
    init_from_dense=True,
    init=Init.auto,
    init_noise=0.01,
    virtual_groups=False,
    router_init=RouterInit.ridge,
    host=Host.auto,
)


def record_of(*widths: int, family: str = "llama") -> dict:
    """Of a dense model, as `dense.describe` gives it."""
    ffn = {"gated": True, "activation": "silu", "bias": False}
    return {
        "family": family,
        "d_model": 32,
        "n_layers": len(widths),
        "layers": [{"index": k, "d_ff": d_ff} | ffn for k, d_ff in enumerate(widths)],
        "config": {"attention_bias": False},
    }


def plans_of(*widths: int, layers: list[int] | None = None, **changes) -> dict[int, dict]:
    chosen = list(range(len(widths))) if layers is None else layers
    return budget.uniform(record_of(*widths), dataclasses.replace(HALF, **changes), chosen)


def test_uniform_gives_every_layer_one_plan_in_order():
    plans = plans_of(64, 64, 64, layers=[2, 0, 1])
    assert list(plans) == [0, 1, 2]
    assert [plan["layer"] for plan in plans.values()] == [0, 1, 2]


def test_uniform_plans_are_json_that_gives_the_shape_back():
    plan = json.loads(json.dumps(plans_of(64)[0]))
    assert MoEShape(**plan["shape"]) == MoEShape(
        d_model=32,
        d_ff=64,
        d_ff_expert=8,
        n_experts=16,
        top_k=4,
        activation="silu",
        gated=True,
        bias=False,
        router_function="softmax_topk",
    )


def test_uniform_records_the_host_and_the_router_function_that_it_fixes():
    for plan in plans_of(64, 64).values():
        host = HOSTS[plan["host"]]
        assert host.name == "mixtral"
        assert plan["shape"]["router_function"] == host.router_function


@pytest.mark.parametrize("d_ff", [64, 96, 128])
def test_uniform_resolves_a_fraction_against_the_width_of_the_layer(d_ff: int):
    assert plans_of(d_ff)[0]["shape"]["d_ff_expert"] == d_ff // 8


def test_uniform_resolves_each_layer_against_its_own_width():
    plans = plans_of(64, 128, 16, d_ff_expert=16)
    assert [plan["shape"]["d_ff"] for plan in plans.values()] == [64, 128, 16]
    assert [plan["shape"]["d_ff_expert"] for plan in plans.values()] == [16, 16, 16]
    assert [plan["init"] for plan in plans.values()] == ["slice", "slice", "copy"]


@pytest.mark.parametrize("d_ff_expert", [None, 0.125])
def test_uniform_refuses_widths_that_differ_by_layer_where_the_host_has_one(d_ff_expert):
    with pytest.raises(ConfigError, match="mixtral: all its layers have one d_ff_expert"):
        plans_of(64, 128, d_ff_expert=d_ff_expert)


def test_uniform_checks_the_sizes_of_every_layer_not_only_of_the_first():
    with pytest.raises(ConfigError, match="12 groups"):
        plans_of(64, 192, d_ff_expert=16)


@pytest.mark.parametrize("layers", [[2], [0, 1, 2], [7]])
def test_uniform_refuses_a_layer_that_the_model_lacks(layers: list[int]):
    with pytest.raises(InputError, match="0 to 1") as refusal:
        plans_of(64, 64, layers=layers)
    assert str(max(layers)) in str(refusal.value)


def test_uniform_refuses_layers_left_dense_where_the_host_has_none():
    with pytest.raises(ConfigError, match=r"layers \[1\] would stay dense"):
        plans_of(64, 64, layers=[0])


def test_uniform_refuses_a_model_without_a_host_before_anything_is_trained():
    with pytest.raises(ConfigError, match="mixtral: it holds llama, mistral, and this is gpt2"):
        budget.uniform(record_of(64, family="gpt2"), HALF, [0])


def test_uniform_refuses_experts_that_are_no_multiple_of_the_groups():
    with pytest.raises(ConfigError) as refusal:
        plans_of(64, n_experts=12)
    assert "moe.n_experts=12, 8 groups" in str(refusal.value)
    assert "moe.n_experts=8 or moe.n_experts=16" in refusal.value.remedy


def test_uniform_refuses_virtual_groups_whose_top_k_is_no_multiple_of_the_groups():
    with pytest.raises(ConfigError, match=r"moe\.top_k=4, 8 groups") as refusal:
        plans_of(64, virtual_groups=True)
    assert "moe.top_k=8" in refusal.value.remedy
    assert plans_of(64, virtual_groups=True, top_k=8)[0]["shape"]["top_k"] == 8


def test_uniform_refuses_virtual_groups_from_a_router_that_prefers_nothing():
    with pytest.raises(ConfigError, match="router_init=zero, 2 replicas"):
        plans_of(64, virtual_groups=True, top_k=8, router_init=RouterInit.zero)


@pytest.mark.parametrize(
    ("changes", "init"),
    [
        ({}, "slice"),
        ({"d_ff_expert": None}, "copy"),
        ({"init": Init.random, "n_experts": 3, "top_k": 1}, "random"),
        ({"init_from_dense": False, "n_experts": 3, "top_k": 1}, "random"),
    ],
)
def test_uniform_records_how_a_layer_starts(changes: dict, init: str):
    assert plans_of(64, **changes)[0]["init"] == init


def test_uniform_says_which_host_and_why(capsys: pytest.CaptureFixture[str]):
    plans_of(64)
    assert "host: mixtral (it can hold llama)" in capsys.readouterr().out
