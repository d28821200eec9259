"""The quality table: recipes x active fraction x seeds on the embedded model, and controls.

Each seed has a dense model, text and activations of its own (`.scratch/quality/seed_N`, kept for
the next run). A recipe's layers are fitted to them and take the FFNs' places in memory; perplexity
and KL are those of the whole model on `heldout` and `shifted` text, errors those of heldout rows.
Regimes: `training-free` (the start alone), `layer-wise` (fitted, `train` at its defaults) and
`healed` (then all layers together, `heal.tokens`). Controls: `static` at each active fraction, and
`oracle` for the layers as they were fitted. Rows already in the output are not made again.

python -m benchmarks.quality [--seeds 0,1,2] [--recipes 'NAME;...'] [--fresh]
"""

import argparse
import copy
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline import runtime
from pipeline.config import RuntimeConfig

OUTPUT = Path("benchmarks/results/quality.json")
WORK = Path(".scratch/quality")
FREE, LAYER_WISE, HEALED = "training-free", "layer-wise", "healed"
REGIMES = {FREE: ["train.epochs=0"], LAYER_WISE: [], HEALED: ["heal.tokens=1048576"]}


@dataclass(frozen=True)
class Recipe:
    """Settings of `conf/` that make one row of the table, and the regimes that it is run in."""

    name: str
    overrides: tuple[str, ...]
    regimes: tuple[str, ...] = (FREE, LAYER_WISE)


def specialists(n_experts: int, width: float, name: str, *regimes: str) -> Recipe:
    shape = (f"moe.n_experts={n_experts}", "moe.top_k=1", f"moe.d_ff_expert={width}")
    start = ("moe.init=specialist", "moe.router_init=ridge")
    return Recipe(name, (*start, *shape), regimes or (FREE, LAYER_WISE))


def carved(n_experts: int, top_k: int, width: float, init: str, name: str) -> Recipe:
    shape = (f"moe.n_experts={n_experts}", f"moe.top_k={top_k}", f"moe.d_ff_expert={width}")
    start = (f"moe.init={init}", "moe.router_init=ridge", "moe.refit=true")
    return Recipe(name, (*start, *shape))


RECIPES = (
    carved(16, 12, 0.0625, "cluster", "clusters, 16 of 1/16"),
    specialists(2, 0.75, "specialists, 2 of 3/4"),
    carved(16, 8, 0.0625, "cluster", "clusters, 16 of 1/16"),
    specialists(2, 0.5, "specialists, 2 of 1/2"),
    specialists(4, 0.5, "specialists, 4 of 1/2", FREE, LAYER_WISE, HEALED),
    specialists(8, 0.5, "specialists, 8 of 1/2"),
    carved(16, 4, 0.0625, "cluster", "clusters, 16 of 1/16"),
    specialists(4, 0.25, "specialists, 4 of 1/4", FREE, LAYER_WISE, HEALED),
    specialists(16, 0.25, "specialists, 16 of 1/4"),
)


