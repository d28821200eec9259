"""One dense pass over the tokens: every FFN's input and output into its layer's store.

Shard k of a split is a fixed range of its token stream, so a killed capture is continued shard by
shard and writing one again changes nothing. One shard of every layer is held in memory at a time:
`2 x layers x shard_mb`.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.activations import record_ffn
from pipeline.config import CaptureConfig, Dtype
from pipeline.corpus import check_token_ids
from pipeline.dense import select_layers
from pipeline.discovery import FFNSlot, find_ffns
from pipeline.runtime import Progress, silent
from pipeline.store import LayerReader, LayerWriter

Forward = Callable[[Tensor, Collection[int]], Mapping[int, tuple[Tensor, Tensor]]]
"""(B, S) token ids and layers -> each layer's FFN input and output, (B S, D) each."""


def capture_activations(
    model: nn.Module,
    blocks: Mapping[str, Tensor],
    folder: Path,
    *,
    cfg: CaptureConfig,
    layers: Iterable[int | str] | None = None,
    dtype: torch.dtype | None = None,
    attributes: Mapping[str, object] | None = None,
    forward: Forward | None = None,
    progress: Progress = silent,
) -> None:
    """Write `layer_K.zarr` and `ffn_K.safetensors` for each of `layers` below `folder`.

    Layers may differ in d_ff; all have the model's d_model.

    Args:
        model: the dense model, on the device that it runs on.
        blocks: packed tokens per split, each (blocks, sequence_length).
        layers: as `dense.select_layers` takes them; null = all.
        dtype: of the stored activations; null = as `cfg.dtype` says.
        attributes: what the stores were made from; kept in each and compared on resume.
        forward: what runs the model; null = itself, its FFNs recorded.

    Raises:
        InputError: the model lacks a layer or a token's embedding, or an activation is not finite.
    """
    sequence_length = next(iter(blocks.values())).shape[1]
    slots = find_ffns(model)
    chosen = select_layers([slot.path for slot in slots], layers)
    for tokens in blocks.values():
        check_token_ids(tokens, model.get_input_embeddings().num_embeddings)  # type: ignore
    folder.mkdir(parents=True, exist_ok=True)
    dtype = dtype or stored_dtype(cfg.dtype, next(model.parameters()).dtype)
    writers = {}
    for layer in chosen:
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
            attributes=dict(attributes or {}),
        )
    unwritten = list(_unwritten(writers, blocks))
    device = next(model.parameters()).device
    total = sum(b.numel() for b in blocks.values())
    done = total - sum(sequences.numel() for _, _, sequences, _ in unwritten)
    progress(done, total, "")
    for split, k, sequences, missing in unwritten:
        run = forward or _forward(model, slots)
        kept = _run(run, sequences.split(cfg.batch_size), missing, device, dtype)
        for layer, pairs in kept.items():
            ffn_input, ffn_output = (torch.cat(side) for side in zip(*pairs, strict=True))
            missing[layer].write_shard(split, k, ffn_input, ffn_output)
        done += sequences.numel()
        progress(done, total, split)
    for layer in chosen:
        LayerReader(folder / f"layer_{layer}.zarr")


def _unwritten(
    writers: Mapping[int, LayerWriter], blocks: Mapping[str, Tensor]
) -> Iterator[tuple[str, int, Tensor, dict[int, LayerWriter]]]:
    """Split, number and sequences of each shard that a layer lacks, with those layers' writers."""
    shard_rows = {w.shard_rows for w in writers.values()}
    assert len(shard_rows) == 1, "layers of one model share d_model"
    (rows,) = shard_rows
    for split, tokens in blocks.items():
        committed = {layer: w.committed(split) for layer, w in writers.items()}
        for k, sequences in enumerate(tokens.split(rows // tokens.shape[1])):
            missing = {layer: w for layer, w in writers.items() if k not in committed[layer]}
            if missing:
                yield split, k, sequences, missing


def _forward(model: nn.Module, slots: Sequence[FFNSlot]) -> Forward:
    def forward(batch: Tensor, layers: Collection[int]) -> Mapping[int, tuple[Tensor, Tensor]]:
        with record_ffn({layer: slots[layer] for layer in layers}) as recorded:
            model(input_ids=batch, use_cache=False)
        return recorded

    return forward


@torch.inference_mode()
def _run(
    forward: Forward,
    batches: Sequence[Tensor],
    layers: Collection[int],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[int, list[tuple[Tensor, Tensor]]]:
    """Each layer's (input, output) of every batch, on the CPU."""
    kept: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for batch in batches:
        for layer, (x, y) in forward(batch.to(device), layers).items():
            kept.setdefault(layer, []).append((x.to("cpu", dtype), y.to("cpu", dtype)))
    return kept


def stored_dtype(dtype: Dtype, model_dtype: torch.dtype) -> torch.dtype:
    """The store's dtype: `auto` is bfloat16, and float16 for a float16 model."""
    if dtype is not Dtype.auto:
        return getattr(torch, dtype.name)
    return torch.float16 if model_dtype is torch.float16 else torch.bfloat16
