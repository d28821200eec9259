"""Each layer's sparse shape and the host of them all, decided before anything is trained.

Uniform: every layer gets what `moe` says, resolved against its own d_ff, but for what
`moe.per_layer` says otherwise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from pipeline import hosts
from pipeline.config import LayerMoEConfig, MoEConfig, Router, Routing
from pipeline.record import check_layers
from pipeline.shape import (
    MoEShape,
    check_dynamic,
    check_start,
    check_virtual_groups,
    resolve_d_ff_expert,
    resolve_init,
    resolve_shared_expert,
)


def uniform(
    record: Mapping[str, Any], moe: MoEConfig, layers: Sequence[int]
) -> dict[int, dict[str, Any]]:
    """What the `budget` stage writes for each layer: `layer`, `shape`, `init`, `host`.

    Args:
        record: of the dense model, `stages/dense/dense.json`.

    Raises:
        ConfigError: sizes that do not fit the model, or no host for what is asked.
        InputError: a layer that the model does not have.
    """
    check_layers(list(layers), record["n_layers"])
    shapes = {layer: _shape(record, moe, layer) for layer in sorted(layers)}
    host, reason = hosts.choose(moe.host.name, record, shapes)
    print(f"host: {host.name} ({reason})", flush=True)
    plans = {}
    for layer, shape in shapes.items():
        d_ff = shape.d_ff_routed
        init = resolve_init(moe.init.name, moe.init_from_dense, d_ff, shape.d_ff_expert)
        check_start(shape, init)
        if moe.virtual_groups:
            check_virtual_groups(shape, init, moe.router_init.name)
        if moe.dynamic.enabled:
            check_dynamic(shape, moe.dynamic.min_d_ff, moe.dynamic.max_d_ff)
        hosted = replace(shape, router_function=host.router_function)
        plans[layer] = {"layer": layer, "shape": asdict(hosted), "init": init, "host": host.name}
    return plans


def _shape(record: Mapping[str, Any], moe: MoEConfig, layer: int) -> MoEShape:
    ffn = record["layers"][layer]
    own = next((other for other in moe.per_layer if layer in other.layers), LayerMoEConfig([layer]))
    width = moe.d_ff_expert if own.d_ff_expert is None else own.d_ff_expert
    shared = moe.shared_expert if own.shared_expert is None else own.shared_expert
    chosen_by_experts = moe.routing is Routing.expert_choice
    return MoEShape(
        d_model=record["d_model"],
        d_ff=ffn["d_ff"],
        d_ff_expert=resolve_d_ff_expert(width, ffn["d_ff"]),
        n_experts=own.n_experts or moe.n_experts,
        top_k=own.top_k or moe.top_k,
        activation=ffn["activation"],
        gated=ffn["gated"],
        bias=ffn["bias"] or moe.mean_compensation,
        router_function="softmax_topk",
        routing=moe.routing.name,
        capacity_factor=moe.capacity_factor if chosen_by_experts else None,
        router_width=moe.router_width if moe.router is Router.mlp else 0,
        balance_bias=moe.balance_bias,
        d_ff_shared=resolve_shared_expert(shared, ffn["d_ff"]),
    )
