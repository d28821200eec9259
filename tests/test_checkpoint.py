"""What is saved is what was trained: exact starts, opened again by transformers alone.

An exact start (all experts of a carve, or virtual groups) has the dense model's logits, untrained;
whatever the way through capture, plan, start, saving and loading loses or renames, they show it.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_start import DYNAMIC
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from pipeline import artifacts, budget, checkpoint, dense, durable, hosts, preflight, proof
from pipeline.capture import capture_activations
from pipeline.config import (
    CaptureConfig,
    Codec,
    ConvertConfig,
    Dtype,
    Host,
    Init,
    MoEConfig,
    Router,
    RouterInit,
    Routing,
    RuntimeConfig,
)
from pipeline.errors import ArtifactError, ConfigError, InputError
from pipeline.experts import start_experts
from pipeline.ffn import DenseFFN
from pipeline.hosts.native import EXPERT_WIDTHS
from pipeline.layers import layer_folders, save_layer
from pipeline.moe import SparseMoE, fit_thresholds
from pipeline.shape import MoEShape
from pipeline.stages import convert as convert_stage
from pipeline.start import is_exact, start_layer
from pipeline.store import LayerReader

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
SMALL |= {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 0}
SMALL |= {"initializer_range": 0.3, "rms_norm_eps": 1e-4}  # large, so that every tensor shows
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": LLAMA3["rope_theta"]}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}

CARVE = MoEConfig(
    n_experts=4,
    top_k=4,
    d_ff_expert=0.25,
    init_from_dense=True,
    init=Init.auto,
    init_noise=0.0,
    virtual_groups=False,
    refit=False,
    mean_compensation=False,
    shared_expert=0,
    router_init=RouterInit.zero,
    host=Host.auto,
    routing=Routing.token_choice,
    capacity_factor=1.25,
    router=Router.linear,
    router_width=8,
    balance_bias=False,
    per_layer=[],
    dynamic=DYNAMIC,
)
VIRTUAL = dataclasses.replace(
    CARVE, n_experts=12, virtual_groups=True, router_init=RouterInit.random
)
ROUTED = dataclasses.replace(
    CARVE, n_experts=8, top_k=2, init_noise=0.5, router_init=RouterInit.ridge
)

# What published models have: the last is invalid, and transformers saves it back unchanged.
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 512}
GREEDY = {"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1}


@dataclasses.dataclass(frozen=True)
class Case:
    """A dense model, and how it is converted."""

    family: str
    changes: dict
    moe: MoEConfig
    dtype: torch.dtype = torch.float32
    generation: dict = dataclasses.field(default_factory=lambda: SAMPLING)
    max_shard_size: str = "2GB"


CASES = {
    "llama3-tied-carve": Case(
        "Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}, CARVE
    ),
    "llama-untied-head_dim-virtual": Case("Llama", {"head_dim": 16}, VIRTUAL),
    "mistral-bf16-carve": Case(
        "Mistral", {"sliding_window": 8}, CARVE, torch.bfloat16, generation=GREEDY
    ),
    "llama-routed-sharded": Case("Llama", {}, ROUTED, max_shard_size="20KB"),
}
EXACT = [name for name, case in CASES.items() if case.moe is not ROUTED]


@dataclasses.dataclass(frozen=True)
class Folders:
    dense: Path
    layers: Path
    sparse: Path

    def layer_folders(self) -> dict[int, Path]:
        return layer_folders(self.layers)


def tokenizer() -> tf.PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "<unk>", "<tool>", *(f"w{i}" for i in range(59))]
    whole = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    made = tf.PreTrainedTokenizerFast(tokenizer_object=whole, **special)
    made.chat_template = "{{ messages[0]['content'] }}"
    return made


def tiny(family: str, dtype: torch.dtype = torch.float32, **changes) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(tf, f"{family}Config")(**SMALL | changes)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
    return model.to(dtype)


def save_dense(model: tf.PreTrainedModel, folder: Path, generation: dict = SAMPLING) -> None:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | generation))


def start_layers(model: tf.PreTrainedModel, moe: MoEConfig, folder: Path, scratch: Path) -> None:
    """What `train` writes at zero epochs: captured, planned, started, sealed."""
    record = dense.describe(model)
    plans = budget.uniform(record, moe, range(record["n_layers"]))
    generator = torch.Generator().manual_seed(1)
    blocks = {s: torch.randint(64, (16, 16), generator=generator) for s in ("train", "validation")}
    scratch.mkdir(parents=True)
    cfg = CaptureConfig(
        dtype=Dtype.float32,
        codec=Codec.fast,
        shard_mb=0.01,
        chunk_mb=0.01,
        batch_size=8,
        heldout_tokens=1,
    )
    capture_activations(
        model, blocks, scratch, layers=list(plans), cfg=cfg, dtype=torch.float32, attributes={}
    )
    for k, plan in plans.items():
        ffn = DenseFFN.load(scratch / f"ffn_{k}.safetensors")
        layer = start_layer(ffn, plan, moe, LayerReader(scratch / f"layer_{k}.zarr"), seed=0)
        (folder / f"layer_{k}").mkdir(parents=True)
        save_layer(layer, folder / f"layer_{k}", {"layer": k, "host": plan["host"]})
        artifacts.write_manifest(folder / f"layer_{k}", {"module": "pipeline.stages.train"})


def prepare(root: Path, case: Case) -> Folders:
    """The dense model and its layers on disk."""
    folders = Folders(root / "dense", root / "layers", root / "sparse")
    model = tiny(case.family, case.dtype, **case.changes)
    save_dense(model, folders.dense, case.generation)
    start_layers(model, case.moe, folders.layers, root / "capture")
    return folders


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Read-only: a Llama and its carved layers, not assembled."""
    return prepare(tmp_path_factory.mktemp("prepared"), CASES["llama3-tied-carve"])


