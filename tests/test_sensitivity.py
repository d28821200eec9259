"""What one sparse layer costs the whole model, and the budget stage that shares out by it."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from test_budget import QUARTER
from test_capture import CONFIG
from test_end_to_end import Checkout, stages_run
from test_report import content

from pipeline import artifacts, budget, compose, dense, report, sensitivity
from pipeline.assembly import replace_ffns, shared_copy
from pipeline.capture import capture_activations
from pipeline.config import BudgetVary, Init, MoEConfig, RouterInit
from pipeline.errors import ArtifactError, ConfigError
from pipeline.ffn import DenseFFN
from pipeline.heal import divergence
from pipeline.moe import SparseMoE
from pipeline.shape import MoEShape
from pipeline.stages import BUDGET
from pipeline.stages import budget as stage
from pipeline.stages import capture as capture_stage
from pipeline.stages import dense as dense_stage
from pipeline.stages import tokens as tokens_stage
from pipeline.start import start_layer
from pipeline.store import LayerReader

LAYERS, HEAVY = 3, 1
MOE = dataclasses.replace(QUARTER, init=Init.slice, n_experts=8, top_k=2)
"""Eight slices or fewer, two of them run; quick to start, and never exact."""


@pytest.fixture(scope="module")
def model() -> tf.PreTrainedModel:
    """A random Llama in which one layer adds far more than the others."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None}
    config = tf.LlamaConfig(**sizes, **heads, num_hidden_layers=LAYERS)
    made = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
        for k in set(range(LAYERS)) - {HEAVY}:
            dense.find_ffns(made)[k].weights().down_proj.mul_(0.1)
    return made


def tokens(blocks: int, seed: int) -> torch.Tensor:
    return torch.randint(100, (blocks, 16), generator=torch.Generator().manual_seed(seed))


VALIDATION = tokens(16, 1)


