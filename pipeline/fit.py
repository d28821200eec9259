"""Closed-form fits: with its routing frozen, a layer's output is linear in every `down_proj`.

A token's features are, side by side, the hidden activations of the shared expert, and `weight x
hidden` of each expert that it takes (and the weight alone, for `down_bias`). All are fitted
together by least squares, since those that share tokens share errors, with a ridge **towards the
present weights**: what the rows say little about stays as it is. The strength is chosen on
validation rows, where the error of any weights is a quadratic form of sums that are taken once;
"change nothing" is among the candidates.

Features are multiplied in the weights' dtype, at least float32, and summed over chunks in float64:
a sum over 200 thousand rows in float32 would lose what a ridge of 1e-4 still resolves, while a
chunk's own product does not, and float64 products take twice the time on a CPU and far more on
most GPUs.

Where the features are too many for one matrix, experts are fitted a block at a time against what
the others leave over, again and again until nothing moves: the blocks see each other through the
residual, so that they reach the joint solution. The shared expert, which meets all of them, is
fitted again in every block. Experts of which each token takes one never meet where nothing is
shared, and one round is exact.

Shapes: T tokens, D d_model, H d_ff_expert, S d_ff_shared, E experts, N features of a block, M of
all of them.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.moe import SparseMoE
from pipeline.shape import MoEShape

if TYPE_CHECKING:
    from pipeline.store import Rows

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidates, each times the mean diagonal of the Gram matrix."""
MIXTURES = 64  # of the channels, by which ridges are compared
BLOCK_FEATURES = 8192  # features that are solved for at once: 0.5 GB per Gram matrix
CHUNK = 4096  # rows whose features are held at a time
ROUNDS = 20  # over the blocks, at most
MOVING = 1e-3  # a round that moves the weights by less than this share of the whole way is the last


class Normal:
    """Sums over rows that tell the squared error of any linear map from features to targets."""

    def __init__(self, n_features: int, d_model: int, device: torch.device | str = "cpu") -> None:
        f64 = {"dtype": torch.float64, "device": device}
        self.gram_NN = torch.zeros(n_features, n_features, **f64)
        self.cross_ND = torch.zeros(n_features, d_model, **f64)
        self.power = 0.0

    def add(self, features_TN: Tensor, target_TD: Tensor) -> None:
        self.gram_NN += features_TN.T @ features_TN
        self.cross_ND += features_TN.T @ target_TD
        self.power += float(target_TD.double().square().sum())

    def take(self, chosen_M: Tensor) -> "Normal":
        """The same of some of the features."""
        part = Normal(0, 0)
        part.gram_NN = self.gram_NN[chosen_M][:, chosen_M]
        part.cross_ND, part.power = self.cross_ND[chosen_M], self.power
        return part

    def mixed(self, mixture_DR: Tensor) -> "Normal":
        """The same for mixtures of the targets; `error` lacks their power, one constant."""
        mixed = Normal(0, 0)
        mixed.gram_NN, mixed.cross_ND = self.gram_NN, self.cross_ND @ mixture_DR
        return mixed

    def error(self, weight_ND: Tensor) -> float:
        """Sum over rows and channels of (target - features @ weight)^2."""
        fitted_ND = self.gram_NN @ weight_ND
        return self.power + float((weight_ND * (fitted_ND - 2 * self.cross_ND)).sum())

    def hold(self, ridge: float) -> Callable[[Tensor, Tensor], Tensor]:
        """(cross_ND, prior_ND) -> (N, D), for any targets and priors by one factorisation.

        Least squares plus `ridge` x the mean diagonal x |weight - prior|^2.
        """
        strength = ridge * self.gram_NN.diagonal().mean()
        if strength == 0:  # no row has any of the features
            return lambda cross_ND, prior_ND: prior_ND.clone()
        held_NN = self.gram_NN.clone()
        held_NN.diagonal().add_(strength)
        root_NN = torch.linalg.cholesky(held_NN)
        return lambda cross_ND, prior_ND: torch.cholesky_solve(
            cross_ND + strength * prior_ND, root_NN
        )

    def solve(self, ridge: float, prior_ND: Tensor) -> Tensor:
        """(N, D): as `hold`, for the targets that were summed."""
        return self.hold(ridge)(self.cross_ND, prior_ND)


def best_ridge(
    train: Normal, validation: Normal, prior_ND: Tensor, ridges: Sequence[float] = RIDGES
) -> tuple[Tensor, float | None]:
    """The weights of the ridge with the least validation error, and that ridge.

    Null stands for no change: the prior is better than all of them. From the weakest ridge on the
    error falls and then rises: the first that is worse than the one before is the last tried. The
    candidates are compared on `MIXTURES` random mixtures of the channels, whose squared error is in
    the mean that of all; only the chosen ridge is solved for every channel.
    """
    mixture_DR = _mixtures(prior_ND)
    cross_NR, prior_NR = train.cross_ND @ mixture_DR, prior_ND @ mixture_DR
    judge = validation.mixed(mixture_DR)
    best, chosen, least, before = None, None, judge.error(prior_NR), math.inf
    for ridge in sorted(ridges):
        solve = train.hold(ridge)
        error = judge.error(solve(cross_NR, prior_NR))
        if error < least:
            best, chosen, least = solve, ridge, error
        if error > before:
            break
        before = error
    return prior_ND if best is None else best(train.cross_ND, prior_ND), chosen


