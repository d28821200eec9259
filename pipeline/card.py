"""The model card: what a checkpoint's README.md says of where it comes from and what it lost.

`convert` writes it into the checkpoint, without figures: they are measured later. `evaluate` writes
it once more with them. The front matter is huggingface_hub's own, so that the hub reads it.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id

from pipeline import artifacts
from pipeline.config import Host
from pipeline.pages import render
from pipeline.record import CONFIG
from pipeline.shape import MoEShape

NAME = "README.md"
LICENCE = ("license", "license_name", "license_link")
TAGS = ["mixture-of-experts", "sparse-distillation"]


def licence(source: str, revision: str | None) -> dict[str, str]:
    """What the card beside the dense model says of its licence; nothing where there is no card.

    Only what is on this machine is read: a model of the hub has been fetched before.
    """
    found: Any = Path(source) / NAME
    if not Path(source).is_dir():
        with contextlib.suppress(HFValidationError):  # neither a folder nor a name: refused later
            found = try_to_load_from_cache(source, NAME, revision=revision)
    if not isinstance(found, str | Path) or not Path(found).is_file():
        return {}
    try:
        data = ModelCard.load(found).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):  # no front matter, or none that can be read
        return {}
    return {name: str(data[name]) for name in LICENCE if data.get(name)}


def write(
    folder: Path,
    layers: Mapping[int, Path],
    *,
    name: str,
    source: str,
    record: Mapping[str, Any],
    licence: Mapping[str, str],
    manifests: Mapping[str, Mapping[str, Any]],
) -> None:
    """The card of a checkpoint that has just been made, beside it.

    Args:
        layers: their folders.
        source: the dense model, as its user named it.
        record: of the dense model: at least `revision` and `digests`.
        manifests: of what it was made from, as far as that is known.
    """
    records = {k: artifacts.read_sealed(path / CONFIG) for k, path in layers.items()}
    architecture = artifacts.read_json(folder / "config.json")["architectures"][0]
    facts = {
        "name": name,
        "source": source,
        "record": record,
        "licence": licence,
        "manifests": manifests,
        "layers": records,
        "host": next(iter(records.values()))["host"],
        "encoder": not architecture.endswith("ForCausalLM"),
    }
    (folder / NAME).write_text(text(facts), encoding="utf-8")


def text(facts: Mapping[str, Any]) -> str:
    """The card as it is written.

    Args:
        facts: `name`, `source` (the dense model in its user's words), `host`, `encoder`, `layers`
            (their records), `manifests` (by artefact), `record` (of the dense model), `licence`;
            with `metrics` also what `report` derives.
    """
    settings = merged(facts["manifests"])
    shown = {
        "metrics": None,
        "settings": settings,
        "base": hub_id(facts["source"]),
        "versions": artifacts.versions(),
        "shapes": by_shape(facts["layers"]),
        "healed": next(iter(facts["layers"].values())).get("healing"),
        "digests": {
            "dense": facts["record"]["digests"],
            "tokens": facts["manifests"].get("tokens", {}).get("files", {}),
        },
        **facts,
        **opening(facts["host"], facts["encoder"]),
    }
    front = ModelCardData(
        model_name=facts["name"],
        base_model=shown["base"],
        datasets=[settings["data.dataset"]] if settings.get("data.dataset") else None,
        library_name="transformers",
        pipeline_tag="sentence-similarity" if facts["encoder"] else "text-generation",
        tags=TAGS,
        eval_results=_results(shown["metrics"], settings) if shown["metrics"] else None,
        **facts["licence"],
    )
    return f"---\n{front.to_yaml()}\n---\n\n{render('card.md.j2', shown)}"


def opening(host: str, encoder: bool) -> dict[str, Any]:
    """How `transformers` opens a checkpoint of this host."""
    native = host != Host.custom.name
    return {
        "native": native,
        "auto_class": "AutoModel" if encoder else "AutoModelForCausalLM",
        "trust": "" if native else ", trust_remote_code=True",
    }


def by_shape(layers: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each distinct shape, in the order of its first layer."""
    shapes = {k: MoEShape(**layer["shape"]) for k, layer in layers.items()}
    return [
        {
            "shape": shape,
            "widths": " to ".join(map(str, sorted({min(shape.widths), max(shape.widths)}))),
            "layers": [k for k, other in shapes.items() if other == shape],
        }
        for shape in dict.fromkeys(shapes.values())
    ]


def merged(manifests: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Every setting that the artefacts were made with, by key."""
    settings: dict[str, Any] = {}
    for manifest in manifests.values():
        settings |= manifest.get("settings", {})  # layers of a notebook have none
    return dict(sorted(settings.items()))


def hub_id(model_id: str) -> str | None:
    """A model's name on the hub; null where it is a folder, a package's or the embedded one."""
    if "/" not in model_id or Path(model_id).is_dir():
        return None
    try:
        validate_repo_id(model_id)
    except HFValidationError:
        return None
    return model_id


def _results(metrics: Mapping[str, Any], settings: Mapping[str, Any]) -> list[EvalResult]:
    data = settings.get("data.dataset") or settings.get("data.source") or "text"
    task = "sentence-similarity" if "embedding_cosine" in metrics else "text-generation"
    found = {}
    for text_name in metrics["judged_tokens"]:
        if "embedding_cosine" in metrics:
            value = metrics["embedding_cosine"][text_name]
            found[text_name, "embedding_cosine"] = value, "cosine with the dense embedding"
        else:
            value = metrics["sparse"]["perplexity"][text_name]
            found[text_name, "perplexity"] = value, "perplexity"
            ratio = metrics["perplexity_ratio"][text_name]
            found[text_name, "perplexity_ratio"] = ratio, "perplexity over the dense model's"
    return [
        EvalResult(
            task_type=task,
            dataset_type=data,
            dataset_name=f"{data}, {text_name}",
            dataset_split=text_name,
            metric_type=kind,
            metric_name=name,
            metric_value=value,
        )
        for (text_name, kind), (value, name) in found.items()
    ]
