"""Where the figures of a training also go: TensorBoard, Weights & Biases, MLflow or DVCLive.

`runtime.logger` chooses; the default is none, and no fingerprint knows of it. A logger gets the
rows of the history as they are written: `step` and the figures by name. All stays on this machine,
below `.scratch/logs/`, unless the logger's own environment says otherwise.
"""

import contextlib
import importlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline import console
from pipeline.config import Logger, RuntimeConfig
from pipeline.errors import ConfigError

Log = Callable[[Mapping[str, float]], None]
"""Called with a row: `step` and figures."""


ALSO = {Logger.mlflow: ("sqlalchemy", "alembic")}
"""What a logger's package does not bring by itself."""


def no_log(row: Mapping[str, float]) -> None:
    """The log of a training whose figures go nowhere else."""


def check(logger: Logger) -> None:
    """Raises `ConfigError` where the chosen package is not installed."""
    needed = () if logger is Logger.none else (logger.name, *ALSO.get(logger, ()))
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"runtime.logger={logger.name} needs a package that is not installed.",
            value=f"runtime.logger={logger.name}",
            rule=f"`import {', '.join(missing)}` must work",
            remedy=f"run `pip install 'sparse-distillation[{logger.name}]'`, "
            "or set runtime.logger=none",
        )


@contextlib.contextmanager
def opened(cfg: RuntimeConfig, title: str, work: Path) -> Iterator[Log]:
    """The chosen logger's run, closed at the end; a rerun of the same work goes on in it.

    Args:
        work: the work folder or one below; its fingerprint keeps the runs of one title apart.
    """
    prints = [p.name for p in (work, *work.parents) if re.fullmatch("[0-9a-f]{16}", p.name)]
    name = "-".join([title.replace(" ", "_"), *(found[:8] for found in prints[:1])])
    with _OPENERS[cfg.logger](name) as log:
        yield log


def _scalars(row: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in row.items() if name != "step"}


@contextlib.contextmanager
def _none(name: str) -> Iterator[Log]:
    yield no_log


@contextlib.contextmanager
def _tensorboard(name: str) -> Iterator[Log]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(console.folder() / "tensorboard" / name)) as writer:

        def log(row: Mapping[str, float]) -> None:
            for key, value in _scalars(row).items():
                writer.add_scalar(key, value, int(row["step"]))
            writer.flush()

        yield log


@contextlib.contextmanager
def _wandb(name: str) -> Iterator[Log]:
    wandb: Any = importlib.import_module("wandb")  # not in the development environment
    os.environ.setdefault("WANDB_MODE", "offline")
    place = console.folder() / "wandb"
    place.mkdir(parents=True, exist_ok=True)
    with wandb.init(project="sparse-distillation", name=name, dir=str(place)) as run:
        yield lambda row: run.log(_scalars(row), step=int(row["step"]))


@contextlib.contextmanager
def _mlflow(name: str) -> Iterator[Log]:
    mlflow: Any = importlib.import_module("mlflow")  # not in the development environment
    place = console.folder() / "mlflow"
    place.mkdir(parents=True, exist_ok=True)
    if "MLFLOW_TRACKING_URI" not in os.environ:
        mlflow.set_tracking_uri(f"sqlite:///{(place / 'mlflow.db').absolute()}")
    mlflow.set_experiment("sparse-distillation")
    with mlflow.start_run(run_name=name):
        yield lambda row: mlflow.log_metrics(_scalars(row), step=int(row["step"]))


@contextlib.contextmanager
def _dvclive(name: str) -> Iterator[Log]:
    from dvclive.live import Live

    place = console.folder() / "dvclive" / name
    with Live(str(place), resume=True, save_dvc_exp=False, dvcyaml=None, report=None) as live:

        def log(row: Mapping[str, float]) -> None:
            live.step = int(row["step"])
            for key, value in _scalars(row).items():
                live.log_metric(key, value)
            live.make_summary()

        yield log


_OPENERS = {
    Logger.none: _none,
    Logger.tensorboard: _tensorboard,
    Logger.wandb: _wandb,
    Logger.mlflow: _mlflow,
    Logger.dvclive: _dvclive,
}
