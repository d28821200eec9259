"""Files that a reader sees whole or not at all, and that survive a crash once they are there."""

import json
import os
import shutil
import uuid
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
    file.write(content)
    file.close()


class NewFile:
    """A file that has its name, whole and durably, once it is closed."""

    def __init__(self, path: Path) -> None:
        self._path, self._partial = path, path.with_name(path.name + ".partial")
        self._file = self._partial.open("wb")

    def write(self, content: bytes | memoryview) -> None:
        self._file.write(content)

    def close(self) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._partial.replace(self._path)
        fsync(self._path.parent)

    def abandon(self) -> None:
        """Let go of it; where it was closed already, it stays."""
        self._file.close()


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
