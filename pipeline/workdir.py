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

import ast
import contextlib
import errno
import fnmatch
import hashlib
import json
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline import preflight
from pipeline.errors import ArtifactError, ResourceError
from pipeline.locks import Part, lock, lock_part

MANIFEST = "manifest.json"
SEAL = "digest"
"""The key under which a sealed JSON file holds the digest of all else in it."""
STAGES = ("dense", "tokens", "capture", "budget", "train", "heal", "convert", "evaluate")
DVC_OBJECT = re.compile(r"/files/md5/[0-9a-f]{2}/[0-9a-f]{30}$")
PACKAGE = Path(__file__).parent
RECORDED_VERSIONS = ("torch", "transformers", "datasets", "zarr", "numcodecs", "tokenizers")


def scratch_root() -> Path:
    """`.scratch` of the repository; of the parent one in `dvc exp run --temp` and `--queue`."""
    return Path(os.environ.get("DVC_ROOT", ".")) / ".scratch"


def produce(
    out: Path,
    *,
    module: str,
    settings: dict[str, Any],
    inputs: dict[str, str],
    compute: Callable[[Path], None],
    lock_wait_s: float,
    scratch: Path | None = None,
    published: bool = True,
    elsewhere: Callable[[Path], object] | None = None,
) -> Path:
    """Publish at `out` what `compute` makes of `settings` and `inputs`; adopt it if it exists.

    Returns where the result lies: `out`, or its work folder when it is not to be published.

    Args:
        module: dotted name of the stage's module: the code that the fingerprint covers.
        settings: every configuration value that the stage reads.
        inputs: digest of everything that it reads, by name.
        compute: fills the folder that it is given; finds there what an interrupted call left.
        scratch: root of the work folders, `scratch_root()` unless given.
        published: false leaves `out` alone; a later call finds the work done.
        elsewhere: raises `ArtifactError` where what finished work keeps elsewhere is not sound.

    Raises:
        ResourceError: another run held the lock for longer than `lock_wait_s` seconds.
    """
    work = Work.of(out, module, settings, inputs, scratch)
    with contextlib.ExitStack() as locks:
        if published:
            here = (scratch or Path(".scratch")) / "locks" / work.unit
            locks.enter_context(lock(here, lock_wait_s))
        locks.enter_context(lock(work.lock, lock_wait_s))
        if _is_complete(work.folder, elsewhere):
            print(f"{out}: found complete in {work.folder}", flush=True)
        else:
            began = time.monotonic()
            if _compute(compute, work):
                computed[work.unit] = time.monotonic() - began
            write_manifest(work.folder, work.identity)
        if not published:
            return work.folder
        out.parent.mkdir(parents=True, exist_ok=True)
        publish(work.folder, out)
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
        fingerprint = _digest_json({"module": module, **made_of})[:16]
        root = scratch or scratch_root()
        unit = "-".join(part for part in out.parts[-2:] if part != "stages")
        return cls(
            unit,
            root / unit / fingerprint,
            root / "locks" / f"{unit}-{fingerprint}",
            {"module": module, "fingerprint": fingerprint, **made_of},
        )


computed: dict[str, float] = {}
"""Unit -> seconds of what this process computed from beginning to end; see `measured.py`."""


def _compute(compute: Callable[[Path], None], work: Work) -> bool:
    """Run `compute`; what the machine lacks becomes a `ResourceError` that names the unit.

    Returns whether it began anew.
    """
    try:
        work.folder.mkdir(parents=True, exist_ok=True)
        anew = not any(work.folder.iterdir())
        compute(work.folder)
    except Exception as error:
        refused = preflight.refusal(error, f"{work.unit} is not finished, what it had done is kept")
        if refused is None:
            raise
        raise refused from error
    return anew


def write_json(path: Path, content: Any) -> None:
    """Write durably, keys in order; never NaN."""
    write_bytes(path, json_bytes(content))


def json_bytes(content: Any) -> bytes:
    """What `write_json` writes."""
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
    return f"{text}\n".encode()


