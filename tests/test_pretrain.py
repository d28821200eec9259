"""The embedded dense model: its training is continued exactly, and keeps its best state."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from pipeline import corpus, pretrain, resume
from pipeline.config import EmbeddedModelConfig
from pipeline.documents import Document
from pipeline.errors import ArtifactError
from pipeline.progress import Progress, silent

CONFIG = EmbeddedModelConfig(
    vocab_size=320,
    d_model=16,
    d_ff=24,
    n_layers=1,
    n_heads=4,
    n_kv_heads=2,
    sequence_length=16,
    batch_tokens=64,
    max_steps=12,
    learning_rate=3e-2,
    weight_decay=0.1,
    warmup_steps=2,
    evaluate_every=2,
    patience=3,
    checkpoint_every=4,
)
WEIGHTS = "model.safetensors"


def text(seed: int, words: str) -> str:
    return " ".join(np.random.default_rng(seed).choice(words.split(), 40))


def documents(first: int, n: int, words: str = "the list of a value returns none if it is not set"):
    return [Document(str(i), text(i, words)) for i in range(first, first + n)]


LIKE = {"train": documents(0, 12), "validation": documents(100, 4)}
UNLIKE = {"train": documents(0, 4), "validation": documents(100, 2, "zebra quartz jumped vixen")}
"""What is learned from these makes validation worse, soon."""


def trained(
    folder: Path,
    splits: dict[str, list[Document]] = LIKE,
    progress: Progress = silent,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Path:
    pretrain.train(
        EmbeddedModelConfig(**vars(CONFIG) | changes),
        splits,
        folder,
        seed=seed,
        device=torch.device("cpu"),
        dtype=dtype,
        progress=progress,
    )
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def validation_blocks(splits: dict[str, list[Document]]) -> torch.Tensor:
    tokenizer = pretrain.train_tokenizer(splits["train"], CONFIG.vocab_size)
    packed = corpus.pack(tokenizer, splits["validation"], CONFIG.sequence_length)
    return torch.from_numpy(packed).long()


def validation_loss(model: torch.nn.Module, splits: dict[str, list[Document]] = LIKE) -> float:
    """As transformers computes it."""
    blocks = validation_blocks(splits)
    with torch.inference_mode():
        return float(model(input_ids=blocks, labels=blocks).loss)


class StoppedError(Exception):
    pass


def stop_at(step: int, note: str = "loss") -> Callable[[int, int, str], None]:
    def progress(done: int, total: int, said: str = "") -> None:
        if done == step and said.startswith(note):
            raise StoppedError

    return progress


class Notes:
    """What the progress said last."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        self.done, self.total, self.note = done, total, note

    @property
    def stopped_and_best(self) -> tuple[int, int]:
        found = re.fullmatch(r"stopped at (\d+), best (\d+)", self.note)
        assert found
        return int(found[1]), int(found[2])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("pretrain") / "model")


# The tokenizer


@pytest.fixture(scope="module")
def tokenizers(undisturbed: Path) -> list[Any]:
    """As trained, and as opened from the model's folder."""
    own = pretrain.train_tokenizer(LIKE["train"], CONFIG.vocab_size)
    return [own, AutoTokenizer.from_pretrained(undisturbed)]


@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.text("aeiou \n\t.,'", max_size=60))
def test_tokenizer_gives_back_any_text(tokenizers, text: str):
    own, opened = (tokenizer(text)["input_ids"] for tokenizer in tokenizers)
    assert own == opened
    assert all(tokenizer.decode(own) == text for tokenizer in tokenizers)


def test_tokenizer_has_learned_the_training_text_and_no_more_tokens_than_configured(tokenizers):
    assert 257 < len(tokenizers[0]) <= CONFIG.vocab_size
    assert len(tokenizers[0](LIKE["train"][0].text)["input_ids"]) < len(LIKE["train"][0].text) / 2


def test_tokenizer_adds_nothing_and_its_end_token_stands_for_all_special_ones(tokenizers):
    for tokenizer in tokenizers:
        assert tokenizer("none").input_ids == tokenizer("none", add_special_tokens=False).input_ids
        ids = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        assert ids == {tokenizer(pretrain.END).input_ids[0]}


