"""What is said of units before they are launched and when they have ended, and how that ends."""

import sys

from pipeline import workdir
from pipeline.errors import (
    ArtifactError,
    ConfigError,
    InputError,
    PipelineError,
    ResourceError,
)
from pipeline.prefill.ledger import Seen, State, counted
from pipeline.prefill.units import titles

ERRORS = {e.exit_code: e for e in (ConfigError, InputError, ResourceError, ArtifactError)}
AGAIN = "run the same command again: what is done stays, the rest goes on where it was"
SHOWN = 10  # names of units in a message


def tell_found(seen: list[Seen]) -> None:
    """Which units are not launched, and why."""
    names = titles(one.unit for one in seen)
    for one in seen:
        if one.state is State.done:
            print(f"{names[one.unit.id]}: found {one.told}", flush=True)
        elif one.state is State.running:
            print(f"{names[one.unit.id]}: {one.told}; it is awaited", flush=True)


def conclude(
    seen: list[Seen], timed_out: bool, launcher: str | None, error: BaseException | None = None
) -> None:
    """Say how the units ended; raises for what is not done.

    Args:
        error: of the launcher itself.

    Raises:
        PipelineError: of the first unit that failed; `ResourceError` where the time was up, or
            where units were lost or never begun.
    """
    left = [one for one in seen if one.state is not State.done]
    if not left:
        print(f"prefill: {len(seen)} of {len(seen)} done, for the next `dvc repro`", flush=True)
        return
    states = [one.state for one in seen]
    done = f"{states.count(State.done)} of {len(seen)} done"
    print(f"prefill: {done}, {counted(states)}", file=sys.stderr)
    names = titles(one.unit for one in seen)
    for one in left:
        print(f"  {names[one.unit.id]}: {one.told}", file=sys.stderr)
        if one.log and one.log.exists():
            print(f"    log: {one.log}", file=sys.stderr)
    sys.stderr.flush()
    if timed_out:
        raise _time_is_up(left, launcher)
    for one in left:
        if one.state is State.failed:
            raise _of_unit(one)
    raise _lost(left, error)


def _time_is_up(left: list[Seen], launcher: str | None) -> ResourceError:
    refused = ResourceError(
        "The time is up, and units of work are not done.",
        value=_named(left),
        rule="a call ends after prefill.timeout_s, however its jobs stand",
        remedy=f"raise prefill.timeout_s, or {AGAIN}",
    )
    refused.add_note(of_those_elsewhere(launcher))
    return refused


def _of_unit(one: Seen) -> BaseException:
    """What stopped a unit, as its own process would have told it."""
    refusal, error = one.run.get("refusal"), ERRORS.get(one.exit_code)
    if refusal and error:
        found = error(**refusal)
        if one.log and one.log.exists():
            found.add_note(f"log:    {one.log}")
        return found
    print(f"{one.unit.name}:\n{one.run.get('traceback', one.told)}", file=sys.stderr, flush=True)
    return SystemExit(one.exit_code)


def _lost(left: list[Seen], error: BaseException | None) -> PipelineError:
    lost = [one for one in left if one.state is State.lost]
    if not lost:
        return ResourceError(
            "Units of work were not begun.",
            value=f"{_named(left)}: {_first_line(error)}",
            rule="a launcher begins every job that it is given",
            remedy=f"mend what the launcher says, then {AGAIN}",
        )
    refused = ResourceError(
        "Units of work were lost.",
        value=_named(lost),
        rule="a job ends by itself, done or with a reason; one that is killed, by `kill -9`, for "
        "its memory or with its node, leaves none",
        remedy=f"{AGAIN}; if memory was short, run fewer at once",
    )
    if error:
        refused.add_note(f"the launcher: {_first_line(error)}")
    return refused


def _named(seen: list[Seen]) -> str:
    more = f" and {len(seen) - SHOWN} more" if len(seen) > SHOWN else ""
    return ", ".join(list(titles(one.unit for one in seen).values())[:SHOWN]) + more


def _first_line(error: BaseException | None) -> str:
    if error is None:
        return "the launcher has ended and says nothing"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def of_those_elsewhere(launcher: str | None) -> str:
    """What becomes of jobs whose call ends before them."""
    if launcher == "submitit_slurm":
        return (
            "jobs that Slurm has go on: `squeue --me` shows and `scancel` ends them; "
            "`python -m pipeline prefill --status` tells how they stand"
        )
    root = workdir.scratch_root()
    return f"jobs on this machine were ended; their checkpoints lie in {root}"
