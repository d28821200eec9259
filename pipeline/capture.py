"""One dense pass over the tokens: every FFN's input and output into its layer's store.

Shard k of a split is a fixed range of its token stream, so a killed capture is continued shard by
shard and writing one again changes nothing. One shard of every layer is held in memory at a time:
`2 x layers x shard_mb`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.activations import record_ffn
from pipeline.config import CaptureConfig, Dtype
from pipeline.dense import find_ffns
from pipeline.record import check_layers
from pipeline.runtime import Progress, silent
from pipeline.store import LayerReader, LayerWriter


def capture_activations(
    model: nn.Module,
    blocks: Mapping[str, Tensor],
    folder: Path,
    *,
    layers: Sequence[int],
    cfg: CaptureConfig,
    dtype: torch.dtype,
    attributes: Mapping[str, object],
    progress: Progress = silent,
) -> None:
    """Write `layer_K.zarr` and `ffn_K.safetensors` for each of `layers` below `folder`.

    Args:
        model: the dense model, on the device that it runs on.
        blocks: packed tokens per split, each (blocks, sequence_length).
        dtype: of the stored activations.
        attributes: what the stores were made from; kept in each and compared on resume.
    """
    sequence_length = next(iter(blocks.values())).shape[1]
    slots = {slot.index: slot for slot in find_ffns(model)}
    check_layers(list(layers), len(slots))
    writers = {}
    for layer in layers:
        weights = slots[layer].weights()
        weights.to("cpu", weights.up_proj.dtype).save(folder / f"ffn_{layer}.safetensors")
        writers[layer] = LayerWriter.open(
            folder / f"layer_{layer}.zarr",
            rows={split: b.numel() for split, b in blocks.items()},
            d_model=weights.d_model,
            dtype=dtype,
            sequence_length=sequence_length,
            codec=cfg.codec,
            shard_mb=cfg.shard_mb,
            chunk_mb=cfg.chunk_mb,
            attributes=dict(attributes),
        )
    total, done = sum(b.numel() for b in blocks.values()), 0
    for split, tokens in blocks.items():
        committed = {layer: w.committed(split) for layer, w in writers.items()}
        for k in range(max(w.n_shards[split] for w in writers.values())):
            missing = {layer: w for layer, w in writers.items() if k not in committed[layer]}
            hooked = {layer: slots[layer].module for layer in missing}
            with record_ffn(hooked) as recorded:
                done += _capture_shard(
                    model, tokens, split, k, missing, recorded, cfg.batch_size, dtype
                )
            progress(done, total, f"tokens ({split})")
    for layer in layers:
        LayerReader(folder / f"layer_{layer}.zarr")


def _capture_shard(
    model: nn.Module,
    tokens: Tensor,
    split: str,
    k: int,
    writers: Mapping[int, LayerWriter],
    recorded: Mapping[int, tuple[Tensor, Tensor]],
    batch_size: int,
    dtype: torch.dtype,
) -> int:
    """Run the sequences of shard k for the layers that lack it; returns how many tokens."""
    if not writers:
        return 0
    shard_rows = {w.shard_rows for w in writers.values()}
    assert len(shard_rows) == 1, "layers of one model share d_model"
    per_shard = shard_rows.pop() // tokens.shape[1]
    sequences = tokens[k * per_shard : (k + 1) * per_shard]
    kept: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in writers}
    device = next(model.parameters()).device
    with torch.inference_mode():
        for batch in sequences.split(batch_size):
            model(input_ids=batch.to(device), use_cache=False)
            for layer, (x, y) in recorded.items():
                kept[layer].append((x.to("cpu", dtype), y.to("cpu", dtype)))
    for layer, pairs in kept.items():
        ffn_input, ffn_output = (torch.cat(side) for side in zip(*pairs, strict=True))
        writers[layer].write_shard(split, k, ffn_input, ffn_output)
    return sequences.numel()


def stored_dtype(dtype: Dtype, model_dtype: torch.dtype) -> torch.dtype:
    """The store's dtype: `auto` is bfloat16, and float16 for a float16 model."""
    if dtype is not Dtype.auto:
        return getattr(torch, dtype.name)
    return torch.float16 if model_dtype is torch.float16 else torch.bfloat16
