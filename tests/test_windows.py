"""Rows behind sparse layers lead the residual stream back to where the dense model has it."""

from pathlib import Path

import pytest
import torch
import transformers as tf
from test_capture import CONFIG

from pipeline.artifacts import file_digest
from pipeline.capture import capture_activations
from pipeline.discovery import find_ffns
from pipeline.errors import ArtifactError, ConfigError
from pipeline.layers import save_layer
from pipeline.moe import SparseMoE
from pipeline.record import check_behind
from pipeline.shape import MoEShape
from pipeline.store import LayerReader
from pipeline.windows import forward_behind

D, F = 32, 64
SHAPE = MoEShape(D, F, 16, 4, 1, "silu", True, False, "softmax_topk")
SIZES = {
    "vocab_size": 100,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}
CONFIGS = {
    "adds": lambda: tf.LlamaConfig(**SIZES),
    "adds a multiple": lambda: tf.GraniteConfig(**SIZES, residual_multiplier=0.25),
}


def model_of(config: tf.PreTrainedConfig) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model.eval()


def layer(seed: int = 0) -> SparseMoE:
    moe, generator = SparseMoE(SHAPE).eval(), torch.Generator().manual_seed(seed)
    for parameter in moe.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    return moe


@torch.no_grad()
def streams(model: torch.nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(T, D) behind each layer; the last without the final norm."""
    found = []
    handles = [
        layer.register_forward_hook(lambda m, i, o: found.append(o if torch.is_tensor(o) else o[0]))
        for layer in model.model.layers  # type: ignore[union-attr]
    ]
    model(input_ids=batch)
    for handle in handles:
        handle.remove()
    return tuple(stream.flatten(0, 1) for stream in found)


BATCH = torch.randint(100, (3, 8), generator=torch.Generator().manual_seed(1))
PROBE = BATCH[:1]


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_the_target_leads_the_stream_back_to_the_dense_models(kind):
    model = model_of(CONFIGS[kind]())
    wanted = streams(model, BATCH)
    x, y = forward_behind(model, {0: layer()}, PROBE)(BATCH, [1])[1]
    dense = find_ffns(model)[1].weights()
    assert not torch.allclose(dense(x), y, atol=1e-2)  # the earlier layer lost something
    slots = find_ffns(model)
    slots[0].replace(layer())
    met = {}
    slots[1].module.register_forward_hook(lambda m, i, o: met.update(x=i[0]) or y.view_as(o))
    behind = streams(model, BATCH)
    torch.testing.assert_close(met["x"].flatten(0, 1), x)
    torch.testing.assert_close(behind[1], wanted[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(behind[2], wanted[2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(behind[0], wanted[0], atol=1e-2)


@torch.no_grad()
def test_layers_of_one_window_are_behind_the_same_layers():
    model = model_of(CONFIGS["adds"]())
    both = forward_behind(model, {0: layer()}, PROBE)(BATCH, [1, 2])
    alone = forward_behind(model, {0: layer()}, PROBE)(BATCH, [2])
    torch.testing.assert_close(both[2], alone[2])
    further = forward_behind(model, {0: layer(), 1: layer(1)}, PROBE)(BATCH, [2])
    assert not torch.allclose(both[2][0], further[2][0], atol=1e-2)


@torch.no_grad()
def test_the_rows_of_a_batch_do_not_depend_on_those_before_it():
    """A capture that is continued begins with another batch."""
    model = model_of(CONFIGS["adds a multiple"]())
    forward = forward_behind(model, {0: layer()}, PROBE)
    forward(BATCH[:2], [1])
    after, first = (
        forward(BATCH[2:], [1]),
        forward_behind(model, {0: layer()}, PROBE)(BATCH[2:], [1]),
    )
    assert all(map(torch.equal, after[1], first[1]))


def test_the_dense_model_stays_as_it_is():
    model = model_of(CONFIGS["adds"]())
    before = streams(model, BATCH)
    with torch.no_grad():
        forward_behind(model, {0: layer()}, PROBE)(BATCH, [1])
    for one, two in zip(before, streams(model, BATCH), strict=True):
        assert torch.equal(one, two)


def test_behind_exact_layers_the_rows_are_those_of_the_dense_model(tmp_path: Path):
    model, rows = model_of(CONFIGS["adds"]()), {}
    blocks = {"train": BATCH, "validation": BATCH[:1]}
    ways = {"dense": None, "behind": forward_behind(model, {}, PROBE)}
    for name, forward in ways.items():
        capture_activations(model, blocks, tmp_path / name, cfg=CONFIG, layers=[2], forward=forward)
        rows[name] = LayerReader(tmp_path / name / "layer_2.zarr").read("train")
    for one, two in zip(*rows.values(), strict=True):
        torch.testing.assert_close(one, two, rtol=2e-2, atol=2e-2)


def test_a_model_that_norms_its_ffns_outputs_is_refused():
    model = model_of(tf.Olmo2Config(**SIZES))
    with pytest.raises(ConfigError, match="cannot be fitted in windows"), torch.no_grad():
        forward_behind(model, {0: layer()}, PROBE)(BATCH, [1])


def test_a_layer_behind_others_than_it_was_fitted_behind_is_refused(tmp_path: Path):
    folders = {k: tmp_path / f"layer_{k}" for k in (0, 1)}
    for k, folder in folders.items():
        folder.mkdir()
        fitted = {"0": file_digest(folders[0] / "layer.safetensors")} if k else {}
        save_layer(layer(k), folder, {"layer": k, "host": "mixtral", "behind": fitted})
    check_behind(folders)
    save_layer(layer(5), folders[0], {"layer": 0, "host": "mixtral"})
    with pytest.raises(ArtifactError) as caught:
        check_behind(folders)
    assert "prefill" in caught.value.remedy
    with pytest.raises(ArtifactError, match="left dense"):
        check_behind({1: folders[1]})
