"""Each layer's sparse shape and the host of them all, decided before anything is trained.

Uniform: every layer gets what `moe` says, resolved against its own d_ff, but for what
`moe.per_layer` says otherwise. By KL: one setting may differ between layers. What each of its
candidates loses in each layer is measured (`sensitivity.py`), and of all the ways to give every
layer one candidate at no more than the uniform cost, the one with the least sum is taken.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from pipeline import hosts
from pipeline.config import BudgetVary, LayerMoEConfig, MoEConfig, Router, Routing
from pipeline.errors import ConfigError
from pipeline.record import check_layers
from pipeline.runtime import tell
from pipeline.shape import (
    MoEShape,
    check_dynamic,
    check_start,
    check_virtual_groups,
    resolve_d_ff_expert,
    resolve_init,
    resolve_shared_expert,
)

Plans = dict[int, dict[str, Any]]
"""What the `budget` stage writes for each layer: `layer`, `shape`, `init`, `host`."""


def uniform(record: Mapping[str, Any], moe: MoEConfig, layers: Sequence[int]) -> Plans:
    """The plans of layers that have all the same but for `moe.per_layer`.

    Args:
        record: of the dense model, `stages/dense/dense.json`.

    Raises:
        ConfigError: sizes that do not fit the model, or no host for what is asked.
        InputError: a layer that the model does not have.
    """
    check_layers(list(layers), record["n_layers"])
    return _plans(record, moe, {k: _entry(moe, k) for k in sorted(layers)})


def shapes(record: Mapping[str, Any], moe: MoEConfig, layers: Sequence[int]) -> dict[int, MoEShape]:
    """The sizes alone of `uniform`, before any host is asked; raises as it does."""
    check_layers(list(layers), record["n_layers"])
    found = {k: _shape(record, moe, k, _entry(moe, k)) for k in sorted(layers)}
    for shape in found.values():
        _init(moe, shape)
    return found


@dataclass(frozen=True)
class Candidate:
    """One value of the varied setting in one layer."""

    entry: LayerMoEConfig  # of moe.per_layer that would say so
    plan: dict[str, Any]  # `layer`, `shape`, `init`
    cost: Fraction  # neurons run per token, or parameters of experts and router


Options = dict[int, dict[str, Candidate]]
"""Layer -> value, as JSON -> its candidate, the cheapest first."""


def candidates(record: Mapping[str, Any], moe: MoEConfig, layers: Sequence[int]) -> Options:
    """What each layer may have: the configured value and every one of `moe.budget.candidates`.

    A layer whose entry in `moe.per_layer` names the varied setting keeps that and has none here.
    Of values that give one layer the same shape, the first stands for all.

    Raises:
        ConfigError: a candidate does not fit the model; nothing is left to choose; or no host could
            hold layers that differ.
        InputError: a layer that the model does not have.
    """
    check_layers(list(layers), record["n_layers"])
    name = moe.budget.vary.name
    options: Options = {}
    for k in sorted(layers):
        entry = _entry(moe, k)
        if getattr(entry, name) is not None:
            continue
        entries = {json.dumps(getattr(moe, name)): entry}
        for value in moe.budget.candidates:
            entries.setdefault(json.dumps(value), replace(entry, **{name: value}))
        found: dict[str, Candidate] = {}
        for label, other in entries.items():
            candidate = _candidate(record, moe, k, label, other)
            if all(candidate.plan != known.plan for known in found.values()):
                found[label] = candidate
        options[k] = dict(sorted(found.items(), key=lambda item: item[1].cost))
    host = _check_choice(record, moe, layers, options)
    for of in options.values():
        for candidate in of.values():
            candidate.plan["shape"]["router_function"] = host.router_function
    return options


def by_kl(
    record: Mapping[str, Any],
    moe: MoEConfig,
    layers: Sequence[int],
    options: Options,
    kls: Mapping[int, Mapping[str, float]],
) -> Plans:
    """The plans with the least summed KL at no more than the uniform cost.

    Each varied layer's gains `budget`: `by`, `vary`, `configured`, `chosen`, and `kl` and `cost` by
    value.

    Args:
        options: as `candidates` gives them.
        kls: of each, as `sensitivity.measure` gives them: nats per token.
    """
    name = moe.budget.vary.name
    configured = json.dumps(getattr(moe, name))
    rows = [
        [(candidate.cost, kls[k][label]) for label, candidate in of.items()]
        for k, of in options.items()
    ]
    spent = sum((of[configured].cost for of in options.values()), Fraction())
    labels = [list(of)[i] for of, i in zip(options.values(), allocate(rows, spent), strict=True)]
    chosen = dict(zip(options, labels, strict=True))
    entries = {k: _entry(moe, k) for k in sorted(layers)}
    plans = _plans(record, moe, entries | {k: options[k][c].entry for k, c in chosen.items()})
    for k, label in chosen.items():
        plans[k]["budget"] = {
            "by": "kl",
            "vary": name,
            "configured": configured,
            "chosen": label,
            "kl": {other: kls[k][other] for other in options[k]},
            "cost": {other: float(c.cost) for other, c in options[k].items()},
        }
        print(f"layer {k}: {name}={label}, KL {kls[k][label]:.4g}", flush=True)
    return plans


def allocate(
    options: Sequence[Sequence[tuple[Fraction, float]]], most: Fraction
) -> tuple[int, ...]:
    """One option, (cost, loss), of each layer: the least summed loss at a summed cost of `most`.

    Exact, by dynamic programming over the layers: of all choices for the first ones only those
    are kept than which none is both cheaper and better. Of equal losses the cheapest, and of
    equal costs the first, is taken. Some choice must be affordable.
    """
    least = [min(cost for cost, _ in row) for row in options]
    kept: list[tuple[Fraction, float, tuple[int, ...]]] = [(Fraction(), 0.0, ())]
    for n, row in enumerate(options):
        left = most - sum(least[n + 1 :])
        longer = sorted(
            (spent + cost, lost + loss, (*chosen, i))
            for spent, lost, chosen in kept
            for i, (cost, loss) in enumerate(row)
            if spent + cost <= left
        )
        kept = []
        for choice in longer:
            if not kept or choice[1] < kept[-1][1]:
                kept.append(choice)
    return kept[-1][2]


def _entry(moe: MoEConfig, layer: int) -> LayerMoEConfig:
    """What the layer has otherwise."""
    return next(
        (other for other in moe.per_layer if layer in other.layers), LayerMoEConfig([layer])
    )


def _candidate(
    record: Mapping[str, Any], moe: MoEConfig, layer: int, label: str, entry: LayerMoEConfig
) -> Candidate:
    try:
        shape = _shape(record, moe, layer, entry)
        init = _init(moe, shape)
    except ConfigError as error:
        raise ConfigError(
            f"Layer {layer} cannot have moe.{moe.budget.vary.name}={label}: {error.what}",
            value=error.value,
            rule=f"every value of moe.budget.candidates fits every layer; {error.rule}",
            remedy=f"correct moe.budget.candidates; {error.remedy}",
        ) from None
    cost = Fraction(shape.total_parameters)
    if moe.budget.vary is not BudgetVary.n_experts:
        cost = shape.d_ff_shared + Fraction(shape.experts_per_token) * shape.d_ff_expert
    return Candidate(entry, {"layer": layer, "shape": asdict(shape), "init": init}, cost)


def _check_choice(
    record: Mapping[str, Any], moe: MoEConfig, layers: Sequence[int], options: Options
) -> hosts.Host:
    """The host of layers that differ as far as they can: told before the work, not after it."""
    name = moe.budget.vary.name
    configured = json.dumps(getattr(moe, name))
    costs = [(c.cost, of[configured].cost) for of in options.values() for c in of.values()]
    cheaper, dearer = any(c < own for c, own in costs), any(c > own for c, own in costs)
    if len(options) < 2 or not cheaper or not dearer:
        raise ConfigError(
            "There is nothing to choose between layers.",
            value=f"{len(options)} layers without a moe.{name} of their own, "
            f"moe.{name}={configured}, moe.budget.candidates={moe.budget.candidates}",
            rule="moe.budget.by=kl needs two such layers, and candidates on both sides of the "
            "configured value: what one layer gains another has to give",
            remedy="add a smaller and a larger candidate, or set moe.budget.by=uniform",
        )
    unlike = {k: next(iter(of.values())).entry for k, of in options.items()}
    first, of = next(iter(options.items()))
    unlike[first] = list(of.values())[-1].entry
    entries = {k: _entry(moe, k) for k in sorted(layers)} | unlike
    shapes = {k: _shape(record, moe, k, entry) for k, entry in entries.items()}
    return hosts.choose(moe.host.name, record, shapes)[0]


def _plans(
    record: Mapping[str, Any], moe: MoEConfig, entries: Mapping[int, LayerMoEConfig]
) -> Plans:
    shapes = {k: _shape(record, moe, k, entry) for k, entry in entries.items()}
    host, reason = hosts.choose(moe.host.name, record, shapes)
    tell("host", host.name, reason)
    plans = {}
    for layer, shape in shapes.items():
        init = _init(moe, shape)
        hosted = replace(shape, router_function=host.router_function)
        plans[layer] = {"layer": layer, "shape": asdict(hosted), "init": init, "host": host.name}
    return plans


def _init(moe: MoEConfig, shape: MoEShape) -> str:
    """How the layer starts; `ConfigError` where its sizes do not allow what is asked."""
    init = resolve_init(moe.init.name, moe.init_from_dense, shape.d_ff_routed, shape.d_ff_expert)
    check_start(shape, init)
    if moe.virtual_groups:
        check_virtual_groups(shape, init, moe.router_init.name)
    if moe.dynamic.enabled:
        check_dynamic(shape, moe.dynamic.min_d_ff, moe.dynamic.max_d_ff)
    return init


def _shape(record: Mapping[str, Any], moe: MoEConfig, layer: int, own: LayerMoEConfig) -> MoEShape:
    ffn = record["layers"][layer]
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