def write_bytes(path: Path, content: bytes) -> None:
    """Write durably: a reader sees the whole file or none."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    fsync(path.parent)


def unique_partial(path: Path) -> Path:
    """A name beside `path` for what several processes may write there at once."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")


def remove_partials(folder: Path, pattern: str = "**/*.partial") -> None:
    """Remove what kills left half-written; nobody else may be writing there."""
    for left in sorted(folder.glob(pattern)):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)  # it was in a folder that is gone


def read_json(path: Path) -> Any:
    """The content of a JSON file of ours; `ArtifactError` when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        preflight.let_through(error)
        raise ArtifactError(
            "A file of an artefact cannot be read.",
            value=f"{path.absolute()}: {error}",
            rule="a complete JSON file",
            remedy=how_to_redo(path),
        ) from None


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """`write_json` of a file that vouches for itself: `read_sealed` refuses any other content."""
    plain = {key: value for key, value in content.items() if key != SEAL}
    write_json(path, {**plain, SEAL: _digest_json(plain)})


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` was given; `ArtifactError` when that is not what the file holds."""
    content = read_json(path)
    seal = content.pop(SEAL, None) if isinstance(content, dict) else None
    if seal is None or seal != _digest_json(content):
        raise _damaged(path, "it does not match its own digest")
    return content


def versions() -> dict[str, str]:
    """Of Python, and of the packages on which numbers depend."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {"python": python, **{name: version(name) for name in RECORDED_VERSIONS}}


def write_manifest(folder: Path, identity: dict[str, Any]) -> None:
    """Seal a folder: the digest of every file, and what they were made from."""
    remove_partials(folder)  # its own manifest's too
    paths = _files(folder)
    files = {str(p.relative_to(folder)): one for p, one in zip(paths, _digests(paths), strict=True)}
    for path in paths:
        fsync(path)
    write_sealed(
        folder / MANIFEST,
        {**identity, "files": files, "versions": versions()},
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Of a sealed folder, whose files are not read; `ArtifactError` when it is not sound."""
    manifest = read_sealed(folder / MANIFEST)
    parts = manifest.get("files"), manifest.get("settings", {}), manifest.get("inputs", {})
    if not all(isinstance(part, dict) for part in parts):
        raise _damaged(folder / MANIFEST, "it lists no files, settings or inputs")
    if not all(isinstance(recorded, str) for recorded in manifest["files"].values()):
        raise _damaged(folder / MANIFEST, "it records what is no SHA-256")
    return manifest


def verify(folder: Path, *patterns: str) -> dict[str, Any]:
    """Re-hash a sealed folder and return its manifest; `ArtifactError` names what is wrong.

    Args:
        patterns: of `fnmatch`, over paths below the folder: only these files; none = all.
    """
    manifest = read_manifest(folder)
    present = {str(p.relative_to(folder)) for p in _files(folder)}
    recorded = manifest["files"]
    names = recorded.keys() | present
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise _damaged(folder / pattern, "it is missing")
    checked = [n for n in sorted(names) if not patterns or _matches(n, patterns)]
    for name in checked:
        if name not in present:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                (folder / name).stat()  # in a folder that may not be read it only seems missing
            raise _damaged(folder / name, "it is missing")
        if name not in recorded:
            raise _damaged(folder / name, "the manifest does not know it")
        if leads_out(folder / name, folder):
            raise _damaged(folder / name, f"it is a link to {(folder / name).resolve()}")
    digests = _digests([folder / name for name in checked])
    for name, found in zip(checked, digests, strict=True):
        if found != recorded[name]:
            raise _damaged(folder / name, f"its SHA-256 is not {recorded[name][:16]}...")
    return manifest


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a path below `folder` is a link out of it, other than DVC's into its cache."""
    real = path.resolve()
    inside = real.is_relative_to(folder.resolve())
    return not inside and DVC_OBJECT.search(real.as_posix()) is None


def digest(folder: Path) -> str:
    """Digest of a verified folder's contents, to be an input of another stage."""
    return _digest_json(verify(folder)["files"])


def file_digest(path: Path) -> str:
    """SHA-256 of one file's bytes; `ArtifactError` when it cannot be read."""
    try:
        return _digest_file(path)
    except OSError as error:
        preflight.let_through(error)
        raise _damaged(path, str(error)) from None


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