@pytest.fixture(scope="module")
def captured(model: tf.PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captured")
    blocks = {"train": tokens(64, 2), "validation": VALIDATION}
    capture_activations(model, blocks, folder, cfg=CONFIG)
    return folder


def options(model: tf.PreTrainedModel, moe: MoEConfig = MOE) -> budget.Options:
    return budget.candidates(dense.describe(model), moe, range(LAYERS))


def plans_of(found: budget.Options) -> dict[int, dict[str, dict[str, Any]]]:
    return {k: {name: c.plan for name, c in of.items()} for k, of in found.items()}


def measured(
    model: tf.PreTrainedModel, captured: Path, known: Path, moe: MoEConfig = MOE, **changes: Any
) -> dict[int, dict[str, float]]:
    given = {"moe_cfg": moe, "seed": 0} | changes
    plans = plans_of(options(model, moe))
    return sensitivity.measure(model, plans, captured, VALIDATION, known, **given)


@torch.no_grad()
def joint_kl(model: tf.PreTrainedModel, captured: Path, plans: Mapping[int, Any]) -> float:
    sparse = shared_copy(model)
    layers = {
        k: start_layer(
            DenseFFN.load(captured / f"ffn_{k}.safetensors"),
            plan,
            MOE,
            LayerReader(captured / f"layer_{k}.zarr"),
            seed=0,
        )
        for k, plan in plans.items()
    }
    replace_ffns(sparse, layers)
    pair = [side(input_ids=VALIDATION).logits[:, :-1] for side in (model, sparse)]
    return float(divergence(*pair).mean())


def test_a_budget_by_kl_loses_less_than_a_uniform_one(model, captured: Path, tmp_path: Path):
    found = options(model)
    kls = measured(model, captured, tmp_path / "kl.json")
    record = dense.describe(model)
    plans = budget.by_kl(record, MOE, range(LAYERS), found, kls)
    told = {k: plan["budget"] for k, plan in plans.items()}
    assert told[HEAVY]["chosen"] == "0.5"
    loss, even = (
        sum(of["kl"][of[which]] for of in told.values()) for which in ("chosen", "configured")
    )
    cost, most = (
        sum(of["cost"][of[which]] for of in told.values()) for which in ("chosen", "configured")
    )
    assert loss < 0.8 * even and cost <= most
    uniform = budget.uniform(record, MOE, range(LAYERS))
    assert joint_kl(model, captured, plans) < 0.8 * joint_kl(model, captured, uniform)


def test_measure_repeats_and_leaves_the_model_as_it_was(model, captured: Path, tmp_path: Path):
    before = model(input_ids=VALIDATION).logits
    first = measured(model, captured, tmp_path / "first.json")
    assert torch.equal(model(input_ids=VALIDATION).logits, before)
    assert measured(model, captured, tmp_path / "second.json") == first
    assert all(0 < kl < math.inf for of in first.values() for kl in of.values())


def test_a_layer_that_gives_the_dense_output_costs_nothing(model, captured: Path):
    exact = dataclasses.replace(MOE, d_ff_expert=None, init=Init.copy, init_noise=0.0)
    slots = dense.find_ffns(model)
    plan = budget.uniform(dense.describe(model), exact, [HEAVY])[HEAVY]
    reader = LayerReader(captured / f"layer_{HEAVY}.zarr")
    moe = start_layer(slots[HEAVY].weights(), plan, exact, reader, seed=0)
    assert abs(sensitivity.layer_kl(model, slots[HEAVY], moe, VALIDATION)) < 1e-5


@torch.no_grad()
def test_the_kl_of_a_layer_is_the_mean_over_predicted_tokens(model, monkeypatch):
    slot = dense.find_ffns(model)[HEAVY]
    moe = SparseMoE(budget.MoEShape(**plans_of(options(model))[HEAVY]["0.25"]["shape"]))
    for parameter in moe.parameters():
        parameter.normal_(std=0.1)
    sparse = shared_copy(model)
    replace_ffns(sparse, {HEAVY: moe})
    pair = [side(input_ids=VALIDATION).logits[:, :-1] for side in (model, sparse)]
    wanted = float(divergence(*pair).mean())
    for batch_tokens in (1, 48, 4096):  # one sequence, a ragged last batch, all at once
        monkeypatch.setattr(sensitivity, "BATCH_TOKENS", batch_tokens)
        found = sensitivity.layer_kl(model, slot, moe, VALIDATION)
        assert found == pytest.approx(wanted, rel=1e-4)


class Killed(BaseException):
    pass


def test_measure_goes_on_from_what_a_killed_one_left(model, captured: Path, tmp_path: Path):
    whole = measured(model, captured, tmp_path / "whole.json")
    known = tmp_path / "killed.json"

    def kill(done: int, total: int, note: str = "") -> None:
        assert total == 9
        if done == 4:
            raise Killed

    with pytest.raises(Killed):
        measured(model, captured, known, progress=kill)
    left = artifacts.read_sealed(known)
    assert [len(of) for of in left.values()] == [3, 1]
    left["0"]["0.25"] = 123.0  # shows that it is not measured again
    artifacts.write_sealed(known, left)
    assert measured(model, captured, known) == {**whole, 0: whole[0] | {"0.25": 123.0}}


def test_what_a_start_reads_of_the_configuration_changes_the_kl(
    model, captured: Path, tmp_path: Path
):
    whole = measured(model, captured, tmp_path / "whole.json")
    zero = dataclasses.replace(MOE, router_init=RouterInit.zero)
    assert measured(model, captured, tmp_path / "zero.json", zero) != whole
    assert measured(model, captured, tmp_path / "seed.json", seed=1) != whole


def test_starts_are_made_from_the_first_rows(model, captured: Path, tmp_path: Path, monkeypatch):
    whole = measured(model, captured, tmp_path / "whole.json")
    monkeypatch.setattr(sensitivity, "ROWS", 64)
    monkeypatch.setattr(sensitivity, "ROWS_PER_NEURON", 1)
    few = measured(model, captured, tmp_path / "few.json")
    assert few.keys() == whole.keys() and few != whole


def test_rows_of_a_start_are_enough_for_every_neuron_of_all_experts():
    shape = MoEShape(16, 4096, 1024, 16, 2, "silu", True, False, "softmax_topk")
    assert sensitivity.start_rows(shape) == 8 * 16 * 1024


def test_first_rows_are_those_of_the_store_and_no_more(captured: Path):
    path = captured / "layer_0.zarr"
    whole, first = LayerReader(path), sensitivity.FirstRows(path, 37)
    assert first.rows == {"train": 37, "validation": whole.rows["validation"]}
    for ours, all_ in zip(first.read("train"), whole.read("train", 0, 37), strict=True):
        assert torch.equal(ours, all_)
    (batch,) = first.batches("train", 37, seed=0, epoch=0)
    assert torch.equal(
        batch[0].sort(dim=0).values, whole.read("train", 0, 37)[0].sort(dim=0).values
    )
    assert torch.equal(first.read("validation")[1], whole.read("validation")[1])
    assert sensitivity.FirstRows(path, 10**9).rows == whole.rows


def test_a_divergence_that_is_not_finite_is_refused(model, captured: Path, tmp_path: Path):
    broken = tmp_path / "captured"
    broken.mkdir()
    for k in range(LAYERS):
        (broken / f"layer_{k}.zarr").symlink_to(captured / f"layer_{k}.zarr")
        ffn = DenseFFN.load(captured / f"ffn_{k}.safetensors")
        huge = dataclasses.replace(ffn, up_proj=ffn.up_proj * 1e30)
        huge.save(broken / f"ffn_{k}.safetensors")
    random = dataclasses.replace(MOE, router_init=RouterInit.random)
    with pytest.raises(ArtifactError, match="diverges with layer 0") as refusal:
        measured(model, broken, tmp_path / "kl.json", random)
    assert "moe.budget.candidates" in refusal.value.remedy


def test_an_encoder_is_refused(captured: Path, tmp_path: Path):
    encoder = tf.BertModel(tf.BertConfig(hidden_size=32, num_attention_heads=2))
    with pytest.raises(ConfigError, match="next token"):
        sensitivity.measure(
            encoder, {}, captured, VALIDATION, tmp_path / "kl.json", moe_cfg=MOE, seed=0
        )


# The stage

SMALL = ["experiment=pico", "moe.budget.by=kl", "moe.budget.candidates=[0.125,0.5]"]
SLICES = ["moe.init=slice", "moe.n_experts=8"]


def decided(*settings: str) -> dict[str, Any]:
    """Each layer's file, after the stage ran with these settings."""
    stage.run(compose.load([*SMALL, *SLICES, *settings]))
    files = sorted(BUDGET.glob("layer_*.json"))
    return {path.stem: artifacts.read_json(path) for path in files}


@pytest.mark.slow
def test_every_setting_of_the_budget_changes_what_the_stage_writes(project: Path):
    cfg = compose.load(SMALL)
    for earlier in (dense_stage, tokens_stage, capture_stage):
        earlier.run(cfg)
    found = decided()
    assert {p.name for p in BUDGET.iterdir()} == {"layer_0.json", "layer_1.json", "manifest.json"}
    told = found["layer_0"]["budget"]
    assert told["vary"] == "d_ff_expert" and list(told["kl"]) == ["0.125", "0.25", "0.5"]
    most = sum(2 * 16 for _ in found)
    assert sum(2 * plan["shape"]["d_ff_expert"] for plan in found.values()) <= most
    fewer = decided("moe.budget.tokens=512")["layer_0"]["budget"]["kl"]
    assert fewer.keys() == told["kl"].keys() and fewer != told["kl"]
    other = decided("moe.budget.candidates=[8,1.0]")["layer_0"]["budget"]["kl"]
    assert list(other) == ["0.25", "1.0", "8"] and other["0.25"] == told["kl"]["0.25"]
    experts = decided("moe.budget.vary=n_experts", "moe.budget.candidates=[4,16]")
    assert experts["layer_0"]["budget"]["kl"].keys() == {"4", "8", "16"}
    with pytest.raises(ArtifactError, match="seed: 0 there, 1 here"):  # of the dense model
        decided("seed=1")
    assert "budget" not in decided("moe.budget.by=uniform")["layer_0"]
    assert decided() == found


@pytest.mark.slow
def test_layers_with_budgets_by_kl_go_through_the_whole_dag(tmp_path: Path):
    checkout = Checkout(tmp_path / "checkout")
    quick = ["train.epochs=1", "train.static_control=false", "evaluate.max_batches=3"]
    settings = " ".join(f"-S '{setting}'" for setting in [*SMALL[1:], *SLICES, *quick])
    output = checkout.run(f"dvc exp run {settings}")
    assert {"budget", "train@1", "evaluate"} <= stages_run(output)
    plans = {k: checkout.json(f"stages/budget/layer_{k}.json") for k in ("0", "1")}
    for k, plan in plans.items():
        trained = checkout.json(f"stages/train/layer_{k}/config.json")
        assert trained["shape"]["d_ff_expert"] == plan["shape"]["d_ff_expert"]
        assert trained["budget"] == plan["budget"]
    assert checkout.json("reports/metrics.json")["active_ffn_fraction"] <= 0.5
    assert "d_ff_expert was chosen" in (checkout.root / "stages/evaluate/report.html").read_text()
    refused = checkout.run(
        "python -m pipeline.stages.budget moe.budget.by=kl moe.budget.candidates=[0.3]", expect=2
    )
    assert "moe.budget.candidates" in refused and "Traceback" not in refused


# The report


def test_the_report_shows_what_was_chosen_and_what_it_saves(tmp_path: Path):
    given = content(n_layers=2)
    for folder in ("plain", "chosen"):
        (tmp_path / folder).mkdir()
    report.write(tmp_path / "plain", given)
    for k, (chosen, kl) in enumerate((("0.5", 0.0625), ("0.125", 0.125))):
        given["layers"][k]["budget"] = {
            "by": "kl",
            "vary": BudgetVary.d_ff_expert.name,
            "configured": "0.25",
            "chosen": chosen,
            "kl": {chosen: kl, "0.25": 0.375},
            "cost": {},
        }
    report.write(tmp_path / "chosen", given)
    plain, page = ((tmp_path / of / "report.html").read_text() for of in ("plain", "chosen"))
    assert "was chosen for each layer" not in plain
    assert "at no more than the cost of 0.25" in page
    assert "Summed it is 0.1875, against 0.7500" in page
    assert '<tr><th scope="row">0</th><td>0.5</td><td>0.06250</td><td>0.3750</td></tr>' in page