PROVED = {"llama3-tied-carve", "mistral-bf16-carve", "layers-differ", "expert-choice-bf16"}
"""Cases that a fresh process opens too, which takes seconds each."""


def convert(folders: Folders, proved: bool, max_shard_size: str = "2GB") -> None:
    source, layers = str(folders.dense), folders.layer_folders()
    if proved:
        size = {"max_shard_size": max_shard_size}
        checkpoint.assemble(source, layers, folders.sparse, **size)
    else:
        how = {"dtype": "auto", "revision": None, "trust_remote_code": False}
        checkpoint.Conversion(source, layers, {}, how).write(folders.sparse, max_shard_size)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Folders]:
    """Read-only: a case assembled, once."""
    done: dict[str, Folders] = {}

    def get(name: str) -> Folders:
        if name not in done:
            case = CASES[name]
            folders = prepare(tmp_path_factory.mktemp(name), case)
            convert(folders, name in PROVED, case.max_shard_size)
            done[name] = folders
        return done[name]

    return get


def load(folder: Path) -> tf.PreTrainedModel:
    return tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: nn.Module) -> torch.Tensor:
    """(2, 48, vocab_size) in float32: longer than the sliding window and the original context."""
    ids = torch.randint(64, (2, 48), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        return model(input_ids=ids).logits


def assert_equal_logits(found: nn.Module, expected: nn.Module) -> None:
    wanted = logits(expected)
    largest = float(wanted.abs().max())
    torch.testing.assert_close(logits(found), wanted, rtol=1e-4, atol=1e-5 * largest)


def difference(one: nn.Module, other: nn.Module) -> float:
    """Of the logits, relative to the largest."""
    return float((logits(one) - logits(other)).abs().max() / logits(other).abs().max())


class Zero(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


# The saved and reloaded checkpoint


@pytest.mark.parametrize("name", EXACT)
def test_logits_show_every_setting_that_must_survive(name: str):
    """The control of what follows: without a setting, or the FFNs, the logits are others."""
    case = CASES[name]
    model = tiny(case.family, **case.changes)
    for setting in {"rope_parameters", "sliding_window"} & case.changes.keys():
        plain = None if setting == "sliding_window" else PLAIN_ROPE
        other = tiny(case.family, **case.changes | {setting: plain})
        assert difference(other, model) > 0.01, setting
    without = tiny(case.family, **case.changes)
    for slot in dense.find_ffns(without):
        slot.replace(Zero())
    assert difference(without, model) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_assemble_of_an_exact_start_has_the_dense_logits_when_reloaded(name: str, converted):
    shape = MoEShape(**artifacts.read_json(converted(name).layers / "layer_0/config.json")["shape"])
    assert is_exact(shape, "slice", CASES[name].moe)
    assert_equal_logits(load(converted(name).sparse), load(converted(name).dense))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_convert_to_sparse_in_memory_has_the_logits_of_the_saved_checkpoint(name: str, converted):
    folders = converted(name)
    model = load(folders.dense)
    sparse = checkpoint.convert_to_sparse(model, folders.layers)
    assert sparse is model
    assert_equal_logits(load(folders.sparse), sparse)
    if name not in EXACT:
        assert difference(sparse, load(folders.dense)) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_assemble_keeps_the_dense_configuration(name: str, converted):
    before, after = (
        json.loads(tf.AutoConfig.from_pretrained(folder).to_json_string(use_diff=False))
        for folder in (converted(name).dense, converted(name).sparse)
    )
    sparse = {"architectures", "model_type", "intermediate_size", "sliding_window"}
    shared = before.keys() & after.keys() - sparse - {"_name_or_path"}
    assert {k: after[k] for k in shared} == {k: before[k] for k in shared}
    assert {"rope_parameters", "tie_word_embeddings", "head_dim", "dtype", "rms_norm_eps"} <= shared
    assert after["sliding_window"] == before.get("sliding_window")
    for key, value in CASES[name].changes.items():
        assert after[key] == value, key
    moe = CASES[name].moe
    assert (after["num_local_experts"], after["num_experts_per_tok"]) == (moe.n_experts, moe.top_k)
    assert after["intermediate_size"] == 16


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_assemble_needs_no_code_of_ours_to_be_opened(name: str, converted):
    config = json.loads((converted(name).sparse / "config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM"] and "auto_map" not in config
    assert not list(converted(name).sparse.glob("*.py"))
    assert type(load(converted(name).sparse)) is tf.MixtralForCausalLM


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_assemble_keeps_the_generation_config(name: str, converted):
    before, after = (
        tf.GenerationConfig.from_pretrained(folder).to_diff_dict()
        for folder in (converted(name).dense, converted(name).sparse)
    )
    assert after == before
    assert {k: after.get(k, False) for k in CASES[name].generation} == CASES[name].generation
    assert (after["eos_token_id"], after["pad_token_id"]) == ([2, 5], 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_assemble_keeps_the_tokenizer(name: str, converted):
    before, after = (
        tf.AutoTokenizer.from_pretrained(folder)
        for folder in (converted(name).dense, converted(name).sparse)
    )
    text = "<s> w3 w4 unheard <tool> </s>"
    assert after(text)["input_ids"] == before(text)["input_ids"] == [1, 8, 9, 3, 4, 2]
    assert after.special_tokens_map == before.special_tokens_map
    assert after.chat_template == before.chat_template == tokenizer().chat_template


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_assemble_stores_the_dtype_of_the_dense_model(name: str, converted):
    config = tf.AutoConfig.from_pretrained(converted(name).sparse)
    stored = {t.dtype for t in stored_tensors(converted(name).sparse).values()}
    assert stored == {config.dtype} == {CASES[name].dtype}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3-tied-carve", "llama-untied-head_dim-virtual"])
def test_assemble_ties_the_output_embedding_where_the_dense_model_does(name: str, converted):
    tied = CASES[name].changes.get("tie_word_embeddings", False)
    model = load(converted(name).sparse)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" not in stored_tensors(converted(name).sparse)) == tied


@pytest.mark.slow
def test_assemble_stores_each_expert_under_the_published_names(converted):
    """`gate_up_proj` of SparseMoE is w1 above w3, as other loaders of Mixtral expect them."""
    folders = converted("llama-untied-head_dim-virtual")
    stored = stored_tensors(folders.sparse)
    for layer in (0, 1):
        trained = load_file(folders.layers / f"layer_{layer}" / "layer.safetensors")
        below = f"model.layers.{layer}.block_sparse_moe"
        torch.testing.assert_close(stored[f"{below}.gate.weight"], trained["router.weight"])
        for e in range(VIRTUAL.n_experts):
            w1, w2, w3 = (stored[f"{below}.experts.{e}.{w}.weight"] for w in ("w1", "w2", "w3"))
            torch.testing.assert_close(torch.cat([w1, w3]), trained["gate_up_proj"][e])
            torch.testing.assert_close(w2, trained["down_proj"][e])


@pytest.mark.slow
def test_assemble_in_small_shards_writes_several_files_that_load_equal(converted):
    """Equal: `test_convert_to_sparse_in_memory_...` has this case too."""
    folder = converted("llama-routed-sharded").sparse
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert {p.name for p in folder.glob("*.safetensors")} == files and len(files) > 3
    assert sum(t.nbytes for t in stored_tensors(folder).values()) == index["metadata"]["total_size"]
    assert not (folder / "model.safetensors").exists()


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """As they lie on disk, read without transformers."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


# Our own modelling file, and experts that grew

OWN_LAYER = MoEShape(32, 64, 16, 6, 2, "silu", True, False, "softmax_topk")


@dataclasses.dataclass(frozen=True)
class OwnCase:
    """A dense model, and what each sparse layer of it has otherwise."""

    layers: dict[int, dict]
    family: str = "Llama"
    changes: dict = dataclasses.field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    host: str = "custom"


BOTH = {0: {}, 1: {}}
CHOICE = {"routing": "expert_choice", "capacity_factor": 1.5}
BALANCED = {"balance_bias": True}
WIDTHS = {"expert_widths": (8, 24, 16, 8, 16, 24), "d_ff_expert": 24}
OWN_CASES = {
    "layers-left-dense": OwnCase({1: {}}, changes={"tie_word_embeddings": True}),
    "layers-differ": OwnCase({0: {"n_experts": 4, "d_ff_expert": 24, "top_k": 3}, 1: {}}),
    "expert-choice-bf16": OwnCase({0: CHOICE, 1: CHOICE}, dtype=torch.bfloat16),
    "mlp-router": OwnCase({0: {"router_width": 5}, 1: {"router_width": 7}}),
    "balance-bias-bf16": OwnCase({0: BALANCED, 1: BALANCED}, dtype=torch.bfloat16),
    "expert-widths": OwnCase({0: WIDTHS, 1: {}}),
    "gemma2": OwnCase(BOTH, "Gemma2", {"sliding_window": 8, "head_dim": 8}),
    "gpt2-biases": OwnCase(BOTH, "GPT2", {"n_inner": 64}),
    "mixtral-expert-widths": OwnCase(
        {0: WIDTHS, 1: {"expert_widths": (16, 8, 8, 8, 8, 8)}}, host="mixtral"
    ),
}


def random_layer(shape: MoEShape, seed: int) -> SparseMoE:
    """Large random weights, so that each shows; those of padding are zero."""
    generator = torch.Generator().manual_seed(seed)
    moe = SparseMoE(shape).eval()
    for tensor in moe.state_dict().values():
        tensor.normal_(std=0.2, generator=generator)
    padding_EH = torch.arange(shape.d_ff_expert) >= torch.tensor(shape.widths)[:, None]
    moe.down_proj.data.masked_fill_(padding_EH[:, None, :], 0)
    fit_thresholds(moe, torch.randn(64, shape.d_model, generator=generator))
    return moe


def prepare_own(root: Path, case: OwnCase) -> Folders:
    folders = Folders(root / "dense", root / "layers", root / "sparse")
    model = tiny(case.family, case.dtype, **case.changes)
    save_dense(model, folders.dense)
    slots = dense.find_ffns(model)
    for k, changes in case.layers.items():
        kind = {"activation": slots[k].formula.activation, "bias": slots[k].has_bias}
        kind["gated"] = slots[k].formula.gate is not None
        moe = random_layer(dataclasses.replace(OWN_LAYER, **kind | changes), seed=k)
        (folders.layers / f"layer_{k}").mkdir(parents=True)
        save_layer(moe, folders.layers / f"layer_{k}", {"layer": k, "host": case.host})
    return folders


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Folders]:
    """Read-only: a case assembled, once."""
    done: dict[str, Folders] = {}

    def get(name: str) -> Folders:
        if name not in done:
            folders = prepare_own(tmp_path_factory.mktemp(name), OWN_CASES[name])
            convert(folders, name in PROVED)
            done[name] = folders
        return done[name]

    return get


def continued(model: tf.PreTrainedModel, **changes) -> torch.Tensor:
    ids = proof.probe(64)
    greedy = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **greedy, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN_CASES)
def test_assemble_of_what_mixtral_cannot_hold_computes_what_was_trained(name: str, own):
    """Opened here, with the modelling file of this package; `PROVED` ones elsewhere too."""
    folders = own(name)
    loaded = dense.load_model(str(folders.sparse), dtype="float32")
    assert loaded.config.model_type == hosts.HOSTS[OWN_CASES[name].host].model_type
    in_memory = checkpoint.convert_to_sparse(load(folders.dense), folders.layers)
    assert difference(load(folders.dense), in_memory) > 0.05
    if OWN_CASES[name].dtype == torch.float32:  # else the layers in memory were not rounded
        assert_equal_logits(loaded, in_memory)
    assert torch.equal(continued(loaded), continued(loaded, use_cache=False))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Bert", "Mistral"])
def test_assemble_of_an_encoder_has_the_hidden_states_of_its_layers_in_memory(
    tmp_path: Path, family: str
):
    """It opens through `AutoModel`, from files that name it as the base of a larger model.

    A decoder without its head is an encoder too.
    """
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    kind: dict[str, Any] = {"d_ff_shared": 8}
    if family == "Bert":
        whole = tf.BertForPreTraining(tf.BertConfig(**sizes))
        nn.init.normal_(whole.bert.encoder.layer[0].output.dense.bias)
        kind |= {"activation": "gelu", "gated": False, "bias": True}
    else:
        whole = tf.MistralModel(tf.MistralConfig(**sizes, num_key_value_heads=2))
    whole.save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    described = artifacts.read_json(tmp_path / "dense/config.json") | {
        "architectures": [f"{family}Model"]
    }
    durable.write_json(tmp_path / "dense/config.json", described)
    model = dense.load_model(str(tmp_path / "dense"))
    for k in (0, 1):
        (tmp_path / f"layer_{k}").mkdir()
        moe = random_layer(dataclasses.replace(OWN_LAYER, **kind), seed=k)
        save_layer(moe, tmp_path / f"layer_{k}", {"layer": k, "host": "custom"})
    layers = layer_folders(tmp_path)
    checkpoint.assemble(str(tmp_path / "dense"), layers, tmp_path / "sparse")
    loaded = dense.load_model(str(tmp_path / "sparse"))
    assert type(loaded).__name__ == "SparseDistilledModel"
    in_memory = checkpoint.convert_to_sparse(model, tmp_path)
    ids = proof.probe(64)
    with torch.no_grad():
        found, wanted = (m(input_ids=ids).last_hidden_state for m in (loaded, in_memory))
    torch.testing.assert_close(found, wanted)
    with proof.FreshProcess() as fresh:
        fresh.open(tmp_path / "sparse")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layers-differ", "gpt2-biases"])
def test_a_fresh_process_opens_our_own_model_by_the_headers_of_its_files(name: str, own):
    with proof.FreshProcess() as fresh:
        fresh.open(own(name).sparse)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["expert-choice-bf16", "balance-bias-bf16"])
def test_assemble_keeps_the_router_of_a_bfloat16_model_as_it_was_trained(name: str, own):
    folders = own(name)
    stored = stored_tensors(folders.sparse)
    model = tf.AutoModelForCausalLM.from_pretrained(folders.dense)
    in_memory = checkpoint.convert_to_sparse(model, folders.layers).state_dict()
    for k in OWN_CASES[name].layers:
        trained = load_file(folders.layers / f"layer_{k}" / "layer.safetensors")
        for name_, tensor in trained.items():
            there = stored[f"dense.model.layers.{k}.mlp.{name_}"]
            kept = torch.float32 if name_.startswith("router.") else torch.bfloat16
            assert there.dtype == in_memory[f"model.layers.{k}.mlp.{name_}"].dtype == kept
            assert torch.equal(there, tensor.to(kept))
            assert torch.equal(there, in_memory[f"model.layers.{k}.mlp.{name_}"])


@pytest.mark.slow
def test_a_fresh_process_writes_nothing_into_the_cache_of_transformers(
    own, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its copy of the modelling file is its own: the home may be read-only, or another's too."""
    (tmp_path / "home").write_text("no folder can be made below a file")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with proof.FreshProcess() as fresh:
        computed = fresh.compute(own("mlp-router").sparse, 64)
    assert computed["logits"].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layers-left-dense", "expert-widths", "gpt2-biases"])
def test_assemble_records_every_sparse_layer_in_the_configuration(name: str, own):
    config = artifacts.read_json(own(name).sparse / "config.json")
    trained = {
        k: MoEShape(**artifacts.read_json(path / "config.json")["shape"])
        for k, path in own(name).layer_folders().items()
    }
    slots = dense.find_ffns(load(own(name).dense))
    recorded = {path: MoEShape(**shape) for path, shape in config["sparse_layers"].items()}
    assert recorded == {slots[k].path: shape for k, shape in trained.items()}


@pytest.mark.slow
def test_assemble_pads_experts_that_grew_for_mixtral_and_records_their_widths(own):
    folder = own("mixtral-expert-widths").sparse
    model = load(folder)
    assert type(model) is tf.MixtralForCausalLM and model.config.intermediate_size == 24
    layers = OWN_CASES["mixtral-expert-widths"].layers
    widths = {str(k): changes["expert_widths"] for k, changes in layers.items()}
    model.save_pretrained(folder.parent / "again")
    for place in (folder, folder.parent / "again"):
        recorded = tf.AutoConfig.from_pretrained(place)
        assert {k: tuple(w) for k, w in getattr(recorded, EXPERT_WIDTHS).items()} == widths
    stored = stored_tensors(folder)
    narrow = stored["model.layers.1.block_sparse_moe.experts.0.w1.weight"]
    assert narrow[:16].any() and not narrow[16:].any()


@pytest.mark.parametrize("kind", [{}, {"gated": False}, {"bias": True}])
@torch.inference_mode()
def test_pad_experts_changes_no_output(kind: dict):
    moe = random_layer(dataclasses.replace(OWN_LAYER, **kind), seed=0)
    wide = checkpoint.pad_experts(moe, dataclasses.replace(moe.shape, d_ff_expert=40))
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(3))
    assert wide.down_proj.shape[-1] == 40
    torch.testing.assert_close(wide(x), moe(x))
    assert checkpoint.pad_experts(moe, moe.shape) is moe


# In memory


def test_convert_to_sparse_moves_the_model_to_the_device_that_is_named(prepared: Folders):
    model = checkpoint.convert_to_sparse(load(prepared.dense), prepared.layers, device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_convert_to_sparse_takes_each_ffns_dtype_and_stays_in_evaluation_mode(prepared: Folders):
    model = tf.AutoModelForCausalLM.from_pretrained(prepared.dense, dtype=torch.bfloat16)
    checkpoint.convert_to_sparse(model, str(prepared.layers))
    for layer in model.model.layers:
        assert isinstance(layer.mlp, SparseMoE) and not layer.mlp.training
        assert {p.dtype for p in layer.mlp.parameters()} == {torch.bfloat16}


def test_convert_to_sparse_replaces_only_the_layers_that_are_named(prepared: Folders):
    model = load(prepared.dense)
    checkpoint.convert_to_sparse(model, prepared.layers, [1])
    assert [type(layer.mlp).__name__ for layer in model.model.layers] == ["LlamaMLP", "SparseMoE"]
    assert_equal_logits(model, load(prepared.dense))


def test_convert_to_sparse_takes_a_family_that_no_host_holds(tmp_path: Path):
    model = gpt2_with_layers(tmp_path / "layers")
    assert_equal_logits(
        checkpoint.convert_to_sparse(model, tmp_path / "layers"), gpt2_with_layers(tmp_path / "b")
    )
    assert sum(isinstance(m, SparseMoE) for m in model.modules()) == 2


def gpt2_with_layers(folder: Path) -> tf.PreTrainedModel:
    """A tiny GPT-2 and its carved layers below `folder`, as for a host that does not hold it."""
    torch.manual_seed(0)
    config = tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_inner=64)
    model = tf.GPT2LMHeadModel(config).eval()
    for slot in dense.find_ffns(model):
        ffn = slot.weights()
        nn.init.normal_(slot.module.get_parameter(f"{slot.formula.down}.bias"))
        shape = MoEShape(32, 64, 16, 4, 4, ffn.activation, False, True, "softmax_topk")
        moe = SparseMoE(shape)
        generator = torch.Generator().manual_seed(0)
        experts = start_experts(ffn, shape, "slice", init_noise=0.0, generator=generator)
        moe.load_state_dict(experts, strict=False)  # all but the router, which is zero
        (folder / f"layer_{slot.index}").mkdir(parents=True)
        save_layer(moe, folder / f"layer_{slot.index}", {"layer": slot.index, "host": "mixtral"})
    return model


@pytest.mark.parametrize("changes", [{"intermediate_size": 48}, {"hidden_size": 64}])
def test_convert_to_sparse_refuses_layers_of_other_sizes(prepared: Folders, changes: dict):
    model = tiny("Llama", **changes)
    with pytest.raises(InputError, match=r"Layer 0 was trained.*(\n.*)*\(32, 64\)"):
        checkpoint.convert_to_sparse(model, prepared.layers)


def test_convert_to_sparse_refuses_all_layers_where_it_refuses_one(
    prepared: Folders, tmp_path: Path
):
    """A notebook's model is not left half converted."""
    other = prepare(tmp_path, Case("Llama", {"intermediate_size": 128}, CARVE))
    shutil.copytree(prepared.layers, tmp_path / "mixed")
    shutil.rmtree(tmp_path / "mixed" / "layer_1")
    shutil.copytree(other.layers / "layer_1", tmp_path / "mixed" / "layer_1")
    model = load(prepared.dense)
    with pytest.raises(InputError, match="Layer 1 was trained for another"):
        checkpoint.convert_to_sparse(model, tmp_path / "mixed")
    assert [type(layer.mlp).__name__ for layer in model.model.layers] == ["LlamaMLP", "LlamaMLP"]


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_convert_to_sparse_refuses_a_folder_without_layers(tmp_path: Path, folder: str):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=f"no trained layers.*(\n.*)*{folder}"):
        checkpoint.convert_to_sparse(tiny("Llama"), tmp_path / folder)


@pytest.mark.parametrize("layers", [[2], [0, 5], [-1]])
def test_convert_to_sparse_refuses_a_layer_that_was_not_trained(
    prepared: Folders, layers: list[int]
):
    with pytest.raises(InputError, match="not been trained") as refusal:
        checkpoint.convert_to_sparse(load(prepared.dense), prepared.layers, layers)
    assert f"layers [{layers[-1]}]" in str(refusal.value) and "holds [0, 1]" in str(refusal.value)


def test_convert_to_sparse_refuses_a_layer_that_the_model_lacks(prepared: Folders):
    with pytest.raises(InputError, match="the model has 1 layers"):
        checkpoint.convert_to_sparse(tiny("Llama", num_hidden_layers=1), prepared.layers)


def cut(folder: Path) -> None:
    path = folder / "layer.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def rename_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "layer.safetensors")
    tensors["gate.weight"] = tensors.pop("router.weight")
    save_file(tensors, folder / "layer.safetensors")


def widen(folder: Path) -> None:
    record = artifacts.read_json(folder / "config.json")
    record["shape"]["d_ff_expert"] = 24
    durable.write_json(folder / "config.json", record)


def lose_weights(folder: Path) -> None:
    (folder / "layer.safetensors").unlink()


def lose_record(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize("damage", [cut, rename_a_tensor, widen, lose_weights, lose_record])
def test_convert_to_sparse_refuses_a_damaged_layer_by_name(
    prepared: Folders, tmp_path: Path, damage: Callable[[Path], None]
):
    shutil.copytree(prepared.layers, tmp_path / "layers")
    damage(tmp_path / "layers" / "layer_1")
    with pytest.raises(ArtifactError, match="layer_1"):
        checkpoint.convert_to_sparse(load(prepared.dense), tmp_path / "layers")


def test_layer_folders_are_in_order_of_their_index_and_pass_over_the_rest(tmp_path: Path):
    for name in ("layer_10", "layer_9", "layer_x", "healed", "layer_"):
        (tmp_path / name).mkdir()
    assert list(layer_folders(tmp_path).items()) == [
        (9, tmp_path / "layer_9"),
        (10, tmp_path / "layer_10"),
    ]


# What is not assembled


def refused(folders: Folders, layers: dict[int, Path], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        checkpoint.assemble(str(folders.dense), layers, folders.sparse)
    assert not folders.sparse.exists()


def test_assemble_refuses_layers_trained_for_different_hosts(prepared: Folders, tmp_path: Path):
    shutil.copytree(prepared.layers, tmp_path / "layers")
    path = tmp_path / "layers/layer_1/config.json"
    artifacts.write_sealed(path, artifacts.read_sealed(path) | {"host": "another"})
    layers = layer_folders(tmp_path / "layers")
    refused(prepared, layers, InputError, "layer 0: mixtral, layer 1: another")


def test_assemble_refuses_layers_left_dense_and_names_them(prepared: Folders):
    one = {1: prepared.layers / "layer_1"}
    refused(prepared, one, ConfigError, r"mixtral cannot hold(.*\n)*.*layers \[0\] would stay")


def test_assemble_refuses_a_family_that_the_layers_host_does_not_hold(tmp_path: Path):
    folders = Folders(tmp_path / "dense", tmp_path / "layers", tmp_path / "sparse")
    gpt2_with_layers(folders.layers).save_pretrained(folders.dense)
    layers = folders.layer_folders()
    refused(folders, layers, ConfigError, "it holds llama, mistral, phi3, and this is gpt2")


def test_assemble_refuses_layers_of_another_model(prepared: Folders, tmp_path: Path):
    other = Folders(tmp_path / "dense", prepared.layers, tmp_path / "sparse")
    save_dense(tiny("Llama", intermediate_size=48), other.dense)
    refused(other, other.layer_folders(), InputError, "Layer 0 was trained for another")


def flip_a_weight(folder: Path) -> None:
    content = bytearray((folder / "layer.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "layer.safetensors").write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip_a_weight])
def test_assemble_refuses_a_damaged_layer(
    prepared: Folders, tmp_path: Path, damage: Callable[[Path], None]
):
    shutil.copytree(prepared.layers, tmp_path / "layers")
    damage(tmp_path / "layers" / "layer_0")
    layers, into = layer_folders(tmp_path / "layers"), tmp_path / "sparse"
    with pytest.raises(ArtifactError, match="layer_0"):
        checkpoint.assemble(str(prepared.dense), layers, into)


def test_assemble_refuses_layers_trained_under_another_router_function(
    prepared: Folders, tmp_path: Path
):
    shutil.copytree(prepared.layers, tmp_path / "layers")
    path = tmp_path / "layers/layer_1/config.json"
    record = artifacts.read_sealed(path)
    record["shape"]["router_function"] = "sigmoid"
    artifacts.write_sealed(path, record)
    layers = layer_folders(tmp_path / "layers")
    refused(prepared, layers, InputError, "layer 0: softmax_topk, layer 1: sigmoid")


# The conversion on its own


def run_alone(cwd: Path, *overrides: str, expect: int) -> str:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("DVC_")}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.stages.convert", *overrides],
        cwd=cwd,
        env=inherited,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout}"
    return done.stdout


@pytest.mark.slow
def test_convert_alone_writes_its_output_and_nothing_else(prepared: Folders, tmp_path: Path):
    """In an empty folder: no conf/, no git, no other stage."""
    run_alone(
        tmp_path,
        f"convert.dense={prepared.dense}",
        f"convert.layers={prepared.layers}",
        "convert.output=sparse",
        "convert.max_shard_size=20KB",
        "runtime.threads=1",
        expect=0,
    )
    assert [p.name for p in tmp_path.iterdir()] == ["sparse"]
    assert (tmp_path / "sparse" / "model.safetensors.index.json").is_file()
    assert artifacts.verify(tmp_path / "sparse")["module"] == "pipeline.stages.convert"
    assert_equal_logits(load(tmp_path / "sparse"), load(prepared.dense))


@pytest.mark.slow
def test_convert_alone_hashes_each_file_once_where_no_model_fits(
    prepared: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What is written is hashed by the proof, while it reads it."""
    digest, hashed = artifacts.file_digest, []
    monkeypatch.setattr(preflight, "free_memory", lambda: 0)
    monkeypatch.setattr(artifacts, "file_digest", lambda path: hashed.append(path) or digest(path))
    alone_into(tmp_path / "sparse", prepared.layers, prepared.dense)
    large = [path for path in hashed if path.suffix == ".safetensors"]
    layers = [path / "layer.safetensors" for path in prepared.layer_folders().values()]
    assert sorted(large) == sorted([prepared.dense / "model.safetensors", *layers])
    monkeypatch.undo()
    assert artifacts.verify(tmp_path / "sparse")["files"].keys() >= {"model.safetensors"}


@pytest.mark.slow
def test_convert_alone_refuses_weights_of_a_layer_that_are_damaged(
    prepared: Folders, tmp_path: Path
):
    shutil.copytree(prepared.layers, tmp_path / "layers")
    path = tmp_path / "layers" / "layer_1" / "layer.safetensors"
    flip_a_weight(path.parent)
    os.utime(path, (1, 1))
    path.chmod(0o444)  # as DVC's cache has it
    with pytest.raises(ArtifactError, match="layer_1"):
        alone_into(tmp_path / "sparse", tmp_path / "layers", prepared.dense)
    assert not (tmp_path / "sparse").exists()
    assert path.stat().st_mtime > 1 and path.stat().st_mode & 0o200, "DVC sees that it changed"


@pytest.mark.slow
def test_convert_alone_publishes_nothing_that_is_over_the_tolerance(
    prepared: Folders, tmp_path: Path
):
    """No difference is below zero, so that even an exact start fails here."""
    paths = {"dense": str(prepared.dense), "layers": str(prepared.layers)}
    cfg = ConvertConfig(**paths, output=str(tmp_path / "sparse"), tolerance=-1.0)
    with pytest.raises(ArtifactError, match=r"convert\.tolerance=-1\.0"):
        convert_stage.run_alone(cfg, RuntimeConfig())
    assert not (tmp_path / "sparse").exists()


@pytest.mark.slow
def test_convert_alone_refuses_a_missing_path_with_exit_2(tmp_path: Path):
    told = run_alone(tmp_path, "convert.dense=dense", "convert.output=sparse", expect=2)
    assert "convert.layers=null" in told and "add convert.layers=..." in told
    assert "convert.dense=null" not in told and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["no dense model", "no layers", "pickled"])
def test_convert_alone_refuses_what_it_cannot_use_with_exit_3(
    prepared: Folders, tmp_path: Path, wrong: str
):
    source, layers = prepared.dense, prepared.layers
    if wrong == "no dense model":
        source = tmp_path / "nowhere"
    elif wrong == "no layers":
        layers = tmp_path / "empty"
        layers.mkdir()
    else:
        source = tmp_path / "pickled"
        shutil.copytree(prepared.dense, source)
        (source / "model.safetensors").rename(source / "pytorch_model.bin")
    told = run_alone(
        tmp_path,
        f"convert.dense={source}",
        f"convert.layers={layers}",
        "convert.output=sparse",
        expect=3,
    )
    named = layers if wrong == "no layers" else source
    assert "error:" in told and str(named) in told and "Traceback" not in told
    assert not (tmp_path / "sparse").exists()


@pytest.mark.parametrize("name", ["dense", "layers", "output"])
def test_convert_alone_names_the_path_that_is_missing(name: str):
    paths = {"dense": "a", "layers": "b", "output": "c"} | {name: None}
    with pytest.raises(ConfigError, match=f"convert.{name}=null") as refusal:
        convert_stage.run_alone(ConvertConfig(**paths), RuntimeConfig())
    assert refusal.value.remedy == f"add convert.{name}=..."


def alone_into(output: Path, layers: Path, source: Path = Path("dense")) -> None:
    cfg = ConvertConfig(dense=str(source), layers=str(layers), output=str(output))
    convert_stage.run_alone(cfg, RuntimeConfig())


@pytest.mark.parametrize("content", ["of a user", "of another stage", "a file"])
def test_convert_alone_refuses_to_replace_what_is_no_conversion(tmp_path: Path, content: str):
    output = tmp_path / "output"
    if content == "a file":
        output.write_text("precious")
    else:
        output.mkdir()
        (output / "notes.txt").write_text("precious")
    if content == "of another stage":
        artifacts.write_manifest(output, {"module": "pipeline.stages.dense"})
    with pytest.raises(ConfigError, match=f"convert.output={output}"):
        alone_into(output, tmp_path)
    kept = output if output.is_file() else output / "notes.txt"
    assert kept.read_text() == "precious"


@pytest.mark.parametrize("content", ["nothing", "an earlier conversion"])
def test_convert_alone_may_replace_what_is_empty_or_a_conversion(tmp_path: Path, content: str):
    """It goes on to the next check: there are no layers."""
    output = tmp_path / "output"
    output.mkdir()
    if content == "an earlier conversion":
        artifacts.write_manifest(output, {"module": "pipeline.stages.convert"})
    with pytest.raises(InputError, match="no trained layers"):
        alone_into(output, tmp_path)
