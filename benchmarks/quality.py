"""The quality table: recipes x active fraction x seeds on the embedded model, and controls.

Each seed has a dense model, text and activations of its own (`.scratch/quality/seed_N`, kept for
the next run). A recipe's layers are fitted to them and take the FFNs' places in memory; perplexity
and KL are those of the whole model on `heldout` and `shifted` text, errors those of heldout rows.
Regimes: `training-free` (the start alone), `layer-wise` (fitted, `train` at its defaults) and
`healed` (then all layers together, `heal.tokens`). Controls: `static` at each active fraction, and
`oracle` for the layers as they were fitted. Rows already in the output are not made again.

python -m benchmarks.quality [--seeds 0,1,2] [--recipes 'NAME;...'] [--fresh] [key=value ...]
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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pipeline import runtime
from pipeline.config import Config, RuntimeConfig

if TYPE_CHECKING:  # torch is imported after the threads are set
    from pipeline.ffn import DenseFFN
    from pipeline.moe import SparseMoE
    from pipeline.store import LayerReader

    Layers = Mapping[int, SparseMoE]

Plans = Mapping[int, Mapping[str, Any]]

OUTPUT = Path("benchmarks/results/quality.json")
WORK = Path(".scratch/quality")
FREE, LAYER_WISE, HEALED = "training-free", "layer-wise", "healed"
HEAL = "heal.tokens=262144"
PRECISION = "train.dtype=float32"  # the same layers on every kind of machine


@dataclass(frozen=True)
class Recipe:
    """Settings of `conf/` that make one row of the table.

    `oracle` asks every expert about every token, and `healed` trains all layers: both cost time.
    """

    name: str
    overrides: tuple[str, ...]
    oracle: bool = False
    healed: bool = False


def specialists(n_experts: int, width: float, *, shared: float = 0, **more: bool) -> Recipe:
    name = f"specialists, {n_experts} of {Fraction(width)}"
    if shared:
        name += f" beside a shared {Fraction(shared)}"
    shape = (f"moe.n_experts={n_experts}", "moe.top_k=1", f"moe.d_ff_expert={width}")
    start = ("moe.init=specialist", f"moe.shared_expert={shared or 0}")
    return Recipe(name, (*start, *shape), **more)


def clusters(n_experts: int, top_k: int) -> Recipe:
    shape = (f"moe.n_experts={n_experts}", f"moe.top_k={top_k}", f"moe.d_ff_expert={1 / n_experts}")
    start = ("moe.init=cluster", "moe.router_init=ridge", "moe.refit=true")
    return Recipe(f"clusters, {top_k} of {n_experts}", (*start, *shape))


RECIPES = (
    specialists(4, 0.5, oracle=True, healed=True),
    specialists(4, 0.25, oracle=True, healed=True),
    specialists(2, 0.5, oracle=True),
    specialists(16, 0.25),
    Recipe(
        "the seed's quarter width: specialists, 16 of 1/4, top-2",
        ("moe.n_experts=16", "moe.top_k=2", "moe.d_ff_expert=0.25"),
    ),
    specialists(2, 0.25, shared=0.5),
    clusters(16, 8),
    clusters(16, 4),
    Recipe(
        "the seed's half width: replicas, 16 of 1/2, top-2",
        ("experiment=seed_half", "moe.virtual_groups=true", "train=default"),
    ),
    clusters(16, 12),
    specialists(2, 0.75),
)


class Bench:
    """The dense model of one seed, its text and its activations."""

    def __init__(self, seed: int, overrides: Sequence[str], work: Path) -> None:
        from pipeline import artifacts, corpus, dense

        self.seed, self.overrides = seed, [PRECISION, *overrides, f"seed={seed}"]
        self.folder = (work / f"seed_{seed}").absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("conf", "params.yaml"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            into = self.folder / name
            (shutil.copytree if Path(name).is_dir() else shutil.copyfile)(name, into)
        for stage in ("dense", "tokens", "capture"):
            command = [sys.executable, "-m", f"pipeline.stages.{stage}", *self.overrides]
            path = {"PYTHONPATH": str(Path.cwd())}
            subprocess.run(command, cwd=self.folder, env=os.environ | path, check=True)
        stages = self.folder / "stages"
        self.record = artifacts.read_json(stages / "dense" / "dense.json")
        self.model = dense.load_model(str(stages / "dense" / "model"), dtype="float32")
        self.captures, self.tokens = stages / "capture", stages / "tokens"
        self.layers = [ffn["index"] for ffn in self.record["layers"]]
        self.counts = artifacts.read_json(self.tokens / corpus.RECORD)["splits"]

    def rows(self, k: int) -> "LayerReader":
        from pipeline.store import LayerReader

        return LayerReader(self.captures / f"layer_{k}.zarr")

    def ffn(self, k: int) -> "DenseFFN":
        from pipeline.ffn import DenseFFN

        return DenseFFN.load(self.captures / f"ffn_{k}.safetensors")

    def start(self, plans: Plans, cfg: Config) -> "Layers":
        from pipeline.start import start_layer

        return {
            k: start_layer(self.ffn(k), plan, cfg.moe, self.rows(k), seed=self.seed)
            for k, plan in plans.items()
        }

    def train(self, plans: Plans, cfg: Config, folder: Path, starts: "Layers") -> "Layers":
        from pipeline.notebook import train_layer

        how = {"moe_cfg": cfg.moe, "cfg": cfg.train, "seed": self.seed}
        return {
            k: train_layer(self.captures, plan, folder, **how, start=starts[k])
            for k, plan in plans.items()
        }

    def heal(self, layers: Path, healed: Path) -> tuple["Layers", Any]:
        """The healed layers, and a copy of the dense model with the healed norms."""
        import torch

        from pipeline import assembly, compose, corpus, heal
        from pipeline.layers import load_layer

        cfg = compose.load([HEAL, *self.overrides])
        heal.heal_layers(
            self.model,
            {k: layers / f"layer_{k}" for k in self.layers},
            {s: corpus.read_blocks(self.tokens, s) for s in ("train", "validation")},
            healed,
            cfg=cfg.heal,
            balance_bias_rate=cfg.train.balance_bias_rate,
            seed=self.seed,
            dtype=torch.float32,
        )
        model = copy.deepcopy(self.model)
        assembly.set_norms(model, assembly.read_norms(healed))
        return {k: load_layer(healed / f"layer_{k}")[0] for k in self.layers}, model

    def judge(self, modules: Mapping[int, Any], model: Any = None) -> dict[str, Any]:
        """The figures of a row; `model` where more than the FFNs is another's."""
        from pipeline import corpus, evaluation

        sparse = evaluation.replaced(model or self.model, modules)
        row: dict[str, Any] = {"perplexity_ratio": {}, "kl": {}}
        for text in evaluation.TEXTS:
            blocks = corpus.read_blocks(self.tokens, text)
            size = self.counts[text]["bytes"]
            loss = evaluation.compare_on_text(self.model, sparse, blocks, size, batch_size=8)
            row["perplexity_ratio"][text] = loss.perplexity[1] / loss.perplexity[0]
            row["kl"][text] = float(loss.kl.mean())
        found = [evaluation.layer_metrics(m, self.rows(k)) for k, m in modules.items()]
        row["relative_mse"] = statistics.mean(m["relative_mse"] for m in found)
        row["cosine_sim"] = {
            "mean": statistics.mean(m["cosine_sim"] for m in found),
            "worst": min(m["cosine_sim"] for m in found),
        }
        row["load_max_over_mean"] = max(m["routing"]["load_max_over_mean"] for m in found)
        row["dead_experts"] = sum(m["routing"]["dead_experts"] for m in found)
        return row


