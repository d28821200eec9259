"""What the documents show is run: the example in Python, and the original's command lines."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

PROJECT = Path(__file__).parent.parent
TEXT = (PROJECT / "pipeline" / "dense.py").read_text()


def fenced(document: str, language: str) -> list[str]:
    """The blocks of that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document, re.DOTALL | re.MULTILINE)


def write_dense(folder: Path) -> None:
    """A tiny Llama with a tokenizer trained on a text that is at hand."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<eos>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(
        folder
    )
    config = tf.LlamaConfig(
        vocab_size=320,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    tf.LlamaForCausalLM(config).save_pretrained(folder)


@pytest.mark.slow
def test_the_eight_steps_run_as_they_stand(project: Path, monkeypatch, capsys):
    """But for where the dense model and the text come from."""
    write_dense(project / "dense")
    parts = [part for part in re.split(r"(?=\bclass |\bdef )", TEXT) if part.strip()]
    import datasets

    dataset = datasets.Dataset.from_dict({"text": parts * 3})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: dataset)
    document = (PROJECT / "docs" / "example.md").read_text()
    steps = fenced(document, "python")
    assert len(steps) == 8
    code = "\n".join(steps).replace('"HuggingFaceTB/SmolLM2-135M"', '"dense"')
    names: dict = {}
    exec(compile(code, "docs/example.md", "exec"), names)
    results, sparse = names["results"], names["sparse_model"]
    assert results.keys() == {0, 1}
    assert all(layer["mse"] > 0 and -1 <= layer["cosine_sim"] <= 1 for layer in results.values())
    assert {layer["verdict"] for layer in results.values()} <= {"good", "below target"}
    assert names["outputs"].logits.shape[-1] == 320
    assert "layer.safetensors" in capsys.readouterr().out
    kinds = {type(layer.mlp).__name__ for layer in sparse.model.layers}
    assert kinds == {"SparseMoE"}


def test_every_setting_that_the_table_names_is_one(project: Path):
    """And every parameter of the original is in it."""
    from pipeline import compose
    from pipeline.config import leaves

    document = (PROJECT / "docs" / "from-the-original.md").read_text()
    known = set(leaves(compose.load([])))
    named = set(re.findall(r"`((?:moe|train|data|model|runtime|convert)\.[a-z_.]+)", document))
    assert named - known == {"convert.dense", "convert.layers", "convert.output"} - known
    moe = "n_experts moe_top_k moe_capacity_factor moe_routing d_ff_expert init_from_dense"
    training = "learning_rate use_cosine_loss cosine_loss_weight sequential_layers"
    dynamic = "dynamic_experts reallocate_every_n_steps growth_factor shrink_factor"
    original = f"{moe} {training} {dynamic} min_d_ff max_d_ff".split()
    assert [name for name in original if f"`{name}`" not in document] == []


def test_the_documents_command_lines_are_ones_that_parse():
    """Those that the end-to-end tests run at pico size."""
    document = (PROJECT / "docs" / "from-the-original.md").read_text()
    lines = [line for block in fenced(document, "") for line in block.splitlines()]
    assert [shlex.split(line)[:3] for line in lines] == [
        ["python", "-m", "pipeline"],
        ["dvc", "exp", "run"],
        ["dvc", "exp", "run"],
        ["dvc", "exp", "run"],
    ]