# Training


def test_saved_folder_opens_with_transformers_alone(undisturbed: Path):
    model, info = AutoModelForCausalLM.from_pretrained(undisturbed, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model) is LlamaForCausalLM and model.dtype is torch.float32
    tokenizer = AutoTokenizer.from_pretrained(undisturbed)
    ids = tokenizer("the list", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]
    assert not {resume.CHECKPOINT, "checkpoint.partial"} & files(undisturbed).keys()


def test_the_model_has_the_configured_sizes_and_tied_embeddings(undisturbed: Path):
    config = AutoModelForCausalLM.from_pretrained(undisturbed).config
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (320, 16, 24)
    assert (config.num_hidden_layers, config.num_attention_heads) == (1, 4)
    assert (config.num_key_value_heads, config.tie_word_embeddings) == (2, True)
    assert "lm_head.weight" not in load_file(undisturbed / WEIGHTS)


def test_validation_loss_falls(undisturbed: Path):
    torch.manual_seed(0)
    tokenizer = pretrain.train_tokenizer(LIKE["train"], CONFIG.vocab_size)
    start = validation_loss(pretrain.build(CONFIG, tokenizer))
    assert start == pytest.approx(math.log(CONFIG.vocab_size), rel=0.05)
    assert validation_loss(AutoModelForCausalLM.from_pretrained(undisturbed)) < 0.8 * start


def test_loss_is_that_of_transformers():
    torch.manual_seed(0)
    tokenizer = pretrain.train_tokenizer(LIKE["train"], CONFIG.vocab_size)
    model = pretrain.build(CONFIG, tokenizer)
    batch = torch.randint(CONFIG.vocab_size, (3, 16))
    expected = model(input_ids=batch, labels=batch).loss
    torch.testing.assert_close(pretrain._loss(model, batch, torch.float32), expected)


def test_a_steps_gradient_has_at_most_norm_one():
    torch.manual_seed(0)
    model = pretrain.build(CONFIG, pretrain.train_tokenizer(LIKE["train"], CONFIG.vocab_size))
    for weight in model.parameters():
        weight.data *= 20
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = torch.randint(CONFIG.vocab_size, (3, 16))
    pretrain._step(pretrain.Run(model, optimizer), batch, CONFIG, torch.float32)
    clipped = torch.stack([w.grad.norm() for w in model.parameters() if w.grad is not None]).norm()
    assert clipped == pytest.approx(1, rel=1e-3)


def test_products_in_bf16_leave_the_weights_in_float32(tmp_path: Path, undisturbed: Path):
    weights = load_file(trained(tmp_path / "model", dtype=torch.bfloat16) / WEIGHTS)
    assert {t.dtype for t in weights.values()} == {torch.float32}
    assert (undisturbed / WEIGHTS).read_bytes() != (tmp_path / "model" / WEIGHTS).read_bytes()


def test_early_stop_keeps_the_state_of_the_least_validation_loss(tmp_path: Path):
    states: dict[int, dict[str, torch.Tensor]] = {}
    best_loss: list[float] = []
    notes = Notes()

    def keep(done: int, total: int, note: str = "") -> None:
        notes(done, total, note)
        if note.startswith("loss"):
            path = tmp_path / "model" / resume.CHECKPOINT
            states[done] = load_file(path)
            best_loss.append(json.loads(metadata_of(path)["kept"])["best_loss"])

    often = {"evaluate_every": 1, "checkpoint_every": 1, "patience": 4, "max_steps": 60}
    folder = trained(tmp_path / "model", UNLIKE, keep, batch_tokens=5 * 16, **often)
    stopped, best = notes.stopped_and_best
    assert stopped - best == 4 and stopped < 60
    assert (notes.done, notes.total) == (60, 60)

    tokenizer = pretrain.train_tokenizer(UNLIKE["train"], CONFIG.vocab_size)
    model, losses = pretrain.build(CONFIG, tokenizer), {}
    for step, tensors in states.items():
        own = {name.removeprefix("model/"): t for name, t in tensors.items() if "model/" in name}
        model.load_state_dict(own)
        losses[step] = validation_loss(model, UNLIKE)
    assert min(losses, key=losses.__getitem__) == best
    assert best_loss[-1] == pytest.approx(losses[best], rel=1e-5)
    assert len(validation_blocks(UNLIKE)) % 5, "the last batch of the validation is a short one"
    for name, tensor in load_file(folder / WEIGHTS).items():
        assert torch.equal(tensor, states[best][f"model/{name}"]), name
        assert not torch.equal(tensor, states[stopped][f"model/{name}"]), name


