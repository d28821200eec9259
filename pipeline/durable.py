"""Files that a reader sees whole or not at all, and that survive a crash once they are there."""

import json
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Write durably, keys in order; never NaN."""
    write_bytes(path, json_bytes(content))


def json_bytes(content: Any) -> bytes:
    """What `write_json` writes."""
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
    return f"{text}\n".encode()


def write_bytes(path: Path, content: bytes) -> None:
    """Write durably: a reader sees the whole file or none."""
    file = NewFile(path)
    file.write([content])
    file.close()


class NewFile:
    """A file that has its name, whole and durably, once it is closed; not held open till then."""

    def __init__(self, path: Path) -> None:
        self._path, self._partial = path, path.with_name(path.name + ".partial")
        self._mode = "wb"

    def write(self, pieces: Iterable[bytes | memoryview]) -> None:
        """Append them."""
        with self._partial.open(self._mode) as file:
            file.seek(0, os.SEEK_END)
            for piece in pieces:
                file.write(piece)
        self._mode = "r+b"  # what is gone since is not begun anew

    def close(self) -> None:
        fsync(self._partial)
        self._partial.replace(self._path)
        fsync(self._path.parent)


def fsync(path: Path) -> None:
    """Make a file's content durable, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
