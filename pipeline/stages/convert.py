"""Put the trained layers in the dense model's place and save a checkpoint that stands on its own.

Inside the DAG it reads the stages before it. Alone, it needs three paths and nothing else: no DVC,
no conf/, no other stage; each layer's folder records what it needs.

Reads:  the dense model; stages/tokens, for the card; stages/train/layer_K, or stages/heal/layer_K
        where a layer was healed, and stages/heal/norms.safetensors where norms were
Writes: stages/convert: config, safetensors, tokenizer, generation config, model card (README.md);
        the modelling file too where the layers' host is `custom`
Cost:   the dense weights from file to file, one tensor in memory at a time; for the proof, where it
        fits, the sparse model in memory and then again in a fresh process
Run:    python -m pipeline.stages.convert [key=value ...]
        python -m pipeline.stages.convert convert.dense=<id or folder> convert.layers=<folder> \\
            convert.output=<folder>
"""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline import artifacts, command, lineage, record, rules, sources, workdir
from pipeline.config import Config, ConvertConfig, ModelConfig, RuntimeConfig, select
from pipeline.errors import ConfigError
from pipeline.stages import CONVERT, DENSE, HEAL, TOKENS, TRAIN, final_layers

MODULE = "pipeline.stages.convert"
TEMPLATE = sources.PACKAGE / "templates" / "card.md.j2"
PARAMS = (
    "convert",
    "model.id",
    "model.dtype",
    "model.trust_remote_code",
    "model.layers",
)


def run(cfg: Config) -> None:
    layers = final_layers(cfg.model.layers)
    inputs = {
        "dense": artifacts.digest(DENSE),
        "healed": artifacts.digest(HEAL),
        "tokens": artifacts.digest(TOKENS),
        **_of_layers(layers),
    }
    described, licence = record.read(DENSE), _licence(cfg.model)
    lineage.check(cfg, [DENSE, TOKENS, HEAL, *layers.values()])
    if all(path.parent == TRAIN for path in layers.values()):
        lineage.check_inputs(inputs, {"heal": HEAL})

    def compute(folder: Path) -> dict[str, str]:
        from pipeline import assembly, card, checkpoint

        source, revision = record.source(cfg.model, DENSE)
        written = checkpoint.assemble(
            source,
            layers,
            folder,
            revision=revision,
            dtype=cfg.model.dtype.name,
            trust_remote_code=cfg.model.trust_remote_code,
            norms=assembly.read_norms(HEAL),
            max_shard_size=cfg.convert.max_shard_size,
            tolerance=cfg.convert.tolerance,
        )
        made_of = {"dense": DENSE, "tokens": TOKENS, "heal": HEAL}
        made_of |= {f"train_{k}": path for k, path in layers.items()}
        manifests = {part: artifacts.read_manifest(path) for part, path in made_of.items()}
        name = manifests["dense"]["settings"]["model.name"]
        card.write(
            folder,
            layers,
            name=name,
            source=cfg.model.id or name,
            record=described,
            licence=licence,
            manifests=manifests,
        )
        return written

    workdir.produce(
        CONVERT,
        module=MODULE,
        settings=select(cfg, PARAMS),
        inputs=inputs | _of_card(licence),
        compute=compute,
        lock_wait_s=cfg.runtime.lock_wait_s,
    )


def run_alone(cfg: ConvertConfig, how: RuntimeConfig) -> None:
    """Convert from three paths; the output folder holds the same files as inside the DAG."""
    missing = [name for name in ("dense", "layers", "output") if getattr(cfg, name) is None]
    if missing:
        raise ConfigError(
            "A conversion on its own needs three paths.",
            value=", ".join(f"convert.{name}=null" for name in missing),
            rule="convert.dense, convert.layers and convert.output are given together",
            remedy=f"add {' '.join(f'convert.{name}=...' for name in missing)}",
        )
    assert cfg.dense and cfg.layers and cfg.output
    source, output = cfg.dense, Path(cfg.output).absolute()
    _check_output(output)
    rules.check_shard_size(cfg.max_shard_size)
    with ThreadPoolExecutor(1) as thread:  # importing transformers takes seconds
        hashed = thread.submit(_digests, source)
        from pipeline import assembly, card, checkpoint
        from pipeline.layers import layer_folders

    given = Path(cfg.layers)
    folders, norms = layer_folders(given), given / assembly.NORMS
    record.check_behind(folders)
    if norms.exists() and (given / artifacts.MANIFEST).exists():
        artifacts.verify(given, assembly.NORMS)
    healed = {"norms": artifacts.file_digest(norms)} if norms.exists() else {}
    digests, licence = hashed.result(), card.licence(source, cfg.revision)

    def compute(folder: Path) -> dict[str, str]:
        written = checkpoint.assemble(
            source,
            folders,
            folder,
            revision=cfg.revision,
            norms=assembly.read_norms(given),
            max_shard_size=cfg.max_shard_size,
            tolerance=cfg.tolerance,
        )
        card.write(
            folder,
            folders,
            name=output.name,
            source=Path(source).name if digests else source,
            record={"revision": cfg.revision, "digests": digests},
            licence=licence,
            manifests={f"train_{k}": artifacts.read_manifest(path) for k, path in folders.items()},
        )
        return written

    scratch = output.parent / f".{output.name}.scratch"
    workdir.produce(
        output,
        module=MODULE,
        settings={"max_shard_size": cfg.max_shard_size, "tolerance": cfg.tolerance},
        inputs={
            "dense": " ".join(map(":".join, digests.items())) or f"{source}@{cfg.revision}",
            **healed,
            **_of_card(licence),
            **_of_layers(folders),
        },
        compute=compute,
        lock_wait_s=how.lock_wait_s,
        scratch=scratch,
    )


def _check_output(output: Path) -> None:
    """Publishing replaces the folder as a whole, so that it must hold nothing but our own."""
    manifest = output / artifacts.MANIFEST
    ours = manifest.is_file() and artifacts.read_sealed(manifest).get("module") == MODULE
    empty = output.is_dir() and not any(output.iterdir())
    if output.exists() and not ours and not empty:
        raise ConfigError(
            "The output would replace something that is no conversion.",
            value=f"convert.output={output.absolute()}",
            rule="a folder that is new, empty, or an earlier conversion",
            remedy="name another convert.output",
        )


def _digests(source: str) -> dict[str, str]:
    """Of the dense model's files; none of a model of the hub, which its revision tells."""
    if not Path(source).is_dir():
        return {}
    files = sorted(p for p in Path(source).iterdir() if p.is_file())
    names = [path.name for path in files]
    return dict(zip(names, artifacts.file_digests(files), strict=True))


def _of_layers(folders: Mapping[int, Path]) -> dict[str, str]:
    """Digests of the layers; their weights are checked when they are read for the checkpoint."""
    return {
        f"layer_{k}": artifacts.digest(path, but=[record.WEIGHTS]) for k, path in folders.items()
    }


def _licence(model: ModelConfig) -> dict[str, str]:
    from pipeline import card

    if model.id is None:
        return {}
    return card.licence(record.located(model.id), record.read(DENSE)["revision"])


def _of_card(licence: dict[str, str]) -> dict[str, str]:
    """What the card adds to the inputs."""
    return {"card": artifacts.file_digest(TEMPLATE), "licence": json.dumps(licence, sort_keys=True)}


if __name__ == "__main__":
    command.stage(run, __doc__, alone=run_alone)
