"""What a layer takes in memory where it is made and trained, in bytes, from sizes alone.

`plan` tells it before, and a run on a GPU asks it before it puts there what may not fit: the same
numbers, and never a probe. Imports no torch.

Shapes: B tokens of a batch, D d_model, F d_ff, E experts, M neurons of one specialist.
"""

import math

from pipeline.shape import MoEShape

SHARE = 0.9
"""Of a GPU's memory that is counted on; the rest is the driver's, and lost between allocations."""

START_ROWS, ROUND_ROWS = 262144, 65536  # of a start by specialists: in all, and in a round
KEPT_BYTES = 2**31  # rows, and hidden activations, that it keeps, each up to this
RIDGE_ROWS = 16384  # of any other start
CHUNK = 4096  # rows that a start multiplies at a time
FIT_ROWS = 4096  # rows of a forward pass of the layer, on a GPU, while scale and bias are fitted
BLOCK_FEATURES = 8192  # that a refit solves for at once


def step(shape: MoEShape, B: int) -> int:
    """Of a step's activations and their gradients; loads may be twice the even one."""
    inner = 2 if shape.gated else 1
    chosen = 2 * B * math.ceil(shape.experts_per_token)
    routed = chosen * ((inner + 2) * shape.d_ff_expert + 3 * shape.d_model)
    shared = B * (inner + 2) * shape.d_ff_shared
    return 4 * 2 * (routed + shared + 8 * B * shape.d_model)


def training(shape: MoEShape, B: int, validation: int) -> int:
    """Of weights, gradients, two moments, weights cast to bf16 with their gradients, and a step.

    Experts that choose their tokens are shown all `validation` inputs at once, in float32.
    """
    judged = 0 if shape.capacity_factor is None else 4 * shape.d_model * validation
    return 20 * shape.total_parameters + max(step(shape, B), judged)


def pair(d_model: int, itemsize: int, rows: int) -> int:
    """Of the inputs and outputs of `rows`."""
    return 2 * d_model * itemsize * rows


def start(
    shape: MoEShape, init: str, rows: int, validation: int, itemsize: int, *, refitted: bool
) -> int:
    """Of `start.start_layer` on a GPU; the training rows stay on the host.

    Args:
        init: of the layer's plan.
        rows, validation: of the splits.
        itemsize: of the stored rows.
        refitted: whether every `down_proj` is fitted last.
    """
    D, F, E = shape.d_model, shape.d_ff, shape.n_experts
    ffn = 3 * F * D * (4 + itemsize)
    if init == "specialist":
        M, S = shape.d_ff_specialist, shape.n_specialists
        kept = [
            size
            for n in (min(rows, ROUND_ROWS), validation)
            for size in (pair(D, itemsize, n), 4 * n * F)
            if size <= KEPT_BYTES
        ]
        found = 2 * 4 * S * M * D  # of this round and of the best one
        making = sum(kept) + found + specialist_sums(shape) + 4 * CHUNK * (3 * F + 2 * D)
    else:
        seen = min(rows, RIDGE_ROWS)
        making = (4 + 8) * seen * D + 3 * 8 * D * D + 3 * 4 * CHUNK * F
    layer = 2 * 4 * shape.total_parameters  # and what it is filled with
    fitted = pair(D, 4, validation) + step(shape, min(validation, FIT_ROWS))
    if refitted:
        weights = 3 * 8 * D * (E * shape.d_ff_expert + shape.d_ff_shared)
        fitted += weights + 6 * 8 * BLOCK_FEATURES**2
    return ffn + max(making, layer + fitted)


def specialist_sums(shape: MoEShape) -> int:
    """Of the float64 sums that a specialist is pruned and fitted by, and of what solves them."""
    D, F = shape.d_model, shape.d_ff
    return 8 * F * (6 * F + 8 * D)
