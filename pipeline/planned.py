"""What a run will cost on this machine, and what of it does not fit.

Sizes come from the model's `config.json` alone (`outline.py`, `cost.py`). Once there is a store,
its own compression ratio is used; a stage's time is that of its last run here, by its work.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from pipeline import artifacts, budget, cost, measured, outline, preflight, sources, volume, workdir
from pipeline.config import Config, Device, select
from pipeline.errors import PipelineError
from pipeline.preflight import size
from pipeline.sizes import Cost, Sizes
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
    ratios = volume.measured_ratios(CAPTURE, cfg.capture.codec, dtype) if _captured(cfg) else {}
    return Sizes(record, shapes, cfg, ratios, on_gpu)


def _captured(cfg: Config) -> bool:
    """Whether the activations that lie here are this model's: another's compress otherwise."""
    try:
        made_with = artifacts.read_manifest(DENSE).get("settings", {})
    except PipelineError:
        return False
    return (
        made_with.get("model.name") == cfg.model.name and made_with.get("model.id") == cfg.model.id
    )


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
            if bool(before.flops) != bool(costs[name].flops):  # then it had another thing to do
                continue
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
