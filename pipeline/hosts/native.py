"""The architectures of transformers that hold a sparse model: one row of `NATIVE` each.

Their code is the reference: what a row says was read there and is shown by `tests/test_hosts.py`,
which converts every family that a row names. The names of tensors are those of published
checkpoints, which other loaders expect, and not transformers' own in memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.hosts.families import FAMILIES, Config, head_dim, pieces
from pipeline.hosts.interface import NOT_KEPT, Host, Record, Shapes, Tensors
from pipeline.shape import MoEShape

ACTIVATION_NAMES = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}

EXPERT_WIDTHS = "sparse_distilled_expert_widths"
"""Field of the configuration: layer -> each expert's true width, where they are padded."""

SHARED_WIDTHS = "sparse_distilled_shared_widths"
"""Field of the configuration: layer -> its shared expert's, where they are padded."""

SPELLED_APART = {
    "attention_bias",
    "attention_multiplier",
    "embd_pdrop",
    "embedding_multiplier",
    "head_dim",
    "hidden_act",
    "intermediate_size",
    "layer_types",
    "logits_scaling",
    "max_window_layers",
    "mlp_bias",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "pretraining_tp",
    "resid_pdrop",
    "residual_multiplier",
    "sliding_window",
    "use_sliding_window",
}
"""Fields that each family has or lacks: none is kept but by the host's own `fields`."""


@dataclass(frozen=True)
class Asked:
    """What a host's own fields are made of."""

    family: str
    dense: Config
    shape: MoEShape  # of every layer, as stored
    left: list[int]  # layers that stay dense

    @property
    def attention_bias(self) -> str:
        return FAMILIES[self.family].attention_bias(self.dense)

    @property
    def windows(self) -> set[int | None]:
        return FAMILIES[self.family].windows(self.dense)

    @property
    def window(self) -> int | None:
        return max((w for w in self.windows if w is not None), default=None)

    @property
    def layer_types(self) -> list[str]:
        if "layer_types" in self.dense:
            return list(self.dense["layer_types"])
        kind = "full_attention" if self.window is None else "sliding_attention"
        return [kind] * self.dense["num_hidden_layers"]


