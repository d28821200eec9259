"""Text to packed token blocks, in splits that share no document.

Reads:  the text that `data` names; the tokenizer of stages/dense
Writes: stages/tokens/{train,validation,heldout,shifted}.safetensors, tokens.json
Cost:   seconds per megabyte of text
Run:    python -m pipeline.stages.tokens [key=value ...]
        python -m pipeline.stages.tokens data=files data.files=[notes/*.txt]
DVC does not see local files of `data`: after one was edited, `dvc repro -f -s tokens`.
"""

from pathlib import Path

from pipeline import artifacts, command, lineage, workdir
from pipeline.config import Config, select
from pipeline.stages import DENSE, TOKENS

PARAMS = ("data", "model.id", "model.trust_remote_code")


def run(cfg: Config) -> None:
    from pipeline import documents, record

    inputs = {"dense": artifacts.digest(DENSE)}
    lineage.check(cfg, [DENSE])
    files = documents.local_files(cfg.data)
    if files:  # another text under the same name is other work
        inputs["text"] = artifacts.json_digest(list(artifacts.file_digests(files)))

    def compute(folder: Path) -> None:
        from pipeline import corpus, pretrained

        source, revision = record.source(cfg.model, DENSE)
        tokenizer = pretrained.load_tokenizer(
            source, revision=revision, trust_remote_code=cfg.model.trust_remote_code
        )
        corpus.write_blocks(cfg.data, tokenizer, folder)

    workdir.produce(
        TOKENS,
        module="pipeline.stages.tokens",
        settings=select(cfg, PARAMS),
        inputs=inputs,
        compute=compute,
        lock_wait_s=cfg.runtime.lock_wait_s,
    )


if __name__ == "__main__":
    command.stage(run, __doc__)
