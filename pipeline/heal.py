"""Train all sparse layers together, in the dense model's place, on the dense model's logits.

A layer that is fitted alone never sees the errors of the layers before it. Here the loss is
KL(dense || sparse) of every predicted token, plus the routers' balance and z terms summed over
layers. Routers, experts and, where asked, norms learn; attention and embeddings stay as they are,
and so does the router of a layer with one expert per token, which no gradient reaches.
The state with the least KL on validation is kept, the start included. A killed run goes on from its
last checkpoint, bit for bit on a CPU: the position in the shuffled blocks is a function of seed and
step.

Experts that choose their tokens choose among the batch while they learn, which holds what they cost
at `capacity_factor`; trained under their thresholds they would take ever more. The thresholds are
fitted anew at each validation, to what the layers then see.

**Memory.** Both models share every frozen tensor: the dense model once, in float32; 4 x 4 bytes per
parameter that learns (itself, gradient, two moments), and a copy of the best on the CPU; the
activations of `batch_size` sequences; and about 6 float32 tensors of batch_size x sequence_length x
vocab_size for the loss, which decides for large vocabularies.
"""

import itertools
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from pipeline import durable, preflight, resume, shuffle
from pipeline.assembly import NORMS, find_norms, replace_ffns, shared_copy
from pipeline.config import HealConfig
from pipeline.corpus import check_token_ids
from pipeline.errors import ArtifactError, ConfigError, InputError
from pipeline.kernels import pick_kernel
from pipeline.layers import HISTORY, is_complete, load_layer, save_layer, write_history
from pipeline.loggers import Log, no_log
from pipeline.moe import SparseMoE
from pipeline.progress import Progress, silent
from pipeline.router import Routing, load_balance_loss, router_z_loss, thresholds
from pipeline.runtime import loss_scaler, tell


class RoutedMoE(nn.Module):
    """A layer in its place in the model; keeps the routing of its last pass."""

    routing: Routing

    def __init__(self, moe: SparseMoE) -> None:
        super().__init__()
        self.moe = moe
        groups = moe.shape.groups
        self.tied = groups if moe.router.has_equal_rows(groups) else 1

    def forward(self, x: Tensor) -> Tensor:
        y, self.routing = self.moe.forward_routed(x)
        return y