def test_the_last_step_is_validated_whatever_the_interval(tmp_path: Path):
    notes = Notes()
    trained(tmp_path / "model", progress=notes, evaluate_every=100)
    assert notes.stopped_and_best == (12, 12)


def test_validation_text_decides_when_to_stop_and_nothing_else(tmp_path: Path):
    states = []
    for name, validation in (("a", LIKE["validation"]), ("b", UNLIKE["validation"])):
        with pytest.raises(StoppedError):
            trained(tmp_path / name, LIKE | {"validation": validation}, stop_at(4))
        found = load_file(tmp_path / name / resume.CHECKPOINT)
        states.append({key: t for key, t in found.items() if not key.startswith("best/")})
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(t, states[1][key]) for key, t in states[0].items())


def test_a_training_that_diverges_is_refused_with_the_setting(tmp_path: Path):
    with pytest.raises(ArtifactError, match="diverged") as refusal:
        trained(tmp_path / "model", learning_rate=1e30)
    assert "lower model.embedded.learning_rate" in refusal.value.remedy
    assert WEIGHTS not in files(tmp_path / "model")


# Resuming


@pytest.mark.parametrize("step", [4, 7, 11])
def test_an_interrupted_training_goes_on_to_the_same_bytes(
    tmp_path: Path, undisturbed: Path, step: int
):
    with pytest.raises(StoppedError):
        trained(tmp_path / "model", progress=stop_at(step))
    assert files(tmp_path / "model").keys() == {resume.CHECKPOINT}
    seen: list[int] = []
    trained(tmp_path / "model", progress=lambda done, total, note="": seen.append(done))
    assert seen[0] == step // 4 * 4 + 1
    assert files(tmp_path / "model") == files(undisturbed)


def test_a_training_stopped_before_it_saves_goes_on_to_the_same_bytes(
    tmp_path: Path, undisturbed: Path
):
    with pytest.raises(StoppedError):
        trained(tmp_path / "model", progress=stop_at(12, "stopped"))
    assert files(trained(tmp_path / "model")) == files(undisturbed)


def test_a_training_stopped_early_is_stopped_early_again(tmp_path: Path):
    changes = {"patience": 1, "max_steps": 60, "checkpoint_every": 1}
    notes = Notes()
    expected = files(trained(tmp_path / "a", UNLIKE, notes, **changes))
    stopped, _ = notes.stopped_and_best
    with pytest.raises(StoppedError):
        trained(tmp_path / "b", UNLIKE, stop_at(stopped), **changes)
    again = Notes()
    assert files(trained(tmp_path / "b", UNLIKE, again, **changes)) == expected
    assert again.note == notes.note


@pytest.mark.parametrize("part", ["exp_avg", "exp_avg_sq", "model", "step"])
def test_a_checkpoint_that_lost_a_part_does_not_give_the_same_bytes(
    tmp_path: Path, undisturbed: Path, part: str
):
    """The control of the tests above: each part of the checkpoint is needed."""
    with pytest.raises(StoppedError):
        trained(tmp_path / "model", progress=stop_at(7))
    path = tmp_path / "model" / resume.CHECKPOINT
    metadata = metadata_of(path)
    tensors = load_file(path)
    chosen = [key for key in tensors if part in (key.split("/")[0], key.split("/")[-1])]
    assert chosen
    lost = {k: t * 0 if k in chosen else t for k, t in tensors.items()}
    save_file(lost, path, metadata | {"digest": resume.digest(lost, metadata)})
    trained(tmp_path / "model")
    assert (tmp_path / "model" / WEIGHTS).read_bytes() != (undisturbed / WEIGHTS).read_bytes()


