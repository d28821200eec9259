"""What a run takes of its machine, and what it says while it works."""

import contextlib
import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import test_capture
import torch

import pipeline
from pipeline import cgroups, preflight, runtime
from pipeline.config import Device, Dtype, MoEConfig, RuntimeConfig, TrainConfig
from pipeline.discovery import find_ffns
from pipeline.errors import ArtifactError, ConfigError, ResourceError


@pytest.mark.parametrize("threads", [1, 2])
def test_configure_sets_the_threads_of_torch(threads: int):
    code = (
        "from pipeline import runtime\n"
        "from pipeline.config import RuntimeConfig\n"
        f"runtime.configure(RuntimeConfig(threads={threads}))\n"
        "import os, torch\n"
        "names = ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'THP_MEM_ALLOC_ENABLE', 'TQDM_DISABLE')\n"
        "print(torch.get_num_threads(), *map(os.environ.get, names))"
    )
    names = (
        "OMP_NUM_THREADS",
        "OMP_WAIT_POLICY",
        "GOMP_SPINCOUNT",
        "THP_MEM_ALLOC_ENABLE",
        "TQDM_DISABLE",
    )
    inherited = {k: v for k, v in os.environ.items() if k not in names}
    done = subprocess.run(
        [sys.executable, "-c", code], env=inherited, capture_output=True, text=True, check=True
    )
    told, set_ = done.stdout.splitlines()
    assert told == f"threads: {threads} (configured)"
    assert set_.split() == [str(min(threads, os.cpu_count() or 1)), "PASSIVE", "10000", "1", "1"]


def test_freed_memory_stays_for_the_next_tensor_where_the_c_library_is_glibc():
    """150 MB are freed and stay resident; by default they go back to the system."""
    code = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from pipeline import runtime\n"
        "able = runtime.reuse_freed_memory() if sys.argv[1] == 'yes' else None\n"
        "resident = lambda: int(Path('/proc/self/statm').read_text().split()[1]) * 4096\n"
        "before = resident()\n"
        "torch.ones(50, 1 << 20, dtype=torch.float32).sum()\n"
        "print(able, (resident() - before) >> 20)"
    )
    if sys.platform != "linux":
        pytest.skip("asks /proc")
    kept = {}
    for word in ("yes", "no"):
        command = [sys.executable, "-c", code, word]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        able, megabytes = done.stdout.split()
        if able == "False":
            pytest.skip("not glibc")
        kept[word] = int(megabytes)
    assert kept["yes"] > 150 > 50 > kept["no"]


def test_libraries_report_nothing_home_unless_the_user_wants_it():
    code = (
        "import os, sys\n"
        "from pipeline import runtime\n"
        "from pipeline.config import RuntimeConfig\n"
        "runtime.configure(RuntimeConfig())\n"
        "from huggingface_hub import constants\n"
        "print(constants.HF_HUB_DISABLE_TELEMETRY, os.environ['DVC_NO_ANALYTICS'])"
    )
    for own, wanted in (({}, "True 1"), ({"HF_HUB_DISABLE_TELEMETRY": "0"}, "False 1")):
        inherited = {k: v for k, v in os.environ.items() if k not in runtime.OWN_CALLS}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=inherited | own | {"DO_NOT_TRACK": "0"} if own else inherited,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.splitlines()[-1] == wanted


