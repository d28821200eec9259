"""Each layer's sparse shape and the host of them all, decided before anything is trained.

Uniform: every layer gets what `moe` says, resolved against its own d_ff.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipeline import hosts
from pipeline.config import MoEConfig
from pipeline.shape import MoEShape, check_start, resolve_d_ff_expert, resolve_init


def uniform(
    record: Mapping[str, Any], moe: MoEConfig, layers: Sequence[int]
) -> dict[int, dict[str, Any]]:
    """What the `budget` stage writes for each layer: `layer`, `shape`, `host`, `init`.

    Args:
        record: of the dense model, `stages/dense/dense.json`.

    Raises:
        ConfigError: sizes that do not fit the model, or no host for what is asked.
        InputError: a layer that the model does not have.
    """
    shapes = {}
    for layer in layers:
        ffn = hosts.layer_of(record, layer)
        shapes[layer] = MoEShape(
            d_model=record["d_model"],
            d_ff=ffn["d_ff"],
            d_ff_expert=resolve_d_ff_expert(moe.d_ff_expert, ffn["d_ff"]),
            n_experts=moe.n_experts,
            top_k=moe.top_k,
            activation=ffn["activation"],
            gated=ffn["gated"],
            bias=ffn["bias"],
            router_function="softmax_topk",
        )
    host, reason = hosts.choose(moe.host.name, record, shapes)
    print(f"host: {host.name} ({reason})", flush=True)
    ...
