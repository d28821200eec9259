"""The log of a run."""

import os
import re
import sys
from pathlib import Path

import pytest

from pipeline import console
from pipeline.errors import ArtifactError, ConfigError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return tmp_path


def only_log() -> list[str]:
    (log,) = console.logs()
    return log.read_text().splitlines()


def test_what_is_printed_goes_to_the_console_and_with_the_time_to_the_log(
    capsys: pytest.CaptureFixture[str],
):
    with console.kept("train_3"):
        print("device: cpu")
        print("warning: x", file=sys.stderr)
        print("half", end="")
        print(" a line", end="")
    print("after")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("device: cpu\nhalf a lineafter\n", "warning: x\n")
    lines = only_log()
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d .*", line) for line in lines)
    assert [line[9:] for line in lines] == ["device: cpu", "warning: x", "half a line"]


def test_a_bar_that_is_drawn_over_leaves_its_last_state_in_the_log():
    with console.kept("evaluate"):
        print("10%\r50%\r100%")
    assert [line[9:] for line in only_log()] == ["100%"]


def test_a_refusal_is_in_the_log_and_names_it():
    with pytest.raises(ArtifactError) as caught, console.kept("heal"):
        raise ArtifactError("what", value=3, rule="rule", remedy="remedy")
    (log,) = console.logs("heal")
    assert caught.value.__notes__ == [f"log:    {log.absolute()}"]
    assert "error: what" in log.read_text() and "remedy: remedy" in log.read_text()


def test_a_run_that_its_configuration_ends_leaves_no_log(folder: Path):
    with pytest.raises(ConfigError) as caught, console.kept("budget"):
        print("x")
        raise ConfigError("what", rule="rule", remedy="remedy")
    assert list(folder.iterdir()) == [] and not hasattr(caught.value, "__notes__")


def test_a_defect_leaves_its_traceback_in_the_log():
    with pytest.raises(ZeroDivisionError), console.kept("heal"):
        _ = 1 / 0
    assert "in test_a_defect_leaves" in "\n".join(only_log())


def test_the_newest_logs_of_a_unit_stay_and_those_of_others_are_left_alone():
    console.folder().mkdir(parents=True)
    for day in range(10, 10 + console.KEPT + 5):
        (console.folder() / f"train_3-202601{day}-000000-1.log").touch()
    for other in ("train_30-20260101-000000-1.log", "train-20260101-000000-1.log"):
        (console.folder() / other).touch()
    with console.kept("train_3"):
        print("new")
    kept = console.logs("train_3")
    assert len(kept) == console.KEPT and "new" in kept[-1].read_text()
    assert len(console.logs("train_30")) == len(console.logs("train")) == 1


def test_a_log_that_cannot_be_written_stops_no_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    (folder / ".scratch").write_text("in the way")
    with console.kept("train_3"):
        print("goes on")
    said = capsys.readouterr()
    assert said.out == "goes on\n" and "no log of this run" in said.err


def test_a_log_whose_disk_fails_meanwhile_stops_no_run(capsys: pytest.CaptureFixture[str]):
    with console.kept("train_3"):
        print("before")
        assert console._log and console._log._file
        os.close(console._log._file.fileno())  # every write fails from here on
        print("after")
    assert capsys.readouterr().out == "before\nafter\n"
    assert [line[9:] for line in only_log()] == ["before"]


def test_logs_of_an_experiment_lie_in_the_parent_repository(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DVC_ROOT", os.fspath(folder / "parent"))
    with console.kept("train_3"):
        print("x")
    assert [log.parent for log in console.logs()] == [folder / "parent/.scratch/logs"]
