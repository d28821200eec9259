"""Every FFN is found by structure and proved by numbers, or refused with what was seen."""

import copy
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline import dense, record
from pipeline.errors import ConfigError, InputError

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GATED = ("Llama", "Mistral", "Qwen2", "Qwen3", "Olmo2", "Gemma", "Gemma2", "Phi3", "Granite")
PLAIN = {"GPT2": "gelu_tanh", "GPTNeoX": "gelu", "Phi": "gelu_tanh"}


def tiny(family: str, meta: bool = False, **changes) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(tf, f"{family}Config")(**SMALL | {"intermediate_size": 48} | changes)
    with torch.device("meta" if meta else "cpu"):
        return tf.AutoModelForCausalLM.from_config(config).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(3, 19)[None]).logits


class Formula(nn.Module):
    """The extracted weights, run by our formula."""

    def __init__(self, slot: dense.FFNSlot) -> None:
        super().__init__()
        self.ffn = slot.weights()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ffn(x)


class Zero(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


@pytest.mark.parametrize("family", [*GATED, *PLAIN])
def test_the_extracted_formula_in_its_place_gives_the_same_logits(family: str):
    model = tiny(family)
    before = logits(model)
    for slot in dense.find_ffns(model):
        slot.replace(Formula(slot))
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [*GATED, *PLAIN])
def test_zeros_in_its_place_change_the_logits(family: str):
    model = tiny(family)
    before = logits(model)
    for slot in dense.find_ffns(model):
        slot.replace(Zero())
    assert (logits(model) - before).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["Llama", "Phi3", "GPT2"])
def test_a_model_without_weights_is_described_as_one_with_them(family: str):
    assert dense.describe(tiny(family, meta=True)) == dense.describe(tiny(family))


@pytest.mark.parametrize(("family", "activation"), PLAIN.items())
def test_the_activation_function_is_found_by_its_numbers(family: str, activation: str):
    (layer, _) = dense.describe(tiny(family))["layers"]
    assert (layer["activation"], layer["gated"], layer["bias"]) == (activation, False, True)


def test_a_record_names_family_widths_and_activation():
    record = dense.describe(tiny("Llama"))
    assert (record["family"], record["d_model"], record["n_layers"]) == ("llama", 32, 2)
    assert record["layers"][1] == {
        "index": 1,
        "path": "model.layers.1.mlp",
        "d_ff": 48,
        "gated": True,
        "activation": "silu",
        "bias": False,
    }


@pytest.mark.parametrize(
    ("family", "named"),
    [("Mixtral", "already sparse"), ("OPT", "fc1"), ("Bloom", "more than its input")],
)
def test_what_has_no_dense_ffn_module_is_refused_with_what_was_seen(family: str, named: str):
    changes = {"ffn_dim": 48, "word_embed_proj_dim": 32} if family == "OPT" else {}
    with pytest.raises(InputError, match=f"{family}.*(\n.*)*{named}"):
        dense.find_ffns(tiny(family, **changes))


# Layers that differ


WIDTHS = (48, 64, 24)


def uneven() -> tf.PreTrainedModel:
    """A Llama whose layers differ in width: no configuration of it says so."""
    model = tiny("Llama", num_hidden_layers=3)
    for layer, width in zip(model.model.layers, WIDTHS, strict=True):
        config = copy.deepcopy(model.config)
        config.intermediate_size = width
        layer.mlp = type(layer.mlp)(config)
    return model


def double_wide() -> tf.PreTrainedModel:
    """Stock layers of two widths: those that reuse keys are twice as wide."""
    kinds = ["sliding_attention", "full_attention"] * 2
    sizes = {"num_hidden_layers": 4, "head_dim": 8, "global_head_dim": 8, "layer_types": kinds}
    sizes |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64}
    return tiny("Gemma4Text", **sizes, num_kv_shared_layers=2, use_double_wide_mlp=True)


