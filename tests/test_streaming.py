"""Training from stored shards is training on the running dense model, bit for bit."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as tf
from test_training import MOE, PLAIN
from torch import Tensor

from benchmarks.streaming import Recipe, Trained, differences, store, stream, train_stored
from pipeline.capture import capture_activations
from pipeline.config import CaptureConfig, Codec, Dtype, RouterInit
from pipeline.shape import MoEShape
from pipeline.store import LayerReader

D, F, LAYERS, LENGTH = 32, 64, 3, 16
SEQUENCES = 4  # of a batch
STEPS, EPOCHS = 7, 2
CAPTURE = CaptureConfig(
    dtype=Dtype.float32,
    codec=Codec.compact,
    # Chunks of one sequence, shards of three batches; the last one holds one and a part.
    shard_mb=3 * SEQUENCES * LENGTH * D * 4 / 1e6,
    chunk_mb=LENGTH * D * 4 / 1e6,
    batch_size=SEQUENCES,
    heldout_tokens=1,
)
RIDGE = replace(MOE, router_init=RouterInit.ridge)
SMALL = replace(MOE.dynamic, enabled=True, reallocate_every_n_steps=3)
TOP_2: dict[str, Any] = {"top_k": 2}
EXPERT_CHOICE = {"routing": "expert_choice", "capacity_factor": 1.25}

KINDS = {
    "top-2": (MOE, TOP_2),
    "top-2 from a ridge router": (RIDGE, TOP_2),
    "expert choice": (MOE, EXPERT_CHOICE),
    "dynamic": (replace(MOE, dynamic=SMALL), TOP_2),
    "dynamic expert choice": (replace(MOE, dynamic=SMALL), EXPERT_CHOICE),
    "balance bias and an MLP router": (MOE, TOP_2 | {"balance_bias": True, "router_width": 8}),
}


class Dense(NamedTuple):
    model: tf.PreTrainedModel
    blocks: dict[str, Tensor]
    starts: dict[int, LayerReader]  # captured beforehand


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Dense:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=64,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    model = tf.LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(1)
    blocks = {
        split: torch.randint(64, (n, LENGTH), generator=generator)
        # The train split has a sequence that fills no batch.
        for split, n in {"train": STEPS * SEQUENCES + 1, "validation": 6, "start": 8}.items()
    }
    folder = tmp_path_factory.mktemp("starts")
    captured = {"train": blocks["start"], "validation": blocks["validation"]}
    capture_activations(model, captured, folder, cfg=CAPTURE)
    starts = {k: LayerReader(folder / f"layer_{k}.zarr") for k in range(LAYERS)}
    return Dense(model, blocks, starts)


def recipe(dense: Dense, kind: str = "top-2") -> Recipe:
    moe, changed = KINDS[kind]
    shape = MoEShape(D, F, F // 4, 8, 2, "silu", True, False, "softmax_topk")
    shape = replace(shape, **changed)
    plans = {
        layer: {"layer": layer, "shape": asdict(shape), "init": "slice", "host": "mixtral"}
        for layer in range(LAYERS)
    }
    train = replace(PLAIN, epochs=EPOCHS, batch_size=SEQUENCES * LENGTH)
    return Recipe(plans, dense.starts, moe, train)


def offline(dense: Dense, how: Recipe, folder: Path, in_order: bool = True) -> Trained:
    store(dense.model, dense.blocks["train"], how, folder, CAPTURE)
    return train_stored(folder, how, in_order=in_order)


@pytest.mark.parametrize("kind", KINDS)
def test_training_from_shards_has_the_losses_and_weights_of_streaming(dense, tmp_path, kind):
    how = recipe(dense, kind)
    streamed = stream(dense.model, dense.blocks["train"], how, sequential=False)
    stored = offline(dense, how, tmp_path)
    assert differences(streamed, stored) == []
    assert len(list(tmp_path.glob("layer_0.zarr/train/input/c.*"))) == 3
    for layer, curve in streamed.curves.items():
        assert [list(row) for row in curve] == [
            ["loss", "mse", "cosine", "load_balance", "router_z"]
        ] * (EPOCHS * STEPS)
        if kind.startswith("dynamic"):
            assert len(set(streamed.moes[layer].shape.widths)) > 1
        else:
            losses = [row["loss"] for row in curve]
            assert sum(losses[STEPS:]) < sum(losses[:STEPS])  # on the same batches


@pytest.mark.parametrize("kind", ["top-2", "expert choice", "dynamic"])
def test_sequential_streaming_has_the_losses_and_weights_of_parallel(dense, kind):
    how = recipe(dense, kind)
    one, other = (
        stream(dense.model, dense.blocks["train"], how, sequential=sequential)
        for sequential in (False, True)
    )
    assert differences(one, other) == []


def test_differences_are_found(dense, tmp_path):
    """Other batches, and one weight that is not the same."""
    how = recipe(dense)
    streamed = stream(dense.model, dense.blocks["train"], how, sequential=False)
    shuffled = offline(dense, how, tmp_path, in_order=False)
    found = differences(streamed, shuffled)
    assert found[0].startswith("layer 0, step 0, loss: ")
    assert "layer 2, down_proj" in found
    again = train_stored(tmp_path, how, in_order=True)
    with torch.no_grad():
        again.moes[1].down_proj[0, 0, 0] += 1e-3
    assert differences(streamed, again) == ["layer 1, down_proj"]


def test_dense_passes_are_one_for_each_batch_epoch_and_layer_trained_apart(dense):
    """What the ways differ in: sequential streaming runs the dense model again for every layer."""
    how = recipe(dense)
    passes = []
    counts = []
    with dense.model.register_forward_hook(lambda *_: passes.append(1)):
        for sequential in (False, True):
            passes.clear()
            stream(dense.model, dense.blocks["train"], how, sequential=sequential)
            counts.append(len(passes))
    assert counts == [EPOCHS * STEPS, EPOCHS * STEPS * LAYERS]


def test_seconds_are_one_growing_number_for_each_epoch(dense, tmp_path):
    how = recipe(dense)
    for trained in (
        stream(dense.model, dense.blocks["train"], how, sequential=True),
        offline(dense, how, tmp_path),
    ):
        assert len(trained.seconds) == EPOCHS
        assert 0 < trained.seconds[0] < trained.seconds[1]
