"""The place of end-to-end distillation between `train` and `convert`; passes the layers through.

Reads:  stages/train/layer_K for each of model.layers
Writes: stages/heal/healed.json: which layers were healed, so far always none
Cost:   nothing
Run:    python -m pipeline.stages.heal [key=value ...]
"""

from pipeline import command, workdir
from pipeline.config import Config, select
from pipeline.stages import HEAL, TRAIN

PARAMS = ("model.layers",)


def run(cfg: Config) -> None:
    workdir.produce(
        HEAL,
        module="pipeline.stages.heal",
        settings=select(cfg, PARAMS),
        inputs={f"layer_{k}": workdir.digest(TRAIN / f"layer_{k}") for k in cfg.model.layers},
        compute=lambda folder: workdir.write_json(folder / "healed.json", {"layers": []}),
        lock_wait_s=cfg.runtime.lock_wait_s,
    )


if __name__ == "__main__":
    command.stage(run, __doc__)
