"""A dense model is loaded or refused, described, and its layers chosen."""

from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from pipeline import artifacts, dense, durable, pretrained, record
from pipeline.errors import InputError

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PLAIN = {"GPT2": "gelu_tanh", "GPTNeoX": "gelu", "Phi": "gelu_tanh"}
SPREAD = {"ffn_dim": 48, "word_embed_proj_dim": 32}  # OPT: the FFN is no module of its own
HEADLESS = {"T5": {"d_ff": 48, "d_kv": 8}, "Bert": {}, "ViT": {}}


def tiny(family: str, meta: bool = False, **changes) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(tf, f"{family}Config")(**SMALL | {"intermediate_size": 48} | changes)
    auto = tf.AutoModel if family in HEADLESS else tf.AutoModelForCausalLM
    with torch.device("meta" if meta else "cpu"):
        return auto.from_config(config).eval()


@pytest.mark.parametrize(
    ("family", "changes"),
    [("Llama", {}), ("Phi3", {}), ("GPT2", {}), ("OPT", SPREAD), *HEADLESS.items()],
)
def test_a_model_without_weights_is_described_as_one_with_them(family: str, changes: dict):
    record = dense.describe(tiny(family, **changes))
    assert dense.describe(tiny(family, meta=True, **changes)) == record


def test_a_model_without_a_vocabulary_is_described_without_one():
    with torch.device("meta"):
        model = tf.AutoModel.from_config(tf.ViTConfig(num_hidden_layers=1))
    record = dense.describe(model)
    assert (record["vocab_size"], record["d_model"]) == (None, 768)


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


def test_a_record_names_what_is_bypassed_where_an_ffn_is_spread_over_modules():
    record = dense.describe(tiny("OPT", **SPREAD))
    layer = record["layers"][1]
    assert layer["path"] == "model.decoder.layers.1.fc2"
    assert layer["bypassed"] == [f"model.decoder.layers.1.{n}" for n in ("fc1", "activation_fn")]


@pytest.mark.parametrize(
    ("family", "architecture", "loaded"),
    [
        ("GPT2", "GPT2LMHeadModel", "GPT2LMHeadModel"),
        ("GPT2", None, "GPT2LMHeadModel"),
        ("Bert", "BertModel", "BertModel"),
        ("Bert", "BertLMHeadModel", "BertLMHeadModel"),
        ("T5", "T5ForConditionalGeneration", "T5Model"),
        ("T5", None, "T5Model"),
    ],
)
def test_load_model_keeps_the_head_of_a_causal_lm_alone(
    tmp_path: Path, family: str, architecture: str | None, loaded: str
):
    config = tiny(family, meta=True, **HEADLESS.get(family, {})).config
    getattr(tf, architecture or loaded)(config).save_pretrained(tmp_path)
    written = artifacts.read_json(tmp_path / "config.json") | {
        "architectures": architecture and [architecture]
    }
    durable.write_json(tmp_path / "config.json", written)
    assert type(dense.load_model(str(tmp_path))).__name__ == loaded
    assert dense.inspect(str(tmp_path))["family"] == config.model_type


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
    stacks = [f"{side}.block.{k}.layer.1.wo" for side in ("encoder", "decoder") for k in (0, 1)]
    expected = "encoder.block.{0-1}.layer.1.wo, decoder.block.{0-1}.layer.1.wo"
    assert dense.path_pattern(stacks) == expected
    assert dense.select_layers(stacks, ["decoder.*"]) == [2, 3]
    assert dense.path_pattern(["ffns.0", "ffns.1"]) == "ffns.{0-1}"


def test_layers_that_the_model_lacks_are_refused():
    with pytest.raises(InputError, match="0 to 1"):
        record.check_layers([0, 2], 2)


def test_a_missing_model_is_refused_in_one_line_with_the_token_hint(tmp_path: Path):
    for call in (dense.load_model, dense.resolve):
        with pytest.raises(InputError, match="HF_TOKEN"):
            call(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        pretrained.load_tokenizer(str(tmp_path / "nowhere"))


def test_a_pickled_model_is_not_opened(tmp_path: Path):
    tiny("Llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError):
        dense.load_model(str(tmp_path))


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