def rows_of(bench: Bench, recipe: Recipe, done: set[tuple[Any, ...]]) -> Iterable[dict[str, Any]]:
    """The recipe's rows and its controls', but for those that are done."""
    from pipeline import budget, compose, controls
    from pipeline.shape import MoEShape

    cfg = compose.load([*bench.overrides, *recipe.overrides])
    plans = budget.uniform(bench.record, cfg.moe, bench.layers)
    shape = MoEShape(**plans[bench.layers[0]]["shape"])
    active = shape.active_ffn_fraction
    neurons = shape.d_ff_shared + shape.n_experts * shape.d_ff_expert
    ours = {"recipe": recipe.name, "parameters_factor": neurons / shape.d_ff, "control": None}
    plain = {"recipe": "static", "parameters_factor": active, "control": "static"}
    pruned = {k: static for k, plan in plans.items() if (static := controls.static_plan(plan))}
    ways = {"ours": (ours, plans, cfg)}
    if pruned:
        ways["static"] = (plain, pruned, compose.load(bench.overrides))
    for name, (kind, wanted, how) in ways.items():
        known = {**kind, "active_ffn_fraction": active, "seed": bench.seed}
        steps = [(FREE, known["control"]), (LAYER_WISE, known["control"])]
        if name == "ours":
            steps += [(LAYER_WISE, "oracle")] * recipe.oracle + [(HEALED, None)] * recipe.healed
        left = [step for step in steps if key(_row(known, *step)) not in done]
        if not left:
            continue
        with TemporaryDirectory() as temporary:
            folder, began = Path(temporary), time.monotonic()
            starts, trained = bench.start(wanted, how), {}
            for regime, control in left:
                judged: tuple[Any, ...] = (starts,)
                if regime != FREE:
                    trained = trained or bench.train(wanted, how, folder / name, starts)
                    judged = (trained,)
                if control == "oracle":
                    ffns = {k: bench.ffn(k) for k in trained}
                    judged = ({k: controls.OracleMoE(m, ffns[k]) for k, m in trained.items()},)
                elif regime == HEALED:
                    judged = bench.heal(folder / name, folder / "healed")
                found = _row(known, regime, control) | bench.judge(*judged)
                yield {**found, "seconds": round(time.monotonic() - began)}


def _row(known: Mapping[str, Any], regime: str, control: str | None) -> dict[str, Any]:
    return {**known, "regime": regime, "control": control}


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
    parser.add_argument("--work", type=Path, default=WORK, help="dense models and activations")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of all configurations")
    args = parser.parse_args()
    runtime.configure(RuntimeConfig(threads=args.threads))
    runtime.settle_kernels()
    chosen = [r for r in RECIPES if not args.recipes or r.name in args.recipes.split(";")]
    kept = args.output.is_file() and not args.fresh
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    if kept:
        rows = {key(row): row for row in json.loads(args.output.read_text())["rows"]}
    for seed in map(int, args.seeds.split(",")):
        bench = Bench(seed, args.overrides, args.work)
        for recipe in chosen:
            for row in rows_of(bench, recipe, set(rows)):
                rows[key(row)] = row
                args.output.parent.mkdir(parents=True, exist_ok=True)
                args.output.write_text(json.dumps({"rows": list(rows.values())}, indent=1) + "\n")
                print({n: row[n] for n in ("recipe", "regime", "control", "seed")}, flush=True)
                print(row["perplexity_ratio"], flush=True)
    print(table(rows.values()))


if __name__ == "__main__":
    main()
