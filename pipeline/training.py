"""Fit one layer's MoE to the (input, output) pairs of its dense FFN.

The loss is `MSE / variance(y) + cosine_loss_weight x (1 - cosine)` plus the router's balance and z
terms. The state with the least validation loss is kept, the start included, so training never
makes a layer worse; after `train.patience` validations without a better one it stops. A killed run
goes on from its last checkpoint, bit for bit on a CPU: weights, optimizer, best state, history and
the position in the shuffled rows (a function of seed and step).

A specialist start with one expert per token brings a finished router, whose weights are always 1:
the output tells it nothing, and balance alone would pull it away from what it was fitted to. It is
held still, and its two terms are 0.

`begin` and `step` are the loop's two halves, for who brings the batches along.
"""

import copy
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline import footprint, preflight, resident, resume
from pipeline.config import DynamicConfig, MoEConfig, Schedule, TrainConfig
from pipeline.errors import ArtifactError, InputError
from pipeline.ffn import DenseFFN
from pipeline.kernels import pick_kernel
from pipeline.layers import save_layer, write_history
from pipeline.loggers import Log, no_log
from pipeline.moe import SparseMoE, fit_thresholds
from pipeline.progress import Progress, silent
from pipeline.reallocation import ExpertLosses, plan_widths, resize_experts
from pipeline.router import load_balance_loss, router_z_loss, routing_statistics
from pipeline.runtime import tell, warn
from pipeline.shape import MoEShape
from pipeline.start import start_layer
from pipeline.synthetic import SyntheticRows

if TYPE_CHECKING:
    from pipeline.store import LayerReader, Rows

LAST_GOOD = "last_good"
"""In the work folder of a layer whose training stopped: its best state, as a layer."""

