"""The plan of every layer: its own shape, its start, and the one host of them all."""

import dataclasses
import itertools
import json
import random
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from test_start import DYNAMIC

from pipeline import artifacts, budget, compose, durable
from pipeline.config import (
    BudgetBy,
    BudgetConfig,
    BudgetVary,
    Host,
    Init,
    LayerMoEConfig,
    MoEConfig,
    Router,
    RouterInit,
    Routing,
)
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
def test_uniform_keeps_widths_that_differ_by_layer_and_says_what_the_host_pads(
    d_ff_expert, capsys: pytest.CaptureFixture[str]
):
    plans = plans_of(64, 128, d_ff_expert=d_ff_expert, host=Host.mixtral)
    narrow, wide = (plan["shape"]["d_ff_expert"] for plan in plans.values())
    assert wide == 2 * narrow
    assert f"experts of {narrow} would be padded to {wide} neurons" in capsys.readouterr().out


def test_uniform_refuses_counts_that_differ_by_layer_where_the_host_has_one():
    with pytest.raises(ConfigError, match="mixtral: all its layers have one n_experts"):
        plans_of(64, 64, per_layer=[LayerMoEConfig([0], n_experts=8)], host=Host.mixtral)


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
    with pytest.raises(ConfigError, match=r"mixtral: it holds llama, mistral, .* this is x") as no:
        budget.uniform(record, HALF, [0])
    assert "code of its own" in str(no.value)


@pytest.mark.parametrize(
    ("changes", "layers", "host", "why"),
    [
        ({"d_ff_expert": 0.125}, [0, 1], "custom", "one d_ff_expert"),
        ({"d_ff_expert": 16}, [0], "qwen2_moe", "would stay dense"),
        ({"routing": Routing.expert_choice}, [0, 1], "custom", "tokens choose"),
        ({"router": Router.mlp}, [0, 1], "custom", "one linear map"),
        ({"d_ff_expert": 16, "balance_bias": True}, [0, 1], "glm4_moe", "no balance bias"),
    ],
)
def test_uniform_takes_another_host_where_mixtral_refuses_and_says_why(
    changes: dict, layers: list[int], host: str, why: str, capsys: pytest.CaptureFixture[str]
):
    plans = plans_of(64, 128, layers=layers, **changes)
    assert {plan["host"] for plan in plans.values()} == {host}
    told = capsys.readouterr().out
    assert why in told and ("trust_remote_code=True" in told) == (host == "custom")


def test_uniform_refuses_experts_that_are_no_multiple_of_the_groups():
    with pytest.raises(ConfigError) as refusal:
        plans_of(64, n_experts=12)
    assert "moe.n_experts=12, 8 groups" in str(refusal.value)
    assert "moe.n_experts=8 or moe.n_experts=16" in refusal.value.remedy


def test_uniform_refuses_virtual_groups_whose_top_k_is_no_multiple_of_the_groups():
    with pytest.raises(ConfigError, match=r"moe\.top_k=4, 8 groups") as refusal:
        plans_of(64, virtual_groups=True)
    assert refusal.value.remedy == "set moe.top_k=8, or moe.virtual_groups=false"
    with pytest.raises(ConfigError) as refusal:
        plans_of(64, virtual_groups=True, init=Init.specialist)
    wanted = "set moe.init=slice and moe.top_k=8, or moe.virtual_groups=false"
    assert refusal.value.remedy == wanted
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


# By KL


BY_KL = BudgetConfig(
    by=BudgetBy.kl, vary=BudgetVary.d_ff_expert, candidates=[0.125, 0.5], tokens=64
)
QUARTER = dataclasses.replace(
    HALF, n_experts=4, top_k=1, d_ff_expert=0.25, init=Init.specialist, budget=BY_KL
)


def options_of(*widths: int, candidates: list | None = None, **changes) -> budget.Options:
    moe = dataclasses.replace(QUARTER, **changes)
    if candidates is not None:
        moe.budget = dataclasses.replace(moe.budget, candidates=candidates)
    return budget.candidates(record_of(*widths), moe, range(len(widths)))


def vary(name: str, candidates: list) -> BudgetConfig:
    return dataclasses.replace(BY_KL, vary=BudgetVary[name], candidates=candidates)


def losses_of(options: budget.Options, importance: list[float]) -> dict[int, dict[str, float]]:
    """The cheaper the more is lost, times what the layer matters."""
    return {
        k: {label: importance[k] / float(1 + c.cost) for label, c in of.items()}
        for k, of in options.items()
    }


