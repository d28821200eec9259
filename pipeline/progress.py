"""Where a run is: one live line on a terminal, a plain line every few seconds elsewhere.

Rate and remaining time come from this run's own work: what was done before the first call (adopted
or resumed) counts towards neither. `TERM=dumb` gives plain lines, `NO_COLOR` a live one without
colours. The plain lines also go to the log where the live one is shown.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator

from pipeline import console

Progress = Callable[[int, int, str], None]
"""Called with (done, total, note)."""

INTERVAL_S = 5.0
LONGEST_S = 60.0
"""Between plain lines: the first at the start, the second as a run grows long."""


def silent(done: int, total: int, note: str = "") -> None:
    """The progress of a call that nobody watches."""


@contextlib.contextmanager
def shown(title: str, unit: str = "steps", tokens: int | None = None) -> Iterator[Progress]:
    """Show what is reported here.

    Args:
        unit: what `done` and `total` count.
        tokens: in one unit, to show the rate in; null = the rate is in units.
    """
    pace = Pace(unit, tokens)
    with _live(title) if is_live() else contextlib.nullcontext() as draw:
        due = 0.0

        def report(done: int, total: int, note: str = "") -> None:
            nonlocal due
            now = time.monotonic()
            text = "  ".join(filter(None, (pace.told(done, total, now), note)))
            if draw:
                draw(done, total, text)
            if now < due and done < total:
                return
            due = now + min(LONGEST_S, max(INTERVAL_S, pace.elapsed_s(now) / 20))
            line = f"{title}: {done:,}/{total:,} {text}"
            if draw:
                console.to_log(line)
            else:
                print(line, file=sys.stderr, flush=True)

        yield report


def is_live() -> bool:
    """Whether a line can be drawn over."""
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")


class Pace:
    """Rate and remaining time of this run's own work, of the last pass where there are several."""

    def __init__(self, unit: str, tokens: int | None) -> None:
        self.unit, self.tokens = unit, tokens
        self._first: tuple[float, int] | None = None
        self._done = 0

    def elapsed_s(self, now: float) -> float:
        return now - self._first[0] if self._first else 0.0

    def told(self, done: int, total: int, now: float) -> str:
        if self._first is None or done < self._done:
            self._first = now, done
        self._done = done
        own, elapsed = done - self._first[1], self.elapsed_s(now)
        if not own or not elapsed:
            return self.unit
        rate = own / elapsed
        told = f"{self.unit}, {_number(rate)} {self.unit}/s"
        if self.tokens:
            told = f"{self.unit}, {_number(rate * self.tokens)} tokens/s"
        elif rate < 0.05:  # of which `_number` shows nothing
            told = self.unit
        return told + (f", {duration((total - done) / rate)} left" if done < total else "")


def _number(rate: float) -> str:
    return f"{rate:,.{0 if rate >= 10 else 1}f}"


def duration(seconds: float) -> str:
    """For people: `8 s`, `12 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


@contextlib.contextmanager
def _live(title: str) -> Iterator[Callable[[int, int, str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
    )
    screen = Console(file=console.stream(sys.stderr))
    # What is printed meanwhile goes above the line, and to the log as before.
    with Bar(*columns, console=screen, redirect_stdout=sys.stdout.isatty()) as bar, console.teed():
        task = bar.add_task(title, total=None, text="")

        def draw(done: int, total: int, text: str) -> None:
            bar.update(task, completed=done, total=total, text=text)

        yield draw
