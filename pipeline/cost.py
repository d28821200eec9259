"""What a conversion costs, stage by stage, from sizes alone: no weight is read, nothing measured.

P parameters of the dense model, S of the sparse one, L layers, T tokens, D d_model, F d_ff, V
vocabulary, B tokens of a batch. Multiply and add are 2 FLOPs; a backward pass is two forward ones.

| stage | on disk | FLOPs | memory besides Python, torch and transformers |
|---|---|---|---|
| dense (embedded) | 4 P, while training 16 P more | 6 P x tokens of all steps | 16 P, logits |
| tokens | 4 T | | the text |
| capture | `volume.py`, and the FFNs | 2 P T, to its last layer | P, the ring of `behind.py` |
| budget by kl | | candidates x (2 x 2 P T and a start) | 4 P, a start |
| train, a layer | 4 s, while training 32 s more | 6 x active x T x epochs, a start | see `_train` |
| heal | 4 S of the FFNs, and a checkpoint | (2 P + 6 active) x tokens | 4 P, 20 s of all, logits |
| convert | S in the model's dtype | | 6 S where that fits, else one layer |
| evaluate | | 2 x (P and active of each control) x T | both models, controls, logits |

with s the parameters of one sparse layer; its static control is counted beside it. S has the
padding of a host that is named. A start by specialists solves least squares over the hidden
activations: 2 F x F per row and round.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline import footprint, volume
from pipeline.config import BudgetBy, Config
from pipeline.footprint import KEPT_BYTES, ROUND_ROWS, START_ROWS
from pipeline.shape import MoEShape
from pipeline.sizes import BASE, Cost, Sizes
from pipeline.volume import ITEMSIZE

TEXT = 250_000_000  # more of them that read text: the standard library's, or a part of a dataset
MANIFEST = 2_000  # bytes of a manifest
CARD = 5_000  # bytes of a model card
TOKENIZER = 48  # bytes per entry of a vocabulary
ROUNDS = 10  # of a start by specialists
PRUNING_STEPS = 128
STREAMED_CHUNKS = 64  # of each array, with train.stream
REPORT = 1_500_000  # bytes of evaluate's output
EVALUATED = 12  # its files


def costs(sizes: Sizes) -> dict[str, Cost]:
    """Stage -> what it costs; `train` once, for all its layers."""
    rows = volume.captured_rows(sizes.cfg)
    return {
        "dense": _dense(sizes),
        "tokens": _tokens(sizes),
        "capture": _capture(sizes, rows),
        "budget": _budget(sizes, rows),
        "train": _train_all(sizes, rows),
        "heal": _heal(sizes),
        "convert": _convert(sizes),
        "evaluate": _evaluate(sizes),
    }


def _dense(sizes: Sizes) -> Cost:
    own = sizes.cfg.model.embedded
    described = 1_500 + len(str(sizes.record["config"]))
    if own is None:
        return Cost(bytes=described + MANIFEST, files=2, host=BASE, flops=0.0)
    P = sizes.record["parameters"]
    tokens, logits = own.batch_tokens * own.max_steps, own.batch_tokens * sizes.head
    return sizes.split(
        16 * P + 16 * logits + 48 * own.batch_tokens * own.n_layers * (own.d_model + own.d_ff),
        kept=TEXT,
        bytes=4 * P + TOKENIZER * sizes.head + described + 2 * MANIFEST,
        transient=2 * 16 * P,
        files=7,
        flops=6.0 * sizes.matrices(P) * tokens,
    )


def _tokens(sizes: Sizes) -> Cost:
    tokens = sum(sizes.tokens(split) for split in ("train", "validation", "heldout", "shifted"))
    return Cost(bytes=4 * tokens + 4 * 80 + 500 + MANIFEST, files=6, host=BASE + TEXT + 60 * tokens)


def _capture(sizes: Sizes, rows: Mapping[str, int]) -> Cost:
    cfg, D = sizes.cfg, sizes.record["d_model"]
    one = layer_volume(sizes, rows)
    ffns = sum(_dense_ffn(s) for s in sizes.shapes.values()) * sizes.itemsize
    per_layer = 300 * one.files // 3  # the manifest names every file
    batch = cfg.capture.batch_size * cfg.data.sequence_length
    widest = max(s.d_ff for s in sizes.shapes.values())
    L = len(sizes.shapes)
    model = sizes.record["parameters"] * sizes.itemsize
    passed = batch * sizes.itemsize * (4 * widest + 8 * D)
    # a pass ends behind the last layer that is wanted, before the head
    body = sizes.matrices(sizes.record["parameters"]) - sizes.head * D
    row_bytes = D * ITEMSIZE[volume.stored_dtype(cfg.capture, sizes.record["dtype"])]
    piece = min(volume.RING_MB * 1e6 / volume.RING, row_bytes * min(batch, max(rows.values())))
    # the ring; what is compressed of it; a chunk of each array whose rows have not all come
    kept = round((volume.RING + volume.AT_ONCE) * piece + 2 * L * cfg.capture.chunk_mb * 1e6)
    if sizes.on_gpu:  # FFNs are written one at a time; rows wait there for the ring
        kept += max(map(_dense_ffn, sizes.shapes.values())) * sizes.itemsize
        passed += round(volume.RING * piece)
    if cfg.capture.store_url is not None:  # an object is put whole, copied for it
        kept += (L + volume.AT_ONCE) * one.shard_bytes
    return sizes.split(
        model + passed,
        kept=kept,
        bytes=L * (one.bytes + per_layer) + ffns + MANIFEST,
        files=L * (one.files + 1) + 1,
        flops=2.0 * body * (max(sizes.shapes) + 1) / sizes.record["n_layers"] * sum(rows.values()),
    )


def apart_bytes(sizes: Sizes) -> int:
    """Of the shards of all layers that go to an object store."""
    if sizes.cfg.capture.store_url is None:
        return 0
    rows = volume.captured_rows(sizes.cfg)
    here = layer_volume(sizes, rows).bytes
    return len(sizes.shapes) * (layer_volume(sizes, rows, apart=False).bytes - here)


def layer_volume(
    sizes: Sizes, rows: Mapping[str, int], *, apart: bool | None = None
) -> volume.Volume:
    """Of what one layer's store takes here; `apart` as `volume.volume`, null = as configured."""
    cfg, D = sizes.cfg.capture, sizes.record["d_model"]
    dtype, length = volume.stored_dtype(cfg, sizes.record["dtype"]), sizes.cfg.data.sequence_length
    return volume.volume(
        rows,
        d_model=D,
        dtype=dtype,
        store=cfg.store,
        codec=cfg.codec,
        layout=volume.row_layout(length, D * ITEMSIZE[dtype], cfg.chunk_mb, cfg.shard_mb),
        ratios=sizes.ratios,
        apart=cfg.store_url is not None if apart is None else apart,
    )


