"""Where figures also go: the real loggers on real stages."""

import contextlib
import csv
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline import artifacts, command, compose, loggers
from pipeline.config import Logger, RuntimeConfig
from pipeline.errors import ConfigError
from pipeline.stages import heal, train


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return tmp_path


def scalars(place: Path) -> dict[str, list[tuple[int, float]]]:
    read = EventAccumulator(str(place)).Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def only(pattern: str) -> Path:
    (found,) = Path(".scratch/logs").glob(pattern)
    return found


def history(path: Path) -> list[dict[str, float]]:
    with path.open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_dense_train_and_heal_log_their_figures(captured_project: Path):
    """What TensorBoard reads back is the history, row by row, and the learning rate."""
    with contextlib.chdir(captured_project):
        cfg = compose.load([])
        for layer in cfg.model.layers:
            train.run(cfg, layer)
        heal.run(cfg)
        dense = scalars(only("tensorboard/dense-*"))
        assert dense.keys() == {"loss", "validation_loss", "learning_rate"}
        assert [step for step, _ in dense["validation_loss"]] == [20, 40]
        for name in ("train_layer_0-*", "train_layer_1-*", "static_control_0-*"):
            logged = scalars(only(f"tensorboard/{name}"))
            wanted = {"loss", "validation_relative_mse", "validation_cosine_sim", "dead_experts"}
            assert wanted | {"learning_rate"} <= logged.keys()
            rows = {
                "train_layer_0-*": "stages/train/layer_0/history.csv",
                "train_layer_1-*": "stages/train/layer_1/history.csv",
                "static_control_0-*": "stages/train/layer_0/static/history.csv",
            }[name]
            trained = [row for row in history(Path(rows)) if row["step"]]
            for key in wanted:
                assert [step for step, _ in logged[key]] == [row["step"] for row in trained]
                values = [value for _, value in logged[key]]
                assert values == pytest.approx([row[key] for row in trained], rel=1e-5), key
        healed = scalars(only("tensorboard/heal-*"))
        assert {"loss", "validation_kl", "learning_rate"} <= healed.keys()
        assert [step for step, _ in healed["validation_kl"]] == [2, 4]


@pytest.mark.slow
def test_the_logger_changes_no_byte_of_a_layer_and_no_fingerprint(captured_project: Path):
    """The layer that another logger watched is found complete."""
    with contextlib.chdir(captured_project):
        cfg = compose.load([])
        train.run(cfg, 0)
        before = artifacts.digest(Path("stages/train/layer_0"))
        works = set(Path(".scratch/train-layer_0").iterdir())
        cfg.runtime.logger = Logger.dvclive
        train.run(cfg, 0)
        assert set(Path(".scratch/train-layer_0").iterdir()) == works
        assert artifacts.digest(Path("stages/train/layer_0")) == before


def test_no_stage_has_the_runtime_in_its_fingerprint():
    for name in artifacts.STAGES:
        keys = importlib.import_module(f"pipeline.stages.{name}").PARAMS
        assert not [key for key in keys if key.startswith("runtime")]


ROWS = [
    {"step": 8, "loss": 0.5, "dead_experts": 0.0},
    {"step": 16, "loss": 0.25, "dead_experts": 1.0},
]


def test_dvclive_keeps_every_row_and_goes_on_after_an_interruption(folder: Path):
    work = Path("work/0123456789abcdef/static")
    for row in ROWS:
        with loggers.opened(RuntimeConfig(logger=Logger.dvclive), "train layer 3", work) as log:
            log(row)
    kept = only("dvclive/train_layer_3-01234567/plots/metrics/loss.tsv").read_text()
    assert kept.split() == ["step", "loss", "8", "0.5", "16", "0.25"]
    assert not Path("dvclive").exists() and not Path("dvc.yaml").exists()


def test_tensorboard_keeps_runs_of_other_work_apart(folder: Path):
    for name in ("a" * 16, "b" * 16):
        with loggers.opened(RuntimeConfig(logger=Logger.tensorboard), "heal", Path(name)) as log:
            log(ROWS[0])
    kept = sorted(p.name for p in Path(".scratch/logs/tensorboard").iterdir())
    assert kept == ["heal-aaaaaaaa", "heal-bbbbbbbb"]
    assert scalars(Path(".scratch/logs/tensorboard/heal-aaaaaaaa"))["loss"] == [(8, 0.5)]


def test_without_a_logger_nothing_is_written(folder: Path):
    with loggers.opened(RuntimeConfig(), "heal", Path("work")) as log:
        log(ROWS[0])
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "logger", [x for x in Logger if x is not Logger.none], ids=lambda x: x.name
)
def test_a_logger_that_is_not_installed_is_refused_with_how_to_install_it(
    logger: Logger, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"pip install 'sparse-distillation\[{logger.name}\]'"):
        loggers.check(logger)
    loggers.check(Logger.none)


def test_every_logger_has_its_extra():
    import tomllib

    project = Path(command.__file__).parent.parent / "pyproject.toml"
    extras = tomllib.loads(project.read_text())["project"]["optional-dependencies"]
    assert {x.name for x in Logger} - {"none"} <= extras.keys()


@pytest.mark.parametrize("logger", ["wandb", "mlflow"])
def test_a_stage_refuses_a_missing_logger_before_any_work(project: Path, logger: str):
    if importlib.util.find_spec(logger):
        pytest.skip(f"{logger} is installed here")
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.stages.dense", f"runtime.logger={logger}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and f"sparse-distillation[{logger}]" in done.stderr
    assert not (project / "stages").exists()