def width_of_each(**changes) -> tf.PreTrainedModel:
    """A family whose configuration has a list of widths."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    sizes = {"num_hidden_layers": 3, "head_dim": 8, "layer_types": kinds, "laurel_rank": 4}
    sizes |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64}
    sizes |= {"intermediate_size": list(WIDTHS), "num_kv_shared_layers": 0}
    return tiny("Gemma3nText", **sizes | {"activation_sparsity_pattern": [0.0] * 3} | changes)


@pytest.mark.parametrize(
    ("model", "widths", "activation"),
    [
        (uneven, WIDTHS, "silu"),
        (double_wide, (48, 48, 96, 96), "gelu_tanh"),
        (width_of_each, WIDTHS, "gelu_tanh"),
    ],
)
def test_layers_of_unlike_widths_are_each_found(model, widths, activation):
    dense_model = model()
    slots, before = dense.find_ffns(dense_model), logits(dense_model)
    assert tuple(slot.d_ff for slot in slots) == widths
    assert {slot.d_model for slot in slots} == {32}
    described = dense.describe(dense_model)["layers"]
    assert [(f["d_ff"], f["activation"]) for f in described] == [(w, activation) for w in widths]
    for slot in slots:
        slot.replace(Formula(slot))
    torch.testing.assert_close(logits(dense_model), before, rtol=1e-5, atol=1e-5)


def test_the_activation_function_is_the_nearest_one_at_every_width():
    """The two kinds of gelu differ so little that either is good enough in some layers."""
    model = tiny("Gemma", num_hidden_layers=1)
    for width in range(8, 72, 8):
        config = copy.deepcopy(model.config)
        config.intermediate_size = width
        for exact, name in ((nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh")):
            mlp = type(model.model.layers[0].mlp)(config)
            mlp.act_fn = exact
            model.model.layers[0].mlp = mlp
            assert dense.find_ffns(model)[0].formula.activation == name, width


def test_layers_of_one_shape_that_compute_otherwise_are_each_proved():
    model = tiny("Llama", num_hidden_layers=3)
    model.model.layers[1].mlp.act_fn = nn.ReLU()
    found = [slot.formula.activation for slot in dense.find_ffns(model)]
    assert found == ["silu", "relu", "silu"]
    with pytest.raises(InputError, match="no known formula"):  # its layer 1 keeps a few neurons
        pattern = {"activation_sparsity_pattern": [0.0, 0.5, 0.0]}
        dense.find_ffns(width_of_each(intermediate_size=[48] * 3, **pattern))


def test_a_slot_has_the_dtype_of_its_weights():
    model = tiny("Llama")
    model.model.layers[1].mlp.bfloat16()
    assert [slot.dtype for slot in dense.find_ffns(model)] == [torch.float32, torch.bfloat16]


# Choosing layers


PATHS = [f"model.layers.{k}.mlp" for k in range(12)]


@pytest.mark.parametrize(
    ("which", "chosen"),
    [
        (None, [*range(12)]),
        ([3], [3]),
        ([11, 0, 3, 0], [0, 3, 11]),
        (["model.layers.*.mlp"], [*range(12)]),
        (["*.1?.mlp"], [10, 11]),
        (["*.[02].mlp", 1, "*.2.*"], [0, 1, 2]),
        (["model.layers.7.mlp"], [7]),
        ([], []),
    ],
)
def test_select_layers_takes_indices_and_patterns_over_whole_paths(which, chosen):
    assert dense.select_layers(PATHS, which) == chosen


@pytest.mark.parametrize("unknown", [12, -1, "*.mlp.up_proj", "layers.3.mlp", "MODEL.*"])
def test_select_layers_refuses_what_means_no_layer(unknown: int | str):
    with pytest.raises(InputError, match=r"model\.layers\.{0-11}\.mlp") as refusal:
        dense.select_layers(PATHS, [0, unknown])
    assert refusal.value.value == unknown and "0 to 11" in refusal.value.rule


def test_path_pattern_tells_unlike_paths_apart():
    assert dense.path_pattern(PATHS[:1]) == "model.layers.{0}.mlp"
    paths = ["h.0.mlp", "h.1.mlp", "h.2.ffn", "h.3.mlp"]
    assert dense.path_pattern(paths) == "h.{0-1, 3}.mlp, h.{2}.ffn"


def test_layers_that_the_model_lacks_are_refused():
    with pytest.raises(InputError, match="0 to 1"):
        record.check_layers([0, 2], 2)


def test_a_missing_model_is_refused_in_one_line_with_the_token_hint(tmp_path: Path):
    for call in (dense.load_model, dense.load_tokenizer, dense.resolve):
        with pytest.raises(InputError, match="HF_TOKEN"):
            call(str(tmp_path / "nowhere"))


def test_a_model_without_tokenizer_is_refused(tmp_path: Path):
    tiny("Llama").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="cannot be loaded"):
        dense.load_tokenizer(str(tmp_path))


def test_a_pickled_model_is_not_opened(tmp_path: Path):
    tiny("Llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError):
        dense.load_model(str(tmp_path))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "link"])
def test_weights_outside_the_folder_are_refused_before_loading(tmp_path: Path, name: str):
    folder = tmp_path / "model"
    tiny("Llama").save_pretrained(folder, max_shard_size="20KB")
    index = folder / dense.INDEX
    (first, *_) = sorted(folder.glob("*.safetensors"))
    outside = first.rename(tmp_path / "outside.safetensors")
    if name == "link":
        first.symlink_to(outside)
    else:
        index.write_text(index.read_text().replace(first.name, name))
    with pytest.raises(InputError, match="outside its folder"):
        dense.load_model(str(folder))


def test_remote_code_needs_a_pinned_revision():
    with pytest.raises(ConfigError, match="pinned commit"):
        dense.load_model("some/model", trust_remote_code=True)


def test_the_record_holds_the_digest_of_every_file(tmp_path: Path):
    tiny("Llama").save_pretrained(tmp_path)
    record = dense.resolve(str(tmp_path))
    assert {"config.json", "model.safetensors"} <= record["digests"].keys()
    assert record["revision"] is None


def saved(folder: Path) -> dict[str, torch.Tensor]:
    tiny("Llama").save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_missing_or_misshapen_tensor_is_refused_by_name(tmp_path: Path, name: str):
    """transformers alone fills it with random numbers."""
    tensors = saved(tmp_path)
    for changed in (None, torch.zeros(3, 5)):
        tensors.pop(name, None)
        kept = tensors if changed is None else {**tensors, name: changed}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=name):
            dense.load_model(str(tmp_path))


def test_truncated_weights_are_refused_in_one_line(tmp_path: Path):
    saved(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="cannot be loaded"):
        dense.load_model(str(tmp_path))
