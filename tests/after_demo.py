"""What the demo must reach; `make test-demo` runs this on the figures of the last `make demo`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def metrics() -> dict:
    assert (PROJECT / "stages/evaluate/metrics.json").is_file(), "run `make demo` first"
    return json.loads((PROJECT / "stages/evaluate/metrics.json").read_text())


def test_the_dense_model_has_learned_english(metrics: dict):
    """Trained for far less (97), its FFNs are nearly linear, and any conversion looks good.

    Three seeds gave 62, 65 and 77, and another kind of CPU is another seed.
    """
    assert metrics["dense"]["perplexity"]["heldout"] < 90


def test_half_of_the_neurons_run_at_no_more_than_twice_the_ffn_parameters(metrics: dict):
    shapes = [
        json.loads((PROJECT / f"stages/budget/layer_{k}.json").read_text())["shape"]
        for k in metrics["layers"]
    ]
    assert metrics["active_ffn_fraction"] == 0.5
    assert all(s["n_experts"] * s["d_ff_expert"] <= 2 * s["d_ff"] for s in shapes)


def test_the_default_recipe_stays_near_the_dense_model(metrics: dict):
    assert metrics["perplexity_ratio"]["heldout"] <= 1.10
    assert metrics["cosine_sim"]["mean"] > 0.93


def test_no_expert_is_dead(metrics: dict):
    assert [layer["routing"]["dead_experts"] for layer in metrics["layers"].values()] == [0] * 4


def test_the_router_is_worth_having(metrics: dict):
    """At equal active size, beside plain pruning refitted and trained alike, on both texts."""
    static = metrics["controls"]["static"]
    for text, ratio in metrics["perplexity_ratio"].items():
        assert ratio - 1 <= 0.7 * (static["perplexity_ratio"][text] - 1)
        assert metrics["kl"]["by_text"][text] <= 0.7 * static["kl"]["by_text"][text]
    assert metrics["gap_recovery"]["worst"] > 0


def test_the_load_is_nearer_to_even_than_to_its_bound(metrics: dict):
    for layer in metrics["layers"].values():
        experts = len(layer["routing"]["load"])
        assert layer["routing"]["load_max_over_mean"] <= (1 + experts) / 2


def test_a_plan_finds_every_stage_there(metrics: dict):
    line = [sys.executable, "-m", "pipeline", "plan", "--json"]
    done = subprocess.run(line, cwd=PROJECT, capture_output=True, text=True, check=True)
    stages = json.loads(done.stdout)["stages"]
    assert stages.keys() >= {"dense", "evaluate"}
    assert all(stage["there"] for stage in stages.values())
