"""How a run uses its machine: threads, memory, device and dtype; each choice with its reason.

Nothing here decides what is computed beyond rounding, and no choice rests on a timed probe.
"""

import ctypes
import functools
import math
import os
import sys
from typing import TYPE_CHECKING

from pipeline import cgroups, loggers
from pipeline.config import Device, Dtype, RuntimeConfig
from pipeline.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    import torch

OWN_CALLS = {"HF_HUB_DISABLE_TELEMETRY": "1", "DVC_NO_ANALYTICS": "1", "DO_NOT_TRACK": "1"}
OWN_CALLS["ITERATIVE_DO_NOT_TRACK"] = "1"  # DVC and DVCLive
OWN_CALLS["RAY_USAGE_STATS_ENABLED"] = "0"

SPINS = "10000"
KEPT_BYTES = 1 << 30
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
MKL_FUNCTIONS = ("acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp", "log", "log10")
MKL_FUNCTIONS += ("log2", "sin", "sqrt", "tan", "tanh", "trunc")  # torch's ATen/cpu/vml.h


def warn(text: str) -> None:
    """Say what a run goes on with and its user should know."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def tell(name: str, value: object, reason: str) -> None:
    """Say what was chosen for this run, and why."""
    print(f"{name}: {value} ({reason})", flush=True)


def keep_private() -> None:
    """Keep libraries from reporting home, where the user has not said otherwise."""
    for name, value in OWN_CALLS.items():
        os.environ.setdefault(name, value)


def check_platform() -> None:
    """Refuse what this does not run on; raises `ConfigError`."""
    if sys.platform == "win32":
        raise ConfigError(
            "Windows itself is not supported.",
            value=f"{sys.platform}, Python {sys.version.split()[0]}",
            rule="Linux or macOS: locks, hard links and renames as POSIX has them",
            remedy="run it in WSL 2 (`wsl --install`), in a folder of the Linux file system",
        )


def cores() -> int:
    """The cores that this process may use; a container's share of time is rounded up to some."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    found = len(affinity(0)) if affinity else os.cpu_count() or 1
    share = cgroups.cores()
    return found if share is None else max(1, min(found, math.ceil(share)))


def configure(cfg: RuntimeConfig, why: str = "configured") -> None:
    """Set up threads and other libraries' bars before torch is imported; raises `ConfigError`.

    `why` is the reason for `cfg.threads`, where it has a value.

    OpenMP's threads spin while they wait; on shared cores that made a small Llama's step 6 times
    slower (2.5 s against 0.4 s), so they are told to sleep. But not at once: two threads that wake
    for each small product trained the embedded model at half the speed of one. Half a millisecond
    of spinning doubles that; beside two other jobs on the same two cores it cost a fifth or more.

    torch asks Linux for huge pages under large tensors: rows of 6 kB are gathered in 0.8 of the
    time, a layer's training step takes 0.85 to 0.9 of it.
    """
    loggers.check(cfg.logger)
    threads = str(cfg.threads or cores())
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ["OMP_NUM_THREADS"] = threads
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    keep_private()
    reuse_freed_memory()
    if not sys.stderr.isatty():  # other libraries' live bars are noise in a log
        os.environ.setdefault("TQDM_DISABLE", "1")
    tell("threads", threads, why if cfg.threads else "every core that it may use")


def reuse_freed_memory() -> bool:
    """Let malloc keep what is freed, up to `KEPT_BYTES`, for the next tensor; whether it can.

    glibc takes fresh pages from the system for every large tensor, and touching them costs as much
    as computing in them: a bf16 step of 16 experts took 1.2 times as long without, a dense FFN of
    equal active FLOPs no longer. Such steps then held 1.4 GB where they had held 1.3. Other C
    libraries have no such call.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return all([mallopt(M_MMAP_THRESHOLD, KEPT_BYTES), mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)])


def pick_device(cfg: RuntimeConfig) -> "torch.device":
    """The device of this run; raises `ResourceError` when the configured one is missing."""
    import torch

    settle_kernels()
    available = torch.cuda.is_available()
    if cfg.device is Device.cuda and not available:
        raise ResourceError(
            "There is no CUDA device.",
            value="runtime.device=cuda",
            rule="torch must see a GPU",
            remedy="use runtime.device=auto, or install a CUDA build of torch",
        )
    use_cuda = available and cfg.device is not Device.cpu
    reason = "configured" if cfg.device is not Device.auto else "CUDA is available" * available
    name = torch.cuda.get_device_name() if use_cuda else f"{torch.get_num_threads()} threads"
    device = torch.device("cuda" if use_cuda else "cpu")
    tell("device", f"{device.type}, {name}", reason or "no CUDA device")
    return device


@functools.cache
def settle_kernels() -> None:
    """Let MKL choose the kernels of its functions, once, before two threads share a tensor.

    It chooses a function's kernel when that is first called. Where two threads are the first,
    MKL before 2025.0 now and then gives one of them, for its share of that one tensor, a kernel of
    low accuracy: cosines of rotary positions were wrong by 1.5e-4, and a capture now and then was
    not what the others were (https://github.com/pytorch/pytorch/issues/188792).
    """
    import torch

    if torch.backends.mkl.is_available():
        for dtype in (torch.float32, torch.float64):
            one = torch.full((1,), 0.5, dtype=dtype)
            for name in MKL_FUNCTIONS:
                getattr(torch, name)(one)


def pick_dtype(dtype: Dtype, device: "torch.device") -> "torch.dtype":
    """The dtype of matrix products; auto takes bfloat16 where the hardware multiplies it fast."""
    import torch

    if dtype is not Dtype.auto:
        chosen, reason = getattr(torch, dtype.name), "configured"
    elif device.type == "cuda" or has_bf16_units():
        chosen, reason = torch.bfloat16, "the hardware has bf16 matrix units"
    else:
        chosen, reason = torch.float32, "the CPU has no bf16 matrix units"
    tell("dtype", str(chosen).removeprefix("torch."), reason)
    return chosen


def loss_scaler(device: "torch.device", dtype: "torch.dtype") -> "torch.amp.GradScaler":
    """Keeps the gradients of products in float16 from vanishing; does nothing in other dtypes."""
    import torch

    return torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)


def has_bf16_units() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware (AMX), by its feature flags."""
    import torch

    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)  # not in every build
    return bool(supported and supported())


def emulates_bf16() -> bool:
    """Whether torch multiplies bf16 matrices on this CPU without its vector units.

    By feature flags, as torch decides it. On two cores with AVX2 such a product of 1024 x 1024
    took 400 times the float32 one's time.
    """
    import torch

    if not torch.backends.mkldnn.is_available():
        return True
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def warn_of_emulation(dtype: "torch.dtype", device: "torch.device") -> None:
    """Say so where a model in bfloat16 will be far slower than it need be."""
    import torch

    if device.type == "cpu" and dtype is torch.bfloat16 and emulates_bf16():
        warn(
            "this CPU has no bf16 instructions, and the model is in bfloat16: its matrix products "
            "take hundreds of times those of float32; model.dtype=float32 computes the same model"
        )
