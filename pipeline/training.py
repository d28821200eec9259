"""Fit one layer's MoE to the (input, output) pairs of its dense FFN.

The loss is `MSE / variance(y) + cosine_loss_weight x (1 - cosine)` plus the router's balance and z
terms. The state with the least validation loss is kept, the start included, so training never
makes a layer worse; after `train.patience` validations without a better one it stops. A killed run
goes on from its last checkpoint, bit for bit on a CPU: weights, optimizer, best state, history and
the position in the shuffled rows (a function of seed and step).

With one expert per token a router's weights are always 1: the output tells it nothing, and balance
alone would pull it away from what it was fitted to. Where the start has fitted it, it is held still
and its two terms are 0; a balance bias is not a part of that, and moves.

`begin` and `step` are the loop's two halves, for who brings the batches along.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline import footprint, preflight, resident, resume
from pipeline.config import DynamicConfig, MoEConfig, Schedule, TrainConfig
from pipeline.errors import ArtifactError, InputError
from pipeline.ffn import DenseFFN
from pipeline.fit_state import Fit, StoppedError, check_finite, copied
from pipeline.kernels import pick_kernel
from pipeline.loggers import Log, no_log
from pipeline.moe import SparseMoE, fit_thresholds
from pipeline.progress import Progress, silent
from pipeline.reallocation import ExpertLosses, plan_widths, resize_experts
from pipeline.router import load_balance_loss, router_z_loss, routing_statistics
from pipeline.runtime import loss_scaler, tell
from pipeline.start import has_ridge, start_layer
from pipeline.synthetic import SyntheticRows

if TYPE_CHECKING:
    from pipeline.store import LayerReader, Rows

ROUTING = ("dead_experts", "load_max_over_mean", "load_entropy", "unserved_tokens")
"""What of the routing of the validation rows goes to the history."""


def fit_layer(
    reader: "LayerReader",
    ffn: DenseFFN,
    plan: Mapping[str, Any],
    folder: Path,
    *,
    moe_cfg: MoEConfig,
    cfg: TrainConfig,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    start: SparseMoE | None = None,
    progress: Progress = silent,
    log: Log = no_log,
) -> SparseMoE:
    """Fit one layer, write it to `folder` and return it in evaluation mode.

    Args:
        plan: the layer's file of the `budget` stage: `layer`, `shape`, `host`, ...
        folder: may hold the checkpoint that an interrupted call left.
        dtype: of the matrix products; weights and optimizer are float32.
        start: the untrained layer, where it is made already; null = `start.start_layer`.
        log: gets each row of the history and its learning rate.

    Raises:
        InputError: fewer training rows than one batch.
        ResourceError: there is no room for its checkpoints.
        ArtifactError: the loss is not finite, or the routing collapses: all tokens take the same
            experts, which they did not before. The best state until then is kept in `LAST_GOOD`,
            as a layer; it is not published.
    """
    _check_widths(reader, ffn, plan)
    steps_per_epoch = reader.rows["train"] // cfg.batch_size
    if cfg.epochs and not steps_per_epoch:
        raise InputError(
            "There are fewer training tokens than one batch.",
            value=f"{reader.rows['train']} tokens, train.batch_size={cfg.batch_size}",
            rule="at least one whole batch",
            remedy="capture more tokens (data.tokens.train) or lower train.batch_size",
        )
    rows: Rows = reader
    if cfg.data_free:
        rows = SyntheticRows(reader, ffn.to(device, torch.float32), seed=seed)
    objective = Objective(rows, cfg, device, dtype)
    fit = begin(
        rows,
        ffn,
        plan,
        objective,
        moe_cfg=moe_cfg,
        seed=seed,
        total=cfg.epochs * steps_per_epoch,
        start=start,
    )
    if fit.total:
        learning = sum(p.numel() for p in fit.moe.parameters())
        lever = "a smaller layer (moe.n_experts, moe.d_ff_expert) takes less in proportion"
        preflight.check_checkpoints(f"layer {fit.layer}", folder, learning, lever)
    try:
        if (folder / resume.CHECKPOINT).is_file():
            fit.restore(folder / resume.CHECKPOINT)
        else:
            fit.judge(objective.validate(fit.moe))
        batches = _batches(fit, objective, rows, moe_cfg.dynamic)
        for ffn_input, ffn_output in _remaining(batches, cfg, seed, fit.step, steps_per_epoch):
            if fit.is_stalled(cfg.patience):
                break
            terms = step(fit, objective, ffn_input.to(device), ffn_output.to(device))
            if fit.step % cfg.evaluate_every == 0 or fit.step == fit.total:
                row = {name: float(term) for name, term in terms.items()}
                fit.judge(row | objective.validate(fit.moe))
                log({**fit.history[-1], "learning_rate": fit.optimizer.param_groups[-1]["lr"]})
            if fit.step % cfg.checkpoint_every == 0:
                check_finite(fit.step, terms)
                fit.save(folder / resume.CHECKPOINT)
            progress(fit.step, fit.total, fit.note())
    except StoppedError as stopped:
        raise fit.keep_last_good(plan, folder, stopped) from None
    return fit.finish(plan, folder)


def _check_widths(reader: "LayerReader", ffn: DenseFFN, plan: Mapping[str, Any]) -> None:
    wanted = plan["shape"]["d_model"], plan["shape"]["d_ff"]
    found = {"store": (reader.d_model, wanted[1]), "dense FFN": (ffn.d_model, ffn.d_ff)}
    wrong = [f"{name} has {sizes}" for name, sizes in found.items() if sizes != wanted]
    if wrong:
        raise ArtifactError(
            f"What layer {plan['layer']} would be fitted to is another model's.",
            value=f"(d_model, d_ff) {wanted} planned; {', '.join(wrong)}; {reader.path.absolute()}",
            rule="store, dense FFN and plan of a layer have one width",
            remedy="run `dvc repro capture budget`",
        )


def _batches(
    fit: Fit, objective: "Objective", rows: "Rows", dynamic: DynamicConfig
) -> resident.Batches:
    """What gives the batches: on a GPU those that lie there or come ahead of it.

    Where the training rows lie on the device, the validation rows are put there too.
    """
    cfg, device = objective.cfg, objective.device
    if device.type == "cpu" or cfg.data_free:
        return rows.batches
    if cfg.stream:
        tell(f"rows of layer {fit.layer}", "on the CPU", "train.stream=true")
        return resident.fed(rows, device)
    shape = fit.moe.shape
    if dynamic.enabled:
        widest = max(shape.d_ff_expert, dynamic.max_d_ff)
        shape = replace(shape, d_ff_expert=widest, expert_widths=None)
    itemsize = objective.validation[0].itemsize
    train, validation = rows.rows["train"], rows.rows["validation"]
    need = footprint.pair(rows.d_model, itemsize, train + validation)
    beside = footprint.training(shape, cfg.batch_size, validation)
    if not resident.fits(f"rows of layer {fit.layer}", device, need, beside):
        return resident.fed(rows, device)
    x_TD, y_TD = objective.validation
    objective.validation = x_TD.to(device), y_TD.to(device)
    return resident.gathered(resident.upload(rows, "train", device))


def begin(
    rows: "Rows",
    ffn: DenseFFN,
    plan: Mapping[str, Any],
    objective: "Objective",
    *,
    moe_cfg: MoEConfig,
    seed: int,
    total: int,
    start: SparseMoE | None = None,
) -> Fit:
    """The untrained layer, made on the objective's device, and its optimizer.

    Args:
        rows: what the start is made from; see `start.start_layer`.
        total: steps that the schedule is made for.
        start: as `fit_layer`; it stays as it is.
    """
    device, layer = objective.device, plan["layer"]
    if start is None:
        moe = start_layer(ffn, plan, moe_cfg, rows, seed=seed, device=device).to(device)
    else:
        moe = copy.deepcopy(start).to(device)
    kernel = objective.cfg.kernel.name
    moe.kernel, reason = pick_kernel(device.type, objective.dtype, moe.shape, kernel)
    fitted = plan["init"] == "specialist" or has_ridge(plan["init"], moe_cfg)
    held = fitted and not moe.shape.weighs
    tell(f"kernel of layer {layer}", moe.kernel, reason)
    fit = Fit(
        layer=layer,
        moe=moe,
        optimizer=_optimizer(moe, objective.cfg, held),
        scaler=loss_scaler(device, objective.dtype),
        router_held=held,
        tied=moe.shape.groups if moe_cfg.virtual_groups else 1,
        losses=ExpertLosses(moe.shape.n_experts, device),
        dynamic=moe_cfg.dynamic,
        seed=seed,
        total=total,
        best=copied(moe),
        best_shape=moe.shape,
    )
    if fit.dynamic.enabled:
        fit.sizes.append({"step": 0, "widths": list(moe.shape.widths)})
    return fit


class Objective:
    """The loss of a layer against its dense FFN, and its value on the validation rows."""

    def __init__(
        self,
        reader: "Rows",
        cfg: TrainConfig,
        device: torch.device,
        dtype: torch.dtype,
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

    def losses(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """(T, D), (T, D) -> (T,): what each token adds to the mean of `reconstruction`."""
        y_hat, y = y_hat.detach().float(), y.float()
        loss_T = (y_hat - y).square().mean(dim=-1) * self.scale
        if self.cfg.use_cosine_loss:
            cosine_T = F.cosine_similarity(y_hat, y, dim=-1)
            loss_T = loss_T + self.cfg.cosine_loss_weight * (1 - cosine_T)
        return loss_T

    @torch.no_grad()
    def validate(self, moe: SparseMoE) -> dict[str, float]:
        """Loss, relative_mse, cosine_sim and `ROUTING` over the whole validation split.

        In evaluation mode: as the layer will be run. What experts that choose will take is fitted
        here first.
        """
        loss = error = power = cosine = 0.0
        rows = len(self.validation[0])
        batches = zip(*(side.split(self.cfg.batch_size) for side in self.validation), strict=True)
        taken = []
        moe.eval()
        if moe.shape.capacity_factor is not None:
            fit_thresholds(moe, self.validation[0].to(self.device))
        for ffn_input, ffn_output in batches:
            y = ffn_output.to(self.device).float()
            with self.autocast():
                y_hat, routing = moe.forward_routed(ffn_input.to(self.device))
            y_hat = y_hat.float()
            loss += float(sum(self.reconstruction(y_hat, y))) * len(y) / rows
            error += float((y_hat - y).square().sum())
            power += float(y.square().sum())
            cosine += float(F.cosine_similarity(y_hat, y, dim=-1).sum()) / rows
            taken.append(routing.taken_TE())
        moe.train()
        relative = error / power if power else error
        statistics = routing_statistics(torch.cat(taken))
        return {
            "validation_loss": loss,
            "validation_relative_mse": relative,
            "validation_cosine_sim": cosine,
            **{name: statistics[name] for name in ROUTING},  # pyright: ignore[reportReturnType]
        }


def _optimizer(moe: SparseMoE, cfg: TrainConfig, router_held: bool) -> torch.optim.AdamW:
    router_rate = cfg.router_learning_rate  # may be 0, which holds the router still
    if router_rate is None:
        router_rate = cfg.learning_rate
    if router_held:
        router_rate = 0.0
    groups = [
        {"params": list(moe.router.parameters()), "peak": router_rate},
        {
            "params": [p for n, p in moe.named_parameters() if not n.startswith("router.")],
            "peak": cfg.learning_rate,
        },
    ]
    # fused: a third of the time on a CPU too
    return torch.optim.AdamW(groups, cfg.learning_rate, weight_decay=cfg.weight_decay, fused=True)


def rate(step: int, total: int, cfg: TrainConfig) -> float:
    """Share of the peak learning rate at `step`, counted from 0."""
    warm = min(1.0, (step + 1) / cfg.warmup_steps) if cfg.warmup_steps else 1.0
    if cfg.schedule is Schedule.constant:
        return warm
    return warm * 0.5 * (1 + math.cos(math.pi * step / total))


def _remaining(
    batches: resident.Batches, cfg: TrainConfig, seed: int, step: int, steps_per_epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches after `step`, epoch after epoch, each in its own order."""
    if not steps_per_epoch:
        return
    first, skip = divmod(step, steps_per_epoch)
    for epoch in range(first, cfg.epochs):
        yield from batches(
            "train",
            cfg.batch_size,
            seed=seed,
            epoch=epoch,
            skip=skip if epoch == first else 0,
            in_memory=not cfg.stream,
        )


