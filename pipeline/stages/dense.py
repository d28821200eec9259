"""The dense model: trained here from the standard library's docstrings, or resolved and recorded.

Reads:  `model`; for the embedded default the `train` and `validation` parts of its text
Writes: stages/dense/dense.json, and for the embedded default stages/dense/model/
Cost:   the embedded default about two minutes; another model one reading of its files
Run:    python -m pipeline.stages.dense [key=value ...]
        python -m pipeline.stages.dense model=pretrained model.id=./my-model model.layers=[0,1]
"""

from pathlib import Path

from pipeline import command, durable, loggers, progress, runtime, workdir
from pipeline.config import Config, select
from pipeline.record import EMBEDDED, RECORD, located
from pipeline.stages import DENSE

PARAMS = (
    "seed",
    "model.name",
    "model.id",
    "model.revision",
    "model.dtype",
    "model.trust_remote_code",
    "model.embedded",
)


def run(cfg: Config) -> None:
    def compute(folder: Path) -> None:
        from pipeline import dense

        source = located(cfg.model.id) if cfg.model.id else str(folder / EMBEDDED)
        if cfg.model.embedded:
            _train_embedded(cfg, folder / EMBEDDED)
        described = dense.resolve(
            source,
            revision=cfg.model.revision,
            dtype=cfg.model.dtype.name,
            trust_remote_code=cfg.model.trust_remote_code,
        )
        durable.write_json(folder / RECORD, {"name": cfg.model.name, **described})

    workdir.produce(
        DENSE,
        module="pipeline.stages.dense",
        settings=select(cfg, PARAMS),
        inputs={},
        compute=compute,
        lock_wait_s=cfg.runtime.lock_wait_s,
    )


def _train_embedded(cfg: Config, folder: Path) -> None:
    from pipeline import corpus, documents, pretrain

    assert cfg.model.embedded
    splits = corpus.split(documents.embedded_documents())
    device = runtime.pick_device(cfg.runtime)
    with (
        progress.shown("dense", tokens=cfg.model.embedded.batch_tokens) as report,
        loggers.opened(cfg.runtime, "dense", folder) as log,
    ):
        pretrain.train(
            cfg.model.embedded,
            splits,
            folder,
            seed=cfg.seed,
            device=device,
            dtype=runtime.pick_dtype(cfg.model.dtype, device),
            progress=report,
            log=log,
        )


if __name__ == "__main__":
    command.stage(run, __doc__)
