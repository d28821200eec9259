"""How a run uses its machine: threads, device, dtype and progress; each choice with its reason.

Nothing here decides what is computed beyond rounding, and no choice rests on a timed probe.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pipeline.config import Device, Dtype, RuntimeConfig
from pipeline.errors import ResourceError

if TYPE_CHECKING:
    import torch

Progress = Callable[[int, int, str], None]
"""Called with (done, total, note)."""

PLAIN_INTERVAL_S = 5.0


def silent(done: int, total: int, note: str = "") -> None:
    """The progress of a call that nobody watches."""


def warn(text: str) -> None:
    """Say what a run goes on with and its user should know."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def configure(cfg: RuntimeConfig) -> None:
    """Set up threads and other libraries' bars before torch is imported.

    OpenMP's threads spin while they wait; on shared cores that made a small Llama's step 6 times
    slower (2.5 s against 0.4 s), so they are told to sleep.
    """
    threads = str(cfg.threads or len(os.sched_getaffinity(0)))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ["OMP_NUM_THREADS"] = threads
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not sys.stderr.isatty():  # other libraries' live bars are noise in a log
        os.environ.setdefault("TQDM_DISABLE", "1")


def pick_device(cfg: RuntimeConfig) -> "torch.device":
    """The device of this run; raises `ResourceError` when the configured one is missing."""
    import torch

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
    print(f"device: {device.type}, {name} ({reason or 'no CUDA device'})", flush=True)
    return device


def pick_dtype(dtype: Dtype, device: "torch.device") -> "torch.dtype":
    """The dtype of matrix products; auto takes bfloat16 where the hardware multiplies it fast."""
    import torch

    if dtype is not Dtype.auto:
        chosen, reason = getattr(torch, dtype.name), "configured"
    elif device.type == "cuda" or has_bf16_units():
        chosen, reason = torch.bfloat16, "the hardware has bf16 matrix units"
    else:
        chosen, reason = torch.float32, "the CPU has no bf16 matrix units"
    print(f"dtype: {str(chosen).removeprefix('torch.')} ({reason})", flush=True)
    return chosen


def has_bf16_units() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware (AMX), by its feature flags."""
    import torch

    return bool(torch.cpu._is_amx_tile_supported())


@contextlib.contextmanager
def progress(title: str, unit: str = "steps") -> Iterator[Progress]:
    """One live line on a terminal, a plain line every few seconds elsewhere.

    Rate and remaining time come from this run's own work: what was done before the first call
    (adopted or resumed) counts towards neither.
    """
    with _live(title, unit) if sys.stderr.isatty() else _plain(title, unit) as show:
        first: tuple[float, int] | None = None

        def report(done: int, total: int, note: str = "") -> None:
            nonlocal first
            now = time.monotonic()
            first = first or (now, done)
            own, elapsed = done - first[1], now - first[0]
            show(done, total, note, own / elapsed if own and elapsed else None)

        yield report


@contextlib.contextmanager
def _live(title: str, unit: str) -> Iterator[Callable[[int, int, str, float | None], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None, note="")

        def show(done: int, total: int, note: str, rate: float | None) -> None:
            bar.update(
                task, completed=done, total=total, note=_pace(done, total, unit, rate) + note
            )

        yield show


@contextlib.contextmanager
def _plain(title: str, unit: str) -> Iterator[Callable[[int, int, str, float | None], None]]:
    shown = 0.0

    def show(done: int, total: int, note: str, rate: float | None) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < PLAIN_INTERVAL_S and done < total:
            return
        shown = now
        line = f"{title}: {done}/{total} {_pace(done, total, unit, rate)}{note}"
        print(line.rstrip(), file=sys.stderr, flush=True)

    yield show


def _pace(done: int, total: int, unit: str, rate: float | None) -> str:
    if rate is None:
        return f"{unit}  "
    left = f", {(total - done) / rate:,.0f} s left" if done < total else ""
    return f"{unit}, {rate:,.{0 if rate >= 10 else 1}f}/s{left}  "
