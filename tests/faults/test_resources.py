"""A machine that runs out of disk, memory or rights: 4, what was done is kept, the rerun is equal.

The disks are small tmpfs, mounted for the test; where nothing may be mounted, the limit of a file's
size stands in, which fails in the same place.
"""

import ctypes
import functools
import os
import platform
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from injection import Boundaries, Ended, Stand

from pipeline import commits
from pipeline.preflight import LOST_ALLOCATIONS
from pipeline.shards import Files

pytestmark = pytest.mark.slow

ROOM = 64_000_000  # more than a stage needs


def mount(*arguments: object) -> bool:
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, check=False)
    return done.returncode == 0


@functools.cache
def may_mount() -> bool:
    """Whether a file system may be mounted here."""
    folder = Path(f"/tmp/pipeline-mount-{os.getpid()}")
    folder.mkdir()
    try:
        if not shutil.which("mount") or not mount("-t", "tmpfs", "-o", "size=64k", "none", folder):
            return False
        subprocess.run(["umount", folder], check=True)
        return True
    finally:
        folder.rmdir()


needs_mount = pytest.mark.skipif(
    not may_mount(), reason="no right to mount a tmpfs: test_limit_of_a_files_size... stands in"
)


class Disk:
    """A project on a file system of its own."""

    def __init__(self, root: Path, undisturbed: Stand) -> None:
        self.root = root
        root.mkdir()
        assert mount("-t", "tmpfs", "-o", f"size={ROOM}", "none", root)
        self.stand = undisturbed.copy(root)

    def leave(self, size: int) -> None:
        """Let as many bytes be free."""
        found = os.statvfs(self.root)
        used = (found.f_blocks - found.f_bfree) * found.f_frsize
        assert mount("-o", f"remount,size={used + size}", self.root)

    def hog(self, left: int) -> None:
        """Fill it as another process would, but for `left` bytes."""
        found = os.statvfs(self.root)
        with (self.root / "hog").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, found.f_bfree * found.f_frsize - left))


@pytest.fixture
def disk(undisturbed: Stand, tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path / "project", undisturbed)
    yield made
    subprocess.run(["umount", "-l", made.root], check=True)


def begin(stand: Stand, stage: str) -> None:
    """Its output is gone, and nothing is done."""
    shutil.rmtree(stand.out(stage))
    shutil.rmtree(stand.root / ".scratch", ignore_errors=True)


def check(ended: Ended, stand: Stand, stage: str) -> None:
    """The refusal is one, and nothing looks finished."""
    ended.check(4)
    assert "Traceback" not in ended.said
    assert re.search(r"^error: .+\n  value: .+\n  rule: .+\n  remedy: .+", ended.said, re.MULTILINE)
    assert not stand.out(stage).exists()
    check_commits(stand.root / ".scratch")


def check_commits(scratch: Path) -> None:
    """Every shard that was committed is sound."""
    for path in scratch.glob("capture/*/layer_*.zarr/commits/*.json"):
        for key, recorded in commits.read_commit(path)["objects"].items():
            commits.check_object(Files(path.parents[1]), key, recorded)


# Disk


@needs_mount
@pytest.mark.parametrize("stage", ["capture", "train@0", "convert"])
def test_disk_of_any_size_ends_with_4_or_with_the_undisturbed_bytes(disk: Disk, stage: str):
    """From nothing to enough: each run goes on from what the ones before it have left."""
    stand, wanted = disk.stand, disk.stand.published()
    begin(stand, stage)
    refused, size = 0, 0
    while True:
        disk.leave(size)
        ended = stand.run(stage)
        if ended.code == 0:
            break
        check(ended, stand, stage)
        refused, size = refused + 1, max(8192, round(2.5 * size))
    assert refused > 3
    assert stand.published() == wanted


@needs_mount
@pytest.mark.parametrize(
    ("stage", "at", "where", "left"),
    [
        ("capture", 2, "train/input/c.1.0.partial", 0),
        ("capture", 1, "train/output/c.0.0.partial", 8192),
        ("capture", 2, "commits/validation_00000.json.partial", 0),
        ("dense", 2, "checkpoint.partial", 4096),
        ("train@0", 2, "checkpoint.partial", 4096),
        ("train@0", 1, "static/layer.safetensors", 0),
        ("heal", 1, "checkpoint.partial", 4096),
        ("convert", 1, "model.safetensors", 20480),
    ],
)
def test_disk_that_fills_up_in_the_midst_loses_nothing(
    disk: Disk, stage: str, at: int, where: str, left: int
):
    """Another process takes the room after it was found to be there."""
    stand, wanted = disk.stand, disk.stand.published()
    begin(stand, stage)
    full = Boundaries(disk.root, at, lambda: disk.hog(left), where=where)
    ended = stand.run(stage, arm=full.arm)
    assert (disk.root / "hog").exists(), f"{where} was never written"
    check(ended, stand, stage)
    assert "No space left on device" in ended.said or "There is no room" in ended.said
    (disk.root / "hog").unlink()
    stand.run(stage).check()
    assert stand.published() == wanted


