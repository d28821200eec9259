"""Dynamic experts: in training those of high loss grow, and those of low loss shrink.

Every `reallocate_every_n_steps` the `n_reallocated` experts of highest mean loss ask for
`growth_factor` times their width and as many of lowest loss offer to keep `shrink_factor` of
theirs, at least one step of 8 and within the bounds. **What grows takes exactly what shrinks
gives**: the side that wants more is trimmed, its least extreme expert first, so that the layer's
neurons are the same number over the whole run.

An expert shrinks to the neurons of largest summed L2 norm (gate_proj, up_proj and down_proj). It
grows by `split`: its most important neurons are doubled, and each output channel of a doubled
neuron goes to one of the two at random. The output does not change, and the two get different
gradients from then on (two equal halves would stay equal for ever). Or by `interpolate`, the
original's: every weight bilinear along d_ff, `down_proj` times sqrt(old / new). The optimizer's
moments follow their neurons.

Shapes: E experts, H d_ff_expert (the widest), D d_model, w and v an expert's old and new width, X
whatever a neuron has.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import DynamicConfig, Growth
from pipeline.moe import SparseMoE
from pipeline.router import Routing
from pipeline.shape import WIDTH_STEP


class ExpertLosses:
    """Mean loss of the tokens that each expert worked on, since the last `reset`."""

    def __init__(self, n_experts: int, device: torch.device | str = "cpu") -> None:
        self.sum_E = torch.zeros(n_experts, dtype=torch.float64, device=device)
        self.count_E = torch.zeros_like(self.sum_E)

    def add(self, routing: Routing, loss_T: Tensor) -> None:
        taken_ET = routing.taken_TE().t().double()
        self.sum_E += taken_ET @ loss_T.detach().double()
        self.count_E += taken_ET.sum(dim=1)

    def mean(self) -> list[float]:
        """(E,); 0 for an expert without a token: it has more neurons than it needs."""
        return (self.sum_E / self.count_E.clamp_min(1)).tolist()

    def reset(self) -> None:
        self.sum_E.zero_()
        self.count_E.zero_()


def plan_widths(
    widths: Sequence[int], losses: Sequence[float], cfg: DynamicConfig
) -> tuple[int, ...]:
    """The experts' next widths; their sum is that of `widths`."""
    by_loss = sorted(range(len(widths)), key=lambda e: losses[e])
    n = min(cfg.n_reallocated, len(widths) // 2)
    wanted = {e: _grown(widths[e], cfg) - widths[e] for e in by_loss[::-1][:n]}
    offered = {e: widths[e] - _shrunk(widths[e], cfg) for e in by_loss[:n]}
    moved = min(sum(wanted.values()), sum(offered.values()))
    new = list(widths)
    for changes, sign in ((wanted, 1), (offered, -1)):
        left = moved
        for e, change in changes.items():  # the most extreme expert first
            new[e] += sign * min(change, left)
            left -= min(change, left)
    return tuple(new)


def _grown(width: int, cfg: DynamicConfig) -> int:
    wanted = max(_round(width * cfg.growth_factor), width + WIDTH_STEP * (cfg.growth_factor > 1))
    return max(width, min(wanted, cfg.max_d_ff))


def _shrunk(width: int, cfg: DynamicConfig) -> int:
    wanted = min(_round(width * cfg.shrink_factor), width - WIDTH_STEP * (cfg.shrink_factor < 1))
    return min(width, max(wanted, cfg.min_d_ff))


def _round(width: float) -> int:
    return int(width / WIDTH_STEP + 0.5) * WIDTH_STEP


@torch.no_grad()
def resize_experts(
    moe: SparseMoE,
    optimizer: torch.optim.Optimizer,
    widths: Sequence[int],
    growth: Growth,
    generator: torch.Generator,
) -> None:
    """Give each expert its new width, in place: the parameters stay the optimizer's own.

    Args:
        widths: neurons of each expert; the widest is the layer's `d_ff_expert` from now on.
        generator: of the CPU; decides which channels go to which half of a split neuron.
    """
    old = moe.shape.widths
    names = [n for n, _ in moe.named_parameters(recurse=False) if n != "down_bias"]
    parameters = {n: moe.get_parameter(n) for n in names}
    rows = {n: _to_rows(n, p.data, moe) for n, p in parameters.items()}
    moments = {
        n: {k: _to_rows(n, m, moe) for k, m in optimizer.state[p].items() if m.dim()}
        for n, p in parameters.items()
    }
    norms = [
        r.unflatten(2, (-1, moe.shape.d_model)).norm(dim=-1).sum(dim=-1)
        for name, r in rows.items()
        if name.endswith("_proj")
    ]
    importance_EH = torch.stack(norms).sum(dim=0)
    changes = [
        _change(w, v, importance_H[:w], growth)
        for w, v, importance_H in zip(old, widths, importance_EH, strict=True)
    ]
    widest = max(widths)
    for name, parameter in parameters.items():
        new_EHX = _resized(rows[name], changes, old, widest)
        if name == "down_proj":
            _share_outputs(new_EHX, changes, old, widths, growth, generator)
        parameter.data = _from_rows(name, new_EHX, moe)
        parameter.grad = None
        for key, moment_EHX in moments[name].items():
            moved = _resized(moment_EHX, changes, old, widest)
            optimizer.state[parameter][key] = _from_rows(name, moved, moe)
    moe.shape = replace(moe.shape, d_ff_expert=widest, expert_widths=tuple(widths))


def _change(w: int, v: int, importance_H: Tensor, growth: Growth) -> Tensor | int:
    """Which old neuron each new one is, (v,); or v, where they are interpolated."""
    by_importance = importance_H.argsort(descending=True, stable=True)
    if v <= w:
        return by_importance[:v].sort().values
    if growth is Growth.interpolate:
        return v
    doubled = by_importance.repeat(-(-(v - w) // w))[: v - w]
    return torch.cat([torch.arange(w, device=doubled.device), doubled])


def _resized(
    rows_EHX: Tensor, changes: Sequence[Tensor | int], old: Sequence[int], widest: int
) -> Tensor:
    E, _, X = rows_EHX.shape
    new_EHX = rows_EHX.new_zeros(E, widest, X)
    for rows_HX, new_HX, change, w in zip(rows_EHX, new_EHX, changes, old, strict=True):
        if isinstance(change, Tensor):
            moved_HX = rows_HX[:w][change]
        else:
            moved_HX = F.interpolate(rows_HX[:w].t()[None], size=change, mode="linear")[0].t()
        new_HX[: len(moved_HX)] = moved_HX
    return new_EHX


def _share_outputs(
    down_EHD: Tensor,
    changes: Sequence[Tensor | int],
    old: Sequence[int],
    widths: Sequence[int],
    growth: Growth,
    generator: torch.Generator,
) -> None:
    """Of experts that grew: a doubled neuron's outputs to one half or the other; or the rescale."""
    for down_HD, change, w, v in zip(down_EHD, changes, old, widths, strict=True):
        if v <= w:
            continue
        if growth is Growth.interpolate:
            down_HD *= (w / v) ** 0.5
            continue
        assert isinstance(change, Tensor)
        for new, source in enumerate(change[w:].tolist(), start=w):
            to_new = torch.rand(down_HD.shape[1], generator=generator) < 0.5
            to_new_D = to_new.to(down_HD.device)
            down_HD[new] = down_HD[source] * to_new_D
            down_HD[source] *= ~to_new_D


def _to_rows(name: str, tensor: Tensor, moe: SparseMoE) -> Tensor:
    """(E, H, X): what each neuron has of a parameter."""
    if name == "down_proj":
        return tensor.transpose(1, 2)
    parts = 2 if moe.shape.gated else 1
    return tensor.unflatten(1, (parts, -1)).transpose(1, 2).flatten(2)


def _from_rows(name: str, rows_EHX: Tensor, moe: SparseMoE) -> Tensor:
    if name == "down_proj":
        return rows_EHX.transpose(1, 2).contiguous()
    parts = 2 if moe.shape.gated else 1
    inner = rows_EHX.unflatten(2, (parts, -1)).transpose(1, 2).flatten(1, 2)
    return (inner.squeeze(-1) if name.endswith("_bias") else inner).contiguous()
