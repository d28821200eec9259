"""Partition neurons into groups that work on the same tokens, or tokens by the neurons they use.

What neuron j does for a token is its contribution, |activation| x norm of its `down_proj` column.
The matrix of contributions (tokens x neurons) is projected to random directions from one side or
the other, which keeps the inner products that clustering needs and never holds the
matrix whole.

Neurons are clustered by the correlation of their contributions: each profile is centred over the
tokens and has length 1, so that a group is of neurons that rise and fall together, whatever their
size. Groups have equal sizes: k-means in which the neurons of two groups change places while that
shortens the distances, until no exchange does. Every step lowers one and the same sum, so that it
ends. 14,336 neurons in 64 groups take about 10 s on one thread of a CPU beside the projection; that
runs where the dense FFN lies, and the exchange, of many small steps, always on the CPU.

Shapes: T tokens, D d_model, F d_ff, G groups, P points, R directions.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.ffn import DenseFFN

DIRECTIONS = 512  # random projections of a neuron's profile
TOKEN_DIRECTIONS = 128  # of a token's: what follows a clustering of tokens makes up for more
CHUNK = 4096  # tokens whose contributions are held at a time


def contributions(dense: DenseFFN, x_TD: Tensor) -> Tensor:
    """(T, F): the norm of what each neuron adds to the output, where the dense FFN lies."""
    return dense.hidden(x_TD.to(dense.up_proj)).abs() * dense.down_proj.norm(dim=0)


def most_contributing(dense: DenseFFN, x_TD: Tensor, neurons: int) -> Tensor:
    """(neurons,) indices, ascending, of the largest mean squared contribution to these inputs."""
    squares_F = sum(contributions(dense, x).square().sum(dim=0) for x in x_TD.split(CHUNK))
    assert isinstance(squares_F, Tensor)
    return squares_F.topk(neurons).indices.sort().values


def cluster_partition(
    dense: DenseFFN, x_TD: Tensor, groups: int, generator: torch.Generator
) -> Tensor:
    """(G, F / G) neuron indices on the CPU, ascending in each group: neurons that act together.

    Args:
        x_TD: inputs to judge by.
    """
    return balanced_clusters(neuron_profiles(dense, x_TD, generator).cpu(), groups, generator)


def neuron_profiles(dense: DenseFFN, x_TD: Tensor, generator: torch.Generator) -> Tensor:
    """(F, R): each neuron's contributions over the tokens, centred, of length 1, projected."""
    like = dense.up_proj
    profile_FR = like.new_zeros(dense.d_ff, DIRECTIONS)
    sum_F, squares_F = like.new_zeros(2, dense.d_ff)
    directions_R = like.new_zeros(DIRECTIONS)
    for x in x_TD.split(CHUNK):
        part_TF = contributions(dense, x)
        random_TR = torch.randn(len(x), DIRECTIONS, generator=generator).to(like)
        profile_FR += part_TF.T @ random_TR
        directions_R += random_TR.sum(dim=0)
        sum_F += part_TF.sum(dim=0)
        squares_F += part_TF.square().sum(dim=0)
    mean_F = sum_F / len(x_TD)
    centred_FR = profile_FR - torch.outer(mean_F, directions_R)
    length_F = (squares_F - len(x_TD) * mean_F.square()).clamp_min(0).sqrt()
    return centred_FR / length_F.clamp_min(1e-12)[:, None] / DIRECTIONS**0.5


def token_profiles(dense: DenseFFN, x_TD: Tensor, generator: torch.Generator) -> Tensor:
    """(T, R): each token's contributions over the neurons, of length 1, projected."""
    random_FR = torch.randn(dense.d_ff, TOKEN_DIRECTIONS, generator=generator).to(dense.up_proj)
    parts = [F.normalize(contributions(dense, x), dim=1) @ random_FR for x in x_TD.split(CHUNK)]
    return torch.cat(parts) / TOKEN_DIRECTIONS**0.5


def balanced_clusters(points_PR: Tensor, groups: int, generator: torch.Generator) -> Tensor:
    """(G, P / G) indices of the points, ascending in each group, that lie near each other.

    A local optimum: no two points of different groups can change places and shorten the sum of
    squared distances to their groups' means.
    """
    size = len(points_PR) // groups
    points_PR = points_PR.double()
    group_P = _fill(_distances(points_PR, spread(points_PR, groups, generator)), size)
    while True:
        members = [(group_P == g).nonzero()[:, 0] for g in range(groups)]
        means_GR = torch.stack([points_PR[m].mean(dim=0) for m in members])
        if not _exchange(_distances(points_PR, means_GR), group_P):
            return torch.stack(members)


