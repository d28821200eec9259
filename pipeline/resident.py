"""Rows where a layer is trained: on a GPU itself where they fit, else a few batches ahead of it.

Which of the two follows from sizes and the card's whole memory, and the run says it. Either way the
batches are those of the store, in its order. On a CPU there is nothing to do.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline import footprint, shuffle
from pipeline.preflight import size
from pipeline.runtime import tell
from pipeline.shuffle import Pair

if TYPE_CHECKING:
    from pipeline.store import Rows

UPLOADED = 65536  # rows that are read and copied at a time
AHEAD = 3  # batches that lie ready, or are being copied, or in use

Batches = Callable[..., Iterator[Pair]]
"""As `store.Rows.batches`; a batch holds until the next one is asked for."""


def fits(what: str, device: torch.device, need: int, beside: int) -> bool:
    """Whether `need` bytes beside others fit the card; says so, and why."""
    card = torch.cuda.get_device_properties(device).total_memory
    enough = need + beside <= footprint.SHARE * card
    also = f" beside {size(beside)}" if beside else ""
    verb = "fits" if enough else "does not fit"
    reason = f"{size(need)}{also} {verb} {footprint.SHARE:.0%} of the card's {size(card)}"
    tell(what, "on the GPU" if enough else "on the CPU", reason)
    return enough


def upload(rows: "Rows", split: str, device: torch.device) -> Pair:
    """All rows of a split on the device, a part of them at a time on the host."""
    first = rows.read(split, 0, 0)
    n = rows.rows[split]
    pair = tuple(torch.empty(n, rows.d_model, dtype=side.dtype, device=device) for side in first)
    for start in range(0, n, UPLOADED):
        stop = min(start + UPLOADED, n)
        for there, here in zip(pair, rows.read(split, start, stop), strict=True):
            there[start:stop].copy_(here)
    x_TD, y_TD = pair
    return x_TD, y_TD


def gathered(pair: Pair) -> Batches:
    """The batches of a split that lies on the device as a whole."""
    return partial(_gather, pair)


def _gather(
    pair: Pair,
    split: str,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    skip: int = 0,
    in_memory: bool = True,
) -> Iterator[Pair]:
    assert in_memory, "a stream's order is another one"
    order = shuffle.permutation(len(pair[0]), seed, epoch, split, 0)[skip * batch_size :]
    yield from shuffle.batches([(order.to(pair[0].device), pair)], batch_size)


def fed(rows: "Rows", device: torch.device) -> Batches:
    """The batches of `rows`: gathered by a thread into pinned memory, copied by a side stream."""
    return partial(_feed, rows, device)


@dataclass
class _Slot:
    """Room for one batch on either side, taken by turns."""

    pinned: Pair
    there: Pair
    copied: torch.cuda.Event  # from pinned to there
    used: torch.cuda.Event  # by what was computed from it


def _feed(
    rows: "Rows",
    device: torch.device,
    split: str,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    skip: int = 0,
    in_memory: bool = True,
) -> Iterator[Pair]:
    left = rows.rows[split] // batch_size - skip
    if left <= 0:
        return
    order = {"seed": seed, "epoch": epoch, "skip": skip, "in_memory": in_memory}
    source = rows.batches(split, batch_size, **order)
    like, shape = rows.read(split, 0, 0)[0], (batch_size, rows.d_model)
    slots = [_slot(shape, like, device) for _ in range(AHEAD)]
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))  # which may yet use what the slots got

    def load(i: int) -> _Slot:
        slot = slots[i % AHEAD]
        slot.copied.synchronize()  # the pinned rows are free again
        for pinned, found in zip(slot.pinned, next(source), strict=True):
            pinned.copy_(found)
        with torch.cuda.stream(stream):
            stream.wait_event(slot.used)
            for there, pinned in zip(slot.there, slot.pinned, strict=True):
                there.copy_(pinned, non_blocking=True)
            slot.copied.record(stream)
        return slot

    try:
        with contextlib.closing(shuffle.prefetch(load, range(left))) as ready:
            for slot in ready:
                current = torch.cuda.current_stream(device)
                current.wait_event(slot.copied)
                yield slot.there
                slot.used.record(current)
    finally:  # a copy that nobody waited for must not meet what gets the slots' memory next
        torch.cuda.current_stream(device).wait_stream(stream)


def _slot(shape: tuple[int, int], like: Tensor, device: torch.device) -> _Slot:
    pinned = [torch.empty(shape, dtype=like.dtype, pin_memory=True) for _ in range(2)]
    there = [torch.empty(shape, dtype=like.dtype, device=device) for _ in range(2)]
    events = torch.cuda.Event(blocking=True), torch.cuda.Event()
    return _Slot((pinned[0], pinned[1]), (there[0], there[1]), *events)
