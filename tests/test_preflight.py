"""What the machine lacks is told as such, by whatever library it is met in."""

import errno
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from joblib.externals.loky import get_reusable_executor
from safetensors.torch import save_file
from test_capture import CONFIG, tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from pipeline import preflight
from pipeline.capture import capture_activations
from pipeline.config import Codec, Store
from pipeline.errors import ResourceError


def error_of(act: Callable[[], object]) -> BaseException:
    with pytest.raises(BaseException) as caught:
        act()
    return caught.value


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    asked = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder)]
    if not shutil.which("mount") or subprocess.run(asked, capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def leave(disk: Path, size: int) -> None:
    """Make it so large as a whole."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


# Other libraries' errors


@pytest.mark.parametrize(
    "act",
    [lambda: torch.empty(1 << 60), lambda: np.empty(1 << 58), lambda: bytearray(1 << 62)],
    ids=["torch", "numpy", "Python"],
)
def test_lost_allocations_are_told_as_memory(act: Callable[[], object]):
    refused = preflight.refusal(error_of(act), "it is not finished")
    assert refused and refused.exit_code == 4
    assert refused.what == "Out of memory: it is not finished."
    assert "capture.batch_size" in refused.remedy


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory",
        "could not create a primitive",
        "error during blosc compression: -1",
        "can't start new thread",
    ],
)
def test_what_libraries_say_without_memory_is_told_as_memory(text: str):
    refused = preflight.refusal(RuntimeError(text), "this")
    assert refused and refused.value == text


def test_a_killed_worker_is_told_as_memory():
    """As the kernel kills one of `prefill`'s jobs that takes too much."""
    error = error_of(get_reusable_executor(1).submit(signal.raise_signal, signal.SIGKILL).result)
    refused = preflight.refusal(error, "this")
    assert refused and refused.exit_code == 4 and "SIGKILL" in str(refused.value)


def test_a_gpu_out_of_memory_is_told_as_memory():
    refused = preflight.refusal(torch.OutOfMemoryError("tried to allocate 2 GiB"), "this")
    assert refused and "2 GiB" in str(refused)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(bytes(1 << 20)),
        lambda path: save_file({"x": torch.zeros(1 << 18)}, path),
        lambda path: Tokenizer(WordLevel({str(i): i for i in range(1 << 16)})).save(str(path)),
    ],
    ids=["Python", "safetensors", "tokenizers"],
)
def test_a_full_disk_is_told_as_one(disk: Path, write: Callable[[Path], object]):
    leave(disk, 1 << 16)
    refused = preflight.refusal(error_of(lambda: write(disk / "file")), "this")
    assert refused and refused.exit_code == 4
    assert str(refused.value).startswith(f"[Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}")
    assert "plan" in refused.remedy


def test_a_refused_path_is_told_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    error = PermissionError(errno.EACCES, "no", "stages/dense")
    refused = preflight.refusal(error, "this")
    assert refused
    assert refused.value == f"[Errno 13] Permission denied: {tmp_path}/stages/dense"


@pytest.mark.parametrize(
    "error", [ValueError("7"), FileNotFoundError(errno.ENOENT, "no", "x"), RuntimeError("sizes")]
)
def test_other_errors_are_not_the_machines_fault(error: Exception):
    assert preflight.refusal(error, "this") is None
    preflight.let_through(error)


def test_the_machines_fault_is_let_through():
    with pytest.raises(MemoryError):
        preflight.let_through(MemoryError())


# What is free


def test_free_memory_is_less_than_the_machine_has():
    free = preflight.free_memory()
    if not Path("/proc/meminfo").exists():
        assert free is None
    else:
        lines = Path("/proc/meminfo").read_text().splitlines()
        assert free and 0 < free < 1024 * int(lines[0].split()[1])


def test_free_gpu_memory_is_that_of_the_emptiest_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert preflight.free_gpu_memory() is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 1024\necho 81000\n")
    tool.chmod(0o755)
    assert preflight.free_gpu_memory() == 81000 * 2**20


def test_disk_and_files_are_those_of_the_nearest_folder_that_is_there(tmp_path: Path):
    assert preflight.free_disk(tmp_path / "a" / "b") == preflight.free_disk(tmp_path) > 0
    found = os.statvfs(tmp_path)
    assert (preflight.free_files(tmp_path / "a") is None) == (found.f_files == 0)


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (2.34e9, "2.34 GB"), (7e15, "7e+03 TB")],
)
def test_sizes_are_told_to_three_figures(n: float, text: str):
    assert preflight.size(n) == text


# Before the work


def test_check_disk_names_need_have_path_and_levers(tmp_path: Path):
    free = preflight.free_disk(tmp_path)
    preflight.check_disk("it", tmp_path, free // 2, [])
    with pytest.raises(ResourceError, match=r"no room for it\.") as refused:
        preflight.check_disk("it", tmp_path, 10**18, ["half of it 5e+05 TB"])
    message = str(refused.value)
    assert "1e+06 TB needed" in message and f"free at {tmp_path}" in message
    assert "half of it 5e+05 TB" in message


def test_checkpoints_need_two_and_what_comes_of_them_less_what_is_there(tmp_path: Path):
    few = preflight.free_disk(tmp_path) // 36
    preflight.check_checkpoints("it", tmp_path, few // 2, "")
    with pytest.raises(ResourceError, match="the checkpoints of it"):
        preflight.check_checkpoints("it", tmp_path, 2 * few, "")
    with (tmp_path / "checkpoint.safetensors").open("wb") as file:
        file.truncate(40 * few)  # takes no room, and counts as room taken
    preflight.check_checkpoints("it", tmp_path, round(1.5 * few), "")


def test_capture_is_refused_again_when_its_first_shard_tells_the_true_ratio(disk: Path):
    """Noise in float32 compresses by 1.08, and 1.18 is planned with."""
    model = tiny(2, hidden_size=64, intermediate_size=128)
    generator = torch.Generator().manual_seed(0)
    blocks = {
        split: torch.randint(64, (n, 64), generator=generator)
        for split, n in (("train", 128), ("validation", 4))
    }
    cfg = replace(CONFIG, store=Store.both, codec=Codec.compact, shard_mb=0.5, chunk_mb=0.25)

    def capture() -> None:
        capture_activations(model, blocks, disk / "captured", cfg=cfg, dtype=torch.float32)

    def committed() -> list[Path]:
        return sorted(disk.rglob("commits/*.json"))

    leave(disk, 1 << 20)
    with pytest.raises(ResourceError) as before:
        capture()
    assert not [p for p in disk.rglob("*") if p.is_file()]
    needed = float(re.search(r"([\d.]+) MB needed", str(before.value))[1]) * 1e6
    assert "half of data.tokens.train" in before.value.remedy
    leave(disk, round(1.02 * needed))
    with pytest.raises(ResourceError, match="no room for the activations"):
        capture()
    assert [p.name for p in committed()] == ["train_00000.json"] * 2
    leave(disk, 64 << 20)
    capture()
    assert len(committed()) > 2
