"""Neurons that act together come into one group, and all groups are of one size."""

import itertools

import pytest
import torch
from torch import Tensor

from pipeline.ffn import DenseFFN
from pipeline.partition import (
    balanced_clusters,
    cluster_partition,
    clusters,
    contributions,
    most_contributing,
    neuron_profiles,
    spread,
    token_profiles,
)

D = 16


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=generator(seed))


def loss(points: Tensor, groups: Tensor) -> float:
    members = points[groups]
    return float((members - members.mean(dim=1, keepdim=True)).square().sum())


def planted(kinds: int, each: int) -> tuple[DenseFFN, Tensor]:
    """Neurons of a few kinds in mixed order, each kind awake for inputs of its own direction."""
    directions = torch.eye(D)[:kinds]
    kind = torch.arange(kinds).repeat_interleave(each)[
        torch.randperm(kinds * each, generator=generator(1))
    ]
    up = 3 * directions[kind] + 0.05 * normal(len(kind), D, seed=2)
    size = torch.rand(len(kind), generator=generator(3)) * 10 + 0.1
    return DenseFFN(up, normal(D, len(kind), seed=4) * size, activation="relu"), kind


@pytest.mark.parametrize("kinds", [2, 4, 8])
def test_neurons_that_act_together_share_a_group_whatever_their_size(kinds):
    dense, kind = planted(kinds, 12)
    found = cluster_partition(dense, normal(3000, D), kinds, generator())
    assert sorted(found.flatten().tolist()) == list(range(dense.d_ff))
    assert all(len(set(kind[group].tolist())) == 1 for group in found)


def test_partition_repeats_with_its_seed():
    dense, _ = planted(4, 12)
    x = normal(500, D)
    one, two = (cluster_partition(dense, x, 4, generator()) for _ in range(2))
    assert torch.equal(one, two)


def test_one_group_is_every_neuron_in_order():
    dense, _ = planted(2, 8)
    assert torch.equal(cluster_partition(dense, normal(99, D), 1, generator())[0], torch.arange(16))


def test_half_precision_rows_are_profiled_in_the_weights_precision():
    dense, _ = planted(2, 8)
    x = normal(200, D).bfloat16()
    assert torch.equal(contributions(dense, x), contributions(dense, x.float()))


@pytest.mark.parametrize("seed", range(5))
def test_balanced_clusters_are_the_best_of_few_points(seed):
    """Of several starts: each ends where no exchange helps, and one of them at the optimum."""
    points = normal(8, 3, seed=seed)
    halves = [c for c in itertools.combinations(range(8), 4) if 0 in c]
    best = min(loss(points, torch.tensor([c, [p for p in range(8) if p not in c]])) for c in halves)
    found = [loss(points, balanced_clusters(points, 2, generator(s))) for s in range(8)]
    assert min(found) == pytest.approx(best, rel=1e-5)


def test_no_exchange_of_two_points_shortens_the_distances():
    points = normal(60, 4)
    found = balanced_clusters(points, 5, generator())
    assert torch.equal(found, found.sort(dim=1).values)
    means = points[found].mean(dim=1)
    distance = torch.cdist(points, means).square()
    for a, b in itertools.combinations(range(5), 2):
        gain_a = (distance[found[a], a] - distance[found[a], b]).max()
        gain_b = (distance[found[b], b] - distance[found[b], a]).max()
        assert gain_a + gain_b <= 1e-5


def test_balanced_clusters_are_far_better_than_chance():
    means = normal(6, 8) * 3
    points = means.repeat_interleave(40, 0) + normal(240, 8, seed=1)
    chance = loss(points, torch.randperm(240, generator=generator()).view(6, 40))
    planted_loss = loss(points, torch.arange(240).view(6, 40))
    found = min(loss(points, balanced_clusters(points, 6, generator(s))) for s in range(4))
    assert found <= 1.001 * planted_loss < 0.3 * chance


def test_many_equal_points_end_in_groups_of_one_size():
    found = balanced_clusters(torch.zeros(40, 3), 8, generator())
    assert sorted(found.flatten().tolist()) == list(range(40))


def test_plain_clusters_have_the_sizes_that_they_have():
    points = torch.cat([normal(90, 2), normal(10, 2, seed=1) + 50])
    group = clusters(points, 2, 20, generator())
    assert len(set(group[:90].tolist())) == 1 and len(set(group[90:].tolist())) == 1
    assert group[0] != group[95]


def test_profiles_keep_the_correlations_of_neurons_and_the_cosines_of_tokens(monkeypatch):
    monkeypatch.setattr("pipeline.partition.CHUNK", 300)
    dense, _ = planted(4, 4)
    x = normal(1000, D)
    exact = contributions(dense, x)
    neurons, tokens = neuron_profiles(dense, x, generator()), token_profiles(dense, x, generator())
    error = neurons @ neurons.T - exact.T.corrcoef()
    assert error.square().mean().sqrt() < 0.1
    length = torch.nn.functional.normalize(exact, dim=1)
    assert (tokens @ tokens.T - length @ length.T).square().mean().sqrt() < 0.12


@pytest.mark.slow
def test_partition_scales_to_a_wide_ffn():
    """14,336 neurons in 64 groups end, and in seconds."""
    centres = normal(200, 128)
    points = centres[torch.randint(200, (14336,), generator=generator())] + normal(14336, 128)
    found = balanced_clusters(points, 64, generator())
    assert loss(points, found) < 0.8 * loss(points, torch.arange(14336).view(64, -1))


def test_neurons_contribute_by_their_squares():
    """One that is large for a token in ten before one that is small for all."""
    x = torch.zeros(10, 2)
    x[0, 0], x[:, 1] = 5.0, 1.0
    dense = DenseFFN(torch.eye(2), torch.eye(2), activation="relu")
    assert most_contributing(dense, x, 1).tolist() == [0]


def test_more_rounds_make_closer_clusters():
    points = normal(300, 4)
    one, many = (clusters(points, 6, rounds, generator()) for rounds in (1, 30))

    def spread_of(groups: Tensor) -> float:
        parts = [points[groups == k] for k in range(6)]
        return sum(float((part - part.mean(dim=0)).square().sum()) for part in parts)

    assert spread_of(many) < 0.98 * spread_of(one)


def test_first_centres_are_drawn_by_their_squared_distance():
    """Ten far points of a thousand: nine draws in ten; by distance it would be one in two."""
    points = torch.cat([torch.zeros(900, 1), torch.ones(90, 1), torch.full((10, 1), 10.0)])
    far = [bool((spread(points, 2, generator(seed)) == 10).any()) for seed in range(200)]
    assert sum(far) > 160
