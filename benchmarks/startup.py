"""How long a command takes before it does anything: help, a plan, and mistakes, as processes.

The reference is the goal: 1.5 seconds.
"""

import subprocess
import sys
from collections.abc import Iterator

from benchmarks import measure
from benchmarks.measure import Row

GOAL_S = 1.5
COMMANDS = {
    "python -m pipeline --help": 0,
    "python -m pipeline.stages.train --help": 0,
    "python -m pipeline plan": 0,
    "python -m pipeline.stages.train --layer 0 moe.n_expert=8": 2,
    "python -m pipeline.stages.capture capture.codec=zip": 2,
}  # with the exit code of each


def rows(quick: bool) -> Iterator[Row]:
    for command, code in COMMANDS.items():
        (seconds,) = measure.turns({command: lambda c=command, n=code: run(c, n)}).values()
        goal = [GOAL_S] * len(seconds)
        yield measure.compare(
            f"start-up: {command}", seconds, goal, size=f"exit {code}", reach="<= 1"
        )


def run(command: str, code: int) -> None:
    line = [sys.executable, *command.split()[1:]]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode != code:
        raise SystemExit(f"{command}: exit {done.returncode}, not {code}\n{done.stderr}")
