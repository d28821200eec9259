"""What a stage reads must have been made for it: with its settings, and from what lies there now.

Under DVC that is so by itself. A stage that is called by hand, with other overrides or after
another stage was run again, would mix what does not belong together.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from pipeline import artifacts
from pipeline.config import Config, select
from pipeline.errors import ArtifactError


def check(cfg: Config, folders: Iterable[Path]) -> None:
    """Refuse artefacts that were made with other settings than those of `cfg`.

    Raises:
        ArtifactError: names the folder, and every setting with its value there and here.
    """
    here = select(cfg, vars(cfg))
    for folder in folders:
        there = artifacts.read_manifest(folder).get("settings", {})
        differing = [k for k in there if k in here and there[k] != here[k]]
        if differing:
            raise ArtifactError(
                f"{folder} was made with other settings.",
                value=f"{folder.absolute()}: "
                + "; ".join(f"{k}: {there[k]} there, {here[k]} here" for k in differing),
                rule="what a stage reads was made with the settings that it runs with",
                remedy=f"{artifacts.how_to_redo(folder)}, with this configuration",
            )


def check_inputs(digests: Mapping[str, str], folders: Mapping[str, Path]) -> None:
    """Refuse artefacts that were made from other ones than those that are read beside them.

    Args:
        digests: of what is read, by the name that it has among a stage's inputs.
        folders: artefacts that may have been made from some of these, by name.

    Raises:
        ArtifactError: names the artefact and its input.
    """
    for name, folder in folders.items():
        made_from = artifacts.read_manifest(folder).get("inputs", {})
        stale = [k for k, digest in made_from.items() if digests.get(k, digest) != digest]
        if stale:
            raise ArtifactError(
                f"{name} was made from what is no longer there.",
                value=f"{folder.absolute()}: {', '.join(stale)} changed since",
                rule="artefacts that are read together were made from each other",
                remedy=artifacts.how_to_redo(folder),
            )