def _is_complete(work: Path, elsewhere: Callable[[Path], object] | None) -> bool:
    if not (work / MANIFEST).is_file():
        return False
    try:
        verify(work)
        if elsewhere:
            elsewhere(work)
    except ArtifactError as error:
        print(f"finished work is damaged and is computed again: {error}", flush=True)
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


def expose(path: Path) -> None:
    """Touch a damaged file and make it writable, in whatever folders it is linked.

    DVC trusts an unchanged time and the mode of its cache: what rotted on the disk would be neither
    made again nor, being the same file in the cache, replaced.
    """
    with contextlib.suppress(OSError):
        path.chmod(path.stat().st_mode | 0o200)
        os.utime(path)


def _damaged(path: Path, why: str) -> ArtifactError:
    expose(path)
    return ArtifactError(
        "An artefact is damaged or incomplete.",
        value=f"{path.absolute()}: {why}",
        rule="every file is as the manifest beside it recorded it",
        remedy=how_to_redo(path),
    )


def how_to_redo(path: Path) -> str:
    """The commands that make the artefact again in which `path` lies.

    By the manifest above it where that can be read, so that a copied or renamed folder is known
    too, else by the names of the folders.
    """
    above = [path.absolute(), *path.absolute().parents]
    for folder in above:
        stage = _stage_of(folder)
        if stage:
            return _commands(stage, folder)
    for folder in above:
        if folder.name in STAGES[:4] + STAGES[5:]:
            return _commands(folder.name, folder)
        if folder.parent.name == "train":
            return _commands("train", folder)
    return "run `dvc repro`, or the command that wrote it, again"


def _stage_of(folder: Path) -> str | None:
    """By the manifest there, sound or not."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        stage = manifest["module"].removeprefix("pipeline.stages.")
        alone = stage == "convert" and "tolerance" in manifest["settings"]  # of three paths
        return stage if stage in STAGES and not alone else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _commands(stage: str, folder: Path) -> str:
    target, option = stage, ""
    if stage == "train":
        layer = folder.name.removeprefix("layer_")
        if not layer.isdecimal():
            return "run `dvc repro`: it is a layer of `train`"
        target, option = f"train@{layer}", f" --layer {layer}"
    alone = f"`python -m pipeline.stages.{stage}{option}`"
    return f"run `dvc repro -f -s {target}`, or without DVC {alone}"


# The code of a stage


def import_closure(module: str) -> list[Path]:
    """Files of this package that importing `module` can run, function-level imports included."""
    closed: set[Path] = set()
    open_ = [module]
    while open_:
        path = _module_path(open_.pop())
        if path and path not in closed:
            closed.add(path)
            open_ += _imports(path)
    return sorted(closed | {PACKAGE / "__init__.py"})


def _module_path(module: str) -> Path | None:
    base = PACKAGE.parent.joinpath(*module.split("."))
    candidates = (base.with_suffix(".py"), base / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


@cache
def _imports(path: Path) -> list[str]:
    names: list[str] = []
    open_: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while open_:
        node = open_.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue  # never runs
        open_ += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in names if name.split(".")[0] == PACKAGE.name]


@cache
def code_digest(module: str) -> str:
    """Digest of the sources in `import_closure(module)`."""
    sources = {str(p.relative_to(PACKAGE)): _digest_file(p) for p in import_closure(module)}
    return _digest_json(sources)


# Files


def _files(folder: Path) -> list[Path]:
    found = (p for p in folder.rglob("*") if p.is_file())
    return sorted(p for p in found if p != folder / MANIFEST)


def _digests(paths: Iterable[Path]) -> Iterator[str]:
    """SHA-256 of each file in turn, taken on several threads: one alone gives some 1.8 GB/s."""
    threads = ThreadPoolExecutor(os.cpu_count() or 1)
    try:
        yield from threads.map(_digest_file, paths)
    finally:
        threads.shutdown(cancel_futures=True)


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_json(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def fsync(path: Path) -> None:
    """Make a file's content durable, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