@needs_mount
def test_capture_refuses_a_small_disk_before_its_first_byte(disk: Disk):
    stand = disk.stand
    begin(stand, "capture")
    disk.leave(300_000)
    said = stand.run("capture").check(4).said
    assert "There is no room for the activations." in said
    assert re.search(r"value: +[\d.]+ [kM]B needed, [\d.]+ kB free at /.+/\.scratch/capture/", said)
    for lever in ("half of data.tokens.train", "half of model.layers", "capture.store=input"):
        assert re.search(rf"{lever} [\d.]+ kB", said)
    assert not [p for p in (stand.root / ".scratch/capture").rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    ("stage", "kilobytes"), [("capture", 20), ("train@0", 40), ("dense", 60), ("convert", 30)]
)
def test_limit_of_a_files_size_ends_with_4_and_the_rerun_as_undisturbed(
    stand: Stand, stage: str, kilobytes: int
):
    wanted = stand.published()
    begin(stand, stage)
    limit = (1024 * kilobytes, resource.RLIM_INFINITY)
    ended = stand.run(stage, arm=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    check(ended, stand, stage)
    assert "File too large" in ended.said
    if stage == "capture" or not may_mount():
        stand.run(stage).check()
        assert stand.published() == wanted


# Memory


def limit_memory(megabytes: int) -> Callable[[], None]:
    """So much more than the child has already."""

    def arm() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + 1_000_000 * megabytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    return arm


WIDE = ["d_model=2048", "d_ff=8192", "n_layers=1"]
LARGE: dict[str, list[str]] = {
    "dense": [f"model.embedded.{size}" for size in WIDE],
    "train@1": ["moe.n_experts=4096", "moe.d_ff_expert=1.0", "moe.init=copy"],
}
"""Settings with which a stage takes far more than `MARGIN`."""
LARGE["train@1"] += ["moe.router_init=random", "train.static_control=false"]
MARGIN = 250  # more megabytes than the child has; libraries written in C end a process of few


@pytest.mark.parametrize("stage", LARGE)
def test_lost_allocation_ends_with_4_names_the_unit_and_keeps_the_others(stand: Stand, stage: str):
    if stage == "train@1":
        stand.run("budget", LARGE[stage]).check()
    wanted = stand.published()
    ended = stand.run(stage, LARGE[stage], arm=limit_memory(MARGIN))
    unit = stage.replace("@", "-layer_")
    assert f"error: Out of memory: {unit} is not finished" in ended.check(4).said
    assert any(lost in ended.said for lost in LOST_ALLOCATIONS) and "Traceback" not in ended.said
    assert stand.published() == wanted


# Rights


@needs_mount
@pytest.mark.parametrize("stage", ["dense", "capture", "train@0", "convert"])
def test_read_only_folder_ends_with_4_the_path_and_errno(disk: Disk, stage: str):
    stand = disk.stand
    begin(stand, stage)
    assert mount("-o", "remount,ro", disk.root)
    said = stand.run(stage).check(4).said
    assert "[Errno 30] Read-only file system" in said and str(disk.root) in said
    assert "Traceback" not in said


def obey_modes() -> None:
    """Give up what lets root read everything."""
    number = {"x86_64": 126, "aarch64": 91}[platform.machine()]  # capset
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    none = (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).syscall(number, header, none) == 0


@pytest.mark.parametrize(
    ("stage", "closed"),
    [
        ("tokens", "stages/dense"),
        ("capture", "stages/tokens"),
        ("train@0", "stages/capture/layer_0.zarr/train/input"),
        ("train@0", "stages/capture/ffn_0.safetensors"),
        ("convert", "stages/heal/layer_1"),
        ("capture", ".scratch"),
    ],
)
def test_unreadable_folder_ends_with_4_the_path_and_errno(stand: Stand, stage: str, closed: str):
    begin(stand, stage)
    (stand.root / ".scratch").mkdir()
    (stand.root / closed).chmod(0)
    try:
        said = stand.run(stage, arm=obey_modes).check(4).said
    finally:
        (stand.root / closed).chmod(0o755)
    assert "[Errno 13] Permission denied" in said and f"{stand.root}/{closed}" in said
    assert "Traceback" not in said