def clusters(points_PR: Tensor, groups: int, rounds: int, generator: torch.Generator) -> Tensor:
    """(P,) group of each point: plain k-means of at most `rounds` rounds, sizes as they come."""
    means_GR = spread(points_PR, groups, generator)
    group_P = _distances(points_PR, means_GR).argmin(dim=1)
    for _ in range(rounds):
        sums_GR = _group_sums(points_PR, group_P, groups)
        count_G = group_P.bincount(minlength=groups)
        means_GR = torch.where(count_G[:, None] > 0, sums_GR / count_G[:, None], means_GR)
        last_P, group_P = group_P, _distances(points_PR, means_GR).argmin(dim=1)
        if torch.equal(last_P, group_P):
            break
    return group_P


def _group_sums(points_PR: Tensor, group_P: Tensor, groups: int) -> Tensor:
    """(G, R): on a GPU by a product, since its `index_add_` adds in no fixed order."""
    if points_PR.device.type == "cpu":
        none_GR = points_PR.new_zeros(groups, points_PR.shape[1])
        return none_GR.index_add_(0, group_P, points_PR)
    return F.one_hot(group_P, groups).to(points_PR).T @ points_PR


def spread(points_PR: Tensor, groups: int, generator: torch.Generator) -> Tensor:
    """(G, R) first means, k-means++: each next one is a point drawn by its squared distance."""
    chosen = [int(torch.randint(len(points_PR), (), generator=generator))]
    nearest_P = _distances(points_PR, points_PR[chosen])[:, 0].clamp_min(0)
    for _ in range(1, groups):
        reach_P = nearest_P.double().cumsum(dim=0)
        at = torch.rand((), generator=generator, dtype=torch.float64) * reach_P[-1]
        chosen.append(min(int(torch.searchsorted(reach_P, at)), len(points_PR) - 1))
        new_P = _distances(points_PR, points_PR[chosen[-1:]])[:, 0].clamp_min(0)
        nearest_P = torch.minimum(nearest_P, new_P)
    return points_PR[chosen]


def _distances(points_PR: Tensor, means_GR: Tensor) -> Tensor:
    """(P, G) squared distances."""
    lengths_P1 = points_PR.square().sum(dim=1, keepdim=True)
    return lengths_P1 - 2 * points_PR @ means_GR.T + means_GR.square().sum(dim=1)


def _fill(distance_PG: Tensor, size: int) -> Tensor:
    """(P,) groups of `size` points: those with most to lose choose first among what has room."""
    order = distance_PG.argsort(dim=1)
    if distance_PG.shape[1] == 1:
        return order[:, 0]
    ranked = distance_PG.gather(1, order[:, :2])
    room = [size] * distance_PG.shape[1]
    group_P = torch.empty(len(distance_PG), dtype=torch.long)
    wishes = order.tolist()
    for p in (ranked[:, 1] - ranked[:, 0]).argsort(descending=True, stable=True).tolist():
        g = next(g for g in wishes[p] if room[g])
        room[g] -= 1
        group_P[p] = g
    return group_P


def _exchange(distance_PG: Tensor, group_P: Tensor) -> bool:
    """Let points of two groups change places, in place, where that shortens the sum.

    Once for every pair of groups: of both sides those who gain most by going, as many as gain
    together. Returns whether any did.
    """
    groups = distance_PG.shape[1]
    gain_PG = distance_PG.gather(1, group_P[:, None]) - distance_PG
    tolerance = 1e-9 * float(distance_PG.abs().mean())
    members = [(group_P == g).nonzero()[:, 0] for g in range(groups)]
    most_GG = torch.stack([gain_PG[m].amax(dim=0) for m in members])
    best_GG = (most_GG + most_GG.T).triu(1)
    pairs = (best_GG > tolerance).nonzero()
    moved = False
    for a, b in pairs[best_GG[tuple(pairs.T)].argsort(descending=True, stable=True)].tolist():
        from_a, order_a = (distance_PG[members[a], a] - distance_PG[members[a], b]).sort(
            descending=True, stable=True
        )
        from_b, order_b = (distance_PG[members[b], b] - distance_PG[members[b], a]).sort(
            descending=True, stable=True
        )
        n = int((from_a + from_b > tolerance).sum())
        if n:
            to_b, to_a = members[a][order_a[:n]], members[b][order_b[:n]]
            members[a] = torch.cat([members[a][order_a[n:]], to_a])
            members[b] = torch.cat([members[b][order_b[n:]], to_b])
            moved = True
    for g, points in enumerate(members):
        group_P[points] = g
    return moved
