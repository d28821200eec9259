"""What is known of units is told from their records and locks alone."""

import fcntl
import json
import multiprocessing
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import artifacts, workdir
from pipeline.errors import ArtifactError, InputError, ResourceError
from pipeline.prefill import ledger, outcome, status
from pipeline.prefill.ledger import State
from pipeline.prefill.units import Unit

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def unit(project: Path) -> Unit:
    found = make("3")
    ledger.record([found])
    return found


def make(what: str, digest: str = "0123456789", *overrides: str) -> Unit:
    kind = "shards" if "/" in what else "layer"
    return Unit(f"{kind}_{what.replace('/', '_of_')}-{digest}", kind, what, overrides, {"seed": 0})


def begin_and_wait(unit: Unit, link) -> None:
    with ledger.held(unit, 0):
        ledger.begin(unit, None)
        link.send("begun")
        link.recv()
        raise SystemExit


def running(unit: Unit):
    """A process that runs the unit until it is killed or told to go on."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=begin_and_wait, args=(unit, theirs), daemon=True)
    process.start()
    assert ours.recv() == "begun"
    return process, ours


def finish(unit: Unit, sealed: bool = True) -> None:
    with ledger.held(unit, 0):
        run = ledger.begin(unit, None)
        work = workdir.scratch_root() / "train-layer_3" / "f00d"
        work.mkdir(parents=True, exist_ok=True)
        if sealed:
            artifacts.write_manifest(work, {})
        ledger.end_done(unit, run, work)


def test_a_record_is_read_as_it_was_written(unit: Unit):
    assert ledger.read(unit.id) == unit
    assert ledger.look(unit).state is State.waiting


def test_a_unit_runs_as_long_as_its_process_and_is_lost_with_it(unit: Unit):
    process, _ = running(unit)
    seen = ledger.look(unit)
    assert seen.state is State.running and f"pid {process.pid} on " in seen.told
    process.kill()
    process.join()
    seen = ledger.look(unit)
    assert seen.state is State.lost and seen.exit_code == 4
    assert f"ended without a word: pid {process.pid} on " in seen.told


def test_who_asks_does_not_look_like_who_runs(unit: Unit):
    """Locks are shared by those who ask."""
    with ledger.held(unit, 0):
        pass
    with ledger._path(unit.id, "lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        assert not ledger.is_held(unit.id)


def test_a_unit_is_run_by_one_process_at_a_time(unit: Unit):
    process, link = running(unit)
    with pytest.raises(ResourceError) as caught, ledger.held(unit, 0.3):
        pass
    assert f"pid {process.pid}" in str(caught.value.value)
    link.send("end")
    with ledger.held(unit, 10):
        pass
    process.join()


def test_done_is_what_lies_there_whatever_was_written(unit: Unit):
    finish(unit)
    assert ledger.look(unit).state is State.done and ledger.look(unit).exit_code == 0
    (ledger.look(unit).folder / artifacts.MANIFEST).unlink()
    assert ledger.look(unit).state is State.lost
    part = make("1/2")
    ledger.record([part])
    finish(part, sealed=False)
    assert ledger.look(part).state is State.done


def test_a_failure_keeps_its_class_message_and_code(unit: Unit, capsys: pytest.CaptureFixture[str]):
    error = InputError("No.", value=7, rule="yes", remedy="say yes")
    with ledger.held(unit, 0):
        ledger.end_failed(unit, ledger.begin(unit, None), error, "")
    seen = ledger.look(unit)
    assert seen.state is State.failed and seen.exit_code == 3 and "exit 3: No." in seen.told
    with pytest.raises(InputError) as caught:
        outcome.conclude([seen], timed_out=False, launcher="joblib")
    assert str(caught.value) == str(error)


def test_what_is_no_refusal_keeps_its_traceback(unit: Unit, capsys: pytest.CaptureFixture[str]):
    with ledger.held(unit, 0):
        ledger.end_failed(unit, ledger.begin(unit, None), KeyError("x"), "Traceback: here")
    with pytest.raises(SystemExit) as left:
        outcome.conclude([ledger.look(unit)], timed_out=False, launcher="joblib")
    assert left.value.code == 1 and "Traceback: here" in capsys.readouterr().err


def test_an_interrupted_unit_is_lost_and_not_failed(unit: Unit):
    with ledger.held(unit, 0):
        ledger.end_failed(unit, ledger.begin(unit, None), KeyboardInterrupt(), "")
    assert ledger.look(unit).state is State.lost and "interrupted" in ledger.look(unit).told


def test_the_first_failure_by_number_decides_though_others_were_lost(
    project: Path, capsys: pytest.CaptureFixture[str]
):
    units = [make(str(k)) for k in range(3)]
    ledger.record(units)
    with ledger.held(units[0], 0):
        ledger.begin(units[0], None)
    for k, error in ((1, InputError), (2, ArtifactError)):
        with ledger.held(units[k], 0):
            refused = error("No.", rule="", remedy="")
            ledger.end_failed(units[k], ledger.begin(units[k], None), refused, "")
    with pytest.raises(InputError):
        outcome.conclude([ledger.look(u) for u in units], timed_out=False, launcher="joblib")
    said = capsys.readouterr().err
    assert "0 of 3 done, 2 failed, 1 lost" in said and said.count("exit ") == 2


def test_a_new_record_forgets_how_the_last_run_ended_unless_it_runs(unit: Unit):
    finish(unit)
    ledger.record([unit])
    assert ledger.look(unit).state is State.waiting
    process, link = running(unit)
    ledger.record([unit])
    assert ledger.look(unit).state is State.running and ledger.look(unit).run["pid"] == process.pid
    link.send("end")
    process.join()


def test_records_of_other_inputs_go_and_of_other_settings_stay(unit: Unit):
    other = make("3", "aaaaaaaaaa", "moe.n_experts=8")
    ledger.record([other])
    assert {seen.unit.id for seen in ledger.every()} == {unit.id, other.id}
    newer = make("3", "bbbbbbbbbb")
    ledger.record([newer])
    assert {seen.unit.id for seen in ledger.every()} == {newer.id, other.id}


def test_records_are_private_to_their_user(unit: Unit):
    assert stat.S_IMODE(ledger.root().stat().st_mode) == 0o700


def test_a_damaged_record_is_told_and_does_not_hide_the_others(unit: Unit):
    (ledger.root() / "units" / "layer_9-0000000000.json").write_text("{}")
    (ledger.root() / "units" / "layer_8-0000000000.json").write_text("no json")
    assert [seen.unit for seen in ledger.every()] == [unit]
    with pytest.raises(ArtifactError, match="layer_9"):
        ledger.read("layer_9-0000000000")


def test_slurms_names_are_recorded(unit: Unit, monkeypatch: pytest.MonkeyPatch):
    for name, value in (("ARRAY_JOB_ID", "12"), ("ARRAY_TASK_ID", "3"), ("JOB_ID", "15")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    with ledger.held(unit, 0):
        ledger.begin(unit, None)
        assert ledger.look(unit).where == f"pid {os.getpid()} on n7, job 12_3"


def shown(*flags: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-X", "importtime", "-m", "pipeline", "prefill", "--status", *flags]
    return subprocess.run(line, capture_output=True, text=True)


def test_status_is_told_in_lines_in_json_and_by_its_exit_code_without_torch(unit: Unit):
    log = workdir.scratch_root() / "layer_3.log"
    log.write_text("one\ntwo\nthree\nfour\n")
    process, _ = running(unit)
    ledger.begin(unit, log)
    began = time.monotonic()
    done = shown()
    assert time.monotonic() - began < 5
    assert done.returncode == 0 and "0 of 1 done, 1 running" in done.stdout
    assert "    four\n" in done.stdout and str(log) in done.stdout
    assert "    one\n" not in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "pipeline.prefill.status" in imported
    assert not imported & {"torch", "transformers", "zarr", "rich", "hydra", "numpy"}
    process.kill()
    process.join()
    done = shown("--json")
    (found,) = json.loads(done.stdout)
    assert done.returncode == 4 and found["state"] == "lost" and found["unit"] == "layer=3"
    assert found["last_lines"] == ["two", "three", "four"]
    with ledger.held(unit, 0):
        refused = InputError("No.", rule="", remedy="")
        ledger.end_failed(unit, ledger.begin(unit, log), refused, "")
    assert shown().returncode == 3


def test_status_of_nothing_says_so(project: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        status.show(as_json=False)
    assert left.value.code == 0 and "nothing was asked" in capsys.readouterr().out
