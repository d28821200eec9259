"""What `clean` removes of a real folder, and what it never does."""

import json
import os
import pty
import re
import shutil
from pathlib import Path

import pytest

from pipeline import artifacts, clean, compose, locks, workdir
from pipeline.config import select
from pipeline.errors import ConfigError
from pipeline.objects import Objects, captures
from pipeline.prefill import ledger
from pipeline.prefill.units import Unit

MODULE = "pipeline.stages.tokens"
KEYS = ("data", "model.id", "model.trust_remote_code")


def made(out: str, *overrides: str, publish: bool = True, content: str = "x" * 1000) -> Path:
    """Finished work of `out`, as a stage makes it; the work folder."""
    settings = select(compose.load([*overrides]), KEYS)
    before = set(Path(".scratch").glob("*/*"))
    workdir.produce(
        Path(out),
        module=MODULE,
        settings=settings,
        inputs={},
        compute=lambda folder: (folder / "data").write_text(content) and None,
        lock_wait_s=1,
        published=publish,
    )
    (work,) = {
        p for p in Path(".scratch").glob("*/*") if (p / artifacts.MANIFEST).is_file()
    } - before
    return work


def interrupted(unit: str, name: str, age_s: int = 0) -> Path:
    work = Path(".scratch") / unit / name
    work.mkdir(parents=True)
    (work / "checkpoint.safetensors").write_bytes(b"0" * 5000)
    then = work.stat().st_mtime - age_s
    os.utime(work, (then, then))
    return work


def state(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(autouse=True)
def _in_project(project: Path):
    """Every test runs in a project's folder."""


def test_work_of_another_configuration_goes_and_what_is_published_or_fits_stays():
    published = made("stages/tokens", "data.sequence_length=64")  # applied, then conf/ was changed
    fitting = made("stages/tokens", publish=False)
    old = made("stages/tokens", "data.sequence_length=32", publish=False)
    outputs = state(Path("stages"))
    clean.clean(dry_run=False, yes=True, everything=False)
    assert published.is_dir() and fitting.is_dir() and not old.exists()
    assert state(Path("stages")) == outputs
    artifacts.verify(Path("stages/tokens"))


def test_the_last_work_of_this_configuration_goes_only_with_all_and_outputs_never():
    work = made("stages/tokens")
    (Path(".scratch/measured")).mkdir()
    outputs = state(Path("stages"))
    clean.clean(dry_run=False, yes=True, everything=False)
    assert work.is_dir() and Path(".scratch/measured").is_dir()
    clean.clean(dry_run=False, yes=True, everything=True)
    assert not work.exists() and not Path(".scratch/measured").exists()
    assert state(Path("stages")) == outputs
    artifacts.verify(Path("stages/tokens"))


def test_work_of_other_code_goes():
    work = made("stages/tokens", publish=False)
    manifest = json.loads((work / artifacts.MANIFEST).read_text())
    (work / artifacts.MANIFEST).write_text(json.dumps(manifest | {"code": "0" * 64}))
    (item,) = clean.survey(compose.load([]))
    assert item.goes and item.why == "finished by other code"


def test_interrupted_work_stays_where_its_run_may_go_on_and_goes_where_it_cannot():
    older = interrupted("train-layer_0", "0" * 16, age_s=60)
    newest = interrupted("train-layer_0", "1" * 16)
    made("stages/tokens")
    superseded = interrupted("tokens", "2" * 16)
    clean.clean(dry_run=False, yes=True, everything=False)
    assert newest.is_dir() and not older.exists() and not superseded.exists()
    clean.clean(dry_run=False, yes=True, everything=True)
    assert not newest.exists() and not newest.parent.exists()


def test_work_whose_lock_is_held_stays_even_with_all(capsys: pytest.CaptureFixture[str]):
    held = interrupted("tokens", "0" * 16)
    free = interrupted("heal", "1" * 16)
    read, write = os.pipe()
    holder = os.fork()
    if holder == 0:
        os.close(write)
        with locks.lock(Path(".scratch/locks/tokens-" + "0" * 16), 1):
            os.write(1, b"")
            Path("held").touch()
            os.read(read, 1)  # until the parent closes its end
        os._exit(0)
    os.close(read)
    while not Path("held").exists():
        os.sched_yield() if hasattr(os, "sched_yield") else None
    clean.clean(dry_run=False, yes=True, everything=True)
    os.close(write)
    os.waitpid(holder, 0)
    assert held.is_dir() and not free.exists()
    assert f"in use by pid {holder} on " in capsys.readouterr().out


def test_work_that_a_run_takes_while_the_user_thinks_is_left():
    work = interrupted("tokens", "0" * 16)
    (item,) = clean.survey(compose.load([]), everything=True)
    pid = os.fork()
    if pid == 0:  # a lock is re-entrant within its process
        with locks.lock(Path(".scratch/locks/tokens-" + "0" * 16), 1):
            grandchild = os.fork()
            if grandchild == 0:
                os._exit(0 if clean._remove(item) is False and work.is_dir() else 1)
            code = os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1])
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_half_published_folders_and_old_logs_go_and_the_last_log_stays():
    made("stages/tokens")
    half = [Path("stages/.tokens.new.tmp"), Path("stages/train/.layer_3.old.tmp")]
    for folder in half:
        folder.mkdir(parents=True)
        (folder / "data").write_text("half")
    logs = Path(".scratch/logs")
    logs.mkdir()
    for name in (
        "train_3-20260101-000000-9",
        "train_3-20260102-000000-1",
        "heal-20260101-000000-1",
    ):
        (logs / f"{name}.log").write_text("line")
    (logs / "tensorboard").mkdir()
    clean.clean(dry_run=False, yes=True, everything=False)
    assert not any(folder.exists() for folder in half)
    kept = sorted(path.name for path in logs.iterdir())
    assert kept == ["heal-20260101-000000-1.log", "tensorboard", "train_3-20260102-000000-1.log"]


