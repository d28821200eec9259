"""The router: which experts a token takes, or which tokens an expert takes, and with what weights.

Logits are always float32. `linear` is one map without bias, `router_logits = x @ weight.T`, which
is what every native host has. `mlp` adds a small network, `silu(x @ hidden_proj.T) @
output_proj.T`, which starts at zero, so that both kinds start alike.

Token choice: each token takes its `top_k` experts; the function from logits to weights is the
host's, and a layer is trained under exactly the function that it will run with. A balance bias is
added where experts are selected and nowhere else: Wang et al. (2024), "Auxiliary-Loss-Free Load
Balancing", section 3.

Expert choice: each expert takes the `capacity_factor x T / n_experts` tokens of the batch that
score highest with it: Zhou et al. (2022), "Mixture-of-Experts with Expert Choice Routing", section
3.2. A token that no expert takes gets zero, and who is taken depends on the rest of the batch, its
later tokens included. That rule is for training. **For inference** an expert takes every token
that scores at least its `threshold`, fitted so that it takes that share of the validation rows:
each token is decided alone, whatever stands beside or after it.

Shapes: T tokens, D d_model, E experts, K top_k, C the most tokens that an expert takes.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.shape import MoEShape


class Router(nn.Module):
    """(T, D) -> (T, E) float32 logits, float64 where the weights are."""

    balance_bias: Tensor
    threshold: Tensor

    def __init__(self, shape: MoEShape) -> None:
        super().__init__()
        E, D, W = shape.n_experts, shape.d_model, shape.router_width
        self.weight = nn.Parameter(torch.zeros(E, D))
        if W:
            self.hidden_proj = nn.Parameter(torch.zeros(W, D))
            self.output_proj = nn.Parameter(torch.zeros(E, W))
        if shape.balance_bias:
            self.register_buffer("balance_bias", torch.zeros(E))
        if shape.routing == "expert_choice":
            self.register_buffer("threshold", torch.zeros(E))

    def forward(self, x_TD: Tensor) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        x_TD = x_TD.to(dtype)
        logits_TE = F.linear(x_TD, self.weight.to(dtype))
        if hasattr(self, "hidden_proj"):
            hidden_TW = F.silu(F.linear(x_TD, self.hidden_proj.to(dtype)))
            logits_TE = logits_TE + F.linear(hidden_TW, self.output_proj.to(dtype))
        return logits_TE

    @torch.no_grad()
    def share_gradient(self, slices: int) -> None:
        """Give each run of `slices` experts the mean of their rows' gradients: equal rows stay so.

        With `moe.virtual_groups` such a run are the slices of one replica, chosen together.
        """
        for name, rows in self.named_parameters():
            if slices > 1 and rows.grad is not None and name != "hidden_proj":
                runs_RSD = rows.grad.unflatten(0, (-1, slices))
                runs_RSD.copy_(runs_RSD.mean(dim=1, keepdim=True))

    def has_equal_rows(self, slices: int) -> bool:
        """Whether the experts of each run of `slices` have one router row, and runs differ."""
        if len(self.weight) % slices:
            return False
        rows_RSD = self.weight.unflatten(0, (-1, slices))
        alike = bool((rows_RSD == rows_RSD[:, :1]).all())
        return alike and not bool((self.weight == self.weight[:1]).all())

    @torch.no_grad()
    def adjust_balance_bias(self, routing: "TokenChoice | ExpertChoice", rate: float) -> None:
        """Raise the bias of experts below the mean load of this batch, lower that of the others."""
        load_E = routing.taken_TE().sum(dim=0).float()
        self.balance_bias += rate * (load_E.mean() - load_E).sign()


class TokenChoice(NamedTuple):
    """One decision per token; `expert_ids` in order of falling score."""

    router_logits: Tensor  # (T, E)
    expert_weights: Tensor  # (T, K)
    expert_ids: Tensor  # (T, K)

    def weights_TE(self) -> Tensor:
        """Every expert's weight for every token, 0 where it was not chosen."""
        return torch.zeros_like(self.router_logits).scatter(1, self.expert_ids, self.expert_weights)

    def taken_TE(self) -> Tensor:
        """Which expert works on which token, bool."""
        none = torch.zeros_like(self.router_logits, dtype=torch.bool)
        return none.scatter(1, self.expert_ids, True)


class ExpertChoice(NamedTuple):
    """One decision per expert; places that it leaves empty have token 0 at weight 0."""

    router_logits: Tensor  # (T, E)
    expert_weights: Tensor  # (E, C)
    token_ids: Tensor  # (E, C)

    def weights_TE(self) -> Tensor:
        """Every expert's weight for every token, 0 where it was not taken."""
        none = torch.zeros_like(self.router_logits.t())
        return none.scatter_add(1, self.token_ids, self.expert_weights).t()

    def taken_TE(self) -> Tensor:
        """Which expert works on which token, bool."""
        return self.weights_TE() > 0