def chosen_of(importance: list[float], **changes) -> dict[int, dict]:
    moe, widths = dataclasses.replace(QUARTER, **changes), [64] * len(importance)
    record, layers = record_of(*widths), range(len(widths))
    options = budget.candidates(record, moe, layers)
    return budget.by_kl(record, moe, layers, options, losses_of(options, importance))


def test_allocate_finds_what_trying_everything_finds():
    rng = random.Random(0)
    for _ in range(100):
        rows = [
            [
                (Fraction(rng.randint(1, 9)), rng.randint(0, 20) / 4)
                for _ in range(rng.randint(1, 4))
            ]
            for _ in range(rng.randint(1, 5))
        ]
        most = sum(max(cost for cost, _ in row) for row in rows) * Fraction(rng.randint(4, 9), 9)
        most = max(most, sum((min(row)[0] for row in rows), Fraction()))
        choices = itertools.product(*(range(len(row)) for row in rows))
        totals = {
            choice: tuple(
                sum(row[i][n] for row, i in zip(rows, choice, strict=True)) for n in (1, 0)
            )
            for choice in choices
        }
        best = min(total for total in totals.values() if total[1] <= most)
        assert totals[budget.allocate(rows, most)] == best  # the cheapest of those that lose least


def test_by_kl_gives_most_to_the_layer_that_matters_most():
    plans = chosen_of([1, 1, 50, 1])
    widths = {k: plan["shape"]["d_ff_expert"] for k, plan in plans.items()}
    assert widths[2] == 32 and sum(widths.values()) <= 4 * 16
    told = [plan["budget"] for plan in plans.values()]
    assert sum(t["kl"][t["chosen"]] for t in told) < sum(t["kl"]["0.25"] for t in told)
    assert sum(t["cost"][t["chosen"]] for t in told) <= sum(t["cost"]["0.25"] for t in told)
    assert told[2] | {"kl": {}} == {
        "by": "kl",
        "vary": "d_ff_expert",
        "configured": "0.25",
        "chosen": "0.5",
        "kl": {},
        "cost": {"0.125": 8.0, "0.25": 16.0, "0.5": 32.0},
    }
    assert json.loads(json.dumps(plans[2])) | {"budget": 0} == plans[2] | {"budget": 0}
    assert chosen_of([1, 1, 50, 1]) == plans


def test_by_kl_keeps_the_configured_value_where_layers_matter_alike():
    plans = chosen_of([1, 1, 1])
    assert {plan["budget"]["chosen"] for plan in plans.values()} == {"0.25"}
    assert {plan["host"] for plan in plans.values()} == {"mixtral"}


def test_by_kl_takes_a_host_that_holds_layers_that_differ():
    assert {plan["host"] for plan in chosen_of([1, 1, 50, 1]).values()} == {"custom"}
    padded = chosen_of([1, 1, 50, 1], host=Host.mixtral)
    assert {plan["host"] for plan in padded.values()} == {"mixtral"}
    assert padded[2]["shape"]["d_ff_expert"] == 32
    with pytest.raises(ConfigError, match="all its layers have one n_experts"):
        options_of(64, 64, host=Host.mixtral, budget=vary("n_experts", [2, 8]))


def test_candidates_are_judged_under_the_router_function_of_their_host():
    for host in (Host.auto, Host.glm4_moe):
        of = options_of(64, 64, host=host)
        functions = {c.plan["shape"]["router_function"] for c in of[0].values()}
        assert functions == {"softmax_topk" if host is Host.auto else "sigmoid"}


@pytest.mark.parametrize(
    ("name", "candidates", "costs"),
    [
        ("d_ff_expert", [0.125, 24], [8, 16, 24]),
        ("shared_expert", [0, 16], [16, 24, 32]),
        # experts of 3 x 16 x 32 and their router rows of 32, beside a shared one of 8
        ("n_experts", [2, 8], [n * (3 * 16 * 32 + 32) + 3 * 8 * 32 for n in (2, 4, 8)]),
    ],
)
def test_a_budget_is_of_neurons_or_of_parameters(name: str, candidates: list, costs: list[int]):
    shared = 0 if name == "d_ff_expert" else 8
    options = options_of(64, 64, shared_expert=shared, budget=vary(name, candidates))
    assert [c.cost for c in options[0].values()] == costs
    field = "d_ff_shared" if name == "shared_expert" else name
    assert len({c.plan["shape"][field] for c in options[0].values()}) == 3


