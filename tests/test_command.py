"""How a command ends: the exit code says what kind of thing went wrong."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import artifacts, command, compose


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


@pytest.mark.parametrize("name", ["config", *artifacts.STAGES])
def test_help_of_a_stage_says_what_it_reads_writes_and_costs_with_examples(name: str):
    help_ = [sys.executable, "-m", f"pipeline.stages.{name}", "--help"]
    done = subprocess.run(help_, capture_output=True, text=True)
    assert done.returncode == 0
    assert all(f"{word}:" in done.stdout for word in ("Reads", "Writes", "Cost", "Run"))
    assert done.stdout.count(f"python -m pipeline.stages.{name}") >= (2 if name == "config" else 3)
    assert f"dvc repro {name}" in done.stdout and "Settings that it reads:" in done.stdout


def in_process(folder: Path, *argv: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """A stage's command, which says at its end which heavy libraries were imported."""
    code = (
        "import runpy, sys\n"
        f"{before}\n"
        f"sys.argv = {list(argv)!r}\n"
        f"try: runpy.run_module({argv[0]!r}, run_name='__main__')\n"
        "finally: print('imported', *sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


@pytest.mark.slow
def test_train_says_its_settings_and_choices_and_imports_no_transformers(captured_project: Path):
    done = in_process(captured_project, "pipeline.stages.train", "--layer", "0")
    assert done.returncode == 0, done.stderr
    *said, imported = done.stdout.splitlines()
    assert imported == "imported torch"
    assert said[0] == "seed=0" and said[1].startswith("moe: init_noise=0.01 virtual_groups=false")
    settings = " ".join(said)
    for key in compose.load([]).train.__dataclass_fields__:
        assert f" {key}=" in settings, key
    assert max(map(len, said[:10])) <= command.WIDTH
    for name in ("threads", "device", "dtype", "kernel of layer 0"):
        (line,) = {line for line in said if line.startswith(f"{name}: ")}
        assert re.fullmatch(r".*: \S.* \(.+\)", line)
    last = done.stderr.splitlines()[-1]
    assert re.search(
        r"8/8 steps.*tokens/s.*loss .*validation cosine .*dead experts", done.stderr
    ), last
    (log,) = (captured_project / ".scratch/logs").glob("train_0-*.log")
    logged = [line[9:] for line in log.read_text().splitlines()]
    assert [line for line in said if line in logged] == said
    assert [line for line in done.stderr.splitlines() if line not in logged] == []


def test_an_error_names_the_log_of_its_run(project: Path):
    done = in_process(project, "pipeline.stages.tokens")
    assert done.returncode == 5 and "imported\n" in done.stdout
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("  log:    "))
    log = Path(line.split()[-1])
    assert log.is_absolute() and log.parent == project / ".scratch/logs"
    assert "stages/dense" in log.read_text()


def test_a_mistake_in_the_configuration_leaves_no_log(project: Path):
    done = in_process(project, "pipeline.stages.tokens", "seed=-1")
    assert done.returncode == 2 and not (project / ".scratch").exists()


def test_a_layer_that_is_not_converted_is_refused_before_torch_is_imported(project: Path):
    done = in_process(project, "pipeline.stages.train", "--layer", "99")
    assert done.returncode == 2 and "imported\n" in done.stdout
    assert "model.layers=[0, 1, 2, 3]" in done.stderr


@pytest.mark.parametrize("argv", [["pipeline", "plan"], ["pipeline.stages.train", "--layer", "0"]])
def test_windows_is_told_at_the_start(project: Path, argv: list[str]):
    done = in_process(project, *argv, before="import pipeline.command; sys.platform = 'win32'")
    assert done.returncode == 2 and "WSL" in done.stderr and "imported\n" in done.stdout


def test_a_reader_that_leaves_early_gets_no_traceback(project: Path):
    """As `| head` does."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "compose", "--print"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout and process.stderr
    process.stdout.close()
    said = process.stderr.read().decode()
    assert (process.wait(), said) == (130, "")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a b", '"a b"'),
        ("auto", "auto"),
        ("", '""'),
        (None, "null"),
        (True, "true"),
        ([0, 1], "[0,1]"),
    ],
)
def test_settings_are_shown_as_they_would_be_typed(
    value: object, shown: str, capsys: pytest.CaptureFixture[str]
):
    command.show_settings({"": {"seed": 1}, "train": {"x": value}})
    assert capsys.readouterr().out == f"seed=1\ntrain: x={shown}\n"
