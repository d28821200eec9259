"""The sparse layer, forward and backward, beside a dense FFN of equal active FLOPs, and beside
transformers' own Mixtral and Qwen3Moe blocks in each of their implementations.

Every step has fresh tokens, so that loads change as they do in training, and eight come before
those that are timed: libraries compile a kernel for each shape that they meet first, which a
training is past after a few steps. Rates are steps a second: a ratio of 1 is the other's speed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from benchmarks import measure
from benchmarks.measure import Row
from pipeline.kernels import pick_kernel
from pipeline.moe import SparseMoE
from pipeline.shape import MoEShape


@dataclass(frozen=True)
class Size:
    d_model: int
    d_ff_expert: int
    n_experts: int
    top_k: int
    tokens: int

    def __str__(self) -> str:
        return (
            f"d {self.d_model}, {self.n_experts} x {self.d_ff_expert}, top-{self.top_k}, "
            f"{self.tokens} tokens"
        )


ASKED = Size(512, 1024, 16, 2, 4096)
SIZES = (ASKED, Size(512, 512, 32, 4, 4096))
TINY = (Size(32, 16, 4, 2, 64),)
WARM_UPS = 8  # steps
GOALS = {"float32": ">= 0.65", "bfloat16": ">= 0.55"}


def rows(quick: bool) -> Iterator[Row]:
    for size in TINY if quick else SIZES:
        for dtype in measure.precisions():
            yield from _rows(size, dtype)


def _rows(size: Size, dtype: torch.dtype) -> Iterator[Row]:
    dtype_name = str(dtype).removeprefix("torch.")
    steps = {
        "ours": _stepper(_ours(size, dtype), size, dtype),
        "dense": _stepper(_dense(size, dtype), size, dtype),
        **{
            f"{family} {how}": _stepper(_theirs(family, how, size, dtype), size, dtype)
            for family in ("mixtral", "qwen3_moe")
            for how in ("eager", "batched_mm", "grouped_mm")
            if how != "batched_mm" or size.tokens * size.top_k * size.d_ff_expert < 2**22
        },
    }  # batched_mm copies an expert's weights for every token: 60 GB at the sizes above
    seconds = measure.turns(steps, warm_ups=WARM_UPS)
    goal = GOALS[dtype_name] if size == ASKED else ""
    yield measure.compare(
        f"layer, forward and backward, {dtype_name} / a dense FFN of equal active FLOPs",
        seconds["ours"],
        seconds["dense"],
        size=str(size),
        unit="steps/s",
        work=1,
        reach=goal,
    )
    theirs = {name: s for name, s in seconds.items() if name not in ("ours", "dense")}
    best = min(theirs, key=lambda name: sorted(theirs[name])[len(theirs[name]) // 2])
    yield measure.compare(
        f"layer, forward and backward, {dtype_name} / the best of transformers' ({best})",
        seconds["ours"],
        theirs[best],
        size=str(size),
        unit="steps/s",
        work=1,
        reach=">= 1.0",
    )


def _stepper(module: nn.Module, size: Size, dtype: torch.dtype) -> Callable[[], None]:
    """A forward and backward pass over the next of some batches."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, size.tokens, size.d_model)
    batches = [
        torch.randn(shape, generator=generator).to(dtype) for _ in range(WARM_UPS + measure.repeats)
    ]
    turn = iter(range(10**9))

    def step() -> None:
        x = batches[next(turn) % len(batches)].requires_grad_()
        y = module(x)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(torch.ones_like(y))
        module.zero_grad(set_to_none=True)
        x.grad = None

    return step


def _filled(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return module


def _ours(size: Size, dtype: torch.dtype) -> nn.Module:
    shape = MoEShape(
        d_model=size.d_model,
        d_ff=size.top_k * size.d_ff_expert,
        d_ff_expert=size.d_ff_expert,
        n_experts=size.n_experts,
        top_k=size.top_k,
        activation="silu",
        gated=True,
        bias=False,
        router_function="softmax_topk",
    )
    kernel, _ = pick_kernel("cpu", dtype, shape)
    return _filled(SparseMoE(shape, kernel)).to(dtype)


def _dense(size: Size, dtype: torch.dtype) -> nn.Module:
    width = size.top_k * size.d_ff_expert
    config = LlamaConfig(hidden_size=size.d_model, intermediate_size=width)
    return _filled(LlamaMLP(config)).to(dtype)


def _theirs(family: str, how: str, size: Size, dtype: torch.dtype) -> nn.Module:
    common = {"hidden_size": size.d_model, "num_experts_per_tok": size.top_k}
    if family == "mixtral":
        config = MixtralConfig(
            **common, intermediate_size=size.d_ff_expert, num_local_experts=size.n_experts
        )
        block = MixtralSparseMoeBlock
    else:
        config = Qwen3MoeConfig(
            **common, moe_intermediate_size=size.d_ff_expert, num_experts=size.n_experts
        )
        block = Qwen3MoeSparseMoeBlock
    config._experts_implementation = how
    return _filled(block(config)).to(dtype)
