"""Nothing half-written looks finished, and finished work is found again."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import artifacts, locks, workdir
from pipeline.errors import ArtifactError, ResourceError

MODULE = "pipeline.errors"


def produce(out: Path, compute=None, **changes):
    calls = []

    def default(folder: Path) -> None:
        calls.append(folder)
        (folder / "a.txt").write_text("content")

    arguments = {"settings": {"seed": 0}, "inputs": {"x": "1"}, "lock_wait_s": 0.2} | changes
    workdir.produce(out, module=MODULE, compute=compute or default, **arguments)
    return calls


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return Path("stages/thing")


def test_equal_work_is_computed_once_and_adopted_after(out: Path):
    assert len(produce(out)) == 1
    shutil.rmtree(out)
    assert produce(out) == []
    assert (out / "a.txt").read_text() == "content"


@pytest.mark.parametrize("change", [{"settings": {"seed": 1}}, {"inputs": {"x": "2"}}])
def test_other_settings_or_inputs_are_other_work(out: Path, change: dict):
    produce(out)
    assert len(produce(out, **change)) == 1


def test_work_is_found_again_from_another_folder(out: Path, tmp_path: Path, monkeypatch):
    produce(out)
    shutil.copytree(tmp_path, tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert produce(out) == []


def test_an_interrupted_computation_publishes_nothing_and_finds_its_folder_again(out: Path):
    def interrupted(folder: Path) -> None:
        (folder / "checkpoint").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        produce(out, interrupted)
    assert not out.exists()
    seen = []
    produce(out, lambda folder: seen.append((folder / "checkpoint").read_text()))
    assert seen == ["half"]


def test_what_was_read_since_it_was_written_is_not_read_again(out: Path, monkeypatch):
    digest, hashed = artifacts.file_digest, []

    def known(folder: Path) -> dict[str, str]:
        for name in ("large", "small"):
            (folder / name).write_text(name)
        return {"large": digest(folder / "large")}

    monkeypatch.setattr(artifacts, "file_digest", lambda p: hashed.append(p.name) or digest(p))
    produce(out, known)
    assert hashed == ["small"]
    assert artifacts.verify(out)["files"].keys() == {"large", "small"}
    with pytest.raises(AssertionError, match="of no file"):
        produce(out, lambda _: {"absent": "0" * 64}, settings={"seed": 1})


def test_publishing_replaces_and_never_edits(out: Path):
    produce(out)
    before = (out / "a.txt").stat().st_ino
    kept = out.parent.parent / "kept"
    os.link(out / "a.txt", kept)

    def other(folder: Path) -> None:
        (folder / "a.txt").write_text("other")

    produce(out, other, settings={"seed": 2})
    assert (out / "a.txt").read_text() == "other" and kept.read_text() == "content"
    assert (out / "a.txt").stat().st_ino != before


@pytest.mark.parametrize("damage", ["flip", "remove", "add", "truncate"])
def test_verify_names_the_damaged_file(out: Path, damage: str):
    produce(out)
    work = next((Path(".scratch") / "thing").iterdir())
    shutil.copytree(work, "copy")
    target = Path("copy/a.txt")
    if damage == "flip":
        target.write_text("contenu")
    elif damage == "remove":
        target.unlink()
    elif damage == "truncate":
        target.write_text("")
    else:
        target = Path("copy/b.txt")
        target.write_text("foreign")
    with pytest.raises(ArtifactError, match=target.name):
        artifacts.verify(Path("copy"))


def test_what_is_left_to_its_reader_is_not_read_and_has_to_be_there(out: Path):
    produce(out)
    known = artifacts.digest(out)
    (out / "a.txt").write_text("other")
    assert artifacts.digest(out, but=["a.txt"]) == known
    with pytest.raises(ArtifactError, match=r"a\.txt"):
        artifacts.digest(out)
    (out / "a.txt").unlink()
    with pytest.raises(ArtifactError, match=r"a\.txt: it is missing"):
        artifacts.digest(out, but=["a.txt"])


def test_damaged_finished_work_is_computed_again(out: Path):
    produce(out)
    shutil.rmtree(out)
    work = next((Path(".scratch") / "thing").iterdir())
    (work / "a.txt").write_text("contenu")
    assert len(produce(out)) == 1
    assert (out / "a.txt").read_text() == "content"


def test_of_damaged_work_that_mends_itself_the_rest_is_kept(out: Path):
    seen = []

    def compute(folder: Path) -> None:
        seen.append(sorted(p.name for p in folder.iterdir()))
        for name in ("a.txt", "b.txt"):
            if not (folder / name).exists() or (folder / name).read_text() != "content":
                (folder / name).unlink(missing_ok=True)
                (folder / name).write_text("content")

    produce(out, compute, mends=True)
    work = next((Path(".scratch") / "thing").iterdir())
    kept = (work / "b.txt").stat().st_ino
    (work / "a.txt").write_text("contenu")
    produce(out, compute, mends=True)
    assert seen == [[], ["a.txt", "b.txt"]] and (work / "b.txt").stat().st_ino == kept
    assert artifacts.verify(out)["files"].keys() == {"a.txt", "b.txt"}


def test_damaged_work_that_cannot_mend_itself_is_computed_again(out: Path):
    def compute(folder: Path) -> None:
        if (folder / "a.txt").exists() and (folder / "a.txt").read_text() != "content":
            raise ArtifactError("no", rule="", remedy="")
        (folder / "a.txt").write_text("content")

    produce(out, compute, mends=True)
    (out / "a.txt").write_text("contenu")  # a hard link
    produce(out, compute, mends=True)
    assert (out / "a.txt").read_text() == "content"
    (out.parent.parent / ".scratch/thing").rename("elsewhere")

    def fails(folder: Path) -> None:
        raise ArtifactError("no", rule="", remedy="")

    with pytest.raises(ArtifactError):
        produce(out, fails, mends=True)


def test_a_unit_right_below_the_root_is_worked_on_in_the_scratch_folder():
    work = workdir.Work.of(Path("/sparse"), MODULE, {}, {}, Path("scratch"))
    assert work.folder.parent == Path("scratch/sparse")
    assert work.lock.parent == Path("scratch/locks")


def test_who_waits_for_a_scratch_folder_that_its_holder_removes_goes_on(out: Path, tmp_path: Path):
    """Two conversions into one output: the second finds the folder of its lock gone."""
    began, release = threading.Event(), threading.Event()
    scratch = tmp_path / ".sparse.scratch"

    def slow(folder: Path) -> None:
        began.set()
        release.wait(10)
        (folder / "a.txt").write_text("first")

    def second() -> list[Path]:
        return produce(out, scratch=scratch, lock_wait_s=10.0)

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(produce, out, slow, scratch=scratch, lock_wait_s=10.0)
        assert began.wait(10)
        other = threads.submit(second)
        time.sleep(0.3)
        release.set()
        first.result()
        assert len(other.result()) == 1
    assert not scratch.exists() and (out / "a.txt").read_text() == "content"


def test_a_second_run_waits_and_then_names_the_holder(out: Path, tmp_path: Path):
    held = locks.lock(tmp_path / ".scratch" / "locks" / "thing", 1)
    with held, pytest.raises(ResourceError, match=f"pid {os.getpid()}"):
        produce(out)
    assert len(produce(out)) == 1


def test_a_lock_dies_with_its_process(out: Path, tmp_path: Path):
    code = f"""
        import time
        from pathlib import Path
        from pipeline import locks
        with locks.lock(Path({str(tmp_path)!r}) / ".scratch/locks/thing", 1):
            print("held", flush=True)
            time.sleep(60)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout and child.stdout.readline() == "held\n"
        with pytest.raises(ResourceError, match=f"pid {child.pid}"):
            produce(out)
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert len(produce(out)) == 1


def test_manifests_of_equal_work_are_equal_bytes(out: Path):
    produce(out)
    first = (out / artifacts.MANIFEST).read_bytes()
    shutil.rmtree(".scratch")
    produce(out)
    assert (out / artifacts.MANIFEST).read_bytes() == first
