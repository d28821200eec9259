"""One unit, computed into `.scratch`: in this process, or in one that a launcher started.

A launcher's job is told the unit's record and the project's folder, and nothing else. What it says
goes to its log; how it ends goes to the record, so that the launcher sees every job end well.
"""

import contextlib
import os
import signal
import threading
import traceback
from pathlib import Path
from subprocess import CalledProcessError
from typing import NoReturn

from omegaconf import DictConfig

from pipeline import console, lineage, preflight, runtime
from pipeline.config import Config
from pipeline.errors import PipelineError
from pipeline.prefill import gpus, ledger
from pipeline.prefill.ledger import State
from pipeline.prefill.units import READS, Unit
from pipeline.stages import budget, capture, train

ENDING = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
"""Signals that interrupt a job, with the handlers that a launcher has not changed."""
_asked_to_end = threading.Event()


def run(composed: DictConfig) -> None:
    """A launcher's job: the unit `unit` of the project in the folder `root`."""
    os.chdir(composed.root)
    with contextlib.ExitStack() as quiet:
        # With one worker joblib starts none, and this is a thread of the process that watches.
        if threading.current_thread() is threading.main_thread():
            _asked_to_end.clear()
            for number, default in ENDING.items():
                if signal.getsignal(number) == default:
                    signal.signal(number, _interrupt)  # so that its end is written
            nowhere = quiet.enter_context(Path(os.devnull).open("w"))
            quiet.enter_context(contextlib.redirect_stdout(nowhere))
            quiet.enter_context(contextlib.redirect_stderr(nowhere))
        unit = ledger.read(composed.unit)
        try:
            perform(unit)
        except Exception:
            if ledger.look(unit).state is not State.failed:  # it is not written there
                raise


def _interrupt(signum: int, frame: object) -> NoReturn:
    _asked_to_end.set()
    raise KeyboardInterrupt


def perform(unit: Unit) -> Path:
    """Compute a unit and write how that ends; returns its work folder, raises what stopped it."""
    cfg = unit.cfg()
    name = f"prefill_{unit.id.replace('-', '_')}"
    with ledger.held(unit, cfg.runtime.lock_wait_s), console.kept(name) as log:
        record = ledger.begin(unit, log)
        try:
            work = _compute(unit, cfg)
        except BaseException as error:
            refused = _told(error, unit)
            ledger.end_failed(unit, record, refused, traceback.format_exc())
            if refused is error:
                raise
            raise refused from error
        ledger.end_done(unit, record, work)
        print(f"{unit.name}: complete in {work}", flush=True)
    return work


def _told(error: BaseException, unit: Unit) -> BaseException:
    """What is written of an error: a refusal where it is one, or an interruption."""
    if _asked_to_end.is_set():  # in the midst of an import it may come out as an ImportError
        return KeyboardInterrupt(f"{unit.name} was told to end")
    # submitit, told by Slurm to make room, puts its job back by `scontrol`, which Slurm kills too
    if isinstance(error, CalledProcessError) and error.cmd[:2] == ["scontrol", "requeue"]:
        return KeyboardInterrupt(f"{unit.name} was put back into Slurm's queue")
    if isinstance(error, Exception) and not isinstance(error, PipelineError):
        return preflight.refusal(error, f"{unit.name} is not finished") or error
    return error


def _compute(unit: Unit, cfg: Config) -> Path:
    lineage.check(cfg, READS[unit.kind])
    gpus.take(unit)
    threads, why = _threads(unit, cfg)
    cfg.runtime.threads = threads
    runtime.configure(cfg.runtime, why)
    if unit.kind == "shards":
        return capture.run(cfg, part=unit.part, published=False)
    plans = budget.run(cfg, published=False)
    return train.run(cfg, int(unit.what), plans, published=False)


def _threads(unit: Unit, cfg: Config) -> tuple[int | None, str]:
    """Those of this job, with the reason: no more than are its own."""
    if cfg.runtime.threads:
        return cfg.runtime.threads, "configured"
    if unit.threads:
        return unit.threads, f"{runtime.cores()} cores for the workers of this machine"
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        given = os.environ.get(name, "")
        if given.isdecimal():
            return min(int(given), runtime.cores()), f"{name} of the job"
    return None, ""
