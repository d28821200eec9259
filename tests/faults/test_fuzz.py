"""Every file that is parsed, mutated: it ends in a named refusal or in the right result.

Bytes are changed, cut, doubled and moved; JSON also by its structure, and sealed again where a file
vouches for itself, as a stranger would. The random numbers are always the same.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import yaml
from injection import Stand

from pipeline import (
    artifacts,
    assembly,
    commits,
    compose,
    corpus,
    dense,
    documents,
    pretrained,
    record,
    resume,
)
from pipeline.config import DataConfig, DataSource
from pipeline.errors import ArtifactError, ConfigError, InputError, PipelineError
from pipeline.ffn import DenseFFN
from pipeline.layers import load_layer, read_history
from pipeline.store import LayerReader

VALUES = (None, True, 0, -1, 1, 3, 2.5, 4096, "", "x", "../x", [], [1], {}, {"a": 1}, 10**30)


def mangled(content: bytes, rng: random.Random) -> bytes:
    """Another content: bytes changed, cut out, doubled, or moved."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at, size = rng.randrange(len(changed) + 1), rng.choice((1, 1, 2, 4, 64))
        kind = rng.choice(("flip", "set", "cut", "double", "end", "insert"))
        if kind in ("flip", "set") and at < len(changed):
            changed[at] = (
                changed[at] ^ 1 << rng.randrange(8) if kind == "flip" else rng.randrange(256)
            )
        elif kind == "cut":
            del changed[at : at + size]
        elif kind == "double":
            changed[at:at] = changed[at : at + size]
        elif kind == "end":
            del changed[at:]
        else:
            changed[at:at] = rng.choice((b'"', b"{", b"[", b"9" * 30, b"\0", b"\xff", b"NaN", b"-"))
    return bytes(changed)


