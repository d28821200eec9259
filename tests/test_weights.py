"""Weights go from file to file one by one, and arrive as they were."""

import dataclasses
import hashlib
import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from test_checkpoint import OWN_LAYER, random_layer, save_dense, tiny

from pipeline import weights
from pipeline.errors import ConfigError
from pipeline.layers import save_layer

PROJECT = Path(__file__).parent.parent
MIXED = {
    "bias": torch.randn(301),
    "odd": torch.randn(33, 5).bfloat16(),
    "none": torch.zeros(0, 4),
    "ids": torch.arange(70),
    "flag": torch.tensor(True),
    "half": torch.randn(9).half(),
    "turned": torch.randn(16, 18).t(),
}


def planned(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.empty_like(t, device="meta") for name, t in tensors.items()}


@pytest.mark.parametrize("size", ["1GB", "1KB"])
def test_write_gives_files_that_safetensors_reads_equal(tmp_path: Path, size: str):
    """Tensors of all dtypes, each where its dtype may begin, in whatever order they come."""
    given = reversed(list(MIXED.items()))
    written = weights.write(tmp_path, planned(MIXED), given, size)
    files = list(tmp_path.glob("*.safetensors"))
    read = {name: crc for path in files for name, crc in weights.checksums(path)[0].items()}
    assert written == read and written.keys() == MIXED.keys()
    found = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert found.keys() == MIXED.keys()
    for name, tensor in MIXED.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    if size == "1GB":
        assert [path.name for path in files] == [weights.SINGLE]
    else:
        index = json.loads((tmp_path / weights.INDEX).read_text())
        assert set(index["weight_map"].values()) == {path.name for path in files}
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in MIXED.values())
        assert len(files) > 2


def test_checksums_are_of_every_byte(tmp_path: Path):
    weights.write(tmp_path, planned(MIXED), MIXED.items(), "1GB")
    path = tmp_path / weights.SINGLE
    assert weights.checksums(path)[1] == hashlib.sha256(path.read_bytes()).hexdigest()
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match="follows its tensors"):
        weights.checksums(path)


def test_checksums_refuse_a_gap_between_tensors(tmp_path: Path):
    wide = {"dtype": "U8", "shape": [1]}
    header = {"a": {**wide, "data_offsets": [0, 1]}, "b": {**wide, "data_offsets": [2, 3]}}
    text = json.dumps(header).encode()
    (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text + b"abc")
    with pytest.raises(ValueError, match="b does not begin"):
        weights.checksums(tmp_path / "a")


def test_write_holds_one_tensor_at_a_time(tmp_path: Path):
    like = {f"t{i}": torch.empty(1000, device="meta") for i in range(20)}
    alive: list[weakref.ref] = []
    most = 0

    def made() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for name in like:
            tensor = torch.zeros(1000)
            alive.append(weakref.ref(tensor))
            yield name, tensor
            del tensor
            most = max(most, sum(ref() is not None for ref in alive))

    weights.write(tmp_path, like, made(), "1GB")
    assert most == 1 and len(alive) == 20


def test_write_refuses_a_size_that_is_none(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"convert\.max_shard_size=2XB"):
        weights.write(tmp_path, planned(MIXED), MIXED.items(), "2XB")


@pytest.mark.parametrize("wrong", ["dtype", "shape", "too few"])
def test_write_takes_only_what_was_planned(tmp_path: Path, wrong: str):
    tensor = torch.zeros(4, dtype=torch.float64) if wrong == "dtype" else torch.zeros(4)
    tensor = torch.zeros(5) if wrong == "shape" else tensor
    given = [] if wrong == "too few" else [("a", tensor)]
    with pytest.raises(AssertionError):
        weights.write(tmp_path, {"a": torch.empty(4, device="meta")}, given, "1GB")


def found_in(model: tf.PreTrainedModel, folder: Path) -> weights.Filed | str:
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    return weights.find(skeleton, weights.persistent(skeleton), str(folder), None)


@pytest.mark.parametrize("size", ["50GB", "20KB"])
@pytest.mark.parametrize("tied", [True, False])
def test_find_reads_every_tensor_of_a_model_from_its_files(tmp_path: Path, size: str, tied: bool):
    model = tiny("Llama", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size=size)
    found = found_in(model, tmp_path)
    assert isinstance(found, weights.Filed)
    assert found.places.keys() == model.state_dict().keys() - (
        {"lm_head.weight"} if tied else set()
    )
    for name in found.places:
        tensor = model.state_dict()[name]
        assert torch.equal(found.read(name), tensor)
        assert torch.equal(found.read(name, (3, 7)), tensor[3:7])


@pytest.mark.parametrize("change", ["removed", "added"])
def test_find_knows_the_prefix_of_the_base_model(tmp_path: Path, change: str):
    """GPT-2 was published without it, and BERT's encoder with it."""
    model = tiny("GPT2", n_inner=64)
    model.save_pretrained(tmp_path)
    tensors, prefix = load_file(tmp_path / weights.SINGLE), "transformer."
    if change == "removed":
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    else:
        model = model.transformer
    save_file(tensors, tmp_path / weights.SINGLE, metadata={"format": "pt"})
    found = found_in(model, tmp_path)
    assert isinstance(found, weights.Filed)
    assert all(torch.equal(found.read(name), model.state_dict()[name]) for name in found.places)


def rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.attention.q"] = tensors.pop("model.layers.1.self_attn.q_proj.weight")


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(33)


def untie(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (rename, "no model.layers.1.self_attn.q_proj.weight of its shape"),
        (reshape, "no model.norm.weight of its shape"),
        (untie, "have lm_head.weight too, which is tied to another"),
    ],
)
def test_find_says_why_a_model_has_to_be_read_as_a_whole(tmp_path: Path, change, why: str):
    model = tiny("Llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / weights.SINGLE)
    change(tensors)
    save_file(tensors, tmp_path / weights.SINGLE, metadata={"format": "pt"})
    assert why in found_in(model, tmp_path)


CONVERSION = """
import sys
from pathlib import Path
from benchmarks.measure import peak_bytes
from transformers import LlamaForCausalLM, MixtralForCausalLM
from pipeline.checkpoint import Conversion
from pipeline.layers import layer_folders

folder = Path(sys.argv[1])
before = peak_bytes()
how = {"dtype": "auto", "revision": None, "trust_remote_code": False}
conversion = Conversion(str(folder / "dense"), layer_folders(folder), {}, how)
conversion.write(folder / "sparse", "2GB")
print(peak_bytes() - before)
"""


@pytest.mark.slow
def test_a_conversion_needs_far_less_memory_than_its_model(tmp_path: Path):
    """Of 8 layers of 19 MB and embeddings of 2 x 64 MB it holds one at a time."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8}
    save_dense(tiny("Llama", vocab_size=32768, **sizes), tmp_path / "dense")
    shape = {"d_model": 512, "d_ff": 1024, "d_ff_expert": 512}
    for k in range(8):
        (tmp_path / f"layer_{k}").mkdir()
        moe = random_layer(dataclasses.replace(OWN_LAYER, **shape), seed=k)
        save_layer(moe, tmp_path / f"layer_{k}", {"layer": k, "host": "mixtral"})
    command = [sys.executable, "-c", CONVERSION, str(tmp_path)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    grown = int(done.stdout.split()[-1])
    written = (tmp_path / "sparse" / weights.SINGLE).stat().st_size
    assert written > 300e6 and grown < written / 2, grown
