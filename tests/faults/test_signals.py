"""Ctrl-C and SIGTERM in mid-stage: 130, the line that resumes, and the undisturbed bytes."""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from injection import LIMIT_S, Boundaries, Stand, tree

pytestmark = pytest.mark.slow

INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.mark.parametrize(
    ("stage", "number", "at", "where"),
    [
        ("dense", INT, 3, "checkpoint.safetensors"),
        ("capture", TERM, 5, "train/output/zarr.json"),
        ("capture", INT, 2, "commits/train_00001.json"),
        ("train@0", TERM, 3, "checkpoint.partial"),
        ("heal", INT, 3, "static/checkpoint.safetensors"),
    ],
)
def test_signal_in_mid_stage_ends_with_130_and_the_rerun_as_undisturbed(
    stand: Stand, stage: str, number: signal.Signals, at: int, where: str
):
    wanted = stand.published()
    subprocess.run(["rm", "-r", stand.out(stage)], check=True)
    act = lambda: os.kill(os.getpid(), number)  # noqa: E731
    ended = stand.run(stage, arm=Boundaries(stand.root, at, act, where=where).arm)
    assert "the same command goes on where it was" in ended.check(130).said
    assert "Traceback" not in ended.said
    assert not stand.out(stage).exists()
    stand.run(stage).check()
    assert stand.published() == wanted


def test_signal_to_the_group_in_the_proof_leaves_no_process(stand: Stand):
    """As Ctrl-C in a terminal: the fresh process that proves a checkpoint gets it too."""
    wanted = stand.published()
    subprocess.run(["rm", "-r", stand.out("convert")], check=True)
    child = stand.start("convert")
    until = time.monotonic() + LIMIT_S
    while not (below := children(child.pid)):
        assert time.monotonic() < until
        time.sleep(0.01)
    os.killpg(child.pid, INT)
    assert "Traceback" not in child.wait().check(130).said
    until = time.monotonic() + 1  # by itself it would take several seconds
    while any(map(is_running, below)):
        assert time.monotonic() < until
        time.sleep(0.01)
    stand.run("convert").check()
    assert stand.published() == wanted


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(
    ("stage", "number", "longer"),
    [("train@1", INT, "train.epochs=12"), ("heal", TERM, "heal.tokens=16000")],
)
def test_command_names_the_line_that_resumes_and_it_does(
    stand: Stand, stage: str, number: signal.Signals, longer: str
):
    stand.run(stage, [longer]).check()
    wanted = tree(stand.out(stage))
    subprocess.run(["rm", "-r", stand.out(stage), stand.root / ".scratch"], check=True)
    process = stand.command(stage, longer)
    until = time.monotonic() + LIMIT_S
    while not list(stand.root.glob(".scratch/*/*/checkpoint.safetensors")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(number)
    said, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130 and "Traceback" not in said, said
    (line,) = re.findall(r"^interrupted; .*: (python -m .*)$", said, re.MULTILINE)
    assert longer in shlex.split(line)
    assert not stand.out(stage).exists()
    again = subprocess.run(
        line, shell=True, cwd=stand.root, env=stand.environment({}), capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert tree(stand.out(stage)) == wanted
