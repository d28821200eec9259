"""How a sparse layer begins: experts, router, one fitted scale and a refit, before any training.

The experts are groups of the dense FFN's neurons, replicated (`experts.py`), or specialists for
parts of the tokens, which bring their router (`specialists.py`). A router that starts by `ridge`
predicts from the input what each group would contribute, and sends each token to one replica of
every group: the replicas' rows also hold a random projection of the input that is the same for all
groups of a replica, so that two replicas of one group are rarely chosen together, which would add
nothing while they are alike. A shared expert takes the neurons that contribute most, and the others
start from what is left. Last, where it is asked for and the start is not exact, every
`down_proj` is refitted under this routing (`fit.py`).

All that is multiplied is multiplied on the device that is asked for, where its memory suffices
(`footprint.start`: 80 GB at Llama-3.1-70B's width for 16 specialists of half of it, 115 GB where
they are slices and refitted); random numbers are drawn on the CPU, the same for every device.

Shapes: T tokens, D d_model, E experts, G groups, R replicas (E = R G).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline import footprint, resident
from pipeline.config import MoEConfig, RouterInit
from pipeline.experts import (
    group_contributions,
    shared_expert,
    slice_partition,
    start_experts,
)
from pipeline.ffn import DenseFFN
from pipeline.fit import CHUNK, Normal, refit_down
from pipeline.moe import SparseMoE, fit_bias, fit_scale, fit_thresholds
from pipeline.partition import cluster_partition, most_contributing
from pipeline.shape import MoEShape
from pipeline.specialists import start_specialists

if TYPE_CHECKING:
    from pipeline.store import Rows

ROUTER_STD = 0.02  # of random rows, as transformers initialises a router
RIDGE_ROWS = 16384  # training tokens that a ridge start looks at, and a clustering of neurons
RIDGE = 1e-3  # of the mean diagonal of the inputs' Gram matrix
LOGIT_STD = 0.1  # of a ridge start's logits: the weights start nearly even
REPLICA_STD = 4.0  # of the replicas' common part, in standard deviations of the groups' part


def start_layer(
    ffn: DenseFFN,
    plan: Mapping[str, Any],
    cfg: MoEConfig,
    reader: "Rows",
    *,
    seed: int,
    device: torch.device | str = "cpu",
    beside: int = 0,
) -> SparseMoE:
    """An untrained layer, the same for the same arguments, on the device that it was made on.

    Args:
        plan: the layer's file of the `budget` stage: `layer`, `shape`, `init`.
        reader: the layer's own store; `train` for router and fits, `validation` for the scale and
            for what is chosen among fits.
        device: where it is made; on the CPU instead where a GPU's memory may not suffice.
        beside: bytes that other things take on the device meanwhile.

    Raises:
        ConfigError: the sizes do not allow this start.
    """
    shape = MoEShape(**plan["shape"])
    # Each specialist has its own idea of what is shared.
    refitted = cfg.refit or (plan["init"] == "specialist" and shape.d_ff_shared > 0)
    refitted = refitted and not is_exact(shape, plan["init"], cfg)
    device = _roomy(torch.device(device), plan, shape, reader, refitted, beside)
    generator = torch.Generator().manual_seed(seed + 1000003 * plan["layer"])
    ffn = ffn.to(device, ffn.up_proj.dtype)
    weights = _weights(ffn, shape, plan["init"], cfg, reader, generator)
    with device:
        moe = SparseMoE(shape).eval()
    moe.load_state_dict({**moe.state_dict(), **weights})
    del weights
    if shape.router_width:  # its output stays zero: both kinds of router start alike
        hidden_WD = torch.empty(moe.router.hidden_proj.shape)
        torch.nn.init.normal_(hidden_WD, std=shape.d_model**-0.5, generator=generator)
        moe.router.hidden_proj.data.copy_(hidden_WD)
    if not is_exact(shape, plan["init"], cfg):
        x_TD, y_TD = (side.to(device, torch.float32) for side in reader.read("validation"))
        at_once = None if device.type == "cpu" else footprint.FIT_ROWS
        fit_thresholds(moe, x_TD)
        fit_scale(moe, x_TD, y_TD, at_once)
        if cfg.mean_compensation:
            fit_bias(moe, x_TD, y_TD, at_once)
    if refitted:
        refit_down(moe, reader)
    return moe


def _roomy(
    device: torch.device,
    plan: Mapping[str, Any],
    shape: MoEShape,
    reader: "Rows",
    refitted: bool,
    beside: int,
) -> torch.device:
    """The device, or the CPU where its memory may not suffice; says which, of a GPU."""
    if device.type == "cpu":
        return device
    itemsize = reader.read("train", 0, 0)[0].itemsize
    rows = (reader.rows["train"], reader.rows["validation"])
    need = footprint.start(shape, plan["init"], *rows, itemsize, refitted=refitted)
    fits = resident.fits(f"start of layer {plan['layer']}", device, need, beside)
    return device if fits else torch.device("cpu")


def is_exact(shape: MoEShape, init: str, cfg: MoEConfig) -> bool:
    """Whether the start gives the dense FFN's output, up to `moe.init_noise` (see `experts.py`)."""
    if init in ("random", "specialist") or shape.routing == "expert_choice":
        return False
    if shape.groups == 1 or cfg.virtual_groups:
        return True
    alike = cfg.router_init is RouterInit.zero
    return alike and shape.replicas == 1 and shape.top_k == shape.n_experts