ROUTING = ("dead_experts", "load_max_over_mean", "load_entropy", "unserved_tokens")
"""What of the routing of the validation rows goes to the history."""


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
    losses: ExpertLosses
    dynamic: DynamicConfig
    seed: int
    total: int  # steps
    router_held: bool
    best: dict[str, Tensor]
    best_shape: MoEShape
    step: int = 0
    best_step: int = 0
    best_loss: float = math.inf
    history: list[dict[str, float]] = field(default_factory=list)
    sizes: list[dict[str, Any]] = field(default_factory=list)  # of dynamic experts
    warnings: dict[str, str] = field(default_factory=dict)  # kind -> the first of its kind


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
    learning = sum(p.numel() for p in fit.moe.parameters())
    lever = "a smaller layer (moe.n_experts, moe.d_ff_expert) takes less in proportion"
    preflight.check_checkpoints(f"layer {fit.layer}", folder, learning, lever)
    try:
        if (folder / resume.CHECKPOINT).is_file():
            _restore(fit, folder / resume.CHECKPOINT)
        else:
            _validate(fit, objective)
        batches = _batches(fit, objective, rows, moe_cfg.dynamic)
        for ffn_input, ffn_output in _remaining(batches, cfg, seed, fit.step, steps_per_epoch):
            if _is_stalled(fit, cfg.patience):
                break
            terms = step(fit, objective, ffn_input.to(device), ffn_output.to(device))
            if fit.step % cfg.evaluate_every == 0 or fit.step == fit.total:
                _validate(fit, objective, terms)
                log({**fit.history[-1], "learning_rate": fit.optimizer.param_groups[-1]["lr"]})
            if fit.step % cfg.checkpoint_every == 0:
                _check_finite(fit.step, terms)
                _save(fit, folder / resume.CHECKPOINT)
            progress(fit.step, fit.total, _note(fit))
    except StoppedError as stopped:
        raise _keep_last_good(fit, plan, folder, stopped) from None
    return _finish(fit, plan, folder)


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
    alone = moe.shape.routing == "token_choice" and moe.shape.top_k == 1
    held = plan["init"] == "specialist" and alone
    tell(f"kernel of layer {layer}", moe.kernel, reason)
    fit = Fit(
        layer=layer,
        moe=moe,
        optimizer=_optimizer(moe, objective.cfg, held),
        router_held=held,
        losses=ExpertLosses(moe.shape.n_experts, device),
        dynamic=moe_cfg.dynamic,
        seed=seed,
        total=total,
        best=_copy(moe),
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
    fused = moe.down_proj.device.type == "cuda" or None  # null: as torch does it on a CPU
    optimizer = {"lr": cfg.learning_rate, "weight_decay": cfg.weight_decay, "fused": fused}
    return torch.optim.AdamW(groups, **optimizer)


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
    loss.backward()
    if cfg.grad_clip:
        torch.nn.utils.clip_grad_norm_(fit.moe.parameters(), cfg.grad_clip)
    optimizer.step()
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


def _validate(fit: Fit, objective: Objective, terms: Mapping[str, Tensor] | None = None) -> None:
    row = {name: float(term) for name, term in (terms or {}).items()}
    row |= objective.validate(fit.moe)
    _check_finite(fit.step, row)
    _check_collapse(fit, row)
    _warn(fit, row)
    fit.history.append({"step": fit.step, **row})
    if row["validation_loss"] < fit.best_loss:
        fit.best_loss, fit.best_step, fit.best = row["validation_loss"], fit.step, _copy(fit.moe)
        fit.best_shape = fit.moe.shape


def _is_stalled(fit: Fit, patience: int) -> bool:
    """Whether as many validations have passed since the best one."""
    return 0 < patience <= sum(row["step"] > fit.best_step for row in fit.history)


def _warn(fit: Fit, row: Mapping[str, float]) -> None:
    """Say once of each kind what is wrong with the routing of the validation rows."""
    shape, found = fit.moe.shape, {}
    if row["dead_experts"]:
        found["dead"] = f"{row['dead_experts']:.0f} of {shape.n_experts} experts get no token"
    bound = shape.n_experts / shape.experts_per_token
    if row["load_max_over_mean"] > (1 + bound) / 2 and bound > 1:
        remedy = "use other moe.n_experts" if fit.router_held else "raise train.load_balance_coef"
        found["collapse"] = (
            f"the routing collapses: one expert has {row['load_max_over_mean']:.1f} times an even "
            f"share, of at most {bound:.1f}; {remedy}"
        )
    if row["unserved_tokens"]:
        found["unserved"] = (
            f"{row['unserved_tokens']:.1%} of the tokens are taken by no expert and get zero; "
            "moe.routing=token_choice is recommended"
        )
    for kind, text in found.items():
        if kind not in fit.warnings:
            fit.warnings[kind] = f"step {fit.step}: {text}"
            warn(f"layer {fit.layer}, {fit.warnings[kind]}")


def _check_finite(step: int, row: Mapping[str, Tensor | float]) -> None:
    bad = [f"{name}={float(x)}" for name, x in row.items() if not math.isfinite(x)]
    if bad:
        raise StoppedError(
            f"diverged at step {step}",
            ", ".join(bad),
            "every loss is finite",
            "lower train.learning_rate, or capture in bfloat16",
        )


def _check_collapse(fit: Fit, row: Mapping[str, float]) -> None:
    """Whether all tokens take the same experts, and took others before."""
    idle = fit.moe.shape.n_experts - fit.moe.shape.top_k
    collapsed = 0 < idle == row["dead_experts"] and fit.moe.shape.routing == "token_choice"
    if collapsed and any(before["dead_experts"] < idle for before in fit.history):
        raise StoppedError(
            f"collapsed at step {fit.step}",
            f"{idle} of {fit.moe.shape.n_experts} experts get no token of validation",
            f"tokens take more than the same top_k={fit.moe.shape.top_k} experts",
            "raise train.load_balance_coef, or lower train.router_learning_rate",
        )


def _keep_last_good(
    fit: Fit, plan: Mapping[str, Any], folder: Path, stopped: StoppedError
) -> ArtifactError:
    """Write the best state until now beside the checkpoint; returns what is to be raised."""
    kept = "no state before it was good"
    if fit.history:
        good = folder / LAST_GOOD
        good.mkdir(exist_ok=True)
        _write(fit, plan, good)
        kept = f"the last good state, of step {fit.best_step}, is kept in {good.absolute()}"
    return ArtifactError(
        f"Training of layer {fit.layer} {stopped.how}.",
        value=f"{stopped.value}; {kept}",
        rule=stopped.rule,
        remedy=f"{stopped.remedy}; other layers are unharmed",
    )


def _note(fit: Fit) -> str:
    last = fit.history[-1]
    told = [f"loss {last['loss']:.4f}"] if "loss" in last else []
    told.append(f"validation cosine {last['validation_cosine_sim']:.4f}")
    return ", ".join([*told, f"{last['dead_experts']:.0f} dead experts"])


def _copy(moe: SparseMoE) -> dict[str, Tensor]:
    return {name: t.detach().cpu().clone() for name, t in moe.state_dict().items()}


KEPT = ("step", "best_step", "best_loss", "history", "sizes", "warnings")


def _save(fit: Fit, path: Path) -> None:
    kept = {name: getattr(fit, name) for name in KEPT}
    kept["shapes"] = [asdict(fit.moe.shape), asdict(fit.best_shape)]
    losses = {"sum": fit.losses.sum_E, "count": fit.losses.count_E}
    states = {"model": fit.moe.state_dict(), "best": fit.best, "losses": losses}
    resume.save(path, states, fit.optimizer, kept)


def _restore(fit: Fit, path: Path) -> None:
    states, kept = resume.restore(path, fit.optimizer)
    for name in KEPT:
        setattr(fit, name, kept[name])
    shape, fit.best_shape = (MoEShape(**shape) for shape in kept["shapes"])
    fit.moe.adopt(shape, states["model"])
    fit.best = states["best"]
    fit.losses.sum_E.copy_(states["losses"]["sum"])
    fit.losses.count_E.copy_(states["losses"]["count"])


def _finish(fit: Fit, plan: Mapping[str, Any], folder: Path) -> SparseMoE:
    shutil.rmtree(folder / LAST_GOOD, ignore_errors=True)  # of a call that ended otherwise
    _write(fit, plan, folder)
    (folder / resume.CHECKPOINT).unlink(missing_ok=True)
    return fit.moe.eval()


def _write(fit: Fit, plan: Mapping[str, Any], folder: Path) -> None:
    fit.moe.adopt(fit.best_shape, fit.best)
    write_history(folder, fit.history)
    best = next(row for row in fit.history if row["step"] == fit.best_step)
    trained = {"steps": fit.step, "best_step": fit.best_step, "validation": best}
    trained["warnings"] = list(fit.warnings.values())
    if fit.sizes:
        trained["sizes"] = fit.sizes
    save_layer(fit.moe, folder, {**plan, "training": trained})
