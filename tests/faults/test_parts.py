"""Parts of a capture at once, overlapping, and killed: the same bytes, never a mixed file."""

import os
import random
import shutil
import signal
from pathlib import Path

import pytest
from injection import Boundaries, Stand, tree

from pipeline import artifacts

pytestmark = pytest.mark.slow

CAPTURE = "capture"
PARTS = [(i, 3) for i in (1, 2, 3)]
ADOPTED = "found complete"


@pytest.fixture
def bare(stand: Stand) -> Stand:
    """The project before its capture."""
    shutil.rmtree(stand.out(CAPTURE))
    return stand


def work(stand: Stand) -> Path:
    (found,) = (stand.root / ".scratch/capture").iterdir()
    return found


def adopt(stand: Stand, undisturbed: Stand) -> str:
    """What the stage says that publishes what the parts made, equal to one run's."""
    said = stand.run(CAPTURE).check().said
    assert stand.published() == undisturbed.published()
    return said


def test_parts_at_once_give_the_bytes_of_one_run_and_the_last_seals_them(undisturbed, bare):
    children = [bare.start(CAPTURE, part=part) for part in PARTS]
    ends = [child.wait().check() for child in children]
    assert sum(": complete in" in ended.said for ended in ends) == 1
    assert tree(work(bare)) == tree(undisturbed.out(CAPTURE))
    assert ADOPTED in adopt(bare, undisturbed)


def test_overlapping_parts_at_once_are_harmless(undisturbed, bare):
    children = [bare.start(CAPTURE, part=part) for part in ((1, 2), (3, 4), (2, 3), (2, 2))]
    ends = [child.wait().check() for child in children]
    assert any("waiting up to" in ended.said for ended in ends)
    assert tree(work(bare)) == tree(undisturbed.out(CAPTURE))
    assert ADOPTED in adopt(bare, undisturbed)


def test_a_run_alone_waits_for_the_parts_and_goes_on_from_them(undisturbed, bare):
    """And a part that comes while it works waits for it, and finds all complete."""
    part = bare.start(CAPTURE, part=(1, 2))
    alone = bare.start(CAPTURE)
    late = bare.start(CAPTURE, part=(2, 2))
    for child in (part, alone, late):
        child.wait().check()
    assert bare.published() == undisturbed.published()


def boundaries(bare: Stand) -> int:
    """Of part 2 of 3 at least: where another has begun the stores, and another seals them."""
    record = bare.outputs / "boundaries"
    bare.run(CAPTURE, part=(1, 3)).check()
    bare.run(CAPTURE, part=(2, 3), arm=Boundaries(bare.root, record=record).arm).check()
    shutil.rmtree(bare.root / ".scratch")
    return len(record.read_text().splitlines())


def test_a_part_killed_at_a_boundary_is_run_again_and_nothing_else_is(undisturbed, bare):
    n = boundaries(bare)
    for at in (1, *sorted(random.Random("parts").sample(range(2, n), 4)), n):
        arm = Boundaries(bare.root, at, torn=at % 2 == 0).arm
        killed = bare.start(CAPTURE, part=(2, 3), arm=arm)
        others = [bare.start(CAPTURE, part=part) for part in ((1, 3), (3, 3))]
        assert killed.wait().signal == signal.SIGKILL, at
        for child in others:
            child.wait().check()
        kept = {p: p.stat().st_mtime_ns for p in work(bare).rglob("c.*.0")}
        assert not (work(bare) / artifacts.MANIFEST).exists()
        bare.run(CAPTURE, part=(2, 3)).check()
        assert tree(work(bare)) == tree(undisturbed.out(CAPTURE)), at
        changed = [p for p, was in kept.items() if p.stat().st_mtime_ns != was]
        assert len(changed) <= 4, f"{at}: more than the shard that it was killed in"
        assert ADOPTED in adopt(bare, undisturbed)
        shutil.rmtree(bare.root / ".scratch")


@pytest.mark.parametrize("torn", [False, True])
def test_a_kill_while_the_last_part_seals_is_made_good_by_the_stage(undisturbed, bare, torn: bool):
    """By any part too. Nothing is computed again: no model is needed any more."""
    for part in PARTS[:2]:
        bare.run(CAPTURE, part=part).check()
    arm = Boundaries(bare.root, 1, where="/manifest.json.partial", torn=torn).arm
    assert bare.run(CAPTURE, part=PARTS[2], arm=arm).signal == signal.SIGKILL
    assert not (work(bare) / artifacts.MANIFEST).exists()
    again = bare.copy(bare.root.with_name("again"), scratch=True)
    assert "no model is loaded" in adopt(bare, undisturbed)
    assert "no model is loaded" in again.run(CAPTURE, part=(1, 3)).check().said
    assert tree(work(again)) == tree(undisturbed.out(CAPTURE))


def test_a_part_that_is_stopped_lets_its_lock_go(undisturbed, bare):
    arm = Boundaries(
        bare.root, 3, lambda: os.kill(os.getpid(), signal.SIGTERM), where=".0.partial"
    ).arm
    bare.run(CAPTURE, part=(1, 2), arm=arm).check(130)
    for part in ((2, 2), (1, 2)):
        assert "waiting" not in bare.run(CAPTURE, part=part).check().said
    assert ADOPTED in adopt(bare, undisturbed)
