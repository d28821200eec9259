"""Fit one layer's MoE to the (input, output) pairs of its dense FFN.

The loss is `MSE / variance(y) + cosine_loss_weight x (1 - cosine)` plus the router's balance and z
terms. The state with the least validation loss is kept, the start included, so training never
makes a layer worse. A killed run goes on from its last checkpoint, bit for bit on a CPU: weights,
optimizer, best state, history and the position in the shuffled rows (a function of seed and step).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline import resume
from pipeline.config import MoEConfig, Schedule, TrainConfig
from pipeline.errors import ArtifactError, InputError
from pipeline.ffn import DenseFFN
from pipeline.kernels import pick_kernel
from pipeline.layers import save_layer, write_history
from pipeline.moe import SparseMoE
from pipeline.router import load_balance_loss, router_z_loss
from pipeline.runtime import Progress, silent
from pipeline.start import start_layer
from pipeline.store import LayerReader


@dataclass
class Fit:
    """Everything that a checkpoint restores."""

    moe: SparseMoE
    optimizer: torch.optim.AdamW
    best: dict[str, Tensor]
    step: int = 0
    best_step: int = 0
    best_loss: float = math.inf
    history: list[dict[str, float]] = field(default_factory=list)


def train_layer(
    reader: LayerReader,
    ffn: DenseFFN,
    plan: Mapping[str, Any],
    folder: Path,
    *,
    moe_cfg: MoEConfig,
    cfg: TrainConfig,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress = silent,
) -> SparseMoE:
    """Fit one layer, write it to `folder` and return it.

    Args:
        plan: the layer's file of the `budget` stage: `layer`, `shape`, `host`, ...
        folder: may hold the checkpoint that an interrupted call left.
        dtype: of the matrix products; weights and optimizer are float32.

    Raises:
        InputError: fewer training rows than one batch.
        ArtifactError: the loss is not finite; the last good checkpoint stays.
    """
    steps_per_epoch = reader.rows["train"] // cfg.batch_size
    if cfg.epochs and not steps_per_epoch:
        raise InputError(
            "There are fewer training tokens than one batch.",
            value=f"{reader.rows['train']} tokens, train.batch_size={cfg.batch_size}",
            rule="at least one whole batch",
            remedy="capture more tokens (data.tokens.train) or lower train.batch_size",
        )
    total = cfg.epochs * steps_per_epoch
    objective = Objective(reader, cfg, device, dtype)
    moe = start_layer(ffn, plan, moe_cfg, reader, seed=seed).to(device)
    moe.kernel, reason = pick_kernel(device.type, dtype, moe.shape, cfg.kernel.name)
    print(f"layer {plan['layer']}: kernel {moe.kernel} ({reason})", flush=True)
    fit = Fit(moe, _optimizer(moe, cfg), best=_copy(moe))
    if (folder / resume.CHECKPOINT).is_file():
        _restore(fit, folder / resume.CHECKPOINT)
    else:
        _validate(fit, objective)
    for ffn_input, ffn_output in _remaining(reader, cfg, seed, fit.step, steps_per_epoch):
        terms = _step(fit, objective, ffn_input.to(device), ffn_output.to(device), total)
        if fit.step % cfg.evaluate_every == 0 or fit.step == total:
            _validate(fit, objective, terms)
        if fit.step % cfg.checkpoint_every == 0:
            _check_finite(fit.step, terms)
            _save(fit, folder / resume.CHECKPOINT)
        progress(fit.step, total, _note(fit))
    return _finish(fit, plan, total, folder)


class Objective:
    """The loss of a layer against its dense FFN, and its value on the validation rows."""

    def __init__(
        self, reader: LayerReader, cfg: TrainConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.cfg, self.device, self.dtype = cfg, device, dtype
        self.validation = reader.read("validation")
        self.scale = 1.0
        if cfg.normalize_mse:
            # Per element, as the MSE is; a constant target keeps the literal formula.
            variance = float(self.validation[1].float().var(dim=0, unbiased=False).mean())
            self.scale = 1 / variance if variance > 0 else 1.0

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def reconstruction(self, y_hat: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(T, D), (T, D) -> the weighted MSE and cosine terms."""
        y_hat, y = y_hat.float(), y.float()
        mse = F.mse_loss(y_hat, y) * self.scale
        if not self.cfg.use_cosine_loss:
            return mse, mse.new_zeros(())
        cosine = F.cosine_similarity(y_hat, y, dim=-1).mean()
        return mse, self.cfg.cosine_loss_weight * (1 - cosine)

    @torch.no_grad()
    def validate(self, moe: SparseMoE) -> dict[str, float]:
        """Loss, relative_mse and cosine_sim over the whole validation split."""
        loss = error = power = cosine = 0.0
        rows = len(self.validation[0])
        batches = zip(*(side.split(self.cfg.batch_size) for side in self.validation), strict=True)
        for ffn_input, ffn_output in batches:
            y = ffn_output.to(self.device).float()
            with self.autocast():
                y_hat = moe(ffn_input.to(self.device)).float()
            loss += float(sum(self.reconstruction(y_hat, y))) * len(y) / rows
            error += float((y_hat - y).square().sum())
            power += float(y.square().sum())
            cosine += float(F.cosine_similarity(y_hat, y, dim=-1).sum()) / rows
        relative = error / power if power else error
        return {
            "validation_loss": loss,
            "validation_relative_mse": relative,
            "validation_cosine_sim": cosine,
        }