@dataclass(frozen=True, kw_only=True)
class Native(Host):
    """A decoder with rotary positions whose experts are gated and have no bias."""

    families: tuple[str, ...]  # model_type of the dense models that it can hold
    experts: str  # field of the configuration: how many
    width: str = "moe_intermediate_size"  # the same: how wide each is
    fields: Callable[[Asked], dict[str, Any]]  # whatever else its configuration has
    tensors: Callable[[Tensors], Tensors]  # those of a SparseMoE under its names
    attention_bias: str = ""  # of q, k, v, o those that have one
    always_biased: str = ""  # of those the ones that cannot do without
    windows: str = "none"  # or `one` for all layers, or `by layer`
    left_dense: str = "none"  # or `first` layers, or `any`
    shared: str = "none"  # or `own width`, or `whole experts`
    balance_bias: bool = False
    least_experts: int = 1

    def refusal(self, record: Record, shapes: Shapes) -> str | None:
        if record["family"] not in self.families:
            return f"it holds {', '.join(self.families)}, and this is {record['family']}"
        if not record.get("causal", True):
            return "it predicts tokens, and this model has no head for that"
        return (
            self._dense_refusal(record)
            or next(filter(None, map(self._layer_refusal, shapes.values())), None)
            or self._left_refusal(record, shapes)
            or self._unlike_refusal(shapes)
        )

    def _dense_refusal(self, record: Record) -> str | None:
        family, config = FAMILIES[record["family"]], record["config"]
        if not set(family.attention_bias(config)) <= set(self.attention_bias):
            has = f" but on {', '.join(self.attention_bias)}" if self.attention_bias else ""
            return f"its attention has no bias{has}"
        windows = family.windows(config)
        if self.windows == "none" and windows != {None}:
            return "its attention has no sliding window"
        if self.windows == "one" and len(windows) > 1:
            return "all its layers have one sliding window, or none"
        rope = config.get("rope_parameters") or {}
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            return "it rotates all of each head"
        if rope.get("rope_type") == "longrope":
            return "longrope was not tried with it"
        return None

    def _layer_refusal(self, shape: MoEShape) -> str | None:
        if shape.bias:
            return "its experts have no bias"
        if not shape.gated or shape.activation not in ACTIVATION_NAMES:
            return "its experts are gated, with an activation function that transformers names"
        if shape.routing != "token_choice":
            return "its tokens choose their experts"
        if shape.router_width:
            return "its router is one linear map"
        if shape.balance_bias and not self.balance_bias:
            return "its router has no balance bias"
        if shape.d_ff_shared and self.shared == "none":
            return "it has no shared expert"
        if shape.n_experts < self.least_experts:
            return f"it has at least {self.least_experts} experts"
        return None

    def _left_refusal(self, record: Record, shapes: Shapes) -> str | None:
        left = sorted(set(range(record["n_layers"])) - set(shapes))
        if left and self.left_dense == "none":
            return f"every layer of it is sparse, and layers {left} would stay dense"
        if self.left_dense == "first" and left != list(range(len(left))):
            return f"only its first layers can stay dense, and layers {left} would"
        return None

    def _unlike_refusal(self, shapes: Shapes) -> str | None:
        stored = list(self.stored(shapes).values())
        if len({replace(s, d_ff=0, expert_widths=None) for s in stored}) > 1:
            return "all its layers have one n_experts and top_k, and a balance bias or none"
        if self.shared == "whole experts" and stored[0].d_ff_shared % stored[0].d_ff_expert:
            return (
                f"its shared expert is as wide as a whole number of experts, and "
                f"{stored[0].d_ff_shared} is no multiple of {stored[0].d_ff_expert}"
            )
        return None

    def stored(self, shapes: Shapes) -> dict[int, MoEShape]:
        """All of one width: padded with zeros to the widest, which changes nothing."""
        widest = max(shape.d_ff_expert for shape in shapes.values())
        shared = max(shape.d_ff_shared for shape in shapes.values())
        if all(s.widths == (widest,) * s.n_experts for s in shapes.values()):
            return {k: replace(shape, d_ff_shared=shared) for k, shape in shapes.items()}
        return {
            k: replace(shape, d_ff_expert=widest, expert_widths=shape.widths, d_ff_shared=shared)
            for k, shape in shapes.items()
        }

    def config(self, record: Record, shapes: Shapes) -> dict[str, Any]:
        dense, stored = record["config"], self.stored(shapes)
        shape = next(iter(stored.values()))
        left = sorted(set(range(record["n_layers"])) - set(shapes))
        asked = Asked(record["family"], dense, shape, left)
        fields = {k: v for k, v in dense.items() if k not in SPELLED_APART | NOT_KEPT}
        fields |= {
            "hidden_act": ACTIVATION_NAMES[shape.activation],
            "head_dim": head_dim(dense),
            "intermediate_size": dense["intermediate_size"],
            "num_experts_per_tok": shape.top_k,
            self.experts: shape.n_experts,
            self.width: shape.d_ff_expert,
            **self.fields(asked),
        }
        if any(s.expert_widths is not None for s in stored.values()):
            fields[EXPERT_WIDTHS] = {str(k): list(s.widths) for k, s in stored.items()}
        if any(s.d_ff_shared != shape.d_ff_shared for s in shapes.values()):
            fields[SHARED_WIDTHS] = {str(k): s.d_ff_shared for k, s in shapes.items()}
        return fields

    def pieces(self, record: Record, name: str) -> dict[str, tuple[int, int] | None]:
        return pieces(record["family"], record["config"], name)

    def layer(self, record: Record, layer: int, tensors: Tensors) -> Tensors:
        return {f"model.layers.{layer}.{n}": t for n, t in self.tensors(tensors).items()}

    def made_up(self, record: Record) -> dict[str, tuple[int, ...]]:
        """The biases that it has and the dense attention has not."""
        config = record["config"]
        own = FAMILIES[record["family"]].attention_bias(config)
        needed = self.always_biased or (self.attention_bias if own else "")
        keys = config["num_key_value_heads"] * head_dim(config)
        queries = config["num_attention_heads"] * head_dim(config)
        rows = {"q": queries, "k": keys, "v": keys, "o": config["hidden_size"]}
        return {
            f"model.layers.{k}.self_attn.{letter}_proj.bias": (rows[letter],)
            for k in range(record["n_layers"])
            for letter in needed
            if letter not in own
        }


