"""Where a stage computes, and how its result becomes visible.

A unit of work (a stage, or one layer of it) is computed in `.scratch/<unit>/<fingerprint>/` under
a file lock that dies with its process, and may leave checkpoints there. When it is complete, a
manifest is written last; only then the result is published: a tree of hard links, put in place by
one rename, still inside the lock. So a killed run is continued by the same command, finished work
is found again by any experiment that asks for the same thing, and nothing half-written ever lies
where a reader looks.

The fingerprint covers the settings that the stage reads, the digests of its inputs, the code that
it runs and the seed (one of the settings); never a path, a host or a time.
"""

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import preflight
from pipeline.artifacts import MANIFEST, json_digest, read_manifest, verify, write_manifest
from pipeline.durable import fsync
from pipeline.errors import ArtifactError, ResourceError
from pipeline.locks import Part, lock, lock_part
from pipeline.sources import code_digest


def scratch_root() -> Path:
    """`.scratch` of the repository; of the parent one in `dvc exp run --temp` and `--queue`."""
    return Path(os.environ.get("DVC_ROOT", ".")) / ".scratch"


def produce(
    out: Path,
    *,
    module: str,
    settings: dict[str, Any],
    inputs: dict[str, str],
    compute: Callable[[Path], Mapping[str, str] | None],
    lock_wait_s: float,
    scratch: Path | None = None,
    published: bool = True,
    elsewhere: Callable[[Path], object] | None = None,
    mends: bool = False,
) -> Path:
    """Publish at `out` what `compute` makes of `settings` and `inputs`; adopt it if it exists.

    Returns where the result lies: `out`, or its work folder when it is not to be published.

    Args:
        module: dotted name of the stage's module: the code that the fingerprint covers.
        settings: every configuration value that the stage reads.
        inputs: digest of everything that it reads, by name.
        compute: fills the folder that it is given; finds there what an interrupted call left. May
            return the SHA-256 of files, by name, that it has read since it wrote them.
        scratch: root of the work folders, `scratch_root()` unless given; removed at the end.
        published: false leaves `out` alone; a later call finds the work done.
        elsewhere: raises `ArtifactError` where what finished work keeps elsewhere is not sound.
        mends: `compute` checks what it finds, piece by piece; of damaged finished work the rest is
            then kept.

    Raises:
        ResourceError: another run held the lock for longer than `lock_wait_s` seconds.
    """
    work = Work.of(out, module, settings, inputs, scratch)
    with contextlib.ExitStack() as locks:
        if published:
            here = (scratch or Path(".scratch")) / "locks" / work.unit
            locks.enter_context(lock(here, lock_wait_s))
        locks.enter_context(lock(work.lock, lock_wait_s))
        mending = mends and (work.folder / MANIFEST).is_file()  # if it turns out to be damaged
        if _is_complete(work.folder, elsewhere, mends):
            print(f"{out}: found complete in {work.folder}", flush=True)
        else:
            began = time.monotonic()
            try:
                anew, known = _compute(compute, work)
            except ArtifactError:
                if not mending:
                    raise
                shutil.rmtree(work.folder)  # what is damaged cannot be made again by itself
                anew, known = _compute(compute, work)
            if anew:
                computed[work.unit] = time.monotonic() - began
            write_manifest(work.folder, work.identity, known)
        if not published:
            return work.folder
        out.parent.mkdir(parents=True, exist_ok=True)
        publish(work.folder, out)
        if scratch:  # of this unit alone
            shutil.rmtree(scratch, ignore_errors=True)
    return out