def _budget(sizes: Sizes, rows: Mapping[str, int]) -> Cost:
    L, cfg = len(sizes.shapes), sizes.cfg
    bytes_ = L * 450 + MANIFEST
    if cfg.moe.budget.by is BudgetBy.uniform:
        return Cost(bytes=bytes_, files=L + 1)
    tried = L * (1 + len(cfg.moe.budget.candidates))
    widest = max(sizes.shapes.values(), key=lambda s: s.total_parameters)
    start_rows = min(rows["train"], max(16384, 8 * sum(widest.widths)))
    P, tokens = sizes.record["parameters"], min(cfg.moe.budget.tokens, rows["validation"])
    judged = 4 * widest.total_parameters + 6 * 4 * 1024 * sizes.head
    there, kept = _start_memory(sizes, widest, start_rows, rows["validation"], beside=4 * P)
    return sizes.split(
        4 * P + max(judged, there),
        kept=kept,
        bytes=bytes_,
        files=L + 1,
        flops=tried
        * (4.0 * sizes.matrices(P) * tokens + start_flops(widest, cfg.moe.init.name, start_rows)),
    )


def _train_all(sizes: Sizes, rows: Mapping[str, int]) -> Cost:
    each = [_train(sizes, shape, rows) for shape in sizes.shapes.values()]
    return Cost(
        bytes=sum(c.bytes for c in each),
        transient=max(c.transient for c in each),
        files=sum(c.files for c in each),
        host=max(c.host for c in each),
        gpu=max(c.gpu for c in each),
        flops=sum(c.flops for c in each),
    )


