"""Capture beside the bare forward pass over the same batches, in the same precision.

The model is a Llama of random weights; its activations are compressed and written durably, shard by
shard. Two widths, and twice the tokens. Captures are of many shards, as real ones are: what one
costs whatever its tokens (the search for the FFNs, their weights written) is in the figures too.
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
LAYERS = 2
GOALS = {Codec.fast: "<= 1.15", Codec.compact: "<= 1.3"}
BF16, FP32 = torch.bfloat16, torch.float32
SIZES = ((1024, 8192, FP32), (1024, 16384, BF16), (1024, 65536, BF16), (2048, 16384, BF16))
EMULATED = ((1024, 8192, FP32), (1024, 16384, FP32), (2048, 4096, FP32))  # where bf16 has no units
TINY = ((64, 1024, FP32),)  # d_model, tokens, dtype of the model


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
            seconds = measure.turns(ways, before=lambda way, of=name: _clear(Path(of, way)))
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
        capture_activations(model, {"train": blocks}, folder / cfg.codec.name, cfg=cfg)

    return run


def _clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


@torch.inference_mode()
def forward(model: PreTrainedModel, blocks: Tensor, batch_size: int) -> None:
    for batch in blocks.split(batch_size):
        model(input_ids=batch, use_cache=False)