Routing = TokenChoice | ExpertChoice


def _unchanged(x: Tensor) -> Tensor:
    return x


# Logits -> the scores that select, and the selected scores -> weights.
ROUTER_FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    # over the chosen ones; sums to 1 (Mixtral, Granite)
    "softmax_topk": (_unchanged, lambda chosen: chosen.softmax(dim=-1)),
    # over all experts, not renormalised (Qwen with norm_topk_prob false)
    "softmax": (lambda logits: logits.softmax(dim=-1), _unchanged),
    # renormalised (Glm4Moe, Dots1)
    "sigmoid": (torch.sigmoid, lambda chosen: chosen / (chosen.sum(dim=-1, keepdim=True) + 1e-20)),
}


def choose_experts(
    router_logits: Tensor, top_k: int, function: str, balance_bias: Tensor | None = None
) -> TokenChoice:
    """(T, E) -> the `top_k` experts of each token.

    Ties go where `torch.topk` puts them, as in every host: repeatable, but in no stated order.
    """
    score, weigh = ROUTER_FUNCTIONS[function]
    scores_TE = score(router_logits)
    selecting_TE = scores_TE if balance_bias is None else scores_TE + balance_bias
    ids_TK = selecting_TE.detach().topk(top_k, dim=-1).indices
    return TokenChoice(router_logits, weigh(scores_TE.gather(-1, ids_TK)), ids_TK)


def capacity(tokens: int, capacity_factor: float, n_experts: int) -> int:
    """Tokens that each expert takes of a batch; at least one, at most all."""
    return min(tokens, max(1, math.ceil(capacity_factor * tokens / n_experts)))


def choose_tokens(router_logits: Tensor, capacity_factor: float) -> ExpertChoice:
    """(T, E) -> the tokens of each expert: the rule for training."""
    scores_ET = router_logits.softmax(dim=-1).t()
    weights_EC, ids_EC = scores_ET.topk(
        capacity(scores_ET.shape[1], capacity_factor, len(scores_ET))
    )
    return ExpertChoice(router_logits, weights_EC, ids_EC)


def choose_tokens_alone(router_logits: Tensor, threshold_E: Tensor) -> ExpertChoice:
    """(T, E) -> the tokens of each expert, each decided alone: the rule for inference."""
    scores_ET = router_logits.softmax(dim=-1).t()
    scores_ET = scores_ET * (scores_ET >= threshold_E[:, None])
    widest = max(1, int((scores_ET > 0).sum(dim=1).max()))
    weights_EC, ids_EC = scores_ET.topk(widest)
    return ExpertChoice(router_logits, weights_EC, ids_EC * (weights_EC > 0))


def thresholds(router_logits: Tensor, capacity_factor: float) -> Tensor:
    """(E,): half-way from the last of these tokens that each expert would take to the next.

    0 where it would take them all: then it takes every other token too.
    """
    scores_ET = router_logits.softmax(dim=-1).t()
    n_experts, tokens = scores_ET.shape
    taken = capacity(tokens, capacity_factor, n_experts)
    if taken == tokens:
        return scores_ET.new_zeros(n_experts)
    return scores_ET.topk(taken + 1).values[:, taken - 1 :].mean(dim=1)


def load_balance_loss(routing: Routing) -> Tensor:
    """`n_experts x sum over experts of f x P`; 1 when both are even, n_experts at collapse.

    f is an expert's share of the routed choices (no gradient), P its mean probability under
    the softmax over all experts. Switch Transformers (2021), equations 4 to 6, where K = 1. Where
    experts choose, their loads are even and it is 0.
    """
    if isinstance(routing, ExpertChoice):
        return routing.router_logits.new_zeros(())
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


def routing_statistics(taken_TE: Tensor) -> dict[str, float | int | list[float]]:
    """Of which expert worked on which token (bool), plain JSON values.

    `load`: each expert's share of the choices. `load_max_over_mean`: from 1 to n_experts / K.
    `load_entropy`: of the shares, over log(n_experts), so that 1 is even. `dead_experts`: how many
    were never chosen. `experts_per_token`: their mean. `unserved_tokens`: the share of tokens that
    no expert took, 0 where tokens choose.
    """
    n_experts = taken_TE.shape[1]
    choices_E = taken_TE.sum(dim=0).double().cpu()
    share = choices_E / choices_E.sum().clamp_min(1)
    entropy = -torch.special.xlogy(share, share).sum()
    even = torch.tensor(float(n_experts)).double().log()
    return {
        "load": share.tolist(),
        "load_max_over_mean": float(share.max() * n_experts),
        "load_entropy": float(entropy / even) if n_experts > 1 else 1.0,
        "dead_experts": int((share == 0).sum()),
        "experts_per_token": float(choices_E.sum() / len(taken_TE)),
        "unserved_tokens": float((~taken_TE.any(dim=1)).double().mean()),
    }
