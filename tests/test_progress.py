"""What a run shows of where it is, on a terminal and off it."""

import itertools
import os
import pty
import re
import sys
from pathlib import Path

import pytest

from pipeline import progress

COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9][0-9;]*m")


def clock(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> None:
    left = iter(seconds)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(left))


def test_progress_off_a_terminal_is_plain_lines_of_this_runs_own_pace(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """900 of 1,000 were adopted: 50 in 10 s is 5/s, and the other 50 take 10 s more."""
    clock(monkeypatch, 0.0, 10.0, 20.0)
    with progress.shown("capture", "tokens") as report:
        for done in (900, 950, 1000):
            report(done, 1000, "train")
    assert capsys.readouterr().err.splitlines() == [
        "capture: 900/1,000 tokens  train",
        "capture: 950/1,000 tokens, 5.0 tokens/s, 10 s left  train",
        "capture: 1,000/1,000 tokens, 5.0 tokens/s  train",
    ]


def test_each_of_several_passes_has_a_pace_of_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    clock(monkeypatch, *range(0, 60, 10))
    with progress.shown("evaluate", "tokens") as report:
        for done in (50, 100) * 3:
            report(done, 100)
    said = capsys.readouterr().err.splitlines()
    assert said[1::2] == ["evaluate: 100/100 tokens, 5.0 tokens/s"] * 3


def test_steps_are_told_in_tokens_a_second(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    clock(monkeypatch, 0.0, 10.0)
    with progress.shown("train layer 3", tokens=2048) as report:
        report(1, 1001)
        report(11, 1001, "loss 0.5")
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "train layer 3: 11/1,001 steps, 2,048 tokens/s, 16 min left  loss 0.5"


def test_lines_off_a_terminal_are_seconds_apart_and_more_as_a_run_grows_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    clock(monkeypatch, *range(3601))
    with progress.shown("train") as report:
        for step in range(3600):
            report(step, 10**6)
        report(10**6, 10**6)
    steps = [
        int(line.split("/")[0][7:].replace(",", ""))
        for line in capsys.readouterr().err.split("\n")[:-1]
    ]
    apart = [b - a for a, b in itertools.pairwise(steps[:-1])]
    assert steps[-1] == 10**6 and apart[0] == progress.INTERVAL_S
    assert apart == sorted(apart) and apart[-1] == progress.LONGEST_S


@pytest.mark.parametrize(
    ("seconds", "told"), [(8.4, "8 s"), (89, "89 s"), (700, "12 min"), (11100, "3 h 05 min")]
)
def test_a_duration_is_told_in_the_unit_that_people_use(seconds: float, told: str):
    assert progress.duration(seconds) == told


def on_a_terminal(tmp_path: Path, **environment: str) -> tuple[str, str]:
    """What a terminal shows of a child that reports its progress, and the log of it."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        os.environ.update(environment)
        sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for fd in (1, 2))  # noqa: SIM115
        from pipeline import console

        with console.kept("train_3"), progress.shown("train layer 3", tokens=512) as report:
            for step in (1, 16, 32):
                report(step, 32, f"loss 0.{step}")
                print(f"printed at {step}")
            print("\ndrawn")
        sys.stdout.flush()
        os._exit(0)
    shown = b""
    while True:
        try:
            read = os.read(terminal, 4096)
        except OSError:  # the child has ended
            break
        if not read:
            break
        shown += read
    os.waitpid(child, 0)
    os.close(terminal)
    (log,) = (tmp_path / ".scratch/logs").iterdir()
    return shown.decode(), log.read_text()


@pytest.fixture(scope="module", autouse=True)
def imported_before_a_fork():
    import rich.progress  # noqa: F401


def test_a_terminal_gets_one_live_line_and_the_log_plain_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown, log = on_a_terminal(tmp_path, TERM="xterm-256color", COLUMNS="120")
    assert "32/32" in shown and "loss 0.32" in shown and "tokens/s" in shown
    assert "\x1b[2K" in shown and COLOUR.search(shown)
    assert "\x1b" not in log
    lines = [line[9:] for line in log.splitlines()]
    assert lines[0] == "train layer 3: 1/32 steps  loss 0.1"
    assert [line for line in lines if line.startswith("printed")] == [
        "printed at 1",
        "printed at 16",
        "printed at 32",
    ]
    assert all(f"printed at {step}" in shown for step in (1, 16, 32))


def test_no_color_and_dumb_terminals_are_honoured(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    shown, _ = on_a_terminal(tmp_path / "a", TERM="xterm-256color", NO_COLOR="1", COLUMNS="120")
    assert "\x1b[2K" in shown and not COLOUR.search(shown)
    shown, _ = on_a_terminal(tmp_path / "b", TERM="dumb")
    assert "\x1b" not in shown and "train layer 3: 32/32 steps" in shown
