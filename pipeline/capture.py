"""One dense pass over the tokens: every FFN's input and output into its layer's store.

Shard k of a split is a fixed range of its token stream, so a killed capture is continued shard by
shard and writing one again changes nothing. A shard is compressed and written while the next one is
computed, so that two of every layer are held in memory: `4 x layers x shard_mb`.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline import preflight, volume
from pipeline.activations import record_ffn
from pipeline.config import CaptureConfig, Codec, Dtype, Store
from pipeline.corpus import check_token_ids
from pipeline.dense import select_layers
from pipeline.discovery import FFNSlot, find_ffns
from pipeline.ffn import DenseFFN
from pipeline.preflight import size
from pipeline.progress import Progress, silent
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
        ResourceError: there is no room for it on the disk.
    """
    sequence_length = next(iter(blocks.values())).shape[1]
    slots = find_ffns(model)
    chosen = select_layers([slot.path for slot in slots], layers)
    for tokens in blocks.values():
        check_token_ids(tokens, model.get_input_embeddings().num_embeddings)  # type: ignore
    folder.mkdir(parents=True, exist_ok=True)
    dtype = dtype or stored_dtype(cfg.dtype, next(model.parameters()).dtype)
    store = Store.both if forward else cfg.store  # what its outputs are, no dense FFN can say
    rows = {split: b.numel() for split, b in blocks.items()}
    ffns = {layer: slots[layer].weights() for layer in chosen}
    room = {"store": store, "dtype": dtype, "sequence_length": sequence_length}
    check_room(folder, rows, ffns, cfg, **room)
    writers = {}
    for layer, weights in ffns.items():
        path = folder / f"ffn_{layer}.safetensors"
        weights.to("cpu", weights.up_proj.dtype).save(path)
        writers[layer] = LayerWriter.open(
            folder / f"layer_{layer}.zarr",
            rows=rows,
            d_model=weights.d_model,
            dtype=dtype,
            sequence_length=sequence_length,
            codec=cfg.codec,
            shard_mb=cfg.shard_mb,
            chunk_mb=cfg.chunk_mb,
            attributes=dict(attributes or {}),
            outputs_from=path if store is Store.input else None,
        )
    unwritten = list(_unwritten(writers, blocks))
    device = next(model.parameters()).device
    total = sum(b.numel() for b in blocks.values())
    done = total - sum(sequences.numel() for _, _, sequences, _ in unwritten)
    progress(done, total, "")
    run, first = forward or _forward(model, slots), True
    with ThreadPoolExecutor(1) as thread:  # writes a shard while the next one is computed
        behind: Future[int] | None = None
        for split, k, sequences, missing in unwritten:
            kept = _run(run, sequences.split(cfg.batch_size), missing, device, dtype)
            if behind:
                done += behind.result()
                progress(done, total, split)
            behind = thread.submit(_write, split, k, kept, missing)
            if first:  # now the ratio of these very activations is known
                behind.result()
                check_room(folder, rows, ffns, cfg, **room)
                first = False
        if behind:
            done += behind.result()
            progress(done, total, "")
    for layer in chosen:
        LayerReader(folder / f"layer_{layer}.zarr")


def check_room(
    folder: Path,
    rows: Mapping[str, int],
    ffns: Mapping[int, DenseFFN],
    cfg: CaptureConfig,
    *,
    store: Store,
    dtype: torch.dtype,
    sequence_length: int,
) -> None:
    """Refuse a capture that does not fit the disk, less what of it lies in `folder` already.

    At the compression ratio of the shards that are there, or else a usual one (`volume.RATIO`).

    Raises:
        ResourceError: says how much is needed, and what would make it less.
    """
    name, d_model = str(dtype).removeprefix("torch."), next(iter(ffns.values())).d_model
    there = [p.stat().st_size for p in folder.rglob("*") if p.is_file()]
    weights = [t.nbytes for ffn in ffns.values() for t in ffn.tensors().values()]
    measured = volume.measured_ratios(folder, cfg.codec, name)

    def need(layers: int, share: float = 1.0, *, store: Store = store, codec: Codec) -> int:
        one = volume.volume(
            {split: max(1, round(share * n)) for split, n in rows.items()},
            d_model=d_model,
            dtype=name,
            store=store,
            codec=codec,
            layout=volume.row_layout(
                sequence_length, d_model * dtype.itemsize, cfg.chunk_mb, cfg.shard_mb
            ),
            ratios=measured if codec is cfg.codec else {},
        )
        files = layers * one.files + len(ffns) - len(there)
        stored = layers * one.bytes + sum(weights) - sum(there)
        return max(0, stored) + volume.BLOCK * max(0, files)

    codec, n = cfg.codec, len(ffns)
    levers = {"half of data.tokens.train": need(n, 0.5, codec=codec)}
    if n > 1:
        levers["half of model.layers"] = need(n // 2, codec=codec)
    if store is not Store.input:
        levers["capture.store=input"] = need(n, store=Store.input, codec=codec)
    if codec is not Codec.compact:
        levers["capture.codec=compact"] = need(n, codec=Codec.compact)
    told = [f"{lever} {size(bytes_)}" for lever, bytes_ in levers.items()]
    preflight.check_disk("the activations", folder, need(n, codec=codec), told)


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


def _write(
    split: str,
    k: int,
    kept: dict[int, list[tuple[Tensor, Tensor]]],
    writers: Mapping[int, LayerWriter],
) -> int:
    """Shard k of every layer, let go when it is written; returns its tokens."""
    tokens = 0
    for layer in list(kept):
        ffn_input, ffn_output = (torch.cat(side) for side in zip(*kept.pop(layer), strict=True))
        writers[layer].write_shard(split, k, ffn_input, ffn_output)
        tokens = len(ffn_input)
    return tokens


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