class Bench:
    """The dense model of one seed, its text and its activations."""

    def __init__(self, seed: int) -> None:
        from pipeline import corpus, dense, workdir

        self.seed, self.folder = seed, (WORK / f"seed_{seed}").absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("conf", "params.yaml"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            into = self.folder / name
            (shutil.copytree if Path(name).is_dir() else shutil.copyfile)(name, into)
        for stage in ("dense", "tokens", "capture"):
            command = [sys.executable, "-m", f"pipeline.stages.{stage}", f"seed={seed}"]
            path = {"PYTHONPATH": str(Path.cwd())}
            subprocess.run(command, cwd=self.folder, env=os.environ | path, check=True)
        stages = self.folder / "stages"
        self.record = workdir.read_json(stages / "dense" / "dense.json")
        self.model = dense.load_model(str(stages / "dense" / "model"), dtype="float32")
        self.captures, self.tokens = stages / "capture", stages / "tokens"
        self.layers = [ffn["index"] for ffn in self.record["layers"]]
        self.counts = workdir.read_json(self.tokens / corpus.RECORD)["splits"]

    def fit(self, plans: Mapping[int, Mapping[str, Any]], cfg: Any, folder: Path) -> None:
        from pipeline.notebook import train_layer

        for k in self.layers:
            train_layer(
                self.captures, plans[k], folder, moe_cfg=cfg.moe, cfg=cfg.train, seed=self.seed
            )

    def judge(self, modules: Mapping[int, Any], model: Any = None) -> dict[str, Any]:
        """The figures of a row; `model` where more than the FFNs is another's."""
        from pipeline import corpus, evaluation
        from pipeline.store import LayerReader

        sparse = evaluation.replaced(model or self.model, modules)
        row: dict[str, Any] = {"perplexity_ratio": {}, "kl": {}}
        for text in evaluation.TEXTS:
            blocks = corpus.read_blocks(self.tokens, text)
            size = self.counts[text]["bytes"]
            loss = evaluation.compare_on_text(self.model, sparse, blocks, size, batch_size=8)
            row["perplexity_ratio"][text] = loss.perplexity[1] / loss.perplexity[0]
            row["kl"][text] = float(loss.kl.mean())
        stores = {k: LayerReader(self.captures / f"layer_{k}.zarr") for k in modules}
        found = [evaluation.layer_metrics(m, stores[k]) for k, m in modules.items()]
        row["relative_mse"] = statistics.mean(m["relative_mse"] for m in found)
        row["cosine_sim"] = {
            "mean": statistics.mean(m["cosine_sim"] for m in found),
            "worst": min(m["cosine_sim"] for m in found),
        }
        row["load_max_over_mean"] = max(m["routing"]["load_max_over_mean"] for m in found)
        row["dead_experts"] = sum(m["routing"]["dead_experts"] for m in found)
        return row


def rows_of(bench: Bench, recipe: Recipe, done: set[tuple[Any, ...]]) -> Iterable[dict[str, Any]]:
    """The recipe's rows, its static and its oracle controls', but for those that are done."""
    from pipeline import budget, compose, controls
    from pipeline.ffn import DenseFFN
    from pipeline.layers import load_layer
    from pipeline.shape import MoEShape

    for regime in (r for r in REGIMES if r in recipe.regimes):
        cfg = compose.load([*recipe.overrides, *REGIMES[regime], f"seed={bench.seed}"])
        plans = budget.uniform(bench.record, cfg.moe, bench.layers)
        shape = MoEShape(**plans[0]["shape"])
        active = shape.active_ffn_fraction
        known = {"active_ffn_fraction": active, "regime": regime, "seed": bench.seed}
        ours = known | {
            "recipe": recipe.name,
            "parameters_factor": shape.n_experts * shape.d_ff_expert / shape.d_ff,
            "control": None,
        }
        static = known | {"recipe": "static", "parameters_factor": active, "control": "static"}
        with TemporaryDirectory() as temporary:
            folder, began = Path(temporary), time.monotonic()
            if key(ours) not in done:
                bench.fit(plans, cfg, folder / "ours")
                model = _heal(bench, cfg, folder) if regime == HEALED else None
                into = folder / ("healed" if regime == HEALED else "ours")
                modules = {k: load_layer(into / f"layer_{k}")[0] for k in bench.layers}
                yield ours | bench.judge(modules, model) | {"seconds": time.monotonic() - began}
                if regime == LAYER_WISE:
                    ffns = {
                        k: DenseFFN.load(bench.captures / f"ffn_{k}.safetensors") for k in modules
                    }
                    oracle = {k: controls.OracleMoE(m, ffns[k]) for k, m in modules.items()}
                    yield ours | {"control": "oracle"} | bench.judge(oracle)
            if regime != HEALED and key(static) not in done:
                done.add(key(static))
                pruned = {k: controls.static_plan(plan) for k, plan in plans.items()}
                plain = compose.load([*REGIMES[regime], f"seed={bench.seed}"])
                bench.fit(pruned, plain, folder / "static")  # pyright: ignore[reportArgumentType]
                modules = {k: load_layer(folder / "static" / f"layer_{k}")[0] for k in plans}
                yield static | bench.judge(modules)


def _heal(bench: Bench, cfg: Any, folder: Path) -> Any:
    """A copy of the dense model with the healed norms; the layers go to `folder/healed`."""
    import torch

    from pipeline import assembly, corpus, heal

    blocks = {s: corpus.read_blocks(bench.tokens, s) for s in ("train", "validation")}
    heal.heal_layers(
        bench.model,
        {k: folder / "ours" / f"layer_{k}" for k in bench.layers},
        blocks,
        folder / "healed",
        cfg=cfg.heal,
        balance_bias_rate=cfg.train.balance_bias_rate,
        seed=bench.seed,
        dtype=torch.float32,
    )
    model = copy.deepcopy(bench.model)
    assembly.set_norms(model, assembly.read_norms(folder / "healed"))
    return model


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[n] for n in ("recipe", "active_ffn_fraction", "regime", "seed", "control"))


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Mean over seeds, least and most; and the excess beside the static control's."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        name = (row["active_ffn_fraction"], row["regime"], row["recipe"], row["control"])
        groups.setdefault(name, []).append(row)
    lines = [
        "| active | regime | recipe | parameters | held-out (least-most) | excess / static's | "
        "shifted | excess / static's | KL | cosine, worst layer |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (active, regime, recipe, control), of in sorted(
        groups.items(), key=lambda g: (-g[0][0], g[0][1], g[0][2], g[0][3] or "")
    ):
        against = groups.get((active, LAYER_WISE, "static", "static"), [])
        cells = [f"{active:.0%}", regime, f"{recipe} ({control})" if control else recipe]
        cells.append(f"{of[0]['parameters_factor']:.2g}x")
        for text in ("heldout", "shifted"):
            ratios = [row["perplexity_ratio"][text] for row in of]
            spread = f" ({min(ratios):.3f}-{max(ratios):.3f})" if text == "heldout" else ""
            cells.append(f"{statistics.mean(ratios):.3f}{spread}")
            plain = [row["perplexity_ratio"][text] - 1 for row in against]
            share = (statistics.mean(ratios) - 1) / statistics.mean(plain) if plain else 0
            cells.append(f"{share:.2f}" if plain else "")
        cells.append(f"{statistics.mean(row['kl']['heldout'] for row in of):.4f}")
        cells.append(f"{min(row['cosine_sim']['worst'] for row in of):.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--recipes", help="names, separated by ';'; not given = all")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--fresh", action="store_true", help="forget the rows of earlier runs")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    runtime.configure(RuntimeConfig(threads=args.threads))
    chosen = [r for r in RECIPES if not args.recipes or r.name in args.recipes.split(";")]
    kept = args.output.is_file() and not args.fresh
    rows = json.loads(args.output.read_text())["rows"] if kept else []
    for seed in map(int, args.seeds.split(",")):
        bench = Bench(seed)
        for recipe in chosen:
            for row in rows_of(bench, recipe, {key(row) for row in rows}):
                rows.append(row)
                args.output.parent.mkdir(parents=True, exist_ok=True)
                args.output.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
                print({n: row[n] for n in ("recipe", "regime", "control", "seed")}, flush=True)
                print(row["perplexity_ratio"], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
