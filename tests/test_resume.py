"""A killed training goes on from its checkpoint as if nothing had happened, bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_start import dense_ffn, write_store
from test_training import Stored, fit
from torch import Tensor, nn

from pipeline import resume
from pipeline.config import Schedule
from pipeline.errors import ArtifactError
from pipeline.layers import load_layer
from pipeline.resume import CHECKPOINT

LENGTH = {"epochs": 3, "batch_size": 40, "evaluate_every": 3, "checkpoint_every": 7}
STEPS = 36  # 12 an epoch, the last 32 of 512 rows left out
BEFORE_THE_FIRST, IN_THE_FIRST_EPOCH, AT_AN_EPOCH, LATE, LAST = 6, 9, 24, 33, 36


class KilledError(Exception):
    pass


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Stored:
    ffn = dense_ffn(bias=True)
    return ffn, write_store(tmp_path_factory.mktemp("stored") / "layer_3.zarr", ffn)


@pytest.fixture(scope="module", params=[False, True], ids=["in_memory", "stream"])
def undisturbed(request, stored: Stored, tmp_path_factory) -> tuple[bool, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    fit(stored, folder, stream=request.param, **LENGTH)
    return request.param, files(folder)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kill(stored: Stored, folder: Path, step: int, **changed: Any) -> None:
    def watch(done: int, total: int, note: str) -> None:
        assert total == STEPS
        if done >= step:
            raise KilledError

    with pytest.raises(KilledError):
        fit(stored, folder, progress=watch, **LENGTH, **changed)


def checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(folder / CHECKPOINT, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize("step", [BEFORE_THE_FIRST, IN_THE_FIRST_EPOCH, AT_AN_EPOCH, LATE, LAST])
def test_killed_training_ends_as_an_undisturbed_one(stored, undisturbed, tmp_path, step):
    """In every file: weights, history and record; and nothing is left beside them."""
    stream, wanted = undisturbed
    kill(stored, tmp_path, step, stream=stream)
    assert (tmp_path / CHECKPOINT).exists() == (step > BEFORE_THE_FIRST)
    fit(stored, tmp_path, stream=stream, **LENGTH)
    assert files(tmp_path) == wanted
    assert wanted.keys() == {"layer.safetensors", "config.json", "history.csv"}


def test_training_killed_again_and_again_ends_as_an_undisturbed_one(stored, undisturbed, tmp_path):
    stream, wanted = undisturbed
    for step in (IN_THE_FIRST_EPOCH, 18, AT_AN_EPOCH, LATE):
        kill(stored, tmp_path, step, stream=stream)
    fit(stored, tmp_path, stream=stream, **LENGTH)
    assert files(tmp_path) == wanted


def test_training_goes_on_and_does_not_begin_again(stored, undisturbed, tmp_path):
    stream, _ = undisturbed
    kill(stored, tmp_path, AT_AN_EPOCH, stream=stream)
    done: list[int] = []
    progress = lambda step, total, note: done.append(step)  # noqa: E731
    fit(stored, tmp_path, stream=stream, progress=progress, **LENGTH)
    assert done == list(range(22, 37))  # after the checkpoint of step 21


def test_best_state_from_before_the_kill_is_kept(stored, tmp_path):
    """Where the learning rate grows past what is stable, nothing after the kill is better."""
    growing = {"learning_rate": 1.0, "warmup_steps": 400, "schedule": Schedule.constant}
    fit(stored, tmp_path / "undisturbed", **LENGTH, **growing)
    best = load_layer(tmp_path / "undisturbed")[1]["training"]["best_step"]
    assert 0 < best < 21
    kill(stored, tmp_path / "killed", AT_AN_EPOCH, **growing)
    fit(stored, tmp_path / "killed", **LENGTH, **growing)
    assert files(tmp_path / "killed") == files(tmp_path / "undisturbed")


@pytest.mark.parametrize("part", ["exp_avg", "exp_avg_sq", "step", "model/", "best/", "kept"])
def test_everything_in_a_checkpoint_is_used(stored, undisturbed, tmp_path, part):
    """The control of the tests above: with one part changed, the end is another."""
    stream, wanted = undisturbed
    kill(stored, tmp_path, AT_AN_EPOCH, stream=stream)
    tensors, metadata = checkpoint(tmp_path)
    touched = [name for name in tensors if part in name]
    for name in touched:
        tensors[name] = tensors[name] * 1.01 if "/step" not in name else tensors[name] + 50
    if part == "kept":
        assert '"step": 21' in metadata["kept"]
        metadata["kept"] = metadata["kept"].replace('"step": 21', '"step": 20', 1)
    elif part == "best/":  # else a later state is better and takes its place
        metadata["kept"] = metadata["kept"].replace('"best_loss": ', '"best_loss": -')
    assert touched or part == "kept"
    metadata["digest"] = resume.digest(tensors, metadata)
    save_file(tensors, tmp_path / CHECKPOINT, metadata=metadata)
    fit(stored, tmp_path, stream=stream, **LENGTH)
    assert files(tmp_path)["layer.safetensors"] != wanted["layer.safetensors"]


def test_checkpoint_written_again_as_it_was_changes_nothing(stored, undisturbed, tmp_path):
    """So that the control above shows the change and not the rewriting."""
    stream, wanted = undisturbed
    kill(stored, tmp_path, AT_AN_EPOCH, stream=stream)
    tensors, metadata = checkpoint(tmp_path)
    save_file(tensors, tmp_path / CHECKPOINT, metadata=metadata)
    fit(stored, tmp_path, stream=stream, **LENGTH)
    assert files(tmp_path) == wanted


# The checkpoint itself


def stepped(steps: int = 3) -> tuple[nn.Linear, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(
        [{"params": [model.weight], "peak": 1.0}, {"params": [model.bias], "peak": 0.5}], lr=0.1
    )
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(2, 4)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def equal(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, two) and one.dtype == two.dtype
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    return one == two


def test_checkpoint_returns_what_it_was_given(tmp_path):
    """Tensors of any dtype and floats to the last bit; names may hold dots and slashes."""
    model, optimizer = stepped()
    half = {"a.b/c": torch.randn(3).bfloat16(), "empty": torch.zeros(0)}
    kept = {"step": 3, "best_loss": 0.1 + 0.2, "history": [{"loss": 1 / 3}], "note": "é"}
    resume.save(tmp_path / CHECKPOINT, {"model": model.state_dict(), "best": half}, optimizer, kept)
    fresh = stepped(0)[1]
    states, found = resume.restore(tmp_path / CHECKPOINT, fresh)
    assert found == kept
    assert equal(states, {"model": dict(model.state_dict()), "best": half})
    assert equal(fresh.state_dict()["state"], optimizer.state_dict()["state"])
    assert [group["peak"] for group in fresh.param_groups] == [1.0, 0.5]


def test_checkpoint_is_a_copy_and_not_a_view(tmp_path):
    """Of weights that share memory, as tied embeddings do, safetensors would refuse to save."""
    model, optimizer = stepped()
    tied = {"one": model.weight, "two": model.weight}
    resume.save(tmp_path / CHECKPOINT, {"model": tied}, optimizer, {})
    states, _ = resume.restore(tmp_path / CHECKPOINT, optimizer)
    assert equal(states["model"]["one"], states["model"]["two"])


def test_checkpoint_before_the_first_step_has_no_moments(tmp_path):
    model, optimizer = stepped(0)
    resume.save(tmp_path / CHECKPOINT, {"model": model.state_dict()}, optimizer, {"step": 0})
    other = stepped(2)[1]
    assert resume.restore(tmp_path / CHECKPOINT, other)[1] == {"step": 0}
    assert other.state_dict()["state"] == {}


@pytest.mark.parametrize("fault", [lambda: {"not": {"json": object()}}, lambda: {1j: 2}])
def test_checkpoint_that_cannot_be_written_leaves_the_one_before(
    tmp_path, fault: Callable[[], dict]
):
    model, optimizer = stepped()
    resume.save(tmp_path / CHECKPOINT, {"model": model.state_dict()}, optimizer, {"step": 3})
    before = files(tmp_path)
    with pytest.raises(TypeError):
        resume.save(tmp_path / CHECKPOINT, {"model": {}}, optimizer, fault())
    assert files(tmp_path) == before


def test_half_written_checkpoint_is_not_taken_for_one(stored, undisturbed, tmp_path):
    """What a kill during the writing leaves: a `.partial` beside the checkpoint before it."""
    stream, wanted = undisturbed
    kill(stored, tmp_path, AT_AN_EPOCH, stream=stream)
    (tmp_path / CHECKPOINT).with_suffix(".partial").write_bytes(b"half")
    fit(stored, tmp_path, stream=stream, **LENGTH)
    assert files(tmp_path) == wanted


def test_truncated_checkpoint_is_refused_and_can_be_removed(stored, undisturbed, tmp_path):
    stream, wanted = undisturbed
    kill(stored, tmp_path, LATE, stream=stream)
    whole = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match="begins anew"):
        fit(stored, tmp_path, stream=stream, **LENGTH)
    (tmp_path / CHECKPOINT).unlink()
    fit(stored, tmp_path, stream=stream, **LENGTH)
    assert files(tmp_path) == wanted
