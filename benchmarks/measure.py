"""Figures measured side by side: ways take turns, and ratios are taken within each turn.

A benchmark is a module with `rows(quick)`, which yields `Row`s. `python -m benchmarks` runs each by
`main`, in a process of its own, where threads are set up before torch is imported.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from pipeline import runtime
from pipeline.config import RuntimeConfig

if TYPE_CHECKING:
    import torch

repeats = 5
"""Of every way; one where it is only asked whether a benchmark runs."""


@dataclass(frozen=True)
class Row:
    """One line of the table: `ratio` is the median of ours / reference over the turns."""

    what: str
    size: str
    unit: str  # of ours and reference
    ours: float
    reference: float
    ratio: float
    spread: tuple[float, float]  # least and most of the ratios
    reach: str = ""  # the goal, as a comparison of the ratio: "<= 1.15"; empty where there is none

    @property
    def reached(self) -> bool | None:
        if not self.reach:
            return None
        sign, goal = self.reach.split()
        return self.ratio <= float(goal) if sign == "<=" else self.ratio >= float(goal)


def turns(
    ways: Mapping[str, Callable[[], object]],
    times: int | None = None,
    warm_ups: int = 1,
    before: Callable[[str], object] = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds of each way in each of `times` turns; in every turn another one begins.

    `before` is called with a way's name each time before it runs, and takes none of its time.
    Garbage is collected before it too: what the libraries left is set aside for that, or each
    collection takes longer than many a way.
    """
    names = list(ways)
    for name in names * (warm_ups if repeats > 1 else 0):
        before(name)
        ways[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.freeze()
    for turn in range(times or repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            before(name)
            gc.collect()
            began = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - began)
    gc.unfreeze()
    return seconds


def compare(
    what: str,
    ours: Sequence[float],
    reference: Sequence[float],
    *,
    size: str = "",
    unit: str = "s",
    work: float | None = None,
    reach: str = "",
) -> Row:
    """A row of two ways' seconds; with `work`, of their rates (`work` per second) instead."""
    if work is not None:
        ours, reference = [work / s for s in ours], [work / s for s in reference]
    ratios = [a / b for a, b in zip(ours, reference, strict=True)]
    return Row(
        what=what,
        size=size,
        unit=unit,
        ours=statistics.median(ours),
        reference=statistics.median(reference),
        ratio=statistics.median(ratios),
        spread=(min(ratios), max(ratios)),
        reach=reach,
    )


def precisions() -> "list[torch.dtype]":
    """float32, and bfloat16 where torch does not emulate its products, hundreds of times slower."""
    import torch

    return [torch.float32] if runtime.emulates_bf16() else [torch.float32, torch.bfloat16]


def peak_bytes() -> int:
    """The most memory that this process had.

    Not `ru_maxrss`, which begins with what the parent had when it was forked.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes, on macOS


def machine() -> str:
    """What the figures hold for, in words; without importing torch."""
    flags = _cpu_flags()
    names = {
        "avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "avx512_bf16", "amx_tile": "AMX",
    }  # fmt: skip
    has = [word for flag, word in names.items() if flag in flags]
    threads = os.environ.get("OMP_NUM_THREADS", "?")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    vectors = ", ".join(has) or "no vector units known here"
    built = f"torch {version('torch')}"
    return f"{platform.machine()}, {vectors}; {cores} cores, {threads} threads; {built}"


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith("flags") for flag in line.split()}


def show(rows: Iterable[Mapping[str, Any]], title: str = "") -> None:
    """Print the table of rows as `save` keeps them."""
    table = Table(title=title or None, title_justify="left")
    for name in ("what", "size", "ours", "reference", "ratio (least-most)", "reach"):
        table.add_column(name, justify="left" if name in ("what", "size") else "right")
    for row in rows:
        low, high = row["spread"]
        mark = {True: " ok", False: " -", None: ""}[row["reached"]]
        table.add_row(
            row["what"],
            row["size"],
            f"{row['ours']:.3g} {row['unit']}",
            f"{row['reference']:.3g} {row['unit']}",
            f"{row['ratio']:.2f} ({low:.2f}-{high:.2f})",
            f"{row['reach']}{mark}",
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def described(row: Row, command: str) -> dict[str, Any]:
    """A row as it is written: with what made it."""
    digits = {n: float(f"{v:.4g}") for n, v in asdict(row).items() if isinstance(v, float)}
    spread = [float(f"{v:.4g}") for v in row.spread]
    return asdict(row) | digits | {
        "spread": spread, "reached": row.reached, "command": command, "machine": machine(),
    }  # fmt: skip


def _next(rows: Iterator[Row]) -> Row | None:
    with contextlib.redirect_stdout(io.StringIO()):  # what stages say of their choices
        return next(rows, None)


def main() -> None:
    from benchmarks import measure  # that of the benchmarks, not the one that runs as a program

    parser = argparse.ArgumentParser(prog="python -m benchmarks.measure", description=__doc__)
    parser.add_argument("name", help="a module of benchmarks/ with `rows`")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs")
    parser.add_argument("--threads", type=int, help="of torch (default: every core)")
    parser.add_argument("--output", type=Path, help="a JSON file for the rows")
    args = parser.parse_args()
    runtime.configure(RuntimeConfig(threads=args.threads))
    if args.quick:
        measure.repeats = 1
    found = []
    rows = import_module(f"benchmarks.{args.name}").rows(args.quick)
    while row := _next(rows):
        found.append(described(row, f"python -m benchmarks {args.name}"))
        print(f"{row.what}, {row.size}: {row.ratio:.2f}", file=sys.stderr, flush=True)
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    else:
        show(found, title=machine())


if __name__ == "__main__":
    main()
