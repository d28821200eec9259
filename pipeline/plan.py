"""What a run will cost, told before any of it is paid: `python -m pipeline plan [key=value ...]`.

For each stage: bytes and files on disk, peak memory of the host and of the GPU, FLOPs and time,
beside what this machine has. Sizes come from the model's `config.json` alone (`outline.py`,
`cost.py`); no weight is read and torch is not imported. Once there is a store, its own compression
ratio is used. Time is that of the last run of the same stage here, by its work; with `--measure`
also a probe of a second: products of matrices and writing, neither of which a stage reaches.
"""

import contextlib
import copy
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from pipeline import (
    artifacts,
    budget,
    compose,
    cost,
    measured,
    outline,
    preflight,
    sources,
    volume,
    workdir,
)
from pipeline.config import Codec, Config, Device, Store, select
from pipeline.cost import Cost, Sizes
from pipeline.errors import PipelineError, ResourceError
from pipeline.preflight import size
from pipeline.stages import BUDGET, CAPTURE, CONVERT, DENSE, EVALUATE, HEAL, TOKENS, TRAIN

OUTPUTS = {
    "dense": DENSE,
    "tokens": TOKENS,
    "capture": CAPTURE,
    "budget": BUDGET,
    "train": TRAIN,
    "heal": HEAL,
    "convert": CONVERT,
    "evaluate": EVALUATE,
}
FOLDERS = 1.5  # entries of the file system per file: its share of folders, twice (see `workdir`)
PROBE_S = 0.4
ENOUGH = 0.97  # of what is needed: a lever that leaves more is not told


@dataclass(frozen=True)
class Free:
    """What the machine has; null = not known, or no limit."""

    disk: int
    files: int | None
    memory: int | None
    gpu: int | None


@dataclass(frozen=True)
class Plan:
    """Of a configuration on this machine."""

    costs: dict[str, Cost]
    there: list[str]  # stages whose output lies there, made with these settings and this code
    free: Free
    seconds: dict[str, float] = field(default_factory=dict)  # of the stages of which it is known
    download: int = 0  # bytes of the dense model that are not in the hub's cache
    apart: int = 0  # bytes that go to capture.store_url

    @property
    def left(self) -> dict[str, Cost]:
        """What is still to be paid."""
        return {name: c for name, c in self.costs.items() if name not in self.there}

    @property
    def disk(self) -> int:
        """Bytes: all that stays, and the most that a stage needs more while it runs."""
        stays = sum(c.bytes + volume.BLOCK * c.files for c in self.left.values())
        return stays + max((c.transient for c in self.left.values()), default=0) + self.download

    @property
    def files(self) -> int:
        return round(FOLDERS * sum(c.files for c in self.left.values()))

    def lacking(self) -> list[str]:
        """What does not fit, in words."""
        found, free = [], self.free
        if self.disk > free.disk:
            found.append(f"disk: {size(self.disk)} needed, {size(free.disk)} free")
        if free.files is not None and self.files > free.files:
            found.append(f"files: {self.files:,} needed, {free.files:,} may be made")
        for kind, most in (("host", free.memory), ("gpu", free.gpu)):
            for name, c in self.left.items():
                if most is not None and getattr(c, kind) > most:
                    what = "memory" if kind == "host" else "GPU memory"
                    found.append(
                        f"{what} of {name}: {size(getattr(c, kind))} needed, {size(most)} free"
                    )
        return found


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


def make(cfg: Config, record: Mapping[str, Any], free: Free | None = None) -> Plan:
    """The plan of `cfg` for the dense model of `record`; raises `ConfigError` as `budget` does.

    Args:
        free: null = what this machine has.
    """
    root = workdir.scratch_root()
    there = _there(cfg)
    if free is None:
        free = Free(
            disk=preflight.free_disk(root),
            files=preflight.free_files(root),
            memory=preflight.free_memory(),
            gpu=None if cfg.runtime.device is Device.cpu else preflight.free_gpu_memory(),
        )
    sizes = replace(sizes_of(cfg, record, on_gpu=free.gpu is not None), card=free.gpu)
    costs = cost.costs(sizes)
    if free.memory is not None:
        costs["convert"] = _fitted(costs["convert"], cost.least_convert(sizes), free.memory)
    seconds, apart = _seconds(costs, root, there), cost.apart_bytes(sizes)
    return Plan(costs, there, free, seconds, _download(cfg, sizes), apart)


def sizes_of(cfg: Config, record: Mapping[str, Any], on_gpu: bool) -> Sizes:
    shapes = budget.shapes(record, cfg.moe, cfg.model.layers)
    dtype = volume.stored_dtype(cfg.capture, record["dtype"])
    ratios = volume.measured_ratios(CAPTURE, cfg.capture.codec, dtype)
    return Sizes(record, shapes, cfg, ratios, on_gpu)


def _fitted(full: Cost, least: int, free: int) -> Cost:
    """A conversion compares logits where that fits, and tensors where not."""
    if full.host <= free:
        return full
    return Cost(**{**asdict(full), "host": min(full.host, least)})


