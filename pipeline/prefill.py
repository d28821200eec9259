"""Fit layers ahead of `dvc repro`, many at a time, on this machine or on a cluster.

Each job computes one layer into `.scratch` under its fingerprint and publishes nothing; the next
`dvc repro`, or `dvc exp run -S` with the same overrides, finds it done and only publishes it.
Hydra's launchers start the jobs: nothing of ours schedules, queues or retries, and no job calls
`dvc`. The capture must lie there, made with the same settings.

With `train.window` the layers depend on each other and are fitted here one after the other: see
`windows.py`.
"""

import hashlib
import os
import shutil
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from pipeline import compose, console, lineage, progress, refusals, runtime, workdir
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.stages import CAPTURE, DENSE, TOKENS, budget, train


def main(arguments: list[str]) -> None:
    """Run Hydra on `conf/prefill.yaml`; raises what a job raised, when all of them have ended."""
    import hydra

    cfg = _check(arguments)
    if cfg.train.window is not None:
        return fit_windows(cfg)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # a refusal comes through as it is
    sys.argv = ["python -m pipeline prefill", *arguments]
    conf = str(compose.CONF.absolute())
    hydra.main(version_base="1.3", config_path=conf, config_name="prefill")(fit)()


def _check(arguments: list[str]) -> Config:
    """Refuse what no job could use, before Hydra starts any; what one without sweeps is."""
    overrides = [a for a in arguments if not a.startswith("-")]
    parsed = refusals.parsed(overrides, compose.CONF).values()
    single = [o.input_line for o in parsed if o.input_line and not o.is_sweep_override()]
    kept = [line for line in single if not line.lstrip("+~").startswith(("layer=", "hydra"))]
    cfg = compose.checked(compose.compose(kept))
    windows, layer = cfg.train.window is not None, any(o.startswith("layer=") for o in overrides)
    if windows and (layer or len(single) < len(overrides)):
        raise ConfigError(
            "Layers in windows are not fitted at once.",
            value=" ".join(arguments),
            rule="with train.window prefill fits all layers, one window after the other",
            remedy="leave out -m, layer= and sweeps",
        )
    if not windows and not layer:
        raise ConfigError(
            "It is not said which layers to fit.",
            value=" ".join(arguments) or "no arguments",
            rule="layer=K, or -m layer=K,L,... for several",
            remedy="add -m layer=0,1,2,3 hydra/launcher=joblib",
        )
    return cfg


def fit(composed: DictConfig) -> None:
    """One job: fit `layer` by the rest of the configuration."""
    rest = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "layer"])
    cfg = compose.checked(rest)
    _check_capture(cfg)
    with console.kept(f"prefill_{composed.layer}"):
        runtime.configure(cfg.runtime)
        plans = budget.run(cfg, published=False)
        work: Path = train.run(cfg, composed.layer, plans, published=False)
        print(f"layer {composed.layer}: complete in {work}", flush=True)


def fit_windows(cfg: Config) -> None:
    """Fit every layer, each window behind the ones before it."""
    assert cfg.train.window is not None
    _check_capture(cfg)
    runtime.configure(cfg.runtime)
    plans, layers = budget.run(cfg, published=False), sorted(cfg.model.layers)
    done: dict[int, Path] = {}
    for first in range(0, len(layers), cfg.train.window):
        window, earlier = layers[first : first + cfg.train.window], dict(done)
        for k in window:
            behind = partial(_capture_behind, cfg, earlier, window, k)
            done[k] = train.run(cfg, k, plans, published=False, behind=behind)
            print(f"layer {k}: complete in {done[k]}", flush=True)
    shutil.rmtree(_windows(), ignore_errors=True)


def _windows() -> Path:
    return workdir.scratch_root() / "windows"


def _capture_behind(
    cfg: Config, earlier: Mapping[int, Path], window: list[int], layer: int, static: bool
) -> tuple[Path, dict[str, str]]:
    """The store of `layer` behind the earlier layers, or behind their static controls."""
    from pipeline import capture, corpus, dense, record, windows
    from pipeline.controls import STATIC
    from pipeline.layers import load_layer
    from pipeline.record import WEIGHTS

    folders = {k: path / STATIC if static else path for k, path in earlier.items()}
    digests = {str(k): workdir.file_digest(path / WEIGHTS) for k, path in folders.items()}
    source, revision = record.source(cfg.model, DENSE)
    model = dense.load_model(
        source,
        revision=revision,
        dtype=cfg.model.dtype.name,
        device=runtime.pick_device(cfg.runtime),
        device_map=cfg.model.device_map,
        trust_remote_code=cfg.model.trust_remote_code,
    )
    # A name for what the rows depend on: a rerun goes on from its shards.
    name = hashlib.sha256("".join(digests.values()).encode()).hexdigest()[:16]
    folder = _windows() / f"layer_{window[0]}-{name}"
    with progress.shown(f"capture layers {window}", "tokens") as report:
        capture.capture_activations(
            model,
            {split: corpus.read_blocks(TOKENS, split) for split in ("train", "validation")},
            folder,
            cfg=cfg.capture,
            layers=window,
            dtype=capture.stored_dtype(cfg.capture.dtype, model.dtype),
            attributes=digests,
            forward=windows.forward_behind(
                model, {k: load_layer(path)[0] for k, path in folders.items()}
            ),
            progress=report,
        )
    return folder / f"layer_{layer}.zarr", digests


def _check_capture(cfg: Config) -> None:
    """A layer fitted to other activations would never be adopted."""
    lineage.check(cfg, (DENSE, TOKENS, CAPTURE))
