"""One GPU per worker, or several layers on one where they fit.

A worker takes a slot, a file lock on (host, GPU, number), before it imports torch, and then sees
that GPU alone. It keeps the slot until it ends: torch, once imported, sees no other. The visible
GPUs are those of CUDA_VISIBLE_DEVICES, which Slurm and ray set for each job, else the machine's;
without any nothing happens.
"""

import fcntl
import os
import socket
import subprocess
import time
from contextlib import suppress
from typing import IO

from pipeline import runtime
from pipeline.config import Config, Device
from pipeline.prefill import ledger
from pipeline.prefill.units import Unit

POLL_S = 0.5
USABLE = 0.9  # of a GPU's memory: the rest is CUDA's own and the allocator's

_taken: tuple[str, IO[bytes]] | None = None
"""The GPU that this process holds, and the lock."""


def visible() -> list[str]:
    """The GPUs that this process may use, by index or identifier."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu.strip() for gpu in named.split(",") if gpu.strip() not in ("", "-1")]
    return _asked("index")


def slots(gpu: str, unit: Unit, cfg: Config) -> int:
    """How many workers run beside each other on a GPU: one for a part of `capture`."""
    if unit.kind == "shards":
        return 1
    if cfg.prefill.layers_per_gpu is not None:
        return cfg.prefill.layers_per_gpu
    memory = _memory(gpu)
    return max(1, int(USABLE * memory // unit.gpu_bytes)) if memory and unit.gpu_bytes else 1


def take(unit: Unit) -> None:
    """Wait for a slot and let this process see its GPU only."""
    global _taken
    cfg = unit.cfg()
    if _taken or cfg.runtime.device is Device.cpu:
        return
    found, told = visible(), False
    while found:
        for gpu, slot in ((gpu, slot) for slot in range(_most(found, unit, cfg)) for gpu in found):
            if slot < slots(gpu, unit, cfg) and (lock := _lock(gpu, slot)):
                _taken = gpu, lock
                os.environ["CUDA_VISIBLE_DEVICES"] = gpu
                runtime.tell("GPU", gpu, f"slot {slot + 1} of {slots(gpu, unit, cfg)} on it")
                return
        if not told:
            runtime.tell("GPU", "waiting", "every slot is taken by another worker")
            told = True
        time.sleep(POLL_S)


def _most(found: list[str], unit: Unit, cfg: Config) -> int:
    return max(slots(gpu, unit, cfg) for gpu in found)


def _lock(gpu: str, slot: int) -> IO[bytes] | None:
    """Of one slot, where it is free. Under Slurm a job counts its GPUs from 0: they are its own."""
    folder = ledger.root() / "gpus"
    folder.mkdir(parents=True, exist_ok=True)
    owner = os.environ.get("SLURM_JOB_ID", "")
    name = f"{socket.gethostname()}-{owner}-{gpu.replace('/', '_')}-{slot}.lock"
    file = (folder / name).open("ab")
    with suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    file.close()
    return None


def _memory(gpu: str) -> int | None:
    """Bytes of a GPU, where the driver tells."""
    lines = _asked("memory.total", f"--id={gpu}")
    return int(lines[0]) * 2**20 if lines and lines[0].isdecimal() else None


def _asked(fields: str, *more: str) -> list[str]:
    """What `nvidia-smi` says, a line for each GPU; nothing where there is none."""
    line = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", *more]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split("\n")[:-1]
