"""The sparse layer: a router and its experts in the place of one dense FFN.

    y = shared_expert(x) + sum over the top_k experts e of weight_e(x) * expert_e(x)

where the shared expert may be absent.

Weights stay in their own dtype (float32 master weights while training) and are cast to the compute
dtype once per forward: that of `torch.autocast` where it is on, their own otherwise. The router
always runs in float32. Results repeat bit for bit on a CPU at equal threads.

Casting the weights of 16 experts (d_model 256, width 96) takes 0.7 ms of a 17 ms bf16 step; fp32
products take 42 ms. Where each expert has more weights than tokens the cast weighs more: at width
1,024 and d_model 512 it is 15 % of the step.

Shapes: T tokens, D d_model, H d_ff_expert, E experts, K top_k.
"""

from collections.abc import Mapping
from functools import reduce
from operator import add

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.kernels import KERNELS, Experts, combine, taken
from pipeline.router import (
    ExpertChoice,
    Router,
    Routing,
    choose_experts,
    choose_tokens,
    choose_tokens_alone,
    thresholds,
)
from pipeline.shape import MoEShape


class SharedExpert(nn.Module):
    """Neurons of the dense FFN that every token runs: (T, D) -> (T, D), in the dtype of x."""

    down_proj: Tensor

    def __init__(self, shape: MoEShape) -> None:
        super().__init__()
        D, S = shape.d_model, shape.d_ff_shared
        self.shape, self.inner = shape, "gate_up" if shape.gated else "up"
        U = 2 * S if shape.gated else S
        self.register_parameter(f"{self.inner}_proj", nn.Parameter(torch.zeros(U, D)))
        self.register_parameter("down_proj", nn.Parameter(torch.zeros(D, S)))
        if shape.bias:
            self.register_parameter(f"{self.inner}_bias", nn.Parameter(torch.zeros(U)))

    def forward(self, x_TD: Tensor) -> Tensor:
        return F.linear(self.hidden(x_TD), self.down_proj.to(x_TD.dtype))

    def hidden(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, S): the input of `down_proj`."""
        weight = self.get_parameter(f"{self.inner}_proj").to(x_TD.dtype)
        bias = self.get_parameter(f"{self.inner}_bias").to(x_TD.dtype) if self.shape.bias else None
        inner = F.linear(x_TD, weight, bias)
        return combine(inner, self.shape.activation, self.shape.gated)


class SparseMoE(nn.Module):
    """A router and its experts. `kernel`, a name in `kernels.KERNELS`: how, not what, is computed.

    In training mode experts that choose their tokens choose among the whole batch; in evaluation
    mode each token is decided alone (`router.py`). Experts of different widths are padded with
    zeros to `d_ff_expert`, the widest: a neuron of zeros adds nothing and gets no gradient.

    Parameters: those of `router` (a `router.Router`); `gate_up_proj` (E, 2H, D), gate first, where
    gated, else `up_proj` (E, H, D); `down_proj` (E, D, H); where the dense FFN has biases
    `gate_up_bias` (E, 2H) or `up_bias` (E, H), and `down_bias` (E, D). They are zero until loaded:
    `start.start_layer` makes a start. `shared_expert`, where there is one, has an expert's
    parameters without E, and no `down_bias`.
    """

    down_proj: Tensor

    def __init__(self, shape: MoEShape, kernel: str = "padded") -> None:
        super().__init__()
        self.shape, self.kernel = shape, kernel
        E, D, H = shape.n_experts, shape.d_model, shape.d_ff_expert
        self.inner = "gate_up" if shape.gated else "up"
        U = 2 * H if shape.gated else H
        self.router = Router(shape)
        self.register_parameter(f"{self.inner}_proj", nn.Parameter(torch.zeros(E, U, D)))
        self.register_parameter("down_proj", nn.Parameter(torch.zeros(E, D, H)))
        if shape.bias:
            self.register_parameter(f"{self.inner}_bias", nn.Parameter(torch.zeros(E, U)))
            self.register_parameter("down_bias", nn.Parameter(torch.zeros(E, D)))
        if shape.d_ff_shared:
            self.shared_expert = SharedExpert(shape)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D), in the compute dtype."""
        return self.forward_routed(x)[0]

    def forward_routed(self, x: Tensor) -> tuple[Tensor, Routing]:
        """`forward`, and the routing of its T = prod(...) tokens for the router's losses."""
        x_TD = x.reshape(-1, self.shape.d_model)
        routing = self.route(x_TD)
        return self.run(x_TD, routing).view_as(x), routing

    def run(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """(T, D) -> (T, D): the experts as `routing` says, in the compute dtype."""
        dtype = self._compute_dtype(x_TD.device.type)
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD, weights = x_TD.to(dtype), routing.expert_weights.to(dtype)
            experts = self.experts(dtype)
            if isinstance(routing, ExpertChoice):
                y_TD = taken(x_TD, weights, routing.token_ids, experts)
            else:
                y_TD = KERNELS[self.kernel](x_TD, weights, routing.expert_ids, experts)
            return y_TD + self.shared_expert(x_TD) if self.shape.d_ff_shared else y_TD

    def route(self, x_TD: Tensor) -> Routing:
        """Who works on which token, in float32 (float64 where the weights are)."""
        shape = self.shape
        with torch.autocast(x_TD.device.type, enabled=False):
            logits = self.router(x_TD)
            if shape.capacity_factor is None:
                bias = self.router.balance_bias if shape.balance_bias else None
                return choose_experts(logits, shape.top_k, shape.router_function, bias)
            if self.training:
                return choose_tokens(logits, shape.capacity_factor)
            return choose_tokens_alone(logits, self.router.threshold)

    def experts(self, dtype: torch.dtype) -> Experts:
        """The experts' weights, cast; the cast is part of the gradient."""
        named = dict(self.named_parameters(recurse=False))
        cast = {name: weight.to(dtype) for name, weight in named.items()}
        return Experts(
            cast[f"{self.inner}_proj"],
            cast["down_proj"],
            cast.get(f"{self.inner}_bias"),
            cast.get("down_bias"),
            self.shape.activation,
            self.shape.gated,
        )

    def adopt(self, shape: MoEShape, tensors: Mapping[str, Tensor]) -> None:
        """Take the state of a layer of the same kind whose experts may have other widths."""
        self.shape = shape
        for name, own in [*self.named_parameters(), *self.named_buffers()]:
            own.data = tensors[name].to(own.device, own.dtype)

    def _compute_dtype(self, device_type: str) -> torch.dtype:
        if torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return self.down_proj.dtype


@torch.no_grad()
def fit_thresholds(moe: SparseMoE, x_TD: Tensor) -> None:
    """Set what each expert takes at inference by what it would take of these rows."""
    if moe.shape.capacity_factor is not None:
        logits = moe.router(x_TD)
        moe.router.threshold.copy_(thresholds(logits, moe.shape.capacity_factor))


@torch.no_grad()
def fit_bias(moe: SparseMoE, x_TD: Tensor, y_TD: Tensor, at_once: int | None = None) -> None:
    """Add to each expert's `down_bias` what its tokens lack on average: mean compensation.

    Least squares of the residual on the experts' weights; for one expert per token it is the mean
    over its tokens. What an expert leaves out is the dense FFN's other neurons: their mean needs
    none of them to be run (FLAP, An et al. 2024, section 3.3).

    Args:
        at_once: rows of a forward pass; null = all.
    """
    grams, crosses = [], []
    for x, y in zip(*(side.split(at_once or len(x_TD)) for side in (x_TD, y_TD)), strict=True):
        y_hat, routing = moe.forward_routed(x)
        weights_TE = routing.weights_TE().double()
        grams.append(weights_TE.T @ weights_TE)
        crosses.append(weights_TE.T @ (y - y_hat).double())
    gram_EE, cross_ED = reduce(add, grams), reduce(add, crosses)
    gram_EE.diagonal().add_(1e-6 * gram_EE.diagonal().mean() + 1e-12)  # an expert without tokens
    moe.get_parameter("down_bias").add_(torch.linalg.solve(gram_EE, cross_ED))


@torch.no_grad()
def fit_scale(moe: SparseMoE, x_TD: Tensor, y_TD: Tensor, at_once: int | None = None) -> float:
    """Multiply `down_proj` by the one scalar that fits `y` best on these rows, and return it.

    Least squares in closed form: with b the (unscaled) part of output biases and shared expert,
    s = <moe(x) - b, y - b> / <moe(x) - b, moe(x) - b>. For starts that are not exact; 1.0 where
    the experts give nothing.

    Args:
        at_once: rows of a forward pass; null = all.
    """
    power = along = 0.0
    for x, y in zip(*(side.split(at_once or len(x_TD)) for side in (x_TD, y_TD)), strict=True):
        y_hat, routing = moe.forward_routed(x)
        bias = torch.zeros_like(y_hat, dtype=torch.float64)
        if moe.shape.bias:
            weights_TE = routing.weights_TE()
            bias = (weights_TE @ moe.get_parameter("down_bias").to(weights_TE.dtype)).double()
        if moe.shape.d_ff_shared:
            bias += moe.shared_expert(x.to(moe.down_proj.dtype)).view_as(bias).double()
        part, target = y_hat.double() - bias, y.double() - bias
        power += float((part * part).sum())
        along += float((part * target).sum())
    scale = along / power if power else 1.0
    moe.down_proj.mul_(scale)
    return scale
