"""Three ways to run the experts on their tokens, equal in outputs and gradients.

    loop     one expert after the other: the plain reference
    padded   a batched product for every `RUN` experts, each given as many rows as their fullest
    grouped  `torch.nn.functional.grouped_mm`: each expert multiplies its own rows

`padded` and `grouped` copy every token's row into a layout ordered by expert and add the results
back, both ways through `embedding_bag`: a gather with weights and float32 sums in one pass, 4
times faster than `index_select`, multiply and add, and free of `index_add`'s atomics.

Shapes: T tokens, D d_model, H d_ff_expert, E experts, K top_k, N rows of the layout, U rows of
the input projection (2H, gate first, where the experts are gated; H where not).
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import ConfigError
from pipeline.ffn import activation
from pipeline.runtime import has_bf16_units
from pipeline.shape import MoEShape

CPU_HALF_ROWS = 32
"""Each expert's rows are padded to a multiple of this in bf16 and fp16 on a CPU.

oneDNN compiles one kernel per matrix shape and loads change with every batch: without the padding
a step with fresh routing took 1.5 to 2.2 times as long (16 experts, d_model 256 and 512)."""

RUN = 4
"""Neighbouring experts that `padded` multiplies at once, so that a core has whole experts.

Where two cores shared each expert's, the six products of a step (16 experts of 544 rows, d_model
512, width 1,024, bf16 on AMX) ran at 0.7 to 1.4 TFLOP/s, by fours at 1.1 to 1.9; by twos at 1.0 to
1.6. More at once gain up to a sixth and pad more."""


class Experts(NamedTuple):
    """The weights of all experts, of one dtype."""

    inner_EUD: Tensor  # gate_up_proj, or up_proj
    down_EDH: Tensor
    inner_bias_EU: Tensor | None
    down_bias_ED: Tensor | None
    activation: str
    gated: bool

    def hidden(self, inner: Tensor) -> Tensor:
        """(..., U) -> (..., H)."""
        return combine(inner, self.activation, self.gated)


def combine(inner: Tensor, name: str, gated: bool) -> Tensor:
    """(..., U) -> (..., H): what the input projections give, through the activation function."""
    act = activation(name)
    if not gated:
        return act(inner)
    gate, up = inner.chunk(2, dim=-1)
    if inner.device.type == "cpu" and inner.dtype != torch.float32:
        gate = gate.contiguous()  # strided bf16 is not vectorised: SiLU took 3.6 times as long
    return act(gate) * up


Kernel = Callable[[Tensor, Tensor, Tensor, Experts], Tensor]
"""(x_TD, expert_weights_TK, expert_ids_TK, experts) -> y_TD, all floats of one dtype."""


def loop(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, experts: Experts) -> Tensor:
    """The definition: y = sum over the token's experts of weight x expert(x)."""
    y_TD = torch.zeros_like(x_TD)
    for e in range(len(experts.inner_EUD)):
        token, k = (ids_TK == e).nonzero(as_tuple=True)
        inner_bias = None if experts.inner_bias_EU is None else experts.inner_bias_EU[e]
        down_bias = None if experts.down_bias_ED is None else experts.down_bias_ED[e]
        hidden = experts.hidden(F.linear(x_TD[token], experts.inner_EUD[e], inner_bias))
        out = F.linear(hidden, experts.down_EDH[e], down_bias)
        y_TD = y_TD.index_add(0, token, out * weights_TK[token, k, None])
    return y_TD


def padded(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, experts: Experts) -> Tensor:
    def multiply(x_NI: Tensor, weight_EOI: Tensor, end_E: Tensor) -> Tensor:
        return _BatchedProduct.apply(x_NI, weight_EOI, end_E.tolist())

    return _by_expert(x_TD, weights_TK, ids_TK, experts, RUN, multiply)


def grouped(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, experts: Experts) -> Tensor:
    def multiply(x_NI: Tensor, weight_EOI: Tensor, end_E: Tensor) -> Tensor:
        return F.grouped_mm(x_NI, weight_EOI.transpose(1, 2), offs=end_E)

    return _by_expert(x_TD, weights_TK, ids_TK, experts, 1, multiply)


