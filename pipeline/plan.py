"""What a run will cost, told before any of it is paid: `python -m pipeline plan [key=value ...]`.

For each stage: bytes and files on disk, peak memory of the host and of the GPU, FLOPs and time,
beside what this machine has (`planned.py`), and what would make it fit (`levers.py`). No weight is
read and torch is not imported; with `--measure` only, a probe of a second tells a lower bound of
the time where no stage was run: products of matrices and writing, neither of which a stage reaches.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline import compose, outline, workdir
from pipeline.config import Config
from pipeline.errors import ResourceError
from pipeline.levers import levers
from pipeline.planned import Plan, make
from pipeline.preflight import size
from pipeline.stages import DENSE

PROBE_S = 0.4


def main(overrides: list[str], as_json: bool, measure: bool) -> None:
    """Print the plan; raises `ResourceError` where it does not fit, with every lever's number."""
    cfg = compose.load(overrides)
    record = outline.record_of(cfg, DENSE)
    found = make(cfg, record)
    if measure:
        found.seconds.update(_probed(found, cfg))
    lacking = found.lacking()
    offers = levers(cfg, record, found) if lacking else []
    if as_json:
        print(json.dumps(_plain(found, offers), indent=1, sort_keys=True))
    else:
        _show(found, cfg, record, measure)
    if lacking:
        raise ResourceError(
            "This does not fit the machine.",
            value="; ".join(lacking),
            rule="every stage fits the disk, the files and the memory that are free at "
            f"{workdir.scratch_root().absolute()}",
            remedy="; ".join(offers) or "use a larger machine or a smaller model",
        )


def _plain(found: Plan, offers: list[str]) -> dict[str, Any]:
    return {
        "stages": {
            name: {**asdict(c), "there": name in found.there, "seconds": found.seconds.get(name)}
            for name, c in found.costs.items()
        },
        "need": {
            "disk": found.disk,
            "files": found.files,
            "download": found.download,
            "object_store": found.apart,
        },
        "free": asdict(found.free),
        "fits": not found.lacking(),
        "lacking": found.lacking(),
        "levers": offers,
    }


def _show(found: Plan, cfg: Config, record: Mapping[str, Any], measured_now: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    gpu = found.free.gpu is not None
    table = Table(
        title=f"{cfg.model.name}: {record['parameters']:,} parameters", title_justify="left"
    )
    table.add_column("stage")
    for name in ("stays", "while it runs", "files", "memory", *["GPU"] * gpu, "FLOPs", "time"):
        table.add_column(name, justify="right")
    for name, c in found.costs.items():
        cells = [size(c.bytes), f"+ {size(c.transient)}" if c.transient else "", f"{c.files:,}"]
        cells += [size(c.host), *[size(c.gpu)] * gpu, f"{c.flops:.1e}" if c.flops else ""]
        cells += ["there" if name in found.there else _duration(found.seconds.get(name))]
        table.add_row(name, *cells)
    free = found.free
    cells = [
        size(found.disk),
        "",
        f"{found.files:,}",
        size(max((c.host for c in found.left.values()), default=0)),
    ]
    table.add_section()
    table.add_row("needed", *cells)
    limit = "no limit" if free.files is None else f"{free.files:,}"
    memory = "not known" if free.memory is None else size(free.memory)
    table.add_row("free", size(free.disk), "", limit, memory, *[size(free.gpu or 0)] * gpu)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if found.download:
        print(f"the dense model is not in the hub's cache: {size(found.download)} to download")
    if found.apart:
        print(f"capture.store_url takes {size(found.apart)} of shards, which take no disk here")
    if found.seconds:
        how = "by the last run of each stage here, at its work"
        how += "; where none was, a lower bound by a probe" * measured_now
        print(f"time: {how}")
    else:
        print("time: nothing has run here yet; --measure probes this machine")
    known = [found.seconds[name] for name in found.left if name in found.seconds]
    total = f", {_duration(sum(known))}" if len(known) == len(found.left) and known else ""
    if not found.lacking():
        print(f"It fits: {size(found.disk)} to write of {size(free.disk)} free{total}.")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 1 else "< 1 s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


# A probe


def _probed(found: Plan, cfg: Config) -> dict[str, float]:
    """A lower bound of the stages of which nothing was measured."""
    with contextlib.redirect_stdout(sys.stderr):  # what `runtime` tells
        flops, bytes_ = _matmul_rate(cfg), _write_rate(workdir.scratch_root())
    print(f"probe: {flops / 1e9:,.0f} GFLOP/s, {size(bytes_)}/s written", file=sys.stderr)
    return {
        name: c.flops / flops + c.bytes / bytes_
        for name, c in found.left.items()
        if name not in found.seconds
    }


def _matmul_rate(cfg: Config) -> float:
    """FLOPs per second of square products, in the dtype that training would take."""
    from pipeline import runtime

    runtime.configure(cfg.runtime)
    import torch

    device = runtime.pick_device(cfg.runtime)
    dtype = runtime.pick_dtype(cfg.train.dtype, device)
    n = 4096 if device.type == "cuda" else 1024
    a = torch.ones(n, n, dtype=dtype, device=device)
    float((a @ a)[0, 0])
    began, done = time.monotonic(), 0
    while time.monotonic() - began < PROBE_S:
        float((a @ a)[0, 0])  # waits for the device
        done += 1
    return done * 2 * n**3 / (time.monotonic() - began)


def _write_rate(root: Path) -> float:
    """Bytes per second that reach the disk below `root`."""
    root.mkdir(parents=True, exist_ok=True)
    block = os.urandom(1 << 24)
    began, done = time.monotonic(), 0
    with tempfile.TemporaryFile(dir=root) as file:
        while done < 16 * len(block) and time.monotonic() - began < PROBE_S:
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            done += len(block)
    return done / (time.monotonic() - began)
