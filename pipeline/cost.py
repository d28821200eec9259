"""What a conversion costs, from sizes alone: no weight is read and nothing is measured."""

from collections.abc import Mapping
from typing import Any

from pipeline.config import CAPTURED_SPLITS, Codec, Config
from pipeline.shape import MoEShape

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
RATIO = {
    Codec.compact: {"bfloat16": 1.45, "float16": 1.16, "float32": 1.18},
    Codec.fast: {"bfloat16": 1.33, "float16": 1.1, "float32": 1.1},
}
"""Raw bytes over those of the store, to plan with; none is 1."""


def cost(
    record: Mapping[str, Any], plans: Mapping[int, Mapping[str, Any]], cfg: Config
) -> dict[str, int | float]:
    """Of converting the model of `record` into the layers of `plans`.

    `parameters` and `parameters_per_token` of the sparse model, `active_ffn_fraction` of its sparse
    layers, `checkpoint_bytes`, `store_bytes` (the activations of every captured token), and
    `training_flops` of all layers (without their static controls).
    """
    shapes = [MoEShape(**plan["shape"]) for plan in plans.values()]
    stored = record["parameters"] + sum(s.total_parameters - s.dense_parameters for s in shapes)
    per_token = stored - sum(s.total_parameters - s.active_parameters for s in shapes)
    dtype = record["dtype"] if cfg.model.dtype.name == "auto" else cfg.model.dtype.name
    captured = {"train": cfg.data.tokens.train, "validation": cfg.data.tokens.validation}
    captured["heldout"] = min(cfg.data.tokens.heldout, cfg.capture.heldout_tokens)
    assert captured.keys() == set(CAPTURED_SPLITS)
    stored_as = cfg.capture.dtype.name
    if stored_as == "auto":
        stored_as = "float16" if record["dtype"] == "float16" else "bfloat16"
    raw = sum(captured.values()) * len(shapes) * 2 * record["d_model"] * BYTES[stored_as]
    ratio = RATIO.get(cfg.capture.codec, {}).get(stored_as, 1)
    steps = cfg.data.tokens.train // cfg.train.batch_size * cfg.train.epochs
    # 2 for multiply and add, 3 for forward and both halves of backward
    per_step = 6 * cfg.train.batch_size * sum(s.active_parameters for s in shapes)
    return {
        "parameters": stored,
        "parameters_per_token": per_token,
        "active_ffn_fraction": sum(s.active_ffn_fraction for s in shapes) / len(shapes),
        "checkpoint_bytes": stored * BYTES[dtype],
        "store_bytes": round(raw / ratio),
        "training_flops": steps * per_step,
    }
