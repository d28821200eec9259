"""The modelling file that a checkpoint brings: it computes what was trained, and opens alone."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import nn

from pipeline import dense, modeling, sources
from pipeline.ffn import ACTIVATIONS
from pipeline.modeling import modeling_sparse_distilled as ours
from pipeline.moe import SparseMoE, fit_thresholds
from pipeline.router import ROUTER_FUNCTIONS
from pipeline.shape import MoEShape

FILE = Path(ours.__file__)
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SMALL |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2}

PLAIN = MoEShape(32, 64, 24, 6, 2, "silu", True, False, "softmax_topk")
EXPERT_CHOICE = {"routing": "expert_choice", "capacity_factor": 1.5}
FEATURES = {
    "plain": {},
    "softmax": {"router_function": "softmax"},
    "sigmoid": {"router_function": "sigmoid"},
    "balance-bias": {"balance_bias": True},
    "softmax-balance-bias": {"router_function": "softmax", "balance_bias": True},
    "sigmoid-balance-bias": {"router_function": "sigmoid", "balance_bias": True},
    "mlp-router": {"router_width": 5},
    "expert-choice": EXPERT_CHOICE,
    "expert-choice-mlp-router": EXPERT_CHOICE | {"router_width": 5},
    "ungated": {"gated": False},
    "biases": {"bias": True},
    "ungated-biases": {"gated": False, "bias": True},
    "expert-choice-ungated-biases": EXPERT_CHOICE | {"gated": False, "bias": True},
    "expert-widths": {"expert_widths": (8, 24, 16, 8, 16, 24)},
    "shared-expert": {"d_ff_shared": 8},
    "shared-expert-ungated-biases": {"d_ff_shared": 8, "gated": False, "bias": True},
    "everything-at-once": {"router_width": 5, "balance_bias": True, "bias": True, "d_ff_shared": 8}
    | {"expert_widths": (8, 24, 16, 8, 16, 24), "router_function": "sigmoid"},
} | {name: {"activation": name} for name in ACTIVATIONS}


def trained(shape: MoEShape, seed: int = 0) -> SparseMoE:
    """Random weights, large enough that each shows; in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    moe = SparseMoE(shape).eval()
    for tensor in moe.state_dict().values():
        tensor.normal_(std=0.3, generator=generator)
    widths = torch.tensor(shape.widths)[:, None]
    padding = torch.arange(shape.d_ff_expert) >= widths  # (E, H)
    moe.down_proj.data.masked_fill_(padding[:, None, :], 0)
    with torch.no_grad():
        for name, tensor in moe.named_parameters(recurse=False):
            if name.startswith(moe.inner):
                halves = tensor.chunk(2 if shape.gated else 1, dim=1)
                for half in halves:
                    half.masked_fill_(padding[..., None] if half.dim() == 3 else padding, 0)
    fit_thresholds(moe, inputs(seed=9))
    return moe


def copy_of(moe: SparseMoE) -> ours.SparseFFN:
    ffn = ours.SparseFFN(json.loads(json.dumps(dataclasses.asdict(moe.shape)))).eval()
    ffn.load_state_dict(moe.state_dict())
    return ffn


def inputs(tokens: int = 40, seed: int = 1) -> torch.Tensor:
    return torch.randn(tokens, 32, generator=torch.Generator().manual_seed(seed))


# One layer


@pytest.mark.parametrize("name", FEATURES)
@torch.inference_mode()
def test_sparse_ffn_computes_what_was_trained(name: str):
    moe = trained(dataclasses.replace(PLAIN, **FEATURES[name]))
    x = inputs().view(4, 10, 32)
    found = copy_of(moe)(x)
    torch.testing.assert_close(found, moe(x), rtol=1e-5, atol=1e-6)
    assert float(found.abs().mean()) > 0.1  # not zeros that are equal