# Tensors


def _each_expert(tensors: Tensors, below: str, names: Sequence[str]) -> Tensors:
    """Gate, up and down of each expert under `below`.E.`name`.weight."""
    found = {}
    for e, (inner, down) in enumerate(
        zip(tensors["gate_up_proj"], tensors["down_proj"], strict=True)
    ):
        width = down.shape[1]
        for name, tensor in zip(names, (inner[:width], inner[width:], down), strict=True):
            found[f"{below}.{e}.{name}.weight"] = tensor
    return found


def _mixtral(tensors: Tensors) -> Tensors:
    below = "block_sparse_moe"
    experts = _each_expert(tensors, f"{below}.experts", ("w1", "w3", "w2"))
    return {f"{below}.gate.weight": tensors["router.weight"], **experts}


def _granite(tensors: Tensors) -> Tensors:
    names = {
        "block_sparse_moe.router.layer.weight": "router.weight",
        "block_sparse_moe.input_linear.weight": "gate_up_proj",
        "block_sparse_moe.output_linear.weight": "down_proj",
        "shared_mlp.input_linear.weight": "shared_expert.gate_up_proj",
        "shared_mlp.output_linear.weight": "shared_expert.down_proj",
    }
    return {name: tensors[own] for name, own in names.items() if own in tensors}


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def _qwen(tensors: Tensors) -> Tensors:
    experts = _each_expert(tensors, "mlp.experts", PROJECTIONS)
    return {"mlp.gate.weight": tensors["router.weight"], **experts}


def _shared(tensors: Tensors, below: str, factor: int = 1) -> Tensors:
    """Of no width where there is none: these hosts build one in any case."""
    experts = tensors["down_proj"]
    inner = tensors.get("shared_expert.gate_up_proj", experts.new_zeros(0, experts.shape[1]))
    down = tensors.get("shared_expert.down_proj", experts.new_zeros(experts.shape[1], 0))
    width = down.shape[1]
    parts = zip(PROJECTIONS, (inner[:width], inner[width:], down * factor), strict=True)
    return {f"{below}.{name}.weight": tensor for name, tensor in parts}


def _qwen2(tensors: Tensors) -> Tensors:
    """The shared expert is weighed by a sigmoid: of zero it is half, so that twice is exact."""
    gate = tensors["down_proj"].new_zeros(1, tensors["down_proj"].shape[1])
    shared = _shared(tensors, "mlp.shared_expert", factor=2)
    return {**_qwen(tensors), "mlp.shared_expert_gate.weight": gate, **shared}


def _sigmoid(tensors: Tensors) -> Tensors:
    router = tensors["router.weight"]
    bias = tensors.get("router.balance_bias", router.new_zeros(len(router)).float())
    selects = {"mlp.gate.e_score_correction_bias": bias}
    return {**_qwen(tensors), **selects, **_shared(tensors, "mlp.shared_experts")}


# Configurations


def _mixtral_fields(asked: Asked) -> dict[str, Any]:
    return {"sliding_window": asked.window, "router_jitter_noise": 0.0}


