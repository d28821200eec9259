"""What is known of each unit: three small files in `.scratch/prefill/units/`, whoever asks.

    <id>.json      what it is: written by the call that asks for it, before anything is launched
    <id>.run.json  who runs it and how it ended: written by its job, first and last
    <id>.lock      held by the job as long as its process lives, and by nobody after

So a job whose lock is free and whose end is not written was lost, whatever its launcher believes;
and one is done when its work folder holds what it says. The lock is the kernel's (`flock`): between
hosts it is as good as the file system's, as in `locks.py`. What a host held that is cut off from a
shared file system is freed when the server ends its lease; until then its unit counts as running.

The folder is private to its user: launchers leave pickles in it.
"""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from pipeline import artifacts, durable, progress, workdir
from pipeline.errors import ArtifactError, PipelineError, ResourceError
from pipeline.prefill.units import Unit

POLL_S = 0.1
INTERRUPTED = 130  # exit code
LAST_BYTES = 4096  # of a log that are read for its last lines


class State(Enum):
    waiting = 0
    running = 1
    done = 2
    failed = 3
    lost = 4


@dataclass(frozen=True)
class Seen:
    """A unit as it was found; `run` is what its job wrote, empty where none has begun."""

    unit: Unit
    state: State
    run: dict[str, Any]

    @property
    def exit_code(self) -> int:
        """0 unless it failed, or was lost."""
        if self.state is State.failed:
            return self.run["exit_code"]
        return ResourceError.exit_code if self.state is State.lost else 0

    @property
    def told(self) -> str:
        """How it stands, in a line."""
        if self.state is State.waiting:
            return "waiting"
        if self.state is State.running:
            if not self.run:  # it holds the lock, and has not written yet
                return "running"
            since = progress.duration(time.time() - self.run["began"])
            return f"running for {since}, {self.where}"
        if self.state is State.done:
            took = progress.duration(self.run["ended"] - self.run["began"])
            return f"complete in {self.folder} after {took}"
        if self.state is State.failed:
            return f"failed, exit {self.exit_code}: {self.run['message'].splitlines()[0]}"
        if "ended" not in self.run:
            return f"lost, it ended without a word: {self.where}"
        return (
            f"lost, {'interrupted' if self.run['exit_code'] else 'its work is gone'}: {self.where}"
        )

    @property
    def where(self) -> str:
        """Who runs or ran it: `pid 7 on n1, job 12_3`."""
        job = f", job {self.run['job']}" if self.run.get("job") else ""
        return f"pid {self.run['pid']} on {self.run['host']}{job}"

    @property
    def folder(self) -> Path:
        """The work of what is done."""
        return workdir.scratch_root() / self.run["work"]

    @property
    def log(self) -> Path | None:
        return Path(self.run["log"]) if self.run.get("log") else None

    def last_lines(self, n: int) -> list[str]:
        """Of its log; empty where there is none."""
        try:
            with (self.log or Path(os.devnull)).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_BYTES))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return []
        return [line for line in lines if line.strip()][-n:]


def counted(states: list[State]) -> str:
    """How many stand how, but for those that are done: `2 running, 1 lost`."""
    found = ((states.count(state), state.name) for state in State if state is not State.done)
    return ", ".join(f"{n} {name}" for n, name in found if n)


def root() -> Path:
    """Where everything of `prefill` lies."""
    return workdir.scratch_root() / "prefill"


def _path(unit_id: str, ending: str) -> Path:
    return root() / "units" / f"{unit_id}.{ending}"


def record(units: list[Unit]) -> None:
    """Write what is to be run; what an earlier job of it wrote goes, unless that one still runs.

    Records of the same units under other inputs or code go too: nothing would adopt their work.
    """
    root().mkdir(parents=True, exist_ok=True)
    root().chmod(0o700)
    (root() / "units").mkdir(exist_ok=True)
    ids = {(unit.name, unit.overrides): unit.id for unit in units}
    for seen in every():
        if ids.get((seen.unit.name, seen.unit.overrides), seen.unit.id) != seen.unit.id:
            _forget(seen)
    for unit in units:
        if not is_held(unit.id):
            _path(unit.id, "run.json").unlink(missing_ok=True)
        durable.write_json(_path(unit.id, "json"), asdict(unit))


def _forget(seen: Seen) -> None:
    if seen.state is not State.running:
        for ending in ("json", "run.json", "lock"):
            _path(seen.unit.id, ending).unlink(missing_ok=True)


