"""Remove what no run will need again: work of other configurations, left-overs, old logs.

Only below `.scratch/`, and half-published folders beside the outputs; never an output. What stays
is shown too, and why: work that a run holds, what the outputs were published from, what this
configuration would adopt, and the newest interrupted work where there is no finished one. `--all`
takes these too, but for work that is held. Locks stay: they are empty, and removing one under a
waiting run would let two in.
"""

import contextlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline import compose, console, preflight, workdir
from pipeline.config import Config, select
from pipeline.errors import ConfigError

OUTPUTS = Path("stages")
OTHERS = ("locks", "logs", "measured", "prefill", "windows")
"""Below `.scratch`, beside the work of stages."""


@dataclass(frozen=True)
class Item:
    """Something that goes or stays; `locks` are held while it is removed."""

    path: Path
    goes: bool
    why: str
    locks: tuple[Path, ...] = ()


def clean(dry_run: bool, yes: bool, everything: bool) -> None:
    """Show what would go and what stays, ask, and remove it.

    Raises:
        ConfigError: this is no project's folder, or nobody can be asked.
    """
    items = survey(compose.load([]), everything)
    going = [item for item in items if item.goes]
    freed = _freed(going)
    for title, shown in (("goes", going), ("stays", [i for i in items if not i.goes])):
        if shown:
            print(f"{title}:")
        for item in shown:
            print(f"  {preflight.size(_size(item.path)):>9}  {item.path}: {item.why}")
    if not going:
        print("there is nothing to remove")
        return
    print(
        f"{len(going)} go and free {preflight.size(freed)}; files that outputs share stay on disk"
    )
    if dry_run or not (yes or _agreed()):
        print("nothing was removed")
        return
    left = [item for item in going if not _remove(item)]
    for item in left:
        print(f"left, since a run took it meanwhile: {item.path}")
    print(f"removed {len(going) - len(left)}")


def survey(cfg: Config, everything: bool = False) -> list[Item]:
    """What lies in the scratch folder, and beside the outputs what publishing left."""
    root = workdir.scratch_root()
    found = [*_works(root, cfg, everything), *_half_published(), *_others(root, cfg, everything)]
    return [item for item in found if os.path.lexists(item.path)]


def _works(root: Path, cfg: Config, everything: bool) -> Iterator[Item]:
    published = {_manifest(path.parent).get("fingerprint") for path in _manifests(OUTPUTS)}
    settings = select(cfg, vars(cfg))
    for unit in _folders(root):
        if unit.name in OTHERS:
            continue
        works = sorted(_folders(unit), key=lambda path: path.stat().st_mtime)
        complete = {work: manifest for work in works if (manifest := _manifest(work))}
        needed = {
            work: why
            for work, manifest in complete.items()
            if (why := _needed(manifest, published, settings))
        }
        unfinished = [work for work in works if work not in complete]
        for work in works:
            lock = root / "locks" / f"{unit.name}-{work.name}"
            if holder := _holder(lock):
                yield Item(work, False, f"in use by {holder}")
            elif not _is_work(work):
                yield Item(work, everything, "not made by a stage")
            elif why := needed.get(work):
                yield Item(work, everything, why, (lock,))
            elif work in complete:
                yield Item(work, True, _otherness(complete[work], settings), (lock,))
            elif work == unfinished[-1] and not needed:
                why = "interrupted; its run would go on from here"
                yield Item(work, everything, why, (lock,))
            else:
                yield Item(work, True, "interrupted, and there is newer work", (lock,))


def _needed(manifest: dict[str, Any], published: set[Any], settings: dict[str, Any]) -> str | None:
    """Why finished work stays."""
    if manifest.get("fingerprint") in published:
        return "what lies in stages/ was published from here"
    return None if _otherness(manifest, settings) else "finished for this configuration"


def _otherness(manifest: dict[str, Any], settings: dict[str, Any]) -> str:
    """Why no run of this configuration would adopt it; empty where one would."""
    made = manifest.get("settings") or {}
    other = [key for key, value in made.items() if settings.get(key) != value]
    if other:
        more = f" and {len(other) - 1} more" if len(other) > 1 else ""
        return f"finished for another configuration ({other[0]}={made[other[0]]}{more})"
    same_code = manifest.get("code") == workdir.code_digest(str(manifest.get("module")))
    return "" if same_code else "finished by other code"


