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

MIXTRAL, OWN = hosts.HOSTS["mixtral"], hosts.HOSTS["sparse_distilled"]
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
            **{k: v for k, v in ffn.items() if k not in ("index", "path")} | sizes | kinds | changes
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
        ({"routing": "expert_choice", "capacity_factor": 2.0}, "its tokens choose their experts"),
        ({"router_width": 4}, "its router is one linear map"),
        ({"balance_bias": True}, "its router has no balance bias"),
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


DYNAMIC = {0: (8, 16, 8, 24, 8, 8, 8, 8), 1: (16, 8, 8, 8, 8, 8, 8, 8)}


def dynamic_shapes(record: dict) -> dict[int, MoEShape]:
    shapes = shapes_of(record)
    return {
        k: dataclasses.replace(shapes[k], expert_widths=widths, d_ff_expert=max(widths))
        for k, widths in DYNAMIC.items()
    }


def test_mixtral_holds_experts_that_grew_padded_to_the_widest_of_all_layers():
    record = record_of("Llama")
    shapes = dynamic_shapes(record)
    assert hosts.can_host(MIXTRAL, record, shapes) is None
    stored = MIXTRAL.store(shapes)
    assert [shape.d_ff_expert for shape in stored.values()] == [24, 24]
    assert {k: shape.widths for k, shape in stored.items()} == DYNAMIC
    fields = MIXTRAL.config(record, stored)
    assert fields["intermediate_size"] == 24
    assert fields[hosts.EXPERT_WIDTHS] == {str(k): list(w) for k, w in DYNAMIC.items()}


def test_mixtral_pads_a_layer_that_never_changed_beside_one_that_did():
    record = record_of("Llama")
    shapes = dynamic_shapes(record) | {1: shapes_of(record)[1]}
    stored = MIXTRAL.store(shapes)
    assert (stored[1].d_ff_expert, stored[1].widths) == (24, (16,) * 8)
    assert hosts.can_host(MIXTRAL, record, shapes) is None


def test_mixtral_refuses_layers_that_differ_otherwise_where_experts_grew():
    record = record_of("Llama")
    shapes = dynamic_shapes(record)
    shapes[1] = dataclasses.replace(shapes[1], top_k=1)
    assert "one d_ff_expert" in (hosts.can_host(MIXTRAL, record, shapes) or "")


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma2", "GPT2", "Phi"])
def test_own_host_holds_any_family_and_whatever_mixtral_refuses(family: str):
    record = record_of(family)
    kinds = {"routing": "expert_choice", "capacity_factor": 2.0, "router_width": 4, "bias": True}
    shapes = shapes_of(record, **kinds, balance_bias=True)
    shapes[1] = dataclasses.replace(shapes[1], d_ff_expert=32, n_experts=4)
    assert hosts.can_host(OWN, record, shapes) is None
    assert hosts.can_host(OWN, record, {1: shapes[1]}) is None
    assert OWN.store(shapes) == shapes


