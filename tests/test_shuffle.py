"""Orders are real permutations, the same on every machine, and can be entered anywhere."""

import threading

import pytest
import torch

from pipeline import shuffle


def test_permutation_is_a_permutation():
    for n in (0, 1, 2, 1000):
        assert shuffle.permutation(n, 0).sort().values.equal(torch.arange(n))


def test_permutation_is_the_same_in_every_process():
    """Pinned: resumed and repeated runs depend on it, whatever PYTHONHASHSEED is."""
    assert shuffle.permutation(8, 0, 1, "train", 2).tolist() == [0, 4, 3, 2, 7, 6, 5, 1]


def test_permutation_differs_by_every_part_of_its_purpose():
    purposes = [(0, 0, "train"), (1, 0, "train"), (0, 1, "train"), (0, 0, "validation")]
    orders = {tuple(shuffle.permutation(50, *purpose).tolist()) for purpose in purposes}
    assert len(orders) == len(purposes)


@pytest.mark.parametrize(
    ("row", "place"), [(0, (0, 0)), (2, (0, 2)), (3, (1, 0)), (7, (2, 3)), (8, (3, 0))]
)
def test_locate_finds_the_window_of_a_row(row, place):
    assert shuffle.locate([3, 1, 4], row) == place


def test_batches_follow_the_order_across_windows_and_drop_the_ragged_end():
    rows = torch.arange(11.0)
    windows = [torch.tensor([2, 0, 1]), torch.tensor([3]), torch.tensor([9, 4, 8, 5, 7, 6, 10])]
    pair = rows[:, None], -rows[:, None]
    found = [
        (x[:, 0].tolist(), y[:, 0].tolist())
        for x, y in shuffle.batches(((order, pair) for order in windows), 4)
    ]
    wanted = [[2, 0, 1, 3], [9, 4, 8, 5]]
    assert found == [(w, [-i for i in w]) for w in wanted]


def test_prefetch_keeps_the_order_and_loads_one_ahead():
    loaded: list[int] = []

    def load(i: int) -> int:
        loaded.append(i)
        return -i

    items = shuffle.prefetch(load, [3, 1, 2])
    assert next(items) == -3
    assert set(loaded) <= {3, 1}
    assert list(items) == [-1, -2]


def test_prefetch_passes_errors_on_and_leaves_no_thread():
    before = threading.active_count()

    def load(i: int) -> int:
        if i == 2:
            raise ValueError("two")
        return i

    with pytest.raises(ValueError, match="two"):
        list(shuffle.prefetch(load, [1, 2, 3]))
    abandoned = shuffle.prefetch(load, [1, 3])
    next(abandoned)
    abandoned.close()
    assert threading.active_count() == before