def _weights(
    ffn: DenseFFN,
    shape: MoEShape,
    init: str,
    cfg: MoEConfig,
    reader: "Rows",
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The parameters of the experts, the shared one too, and `router.weight`; on any device."""
    device = ffn.up_proj.device
    shared, shared_S = {}, None
    if shape.d_ff_shared:
        x_TD = reader.read("train", 0, RIDGE_ROWS)[0].to(device, torch.float32)
        shared_S = most_contributing(ffn.to(device, torch.float32), x_TD, shape.d_ff_shared)
        shared = shared_expert(ffn.take(shared_S), shape)
    if init == "specialist":
        dense = ffn.to(device, torch.float32)
        return {**shared, **start_specialists(dense, shape, reader, generator, shared_S)}
    if shared_S is not None:
        left_F = torch.ones(ffn.d_ff, dtype=torch.bool, device=device)
        left_F[shared_S] = False
        ffn = ffn.take(left_F.nonzero()[:, 0])
    partition = None
    if init == "cluster":
        x_TD = reader.read("train", 0, RIDGE_ROWS)[0].to(device, torch.float32)
        dense = ffn.to(device, torch.float32)
        partition = cluster_partition(dense, x_TD, shape.groups, generator)
    noise = cfg.init_noise
    experts = start_experts(
        ffn, shape, init, init_noise=noise, generator=generator, partition=partition
    )
    router = start_router(ffn, shape, init, cfg, reader, generator, partition)
    return {**shared, **experts, "router.weight": router}


def has_ridge(init: str, cfg: MoEConfig) -> bool:
    """Whether a start that is no specialists' has its router fitted."""
    return init != "random" and cfg.router_init is RouterInit.ridge


@torch.no_grad()
def start_router(
    ffn: DenseFFN,
    shape: MoEShape,
    init: str,
    cfg: MoEConfig,
    reader: "Rows",
    generator: torch.Generator,
    partition: Tensor | None = None,
) -> Tensor:
    """(E, D) float32 router rows; `partition` as `experts.start_experts` takes it.

    A ridge is solved where the dense FFN lies; rows of zeros and random ones lie on the CPU.
    """
    E, D = shape.n_experts, shape.d_model
    if cfg.router_init is RouterInit.zero:
        return torch.zeros(E, D)
    if cfg.router_init is RouterInit.random or init == "random":
        rows = shape.replicas if cfg.virtual_groups else E
        weight = ROUTER_STD * torch.randn(rows, D, generator=generator)
        return weight.repeat_interleave(E // rows, dim=0)
    device = ffn.up_proj.device
    x_TD = reader.read("train", 0, RIDGE_ROWS)[0].to(device, torch.float32)
    if partition is None:
        partition = slice_partition(shape.d_ff_routed, shape.groups)
    partition, dense = partition.to(device), ffn.to(device, torch.float32)
    target_TE = _targets(dense, shape, cfg, x_TD, generator, partition)
    return _ridge(x_TD, target_TE)


def _targets(
    ffn: DenseFFN,
    shape: MoEShape,
    cfg: MoEConfig,
    x_TD: Tensor,
    generator: torch.Generator,
    partition: Tensor,
) -> Tensor:
    """(T, E) logits that a router should give."""
    group_TG = group_contributions(ffn, x_TD, partition)
    group_TG = group_TG - group_TG.mean(dim=1, keepdim=True)
    if cfg.virtual_groups or shape.groups == 1:
        group_TG = torch.zeros_like(group_TG)
    group_TG = group_TG / group_TG.std().clamp_min(1e-12)
    centred_TD = x_TD - x_TD.mean(dim=0)
    directions_DR = torch.randn(shape.d_model, shape.replicas, generator=generator).to(x_TD)
    if shape.replicas > 1:  # as far from each other as they can be
        directions_DR = directions_DR - directions_DR.mean(dim=1, keepdim=True)
    else:
        directions_DR = torch.zeros_like(directions_DR)
    replica_TR = centred_TD @ directions_DR
    replica_TR = REPLICA_STD * replica_TR / replica_TR.std().clamp_min(1e-12)
    target_TE = (replica_TR[:, :, None] + group_TG[:, None, :]).flatten(1)
    return LOGIT_STD * target_TE


def _ridge(x_TD: Tensor, target_TE: Tensor) -> Tensor:
    """(E, D): the least squares map from x to the targets, held towards zero."""
    sums = Normal(x_TD.shape[1], target_TE.shape[1], x_TD.device)
    for x, target in zip(x_TD.split(CHUNK), target_TE.split(CHUNK), strict=True):
        sums.add(x, target)
    return sums.solve(RIDGE, torch.zeros_like(sums.cross_ND)).T.float().contiguous()
