"""What a conversion must be measured against, at equal active size and on the same data.

`static`: one expert for all tokens, as wide as what a token runs: the dense FFN pruned, refitted by
least squares with a bias, and trained by the same steps. A sparse layer that does not beat it has
no router worth having. `oracle`: the layer's own experts, each token's chosen by the dense FFN's
true output. What lies between the two is what routing can win:
`gap_recovery = (static - ours) / (static - oracle)` in relative_mse.

Shapes: T tokens, D d_model, E experts, K top_k.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.ffn import DenseFFN
from pipeline.moe import SparseMoE
from pipeline.router import ROUTER_FUNCTIONS, TokenChoice
from pipeline.shape import MoEShape

STATIC = "static"
"""The folder of the static control below that of its layer."""

CHUNK = 256
"""Tokens for which an oracle holds every expert's output."""


def static_plan(plan: Mapping[str, Any]) -> dict[str, Any] | None:
    """The plan of the static control of a layer; null where as much is run as in the dense FFN."""
    shape = MoEShape(**plan["shape"])
    width = round(shape.active_ffn_fraction * shape.d_ff)
    if width >= shape.d_ff:
        return None
    static = MoEShape(
        d_model=shape.d_model,
        d_ff=shape.d_ff,
        d_ff_expert=width,
        n_experts=1,
        top_k=1,
        activation=shape.activation,
        gated=shape.gated,
        bias=True,
        router_function="softmax_topk",
    )
    return {**plan, "shape": asdict(static), "init": "specialist"}


class OracleMoE(nn.Module):
    """A trained layer whose tokens go where the dense FFN's output is best met.

    One expert after the other is added, each time the one that leaves the least error, at the
    weights that the router gives to those chosen. Runs every expert on every token.
    """

    def __init__(self, moe: SparseMoE, ffn: DenseFFN) -> None:
        super().__init__()
        assert moe.shape.capacity_factor is None, "where experts choose, tokens do not"
        self.moe, self.shape, self.down_proj = moe, moe.shape, moe.down_proj
        self.ffn = ffn.to(moe.down_proj.device, moe.down_proj.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.forward_routed(x)[0]

    def forward_routed(self, x: Tensor) -> tuple[Tensor, TokenChoice]:
        """As `SparseMoE.forward_routed`."""
        x_TD = x.reshape(-1, self.shape.d_model)
        logits = self.moe.router(x_TD)
        parts = zip(x_TD.split(CHUNK), logits.split(CHUNK), strict=True)
        ids_TK = torch.cat([self._choose(*part) for part in parts])
        score, weigh = ROUTER_FUNCTIONS[self.shape.router_function]
        routing = TokenChoice(logits, weigh(score(logits).gather(1, ids_TK)), ids_TK)
        return self.moe.run(x_TD, routing).view_as(x), routing

    def _choose(self, x_TD: Tensor, logits_TE: Tensor) -> Tensor:
        y_TD, outputs_TED = self.ffn(x_TD), self._outputs(x_TD)
        if self.shape.d_ff_shared:
            y_TD = y_TD - self.moe.shared_expert(x_TD)
        score, _ = ROUTER_FUNCTIONS[self.shape.router_function]
        scores_TE = score(logits_TE).to(x_TD.dtype)
        if self.shape.router_function == "softmax_topk":
            scores_TE = scores_TE.softmax(dim=-1)
        weighted_TED = scores_TE[:, :, None] * outputs_TED
        sum_TD, total_T = torch.zeros_like(y_TD), scores_TE.new_zeros(len(x_TD))
        free_TE = torch.ones_like(scores_TE, dtype=torch.bool)
        ids = []
        for _ in range(self.shape.top_k):
            found_TED = sum_TD[:, None] + weighted_TED
            if self.shape.router_function != "softmax":  # the weights of those chosen sum to 1
                found_TED = found_TED / (total_T[:, None] + scores_TE)[:, :, None]
            error_TE = (found_TED - y_TD[:, None]).square().sum(dim=-1)
            chosen_T = error_TE.masked_fill(~free_TE, torch.inf).argmin(dim=1)
            free_TE[torch.arange(len(x_TD), device=x_TD.device), chosen_T] = False
            rows = chosen_T[:, None]
            sum_TD = sum_TD + weighted_TED.take_along_dim(rows[:, :, None], dim=1)[:, 0]
            total_T = total_T + scores_TE.gather(1, rows)[:, 0]
            ids.append(chosen_T)
        return torch.stack(ids, dim=1)

    def _outputs(self, x_TD: Tensor) -> Tensor:
        """(T, E, D): every expert's output."""
        experts = self.moe.experts(x_TD.dtype)
        inner = torch.einsum("td,eud->etu", x_TD, experts.inner_EUD)
        if experts.inner_bias_EU is not None:
            inner = inner + experts.inner_bias_EU[:, None]
        out = torch.bmm(experts.hidden(inner), experts.down_EDH.transpose(1, 2))
        if experts.down_bias_ED is not None:
            out = out + experts.down_bias_ED[:, None]
        return out.transpose(0, 1)


def gap_recovery(ours: float | None, static: float | None, oracle: float | None) -> float | None:
    """Of relative_mse; null where there is no gap to recover."""
    if ours is None or static is None or oracle is None or static <= oracle:
        return None
    return (static - ours) / (static - oracle)
