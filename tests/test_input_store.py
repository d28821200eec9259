"""A store of inputs alone gives the rows that one of both sides holds, to whoever reads it."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from test_sensitivity import MOE, options, plans_of
from test_training import MOE as SLICES
from test_training import PLAIN
from torch import Tensor

from pipeline import evaluation, notebook, sensitivity
from pipeline.capture import capture_activations
from pipeline.config import CaptureConfig, Codec, Dtype, Init, Store
from pipeline.errors import ArtifactError
from pipeline.ffn import DenseFFN
from pipeline.moe import SparseMoE
from pipeline.record import WEIGHTS
from pipeline.shape import MoEShape
from pipeline.shuffle import Pair
from pipeline.store import LayerReader
from pipeline.windows import forward_behind

D, F, LENGTH, SEQUENCES = 32, 64, 16, {"train": 64, "validation": 16, "heldout": 11}

# Chunks of two sequences, shards of eight; `heldout` ends within a chunk.
CONFIG = CaptureConfig(
    dtype=Dtype.float32,
    store=Store.both,
    codec=Codec.compact,
    shard_mb=8 * LENGTH * D * 4 / 1e6,
    chunk_mb=2 * LENGTH * D * 4 / 1e6,
    batch_size=3,
    heldout_tokens=1000,
)


@pytest.fixture(scope="module")
def model() -> tf.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": 3}
    config = tf.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    made = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return made


def blocks() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {s: torch.randint(100, (n, LENGTH), generator=generator) for s, n in SEQUENCES.items()}


def captured(folder: Path, model: Any, store: Store, dtype: torch.dtype = torch.float32) -> Path:
    cfg = replace(CONFIG, store=store)
    capture_activations(model, blocks(), folder, layers=[0, 2], cfg=cfg, dtype=dtype)
    return folder


Both = dict[Store, Path]


@pytest.fixture(scope="module")
def stores(model: tf.PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Both:
    return {s: captured(tmp_path_factory.mktemp(s.name), model, s) for s in Store}


def reader(folder: Path, layer: int = 2) -> LayerReader:
    return LayerReader(folder / f"layer_{layer}.zarr")


def size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.glob("layer_*.zarr/**/c.*"))


def assert_equal(found: Pair, expected: Pair) -> None:
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("layer", [0, 2])
def test_computed_outputs_are_the_stored_ones_bit_for_bit_in_float32(stores: Both, layer: int):
    for split in SEQUENCES:
        rows = [reader(stores[store], layer).read(split) for store in (Store.input, Store.both)]
        assert_equal(*rows)
        assert rows[0][1].abs().max() > 0.1


def test_a_store_of_inputs_has_half_the_arrays_and_their_very_bytes(stores: Both):
    kept = {p.relative_to(stores[Store.both]) for p in stores[Store.both].rglob("c.*")}
    for path in stores[Store.input].rglob("c.*"):
        name = path.relative_to(stores[Store.input])
        assert name.parent.name == "input"
        assert path.read_bytes() == (stores[Store.both] / name).read_bytes()
        kept.remove(name)
    assert {name.parent.name for name in kept} == {"output"}
    assert 0.4 < size(stores[Store.input]) / size(stores[Store.both]) < 0.6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_are_rounded_as_stored_ones(model, tmp_path: Path, dtype: torch.dtype):
    rows = reader(captured(tmp_path, model, Store.input, dtype)).read("train")
    ffn = DenseFFN.load(tmp_path / "ffn_2.safetensors")
    assert rows[0].dtype is rows[1].dtype is dtype
    with torch.no_grad():
        given = torch.cat([ffn(x.float()) for x in rows[0].split(2 * LENGTH)])
    assert torch.equal(rows[1], given.to(dtype))


def test_a_model_in_bfloat16_is_asked_in_bfloat16(model, tmp_path: Path):
    half = copy.deepcopy(model).bfloat16()
    for store in Store:
        captured(tmp_path / store.name, half, store, torch.bfloat16)
    found, stored = (reader(tmp_path / s.name).read("train") for s in (Store.input, Store.both))
    assert torch.equal(found[0], stored[0])
    differing = (found[1] != stored[1]).float().mean()
    in_float32 = DenseFFN.load(tmp_path / "input/ffn_2.safetensors").to("cpu", torch.float32)
    with torch.no_grad():
        other = in_float32(found[0].float()).bfloat16()
    assert differing < 0.02 < (other != stored[1]).float().mean()


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (7, 90), (64, 96), (170, None), (3, 3)])
def test_a_row_is_the_same_whatever_is_read_with_it(stores: Both, start: int, stop: int | None):
    found = reader(stores[Store.input])
    whole = found.read("heldout")
    assert_equal(found.read("heldout", start, stop), (whole[0][start:stop], whole[1][start:stop]))


@pytest.mark.parametrize("in_memory", [True, False])
def test_batches_are_those_of_a_store_of_both(stores: Both, in_memory: bool):
    order = {"seed": 3, "epoch": 1, "skip": 2, "in_memory": in_memory}
    sides = [list(reader(stores[s]).batches("train", 48, **order)) for s in Store]
    assert len(sides[0]) == SEQUENCES["train"] * LENGTH // 48 - 2
    for found, expected in zip(*sides, strict=True):
        assert_equal(found, expected)


SPECIALISTS = replace(SLICES, init=Init.specialist, top_k=1, n_experts=2, d_ff_expert=0.5)
FITS: dict[str, tuple[Any, dict[str, Any]]] = {
    "slices": (SLICES, {}),
    "streamed": (SLICES, {"stream": True}),
    "data-free": (SLICES, {"data_free": True}),
    "specialists": (SPECIALISTS, {"epochs": 0}),
    "refitted": (replace(SLICES, refit=True, top_k=2), {"epochs": 0}),
}


@pytest.mark.parametrize("kind", FITS)
def test_a_layer_is_fitted_to_the_same_bytes(stores: Both, model, tmp_path: Path, kind: str):
    moe_cfg, changed = FITS[kind]
    plan = notebook.plan_layers(model, moe_cfg, [2])[2]
    for store, folder in stores.items():
        cfg = replace(PLAIN, **changed)
        notebook.train_layer(folder, plan, tmp_path / store.name, moe_cfg=moe_cfg, cfg=cfg)
    files = [tmp_path / store.name / "layer_2" / WEIGHTS for store in Store]
    assert files[0].read_bytes() == files[1].read_bytes()
    metrics = [evaluation.evaluate(f.parent.parent, stores[Store(f.parts[-3])]) for f in files]
    assert metrics[0] == metrics[1] and metrics[0][2]["relative_mse"] > 0


def test_the_dtype_of_products_is_read_from_the_configuration(stores: Both, model, tmp_path: Path):
    plan = notebook.plan_layers(model, SLICES, [2])[2]
    fitted = {}
    for dtype in (Dtype.float32, Dtype.bfloat16):
        cfg = replace(PLAIN, dtype=dtype)
        into = tmp_path / dtype.name
        notebook.train_layer(stores[Store.both], plan, into, moe_cfg=SLICES, cfg=cfg)
        fitted[dtype] = (into / "layer_2" / WEIGHTS).read_bytes()
    assert fitted[Dtype.float32] != fitted[Dtype.bfloat16]


def test_budgets_are_judged_alike(stores: Both, model, tmp_path: Path):
    plans = plans_of(options(model, MOE))
    plans = {k: dict(list(plans[k].items())[:1]) for k in (0, 2)}
    found = [
        sensitivity.measure(
            model, plans, stores[s], blocks()["validation"], tmp_path / s.name, moe_cfg=MOE, seed=0
        )
        for s in Store
    ]
    assert found[0] == found[1] and found[0][0]


def test_rows_behind_sparse_layers_keep_their_outputs(model, tmp_path: Path):
    """They are no dense FFN's: `train.window` leads them back to the dense model's stream."""
    shape = notebook.plan_layers(model, SLICES, [0])[0]["shape"]
    behind = forward_behind(model, {0: SparseMoE(MoEShape(**shape))}, blocks()["validation"][:1])
    cfg = replace(CONFIG, store=Store.input)
    capture_activations(model, blocks(), tmp_path, layers=[2], cfg=cfg, forward=behind)
    x, y = reader(tmp_path).read("train")
    ffn = DenseFFN.load(tmp_path / "ffn_2.safetensors")
    with torch.no_grad():
        assert (ffn(x) - y).abs().max() > 0.1


def another(path: Path) -> None:
    ffn = DenseFFN.load(path)
    replace(ffn, up_proj=-ffn.up_proj).save(path)


@pytest.mark.parametrize("harm", [Path.unlink, another])
def test_an_ffn_that_is_gone_or_another_is_refused(
    model, tmp_path: Path, harm: Callable[[Path], None]
):
    captured(tmp_path, model, Store.input)
    opened = reader(tmp_path)
    harm(tmp_path / "ffn_2.safetensors")
    for read in (lambda: opened.read("train"), opened.verify):
        with pytest.raises(ArtifactError, match=r"ffn_2\.safetensors"):
            read()


def test_a_store_is_not_continued_with_other_sides(stores: Both, model, tmp_path: Path):
    captured(tmp_path, model, Store.both)
    with pytest.raises(ArtifactError, match="begun with other settings"):
        captured(tmp_path, model, Store.input)
