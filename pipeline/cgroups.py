"""What Linux lets this process's control groups have: those of a container, or of a Slurm job.

Both versions of control groups are read. The limits of all groups hold that a process is below, and
its own group is told by /proc: only a container sees its group as the root.
"""

from collections.abc import Iterator
from pathlib import Path

MEMORY = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Of version 2 and of 1: the limit, what is used, and the line of `memory.stat` that can go."""


def free_memory() -> int | None:
    """Bytes below the nearest limit, the page cache left out; null or 2**63 = there is none."""
    known = map(_free, _groups("memory"))
    return min((n for n in known if n is not None), default=None)


def cores() -> float | None:
    """Cores' worth of time that these groups get in each period; null = no limit."""
    known = map(_quota, _groups("cpu"))
    return min((n for n in known if n is not None), default=None)


def _groups(controller: str) -> Iterator[Path]:
    """The folders of this process's groups, its own before those above."""
    root = Path("/sys/fs/cgroup")
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controller if controllers else root
        group = top / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(top))


def _free(group: Path) -> int | None:
    for limit, used, cache in MEMORY:
        given, taken = _read(group / limit), _read(group / used)
        if given.isdecimal() and taken.isdecimal():
            lines = map(str.split, _read(group / "memory.stat").splitlines())
            stat = {name: int(value) for name, value in lines}
            return max(0, int(given) - (int(taken) - stat.get(cache, 0)))
    return None


def _quota(group: Path) -> float | None:
    given = _read(group / "cpu.max") or " ".join(
        (_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us"))
    )
    quota, _, period = given.partition(" ")
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