@pytest.mark.parametrize("name", ["plain", "balance-bias", "mlp-router", "biases", "shared-expert"])
@torch.inference_mode()
def test_sparse_ffn_repeats_the_plain_loop_bit_for_bit(name: str):
    moe = trained(dataclasses.replace(PLAIN, **FEATURES[name]))
    moe.kernel = "loop"
    assert torch.equal(copy_of(moe)(inputs()), moe(inputs()))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("balance-bias", "router.balance_bias"),
        ("mlp-router", "router.hidden_proj"),
        ("mlp-router", "router.output_proj"),
        ("expert-choice", "router.threshold"),
        ("plain", "router.weight"),
        ("biases", "gate_up_bias"),
        ("biases", "down_bias"),
        ("shared-expert", "shared_expert.gate_up_proj"),
        ("shared-expert", "shared_expert.down_proj"),
        ("shared-expert-ungated-biases", "shared_expert.up_bias"),
    ],
)
@torch.inference_mode()
def test_sparse_ffn_without_one_tensor_computes_something_else(name: str, tensor: str):
    """The control of the two above: each tensor shows."""
    moe = trained(dataclasses.replace(PLAIN, **FEATURES[name]))
    ffn = copy_of(moe)
    ffn.state_dict()[tensor].zero_()
    assert float((ffn(inputs()) - moe(inputs())).abs().max()) > 0.01


def test_sparse_ffn_knows_every_activation_and_router_function():
    assert ours.ACTIVATIONS.keys() == ACTIVATIONS.keys()
    assert ours.ROUTER_FUNCTIONS.keys() == ROUTER_FUNCTIONS.keys()


@torch.inference_mode()
def test_expert_choice_decides_each_token_alone():
    ffn = copy_of(trained(dataclasses.replace(PLAIN, **EXPERT_CHOICE)))
    x = inputs()
    together = ffn(x)
    torch.testing.assert_close(torch.cat([ffn(row[None]) for row in x]), together)
    other = torch.cat([x[:20], inputs(20, seed=3)])  # other tokens after these
    torch.testing.assert_close(ffn(other)[:20], together[:20])


@torch.inference_mode()
def test_expert_choice_gives_zero_to_a_token_that_no_expert_takes():
    few = EXPERT_CHOICE | {"capacity_factor": 0.7, "bias": True}
    ffn = copy_of(trained(dataclasses.replace(PLAIN, **few)))
    _, taken_TE = ffn.router(inputs())
    unserved = ~taken_TE.any(dim=1)
    assert 0 < int(unserved.sum()) < len(unserved)
    assert not ffn(inputs())[unserved].any() and ffn(inputs())[~unserved].all()


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_router_keeps_float32_where_the_model_is_narrow(narrow: torch.dtype):
    """Its decisions on the same rows are those of before, thresholds included."""
    ffn = copy_of(trained(dataclasses.replace(PLAIN, **EXPERT_CHOICE, router_width=5)))
    x = inputs(400).to(narrow)
    weights_TE, taken_TE = ffn.router(x)
    rounded = ffn.router.threshold.to(narrow).float()
    assert not torch.equal(rounded, ffn.router.threshold)
    ffn = ffn.to(narrow)
    assert {t.dtype for t in ffn.router.state_dict().values()} == {torch.float32}
    assert ffn.down_proj.dtype == ffn(x).dtype == narrow
    assert torch.equal(ffn.router(x)[0], weights_TE) and torch.equal(ffn.router(x)[1], taken_TE)


def test_router_follows_its_model_to_float64_and_to_another_device():
    ffn = copy_of(trained(PLAIN)).double()
    assert ffn.router.weight.dtype == ffn(inputs().double()).dtype == torch.float64
    assert ffn.to("meta").router.weight.is_meta


@torch.inference_mode()
def test_sparse_ffn_runs_under_autocast_with_a_float32_router():
    moe = trained(PLAIN)
    ffn = copy_of(moe)
    with torch.autocast("cpu", torch.bfloat16):
        weights_TE, _ = ffn.router(inputs())
        y = ffn(inputs())
    assert torch.equal(weights_TE, ffn.router(inputs())[0])
    torch.testing.assert_close(y.float(), moe(inputs()), rtol=0.05, atol=0.05)


# A whole model


def dense_model(family: str, **changes) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(tf, f"{family}Config")(**SMALL | changes)
    return tf.AutoModelForCausalLM.from_config(config).eval()


def sparse_pair(
    family: str, features: dict | None = None, **changes
) -> tuple[tf.PreTrainedModel, tf.PreTrainedModel]:
    """A dense model with one SparseMoE in it, and the same by the modelling file."""
    model = dense_model(family, **changes)
    record, slot = dense.describe(model), dense.find_ffns(model)[1]
    kind = {"activation": slot.formula.activation, "bias": slot.has_bias}
    kind["gated"] = slot.formula.gate is not None
    moe = trained(dataclasses.replace(PLAIN, **kind | (features or {})))
    slot.replace(moe)
    config = ours.SparseDistilledConfig(
        dense_config=record["config"],
        sparse_layers={slot.path: dataclasses.asdict(moe.shape)},
    )
    sparse = tf.AutoModelForCausalLM.from_config(config).eval()
    sparse.load_state_dict({f"dense.{k}": v for k, v in model.state_dict().items()})
    return model, sparse


