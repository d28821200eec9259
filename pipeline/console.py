"""What a run says also goes to a file.

A stage's log is `.scratch/logs/<unit>-<time>-<pid>.log`: each line of the console with the clock
before it. It is no artefact, nothing reads it, and a log that cannot be written stops no run. The
newest few of each unit stay.
"""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from pipeline import workdir
from pipeline.errors import ConfigError, PipelineError

KEPT = 10
"""Logs of one unit that stay."""


def folder() -> Path:
    """Where logs lie."""
    return workdir.scratch_root() / "logs"


class Log:
    """A file of lines, each with its time; errors of writing end it in silence."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = path.open("a", encoding="utf-8", errors="backslashreplace")
        self._begun: dict[int, str] = {}  # by writer, the line that is not at its end

    def write(self, text: str, writer: int = 0) -> None:
        """`writer` keeps lines apart that two streams write at once."""
        *lines, self._begun[writer] = (self._begun.get(writer, "") + text).split("\n")
        for line in lines:
            self._line(line)

    def _line(self, line: str) -> None:
        if self._file is None:
            return
        last = line.rstrip("\r").rpartition("\r")[2]  # of a bar that was drawn over
        try:
            self._file.write(f"{time.strftime('%H:%M:%S')} {last}\n")
            self._file.flush()
        except OSError:
            self._file = None

    def discard(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others lie there
            self.path.parent.rmdir()
            self.path.parent.parent.rmdir()

    def close(self) -> None:
        for line in filter(None, self._begun.values()):
            self._line(line)
        if self._file:
            with contextlib.suppress(OSError):
                self._file.close()


_log: Log | None = None


def to_log(line: str) -> None:
    """Write a line to the log alone, where there is one."""
    if _log:
        _log.write(line + "\n")


class _Tee:
    """A stream whose text goes to the log too; all else is the stream's own."""

    def __init__(self, stream: TextIO, log: Log) -> None:
        self.stream, self._log = stream, log

    def write(self, text: str) -> int:
        self._log.write(text, id(self))
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def stream(tee: Any) -> TextIO:
    """What lies under a stream that `teed` put in place."""
    return tee.stream if isinstance(tee, _Tee) else tee


@contextlib.contextmanager
def teed() -> Iterator[None]:
    """Send what is printed to the log too, where there is one."""
    if _log is None:
        yield
        return
    with (
        contextlib.redirect_stdout(_Tee(sys.stdout, _log)),  # type: ignore[type-var]
        contextlib.redirect_stderr(_Tee(sys.stderr, _log)),  # type: ignore[type-var]
    ):
        yield


@contextlib.contextmanager
def kept(unit: str) -> Iterator[Path | None]:
    """Keep a log of what is printed here; how it ends is written too, and names the log.

    Gives the log's path; null where none can be written.

    A run that its configuration ends leaves none: it has done nothing.
    """
    global _log
    before, log = _log, _open(unit)
    _log = log
    try:
        with teed():
            yield log.path if log else None
    except ConfigError:
        if log:
            log.discard()
        raise
    except BaseException as error:
        if log:
            known = isinstance(error, PipelineError | KeyboardInterrupt | SystemExit)
            log.write(f"ended by {error!r}\n" if known else traceback.format_exc())
            if isinstance(error, PipelineError):
                log.write(f"error: {error}\n")
            error.add_note(f"log:    {log.path.absolute()}")
        raise
    finally:
        _log = before
        if log:
            log.close()


def _open(unit: str) -> Log | None:
    name = f"{unit}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    try:
        folder().mkdir(parents=True, exist_ok=True)
        log = Log(folder() / name)
        for old in logs(unit)[:-KEPT]:
            old.unlink(missing_ok=True)
    except OSError as error:
        print(f"warning: no log of this run: {error}", file=sys.stderr, flush=True)
        return None
    return log


def logs(unit: str = "*") -> list[Path]:
    """The logs of a unit, the oldest first."""
    return sorted(
        folder().glob(f"{unit}-????????-??????-*.log"), key=lambda p: p.name.split("-")[-3:]
    )
