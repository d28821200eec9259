"""Two runs on one folder: one works, the other waits, adopts or is refused; they never mix."""

import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from injection import LIMIT_S, Boundaries, Child, Stand, tree

pytestmark = pytest.mark.slow

LAYER = "train@0"
OTHER = ["train.learning_rate=1e-4"]
QUICK = ["runtime.lock_wait_s=0.5"]


class Gate:
    """Where a child stops, until it is let through."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.reached, self.opened = folder / "reached", folder / "opened"

    def stop(self) -> None:
        self.reached.touch()
        _wait_for(self.opened)

    def wait(self) -> None:
        _wait_for(self.reached)


def _wait_for(path: Path) -> None:
    until = time.monotonic() + LIMIT_S  # a child whose test was killed must not stay
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.fixture
def held(stand: Stand, tmp_path: Path) -> Iterator[Callable[[int, str], tuple[Child, Gate]]]:
    """A layer's run that stops before a change, and stays there."""
    shutil.rmtree(stand.out(LAYER))
    gate = Gate(tmp_path / "gate")

    def hold(at: int, where: str) -> tuple[Child, Gate]:
        child = stand.start(LAYER, arm=Boundaries(stand.root, at, gate.stop, where=where).arm)
        gate.wait()
        return child, gate

    yield hold
    gate.opened.touch()


def test_second_run_waits_names_the_holder_and_ends_with_4(undisturbed, stand, held):
    """The holder is an orphan, as the kill of a dvc leaves it; its own kill frees the lock."""
    orphan, _ = held(2, "checkpoint.safetensors")
    named = f"pid {orphan.pid} on {socket.gethostname()}"
    second = stand.run(LAYER, QUICK).check(4)
    assert f"waiting up to 0.5 s for {named}" in second.said
    assert f"value:  {named}" in second.said and "runtime.lock_wait_s" in second.said
    assert str(stand.root) in second.said and not stand.out(LAYER).exists()
    os.kill(orphan.pid, signal.SIGKILL)
    assert orphan.wait().signal == signal.SIGKILL
    third = stand.run(LAYER, QUICK).check()
    assert "waiting" not in third.said and "found complete" not in third.said
    assert stand.published() == undisturbed.published()


def test_second_run_waits_for_the_holder_and_adopts_its_work(undisturbed, stand, held):
    holder, gate = held(1, "checkpoint.safetensors")
    second = stand.start(LAYER)
    until = time.monotonic() + LIMIT_S
    while f"for pid {holder.pid}" not in second.said():
        assert time.monotonic() < until
        time.sleep(0.01)
    gate.opened.touch()
    holder.wait().check()
    assert "found complete" in second.wait().check().said
    assert stand.published() == undisturbed.published()


@pytest.mark.parametrize("where", ["stages/train/layer_0", "/.layer_0.new.tmp"])
def test_publishing_is_done_inside_the_lock(undisturbed, stand, held, where):
    """Between the tree of links and its rename, and before the tree: a second run is kept out."""
    publisher, gate = held(1, where)
    assert f"pid {publisher.pid}" in stand.run(LAYER, QUICK).check(4).said
    assert not stand.out(LAYER).exists()
    gate.opened.touch()
    publisher.wait().check()
    assert "found complete" in stand.run(LAYER).check().said
    assert stand.published() == undisturbed.published()


@pytest.mark.parametrize("later_s", [0.0, 0.4])
def test_of_two_runs_at_the_same_moment_one_computes_and_one_adopts(
    undisturbed, stand, later_s: float
):
    shutil.rmtree(stand.out(LAYER))
    first = stand.start(LAYER)
    time.sleep(later_s)
    second = stand.start(LAYER)
    ends = [child.wait().check() for child in (first, second)]
    assert sorted("found complete" in ended.said for ended in ends) == [False, True]
    assert stand.published() == undisturbed.published()


def test_two_runs_of_different_settings_leave_one_of_the_two_whole(undisturbed, stand, tmp_path):
    other = undisturbed.copy(tmp_path / "other")
    other.run(LAYER, OTHER).check()
    whole = [tree(side.out(LAYER)) for side in (undisturbed, other)]
    assert whole[0] != whole[1]
    for _ in range(2):
        children = [stand.start(LAYER), stand.start(LAYER, OTHER)]
        for child in children:
            child.wait().check()
        assert tree(stand.out(LAYER)) in whole
    assert not list(stand.out(LAYER).parent.glob(".*"))


def test_two_checkouts_of_one_repository_compute_a_layer_once(undisturbed, stand, tmp_path):
    """As `dvc exp run --temp` does, which names the repository by DVC_ROOT."""
    temporary = stand.copy(tmp_path / "temporary")
    sides = (stand, temporary)
    for side in sides:
        shutil.rmtree(side.out(LAYER))
    root = {"DVC_ROOT": str(stand.root)}
    children = [side.start(LAYER, environment=root) for side in sides]
    ends = [child.wait().check() for child in children]
    assert sorted("found complete" in ended.said for ended in ends) == [False, True]
    assert not (temporary.root / ".scratch/train-layer_0").exists()
    assert all(side.published() == undisturbed.published() for side in sides)


def test_partial_files_of_a_lost_worker_are_ignored(undisturbed, stand):
    """Of one that fitted the layer ahead, on a machine that is gone: its lock is nobody's."""
    shutil.rmtree(stand.out(LAYER))
    arm = Boundaries(stand.root, 3, where="checkpoint.partial", torn=True).arm
    assert stand.run(LAYER, arm=arm, published=False).signal == signal.SIGKILL
    (work,) = (stand.root / ".scratch/train-layer_0").iterdir()
    assert (work / "checkpoint.partial").exists()
    for name in ("layer.safetensors", "history.csv", "config.json.partial"):
        (work / name).write_bytes(b"half")
    for holder in (stand.root / ".scratch/locks").glob("*.holder"):
        holder.write_text("pid 1 on a-machine-that-is-gone")
    assert "waiting" not in stand.run(LAYER, QUICK).check().said
    assert stand.published() == undisturbed.published()
