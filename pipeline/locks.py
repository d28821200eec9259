"""Locks on a unit of work: one run holds it alone, or several hold parts of it that do not overlap.

Each is the kernel's (`flock`, and `lockf` for a range), so that it dies with its process, however
that ends. Between hosts they are as good as the file system's: NFS from version 4 on, or Lustre
mounted with `flock`, where what a lost host held is freed when its lease ends; a mount with
`nolock` or `localflock` keeps out only runs on the same host. A file beside each lock names its
holder.
"""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.errors import ResourceError

Part = tuple[int, int]
"""(i, n): the i-th of n parts, from 1."""

SPAN = 2**30
"""What all parts of a unit have together, in the range that each locks its share of."""

POLL_S = 0.05


@contextlib.contextmanager
def lock(path: Path, wait_s: float) -> Iterator[None]:
    """Hold `path`.lock alone; waits up to `wait_s` seconds for its holder and then names it."""
    held, holder = FileLock(f"{path}.lock"), Path(f"{path}.holder")

    def take() -> bool:
        with contextlib.suppress(Timeout, FileNotFoundError):
            path.parent.mkdir(parents=True, exist_ok=True)  # its holder may have removed it
            held.acquire(timeout=0)
        return held.is_locked

    _wait(take, path, wait_s)
    try:
        for lost in _holders(holder):  # of parts that were killed: none is held
            lost.unlink(missing_ok=True)
        holder.write_text(_name())
        yield
    finally:
        holder.unlink(missing_ok=True)
        held.release()


@contextlib.contextmanager
def lock_part(path: Path, part: Part, wait_s: float) -> Iterator[None]:
    """Hold `path`.lock with other parts, and of what it guards this part alone.

    Parts of different numbers overlap where their shares do: 1/2 and 2/4, not 1/2 and 3/4.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    (i, n), holder = part, Path(f"{path}.holder")
    first, last = (i - 1) * SPAN // n, i * SPAN // n
    with Path(f"{path}.lock").open("a+b") as whole, Path(f"{path}.parts").open("a+b") as shares:
        shared, alone = fcntl.LOCK_SH | fcntl.LOCK_NB, fcntl.LOCK_EX | fcntl.LOCK_NB
        _wait(lambda: _taken(fcntl.flock, whole, shared), path, wait_s)
        _wait(lambda: _taken(fcntl.lockf, shares, alone, last - first, first), path, wait_s)
        own = Path(f"{holder}.{i}-{n}")
        try:
            own.write_text(f"{_name()} (part {i}/{n})")
            yield
        finally:
            own.unlink(missing_ok=True)


def read_holder(path: Path) -> str:
    """Who wrote that file, or who wrote those of parts beside it: `pid 1 on host`."""
    named = []
    for found in (path, *_holders(path)):
        with contextlib.suppress(OSError):
            named.append(found.read_text())
    return ", ".join(filter(None, named)) or "a run that has not named itself"


def _holders(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}.*"))


def _name() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()}"


def _taken(take: Callable[..., object], *arguments: object) -> bool:
    try:
        take(*arguments)
    except (BlockingIOError, PermissionError):  # POSIX allows either where another holds it
        return False
    return True


def _wait(take: Callable[[], bool], path: Path, wait_s: float) -> None:
    """Until it is taken; `ResourceError` names the holder after `wait_s` seconds."""
    if take():
        return
    holder, until = Path(f"{path}.holder"), time.monotonic() + wait_s
    if wait_s:
        print(f"waiting up to {wait_s:g} s for {read_holder(holder)}", flush=True)
    while not take():
        if time.monotonic() >= until:
            raise ResourceError(
                f"Another run works on {path.absolute()}.",
                value=read_holder(holder),
                rule=f"one run at a time; waited runtime.lock_wait_s={wait_s:g} s",
                remedy="let it finish or stop it by its pid, then run the same command again",
            )
        time.sleep(POLL_S)