def _mixtures(like_ND: Tensor) -> Tensor:
    """(D, R): random directions, the same for every call; the channels where they are no more."""
    D = like_ND.shape[1]
    if D <= MIXTURES:
        return torch.eye(D).to(like_ND)
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(D, MIXTURES, generator=generator) / MIXTURES**0.5).to(like_ND)


@torch.no_grad()
def refit_down(
    moe: SparseMoE,
    rows: "Rows",
    *,
    ridges: Sequence[float] = RIDGES,
    block_features: int = BLOCK_FEATURES,
    max_rows: int | None = None,
) -> tuple[float, float]:
    """Refit every `down_proj` and `down_bias` in place, the shared too; runs where `moe` lies.

    In evaluation mode: of experts that choose their tokens the thresholds must be fitted before.
    Returns the relative_mse on validation rows before and after; what makes it worse is undone.

    Args:
        block_features: solved for at once; a block has at least one expert.
        max_rows: of `train`, the first ones; null = all.
    """
    moe.eval()
    before = validation_error(moe, rows)
    start_MD = _weights(moe)
    now_MD, chosen = start_MD.clone(), {}
    passes = _passes(moe.shape, block_features)
    alone = _never_meet(moe.shape) or len(passes) == 1
    for turn in range(1 if alone else ROUNDS):
        last_MD = now_MD.clone()
        for blocks in passes:
            train = _sums(moe, rows, "train", blocks, alone, max_rows)
            validation = _sums(moe, rows, "validation", blocks, alone) if turn == 0 else train
            for block, fitted, judged in zip(blocks, train, validation, strict=True):
                features_N = _features(moe.shape, block).to(now_MD.device)
                behind_ND = 0 if alone else now_MD[features_N]
                way_ND = start_MD[features_N] - behind_ND
                if turn == 0:
                    change_ND, chosen[block.start] = best_ridge(fitted, judged, way_ND, ridges)
                elif (ridge := chosen[block.start]) is not None:
                    change_ND = fitted.solve(ridge, way_ND)
                else:
                    continue
                now_MD[features_N] = behind_ND + change_ND
            _set_weights(moe, now_MD)
        moved, whole = (now_MD - last_MD).norm(), (now_MD - start_MD).norm()
        if moved <= MOVING * whole:
            break
    after = validation_error(moe, rows)
    if not after <= before:
        _set_weights(moe, start_MD)
        return before, before
    return before, after


@torch.no_grad()
def validation_error(moe: SparseMoE, rows: "Rows") -> float:
    """relative_mse of the layer as it is; the absolute error where the target is zero."""
    error = power = 0.0
    for x_TD, y_TD in _chunks(moe, rows, "validation"):
        error += float((moe(x_TD) - y_TD).double().square().sum())
        power += float(y_TD.double().square().sum())
    return error / power if power else error


def _never_meet(shape: MoEShape) -> bool:
    return shape.capacity_factor is None and shape.top_k == 1 and not shape.d_ff_shared


def _features(shape: MoEShape, block: slice) -> Tensor:
    """(N,) places of a block's features among all: the shared expert's, then its own experts'."""
    S, size = shape.d_ff_shared, shape.d_ff_expert + shape.bias
    own_N = torch.arange(S + block.start * size, S + block.stop * size)
    return torch.cat([torch.arange(S), own_N])


