"""What a conversion must be measured against, at equal active size and on the same data.

`static`: one expert for all tokens, as wide as what a token runs: the dense FFN pruned, refitted by
least squares with a bias, and trained by the same steps; the dense FFN itself where a token runs as
much as in it. A sparse layer that does not beat it has no router worth having. `oracle`: the
layer's own experts, each token's chosen by the dense FFN's true output. What lies between the two
is what routing can win:
`gap_recovery = (static - ours) / (static - oracle)` in relative_mse.

Shapes: T tokens, D d_model, E experts, K top_k.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.experts import start_experts
from pipeline.ffn import DenseFFN
from pipeline.moe import SparseMoE
from pipeline.router import ROUTER_FUNCTIONS, TokenChoice, choose_experts
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


def unpruned(ffn: DenseFFN) -> SparseMoE:
    """The dense FFN as a layer of one expert: the static control where nothing is to be pruned."""
    one = MoEShape(
        d_model=ffn.d_model,
        d_ff=ffn.d_ff,
        d_ff_expert=ffn.d_ff,
        n_experts=1,
        top_k=1,
        activation=ffn.activation,
        gated=ffn.gate_proj is not None,
        bias=ffn.up_bias is not None or ffn.down_bias is not None,
        router_function="softmax_topk",
    )
    moe = SparseMoE(one)
    none = torch.Generator()
    made = start_experts(ffn, one, "copy", init_noise=0.0, generator=none)
    moe.load_state_dict(made, strict=False)  # any router gives one expert all
    return moe.eval()


class OracleMoE(nn.Module):
    """A trained layer whose tokens go where the dense FFN's output is best met.

    One expert after the other is added, each time the one that leaves the least error, at the
    weights that the router gives to those chosen; where the router's own choice is better, which
    several experts fitted together may make it, that one stands. Runs every expert on every token.
    """

    def __init__(self, moe: SparseMoE, ffn: DenseFFN) -> None:
        super().__init__()
        assert moe.shape.capacity_factor is None, "where experts choose, tokens do not"
        self.moe, self.shape, self.down_proj = moe, moe.shape, moe.down_proj
        self.ffn = ffn.to(moe.down_proj.device, moe.down_proj.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OracleMoE":
        """What `to` calls; the dense FFN, whose tensors are no parameters, goes along."""
        super()._apply(fn, recurse)
        self.ffn = self.ffn.to(self.down_proj.device, self.down_proj.dtype)
        return self

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
        function, dtype = self.shape.router_function, x_TD.dtype
        scores_TE = ROUTER_FUNCTIONS[function][0](logits_TE).to(dtype)
        sum_TD, empty_T = torch.zeros_like(y_TD), scores_TE.new_zeros(len(x_TD))
        total_T = empty_T.log() if function == "softmax_topk" else empty_T
        free_TE = torch.ones_like(scores_TE, dtype=torch.bool)
        ids = []
        for _ in range(self.shape.top_k):
            if function == "softmax_topk":  # in logarithms: an expert never taken is no 0 / 0
                share_TE = (scores_TE - total_T[:, None]).sigmoid()
            elif function == "sigmoid":
                share_TE = scores_TE / (total_T[:, None] + scores_TE + 1e-20)
            else:
                share_TE = scores_TE
            kept = 0 if function == "softmax" else share_TE[:, :, None] * sum_TD[:, None]
            found_TED = sum_TD[:, None] - kept + share_TE[:, :, None] * outputs_TED
            error_TE = (found_TED - y_TD[:, None]).square().sum(dim=-1)
            chosen_T = error_TE.masked_fill(~free_TE, torch.inf).argmin(dim=1)
            free_TE[torch.arange(len(x_TD), device=x_TD.device), chosen_T] = False
            rows = chosen_T[:, None]
            sum_TD = found_TED.take_along_dim(rows[:, :, None], dim=1)[:, 0]
            score_T = scores_TE.gather(1, rows)[:, 0]
            in_logs = function == "softmax_topk"
            total_T = total_T.logaddexp(score_T) if in_logs else total_T + score_T
            ids.append(chosen_T)
        bias = self.moe.router.balance_bias if self.shape.balance_bias else None
        routed = choose_experts(logits_TE, self.shape.top_k, function, bias)
        weights_TE = routed.weights_TE().to(dtype)
        routed_TD = torch.bmm(weights_TE[:, None], outputs_TED)[:, 0]
        errors = [(found - y_TD).square().sum(dim=-1) for found in (sum_TD, routed_TD)]
        better_T1 = (errors[1] < errors[0])[:, None]
        return torch.where(better_T1, routed.expert_ids, torch.stack(ids, dim=1))

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
