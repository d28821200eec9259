"""An FFN is found by structure and proved by numbers, or the model is refused with what was seen.

Which families are found is in `tests/test_families.py`.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from accelerate import cpu_offload
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline import dense, places, speed
from pipeline.activations import record_ffn
from pipeline.assembly import replace_ffns, shared_copy
from pipeline.capture import capture_activations
from pipeline.comparison import compare_on_text
from pipeline.config import CaptureConfig, Codec, Dtype
from pipeline.discovery import find_ffns
from pipeline.embeddings import embed
from pipeline.errors import InputError, ResourceError
from pipeline.evaluation import replaced
from pipeline.ffn import DenseFFN
from pipeline.moe import SparseMoE
from pipeline.shape import MoEShape
from pipeline.store import LayerReader
from pipeline.windows import forward_behind

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "activation_function": "gelu"}
CAPTURE = CaptureConfig(
    dtype=Dtype.float32, codec=Codec.none, shard_mb=1, chunk_mb=1, batch_size=2, heldout_tokens=8
)
IDS = torch.arange(3, 19)[None]


def tiny(family: str, **changes: Any) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(tf, f"{family}Config")(**SMALL | {"intermediate_size": 48} | changes)
    return tf.AutoModelForCausalLM.from_config(config).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        return model(IDS).logits


class Formula(nn.Module):
    """The extracted weights, run by our formula."""

    def __init__(self, ffn: DenseFFN) -> None:
        super().__init__()
        self.ffn = ffn

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(x)


# Made by hand


class Chain(nn.Module):
    """A layer whose FFN is no module of its own."""

    def __init__(self, d: int = 8, f: int = 12) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(d), nn.GELU()
        self.fc1, self.fc2 = nn.Linear(d, f), nn.Linear(f, d)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(self.norm(x))))


class Whole(nn.Module):
    """A layer with an FFN as a module."""

    def __init__(self, d: int = 8, f: int = 12) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(d, f), nn.ReLU(), nn.Linear(f, d))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Macaron(nn.Module):
    """A layer with two FFNs."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn1, self.ffn2 = Whole().mlp, Whole().mlp

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn2(x + self.ffn1(x))


class Stack(nn.Module):
    """A model of such layers."""

    def __init__(self, *layers: nn.Module, **stacks: nn.Module) -> None:
        super().__init__()
        self.config = tf.PreTrainedConfig()
        if layers:
            self.layers = nn.ModuleList(layers)
        for name, stack in stacks.items():
            self.add_module(name, stack)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class NoModule(Chain):
    """Its activation function is no module."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


class UsedTwice(Chain):
    """Its activation module works elsewhere too: taken away, the layer computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class NormWithin(Chain):
    """A norm stands between the activation and the second projection."""

    def __init__(self) -> None:
        super().__init__()
        self.within = nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.within(self.act(self.fc1(x))))


class Learned(Whole):
    """Its activation function has a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp[1] = nn.PReLU()


class Repeated(Chain):
    """Its second projection runs twice."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.fc1(x))
        return self.fc2(hidden) + self.fc2(hidden.neg())