def _there(cfg: Config) -> list[str]:
    """Stages whose published output was made with these settings and this code, in order."""
    found = []
    for name, out in OUTPUTS.items():
        module = import_module(f"pipeline.stages.{name}")
        settings = select(cfg, module.PARAMS)
        folders = [out / f"layer_{k}" for k in cfg.model.layers] if name == "train" else [out]
        for folder in folders:
            try:
                manifest = artifacts.read_manifest(folder)
            except PipelineError:
                return found
            made_with = manifest.get("settings", {})  # a stage may read more than makes its result
            same = made_with == {key: settings.get(key) for key in made_with}
            if not same or manifest.get("code") != sources.code_digest(module.__name__):
                return found
        found.append(name)
    return found


def _download(cfg: Config, sizes: Sizes) -> int:
    if cfg.model.id is None or outline.is_here(cfg.model.id, cfg.model.revision):
        return 0
    return sizes.record["parameters"] * volume.ITEMSIZE[sizes.record["dtype"]]


# Time


def _seconds(costs: Mapping[str, Cost], root: Path, there: list[str]) -> dict[str, float]:
    """By what the same stage took here, and its work then and now."""
    done: dict[str, list[float]] = {}
    for unit, (seconds, then) in measured.read(root).items():
        name, _, layer = unit.partition("-layer_")
        try:
            sizes = sizes_of(then, outline.record_of(then, DENSE, online=False), on_gpu=False)
            before = cost.train_layer(sizes, int(layer)) if layer else cost.costs(sizes)[name]
        except (PipelineError, KeyError):  # of a model that is gone
            continue
        sums = done.setdefault(name, [0.0, 0.0])
        sums[0] += seconds
        sums[1] += before.work
    return {
        name: seconds * costs[name].work / work
        for name, (seconds, work) in done.items()
        if work and name not in there
    }


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


# Levers


def levers(cfg: Config, record: Mapping[str, Any], found: Plan) -> list[str]:
    """What would lower what is lacking, each with what it leaves; first what alone suffices."""
    offers: list[tuple[int, str]] = []
    for text, changed in _changes(cfg, record, found):
        other = make(changed, record, found.free)
        worse, told = other.lacking(), []
        if other.disk < ENOUGH * found.disk > ENOUGH * found.free.disk:
            told.append(f"disk {size(other.disk)}")
        most = found.free.files
        if most is not None and other.files < ENOUGH * found.files > ENOUGH * most:
            told.append(f"{other.files:,} files")
        for kind, free in (("host", found.free.memory), ("gpu", found.free.gpu)):
            for name, c in found.left.items():
                lower = getattr(other.costs[name], kind)
                if free is not None and lower < ENOUGH * getattr(c, kind) > ENOUGH * free:
                    told.append(f"{name} {size(lower)}")
        if told:
            enough = "" if worse else ", which fits"
            offers.append((len(worse), f"{text} ({', '.join(told)}{enough})"))
    return [text for _, text in sorted(offers, key=lambda offer: offer[0])]


def _changes(cfg: Config, record: Mapping[str, Any], found: Plan) -> list[tuple[str, Config]]:
    changes: list[tuple[str, Config]] = []

    def offer(key: str, value: Any, shown: object = None) -> None:
        section, _, name = key.partition(".")
        changed = copy.deepcopy(cfg)
        at = getattr(changed, section)
        if "." in name:
            inner, _, name = name.partition(".")
            at = getattr(at, inner)
        if getattr(at, name) != value:
            setattr(at, name, value)
            changes.append((f"{key}={value if shown is None else shown}", changed))

    if fewer := _tokens_that_fit(cfg, record, found):
        offer("data.tokens.train", fewer)
    offer("capture.store", Store.input, "input")
    if cfg.capture.codec is not Codec.compact:
        offer("capture.codec", Codec.compact, "compact")
    if len(cfg.model.layers) > 1:
        half = cfg.model.layers[: len(cfg.model.layers) // 2]
        offer("model.layers", half, str(half).replace(" ", ""))
    offer("train.static_control", False, "false")
    offer("capture.shard_mb", min(cfg.capture.shard_mb, 16.0))
    offer("train.stream", True, "true")
    for section in ("capture", "heal", "evaluate"):
        offer(f"{section}.batch_size", 1)
    offer("train.batch_size", min(cfg.train.batch_size, 512))
    return changes


def _tokens_that_fit(cfg: Config, record: Mapping[str, Any], found: Plan) -> int | None:
    """The most training tokens, in whole batches, that fit; or that fit the disk at least."""

    def most(fits: Callable[[Plan], bool]) -> int:
        low, high = 0, cfg.data.tokens.train // cfg.train.batch_size
        changed = copy.deepcopy(cfg)
        while high - low > 1:
            middle = (low + high) // 2
            changed.data.tokens.train = middle * cfg.train.batch_size
            enough = fits(make(changed, record, found.free))
            low, high = (middle, high) if enough else (low, middle)
        return low * cfg.train.batch_size

    return most(lambda p: not p.lacking()) or most(lambda p: p.disk <= p.free.disk) or None


# Output


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
