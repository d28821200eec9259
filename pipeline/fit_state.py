"""The state of one layer's training: what is judged, checkpointed, and in the end written.

The state with the least validation loss is kept, the start included. Training stops with
`StoppedError` where a loss is not finite, or where all tokens come to take the same experts.
"""

import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import resume
from pipeline.config import DynamicConfig
from pipeline.errors import ArtifactError
from pipeline.layers import save_layer, write_history
from pipeline.moe import SparseMoE
from pipeline.reallocation import ExpertLosses
from pipeline.runtime import warn
from pipeline.shape import MoEShape

LAST_GOOD = "last_good"
"""In the work folder of a layer whose training stopped: its best state, as a layer."""

KEPT = ("step", "best_step", "best_loss", "history", "sizes", "warnings")
"""Fields of a `Fit` that a checkpoint holds beside weights, optimizer and shapes."""


class StoppedError(Exception):
    """Training cannot go on; says how, with what value, under which rule, and the remedy."""

    def __init__(self, how: str, value: str, rule: str, remedy: str) -> None:
        super().__init__(how)
        self.how, self.value, self.rule, self.remedy = how, value, rule, remedy


@dataclass
class Fit:
    """Everything that a checkpoint restores, and what a step needs beside."""

    layer: int
    moe: SparseMoE
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler  # pyright: ignore[reportPrivateImportUsage]
    losses: ExpertLosses
    dynamic: DynamicConfig
    seed: int
    total: int  # steps
    router_held: bool
    tied: int  # experts in a row that share their router row
    best: dict[str, Tensor]
    best_shape: MoEShape
    step: int = 0
    best_step: int = 0
    best_loss: float = math.inf
    history: list[dict[str, float]] = field(default_factory=list)
    sizes: list[dict[str, Any]] = field(default_factory=list)  # of dynamic experts
    warnings: dict[str, str] = field(default_factory=dict)  # kind -> the first of its kind

    def judge(self, row: dict[str, float]) -> None:
        """Take what validation found at this step to the history, and keep the best state.

        Raises:
            StoppedError: a loss is not finite, or the routing collapsed.
        """
        check_finite(self.step, row)
        self._check_collapse(row)
        self._warn(row)
        self.history.append({"step": self.step, **row})
        if row["validation_loss"] < self.best_loss:
            self.best_loss, self.best_step = row["validation_loss"], self.step
            self.best, self.best_shape = copied(self.moe), self.moe.shape

    def is_stalled(self, patience: int) -> bool:
        """Whether as many validations have passed since the best one."""
        return 0 < patience <= sum(row["step"] > self.best_step for row in self.history)

    def note(self) -> str:
        """The last validation, for who watches."""
        last = self.history[-1]
        told = [f"loss {last['loss']:.4f}"] if "loss" in last else []
        told.append(f"validation cosine {last['validation_cosine_sim']:.4f}")
        return ", ".join([*told, f"{last['dead_experts']:.0f} dead experts"])

    def save(self, path: Path) -> None:
        kept = {name: getattr(self, name) for name in KEPT}
        kept["scaler"] = self.scaler.state_dict()
        kept["shapes"] = [asdict(self.moe.shape), asdict(self.best_shape)]
        losses = {"sum": self.losses.sum_E, "count": self.losses.count_E}
        states = {"model": self.moe.state_dict(), "best": self.best, "losses": losses}
        resume.save(path, states, self.optimizer, kept)

    def restore(self, path: Path) -> None:
        states, kept = resume.restore(path, self.optimizer)
        for name in KEPT:
            setattr(self, name, kept[name])
        self.scaler.load_state_dict(kept["scaler"])
        shape, self.best_shape = (MoEShape(**shape) for shape in kept["shapes"])
        self.moe.adopt(shape, states["model"])
        self.best = states["best"]
        self.losses.sum_E.copy_(states["losses"]["sum"])
        self.losses.count_E.copy_(states["losses"]["count"])

    def finish(self, plan: Mapping[str, Any], folder: Path) -> SparseMoE:
        """Write the best state as a layer; returns it in evaluation mode."""
        shutil.rmtree(folder / LAST_GOOD, ignore_errors=True)  # of a call that ended otherwise
        self._write(plan, folder)
        (folder / resume.CHECKPOINT).unlink(missing_ok=True)
        return self.moe.eval()

    def keep_last_good(
        self, plan: Mapping[str, Any], folder: Path, stopped: StoppedError
    ) -> ArtifactError:
        """Write the best state until now beside the checkpoint; returns what is to be raised."""
        kept = "no state before it was good"
        if self.history:
            good = folder / LAST_GOOD
            good.mkdir(exist_ok=True)
            self._write(plan, good)
            kept = f"the last good state, of step {self.best_step}, is kept in {good.absolute()}"
        return ArtifactError(
            f"Training of layer {self.layer} {stopped.how}.",
            value=f"{stopped.value}; {kept}",
            rule=stopped.rule,
            remedy=f"{stopped.remedy}; other layers are unharmed",
        )

    def _write(self, plan: Mapping[str, Any], folder: Path) -> None:
        self.moe.adopt(self.best_shape, self.best)
        write_history(folder, self.history)
        best = next(row for row in self.history if row["step"] == self.best_step)
        trained = {"steps": self.step, "best_step": self.best_step, "validation": best}
        trained["warnings"] = list(self.warnings.values())
        if self.sizes:
            trained["sizes"] = self.sizes
        save_layer(self.moe, folder, {**plan, "training": trained})

    def _warn(self, row: Mapping[str, float]) -> None:
        """Say once of each kind what is wrong with the routing of the validation rows."""
        shape, found = self.moe.shape, {}
        if row["dead_experts"]:
            found["dead"] = f"{row['dead_experts']:.0f} of {shape.n_experts} experts get no token"
        bound = shape.n_experts / shape.experts_per_token
        if row["load_max_over_mean"] > (1 + bound) / 2 and bound > 1:
            remedy = (
                "use other moe.n_experts" if self.router_held else "raise train.load_balance_coef"
            )
            found["collapse"] = (
                f"the routing collapses: one expert has {row['load_max_over_mean']:.1f} times an "
                f"even share, of at most {bound:.1f}; {remedy}"
            )
        if row["unserved_tokens"]:
            found["unserved"] = (
                f"{row['unserved_tokens']:.1%} of the tokens are taken by no expert and get zero; "
                "moe.routing=token_choice is recommended"
            )
        for kind, text in found.items():
            if kind not in self.warnings:
                self.warnings[kind] = f"step {self.step}: {text}"
                warn(f"layer {self.layer}, {self.warnings[kind]}")

    def _check_collapse(self, row: Mapping[str, float]) -> None:
        """Whether all tokens take the same experts, and took others before."""
        shape = self.moe.shape
        idle = shape.n_experts - shape.top_k
        collapsed = 0 < idle == row["dead_experts"] and shape.routing == "token_choice"
        if collapsed and any(before["dead_experts"] < idle for before in self.history):
            raise StoppedError(
                f"collapsed at step {self.step}",
                f"{idle} of {shape.n_experts} experts get no token of validation",
                f"tokens take more than the same top_k={shape.top_k} experts",
                "raise train.load_balance_coef, or lower train.router_learning_rate",
            )


def check_finite(step: int, row: Mapping[str, Tensor | float]) -> None:
    """Raise `StoppedError` where a loss is not finite."""
    bad = [f"{name}={float(x)}" for name, x in row.items() if not math.isfinite(x)]
    if bad:
        raise StoppedError(
            f"diverged at step {step}",
            ", ".join(bad),
            "every loss is finite",
            "lower train.learning_rate, or capture in bfloat16",
        )


def copied(moe: SparseMoE) -> dict[str, Tensor]:
    """The layer's state, on the CPU."""
    return {name: t.detach().cpu().clone() for name, t in moe.state_dict().items()}