@dataclass
class Healing:
    """Both models, and everything that a checkpoint restores."""

    dense: PreTrainedModel
    sparse: PreTrainedModel
    layers: dict[int, RoutedMoE]
    norms: dict[str, nn.Parameter]
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler  # pyright: ignore[reportPrivateImportUsage]
    cfg: HealConfig
    balance_bias_rate: float
    dtype: torch.dtype
    total: int  # steps
    best: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    best_step: int = 0
    best_kl: float = math.inf
    history: list[dict[str, float]] = field(default_factory=list)

    def state(self) -> dict[str, Tensor]:
        """All that learns, by one name each: `<layer>/<tensor>` and `norms/<name>`."""
        layers = {
            f"{k}/{name}": tensor
            for k, layer in self.layers.items()
            for name, tensor in layer.moe.state_dict().items()
        }
        return layers | {f"norms/{name}": p.detach() for name, p in self.norms.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def logits(self, model: PreTrainedModel, batch: Tensor) -> Tensor:
        """(B, S) token ids -> (B, S - 1, V): the predictions of all tokens but each first."""
        kind = batch.device.type
        with torch.autocast(kind, self.dtype, enabled=self.dtype != torch.float32):
            return model(input_ids=batch, use_cache=False).logits[:, :-1]


def heal_layers(
    model: PreTrainedModel,
    trained: Mapping[int, Path],
    blocks: Mapping[str, Tensor],
    folder: Path,
    *,
    cfg: HealConfig,
    balance_bias_rate: float,
    seed: int,
    dtype: torch.dtype,
    progress: Progress = silent,
    log: Log = no_log,
) -> None:
    """Write to `folder` each healed layer as `train` writes it, and the norms that learned.

    A layer's record gains `healing`: tokens, steps, best step, and KL and perplexity on validation
    before and after.

    Args:
        model: the dense model in float32, on the device that it runs on; it is frozen, its weights
            stay what they are.
        trained: each layer's folder.
        blocks: `train` and `validation`, each (blocks, sequence_length) token ids.
        folder: may hold the checkpoint that an interrupted call left.
        balance_bias_rate: per step, where a router has a balance bias.
        dtype: of the matrix products.
        log: gets each row of the history and the experts' learning rate.

    Raises:
        ConfigError: the model is an encoder.
        InputError: less text than one batch, or layers of another model.
        ArtifactError: a layer is damaged, or the loss is not finite.
    """
    path = folder / resume.CHECKPOINT
    if all(is_complete(folder / f"layer_{k}") for k in trained):
        path.unlink(missing_ok=True)
        return
    if not model.can_generate():
        raise ConfigError(
            "An encoder cannot be healed.",
            value=f"{type(model).__name__}, heal.tokens={cfg.tokens}",
            rule="healing compares predictions of the next token",
            remedy="set heal.tokens=0",
        )
    if len(blocks["train"]) < cfg.batch_size:
        raise InputError(
            "There are fewer training blocks than one batch.",
            value=f"{len(blocks['train'])} blocks, heal.batch_size={cfg.batch_size}",
            rule="at least one whole batch",
            remedy="give more text (data.tokens.train) or lower heal.batch_size",
        )
    for tokens in blocks.values():
        check_token_ids(tokens, model.get_input_embeddings().num_embeddings)  # type: ignore
    folder.mkdir(parents=True, exist_ok=True)
    step_tokens = cfg.batch_size * blocks["train"].shape[1]
    total = max(1, cfg.tokens // step_tokens)
    read = {k: load_layer(path) for k, path in trained.items()}
    moes = {k: moe for k, (moe, _) in read.items()}
    healing = _begin(model, moes, cfg, balance_bias_rate, dtype, total)
    learning = sum(p.numel() for group in healing.optimizer.param_groups for p in group["params"])
    preflight.check_checkpoints("healing", folder, learning, "heal.tokens=0 needs none")
    if path.is_file():
        _restore(healing, path)
    else:
        _validate(healing, blocks["validation"])
    remaining = _batches(blocks["train"], cfg.batch_size, seed, healing.step)
    for batch in itertools.islice(remaining, total - healing.step):
        terms = _step(healing, batch.to(model.device))
        if healing.step % cfg.evaluate_every == 0 or healing.step == total:
            _validate(healing, blocks["validation"], terms)
            log({**healing.history[-1], "learning_rate": healing.optimizer.param_groups[0]["lr"]})
        if healing.step % cfg.checkpoint_every == 0:
            _check_finite(healing.step, terms)
            _save(healing, path)
        progress(healing.step, total, _note(healing))
    records = {k: record for k, (_, record) in read.items()}
    _finish(healing, trained, records, folder, total * step_tokens)


def _note(healing: Healing) -> str:
    last = healing.history[-1]
    told = [f"loss {last['loss']:.4f}"] if "loss" in last else []
    told.append(f"validation KL {last['validation_kl']:.4f}, best {healing.best_kl:.4f}")
    return ", ".join(told)


def _begin(
    model: PreTrainedModel,
    moes: Mapping[int, SparseMoE],
    cfg: HealConfig,
    balance_bias_rate: float,
    dtype: torch.dtype,
    total: int,
) -> Healing:
    """The sparse model beside the dense one, sharing what neither changes, and its optimizer."""
    model.eval().requires_grad_(False)
    sparse = shared_copy(model)
    paths, layers = replace_ffns(sparse, moes), {}
    for k, moe in moes.items():
        moe.kernel, reason = pick_kernel(model.device.type, dtype, moe.shape)
        tell(f"kernel of layer {k}", moe.kernel, reason)
        layers[k] = RoutedMoE(moe)
        sparse.set_submodule(paths[k], layers[k])
    norms = _own_norms(sparse) if cfg.train_norms else {}
    # To others the divergence has nothing to tell, and the balance terms alone would only spoil
    # what `train` found.
    routers = [p for moe in moes.values() if moe.shape.weighs for p in moe.router.parameters()]
    experts = [
        p
        for moe in moes.values()
        for name, p in moe.named_parameters()
        if not name.startswith("router.")
    ]
    router_rate = cfg.router_learning_rate  # may be 0, which holds the routers still
    groups = [
        {"params": routers, "peak": cfg.learning_rate if router_rate is None else router_rate},
        {"params": experts, "peak": cfg.learning_rate},
        {"params": list(norms.values()), "peak": cfg.learning_rate, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, cfg.learning_rate, weight_decay=cfg.weight_decay, fused=True
    )
    scaler = loss_scaler(model.device, dtype)
    return Healing(
        model, sparse, layers, norms, optimizer, scaler, cfg, balance_bias_rate, dtype, total
    )


def _own_norms(sparse: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Give the sparse model norms of its own, which learn, and return them."""
    norms = {}
    for name, shared in find_norms(sparse).items():
        path, _, attribute = name.rpartition(".")
        norms[name] = nn.Parameter(shared.detach().clone())
        setattr(sparse.get_submodule(path), attribute, norms[name])
    return norms


def _batches(blocks: Tensor, batch_size: int, seed: int, step: int) -> Iterator[Tensor]:
    """The batches after `step`, without end; each epoch has its own order."""
    first, skip = divmod(step, len(blocks) // batch_size)
    for epoch in itertools.count(first):
        order = shuffle.permutation(len(blocks), seed, epoch, "heal")
        whole = len(blocks) // batch_size * batch_size
        for rows in order[:whole].split(batch_size)[skip:]:
            yield blocks[rows]
        skip = 0


def divergence(dense_logits: Tensor, sparse_logits: Tensor) -> Tensor:
    """(..., V), (..., V) -> (...): KL(dense || sparse) in nats, in float32."""
    log_p, log_q = (side.float().log_softmax(dim=-1) for side in (dense_logits, sparse_logits))
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)


def rate(step: int, total: int, warmup_steps: int) -> float:
    """Share of the peak learning rate at `step`, counted from 0: a cosine after the warm-up."""
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return warm * 0.5 * (1 + math.cos(math.pi * step / total))


def _step(healing: Healing, batch: Tensor) -> dict[str, Tensor]:
    cfg, optimizer = healing.cfg, healing.optimizer
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * rate(healing.step, healing.total, cfg.warmup_steps)
    layers = healing.layers.values()
    for layer in layers:  # not the model: its dropout would be noise between two equal models
        layer.train()
    with torch.no_grad():
        wanted = healing.logits(healing.dense, batch)
    kl = divergence(wanted, healing.logits(healing.sparse, batch)).mean()
    routings = [layer.routing for layer in layers if layer.moe.shape.weighs]
    none = kl.new_zeros(())
    balance = cfg.load_balance_coef * sum(map(load_balance_loss, routings), none)
    z = cfg.router_z_coef * sum(map(router_z_loss, routings), none)
    loss = kl + balance + z
    optimizer.zero_grad(set_to_none=True)
    healing.scaler.scale(loss).backward()
    healing.scaler.unscale_(optimizer)
    for layer in layers:
        layer.moe.router.share_gradient(layer.tied)
    if cfg.grad_clip:
        learning = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(learning, cfg.grad_clip)
    healing.scaler.step(optimizer)
    healing.scaler.update()
    healing.step += 1
    for layer in layers:
        if layer.moe.shape.balance_bias:
            layer.moe.router.adjust_balance_bias(layer.routing, healing.balance_bias_rate)
    terms = {"loss": loss, "kl": kl, "load_balance": balance, "router_z": z}
    return {name: term.detach() for name, term in terms.items()}


@torch.no_grad()
def _validate(healing: Healing, blocks: Tensor, terms: Mapping[str, Tensor] | None = None) -> None:
    """Judge the state as it will be run, and keep it if it is the best."""
    batches = [b.to(healing.dense.device) for b in blocks.split(healing.cfg.batch_size)]
    if healing.step:  # the start is judged as it was trained
        _fit_thresholds(healing, batches)
    for layer in healing.layers.values():
        layer.eval()
    predicted = blocks.numel() - len(blocks)
    kl, losses = 0.0, [0.0, 0.0]
    for batch in batches:
        pair = [healing.logits(model, batch) for model in (healing.dense, healing.sparse)]
        kl += float(divergence(*pair).double().sum()) / predicted
        for side, logits in enumerate(pair):
            following = batch[:, 1:].flatten()
            loss = F.cross_entropy(logits.flatten(0, 1).float(), following, reduction="sum")
            losses[side] += float(loss) / predicted
    row = {name: float(term) for name, term in (terms or {}).items()}
    row |= {"validation_kl": kl, "validation_perplexity": _perplexity(losses[1])}
    row["validation_dense_perplexity"] = _perplexity(losses[0])
    _check_finite(healing.step, row)
    healing.history.append({"step": healing.step, **row})
    if kl < healing.best_kl:
        healing.best_kl, healing.best_step = kl, healing.step
        healing.best = {name: t.cpu().clone() for name, t in healing.state().items()}


def _perplexity(loss: float) -> float:
    return float(torch.tensor(loss, dtype=torch.float64).exp())  # inf, where math would raise


def _fit_thresholds(healing: Healing, batches: list[Tensor]) -> None:
    """Set what each choosing expert will take by what it takes of these tokens as it learns."""
    choosing = [
        layer for layer in healing.layers.values() if layer.moe.shape.capacity_factor is not None
    ]
    if not choosing:
        return
    for layer in choosing:
        layer.train()
    seen: list[list[Tensor]] = [[] for _ in choosing]
    for batch in batches:
        healing.logits(healing.sparse, batch)
        for logits, layer in zip(seen, choosing, strict=True):
            logits.append(layer.routing.router_logits)
    for logits, layer in zip(seen, choosing, strict=True):
        factor = layer.moe.shape.capacity_factor
        assert factor is not None
        layer.moe.router.threshold.copy_(thresholds(torch.cat(logits), factor))


def _check_finite(step: int, row: Mapping[str, Tensor | float]) -> None:
    bad = [f"{name}={float(x)}" for name, x in row.items() if not math.isfinite(x)]
    if bad:
        raise ArtifactError(
            f"Healing diverged at step {step}.",
            value=", ".join(bad),
            rule="every loss is finite",
            remedy="lower heal.learning_rate, or set heal.dtype=float32",
        )


KEPT = ("step", "best_step", "best_kl", "history")


def _save(healing: Healing, path: Path) -> None:
    kept = {name: getattr(healing, name) for name in KEPT}
    kept["scaler"] = healing.scaler.state_dict()
    states = {"model": healing.state(), "best": healing.best}
    resume.save(path, states, healing.optimizer, kept)


def _restore(healing: Healing, path: Path) -> None:
    states, kept = resume.restore(path, healing.optimizer)
    for name in KEPT:
        setattr(healing, name, kept[name])
    healing.scaler.load_state_dict(kept["scaler"])
    healing.load(states["model"])
    healing.best = states["best"]


def _finish(
    healing: Healing,
    trained: Mapping[int, Path],
    records: Mapping[int, Mapping[str, Any]],
    folder: Path,
    tokens: int,
) -> None:
    healing.load(healing.best)
    rows = {row["step"]: row for row in healing.history}
    before, after = rows[0], rows[healing.best_step]
    told = {
        "tokens": tokens,
        "steps": healing.total,
        "best_step": healing.best_step,
        "norms": len(healing.norms),
        "validation": {
            "kl": {"before": before["validation_kl"], "after": after["validation_kl"]},
            "perplexity": {
                "dense": before["validation_dense_perplexity"],
                "before": before["validation_perplexity"],
                "after": after["validation_perplexity"],
            },
        },
    }
    if healing.norms:
        norms = {name: p.detach().cpu() for name, p in healing.norms.items()}
        save_file(norms, folder / NORMS)
    write_history(folder, healing.history)
    for path in (folder / NORMS, folder / HISTORY):  # durable before the layers that end the work
        if path.exists():
            durable.fsync(path)
    for k, layer in healing.layers.items():
        out = folder / f"layer_{k}"
        out.mkdir(exist_ok=True)
        shutil.copyfile(trained[k] / HISTORY, out / HISTORY)
        save_layer(layer.moe, out, {**records[k], "healing": told})
    (folder / resume.CHECKPOINT).unlink(missing_ok=True)
