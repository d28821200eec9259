"""A call ends by what its jobs wrote, whatever their launcher does."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_prefill_ledger import finish, make, running

from pipeline.errors import InputError
from pipeline.prefill import launch, ledger
from pipeline.prefill.ledger import State
from pipeline.prefill.units import Unit


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "POLL_S", 0.02)


@pytest.fixture
def units(project: Path) -> list[Unit]:
    found = [make("3"), make("4")]
    ledger.record(found)
    return found


def fail(unit: Unit) -> None:
    with ledger.held(unit, 5):
        refused = InputError("No.", rule="", remedy="")
        ledger.end_failed(unit, ledger.begin(unit, None), refused, "")


class Launcher(launch.Launching):
    """One that runs for ever, or has ended, by an error or not."""

    def __init__(self, alive: bool, error: Exception | None) -> None:
        super().__init__([], [])
        self.is_alive = lambda: alive
        self.error = error


def watch(
    units: list[Unit],
    alive: bool,
    timeout_s: float | None = 20.0,
    lost_wait_s: float = 10.0,
    error: Exception | None = None,
):
    seen, timed_out = launch.watch(units, Launcher(alive, error), timeout_s, lost_wait_s)
    return [one.state for one in seen], timed_out


def test_it_ends_when_every_unit_has_though_the_launcher_never_does(
    units: list[Unit], capsys: pytest.CaptureFixture[str]
):
    ends = threading.Timer(0.3, lambda: (finish(units[0]), fail(units[1])))
    ends.start()
    assert watch(units, alive=True) == ([State.done, State.failed], False)
    told = capsys.readouterr()
    assert "layer 3: complete in" in told.out and "layer 4: failed, exit 3: No." in told.out
    assert "prefill: 0/2 units  2 waiting" in told.err


def test_a_lost_unit_is_given_up_when_nobody_begins_it_again(units: list[Unit]):
    finish(units[0])
    process, _ = running(units[1])
    threading.Timer(0.3, process.kill).start()
    began = time.monotonic()
    assert watch(units, alive=True, lost_wait_s=0.5) == ([State.done, State.lost], False)
    assert 0.7 < time.monotonic() - began < 10


def test_a_unit_that_is_begun_again_is_awaited(units: list[Unit]):
    finish(units[0])
    process, _ = running(units[1])
    process.kill()
    process.join()
    threading.Timer(0.4, lambda: finish(units[1])).start()
    assert watch(units, alive=True, lost_wait_s=5.0) == ([State.done, State.done], False)


def test_units_that_no_launcher_will_begin_are_given_up_and_running_ones_awaited(
    units: list[Unit],
):
    process, link = running(units[0])
    threading.Timer(0.8, lambda: link.send("end")).start()
    began = time.monotonic()
    assert watch(units, alive=False, lost_wait_s=0.3) == ([State.lost, State.waiting], False)
    assert time.monotonic() - began > 0.8
    process.join()


def test_a_launcher_that_hands_over_nothing_is_not_waited_for(units: list[Unit]):
    began = time.monotonic()
    assert watch(units, alive=False, error=RuntimeError("no cluster")) == (
        [State.waiting] * 2,
        False,
    )
    assert time.monotonic() - began < 5
    finish(units[0])  # it has handed over one, so the other may wait in a queue
    assert watch(units, alive=False, error=RuntimeError(), timeout_s=0.5)[1]


def test_time_is_bounded(units: list[Unit]):
    assert watch(units, alive=True, timeout_s=0.2) == ([State.waiting] * 2, True)


HANGING = """
import sys, threading, time
from pipeline import prefill
from pipeline.errors import InputError
thread = threading.Thread(target=time.sleep, args=(600,))
thread.start()
def act():
    if sys.argv[1] == "fail":
        raise InputError("No.", rule="", remedy="")
    print("all is well")
prefill._leaving(act, thread.is_alive)
"""


@pytest.mark.parametrize(("how", "code", "said"), [("end", 0, "all is well"), ("fail", 3, "No.")])
def test_a_launcher_that_hangs_is_left_behind_with_all_said(how: str, code: int, said: str):
    line = [sys.executable, "-c", HANGING, how]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == code and said in done.stdout + done.stderr


def test_what_was_started_here_is_stopped_even_if_it_does_not_listen():
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); "
    )
    code = f"""
import subprocess, sys
from pipeline.prefill import launch
launch.STOP_S = 0.5
line = [sys.executable, "-c", {deaf + "time.sleep(60)"!r}]
below = subprocess.Popen(line, stdout=subprocess.PIPE)
below.stdout.readline()
launch.stop()
print(below.wait(10))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["-9"], done.stderr
