"""How a launcher's jobs share this machine: a GPU's slot each, or as many cores as there are.

Joblib gets as many workers as run beside each other, submitit's local executor, which starts all
jobs at once, as many to a batch; ray counts by itself, and a cluster gives each job its own.
"""

from dataclasses import dataclass, replace

from omegaconf import DictConfig

from pipeline import runtime
from pipeline.config import Config, Device
from pipeline.prefill import gpus
from pipeline.prefill.units import Unit
from pipeline.stages import DENSE

COUNTS = {"joblib": "hydra.launcher.n_jobs", "submitit_local": "hydra.sweeper.max_batch_size"}
"""The setting of a launcher that says how many jobs run at once on this machine."""


@dataclass(frozen=True)
class Share:
    """Units that know what is theirs, and what the launcher is told."""

    units: list[Unit]
    overrides: list[str]


def among(units: list[Unit], launcher: str, told: DictConfig, cfg: Config) -> Share:
    """Share the machine; says how, and warns where bytes will differ from a plain run's.

    Args:
        told: Hydra's configuration, with what the user set of the launcher.
    """
    memory = _memory(units)
    if not units or launcher not in (*COUNTS, "ray"):
        return Share([replace(unit, gpu_bytes=memory) for unit in units], [])
    cores = runtime.cores()
    if launcher == "ray":
        threads, overrides = int(told.launcher.ray.remote.get("num_cpus") or 1), []
        workers = max(1, min(len(units), cores // threads))
    else:
        given = told.launcher.n_jobs if launcher == "joblib" else told.sweeper.max_batch_size
        workers = min(len(units), given if given and given > 0 else _most(units, cfg, memory))
        threads, overrides = max(1, cores // workers), [f"{COUNTS[launcher]}={workers}"]
    runtime.tell("workers", workers, f"{len(units)} units, {cores} cores")
    _warn(cfg, workers, threads, cores)
    return Share([replace(u, threads=threads, gpu_bytes=memory) for u in units], overrides)


def _most(units: list[Unit], cfg: Config, memory: int | None) -> int:
    """The most workers that this machine has room for."""
    found = [] if cfg.runtime.device is Device.cpu else gpus.visible()
    if not found:
        return max(1, runtime.cores() // (cfg.runtime.threads or 1))
    sized = [replace(unit, gpu_bytes=memory) for unit in units]
    return sum(min(gpus.slots(gpu, unit, cfg) for unit in sized) for gpu in found)


def _memory(units: list[Unit]) -> int | None:
    """Bytes of a GPU that the largest layer takes, where several may share one."""
    from pipeline import cost, outline, planned

    most = 0
    for unit in units:
        cfg = unit.cfg()
        if unit.kind == "layer" and cfg.prefill.layers_per_gpu is None:
            sizes = planned.sizes_of(cfg, outline.record_of(cfg, DENSE), on_gpu=True)
            most = max(most, cost.train_layer(sizes, int(unit.what)).gpu)
    return most or None


def _warn(cfg: Config, workers: int, threads: int, cores: int) -> None:
    named = cfg.runtime.threads
    if named is None and threads != cores:
        runtime.warn(
            f"each worker has {threads} of {cores} threads, so that results round otherwise than "
            f"those of a plain run; for the same bytes name runtime.threads={threads} in both"
        )
    elif named and named * workers > cores:
        runtime.warn(f"{workers} workers with runtime.threads={named} are more than {cores} cores")
