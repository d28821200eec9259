"""Decide each layer's sparse shape and the architecture that will hold it, before any training.

Every layer gets the same share: what `moe` says, resolved against its own d_ff. The host is decided
here because it fixes the router function that the layers are trained under.

Reads:  stages/dense/dense.json
Writes: stages/budget/layer_K.json for each of model.layers
Cost:   nothing
Run:    python -m pipeline.stages.budget [key=value ...]
"""

from pathlib import Path

from pipeline import command, workdir
from pipeline.config import Config, select
from pipeline.stages import BUDGET, DENSE

PARAMS = ("model.layers", "moe")


def run(cfg: Config, published: bool = True) -> Path:
    def compute(folder: Path) -> None:
        from pipeline import budget, record

        for layer, content in budget.uniform(record.read(DENSE), cfg.moe, cfg.model.layers).items():
            workdir.write_json(folder / f"layer_{layer}.json", content)

    return workdir.produce(
        BUDGET,
        module="pipeline.stages.budget",
        settings=select(cfg, PARAMS),
        inputs={"dense": workdir.digest(DENSE)},
        compute=compute,
        lock_wait_s=cfg.runtime.lock_wait_s,
        published=published,
    )


if __name__ == "__main__":
    command.stage(run, __doc__)