def _passes(shape: MoEShape, block_features: int) -> list[list[slice]]:
    """Blocks of experts; those of one pass are summed together and must never meet."""
    features = shape.d_ff_expert + shape.bias
    fitting = max(1, (block_features - shape.d_ff_shared) // features)
    size = 1 if _never_meet(shape) else fitting
    blocks = [
        slice(first, min(first + size, shape.n_experts))
        for first in range(0, shape.n_experts, size)
    ]
    together = max(1, block_features**2 // features**2) if _never_meet(shape) else 1
    return [blocks[i : i + together] for i in range(0, len(blocks), together)]


def _sums(
    moe: SparseMoE,
    rows: "Rows",
    split: str,
    blocks: list[slice],
    alone: bool,
    max_rows: int | None = None,
) -> list[Normal]:
    """Of each block: its features, against what the layer leaves over.

    Of a block that meets no other (`alone`), against the outputs: what is left over plus its own.
    """
    shape, device = moe.shape, moe.down_proj.device
    sums = [Normal(len(_features(shape, b)), shape.d_model, device) for b in blocks]
    for x_TD, y_TD in _chunks(moe, rows, split, max_rows):
        weights_TE = moe.route(x_TD).weights_TE()
        for block, normal in zip(blocks, sums, strict=True):
            taken_T = (weights_TE[:, block] != 0).any(dim=1)
            taken_T = (taken_T | bool(shape.d_ff_shared)).nonzero()[:, 0]
            if not len(taken_T):
                continue
            x, y = x_TD[taken_T], y_TD[taken_T]
            _add(normal, moe, x, weights_TE[taken_T], block, y if alone else y - moe(x))
    for normal in sums:
        _mirror(normal.gram_NN, shape)
    return sums


def _add(
    normal: Normal, moe: SparseMoE, x_TD: Tensor, weights_TE: Tensor, block: slice, rest_TD: Tensor
) -> None:
    """`normal.add` for features that are mostly zero: each expert multiplies its own rows.

    Of the Gram matrix, each expert's with itself and with those after it.
    """
    experts = moe.experts(x_TD.dtype)
    S, size = moe.shape.d_ff_shared, moe.shape.d_ff_expert + moe.shape.bias
    features_TN = x_TD.new_zeros(len(x_TD), len(normal.gram_NN))
    if S:
        features_TN[:, :S] = moe.shared_expert.hidden(x_TD)
    for i, e in enumerate(range(block.start, block.stop)):
        t = weights_TE[:, e].nonzero()[:, 0]
        bias_EU = experts.inner_bias_EU
        inner_TU = F.linear(x_TD[t], experts.inner_EUD[e], None if bias_EU is None else bias_EU[e])
        hidden_TN = experts.hidden(inner_TU)
        if moe.shape.bias:
            hidden_TN = F.pad(hidden_TN, (0, 1), value=1.0)
        weight_T = weights_TE[t, e, None].to(x_TD.dtype)
        features_TN[t, S + i * size : S + (i + 1) * size] = weight_T * hidden_TN
    if S:
        normal.gram_NN[:S] += features_TN[:, :S].T @ features_TN
        normal.cross_ND[:S] += features_TN[:, :S].T @ rest_TD
    for i, e in enumerate(range(block.start, block.stop)):
        t = weights_TE[:, e].nonzero()[:, 0]
        own = slice(S + i * size, S + (i + 1) * size)
        own_TN = features_TN[t, own]
        later_TN = own_TN if block.stop - block.start == 1 else features_TN[t, own.start :]
        normal.gram_NN[own, own.start :] += own_TN.T @ later_TN
        normal.cross_ND[own] += own_TN.T @ rest_TD[t]
    normal.power += float(rest_TD.double().square().sum())


def _mirror(gram_NN: Tensor, shape: MoEShape) -> None:
    """Fill what lies below the diagonal's blocks."""
    size = shape.d_ff_expert + shape.bias
    edges = [0] * bool(shape.d_ff_shared) + [*range(shape.d_ff_shared, len(gram_NN), size)]
    for first, stop in itertools.pairwise(edges):
        gram_NN[stop:, first:stop] = gram_NN[first:stop, stop:].T


def _chunks(
    moe: SparseMoE, rows: "Rows", split: str, max_rows: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """(T, D) pairs on the layer's device, in its weights' dtype, float32 at least."""
    dtype = torch.promote_types(moe.down_proj.dtype, torch.float32)
    stop = min(rows.rows[split], max_rows or rows.rows[split])
    for start in range(0, stop, CHUNK):
        pair = rows.read(split, start, min(start + CHUNK, stop))
        x_TD, y_TD = (side.to(moe.down_proj.device, dtype) for side in pair)
        yield x_TD, y_TD


def _weights(moe: SparseMoE) -> Tensor:
    """(M, D) float64: the shared expert's, then each expert's, its bias last."""
    down_EHD = moe.down_proj.detach().double().transpose(1, 2)
    if moe.shape.bias:
        bias_ED = moe.get_parameter("down_bias").detach().double()
        down_EHD = torch.cat([down_EHD, bias_ED[:, None]], dim=1)
    weight_MD = down_EHD.flatten(0, 1)
    if moe.shape.d_ff_shared:
        weight_MD = torch.cat([moe.shared_expert.down_proj.detach().double().T, weight_MD])
    return weight_MD.clone()


def _set_weights(moe: SparseMoE, weight_MD: Tensor) -> None:
    H, S = moe.shape.d_ff_expert, moe.shape.d_ff_shared
    if S:
        moe.shared_expert.down_proj.copy_(weight_MD[:S].T)
    weight_END = weight_MD[S:].unflatten(0, (moe.shape.n_experts, -1))
    moe.down_proj.copy_(weight_END[:, :H].transpose(1, 2))
    if moe.shape.bias:
        moe.get_parameter("down_bias").copy_(weight_END[:, H])