def test_experts_that_choose_cost_what_they_take_on_average():
    chosen = {"routing": Routing.expert_choice, "capacity_factor": 1.25}
    assert [c.cost for c in options_of(64, 64, **chosen)[0].values()] == [10, 20, 40]


def test_the_configured_value_is_a_candidate_and_equal_shapes_are_one():
    named = options_of(64, 64, candidates=[8, 0.125, 0.25, 16, 0.5])
    assert [list(of) for of in named.values()] == [["8", "0.25", "0.5"]] * 2


def test_layers_with_an_entry_of_the_varied_setting_keep_it():
    other = [LayerMoEConfig(layers=[1], d_ff_expert=64), LayerMoEConfig(layers=[2], n_experts=8)]
    plans = chosen_of([1, 99, 1, 50], per_layer=other)
    assert plans[1]["shape"]["d_ff_expert"] == 64 and "budget" not in plans[1]
    assert plans[2]["shape"]["n_experts"] == 8
    free = [plans[k]["shape"]["d_ff_expert"] for k in (0, 2, 3)]
    assert free[2] == 32 and sum(free) <= 3 * 16


@pytest.mark.parametrize(
    ("widths", "changes", "told"),
    [
        ((64, 64), {"candidates": [0.5]}, "nothing to choose"),
        ((64, 64), {"candidates": [0.125]}, "nothing to choose"),
        ((64, 64), {"candidates": []}, "nothing to choose"),
        ((64,), {}, "1 layers without"),
        ((64, 64), {"candidates": [0.3, 0.5]}, "Layer 0 cannot have moe.d_ff_expert=0.3"),
        ((64, 64), {"init": Init.slice, "candidates": [24, 8]}, "cannot have moe.d_ff_expert=24"),
        (
            (64, 64),
            {"dynamic": dataclasses.replace(DYNAMIC, enabled=True, max_d_ff=24)},
            "cannot have moe.d_ff_expert=0.5",
        ),
    ],
)
def test_candidates_that_do_not_fit_are_refused(widths: tuple, changes: dict, told: str):
    with pytest.raises(ConfigError, match=told.replace(".", r"\.")) as refusal:
        options_of(*widths, **changes)
    assert refusal.value.exit_code == 2 and "moe.budget" in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["candidates=[-0.5]"], "value:  -0.5"),
        (["candidates=[[1]]"], "value:  [1]"),
        (["candidates=[0.25,many]"], "many"),
        (["vary=n_experts"], "value:  0.25"),
        (["vary=n_experts", "candidates=[2,8.0]"], "value:  8.0"),
        (["vary=n_experts", "candidates=[0,8]"], "value:  0"),
        (["vary=depth"], "depth"),
        (["tokens=0"], "moe.budget.tokens"),
    ],
)
def test_candidates_of_another_kind_are_refused_without_the_model(
    project: Path, settings: list[str], told: str
):
    with pytest.raises(ConfigError) as refusal:
        compose.load(["moe.budget.by=kl", *(f"moe.budget.{setting}" for setting in settings)])
    assert told in str(refusal.value)


def test_candidates_below_the_experts_of_a_token_are_refused(project: Path):
    many = ["moe.budget.by=kl", "moe.budget.vary=n_experts", "moe.budget.candidates=[3,8]"]
    compose.load(many)
    with pytest.raises(ConfigError, match="as many experts as work on a token"):
        compose.load([*many, "moe.top_k=4"])
    with pytest.raises(ConfigError, match="as many experts as work on a token"):
        compose.load([*many, "moe.per_layer=[{layers:[0],top_k:4}]"])
    compose.load([*many, "moe.per_layer=[{layers:[0],top_k:4,n_experts:4}]"])


def test_a_uniform_budget_needs_neither_torch_nor_a_capture(project: Path):
    dense = Path("stages/dense")
    dense.mkdir(parents=True)
    durable.write_json(dense / "dense.json", record_of(512, 512))
    artifacts.write_manifest(dense, {"module": "pipeline.stages.dense", "settings": {}})
    code = (
        "import sys\n"
        "from pipeline import compose\n"
        "from pipeline.stages import budget\n"
        "budget.run(compose.load(['model.layers=[0,1]']))\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"
    plan = artifacts.read_json(Path("stages/budget/layer_1.json"))
    assert plan["shape"]["d_ff_expert"] == 256 and "budget" not in plan
    assert {p.name for p in Path("stages/budget").iterdir()} == {
        "layer_0.json",
        "layer_1.json",
        "manifest.json",
    }
