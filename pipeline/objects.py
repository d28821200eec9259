"""Shards on an object store: what `capture.store_url` names, read and written through obstore.

The store in the DAG is then a folder of digests: every `zarr.json`, the commits, and `shards.json`,
which says below what prefix the objects lie, and not on which store. The address is given whenever
it is needed, and kept nowhere. The objects are the files of a store that lies in one folder, byte
for byte, with its commits and `zarr.json`: any Zarr reader opens them, and another machine goes on
from them.

A PUT is atomic, so that an object is there whole or not at all; the commit is written last.

Credentials are those of the environment or of the machine, as obstore finds them. What it says of
an error may hold a key, or what was signed with one: none of it is repeated, see `SAID`.
"""

import contextlib
import importlib.util
import re
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from crc32c import crc32c

from pipeline import preflight
from pipeline.artifacts import read_json
from pipeline.durable import fsync, json_bytes
from pipeline.errors import ArtifactError, ConfigError, PipelineError, ResourceError
from pipeline.rules import check_store_url
from pipeline.shards import Bytes, Files, damaged, sound_chunks
from pipeline.volume import APART

RETRY: dict[str, Any] = {"max_retries": 10, "retry_timeout": timedelta(minutes=3)}
"""As obstore has it by itself: it waits 0.1 s before it tries again, and longer each time."""

BLOCK = 1 << 23  # bytes of one GET where a whole object is read

CREDENTIALS = (
    "give this process credentials in its environment (AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY; GOOGLE_SERVICE_ACCOUNT) that may list, read, write and delete there"
)
SAID = (
    ("NoSuchBucket", "there is no such bucket", "create it, or correct capture.store_url"),
    (
        r"169\.254\.169\.254|metadata\.google|metadata server",
        "no credentials were found",
        CREDENTIALS,
    ),
    (
        r"AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken|InvalidToken|"
        r"PermissionDenied|Unauthenticated|status(?: code)?: 40[13]",
        "access is denied",
        CREDENTIALS,
    ),
    (
        "PermanentRedirect|AuthorizationHeaderMalformed|IllegalLocationConstraint",
        "the bucket lies in another region",
        "set AWS_REGION to that of the bucket",
    ),
)
"""What a server says, the same in our words, and the remedy. Anything else is no answer."""


def apart(path: Path) -> dict[str, bytes]:
    """The file that says where the shards of the store at `path` lie: below its folder's name.

    A capture's work folder is called by its fingerprint, so that experiments share what is equal
    and captures of several settings do not collide.
    """
    return {APART: json_bytes({"below": f"{path.absolute().parent.name}/{path.name}"})}


def is_apart(path: Path) -> bool:
    """Whether the shards of the store at `path` lie on an object store."""
    return (path / APART).is_file()


def place_of(path: Path, store_url: str | None, *, create: bool = False) -> "Files | Objects":
    """Where the shards of the store at `path` lie.

    Args:
        store_url: of the object store, for a store that has its shards there.
        create: make the folder of a `file://` address.

    Raises:
        ConfigError: they lie on one, and its address is not given, or is none.
    """
    if not is_apart(path):
        return Files(path)
    if store_url is None:
        raise ConfigError(
            "The shards of a store lie on an object store that is not named.",
            value=f"{path.absolute()}, capture.store_url=null",
            rule="capture.store_url is where they were written, or were copied to since",
            remedy="set capture.store_url in conf/ and run `python -m pipeline compose`; or leave "
            "it null and run `dvc repro -f -s capture`, which then has them here",
        )
    named = read_json(path / APART)
    below = named.get("below") if isinstance(named, dict) else None
    if not isinstance(below, str) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", below):
        raise damaged(path / APART, "it does not say where the shards lie")
    return Objects(store_url, below, create=create)


def captures(store_url: str) -> dict[str, int]:
    """Bytes of every capture below an address, by its fingerprint."""
    found: dict[str, int] = {}
    for key, size in Objects(store_url, "", create=True).sizes().items():
        name, slash, _ = key.partition("/")
        if slash and re.fullmatch("[0-9a-f]{16}", name):
            found[name] = found.get(name, 0) + size
    return found


def remove(store_url: str, fingerprint: str) -> None:
    """Every object of a capture; the commits first, so that what is left is no store."""
    place = Objects(store_url, fingerprint)
    for key in sorted(place.sizes(), key=lambda key: ("/commits/" not in key, key)):
        place.delete(key)


