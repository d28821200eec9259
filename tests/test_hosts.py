"""Which architecture holds which conversion: every refusal is explained, every tensor is placed."""

import dataclasses
import subprocess
import sys

import pytest
import torch
import transformers as tf
from transformers.activations import ACT2FN

from pipeline import dense, hosts
from pipeline.errors import ConfigError
from pipeline.ffn import ACTIVATIONS
from pipeline.moe import SparseMoE
from pipeline.router import ROUTER_FUNCTIONS
from pipeline.shape import MoEShape

MIXTRAL = hosts.HOSTS["mixtral"]
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def record_of(family: str, **changes) -> dict:
    config = getattr(tf, f"{family}Config")(**SMALL | {"intermediate_size": 64} | changes)
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(config)
    return dense.describe(model)


def shapes_of(record: dict, d_ff_expert: int = 16, **changes) -> dict[int, MoEShape]:
    sizes = {"d_ff_expert": d_ff_expert, "n_experts": 8, "top_k": 2, "d_model": record["d_model"]}
    kinds = {"router_function": MIXTRAL.router_function}
    return {
        ffn["index"]: MoEShape(
            **{k: v for k, v in ffn.items() if k != "index"} | sizes | kinds | changes
        )
        for ffn in record["layers"]
    }


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_mixtral_holds_a_whole_conversion_of(family: str):
    record = record_of(family)
    assert hosts.can_host(MIXTRAL, record, shapes_of(record)) is None


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("Llama", {"attention_bias": True}, "its attention has no bias"),
        ("Llama", {"mlp_bias": True}, "its experts have no bias"),
        ("Qwen2", {}, "it holds llama, mistral, and this is qwen2"),
        ("Qwen3", {}, "it holds llama, mistral, and this is qwen3"),
        ("GPT2", {}, "it holds llama, mistral, and this is gpt2"),
    ],
)
def test_mixtral_refuses_a_dense_model_and_says_why(family: str, changes: dict, why: str):
    record = record_of(family, **changes)
    assert hosts.can_host(MIXTRAL, record, shapes_of(record)) == why


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"gated": False}, "its experts are gated"),
        ({"activation": "quick_gelu"}, "activation function that transformers names"),
        ({"bias": True}, "its experts have no bias"),
    ],
)
def test_mixtral_refuses_experts_that_it_cannot_compute(changes: dict, why: str):
    record = record_of("Llama")
    assert why in (hosts.can_host(MIXTRAL, record, shapes_of(record, **changes)) or "")


def test_mixtral_refuses_layers_left_dense_and_names_them():
    record = record_of("Llama", num_hidden_layers=4)
    shapes = shapes_of(record)
    left = {k: shapes[k] for k in (1, 3)}
    assert "layers [0, 2] would stay dense" in (hosts.can_host(MIXTRAL, record, left) or "")


@pytest.mark.parametrize("changes", [{"d_ff_expert": 32}, {"n_experts": 4}, {"top_k": 1}])
def test_mixtral_refuses_layers_of_differing_shapes(changes: dict):
    record = record_of("Llama")
    shapes = shapes_of(record)
    shapes[1] = dataclasses.replace(shapes[1], **changes)
    refusal = hosts.can_host(MIXTRAL, record, shapes)
    assert refusal == "all its layers have one d_ff_expert, n_experts and top_k"


def test_mixtral_takes_equal_experts_out_of_dense_ffns_of_differing_widths():
    record = record_of("Llama")
    shapes = shapes_of(record)
    shapes[1] = dataclasses.replace(shapes[1], d_ff=128)
    assert hosts.can_host(MIXTRAL, record, shapes) is None


def test_choose_auto_takes_the_first_that_can_and_says_why():
    record = record_of("Llama")
    host, reason = hosts.choose("auto", record, shapes_of(record))
    assert (host.name, reason) == ("mixtral", "it can hold llama")


def test_choose_by_name_says_that_it_was_configured():
    record = record_of("Mistral")
    host, reason = hosts.choose("mixtral", record, shapes_of(record))
    assert (host.name, reason) == ("mixtral", "configured")


@pytest.mark.parametrize("name", ["auto", "mixtral"])
def test_choose_refuses_with_the_reason_of_every_host(name: str):
    record = record_of("Qwen2")
    with pytest.raises(ConfigError) as refusal:
        hosts.choose(name, record, shapes_of(record))
    for host in hosts.HOSTS:
        assert f"{host}: it holds llama, mistral, and this is qwen2" in str(refusal.value)
    assert f"moe.host={name}" in str(refusal.value) and "pipeline inspect" in str(refusal.value)


@pytest.mark.parametrize(
    ("family", "changes", "answer"),
    [
        ("Llama", {}, "yes"),
        ("Mistral", {}, "yes"),
        ("Llama", {"attention_bias": True}, "its attention has no bias"),
        ("Llama", {"mlp_bias": True}, "its experts have no bias"),
        ("GPT2", {}, "it holds llama, mistral, and this is gpt2"),
    ],
)
def test_explain_answers_for_every_host(family: str, changes: dict, answer: str):
    assert hosts.explain(record_of(family, **changes)) == {"mixtral": answer}


def hosted(record: dict, shapes: dict[int, MoEShape]) -> tf.PreTrainedModel:
    config = tf.AutoConfig.for_model("mixtral", **hosts.config_fields(MIXTRAL, record, shapes))
    with torch.device("meta"):
        return tf.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_rename_gives_every_parameter_of_a_layer_its_place_in_the_host(family: str):
    record = record_of(family)
    shapes = shapes_of(record)
    places = {name: tuple(t.shape) for name, t in hosted(record, shapes).state_dict().items()}
    for layer, shape in shapes.items():
        for name, tensor in SparseMoE(shape).state_dict().items():
            assert places.pop(hosts.rename(MIXTRAL, layer, name)) == tuple(tensor.shape)
    assert not any(".mlp." in name for name in places)


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_config_fields_drop_only_what_the_host_declares(family: str):
    """A field that Mixtral does not know would be kept, and silently mean nothing."""
    record = record_of(family)
    shapes = shapes_of(record)
    fields = hosts.config_fields(MIXTRAL, record, shapes)
    assert fields.keys() <= tf.MixtralConfig().to_dict().keys()
    assert record["config"].keys() - fields.keys() <= MIXTRAL.dropped | hosts.NOT_KEPT
    changed = {
        k for k in record["config"].keys() & fields.keys() if fields[k] != record["config"][k]
    }
    assert changed == {"intermediate_size"}


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_config_names_the_activation_function_that_computes_the_same(activation: str):
    record = record_of("Llama")
    shapes = shapes_of(record, activation=activation)
    assert hosts.can_host(MIXTRAL, record, shapes) is None
    name = hosts.config_fields(MIXTRAL, record, shapes)["hidden_act"]
    x = torch.linspace(-4, 4, 101)
    torch.testing.assert_close(ACT2FN[name](x), ACTIVATIONS[activation](x))


@pytest.mark.parametrize("host", hosts.HOSTS.values(), ids=lambda host: host.name)
def test_every_host_has_a_router_function_and_an_enum_member(host: hosts.Host):
    from pipeline.config import Host

    assert host.router_function in ROUTER_FUNCTIONS
    assert hosts.HOSTS[host.name] is host and host.name in Host.__members__


def test_hosts_import_neither_torch_nor_transformers():
    code = "import sys, pipeline.hosts; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