def ids(tokens: int = 24) -> torch.Tensor:
    return torch.randint(3, 64, (2, tokens), generator=torch.Generator().manual_seed(2))


@torch.inference_mode()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=ids()).logits


def continued(model: tf.PreTrainedModel, **changes) -> torch.Tensor:
    greedy = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    return model.generate(ids(8), **greedy | changes)  # type: ignore[operator]


FAMILIES = {
    "Llama": {"tie_word_embeddings": True},
    "Mistral": {"sliding_window": 8},
    "Qwen2": {},
    "Qwen3": {},
    "Olmo2": {},
    "Gemma": {},
    "Gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "Phi3": {},
    "Granite": {},
    "GPT2": {"n_inner": 64},
    "GPTNeoX": {},
    "Phi": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_any_family_survives_saving_and_loading(family: str, tmp_path: Path):
    model, sparse = sparse_pair(family, {"router_width": 5}, **FAMILIES[family])
    torch.testing.assert_close(logits(sparse), logits(model))
    sparse.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, info = tf.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(logits(loaded.eval()), logits(model), rtol=1e-5, atol=1e-5)
    again = loaded.config.dense_config.to_dict()
    before = model.config.to_dict()
    assert {k for k in before if again[k] != before[k]} <= {"_name_or_path", "dtype"}


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "GPT2"])
@pytest.mark.parametrize("features", [{}, EXPERT_CHOICE], ids=["token-choice", "expert-choice"])
def test_generate_is_the_dense_models_own_with_and_without_cache(family: str, features: dict):
    model, sparse = sparse_pair(family, features, **FAMILIES[family])
    expected = continued(model)
    assert torch.equal(continued(sparse), expected)
    assert torch.equal(continued(sparse, use_cache=False), expected)


def test_generate_obeys_the_generation_config_of_the_model():
    _, sparse = sparse_pair("Llama")
    sparse.generation_config = tf.GenerationConfig(max_new_tokens=3, min_new_tokens=3)
    assert sparse.generate(ids(8)).shape == (2, 11)


def test_tied_embeddings_stay_one_tensor_and_are_stored_once(tmp_path: Path):
    _, sparse = sparse_pair("Llama", tie_word_embeddings=True)
    sparse.save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    stored = dense.load_model(str(tmp_path)).num_parameters()
    assert (tmp_path / "model.safetensors").stat().st_size < 4 * stored + 10_000


def test_a_bfloat16_checkpoint_keeps_its_router_in_float32(tmp_path: Path):
    _, sparse = sparse_pair("Llama", EXPERT_CHOICE)
    sparse.to(torch.bfloat16).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    for dtype in ("auto", torch.bfloat16, torch.float32):
        loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        for name, tensor in loaded.state_dict().items():
            if ".router." in name:
                assert tensor.dtype == torch.float32
                assert torch.equal(tensor, sparse.state_dict()[name])
            else:
                assert tensor.dtype == (torch.float32 if dtype == torch.float32 else torch.bfloat16)


def test_device_map_and_attention_implementation_reach_the_dense_model(tmp_path: Path):
    model, sparse = sparse_pair("Llama")
    sparse.save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map="cpu", attn_implementation="eager"
    )
    assert loaded.dense.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(loaded.eval()), logits(model), rtol=1e-5, atol=1e-5)


def test_loss_is_the_dense_models_and_reaches_router_and_experts():
    model, sparse = sparse_pair("Llama")
    loss = sparse(input_ids=ids(), labels=ids()).loss
    torch.testing.assert_close(loss, model(input_ids=ids(), labels=ids()).loss)
    loss.backward()
    ffn = sparse.dense.model.layers[1].mlp
    assert all(p.grad is not None and p.grad.any() for p in ffn.parameters())


def test_resized_embeddings_serve_new_tokens():
    _, sparse = sparse_pair("Llama")
    sparse.resize_token_embeddings(70)
    assert logits(sparse).shape[-1] == 70
    assert sparse(input_ids=ids(), labels=ids()).loss.isfinite()


