"""What the stores hold is what every FFN was given and gave, in the order of the tokens."""

import errno
import re
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from pipeline import artifacts, behind, capture, corpus, dense, durable, runtime
from pipeline.activations import INPUT, OUTPUT, hook_ffn, record_ffn
from pipeline.config import CaptureConfig, Codec, Config, DataConfig, Dtype, TokensConfig
from pipeline.documents import Document
from pipeline.errors import ArtifactError, InputError
from pipeline.ffn import DenseFFN
from pipeline.pretrain import train_tokenizer
from pipeline.progress import Progress, silent
from pipeline.shard_writer import ShardWriter
from pipeline.stages import CAPTURE, DENSE, TOKENS
from pipeline.stages import capture as stage
from pipeline.store import LayerReader
from pipeline.store_writer import LayerWriter
from pipeline.transfer import Transfer

LENGTH, VOCABULARY = 8, 64
SEQUENCES = {"train": 5, "validation": 1, "heldout": 2}

# In float32 and 16 channels: chunks of one sequence, shards of two. `train` has a ragged last one.
CONFIG = CaptureConfig(
    dtype=Dtype.float32,
    codec=Codec.compact,
    shard_mb=2 * LENGTH * 16 * 4 / 1e6,
    chunk_mb=LENGTH * 16 * 4 / 1e6,
    batch_size=3,
    heldout_tokens=1000,
)
SHARDS = {"train": 3, "validation": 1, "heldout": 1}


def tiny(layers: int = 3, **changes: Any) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        **{"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24}
        | {"num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 1}
        | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3}
        | changes
    )
    return tf.AutoModelForCausalLM.from_config(config).eval()


def blocks() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        split: torch.randint(VOCABULARY, (n, LENGTH), generator=generator)
        for split, n in SEQUENCES.items()
    }


