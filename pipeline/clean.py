"""Remove what no run will need again: work of other configurations, left-overs, old logs.

Only below `.scratch/`, and half-published folders beside the outputs; never an output. What stays
is shown too, and why: work that a run holds, what the outputs were published from, what this
configuration would adopt, and the newest interrupted work where there is no finished one. `--all`
takes these too, but for work that is held. What lies on an object store stays, unless `--objects`
is said; then the shards go of captures whose work here goes, and those of which nothing is known
here are shown: they may be another checkout's. Locks stay: they are empty, and removing one under a
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

from pipeline import artifacts, compose, console, locks, preflight, sources, workdir
from pipeline.config import Config, select
from pipeline.errors import ConfigError
from pipeline.prefill import ledger
from pipeline.prefill.ledger import State

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


@dataclass(frozen=True)
class Apart:
    """The shards of a capture on an object store, which go with its work folder or stay."""

    url: str
    fingerprint: str
    bytes: int
    work: Item | None  # that goes
    why: str


def clean(dry_run: bool, yes: bool, everything: bool, objects: bool = False) -> None:
    """Show what would go and what stays, ask, and remove it.

    Args:
        objects: also of what lies at capture.store_url.

    Raises:
        ConfigError: this is no project's folder, nobody can be asked, or no object store is named.
    """
    cfg = compose.load([])
    items = survey(cfg, everything)
    apart = _apart(cfg, items) if objects else []
    going = [item for item in items if item.goes]
    freed = _freed(going)
    for goes in (True, False):
        shown = [(_size(i.path), i.path, i.why) for i in items if i.goes is goes]
        far = [(a.bytes, f"{a.url}/{a.fingerprint}", a.why) for a in apart if bool(a.work) is goes]
        if shown or far:
            print("goes:" if goes else "stays:")
        for taken, what, why in (*shown, *far):
            print(f"  {preflight.size(taken):>9}  {what}: {why}")
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
    for capture in apart:
        if capture.work and capture.work not in left:
            _remove_objects(capture)
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
    same_code = manifest.get("code") == sources.code_digest(str(manifest.get("module")))
    return "" if same_code else "finished by other code"


def _apart(cfg: Config, items: list[Item]) -> list[Apart]:
    """Captures at capture.store_url."""
    from pipeline import objects

    url = cfg.capture.store_url
    if url is None:
        raise ConfigError(
            "There is no object store to clean.",
            value="capture.store_url=null",
            rule="--objects looks at capture.store_url",
            remedy="leave --objects out, or set capture.store_url",
        )
    published = _manifest(OUTPUTS / "capture").get("fingerprint")
    works = {item.path.name: item for item in items if item.path.parent.name == "capture"}
    found = []
    for fingerprint, size in objects.captures(url).items():
        work = works.get(fingerprint)
        if fingerprint == published:
            work, why = None, "what lies in stages/ reads it"
        elif work is None:
            why = "unknown here, perhaps another checkout's"
        else:
            why = work.why
        found.append(Apart(url, fingerprint, size, work if work and work.goes else None, why))
    return found


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
    left = sum(seen.state in (State.waiting, State.running) for seen in ledger.every())
    why = f"{left} units of prefill run or wait" if left else "records of prefill"
    yield Item(root / "prefill", not busy and (everything or not left), why)
    rows = "captured behind sparse layers; an interrupted prefill would go on from there"
    windows = cfg.train.window is not None and not everything
    yield Item(root / "windows", not busy and not windows, rows)
    yield Item(root / "measured", everything and not busy, "how long stages took, for `plan`")


def _is_work(path: Path) -> bool:
    return len(path.name) == 16 and not set(path.name) - set("0123456789abcdef")


def _manifests(folder: Path) -> list[Path]:
    return [*folder.glob(f"*/{artifacts.MANIFEST}"), *folder.glob(f"*/*/{artifacts.MANIFEST}")]


def _manifest(folder: Path) -> dict[str, Any]:
    """Of finished work; empty where it is not finished, or its manifest cannot be read."""
    try:
        found = json.loads((folder / artifacts.MANIFEST).read_text(encoding="utf-8"))
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
        return locks.read_holder(Path(f"{lock}.holder"))


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


def _remove_objects(capture: Apart) -> None:
    from pipeline import objects

    objects.remove(capture.url, capture.fingerprint)


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
