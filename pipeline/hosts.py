"""Which architecture holds a converted model, and how its parts are named there.

A host is chosen before training, because it fixes the router function that the layers are trained
under. A native one, which transformers has, is preferred; our own, `modeling/`, holds what none of
them can and opens with `trust_remote_code=True`. Every refusal says why; nothing is approximated.
Imports neither torch nor transformers: it reads the dense model's recorded configuration.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.errors import ConfigError
from pipeline.shape import MoEShape

Shapes = Mapping[int, MoEShape]
"""The sparse layers, by index."""

EXPERT_CHOICE_CAUTION = (
    "token choice is recommended: where experts choose, whom they take in training depends on the "
    "rest of the batch, later tokens included, and a token that none takes gets zero"
)

REMOTE_CODE = "the checkpoint brings its own modelling file and opens with trust_remote_code=True"


@dataclass(frozen=True)
class Host:
    """One architecture.

    `refuse(record, shapes)` says why it cannot hold a model, or None; `record` is as
    `dense.describe` gives it. `store(shapes)` gives the shapes as they lie in it, and
    `config(record, stored shapes)` its configuration. The dense model's tensors keep their names
    below `prefix`; a SparseMoE's lie below `layer_prefix` under the names of `tensors`, or their
    own where that is None.
    """

    name: str  # its model_type
    families: frozenset[str] | None  # model_type of the dense models that it can hold; None = any
    router_function: str  # a name in router.ROUTER_FUNCTIONS
    remote_code: bool  # not of transformers: opens with trust_remote_code=True
    float32_router: bool  # whatever the model's dtype, else the router is rounded to that
    refuse: Callable[[Mapping[str, Any], Shapes], str | None]
    store: Callable[[Shapes], dict[int, MoEShape]]
    config: Callable[[Mapping[str, Any], Shapes], dict[str, Any]]
    prefix: str
    layer_prefix: str
    tensors: Mapping[str, str] | None


NOT_KEPT = frozenset({"architectures", "model_type", "transformers_version", "_name_or_path"})
"""Fields of the dense model's configuration that name the model and say nothing of it."""


# Mixtral


def _mixtral_refusal(record: Mapping[str, Any], shapes: Shapes) -> str | None:
    config, shape = record["config"], next(iter(shapes.values()))
    if config.get("attention_bias"):
        return "its attention has no bias"
    if shape.bias:
        return "its experts have no bias"
    if not shape.gated or shape.activation not in ("silu", "gelu", "gelu_tanh", "relu"):
        return "its experts are gated, with an activation function that transformers names"
    for other in shapes.values():
        if other.routing != "token_choice":
            return "its tokens choose their experts"
        if other.router_width:
            return "its router is one linear map"
        if other.balance_bias:
            return "its router has no balance bias"
    left = sorted(set(range(record["n_layers"])) - set(shapes))
    if left:
        return f"every layer of it is sparse, and layers {left} would stay dense"
    alike = {replace(s, d_ff=0, expert_widths=None) for s in _one_width(shapes).values()}
    if len(alike) > 1:  # d_ff leaves with the dense FFN
        return "all its layers have one d_ff_expert, n_experts and top_k"
    return None


def _one_width(shapes: Shapes) -> dict[int, MoEShape]:
    """Where experts grew or shrank: padded to the widest of all layers, which changes nothing."""
    if all(shape.expert_widths is None for shape in shapes.values()):
        return dict(shapes)
    widest = max(shape.d_ff_expert for shape in shapes.values())
    return {
        k: replace(shape, d_ff_expert=widest, expert_widths=shape.widths)
        for k, shape in shapes.items()
    }


MIXTRAL_LACKS = frozenset({"attention_bias", "mlp_bias", "pretraining_tp"})

ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}

EXPERT_WIDTHS = "sparse_distilled_expert_widths"
"""Field of Mixtral's configuration: layer -> each expert's true width, where they are padded."""


