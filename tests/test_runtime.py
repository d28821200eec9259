"""What a run takes of its machine, and what it says while it works."""

import os
import subprocess
import sys

import pytest
import torch

from pipeline import runtime
from pipeline.config import Device, Dtype, RuntimeConfig
from pipeline.errors import ResourceError


@pytest.mark.parametrize("threads", [1, 2])
def test_configure_sets_the_threads_of_torch(threads: int):
    code = (
        "from pipeline import runtime\n"
        "from pipeline.config import RuntimeConfig\n"
        f"runtime.configure(RuntimeConfig(threads={threads}))\n"
        "import os, torch\n"
        "print(torch.get_num_threads(), os.environ['OMP_WAIT_POLICY'], os.environ['TQDM_DISABLE'])"
    )
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "TQDM_DISABLE")
    inherited = {k: v for k, v in os.environ.items() if k not in names}
    done = subprocess.run(
        [sys.executable, "-c", code], env=inherited, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(min(threads, os.cpu_count() or 1)), "PASSIVE", "1"]


def test_a_missing_gpu_is_refused_when_it_was_asked_for():
    if torch.cuda.is_available():
        assert runtime.pick_device(RuntimeConfig(device=Device.cuda)).type == "cuda"
        return
    with pytest.raises(ResourceError, match=r"runtime\.device=auto"):
        runtime.pick_device(RuntimeConfig(device=Device.cuda))


def test_the_device_is_told_with_its_reason(capsys: pytest.CaptureFixture[str]):
    assert runtime.pick_device(RuntimeConfig(device=Device.cpu)).type == "cpu"
    assert "device: cpu" in (said := capsys.readouterr().out) and "(configured)" in said


def test_auto_takes_bfloat16_only_where_the_cpu_has_units_for_it(
    capsys: pytest.CaptureFixture[str],
):
    chosen = runtime.pick_dtype(Dtype.auto, torch.device("cpu"))
    assert chosen is (torch.bfloat16 if runtime.has_bf16_units() else torch.float32)
    assert "bf16 matrix units" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_configured_dtype_is_taken(dtype: str):
    assert runtime.pick_dtype(Dtype[dtype], torch.device("cpu")) is getattr(torch, dtype)


def test_progress_off_a_terminal_is_plain_lines_of_this_runs_own_pace(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """900 of 1,000 were adopted: 50 in 10 s is 5/s, and the other 50 take 10 s more."""
    seconds = iter([0.0, 0.0, 10.0, 10.0, 20.0, 20.0])
    monkeypatch.setattr(runtime.time, "monotonic", lambda: next(seconds))
    with runtime.progress("capture", "tokens") as progress:
        for done in (900, 950, 1000):
            progress(done, 1000, "train")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "capture: 950/1000 tokens, 5.0/s, 10 s left  train",
        "capture: 1000/1000 tokens, 5.0/s  train",
    ]
