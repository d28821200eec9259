"""Which architecture of transformers holds a converted model, and how its parts are named there.

A host is chosen before training, because it fixes the router function that the layers are trained
under. Every refusal says why; nothing is approximated. Imports neither torch nor transformers: it
reads the dense model's recorded configuration.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import ConfigError
from pipeline.shape import MoEShape

Shapes = Mapping[int, MoEShape]
"""The sparse layers, by index."""


@dataclass(frozen=True)
class Host:
    """One architecture of transformers.

    `refuse(record, shapes)` says why it cannot hold a model, or None. `config(dense_config, shape)`
    gives the fields that differ from the dense model's configuration, `dropped` those that the host
    does not have. `tensors` maps a SparseMoE's parameters to names below `layer_prefix`.
    """

    name: str  # its model_type
    families: frozenset[str]  # model_type of the dense models that it can hold
    router_function: str  # a name in router.ROUTER_FUNCTIONS
    refuse: Callable[[Mapping[str, Any], Shapes], str | None]
    config: Callable[[Mapping[str, Any], MoEShape], dict[str, Any]]
    dropped: frozenset[str]
    layer_prefix: str
    tensors: Mapping[str, str]


def _mixtral_refusal(record: Mapping[str, Any], shapes: Shapes) -> str | None:
    config, shape = record["config"], next(iter(shapes.values()))
    if config.get("attention_bias"):
        return "its attention has no bias"
    if shape.bias:
        return "its experts have no bias"
    if not shape.gated or shape.activation not in ("silu", "gelu", "gelu_tanh", "relu"):
        return "its experts are gated, with an activation function that transformers names"
    left = sorted(set(range(record["n_layers"])) - set(shapes))
    if left:
        return f"every layer of it is sparse, and layers {left} would stay dense"
    if len({replace(s, d_ff=0) for s in shapes.values()}) > 1:  # d_ff leaves with the dense FFN
        return "all its layers have one d_ff_expert, n_experts and top_k"
    return None


ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def _mixtral_config(config: Mapping[str, Any], shape: MoEShape) -> dict[str, Any]:
    return {
        "intermediate_size": shape.d_ff_expert,
        "num_local_experts": shape.n_experts,
        "num_experts_per_tok": shape.top_k,
        "hidden_act": ACTIVATION_NAMES.get(shape.activation, shape.activation),
        "sliding_window": config.get("sliding_window"),
        "router_jitter_noise": 0.0,
    }


HOSTS: dict[str, Host] = {
    "mixtral": Host(
        name="mixtral",
        families=frozenset({"llama", "mistral"}),
        router_function="softmax_topk",
        refuse=_mixtral_refusal,
        config=_mixtral_config,
        dropped=frozenset({"attention_bias", "mlp_bias", "pretraining_tp"}),
        layer_prefix="model.layers.{layer}.mlp.",
        tensors={
            "router.weight": "gate.weight",
            "gate_up_proj": "experts.gate_up_proj",
            "down_proj": "experts.down_proj",
        },
    )
}


def can_host(host: Host, record: Mapping[str, Any], shapes: Shapes) -> str | None:
    """None when `host` can hold the dense model with these sparse layers, else why not.

    Args:
        record: as `dense.describe` gives it.
    """
    if record["family"] not in host.families:
        return f"it holds {', '.join(sorted(host.families))}, and this is {record['family']}"
    return host.refuse(record, shapes)


def choose(name: str, record: Mapping[str, Any], shapes: Shapes) -> tuple[Host, str]:
    """The host named `name`, or for `auto` the first that can hold the model; and the reason.

    Raises:
        ConfigError: none can; the reason of each is given.
    """
    candidates = list(HOSTS.values()) if name == "auto" else [HOSTS[name]]
    refusals = {}
    for host in candidates:
        refusals[host.name] = can_host(host, record, shapes)
        if refusals[host.name] is None:
            return host, "configured" if name != "auto" else f"it can hold {record['family']}"
    raise ConfigError(
        "No native architecture can hold this conversion.",
        value=f"moe.host={name}; " + "; ".join(f"{n}: {why}" for n, why in refusals.items()),
        rule="transformers must be able to load the result with no custom code",
        remedy="convert every layer, or another model; `python -m pipeline inspect <model>` "
        "says what can host it",
    )


def explain(record: Mapping[str, Any]) -> dict[str, str]:
    """Host -> `yes`, or why not, for the model as a whole with one expert per token."""
    shapes = {
        ffn["index"]: MoEShape(
            d_model=record["d_model"],
            d_ff=ffn["d_ff"],
            d_ff_expert=ffn["d_ff"],
            n_experts=2,
            top_k=1,
            activation=ffn["activation"],
            gated=ffn["gated"],
            bias=ffn["bias"],
            router_function="softmax_topk",
        )
        for ffn in record["layers"]
    }
    return {name: can_host(host, record, shapes) or "yes" for name, host in HOSTS.items()}


def config_fields(host: Host, record: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """The host's configuration: the dense model's own fields, and those that make it sparse."""
    kept = {k: v for k, v in record["config"].items() if k not in host.dropped | NOT_KEPT}
    return kept | host.config(record["config"], next(iter(shapes.values())))


NOT_KEPT = frozenset({"architectures", "model_type", "transformers_version", "_name_or_path"})


def rename(host: Host, layer: int, name: str) -> str:
    """The host's full name of a SparseMoE's parameter."""
    return host.layer_prefix.format(layer=layer) + host.tensors[name]
