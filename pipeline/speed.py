"""How fast the sparse model runs beside the dense one, on the machine at hand.

The only figures that a clock makes. They stand in `speed.json`, in `headline.json` and on the pages
that quote them, and nowhere else: `metrics.json` and every other artefact stay the same bytes.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.discovery import input_device
from pipeline.embeddings import is_encoder

ROUNDS = 9
"""Timings of each kind of work; in each both models run, one right after the other."""
TOGETHER = (1, 16)
"""Sequences that are read at once."""
LONGEST = 512
"""Tokens of a sequence at most."""
DECODED = 32
"""Tokens that are generated one after the other."""


@torch.inference_mode()
def compare(dense: PreTrainedModel, sparse: PreTrainedModel, blocks: Tensor) -> dict[str, Any]:
    """Tokens per second of both models on (sequences, sequence_length) token ids.

    `work`: by `prefill_1`, `prefill_16` (sequences read at once) and `decode` (one sequence goes on
    token by token, with a cache; not of encoders), each with the medians of `dense` and `sparse`,
    and `ratio`, `least` and `most`: median and spread of the sparse model's speed over the dense
    one's in the same round. `device`, `threads`, `dtype`, `rounds`: where and how.
    """
    blocks, device = blocks[:, :LONGEST], input_device(dense)
    works: dict[str, tuple[int, Callable[[nn.Module], Callable[[], object]]]] = {}
    for n in TOGETHER:
        batch = blocks.repeat(-(-n // len(blocks)), 1)[:n].to(device)
        works[f"prefill_{n}"] = (batch.numel(), lambda model, batch=batch: _prefill(model, batch))
    if not is_encoder(dense):
        read = min(DECODED, blocks.shape[1] // 2)
        written = min(DECODED, blocks.shape[1] - read)
        prompt = blocks[:1, :read].to(device)
        works["decode"] = (written, lambda model: _decode(model, prompt, written))
    return {
        "work": {name: _side_by_side(dense, sparse, *work) for name, work in works.items()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "dtype": str(dense.dtype).removeprefix("torch."),
        "rounds": ROUNDS,
    }


def _side_by_side(
    dense: nn.Module,
    sparse: nn.Module,
    tokens: int,
    prepare: Callable[[nn.Module], Callable[[], object]],
) -> dict[str, float]:
    seconds: dict[str, list[float]] = {"dense": [], "sparse": []}
    sides = {"dense": dense, "sparse": sparse}
    for model in sides.values():  # what is done only once: caches, kernels, memory
        prepare(model)()
    for i in range(ROUNDS):
        for side in list(sides)[:: -1 if i % 2 else 1]:
            run = prepare(sides[side])
            _wait()
            start = time.perf_counter()
            run()
            _wait()
            seconds[side].append(time.perf_counter() - start)
    ratios = [d / s for d, s in zip(*seconds.values(), strict=True)]
    speeds = {side: tokens / median(taken) for side, taken in seconds.items()}
    return {**speeds, "ratio": median(ratios), "least": min(ratios), "most": max(ratios)}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _prefill(model: nn.Module, batch: Tensor) -> Callable[[], object]:
    return lambda: model(input_ids=batch)


def _decode(model: nn.Module, prompt: Tensor, n: int) -> Callable[[], object]:
    """Reads the prompt at once; what it returns generates `n` tokens, greedily."""
    out = model(input_ids=prompt, use_cache=True)

    def run() -> None:
        nonlocal out
        for _ in range(n):
            token = out.logits[:, -1:].argmax(dim=-1)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)

    return run
