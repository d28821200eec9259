"""Artefacts that vouch for themselves: sealed JSON files, and folders with a manifest.

A manifest records the digest of every file beside it, and what they were made from. What is damaged
is refused by name, with the commands that make it again.
"""

import contextlib
import fnmatch
import hashlib
import json
import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline import preflight
from pipeline.durable import fsync, remove_partials, write_json
from pipeline.errors import ArtifactError

MANIFEST = "manifest.json"
SEAL = "digest"
"""The key under which a sealed JSON file holds the digest of all else in it."""
STAGES = ("dense", "tokens", "capture", "budget", "train", "heal", "convert", "evaluate")
DVC_OBJECT = re.compile(r"/files/md5/[0-9a-f]{2}/[0-9a-f]{30}$")
RECORDED_VERSIONS = ("torch", "transformers", "datasets", "zarr", "numcodecs", "tokenizers")


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
    write_json(path, {**plain, SEAL: json_digest(plain)})


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` was given; `ArtifactError` when that is not what the file holds."""
    content = read_json(path)
    seal = content.pop(SEAL, None) if isinstance(content, dict) else None
    if seal is None or seal != json_digest(content):
        raise _damaged(path, "it does not match its own digest")
    return content


def versions() -> dict[str, str]:
    """Of Python, and of the packages on which numbers depend."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {"python": python, **{name: version(name) for name in RECORDED_VERSIONS}}


def write_manifest(
    folder: Path, identity: dict[str, Any], known: Mapping[str, str] | None = None
) -> None:
    """Seal a folder: the digest of every file, and what they were made from.

    Args:
        known: SHA-256 by name, of files that were read since they were written.
    """
    remove_partials(folder)  # its own manifest's too
    paths = {str(path.relative_to(folder)): path for path in _files(folder)}
    unread = [name for name in paths if name not in (known or {})]
    found = file_digests(paths[name] for name in unread)
    files = {**(known or {}), **dict(zip(unread, found, strict=True))}
    assert files.keys() == paths.keys(), "a digest of no file"
    for path in paths.values():
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


def verify(folder: Path, *patterns: str, but: Collection[str] = ()) -> dict[str, Any]:
    """Re-hash a sealed folder and return its manifest; `ArtifactError` names what is wrong.

    Args:
        patterns: of `fnmatch`, over paths below the folder: only these files; none = all.
        but: files that have to be there, and whose content is left to who reads them.
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
    checked = [name for name in checked if name not in but]
    digests = file_digests([folder / name for name in checked])
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


def digest(folder: Path, but: Collection[str] = ()) -> str:
    """Digest of a verified folder's contents, to be an input of another stage; as `verify`."""
    return json_digest(verify(folder, but=but)["files"])


def file_digest(path: Path) -> str:
    """SHA-256 of one file's bytes; `ArtifactError` when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        preflight.let_through(error)
        raise _damaged(path, str(error)) from None


def file_digests(paths: Iterable[Path]) -> Iterator[str]:
    """Those of several in turn, taken on several threads: one alone gives some 1.8 GB/s."""
    threads = ThreadPoolExecutor(os.cpu_count() or 1)
    try:
        yield from threads.map(file_digest, paths)
    finally:
        threads.shutdown(cancel_futures=True)


def json_digest(content: Any) -> str:
    """SHA-256 of a JSON value, keys in order."""
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    found = (p for p in folder.rglob("*") if p.is_file())
    return sorted(p for p in found if p != folder / MANIFEST)


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
