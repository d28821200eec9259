"""Fit one layer's MoE to that layer's own activations; independent of every other layer.

Reads:  stages/capture/layer_K.zarr, stages/capture/ffn_K.safetensors, stages/budget/layer_K.json
Writes: stages/train/layer_K/{layer.safetensors, config.json, history.csv}, and the same of the
        static control in stages/train/layer_K/static
Cost:   epochs x tokens x 9 x 2 x top_k x d_ff_expert x d_model FLOPs, once more for the control;
        the layer in memory
Run:    python -m pipeline.stages.train --layer K [key=value ...]
        python -m pipeline.stages.train --layer 3 train.epochs=10 runtime.logger=tensorboard

With train.window, layers behind the first window are fitted to rows that only `prefill` makes; here
they are adopted from there.
"""

from collections.abc import Callable
from pathlib import Path

from pipeline import artifacts, command, lineage, loggers, progress, runtime, workdir
from pipeline.config import Config, select
from pipeline.errors import ConfigError
from pipeline.stages import BUDGET, CAPTURE, TRAIN

PARAMS = (
    "seed",
    "train",
    "moe.init_noise",
    "moe.virtual_groups",
    "moe.router_init",
    "moe.refit",
    "moe.mean_compensation",
    "moe.dynamic",
)


Behind = Callable[[bool], tuple[Path, dict[str, str]]]
"""Whether the static control is meant -> the store of a layer behind sparse ones, and these: by
layer the digest of its weights."""


def run(
    cfg: Config,
    layer: int,
    budget: Path = BUDGET,
    published: bool = True,
    behind: Behind | None = None,
) -> Path:
    store, ffn = CAPTURE / f"layer_{layer}.zarr", CAPTURE / f"ffn_{layer}.safetensors"
    shape = budget / f"layer_{layer}.json"
    # The reader holds the shards against their commits; of a capture that is all this layer reads.
    artifacts.verify(CAPTURE, f"layer_{layer}.zarr/commits/*", f"ffn_{layer}.safetensors")
    artifacts.verify(budget, f"layer_{layer}.json")
    lineage.check(cfg, [CAPTURE, budget])
    earlier = layers_before(cfg.train.window, layer, budget)

    def compute(folder: Path) -> None:
        from pipeline import controls, layers, resume, training
        from pipeline.ffn import DenseFFN
        from pipeline.store import LayerReader

        device = runtime.pick_device(cfg.runtime)
        plan = artifacts.read_json(shape)
        fits = {folder: (f"train layer {layer}", plan)}
        control = controls.static_plan(plan) if cfg.train.static_control else None
        if control:
            fits[folder / controls.STATIC] = (f"static control {layer}", control)
        for into, (title, wanted) in fits.items():
            if layers.is_complete(into):  # of an interrupted run
                (into / resume.CHECKPOINT).unlink(missing_ok=True)
                continue
            into.mkdir(exist_ok=True)
            rows = store
            if earlier:
                rows, digests = _behind(layer, behind)(into != folder)
                wanted = {**wanted, "behind": digests}
            with (
                progress.shown(title, tokens=cfg.train.batch_size) as report,
                loggers.opened(cfg.runtime, title, folder) as log,
            ):
                training.fit_layer(
                    LayerReader(rows, device, cfg.capture.store_url),
                    DenseFFN.load(ffn),
                    wanted,
                    into,
                    moe_cfg=cfg.moe,
                    cfg=cfg.train,
                    seed=cfg.seed,
                    device=device,
                    dtype=runtime.pick_dtype(cfg.train.dtype, device),
                    progress=report,
                    log=log,
                )

    return workdir.produce(
        TRAIN / f"layer_{layer}",
        module="pipeline.stages.train",
        settings=select(cfg, PARAMS),
        inputs={
            "store": store_digest(store),
            "ffn": artifacts.file_digest(ffn),
            "shape": artifacts.file_digest(shape),
            **{f"shape_{k}": artifacts.file_digest(budget / f"layer_{k}.json") for k in earlier},
            **{f"store_{k}": store_digest(CAPTURE / f"layer_{k}.zarr") for k in earlier},
        },
        compute=compute,
        lock_wait_s=cfg.runtime.lock_wait_s,
        published=published,
    )


def layers_before(window: int | None, layer: int, budget: Path) -> list[int]:
    """Which layers are sparse before the window of this one is fitted; none without windows."""
    if window is None:
        return []
    every = sorted(int(p.stem.removeprefix("layer_")) for p in budget.glob("layer_*.json"))
    return every[: every.index(layer) // window * window]


def _behind(layer: int, behind: Behind | None) -> Behind:
    if behind is None:
        raise ConfigError(
            f"Layer {layer} is to be fitted behind sparse layers, and has not been.",
            value="train.window is set",
            rule="windows are fitted one after the other, by prefill",
            remedy="run `python -m pipeline prefill` with this configuration, then this again",
        )
    return behind


def store_digest(path: Path) -> str:
    from pipeline import store

    return store.digest(path)


if __name__ == "__main__":
    command.stage(run, __doc__)
