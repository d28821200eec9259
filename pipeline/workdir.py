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
import hashlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.errors import ArtifactError, ResourceError

MANIFEST = "manifest.json"
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

    Raises:
        ResourceError: another run held the lock for longer than `lock_wait_s` seconds.
    """
    identity = {"settings": settings, "inputs": inputs, "code": code_digest(module)}
    fingerprint = _digest_json({"module": module, **identity})[:16]
    root = scratch or scratch_root()
    unit = "-".join(part for part in out.parts[-2:] if part != "stages")
    work = root / unit / fingerprint
    with contextlib.ExitStack() as locks:
        if published:
            locks.enter_context(lock((scratch or Path(".scratch")) / "locks" / unit, lock_wait_s))
        locks.enter_context(lock(root / "locks" / f"{unit}-{fingerprint}", lock_wait_s))
        if _is_complete(work):
            print(f"{out}: found complete in {work}", flush=True)
        else:
            work.mkdir(parents=True, exist_ok=True)
            compute(work)
            write_manifest(work, {"module": module, "fingerprint": fingerprint, **identity})
        if not published:
            return work
        out.parent.mkdir(parents=True, exist_ok=True)
        publish(work, out)
    return out


@contextlib.contextmanager
def lock(path: Path, wait_s: float) -> Iterator[None]:
    """Hold `path`.lock; waits up to `wait_s` seconds for its holder and then names it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held, holder = FileLock(f"{path}.lock"), Path(f"{path}.holder")
    try:
        try:
            held.acquire(timeout=0)
        except Timeout:
            print(f"waiting up to {wait_s:.0f} s for {_read_holder(holder)}", flush=True)
            held.acquire(timeout=wait_s)
    except Timeout:
        raise ResourceError(
            f"Another run works on {path}.",
            value=_read_holder(holder),
            rule=f"one run at a time; waited runtime.lock_wait_s={wait_s:.0f} s",
            remedy="let it finish or stop it by its pid, then run the same command again",
        ) from None
    try:
        holder.write_text(f"pid {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        holder.unlink(missing_ok=True)
        held.release()


def _read_holder(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return "a run that has not named itself"


def write_json(path: Path, content: Any) -> None:
    """Write durably: a reader sees the whole file or none."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, sort_keys=True, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    fsync_folder(path.parent)


def read_json(path: Path) -> Any:
    """The content of a JSON file of ours; `ArtifactError` when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            "A file of an artefact cannot be read.",
            value=f"{path.absolute()}: {error}",
            rule="a complete JSON file",
            remedy="run the stage that writes it again (`dvc repro`)",
        ) from None


def write_manifest(folder: Path, identity: dict[str, Any]) -> None:
    """Seal a folder: the digest of every file, and what they were made from."""
    files = {str(p.relative_to(folder)): _digest_file(p) for p in _files(folder)}
    versions = {name: version(name) for name in RECORDED_VERSIONS}
    python = ".".join(map(str, sys.version_info[:3]))
    for path in _files(folder):
        _fsync(path)
    write_json(
        folder / MANIFEST,
        {**identity, "files": files, "versions": {"python": python, **versions}},
    )


def verify(folder: Path) -> dict[str, Any]:
    """Re-hash a sealed folder and return its manifest; `ArtifactError` names what is wrong."""
    manifest = read_json(folder / MANIFEST)
    recorded = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(recorded, dict):
        raise _damaged(folder / MANIFEST, "it lists no files")
    present = {str(p.relative_to(folder)) for p in _files(folder)}
    for name in sorted(recorded.keys() | present):
        if name not in present:
            raise _damaged(folder / name, "it is missing")
        if name not in recorded:
            raise _damaged(folder / name, "the manifest does not know it")
        if _digest_file(folder / name) != recorded[name]:
            raise _damaged(folder / name, f"its SHA-256 is not {recorded[name][:16]}...")
    return manifest


def digest(folder: Path) -> str:
    """Digest of a verified folder's contents, to be an input of another stage."""
    return _digest_json(verify(folder)["files"])


def file_digest(path: Path) -> str:
    """SHA-256 of one file's bytes; `ArtifactError` when it cannot be read."""
    try:
        return _digest_file(path)
    except OSError as error:
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
    fsync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):
            raise
        shutil.copy2(source, target)


def _is_complete(work: Path) -> bool:
    if not (work / MANIFEST).is_file():
        return False
    try:
        verify(work)
    except ArtifactError as error:
        print(f"finished work is damaged and is computed again: {error}", flush=True)
        shutil.rmtree(work)
        return False
    return True


def _damaged(path: Path, why: str) -> ArtifactError:
    return ArtifactError(
        "An artefact is damaged or incomplete.",
        value=f"{path.absolute()}: {why}",
        rule="every file is as the manifest beside it recorded it",
        remedy="remove the folder and run `dvc repro`",
    )


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


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_json(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


fsync_folder = _fsync
"""Make the names in a folder durable."""
