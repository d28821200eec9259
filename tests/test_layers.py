"""A layer on disk is read back as it was written, or refused with the reason."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_start import D, F, dense_ffn, plan_of

from pipeline import artifacts
from pipeline.errors import ArtifactError, InputError
from pipeline.layers import (
    CONFIG,
    HISTORY,
    WEIGHTS,
    is_complete,
    layer_folders,
    load_layer,
    read_history,
    save_layer,
    write_history,
)
from pipeline.moe import SparseMoE
from pipeline.shape import MoEShape

FAMILIES = [(True, False), (True, True), (False, False), (False, True)]  # gated, bias


def record_of(gated: bool = True, bias: bool = False) -> dict[str, Any]:
    plan = plan_of(dense_ffn(gated, bias), F // 4, 8, 2)
    return {**plan, "training": {"steps": 7, "validation": {"validation_loss": 0.1}}}


def saved(folder: Path, gated: bool = True, bias: bool = False) -> SparseMoE:
    """A random layer, and its files in `folder`."""
    record = record_of(gated, bias)
    moe = SparseMoE(MoEShape(**record["shape"]))
    with torch.no_grad():
        for weight in moe.parameters():
            weight.normal_(generator=torch.Generator().manual_seed(weight.numel()))
    save_layer(moe, folder, record)
    return moe


def seal(folder: Path, **changed: Any) -> None:
    """Make the record vouch for itself and for the weights that lie there now."""
    record = json.loads((folder / CONFIG).read_text())
    record |= {"weights": artifacts.file_digest(folder / WEIGHTS), **changed}
    artifacts.write_sealed(folder / CONFIG, record)


def refusal(folder: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        load_layer(folder)
    return str(caught.value)


@pytest.mark.parametrize("name", [WEIGHTS, HISTORY, CONFIG])
def test_a_layer_that_is_damaged_is_not_complete(tmp_path: Path, name: str):
    write_history(tmp_path, [{"step": 0, "validation_loss": 0.5}])
    saved(tmp_path)
    assert is_complete(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-3] + b"x,x")
    if name == CONFIG:
        path.unlink()
    assert not is_complete(tmp_path) and not (tmp_path / CONFIG).exists()


@pytest.mark.parametrize(("gated", "bias"), FAMILIES)
def test_layer_is_read_as_it_was_written(tmp_path, gated, bias):
    moe = saved(tmp_path, gated, bias)
    found, record = load_layer(tmp_path)
    digest = artifacts.file_digest(tmp_path / WEIGHTS)
    assert record == {**record_of(gated, bias), "dtype": "float32", "weights": digest}
    assert found.shape == moe.shape
    torch.testing.assert_close(found.state_dict(), moe.state_dict(), rtol=0, atol=0)
    x = torch.randn(5, D)
    assert torch.equal(found(x), moe(x))


def test_layer_lies_there_in_safetensors_and_json_alone(tmp_path):
    moe = saved(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, CONFIG}
    assert load_file(tmp_path / WEIGHTS).keys() == moe.state_dict().keys()
    assert json.loads((tmp_path / CONFIG).read_text())["host"] == "mixtral"


def test_equal_layers_are_equal_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        saved(tmp_path / name)
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_record_names_the_dtype_of_the_weights(tmp_path):
    moe = saved(tmp_path).to(torch.bfloat16)
    save_layer(moe, tmp_path, record_of())
    assert load_layer(tmp_path)[1]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("down_proj"),
        lambda tensors: tensors.update(up_bias=torch.zeros(8, F // 4)),
        lambda tensors: tensors.update(down_proj=tensors["down_proj"][:, :-1].clone()),
        lambda tensors: tensors.update(w2=tensors.pop("down_proj")),
    ],
    ids=["missing", "foreign", "of another shape", "renamed"],
)
def test_layer_of_other_tensors_than_its_shape_has_is_refused(tmp_path, change):
    saved(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    wanted = set(tensors.items())
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    assert "SHA-256" in refusal(tmp_path)
    seal(tmp_path)
    message = refusal(tmp_path)
    differing = {name for name, _ in wanted ^ set(tensors.items())}
    assert all(name in message for name in differing) and "router" not in message
    assert str(tmp_path) in message and "dvc repro" in message


def test_layer_of_another_shape_than_its_record_says_is_refused(tmp_path):
    saved(tmp_path)
    record = json.loads((tmp_path / CONFIG).read_text())
    record["shape"]["n_experts"] = 16
    (tmp_path / CONFIG).write_text(json.dumps(record))
    assert "its own digest" in refusal(tmp_path)
    seal(tmp_path, shape=record["shape"])
    assert "router.weight" in refusal(tmp_path)


def test_layer_of_another_dtype_than_its_record_says_is_refused(tmp_path):
    saved(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["down_proj"] = tensors["down_proj"].bfloat16()
    save_file(tensors, tmp_path / WEIGHTS)
    seal(tmp_path)
    assert "torch.bfloat16" in refusal(tmp_path)


def test_a_record_that_was_edited_is_refused(tmp_path):
    """Of another top_k the tensors have the same shapes."""
    saved(tmp_path)
    text = (tmp_path / CONFIG).read_text()
    assert '"top_k": 2' in text
    (tmp_path / CONFIG).write_text(text.replace('"top_k": 2', '"top_k": 3'))
    assert "its own digest" in refusal(tmp_path)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_weights_are_refused(tmp_path, size):
    saved(tmp_path)
    path = tmp_path / WEIGHTS
    path.write_bytes(path.read_bytes()[:size])
    assert str(tmp_path) in refusal(tmp_path)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_layer_without_one_of_its_files_is_refused(tmp_path, name):
    saved(tmp_path)
    (tmp_path / name).unlink()
    assert str(tmp_path) in refusal(tmp_path)


def test_damaged_record_is_refused(tmp_path):
    saved(tmp_path)
    path = tmp_path / CONFIG
    path.write_text(path.read_text()[:-20])
    assert CONFIG in refusal(tmp_path)


@pytest.mark.parametrize("content", ["{}", "[]", '{"shape": {"n_experts": 8}}', '{"shape": 3}'])
def test_record_of_something_else_is_refused(tmp_path, content):
    saved(tmp_path)
    (tmp_path / CONFIG).write_text(content)
    assert str(tmp_path) in refusal(tmp_path)


@pytest.mark.parametrize("shape", [{"n_experts": 8}, 3, None, {}])
def test_record_without_a_shape_is_refused(tmp_path, shape):
    saved(tmp_path)
    seal(tmp_path, shape=shape)
    assert "holds no shape" in refusal(tmp_path)


def test_history_is_read_as_it_was_written(tmp_path):
    """To the last bit, and without the losses that the start does not have."""
    rows = [
        {"step": 0, "validation_loss": 0.1 + 0.2},
        {"step": 8, "loss": 1 / 3, "validation_loss": 1e-30},
        {"step": 16, "loss": 0.0, "validation_loss": 2e30},
    ]
    write_history(tmp_path, rows)
    assert read_history(tmp_path) == rows
    assert (tmp_path / HISTORY).read_text().startswith("step,loss,validation_loss\n0,,0.3")


def test_history_of_the_start_alone_is_one_row(tmp_path):
    rows = [{"step": 0, "validation_loss": 0.5}]
    write_history(tmp_path, rows)
    assert read_history(tmp_path) == rows


def test_layer_folders_are_found_by_their_number_and_in_its_order(tmp_path):
    for name in ("layer_10", "layer_2", "layer_x", "other_1"):
        (tmp_path / name).mkdir()
    assert list(layer_folders(tmp_path).items()) == [
        (2, tmp_path / "layer_2"),
        (10, tmp_path / "layer_10"),
    ]


def test_folder_without_layers_is_refused(tmp_path):
    with pytest.raises(InputError, match="no trained layers"):
        layer_folders(tmp_path)
