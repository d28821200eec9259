"""All layers at once in the dense model's place: what learns, what stays, what is kept."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from test_checkpoint import tiny, tokenizer

from pipeline import artifacts, assembly, checkpoint, compose, dense, durable, evaluation
from pipeline import heal as heal_module
from pipeline.activations import record_ffn
from pipeline.config import Dtype, HealConfig
from pipeline.discovery import find_ffns
from pipeline.errors import ArtifactError, InputError
from pipeline.ffn import DenseFFN
from pipeline.heal import divergence, heal_layers, rate
from pipeline.layers import load_layer, read_history, save_layer
from pipeline.moe import SparseMoE
from pipeline.resume import CHECKPOINT
from pipeline.router import expert_load
from pipeline.shape import MoEShape
from pipeline.stages import (
    CAPTURE,
    CONVERT,
    DENSE,
    HEAL,
    TOKENS,
    TRAIN,
    convert,
    evaluate,
    final_layers,
    heal,
)

PROJECT = Path(__file__).parent.parent
SEQUENCE, BATCH = 16, 4
HEALING = HealConfig(
    tokens=24 * BATCH * SEQUENCE,
    batch_size=BATCH,
    learning_rate=1e-2,
    router_learning_rate=None,
    train_norms=True,
    weight_decay=0.01,
    warmup_steps=2,
    grad_clip=1.0,
    load_balance_coef=0.01,
    router_z_coef=0.001,
    evaluate_every=8,
    checkpoint_every=6,
    dtype=Dtype.float32,
)
EXPERT_CHOICE = {"routing": "expert_choice", "capacity_factor": 2.0}


class Killed(BaseException):
    pass


def blocks_of(
    train: int = 24, validation: int = 8, vocab_size: int = 64
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = {"train": train, "validation": validation}
    return {
        name: torch.randint(vocab_size, (n, SEQUENCE), generator=generator)
        for name, n in sizes.items()
    }


BLOCKS = blocks_of()


def sliced(ffn: DenseFFN, n_experts: int = 4, seed: int = 0, **changes: Any) -> SparseMoE:
    """Experts that are slices of the dense FFN, under a random router."""
    D, F = ffn.d_model, ffn.d_ff
    H = F // n_experts
    plain = MoEShape(
        d_model=D,
        d_ff=F,
        d_ff_expert=H,
        n_experts=n_experts,
        top_k=max(1, n_experts // 2),
        activation=ffn.activation,
        gated=ffn.gate_proj is not None,
        bias=ffn.up_bias is not None,
        router_function="softmax_topk",
    )
    moe = SparseMoE(dataclasses.replace(plain, **changes)).eval()
    inner = [side for side in (ffn.gate_proj, ffn.up_proj) if side is not None]
    biases = [side for side in (ffn.gate_bias, ffn.up_bias) if side is not None]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        halves = [side.view(n_experts, H, D) for side in inner]
        moe.get_parameter(f"{moe.inner}_proj").copy_(torch.cat(halves, dim=1))
        moe.down_proj.copy_(n_experts * ffn.down_proj.view(D, n_experts, H).permute(1, 0, 2))
        if biases and ffn.down_bias is not None:
            bias = torch.cat([side.view(n_experts, H) for side in biases], dim=1)
            moe.get_parameter(f"{moe.inner}_bias").copy_(bias)
            moe.get_parameter("down_bias").copy_(ffn.down_bias.expand(n_experts, D))
        moe.router.weight.normal_(std=0.5, generator=generator)
    return moe


def write_layers(
    model: tf.PreTrainedModel, folder: Path, layers: tuple[int, ...] = (0, 1), **changes: Any
) -> dict[int, Path]:
    """As `train` leaves them."""
    slots, trained = dense.find_ffns(model), {}
    for k in layers:
        trained[k] = folder / f"layer_{k}"
        trained[k].mkdir(parents=True)
        record = {"layer": k, "host": "mixtral", "init": "slice", "training": {"steps": 9}}
        save_layer(sliced(slots[k].weights(), seed=k, **changes), trained[k], record)
        (trained[k] / "history.csv").write_text("step,validation_loss\n0,1.5\n")
    return trained


@pytest.fixture(scope="module")
def model() -> tf.PreTrainedModel:
    return tiny("Llama")


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory) -> dict[int, Path]:
    return write_layers(model, tmp_path_factory.mktemp("train"))


def healed(
    model: tf.PreTrainedModel,
    trained: Mapping[int, Path],
    folder: Path,
    *,
    blocks: Mapping[str, torch.Tensor] = BLOCKS,
    seed: int = 0,
    rate: float = 1e-3,
    dtype: torch.dtype = torch.float32,
    killed_at: int | None = None,
    **changes: Any,
) -> Path:
    folder.mkdir(exist_ok=True)

    def progress(done: int, total: int, note: str) -> None:
        if done == killed_at:
            raise Killed

    heal_layers(
        model,
        trained,
        blocks,
        folder,
        cfg=dataclasses.replace(HEALING, **changes),
        balance_bias_rate=rate,
        seed=seed,
        dtype=dtype,
        progress=progress,
    )
    return folder


@pytest.fixture(scope="module")
def plain(model, trained, tmp_path_factory) -> Path:
    return healed(model, trained, tmp_path_factory.mktemp("heal"))


def healing_of(folder: Path, layer: int = 0) -> dict[str, Any]:
    return load_layer(folder / f"layer_{layer}")[1]["healing"]


def tensors_of(folder: Path, layer: int = 0) -> dict[str, torch.Tensor]:
    return load_file(folder / f"layer_{layer}" / "layer.safetensors")


def same(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(t, two[name]) for name, t in one.items())


def files(folder: Path) -> dict[str, bytes]:
    paths = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def kl_of(folder: Path) -> float:
    """Of the layers and norms in `folder`, by the code that judges a finished conversion."""
    pair = [tiny("Llama") for _ in range(2)]
    checkpoint.convert_to_sparse(pair[1], folder)
    found = evaluation.compare_on_text(*pair, BLOCKS["validation"], 1, batch_size=8)
    return float(found.kl.mean())


# What it reaches


def test_healing_lowers_the_divergence_on_validation(trained, plain):
    kl = healing_of(plain)["validation"]["kl"]
    assert kl["after"] < 0.9 * kl["before"]
    assert kl_of(plain) == pytest.approx(kl["after"], rel=1e-4)
    assert kl_of(trained[0].parent) == pytest.approx(kl["before"], rel=1e-4)


def test_healing_is_recorded_with_each_layer(plain):
    history = read_history(plain)
    assert [row["step"] for row in history] == [0, 8, 16, 24]
    best = min(history, key=lambda row: row["validation_kl"])
    for k in (0, 1):
        record = load_layer(plain / f"layer_{k}")[1]
        assert record["layer"] == k and record["training"] == {"steps": 9}
        told = record["healing"]
        assert (told["tokens"], told["steps"], told["norms"]) == (HEALING.tokens, 24, 5)
        assert told["best_step"] == best["step"] > 0
        assert told["validation"]["kl"]["after"] == best["validation_kl"]
        perplexity = told["validation"]["perplexity"]
        assert perplexity["after"] == best["validation_perplexity"]
        assert read_history(plain / f"layer_{k}") == [{"step": 0.0, "validation_loss": 1.5}]


def test_recorded_perplexities_are_those_that_transformers_gives(model, plain):
    blocks = BLOCKS["validation"]
    with torch.inference_mode():
        loss = float(model(input_ids=blocks, labels=blocks).loss)
    perplexity = healing_of(plain)["validation"]["perplexity"]
    assert perplexity["dense"] == pytest.approx(math.exp(loss), rel=1e-5)


def test_divergence_is_that_of_the_two_distributions():
    p, q = torch.randn(2, 3, 5, 7).unbind()
    wanted = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    assert divergence(p, q) == pytest.approx(wanted, abs=1e-6)
    assert divergence(p, p).abs().max() < 1e-6


def test_rate_rises_and_falls_to_nearly_zero():
    rates = [rate(step, 100, 10) for step in range(100)]
    assert rates[0] < 0.11 and max(rates) == rates[9] > 0.97 and rates[-1] < 1e-3
    assert rate(0, 100, 0) == 1.0


def test_a_worse_state_is_never_kept(model, trained, tmp_path):
    wild = healed(model, trained, tmp_path / "wild", learning_rate=3.0, grad_clip=0.0)
    told = healing_of(wild)
    assert told["best_step"] == 0
    assert told["validation"]["kl"]["after"] == told["validation"]["kl"]["before"]
    for k, path in trained.items():
        assert same(tensors_of(wild, k), load_file(path / "layer.safetensors"))
    assert read_history(wild)[-1]["validation_kl"] > told["validation"]["kl"]["before"]


# What learns, and what stays


def test_the_dense_model_stays_what_it_was(trained, tmp_path):
    model = tiny("Llama")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    kinds = [type(m) for m in model.modules()]
    healed(model, trained, tmp_path)
    assert same(model.state_dict(), before)
    assert [type(m) for m in model.modules()] == kinds


def test_norms_learn_only_where_asked(model, trained, plain, tmp_path):
    own = {n: p for n, p in model.named_parameters() if "norm" in n}
    norms = load_file(plain / assembly.NORMS)
    assert norms.keys() == own.keys() and len(norms) == 5
    assert not any(torch.equal(t, own[name]) for name, t in norms.items())
    still = healed(model, trained, tmp_path, train_norms=False)
    assert not (still / assembly.NORMS).exists() and healing_of(still)["norms"] == 0


def test_a_router_learning_rate_of_zero_holds_the_routers_still(model, trained, tmp_path):
    held = healed(model, trained, tmp_path, router_learning_rate=0.0)
    before = load_file(trained[1] / "layer.safetensors")
    after = tensors_of(held, 1)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"gate_up_proj", "down_proj"}


def test_the_router_of_one_expert_per_token_stays(model, tmp_path):
    """Its weights are 1 whatever its logits: only the balance terms would move it."""
    trained = write_layers(model, tmp_path / "train", top_k=1)
    out = healed(model, trained, tmp_path / "heal", load_balance_coef=1.0, router_z_coef=1.0)
    for k, path in trained.items():
        before, after = load_file(path / "layer.safetensors"), tensors_of(out, k)
        assert torch.equal(after["router.weight"], before["router.weight"])
        assert not torch.equal(after["down_proj"], before["down_proj"])
    terms = {row[name] for row in read_history(out)[1:] for name in ("load_balance", "router_z")}
    assert terms == {0.0}


def test_slices_of_a_replica_go_on_sharing_their_router_row(model, tmp_path):
    """Of halves of the FFN, four times each."""
    generator = torch.Generator().manual_seed(0)
    trained = write_layers(model, tmp_path / "train", n_experts=2)
    for path in trained.values():
        one, record = load_layer(path)
        moe = SparseMoE(dataclasses.replace(one.shape, n_experts=8, top_k=2))
        experts = {n: t.repeat(4, 1, 1) for n, t in one.state_dict().items() if t.dim() == 3}
        rows = torch.randn(4, moe.shape.d_model, generator=generator).repeat_interleave(2, dim=0)
        worse = {
            n: t + t.std() * torch.randn(t.shape, generator=generator) for n, t in experts.items()
        }
        moe.load_state_dict({**worse, "router.weight": rows})
        save_layer(moe, path, record)
    out = healed(model, trained, tmp_path / "heal")
    for k, path in trained.items():
        before, after = load_file(path / "layer.safetensors"), tensors_of(out, k)
        rows_RSD = after["router.weight"].unflatten(0, (4, 2))
        assert torch.equal(rows_RSD[:, 0], rows_RSD[:, 1])
        assert not torch.equal(after["router.weight"], before["router.weight"])


def begun(model: tf.PreTrainedModel) -> heal_module.Healing:
    cfg = dataclasses.replace(HEALING, weight_decay=1.0, grad_clip=1e-3)
    moes = {slot.index: sliced(slot.weights()) for slot in dense.find_ffns(model)}
    return heal_module._begin(model, moes, cfg, 0.0, torch.float32, 4)


def test_norms_do_not_decay(model):
    decays = [group["weight_decay"] for group in begun(model).optimizer.param_groups]
    assert decays == [1.0, 1.0, 0.0]


def test_the_gradients_of_all_that_learns_are_clipped_together(model, monkeypatch):
    seen, clip = [], torch.nn.utils.clip_grad_norm_

    def watched(parameters, largest: float):
        seen.extend(parameters)
        return clip(seen, largest)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    healing = begun(model)
    heal_module._step(healing, torch.randint(0, 16, (2, 8)))
    learning = [p for group in healing.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in seen} == {id(p) for p in learning}
    assert 0 < sum(float(p.grad.square().sum()) for p in learning) ** 0.5 <= 1.001e-3


def test_dropout_of_the_dense_model_is_off(tmp_path):
    """One expert that is the whole FFN: any difference of the two models would be noise."""
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    torch.manual_seed(0)
    model = tf.GPT2LMHeadModel(tf.GPT2Config(**sizes)).train()
    assert model.config.resid_pdrop > 0
    trained = write_layers(model, tmp_path / "train", n_experts=1)
    still = {"learning_rate": 0.0, "evaluate_every": 1, "tokens": 2 * BATCH * SEQUENCE}
    history = read_history(healed(model, trained, tmp_path / "heal", **still))
    assert len(history) == 3
    assert all(abs(row["validation_kl"]) < 1e-6 for row in history)
    assert all(abs(row["kl"]) < 1e-6 for row in history[1:])


def test_layers_that_are_left_dense_take_part_unchanged(model, tmp_path):
    trained = write_layers(model, tmp_path / "train", layers=(1,))
    healed(model, trained, tmp_path / "heal")
    assert not (tmp_path / "heal" / "layer_0").exists()
    sparse = tiny("Llama")
    checkpoint.convert_to_sparse(sparse, tmp_path / "heal")
    left, was = (m.get_submodule("model.layers.0.mlp") for m in (sparse, model))
    assert same(left.state_dict(), was.state_dict())
    kl = healing_of(tmp_path / "heal", 1)["validation"]["kl"]
    assert kl_of(tmp_path / "heal") == pytest.approx(kl["after"], rel=1e-4) and kl["after"] > 0


def test_padding_of_narrower_experts_stays_zero(model, tmp_path):
    widths = (16, 8, 16, 8)
    trained = write_layers(model, tmp_path / "train", expert_widths=widths)
    for path in trained.values():
        moe, record = load_layer(path)
        for e, width in enumerate(widths):
            moe.down_proj.data[e, :, width:] = 0
            for half in moe.get_parameter("gate_up_proj").data[e].chunk(2):
                half[width:] = 0
        save_layer(moe, path, record)
    healed(model, trained, tmp_path / "heal")
    for k in trained:
        moe, _ = load_layer(tmp_path / "heal" / f"layer_{k}")
        assert moe.shape.widths == widths
        for e, width in enumerate(widths):
            halves = moe.get_parameter("gate_up_proj")[e].chunk(2)
            for part in (moe.down_proj[e].T, *halves):
                assert not part[width:].any() and part[:width].any(dim=1).all()


def test_balance_bias_goes_on_and_evens_the_load(model, tmp_path):
    """At a learning rate of 0 it alone moves: 96 steps of it, as the checkpoint has it then."""
    trained = write_layers(model, tmp_path / "train", balance_bias=True)
    moe, record = load_layer(trained[0])
    start = torch.tensor([2.0, 0.0, 0.0, 0.0])
    moe.router.balance_bias.copy_(start)
    save_layer(moe, trained[0], record)
    uneven = []
    for speed in (0.0, 0.02):
        options = {"learning_rate": 0.0, "evaluate_every": 200, "checkpoint_every": 96}
        with pytest.raises(Killed):
            many = {"tokens": 200 * BATCH * SEQUENCE, "killed_at": 96}
            healed(model, trained, tmp_path / str(speed), rate=speed, **options, **many)
        bias = load_file(tmp_path / str(speed) / CHECKPOINT)["model/0/router.balance_bias"]
        assert torch.equal(bias, start) is not bool(speed)
        moe.router.balance_bias.copy_(bias)
        load_E = expert_load(routed_ids(model, moe), 4)
        uneven.append(float(load_E.max() / load_E.mean()))
    assert uneven[1] - 1 < 0.5 * (uneven[0] - 1)


def routed_ids(model: tf.PreTrainedModel, moe: SparseMoE) -> torch.Tensor:
    slot = dense.find_ffns(model)[0]
    with torch.no_grad(), record_ffn({0: slot.module}) as recorded:
        model(input_ids=BLOCKS["train"])
    return moe.route(recorded[0][0]).expert_ids  # type: ignore[union-attr]


def test_experts_that_choose_keep_their_cost_and_get_thresholds(model, tmp_path):
    trained = write_layers(model, tmp_path / "train", **EXPERT_CHOICE)
    for path in trained.values():
        moe, record = load_layer(path)
        moe.router.threshold.fill_(0.25)
        save_layer(moe, path, record)
    out = healed(model, trained, tmp_path / "heal")
    told = healing_of(out)
    assert told["best_step"] > 0
    assert told["validation"]["kl"]["after"] < told["validation"]["kl"]["before"]
    assert kl_of(out) == pytest.approx(told["validation"]["kl"]["after"], rel=1e-4)
    sparse = tiny("Llama")
    checkpoint.convert_to_sparse(sparse, out)
    taken = []
    for layer in sparse.model.layers:  # type: ignore[union-attr]
        layer.mlp.register_forward_hook(
            lambda moe, args, out: taken.append(moe.route(args[0].flatten(0, 1)).taken_TE())
        )
    with torch.no_grad():
        sparse(input_ids=BLOCKS["validation"])
    for taken_TE in taken:
        assert taken_TE.sum(dim=1).float().mean() == pytest.approx(2.0, rel=0.1)


# Settings


def outcome(folder: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    return read_history(folder), tensors_of(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": 16 * BATCH * SEQUENCE},
        {"batch_size": 6},
        {"learning_rate": 1e-3},
        {"router_learning_rate": 1e-3},
        {"train_norms": False},
        {"weight_decay": 1.0},
        {"warmup_steps": 6},
        {"grad_clip": 1e-3},
        {"load_balance_coef": 1.0},
        {"router_z_coef": 1.0},
        {"evaluate_every": 5},
        {"seed": 1},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_setting_changes_the_outcome(model, trained, plain, tmp_path, changes):
    history, tensors = outcome(plain)
    other_history, other_tensors = outcome(healed(model, trained, tmp_path, **changes))
    assert other_history != history
    assert "evaluate_every" in changes or not same(other_tensors, tensors)


def test_blocks_are_read_again_where_the_budget_is_larger(model, trained, tmp_path):
    """24 blocks are 6 batches; the second epoch has an order of its own."""
    short = {"evaluate_every": 6, "learning_rate": 0.0}
    history = read_history(healed(model, trained, tmp_path, **short))
    assert history[-1]["step"] == 24
    assert len({row["kl"] for row in history[1:]}) > 1


# Interruptions


@pytest.mark.parametrize("killed_at", [7, 17, 24])
@pytest.mark.parametrize("shape", [{}, EXPERT_CHOICE, {"balance_bias": True}], ids=str)
def test_a_killed_run_resumes_bit_for_bit(model, tmp_path, killed_at, shape):
    trained = write_layers(model, tmp_path / "train", **shape)
    whole = healed(model, trained, tmp_path / "whole")
    with pytest.raises(Killed):
        healed(model, trained, tmp_path / "killed", killed_at=killed_at)
    assert (tmp_path / "killed" / CHECKPOINT).exists()
    healed(model, trained, tmp_path / "killed")
    assert files(tmp_path / "killed") == files(whole)
    assert not (whole / CHECKPOINT).exists()


def test_checkpoints_come_as_often_as_asked(model, trained, tmp_path):
    for name, every, there in (("seldom", 10, False), ("often", 3, True)):
        with pytest.raises(Killed):
            healed(model, trained, tmp_path / name, killed_at=4, checkpoint_every=every)
        assert (tmp_path / name / CHECKPOINT).exists() is there


def test_a_finished_run_is_not_run_again(model, trained, plain, tmp_path):
    shutil.copytree(plain, tmp_path / "done")
    (tmp_path / "done" / CHECKPOINT).write_bytes(b"left by a kill at the very end")
    healed(model, trained, tmp_path / "done", killed_at=1)
    assert files(tmp_path / "done") == files(plain)


# Refusals


def test_less_text_than_one_batch_is_refused(model, trained, tmp_path):
    with pytest.raises(InputError, match=r"3 blocks, heal\.batch_size=4"):
        healed(model, trained, tmp_path, blocks=blocks_of(train=3))


def test_a_token_without_embedding_is_refused(model, trained, tmp_path):
    with pytest.raises(InputError, match="embedding rows"):
        healed(model, trained, tmp_path, blocks=blocks_of(vocab_size=70))


def test_layers_of_another_model_are_refused(trained, tmp_path):
    with pytest.raises(InputError, match="trained for another dense model"):
        healed(tiny("Llama", intermediate_size=96), trained, tmp_path)


def test_divergence_of_the_training_is_told(model, trained, tmp_path):
    with pytest.raises(
        ArtifactError, match=r"Healing diverged at step (6|8)\.(.|\n)*learning_rate"
    ):
        healed(model, trained, tmp_path, learning_rate=1e30, grad_clip=0.0)
    assert not (tmp_path / CHECKPOINT).exists()


def test_norms_of_another_model_are_refused(plain):
    with pytest.raises(InputError, match="healed norms belong to another"):
        assembly.set_norms(tiny("Llama", num_hidden_layers=1), assembly.read_norms(plain))


def test_damaged_norms_are_refused(tmp_path):
    (tmp_path / assembly.NORMS).write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match=r"norms\.safetensors"):
        assembly.read_norms(tmp_path)
    assert assembly.read_norms(tmp_path / "elsewhere") == {}


# The stage


SETTINGS = [
    "experiment=pico",
    f"heal.tokens={8 * BATCH * SEQUENCE}",
    f"heal.batch_size={BATCH}",
    "heal.learning_rate=3e-3",
    "heal.dtype=float32",
    "runtime.device=cpu",
]


def seal(folder: Path, **settings: Any) -> None:
    artifacts.write_manifest(folder, {"module": "test", "settings": settings})


@pytest.fixture
def before_heal(project: Path, model) -> Path:
    """What the stages before `heal` leave, static controls included."""
    (DENSE / "model").mkdir(parents=True)
    model.save_pretrained(DENSE / "model")
    tokenizer().save_pretrained(DENSE / "model")
    described = {"digests": {}, "revision": None, **dense.describe(model)}
    durable.write_json(DENSE / "dense.json", described)
    seal(DENSE, **{"model.name": "pico"})
    TOKENS.mkdir()
    for name, blocks in BLOCKS.items():
        save_file({"tokens": blocks.int()}, TOKENS / f"{name}.safetensors")
    seal(TOKENS)
    trained = write_layers(model, TRAIN)
    for k, path in trained.items():
        static = write_layers(model, project / "static", layers=(k,), n_experts=1)
        shutil.copytree(static[k], path / "static")
        seal(path, **{"train.epochs": 2})  # as the pico experiment has it
    return project


def test_stage_without_tokens_writes_only_its_marker_and_needs_no_torch(before_heal):
    code = (
        "import sys\n"
        "from pipeline import compose\n"
        "from pipeline.stages import heal\n"
        "heal.run(compose.load(['experiment=pico']))\n"
        "assert 'torch' not in sys.modules\n"
    )
    path = {"PYTHONPATH": str(PROJECT)}
    subprocess.run([sys.executable, "-c", code], env=os.environ | path, check=True)
    assert sorted(p.name for p in HEAL.iterdir()) == ["healed.json", "manifest.json"]
    assert final_layers([0, 1]) == {k: TRAIN / f"layer_{k}" for k in (0, 1)}


def test_stage_heals_the_layers_and_their_static_controls(before_heal):
    cfg = compose.load(SETTINGS)
    heal.run(cfg)
    artifacts.verify(HEAL)
    assert final_layers([0, 1]) == {k: HEAL / f"layer_{k}" for k in (0, 1)}
    for k in (0, 1):
        manifest = artifacts.verify(HEAL / f"layer_{k}")
        assert manifest["fingerprint"] == artifacts.verify(HEAL)["fingerprint"]
        settings = manifest["settings"]
        assert settings["train.epochs"] == 2 and settings["heal.tokens"] == cfg.heal.tokens
        assert healing_of(HEAL, k)["steps"] == healing_of(HEAL / "static", k)["steps"] == 8
        assert load_layer(HEAL / "static" / f"layer_{k}")[0].shape.n_experts == 1
    assert (HEAL / "static" / assembly.NORMS).exists()
    assert not list(HEAL.rglob(CHECKPOINT))


def test_a_layer_without_a_static_control_is_left_dense_while_those_of_others_heal(before_heal):
    shutil.rmtree(TRAIN / "layer_0" / "static")
    seal(TRAIN / "layer_0", **{"train.epochs": 2})
    heal.run(compose.load(SETTINGS))
    assert healing_of(HEAL / "static", 1)["steps"] == 8
    assert sorted(p.name for p in (HEAL / "static").glob("layer_*")) == ["layer_1"]
    assert sorted(p.name for p in HEAL.glob("layer_*")) == ["layer_0", "layer_1"]


@pytest.mark.parametrize("tokens", [0, 64])
def test_evaluate_puts_the_dense_ffn_where_a_layer_has_no_static_control(
    before_heal, model, tokens
):
    shutil.rmtree(TRAIN / "layer_0" / "static")
    seal(TRAIN / "layer_0", **{"train.epochs": 2})
    heal.run(compose.load([*SETTINGS, f"heal.tokens={tokens}"]))
    CAPTURE.mkdir()
    slots = find_ffns(model)
    for k in (0, 1):
        slots[k].weights().save(CAPTURE / f"ffn_{k}.safetensors")
    found = evaluate._controls(final_layers([0, 1]), torch.device("cpu"))["controls"]
    x = torch.randn(5, slots[0].d_model)
    torch.testing.assert_close(found["static"][0](x), slots[0].weights()(x))
    place = HEAL / "static" / "layer_1" if tokens else TRAIN / "layer_1" / "static"
    assert torch.equal(found["static"][1](x), load_layer(place)[0](x))
    for k in (0, 1):
        shutil.rmtree(TRAIN / f"layer_{k}" / "static", ignore_errors=True)
    if not tokens:
        assert (
            "static"
            not in evaluate._controls(final_layers([0, 1]), torch.device("cpu"))["controls"]
        )


@pytest.mark.slow
@pytest.mark.parametrize("alone", [False, True], ids=["in the DAG", "alone"])
def test_convert_holds_the_healed_weights_and_norms_and_all_else_of_the_dense(
    before_heal, model, alone
):
    cfg = compose.load(SETTINGS)
    heal.run(cfg)
    if alone:
        paths = {"dense": str(DENSE / "model"), "layers": str(HEAL), "output": "sparse"}
        convert.run_alone(dataclasses.replace(cfg.convert, **paths), cfg.runtime)
    else:
        convert.run(cfg)
    found = load_file((Path("sparse") if alone else CONVERT) / "model.safetensors")
    norms = load_file(HEAL / assembly.NORMS)
    own = model.state_dict()
    for name, tensor in own.items():
        if ".mlp." not in name:
            assert torch.equal(found[name], norms.get(name, tensor)), name
    assert not any(torch.equal(norms[name], own[name]) for name in norms)
    for k in (0, 1):
        mine = tensors_of(HEAL, k)
        routers = [t for n, t in found.items() if f"layers.{k}." in n and t.shape == (4, 32)]
        assert len(routers) == 1 and torch.equal(routers[0], mine["router.weight"])


@pytest.mark.slow
def test_convert_runs_again_when_only_the_norms_were_healed_otherwise(before_heal):
    cfg = compose.load(SETTINGS)
    heal.run(cfg)
    convert.run(cfg)
    first = json.loads((CONVERT / artifacts.MANIFEST).read_text())["fingerprint"]
    norms = {name: 2 * t for name, t in load_file(HEAL / assembly.NORMS).items()}
    identity = json.loads((HEAL / artifacts.MANIFEST).read_text())
    shutil.copytree(HEAL, "copy")  # a published file is a hard link
    save_file(norms, Path("copy") / assembly.NORMS)
    artifacts.write_manifest(Path("copy"), identity)
    shutil.rmtree(HEAL)
    shutil.move("copy", HEAL)
    convert.run(cfg)
    assert json.loads((CONVERT / artifacts.MANIFEST).read_text())["fingerprint"] != first
    found = load_file(CONVERT / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in norms.items())
