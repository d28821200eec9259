"""Measure what the conversion gained and lost, and say so in figures, pictures and words.

Reads:  the dense model, stages/tokens, stages/capture, stages/budget, the layers, stages/convert
Writes: stages/evaluate: report.html, README.md (the model card), summary.txt, metrics.json,
        layers.csv, layers.json, history.csv; the small ones also in reports/, which git keeps
Cost:   one pass of both models over the heldout and shifted text, and two short generations
Run:    python -m pipeline.stages.evaluate [key=value ...]
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import command, record, runtime, workdir
from pipeline.config import Config, select
from pipeline.stages import (
    BUDGET,
    CAPTURE,
    CONVERT,
    DENSE,
    EVALUATE,
    HEAL,
    REPORTS,
    TOKENS,
    TRAIN,
    final_layers,
)

if TYPE_CHECKING:
    import torch

PARAMS = (
    "evaluate",
    "model.name",
    "model.id",
    "model.dtype",
    "model.device_map",
    "model.trust_remote_code",
    "model.layers",
)
KEPT_IN_GIT = ("metrics.json", "layers.csv", "layers.json", "history.csv", "summary.txt")
TEMPLATES = Path(runtime.__file__).parent / "templates"


def run(cfg: Config) -> None:
    from pipeline.store import LayerReader

    layers = final_layers(cfg.model.layers)
    stores = {k: LayerReader(CAPTURE / f"layer_{k}.zarr") for k in layers}
    settings = select(cfg, PARAMS)
    parts = {"dense": DENSE, "tokens": TOKENS, "budget": BUDGET, "convert": CONVERT}
    parts |= {f"layer_{k}": path for k, path in layers.items()}
    parts |= {f"train_{k}": TRAIN / f"layer_{k}" for k in layers}  # for the static controls
    parts["heal"] = HEAL

    def compute(folder: Path) -> None:
        from pipeline import dense, evaluation, report

        device = runtime.pick_device(cfg.runtime)
        models = {}
        for side, path, commit in (
            ("dense", *record.source(cfg.model, DENSE)),
            ("sparse", str(CONVERT), None),
        ):
            models[side] = dense.load_model(
                path,
                revision=commit,
                dtype=cfg.model.dtype.name,
                device=device,
                device_map=cfg.model.device_map,
                trust_remote_code=cfg.model.trust_remote_code,
            )
        with runtime.progress("evaluate", "tokens") as progress:
            measured = evaluation.measure(
                **models,
                tokenizer=dense.load_tokenizer(str(CONVERT)),
                tokens=TOKENS,
                layers=layers,
                stores=stores,
                **_controls(layers, device),
                cfg=cfg.evaluate,
                progress=progress,
            )
        manifests = {
            name: workdir.read_json(path / workdir.MANIFEST)
            for name, path in (parts | {"capture": CAPTURE}).items()
        }
        every = range(record.read(DENSE)["n_layers"])
        known = {"name": cfg.model.name, "settings": settings, "manifests": manifests}
        known["left_dense"] = [k for k in every if k not in layers]
        report.write(folder, known | measured)

    workdir.produce(
        EVALUATE,
        module="pipeline.stages.evaluate",
        settings=settings,
        inputs={name: workdir.digest(path) for name, path in parts.items()}
        | {f"store_{k}": store.digest() for k, store in stores.items()}
        | {path.name: workdir.file_digest(path) for path in sorted(TEMPLATES.iterdir())},
        compute=compute,
        lock_wait_s=cfg.runtime.lock_wait_s,
    )
    REPORTS.mkdir(exist_ok=True)
    for name in KEPT_IN_GIT:
        shutil.copyfile(EVALUATE / name, REPORTS / name)


def _controls(layers: Mapping[int, Path], device: "torch.device") -> dict[str, Any]:
    """`controls` and `static_norms` of `evaluation.measure`; `train` and `heal` fitted the static.

    No oracle where layers were healed: they no longer stand for the FFNs that it would ask.
    """
    from pipeline.assembly import read_norms
    from pipeline.controls import STATIC, OracleMoE
    from pipeline.ffn import DenseFFN
    from pipeline.layers import load_layer

    healed = bool(workdir.read_json(HEAL / "healed.json")["layers"])
    static, oracle = {}, {}
    for k, folder in layers.items():
        fitted = HEAL / STATIC / f"layer_{k}" if healed else TRAIN / f"layer_{k}" / STATIC
        if fitted.is_dir():
            static[k] = load_layer(fitted)[0].to(device)
        moe = load_layer(folder)[0].to(device)
        if moe.shape.capacity_factor is None and not healed:
            oracle[k] = OracleMoE(moe, DenseFFN.load(CAPTURE / f"ffn_{k}.safetensors"))
    every = {"static": static, "oracle": oracle}
    complete = {name: found for name, found in every.items() if len(found) == len(layers)}
    return {"controls": complete, "static_norms": read_norms(HEAL / STATIC) if healed else {}}


if __name__ == "__main__":
    command.stage(run, __doc__)
