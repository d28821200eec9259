"""Re-hash every artefact below a folder, wherever it was copied or renamed to.

Shards that lie on an object store are read too, where this folder's settings name it.
An artefact is a folder with a manifest. What only a stage writes, and lies below no manifest, is
an artefact that has lost its own.
"""

from pathlib import Path

from pipeline import artifacts, compose
from pipeline.errors import ArtifactError
from pipeline.volume import APART

TELLTALE = (
    "dense.json",
    "tokens.json",
    "ffn_*.safetensors",
    "layer_*.json",
    "layer.safetensors",
    "healed.json",
    "model*.safetensors",
    "report.html",
)


def verify(folder: Path) -> None:
    """Print a line for each artefact.

    Raises:
        ArtifactError: there is none, or one is damaged; it names the file and what makes it again.
    """
    sealed = sorted(path.parent for path in folder.rglob(artifacts.MANIFEST))
    bare = _without_manifest(folder, set(sealed))
    if not sealed and not bare:
        raise ArtifactError(
            "There is no artefact to verify.",
            value=folder.absolute(),
            rule=f"an artefact is a folder with a {artifacts.MANIFEST}",
            remedy="name a folder that holds artefacts, for example stages",
        )
    damaged: list[ArtifactError] = []
    for artefact in sorted({*sealed, *bare}):
        try:
            artifacts.verify(artefact)
            print(f"ok       {artefact}{_objects(artefact)}")
        except ArtifactError as error:
            damaged.append(error)
            print(f"DAMAGED  {artefact}\n{error}")
    if damaged:
        raise ArtifactError(
            f"{len(damaged)} of {len(sealed) + len(bare)} artefacts are damaged.",
            value="; ".join(str(error.value) for error in damaged),
            rule="every file has the digest that its manifest recorded",
            remedy="; ".join(dict.fromkeys(error.remedy for error in damaged)),
        )


def _objects(artefact: Path) -> str:
    """What was read of the artefact's shards on an object store, to be told."""
    if not any(artefact.glob(f"layer_*.zarr/{APART}")):
        return ""
    from pipeline import store

    url = compose.load([]).capture.store_url if compose.PARAMS.is_file() else None
    if url is None:
        return ": of its shards nothing was read, since capture.store_url is null here"
    return f": also the shards of {store.verify_apart(artefact, url)} layers on {url}"


def _without_manifest(folder: Path, sealed: set[Path]) -> list[Path]:
    found = {path.parent for name in TELLTALE for path in folder.rglob(name)}
    return sorted(p for p in found if not sealed & {p, *p.parents})
