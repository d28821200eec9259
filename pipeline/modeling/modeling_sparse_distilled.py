"""A dense transformer in which some or all feed-forward networks (FFNs) are sparse.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

and `AutoModel` for an encoder, which has no language model's head.

This file lies beside the weights and needs nothing but torch and transformers. transformers builds
the dense model from `config.dense_config`; a SparseFFN takes the place of each module that
`config.sparse_layers` names, and every other layer stays dense. Where an FFN is spread over several
modules, it takes the place of the last and those before it do nothing (`bypassed`). Attention,
embeddings, loss and generation are the dense model's own code (`model.dense`).

A SparseFFN is a router and E experts: y = sum over the experts e that are taken of weight_e(x) *
expert_e(x); a shared expert, where there is one, adds its own to every token.

- Token choice: each token takes the `top_k` experts that score highest. Where there is a balance
  bias it is added to the scores that select, and never to those that weigh.
- Expert choice: an expert takes every token that scores at least its `threshold`, so that each
  token is decided alone, whatever stands beside or after it. In training each expert took the best
  of a whole batch; the threshold is the score of the last that it would take among validation
  tokens. A token that no expert takes gets zero from this layer.

The router has float32 weights and computes in float32, also where the model is bfloat16, and `to`
and `half` leave its precision alone. Experts of different widths are padded with zeros to the
widest, which changes no output; `expert_widths` in the configuration holds their true widths.

Shapes: T tokens, D d_model, H d_ff_expert, E experts, W units of an MLP router's hidden layer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}

# Logits -> the scores that select, and the scores of those selected -> their weights.
ROUTER_FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "softmax_topk": (lambda logits: logits, lambda chosen: chosen.softmax(dim=-1)),
    "softmax": (lambda logits: logits.softmax(dim=-1), lambda chosen: chosen),
    "sigmoid": (torch.sigmoid, lambda chosen: chosen / (chosen.sum(dim=-1, keepdim=True) + 1e-20)),
}


def combine(inner: Tensor, shape: dict[str, Any]) -> Tensor:
    """(..., 2H), gate first, where gated, else (..., H) -> (..., H)."""
    act = ACTIVATIONS[shape["activation"]]
    if not shape["gated"]:
        return act(inner)
    gate, up = inner.chunk(2, dim=-1)
    return act(gate) * up


class SparseDistilledConfig(PreTrainedConfig):
    """The dense model's configuration, and what each sparse layer is.

    Args:
        dense_config: of the dense model, as a dictionary with its `model_type`, or as an object.
        sparse_layers: path of an FFN in the dense model -> d_model, d_ff (of the dense FFN),
            d_ff_expert, n_experts, top_k, activation, gated, bias, router_function, routing
            (token_choice or expert_choice), capacity_factor (expert choice: experts per token in
            training, on average), router_width (0 = a linear router), balance_bias, expert_widths
            (null = all have d_ff_expert), d_ff_shared (of the shared expert; 0 = none); and, where
            there are any, `bypassed`: paths in the dense model of what lies before it in the FFN.
    """

    model_type = "sparse_distilled"
    sub_configs = {"dense_config": AutoConfig}  # pyright: ignore[reportAssignmentType]
    has_no_defaults_at_init = True

    def __init__(
        self,
        dense_config: dict[str, Any] | PreTrainedConfig,
        sparse_layers: dict[str, dict[str, Any]],
        **kwargs: Any,
    ) -> None:
        if isinstance(dense_config, dict):
            dense_config = AutoConfig.for_model(**dense_config)
        self.dense_config = dense_config
        self.sparse_layers = sparse_layers
        super().__init__(**kwargs)
        self.tie_word_embeddings = getattr(dense_config, "tie_word_embeddings", False)

    def get_text_config(
        self, decoder: bool | None = None, encoder: bool | None = None
    ) -> PreTrainedConfig:
        """The dense model's: layers, sizes and vocabulary stand there."""
        return self.dense_config.get_text_config(decoder=decoder, encoder=encoder)


class Router(nn.Module):
    """(T, D) -> every expert's weight for every token (T, E), and which it takes (T, E), bool."""

    balance_bias: Tensor
    threshold: Tensor

    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        E, D, W = shape["n_experts"], shape["d_model"], shape["router_width"]
        self.shape = shape
        self.weight = nn.Parameter(torch.zeros(E, D, dtype=torch.float32))
        if W:
            self.hidden_proj = nn.Parameter(torch.zeros(W, D, dtype=torch.float32))
            self.output_proj = nn.Parameter(torch.zeros(E, W, dtype=torch.float32))
        if shape["balance_bias"]:
            self.register_buffer("balance_bias", torch.zeros(E, dtype=torch.float32))
        if shape["routing"] == "expert_choice":
            self.register_buffer("threshold", torch.zeros(E, dtype=torch.float32))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD.to(self.weight.dtype))
            if self.shape["routing"] == "expert_choice":
                scores_TE = logits_TE.softmax(dim=-1)
                taken_TE = scores_TE >= self.threshold
                return scores_TE * taken_TE, taken_TE
            score, weigh = ROUTER_FUNCTIONS[self.shape["router_function"]]
            scores_TE = score(logits_TE)
            selecting = scores_TE + self.balance_bias if self.shape["balance_bias"] else scores_TE
            ids_TK = selecting.topk(self.shape["top_k"], dim=-1).indices
            weights_TK = weigh(scores_TE.gather(-1, ids_TK))
            weights_TE = torch.zeros_like(scores_TE).scatter(-1, ids_TK, weights_TK)
            return weights_TE, torch.zeros_like(scores_TE).scatter(-1, ids_TK, 1.0).bool()

    def logits(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, E)."""
        logits_TE = F.linear(x_TD, self.weight)
        if self.shape["router_width"]:
            hidden_TW = F.silu(F.linear(x_TD, self.hidden_proj))
            logits_TE = logits_TE + F.linear(hidden_TW, self.output_proj)
        return logits_TE

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Moves as every module does; below float32 it is not rounded."""

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            wide = torch.promote_types(new.dtype, torch.float32)
            return new if new.dtype == wide else tensor.to(new.device, wide)

        return super()._apply(moved, recurse)