def read(unit_id: str) -> Unit:
    """The record of a unit; `ArtifactError` where it was removed or is damaged."""
    try:
        found = artifacts.read_json(_path(unit_id, "json"))
        return Unit(**{**found, "overrides": tuple(found["overrides"])})
    except (TypeError, KeyError):
        raise ArtifactError(
            "A record of prefill cannot be read.",
            value=_path(unit_id, "json").absolute(),
            rule="a record of this version",
            remedy="remove it, and run `python -m pipeline prefill` again",
        ) from None


def every() -> list[Seen]:
    """All units that are recorded and can be read, those asked for first before later ones."""
    found = []
    for path in (root() / "units").glob("*.json"):
        if not path.name.endswith(".run.json"):
            with contextlib.suppress(ArtifactError, OSError):
                found.append((path.stat().st_mtime_ns, look(read(path.name[: -len(".json")]))))
    return [seen for _, seen in sorted(found, key=lambda pair: pair[0])]


def look(unit: Unit) -> Seen:
    """How a unit stands."""
    for _ in range(2):  # between the lock and the record its job may begin, or end
        if is_held(unit.id):
            return Seen(unit, State.running, _read_run(unit.id))
        run = _read_run(unit.id)
        if not run:
            return Seen(unit, State.waiting, run)
        if "exit_code" in run:
            break
    if "exit_code" not in run:
        return Seen(unit, State.lost, run)
    if run["exit_code"] == INTERRUPTED:
        return Seen(unit, State.lost, run)
    if run["exit_code"]:
        return Seen(unit, State.failed, run)
    return Seen(unit, State.done if _is_there(unit, run) else State.lost, run)


def _is_there(unit: Unit, run: dict[str, Any]) -> bool:
    """Whether the work lies there: sealed, or of a part of `capture` begun at least."""
    folder = workdir.scratch_root() / run["work"]
    if unit.kind == "shards":
        return folder.is_dir()
    return (folder / artifacts.MANIFEST).is_file()


def _read_run(unit_id: str) -> dict[str, Any]:
    try:
        return json.loads(_path(unit_id, "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def is_held(unit_id: str) -> bool:
    """Whether a process lives that runs it; several may ask at once."""
    try:
        with _path(unit_id, "lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@contextlib.contextmanager
def held(unit: Unit, wait_s: float) -> Iterator[None]:
    """Hold a unit; `ResourceError` when another process ran it for `wait_s` seconds."""
    until = time.monotonic() + wait_s
    with _path(unit.id, "lock").open("ab") as file:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() > until:
                raise ResourceError(
                    f"Another job runs {unit.name}.",
                    value=look(unit).where,
                    rule=f"one at a time; waited runtime.lock_wait_s={wait_s:g} s",
                    remedy="let it finish, then run the same command again",
                )
            time.sleep(POLL_S)
        yield


def begin(unit: Unit, log: Path | None) -> dict[str, Any]:
    """Write that this process runs the unit; the caller holds it."""
    run = {
        "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "pid": os.getpid(),
        "job": _job(),
        "log": str(log.absolute()) if log else None,
        "began": time.time(),
    }
    durable.write_json(_path(unit.id, "run.json"), run)
    return run


def _job() -> str | None:
    """The launcher's name of this job, where it has one."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    one = os.environ.get("SLURM_JOB_ID") or os.environ.get("SUBMITIT_LOCAL_JOB_ID")
    return f"{array}_{task}" if array else one


def end_done(unit: Unit, run: dict[str, Any], work: Path) -> None:
    """Write that it is done, and where its work lies."""
    _end(unit, run, 0, work=work.relative_to(workdir.scratch_root()).as_posix())


def end_failed(unit: Unit, run: dict[str, Any], error: BaseException, text: str) -> None:
    """Write why it is not done; `text` of what is no refusal is its traceback."""
    if isinstance(error, PipelineError):
        told = {"what": error.what, "rule": error.rule, "remedy": error.remedy}
        value = None if error.value is None else str(error.value)
        _end(unit, run, error.exit_code, message=str(error), refusal={**told, "value": value})
    else:
        code = INTERRUPTED if isinstance(error, KeyboardInterrupt | SystemExit) else 1
        message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        _end(unit, run, code, message=message, traceback=text)


def _end(unit: Unit, run: dict[str, Any], exit_code: int, **more: Any) -> None:
    durable.write_json(
        _path(unit.id, "run.json"), {**run, "ended": time.time(), "exit_code": exit_code, **more}
    )
