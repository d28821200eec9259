"""Every dense family: its FFNs are where we say, and a sparse layer can take their place.

Tiny random models, built from their configurations. **Adding a family is one row of a table.** If
its FFNs are not found, the refusal says what was seen, and `pipeline/places.py` what is looked
for.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor, nn

from pipeline import dense, hosts
from pipeline.activations import record_ffn
from pipeline.checkpoint import assemble
from pipeline.discovery import FFNSlot, find_ffns
from pipeline.experts import start_experts
from pipeline.layers import save_layer
from pipeline.modeling.modeling_sparse_distilled import (
    SparseDistilledConfig,
    SparseDistilledForCausalLM,
    SparseDistilledModel,
)
from pipeline.moe import SparseMoE
from pipeline.shape import MoEShape

D_FF, LAYERS = 48, 2
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": D_FF, "num_attention_heads": 4}
SIZES |= {"num_hidden_layers": LAYERS, "max_position_embeddings": 64, "initializer_range": 0.2}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}

# Name of the configuration's class without `Config` -> what is not as in SIZES; ... = not given.
CAUSAL: dict[str, dict[str, Any]] = {
    "Llama": GROUPED,
    "Mistral": GROUPED,
    "Qwen2": GROUPED,
    "Qwen3": GROUPED,
    "Gemma": GROUPED,
    "Gemma2": GROUPED,
    "Gemma3Text": GROUPED,
    "Phi": {},
    "Phi3": {},
    "GPT2": {"n_inner": D_FF},
    "GPTNeo": {"attention_types": [[["global", "local"], 1]]},
    "GPTNeoX": {},
    "GPTJ": {"n_inner": D_FF, "rotary_dim": 4},
    "GPTBigCode": {"n_inner": D_FF},
    "CodeGen": {"n_inner": D_FF, "rotary_dim": 4},
    "OpenAIGPT": {},
    "CTRL": {"dff": D_FF},
    "OPT": {"ffn_dim": D_FF, "word_embed_proj_dim": 32},
    "XGLM": {"ffn_dim": D_FF},
    "BioGpt": {},
    "Bloom": {},
    "Mpt": {},
    "Falcon": {"ffn_hidden_size": D_FF},
    "StableLm": GROUPED,
    "Starcoder2": GROUPED,
    "Olmo": {},
    "Olmo2": {},
    "Olmo3": {},
    "Granite": {},
    "Cohere": {},
    "Cohere2": GROUPED,
    "Persimmon": {},
    "Nemotron": GROUPED,
    "SmolLM3": GROUPED,
    "Helium": GROUPED,
    "Glm": GROUPED,
    "Glm4": GROUPED,
    "Ernie4_5": GROUPED,
    "SeedOss": GROUPED,
    "Exaone4": GROUPED,
    "Arcee": GROUPED,
    "DiffLlama": GROUPED,
    "ModernBertDecoder": {},
}
ENCODERS: dict[str, dict[str, Any]] = {
    "Bert": {},
    "Roberta": {},
    "XLMRoberta": {},
    "DistilBert": {"hidden_dim": D_FF},
    "Electra": {"embedding_size": 32},
    "MPNet": {},
    "Deberta": {},
    "DebertaV2": {"pooler_hidden_size": 32},
    "ModernBert": {},
    "NomicBert": {},
    "Esm": {},
    "Ernie": {},
    "Longformer": {"attention_window": [4, 4]},
    "Nystromformer": {},
    "RoFormer": {"embedding_size": 32},
    "EuroBert": GROUPED,
    "XLM": {},
    "XLNet": {"d_inner": D_FF, "d_head": 8, "max_position_embeddings": ...},
    "CLIPText": {},
}
ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "T5": {"d_ff": D_FF, "d_kv": 8},
    "MT5": {"d_ff": D_FF, "d_kv": 8},
    "UMT5": {"d_ff": D_FF, "d_kv": 8},
    "LongT5": {"d_ff": D_FF, "d_kv": 8},
    "Bart": {},
    "MBart": {},
    "Pegasus": {},
    "Marian": {"decoder_start_token_id": 1},
    "M2M100": {},
    "FSMT": {"langs": ["en", "de"], "src_vocab_size": 64, "tgt_vocab_size": 64},
    "Blenderbot": {},
    "PLBart": {},
    "LED": {"attention_window": [4, 4]},
    "BigBirdPegasus": {"attention_type": "original_full"},
}
IMAGES: dict[str, dict[str, Any]] = {
    "ViT": {},
    "DeiT": {},
    "Beit": {},
    "Dinov2": {"mlp_ratio": 2},
    "ViTMAE": {"mask_ratio": 0.0},
    "ViTMSN": {},
    "CLIPVision": {},
    "SiglipVision": {},
    "Aimv2Vision": {},
}
SOUNDS: dict[str, dict[str, Any]] = {
    "Whisper": {"num_mel_bins": 8, "max_source_positions": 8, "decoder_start_token_id": 1},
    "Wav2Vec2": {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
}

TWO_STACKS = {"d_model": 32, "encoder_layers": LAYERS, "decoder_layers": LAYERS}
TWO_STACKS |= {"num_layers": LAYERS, "encoder_ffn_dim": D_FF, "decoder_ffn_dim": D_FF}
TWO_STACKS |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}

OWN = next(host for host in hosts.HOSTS.values() if host.remote_code)
IDS = torch.arange(3, 19)[None]
RANDOM = torch.Generator().manual_seed(0)
INPUTS = {
    "input_ids": IDS,
    "decoder_input_ids": IDS[:, :6],
    "pixel_values": torch.randn(1, 3, 16, 16, generator=RANDOM),
    "input_features": torch.randn(1, 8, 16, generator=RANDOM),
    "input_values": torch.randn(1, 2000, generator=RANDOM),
}


class Kind(NamedTuple):
    rows: dict[str, dict[str, Any]]
    sizes: dict[str, Any]
    auto: Any


KINDS = [
    Kind(CAUSAL, {}, tf.AutoModelForCausalLM),
    Kind(ENCODERS, {}, tf.AutoModel),
    Kind(ENCODER_DECODERS, TWO_STACKS, tf.AutoModel),
    Kind(IMAGES, {"image_size": 16, "patch_size": 8, "vocab_size": ...}, tf.AutoModel),
    Kind(SOUNDS, TWO_STACKS, tf.AutoModel),
]
FAMILIES = {name: kind for kind in KINDS for name in kind.rows}


class Family(NamedTuple):
    """A model that every test leaves as it was, and what it computes."""

    model: tf.PreTrainedModel
    inputs: dict[str, Tensor]
    output: Tensor
    slots: list[FFNSlot]


@cache
def family(name: str) -> Family:
    kind = FAMILIES[name]
    sizes = SIZES | kind.sizes | kind.rows[name]
    config = getattr(tf, f"{name}Config")(**{k: v for k, v in sizes.items() if v is not ...})
    torch.manual_seed(0)
    model = kind.auto.from_config(config).eval()
    names = [model.main_input_name] + ["decoder_input_ids"] * config.is_encoder_decoder
    inputs = {name: INPUTS[name] for name in names}
    return Family(model, inputs, run(model, inputs), find_ffns(model))


@torch.inference_mode()
def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits, or the last hidden states, of its decoder where there is one."""
    torch.manual_seed(0)  # a masked autoencoder shuffles its patches
    return model(**inputs)[0]


