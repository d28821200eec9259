"""The plan of every layer: its own shape, its start, and the one host of them all."""

import dataclasses
import json

import pytest
from test_start import DYNAMIC

from pipeline import budget
from pipeline.config import Host, Init, LayerMoEConfig, MoEConfig, Router, RouterInit, Routing
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
    refit=False,
    mean_compensation=False,
    shared_expert=0,
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
        plans_of(64, 128, d_ff_expert=d_ff_expert, host=Host.mixtral)


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
        plans_of(64, 64, layers=[0], host=Host.mixtral)


def test_uniform_refuses_a_model_without_a_host_before_anything_is_trained():
    record = record_of(64)
    record["config"]["auto_map"] = {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    record["family"] = "x"
    with pytest.raises(ConfigError, match="mixtral: it holds llama, mistral, and this is x") as no:
        budget.uniform(record, HALF, [0])
    assert "code of its own" in str(no.value)


@pytest.mark.parametrize(
    ("changes", "layers", "why"),
    [
        ({"d_ff_expert": 0.125}, [0, 1], "one d_ff_expert"),
        ({"d_ff_expert": 16}, [0], "would stay dense"),
        ({"d_ff_expert": 16, "routing": Routing.expert_choice}, [0, 1], "tokens choose"),
        ({"d_ff_expert": 16, "router": Router.mlp}, [0, 1], "one linear map"),
        ({"d_ff_expert": 16, "balance_bias": True}, [0, 1], "no balance bias"),
    ],
)
def test_uniform_takes_our_own_host_where_mixtral_refuses_and_says_why(
    changes: dict, layers: list[int], why: str, capsys: pytest.CaptureFixture[str]
):
    plans = plans_of(64, 128, layers=layers, **changes)
    assert {plan["host"] for plan in plans.values()} == {"sparse_distilled"}
    told = capsys.readouterr().out
    assert why in told and "trust_remote_code=True" in told


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


def test_some_layers_have_another_count_width_or_top_k():
    other = [
        LayerMoEConfig(layers=[0, 2], n_experts=8, d_ff_expert=0.5, top_k=2),
        LayerMoEConfig(layers=[3], d_ff_expert=16),
    ]
    plans = plans_of(64, 64, 64, 64, per_layer=other, d_ff_expert=0.25)
    found = {
        k: (plan["shape"]["n_experts"], plan["shape"]["d_ff_expert"], plan["shape"]["top_k"])
        for k, plan in plans.items()
    }
    assert found == {0: (8, 32, 2), 1: (16, 16, 4), 2: (8, 32, 2), 3: (16, 16, 4)}


def test_the_router_and_its_choice_go_into_every_shape():
    chosen = plans_of(64, routing=Routing.expert_choice, capacity_factor=2.0)[0]["shape"]
    assert (chosen["routing"], chosen["capacity_factor"]) == ("expert_choice", 2.0)
    plain = plans_of(64, capacity_factor=2.0)[0]["shape"]
    assert (plain["capacity_factor"], plain["router_width"]) == (None, 0)
    assert plans_of(64, router=Router.mlp, router_width=24)[0]["shape"]["router_width"] == 24
    assert plans_of(64, balance_bias=True)[0]["shape"]["balance_bias"] is True


def test_dynamic_experts_that_start_outside_their_bounds_are_refused():
    sizes = dataclasses.replace(DYNAMIC, enabled=True, min_d_ff=32, max_d_ff=64)
    with pytest.raises(ConfigError, match=r"width 8 of moe\.d_ff_expert") as refusal:
        plans_of(64, dynamic=sizes)
    assert refusal.value.exit_code == 2
    assert plans_of(256, dynamic=sizes)[0]["shape"]["d_ff_expert"] == 32