def _granite_fields(asked: Asked) -> dict[str, Any]:
    """The multipliers of Granite, or those that change nothing."""
    plain = {"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0}
    plain["attention_multiplier"] = head_dim(asked.dense) ** -0.5
    own = {name: asked.dense[name] for name in plain if asked.family == "granite"}
    return {**plain, **own, "attention_bias": bool(asked.attention_bias)}


def _granite_shared_fields(asked: Asked) -> dict[str, Any]:
    return {**_granite_fields(asked), "shared_intermediate_size": asked.shape.d_ff_shared}


def _qwen_fields(asked: Asked) -> dict[str, Any]:
    return {
        "norm_topk_prob": True,  # then the weights are Mixtral's
        "decoder_sparse_step": 1,
        "mlp_only_layers": asked.left,
        "use_sliding_window": asked.window is not None,
        "sliding_window": asked.window,
    }


def _qwen2_fields(asked: Asked) -> dict[str, Any]:
    return {
        **_qwen_fields(asked),
        "qkv_bias": True,
        "layer_types": asked.layer_types,
        "shared_expert_intermediate_size": asked.shape.d_ff_shared,
    }


def _qwen3_fields(asked: Asked) -> dict[str, Any]:
    return {**_qwen_fields(asked), "attention_bias": bool(asked.attention_bias)}


def _flex_olmo_fields(asked: Asked) -> dict[str, Any]:
    return {"norm_topk_prob": True, "attention_bias": bool(asked.attention_bias)}


def _sigmoid_fields(asked: Asked) -> dict[str, Any]:
    return {
        "attention_bias": bool(asked.attention_bias),
        "n_shared_experts": asked.shape.d_ff_shared // asked.shape.d_ff_expert,
        "first_k_dense_replace": len(asked.left),
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
    }


def _glm4_fields(asked: Asked) -> dict[str, Any]:
    return {
        **_sigmoid_fields(asked),
        "use_qk_norm": asked.family == "qwen3",
        "partial_rotary_factor": 1.0,  # half where it is not given
        "num_mtp_layers": 0,
    }


def _dots1_fields(asked: Asked) -> dict[str, Any]:
    return {
        **_sigmoid_fields(asked),
        "sliding_window": asked.window,
        "layer_types": asked.layer_types,
    }


NATIVE = (  # those first that most loaders read
    Native(
        name="mixtral",
        families=("llama", "mistral", "phi3"),
        experts="num_local_experts",
        width="intermediate_size",
        fields=_mixtral_fields,
        tensors=_mixtral,
        windows="one",
    ),
    Native(
        name="granitemoe",
        families=("granite", "llama", "mistral", "phi3"),
        experts="num_local_experts",
        width="intermediate_size",
        fields=_granite_fields,
        tensors=_granite,
        attention_bias="qkvo",
        caution="vLLM reads no attention bias in it",
    ),
    Native(
        name="granitemoeshared",
        families=("granite", "llama", "mistral", "phi3"),
        experts="num_local_experts",
        width="intermediate_size",
        fields=_granite_shared_fields,
        tensors=_granite,
        attention_bias="qkvo",
        shared="own width",
        caution="vLLM reads no attention bias in it",
    ),
    Native(
        name="qwen3_moe",
        families=("qwen3",),
        experts="num_experts",
        fields=_qwen3_fields,
        tensors=_qwen,
        attention_bias="qkvo",
        windows="one",
        left_dense="any",
    ),
    Native(
        name="flex_olmo",
        families=("olmo2",),
        experts="num_experts",
        width="intermediate_size",
        fields=_flex_olmo_fields,
        tensors=_qwen,
        attention_bias="qkvo",
    ),
    Native(
        name="qwen2_moe",
        families=("qwen2", "llama", "mistral", "phi3"),
        experts="num_experts",
        fields=_qwen2_fields,
        tensors=_qwen2,
        attention_bias="qkv",
        always_biased="qkv",  # other loaders expect them, whatever `qkv_bias` says
        windows="by layer",
        left_dense="any",
        shared="own width",
        caution="llama.cpp does not renormalise its weights and makes NaN of a shared gate of "
        "zero; vLLM takes heads of d_model / n_heads",
    ),
    Native(
        name="glm4_moe",
        families=("qwen3", "llama", "mistral", "qwen2", "phi3"),
        router_function="sigmoid",
        float32=("router.balance_bias",),
        experts="n_routed_experts",
        fields=_glm4_fields,
        tensors=_sigmoid,
        attention_bias="qkv",
        left_dense="first",
        shared="whole experts",
        balance_bias=True,
        least_experts=2,  # it sums the best two of a group
    ),
    Native(
        name="dots1",
        families=("qwen3",),
        router_function="sigmoid",
        float32=("router.balance_bias",),
        experts="n_routed_experts",
        fields=_dots1_fields,
        tensors=_sigmoid,
        attention_bias="qkvo",
        windows="by layer",
        left_dense="first",
        shared="whole experts",
        balance_bias=True,
        least_experts=2,
    ),
)