def test_configuration_records_each_layer_and_the_dense_model(tmp_path: Path):
    features = {"expert_widths": (8, 24, 16, 8, 16, 24)}
    model, sparse = sparse_pair("Gemma2", features)
    sparse.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["sparse_layers"].keys() == {"model.layers.1.mlp"}
    assert MoEShape(**config["sparse_layers"]["model.layers.1.mlp"]).widths == (
        8,
        24,
        16,
        8,
        16,
        24,
    )
    assert config["dense_config"]["model_type"] == "gemma2"
    loaded = tf.AutoConfig.from_pretrained(tmp_path)
    assert loaded.get_text_config().num_hidden_layers == model.config.num_hidden_layers


def test_a_path_that_the_dense_model_lacks_is_refused():
    config = ours.SparseDistilledConfig(
        dense_config=dense.describe(dense_model("Llama"))["config"],
        sparse_layers={"model.layers.7.mlp": dataclasses.asdict(PLAIN)},
    )
    with pytest.raises((AttributeError, IndexError)):
        ours.SparseDistilledForCausalLM(config)


# The file beside the weights


def test_the_file_imports_torch_and_transformers_and_nothing_of_this_package():
    assert set(sources.import_closure("pipeline.modeling.modeling_sparse_distilled")) == {
        FILE,
        FILE.parent.parent / "__init__.py",  # by its place
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only: a sparse checkpoint."""
    folder = tmp_path_factory.mktemp("saved") / "sparse"
    _, sparse = sparse_pair("Llama")
    sparse.save_pretrained(folder)
    return folder


def elsewhere(code: str, cwd: Path) -> str:
    """What a fresh process without this package prints, or the last line of its error."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import torch, transformers as tf\n{code}"],
        cwd=cwd,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "cache"), "PATH": ""},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    return (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1]


def test_a_checkpoint_brings_the_file_and_says_so(saved: Path):
    assert (saved / FILE.name).read_text() == FILE.read_text()
    config = json.loads((saved / "config.json").read_text())
    assert config["model_type"] == "sparse_distilled"
    assert config["auto_map"] == {
        "AutoConfig": "modeling_sparse_distilled.SparseDistilledConfig",
        "AutoModelForCausalLM": "modeling_sparse_distilled.SparseDistilledForCausalLM",
    }


@pytest.mark.slow
def test_loading_without_trust_fails_and_names_the_remedy(saved: Path, tmp_path: Path):
    code = f"print(type(tf.AutoModelForCausalLM.from_pretrained({str(saved)!r})))"
    assert "trust_remote_code=True" in elsewhere(code, tmp_path)


@pytest.mark.slow
def test_loading_runs_the_file_of_the_folder_and_no_cached_copy_of_another(
    saved: Path, tmp_path: Path
):
    """Two folders of one name, one cache: each gets its own file."""
    for name, line in (("one", ""), ("two", "\nMARK = 2\n")):
        shutil.copytree(saved, tmp_path / name / "sparse")
        path = tmp_path / name / "sparse" / FILE.name
        path.write_text(path.read_text() + line)
    code = """
import sys
for name in ("one", "two", "one"):
    model = tf.AutoModelForCausalLM.from_pretrained(f"{name}/sparse", trust_remote_code=True)
    print(hasattr(sys.modules[type(model).__module__], "MARK"), end=" ")
"""
    assert elsewhere(code, tmp_path) == "False True False"


@pytest.mark.slow
def test_a_model_opened_elsewhere_is_saved_with_its_file(saved: Path, tmp_path: Path):
    code = f"""
model = tf.AutoModelForCausalLM.from_pretrained({str(saved)!r}, trust_remote_code=True)
model.save_pretrained("again")
print(type(model).__name__)
"""
    assert elsewhere(code, tmp_path) == "SparseDistilledForCausalLM"
    assert (tmp_path / "again" / FILE.name).read_text() == FILE.read_text()
    assert torch.equal(
        logits(dense.load_model(str(tmp_path / "again"))), logits(dense.load_model(str(saved)))
    )


@pytest.mark.parametrize("trust", [False, True])
def test_load_model_runs_the_code_of_this_package_and_not_the_folders(
    saved: Path, tmp_path: Path, trust: bool
):
    folder = tmp_path / "sparse"
    shutil.copytree(saved, folder)
    (folder / FILE.name).write_text("raise SystemExit('the code of the folder ran')")
    model = dense.load_model(str(folder), trust_remote_code=trust)
    assert type(model) is ours.SparseDistilledForCausalLM
    assert torch.equal(logits(model), logits(dense.load_model(str(saved))))


def test_register_can_be_called_again():
    modeling.register()
    assert ours.SparseDistilledForCausalLM._auto_class == "AutoModelForCausalLM"