def _mixtral_config(record: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    config, shape = record["config"], next(iter(shapes.values()))
    widths = {str(k): list(s.widths) for k, s in shapes.items() if s.expert_widths is not None}
    return {
        **{k: v for k, v in config.items() if k not in MIXTRAL_LACKS | NOT_KEPT},
        "intermediate_size": shape.d_ff_expert,
        "num_local_experts": shape.n_experts,
        "num_experts_per_tok": shape.top_k,
        "hidden_act": ACTIVATION_NAMES.get(shape.activation, shape.activation),
        "sliding_window": config.get("sliding_window"),
        "router_jitter_noise": 0.0,
        **({EXPERT_WIDTHS: widths} if widths else {}),
    }


# Our own


def _own_refusal(record: Mapping[str, Any], shapes: Shapes) -> str | None:
    if record["config"].get("auto_map"):
        return "transformers builds the dense part of it, and this model has code of its own"
    return None


def _own_config(record: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    paths = {ffn["index"]: ffn["path"] for ffn in record["layers"]}
    gone = NOT_KEPT - {"architectures"}  # some model types have several
    kept = {k: v for k, v in record["config"].items() if k not in gone}
    return {
        "dense_config": {**kept, "model_type": record["family"]},
        "sparse_layers": {paths[k]: asdict(shape) for k, shape in shapes.items()},
    }


HOSTS: dict[str, Host] = {
    "mixtral": Host(
        name="mixtral",
        families=frozenset({"llama", "mistral"}),
        router_function="softmax_topk",
        remote_code=False,
        float32_router=False,
        refuse=_mixtral_refusal,
        store=_one_width,
        config=_mixtral_config,
        prefix="",
        layer_prefix="model.layers.{layer}.mlp.",
        tensors={
            "router.weight": "gate.weight",
            "gate_up_proj": "experts.gate_up_proj",
            "down_proj": "experts.down_proj",
        },
    ),
    "sparse_distilled": Host(
        name="sparse_distilled",
        families=None,
        router_function="softmax_topk",
        remote_code=True,
        float32_router=True,
        refuse=_own_refusal,
        store=dict,
        config=_own_config,
        prefix="dense.",
        layer_prefix="dense.{path}.",
        tensors=None,
    ),
}


# Any of them


def can_host(host: Host, record: Mapping[str, Any], shapes: Shapes) -> str | None:
    """None when `host` can hold the dense model with these sparse layers, else why not.

    Args:
        record: as `dense.describe` gives it.
    """
    if host.families is not None and record["family"] not in host.families:
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
            return host, _reason(host, name, record, shapes, refusals)
    raise ConfigError(
        "No architecture can hold this conversion.",
        value=f"moe.host={name}; " + _told(refusals),
        rule="the host can hold the dense model with these sparse layers",
        remedy="set moe.host=auto, or convert another model; `python -m pipeline inspect <model>` "
        "says what can host it",
    )


def _reason(
    host: Host,
    name: str,
    record: Mapping[str, Any],
    shapes: Shapes,
    refusals: Mapping[str, str | None],
) -> str:
    parts = ["configured" if name != "auto" else f"it can hold {record['family']}"]
    if host.remote_code:
        parts += [f"no native one can: {_told(refusals)}"] if _told(refusals) else []
        parts += [REMOTE_CODE]
    if any(shape.routing == "expert_choice" for shape in shapes.values()):
        parts += [EXPERT_CHOICE_CAUTION]
    return "; ".join(parts)


def _told(refusals: Mapping[str, str | None]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in refusals.items() if why)


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
    answers = {}
    for name, host in HOSTS.items():
        yes = f"yes; {REMOTE_CODE}" if host.remote_code else "yes"
        answers[name] = can_host(host, record, shapes) or yes
    return answers


def rename(host: Host, layer: int, path: str, name: str) -> str:
    """The host's full name of a parameter of the SparseMoE at `path` in the dense model."""
    own = name if host.tensors is None else host.tensors[name]
    return host.layer_prefix.format(layer=layer, path=path) + own
