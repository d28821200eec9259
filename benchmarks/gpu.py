"""A layer of Llama-3.2-3B's shape on a CUDA GPU, in bf16, beside that card's own ceilings.

    products    square matrix products: the measured ceiling
    dense       a dense FFN of equal active FLOPs, forward and backward
    sparse      16 experts of half width, top-2, forward and backward
    step        a training step on one batch: the losses, clipping and AdamW too
    training    the same steps, shuffled rows from host memory: what waiting for the loader costs
    capture     4 layers of the shape beside the bare forward pass, the store on local disk

Needs torch, numpy and the parts of the package that it times; capture also needs what the store
needs, and is left out where that is missing. Without a GPU it says so and exits 0.

python -m benchmarks.gpu [--tokens N] [--output FILE]
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline import compose
from pipeline.ffn import DenseFFN
from pipeline.kernels import pick_kernel
from pipeline.moe import SparseMoE
from pipeline.shape import MoEShape
from pipeline.training import Objective, begin, step

REPEATS = 7


@dataclass(frozen=True)
class Size:
    d_model: int = 3072
    d_ff: int = 8192
    batch: int = 16384  # tokens of a step
    square: int = 8192  # of the products

    @property
    def shape(self) -> MoEShape:
        return MoEShape(
            d_model=self.d_model,
            d_ff=self.d_ff,
            d_ff_expert=self.d_ff // 2,
            n_experts=16,
            top_k=2,
            activation="silu",
            gated=True,
            bias=False,
            router_function="softmax_topk",
        )

    @property
    def flops(self) -> float:
        """Of a batch, forward and backward, without the router."""
        return self.batch * 3 * 2 * 3 * self.d_model * self.d_ff


TINY = Size(64, 128, 256, 128)


class RandomRows:
    """What stands in for a store: rows in host memory, pinned where there is a GPU."""

    def __init__(self, size: Size, tokens: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(2, tokens, size.d_model, generator=generator).bfloat16()
        self.pair = drawn.pin_memory() if device.type == "cuda" else drawn
        self.rows = {"train": tokens, "validation": size.batch}
        self.d_model = size.d_model

    def read(self, split: str, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        stop = self.rows[split] if stop is None else stop
        return self.pair[0, start:stop], self.pair[1, start:stop]

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        skip: int = 0,
        in_memory: bool = True,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed + epoch)
        order = torch.randperm(self.rows[split], generator=generator)
        for picked in order.split(batch_size)[skip:]:
            if len(picked) == batch_size:
                yield self.pair[0].index_select(0, picked), self.pair[1].index_select(0, picked)


class DenseLayer(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(2 * size.d_ff, size.d_model) * 0.02)
        self.down_proj = nn.Parameter(torch.randn(size.d_model, size.d_ff) * 0.02)

    def forward(self, x_TD: Tensor) -> Tensor:
        gate, up = F.linear(x_TD, self.gate_up_proj).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down_proj)


def measured(size: Size, tokens: int, device: torch.device) -> dict[str, object]:
    """Milliseconds (median, least, most), shares of the ceiling, and peak memory."""
    dtype = torch.bfloat16
    a = torch.randn(size.square, size.square, device=device, dtype=dtype)
    x = torch.randn(size.batch, size.d_model, device=device, dtype=dtype, requires_grad=True)
    moe = SparseMoE(size.shape)
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.02)
    moe.kernel, reason = pick_kernel(device.type, dtype, size.shape)
    ms = {
        "products": timed(lambda: a @ a, device),
        "dense": timed(_pass(DenseLayer(size).to(device, dtype), x), device),
        "sparse": timed(_pass(moe.to(device, dtype), x), device),
        **_trained(size, tokens, device),
    }
    ceiling = 2 * size.square**3 / ms["products"]["median"]
    found: dict[str, object] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "size": asdict(size),
        "kernel": f"{moe.kernel} ({reason})",
        "ms": ms,
        "teraflops of the products": ceiling / 1e9,
        "sparse, of the dense layer's speed": ms["dense"]["median"] / ms["sparse"]["median"],
        "training, of a step's speed on one batch": ms["step"]["median"] / ms["training"]["median"],
    }
    for name in ("dense", "sparse", "step", "training"):
        found[f"{name}, of the products' rate"] = size.flops / ms[name]["median"] / ceiling
    if device.type == "cuda":
        found["peak bytes"] = torch.cuda.max_memory_allocated()
    return found


def timed(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Milliseconds of a call, the device's work included."""
    found = []
    for repeat in range(REPEATS + 2):
        _wait(device)
        began = time.perf_counter()
        call()
        _wait(device)
        if repeat > 1:  # warm
            found.append((time.perf_counter() - began) * 1e3)
    return {"median": statistics.median(found), "least": min(found), "most": max(found)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _pass(module: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        module(x).sum().backward()
        module.zero_grad(set_to_none=True)
        x.grad = None

    return run


def _trained(size: Size, tokens: int, device: torch.device) -> dict[str, dict[str, float]]:
    """A step on one batch, and what one takes in an epoch of shuffled rows."""
    cfg = compose.load(["train.warmup_steps=0", "moe.init=random", "moe.router_init=random"])
    train = replace(cfg.train, batch_size=size.batch)
    rows = RandomRows(size, tokens, device)
    objective = Objective(rows, train, device, torch.bfloat16)
    plan = {"layer": 0, "shape": asdict(size.shape), "init": "random", "host": "mixtral"}
    dense = DenseLayer(size)
    gate, up = dense.gate_up_proj.detach().chunk(2)
    ffn = DenseFFN(up_proj=up, down_proj=dense.down_proj.detach(), gate_proj=gate)
    fit = begin(rows, ffn, plan, objective, moe_cfg=cfg.moe, seed=0, total=10**6)
    batch = tuple(side.to(device) for side in rows.read("train", 0, size.batch))

    def epoch() -> None:
        for x, y in rows.batches("train", size.batch, seed=0, epoch=0):
            step(fit, objective, x.to(device, non_blocking=True), y.to(device, non_blocking=True))

    one = timed(lambda: step(fit, objective, *batch), device)
    whole = timed(epoch, device)
    return {"step": one, "training": {n: ms / (tokens // size.batch) for n, ms in whole.items()}}


def _captured(size: Size, device: torch.device) -> dict[str, object]:
    """Capture of 4 layers beside the bare forward pass, and the store's rate."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM

        from pipeline.capture import capture_activations
    except ImportError as missing:
        return {"capture": f"left out: {missing}"}
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=size.d_model,
        intermediate_size=size.d_ff,
        num_hidden_layers=4,
        num_attention_heads=max(1, size.d_model // 128),
        num_key_value_heads=max(1, size.d_model // 384),
    )
    model = LlamaForCausalLM(config).to(device, torch.bfloat16).eval()  # pyright: ignore
    blocks = torch.randint(4096, (size.batch // 128, 128))
    cfg = compose.load([]).capture

    @torch.inference_mode()
    def forward() -> None:
        for part in blocks.split(cfg.batch_size):
            model(input_ids=part.to(device), use_cache=False)

    def capture() -> None:
        with tempfile.TemporaryDirectory(dir=".") as folder:
            capture_activations(model, {"train": blocks}, Path(folder), cfg=cfg)

    bare, kept = timed(forward, device), timed(capture, device)
    stored = 4 * 2 * blocks.numel() * size.d_model * 2
    return {
        "ms of capture": kept,
        "ms of its forward pass": bare,
        "capture / forward": kept["median"] / bare["median"],
        "raw MB/s into the store": stored / 1e3 / kept["median"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, default=2**21, help="of an epoch of training")
    parser.add_argument("--quick", action="store_true", help="tiny, on any device: whether it runs")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not args.quick:
        print("There is no CUDA device: nothing to measure. `make bench` is for CPUs.")
        return
    device = torch.device("cuda" if cuda else "cpu")
    size, tokens = (TINY, 1024) if args.quick else (Size(), args.tokens)
    with contextlib.redirect_stdout(io.StringIO()):
        found = measured(size, tokens, device) | _captured(size, device)
    print(json.dumps(found, indent=1))
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