def _by_expert(
    x_TD: Tensor,
    weights_TK: Tensor,
    ids_TK: Tensor,
    experts: Experts,
    run: int,
    multiply: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """`multiply(rows, weights, end_E)`: each expert's rows by its own weights."""
    rows = lay_out(ids_TK, len(experts.inner_EUD), align=_align(x_TD), run=run)

    def project(x_NI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None) -> Tensor:
        out_NO = multiply(x_NI, weight_EOI, rows.end_E)
        if bias_EO is None:
            return out_NO
        every_N = torch.arange(len(x_NI), device=x_NI.device)
        expert_N = torch.searchsorted(rows.end_E, every_N, right=True)
        return out_NO + bias_EO.index_select(0, expert_N)

    x_ND = _Dispatch.apply(x_TD, rows.token_N, rows.row_TK)
    hidden_NH = experts.hidden(project(x_ND, experts.inner_EUD, experts.inner_bias_EU))
    out_ND = project(hidden_NH, experts.down_EDH, experts.down_bias_ED)
    return _Combine.apply(out_ND, weights_TK, rows.token_N, rows.row_TK)


def taken(x_TD: Tensor, weights_EC: Tensor, tokens_EC: Tensor, experts: Experts) -> Tensor:
    """Where the experts choose: each has C rows, so that nothing is padded."""
    inner = torch.bmm(x_TD[tokens_EC], experts.inner_EUD.transpose(1, 2))
    if experts.inner_bias_EU is not None:
        inner = inner + experts.inner_bias_EU[:, None]
    out = torch.bmm(experts.hidden(inner), experts.down_EDH.transpose(1, 2))
    if experts.down_bias_ED is not None:
        out = out + experts.down_bias_ED[:, None]
    weighted_ECD = out * weights_EC[:, :, None]
    return torch.zeros_like(x_TD).index_add(0, tokens_EC.flatten(), weighted_ECD.flatten(0, 1))


KERNELS: dict[str, Kernel] = {"padded": padded, "grouped": grouped, "loop": loop}


class Layout(NamedTuple):
    """Where each (token, choice) lies among N rows ordered by expert."""

    token_N: Tensor  # the token of each row; 0 in a padding row
    row_TK: Tensor  # the row of each choice
    end_E: Tensor  # int32, one past each expert's last row


def lay_out(ids_TK: Tensor, n_experts: int, *, align: int, run: int) -> Layout:
    """Order the choices by expert, in token order within one (a stable sort: deterministic).

    Each expert gets the largest load among the `run` neighbours that it is one of, rounded up to a
    multiple of `align`. With both 1, nothing waits for the device.
    """
    choices = ids_TK.numel()
    expert_S, order_S = ids_TK.flatten().sort(stable=True)
    every = torch.arange(n_experts, device=ids_TK.device)
    sorted_end_E = torch.searchsorted(expert_S, every, right=True)
    load_E = sorted_end_E.diff(prepend=sorted_end_E.new_zeros(1))
    runs = F.pad((load_E + align - 1) // align * align, (0, -n_experts % run)).view(-1, run)
    room_E = runs.amax(dim=1).repeat_interleave(run)[:n_experts]
    end_E = room_E.cumsum(0)
    n_rows = choices if align == run == 1 else int(end_E[-1])
    shift_E = (end_E - room_E) - (sorted_end_E - load_E)
    row_S = torch.arange(choices, device=ids_TK.device) + shift_E.index_select(0, expert_S)
    row_TK = torch.empty_like(order_S).scatter_(0, order_S, row_S).view_as(ids_TK)
    token_S = order_S.div(ids_TK.shape[1], rounding_mode="floor")
    token_N = token_S.new_zeros(n_rows).scatter_(0, row_S, token_S)
    return Layout(token_N, row_TK, end_E.to(torch.int32))


class _BatchedProduct(torch.autograd.Function):
    """(N, I) -> (N, O): each expert's rows by its weights (O, I), `RUN` experts at once."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_EOI: Tensor, end_E: list[int]) -> Tensor:
        ctx.save_for_backward(x_NI, weight_EOI)
        ctx.end_E = end_E
        out_NO = x_NI.new_empty(len(x_NI), weight_EOI.shape[1])
        for experts, of in _runs(end_E):
            torch.bmm(of(x_NI), weight_EOI[experts].mT, out=of(out_NO))
        return out_NO

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        x_NI, weight_EOI = ctx.saved_tensors
        grad_NO = grad_NO.contiguous()
        grad_x = torch.empty_like(x_NI) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight_EOI) if ctx.needs_input_grad[1] else None
        for experts, of in _runs(ctx.end_E):
            if grad_x is not None:
                torch.bmm(of(grad_NO), weight_EOI[experts], out=of(grad_x))
            if grad_weight is not None:
                torch.bmm(of(grad_NO).mT, of(x_NI), out=grad_weight[experts])
        return grad_x, grad_weight, None


def _runs(end_E: list[int]) -> Iterator[tuple[slice, Callable[[Tensor], Tensor]]]:
    """The experts of each run, and what gives their rows: (N, width) -> (n, room, width)."""
    start = 0
    for first in range(0, len(end_E), RUN):
        experts = slice(first, min(first + RUN, len(end_E)))
        n, end = experts.stop - first, end_E[experts.stop - 1]

        def of(rows: Tensor, start: int = start, end: int = end, n: int = n) -> Tensor:
            return rows[start:end].view(n, (end - start) // n, rows.shape[1])

        yield experts, of
        start = end


class _Dispatch(torch.autograd.Function):
    """x_ND = x_TD[token_N]; each token's gradient is the sum over its own K rows."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_N: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        return x_TD.index_select(0, token_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (row_TK,) = ctx.saved_tensors
        return F.embedding_bag(row_TK, grad_ND.contiguous(), mode="sum"), None, None


class _Combine(torch.autograd.Function):
    """y_TD = sum over k of weights_TK x out_ND[row_TK]; padding rows get a gradient of zero."""

    @staticmethod
    def forward(
        ctx: Any, out_ND: Tensor, weights_TK: Tensor, token_N: Tensor, row_TK: Tensor
    ) -> Tensor:
        ctx.save_for_backward(out_ND, weights_TK, token_N, row_TK)
        return F.embedding_bag(row_TK, out_ND, per_sample_weights=weights_TK, mode="sum")

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        out_ND, weights_TK, token_N, row_TK = ctx.saved_tensors
        grad_TD = grad_TD.contiguous()
        weight_N = weights_TK.new_zeros(len(out_ND)).scatter_(
            0, row_TK.flatten(), weights_TK.flatten()
        )
        grad_ND = F.embedding_bag(
            token_N[:, None], grad_TD, per_sample_weights=weight_N[:, None], mode="sum"
        )
        dot_N = (grad_TD.index_select(0, token_N) * out_ND).sum(-1)
        return grad_ND, dot_N[row_TK], None, None


def _align(x: Tensor) -> int:
    half = x.dtype in (torch.bfloat16, torch.float16)
    return CPU_HALF_ROWS if half and x.device.type == "cpu" else 1


def pick_kernel(
    device_type: str, dtype: torch.dtype, shape: MoEShape, configured: str = "auto"
) -> tuple[str, str]:
    """The kernel's name and the reason for it; decided by hardware and sizes, never by a clock.

    Forward and backward in a dense FFN's time at equal active FLOPs, on two cores (1 = as fast;
    fresh routing each step, `max/mean` the fullest load). With bf16 units, but no AMX, and all
    experts one run of `padded`:

                                                fp32              bf16
                                           padded  grouped   padded  grouped
        d 512,  16 x 1024, top-2, 4096 T    0.63    0.82      0.46    0.61
        d 256,  16 x 96,   top-4, 2048 T    0.62    0.50      0.53    0.30
        the same, max/mean 3.6              0.20    0.49      0.21    0.28

    With AMX, in runs of `RUN`, medians of 7 to 15 times eight steps:

        d 512,  16 x 1024, top-2, 4096 T                      0.55    0.48
        the same, max/mean 1.7                                0.38    0.37
        d 256,  16 x 96,   top-4, 2048 T                      0.35    0.26
        the same, max/mean 1.3                                0.28    0.23

    Raises `ConfigError` where the configured kernel cannot run.
    """
    unfit = _unfit_for_grouped(dtype, shape)
    if configured == "grouped" and unfit:
        raise ConfigError(
            "The kernel `grouped` cannot run this layer.",
            value=unfit,
            rule="float32, bfloat16 or float16, and rows of a multiple of 16 bytes",
            remedy="set train.kernel=auto",
        )
    if configured != "auto":
        return configured, "configured"
    if unfit:
        return "padded", f"grouped_mm takes no {unfit}"
    if device_type == "cpu" and dtype is torch.bfloat16 and has_bf16_units():
        return "padded", f"a core's bf16 matrix units are faster on {RUN} whole experts at once"
    if device_type == "cpu":
        return "grouped", "on a CPU it wastes nothing on uneven loads"
    return "grouped", "no padding, and nothing waits for the device"


def _unfit_for_grouped(dtype: torch.dtype, shape: MoEShape) -> str | None:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return str(dtype).removeprefix("torch.")
    for name, width in (("d_model", shape.d_model), ("d_ff_expert", shape.d_ff_expert)):
        if width * dtype.itemsize % 16:
            return f"{name} of {width} in {str(dtype).removeprefix('torch.')}"
    return None
