"""What the dense model loses on its final logits when one layer alone is sparse.

A layer's own error does not say this: the same error may be corrected, or drowned, or amplified by
the layers behind it. So each layer is made sparse as it would begin to be trained
(`start.start_layer`), takes its place in the dense model alone, and KL(dense || sparse) of the
predicted tokens is read off.

Only the first `start_rows` training rows are used for a start, since there is one for every layer
and candidate.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline import artifacts
from pipeline.config import MoEConfig
from pipeline.discovery import FFNSlot, find_ffns
from pipeline.errors import ArtifactError, ConfigError
from pipeline.ffn import DenseFFN
from pipeline.heal import divergence
from pipeline.kernels import pick_kernel
from pipeline.moe import SparseMoE
from pipeline.progress import Progress, silent
from pipeline.shape import MoEShape
from pipeline.start import start_layer
from pipeline.store import LayerReader

BATCH_TOKENS = 1024
"""Of a forward pass; the logits of a large vocabulary take most of the memory."""
ROWS, ROWS_PER_NEURON = 16384, 8
"""Training rows of a start: at least so many, and so many for each neuron of all its experts."""


def measure(
    model: PreTrainedModel,
    plans: Mapping[int, Mapping[str, Mapping[str, Any]]],
    captured: Path,
    blocks: Tensor,
    known: Path,
    *,
    moe_cfg: MoEConfig,
    seed: int,
    store_url: str | None = None,
    progress: Progress = silent,
) -> dict[int, dict[str, float]]:
    """Layer -> candidate -> the KL of the model with it in place, in nats per predicted token.

    Args:
        model: the dense model in float32, on the device that it runs on; it stays as it is.
        plans: layer -> candidate -> `layer`, `shape` and `init`.
        captured: holds `layer_K.zarr` and `ffn_K.safetensors`.
        blocks: (sequences, sequence_length) token ids of text that things are chosen on.
        known: JSON file of what is measured so far; an interrupted call goes on from it.
        store_url: the object store, for captures whose shards lie there.

    Raises:
        ConfigError: the model predicts no tokens.
        ArtifactError: a layer's capture is damaged, or a divergence is not finite.
    """
    if not model.can_generate():
        raise ConfigError(
            "An encoder's layers cannot be judged by KL.",
            value=f"{type(model).__name__}, moe.budget.by=kl",
            rule="KL compares predictions of the next token",
            remedy="set moe.budget.by=uniform",
        )
    slots = find_ffns(model)
    kls = artifacts.read_sealed(known) if known.exists() else {}
    total = sum(map(len, plans.values()))
    taken = sum(p.nbytes for p in model.parameters())
    for k, of in plans.items():
        measured = kls.setdefault(str(k), {})
        ffn = DenseFFN.load(captured / f"ffn_{k}.safetensors")
        for name, plan in of.items():
            if name not in measured:
                n = start_rows(MoEShape(**plan["shape"]))
                rows = FirstRows(captured / f"layer_{k}.zarr", n, model.device, store_url)
                place = {"device": model.device, "beside": taken}
                moe = start_layer(ffn, plan, moe_cfg, rows, seed=seed, **place)
                measured[name] = _finite(layer_kl(model, slots[k], moe, blocks), k, name)
                artifacts.write_sealed(known, kls)
            done = sum(map(len, kls.values()))
            progress(done, total, f"layer {k} at {name}: KL {measured[name]:.4g}")
    return {int(k): of for k, of in kls.items()}


@torch.inference_mode()
def layer_kl(model: PreTrainedModel, slot: FFNSlot, moe: SparseMoE, blocks: Tensor) -> float:
    """The mean KL(dense || with `moe` in that FFN's place) over predicted tokens, in nats."""
    kept = slot.module
    like = slot.weights().up_proj
    moe.kernel, _ = pick_kernel(like.device.type, like.dtype, moe.shape)
    sparse = moe.to(like.device, like.dtype).eval()
    total = 0.0
    for batch in blocks.split(max(1, BATCH_TOKENS // blocks.shape[1])):
        batch = batch.to(like.device)
        wanted = _logits(model, batch)
        slot.replace(sparse)
        try:
            total += float(divergence(wanted, _logits(model, batch)).double().sum())
        finally:
            slot.replace(kept)
    return total / (blocks.numel() - len(blocks))


def start_rows(shape: MoEShape) -> int:
    """Training rows that a candidate's start is made from."""
    return max(ROWS, ROWS_PER_NEURON * sum(shape.widths))


class FirstRows(LayerReader):
    """A layer's store, of whose training rows only the first ones are seen."""

    def __init__(
        self,
        path: Path,
        train: int,
        device: torch.device | str = "cpu",
        store_url: str | None = None,
    ) -> None:
        super().__init__(path, device, store_url)
        self.rows = {**self.rows, "train": min(train, self.rows["train"])}
        self._layout = dataclasses.replace(self._layout, rows=self.rows)


def _logits(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """(B, S) token ids -> (B, S - 1, V)."""
    return model(input_ids=batch, use_cache=False).logits[:, :-1]


def _finite(kl: float, layer: int, name: str) -> float:
    if not math.isfinite(kl):
        raise ArtifactError(
            f"The model diverges with layer {layer} made sparse.",
            value=f"KL {kl} at {name}",
            rule="every divergence is finite",
            remedy="take this value out of moe.budget.candidates, or set moe.budget.by=uniform",
        )
    return kl
