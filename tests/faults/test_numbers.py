"""What is no number is told where it arises, by layer, step, batch or file; it is never averaged.

Rows 14, 15, 16, 33 and 34 of docs/reliability.md.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf
from injection import Stand, tree
from safetensors.torch import load_file, save_file
from test_start import dense_ffn, plan_of, write_store
from test_training import MOE, PLAIN

from pipeline import artifacts, durable
from pipeline.comparison import compare_on_text
from pipeline.config import Codec
from pipeline.embeddings import compare_embeddings
from pipeline.errors import ArtifactError
from pipeline.evaluation import layer_metrics
from pipeline.fit_state import LAST_GOOD
from pipeline.layers import load_layer
from pipeline.moe import SparseMoE
from pipeline.shape import MoEShape
from pipeline.start import start_layer
from pipeline.store import LayerReader
from pipeline.store_writer import LayerWriter
from pipeline.training import fit_layer

# The dense model


def from_folder(stand: Stand, name: str, change) -> list[str]:
    """The project's dense model as somebody's folder, with one changed tensor; the overrides."""
    folder = shutil.copytree(stand.root / "stages/dense/model", stand.root / "given")
    tensors = load_file(folder / "model.safetensors")
    change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    small = (stand.root / "conf/experiment/smaller.yaml").read_text()
    lines = [line for line in small.splitlines() if not line.startswith(("model:", "  embedded:"))]
    (stand.root / "conf/experiment/given.yaml").write_text("\n".join(lines))
    named = ["model.name=given", f"model.id={folder}", "model.layers=[0,1]"]
    return ["experiment=[pico,given]", "model=pretrained", *named]


def until(stand: Stand, overrides: list[str], *stages: str) -> None:
    for stage in stages:
        stand.run(stage, overrides).check()


def test_a_dense_model_that_gives_nan_is_refused_by_layer_and_token(stand: Stand):
    def poison(tensor: torch.Tensor) -> None:
        tensor[3, 5] = torch.nan

    given = from_folder(stand, "model.layers.1.mlp.down_proj.weight", poison)
    until(stand, given, "dense", "tokens")
    said = stand.run("capture", given).check(3).said
    assert "layer_1.zarr" in said and "nan in split train, shard 0, array output" in said
    assert "token 0, channel 3" in said and "Traceback" not in said


def test_an_overflow_of_float16_in_capture_proposes_bfloat16(stand: Stand):
    given = from_folder(stand, "model.layers.1.mlp.down_proj.weight", lambda t: t.mul_(1e8))
    until(stand, given, "dense", "tokens")
    said = stand.run("capture", [*given, "capture.dtype=float16"]).check(3).said
    assert "layer_1.zarr" in said and "set capture.dtype=bfloat16" in said
    stand.run("capture", given).check()


def test_a_layer_that_cannot_be_fitted_stops_alone(stand: Stand):
    """Outputs whose square is beyond float32: the layer before it is fitted as ever."""
    given = from_folder(stand, "model.layers.1.mlp.down_proj.weight", lambda t: t.mul_(1e22))
    until(stand, given, "dense", "tokens", "capture", "budget")
    said = stand.run("train@1", given).check(5).said
    assert "Training of layer 1 diverged at step 0." in said
    assert "no state before it was good" in said and "other layers are unharmed" in said
    stand.run("train@0", given).check()
    artifacts.verify(stand.root / "stages/train/layer_0")


# Training


def test_a_layer_that_diverges_keeps_its_last_good_state_and_says_so(stand: Stand):
    """Another layer and the published one stay; the state is whole, finite and opens as a layer."""
    before = tree(stand.root / "stages")
    wild = ["train.learning_rate=1e30", "train.warmup_steps=0"]
    said = stand.run("train@0", wild).check(5).said
    assert "Training of layer 0 diverged at step 4." in said and "Traceback" not in said
    (good,) = (stand.root / ".scratch").rglob(LAST_GOOD)
    assert f"the last good state, of step 0, is kept in {good}" in said
    moe, record = load_layer(good)
    assert all(t.isfinite().all() for t in moe.state_dict().values())
    assert record["training"]["best_step"] == 0
    assert tree(stand.root / "stages") == before
    assert not (good.parent / artifacts.MANIFEST).exists()


def test_a_router_that_collapses_stops_its_layer(tmp_path: Path):
    """All tokens take the same experts, and did not before: the others give what is wrong."""
    ffn, mean = dense_ffn(), torch.zeros(dense_ffn().d_model)
    mean[3] = 12.0
    store = write_store(tmp_path / "layer_3.zarr", ffn, mean=mean)
    plan = plan_of(ffn, ffn.d_ff, 8, 2)
    start = start_layer(ffn, plan, MOE, store, seed=0)
    with torch.no_grad():
        start.down_proj[2:] *= -3
        start.router.weight[:, 3] = 0
        start.router.weight *= 10
    fit = {"learning_rate": 1e-6, "load_balance_coef": 0.0, "evaluate_every": 1, "warmup_steps": 0}
    with pytest.raises(ArtifactError) as caught:
        fit_layer(
            store,
            ffn,
            plan,
            tmp_path,
            start=start,
            moe_cfg=MOE,
            cfg=replace(PLAIN, router_learning_rate=0.02, **fit),
            seed=0,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
    said = str(caught.value)
    assert "Training of layer 3 collapsed at step" in said
    assert "6 of 8 experts get no token" in said and "train.load_balance_coef" in said
    _, record = load_layer(tmp_path / LAST_GOOD)
    assert record["training"]["validation"]["dead_experts"] < 6


# Judging


def tiny(family: str = "Llama", **changed) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = getattr(tf, f"{family}Config")(**sizes, intermediate_size=48, **changed)
    auto = tf.AutoModel if family == "Bert" else tf.AutoModelForCausalLM
    return auto.from_config(config).eval()


BLOCKS = torch.arange(6 * 16).reshape(6, 16) % 64


def compared(other: tf.PreTrainedModel):
    return compare_on_text(tiny(), other, BLOCKS, 100, batch_size=2, name="heldout")


def test_a_models_nan_is_told_with_its_text_and_batch():
    broken = tiny()
    with torch.no_grad():  # only what the third batch holds
        broken.model.embed_tokens.weight[int(BLOCKS[5, 15])] = torch.nan
    with pytest.raises(ArtifactError) as caught:
        compared(broken)
    assert "The other model gives what is no number." in str(caught.value)
    assert "logits of batch" in str(caught.value) and "heldout" in str(caught.value)


def test_a_perplexity_beyond_any_number_is_refused():
    wild = tiny()
    with torch.no_grad():
        wild.lm_head.weight.mul_(1e6)
    with pytest.raises(ArtifactError, match="perplexity of heldout"):
        compared(wild)


def test_an_encoders_nan_is_told():
    broken = tiny("Bert")
    with torch.no_grad():
        broken.embeddings.word_embeddings.weight[:] = torch.nan
    with pytest.raises(ArtifactError, match="hidden states of batch 0"):
        compare_embeddings(tiny("Bert"), broken, BLOCKS, batch_size=2)


def test_a_layers_nan_is_told_with_its_store(undisturbed: Stand):
    moe, _ = load_layer(undisturbed.root / "stages/train/layer_0")
    store = LayerReader(undisturbed.root / "stages/capture/layer_0.zarr")
    assert layer_metrics(moe, store)["mse"] >= 0
    with torch.no_grad():
        moe.down_proj[0] = torch.inf
    with pytest.raises(ArtifactError, match=r"batch 0 of .*layer_0\.zarr"):
        layer_metrics(moe, store)


def test_rows_whose_squares_overflow_float32_are_judged(tmp_path: Path):
    ffn = dense_ffn()
    how = {"d_model": ffn.d_model, "dtype": torch.float32, "sequence_length": 8}
    how |= {"codec": Codec.fast, "shard_mb": 1, "chunk_mb": 1, "attributes": {}}
    writer = LayerWriter.open(tmp_path / "layer_0.zarr", rows={"heldout": 16}, **how)
    x = torch.randn(16, ffn.d_model, generator=torch.Generator().manual_seed(0))
    writer.write_shard("heldout", 0, x, 1e25 * x)
    moe = SparseMoE(MoEShape(**plan_of(ffn, ffn.d_ff // 4, 8, 2)["shape"]))  # gives zeros
    found = layer_metrics(moe, LayerReader(tmp_path / "layer_0.zarr"))
    assert found["relative_mse"] == pytest.approx(1) and found["mse"] > 1e49


# JSON


def test_no_json_of_any_artefact_holds_what_is_no_number(undisturbed: Stand):
    paths = [p for p in undisturbed.root.rglob("*.json") if p.is_file()]
    assert len(paths) > 30
    for path in paths:
        json.loads(path.read_text(), parse_constant=lambda c, p=path: pytest.fail(f"{c} in {p}"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_neither_written_nor_read(tmp_path: Path, value: float):
    with pytest.raises(ValueError, match="not JSON compliant"):
        durable.write_json(tmp_path / "a.json", {"x": [value]})
    assert not any(tmp_path.iterdir())
    (tmp_path / "a.json").write_text(json.dumps({"x": value}))
    with pytest.raises(ArtifactError, match="is no number"):
        artifacts.read_json(tmp_path / "a.json")