def _optimizer(moe: SparseMoE, cfg: TrainConfig) -> torch.optim.AdamW:
    router_rate = cfg.router_learning_rate  # may be 0, which holds the router still
    if router_rate is None:
        router_rate = cfg.learning_rate
    groups = [
        {"params": list(moe.router.parameters()), "peak": router_rate},
        {
            "params": [p for n, p in moe.named_parameters() if not n.startswith("router.")],
            "peak": cfg.learning_rate,
        },
    ]
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, weight_decay=cfg.weight_decay)


def rate(step: int, total: int, cfg: TrainConfig) -> float:
    """Share of the peak learning rate at `step`, counted from 0."""
    warm = min(1.0, (step + 1) / cfg.warmup_steps) if cfg.warmup_steps else 1.0
    if cfg.schedule is Schedule.constant:
        return warm
    return warm * 0.5 * (1 + math.cos(math.pi * step / total))


def _remaining(
    reader: LayerReader, cfg: TrainConfig, seed: int, step: int, steps_per_epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches after `step`, epoch after epoch, each in its own order."""
    if not steps_per_epoch:
        return
    first, skip = divmod(step, steps_per_epoch)
    for epoch in range(first, cfg.epochs):
        yield from reader.batches(
            "train",
            cfg.batch_size,
            seed=seed,
            epoch=epoch,
            skip=skip if epoch == first else 0,
            in_memory=not cfg.stream,
        )


def _step(
    fit: Fit, objective: Objective, ffn_input: Tensor, ffn_output: Tensor, total: int
) -> dict[str, Tensor]:
    cfg, optimizer = objective.cfg, fit.optimizer
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * rate(fit.step, total, cfg)
    with objective.autocast():
        y_hat, routing = fit.moe.forward_routed(ffn_input)
    mse, cosine = objective.reconstruction(y_hat, ffn_output)
    balance = cfg.load_balance_coef * load_balance_loss(routing)
    z = cfg.router_z_coef * router_z_loss(routing)
    loss = mse + cosine + balance + z
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if cfg.grad_clip:
        torch.nn.utils.clip_grad_norm_(fit.moe.parameters(), cfg.grad_clip)
    optimizer.step()
    fit.step += 1
    terms = {"loss": loss, "mse": mse, "cosine": cosine, "load_balance": balance, "router_z": z}
    return {name: term.detach() for name, term in terms.items()}


def _validate(fit: Fit, objective: Objective, terms: Mapping[str, Tensor] | None = None) -> None:
    row = {name: float(term) for name, term in (terms or {}).items()}
    row |= objective.validate(fit.moe)
    _check_finite(fit.step, row)
    fit.history.append({"step": fit.step, **row})
    if row["validation_loss"] < fit.best_loss:
        fit.best_loss, fit.best_step, fit.best = row["validation_loss"], fit.step, _copy(fit.moe)


def _check_finite(step: int, row: Mapping[str, Tensor | float]) -> None:
    bad = [f"{name}={float(x)}" for name, x in row.items() if not math.isfinite(x)]
    if bad:
        raise ArtifactError(
            f"Training diverged at step {step}.",
            value=", ".join(bad),
            rule="every loss is finite",
            remedy="lower train.learning_rate, or capture in bfloat16; other layers are unharmed",
        )


def _note(fit: Fit) -> str:
    last = fit.history[-1]
    cosine = f"validation cosine {last['validation_cosine_sim']:.4f}"
    return f"loss {last['loss']:.4f}, {cosine}" if "loss" in last else cosine


def _copy(moe: SparseMoE) -> dict[str, Tensor]:
    return {name: t.detach().cpu().clone() for name, t in moe.state_dict().items()}


def _save(fit: Fit, path: Path) -> None:
    kept = {
        "step": fit.step,
        "best_step": fit.best_step,
        "best_loss": fit.best_loss,
        "history": fit.history,
    }
    resume.save(path, {"model": fit.moe.state_dict(), "best": fit.best}, fit.optimizer, kept)


def _restore(fit: Fit, path: Path) -> None:
    states, kept = resume.restore(path, fit.optimizer)
    fit.moe.load_state_dict(states["model"])
    fit.best = states["best"]
    fit.step, fit.best_step = kept["step"], kept["best_step"]
    fit.best_loss, fit.history = kept["best_loss"], kept["history"]


def _finish(fit: Fit, plan: Mapping[str, Any], total: int, folder: Path) -> SparseMoE:
    fit.moe.load_state_dict(fit.best)
    write_history(folder, fit.history)
    best = next(row for row in fit.history if row["step"] == fit.best_step)
    trained = {"steps": total, "best_step": fit.best_step, "validation": best}
    save_layer(fit.moe, folder, {**plan, "training": trained})
    (folder / resume.CHECKPOINT).unlink(missing_ok=True)
    return fit.moe
