"""Specialists: partition the tokens, not the neurons, and fit each expert to its own tokens.

    1. Tokens are clustered by their neurons' contributions (`partition.token_profiles`).
    2. A linear router learns who is to have which token.
    3. Each specialist is the dense FFN pruned and refitted for the tokens that the router sends
       it. `prune` takes out the neurons that cost least once the others make up for them, a few
       at a time; `down_proj` is then fitted by least squares, ridge towards the dense one.
    4. Every token goes to the specialist with the least error on it. From 2.

What is best on validation rows of all the rounds is the start; the last round alone sees every
row. One specialist of all tokens is a static pruning, refitted.

With top_k = 1 a renormalised softmax gives every expert the weight 1 and nothing has to be scaled.
With more, top_k experts together are one specialist, of top_k x d_ff_expert neurons: they share
their router row, so that they are always chosen together at weights 1 / top_k, and hold
`down_proj` x top_k.

Beside a shared expert every specialist has its neurons too, with weights of its own; which ones the
shared expert gets is decided after, by least squares of all together (`start.py`).

On the embedded model (d_ff 512, 4 specialists of 128 neurons) the relative error of a layer falls
from 0.067 to 0.050 over ten rounds, and by a fifth where neurons are pruned so and not by variance
x squared `down_proj` norm. Weighting the router's tokens by their regret changed nothing.

All of it runs where the dense FFN lies. What that takes is mostly the sums of least squares, in
float64: `8 F (6 F + 8 D)` bytes, 54 GB at Llama-3.1-70B's width; `footprint.start` counts it all.

Shapes: T tokens, D d_model, F d_ff, S specialists, M neurons of one, N features (a 1 beside the
neurons where there is a bias), E = S x top_k experts.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.ffn import DenseFFN
from pipeline.fit import Normal, best_ridge
from pipeline.partition import clusters, token_profiles
from pipeline.shape import MoEShape, check_start
from pipeline.shuffle import Pair

if TYPE_CHECKING:
    from pipeline.store import Rows

MAX_ROWS = 262144  # training tokens looked at, the first ones
ROUND_ROWS = 65536  # of them in every round but the last
ROUNDS = 10  # of moving tokens, after the first specialists
CLUSTER_ROUNDS = 12
ROUTER_STEPS, ROUTER_BATCH, ROUTER_RATE = 150, 4096, 3e-2  # in every round, from the last one's
PRUNING_STEPS = 128  # at most; each takes out the same number of neurons
PRUNING_RIDGE = 1e-4  # of the mean diagonal of the Gram matrix
FEW = 2  # training tokens per neuron, below which a specialist is fitted to all of them
CHUNK = 4096  # rows that are multiplied at a time
KEPT_BYTES = 2**31  # rows, and hidden activations, up to this size are kept for the rounds

Specialist = tuple[Tensor, Tensor]
"""Its neurons (M,), ascending, the shared ones too, and its `down_proj` (M, D), with a row more for
a bias."""


@torch.no_grad()
def start_specialists(
    dense: DenseFFN,
    shape: MoEShape,
    rows: "Rows",
    generator: torch.Generator,
    shared_S: Tensor | None = None,
) -> dict[str, Tensor]:
    """The parameters of a `SparseMoE` and `router.weight`, float32, on the dense FFN's device.

    Args:
        rows: `train` to fit, `validation` to choose by.
        shared_S: neurons of the shared expert.

    Raises:
        ConfigError: the sizes do not allow this start (`shape.check_start`).
    """
    check_start(shape, "specialist")
    device = dense.up_proj.device
    dense = dense.to(device, torch.float32)
    n = shape.n_specialists
    may_go_F = torch.ones(dense.d_ff, dtype=torch.bool, device=device)
    if shared_S is not None:
        may_go_F[shared_S] = False
    everything = rows.read("train", 0, MAX_ROWS)
    few = HiddenRows(dense, everything[0][:ROUND_ROWS], everything[1][:ROUND_ROWS])
    validation = HiddenRows(dense, *rows.read("validation"))
    everything = HiddenRows(dense, *everything, again=False)
    router_SD = torch.zeros(n, shape.d_model, device=device)
    kept: list[tuple[float, Tensor, list[Specialist]]] = []
    if n == 1:
        found = _fit_all(dense, shape, may_go_F, router_SD, everything, validation)
        return _assemble(dense, shape, may_go_F, router_SD, found)
    profile_TR = token_profiles(dense, few.x_TD, generator)
    sent_T = clusters(profile_TR, n, CLUSTER_ROUNDS, generator)
    for turn in range(ROUNDS + 1):
        router_SD = fit_router(few.x_TD, sent_T, router_SD, generator)
        train = everything if turn == ROUNDS else few
        found = _fit_all(dense, shape, may_go_F, router_SD, train, validation)
        error_TS = errors(found, validation)
        sent_V1 = _send(router_SD, validation.x_TD)[:, None]
        error = float(error_TS.gather(1, sent_V1).double().sum())
        if not kept or error < kept[0][0]:
            kept = [(error, router_SD, found)]
        if turn < ROUNDS:
            sent_T = errors(found, few).argmin(dim=1)
    return _assemble(dense, shape, may_go_F, *kept[0][1:])


def fit_router(
    x_TD: Tensor, sent_T: Tensor, router_SD: Tensor, generator: torch.Generator
) -> Tensor:
    """(S, D): softmax regression on the specialist of each token, from the rows given on.

    Channels are brought to one size first: a rate is too large for some and too small for others.
    """
    device = router_SD.device
    squares = [x.to(device, torch.float64).square().sum(dim=0) for x in x_TD.split(CHUNK)]
    size_D = (torch.stack(squares).sum(dim=0) / len(x_TD)).sqrt().float()
    size_D = torch.where(size_D > 0, size_D, 1.0)
    weight_SD = (router_SD * size_D).requires_grad_()
    optimizer = torch.optim.AdamW([weight_SD], ROUTER_RATE, weight_decay=0.01, fused=True)
    sent_T = sent_T.to(device)
    for step in range(ROUTER_STEPS):
        optimizer.param_groups[0]["lr"] = ROUTER_RATE * (1 - step / ROUTER_STEPS)
        batch_T = torch.randint(len(x_TD), (min(ROUTER_BATCH, len(x_TD)),), generator=generator)
        x = x_TD[batch_T.to(x_TD.device)].to(device, torch.float32) / size_D
        with torch.enable_grad():
            loss = F.cross_entropy(x @ weight_SD.T, sent_T[batch_T.to(device)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weight_SD.detach() / size_D


def prune(normal: Normal, prior_ND: Tensor, may_go_N: Tensor, keep: int) -> Tensor:
    """(keep,) of the features that may go, ascending: those whose loss would cost most.

    Backward elimination by least squares. Taking out feature j and refitting the others costs
    |w_j|^2 / (G^-1)_jj, with G the Gram matrix held by `PRUNING_RIDGE`; inverse and weights of the
    rest follow by a rank-one step (Hassibi and Stork, 1993, "Optimal Brain Surgeon", equation 5).
    """
    gram_NN = normal.gram_NN
    strength = PRUNING_RIDGE * gram_NN.diagonal().mean()
    if strength == 0:  # no feature is ever active
        return may_go_N.nonzero()[:keep, 0]
    held_NN = gram_NN.clone()
    held_NN.diagonal().add_(strength)
    inverse_NN = torch.cholesky_inverse(torch.linalg.cholesky(held_NN))
    weight_ND = inverse_NN @ (normal.cross_ND + strength * prior_ND)
    left_N = may_go_N.clone()
    going = int(may_go_N.sum()) - keep
    at_once = max(1, -(-going // PRUNING_STEPS))
    for first in range(0, going, at_once):
        n = min(at_once, going - first)
        cost_N = weight_ND.square().sum(dim=1) / inverse_NN.diagonal()
        out_n = cost_N.where(left_N, torch.inf).topk(n, largest=False).indices
        both = torch.cat([inverse_NN[out_n], weight_ND[out_n]], dim=1)
        step = torch.linalg.solve(inverse_NN[out_n][:, out_n], both)
        column_Nn = inverse_NN[:, out_n]
        inverse_NN.addmm_(column_Nn, step[:, : len(gram_NN)], alpha=-1)
        weight_ND.addmm_(column_Nn, step[:, len(gram_NN) :], alpha=-1)
        left_N[out_n] = False
    return left_N.nonzero()[:, 0]


class HiddenRows:
    """Rows of a layer, and what its dense FFN's neurons make of them.

    Kept where the dense FFN lies if they are asked for `again` and fit (`KEPT_BYTES` for either).
    """

    def __init__(self, dense: DenseFFN, x_TD: Tensor, y_TD: Tensor, *, again: bool = True) -> None:
        device = dense.up_proj.device
        if again and x_TD.nbytes + y_TD.nbytes <= KEPT_BYTES:
            x_TD, y_TD = x_TD.to(device), y_TD.to(device)
        self.dense, self.x_TD, self.y_TD = dense, x_TD, y_TD
        fits = again and 4 * len(x_TD) * dense.d_ff <= KEPT_BYTES
        self._kept = [self._hidden(x) for x in x_TD.split(CHUNK)] if fits else None

    def chunks(self, mine_T: Tensor | None = None) -> Iterator[Pair]:
        """(T, F) and (T, D) of a chunk of rows at a time, float32; only of those chosen."""
        device = self.dense.up_proj.device
        for i, (x_TD, y_TD) in enumerate(
            zip(self.x_TD.split(CHUNK), self.y_TD.split(CHUNK), strict=True)
        ):
            chosen = slice(None) if mine_T is None else mine_T[i * CHUNK : i * CHUNK + len(x_TD)]
            there = chosen if isinstance(chosen, slice) else chosen.to(x_TD.device)
            hidden_TF = self._kept[i][chosen] if self._kept else self._hidden(x_TD[there])
            yield hidden_TF, y_TD[there].to(device, torch.float32)

    def _hidden(self, x_TD: Tensor) -> Tensor:
        return self.dense.hidden(x_TD.to(self.dense.up_proj.device, torch.float32))


def errors(found: list[Specialist], rows: HiddenRows) -> Tensor:
    """(T, S): each specialist's squared error on every token, summed over channels."""
    parts = []
    for hidden_TF, y_TD in rows.chunks():
        own = []
        for neurons, weight in found:
            y_hat_TD = hidden_TF[:, neurons] @ weight[: len(neurons)]
            if len(weight) > len(neurons):
                y_hat_TD = y_hat_TD + weight[-1]
            own.append((y_hat_TD - y_TD).square().sum(dim=1))
        parts.append(torch.stack(own, dim=1))
    return torch.cat(parts)