def _half_published() -> Iterator[Item]:
    for path in sorted(OUTPUTS.rglob(".*.tmp")):
        name = path.name.removeprefix(".").removesuffix(".tmp").rpartition(".")[0]
        unit = "-".join(p for p in (path.parent / name).parts[-2:] if p != OUTPUTS.name)
        lock = Path(".scratch") / "locks" / unit
        holder = _holder(lock)
        why = f"in use by {holder}" if holder else "half published"
        yield Item(path, not holder, why, (lock,))


def _others(root: Path, cfg: Config, everything: bool) -> Iterator[Item]:
    busy = any(_holder(path.with_suffix("")) for path in (root / "locks").glob("*.lock"))
    newest: dict[str, Path] = {}
    for log in console.logs():
        newest[log.name.rsplit("-", 3)[0]] = log
    for log in console.logs():
        last = log in newest.values()
        why = "the last log of its kind" if last else "an old log"
        yield Item(log, (everything and not busy) or not last, why)
    for place in _folders(root / "logs"):
        yield Item(place, everything and not busy, f"what runtime.logger={place.name} wrote")
    yield Item(root / "prefill", not busy, "what Hydra keeps of a prefill")
    rows = "captured behind sparse layers; an interrupted prefill would go on from there"
    windows = cfg.train.window is not None and not everything
    yield Item(root / "windows", not busy and not windows, rows)
    yield Item(root / "measured", everything and not busy, "how long stages took, for `plan`")


def _is_work(path: Path) -> bool:
    return len(path.name) == 16 and not set(path.name) - set("0123456789abcdef")


def _manifests(folder: Path) -> list[Path]:
    return [*folder.glob(f"*/{workdir.MANIFEST}"), *folder.glob(f"*/*/{workdir.MANIFEST}")]


def _manifest(folder: Path) -> dict[str, Any]:
    """Of finished work; empty where it is not finished, or its manifest cannot be read."""
    try:
        found = json.loads((folder / workdir.MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir()) if path.is_dir() else []


def _holder(lock: Path) -> str | None:
    """Who holds a lock; null when nobody does."""
    if not Path(f"{lock}.lock").exists():
        return None
    try:
        with FileLock(f"{lock}.lock", timeout=0):
            return None
    except Timeout:
        return workdir.read_holder(Path(f"{lock}.holder"))


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise ConfigError(
            "Nobody can be asked whether to remove it.",
            value="standard input is no terminal",
            rule="nothing is removed unasked",
            remedy="add --yes, or --dry-run to only look",
        )
    try:
        return input("remove it? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _remove(item: Item) -> bool:
    """Whether it could be removed; not where a run has begun to use it."""
    with contextlib.ExitStack() as held:
        try:
            for lock in item.locks:
                lock.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(f"{lock}.lock", timeout=0))
        except Timeout:
            return False
        if item.path.is_dir() and not item.path.is_symlink():
            shutil.rmtree(item.path)
        else:
            item.path.unlink(missing_ok=True)
    if item.path.parent.parent == workdir.scratch_root():
        with contextlib.suppress(OSError):  # other work of the unit
            item.path.parent.rmdir()
    return True


def _files(path: Path) -> list[os.stat_result]:
    if path.is_dir() and not path.is_symlink():
        return [p.lstat() for p in path.rglob("*") if p.is_symlink() or p.is_file()]
    return [path.lstat()]


def _size(path: Path) -> int:
    return sum(stat.st_size for stat in _files(path))


def _freed(items: list[Item]) -> int:
    """Bytes of files of which no name is left."""
    stats = [stat for item in items for stat in _files(item.path)]
    names = Counter((stat.st_dev, stat.st_ino) for stat in stats)
    gone = {(s.st_dev, s.st_ino): s for s in stats if names[s.st_dev, s.st_ino] >= s.st_nlink}
    return sum(stat.st_size for stat in gone.values())
