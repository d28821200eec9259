"""Units through each launcher, as processes: what they leave, how calls end, what a rerun does."""

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_prefill_units
from test_prefill_units import damage

from pipeline import workdir
from pipeline.prefill import ledger
from pipeline.stages import CAPTURE

pytestmark = pytest.mark.slow
here = test_prefill_units.here
TWO = ("-m", "layer=0,1", "runtime.threads=1")
LONG = "train.epochs=3000"


CALLS: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def no_call_goes_on() -> Iterator[None]:
    """Behind a test that failed, too."""
    yield
    for process in CALLS:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
    CALLS.clear()


def call(*arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "prefill", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    CALLS.append(process)
    return process


def prefill(*arguments: str, expect: int = 0) -> str:
    return ended(call(*arguments), expect)


def ended(process: subprocess.Popen[str], expect: int = 0) -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == expect, said
    return said


def stage(name: str, *arguments: str) -> str:
    line = [sys.executable, "-m", f"pipeline.stages.{name}", *arguments, "runtime.threads=1"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def states() -> dict[str, str]:
    return {seen.unit.name: seen.state.name for seen in ledger.every()}


def wait_for(state: str) -> list[ledger.Seen]:
    """Until every unit is in that state, and its job has written who it is."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        found = ledger.every()
        if found and all(seen.run and seen.state.name == state for seen in found):
            return found
        time.sleep(0.05)
    raise AssertionError(f"{states()}, not {state}")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_parts_and_layers_by_joblib_are_what_one_process_makes(here: Path):
    """The bytes of a capture, and of layers fitted to it; the stages find both."""
    fresh = "capture.codec=fast"
    said = prefill("-m", "shards=1/2,2/2", "hydra/launcher=joblib", "runtime.threads=1", fresh)
    assert "shards 1/2: complete in" in said and "2 of 2 done" in said
    assert "stages/capture: found complete" in stage("capture", fresh)
    prefill(*TWO, "hydra/launcher=joblib", fresh)
    for k in "01":
        said = stage("train", "--layer", k, fresh)
        assert f"stages/train/layer_{k}: found complete" in said
    several = bytes_of(Path("stages/capture")) | bytes_of(Path("stages/train"))
    for unit in ("capture", "train-layer_0", "train-layer_1"):
        for work in (workdir.scratch_root() / unit).iterdir():
            work.rename(work.with_name("away-" + work.name))
    stage("capture", fresh)
    for k in "01":
        assert "found complete" not in stage("train", "--layer", k, fresh)
    assert bytes_of(Path("stages/capture")) | bytes_of(Path("stages/train")) == several


def test_a_failing_layer_ends_the_call_and_a_rerun_does_only_what_is_missing(here: Path):
    whole = CAPTURE / "ffn_1.safetensors"
    kept = whole.read_bytes()
    damage(whole)
    said = prefill(*TWO, "hydra/launcher=joblib", expect=5)
    assert "1 of 2 done, 1 failed" in said and "ffn_1.safetensors: its SHA-256 is not" in said
    assert "Traceback" not in said
    assert states() == {"layer 0": "done", "layer 1": "failed"}
    assert prefill("--status", "--json", expect=5)
    whole.unlink()
    whole.write_bytes(kept)
    said = prefill(*TWO, "hydra/launcher=joblib")
    assert "layer 0: found complete" in said and "1 units, " in said
    assert states() == {"layer 0": "done", "layer 1": "done"}
    assert "workers" not in prefill(*TWO, "hydra/launcher=joblib")


def test_a_killed_worker_is_told_as_lost_and_a_rerun_goes_on(here: Path):
    running = call(*TWO, "hydra/launcher=joblib", LONG)
    seen = wait_for("running")
    os.kill(seen[0].run["pid"], signal.SIGKILL)
    said = ended(running, 4)
    assert "Units of work were lost." in said and "Traceback" not in said
    assert f"ended without a word: pid {seen[0].run['pid']} on " in said
    assert "lost" in states().values()
    again = call(*TWO, "hydra/launcher=joblib", LONG)
    assert [one.run["pid"] for one in wait_for("running")] != [one.run["pid"] for one in seen]
    again.send_signal(signal.SIGINT)
    ended(again, 130)


def test_ctrl_c_ends_the_jobs_of_this_machine_and_names_the_command(here: Path):
    running = call(*TWO, "hydra/launcher=joblib", LONG)
    pids = [seen.run["pid"] for seen in wait_for("running")]
    running.send_signal(signal.SIGINT)
    said = ended(running, 130)
    assert "python -m pipeline prefill -m layer=0,1" in said and "were ended" in said
    assert not any(alive(pid) for pid in pids)
    assert set(states().values()) == {"lost"}


def test_who_leaves_the_output_ends_the_jobs_too(here: Path):
    """As `| head` does."""
    running = call(*TWO, "hydra/launcher=joblib", LONG)
    pids = [seen.run["pid"] for seen in wait_for("running")]
    assert running.stdout
    running.stdout.close()
    assert running.wait(60) == 130
    assert not any(alive(pid) for pid in pids)


def test_when_the_time_is_up_jobs_here_end_and_what_is_done_stays(here: Path):
    prefill("layer=0", "runtime.threads=1", "train.patience=0")
    sweep = ("-m", "layer=0", "train.epochs=1,3000", "runtime.threads=1", "train.patience=0")
    said = prefill(*sweep, "hydra/launcher=joblib", "prefill.timeout_s=8", expect=4)
    assert "layer 0 train.epochs=1: found complete" in said
    assert "The time is up" in said and "layer 0 train.epochs=3000" in said
    found = {seen.unit.overrides: seen for seen in ledger.every()}
    assert found[("train.patience=0",)].state.name == "done"
    late = found[("train.epochs=3000", "train.patience=0")]
    assert late.state.name in ("lost", "waiting") and not (late.run and alive(late.run["pid"]))


@pytest.mark.parametrize("launcher", ["submitit_local", "ray"])
def test_layers_by_other_launchers_are_found_by_their_stage(here: Path, launcher: str):
    said = prefill(*TWO, f"hydra/launcher={launcher}")
    assert "2 of 2 done" in said
    for k in "01":
        assert f"stages/train/layer_{k}: found complete" in stage("train", "--layer", k)
    found = json.loads(prefill("--status", "--json"))
    assert [(one["unit"], one["state"]) for one in found] == [
        ("layer=0", "done"),
        ("layer=1", "done"),
    ]
    logs = [Path(one["log"]).read_text() for one in found]
    assert all("threads: 1 (configured)" in log and "complete in" in log for log in logs)
    if launcher == "submitit_local":
        pickles = list(ledger.root().rglob("*.pkl"))
        assert pickles and all(one["job"] for one in found)
    assert stat.S_IMODE(ledger.root().stat().st_mode) == 0o700


def alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False