def train_layer(sizes: Sizes, layer: int) -> Cost:
    """Of `train` for one layer."""
    return _train(sizes, sizes.shapes[layer], volume.captured_rows(sizes.cfg))


def _train(sizes: Sizes, shape: MoEShape, rows: Mapping[str, int]) -> Cost:
    """Memory: the rows, weights with gradient and two moments, the best state, a batch's passes.

    The start comes before the training rows are held, so that the larger of the two counts. Rows
    that lie on a GPU lie there because there is room: they are not counted.
    """
    cfg, fits = sizes.cfg.train, [shape, *static(shape, sizes.cfg)]
    B, steps = cfg.batch_size, rows["train"] // cfg.batch_size * cfg.epochs
    validations = 1 + -(-steps // cfg.evaluate_every)
    pair = (
        2 * shape.d_model * ITEMSIZE[volume.stored_dtype(sizes.cfg.capture, sizes.record["dtype"])]
    )
    held = pair * (rows["validation"] + (0 if cfg.stream else rows["train"]))
    if cfg.stream:
        held += 2 * STREAMED_CHUNKS * round(1e6 * sizes.cfg.capture.chunk_mb)
    most = max(s.total_parameters for s in fits)
    there, start = _start_memory(sizes, shape, rows["train"], rows["validation"])
    largest = max(fits, key=lambda s: s.total_parameters)
    training = max(there, footprint.training(largest, B, rows["validation"]))
    kept = max(start, held + 8 * most)
    if not sizes.on_gpu:
        training, kept = 0, max(start, held + 24 * most + footprint.step(shape, B))
    init = sizes.cfg.moe.init.name
    return sizes.split(
        training,
        kept=kept,
        bytes=sum(4 * s.total_parameters + 2_000 + 200 * (validations + 1) for s in fits)
        + MANIFEST,
        transient=2 * 16 * most,
        files=3 * len(fits) + 1,
        flops=sum(
            6.0 * s.active_parameters * B * steps
            + 2.0 * s.active_parameters * rows["validation"] * validations
            + start_flops(s, init if s is shape else "specialist", rows["train"])
            for s in fits
        ),
    )


def static(shape: MoEShape, cfg: Config) -> list[MoEShape]:
    """The shape of the layer's static control, where there is one."""
    return control(shape) if cfg.train.static_control else []


def control(shape: MoEShape) -> list[MoEShape]:
    """The shape of a layer's static control; none where as much is run as in the dense FFN."""
    width = round(shape.active_ffn_fraction * shape.d_ff)
    if width >= shape.d_ff:
        return []
    one = replace(shape, d_ff_expert=width, n_experts=1, top_k=1, bias=True, d_ff_shared=0)
    plain = {"routing": "token_choice", "capacity_factor": None, "router_width": 0}
    return [replace(one, balance_bias=False, expert_widths=None, **plain)]


def _controls(sizes: Sizes) -> tuple[list[MoEShape], int]:
    """The static controls, and parameters of the dense FFNs that stand beside them unpruned."""
    controls = {k: static(shape, sizes.cfg) for k, shape in sizes.shapes.items()}
    left = [sizes.shapes[k].dense_parameters for k, found in controls.items() if not found]
    return [shape for found in controls.values() for shape in found], sum(left)


def _dense_ffn(shape: MoEShape) -> int:
    """Parameters of the dense FFN, less a bias that only its experts have; and a header."""
    return replace(shape, bias=False).dense_parameters + 100


def _start_memory(
    sizes: Sizes, shape: MoEShape, rows: int, validation: int, beside: int = 0
) -> tuple[int, int]:
    """Of an untrained layer's making: on the GPU, where its card has room, and on the host.

    A static control is made by specialists, whatever the layer's start.

    Args:
        beside: bytes on the GPU meanwhile.
    """
    D, F = shape.d_model, shape.d_ff
    itemsize = ITEMSIZE[volume.stored_dtype(sizes.cfg.capture, sizes.record["dtype"])]
    read = footprint.pair(D, itemsize, min(rows, START_ROWS) + validation)
    if sizes.on_gpu:
        inits = {sizes.cfg.moe.init.name} | {"specialist" for _ in static(shape, sizes.cfg)}
        refitted = sizes.cfg.moe.refit or shape.d_ff_shared > 0
        there = max(
            footprint.start(shape, init, rows, validation, itemsize, refitted=refitted)
            for init in inits
        )
        if sizes.card is None or there + beside <= footprint.SHARE * sizes.card:
            return there, read
    hidden = sum(
        h if (h := 4 * n * F) <= KEPT_BYTES else 0 for n in (min(rows, ROUND_ROWS), validation)
    )
    sums = footprint.specialist_sums(shape)
    made = 4 * (4096 * 3 * F + 2 * shape.total_parameters + 3 * F * D)
    return 0, read + hidden + sums + made


def start_flops(shape: MoEShape, init: str, rows: int) -> float:
    """Of an untrained layer's making from so many training rows; only specialists count."""
    if init != "specialist":
        return 0.0
    D, F, n = shape.d_model, shape.d_ff, shape.n_specialists
    rounds = 0 if n == 1 else ROUNDS
    seen = min(rows, START_ROWS) + rounds * min(rows, ROUND_ROWS)
    sums = seen * (2.0 * F * F + 6.0 * F * D + 2.0 * n * shape.d_ff_specialist * D)
    solved = (rounds + 1) * n * (2.0 * F**3 + 2.0 * F * F * (F + D))
    return sums + solved


def _heal(sizes: Sizes) -> Cost:
    cfg, length = sizes.cfg.heal, sizes.cfg.data.sequence_length
    if not cfg.tokens:
        return Cost(bytes=1_500, files=2)
    fitted = [list(sizes.shapes.values())]
    controls, unpruned = _controls(sizes)
    if controls:
        fitted.append(controls)
    learning = max(sum(s.total_parameters for s in shapes) for shapes in fitted)
    P, B = sizes.record["parameters"], cfg.batch_size * length
    tokens = max(1, cfg.tokens // B) * B
    validations = 1 + -(-(tokens // B) // cfg.evaluate_every)
    rest = sizes.matrices(P) - sum(s.dense_parameters for s in sizes.shapes.values())
    D, L = sizes.record["d_model"], sizes.record["n_layers"]
    flops = 0.0
    for shapes in fitted:
        run = rest + sum(s.active_parameters for s in shapes) + unpruned * (shapes is controls)
        judged = sizes.tokens("validation") * validations
        flops += tokens * (2.0 * sizes.matrices(P) + 6.0 * run)
        flops += judged * 2.0 * (sizes.matrices(P) + run)
    passes = sum(footprint.step(s, B) for s in sizes.shapes.values()) + 4 * 16 * B * D * L
    return sizes.split(
        4 * P + 16 * learning + 6 * 4 * B * sizes.head + passes,
        kept=20 * learning,  # the best state, and a checkpoint while it is written
        bytes=sum(4 * s.total_parameters + 5_000 for shapes in fitted for s in shapes) + MANIFEST,
        transient=2 * 16 * learning,
        files=sum(5 * len(shapes) + 2 for shapes in fitted) + 2,
        flops=flops,
    )


def _convert(sizes: Sizes) -> Cost:
    stored = sizes.sparse * sizes.itemsize
    parts = max(1, -(-stored // _bytes_of(sizes.cfg.convert.max_shard_size)))
    logits = 64 * sizes.head * 4 * 4
    return Cost(
        host=BASE + 6 * sizes.sparse + logits,
        bytes=stored + TOKENIZER * sizes.head + CARD + 2 * MANIFEST + 100 * len(sizes.shapes),
        files=parts + (parts > 1) + 6,
    )


def least_convert(sizes: Sizes) -> int:
    """Host memory of a conversion that proves itself tensor by tensor: the largest layer."""
    largest = max(s.total_parameters for s in sizes.padded.values())
    embedding = sizes.head * sizes.record["d_model"]
    return BASE + 4 * max(2 * largest, embedding)


def _evaluate(sizes: Sizes) -> Cost:
    cfg, length = sizes.cfg.evaluate, sizes.cfg.data.sequence_length
    B = cfg.batch_size * length
    tokens = 0
    for split in ("heldout", "shifted"):
        seen = sizes.tokens(split)
        tokens += seen if cfg.max_batches is None else min(seen, cfg.max_batches * B)
    P = sizes.record["parameters"]
    rest = sizes.matrices(P) - sum(s.dense_parameters for s in sizes.shapes.values())
    shapes = list(sizes.shapes.values())
    controls, unpruned = _controls(sizes)
    run = sizes.matrices(P) + rest + sum(s.active_parameters for s in shapes)
    if controls:
        run += sizes.matrices(P) + rest + sum(s.active_parameters for s in controls) + unpruned
    oracle = any(s.capacity_factor is None for s in shapes)
    if oracle:  # it runs every expert on every token
        run += sizes.matrices(P) + rest + sum(s.total_parameters for s in shapes)
    layers = sum(s.total_parameters for s in [*shapes, *controls] + shapes * oracle)
    weights = sizes.itemsize * (P + sizes.sparse) + 4 * layers
    wide = max(s.d_ff_expert * s.n_experts + s.d_model * s.n_experts for s in shapes)
    return sizes.split(
        weights + B * sizes.head * (2 * sizes.itemsize + 4 * 4) + 4 * 2 * 256 * wide,
        kept=TEXT,
        bytes=REPORT,
        files=EVALUATED,
        flops=2.0 * run * tokens,
    )


def _bytes_of(text: str) -> int:
    """`2GB`, which `rules` has checked, as a number."""
    number, unit = text.strip()[:-2], text.strip()[-2].upper()
    return int(number) * 1000 ** ("KMGT".index(unit) + 1)


def cost(
    record: Mapping[str, Any], plans: Mapping[int, Mapping[str, Any]], cfg: Config
) -> dict[str, int | float]:
    """Of converting the model of `record` into the layers of `plans`.

    `parameters` and `parameters_per_token` of the sparse model, `active_ffn_fraction` of its sparse
    layers, `checkpoint_bytes`, `store_bytes` (the activations of every captured token), and
    `training_flops` of all layers (without their starts and static controls).
    """
    shapes = {k: MoEShape(**plan["shape"]) for k, plan in plans.items()}
    sizes = Sizes(record, shapes, cfg, {}, on_gpu=False)
    asleep = sum(s.total_parameters - s.active_parameters for s in shapes.values())
    stored = sum(volume.captured_rows(cfg).values()) * len(shapes) * record["d_model"]
    dtype = volume.stored_dtype(cfg.capture, record["dtype"])
    raw = stored * len(volume.arrays(cfg.capture.store)) * ITEMSIZE[dtype]
    steps = cfg.data.tokens.train // cfg.train.batch_size * cfg.train.epochs
    per_step = 6 * cfg.train.batch_size * sum(s.active_parameters for s in shapes.values())
    return {
        "parameters": sizes.sparse,
        "parameters_per_token": sizes.unpadded - asleep,
        "active_ffn_fraction": sum(s.active_ffn_fraction for s in shapes.values()) / len(shapes),
        "checkpoint_bytes": sizes.sparse * sizes.itemsize,
        "store_bytes": round(raw / volume.RATIO.get(cfg.capture.codec, {}).get(dtype, 1)),
        "training_flops": steps * per_step,
    }