class SharedExpert(nn.Module):
    """What every token runs: (T, D) -> (T, D)."""

    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        D, S = shape["d_model"], shape["d_ff_shared"]
        self.shape, self.inner = shape, "gate_up" if shape["gated"] else "up"
        U = 2 * S if shape["gated"] else S
        self.register_parameter(f"{self.inner}_proj", nn.Parameter(torch.zeros(U, D)))
        self.register_parameter("down_proj", nn.Parameter(torch.zeros(D, S)))
        if shape["bias"]:
            self.register_parameter(f"{self.inner}_bias", nn.Parameter(torch.zeros(U)))

    def forward(self, x_TD: Tensor) -> Tensor:
        bias = self.get_parameter(f"{self.inner}_bias") if self.shape["bias"] else None
        hidden = F.linear(x_TD, self.get_parameter(f"{self.inner}_proj"), bias)
        return F.linear(combine(hidden, self.shape), self.get_parameter("down_proj"))


class SparseFFN(nn.Module):
    """A router and its experts: (..., D) -> (..., D).

    Parameters: those of `router`; `gate_up_proj` (E, 2H, D), gate first, where gated, else
    `up_proj` (E, H, D); `down_proj` (E, D, H); where there are biases `gate_up_bias` (E, 2H) or
    `up_bias` (E, H), and `down_bias` (E, D). `shared_expert`, where there is one, has the same
    without E, and no `down_bias`.
    """

    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        E, D, H = shape["n_experts"], shape["d_model"], shape["d_ff_expert"]
        self.shape = shape
        self.inner = "gate_up" if shape["gated"] else "up"
        U = 2 * H if shape["gated"] else H
        self.router = Router(shape)
        self.register_parameter(f"{self.inner}_proj", nn.Parameter(torch.zeros(E, U, D)))
        self.register_parameter("down_proj", nn.Parameter(torch.zeros(E, D, H)))
        if shape["bias"]:
            self.register_parameter(f"{self.inner}_bias", nn.Parameter(torch.zeros(E, U)))
            self.register_parameter("down_bias", nn.Parameter(torch.zeros(E, D)))
        if shape["d_ff_shared"]:
            self.shared_expert = SharedExpert(shape)

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        weights_TE, taken_TE = self.router(x_TD)
        y_TD = torch.zeros_like(x_TD)
        for e in range(self.shape["n_experts"]):
            token_N = taken_TE[:, e].nonzero().squeeze(-1)
            out_ND = self.expert(e, x_TD[token_N])
            weighted_ND = out_ND * weights_TE[token_N, e, None].to(out_ND.dtype)
            y_TD = y_TD.index_add(0, token_N, weighted_ND.to(y_TD.dtype))
        if self.shape["d_ff_shared"]:
            y_TD = y_TD + self.shared_expert(x_TD)
        return y_TD.view_as(x)

    def expert(self, e: int, x_ND: Tensor) -> Tensor:
        """What expert `e` makes of its tokens."""

        def project(name: str, x: Tensor) -> Tensor:
            bias = self.get_parameter(f"{name}_bias")[e] if self.shape["bias"] else None
            return F.linear(x, self.get_parameter(f"{name}_proj")[e], bias)

        return project("down", combine(project(self.inner, x_ND), self.shape))


class SparseDistilledModel(PreTrainedModel):
    """The dense model in `dense`, with a SparseFFN wherever `config.sparse_layers` names one."""

    dense_class: type = AutoModel
    config_class = SparseDistilledConfig
    supports_gradient_checkpointing = True
    # Whatever the dense model supports: it checks for itself.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["router"]

    def __init__(self, config: SparseDistilledConfig) -> None:
        super().__init__(config)
        self.dense = self.dense_class.from_config(config.dense_config)
        for path, shape in config.sparse_layers.items():
            for before in shape.get("bypassed", ()):
                self.dense.set_submodule(before, nn.Identity(), strict=True)
            self.dense.set_submodule(path, SparseFFN(shape), strict=True)
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As of the dense model, with whatever it takes."""
        return self.dense(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.dense.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.dense.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.dense.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.dense.set_output_embeddings(new_embeddings)


class SparseDistilledForCausalLM(SparseDistilledModel, GenerationMixin):
    """The same of a dense model that predicts tokens."""

    dense_class = AutoModelForCausalLM

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        return self.dense(
            input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self.dense.generation_config = self.generation_config
        return self.dense.generate(*args, **kwargs)
