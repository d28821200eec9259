"""Compute units of work ahead of `dvc repro`, many at a time, on this machine or on a cluster.

    python -m pipeline prefill -m layer=0,1,2,3 moe.n_experts=8,16 hydra/launcher=joblib

A unit is a layer of `train` or a part of `capture` (`units.py`). Each is recorded first
(`ledger.py`), then computed into `.scratch` under its fingerprint and published nowhere (`job.py`);
the next `dvc repro`, or `dvc exp run -S` with the same overrides, finds it done. Hydra's launchers
start the jobs (`launch.py`): nothing of ours schedules, queues or retries, and no job calls `dvc`.
What is done already is not launched, and what still runs is only awaited; so the same command,
given again, does what is missing.

With `train.window` the layers depend on each other and are fitted here one after the other
(`chain.py`).
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from omegaconf import DictConfig

from pipeline import command, compose, refusals
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.prefill import chain, job, launch, ledger, outcome, share, status, units
from pipeline.prefill.ledger import State
from pipeline.prefill.units import Unit

LEAVE_S = 10.0
"""For a launcher to end behind its last job."""
QUIET_S = 2.0
"""Until a lost job of this machine is given up: nobody will begin it again."""


def main(
    overrides: list[str], multirun: bool = False, show: bool = False, as_json: bool = False
) -> None:
    """Run what is asked, or show how what was asked stands.

    Raises:
        PipelineError: what the first unit raised that failed, when all have ended; or what was
            refused before any was launched; `ResourceError` where units were lost, or not begun, or
            the time was up.
    """
    if show:
        return status.show(as_json)
    if as_json:
        raise ConfigError(
            "--json is for --status.",
            value="--json",
            rule="--status --json prints how the units stand",
            remedy="leave it out, or add --status",
        )
    if (cfg := _in_windows(overrides, multirun)) is not None:
        return chain.fit_windows(cfg)
    own, hydras = units.split(overrides, multirun)
    launcher = launch.launcher_of(hydras)
    if launcher is None:
        return _one_after_the_other(units.asked(own))
    told = launch.settings(hydras)
    _launched(units.asked(own), hydras, launcher, told)


def _in_windows(overrides: list[str], multirun: bool) -> Config | None:
    """The configuration, where layers are fitted in windows: then nothing is said of units."""
    parsed = refusals.parsed(overrides, compose.CONF).values()
    kept = [
        o.input_line or ""
        for o in parsed
        if not (o.is_sweep_override() or units.is_hydras(o) or o.get_key_element() in units.KINDS)
    ]
    cfg = compose.checked(compose.compose(kept))
    if cfg.train.window is None or any(text.startswith("shards=") for text in overrides):
        return None
    if multirun or kept != overrides:
        raise ConfigError(
            "Layers in windows are not fitted at once.",
            value=" ".join(overrides),
            rule="with train.window prefill fits all layers, one window after the other",
            remedy="leave out -m, layer=, hydra/launcher and sweeps",
        )
    return cfg


class TimeIsUp(KeyboardInterrupt):
    """`prefill.timeout_s` has passed, where units are computed in this process."""


def _one_after_the_other(asked: list[Unit]) -> None:
    """In this process; where one fails the others are computed all the same."""
    ledger.record(asked)
    signal.signal(signal.SIGALRM, _end)
    signal.setitimer(signal.ITIMER_REAL, asked[0].cfg().prefill.timeout_s or 0.0)
    timed_out = False
    try:
        for unit in asked:
            _perform(unit, alone=len(asked) == 1)
    except TimeIsUp:
        timed_out = True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
    outcome.conclude([ledger.look(unit) for unit in asked], timed_out, launcher=None)


def _end(signum: int, frame: object) -> NoReturn:
    raise TimeIsUp


def _perform(unit: Unit, alone: bool) -> None:
    try:
        job.perform(unit)
    except Exception as error:
        if alone or ledger.look(unit).state is not State.failed:
            raise
        print(f"{unit.name}: failed: {error}", file=sys.stderr, flush=True)


def _launched(asked: list[Unit], hydras: list[str], launcher: str, told: DictConfig) -> None:
    """By a launcher, which is left behind where it does not end when the units have."""
    cfg, seen = asked[0].cfg(), [ledger.look(unit) for unit in asked]
    done = [one for one in seen if one.state is State.done]
    awaited = [one.unit for one in seen if one not in done]
    missing = [one.unit for one in seen if one.state not in (State.done, State.running)]
    outcome.tell_found(seen)
    if not awaited:
        return outcome.conclude(seen, False, launcher)
    shared = share.among(missing, launcher, told, cfg)
    ledger.record(shared.units)
    launching, typed = launch.Launching(shared.units, [*hydras, *shared.overrides]), sys.argv
    if missing:
        launching.start()

    def act() -> None:
        try:
            ended, timed_out = launch.watch(
                awaited,
                launching,
                timeout_s=cfg.prefill.timeout_s,
                lost_wait_s=_lost_wait_s(launcher, cfg),
            )
        except KeyboardInterrupt as stopped:
            sys.argv = typed  # Hydra read another one
            stopped.add_note(outcome.of_those_elsewhere(launcher))
            raise
        if missing and not timed_out:
            launching.join(LEAVE_S)
        outcome.conclude([*done, *ended], timed_out, launcher, launching.error)

    _leaving(act, launching.is_alive)


def _lost_wait_s(launcher: str, cfg: Config) -> float:
    """How long a lost unit may still be begun again: only Slurm does that."""
    return cfg.prefill.lost_wait_s if launcher == launch.SLURM else QUIET_S


def _leaving(act: Callable[[], None], hangs: Callable[[], bool]) -> None:
    """Act; then end this process, and what it started here, where its launcher does not end."""

    def end() -> NoReturn:
        command.exit_with(act)

    try:
        end()
    except SystemExit as left:
        if hangs():
            launch.stop()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(left.code or 0))
        raise