def captured(
    folder: Path,
    model: nn.Module | None = None,
    layers: Iterable[int | str] | None = (0, 2),
    tokens: Mapping[str, Tensor] | None = None,
    progress: Progress = silent,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Path:
    folder.mkdir(exist_ok=True)
    capture.capture_activations(
        model or tiny(),
        tokens or blocks(),
        folder,
        layers=layers,
        cfg=CaptureConfig(**vars(CONFIG) | changes),
        dtype=dtype,
        attributes={"tokens": "t"},
        progress=progress,
    )
    return folder


def by_hand(model: tf.PreTrainedModel, sequences: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Layer -> (input, output) of its FFN, one sequence at a time; no hook is used."""
    recorded: dict[int, list[tuple[Tensor, Tensor]]] = {}
    with torch.inference_mode():
        for tokens in sequences:
            embedded = model.model.embed_tokens(tokens[None])
            position = torch.arange(len(tokens))[None]
            rotary = model.model.rotary_emb(embedded, position)
            mask = torch.full((len(tokens), len(tokens)), -torch.inf).triu(1)[None, None]
            for k, layer in enumerate(model.model.layers):
                attended, _ = layer.self_attn(
                    layer.input_layernorm(embedded),
                    position_embeddings=rotary,
                    attention_mask=mask,
                )
                embedded = embedded + attended
                x = layer.post_attention_layernorm(embedded)
                y = layer.mlp(x)
                embedded = embedded + y
                recorded.setdefault(k, []).append((x[0], y[0]))
    return {
        k: (torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs]))
        for k, pairs in recorded.items()
    }


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def layer_files(folder: Path, *layers: int) -> dict[str, bytes]:
    return {
        name: content
        for name, content in files(folder).items()
        if name.startswith(tuple(f"{kind}_{k}." for k in layers for kind in ("layer", "ffn")))
    }


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layer, captured without interruption in float32."""
    return captured(tmp_path_factory.mktemp("capture") / "all", layers=[0, 1, 2])


def watched(model: nn.Module) -> list[Tensor]:
    """Fills with every batch of token ids that the model is given."""
    seen: list[Tensor] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    return seen


class StopError(Exception):
    pass


class StopAfter:
    """A progress that ends the run at its n-th call."""

    def __init__(self, calls: int) -> None:
        self.left, self.seen = calls, []

    def __call__(self, done: int, total: int, note: str = "") -> None:
        self.seen.append((done, total))
        self.left -= 1
        if not self.left:
            raise StopError


# Hooks


def test_record_ffn_gives_each_ffns_input_and_output_in_token_order():
    model, sequences = tiny(), blocks()["train"]
    slots = dense.find_ffns(model)
    expected = by_hand(model, sequences)
    with torch.inference_mode(), record_ffn({s.index: s.module for s in slots}) as recorded:
        model(input_ids=sequences)
    assert recorded.keys() == expected.keys()
    for k, (x, y) in recorded.items():
        assert x.shape == y.shape == (sequences.numel(), 16)
        torch.testing.assert_close(x, expected[k][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(y, expected[k][1], rtol=1e-5, atol=1e-5)
        with torch.inference_mode():
            assert torch.equal(slots[k].module(x), y)


def test_record_ffn_holds_the_last_forward_pass_and_no_graph():
    model, sequences = tiny(), blocks()["train"]
    with record_ffn({1: dense.find_ffns(model)[1].module}) as recorded:
        model(input_ids=sequences[:2])
        first = recorded[1]
        model(input_ids=sequences[2:5])
    assert (len(first[0]), len(recorded[1][0])) == (2 * LENGTH, 3 * LENGTH)
    assert not any(t.requires_grad for t in (*first, *recorded[1]))


def test_record_ffn_leaves_no_hook_behind():
    model = tiny()
    modules = {s.index: s.module for s in dense.find_ffns(model)}
    with record_ffn(modules) as recorded:
        assert hooks(model) == 3
    assert hooks(model) == 0
    model(input_ids=blocks()["heldout"])
    assert recorded == {}


def test_record_ffn_leaves_no_hook_behind_after_an_exception():
    model = tiny()
    with pytest.raises(StopError), record_ffn({s.index: s.module for s in dense.find_ffns(model)}):
        raise StopError
    assert hooks(model) == 0


def test_a_pass_ends_behind_the_last_ffn_that_is_wanted(undisturbed: Path, tmp_path: Path):
    """No logits are computed, nor a layer further on; the model then runs as a whole again."""
    model, ran = tiny(), []
    for name in ("lm_head", "model.norm", "model.layers.2", "model.layers.1"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    folder = captured(tmp_path / "a", model, layers=[0, 1])
    assert files(folder) == layer_files(undisturbed, 0, 1)
    assert not ran, "layer 1 is left behind its FFN"
    model(input_ids=blocks()["heldout"])
    assert ran == ["model.layers.1", "model.layers.2", "model.norm", "lm_head"]


def test_hook_ffn_gives_rows_of_the_models_own(tmp_path: Path):
    """Whoever keeps them copies them: a model may add to its FFN's output in place."""
    model, seen = tiny(), {}
    slots = dense.find_ffns(model)
    with (
        torch.inference_mode(),
        hook_ffn({1: slots[1]}, lambda *given: seen.update([(given[:2], given[2])])),
    ):
        model(input_ids=blocks()["train"])
    assert seen.keys() == {(1, INPUT), (1, OUTPUT)}
    assert all(rows.shape == (5 * LENGTH, 16) for rows in seen.values())
    assert hooks(model) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transfer_copies_into_the_dtype_of_its_target(dtype: torch.dtype):
    rows, target = torch.randn(6, 4), torch.empty(6, 4, dtype=dtype)
    transfer = Transfer()
    wait = transfer(target, rows)
    kept = rows.clone()
    rows.zero_()
    wait()
    assert torch.equal(target, kept.to(dtype))
    with pytest.raises(AssertionError):
        transfer(target, rows[:1])  # it would be repeated


# Stores


def test_capture_stores_every_splits_rows_in_token_order(undisturbed: Path):
    for split, sequences in blocks().items():
        expected = by_hand(tiny(), sequences)
        for k in range(3):
            reader = LayerReader(undisturbed / f"layer_{k}.zarr")
            assert (reader.sequence_length, reader.rows[split]) == (LENGTH, sequences.numel())
            for found, wanted in zip(reader.read(split), expected[k], strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_stored_formula_of_the_stored_input_is_the_stored_output(undisturbed: Path):
    for k in range(3):
        ffn = DenseFFN.load(undisturbed / f"ffn_{k}.safetensors")
        x, y = LayerReader(undisturbed / f"layer_{k}.zarr").read("train")
        torch.testing.assert_close(ffn(x), y, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(ffn(x), y.roll(1, dims=0), rtol=0.1, atol=0.1)


def test_capture_leaves_the_model_as_it_was(tmp_path: Path):
    model = tiny()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    captured(tmp_path / "a", model, layers=[1])
    assert hooks(model) == 0
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_capture_of_some_layers_gives_the_same_stores_and_no_others(
    undisturbed: Path, tmp_path: Path
):
    some = files(captured(tmp_path / "some", layers=[2, 0]))
    assert some == layer_files(undisturbed, 0, 2)


@pytest.mark.parametrize(
    ("layers", "meant"),
    [(None, [0, 1, 2]), (["*.mlp"], [0, 1, 2]), (["*.2.*", 0, "model.layers.0.mlp"], [0, 2])],
)
def test_capture_takes_layers_by_name(undisturbed: Path, tmp_path: Path, layers, meant: list[int]):
    assert files(captured(tmp_path / "a", layers=layers)) == layer_files(undisturbed, *meant)


def uneven() -> tf.PreTrainedModel:
    model = tiny()
    for layer, width in zip(model.model.layers, (24, 40, 8), strict=True):
        layer.mlp = type(layer.mlp)(tiny(1, intermediate_size=width).config)
    return model


def double_wide() -> tf.PreTrainedModel:
    torch.manual_seed(0)
    config = tf.Gemma4TextConfig(
        **{"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24}
        | {"num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1}
        | {"head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 8}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
        | {"vocab_size_per_layer_input": VOCABULARY, "use_double_wide_mlp": True}
    )
    return tf.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("model", "widths"), [(uneven, (24, 40, 8)), (double_wide, (24, 24, 48, 48))]
)
def test_capture_of_layers_of_unlike_widths(tmp_path: Path, model, widths: tuple[int, ...]):
    folder = captured(tmp_path / "a", model(), layers=None)
    for k, width in enumerate(widths):
        ffn = DenseFFN.load(folder / f"ffn_{k}.safetensors")
        x, y = LayerReader(folder / f"layer_{k}.zarr").read("train")
        assert (ffn.d_ff, ffn.d_model) == (width, 16) and x.shape == y.shape == (40, 16)
        torch.testing.assert_close(ffn(x), y, rtol=1e-5, atol=1e-6)
    assert not (folder / f"layer_{len(widths)}.zarr").exists()


@pytest.mark.parametrize("batch_size", [1, 100])
def test_batch_size_does_not_change_what_is_stored(
    undisturbed: Path, tmp_path: Path, batch_size: int
):
    model = tiny()
    seen = watched(model)
    folder = captured(tmp_path / "a", model, layers=[2], batch_size=batch_size)
    assert max(map(len, seen)) == min(batch_size, 5), "a shard, of two sequences, is no limit"
    for split in SEQUENCES:
        expected, found = (
            LayerReader(f / "layer_2.zarr").read(split) for f in (undisturbed, folder)
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_capture_rounds_to_the_stored_dtype(undisturbed: Path, tmp_path: Path, dtype: torch.dtype):
    exact = LayerReader(undisturbed / "layer_1.zarr").read("train")
    # Half the bytes per value and per shard: the same batches.
    shard_mb = CONFIG.shard_mb / 2
    folder = captured(tmp_path / "a", layers=[1], dtype=dtype, shard_mb=shard_mb)
    rounded = LayerReader(folder / "layer_1.zarr").read("train")
    assert torch.equal(torch.stack(rounded), torch.stack(exact).to(dtype))


@pytest.mark.parametrize(
    ("name", "value"), [("codec", Codec.none), ("shard_mb", 1.0), ("chunk_mb", 0.0001)]
)
def test_settings_of_the_store_change_its_bytes_and_not_its_rows(
    undisturbed: Path, tmp_path: Path, name: str, value: Any
):
    folder = captured(tmp_path / "a", layers=[1], **{name: value})
    assert files(folder) != layer_files(undisturbed, 1)
    for split in SEQUENCES:
        expected, found = (
            LayerReader(f / "layer_1.zarr").read(split) for f in (undisturbed, folder)
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_ffn_weights_are_stored_in_the_models_dtype(tmp_path: Path):
    model = tiny().bfloat16()
    folder = captured(tmp_path / "a", model, layers=[1])
    stored = DenseFFN.load(folder / "ffn_1.safetensors")
    for name, tensor in dense.find_ffns(model)[1].weights().tensors().items():
        assert torch.equal(stored.tensors()[name], tensor), name


# Resuming


@pytest.mark.parametrize(("calls", "shards"), [(1, 0), (2, 1), (3, 3), (5, 5)])
def test_a_killed_capture_run_again_gives_the_bytes_of_an_undisturbed_one(
    undisturbed: Path, tmp_path: Path, calls: int, shards: int
):
    """One call before the first batch, one after each: the first ends within the second shard."""
    with pytest.raises(StopError):
        captured(tmp_path / "a", progress=StopAfter(calls))
    written = {p: p.stat() for p in (tmp_path / "a").rglob("c.*.0")}
    assert len(written) == 2 * 2 * shards, "two files of each layer"
    model = tiny()
    assert files(captured(tmp_path / "a", model)) == layer_files(undisturbed, 0, 2)
    for path, was in written.items():
        now = path.stat()
        assert (now.st_ino, now.st_mtime_ns) == (was.st_ino, was.st_mtime_ns), path
    assert hooks(model) == 0


@pytest.mark.parametrize(("batch_size", "first"), [(2, 2), (3, 0)])
def test_a_resumed_capture_runs_the_batches_that_something_is_missing_of(
    tmp_path: Path, batch_size: int, first: int
):
    """Whole, so that the same rows come out; the second batch begins where a shard does or not."""
    with pytest.raises(StopError):
        captured(tmp_path / "a", batch_size=batch_size, progress=StopAfter(2))
    model = tiny()
    seen = watched(model)
    captured(tmp_path / "a", model, batch_size=batch_size)
    left = [blocks()["train"][first:], blocks()["validation"], blocks()["heldout"]]
    assert torch.equal(torch.cat(seen), torch.cat(left))


def test_a_shard_that_one_layer_lacks_is_written_for_that_layer_alone(
    undisturbed: Path, tmp_path: Path
):
    folder = captured(tmp_path / "a")
    kept = {p: p.stat().st_mtime_ns for p in folder.rglob("c.*")}
    (folder / "layer_2.zarr" / "commits" / "train_00001.json").unlink()
    captured(folder)
    assert files(folder) == layer_files(undisturbed, 0, 2)
    rewritten = {p for p, was in kept.items() if p.stat().st_mtime_ns != was}
    train = folder / "layer_2.zarr" / "train"
    assert rewritten == {train / name / "c.1.0" for name in ("input", "output")}


def test_progress_ends_at_its_total_and_counts_what_was_there(tmp_path: Path):
    total = sum(SEQUENCES.values()) * LENGTH
    first, second = StopAfter(3), StopAfter(0)
    with pytest.raises(StopError):
        captured(tmp_path / "a", layers=[1], batch_size=2, progress=first)
    assert first.seen == [(2 * LENGTH * i, total) for i in range(3)]
    captured(tmp_path / "a", layers=[1], batch_size=2, progress=second)
    assert second.seen[0] == first.seen[-1]
    assert second.seen[-1] == (total, total)
    assert len(second.seen) == 1 + sum(SHARDS.values()) - 2


def test_a_store_of_other_tokens_is_not_continued(tmp_path: Path):
    with pytest.raises(StopError):
        captured(tmp_path / "a", progress=StopAfter(1))
    shorter = blocks() | {"train": blocks()["train"][:4]}
    with pytest.raises(ArtifactError, match="rows"):
        captured(tmp_path / "a", tokens=shorter)


def test_a_capture_ends_only_with_a_store_that_a_reader_accepts(tmp_path: Path):
    with pytest.raises(StopError):
        captured(tmp_path / "a", layers=[1], progress=StopAfter(2))
    commits = tmp_path / "a" / "layer_1.zarr" / "commits"
    (commits / "train_00007.json").write_bytes((commits / "train_00000.json").read_bytes())
    with pytest.raises(ArtifactError, match="train_00007"):
        captured(tmp_path / "a", layers=[1])


# Refusals


@pytest.mark.parametrize(("value", "named"), [(1e6, "inf"), (float("nan"), "nan")])
def test_an_activation_that_cannot_be_stored_is_refused_naming_its_layer(
    tmp_path: Path, value: float, named: str
):
    model = tiny()
    model.model.layers[1].mlp.down_proj.weight.data[5] = value
    with pytest.raises(InputError, match=r"layer_1\.zarr") as refusal:
        captured(tmp_path / "a", model, layers=[0, 1], dtype=torch.float16)
    assert re.search(rf"{named} in split train, shard 0, array output", str(refusal.value))
    assert refusal.value.exit_code == 3
    assert "capture.dtype=bfloat16" in refusal.value.remedy
    with pytest.raises(ArtifactError):
        LayerReader(tmp_path / "a" / "layer_1.zarr")


def test_what_overflows_float16_fits_bfloat16(tmp_path: Path):
    model = tiny(layers=2)
    model.model.layers[1].mlp.down_proj.weight.data *= 1e5
    folder = captured(tmp_path / "a", model, layers=[1], dtype=torch.bfloat16)
    assert LayerReader(folder / "layer_1.zarr").read("train")[1].abs().max() > 65504


@pytest.mark.parametrize("split", SEQUENCES)
def test_a_token_without_an_embedding_row_is_refused_before_any_work(tmp_path: Path, split: str):
    tokens = blocks()
    tokens[split][-1, 3] = VOCABULARY
    with pytest.raises(InputError, match="token id 64, 64 embedding rows") as refusal:
        captured(tmp_path / "a", tokens=tokens)
    assert refusal.value.exit_code == 3
    assert files(tmp_path / "a") == {}


def test_a_layer_that_the_model_lacks_is_refused_before_any_work(tmp_path: Path):
    for absent in (3, "*.3.mlp"):
        with pytest.raises(InputError, match="0 to 2"):
            captured(tmp_path / "a", layers=[0, absent])
    assert files(tmp_path / "a") == {}


@pytest.mark.parametrize(
    ("setting", "model", "stored"),
    [
        ("auto", "float32", "bfloat16"),
        ("auto", "bfloat16", "bfloat16"),
        ("auto", "float16", "float16"),
        ("float32", "bfloat16", "float32"),
        ("bfloat16", "float16", "bfloat16"),
        ("float16", "float32", "float16"),
    ],
)
def test_stored_dtype_is_the_configured_one_or_16_bits_of_the_models_kind(setting, model, stored):
    found = capture.stored_dtype(Dtype[setting], getattr(torch, model))
    assert found is getattr(torch, stored)


# The stage


@pytest.fixture
def upstream(project: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A sealed dense model and tokens in the working folder, and a configuration for them."""
    words = " ".join(str(i) for i in range(400))
    documents = [Document(str(i), f"{i} {words[i:]}") for i in range(60)]
    tokenizer = train_tokenizer(documents, 300)
    for folder in (DENSE, TOKENS):
        folder.mkdir(parents=True)
    model = tiny(layers=2, vocab_size=300)
    model.save_pretrained(DENSE / "model")
    tokenizer.save_pretrained(DENSE / "model")
    durable.write_json(DENSE / "dense.json", {"revision": None, "digests": {}})
    (project / "text.txt").write_text("\n".join(d.text for d in documents))
    data = DataConfig(files=[str(project / "text.txt")], shifted_files=[], sequence_length=LENGTH)
    data.tokens = TokensConfig(train=128, validation=64, heldout=64, shifted=64)
    for split in ("train", "validation", "heldout", "shifted"):
        packed = corpus.pack(tokenizer, documents, LENGTH, getattr(data.tokens, split))
        save(split, torch.from_numpy(packed))
    seal()
    cfg = Config(capture=CaptureConfig(**vars(CONFIG) | {"dtype": Dtype.auto}))
    cfg.model.id, cfg.model.device_map, cfg.model.trust_remote_code = None, None, False
    cfg.model.dtype, cfg.model.layers = Dtype.auto, [0, 1]
    return cfg


def save(split: str, tokens: Tensor) -> None:
    from safetensors.torch import save_file

    save_file({"tokens": tokens}, TOKENS / f"{split}.safetensors")


def seal() -> None:
    for folder in (DENSE, TOKENS):
        artifacts.write_manifest(folder, {})


def test_the_stage_stores_bf16_and_no_more_heldout_than_configured(upstream: Config):
    upstream.capture.heldout_tokens = 3 * LENGTH + 1
    stage.run(upstream)
    reader = LayerReader(CAPTURE / "layer_1.zarr")
    assert reader.dtype is torch.bfloat16
    assert reader.rows == {"train": 128, "validation": 64, "heldout": 3 * LENGTH}
    assert reader.attributes == {
        k: artifacts.digest(v) for k, v in (("dense", DENSE), ("tokens", TOKENS))
    }


def test_the_stage_refuses_a_token_without_an_embedding_row_in_any_text(upstream: Config):
    """Also in text that is only evaluated: `heldout` beyond what is captured, and `shifted`."""
    upstream.capture.heldout_tokens = LENGTH
    for split in ("heldout", "shifted"):
        tokens = corpus.read_blocks(TOKENS, split)
        changed = tokens.clone()
        changed[-1, -1] = 300
        save(split, changed)
        seal()
        with pytest.raises(InputError, match="token id 300, 300 embedding rows"):
            stage.run(upstream)
        save(split, tokens)
    assert not CAPTURE.exists()


# Beside the model


@pytest.mark.parametrize("apart", [False, True])
def test_arrays_written_at_once_give_the_bytes_of_one_after_the_other(tmp_path, monkeypatch, apart):
    def run(name: str) -> dict[str, bytes]:
        folder = tmp_path / name
        url = f"file://{folder}/objects" if apart else None
        capture.capture_activations(tiny(), blocks(), folder / "stores", cfg=CONFIG, store_url=url)
        return files(folder)

    monkeypatch.setattr(behind, "AT_ONCE", 1)
    apiece = run("apiece")
    monkeypatch.setattr(behind, "AT_ONCE", 4)
    meeting, add = threading.Barrier(2), ShardWriter.add

    def meet(self: ShardWriter, side: int, *more: Any) -> None:
        """Of the split that has one shard, which comes at once."""
        array = self._path.name, self._split, side
        if array in [(f"layer_{k}.zarr", "validation", k) for k in (INPUT, OUTPUT)]:
            meeting.wait(timeout=30)
        add(self, side, *more)

    monkeypatch.setattr(ShardWriter, "add", meet)
    assert run("at_once") == apiece


@pytest.mark.parametrize("spare", [0, 1])
@pytest.mark.parametrize(("buffers", "megabytes"), [(1, 256.0), (3, 1e-4), (16, 1e-9)])
def test_the_ring_does_not_change_what_is_stored(
    undisturbed: Path, tmp_path: Path, monkeypatch, buffers: int, megabytes: float, spare: int
):
    """One buffer, that every hook waits for; buffers of a few rows, and of one.

    Beside the model, and by turns with it.
    """
    monkeypatch.setattr(runtime, "cores", lambda: torch.get_num_threads() + spare)
    monkeypatch.setattr(behind, "RING", buffers)
    monkeypatch.setattr(behind, "RING_MB", megabytes)
    assert files(captured(tmp_path / "a")) == layer_files(undisturbed, 0, 2)


def test_no_more_rows_wait_than_the_ring_holds(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(behind, "RING", 2)
    waiting, most, lock = 0, 0, threading.Lock()
    transfer, add = Transfer.__call__, ShardWriter.add

    def count(change: int) -> None:
        nonlocal waiting, most
        with lock:
            waiting += change
            most = max(most, waiting)

    def taken(self: Transfer, *given: Any) -> Any:
        count(1)
        return transfer(self, *given)

    def slow(self: ShardWriter, *given: Any) -> None:
        time.sleep(0.02)
        add(self, *given)
        count(-1)

    monkeypatch.setattr(Transfer, "__call__", taken)
    monkeypatch.setattr(ShardWriter, "add", slow)
    captured(tmp_path / "a")
    assert (waiting, most) == (0, 2)


def test_rows_are_written_beside_a_model_that_leaves_a_core(tmp_path: Path, monkeypatch):
    """Its last layer waits until rows of the first are written."""
    monkeypatch.setattr(runtime, "cores", lambda: torch.get_num_threads() + 1)
    model, written, add = tiny(), threading.Event(), ShardWriter.add

    def note(self: ShardWriter, *given: Any) -> None:
        add(self, *given)
        written.set()

    monkeypatch.setattr(ShardWriter, "add", note)
    waited = []
    model.model.layers[2].register_forward_pre_hook(lambda *_: waited.append(written.wait(30)))
    captured(tmp_path / "a", model)
    assert waited and all(waited)


def test_a_model_that_takes_every_core_and_the_writers_take_turns(tmp_path: Path, monkeypatch):
    """No row is written while a layer runs; all of them are, whenever the ring is full."""
    monkeypatch.setattr(runtime, "cores", torch.get_num_threads)
    monkeypatch.setattr(behind, "RING", 3)
    model, running, seen, add = tiny(), threading.Event(), [], ShardWriter.add
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda *_: running.set())
        layer.self_attn.register_forward_hook(lambda *_: (time.sleep(0.02), running.clear())[1])

    def note(self: ShardWriter, *given: Any) -> None:
        seen.append(running.is_set())
        add(self, *given)

    monkeypatch.setattr(ShardWriter, "add", note)
    captured(tmp_path / "a", model)
    assert len(seen) > 6 and not any(seen)


@pytest.mark.parametrize("failing", ["close", "commit", "weights"])
def test_what_fails_beside_the_model_ends_the_capture(tmp_path: Path, monkeypatch, failing: str):
    """After the last batch too; run again, it is whole."""
    owner, name = {
        "close": (ShardWriter, "close"),
        "commit": (LayerWriter, "_write_commit"),
        "weights": (DenseFFN, "save"),
    }[failing]
    works = getattr(owner, name)

    def full(self: Any, *given: Any) -> None:
        if failing == "weights" or "heldout" in (getattr(self, "_split", ""), *given):
            raise OSError(errno.ENOSPC, "No space left on device")
        works(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(OSError, match="No space left"):
            captured(tmp_path / "a", batch_size=100)
    assert files(captured(tmp_path / "a", batch_size=100)) == files(
        captured(tmp_path / "b", batch_size=100)
    )


@pytest.mark.parametrize("n", [-1, 1])
def test_an_ffn_that_sees_more_or_fewer_rows_is_not_stored(tmp_path: Path, n: int):
    def forward(tokens: Tensor, layers: Collection[int]) -> dict[int, tuple[Tensor, Tensor]]:
        rows = torch.zeros(tokens.numel() + n, 16)
        return dict.fromkeys(layers, (rows, rows))

    with pytest.raises(InputError, match=f"layer 0: sees {24 + n} rows of 24 tokens"):
        capture.capture_activations(
            tiny(), blocks(), tmp_path / "a", cfg=CONFIG, layers=[0], forward=forward
        )


def test_an_ffn_that_runs_twice_is_not_stored(tmp_path: Path):
    model = tiny()

    def again(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        model.model.layers[0].mlp(args[0])

    model.model.layers[1].register_forward_pre_hook(again)
    with pytest.raises(InputError, match="layer 0: is run again in one pass"):
        captured(tmp_path / "a", model)


def test_an_ffn_that_is_not_run_is_not_stored(tmp_path: Path):
    model = tiny()
    model.model.layers[2].forward = lambda states, *_, **__: states
    with pytest.raises(InputError, match="layer 2: is not run"):
        captured(tmp_path / "a", model)


def test_an_interrupt_while_rows_are_handed_over_stores_none_twice(
    undisturbed: Path, tmp_path: Path, monkeypatch
):
    """When the last piece of the first batch is, with half of the second shard's rows."""

    class Interrupted(dict[Any, Any]):
        left = 8  # a batch has rows for two shards of two arrays of two layers

        def __setitem__(self, key: Any, task: Any) -> None:
            super().__setitem__(key, task)
            self.left -= len(key) == 2 if isinstance(key, tuple) else 0
            if not self.left:
                self.left = -1
                raise KeyboardInterrupt

    def enter(self: behind.Behind) -> behind.Behind:
        self._tasks = Interrupted()
        return self

    monkeypatch.setattr(runtime, "cores", torch.get_num_threads)
    with monkeypatch.context() as patch:
        patch.setattr(behind, "RING", 8)
        patch.setattr(behind.Behind, "__enter__", enter)
        with pytest.raises(KeyboardInterrupt):
            captured(tmp_path / "a")
    assert files(captured(tmp_path / "a")) == layer_files(undisturbed, 0, 2)


def test_a_store_that_is_slower_than_the_model_holds_it_up(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(behind, "RING", 2)
    monkeypatch.setattr(behind, "AT_ONCE", 1)
    answers, close = threading.Event(), ShardWriter.close
    monkeypatch.setattr(ShardWriter, "close", lambda *given: answers.wait(30) and close(*given))
    model = tiny()
    seen = watched(model)
    with ThreadPoolExecutor(1) as thread:
        run = thread.submit(captured, tmp_path / "a", model, batch_size=1)
        time.sleep(1)
        held_up_at = len(seen)
        answers.set()
        run.result()
    assert held_up_at < len(seen) == sum(SEQUENCES.values())


def test_a_layer_that_fails_beside_another_is_named_and_only_it_is_written_again(
    tmp_path, monkeypatch
):
    add, written = ShardWriter.add, set()

    def fail(self: ShardWriter, *given: Any) -> None:
        if self._path.name == "layer_2.zarr":
            raise InputError("It fails.", value=self._path.name, rule="", remedy="")
        add(self, *given)

    def note(self: ShardWriter, *given: Any) -> None:
        written.add((self._path.name, self._split, self._k))
        add(self, *given)

    whole = files(captured(tmp_path / "whole"))
    monkeypatch.setattr(ShardWriter, "add", fail)
    with pytest.raises(InputError, match="layer_2"):
        captured(tmp_path / "failed")
    monkeypatch.setattr(ShardWriter, "add", note)
    assert files(captured(tmp_path / "failed")) == whole
    assert ("layer_0.zarr", "train", 0) not in written
    assert ("layer_2.zarr", "train", 0) in written
