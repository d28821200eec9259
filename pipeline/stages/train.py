"""Fit one layer's MoE to that layer's own activations; independent of every other layer.

Reads:  stages/capture/layer_K.zarr, stages/capture/ffn_K.safetensors, stages/budget/layer_K.json
Writes: stages/train/layer_K/{layer.safetensors, config.json, history.csv}, and the same of the
        static control in stages/train/layer_K/static
Cost:   epochs x tokens x 9 x 2 x top_k x d_ff_expert x d_model FLOPs, once more for the control;
        the layer in memory
Run:    python -m pipeline.stages.train --layer K [key=value ...]
"""

from pathlib import Path

from pipeline import command, runtime, workdir
from pipeline.config import Config, select
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


def run(cfg: Config, layer: int, budget: Path = BUDGET, published: bool = True) -> Path:
    store, ffn = CAPTURE / f"layer_{layer}.zarr", CAPTURE / f"ffn_{layer}.safetensors"
    shape = budget / f"layer_{layer}.json"

    def compute(folder: Path) -> None:
        from pipeline import controls, layers, training
        from pipeline.ffn import DenseFFN
        from pipeline.store import LayerReader

        device = runtime.pick_device(cfg.runtime)
        plan = workdir.read_json(shape)
        fits = {folder: (f"train layer {layer}", plan)}
        control = controls.static_plan(plan) if cfg.train.static_control else None
        if control:
            fits[folder / controls.STATIC] = (f"static control {layer}", control)
        for into, (title, wanted) in fits.items():
            if layers.is_complete(into):  # of an interrupted run
                continue
            into.mkdir(exist_ok=True)
            with runtime.progress(title) as progress:
                training.fit_layer(
                    LayerReader(store),
                    DenseFFN.load(ffn),
                    wanted,
                    into,
                    moe_cfg=cfg.moe,
                    cfg=cfg.train,
                    seed=cfg.seed,
                    device=device,
                    dtype=runtime.pick_dtype(cfg.train.dtype, device),
                    progress=progress,
                )

    return workdir.produce(
        TRAIN / f"layer_{layer}",
        module="pipeline.stages.train",
        settings=select(cfg, PARAMS),
        inputs={
            "store": store_digest(store),
            "ffn": workdir.file_digest(ffn),
            "shape": workdir.file_digest(shape),
        },
        compute=compute,
        lock_wait_s=cfg.runtime.lock_wait_s,
        published=published,
    )


def store_digest(path: Path) -> str:
    from pipeline.store import LayerReader

    return LayerReader(path).digest()


if __name__ == "__main__":
    command.stage(run, __doc__)
