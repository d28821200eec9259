"""What no artefact depends on: path, clock, environment, hash seed, order of a folder."""

import os
import shutil
import time
from pathlib import Path

import pytest
from injection import LIMIT_S, STAGES, Stand

pytestmark = pytest.mark.slow

ELSEWHERE = {
    "TZ": "Asia/Kathmandu",
    "LC_ALL": "C",
    "LANG": "tr_TR.UTF-8",
    "HOME": "/nonexistent",
    "USER": "another",
    "COLUMNS": "40",
    "UNRELATED": "value",
}
YEARS_S = 3e8


def elsewhere() -> None:
    """Another clock, and folders that are listed from their other end."""
    time.tzset()
    now, now_ns, listed, scanned = time.time, time.time_ns, os.listdir, os.scandir
    time.time = lambda: now() + YEARS_S
    time.time_ns = lambda: now_ns() + int(YEARS_S * 1e9)

    class Reversed:
        def __init__(self, path=".") -> None:
            with scanned(path) as found:
                self.entries = iter(sorted(found, key=lambda e: e.name, reverse=True))

        def __iter__(self):
            return self

        def __next__(self):
            return next(self.entries)

        def __enter__(self):
            return self

        def __exit__(self, *_) -> None:
            self.close()

        def close(self) -> None:
            pass

    os.listdir = lambda path=".": sorted(listed(path), reverse=True)
    os.scandir = Reversed
    os.umask(0o077)


def test_every_artefact_is_the_same_from_another_path_clock_and_environment(
    undisturbed: Stand, tmp_path: Path
):
    """All stages from scratch; a layer that is computed twice is the same bytes."""
    again = Stand(tmp_path / "a longer path, with spaces and ü" / "project", undisturbed.library)
    again.run_all(arm=elsewhere, environment=ELSEWHERE)
    assert_same(again, undisturbed)


def test_every_artefact_is_the_same_by_commands_of_another_hash_seed(
    undisturbed: Stand, tmp_path: Path
):
    again = Stand(tmp_path / "project", undisturbed.library)
    for stage in STAGES:
        seed = {"PYTHONHASHSEED": str(STAGES.index(stage) + 1), "OMP_NUM_THREADS": "7"}
        process = again.command(stage, environment=seed)
        said, _ = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, said
    assert_same(again, undisturbed)


def assert_same(one: Stand, other: Stand) -> None:
    found, wanted = one.published(), other.published()
    assert {n for n in found.keys() | wanted if found.get(n) != wanted.get(n)} == set()


def test_work_is_found_in_a_checkout_that_moved_under_another_clock(
    undisturbed: Stand, tmp_path: Path
):
    """Nothing is computed again, though every file looks older or newer than it was."""
    moved = undisturbed.copy(tmp_path / "moved", scratch=True)
    shutil.rmtree(moved.root / "stages")
    for i, path in enumerate(sorted(p for p in moved.root.rglob("*") if p.is_file())):
        os.utime(path, (0, 0) if i % 2 else (2e9, 2e9))
    for stage in STAGES[1:]:
        said = moved.run(stage, arm=elsewhere, environment=ELSEWHERE).check().said
        assert "found complete" in said, f"{stage}\n{said}"
    moved.run("config").check()
    assert_same(moved, undisturbed)
