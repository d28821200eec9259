"""Whatever happens to a file of an artefact, its next reader and `verify` refuse it by name.

Rows 17, 18, 19, 24, 25, 26, 35 of docs/reliability.md, on what the real stages have made.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from injection import Stand, tree
from safetensors.torch import load_file, save_file
from test_start import dense_ffn, plan_of, write_store
from test_training import MOE, PLAIN

from pipeline import artifacts
from pipeline.__main__ import main
from pipeline.config import Codec
from pipeline.errors import ArtifactError
from pipeline.ffn import DenseFFN
from pipeline.layers import load_layer
from pipeline.store import LayerReader
from pipeline.store_writer import LayerWriter
from pipeline.training import fit_layer

ARTEFACTS = {
    "dense": "dense",
    "tokens": "tokens",
    "capture": "capture",
    "budget": "budget",
    "train/layer_0": "train@0",
    "train/layer_1": "train@1",
    "heal": "heal",
    "convert": "convert",
    "evaluate": "evaluate",
}
"""Folder below `stages` -> the stage that makes it, as dvc.yaml names it."""


def flip(path: Path, bit: int = 0) -> None:
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1 << bit
    path.write_bytes(content)


def reader_of(folder: str, name: str) -> str:
    """The first stage that reads that file."""
    layer = "1" if "_1." in name else "0"
    if folder == "capture":
        return "evaluate" if "/heldout/" in name or "heldout_" in name else f"train@{layer}"
    readers = {"dense": "tokens", "tokens": "capture", "budget": f"train@{layer}"}
    readers |= {"train/layer_0": "heal", "train/layer_1": "heal"}
    return (readers | {"heal": "convert", "convert": "evaluate"})[folder]


def verify(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["verify", *arguments])
    return int(ended.value.code or 0)


def files_of(stand: Stand, folder: str) -> list[str]:
    return list(tree(stand.root / "stages" / folder))


@pytest.mark.slow
@pytest.mark.parametrize("folder", [*ARTEFACTS][:-1])
def test_one_flipped_bit_in_any_file_is_refused_by_the_next_stage(stand: Stand, folder: str):
    """Of a store the middle file of each array stands for the others, which are read alike."""
    root = stand.root / "stages" / folder
    tried = 0
    for name in files_of(stand, folder):
        if Path(name).name in ("c.0.0", "c.2.0"):
            continue
        path, kept = root / name, (root / name).read_bytes()
        flip(path, tried % 8)
        ended = stand.run(reader_of(folder, name)).check(5)
        assert str(path) in ended.said and "remedy:" in ended.said, ended.said
        assert "Traceback" not in ended.said
        path.write_bytes(kept)
        tried += 1
    assert tried >= 3


@pytest.mark.parametrize("folder", ARTEFACTS)
def test_verify_names_any_damaged_file_and_what_makes_it_again(
    stand: Stand, folder: str, capsys: pytest.CaptureFixture[str]
):
    root = stand.root / "stages" / folder
    target = ARTEFACTS[folder]
    stage, _, layer = target.partition("@")
    alone = f"python -m pipeline.stages.{stage}" + (f" --layer {layer}" if layer else "")
    for k, name in enumerate(files_of(stand, folder)):
        path, kept = root / name, (root / name).read_bytes()
        for damage in (lambda p, k=k: flip(p, k % 8), cut, empty, Path.unlink):
            damage(path)
            with pytest.raises(ArtifactError) as caught:
                artifacts.verify(root)
            assert str(path) in str(caught.value)
            assert f"`dvc repro -f -s {target}`" in caught.value.remedy
            assert f"`{alone}`" in caught.value.remedy
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(kept)
    (root / "foreign.txt").write_text("")
    assert verify(str(stand.root / "stages")) == 5
    said = capsys.readouterr()
    assert f"{root / 'foreign.txt'}: the manifest does not know it" in said.err
    assert said.out.count("DAMAGED") == 1 and said.out.count("ok  ") == EVERY - 1


EVERY = len(ARTEFACTS) + 2
"""Healed layers are artefacts of their own."""


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("folder", ARTEFACTS)
def test_verify_misses_a_manifest_that_is_gone(
    stand: Stand, folder: str, capsys: pytest.CaptureFixture[str]
):
    manifest = stand.root / "stages" / folder / artifacts.MANIFEST
    manifest.unlink()
    assert verify(str(stand.root / "stages")) == 5
    said = capsys.readouterr().err
    assert str(manifest) in said and f"dvc repro -f -s {ARTEFACTS[folder]}" in said


def test_verify_knows_an_artefact_in_a_renamed_copy(
    stand: Stand, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(stand.root / "stages/capture", tmp_path / "of-last-week")
    shutil.copytree(stand.root / "stages/train", tmp_path / "layers")
    assert verify(str(tmp_path / "of-last-week")) == 0
    assert verify(str(tmp_path / "layers")) == 0
    flip(tmp_path / "of-last-week/ffn_1.safetensors")
    flip(tmp_path / "layers/layer_1/history.csv")
    capsys.readouterr()
    assert verify(str(tmp_path)) == 5
    said = capsys.readouterr().err
    assert "python -m pipeline.stages.capture" in said
    assert "python -m pipeline.stages.train --layer 1" in said


def test_what_is_damaged_is_made_again_by_the_command_that_is_named(stand: Stand):
    """With the bytes that it had."""
    wanted = tree(stand.root / "stages")
    stand.run("train@1").check()  # leaves finished work in .scratch, of which the out is links
    path = stand.root / "stages/train/layer_1/layer.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    with path.open("r+b") as file:  # in place: the finished work is damaged too
        file.write(content)
    ended = stand.run("heal").check(5)
    assert f"{path}: its SHA-256" in ended.said
    assert "`python -m pipeline.stages.train --layer 1`" in ended.said
    ended = stand.run("train@1").check()
    assert "damaged and is computed again" in ended.said
    assert tree(stand.root / "stages") == wanted


# A store


def test_a_shard_that_is_gone_is_never_read_as_zeros(stand: Stand):
    path = stand.root / "stages/capture/layer_0.zarr/train/input/c.1.0"
    for damage in (Path.unlink, empty):
        damage(path)
        ended = stand.run("train@0").check(5)
        assert str(path) in ended.said and "dvc repro capture" in ended.said
    assert not (stand.root / "stages/train/layer_0/last_good").exists()


def test_the_store_of_another_layer_is_refused(stand: Stand):
    """Each is sound in itself."""
    captured = stand.root / "stages/capture"
    (captured / "layer_0.zarr").rename(captured / "aside")
    (captured / "layer_1.zarr").rename(captured / "layer_0.zarr")
    (captured / "aside").rename(captured / "layer_1.zarr")
    for stage in ("train@0", "train@1"):
        assert "its SHA-256 is not" in stand.run(stage).check(5).said


# What belongs to something else


@pytest.mark.parametrize(
    ("stage", "override", "named"),
    [
        ("tokens", "seed=7", "seed: 0 there, 7 here"),
        ("capture", "data.sequence_length=16", "data.sequence_length: 32 there, 16 here"),
        ("budget", "seed=7", "seed: 0 there, 7 here"),
        ("train@0", "capture.dtype=float32", "capture.dtype: auto there, float32 here"),
        ("train@0", "moe.n_experts=8", "moe.n_experts: 4 there, 8 here"),
        ("heal", "train.epochs=3", "train.epochs: 2 there, 3 here"),
        ("convert", "heal.learning_rate=0.5", "heal.learning_rate: 0.001 there, 0.5 here"),
        ("evaluate", "convert.max_shard_size=1MB", "convert.max_shard_size: 2GB there, 1MB here"),
    ],
)
def test_what_was_made_with_other_settings_is_refused_with_the_field(
    stand: Stand, stage: str, override: str, named: str
):
    said = stand.run(stage, [override]).check(5).said
    assert named in said and "Traceback" not in said, said


def test_what_was_made_from_another_artefact_is_refused(stand: Stand):
    """The same settings, and another text before it: as if it had been run again."""
    folder = stand.root / "stages/dense"
    manifest = artifacts.read_manifest(folder)
    shutil.copytree(folder, stand.root / "copy")
    (stand.root / "copy/note.txt").write_text("another")
    artifacts.write_manifest(stand.root / "copy", manifest)
    shutil.rmtree(folder)
    (stand.root / "copy").rename(folder)
    for stage in ("capture", "heal", "evaluate"):
        said = stand.run(stage).check(5).said
        assert "tokens was made from what is no longer there." in said
        assert "dense changed since" in said and "dvc repro -f -s tokens" in said


def test_layers_trained_again_are_not_converted_beside_healed_ones_of_before(stand: Stand):
    """A layer of other bytes under the same settings, healed by nobody."""
    folder = stand.root / "stages/train/layer_0"
    other = shutil.copytree(folder, stand.root / "copy")
    (other / "note.txt").write_text("another")
    artifacts.write_manifest(other, artifacts.read_manifest(folder))
    shutil.rmtree(folder)
    other.rename(folder)
    said = stand.run("evaluate").check(5).said
    assert "heal was made from what is no longer there." in said and "layer_0" in said


# Of another dtype or width, or incomplete


def layer(stand: Stand, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object]):
    """A trained layer with changed tensors, as whole as one that was written so."""
    folder = shutil.copytree(stand.root / "stages/train/layer_0", tmp_path / "changed")
    tensors = load_file(folder / "layer.safetensors")
    change(tensors)
    save_file(tensors, folder / "layer.safetensors")
    record = artifacts.read_sealed(folder / "config.json")
    record["weights"] = artifacts.file_digest(folder / "layer.safetensors")
    artifacts.write_sealed(folder / "config.json", record)
    return folder


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.update(down_proj=t["down_proj"].half()), "torch.float16"),
        (lambda t: t.update(down_proj=t["down_proj"][:, :-1].contiguous()), "down_proj"),
        (lambda t: t.pop("router.weight"), "router.weight"),
    ],
    ids=["dtype", "width", "missing"],
)
def test_a_layer_of_another_dtype_or_width_or_with_a_tensor_too_few_is_refused(
    stand: Stand, tmp_path: Path, change: Callable, named: str
):
    with pytest.raises(ArtifactError, match=named):
        load_layer(layer(stand, tmp_path, change))


@pytest.mark.parametrize("of", ["store", "dense FFN"])
def test_a_store_or_an_ffn_of_another_width_is_not_trained_on(tmp_path: Path, of: str):
    ffn = dense_ffn()
    other = DenseFFN(
        up_proj=torch.zeros(2 * ffn.d_ff, ffn.d_model + 8),
        gate_proj=torch.zeros(2 * ffn.d_ff, ffn.d_model + 8),
        down_proj=torch.zeros(ffn.d_model + 8, 2 * ffn.d_ff),
    )
    how = {"d_model": other.d_model, "dtype": torch.float32, "sequence_length": 8}
    how |= {"codec": Codec.fast, "shard_mb": 1, "chunk_mb": 1, "attributes": {}}
    writer = LayerWriter.open(tmp_path / "wide.zarr", rows={"train": 8, "validation": 8}, **how)
    for split in ("train", "validation"):
        writer.write_shard(split, 0, *torch.ones(2, 8, other.d_model))
    store = write_store(tmp_path / "layer_3.zarr", ffn)
    (tmp_path / "fitted").mkdir()
    with pytest.raises(ArtifactError, match=f"{of} has"):
        fit_layer(
            LayerReader(writer.path) if of == "store" else store,
            ffn if of == "store" else other,
            plan_of(ffn, ffn.d_ff // 4, 8, 2),
            tmp_path / "fitted",
            moe_cfg=MOE,
            cfg=PLAIN,
            seed=0,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
    assert not any((tmp_path / "fitted").iterdir())


def test_a_layer_that_was_not_trained_is_missed_at_assembly(stand: Stand):
    shutil.rmtree(stand.root / "stages/train/layer_1")
    shutil.rmtree(stand.root / "stages/heal")
    said = stand.run("heal").check(5).said
    assert str(stand.root / "stages/train/layer_1") in said
    assert "python -m pipeline.stages.train --layer 1" in said


def test_every_manifest_tells_what_it_was_made_from(undisturbed: Stand):
    for folder in ARTEFACTS:
        manifest = artifacts.verify(undisturbed.root / "stages" / folder)
        known = {"module", "fingerprint", "settings", "inputs", "code", "files", "versions"}
        assert manifest.keys() >= known
    manifest = artifacts.read_manifest(undisturbed.root / "stages/train/layer_0")
    assert manifest["settings"]["seed"] == 0
    assert manifest["inputs"].keys() == {"store", "ffn", "shape"}