def _fit_all(
    dense: DenseFFN,
    shape: MoEShape,
    may_go_F: Tensor,
    router_SD: Tensor,
    train: HiddenRows,
    validation: HiddenRows,
) -> list[Specialist]:
    """Each pruned and refitted for the tokens that the router sends it."""
    bias, width = shape.bias, min(shape.d_ff_routed, shape.d_ff_specialist)
    fitted, judged = (_send(router_SD, side.x_TD) for side in (train, validation))
    prior_ND = dense.down_proj.T.double()
    if bias:
        none_D = torch.zeros_like(prior_ND[0])
        last_D = none_D if dense.down_bias is None else dense.down_bias.double()
        prior_ND = torch.cat([prior_ND, last_D[None]])
    found = []
    for s in range(len(router_SD)):
        mine = fitted == s
        normal = _sums(train, bias, mine if mine.sum() >= FEW * width else None)
        mine = judged == s
        judge = _sums(validation, bias, mine if mine.any() else None)
        own = prune(normal, prior_ND, F.pad(may_go_F, (0, int(bias))), width)
        neurons = torch.cat([own, (~may_go_F).nonzero()[:, 0]]).sort().values
        features = F.pad(neurons, (0, 1), value=dense.d_ff) if bias else neurons
        weight_ND, _ = best_ridge(normal.take(features), judge.take(features), prior_ND[features])
        found.append((neurons, weight_ND.float()))
    return found


