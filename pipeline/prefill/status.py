"""How the units stand that were asked for: `python -m pipeline prefill --status`.

Ends with 0 when all are done, run or wait; with the exit code of the first that failed; with 4 when
some were lost. Reads records and locks alone, so it may be asked as often as one likes, anywhere
that sees the project's `.scratch`.
"""

import json
import sys
from typing import Any

from pipeline.prefill import ledger
from pipeline.prefill.ledger import Seen, State
from pipeline.prefill.units import titles

LINES = 3  # of a log


def show(as_json: bool) -> None:
    """Print it; leaves with the exit code that says how they stand."""
    seen = ledger.every()
    if as_json:
        print(json.dumps([_plain(one) for one in seen], indent=1))
    elif not seen:
        print("no unit is recorded here: nothing was asked of prefill, or it was cleaned")
    else:
        names = titles(one.unit for one in seen)
        for one in seen:
            _print(one, names[one.unit.id])
        states = [one.state for one in seen]
        more = ledger.counted(states)
        print(f"{states.count(State.done)} of {len(seen)} done{', ' * bool(more)}{more}")
    codes = [one.exit_code for one in seen if one.state is State.failed]
    codes += [one.exit_code for one in seen if one.state is State.lost]
    sys.exit(codes[0] if codes else 0)


def _print(one: Seen, name: str) -> None:
    print(f"{name}: {one.told}")
    if one.state in (State.running, State.failed, State.lost):
        for line in one.last_lines(LINES):
            print(f"    {line}")
        if one.log and one.log.exists():
            print(f"    log: {one.log}")


def _plain(one: Seen) -> dict[str, Any]:
    return {
        "id": one.unit.id,
        "unit": f"{one.unit.kind}={one.unit.what}",
        "overrides": list(one.unit.overrides),
        "state": one.state.name,
        "exit_code": one.exit_code,
        **{key: one.run.get(key) for key in ("host", "pid", "job", "began", "ended", "message")},
        "work": str(one.folder) if one.state is State.done else None,
        "log": str(one.log) if one.log else None,
        "last_lines": [] if one.state is State.done else one.last_lines(LINES),
    }