def places(node: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    if isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, below in items:
            yield from places(below, (*path, key))


def restructured(content: Any, rng: random.Random) -> Any:
    """The same JSON with another value, without one, or with one too many."""
    changed = json.loads(json.dumps(content))
    path = rng.choice(list(places(changed)))
    if not path:
        return rng.choice(VALUES)
    node = changed
    for key in path[:-1]:
        node = node[key]
    kind = rng.choice(("value", "value", "value", "remove", "more"))
    if kind == "remove":
        del node[path[-1]]
    elif kind == "more" and isinstance(node, dict):
        node[rng.choice(("x", "", "../x"))] = rng.choice(VALUES)
    else:
        node[path[-1]] = rng.choice(VALUES)
    return changed


def fuzz(
    path: Path,
    read: Callable[[], object],
    times: int,
    kinds: tuple[type[PipelineError], ...],
    write: Callable[[random.Random], object] | None = None,
    right: Callable[[Any], bool] | None = None,
) -> int:
    """How many of `times` mutations of `path` were refused.

    Args:
        kinds: the refusals that may come; any other exception ends the test.
        write: mutates the file; null = `mangled`.
        right: of what `read` gives; null = it gives what it gave before.
    """
    content, rng = path.read_bytes(), random.Random(0)
    expected = read() if right is None else None
    refused = 0
    for k in range(times):
        if write:
            write(rng)
        else:
            path.write_bytes(mangled(content, rng))
        now = path.read_bytes()
        try:
            found = read()
        except kinds as error:
            assert error.value is not None and error.rule and error.remedy, error
            refused += 1
        except Exception as error:
            raise AssertionError(f"mutation {k}: {now[:2000]!r}") from error
        else:
            same = right(found) if right else found == expected
            assert same, f"mutation {k} changed the result: {now[:2000]!r}"
    path.write_bytes(content)
    return refused


def anything(found: Any) -> bool:
    return True


# What vouches for itself


@pytest.fixture
def layer(undisturbed: Stand, tmp_path: Path) -> Path:
    return shutil.copytree(undisturbed.root / "stages/train/layer_0", tmp_path / "layer_0")


@pytest.fixture
def store(undisturbed: Stand, tmp_path: Path) -> Path:
    return shutil.copytree(undisturbed.root / "stages/capture/layer_0.zarr", tmp_path / "0.zarr")


def test_manifest(layer: Path):
    path = layer / artifacts.MANIFEST
    assert fuzz(path, lambda: artifacts.verify(layer), 200, (ArtifactError,)) > 180


def test_manifest_sealed_by_a_stranger(layer: Path):
    path = layer / artifacts.MANIFEST
    manifest = artifacts.read_manifest(layer)

    def write(rng: random.Random) -> None:
        changed = restructured(manifest, rng)
        artifacts.write_sealed(path, changed if isinstance(changed, dict) else {})

    fuzz(path, lambda: artifacts.verify(layer), 100, (ArtifactError,), write, anything)


def test_record_of_a_layer(layer: Path):
    path = layer / "config.json"
    read = lambda: load_layer(layer)[1]  # noqa: E731
    assert fuzz(path, read, 200, (ArtifactError,)) > 180


def test_record_of_a_layer_sealed_by_a_stranger(layer: Path):
    path = layer / "config.json"
    content = artifacts.read_sealed(path)

    def write(rng: random.Random) -> None:
        changed = {**content, "shape": restructured(content["shape"], rng)}
        if rng.random() < 0.3:
            changed = restructured(content, rng)
        artifacts.write_sealed(path, changed if isinstance(changed, dict) else {})

    def read() -> object:
        return load_layer(layer)[0](torch.ones(2, 32)).shape

    assert fuzz(path, read, 200, (ArtifactError,), write) > 50


def test_weights_of_a_layer(layer: Path):
    """Sealed again, so that safetensors and the shape are all that is left to see it."""
    path, content = layer / "layer.safetensors", (layer / "layer.safetensors").read_bytes()
    known = artifacts.read_sealed(layer / "config.json")

    def write(rng: random.Random) -> None:
        header = int.from_bytes(content[:8], "little") + 8
        path.write_bytes(mangled(content[:header], rng) + content[header:])
        seal = {**known, "weights": artifacts.file_digest(path)}
        artifacts.write_sealed(layer / "config.json", seal)

    fuzz(path, lambda: load_layer(layer), 150, (ArtifactError,), write, anything)
    artifacts.write_sealed(layer / "config.json", known)
    read = lambda: load_layer(layer)[1]  # noqa: E731
    assert fuzz(path, read, 100, (ArtifactError,)) == 100


def test_history_of_a_layer(layer: Path):
    read = lambda: read_history(layer)  # noqa: E731
    fuzz(layer / "history.csv", read, 200, (ArtifactError,), right=anything)


def rows_of(store: Path) -> list[bytes]:
    reader = LayerReader(store)
    pairs = [reader.read(split) for split in reader.rows]
    return [side.view(torch.uint8).numpy().tobytes() for pair in pairs for side in pair]


@pytest.mark.parametrize(
    "name", ["commits/train_00001.json", "zarr.json", "train/zarr.json", "train/input/zarr.json"]
)
def test_metadata_of_a_store(store: Path, name: str):
    assert fuzz(store / name, lambda: rows_of(store), 60, (ArtifactError,)) > 50


def test_shard_of_a_store(store: Path):
    path = store / "train/output/c.1.0"
    assert fuzz(path, lambda: rows_of(store), 60, (ArtifactError,)) == 60


def test_commit_sealed_by_a_stranger(store: Path):
    path = store / "commits/train_00001.json"
    commit = commits.read_commit(path)

    def write(rng: random.Random) -> None:
        changed = restructured(commit, rng)
        if isinstance(changed, dict):
            changed = {**changed, "crc32c": commits._checksum(changed)}
        path.write_text(json.dumps(changed))

    fuzz(path, lambda: rows_of(store), 200, (ArtifactError,), write)


def test_attributes_of_a_store_sealed_by_a_stranger(store: Path):
    """All commits vouch for them."""
    path = store / "zarr.json"
    content = json.loads(path.read_text())

    def write(rng: random.Random) -> None:
        attributes = restructured(content["attributes"], rng)
        path.write_text(json.dumps({**content, "attributes": attributes}))
        for other in (store / "commits").glob("*.json"):
            commit = {k: v for k, v in json.loads(other.read_text()).items() if k != "crc32c"}
            commit["objects"]["zarr.json"] = commits.describe_file(path)
            other.write_text(json.dumps({**commit, "crc32c": commits._checksum(commit)}))

    def read() -> int:
        return len(rows_of(store))

    assert fuzz(path, read, 150, (ArtifactError,), write, anything) > 50


def test_checkpoint_to_continue_from(tmp_path: Path):
    weight = torch.nn.Parameter(torch.randn(3, 2))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    path = tmp_path / resume.CHECKPOINT
    resume.save(path, {"model": {"weight": weight}}, optimizer, {"step": 1, "history": [0.5]})

    def read() -> str:
        states, kept = resume.restore(path, torch.optim.AdamW([weight]))
        return f"{states} {kept}"

    assert fuzz(path, read, 300, (ArtifactError,)) > 280


# What a stage's manifest vouches for, read without it


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("capture/ffn_0.safetensors", lambda p: DenseFFN.load(p)),
        ("tokens/train.safetensors", lambda p: corpus.read_blocks(p.parent, "train")),
        ("heal/norms.safetensors", lambda p: assembly.read_norms(p.parent)),
    ],
)
def test_tensors_of_a_stage(undisturbed: Stand, tmp_path: Path, name: str, read: Callable):
    path = tmp_path / Path(name).name
    shutil.copy(undisturbed.root / "stages" / name, path)
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little") + 8

    def write(rng: random.Random) -> None:
        path.write_bytes(mangled(content[:header], rng) + content[header:])

    assert fuzz(path, lambda: read(path), 150, (ArtifactError,), write, anything) > 20