def _sums(rows: HiddenRows, bias: bool, mine_T: Tensor | None) -> Normal:
    dense = rows.dense
    normal = Normal(dense.d_ff + bias, dense.d_model, dense.up_proj.device)
    for hidden_TF, y_TD in rows.chunks(mine_T):
        normal.add(F.pad(hidden_TF, (0, 1), value=1.0) if bias else hidden_TF, y_TD)
    return normal


def _send(router_SD: Tensor, x_TD: Tensor) -> Tensor:
    """(T,) the specialist of each token."""
    device = router_SD.device
    chunks = (x.to(device, torch.float32) for x in x_TD.split(CHUNK))
    return torch.cat([(x @ router_SD.T).argmax(dim=1) for x in chunks])


def _assemble(
    dense: DenseFFN,
    shape: MoEShape,
    may_go_F: Tensor,
    router_SD: Tensor,
    found: list[Specialist],
) -> dict[str, Tensor]:
    """Each specialist, without what is shared, cut into experts that are always chosen together."""
    H, team = shape.d_ff_expert, shape.n_experts // shape.n_specialists
    name = "gate_up" if shape.gated else "up"
    parts: dict[str, list[Tensor]] = {f"{name}_proj": [], "down_proj": []}
    if shape.bias:
        parts |= {f"{name}_bias": [], "down_bias": []}
    halves = [dense.gate_proj, dense.up_proj] if shape.gated else [dense.up_proj]
    biases = [dense.gate_bias, dense.up_bias] if shape.gated else [dense.up_bias]
    for together, weight in found:
        own = may_go_F[together].nonzero()[:, 0]
        neurons, down_MD = together[own], weight[own]
        for i in range(team):
            mine = neurons[i::team]
            pad = H - len(mine)  # > 0 where the specialist is wider than the dense FFN
            inner = [F.pad(half[mine], (0, 0, 0, pad)) for half in halves if half is not None]
            parts[f"{name}_proj"].append(torch.cat(inner))
            parts["down_proj"].append(F.pad(team * down_MD[i::team].T, (0, pad)))
            if shape.bias:
                none = torch.zeros(len(mine), device=weight.device)
                inner = [F.pad(none if b is None else b[mine], (0, pad)) for b in biases]
                parts[f"{name}_bias"].append(torch.cat(inner))
                parts["down_bias"].append(weight[-1])
    stacked = {key: torch.stack(parts.pop(key)).contiguous() for key in list(parts)}
    return {**stacked, "router.weight": router_SD.repeat_interleave(team, dim=0)}
