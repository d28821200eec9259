"""Which architecture holds which conversion: every refusal is explained, every tensor is placed."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from test_checkpoint import (
    LLAMA3,
    PLAIN_ROPE,
    SMALL,
    assert_equal_logits,
    continued,
    difference,
    load,
    random_layer,
    save_dense,
    tiny,
)
from transformers.activations import ACT2FN

from pipeline import checkpoint, dense, hosts, reload
from pipeline.errors import ConfigError
from pipeline.ffn import ACTIVATIONS
from pipeline.hosts.families import FAMILIES
from pipeline.hosts.interface import NOT_KEPT
from pipeline.hosts.native import EXPERT_WIDTHS, NATIVE, SHARED_WIDTHS, SPELLED_APART
from pipeline.layers import layer_folders, save_layer
from pipeline.router import ROUTER_FUNCTIONS
from pipeline.shape import MoEShape

MIXTRAL, CUSTOM = hosts.HOSTS["mixtral"], hosts.HOSTS["custom"]


def record_of(family: str, **changes) -> dict:
    config = getattr(tf, f"{family}Config")(**SMALL | changes)
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(config)
    return dense.describe(model)


def shapes_of(record: dict, d_ff_expert: int = 16, **changes) -> dict[int, MoEShape]:
    sizes = {"d_ff_expert": d_ff_expert, "n_experts": 6, "top_k": 2, "d_model": record["d_model"]}
    kinds = {"router_function": "softmax_topk"}
    return {
        ffn["index"]: MoEShape(
            **{k: v for k, v in ffn.items() if k not in ("index", "path")} | sizes | kinds | changes
        )
        for ffn in record["layers"]
    }


def refusal(name: str, record: dict, shapes: dict[int, MoEShape]) -> str:
    return hosts.can_host(hosts.HOSTS[name], record, shapes) or ""


# What each native host holds, converted and opened again

LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
YARN = LINEAR | {"rope_type": "yarn", "original_max_position_embeddings": 128}
WINDOW = {"sliding_window": 8}
FULL = {"sliding_window": None}
LAST = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
ALL = LAST | {"max_window_layers": 0}
SCALED = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.7}
SCALED |= {"attention_multiplier": 0.3}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
BIASED, HEADS = {"attention_bias": True}, {"head_dim": 16}
SHARED = {"d_ff_shared": 32}
BALANCED = {"balance_bias": True}
GROWN = {"expert_widths": (8, 16, 8, 8, 16, 8)}


class Case(NamedTuple):
    """A dense model, its host, and what its sparse layers have: those that are left out stay."""

    family: str
    host: str
    dense: dict[str, Any]
    layers: dict[int, dict[str, Any]]


CASES = [
    Case("Llama", "mixtral", TIED | {"rope_parameters": LLAMA3}, {0: {}, 1: GROWN}),
    Case("Mistral", "mixtral", WINDOW | HEADS, {0: {"d_ff_expert": 24}, 1: {}}),
    Case("Phi3", "mixtral", WINDOW, {0: {}, 1: {}}),
    Case("Granite", "granitemoe", SCALED | TIED, {0: {}, 1: {}}),
    Case("Llama", "granitemoe", BIASED | {"rope_parameters": YARN}, {0: {}, 1: {}}),
    Case("Mistral", "granitemoe", FULL, {0: {"top_k": 1}, 1: {"top_k": 1}}),
    Case("Phi3", "granitemoe", FULL, {0: {}, 1: {}}),
    Case("Granite", "granitemoeshared", SCALED | BIASED, {0: SHARED, 1: {"d_ff_shared": 8}}),
    Case("Llama", "granitemoeshared", BIASED | HEADS | {"rope_parameters": LINEAR}, {0: {}, 1: {}}),
    Case("Mistral", "granitemoeshared", FULL | TIED, {0: SHARED, 1: SHARED}),
    Case("Phi3", "granitemoeshared", FULL, {0: SHARED, 1: {}}),
    Case("Qwen3", "qwen3_moe", ALL | HEADS | BIASED, {0: {}}),
    Case("Olmo2", "flex_olmo", BIASED | {"rope_parameters": YARN}, {0: {}, 1: {}}),
    Case("Qwen2", "qwen2_moe", LAST | TIED, {0: SHARED, 1: {"d_ff_shared": 8}}),
    Case("Llama", "qwen2_moe", {"rope_parameters": LLAMA3}, {0: {}, 1: {}}),
    Case("Mistral", "qwen2_moe", WINDOW, {1: SHARED}),
    Case("Phi3", "qwen2_moe", WINDOW, {0: {}}),
    Case("Qwen3", "glm4_moe", HEADS, {1: SHARED}),
    Case("Llama", "glm4_moe", {"rope_parameters": LLAMA3}, {0: BALANCED, 1: BALANCED}),
    Case("Mistral", "glm4_moe", FULL, {1: BALANCED | SHARED}),
    Case("Qwen2", "glm4_moe", TIED, {0: {}, 1: {}}),
    Case("Phi3", "glm4_moe", FULL, {1: {"top_k": 1}}),
    Case("Qwen3", "dots1", LAST | BIASED, {0: BALANCED | SHARED, 1: BALANCED | SHARED}),
    Case("Llama", "custom", TIED | BIASED, {0: SHARED, 1: BALANCED}),
]
PAIRS = [f"{case.family}-{case.host}" for case in CASES]


class Converted(NamedTuple):
    dense: Path
    sparse: Path
    in_memory: tf.PreTrainedModel


def convert(case: Case, folder: Path, dtype: torch.dtype = torch.float32) -> Converted:
    """A tiny random model with random sparse layers."""
    model = tiny(case.family, dtype, **case.dense)
    save_dense(model, folder / "dense")
    function = hosts.HOSTS[case.host].router_function
    for k, shape in shapes_of(dense.describe(model), router_function=function).items():
        if k in case.layers:
            (folder / f"layer_{k}").mkdir()
            moe = random_layer(dataclasses.replace(shape, **case.layers[k]), seed=k)
            save_layer(moe, folder / f"layer_{k}", {"layer": k, "host": case.host})
    how = {"dtype": "auto", "revision": None, "trust_remote_code": False}
    conversion = checkpoint.Conversion(str(folder / "dense"), layer_folders(folder), {}, how)
    conversion.write(folder / "sparse", "2GB")
    in_memory = conversion.put_into(dense.load_model(str(folder / "dense"))).float()
    return Converted(folder / "dense", folder / "sparse", in_memory)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Converted]:
    """Read-only: a case, converted once."""
    done: dict[int, Converted] = {}

    def get(case: Case) -> Converted:
        if id(case) not in done:
            done[id(case)] = convert(case, tmp_path_factory.mktemp(f"{case.family}-{case.host}"))
        return done[id(case)]

    return get


def test_every_pair_of_a_family_and_a_native_host_is_converted_below():
    held = {(family, host.name) for host in NATIVE for family in host.families}
    assert held == {(c.family.lower(), c.host) for c in CASES} - {("llama", "custom")}
    assert {family for family, _ in held} == FAMILIES.keys()


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (case, name)
        for case in CASES
        for name, value in case.dense.items()
        if value and name not in ("tie_word_embeddings", "head_dim", "max_window_layers")
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.family}-{value.host}",
)
def test_logits_show_the_setting_that_must_survive(case: Case, name: str):
    """The control of what follows: without it the logits are others."""
    plain = {name: None} if name == "sliding_window" else {}
    plain = {"rope_parameters": PLAIN_ROPE} if name == "rope_parameters" else plain
    other = {k: v for k, v in case.dense.items() if k != name} | plain
    assert difference(tiny(case.family, **other), tiny(case.family, **case.dense)) > 1e-3


@pytest.mark.parametrize("case", CASES, ids=PAIRS)
def test_a_converted_model_computes_what_its_layers_compute_in_memory(case: Case, converted):
    """Opened by transformers with every tensor found, and no code of the folder."""
    done = converted(case)
    model, info = tf.AutoModelForCausalLM.from_pretrained(done.sparse, output_loading_info=True)
    assert not any(info.values()) and model.config.model_type == hosts.HOSTS[case.host].model_type
    assert_equal_logits(model.eval(), done.in_memory)
    assert torch.equal(continued(model), continued(done.in_memory))
    assert difference(done.in_memory, load(done.dense)) > 0.01


@pytest.mark.parametrize("case", CASES, ids=PAIRS)
def test_a_converted_model_opens_by_the_headers_of_its_files(case: Case, converted):
    """As in the proof where no model fits; a tensor too few is told there too."""
    done = converted(case)
    model = reload.opened(done.sparse, device_map="meta")
    assert all(tensor.is_meta for tensor in model.parameters())
    assert model.state_dict().keys() == load(done.sparse).state_dict().keys()
    found = reload.described(done.sparse)
    found.popitem()
    fewer = mock.patch.object(reload, "described", lambda folder: found)
    with fewer, pytest.raises(SystemExit, match=r"missing_keys|mismatched_keys"):
        reload.opened(done.sparse, device_map="meta")


@pytest.mark.parametrize("case", CASES[:-1], ids=PAIRS[:-1])
def test_a_native_configuration_holds_the_dense_models_and_nothing_that_it_does_not_know(
    case: Case, converted
):
    """A field that the host does not know would be kept, and silently mean nothing."""
    done = converted(case)
    dense_config = tf.AutoConfig.from_pretrained(done.dense).to_dict()
    config = tf.AutoConfig.from_pretrained(done.sparse).to_dict()
    known = set(tf.AutoConfig.for_model(case.host).to_dict())
    ours = {"head_dim", "dtype", "_name_or_path", "sliding_window", "layer_types", "auto_map"}
    ours |= {EXPERT_WIDTHS, SHARED_WIDTHS, "partial_rotary_factor", "architectures"}
    assert config.keys() <= known | ours
    for name in dense_config.keys() - SPELLED_APART - NOT_KEPT:
        found, wanted = config[name], dense_config[name]
        if name == "rope_parameters":
            found, wanted = ({"partial_rotary_factor": 1.0} | r for r in (found, wanted))
        assert found == wanted, name


@pytest.mark.parametrize("case", CASES, ids=PAIRS)
def test_a_converted_model_keeps_generation_config_tokenizer_and_dtype(case: Case, converted):
    done = converted(case)
    before, after = (
        tf.GenerationConfig.from_pretrained(path).to_diff_dict()
        for path in (done.dense, done.sparse)
    )
    assert after == before and after["temperature"] == 0.6
    before, after = (tf.AutoTokenizer.from_pretrained(path) for path in (done.dense, done.sparse))
    assert after.chat_template == before.chat_template is not None
    assert after.special_tokens_map == before.special_tokens_map
    assert tf.AutoConfig.from_pretrained(done.sparse).dtype == torch.float32


@pytest.mark.parametrize("case", [CASES[18], CASES[-1]], ids=[PAIRS[18], PAIRS[-1]])
def test_a_bfloat16_model_keeps_the_balance_bias_in_float32(case: Case, tmp_path: Path):
    """Rounded, it would send tokens elsewhere."""
    done = convert(case, tmp_path, torch.bfloat16)
    stored = load_file(done.sparse / "model.safetensors")
    biases = {n: t for n, t in stored.items() if n.endswith(("correction_bias", "balance_bias"))}
    trained = {
        path.name: load_file(path / "layer.safetensors").get("router.balance_bias")
        for path in layer_folders(tmp_path).values()
    }
    trained = {name: bias for name, bias in trained.items() if bias is not None}
    assert len(biases) == len(trained) > 0
    for bias, expected in zip(biases.values(), trained.values(), strict=True):
        assert torch.equal(bias, expected) and not torch.equal(bias, bias.bfloat16().float())
    assert {t.dtype for t in stored.values()} == {torch.bfloat16, torch.float32}
    assert_equal_logits(load(done.sparse), done.in_memory)


def test_widths_that_differ_between_layers_are_padded_and_the_true_ones_recorded(converted):
    config = tf.AutoConfig.from_pretrained(converted(CASES[1]).sparse)
    assert config.intermediate_size == 24
    assert getattr(config, EXPERT_WIDTHS) == {"0": [24] * 6, "1": [16] * 6}
    config = tf.AutoConfig.from_pretrained(converted(CASES[7]).sparse)
    assert config.shared_intermediate_size == 32
    assert getattr(config, SHARED_WIDTHS) == {"0": 32, "1": 8}
    assert not hasattr(config, EXPERT_WIDTHS)


def test_a_shared_expert_that_is_weighed_by_half_is_stored_twice_as_large(converted):
    done = converted(CASES[15])
    stored = load_file(done.sparse / "model.safetensors")
    trained = load_file(done.sparse.parent / "layer_1" / "layer.safetensors")
    below = "model.layers.1.mlp.shared_expert"
    assert not stored[f"{below}_gate.weight"].any()
    wanted = 2 * trained["shared_expert.down_proj"]
    torch.testing.assert_close(stored[f"{below}.down_proj.weight"], wanted, rtol=0, atol=0)


@pytest.mark.parametrize("host", hosts.HOSTS.values(), ids=lambda host: host.name)
def test_one_expert_per_token_has_weight_one_in_every_host(host: hosts.Host):
    """Specialists are fitted so: the router then has no say in how much."""
    score, weigh = ROUTER_FUNCTIONS[host.router_function]
    scores = score(torch.randn(100, 6, generator=torch.Generator().manual_seed(0)))
    best = scores.gather(-1, scores.topk(1).indices)
    torch.testing.assert_close(weigh(best), torch.ones(100, 1), rtol=0, atol=0)


# Refusals


@pytest.mark.parametrize(
    ("host", "family", "changes", "why"),
    [
        ("mixtral", "Llama", BIASED, "its attention has no bias"),
        ("mixtral", "Llama", {"mlp_bias": True}, "its experts have no bias"),
        ("mixtral", "Qwen2", {}, "it holds llama, mistral, phi3, and this is qwen2"),
        ("mixtral", "GPT2", {}, "it holds llama, mistral, phi3, and this is gpt2"),
        ("mixtral", "Phi3", {"rope_parameters": LINEAR | {"rope_type": "default"}}, ""),
        (
            "mixtral",
            "Phi3",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "it rotates all of each head",
        ),
        ("granitemoe", "Mistral", WINDOW, "its attention has no sliding window"),
        ("glm4_moe", "Llama", BIASED, "its attention has no bias but on q, k, v"),
        ("qwen2_moe", "Llama", BIASED, "its attention has no bias but on q, k, v"),
        ("qwen3_moe", "Qwen3", LAST, "all its layers have one sliding window, or none"),
        ("glm4_moe", "Qwen3", LAST, "its attention has no sliding window"),
        ("flex_olmo", "Llama", {}, "it holds olmo2, and this is llama"),
    ],
)
def test_a_native_host_refuses_a_dense_model_and_says_why(
    host: str, family: str, changes: dict, why: str
):
    record = record_of(family, **changes)
    assert refusal(host, record, shapes_of(record)) == why


def test_longrope_is_refused():
    record = record_of("Phi3")
    record["config"]["rope_parameters"] = {"rope_type": "longrope"}
    assert refusal("mixtral", record, shapes_of(record)) == "longrope was not tried with it"


@pytest.mark.parametrize(
    ("host", "changes", "why"),
    [
        ("mixtral", {"gated": False}, "its experts are gated"),
        ("mixtral", {"activation": "quick_gelu"}, "activation function that transformers names"),
        ("mixtral", {"bias": True}, "its experts have no bias"),
        ("mixtral", {"routing": "expert_choice", "capacity_factor": 2.0}, "its tokens choose"),
        ("mixtral", {"router_width": 4}, "its router is one linear map"),
        ("mixtral", {"balance_bias": True}, "its router has no balance bias"),
        ("mixtral", {"d_ff_shared": 16}, "it has no shared expert"),
        ("granitemoe", {"d_ff_shared": 16}, "it has no shared expert"),
        ("glm4_moe", {"d_ff_shared": 24}, "24 is no multiple of 16"),
        ("glm4_moe", {"n_experts": 1, "top_k": 1}, "it has at least 2 experts"),
    ],
)
def test_a_native_host_refuses_experts_that_it_cannot_compute(host: str, changes: dict, why: str):
    record = record_of("Llama")
    assert why in refusal(host, record, shapes_of(record, **changes))


@pytest.mark.parametrize(
    ("host", "family", "sparse", "why"),
    [
        ("mixtral", "Llama", (1, 3), "layers [0, 2] would stay dense"),
        ("granitemoeshared", "Llama", (1, 2, 3), "layers [0] would stay dense"),
        ("qwen2_moe", "Llama", (1, 3), ""),
        ("glm4_moe", "Llama", (1, 2, 3), ""),
        ("glm4_moe", "Llama", (0, 2, 3), "only its first layers can stay dense, and layers [1]"),
    ],
)
def test_layers_left_dense_are_refused_by_name_where_the_host_has_none(
    host: str, family: str, sparse: tuple[int, ...], why: str
):
    record = record_of(family, num_hidden_layers=4)
    shapes = shapes_of(record)
    found = refusal(host, record, {k: shapes[k] for k in sparse})
    assert why in found and bool(why) == bool(found)


@pytest.mark.parametrize("changes", [{"n_experts": 4}, {"top_k": 1}])
def test_mixtral_refuses_layers_that_differ_in_more_than_width(changes: dict):
    record = record_of("Llama")
    shapes = shapes_of(record)
    shapes[1] = dataclasses.replace(shapes[1], **changes)
    assert "all its layers have one n_experts and top_k" in refusal("mixtral", record, shapes)


def test_mixtral_takes_equal_experts_out_of_dense_ffns_of_differing_widths():
    record = record_of("Llama")
    shapes = shapes_of(record)
    shapes[1] = dataclasses.replace(shapes[1], d_ff=128)
    assert refusal("mixtral", record, shapes) == ""


DYNAMIC = {0: (8, 16, 8, 24, 8, 8), 1: (16, 8, 8, 8, 8, 8)}


def dynamic_shapes(record: dict) -> dict[int, MoEShape]:
    shapes = shapes_of(record)
    return {
        k: dataclasses.replace(shapes[k], expert_widths=widths, d_ff_expert=max(widths))
        for k, widths in DYNAMIC.items()
    }


def test_mixtral_holds_experts_that_grew_padded_to_the_widest_of_all_layers():
    record = record_of("Llama")
    shapes = dynamic_shapes(record)
    assert refusal("mixtral", record, shapes) == ""
    stored = MIXTRAL.stored(shapes)
    assert [shape.d_ff_expert for shape in stored.values()] == [24, 24]
    assert {k: shape.widths for k, shape in stored.items()} == DYNAMIC
    fields = MIXTRAL.config(record, shapes)
    assert fields["intermediate_size"] == 24
    assert fields[EXPERT_WIDTHS] == {str(k): list(w) for k, w in DYNAMIC.items()}


def test_mixtral_pads_a_layer_that_never_changed_beside_one_that_did():
    record = record_of("Llama")
    shapes = dynamic_shapes(record) | {1: shapes_of(record)[1]}
    stored = MIXTRAL.stored(shapes)
    assert (stored[1].d_ff_expert, stored[1].widths) == (24, (16,) * 6)
    assert refusal("mixtral", record, shapes) == ""


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_config_names_the_activation_function_that_computes_the_same(activation: str):
    record = record_of("Llama")
    shapes = shapes_of(record, activation=activation)
    assert refusal("mixtral", record, shapes) == ""
    name = MIXTRAL.config(record, shapes)["hidden_act"]
    x = torch.linspace(-4, 4, 101)
    torch.testing.assert_close(ACT2FN[name](x), ACTIVATIONS[activation](x))


# Our own


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma2", "GPT2", "Phi"])
def test_custom_holds_any_family_and_whatever_mixtral_refuses(family: str):
    record = record_of(family)
    kinds = {"routing": "expert_choice", "capacity_factor": 2.0, "router_width": 4, "bias": True}
    shapes = shapes_of(record, **kinds, balance_bias=True, d_ff_shared=8)
    shapes[1] = dataclasses.replace(shapes[1], d_ff_expert=32, n_experts=4)
    assert refusal("custom", record, shapes) == ""
    assert refusal("custom", record, {1: shapes[1]}) == ""
    assert CUSTOM.stored(shapes) == shapes


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"config": {"auto_map": {"AutoModel": "x.X"}}}, "code of its own"),
        ({"config": {"is_encoder_decoder": True}}, "language models and text encoders"),
        ({"vocab_size": None}, "language models and text encoders"),
        (
            {"causal": False, "config": {"architectures": ["LlavaForConditionalGeneration"]}},
            "the head of LlavaForConditionalGeneration would be left out",
        ),
    ],
)
def test_custom_refuses_a_dense_model_that_it_cannot_build(changes: dict, why: str):
    record = record_of("Llama")
    assert why in refusal("custom", record | changes, shapes_of(record))


@pytest.mark.parametrize("named", ["BertModel", "BertForMaskedLM", "BertForPreTraining", None])
def test_custom_takes_an_encoder_by_whatever_name_it_has(named: str | None):
    record = record_of("Llama")
    config = {**record["config"], "architectures": named and [named]}
    assert refusal("custom", record | {"causal": False, "config": config}, shapes_of(record)) == ""


def test_a_decoder_without_a_head_is_held_by_our_own_host_alone(tmp_path: Path):
    config = tf.MistralConfig(**SMALL)
    for name, held in (("MistralModel", ["custom"]), ("MistralForSequenceClassification", [])):
        config.architectures = [name]
        config.save_pretrained(tmp_path)
        told = hosts.explain(dense.inspect(str(tmp_path)))
        assert [host for host, said in told.items() if said.startswith("yes")] == held
        assert "no head" in told["mixtral"]


def test_the_code_of_the_dense_models_folder_is_not_named_by_a_native_checkpoint():
    record = record_of("Llama")
    record["config"]["auto_map"] = {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    assert "auto_map" not in MIXTRAL.config(record, shapes_of(record))


def test_custom_config_records_the_dense_model_and_every_layer_under_its_path():
    record = record_of("GPT2")
    shapes = shapes_of(record, expert_widths=(8, 16) * 3)
    fields = CUSTOM.config(record, {1: shapes[1]})
    assert fields["sparse_layers"] == {"transformer.h.1.mlp": dataclasses.asdict(shapes[1])}
    assert fields["dense_config"]["model_type"] == "gpt2"
    lost = {k for k, v in record["config"].items() if fields["dense_config"].get(k, "lost") != v}
    assert lost <= {"transformers_version", "_name_or_path"}


# Choosing


@pytest.mark.parametrize(
    ("family", "dense", "layers", "host"),
    [
        ("Llama", {}, {}, "mixtral"),
        ("Llama", BIASED, {}, "granitemoe"),
        ("Llama", {}, SHARED, "granitemoeshared"),
        ("Llama", {}, BALANCED, "glm4_moe"),
        ("Llama", BIASED, BALANCED, "custom"),
        ("Llama", {"mlp_bias": True}, {}, "custom"),
        ("Mistral", WINDOW, {}, "mixtral"),
        ("Mistral", WINDOW, SHARED, "qwen2_moe"),
        ("Phi3", FULL, {}, "mixtral"),
        ("Qwen2", {}, {}, "qwen2_moe"),
        ("Qwen3", {}, {}, "qwen3_moe"),
        ("Qwen3", {}, SHARED, "glm4_moe"),
        ("Qwen3", LAST, {}, "dots1"),
        ("Olmo2", {}, {}, "flex_olmo"),
        ("Olmo2", {}, SHARED, "custom"),
        ("Granite", {}, {}, "granitemoe"),
        ("Gemma2", {}, {}, "custom"),
    ],
)
def test_auto_takes_what_can_hold_what_is_asked(family: str, dense: dict, layers: dict, host: str):
    record = record_of(family, **dense)
    chosen, reason = hosts.choose("auto", record, shapes_of(record, **layers))
    assert chosen.name == host and f"it can hold {family.lower()}" in reason
    for other in list(hosts.HOSTS)[: list(hosts.HOSTS).index(host)]:
        assert f"{other}: " in reason


def test_auto_leaves_layers_dense_in_a_host_that_has_such():
    record = record_of("Llama")
    host, reason = hosts.choose("auto", record, {1: shapes_of(record)[1]})
    assert host.name == "qwen2_moe" and "llama.cpp does not renormalise" in reason


def test_auto_pads_no_layer_to_the_width_of_another_where_our_own_can_do_without():
    record = record_of("Llama")
    shapes = shapes_of(record)
    shapes[1] = dataclasses.replace(shapes[1], d_ff_expert=32)
    host, reason = hosts.choose("auto", record, shapes)
    told = "one d_ff_expert: experts of 16 would be padded to 32 neurons"
    assert host is CUSTOM and f"mixtral: all its layers have {told}" in reason
    host, reason = hosts.choose("mixtral", record, shapes)
    assert host is MIXTRAL and reason == f"configured; all its layers have {told}"
    record["config"]["auto_map"] = {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    assert hosts.choose("auto", record, shapes)[0] is MIXTRAL


def test_choose_says_why_and_what_it_means():
    record = record_of("Llama")
    assert hosts.choose("auto", record, shapes_of(record))[1] == "it can hold llama"
    assert hosts.choose("mixtral", record, shapes_of(record))[1] == "configured"
    host, reason = hosts.choose("custom", record, shapes_of(record))
    assert host is CUSTOM and reason == f"configured; {hosts.REMOTE_CODE}"
    host, reason = hosts.choose("glm4_moe", record, shapes_of(record))
    assert reason == "configured; its router function is sigmoid"
    record = record_of("Gemma2")
    host, reason = hosts.choose("auto", record, shapes_of(record))
    assert f"no native one can: mixtral: {hosts.can_host(MIXTRAL, record, {})}" in reason
    assert hosts.REMOTE_CODE in reason


@pytest.mark.parametrize("name", ["auto", "custom"])
def test_choose_recommends_token_choice_where_experts_choose(name: str):
    record = record_of("Llama")
    experts = shapes_of(record, routing="expert_choice", capacity_factor=2.0)
    for shapes, told in ((experts, True), (shapes_of(record), False)):
        _, reason = hosts.choose(name, record, shapes)
        assert (hosts.EXPERT_CHOICE_CAUTION in reason) == told


@pytest.mark.parametrize("name", ["auto", "mixtral", "custom"])
def test_choose_refuses_with_the_reason_of_every_host(name: str):
    record = record_of("Gemma2")
    record["config"]["auto_map"] = {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    with pytest.raises(ConfigError) as refused:
        hosts.choose(name, record, shapes_of(record))
    for host in hosts.HOSTS:
        why = "code of its own" if host == "custom" else "and this is gemma2"
        told = f"{host}: " in str(refused.value) and why in str(refused.value)
        assert told == (name in ("auto", host))
    assert f"moe.host={name}" in str(refused.value)
    assert "convert another model" in str(refused.value) and "pipeline inspect" in str(
        refused.value
    )


@pytest.mark.parametrize(
    ("name", "layers", "offered"),
    [
        (
            "mixtral",
            {"d_ff_shared": 16},
            ["moe.host=granitemoeshared can as it is", "with moe.shared_expert=0 mixtral can"],
        ),
        (
            "granitemoe",
            {"router_width": 4, "balance_bias": True},
            [
                "moe.host=custom can as it is",
                "with moe.balance_bias=false and moe.router=linear granitemoe can",
            ],
        ),
        (
            "mixtral",
            {"bias": True},
            ["moe.host=custom can as it is", "with moe.mean_compensation=false mixtral can"],
        ),
        (
            "mixtral",
            {"routing": "expert_choice", "capacity_factor": 2.0},
            ["moe.host=custom can as it is", "with moe.routing=token_choice mixtral can"],
        ),
    ],
)
def test_choose_refuses_with_the_nearest_that_would_work(
    name: str, layers: dict, offered: list[str]
):
    record = record_of("Llama")
    with pytest.raises(ConfigError) as refused:
        hosts.choose(name, record, shapes_of(record, **layers))
    assert refused.value.remedy.split("; ")[: len(offered)] == offered


def test_choose_offers_to_convert_all_layers_and_all_alike():
    record = record_of("Llama")
    shapes = shapes_of(record)
    with pytest.raises(ConfigError, match=r"with all layers in model\.layers mixtral can"):
        hosts.choose("mixtral", record, {1: shapes[1]})
    shapes[1] = dataclasses.replace(shapes[1], top_k=1)
    with pytest.raises(ConfigError, match=r"with layers alike \(moe\.per_layer.*\) mixtral can"):
        hosts.choose("mixtral", record, shapes)


def test_explain_answers_for_every_host():
    answers = hosts.explain(record_of("Llama"))
    assert list(answers) == list(hosts.HOSTS)
    assert answers["mixtral"] == "yes" and answers["custom"] == f"yes; {hosts.REMOTE_CODE}"
    assert answers["glm4_moe"] == "yes; its router function is sigmoid"
    assert answers["flex_olmo"] == "it holds olmo2, and this is llama"
    assert answers["qwen2_moe"].startswith("yes; llama.cpp")
    answers = hosts.explain(record_of("Llama", **BIASED))
    assert answers["mixtral"] == "its attention has no bias"
    assert answers["granitemoeshared"] == "yes; vLLM reads no attention bias in it"


# The table


@pytest.mark.parametrize("host", hosts.HOSTS.values(), ids=lambda host: host.name)
def test_every_host_has_a_router_function_and_an_enum_member(host: hosts.Host):
    from pipeline.config import Host

    assert host.router_function in ROUTER_FUNCTIONS
    assert hosts.HOSTS[host.name] is host
    assert set(hosts.HOSTS) | {"auto"} == {member.name for member in Host}


def test_hosts_import_neither_torch_nor_transformers():
    code = "import sys, pipeline.hosts; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
