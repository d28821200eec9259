"""Measure what the conversion gained and lost, and say so in figures, pictures and words.

Reads:  the dense model, stages/tokens, stages/capture, stages/budget, the layers, stages/convert
Writes: stages/evaluate: report.html, README.md (the checkpoint's card with its figures),
        summary.txt, metrics.json, headline.json, layers.csv, layers.json, history.csv, load.csv and
        speed.json; the small ones also in reports/, which git keeps
Cost:   one pass of both models over the heldout and shifted text, and two short generations;
        with evaluate.measure_speed ten times 17 sequences through each model, and a generation
Run:    python -m pipeline.stages.evaluate [key=value ...]
        python -m pipeline.stages.evaluate evaluate.max_batches=8
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import artifacts, command, durable, lineage, progress, record, runtime, workdir
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

    from pipeline.store import LayerReader

PARAMS = (
    "evaluate",
    "model.name",
    "model.id",
    "model.dtype",
    "model.device_map",
    "model.trust_remote_code",
    "model.layers",
)
KEPT_IN_GIT = ("headline.json", "metrics.json", "layers.csv", "layers.json", "history.csv")
KEPT_IN_GIT += ("load.csv", "summary.txt")
TEMPLATES = Path(runtime.__file__).parent / "templates"


def run(cfg: Config) -> None:
    from pipeline.store import LayerReader

    layers = final_layers(cfg.model.layers)
    url = cfg.capture.store_url
    stores = {k: LayerReader(CAPTURE / f"layer_{k}.zarr", store_url=url) for k in layers}
    settings = select(cfg, PARAMS)
    del settings["evaluate.push_to_hub"]  # where the result goes too does not change it
    parts = {"dense": DENSE, "tokens": TOKENS, "budget": BUDGET, "convert": CONVERT}
    parts |= {f"layer_{k}": path for k, path in layers.items()}
    parts |= {f"train_{k}": TRAIN / f"layer_{k}" for k in layers}  # for the static controls
    parts["heal"] = HEAL
    inputs = {name: artifacts.digest(path) for name, path in parts.items()}
    inputs |= {f"store_{k}": store.digest() for k, store in stores.items()}
    lineage.check(cfg, [*parts.values(), CAPTURE])
    _check_lineage(inputs, list(layers))

    def compute(folder: Path) -> None:
        from pipeline import card, corpus, dense, evaluation, pretrained, report, speed

        device = runtime.pick_device(cfg.runtime)
        models = {
            "dense": dense.load_recorded(cfg.model, DENSE, device),
            "sparse": dense.load_model(
                str(CONVERT),
                dtype=cfg.model.dtype.name,
                device=device,
                device_map=cfg.model.device_map,
                trust_remote_code=cfg.model.trust_remote_code,
            ),
        }
        with progress.shown("evaluate", "tokens") as shown:
            measured = evaluation.measure(
                **models,
                tokenizer=pretrained.load_tokenizer(str(CONVERT)),
                tokens=TOKENS,
                layers=layers,
                stores={k: LayerReader(s.path, device, url) for k, s in stores.items()},
                **_controls(layers, device),
                cfg=cfg.evaluate,
                progress=shown,
            )
        read = {path: name for name, path in parts.items()} | {CAPTURE: "capture"}
        manifests = {name: artifacts.read_manifest(path) for path, name in read.items()}
        described = record.read(DENSE)
        blocks = corpus.read_blocks(TOKENS, "heldout")
        known = {
            "name": cfg.model.name,
            "settings": settings,
            "manifests": manifests,
            "record": described,
            "licence": card.licence(str(CONVERT), None),
            "left_dense": [k for k in range(described["n_layers"]) if k not in layers],
            "speed": speed.compare(**models, blocks=blocks) if cfg.evaluate.measure_speed else {},
            "sizes": _sizes(stores),
        }
        report.write(folder, known | measured)

    workdir.produce(
        EVALUATE,
        module="pipeline.stages.evaluate",
        settings=settings,
        inputs=inputs
        | {path.name: artifacts.file_digest(path) for path in sorted(TEMPLATES.iterdir())},
        compute=compute,
        lock_wait_s=cfg.runtime.lock_wait_s,
    )
    REPORTS.mkdir(exist_ok=True)
    for name in KEPT_IN_GIT:
        durable.write_bytes(REPORTS / name, (EVALUATE / name).read_bytes())
    if cfg.evaluate.push_to_hub:
        from pipeline import hub

        hub.push(CONVERT, EVALUATE / "README.md", cfg.evaluate.push_to_hub)


def _check_lineage(digests: Mapping[str, str], layers: list[int]) -> None:
    """That all of what is judged here, and by what, was made from each other."""
    artifacts.verify(CAPTURE, "layer_*.zarr/commits/*", "ffn_*.safetensors")
    lineage.check_inputs(digests, {"tokens": TOKENS, "capture": CAPTURE, "budget": BUDGET})
    lineage.check_inputs({**digests, "healed": digests["heal"]}, {"convert": CONVERT})
    trained = {f"layer_{k}": digests[f"train_{k}"] for k in layers}
    lineage.check_inputs({**digests, **trained}, {"heal": HEAL})
    for k in layers:
        read = {
            "store": digests[f"store_{k}"],
            "ffn": artifacts.file_digest(CAPTURE / f"ffn_{k}.safetensors"),
            "shape": artifacts.file_digest(BUDGET / f"layer_{k}.json"),
        }
        lineage.check_inputs(read, {f"train_{k}": TRAIN / f"layer_{k}"})


def _sizes(stores: Mapping[int, "LayerReader"]) -> dict[str, int]:
    rows = next(iter(stores.values())).rows
    return {
        "captured_tokens": sum(rows.values()),
        "train_tokens": rows["train"],
        "store_bytes": sum(store.stored_bytes() for store in stores.values()),
        "checkpoint_bytes": sum(p.stat().st_size for p in CONVERT.glob("*.safetensors")),
    }


def _controls(layers: Mapping[int, Path], device: "torch.device") -> dict[str, Any]:
    """`controls` and `static_norms` of `evaluation.measure`; `train` and `heal` fitted the static.

    No oracle where layers were healed: they no longer stand for the FFNs that it would ask.
    """
    from pipeline.assembly import read_norms
    from pipeline.controls import STATIC, OracleMoE, unpruned
    from pipeline.ffn import DenseFFN
    from pipeline.layers import load_layer

    healed = bool(artifacts.read_json(HEAL / "healed.json")["layers"])
    static, oracle = {}, {}
    for k, folder in layers.items():
        fitted = HEAL / STATIC / f"layer_{k}" if healed else TRAIN / f"layer_{k}" / STATIC
        if fitted.is_dir():
            static[k] = load_layer(fitted)[0].to(device)
        moe = load_layer(folder)[0].to(device)
        if moe.shape.capacity_factor is None and not healed:
            oracle[k] = OracleMoE(moe, DenseFFN.load(CAPTURE / f"ffn_{k}.safetensors"))
    for k in layers.keys() - static.keys() if static else ():  # as much is run as in the dense FFN
        static[k] = unpruned(DenseFFN.load(CAPTURE / f"ffn_{k}.safetensors")).to(device)
    every = {"static": static, "oracle": oracle}
    complete = {name: found for name, found in every.items() if len(found) == len(layers)}
    return {"controls": complete, "static_norms": read_norms(HEAL / STATIC) if healed else {}}


if __name__ == "__main__":
    command.stage(run, __doc__)