# Batches


def starts(tokens: torch.Tensor, step: int, seed: int = 0, batch_size: int = 4) -> list[int]:
    """Where in the stream each sequence of a batch begins."""
    batch = pretrain._batch(tokens, batch_size, seed, step)
    length = tokens.shape[1]
    assert torch.equal(batch, batch[:, :1] + torch.arange(length))
    return batch[:, 0].tolist()


def test_batch_takes_every_sequence_of_an_epoch_once():
    tokens = torch.arange(9 * 6).view(9, 6)
    for epoch in range(5):
        taken = starts(tokens, 2 * epoch) + starts(tokens, 2 * epoch + 1)
        assert sorted(taken) == list(range(min(taken), min(taken) + 8 * 6, 6))


def test_batch_cuts_and_mixes_every_epoch_differently():
    tokens = torch.arange(9 * 6).view(9, 6)
    epochs = [starts(tokens, 2 * e) + starts(tokens, 2 * e + 1) for e in range(20)]
    offsets = [min(taken) for taken in epochs]
    assert set(offsets) == set(range(6))
    orders = {
        tuple((t - offset) // 6 for t in taken)
        for taken, offset in zip(epochs, offsets, strict=True)
    }
    assert len(orders) == 20


def test_batch_depends_on_seed_and_step_alone():
    tokens = torch.arange(9 * 6).view(9, 6)
    assert starts(tokens, 3) == starts(tokens, 3)
    assert starts(tokens, 3) != starts(tokens, 3, seed=1)


def test_batch_of_text_of_one_block_is_that_block():
    tokens = torch.arange(6).view(1, 6)
    assert all(starts(tokens, step) == [0] for step in range(3))


# Settings

CHANGES: dict[str, Any] = {
    "vocab_size": 330,
    "d_model": 24,
    "d_ff": 32,
    "n_layers": 2,
    "n_heads": 2,
    "n_kv_heads": 4,
    "sequence_length": 12,
    "batch_tokens": 32,
    "max_steps": 13,
    "learning_rate": 2e-2,
    "weight_decay": 0.5,
    "warmup_steps": 5,
    "evaluate_every": 7,
    "patience": 1,
    "checkpoint_every": 3,
}


@pytest.fixture(scope="module")
def worsening(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, tuple[int, int]]:
    """Weights, and where it stopped, of a training that makes validation worse."""
    notes = Notes()
    folder = trained(tmp_path_factory.mktemp("worse") / "model", UNLIKE, notes)
    return (folder / WEIGHTS).read_bytes(), notes.stopped_and_best


@pytest.mark.parametrize("name", [f.name for f in fields(EmbeddedModelConfig)])
def test_every_setting_of_the_embedded_model_matters(tmp_path: Path, worsening, name: str):
    change = {name: CHANGES[name]}
    if name == "checkpoint_every":  # where an interrupted training goes on
        with pytest.raises(StoppedError):
            trained(tmp_path / "model", progress=stop_at(3), **change)
        assert (tmp_path / "model" / resume.CHECKPOINT).is_file()
        return
    notes = Notes()
    folder = trained(tmp_path / "model", UNLIKE, notes, **change)
    weights, stopped = worsening
    if name == "patience":
        assert notes.stopped_and_best != stopped
    else:
        assert (folder / WEIGHTS).read_bytes() != weights


def test_the_seed_decides_the_start_and_the_order_of_the_text(tmp_path: Path):
    def weights(seed: int, learning_rate: float) -> dict[str, torch.Tensor]:
        folder = trained(
            tmp_path / f"{seed}{learning_rate}", seed=seed, learning_rate=learning_rate
        )
        return load_file(folder / WEIGHTS)

    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(weights(0, 0.0)[name], weights(1, 0.0)[name])
    tokens = torch.arange(9 * 6).view(9, 6)
    assert starts(tokens, 0, seed=0) != starts(tokens, 0, seed=1)
