"""A layer of Llama-3.2-3B's shape on a CUDA GPU, in bf16, beside that card's own ceilings.

    products    square matrix products: the measured ceiling
    dense       a dense FFN of equal active FLOPs, forward and backward
    sparse      16 experts of half width, top-2, forward and backward
    step        a training step on one batch: the losses, clipping and AdamW too
    resident    the same steps, shuffled rows that lie on the GPU
    fed         the same steps, shuffled rows of host memory: what waiting for the loader costs
    whole       a layer from nothing: a start by specialists, then 3 epochs, and both validations
    capture     a model of the shape beside its bare forward pass; the store on local disk

Needs torch, numpy, safetensors and the parts of the package that it times; capture also needs
transformers and what the store needs, and is left out where one is missing. Without a GPU it says
so and exits 0. Training holds `tokens` rows in host memory, 12 kB each.

python -m benchmarks.gpu [--tokens N] [--output FILE]
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline import resident, shuffle
from pipeline.config import (
    CaptureConfig,
    Codec,
    Dtype,
    DynamicConfig,
    Kernel,
    MoEConfig,
    RouterInit,
    Schedule,
    Store,
    TrainConfig,
)
from pipeline.ffn import DenseFFN
from pipeline.kernels import pick_kernel
from pipeline.moe import SparseMoE
from pipeline.shape import MoEShape
from pipeline.start import start_layer
from pipeline.training import Objective, begin, fit_layer, step

REPEATS, FEW = 7, 3  # of what takes milliseconds, and seconds
EPOCHS = 3
MADE = 65536  # rows that are made at a time


@dataclass(frozen=True)
class Size:
    d_model: int = 3072
    d_ff: int = 8192
    batch: int = 16384  # tokens of a step
    square: int = 8192  # of the products
    layers: int = 28  # of the captured model
    vocabulary: int = 128256
    sequence: int = 512  # tokens of a captured sequence
    captured: int = 16384  # tokens

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


TINY = Size(64, 128, 256, 128, layers=2, vocabulary=256, sequence=32, captured=256)

MOE = MoEConfig(  # what a start and a training read of it
    init_noise=0.0,
    virtual_groups=False,
    router_init=RouterInit.random,
    refit=False,
    mean_compensation=False,
    dynamic=DynamicConfig(enabled=False),
)
TRAIN = TrainConfig(
    epochs=EPOCHS,
    learning_rate=1e-3,
    weight_decay=0.01,
    warmup_steps=20,
    schedule=Schedule.cosine,
    grad_clip=1.0,
    normalize_mse=True,
    use_cosine_loss=True,
    cosine_loss_weight=0.1,
    load_balance_coef=0.01,
    router_z_coef=0.001,
    data_free=False,
    evaluate_every=10**9,
    patience=0,
    checkpoint_every=10**9,
    stream=False,
    kernel=Kernel.auto,
)


class HostRows:
    """What stands in for a store: rows in host memory, and what a dense FFN gives of them."""

    def __init__(self, size: Size, tokens: int, ffn: DenseFFN, device: torch.device) -> None:
        self.path, self.d_model = Path("host memory"), size.d_model
        self.rows = {"train": tokens, "validation": size.batch}
        n, ffn = tokens + size.batch, ffn.to(device, torch.bfloat16)
        self.pair = tuple(torch.empty(n, size.d_model, dtype=torch.bfloat16) for _ in range(2))
        torch.manual_seed(0)
        for first in range(0, n, MADE):
            x_TD = torch.randn(min(MADE, n - first), size.d_model, device=device).bfloat16()
            for side, made in zip(self.pair, (x_TD, ffn(x_TD)), strict=True):
                side[first : first + len(made)].copy_(made)

    def read(self, split: str, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        first = 0 if split == "train" else self.rows["train"]
        start, stop, _ = slice(start, stop).indices(self.rows[split])
        x_TD, y_TD = (side[first + start : first + stop] for side in self.pair)
        return x_TD, y_TD

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
        order = shuffle.permutation(self.rows[split], seed, epoch, split, 0)
        yield from shuffle.batches([(order[skip * batch_size :], self.read(split))], batch_size)


def dense_ffn(size: Size, device: torch.device) -> DenseFFN:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device) * shape[1] ** -0.5

    D, W = size.d_model, size.d_ff
    return DenseFFN(up_proj=normal(W, D), down_proj=normal(D, W), gate_proj=normal(W, D))


class DenseLayer(nn.Module):
    def __init__(self, ffn: DenseFFN) -> None:
        super().__init__()
        assert ffn.gate_proj is not None
        self.gate_up_proj = nn.Parameter(torch.cat([ffn.gate_proj, ffn.up_proj]))
        self.down_proj = nn.Parameter(ffn.down_proj.clone())

    def forward(self, x_TD: Tensor) -> Tensor:
        gate, up = F.linear(x_TD, self.gate_up_proj).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down_proj)


Figures = dict[str, Any]


class Clock:
    """Milliseconds and peak memory of what is timed on the device, by name."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ms: dict[str, dict[str, float]] = {}
        self.peak: dict[str, int] = {}

    def time(
        self, name: str, call: Callable[[], object], repeats: int = REPEATS, parts: int = 1
    ) -> float:
        """Median of `repeats` after a warm-up; of one of `parts` equal ones."""
        cuda, found = self.device.type == "cuda", []
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for repeat in range(repeats + 1):
            self.wait()
            began = time.perf_counter()
            call()
            self.wait()
            if repeat or repeats == 1:
                found.append((time.perf_counter() - began) * 1e3 / parts)
        median = statistics.median(found)
        self.ms[name] = {"median": median, "least": min(found), "most": max(found)}
        if cuda:
            self.peak[name] = torch.cuda.max_memory_allocated()
        return median

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def layer_figures(size: Size, tokens: int, clock: Clock) -> Figures:
    """The layer beside the dense one, and its training."""
    device, dtype = clock.device, torch.bfloat16
    a = torch.randn(size.square, size.square, device=device, dtype=dtype)
    products = clock.time("products", lambda: a @ a)
    ceiling = 2 * size.square**3 / products
    x = torch.randn(size.batch, size.d_model, device=device, dtype=dtype, requires_grad=True)
    ffn = dense_ffn(size, device)
    dense = clock.time("dense", _pass(DenseLayer(ffn).to(device, dtype), x))
    with device:
        moe = SparseMoE(size.shape)
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.02)
    moe.kernel, reason = pick_kernel(device.type, dtype, size.shape)
    sparse = clock.time("sparse", _pass(moe.to(device, dtype), x))
    kernel = f"{moe.kernel} ({reason})"
    del moe, x
    rows = HostRows(size, tokens, ffn, device)
    one = _steps(size, rows, ffn, clock)
    seconds = _whole(size, rows, ffn, device)
    work = size.flops * (tokens // size.batch) * EPOCHS
    rates = {name: size.flops / clock.ms[name]["median"] for name in ("dense", "sparse", *one)}
    rates |= {"whole, without its start": work / seconds["training"] / 1e3}
    return {
        "kernel": kernel,
        "teraflops of the products": ceiling / 1e9,
        "sparse, of the dense layer's speed": dense / sparse,
        **{f"{n}, of a step's speed on one batch": one["step"] / one[n] for n in list(one)[1:]},
        **{f"{name}, of the products' rate": rate / ceiling for name, rate in rates.items()},
        "seconds of a whole layer": seconds | {"epochs": EPOCHS, "tokens": tokens},
    }


def _pass(module: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        module(x).sum().backward()
        module.zero_grad(set_to_none=True)
        x.grad = None

    return run


def _plan(size: Size, init: str) -> Figures:
    return {"layer": 0, "shape": asdict(size.shape), "init": init, "host": "mixtral"}


def _steps(size: Size, rows: HostRows, ffn: DenseFFN, clock: Clock) -> dict[str, float]:
    """Milliseconds of a step: on one batch, and in an epoch of either way to bring them."""
    device, train = clock.device, replace(TRAIN, batch_size=size.batch, warmup_steps=0)
    objective = Objective(rows, train, device, torch.bfloat16)
    fit = begin(rows, ffn, _plan(size, "random"), objective, moe_cfg=MOE, seed=0, total=10**6)
    batch = tuple(side.to(device) for side in rows.read("train", 0, size.batch))
    found = {"step": clock.time("step", lambda: step(fit, objective, *batch))}
    ways: dict[str, Callable[[], resident.Batches]] = {"rows": lambda: rows.batches}
    if device.type == "cuda":
        ways = {"fed": lambda: resident.fed(rows, device)}
        ways["resident"] = lambda: resident.gathered(resident.upload(rows, "train", device))
    steps = rows.rows["train"] // size.batch
    for name, way in ways.items():
        batches = way()

        def epoch(batches: resident.Batches = batches) -> None:
            for pair in batches("train", size.batch, seed=0, epoch=0):
                step(fit, objective, *pair)

        found[name] = clock.time(name, epoch, FEW, steps)
    return found


def _whole(size: Size, rows: HostRows, ffn: DenseFFN, device: torch.device) -> dict[str, float]:
    """Seconds of a layer's start, by specialists, and of its training."""
    train, plan = replace(TRAIN, batch_size=size.batch), _plan(size, "specialist")
    began = time.perf_counter()
    made = start_layer(ffn, plan, MOE, rows, seed=0, device=device)
    made.down_proj.sum().item()  # which waits for it
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        given = {"moe_cfg": MOE, "cfg": train, "seed": 0, "device": device, "start": made}
        dtype = torch.bfloat16
        fit_layer(rows, ffn, plan, Path(folder), dtype=dtype, **given)  # pyright: ignore
    return {"start": started - began, "training": time.perf_counter() - started}


def capture_figures(size: Size, clock: Clock) -> Figures:
    """Capture beside the bare forward pass, and what of it takes longest alone."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM

        from pipeline.capture import capture_activations
    except ImportError as missing:
        return {"capture": f"left out: {missing}"}
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.d_model,
        intermediate_size=size.d_ff,
        num_hidden_layers=size.layers,
        num_attention_heads=max(1, size.d_model // 128),
        num_key_value_heads=max(1, size.d_model // 384),
        dtype=torch.bfloat16,
    )
    with clock.device:
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()  # pyright: ignore
    blocks = torch.randint(size.vocabulary, (size.captured // size.sequence, size.sequence))
    cfg = CaptureConfig(
        dtype=Dtype.bfloat16,
        store=Store.both,
        codec=Codec.compact,
        shard_mb=16,
        chunk_mb=1,
        batch_size=16,
    )
    raw = size.layers * 2 * blocks.numel() * size.d_model * 2

    @torch.inference_mode()
    def forward() -> None:
        for part in blocks.split(cfg.batch_size):
            model(input_ids=part.to(clock.device), use_cache=False)

    def capture(codec: Codec) -> None:
        with tempfile.TemporaryDirectory(dir=".") as folder:
            there = {"train": blocks}
            capture_activations(model, there, Path(folder), cfg=replace(cfg, codec=codec))

    block = os.urandom(min(raw, 2**24))

    def disk() -> None:
        with tempfile.TemporaryFile(dir=".") as file:
            for _ in range(raw // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())

    alone = {"forward": clock.time("forward", forward, FEW), "disk": clock.time("disk", disk, FEW)}
    found = {
        codec.name: clock.time(f"capture, {codec.name}", lambda codec=codec: capture(codec), FEW)
        for codec in (Codec.none, Codec.fast, Codec.compact)
    }
    slowest = max(alone, key=lambda name: alone[name])
    return {
        "captured": {"layers": size.layers, "tokens": blocks.numel(), "raw bytes": raw},
        **{f"capture, {name} / forward": ms / alone["forward"] for name, ms in found.items()},
        **{f"raw MB/s into the store, {name}": raw / 1e3 / ms for name, ms in found.items()},
        "raw MB/s onto the disk": raw / 1e3 / alone["disk"],
        "the slower of pass and disk": slowest,
        "the rest of a capture (weights, copies, codec)": {
            name: 1 - alone[slowest] / ms for name, ms in found.items()
        },
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
    found = measured(*(TINY, 1024) if args.quick else (Size(), args.tokens), cuda=cuda)
    print(json.dumps(found, indent=1))
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def measured(size: Size, tokens: int, *, cuda: bool) -> Figures:
    clock = Clock(torch.device("cuda" if cuda else "cpu"))
    with contextlib.redirect_stdout(sys.stderr):  # what a run says of its choices
        found = layer_figures(size, tokens, clock) | capture_figures(size, clock)
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "size": asdict(size),
        **found,
        "ms": clock.ms,
        **({"peak bytes": clock.peak} if cuda else {}),
    }


if __name__ == "__main__":
    main()
