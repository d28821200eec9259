"""Daemons that a test starts, and stops by their pids whatever happens."""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from slurm.packages import program

START_S, STOP_S = 60.0, 20.0
PR_SET_PDEATHSIG = 1


class Daemons:
    """By name; what they print lies in `folder`, `<name>.out`."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        plain = (item for item in os.environ.items() if not item[0].startswith(("SLURM", "SBATCH")))
        self.environment = dict(plain) | environment
        self.started: dict[str, subprocess.Popen] = {}

    def start(self, name: str, *command: str) -> None:
        """`command` is the program and its arguments."""
        with (self.folder / f"{name}.out").open("ab") as output:
            self.started[name] = subprocess.Popen(
                [program(command[0]), *command[1:]],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=_end_with_parent,
            )

    def until(self, reached: Callable[[], bool], what: str) -> None:
        """Wait for what the daemons do; `TimeoutError` when it does not come, or one has ended."""
        until = time.monotonic() + START_S
        while not reached():
            ended = [name for name, process in self.started.items() if process.poll() is not None]
            if ended or time.monotonic() > until:
                raise TimeoutError(f"{what} did not come up; ended: {ended}\n{self.logs()}")
            time.sleep(0.1)

    def kill(self, name: str) -> None:
        """With -9."""
        process = self.started.pop(name)
        process.kill()
        process.wait()

    def stop(self) -> None:
        """All, the last first."""
        for process in reversed(self.started.values()):
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def logs(self) -> str:
        """The last lines of each."""
        files = sorted([*self.folder.glob("*.out"), *self.folder.glob("*.log")])
        ends = {path.name: path.read_text(errors="replace")[-1500:] for path in files}
        return "\n".join(f"--- {name}\n{text}" for name, text in ends.items() if text)


def _end_with_parent() -> None:
    """A daemon does not outlive the test, however that ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def with_variables(*needed: bytes) -> list[int]:
    """Pids of processes with such variables, by how each begins; Slurm's steps above them too."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            variables = (entry / "environ").read_bytes().split(b"\0")
            if all(any(line.startswith(start) for line in variables) for start in needed):
                found |= {int(entry.name), *_step_above(entry)}
    return sorted(found)


def _step_above(process: Path) -> set[int]:
    """The daemon that watches a step of a job, where it is the parent of that process."""
    parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
    command = (Path("/proc") / parent / "comm").read_text().strip()
    return {int(parent)} if command.startswith("slurmstepd") else set()