def test_without_the_calls_of_linux_the_machine_is_asked_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """As on macOS: no affinity, no AMX query in torch, no /proc."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    for module in (preflight, cgroups):
        monkeypatch.setattr(module, "Path", lambda name: tmp_path / name.lstrip("/"))
    assert runtime.cores() == os.cpu_count()
    assert runtime.has_bf16_units() is False
    assert preflight.free_memory() is None


def test_windows_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch):
    runtime.check_platform()
    monkeypatch.setattr(sys, "platform", "darwin")
    runtime.check_platform()
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(ConfigError, match="WSL"):
        runtime.check_platform()


def test_a_missing_gpu_is_refused_when_it_was_asked_for():
    if torch.cuda.is_available():
        assert runtime.pick_device(RuntimeConfig(device=Device.cuda)).type == "cuda"
        return
    with pytest.raises(ResourceError, match=r"runtime\.device=auto"):
        runtime.pick_device(RuntimeConfig(device=Device.cuda))


def test_the_device_is_told_with_its_reason(capsys: pytest.CaptureFixture[str]):
    assert runtime.pick_device(RuntimeConfig(device=Device.cpu)).type == "cpu"
    assert "device: cpu" in (said := capsys.readouterr().out) and "(configured)" in said


def test_every_function_that_torch_takes_from_mkl_is_settled(monkeypatch: pytest.MonkeyPatch):
    """By what its library exports: `vmsCos` is MKL's cosine of float32, `vmdLn` its logarithm."""
    if not torch.backends.mkl.is_available() or sys.platform != "linux":
        pytest.skip("asks the MKL in torch's build for Linux")
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libtorch_cpu.so"))
    spelt = {"log": "Ln", "erfinv": "ErfInv", "lgamma": "LGamma"}
    names = [n for n in torch.__all__ + dir(torch) if n.islower() and not n.startswith("_")]
    linked = {n for n in names if hasattr(library, f"vms{spelt.get(n, n.capitalize())}")}
    assert linked == set(runtime.MKL_FUNCTIONS)

    called: list[tuple[str, torch.dtype, int]] = []
    for name in linked:
        function = getattr(torch, name)

        def call(x: torch.Tensor, name: str = name, function: Any = function) -> torch.Tensor:
            called.append((name, x.dtype, x.numel()))
            return function(x)

        monkeypatch.setattr(torch, name, call)
    runtime.settle_kernels.cache_clear()
    runtime.pick_device(RuntimeConfig(device=Device.cpu))
    kinds = (torch.float32, torch.float64)
    assert sorted(called, key=str) == sorted(((n, k, 1) for n in linked for k in kinds), key=str)
    runtime.settle_kernels()
    assert len(called) == 2 * len(linked), "once in a process"


def test_functions_for_notebooks_and_the_search_for_ffns_settle_kernels_too(tmp_path: Path):
    """They are called without a stage, and may be the first to compute."""
    model, blocks = test_capture.tiny(), test_capture.blocks()
    calls = {
        "find_ffns": lambda: find_ffns(model),
        "capture_activations": lambda: pipeline.capture_activations(
            model, blocks, tmp_path / "capture", cfg=test_capture.CONFIG
        ),
        "train_layer": lambda: pipeline.train_layer(
            tmp_path, {"layer": 0}, tmp_path, moe_cfg=MoEConfig(), cfg=TrainConfig()
        ),
        "evaluate": lambda: pipeline.evaluate(tmp_path, tmp_path, [0]),
    }
    for name, call in calls.items():
        runtime.settle_kernels.cache_clear()
        with contextlib.suppress(ArtifactError):  # nothing lies there
            call()
        assert runtime.settle_kernels.cache_info().misses == 1, name


def test_auto_takes_bfloat16_only_where_the_cpu_has_units_for_it(
    capsys: pytest.CaptureFixture[str],
):
    chosen = runtime.pick_dtype(Dtype.auto, torch.device("cpu"))
    assert chosen is (torch.bfloat16 if runtime.has_bf16_units() else torch.float32)
    assert "bf16 matrix units" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_configured_dtype_is_taken(dtype: str):
    assert runtime.pick_dtype(Dtype[dtype], torch.device("cpu")) is getattr(torch, dtype)


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_bfloat16_model_on_a_cpu_that_emulates_it_is_warned_of(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flag: bool,
    dtype: torch.dtype,
):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: flag)
    runtime.warn_of_emulation(dtype, torch.device("cpu"))
    told = capsys.readouterr().err
    assert ("model.dtype=float32" in told) == (not flag and dtype is torch.bfloat16)
    runtime.warn_of_emulation(dtype, torch.device("meta"))  # another device's own matter
    assert not capsys.readouterr().err