class Unwired(Chain):
    """Has the projections, and never runs one into the other."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(x)).flip(-1))


@pytest.mark.parametrize(
    "layer", [NoModule, UsedTwice, NormWithin, Learned, Repeated, Unwired], ids=lambda c: c.__name__
)
def test_what_cannot_be_proved_is_refused_with_what_was_seen(layer: type[nn.Module]):
    with pytest.raises(InputError) as refusal:
        find_ffns(Stack(layer(), layer()))
    assert refusal.value.exit_code == 3
    assert layer.__name__ in refusal.value.what and "8 -> 12" in str(refusal.value.value)
    assert "12 -> 8" in str(refusal.value.value) and "CONTRIBUTING.md" in refusal.value.remedy


@pytest.mark.parametrize("layer", [Chain, Whole, Macaron])
@torch.inference_mode()
def test_an_ffn_is_found_where_it_is_and_its_formula_takes_its_place(layer: type[nn.Module]):
    model, x = Stack(layer(), layer()), torch.randn(3, 8)
    expected = {Chain: ["fc2"], Whole: ["mlp"], Macaron: ["ffn1", "ffn2"]}[layer]
    slots, before = find_ffns(model), model(x)
    paths = [f"layers.{k}.{name}" for k in (0, 1) for name in expected]
    assert [slot.path for slot in slots] == paths
    assert [slot.index for slot in slots] == [*range(len(paths))]
    for slot in slots:
        slot.replace(Formula(slot.weights()))
    torch.testing.assert_close(model(x), before)


def test_an_ffn_narrower_than_the_model_is_found():
    for layer in (Chain(8, 5), Whole(8, 5)):
        (slot,) = find_ffns(Stack(layer))
        assert (slot.d_model, slot.d_ff) == (8, 5)


def test_the_widest_pair_of_projections_is_meant():
    """A layer may hold others, as Gemma 3n does beside its FFN; a smaller one is never taken."""
    layer = Whole()
    layer.adapter = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8))
    assert [slot.path for slot in find_ffns(Stack(layer))] == ["layers.0.mlp"]
    layer.mlp[1] = nn.PReLU()
    with pytest.raises(InputError):
        find_ffns(Stack(layer))


def test_layers_in_a_sequence_are_found():
    model = Stack(blocks=nn.Sequential(Whole(), Chain()))
    assert [slot.path for slot in find_ffns(model)] == ["blocks.0.mlp", "blocks.1.fc2"]


def test_an_encoders_ffns_come_before_a_decoders_and_may_differ_in_width():
    stacks = {"decoder": nn.ModuleList([Whole(8, 12)]), "encoder": nn.ModuleList([Chain(4, 6)])}
    slots = find_ffns(Stack(**stacks))
    assert [(s.index, s.path) for s in slots] == [(0, "encoder.0.fc2"), (1, "decoder.0.mlp")]
    assert [(s.d_model, s.d_ff) for s in slots] == [(4, 6), (8, 12)]


def test_one_layer_in_two_places_is_refused():
    layer = Whole()
    with pytest.raises(InputError, match="share"):
        find_ffns(Stack(layer, layer))


def test_experts_in_a_list_are_not_taken_for_ffns():
    layer = Whole()
    layer.mlp = nn.ModuleDict({"experts": nn.ModuleList([Whole().mlp, Whole().mlp])})
    with pytest.raises(InputError, match="already sparse"):
        find_ffns(Stack(layer))


def test_a_layer_without_an_ffn_among_others_is_refused_by_its_class():
    with pytest.raises(InputError, match="No dense FFN was found in Linear"):
        find_ffns(Stack(Whole(), nn.Linear(8, 8), Whole()))


def test_a_fused_projection_may_hold_up_before_gate_with_biases():
    module, x = nn.Module(), torch.randn(5, 4)
    module.both, module.down = nn.Linear(4, 12), nn.Linear(6, 4)
    up, gate = module.both(x).chunk(2, -1)
    formula = places.Formula("both", "down", "both", "silu", fused=True, gate_first=False)
    torch.testing.assert_close(places.ffn_of(module, formula)(x), module.down(F.silu(gate) * up))


# Of transformers


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("Mixtral", {}, "MixtralDecoderLayer.*already sparse"),
        ("Qwen2Moe", {}, "Qwen2MoeDecoderLayer.*already sparse"),
        ("DeepseekV3", {"first_k_dense_replace": 1}, "DeepseekV3DecoderLayer.*already sparse"),
        ("Mamba", {}, "MambaBlock.*mixer.in_proj"),
        ("Apertus", {}, "ApertusDecoderLayer.*mlp.up_proj': '32 -> 48'"),
        ("Albert", {}, "AlbertLayer.*2 layers share 1"),
    ],
)
def test_what_has_no_dense_ffn_of_its_own_is_refused(family: str, changes: dict, named: str):
    config = getattr(tf, f"{family}Config")(**SMALL | {"intermediate_size": 48} | changes)
    with torch.device("meta"):
        model = tf.AutoModel.from_config(config)
    with pytest.raises(InputError, match=f"(?s){named}") as refusal:
        find_ffns(model)
    assert refusal.value.exit_code == 3 and "model.id" in refusal.value.remedy


@pytest.mark.parametrize(("width", "depth"), [(16, 3), (32, 2)])
def test_of_a_multimodal_model_the_text_models_ffns_are_found(width: int, depth: int):
    text = tf.LlamaConfig(**SMALL | {"intermediate_size": 48, "num_hidden_layers": 3})
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "intermediate_size": 24}
    vision = tf.CLIPVisionConfig(**sizes, num_attention_heads=2)
    with torch.device("meta"):
        model = tf.AutoModel.from_config(tf.LlavaConfig(text_config=text, vision_config=vision))
    slots = find_ffns(model)
    assert [slot.path for slot in slots] == [f"language_model.layers.{k}.mlp" for k in range(3)]


@torch.inference_mode()
def test_a_chain_is_replaced_as_one_recorded_as_one_and_put_back():
    model = tiny("OPT", **OPT)
    slot, before = find_ffns(model)[1], logits(model)
    layer = model.model.decoder.layers[1]
    modules = (layer.fc1, layer.activation_fn, layer.fc2)
    with record_ffn({1: slot}) as recorded:
        logits(model)
    x, y = recorded[1]
    ffn = slot.weights()
    zero = nn.Linear(32, 32)
    zero.weight.zero_(), zero.bias.zero_()
    slot.replace(zero)
    assert type(layer.fc1) is type(layer.activation_fn) is nn.Identity and layer.fc2 is zero
    with record_ffn({1: slot}) as again:
        assert not torch.equal(logits(model), before)
    assert torch.equal(again[1][0], x) and not again[1][1].any()
    torch.testing.assert_close(ffn(x), y)
    slot.replace(modules[2])
    assert (layer.fc1, layer.activation_fn, layer.fc2) == modules
    assert torch.equal(logits(model), before)


@torch.inference_mode()
def test_layers_take_a_chains_place_in_a_copy_and_leave_the_model_alone():
    model = tiny("OPT", **OPT)
    before, kept = logits(model), model.model.decoder.layers[1].fc1
    shape = MoEShape(32, 48, 16, 2, 1, "gelu", False, True, "softmax_topk")
    moe = SparseMoE(shape).eval()
    for parameter in moe.parameters():
        parameter.normal_()
    copied = shared_copy(model)
    assert replace_ffns(copied, {1: moe}) == {1: "model.decoder.layers.1.fc2"}
    sparse = logits(copied)
    assert (sparse - before).abs().max() > 1e-3
    assert torch.equal(logits(replaced(model, {1: moe})), sparse)
    assert torch.equal(logits(model), before) and model.model.decoder.layers[1].fc1 is kept


def test_what_is_recorded_stays_when_the_model_changes_its_states_in_place():
    class InPlace(Whole):
        def forward(self, x: Tensor) -> Tensor:
            y = self.mlp(x)
            y += x
            x.zero_()
            return y

    model = Stack(InPlace())
    (slot,), x = find_ffns(model), torch.randn(3, 8)
    kept = x.clone()
    with torch.inference_mode(), record_ffn({0: slot}) as recorded:
        model(x)
    assert torch.equal(recorded[0][0], kept)
    torch.testing.assert_close(recorded[0][1], slot.weights()(kept))


def test_a_chain_is_captured_with_its_ffn(tmp_path: Path):
    blocks = {"train": torch.randint(64, (4, 8)), "validation": torch.randint(64, (1, 8))}
    capture_activations(tiny("OPT", **OPT), blocks, tmp_path, cfg=CAPTURE)
    for k in range(2):
        ffn = DenseFFN.load(tmp_path / f"ffn_{k}.safetensors")
        x, y = LayerReader(tmp_path / f"layer_{k}.zarr").read("train")
        assert (ffn.d_ff, x.shape) == (48, (32, 32)) and y.std() > 0
        torch.testing.assert_close(ffn(x), y, rtol=1e-5, atol=1e-6)


# Spread by a device_map


def offloaded(*layers: int) -> tf.PreTrainedModel:
    """Accelerate keeps the weights of these layers and lends them to each pass."""
    model = tiny("Llama")
    for k in layers:
        cpu_offload(model.model.layers[k], "cpu")
    return model


def hooks(model: nn.Module) -> list[int]:
    return [id(module._hf_hook) for module in model.modules() if hasattr(module, "_hf_hook")]


def test_ffns_of_offloaded_layers_are_found_and_the_model_keeps_its_hooks():
    wanted, model = logits(tiny("Llama")), offloaded(0, 1)
    before = hooks(model)
    slots = find_ffns(model)
    assert [slot.path for slot in slots] == [f"model.layers.{k}.mlp" for k in (0, 1)]
    assert {slot.formula.activation for slot in slots} == {"silu"}
    assert hooks(model) == before and before
    assert all(p.is_meta for p in model.model.layers.parameters())
    assert torch.equal(logits(model), wanted)


def test_an_ffn_is_proved_on_weights_of_its_own_wherever_the_models_lie():
    """Nothing is fetched, and no hook sends the trial's input to the layer's device."""

    class Guarded(dict):
        def __getitem__(self, name: str) -> Tensor:
            raise AssertionError(f"{name} was fetched")

    model, x = offloaded(0, 1), torch.randn(1, 2, 32)
    hooked = [m._hf_hook for m in model.model.layers.modules() if hasattr(m, "_hf_hook")]
    for hook in hooked:
        for each in getattr(hook, "hooks", [hook]):
            each.execution_device = torch.device("meta")  # for one that is not here
            each.weights_map = Guarded()
    with pytest.raises(AssertionError, match="was fetched"):
        model.model.layers[0].mlp(x)
    assert len(find_ffns(model)) == 2


def test_what_needs_the_weights_of_an_offloaded_layer_is_refused_by_its_name(tmp_path: Path):
    model, moe = offloaded(1), SparseMoE(MoEShape(32, 48, 16, 2, 1, "silu", True, False, "softmax"))
    blocks = {"train": torch.randint(64, (4, 8)), "validation": torch.randint(64, (1, 8))}
    for needing in (
        lambda: capture_activations(model, blocks, tmp_path / "all", cfg=CAPTURE),
        lambda: replaced(model, {0: moe, 1: moe}),
        lambda: replace_ffns(model, {1: moe}),
        lambda: forward_behind(model, {1: moe}, blocks["validation"]),
    ):
        with pytest.raises(ResourceError, match=r"layer 1, model\.layers\.1\.mlp") as refusal:
            needing()
        assert "device_map offloaded it" in str(refusal.value.value)
        assert "model.device_map=null" in refusal.value.remedy
    assert not any((tmp_path / "all").iterdir())
    replaced(model, {0: moe})
    capture_activations(model, blocks, tmp_path / "first", cfg=CAPTURE, layers=[0])
    assert LayerReader(tmp_path / "first" / "layer_0.zarr").rows["train"] == 32


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
    slots, before = find_ffns(dense_model), logits(dense_model)
    assert tuple(slot.d_ff for slot in slots) == widths
    assert {slot.d_model for slot in slots} == {32}
    described = dense.describe(dense_model)["layers"]
    assert [(f["d_ff"], f["activation"]) for f in described] == [(w, activation) for w in widths]
    for slot in slots:
        slot.replace(Formula(slot.weights()))
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
            assert find_ffns(model)[0].formula.activation == name, width


def test_layers_of_one_shape_that_compute_otherwise_are_each_proved():
    model = tiny("Llama", num_hidden_layers=3)
    model.model.layers[1].mlp.act_fn = nn.ReLU()
    found = [slot.formula.activation for slot in find_ffns(model)]
    assert found == ["silu", "relu", "silu"]
    with pytest.raises(InputError, match="no known formula"):  # its layer 1 keeps a few neurons
        pattern = {"activation_sparsity_pattern": [0.0, 0.5, 0.0]}
        find_ffns(width_of_each(intermediate_size=[48] * 3, **pattern))


def test_a_slot_has_the_dtype_of_its_weights():
    model = tiny("Llama")
    model.model.layers[1].mlp.bfloat16()
    assert [slot.dtype for slot in find_ffns(model)] == [torch.float32, torch.bfloat16]


def test_a_model_whose_embedding_is_offloaded_is_captured_and_compared(tmp_path: Path):
    """Its first parameter lies nowhere: token ids go to the CPU, and a hook takes them on."""
    plain, model = tiny("Llama"), tiny("Llama")
    cpu_offload(model.model.embed_tokens, "cpu")
    assert next(model.parameters()).is_meta
    blocks = {"train": torch.randint(64, (4, 8)), "validation": torch.randint(64, (1, 8))}
    for one, name in ((plain, "plain"), (model, "spread")):
        capture_activations(one, blocks, tmp_path / name, cfg=CAPTURE, layers=[0])
    both = [LayerReader(tmp_path / name / "layer_0.zarr") for name in ("plain", "spread")]
    assert torch.equal(*(torch.as_tensor(one.read("train", 0, 32)[0]) for one in both))
    loss = compare_on_text(plain, model, blocks["train"], 64, batch_size=2)
    assert loss.perplexity[0] == loss.perplexity[1] and loss.top1_agreement == 1
    assert torch.equal(
        embed(plain.model, blocks["train"], 2), embed(model.model, blocks["train"], 2)
    )
    assert speed.compare(plain, model, blocks["train"])["device"] == "cpu"
