"""Experts out of a dense FFN's neurons: partition them into groups, then replicate the groups.

The `d_ff` neurons form G = d_ff / d_ff_expert groups, and each group becomes R = n_experts / G
experts. **Expert e is replica e // G of group e % G**, so that experts rG to rG + G - 1 together
are one whole dense FFN. G = 1 copies it, R = 1 carves it with no parameter added.

The FFN is the sum of its groups, while a router weighs experts by factors that sum to 1; hence
`down_proj` x G. With no noise the start is exact where every token takes one whole set of groups
at weights 1/G (all experts of a carve, or one replica by shared router rows: "virtual groups"),
and for copies under any router. Other starts want `moe.fit_scale`. A bias on the output goes
unscaled into every expert, since the weights sum to 1.

Shapes: D d_model, F d_ff, H d_ff_expert, E experts, G groups, R replicas.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.ffn import DenseFFN
from pipeline.shape import MoEShape, check_start

CHUNK = 1024  # tokens whose hidden activations are held at a time


def slice_partition(d_ff: int, groups: int) -> Tensor:
    """(G, F / G) neuron indices: contiguous slices."""
    return torch.arange(d_ff).view(groups, -1)


def start_experts(
    dense: DenseFFN,
    shape: MoEShape,
    init: str,
    *,
    init_noise: float,
    generator: torch.Generator,
    partition: Tensor | None = None,
) -> dict[str, Tensor]:
    """The experts' parameters of a `SparseMoE`, all but its router: where `dense` lies.

    At least float32.

    Args:
        dense: without the neurons of a shared expert.
        init: `copy`, `slice` or `cluster` (all: replicate the groups), or `random`.
        init_noise: normal noise on replicated weights, in standard deviations of each tensor.
        generator: of the CPU, so that every device gets the same numbers.
        partition: (G, F / G) neuron indices, each neuron once; null = `slice_partition`.

    Raises:
        ConfigError: the sizes do not allow this start (`shape.check_start`).
    """
    check_start(shape, init)
    device = dense.up_proj.device
    dense = dense.to(device, torch.promote_types(dense.up_proj.dtype, torch.float32))
    if init == "random":
        return _named(shape, *_random(dense, shape, generator))
    if partition is None:
        partition = slice_partition(shape.d_ff_routed, shape.groups)
    partition = partition.to(device)
    pad = shape.d_ff_expert - partition.shape[1]  # > 0 where experts are wider than the FFN

    def rows(weight_FD: Tensor) -> Tensor:
        return F.pad(weight_FD[partition], (0, 0, 0, pad))

    gate = [] if dense.gate_proj is None else [rows(dense.gate_proj)]
    inner_GUD = torch.cat([*gate, rows(dense.up_proj)], dim=1)
    down_GDH = F.pad(dense.down_proj[:, partition].transpose(0, 1), (0, pad)) * shape.groups
    inner_bias_GU = F.pad(_inner_bias(dense)[:, partition], (0, pad)).transpose(0, 1).flatten(1)
    noise = init_noise if shape.replicas > 1 else 0.0

    def replicate(weight: Tensor) -> Tensor:
        copies = weight.repeat(shape.replicas, *[1] * (weight.dim() - 1))
        if noise == 0:
            return copies
        random = torch.randn(copies.shape, generator=generator, dtype=copies.dtype)
        return copies.add_(random.to(device), alpha=noise * float(weight.std()))

    return _named(
        shape,
        replicate(inner_GUD),
        replicate(down_GDH),
        inner_bias_GU.repeat(shape.replicas, 1),
        _down_bias(dense),
    )


def shared_expert(dense: DenseFFN, shape: MoEShape) -> dict[str, Tensor]:
    """The parameters of a `SharedExpert` of all neurons of `dense`, its output bias left out."""
    dtype = torch.promote_types(dense.up_proj.dtype, torch.float32)
    dense = dense.to(dense.up_proj.device, dtype)
    gate = [] if dense.gate_proj is None else [dense.gate_proj]
    name = "gate_up" if shape.gated else "up"
    weights = {f"{name}_proj": torch.cat([*gate, dense.up_proj]), "down_proj": dense.down_proj}
    if shape.bias:
        weights[f"{name}_bias"] = _inner_bias(dense).flatten()
    return {f"shared_expert.{key}": weight.contiguous() for key, weight in weights.items()}


def group_contributions(dense: DenseFFN, x_TD: Tensor, partition: Tensor) -> Tensor:
    """(T, G): the norm of what each group of neurons adds to the dense output, biases left out.

    By the Gram matrix of each group's `down_proj`: narrow groups need not be multiplied out.
    """
    down_GHD = dense.down_proj.t()[partition]
    gram_GHH = torch.bmm(down_GHD, down_GHD.mT)
    parts = []
    for x in x_TD.split(CHUNK):
        hidden_GTH = dense.hidden(x)[:, partition].transpose(0, 1)
        squares_GT = (torch.bmm(hidden_GTH, gram_GHH) * hidden_GTH).sum(dim=-1)
        parts.append(squares_GT.clamp_min(0).sqrt().t())
    return torch.cat(parts)


def _random(
    dense: DenseFFN, shape: MoEShape, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normal weights that give an output of about the dense FFN's variance.

    The input projections have the dense standard deviation. The output sums d_ff_expert neurons
    instead of d_ff, and the mean of top_k independent experts is sqrt(top_k) smaller than one:
    `down_proj` makes up for both.
    """
    E, D, H = shape.n_experts, shape.d_model, shape.d_ff_expert
    gate = [] if dense.gate_proj is None else [dense.gate_proj]
    like = dense.up_proj

    def normal(size: tuple[int, int, int], std: Tensor) -> Tensor:
        return torch.randn(size, generator=generator, dtype=like.dtype).to(like.device) * std

    inner = torch.cat([normal((E, H, D), weight.std()) for weight in (*gate, like)], dim=1)
    larger = (shape.top_k * shape.d_ff_routed / H) ** 0.5
    down = normal((E, D, H), dense.down_proj.std() * larger)
    return inner, down, like.new_zeros(E, inner.shape[1]), _down_bias(dense)


def _named(
    shape: MoEShape, inner: Tensor, down: Tensor, inner_bias: Tensor, down_bias: Tensor
) -> dict[str, Tensor]:
    name = "gate_up" if shape.gated else "up"
    weights = {f"{name}_proj": inner, "down_proj": down}
    if shape.bias:
        weights[f"{name}_bias"] = inner_bias
        weights["down_bias"] = down_bias.repeat(shape.n_experts, 1)
    return {key: weight.contiguous() for key, weight in weights.items()}


def _inner_bias(dense: DenseFFN) -> Tensor:
    """(2, F) of gate and up, or (1, F) of up; zero where the dense FFN has none."""
    none = dense.up_proj.new_zeros(dense.d_ff)
    up = none if dense.up_bias is None else dense.up_bias
    if dense.gate_proj is None:
        return up[None]
    return torch.stack([none if dense.gate_bias is None else dense.gate_bias, up])


def _down_bias(dense: DenseFFN) -> Tensor:
    if dense.down_bias is None:
        return dense.down_proj.new_zeros(dense.d_model)
    return dense.down_bias
