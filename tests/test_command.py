"""How a command ends: the exit code says what kind of thing went wrong."""

import os
import signal
import subprocess
import sys
import time

import pytest


def ended(action: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import errno\n"
        "from pipeline import command\n"
        "from pipeline.errors import *\n"
        "def act():\n"
        f"    {action}\n"
        "command.exit_with(act)"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("action", "code", "said"),
    [
        ("pass", 0, ""),
        ("raise ConfigError('w', rule='r', remedy='do it')", 2, "remedy: do it"),
        ("raise InputError('w', rule='r', remedy='do it')", 3, "remedy: do it"),
        ("raise ResourceError('w', rule='r', remedy='do it')", 4, "remedy: do it"),
        ("raise ArtifactError('w', rule='r', remedy='do it')", 5, "remedy: do it"),
        ("raise OSError(errno.ENOSPC, 'No space left', '/full')", 4, "/full"),
        ("raise PermissionError(errno.EACCES, 'Permission denied', '/closed')", 4, "/closed"),
        ("raise MemoryError('8 GiB')", 4, "8 GiB"),
        ("raise KeyboardInterrupt", 130, "the same command goes on"),
    ],
)
def test_each_kind_of_end_has_its_exit_code_and_no_traceback(action: str, code: int, said: str):
    done = ended(action)
    assert (done.returncode, said in done.stderr) == (code, True)
    assert "Traceback" not in done.stderr


def test_a_defect_of_ours_keeps_its_traceback():
    done = ended("1 / 0")
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


def test_a_refusal_survives_the_way_between_processes():
    import pickle

    from pipeline.errors import ArtifactError

    error = ArtifactError("what", value=3, rule="rule", remedy="remedy")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.value) == (ArtifactError, str(error), 3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_with_130_and_says_how_to_go_on(number: signal.Signals):
    code = (
        "import time\n"
        "from pipeline import command\n"
        "def act():\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "command.exit_with(act)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    started = time.monotonic()
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, "the same command goes on" in said) == (130, True)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("name", ["capture", "convert", "train"])
def test_help_of_a_stage_says_what_it_reads_writes_and_costs(name: str):
    command = [sys.executable, "-m", f"pipeline.stages.{name}", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert all(f"{word}:" in done.stdout for word in ("Reads", "Writes", "Cost", "Run"))