def step(
    fit: Fit, objective: Objective, ffn_input: Tensor, ffn_output: Tensor
) -> dict[str, Tensor]:
    """One batch, (T, D) each, on the objective's device; returns the loss and its terms."""
    cfg, optimizer = objective.cfg, fit.optimizer
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * rate(fit.step, fit.total, cfg)
    fit.moe.train()
    with objective.autocast():
        y_hat, routing = fit.moe.forward_routed(ffn_input)
    mse, cosine = objective.reconstruction(y_hat, ffn_output)
    learns = float(not fit.router_held)
    balance = learns * cfg.load_balance_coef * load_balance_loss(routing)
    z = learns * cfg.router_z_coef * router_z_loss(routing)
    loss = mse + cosine + balance + z
    optimizer.zero_grad(set_to_none=True)
    fit.scaler.scale(loss).backward()
    fit.scaler.unscale_(optimizer)
    fit.moe.router.share_gradient(fit.tied)
    if cfg.grad_clip:
        torch.nn.utils.clip_grad_norm_(fit.moe.parameters(), cfg.grad_clip)
    fit.scaler.step(optimizer)
    fit.scaler.update()
    fit.step += 1
    if fit.moe.shape.balance_bias:
        fit.moe.router.adjust_balance_bias(routing, cfg.balance_bias_rate)
    if fit.dynamic.enabled:
        fit.losses.add(routing, objective.losses(y_hat, ffn_output))
        if fit.step % fit.dynamic.reallocate_every_n_steps == 0 and fit.step < fit.total:
            _reallocate(fit)
    terms = {"loss": loss, "mse": mse, "cosine": cosine, "load_balance": balance, "router_z": z}
    return {name: term.detach() for name, term in terms.items()}


def _reallocate(fit: Fit) -> None:
    widths = plan_widths(fit.moe.shape.widths, fit.losses.mean(), fit.dynamic)
    generator = torch.Generator().manual_seed(fit.seed + 1000003 * fit.layer + fit.step)
    resize_experts(fit.moe, fit.optimizer, widths, fit.dynamic.growth, generator)
    fit.losses.reset()
    fit.sizes.append({"step": fit.step, "widths": list(widths)})
