"""The router: which experts a token takes, and with what weights.

A router is one linear map without bias, `router_logits = x @ weight.T`, always in float32: that is
what every native host has. The function from logits to weights is the host's, and a layer is
trained under exactly the function that it will run with.

Shapes: T tokens, D d_model, E experts, K top_k.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """One decision per token; `expert_ids` in order of falling logits."""

    router_logits: Tensor  # (T, E)
    expert_weights: Tensor  # (T, K)
    expert_ids: Tensor  # (T, K)


def _softmax_topk(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    chosen, ids = logits_TE.topk(top_k, dim=-1)
    return chosen.softmax(dim=-1), ids


def _softmax(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    return logits_TE.softmax(dim=-1).topk(top_k, dim=-1)


def _sigmoid(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    chosen, ids = logits_TE.sigmoid().topk(top_k, dim=-1)
    return chosen / (chosen.sum(dim=-1, keepdim=True) + 1e-20), ids


ROUTER_FUNCTIONS: dict[str, Callable[[Tensor, int], tuple[Tensor, Tensor]]] = {
    "softmax_topk": _softmax_topk,  # over the chosen ones; sums to 1 (Mixtral, Granite)
    "softmax": _softmax,  # over all experts, not renormalised (Qwen with norm_topk_prob false)
    "sigmoid": _sigmoid,  # renormalised (Glm4Moe, Dots1, without their selection bias)
}


def route(router_logits: Tensor, top_k: int, function: str) -> Routing:
    """(T, E) -> the `top_k` experts of each token.

    Ties go where `torch.topk` puts them, as in every host: repeatable, but in no stated order.
    """
    weights, ids = ROUTER_FUNCTIONS[function](router_logits, top_k)
    return Routing(router_logits, weights, ids)


def load_balance_loss(routing: Routing) -> Tensor:
    """`n_experts x sum over experts of f x P`; 1 when both are even, n_experts at collapse.

    f is an expert's share of the T x K routed choices (no gradient), P its mean probability under
    the softmax over all experts. Switch Transformers (2021), equations 4 to 6, where K = 1.
    """
    n_experts = routing.router_logits.shape[-1]
    share_E = expert_load(routing.expert_ids, n_experts) / routing.expert_ids.numel()
    probability_E = routing.router_logits.softmax(dim=-1).mean(dim=0)
    return n_experts * (share_E * probability_E).sum()


def router_z_loss(routing: Routing) -> Tensor:
    """Mean over tokens of logsumexp(logits) squared: ST-MoE (2022), equation 5."""
    return routing.router_logits.logsumexp(dim=-1).square().mean()


def expert_load(expert_ids: Tensor, n_experts: int) -> Tensor:
    """(T, K) -> (E,): how many choices fell on each expert."""
    ones = torch.ones(expert_ids.numel(), device=expert_ids.device)
    return ones.new_zeros(n_experts).index_add_(0, expert_ids.flatten(), ones)


def routing_statistics(expert_ids: Tensor, n_experts: int) -> dict[str, float | int | list[float]]:
    """Of the choices (T, K) of one layer, plain JSON values.

    `load`: each expert's share of the choices. `load_max_over_mean`: from 1 to n_experts / K.
    `load_entropy`: of the shares, over log(n_experts), so that 1 is even. `dead_experts`: how many
    were never chosen.
    """
    share = torch.bincount(expert_ids.flatten().cpu(), minlength=n_experts).double()
    share = share / share.sum()
    entropy = -torch.special.xlogy(share, share).sum()
    even = torch.tensor(float(n_experts)).double().log()
    return {
        "load": share.tolist(),
        "load_max_over_mean": float(share.max() * n_experts),
        "load_entropy": float(entropy / even) if n_experts > 1 else 1.0,
        "dead_experts": int((share == 0).sum()),
    }
