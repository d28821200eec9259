"""One dense pass over the tokens: every FFN's input and output into its layer's store.

Shard k of a split is a fixed range of its token stream, so a killed capture is continued shard by
shard and writing one again changes nothing. A shard is compressed and written while the next one is
computed, so that two of every layer are held in memory: `4 x layers x shard_mb`.

Parts of a capture, each a range of the shards of all splits in a row, may be written into one
folder at the same time; together they are the bytes that one run writes.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from pipeline.artifacts import file_digest
from pipeline.commits import commit_path
from pipeline.config import CaptureConfig, Dtype, Store
from pipeline.corpus import check_token_ids
from pipeline.dense import select_layers
from pipeline.discovery import find_ffns
from pipeline.durable import fsync, remove_partials, unique_partial
from pipeline.errors import ArtifactError
from pipeline.ffn import DenseFFN
from pipeline.locks import Part
from pipeline.passes import Forward, Passes, Rows, of_forward, of_model
from pipeline.progress import Progress, silent
from pipeline.room import check_room
from pipeline.store import LayerReader
from pipeline.store_writer import LayerWriter

T = TypeVar("T")
AT_ONCE = 2
"""Layers whose shards are written at the same time; each holds a compressed array meanwhile."""


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
    part: Part | None = None,
    store_url: str | None = None,
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
        part: only this share of the shards, while others may write theirs; null = all of them.
        store_url: object store that takes the shards, as `capture.store_url`; null = `folder` does.

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
    check_disk = partial(check_room, folder, rows, ffns, cfg, **room, apart=store_url is not None)
    check_disk()
    if store is Store.input:  # the stores name their digests
        _save(ffns, folder, part is None)
    with ThreadPoolExecutor(1) as thread:  # saves weights, and a shard while the next is computed
        writers = {
            layer: LayerWriter.open(
                folder / f"layer_{layer}.zarr",
                rows=rows,
                d_model=weights.d_model,
                dtype=dtype,
                sequence_length=sequence_length,
                codec=cfg.codec,
                shard_mb=cfg.shard_mb,
                chunk_mb=cfg.chunk_mb,
                attributes=dict(attributes or {}),
                outputs_from=_ffn(folder, layer) if store is Store.input else None,
                alone=part is None,
                store_url=store_url,
            )
            for layer, weights in ffns.items()
        }
        missing, total = _missing(writers, blocks, part)
        passes = Passes(
            next(model.parameters()).device,
            of_forward(forward) if forward else of_model(model, slots),
            cfg.batch_size,
            {layer: ffn.d_model for layer, ffn in ffns.items()},
            max((shard.sequences.numel() for shard in missing), default=0),
            dtype,
        )
        done = total - sum(shard.sequences.numel() for shard in missing)
        progress(done, total, "")
        behind: Future[None] | None = None
        if store is not Store.input:
            behind = thread.submit(_save, ffns, folder, part is None)
        for i, shard in enumerate(missing):
            rows_of = passes.rows(shard.sequences, shard.writers)
            if behind:
                behind.result()
            if i:
                done += missing[i - 1].sequences.numel()
                progress(done, total, missing[i - 1].split)
            if i == 1:  # now the ratio of these very activations is known
                check_disk()
            behind = thread.submit(shard.write, rows_of)
        if behind:
            behind.result()
        progress(total, total, "")
    if part is None:
        check_stores(folder, chosen, store_url)


def check_stores(folder: Path, layers: Iterable[int], store_url: str | None = None) -> None:
    """Refuse stores of layers that no reader accepts; `ArtifactError` names the file."""
    for layer in layers:
        LayerReader(folder / f"layer_{layer}.zarr", store_url=store_url)


def deal(shards: Sequence[T], part: Part | None) -> Sequence[T]:
    """The share of a part: a range; those of all parts are disjoint and together everything."""
    if part is None:
        return shards
    i, n = part
    assert 1 <= i <= n, part
    return shards[(i - 1) * len(shards) // n : i * len(shards) // n]


def is_written(
    folder: Path,
    layers: Iterable[int],
    part: Part | None = None,
    store_url: str | None = None,
) -> bool:
    """Whether nothing of a part, or of the whole, is missing below `folder`: no model is needed.

    Every byte of the shards is read and verified.
    """
    try:
        writers = {k: LayerWriter.reopen(folder / f"layer_{k}.zarr", store_url) for k in layers}
    except ArtifactError:
        return False
    if not all(_has_ffn(folder, k, writer) for k, writer in writers.items()):
        return False
    mine = deal(_shards(writers), part)
    here = all(commit_path(w.path, *shard).is_file() for w in writers.values() for shard in mine)
    if not here and store_url is None:  # there another machine's commits may lie
        return False
    return all(k in w.committed(split, [k]) for w in writers.values() for split, k in mine)


def _ffn(folder: Path, layer: int) -> Path:
    return folder / f"ffn_{layer}.safetensors"


def _has_ffn(folder: Path, layer: int, writer: LayerWriter) -> bool:
    """Whether the dense FFN lies there: the very one that gives the outputs of a store without."""
    path, named = _ffn(folder, layer), writer.layout.outputs_from
    return path.is_file() and (named is None or file_digest(path) == named[1])


def _save(ffns: Mapping[int, DenseFFN], folder: Path, alone: bool) -> None:
    """Write each FFN, whole or not at all; where others write too, only what is missing."""
    if alone:
        remove_partials(folder, "ffn_*.partial")
    for layer, ffn in ffns.items():
        path = _ffn(folder, layer)
        if alone or not path.exists():
            partial = unique_partial(path)
            ffn.to("cpu", ffn.up_proj.dtype).save(partial)
            fsync(partial)
            partial.replace(path)


def _shards(writers: Mapping[int, LayerWriter]) -> list[tuple[str, int]]:
    """(split, number) of the shards of every layer, splits by name: as they are dealt."""
    numbers = [w.n_shards for w in writers.values()]
    assert all(n == numbers[0] for n in numbers), "layers of one model share d_model"
    return [(split, k) for split, n in sorted(numbers[0].items()) for k in range(n)]


@dataclass(frozen=True)
class _Shard:
    """Shard k of a split: its tokens, and the layers that lack it."""

    split: str
    k: int
    sequences: Tensor  # (sequences, length)
    writers: dict[int, LayerWriter]

    def write(self, rows: Rows) -> None:
        """Make them durable; one layer is compressed while another waits for the disk."""
        n_threads = torch.get_num_threads()
        at_once = min(AT_ONCE, n_threads)

        def write_layer(layer: int) -> None:
            threads = -(-n_threads // min(at_once, len(rows)))
            self.writers[layer].write_shard(self.split, self.k, *rows[layer], threads)

        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(write_layer, rows))


def _missing(
    writers: Mapping[int, LayerWriter], blocks: Mapping[str, Tensor], part: Part | None
) -> tuple[list[_Shard], int]:
    """What a part has to write, and the tokens of all that it has."""
    every = _shards(writers)
    mine = deal(every, part)
    if part and not mine:
        print("part {}/{} holds none".format(*part), f"of the {len(every)} shards", flush=True)
    shard_rows = next(iter(writers.values())).shard_rows
    missing, total, order = [], 0, list(blocks)
    for split, k in sorted(mine, key=lambda shard: (order.index(shard[0]), shard[1])):
        n = shard_rows // blocks[split].shape[1]
        sequences = blocks[split][k * n : (k + 1) * n]
        total += sequences.numel()
        lacking = {layer: w for layer, w in writers.items() if not w.committed(split, [k])}
        if lacking:
            missing.append(_Shard(split, k, sequences, lacking))
    return missing, total


def stored_dtype(dtype: Dtype, model_dtype: torch.dtype) -> torch.dtype:
    """The store's dtype: `auto` is bfloat16, and float16 for a float16 model."""
    if dtype is not Dtype.auto:
        return getattr(torch, dtype.name)
    return torch.float16 if model_dtype is torch.float16 else torch.bfloat16
