"""The original's way to train, beside ours, on the same batches.

Streaming: in every epoch the frozen dense model runs over each batch, and hooks give each layer's
sparse layer its (input, output) to take a step on; nothing touches the disk. In parallel every
layer steps on each dense forward pass; sequentially one layer is trained after the other, each with
dense passes of its own. Offline: one dense pass into the stores, then each layer from its own.

Both train our layer by `training.begin` and `training.step`, without validations.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.activations import record_ffn
from pipeline.capture import capture_activations
from pipeline.config import CaptureConfig, MoEConfig, TrainConfig
from pipeline.discovery import find_ffns
from pipeline.ffn import DenseFFN
from pipeline.fit_state import Fit
from pipeline.moe import SparseMoE
from pipeline.store import LayerReader, Rows
from pipeline.training import Objective, begin, step


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how; the same for every way."""

    plans: Mapping[int, Mapping[str, Any]]  # layer -> its file of the `budget` stage
    starts: Mapping[int, Rows]  # layer -> what its start and the scale of its loss are made from
    moe: MoEConfig
    train: TrainConfig  # batch_size: tokens of a step, and of a dense forward pass
    seed: int = 0
    dtype: torch.dtype = torch.float32  # of the sparse layers' matrix products
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def begin(self, layer: int, ffn: DenseFFN, steps: int) -> tuple[Fit, Objective]:
        """The untrained layer of a run of `steps` steps an epoch."""
        rows = self.starts[layer]
        objective = Objective(rows, self.train, self.device, self.dtype)
        total = steps * self.train.epochs
        fit = begin(
            rows, ffn, self.plans[layer], objective, moe_cfg=self.moe, seed=self.seed, total=total
        )
        return fit, objective


@dataclass
class Trained:
    """What a way came to."""

    moes: dict[int, SparseMoE] = field(default_factory=dict)
    curves: dict[int, list[dict[str, float]]] = field(default_factory=dict)  # terms of each step
    seconds: list[float] = field(default_factory=list)  # after each epoch, all layers' together

    def step(self, fit: Fit, objective: Objective, ffn_input: Tensor, ffn_output: Tensor) -> None:
        terms = step(fit, objective, ffn_input, ffn_output)
        curve = self.curves.setdefault(fit.layer, [])
        curve.append({name: float(term) for name, term in terms.items()})

    def add_seconds(self, epoch: int, seconds: float) -> None:
        if epoch == len(self.seconds):
            self.seconds.append(0.0)
        self.seconds[epoch] += seconds

    def finish(self, fit: Fit) -> None:
        """Keep the layer in its last state; its gradients and moments go."""
        fit.optimizer.zero_grad(set_to_none=True)
        self.moes[fit.layer] = fit.moe.eval()


def stream(model: nn.Module, blocks: Tensor, recipe: Recipe, *, sequential: bool) -> Trained:
    """Train each layer of the plans while the dense model runs.

    Args:
        model: the dense model, on the recipe's device.
        blocks: packed tokens (blocks, sequence_length); what fills no whole batch is left out.
        sequential: one layer after the other, not all on each forward pass.
    """
    batches = list(_batches(blocks.to(recipe.device), recipe.train.batch_size))
    slots = find_ffns(model)
    trained = Trained()
    layers = list(recipe.plans)
    for together in [[layer] for layer in layers] if sequential else [layers]:
        began = time.perf_counter()
        fits = [recipe.begin(k, slots[k].weights(), len(batches)) for k in together]
        with record_ffn({k: slots[k].module for k in together}) as recorded:
            for epoch in range(recipe.train.epochs):
                for batch in batches:
                    with torch.no_grad():
                        model(input_ids=batch, use_cache=False)
                    for fit, objective in fits:
                        trained.step(fit, objective, *recorded[fit.layer])
                trained.add_seconds(epoch, time.perf_counter() - began)
        for fit, _ in fits:
            trained.finish(fit)
    return trained


def _batches(blocks: Tensor, tokens: int) -> Iterator[Tensor]:
    """Whole batches of sequences."""
    sequences = tokens // blocks.shape[1]
    for batch in blocks.split(sequences):
        if len(batch) == sequences:
            yield batch


def store(
    model: nn.Module, blocks: Tensor, recipe: Recipe, folder: Path, cfg: CaptureConfig
) -> None:
    """One dense pass over `blocks` as split `train`, in the batches that `stream` has."""
    cfg = replace(cfg, batch_size=recipe.train.batch_size // blocks.shape[1])
    capture_activations(model, {"train": blocks}, folder, cfg=cfg, layers=recipe.plans)


def train_stored(folder: Path, recipe: Recipe, *, in_order: bool) -> Trained:
    """Train each layer of the plans from what `store` wrote, one after the other.

    Args:
        in_order: read from the shards the batches that `stream` has; otherwise shuffled rows that
            stay in memory, as the `train` stage does.
    """
    trained = Trained()
    for layer in recipe.plans:
        began = time.perf_counter()
        reader = LayerReader(folder / f"layer_{layer}.zarr")
        ffn = DenseFFN.load(folder / f"ffn_{layer}.safetensors")
        fit, objective = recipe.begin(layer, ffn, reader.rows["train"] // recipe.train.batch_size)
        for epoch in range(recipe.train.epochs):
            for ffn_input, ffn_output in _stored_batches(reader, recipe, epoch, in_order):
                trained.step(
                    fit, objective, ffn_input.to(recipe.device), ffn_output.to(recipe.device)
                )
            trained.add_seconds(epoch, time.perf_counter() - began)
        trained.finish(fit)
    return trained


def _stored_batches(
    reader: LayerReader, recipe: Recipe, epoch: int, in_order: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    size = recipe.train.batch_size
    if not in_order:
        yield from reader.batches("train", size, seed=recipe.seed, epoch=epoch)
        return
    for start in range(0, reader.rows["train"] - size + 1, size):
        yield reader.read("train", start, start + size)


def differences(one: Trained, other: Trained) -> list[str]:
    """Where two ways did not do the same, bit for bit: terms of a step, and final weights."""
    assert one.moes.keys() == other.moes.keys() == one.curves.keys() == other.curves.keys()
    found = []
    for layer, curve in one.curves.items():
        for index, (a, b) in enumerate(zip(curve, other.curves[layer], strict=True)):
            found += [
                f"layer {layer}, step {index}, {name}: {a[name]!r} and {b[name]!r}"
                for name in a
                if a[name] != b[name]
            ]
        ours, theirs = (trained.moes[layer].state_dict() for trained in (one, other))
        found += [
            f"layer {layer}, {name}" for name in ours if not torch.equal(ours[name], theirs[name])
        ]
    return found
