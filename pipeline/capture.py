"""One dense pass over the tokens: every FFN's input and output into its layer's store.

Shard k of a split is a fixed range of its token stream, so a killed capture is continued shard by
shard and writing one again changes nothing. So are the batches, whatever is missing: one that
reaches into shards that are there is run whole, and the same rows come out. Rows are compressed and
written while the model goes on, see `behind.py`.

Parts of a capture, each a range of the shards of all splits in a row, may be written into one
folder at the same time; together they are the bytes that one run writes.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from pipeline.artifacts import file_digest
from pipeline.behind import Behind
from pipeline.commits import ARRAYS, commit_path
from pipeline.config import CaptureConfig, Dtype, Store
from pipeline.corpus import check_token_ids
from pipeline.dense import select_layers
from pipeline.discovery import find_ffns, input_device
from pipeline.durable import fsync, remove_partials, unique_partial
from pipeline.errors import ArtifactError, InputError
from pipeline.ffn import DenseFFN
from pipeline.locks import Part
from pipeline.passes import Forward, Record, of_forward, of_model
from pipeline.progress import Progress, silent
from pipeline.room import check_room
from pipeline.shard_writer import ShardWriter
from pipeline.store import LayerReader
from pipeline.store_writer import LayerWriter

T = TypeVar("T")


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
        InputError: the model lacks a layer or a token's embedding, an FFN does not see every token
            once, or an activation is not finite.
        ResourceError: there is no room for it on the disk, or `device_map` left a layer's FFN on
            no device.
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
    done = total - sum(shard.stop - shard.start for shard in missing)
    progress(done, total, "")
    record = of_forward(forward) if forward else of_model(model, slots)
    device, d_model = input_device(model), next(iter(ffns.values())).d_model
    tokens = min(cfg.batch_size * sequence_length, max(rows.values()))
    with Behind(device, d_model, dtype, tokens) as behind:
        if store is not Store.input:
            behind.submit(partial(_save, ffns, folder, part is None))
        unsure = True
        for batch in _batches(missing, blocks, cfg.batch_size):
            _run(record, batch, device, behind)
            behind.check()
            if unsure and behind.committed:  # now the ratio of these very activations is known
                check_disk()
                unsure = False
            done += sum(len(rows) for _, rows in batch.shards)
            progress(done, total, batch.split)
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
    return _is_sound(path) and (named is None or file_digest(path) == named[1])


def _is_sound(ffn: Path) -> bool:
    try:
        DenseFFN.load(ffn)
    except ArtifactError:
        return False
    return True


def _save(ffns: Mapping[int, DenseFFN], folder: Path, alone: bool) -> None:
    """Write each FFN, whole or not at all; where others write too, only what is missing."""
    if alone:
        remove_partials(folder, "ffn_*.partial")
    for layer, ffn in ffns.items():
        path = _ffn(folder, layer)
        if alone or not _is_sound(path):
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
    """Shard k of a split, and the layers that lack it."""

    split: str
    k: int
    start: int  # its first row
    stop: int
    lacking: dict[int, LayerWriter]
    begun: dict[int, ShardWriter] = field(default_factory=dict)

    def writer(self, layer: int) -> ShardWriter:
        if layer not in self.begun:
            self.begun[layer] = self.lacking[layer].begin(self.split, self.k)
        return self.begun[layer]


@dataclass(frozen=True)
class _Batch:
    """What the model is given at once."""

    split: str
    sequences: Tensor  # (sequences, length)
    shards: list[tuple[_Shard, range]]  # that lack some of it, and which of its rows

    @property
    def layers(self) -> list[int]:
        return sorted({layer for shard, _ in self.shards for layer in shard.lacking})


def _missing(
    writers: Mapping[int, LayerWriter], blocks: Mapping[str, Tensor], part: Part | None
) -> tuple[list[_Shard], int]:
    """What a part has to write, splits as in `blocks`, and the tokens of all that it has."""
    every = _shards(writers)
    mine = deal(every, part)
    if part and not mine:
        print("part {}/{} holds none".format(*part), f"of the {len(every)} shards", flush=True)
    layout = next(iter(writers.values())).layout
    missing, total, order = [], 0, list(blocks)
    for split, k in sorted(mine, key=lambda shard: (order.index(shard[0]), shard[1])):
        start, stop = layout.shard_range(split, k)
        total += stop - start
        lacking = {layer: w for layer, w in writers.items() if not w.committed(split, [k])}
        if lacking:
            missing.append(_Shard(split, k, start, stop, lacking))
    return missing, total


def _batches(
    missing: Sequence[_Shard], blocks: Mapping[str, Tensor], batch_size: int
) -> Iterator[_Batch]:
    """Those that missing shards are in; each split is cut from its beginning, whatever it lacks."""
    for split, sequences in blocks.items():
        shards = deque(shard for shard in missing if shard.split == split)
        length, at = sequences.shape[1], 0
        for batch in sequences.split(batch_size):
            start, stop = at * length, (at + len(batch)) * length
            at += len(batch)
            while shards and shards[0].stop <= start:
                shards.popleft().begun.clear()  # they go when they are written
            touched = itertools.takewhile(lambda shard, end=stop: shard.start < end, shards)
            parts = [
                (s, range(max(s.start, start) - start, min(s.stop, stop) - start)) for s in touched
            ]
            if parts:
                yield _Batch(split, batch, parts)


@torch.inference_mode()
def _run(record: Record, batch: _Batch, device: torch.device, behind: Behind) -> None:
    given: set[tuple[int, int]] = set()

    def keep(layer: int, side: int, rows: Tensor) -> None:
        tokens = batch.sequences.numel()
        if len(rows) != tokens:
            raise _not_once(layer, f"sees {len(rows)} rows of {tokens} tokens")
        if (layer, side) in given:
            raise _not_once(layer, f"is run again in one pass over {tokens} tokens")
        given.add((layer, side))
        for shard, part in batch.shards:
            if layer in shard.lacking:
                behind.write(shard.writer(layer), side, rows[part.start : part.stop])

    record(batch.sequences.to(device), batch.layers, keep)
    for layer in batch.layers:
        if not {(layer, side) for side in range(len(ARRAYS))} <= given:
            raise _not_once(layer, "is not run")


def _not_once(layer: int, seen: str) -> InputError:
    return InputError(
        "An FFN cannot be captured.",
        value=f"layer {layer}: {seen}",
        rule="in a forward pass of the dense model each layer's FFN sees every token once",
        remedy="leave the layer out with model.layers",
    )


def stored_dtype(dtype: Dtype, model_dtype: torch.dtype) -> torch.dtype:
    """The store's dtype: `auto` is bfloat16, and float16 for a float16 model."""
    if dtype is not Dtype.auto:
        return getattr(torch, dtype.name)
    return torch.float16 if model_dtype is torch.float16 else torch.bfloat16