def test_own_host_refuses_a_dense_model_with_code_of_its_own():
    record = record_of("Llama")
    record["config"]["auto_map"] = {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    assert "code of its own" in (hosts.can_host(OWN, record, shapes_of(record)) or "")


def test_own_config_records_the_dense_model_and_every_layer_under_its_path():
    record = record_of("GPT2")
    shapes = shapes_of(record, expert_widths=(8, 16) * 4)
    fields = OWN.config(record, {1: shapes[1]})
    assert fields["sparse_layers"] == {"transformer.h.1.mlp": dataclasses.asdict(shapes[1])}
    assert fields["dense_config"]["model_type"] == "gpt2"
    lost = {k for k, v in record["config"].items() if fields["dense_config"].get(k, "lost") != v}
    assert lost <= {"transformers_version", "_name_or_path"}


def test_choose_auto_takes_the_first_that_can_and_says_why():
    record = record_of("Llama")
    host, reason = hosts.choose("auto", record, shapes_of(record))
    assert (host.name, reason) == ("mixtral", "it can hold llama")


def test_choose_by_name_says_that_it_was_configured():
    record = record_of("Mistral")
    host, reason = hosts.choose("mixtral", record, shapes_of(record))
    assert (host.name, reason) == ("mixtral", "configured")


def test_choose_auto_takes_our_own_where_no_native_one_can_and_says_what_that_means():
    record = record_of("Qwen2")
    host, reason = hosts.choose("auto", record, shapes_of(record))
    assert host is OWN
    assert "mixtral: it holds llama, mistral, and this is qwen2" in reason
    assert "trust_remote_code=True" in reason


def test_choose_our_own_by_name_says_what_that_means():
    record = record_of("Llama")
    host, reason = hosts.choose("sparse_distilled", record, shapes_of(record))
    assert host is OWN and reason.startswith("configured; ")
    assert "trust_remote_code=True" in reason and "no native one" not in reason


@pytest.mark.parametrize("name", ["auto", "sparse_distilled"])
def test_choose_recommends_token_choice_where_experts_choose(name: str):
    record = record_of("Llama")
    experts = shapes_of(record, routing="expert_choice", capacity_factor=2.0)
    for shapes, told in ((experts, True), (shapes_of(record), False)):
        _, reason = hosts.choose(name, record, shapes)
        assert (hosts.EXPERT_CHOICE_CAUTION in reason) == told


@pytest.mark.parametrize("name", ["auto", "mixtral", "sparse_distilled"])
def test_choose_refuses_with_the_reason_of_every_host(name: str):
    record = record_of("Qwen2")
    record["config"]["auto_map"] = {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    with pytest.raises(ConfigError) as refusal:
        hosts.choose(name, record, shapes_of(record))
    for host, why in (("mixtral", "and this is qwen2"), ("sparse_distilled", "code of its own")):
        assert (why in str(refusal.value)) == (name in ("auto", host))
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
    answers = hosts.explain(record_of(family, **changes))
    assert answers == {"mixtral": answer, "sparse_distilled": f"yes; {hosts.REMOTE_CODE}"}


def hosted(host: hosts.Host, record: dict, shapes: dict[int, MoEShape]) -> tf.PreTrainedModel:
    config = tf.AutoConfig.for_model(host.name, **host.config(record, shapes))
    with torch.device("meta"):
        return tf.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("host", "family"), [(MIXTRAL, "Llama"), (MIXTRAL, "Mistral"), (OWN, "Llama"), (OWN, "GPT2")]
)
def test_rename_gives_every_parameter_of_a_layer_its_place_in_the_host(
    host: hosts.Host, family: str
):
    record = record_of(family)
    shapes = shapes_of(record)
    places = {name: tuple(t.shape) for name, t in hosted(host, record, shapes).state_dict().items()}
    for layer, shape in shapes.items():
        path = record["layers"][layer]["path"]
        for name, tensor in SparseMoE(shape).state_dict().items():
            assert places.pop(hosts.rename(host, layer, path, name)) == tuple(tensor.shape)
    assert not any(".mlp." in name for name in places)
    assert all(name.startswith(host.prefix) for name in places)


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_mixtral_config_drops_only_what_mixtral_lacks(family: str):
    """A field that Mixtral does not know would be kept, and silently mean nothing."""
    record = record_of(family)
    fields = MIXTRAL.config(record, shapes_of(record))
    assert fields.keys() <= tf.MixtralConfig().to_dict().keys()
    assert record["config"].keys() - fields.keys() <= hosts.MIXTRAL_LACKS | hosts.NOT_KEPT
    changed = {
        k for k in record["config"].keys() & fields.keys() if fields[k] != record["config"][k]
    }
    assert changed == {"intermediate_size"}


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_config_names_the_activation_function_that_computes_the_same(activation: str):
    record = record_of("Llama")
    shapes = shapes_of(record, activation=activation)
    assert hosts.can_host(MIXTRAL, record, shapes) is None
    name = MIXTRAL.config(record, shapes)["hidden_act"]
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
