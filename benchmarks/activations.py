"""Capture beside the bare forward pass over the same batches, in the same precision.

The model is a Llama of random weights; its activations are compressed and written durably, shard by
shard. Two widths, and twice the tokens.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import measure
from benchmarks.measure import Row
from benchmarks.models import VOCAB, llama
from pipeline import compose
from pipeline.capture import capture_activations
from pipeline.config import CaptureConfig, Codec

SEQUENCE = 256
LAYERS = 4
GOALS = {Codec.fast: "<= 1.15", Codec.compact: "<= 1.3"}
SIZES = ((1024, 4096, torch.float32), (1024, 8192, torch.bfloat16), (2048, 2048, torch.bfloat16))
EMULATED = ((1024, 4096, torch.float32), (2048, 2048, torch.float32))  # where bf16 has no units
TINY = ((64, 1024, torch.float32),)  # d_model, tokens, dtype of the model


def rows(quick: bool) -> Iterator[Row]:
    cfg = compose.load([]).capture
    sizes = SIZES if torch.bfloat16 in measure.precisions() else EMULATED
    for d_model, tokens, dtype in TINY if quick else sizes:
        model = llama(d_model, LAYERS, dtype)
        blocks = torch.randint(VOCAB, (tokens // SEQUENCE, SEQUENCE))
        with tempfile.TemporaryDirectory() as name:
            ways: dict[str, Callable[[], object]] = {
                codec.name: _capture(model, blocks, Path(name), replace(cfg, codec=codec))
                for codec in GOALS
            }
            ways["forward"] = lambda m=model, b=blocks: forward(m, b, cfg.batch_size)
            seconds = measure.turns(ways)
            stored = Path(name, "compact").glob("layer_*.zarr/**/*")
            taken = sum(p.stat().st_size for p in stored if p.is_file())
        precision = str(dtype).removeprefix("torch.")
        size = f"{LAYERS} layers, d {d_model}, d_ff {4 * d_model}, {tokens} tokens"
        raw = 2 * LAYERS * tokens * d_model * torch.bfloat16.itemsize
        yield Row(
            "store size, compact, captured / raw bf16", size, "MB", taken / 1e6, raw / 1e6,
            taken / raw, (taken / raw,) * 2, "<= 0.69",
        )  # fmt: skip
        for codec, goal in GOALS.items():
            yield measure.compare(
                f"capture, {codec.name} codec / the bare forward pass, {precision}",
                seconds[codec.name],
                seconds["forward"],
                size=size,
                reach=goal if d_model >= 1024 else "",
            )


def _capture(
    model: PreTrainedModel, blocks: Tensor, folder: Path, cfg: CaptureConfig
) -> Callable[[], None]:
    def run() -> None:
        shutil.rmtree(folder / cfg.codec.name, ignore_errors=True)
        capture_activations(model, {"train": blocks}, folder / cfg.codec.name, cfg=cfg)

    return run


@torch.inference_mode()
def forward(model: PreTrainedModel, blocks: Tensor, batch_size: int) -> None:
    for batch in blocks.split(batch_size):
        model(input_ids=batch, use_cache=False)
