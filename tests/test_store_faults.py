"""A store is complete or refused: kills, full disks and damaged files, one by one and mixed."""

import contextlib
import os
import resource
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from test_store import SETTINGS, activations, fill, tree, write

from pipeline.config import Codec
from pipeline.errors import ArtifactError
from pipeline.store import LayerReader
from pipeline.store_writer import LayerWriter

DATA = activations(SETTINGS)
BOUNDARIES = ("fsync", "replace", "rename", "unlink")


@pytest.fixture(scope="module")
def golden(tmp_path_factory) -> Path:
    """A store that nothing happened to."""
    path = tmp_path_factory.mktemp("golden") / "layer_0.zarr"
    write(path, DATA)
    return path


@pytest.fixture
def store(golden, tmp_path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(golden, tmp_path / "layer_0.zarr")


def resume(path: Path) -> None:
    fill(LayerWriter.open(path, **SETTINGS), DATA)


def is_right(path: Path) -> bool:
    """Whether the store reads as what was written; `ArtifactError` where it is refused."""
    reader = LayerReader(path)
    found = [rows for split in DATA for rows in reader.read(split)]
    return all(map(torch.equal, found, [rows for pair in DATA.values() for rows in pair]))


# Interrupted writers


def test_kill_at_every_boundary_then_resume_gives_the_undisturbed_bytes(tmp_path):
    """SIGKILL before the N-th fsync, rename or removal of a writing process, for all N."""
    small = SETTINGS | {"rows": {"train": 29}}
    data = activations(small)

    def go_on(path: Path) -> None:
        fill(LayerWriter.open(path, **small), data)

    go_on(tmp_path / "golden")
    refused, n, survived = 0, 0, False
    while not survived:
        n += 1
        path = tmp_path / f"layer_{n}.zarr"
        survived = _survives(n, lambda path=path: go_on(path))
        try:
            found = LayerReader(path).read("train")
            assert all(map(torch.equal, found, data["train"]))
        except ArtifactError:
            refused += 1
        go_on(path)
        assert tree(path) == tree(tmp_path / "golden")
    assert n > 30
    assert refused >= n - 2, "complete only when the last rename is done"


def test_kill_while_a_damaged_store_is_mended_loses_nothing(golden, store, tmp_path):
    _flip(store / "train/output/c.1.0", 40)
    (store / "commits/train_00002.json").unlink()
    n, survived = 0, False
    while not survived:
        n += 1
        path = shutil.copytree(store, tmp_path / str(n) / "layer_0.zarr")
        survived = _survives(n, lambda path=path: resume(path))
        resume(path)
        assert tree(path) == tree(golden)
    assert n > 10


def _survives(n: int, action: Callable[[], None]) -> bool:
    """Whether a child comes to the end of `action`, if it dies at its n-th boundary."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside zarr's idle threads
        child = os.fork()
    if child == 0:
        with _at_boundary(n, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            action()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), "the child failed by itself"
    return status == 0


@contextlib.contextmanager
def _at_boundary(n: int, act: Callable[[], None]) -> Iterator[None]:
    """Call `act` before the n-th call of the process that makes something durable or visible."""
    left = n
    originals = {name: getattr(os, name) for name in BOUNDARIES}

    def counted(original):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                act()
            return original(*args, **kwargs)

        return call

    try:
        for name, original in originals.items():
            setattr(os, name, counted(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def test_a_write_that_fails_midway_keeps_what_was_committed(golden, tmp_path):
    """As on a full disk: no file may grow past a limit, swept over sizes."""
    path = tmp_path / "layer_0.zarr"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept: list[int] = []
    for size in sorted({file.stat().st_size for file in golden.rglob("*") if file.is_file()}):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, limits[1]))
            with pytest.raises(OSError, match="File too large"):
                resume(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        with pytest.raises(ArtifactError):
            LayerReader(path)
        if path.exists():
            kept.append(len(LayerWriter.open(path, **SETTINGS).committed("train")))
    assert kept == sorted(kept)
    resume(path)
    assert tree(path) == tree(golden)


def test_resume_removes_partial_files(golden, store):
    for name in ("train/input/c.1.0.partial", "commits/train_00001.json.partial"):
        (store / name).write_bytes(b"torn")
    resume(store)
    assert tree(store) == tree(golden)


# Damaged files


def _flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1 << bit
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped byte": lambda path: _flip(path, 30),
    "flipped last byte": lambda path: _flip(path, -1),
    "truncated": _truncate,
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["train/input/c.0.0", "train/output/c.2.0"])
def test_a_damaged_shard_is_refused_by_name_and_written_again(golden, store, name, damage):
    DAMAGES[damage](store / name)
    with pytest.raises(ArtifactError, match=str(store / name)):
        is_right(store)
    if (store / name).exists() and "flipped" in damage:
        with pytest.raises(ArtifactError, match=str(store / name)):
            LayerReader(store).verify()
        with pytest.raises(ArtifactError, match=str(store / name)):
            list(LayerReader(store).batches("train", 8, seed=0, epoch=0, in_memory=False))
    resume(store)
    assert tree(store) == tree(golden)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_commit_is_refused_by_name_and_written_again(golden, store, damage):
    DAMAGES[damage](store / "commits/train_00001.json")
    with pytest.raises(ArtifactError, match=r"commits/train_00001\.json"):
        LayerReader(store)
    resume(store)
    assert tree(store) == tree(golden)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["zarr.json", "train/zarr.json", "train/output/zarr.json"])
def test_damaged_metadata_is_refused_by_name(store, name, damage):
    DAMAGES[damage](store / name)
    with pytest.raises(ArtifactError, match=str(store / name)):
        LayerReader(store)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("commits/train_00000.json", "commits/train_00001.json"),
        ("train/input/c.0.0", "train/input/c.1.0"),
        ("train/input/c.0.0", "train/output/c.0.0"),
    ],
)
@pytest.mark.parametrize("codec", [Codec.compact, Codec.none])
def test_renumbered_files_are_refused(tmp_path, one, other, codec):
    """Uncompressed shards have equal sizes, and each is sound in itself."""
    path = tmp_path / "layer_0.zarr"
    write(path, DATA, codec=codec)
    before = tree(path)
    _swap(path / one, path / other)
    with pytest.raises(ArtifactError):
        is_right(path)
    fill(LayerWriter.open(path, **SETTINGS | {"codec": codec}), DATA)
    assert tree(path) == before


def test_a_shard_too_many_is_refused(store):
    shutil.copy(store / "commits/train_00002.json", store / "commits/train_00003.json")
    with pytest.raises(ArtifactError, match="no such shard"):
        LayerReader(store)


def test_a_shard_of_another_configuration_is_refused(store, tmp_path):
    other = tmp_path / "other.zarr"
    write(other, DATA, attributes={"model": "n"})
    for name in ("train/input/c.1.0", "train/output/c.1.0", "commits/train_00001.json"):
        shutil.copy(other / name, store / name)
    with pytest.raises(ArtifactError, match=r"zarr\.json"):
        LayerReader(store)
    assert LayerWriter.open(store, **SETTINGS).committed("train") == {0, 2}


def test_a_split_that_was_never_written_is_missed(store):
    for path in store.glob("commits/validation_*.json"):
        path.unlink()
    with pytest.raises(ArtifactError, match=r"validation_00000\.json: it is missing"):
        LayerReader(store)


def test_an_empty_folder_is_no_store(tmp_path):
    with pytest.raises(ArtifactError, match="no commit"):
        LayerReader(tmp_path)


def test_verify_passes_a_sound_store_and_finds_a_foreign_file(store):
    LayerReader(store).verify()
    (store / "train/input/c.9.0").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"c\.9\.0"):
        LayerReader(store).verify()


def test_any_flipped_bit_is_found_by_verify_and_never_read_as_data(store):
    """Bits all over the store, one at a time; a reader is right or refuses."""
    for name, content in tree(store).items():
        for position in range(0, len(content), 41):
            _flip(store / name, position, position % 8)
            with contextlib.suppress(ArtifactError):
                assert is_right(store)
            with pytest.raises(ArtifactError):
                LayerReader(store).verify()
            (store / name).write_bytes(content)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_zarr_itself_would_read_zeros(store, damage):
    """Why commits exist: a missing or an empty shard is no error there."""
    damage(store / "train/input/c.0.0")
    array = zarr.open_array(store, path="train/input", mode="r")
    assert not array[:24].any()  # pyright: ignore
    with pytest.raises(ArtifactError, match=r"c\.0\.0"):
        LayerReader(store)


# Everything at once

FILES = sorted(
    [f"train/{array}/c.{k}.0" for array in ("input", "output") for k in range(3)]
    + [f"commits/train_{k:05d}.json" for k in range(3)]
    + ["commits/validation_00000.json", "validation/input/c.0.0"]
)
EVENTS = st.one_of(
    st.tuples(st.just("stop"), st.integers(1, 70), st.none()),
    st.tuples(st.sampled_from(sorted(DAMAGES)), st.sampled_from(FILES), st.none()),
    st.tuples(st.just("swap"), st.sampled_from(FILES), st.sampled_from(FILES)),
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(events=st.lists(EVENTS, min_size=1, max_size=6))
def test_any_history_is_refused_or_right_and_ends_in_the_undisturbed_bytes(golden, events):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer_0.zarr"
        for event, what, other in events:
            if event == "stop":
                with contextlib.suppress(InterruptedError), _at_boundary(what, _interrupt):
                    resume(path)
            elif event == "swap":
                if what != other and (path / what).exists() and (path / other).exists():
                    _swap(path / what, path / other)
            elif (path / what).exists() and (path / what).stat().st_size:
                DAMAGES[event](path / what)
            with contextlib.suppress(ArtifactError):
                assert is_right(path)
        resume(path)
        assert tree(path) == tree(golden)
        assert is_right(path)


def _interrupt() -> None:
    raise InterruptedError