def test_rows_of_windows_stay_while_windows_are_configured():
    Path(".scratch/windows/layer_2-abc").mkdir(parents=True)
    (windows,) = clean.survey(compose.load(["train.window=2"]))
    assert not windows.goes
    (windows,) = clean.survey(compose.load([]))
    assert windows.goes


def test_what_no_stage_made_stays_unless_all_is_said():
    Path(".scratch/quality/seed_0").mkdir(parents=True)
    assert [item.goes for item in clean.survey(compose.load([]))] == [False]
    assert [item.goes for item in clean.survey(compose.load([]), everything=True)] == [True]


def test_the_table_says_what_goes_why_and_what_it_frees(capsys: pytest.CaptureFixture[str]):
    """A file that an output shares with the work is not freed."""
    made("stages/tokens", content="y" * 50_000)
    made("stages/tokens", "data.sequence_length=32", publish=False, content="z" * 10_000)
    clean.clean(dry_run=True, yes=False, everything=True)
    said = capsys.readouterr().out
    assert "finished for another configuration (data.sequence_length=32)" in said
    assert "what lies in stages/ was published from here" in said
    (freed,) = (line for line in said.splitlines() if "go and free" in line)
    kilobytes = float(freed.split("free ")[1].split(" kB")[0])
    assert 10 < kilobytes < 20 and "nothing was removed" in said
    assert len(list(Path(".scratch/tokens").iterdir())) == 2


def test_nobody_to_ask_is_refused_and_nothing_removed():
    work = interrupted("tokens", "0" * 16)
    with pytest.raises(ConfigError, match="add --yes"):
        clean.clean(dry_run=False, yes=False, everything=True)
    assert work.is_dir()


@pytest.mark.parametrize(("answer", "stays"), [("n", True), ("", True), ("y", False)])
def test_the_user_is_asked_and_taken_at_the_word(answer: str, stays: bool):
    work = interrupted("tokens", "0" * 16)
    child, terminal = pty.fork()
    if child == 0:
        import sys

        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        clean.clean(dry_run=False, yes=False, everything=True)
        os._exit(0)
    os.write(terminal, f"{answer}\n".encode())
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(terminal)
    assert code == 0 and work.is_dir() == stays


def test_a_folder_that_is_no_project_is_refused():
    Path("params.yaml").unlink()
    with pytest.raises(ConfigError, match=r"no params\.yaml here"):
        clean.clean(dry_run=False, yes=True, everything=True)


def test_an_empty_project_has_nothing_to_remove(capsys: pytest.CaptureFixture[str]):
    shutil.rmtree(".scratch", ignore_errors=True)
    clean.clean(dry_run=False, yes=False, everything=False)
    assert "nothing to remove" in capsys.readouterr().out


def test_objects_go_with_the_work_that_they_belong_to_and_only_if_it_is_said(
    project: Path, capsys: pytest.CaptureFixture[str]
):
    other, published = (made("stages/capture", *how) for how in (["data.sequence_length=16"], []))
    unknown = "0" * 16
    url = f"file://{project}/objects"
    for name in (other.name, published.name, unknown):
        place = Objects(url, f"{name}/layer_0.zarr", create=True)
        place.put("train/input/c.0.0", b"x" * 5000)
        place.put("commits/train_00000.json", b"{}")
    params = project / "params.yaml"
    with pytest.raises(ConfigError, match="no object store to clean"):
        clean.clean(dry_run=False, yes=True, everything=False, objects=True)
    params.write_text(params.read_text().replace("store_url: null", f"store_url: {url}"))
    clean.clean(dry_run=True, yes=False, everything=False, objects=True)
    told = capsys.readouterr().out
    assert re.search(rf"goes:\n(.*\n)* +5 kB  {url}/{other.name}: finished for another", told)
    assert re.search(rf"stays:\n(.*\n)* +5 kB  {url}/{published.name}: what lies in stages", told)
    assert re.search(rf" +5 kB  {url}/{unknown}: unknown here", told)
    assert captures(url).keys() == {other.name, published.name, unknown}
    clean.clean(dry_run=False, yes=True, everything=False, objects=True)
    assert captures(url).keys() == {published.name, unknown}
    clean.clean(dry_run=False, yes=True, everything=True)
    assert captures(url).keys() == {published.name, unknown}


def test_records_of_prefill_stay_while_a_unit_waits_unless_all_goes():
    unit = Unit("layer_0-0", "layer", "0", (), {})
    ledger.record([unit])
    clean.clean(dry_run=False, yes=True, everything=False)
    assert ledger.look(unit) in ledger.every()
    with ledger.held(unit, 0):
        clean.clean(dry_run=False, yes=True, everything=False)
        assert ledger.every()
        ledger.end_failed(unit, ledger.begin(unit, None), KeyError(), "")
    clean.clean(dry_run=False, yes=True, everything=False)
    assert not ledger.root().exists()
    ledger.record([unit])
    clean.clean(dry_run=False, yes=True, everything=True)
    assert not ledger.root().exists()
