"""Which architecture holds a converted model, and how its parts are named there.

A host is chosen before training, because it fixes the router function that the layers are trained
under. A native one, which transformers has (`native.py`), is preferred; our own (`custom.py`) holds
what none of them can and opens with `trust_remote_code=True`. Every refusal says why; nothing is
approximated. Imports neither torch nor transformers: it reads the dense model's recorded
configuration.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import combinations

from pipeline.errors import ConfigError
from pipeline.hosts.custom import CUSTOM
from pipeline.hosts.interface import Host as Host
from pipeline.hosts.interface import Record, Shapes
from pipeline.hosts.native import NATIVE
from pipeline.shape import MoEShape

EXPERT_CHOICE_CAUTION = (
    "token choice is recommended: where experts choose, whom they take in training depends on the "
    "rest of the batch, later tokens included, and a token that none takes gets zero"
)

REMOTE_CODE = "the checkpoint brings its own modelling file and opens with trust_remote_code=True"

HOSTS: dict[str, Host] = {host.name: host for host in (*NATIVE, CUSTOM)}
"""In the order in which `auto` takes them."""


def can_host(host: Host, record: Record, shapes: Shapes) -> str | None:
    """None when `host` can hold the dense model with these sparse layers, else why not."""
    return host.refusal(record, shapes)


def choose(name: str, record: Record, shapes: Shapes) -> tuple[Host, str]:
    """The host named `name`, or for `auto` the first that can hold the model; and the reason.

    `auto` takes none that would have to pad layers to one width where another can: zeros change
    nothing, but they are stored and run.

    Raises:
        ConfigError: none can; the reason of each is given, and what could be changed.
    """
    candidates = list(HOSTS.values()) if name == "auto" else [HOSTS[name]]
    refusals, padding = {}, {}
    for host in candidates:
        refusals[host.name] = can_host(host, record, shapes)
        if refusals[host.name] is None:
            padding[host] = _padding(host, shapes)
    fitting = [host for host in padding if not padding[host]] or list(padding)
    if fitting:
        told = refusals | {host.name: why for host, why in padding.items()}
        return fitting[0], _reason(fitting[0], name, record, shapes, told)
    raise ConfigError(
        "No architecture can hold this conversion.",
        value=f"moe.host={name}; " + _told(refusals),
        rule="the host can hold the dense model with these sparse layers",
        remedy=_remedy(name, record, shapes),
    )


def padded(name: str, shapes: Shapes) -> dict[int, MoEShape]:
    """The shapes with all neurons that lie in the checkpoint, those of padding among them.

    Args:
        name: of the host; with `auto` no layer is padded to the width of another.
    """
    stored = HOSTS.get(name, CUSTOM).stored(shapes)
    return {k: replace(shape, expert_widths=None) for k, shape in stored.items()}


def _padding(host: Host, shapes: Shapes) -> str | None:
    """What it would have to pad, for layers that differ."""
    stored = host.stored(shapes)
    for width, what in (("d_ff_expert", "experts"), ("d_ff_shared", "shared experts")):
        there = {getattr(shape, width) for shape in stored.values()}
        here = {getattr(shape, width) for shape in shapes.values()}
        if here != there:
            return (
                f"all its layers have one {width}: {what} of {min(here)} would be padded to "
                f"{max(there)} neurons"
            )
    return None


def _reason(
    host: Host, name: str, record: Record, shapes: Shapes, told: Mapping[str, str | None]
) -> str:
    parts = ["configured" if name != "auto" else f"it can hold {record['family']}"]
    before = {other: told[other] for other in list(told)[: list(told).index(host.name)]}
    if host.remote_code:
        parts += [f"no native one can: {_told(before)}"] if before else []
        parts += [REMOTE_CODE]
    else:
        parts += [_told(before)] if before else []
    parts += [why for why in (told[host.name], host.caution) if why]
    if host.router_function != "softmax_topk":
        parts += [f"its router function is {host.router_function}"]
    if any(shape.routing == "expert_choice" for shape in shapes.values()):
        parts += [EXPERT_CHOICE_CAUTION]
    return "; ".join(parts)


def _told(refusals: Mapping[str, str | None]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in refusals.items() if why)


# What could be changed


def _whole(record: Record, shapes: Shapes) -> Shapes:
    like = next(iter(shapes.values()))
    return {
        ffn["index"]: shapes.get(ffn["index"], replace(like, d_ff=ffn["d_ff"]))
        for ffn in record["layers"]
    }


def _alike(record: Record, shapes: Shapes) -> Shapes:
    like = next(iter(shapes.values()))
    return {k: replace(like, d_ff=shape.d_ff) for k, shape in shapes.items()}


def _each(**changes: object) -> Callable[[Record, Shapes], Shapes]:
    def changed(record: Record, shapes: Shapes) -> Shapes:
        return {k: replace(shape, **changes) for k, shape in shapes.items()}  # pyright: ignore

    return changed


def _without_compensation(record: Record, shapes: Shapes) -> Shapes:
    dense = {ffn["index"]: ffn["bias"] for ffn in record["layers"]}
    return {k: replace(shape, bias=dense[k]) for k, shape in shapes.items()}


CHANGES: dict[str, Callable[[Record, Shapes], Shapes]] = {
    "moe.shared_expert=0": _each(d_ff_shared=0),
    "moe.balance_bias=false": _each(balance_bias=False),
    "moe.router=linear": _each(router_width=0),
    "moe.routing=token_choice": _each(routing="token_choice", capacity_factor=None),
    "moe.mean_compensation=false": _without_compensation,
    "all layers in model.layers": _whole,
    "layers alike (moe.per_layer, moe.budget.by)": _alike,
}


def _remedy(name: str, record: Record, shapes: Shapes) -> str:
    """The hosts that can as it is, and the least changes with which others could."""
    able = [other for other, host in HOSTS.items() if can_host(host, record, shapes) is None]
    meant = list(HOSTS) if name == "auto" else [name]
    offers = [f"moe.host={able[0]} can as it is"] if able else []
    for count in (1, 2):
        found = []
        for names in combinations(CHANGES, count):
            changed = shapes
            for change in names:
                changed = CHANGES[change](record, changed)
            able = [other for other in meant if can_host(HOSTS[other], record, changed) is None]
            found += [f"with {' and '.join(names)} {able[0]} can"] if able else []
        if found:
            offers += found
            break
    offers = offers or ["convert another model"]
    return "; ".join(offers) + "; `python -m pipeline inspect <model>` says what can host it"


# The model as a whole


def explain(record: Record) -> dict[str, str]:
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
    return {
        name: can_host(host, record, shapes) or "; ".join(["yes", *_notes(host)])
        for name, host in HOSTS.items()
    }


def _notes(host: Host) -> list[str]:
    notes = [REMOTE_CODE] if host.remote_code else []
    if host.router_function != "softmax_topk":
        notes += [f"its router function is {host.router_function}"]
    return notes + ([host.caution] if host.caution else [])
