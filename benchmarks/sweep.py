"""A sweep beside the original's streaming: eight configurations, three epochs, every layer.

Streaming runs the dense model over the text in every epoch of every configuration, and each layer
takes its step on what the hooks give. Ours runs it once, into the stores, and trains from there.
The configurations differ in what a sweep varies at equal cost: seed and learning rate. The dense
model has random weights and the text is random; validations and the reading of text are left out.

The cost formula, of a sweep of C configurations, E epochs and S steps an epoch, from the seconds of
one dense forward pass over a batch (F), the start of all layers (B), one step of all layers (T),
and capture of the text (K):

    streaming  C x (B + E x S x (F + T))
    ours       K + C x (B + E x S x T)

`python -m benchmarks.sweep ours|parallel D_MODEL STEPS` trains once and prints the peak memory.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from benchmarks import measure, streaming
from benchmarks.measure import Row
from benchmarks.models import VOCAB, llama
from benchmarks.streaming import Recipe
from pipeline import budget, compose, dense, runtime
from pipeline.capture import capture_activations
from pipeline.config import Config
from pipeline.ffn import DenseFFN
from pipeline.store import LayerReader
from pipeline.training import step

CONFIGURATIONS, EPOCHS, SEQUENCE, LAYERS = 8, 3, 256, 4
SIZES = ((128, 4), (192, 4))  # d_model, steps of an epoch
TINY = ((32, 2),)
ACTIVE = {"25 %": (1, ">= 1.8"), "50 %": (2, ">= 1.4")}  # experts of a quarter run per token, goal


def rows(quick: bool) -> Iterator[Row]:
    for d_model, steps in TINY if quick else SIZES:
        for active, (top_k, goal) in ACTIVE.items():
            with tempfile.TemporaryDirectory() as name:
                yield from Sweep(Path(name), d_model, steps, top_k).rows(active, goal)
        yield _memory(d_model, steps)


def _memory(d_model: int, steps: int) -> Row:
    peaks = {}
    for way in ("ours", "parallel"):
        line = [sys.executable, "-m", "benchmarks.sweep", way, str(d_model), str(steps)]
        done = subprocess.run(line, capture_output=True, text=True, check=True)
        peaks[way] = int(done.stdout.split()[-1]) / 2**20
    ratio = peaks["ours"] / peaks["parallel"]
    return Row(
        "peak memory of capture and training: ours / streaming, in parallel",
        f"{LAYERS} layers, d {d_model}, {steps} steps an epoch",
        "MiB",
        peaks["ours"],
        peaks["parallel"],
        ratio,
        (ratio, ratio),
    )


class Sweep:
    """A dense model, text, and the recipe of one of the configurations."""

    def __init__(self, folder: Path, d_model: int, steps: int, top_k: int) -> None:
        shape = ["moe.n_experts=8", f"moe.top_k={top_k}", "moe.d_ff_expert=0.25"]
        fitted = ["moe.init=slice", "moe.router_init=random", "moe.refit=false", "capture=default"]
        layers = f"model.layers={list(range(LAYERS))}".replace(" ", "")
        self.cfg: Config = compose.load([*shape, *fitted, layers, f"train.epochs={EPOCHS}"])
        self.cfg.capture.codec = compose.load([]).capture.codec
        self.folder, self.steps, self.d_model = folder, steps, d_model
        self.device = torch.device("cpu")
        self.model = llama(d_model, LAYERS, torch.float32)
        self.blocks = text(steps * self.cfg.train.batch_size, seed=1)
        few = {"validation": text(self.cfg.train.batch_size, seed=2)}
        capture_activations(self.model, few, folder / "starts", cfg=self.cfg.capture)

    def recipe(self, configuration: int) -> Recipe:
        moe, layers = self.cfg.moe, self.cfg.model.layers
        plans = budget.uniform(dense.describe(self.model), moe, layers)
        starts = {k: LayerReader(self.folder / "starts" / f"layer_{k}.zarr") for k in plans}
        rate = self.cfg.train.learning_rate * (1 + configuration % 2)
        train = replace(self.cfg.train, learning_rate=rate)
        dtype = runtime.pick_dtype(train.dtype, self.device)
        return Recipe(plans, starts, moe, train, seed=configuration, dtype=dtype)

    def streamed(self, configuration: int) -> None:
        streaming.stream(self.model, self.blocks, self.recipe(configuration), sequential=False)

    def captured(self) -> None:
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            streaming.store(self.model, self.blocks, self.recipe(0), Path(name), self.cfg.capture)

    def trained(self, configuration: int) -> None:
        recipe = self.recipe(configuration)
        streaming.train_stored(self.folder / "captured", recipe, in_order=False)

    def forward(self) -> None:
        size = self.cfg.train.batch_size // SEQUENCE
        with torch.inference_mode():
            for batch in self.blocks.split(size):
                self.model(input_ids=batch, use_cache=False)

    def begun(self, configuration: int) -> None:
        """The start of every layer."""
        recipe = self.recipe(configuration)
        self.fits = {
            k: recipe.begin(
                k, DenseFFN.load(self.folder / "captured" / f"ffn_{k}.safetensors"), self.steps
            )
            for k in recipe.plans
        }

    def stepped(self) -> None:
        """An epoch's steps of every layer that has begun, on one batch."""
        for layer, (fit, objective) in self.fits.items():
            reader = LayerReader(self.folder / "captured" / f"layer_{layer}.zarr")
            batch = reader.read("train", 0, self.cfg.train.batch_size)
            for _ in range(self.steps):
                step(fit, objective, *batch)

    def rows(self, active: str, goal: str) -> Iterator[Row]:
        streaming.store(
            self.model, self.blocks, self.recipe(0), self.folder / "captured", self.cfg.capture
        )
        self.streamed(0)  # warm
        parts: dict[str, list[float]] = {}
        for configuration in range(CONFIGURATIONS):
            ways: dict[str, Callable[[], None]] = {
                "stream": lambda c=configuration: self.streamed(c),
                "capture": self.captured,
                "train": lambda c=configuration: self.trained(c),
                "forward": self.forward,
                "begin": lambda c=configuration: self.begun(c),
                "step": self.stepped,
            }
            for name, found in measure.turns(ways, times=1, warm_ups=0).items():
                parts.setdefault(name, []).extend(found)
        kept = median(parts["capture"])
        ours = [CONFIGURATIONS * t + kept for t in parts["train"]]
        size = f"{LAYERS} layers, d {self.d_model}, {self.blocks.numel()} tokens an epoch"
        whole = sum(parts["train"]) + kept
        swept = measure.compare(
            f"sweep of 8 x {EPOCHS} epochs, {active} active: ours / streaming, in parallel",
            ours,
            [CONFIGURATIONS * t for t in parts["stream"]],
            size=size,
            unit="sweeps/s",
            work=1,
            reach=goal,
        )
        yield replace(swept, ratio=sum(parts["stream"]) / whole)
        seconds = {name: median(of) for name, of in parts.items()}
        trained = seconds["begin"] + EPOCHS * seconds["step"]
        for way, formula, true in (
            (
                "streaming",
                CONFIGURATIONS * (trained + EPOCHS * seconds["forward"]),
                sum(parts["stream"]),
            ),
            ("ours", kept + CONFIGURATIONS * trained, whole),
        ):
            ratio = formula / true
            yield Row(
                f"sweep, {active} active, {way}: the cost formula / measured",
                size, "s", formula, true, ratio, (ratio, ratio),
            )  # fmt: skip


def text(tokens: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (tokens // SEQUENCE, SEQUENCE), generator=generator)


def main() -> None:
    way, d_model, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with tempfile.TemporaryDirectory() as name:
        sweep = Sweep(Path(name), d_model, steps, 2)
        if way == "parallel":
            sweep.streamed(0)
        else:
            recipe, cfg = sweep.recipe(0), sweep.cfg.capture
            streaming.store(sweep.model, sweep.blocks, recipe, Path(name) / "captured", cfg)
            sweep.trained(0)
    print(measure.peak_bytes())


if __name__ == "__main__":
    main()
