"""The record of the dense model: what it is, and where its weights lie.

`stages/dense/dense.json` holds the resolved revision, the digest of every file and a description;
never a copy of somebody else's weights. Read without torch or transformers.
"""

from pathlib import Path
from typing import Any

from pipeline import workdir
from pipeline.config import ModelConfig
from pipeline.errors import ArtifactError

RECORD, EMBEDDED = "dense.json", "model"


def read(folder: Path) -> dict[str, Any]:
    """The record in the verified artefact `folder`."""
    workdir.verify(folder)
    return workdir.read_json(folder / RECORD)


def source(model: ModelConfig, folder: Path) -> tuple[str, str | None]:
    """Hub id or folder of the dense model, and its pinned revision.

    Raises:
        ArtifactError: a local model's files are not the ones that were recorded.
    """
    record = read(folder)
    if model.id is None:
        return str(folder / EMBEDDED), None
    local = Path(model.id)
    if local.is_dir():
        for name, recorded in record["digests"].items():
            if workdir.file_digest(local / name) != recorded:
                raise ArtifactError(
                    "The dense model changed after it was recorded.",
                    value=local.absolute() / name,
                    rule="every file has the SHA-256 that stages/dense/dense.json recorded",
                    remedy="restore the file, or remove stages/dense and run `dvc repro`",
                )
    return model.id, record["revision"]