@pytest.mark.parametrize(
    ("folder", "name", "read"),
    [
        ("dense", "dense.json", record.read),
        ("budget", "layer_0.json", lambda p: artifacts.verify(p, "layer_0.json")),
    ],
)
def test_records_of_a_stage(
    undisturbed: Stand, tmp_path: Path, folder: str, name: str, read: Callable
):
    copy = shutil.copytree(undisturbed.root / "stages" / folder, tmp_path / folder)
    assert fuzz(copy / name, lambda: read(copy), 100, (ArtifactError,)) > 95


# What others write


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    tf.LlamaForCausalLM(config).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


@pytest.mark.slow
def test_configuration_of_a_model(model: Path):
    path = model / "config.json"
    config = json.loads(path.read_text())
    read = lambda: dense.inspect(str(model))  # noqa: E731
    known = (InputError, ConfigError)
    assert fuzz(path, read, 60, known, right=anything) > 5

    def write(rng: random.Random) -> None:
        path.write_text(json.dumps(restructured(config, rng)))

    assert fuzz(path, read, 120, known, write, anything) > 20


def test_index_of_a_models_weights(model: Path):
    path = model / pretrained.INDEX
    index = json.loads(path.read_text())

    def read() -> str:
        tensors = dense.load_model(str(model)).state_dict()
        return str({name: t.double().sum().item() for name, t in tensors.items()})

    def write(rng: random.Random) -> None:
        path.write_text(json.dumps(restructured(index, rng)))

    fuzz(path, read, 40, (InputError,), write)
    fuzz(path, read, 40, (InputError,))


def test_weights_of_a_model(model: Path):
    (path, *_) = sorted(model.glob("*.safetensors"))
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little") + 8

    def write(rng: random.Random) -> None:
        path.write_bytes(mangled(content[:header], rng) + content[header:])

    fuzz(path, lambda: dense.load_model(str(model)), 60, (InputError,), write, anything)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer(undisturbed: Stand, tmp_path: Path, name: str):
    folder = shutil.copytree(undisturbed.root / "stages/dense/model", tmp_path / "model")
    read = lambda: pretrained.load_tokenizer(str(folder))  # noqa: E731
    fuzz(folder / name, read, 25, (InputError,), right=anything)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_text(tmp_path: Path, suffix: str):
    import datasets

    path = tmp_path / f"text{suffix}"
    rows = datasets.Dataset.from_dict({"text": [f"a line of text, number {k}" for k in range(40)]})
    if suffix == ".parquet":
        rows.to_parquet(path)
    elif suffix == ".jsonl":
        rows.to_json(path)
    else:
        path.write_text("\n".join(rows["text"]))
    cfg = DataConfig(source=DataSource.files, files=[str(path)])
    read = lambda: list(documents.read_documents(cfg))  # noqa: E731
    fuzz(path, read, 40, (InputError,), right=anything)


def test_params_yaml(project: Path):
    path = project / "params.yaml"
    fuzz(path, lambda: compose.load([]), 60, (ConfigError,), right=anything)
    params = yaml.safe_load(path.read_text())

    def write(rng: random.Random) -> None:
        path.write_text(yaml.safe_dump(restructured(params, rng)))

    assert fuzz(path, lambda: compose.load([]), 100, (ConfigError,), write, anything) > 40


@pytest.mark.parametrize("name", ["config.yaml", "moe/half.yaml"])
def test_conf(project: Path, name: str):
    read = lambda: compose.checked(compose.compose(["seed=1"]))  # noqa: E731
    fuzz(project / "conf" / name, read, 40, (ConfigError,), right=anything)


def test_the_fuzz_would_see_a_traceback(tmp_path: Path):
    (tmp_path / "a.json").write_text('{"a": [1, 2], "b": {"c": 3}}')
    read = lambda: json.loads((tmp_path / "a.json").read_text())  # noqa: E731
    with pytest.raises(AssertionError, match="mutation"):
        fuzz(tmp_path / "a.json", read, 20, (ArtifactError,))
