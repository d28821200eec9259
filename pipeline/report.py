"""The report of one conversion: a page that needs nothing beside it, its tables, a model card.

Equal figures give equal bytes: no clock, no random identifiers.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import card, charts, cost, durable, hosts
from pipeline.figures import headline
from pipeline.pages import render
from pipeline.shape import MoEShape

NOTHING = 1e-4
"""Plain pruning that loses less, as a share of perplexity or cosine, loses nothing."""
ROUTING = (
    "experts_per_token",
    "unserved_tokens",
    "load_max_over_mean",
    "load_entropy",
    "dead_experts",
)
WEIGHT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
WORK = {
    "prefill_1": "reading one sequence",
    "prefill_16": "reading 16 sequences at once",
    "decode": "writing one token after the other",
}
"""The kinds of work that `pipeline.speed` times, in words."""


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `metrics.json`, `report.html`, `README.md` (the model card), `summary.txt`, tables.

    Args:
        content: `name`, `manifests` (by artefact), `left_dense` (indices of the layers that kept
            their FFN), `record` (of the dense model), `licence` (of its card), `sizes`
            (`captured_tokens`, `train_tokens` of them, `store_bytes`, `checkpoint_bytes`), `speed`
            (of `speed.compare`, or nothing), `settings` (of the evaluation), and all that
            `evaluation.measure` returns.
    """
    metrics, speed, history = content["metrics"], content["speed"], content["history"]
    rows = layer_rows(metrics)
    shown = {**content, **_derived(content), "layer_rows": rows}
    durable.write_json(folder / "metrics.json", metrics)
    durable.write_json(folder / "headline.json", headline(metrics, speed))
    durable.write_json(folder / "layers.json", rows)
    if speed:
        durable.write_json(folder / "speed.json", speed)
    drawn = charts.draw(content, shown["resized"])
    texts = {
        "report.html": render("report.html.j2", {**shown, "pictures": drawn}),
        "README.md": card.text(shown),
        "summary.txt": render("summary.txt.j2", shown),
        "layers.csv": _csv(rows),
        "history.csv": _csv([{"layer": k} | row for k, of in history.items() for row in of]),
        "load.csv": _csv(_loads(metrics["layers"])),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _derived(content: Mapping[str, Any]) -> dict[str, Any]:
    """What the pages show of the layers' records and of the artefacts' manifests."""
    layers, manifests, metrics = content["layers"], content["manifests"], content["metrics"]
    shapes = {k: MoEShape(**layer["shape"]) for k, layer in layers.items()}
    tokens = {name: count["tokens"] for name, count in content["tokens"].items()}
    host, good = next(iter(layers.values()))["host"], metrics["good_layers"]
    encoder = "embedding_cosine" in metrics
    settings = card.merged({"evaluate": content, **manifests})
    biased = {ffn["index"]: ffn["bias"] for ffn in content["record"]["layers"]}
    dense = {k: replace(s, bias=biased[k]).dense_parameters for k, s in shapes.items()}
    return {
        "host": host,
        "encoder": encoder,
        "source": settings["model.id"] or settings["model.name"],
        **card.opening(host, encoder),
        "most_experts": max(len(m["routing"]["load"]) for m in metrics["layers"].values()),
        "by_shape": [
            {**row, "configuration": _configuration(row["shape"])}
            | {"dense_parameters": dense[row["layers"][0]]}
            for row in card.by_shape(layers)
        ],
        "budgets": _budgets(layers),
        "healed": next(iter(layers.values())).get("healing"),
        "resized": _resized(layers, shapes),
        "warnings": _warnings(layers),
        "unserved": _most_unserved(metrics["layers"], shapes),
        "verdicts": f"{good['good']} of {good['of']} layers good: cosine above "
        f"{good['cosine_above']:g}.",
        "compared": {"sparse": metrics, **metrics["controls"]},
        "against_static": _against_static(metrics),
        "unpruned": _unpruned(content) if "static" in metrics["controls"] else [],
        "no_static": "" if metrics["active_ffn_fraction"] < 1 else "; as much is run as in it",
        "most_panels": charts.MOST_PANELS,
        "routing_names": list(ROUTING),
        "judged_of": ", ".join(
            f"the first {judged:,} of {tokens[name]:,} tokens of {name}"
            for name, judged in metrics["judged_tokens"].items()
            if judged < tokens[name]
        ),
        "settings": settings,
        "versions": manifests["convert"]["versions"],
        "ffn": {
            "dense": sum(dense.values()),
            "total": sum(s.total_parameters for s in hosts.padded(host, shapes).values()),
            "active": sum(s.active_parameters for s in shapes.values()),
        },
        "cost": _cost(content, shapes, settings),
        "said": _said(content["samples"]),
        "speed_rows": _speed_rows(content["speed"]),
        "speed_where": _speed_where(content["speed"]),
    }


def _cost(
    content: Mapping[str, Any], shapes: Mapping[int, MoEShape], settings: Mapping[str, Any]
) -> dict[str, float]:
    """FLOPs, tokens and bytes, from sizes and records; nothing is timed."""
    parameters, sizes = content["metrics"]["dense"]["parameters"], content["sizes"]
    batch = settings.get("train.batch_size", 0)
    trained = {k: content["layers"][k]["training"]["steps"] * batch for k in shapes}
    controlled = "static" in content["metrics"]["controls"]
    alone = set(_unpruned(content)) if controlled else set(shapes)
    healing = next(iter(content["layers"].values())).get("healing", {}).get("tokens", 0)
    active = content["metrics"]["sparse"]["parameters"]["active"]
    return {
        **sizes,
        "dense_bytes": parameters * WEIGHT_BYTES[content["record"]["dtype"]],
        "capture_flops": 2 * parameters * sizes["captured_tokens"],
        "start_flops": _start_flops(content["layers"], sizes["train_tokens"], controlled),
        # 2 for multiply and add, 3 for forward and both halves of backward
        "training_flops": sum(
            (6 if k in alone else 12) * n * shapes[k].active_parameters for k, n in trained.items()
        ),
        "trained_tokens": sum(trained.values()),
        "healing_tokens": healing,
        "healing_flops": (1 + controlled) * (2 * parameters + 6 * active) * healing,
    }


def _unpruned(content: Mapping[str, Any]) -> list[int]:
    """The layers whose static control is the dense FFN: as much is run as in it."""
    return [k for k, layer in content["layers"].items() if not cost.control(_begun(layer))]


def _start_flops(layers: Mapping[int, Mapping[str, Any]], rows: int, controlled: bool) -> float:
    """Of the untrained layers' making, and where controlled of their static controls'."""
    fits = []
    for layer in layers.values():
        shape = _begun(layer)
        fits += [(shape, layer["init"])]
        fits += [(static, "specialist") for static in cost.control(shape) if controlled]
    return sum(cost.start_flops(shape, init, rows) for shape, init in fits)


def _begun(layer: Mapping[str, Any]) -> MoEShape:
    """The shape before training: dynamic experts grew and shrank since."""
    shape, training = MoEShape(**layer["shape"]), layer["training"]
    if "sizes" not in training:
        return shape
    return replace(shape, d_ff_expert=max(training["sizes"][0]["widths"]), expert_widths=None)


def _said(samples: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Each side's text, parted where the two begin to differ."""
    texts = list(samples.values())
    if not texts:
        return {}
    pairs = zip(*texts, strict=False)
    alike = next((i for i, pair in enumerate(pairs) if len(set(pair)) > 1), min(map(len, texts)))
    return {side: (text[:alike], text[alike:]) for side, text in samples.items()}


def _speed_rows(speed: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"name": name, "what": WORK[name], "verdict": _faster(of), **of}
        for name, of in speed.get("work", {}).items()
    ]


def _faster(of: Mapping[str, float]) -> str:
    """In a word, by the spread and not by the median alone."""
    if of["least"] > 1:
        return "faster"
    return "slower" if of["most"] < 1 else "no clear difference"


def _speed_where(speed: Mapping[str, Any]) -> str:
    if not speed:
        return ""
    threads = f", {speed['threads']} thread{'s' * (speed['threads'] > 1)}"
    return f"{speed['device']}{threads if speed['device'] == 'cpu' else ''}, {speed['dtype']}"


def _against_static(metrics: Mapping[str, Any]) -> str:
    """What the comparison with plain pruning says, in one sentence."""
    if "static" not in metrics["controls"]:
        return ""
    said = "Plain pruning to the same active size, refitted and trained alike, has"
    if "embedding_cosine" in metrics:
        ours, static = (
            1 - of["embedding_cosine"]["heldout"] for of in (metrics, metrics["controls"]["static"])
        )
        return (
            f"{said} an embedding cosine of {1 - static:.4f} where the sparse model has "
            f"{1 - ours:.4f}: {_lost(ours, static)}"
        )
    ratio = metrics["perplexity_ratio"]["heldout"]
    static = metrics["controls"]["static"]["perplexity_ratio"]["heldout"]
    said = f"{said} {static:.3f} times the dense perplexity"
    return f"{said} where the sparse model has {ratio:.3f}: {_lost(ratio - 1, static - 1)}"


def _lost(ours: float, static: float) -> str:
    if max(ours, static) < NOTHING:
        return "neither loses anything that can be told apart, so that this says nothing."
    if ours >= static:
        return "here the router is worth nothing."
    return f"it loses {max(ours, 0) / static:.0%} of what that loses."


def _budgets(layers: Mapping[int, Mapping[str, Any]]) -> dict[str, Any] | None:
    """What was chosen for each layer by KL and what it cost there; null where nothing was."""
    chosen = {k: layer["budget"] for k, layer in layers.items() if "budget" in layer}
    if not chosen:
        return None
    rows = [
        {"layer": k, "chosen": of["chosen"]}
        | {"kl": of["kl"][of["chosen"]], "uniform_kl": of["kl"][of["configured"]]}
        for k, of in chosen.items()
    ]
    first = next(iter(chosen.values()))
    summed = {name: sum(row[name] for row in rows) for name in ("kl", "uniform_kl")}
    return {"vary": first["vary"], "configured": first["configured"], "rows": rows} | summed


def _configuration(shape: MoEShape) -> str:
    """For example `d_ff_expert=0.125 (64), n=16, top-2`."""
    narrowest, widest = min(shape.widths), max(shape.widths)
    if narrowest == widest:
        width = f"{widest / shape.d_ff:.4g} ({widest})"
    else:
        width = f"{narrowest} to {widest}, mean {sum(shape.widths) / shape.n_experts:.4g}"
    chosen = f"top-{shape.top_k}"
    if shape.capacity_factor is not None:
        chosen = f"expert choice at capacity {shape.capacity_factor:g}"
    router = f", MLP router of {shape.router_width}" if shape.router_width else ""
    bias = ", balance bias" if shape.balance_bias else ""
    shared = f", shared expert of {shape.d_ff_shared}" if shape.d_ff_shared else ""
    return f"d_ff_expert={width}, n={shape.n_experts}, {chosen}{shared}{router}{bias}"


def _resized(
    layers: Mapping[int, Mapping[str, Any]], shapes: Mapping[int, MoEShape]
) -> dict[int, dict[str, Any]]:
    """Layers of dynamic experts: the `sizes` over training, and the widths that were `kept`."""
    return {
        k: {"sizes": layer["training"]["sizes"], "kept": shapes[k].widths}
        | {name: layer["training"][name] for name in ("steps", "best_step")}
        for k, layer in layers.items()
        if "sizes" in layer["training"]
    }


def _warnings(layers: Mapping[int, Mapping[str, Any]]) -> dict[str, list[int]]:
    """What training warned of, and in which layers."""
    found: dict[str, list[int]] = {}
    for k, layer in layers.items():
        for text in layer["training"]["warnings"]:
            found.setdefault(text, []).append(k)
    return found


def _most_unserved(
    layers: Mapping[str, Mapping[str, Any]], shapes: Mapping[int, MoEShape]
) -> dict[str, Any] | None:
    """The layer in which most tokens found no expert; null where tokens choose."""
    shares = {
        k: layers[str(k)]["routing"]["unserved_tokens"]
        for k, shape in shapes.items()
        if shape.routing == "expert_choice"
    }
    if not shares:
        return None
    most = max(shares, key=shares.__getitem__)
    return {"layer": most, "share": shares[most]}


def layer_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One flat row per layer, in order; the controls' errors last, null where there is none."""
    names = ("mse", "relative_mse", "cosine_sim", "cosine_sim_p5")
    layers, controls = metrics["layers"], metrics["controls"]
    return [
        {"layer": int(k), "verdict": layers[k]["verdict"]}
        | {name: layers[k][name] for name in names}
        | {f"first_token_{name}": layers[k]["first_token"][name] for name in names[1:3]}
        | {"active_ffn_fraction": layers[k]["active_ffn_fraction"]}
        | {name: layers[k]["routing"][name] for name in ROUTING}
        | {
            f"{control}_{name}": controls[control]["layers"][k][name]
            if control in controls
            else None
            for control in ("static", "oracle")
            for name in names[1:3]
        }
        for k in sorted(layers, key=int)
    ]


def _loads(layers: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each expert its share of the choices, over an even share."""
    return [
        {"layer": int(k), "expert": e, "load": share * len(layers[k]["routing"]["load"])}
        for k in sorted(layers, key=int)
        for e, share in enumerate(layers[k]["routing"]["load"])
    ]


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    names = {name: None for row in rows for name in row}
    writer = csv.DictWriter(text, fieldnames=list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
