"""Train all layers together, end to end, on the dense model's logits; off unless asked for.

With `heal.tokens` 0, the default, the trained layers are passed through. The static controls, where
`train` made them, are healed by the same steps: a control that saw less text would prove nothing.

Reads:  stages/train/layer_K for each of model.layers; with heal.tokens also the dense model and
        stages/tokens, of which it learns from train and is judged on validation
Writes: stages/heal/healed.json: which layers were healed. Those in stages/heal/layer_K as `train`
        has them, stages/heal/history.csv, and stages/heal/norms.safetensors with heal.train_norms;
        the same of the static controls in stages/heal/static
Cost:   nothing; with heal.tokens two forward passes and one backward pass per token, once more for
        the controls
Run:    python -m pipeline.stages.heal [key=value ...]
        python -m pipeline.stages.heal heal.tokens=1000000
"""

from collections.abc import Mapping
from pathlib import Path

from pipeline import (
    artifacts,
    command,
    durable,
    lineage,
    loggers,
    progress,
    record,
    runtime,
    sources,
    workdir,
)
from pipeline.config import Config, select
from pipeline.stages import DENSE, HEAL, TOKENS, TRAIN

MODULE = "pipeline.stages.heal"
PARAMS = (
    "seed",
    "heal",
    "train.balance_bias_rate",
    "model.id",
    "model.trust_remote_code",
    "model.layers",
)


def run(cfg: Config) -> None:
    trained = {k: TRAIN / f"layer_{k}" for k in cfg.model.layers}
    settings = select(cfg, PARAMS)
    inputs = {f"layer_{k}": artifacts.digest(path) for k, path in trained.items()}
    healed = sorted(trained) if cfg.heal.tokens else []
    if healed:
        inputs |= {"dense": artifacts.digest(DENSE), "tokens": artifacts.digest(TOKENS)}
        lineage.check(cfg, [DENSE, TOKENS])
        lineage.check_inputs(inputs, {"tokens": TOKENS})
    lineage.check(cfg, trained.values())

    def compute(folder: Path) -> None:
        record.check_behind(trained)
        if healed:
            _heal_all(cfg, trained, folder)
        for k in healed:
            before = artifacts.read_json(trained[k] / artifacts.MANIFEST)["settings"]
            identity = {"module": MODULE, "settings": before | settings, "inputs": inputs}
            identity["fingerprint"] = folder.name  # a work folder is named so
            identity["code"] = sources.code_digest(MODULE)
            artifacts.write_manifest(folder / f"layer_{k}", identity)
        durable.write_json(folder / "healed.json", {"layers": healed})

    workdir.produce(
        HEAL,
        module=MODULE,
        settings=settings,
        inputs=inputs,
        compute=compute,
        lock_wait_s=cfg.runtime.lock_wait_s,
    )


def _heal_all(cfg: Config, trained: Mapping[int, Path], folder: Path) -> None:
    from pipeline.controls import STATIC

    _heal(cfg, "heal", trained, folder)
    static = {k: path / STATIC for k, path in trained.items() if (path / STATIC).is_dir()}
    if static:  # a layer that has none keeps its dense FFN
        _heal(cfg, "heal the static control", static, folder / STATIC)


def _heal(cfg: Config, title: str, trained: Mapping[int, Path], folder: Path) -> None:
    from pipeline import corpus, dense, heal

    device = runtime.pick_device(cfg.runtime)
    model = dense.load_recorded(cfg.model, DENSE, device, in_float32=True)
    blocks = {split: corpus.read_blocks(TOKENS, split) for split in ("train", "validation")}
    with (
        progress.shown(title, tokens=cfg.heal.batch_size * blocks["train"].shape[1]) as report,
        loggers.opened(cfg.runtime, title, folder) as log,
    ):
        heal.heal_layers(
            model,
            trained,
            blocks,
            folder,
            cfg=cfg.heal,
            balance_bias_rate=cfg.train.balance_bias_rate,
            seed=cfg.seed,
            dtype=runtime.pick_dtype(cfg.heal.dtype, device),
            progress=report,
            log=log,
        )


if __name__ == "__main__":
    command.stage(run, __doc__)
