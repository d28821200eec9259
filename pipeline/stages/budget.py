"""Decide each layer's sparse shape and the architecture that will hold it, before any training.

With moe.budget.by=uniform, the default, every layer gets the same share: what `moe` says, resolved
against its own d_ff. With kl, layers differ in `moe.budget.vary` as costs the whole model least,
judged on validation, at no more than the uniform cost. The host is decided here because it fixes
the router function that the layers are trained under.

Reads:  stages/dense/dense.json; by kl also the dense model, stages/tokens (validation) and
        stages/capture
Writes: stages/budget/layer_K.json for each of model.layers
Cost:   nothing; by kl, for each layer and candidate, an untrained layer and two forward passes over
        moe.budget.tokens
Run:    python -m pipeline.stages.budget [key=value ...]
        python -m pipeline.stages.budget moe.n_experts=8 moe.d_ff_expert=0.25
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import artifacts, command, durable, lineage, progress, runtime, workdir
from pipeline.config import BudgetBy, Config, Init, select
from pipeline.stages import BUDGET, CAPTURE, DENSE, TOKENS

if TYPE_CHECKING:
    from pipeline.budget import Options

PARAMS = ("seed", "model.id", "model.trust_remote_code", "model.layers", "moe")
KNOWN = "kl.json"
"""What an interrupted run has measured, in its work folder."""


def run(cfg: Config, published: bool = True) -> Path:
    judged = cfg.moe.budget.by is BudgetBy.kl
    inputs = {"dense": artifacts.digest(DENSE)} | (_judged_on(cfg.model.layers) if judged else {})
    lineage.check(cfg, [DENSE, TOKENS, CAPTURE] if judged else [DENSE])
    if judged:
        lineage.check_inputs(inputs, {"tokens": TOKENS, "capture": CAPTURE})

    def compute(folder: Path) -> None:
        from pipeline import budget, record

        described, layers = record.read(DENSE), cfg.model.layers
        if judged:
            options = budget.candidates(described, cfg.moe, layers)
            kls = _measure(cfg, options, folder / KNOWN)
            plans = budget.by_kl(described, cfg.moe, layers, options, kls)
        else:
            plans = budget.uniform(described, cfg.moe, layers)
        starts = sorted({content["init"] for content in plans.values()})
        auto = cfg.moe.init is Init.auto and cfg.moe.init_from_dense
        reason = "auto: copy where the widths are equal, else slice" if auto else "configured"
        runtime.tell("start", ", ".join(starts), reason)
        for layer, content in plans.items():
            durable.write_json(folder / f"layer_{layer}.json", content)
        (folder / KNOWN).unlink(missing_ok=True)

    return workdir.produce(
        BUDGET,
        module="pipeline.stages.budget",
        settings=select(cfg, PARAMS),
        inputs=inputs,
        compute=compute,
        lock_wait_s=cfg.runtime.lock_wait_s,
        published=published,
    )


def _judged_on(layers: list[int]) -> dict[str, str]:
    from pipeline import store

    found = {"tokens": artifacts.digest(TOKENS)}
    for k in layers:
        artifacts.verify(CAPTURE, f"layer_{k}.zarr/commits/*", f"ffn_{k}.safetensors")
        found[f"store_{k}"] = store.digest(CAPTURE / f"layer_{k}.zarr")
        found[f"ffn_{k}"] = artifacts.file_digest(CAPTURE / f"ffn_{k}.safetensors")
    return found


def _measure(cfg: Config, options: "Options", known: Path) -> dict[int, dict[str, float]]:
    from pipeline import corpus, dense, sensitivity

    device = runtime.pick_device(cfg.runtime)
    model = dense.load_recorded(cfg.model, DENSE, device, in_float32=True)
    blocks = corpus.read_blocks(TOKENS, "validation")
    plans: dict[int, dict[str, Any]] = {
        k: {name: candidate.plan for name, candidate in of.items()} for k, of in options.items()
    }
    with progress.shown("budget", "candidates") as report:
        return sensitivity.measure(
            model,
            plans,
            CAPTURE,
            blocks[: max(1, cfg.moe.budget.tokens // blocks.shape[1])],
            known,
            store_url=cfg.capture.store_url,
            moe_cfg=cfg.moe,
            seed=cfg.seed,
            progress=report,
        )


if __name__ == "__main__":
    command.stage(run, __doc__)