@pytest.fixture(params=FAMILIES)
def found(request: pytest.FixtureRequest) -> Iterator[Family]:
    given = family(request.param)
    modules = [slot.module for slot in given.slots]
    yield given
    for slot, module in zip(given.slots, modules, strict=True):
        slot.replace(module)


class Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def shape_of(slot: FFNSlot, **changes: Any) -> MoEShape:
    return MoEShape(
        **{"d_model": slot.d_model, "d_ff": slot.d_ff, "d_ff_expert": slot.d_ff, "n_experts": 1}
        | {"top_k": 1, "activation": slot.formula.activation, "bias": slot.has_bias}
        | {"gated": slot.formula.gate is not None, "router_function": "softmax_topk"}
        | changes
    )


def exact_start(slot: FFNSlot) -> SparseMoE:
    """One expert that is a copy of the dense FFN."""
    moe = SparseMoE(shape_of(slot)).eval()
    weights = start_experts(
        slot.weights(), moe.shape, "copy", init_noise=0.0, generator=torch.Generator()
    )
    assert not moe.load_state_dict(weights, strict=False).unexpected_keys
    return moe


@torch.inference_mode()
def test_the_ffn_of_every_layer_is_found_and_is_its_formula(found: Family):
    n_stacks = 2 if found.model.config.is_encoder_decoder else 1
    assert [slot.index for slot in found.slots] == [*range(n_stacks * LAYERS)]
    assert len({slot.path for slot in found.slots}) == n_stacks * LAYERS
    with record_ffn(dict(enumerate(found.slots))) as recorded:
        run(found.model, found.inputs)
    for slot in found.slots:
        x, y = recorded[slot.index]
        assert x.shape == y.shape == (x.shape[0], 32)
        torch.testing.assert_close(slot.weights()(x), y, rtol=1e-5, atol=1e-5)