class Objects:
    """The objects below one prefix, as `shards.Place` has them.

    Raises:
        ConfigError: no address of an object store.
        ResourceError: from every method, where the store does not answer or denies access.
    """

    in_flight: int | None = 32

    def __init__(self, store_url: str, below: str, *, create: bool = False) -> None:
        check_store_url(store_url)
        self.url = f"{store_url.rstrip('/')}/{below}".rstrip("/")
        self._folder = Path(unquote(urlsplit(self.url).path)) if _is_folder(self.url) else None
        if self._folder and not (create or self._folder.is_dir()):
            raise self.damaged("", "it is missing")
        with self.told(""):
            self.store = _open(self.url)
        self._sizes: dict[str, int] | None = None

    def sizes(self) -> dict[str, int]:
        """Bytes of every object by its key, as they were when this first was asked."""
        import obstore

        if self._sizes is None:
            with self.told(""):
                pages = obstore.list(self.store, chunk_size=1000)
                self._sizes = {meta["path"]: meta["size"] for page in pages for meta in page}
        return self._sizes

    def size(self, key: str) -> int | None:
        return self.sizes().get(key)

    def read(self, key: str, offset: int, *into: Bytes) -> None:
        import obstore

        wanted = sum(map(len, into))
        with self.told(key):
            found = obstore.get_range(self.store, key, start=offset, length=wanted)
        content = np.frombuffer(memoryview(found), np.uint8)
        if len(content) != wanted:
            raise self.damaged(key, "it ends early")
        for part in into:
            part[:], content = content[: len(part)], content[len(part) :]

    def content(self, key: str) -> Bytes:
        """All of an object, as long as it was when the objects were listed."""
        import obstore

        size = self.size(key)
        if size is None:
            raise self.damaged(key, "it is missing")
        starts = list(range(0, size, BLOCK))
        ends = [min(size, start + BLOCK) for start in starts]
        with self.told(key):
            found = obstore.get_ranges(self.store, key, starts=starts, ends=ends, coalesce=0)
        content = np.frombuffer(b"".join(map(memoryview, found)), np.uint8)
        if len(content) != size:
            raise self.damaged(key, "it ends early")
        return content

    def checksums(self, key: str, n_chunks: int) -> tuple[int, list[int | None]]:
        content = self.content(key)
        return crc32c(content.data), sound_chunks(content, n_chunks)

    def put(self, key: str, content: bytes | Bytes) -> None:
        """Whole, visible and durable on return."""
        import obstore

        with self.told(key):
            obstore.put(self.store, key, content)  # pyright: ignore[reportArgumentType]
        if self._folder:  # where a name is visible before its bytes are durable
            fsync(self._folder / key)
            fsync((self._folder / key).parent)
        if self._sizes is not None:
            self._sizes[key] = len(content)

    def create(self, key: str) -> "NewObject":
        return NewObject(self, key)

    def delete(self, key: str) -> None:
        import obstore

        with self.told(key), contextlib.suppress(FileNotFoundError):
            obstore.delete(self.store, key)
        if self._sizes is not None:
            self._sizes.pop(key, None)

    def damaged(self, key: str, why: str) -> ArtifactError:
        return ArtifactError(
            "An activation store is damaged or incomplete.",
            value=f"{self.url}/{key}: {why}",
            rule="every shard lies where its commit says, with the bytes that were committed",
            remedy="run `dvc repro -f -s capture`: it writes again what is damaged; where the "
            "objects were moved, set capture.store_url to where they lie now",
        )

    @contextlib.contextmanager
    def told(self, key: str) -> Iterator[None]:
        """Turn obstore's errors into refusals, of which none repeats its words."""
        from obstore.exceptions import BaseError

        try:
            yield
        except PipelineError:
            raise
        except (BaseError, OSError) as error:
            raise self._refusal(error, key) from None

    def _refusal(self, error: Exception, key: str) -> PipelineError:
        if refused := preflight.refusal(error, f"{self.url} cannot be used"):
            return refused
        text = f"{type(error).__name__} {error}"
        for pattern, cause, remedy in SAID:
            if re.search(pattern, text):
                return _unusable(f"{self.url}/{key}", cause, remedy)
        if isinstance(error, FileNotFoundError):
            return self.damaged(key, "it is missing")
        if re.search(r"InvalidRange|status(?: code)?: 416", text):
            return self.damaged(key, "it ends early")
        remedy = "see that the store can be reached from here, then run the same command again"
        return _unusable(f"{self.url}/{key}", "it does not answer", remedy)


class NewObject:
    """An object that is put when it is closed, as `durable.NewFile` gets its name then."""

    def __init__(self, place: Objects, key: str) -> None:
        self._place, self._key = place, key
        self._pieces: list[bytes] = []

    def write(self, pieces: Iterable[bytes | memoryview]) -> None:
        self._pieces += map(bytes, pieces)  # a view's memory is used again

    def close(self) -> None:
        self._place.put(self._key, b"".join(self._pieces))
        self._pieces.clear()


def _unusable(url: str, cause: str, remedy: str) -> ResourceError:
    return ResourceError(
        f"The object store cannot be used: {cause}.",
        value=url,
        rule="an object store that answers, in time and after its retries, and permits it",
        remedy=remedy,
    )


def _is_folder(url: str) -> bool:
    return url.startswith("file:")


def _open(url: str) -> Any:
    """obstore's store of an address."""
    if importlib.util.find_spec("obstore") is None:
        raise ConfigError(
            "capture.store_url needs a package that is not installed.",
            value=f"capture.store_url={url}",
            rule="`import obstore` must work",
            remedy="run `pip install 'sparse-distillation[objects]'`, "
            "or set capture.store_url=null",
        )
    from obstore.store import from_url

    if _is_folder(url):
        return from_url(url, mkdir=True)
    return from_url(url, retry_config=RETRY)  # pyright: ignore[reportCallIssue, reportArgumentType]
