"""Jobs through one of Hydra's launchers, watched by what they write and not by what it says.

The launcher runs in a thread of its own: Slurm's, without accounting, waits for ever for a job that
was killed, and joblib's gives up on all when one dies. `watch` ends when every unit has ended, when
nothing can be expected any more, or when the time is up.
"""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import psutil
from omegaconf import DictConfig

from pipeline import compose, progress, runtime
from pipeline.errors import ConfigError
from pipeline.prefill import job, ledger
from pipeline.prefill.ledger import Seen, State
from pipeline.prefill.units import Unit, titles

EXTRAS = {"joblib": "joblib", "submitit_local": "slurm", "submitit_slurm": "slurm", "ray": "ray"}
PLUGINS = {"joblib": "hydra_joblib_launcher", "slurm": "hydra_submitit_launcher"}
PLUGINS["ray"] = "hydra_ray_launcher"
SLURM = "submitit_slurm"

POLL_S = 0.5
STOP_S = 5.0
"""For a process that is asked to end."""


def launcher_of(hydras: list[str]) -> str | None:
    """The launcher that is named; `ConfigError` where it is none, or not installed."""
    named = [o.partition("=")[2] for o in hydras if o.startswith("hydra/launcher=")]
    if not named and hydras:
        raise ConfigError(
            "It is not said which launcher is meant.",
            value=" ".join(hydras),
            rule=f"hydra.* is for a launcher, hydra/launcher={'|'.join(EXTRAS)}",
            remedy=f"add hydra/launcher=joblib, or leave out {' '.join(hydras)}",
        )
    if not named or named[-1] == "basic":
        return None
    extra = EXTRAS.get(named[-1])
    if extra is None:
        raise ConfigError(
            f"There is no launcher {named[-1]}.",
            value=f"hydra/launcher={named[-1]}",
            rule=f"one of {', '.join(EXTRAS)}",
            remedy="joblib is for one machine, submitit_slurm for a cluster",
        )
    if find_spec("hydra_plugins") is None or not find_spec(f"hydra_plugins.{PLUGINS[extra]}"):
        raise ConfigError(
            f"The launcher {named[-1]} is not installed.",
            value=f"hydra/launcher={named[-1]}",
            rule=f"it comes with the extra `{extra}`",
            remedy=f"pip install 'sparse-distillation[{extra}]'",
        )
    if named[-1] == SLURM and which("srun") is None:
        raise ConfigError(
            "There is no Slurm here.",
            value=f"hydra/launcher={SLURM}, and no `srun` on the PATH",
            rule="jobs are handed to Slurm on a machine that has its commands",
            remedy="log in to a node of the cluster, or use hydra/launcher=joblib",
        )
    return named[-1]


def settings(hydras: list[str]) -> DictConfig:
    """What a launcher and its sweeper are told; raises `ConfigError`."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(compose.CONF.absolute()), version_base="1.3"):
            found = hydra_compose("prefill", hydras, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(
            "The launcher does not take these settings.",
            value=" ".join(str(error).split())[:300],
            rule="hydra/launcher=<name> and hydra.launcher.<setting>=<value>",
            remedy="correct what it names; docs/clusters.md has the settings that matter",
        ) from None
    return found.hydra


class Launching(threading.Thread):
    """Hydra, with its launcher, over units that are recorded."""

    def __init__(self, units: list[Unit], hydras: list[str]) -> None:
        super().__init__(name="launcher", daemon=True)
        ids = ",".join(unit.id for unit in units)
        root = str(Path.cwd()).replace("\\", "\\\\").replace("'", "\\'")
        self._line = ["-m", f"unit={ids}", f"root='{root}'", *hydras]
        self.error: BaseException | None = None

    def run(self) -> None:
        import hydra

        runtime.keep_private()
        os.environ["HYDRA_FULL_ERROR"] = "1"  # what goes wrong comes as it is
        logging.getLogger("submitit").setLevel(logging.ERROR)  # of accounting that is not there
        sys.argv = ["python -m pipeline prefill", *self._line]
        conf = str(compose.CONF.absolute())
        try:
            hydra.main(version_base="1.3", config_path=conf, config_name="prefill")(job.run)()
        except BaseException as error:
            self.error = error


def watch(
    units: list[Unit],
    launching: Launching,
    timeout_s: float | None,
    lost_wait_s: float,
) -> tuple[list[Seen], bool]:
    """How the units ended, and whether the time was up before; shows and tells as it goes on.

    Args:
        timeout_s: null = no bound.
        lost_wait_s: how long nothing may change where only lost units are left, which a scheduler
            may begin again, or where the launcher has ended before units have.
    """
    names = titles(units)
    began = quiet_since = time.monotonic()
    seen: dict[str, Seen] = {}
    before: list[State] = []
    with progress.shown("prefill", "units") as report:
        while True:
            alive, now = launching.is_alive(), time.monotonic()
            for unit in units:
                if unit.id not in seen or not _has_ended(seen[unit.id]):
                    seen[unit.id] = ledger.look(unit)
                    if _has_ended(seen[unit.id]):
                        print(f"{names[unit.id]}: {seen[unit.id].told}", flush=True)
            states = [one.state for one in seen.values()]
            quiet_since = now if states != before else quiet_since
            before = states
            report(states.count(State.done), len(units), ledger.counted(states))
            if all(_has_ended(one) for one in seen.values()):
                return list(seen.values()), False
            if not alive and launching.error and set(states) == {State.waiting}:
                return list(seen.values()), False  # it has handed over nothing
            waits_for = {State.running} | ({State.waiting} if alive else set())
            if not waits_for & set(states) and now - quiet_since >= lost_wait_s:
                return list(seen.values()), False
            if timeout_s is not None and now - began >= timeout_s:
                return list(seen.values()), True
            time.sleep(POLL_S)


def _has_ended(seen: Seen) -> bool:
    return seen.state in (State.done, State.failed)


def stop() -> None:
    """End what this process started on this machine; what a cluster runs goes on."""
    below = [p for p in psutil.Process().children(recursive=True) if not _tidies(p)]
    for process in below:
        _end(process.terminate)
    _, left = psutil.wait_procs(below, timeout=STOP_S)
    for process in left:
        _end(process.kill)


def _tidies(process: psutil.Process) -> bool:
    """Whether it removes what others leave, as Python's and loky's trackers do when they end."""
    with contextlib.suppress(psutil.Error):
        return "resource_tracker" in " ".join(process.cmdline())
    return True


def _end(act: Callable[[], None]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        act()