def test_an_exact_start_in_its_place_computes_the_same(found: Family):
    for slot in found.slots:
        slot.replace(exact_start(slot))
    torch.testing.assert_close(run(found.model, found.inputs), found.output, rtol=1e-4, atol=1e-4)


def test_zeros_in_its_place_change_the_output(found: Family):
    for slot in found.slots:
        kept = slot.module
        slot.replace(Zero())
        assert (run(found.model, found.inputs) - found.output).abs().max() > 1e-3, slot.path
        slot.replace(kept)
    assert torch.equal(run(found.model, found.inputs), found.output)


def test_our_modelling_file_puts_the_layers_in_the_same_places(found: Family):
    record = dense.describe(found.model)
    moes = {}
    for slot in found.slots:
        moes[slot.index] = SparseMoE(shape_of(slot, n_experts=2)).eval()
        for parameter in moes[slot.index].parameters():
            nn.init.normal_(parameter, std=0.2)
    fields = OWN.config(record, {k: moe.shape for k, moe in moes.items()})
    causal = found.model.can_generate()
    hosted = (SparseDistilledForCausalLM if causal else SparseDistilledModel)(
        SparseDistilledConfig(**fields)
    ).eval()
    for slot in found.slots:
        slot.replace(moes[slot.index])
    hosted.load_state_dict({f"dense.{n}": t for n, t in found.model.state_dict().items()})
    expected = run(found.model, found.inputs)
    assert (expected - found.output).abs().max() > 1e-3
    torch.testing.assert_close(run(hosted, found.inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["OPT", "Bert"])
def test_a_conversion_opens_in_a_fresh_process(name: str, tmp_path: Path):
    """`assemble` compares what it computes there with the model in memory."""
    model, inputs, before, slots = family(name)
    vocabulary = Tokenizer(BPE(vocab={"a": 0, "b": 1, "</s>": 2}, merges=[]))
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="</s>")
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "dense")
    folders = {slot.index: tmp_path / f"layer_{slot.index}" for slot in slots}
    for slot in slots:
        moe = exact_start(slot)
        nn.init.normal_(moe.down_proj, std=0.2)
        folders[slot.index].mkdir()
        save_layer(moe, folders[slot.index], {"layer": slot.index, "host": OWN.name})
    assemble(str(tmp_path / "dense"), folders, tmp_path / "sparse")
    sparse = run(dense.load_model(str(tmp_path / "sparse")), inputs)
    assert sparse.shape == before.shape and (sparse - before).abs().max() > 1e-3