def produce_part(
    out: Path,
    part: Part,
    *,
    module: str,
    settings: dict[str, Any],
    inputs: dict[str, str],
    compute: Callable[[Path], None],
    is_whole: Callable[[Path], bool],
    lock_wait_s: float,
    scratch: Path | None = None,
) -> Path:
    """Compute a part of what `produce` would, into the same folder; the last part seals it.

    Other parts may be computed at the same time, by other processes or on other hosts. Returns the
    work folder.

    Args:
        compute: fills the folder with this part of the result, beside what others write there.
        is_whole: whether no part is missing in the folder, which nobody writes to meanwhile.

    Raises:
        ResourceError: another run held this part, or all of it, for longer than `lock_wait_s`.
    """
    work, name = Work.of(out, module, settings, inputs, scratch), "{}/{}".format(*part)
    with lock_part(work.lock, part, lock_wait_s):
        if _is_sealed(work.folder):
            print(f"{out}, part {name}: found complete in {work.folder}", flush=True)
            return work.folder
        _compute(compute, work)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(lock(work.lock, 0.0))
        except ResourceError:
            print(f"{out}: others still work on it, the last of them seals it", flush=True)
            return work.folder
        # Whoever let go of the lock before has written what it had to: all of it is seen here.
        if not _is_sealed(work.folder) and is_whole(work.folder):
            write_manifest(work.folder, work.identity)
            print(f"{out}: complete in {work.folder}", flush=True)
    return work.folder


@dataclass(frozen=True)
class Work:
    """Where a unit of work is computed, and what it is made of."""

    unit: str
    folder: Path
    lock: Path
    identity: dict[str, Any]  # of its manifest

    @classmethod
    def of(
        cls,
        out: Path,
        module: str,
        settings: dict[str, Any],
        inputs: dict[str, str],
        scratch: Path | None = None,
    ) -> "Work":
        made_of = {"settings": settings, "inputs": inputs, "code": code_digest(module)}
        fingerprint = json_digest({"module": module, **made_of})[:16]
        root = scratch or scratch_root()
        unit = "-".join(part for part in out.parts[-2:] if part not in ("stages", out.anchor))
        return cls(
            unit,
            root / unit / fingerprint,
            root / "locks" / f"{unit}-{fingerprint}",
            {"module": module, "fingerprint": fingerprint, **made_of},
        )


computed: dict[str, float] = {}
"""Unit -> seconds of what this process computed from beginning to end; see `measured.py`."""


def _compute(
    compute: Callable[[Path], Mapping[str, str] | None], work: Work
) -> tuple[bool, Mapping[str, str] | None]:
    """Run `compute`; what the machine lacks becomes a `ResourceError` that names the unit.

    Returns whether it began anew, and what `compute` does.
    """
    try:
        work.folder.mkdir(parents=True, exist_ok=True)
        anew = not any(work.folder.iterdir())
        return anew, compute(work.folder)
    except Exception as error:
        refused = preflight.refusal(error, f"{work.unit} is not finished, what it had done is kept")
        if refused is None:
            raise
        raise refused from error


def publish(work: Path, out: Path) -> None:
    """Make `out` a hard-link copy of `work` by one rename; an old `out` is never edited."""
    new, old = (out.parent / f".{out.name}.{name}.tmp" for name in ("new", "old"))
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(work, new, copy_function=_link)
    if out.exists():
        out.rename(old)
    new.rename(out)
    fsync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):
            raise
        shutil.copy2(source, target)


def _is_complete(work: Path, elsewhere: Callable[[Path], object] | None, mends: bool) -> bool:
    if not (work / MANIFEST).is_file():
        return False
    try:
        verify(work)
        if elsewhere:
            elsewhere(work)
    except ArtifactError as error:
        kept = ", but for what of it is sound" if mends else ""
        print(f"finished work is damaged and is computed again{kept}: {error}", flush=True)
        if mends:
            (work / MANIFEST).unlink()
        else:
            shutil.rmtree(work)
        return False
    return True


def _is_sealed(work: Path) -> bool:
    """Whether a sound manifest lies there: the files are held against it when it is adopted."""
    try:
        return (work / MANIFEST).is_file() and bool(read_manifest(work))
    except ArtifactError:
        (work / MANIFEST).unlink(missing_ok=True)  # what is there is checked piece by piece
        return False
