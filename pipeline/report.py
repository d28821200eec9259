"""The report of one conversion: a page that needs nothing beside it, its tables, a model card.

Pictures are inline SVG whose text takes the page's colour, so that they follow light and dark.
Equal figures give equal bytes: no clock, no random identifiers.
"""

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib as mpl
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from pipeline import workdir
from pipeline.config import Host
from pipeline.record import spans
from pipeline.shape import MoEShape

INK = "#123456"  # stands for the page's own text colour until the SVG is inlined
DENSE, SPARSE = "#8a8f98", "#2f7ed8"
# The page is HTML: it needs no namespaces, and matplotlib's group names repeat in each picture.
NOT_NEEDED = re.compile(r' xmlns(:\w+)?="[^"]*"| id="[A-Za-z0-9.]+_\d+"')
ROUTING = (
    "experts_per_token",
    "unserved_tokens",
    "load_max_over_mean",
    "load_entropy",
    "dead_experts",
)
MOST_PANELS = 12  # layers whose experts' widths are drawn
LINES = ("#2f7ed8", "#e4572e", "#3aa655", "#a05195", "#d4a017", "#17a2b8", "#8c564b", "#e377c2")

mpl.use("agg")
mpl.rcParams.update(
    {
        "svg.fonttype": "none",
        "svg.hashsalt": "report",
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "savefig.transparent": True,
    }
)


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `metrics.json`, `report.html`, `README.md` (the model card), `summary.txt`, tables.

    Args:
        content: `name`, `settings` (of the evaluation), `manifests` (by artefact), `left_dense`
            (indices of the layers that kept their FFN), and all that `evaluation.measure` returns.
    """
    rows = layer_rows(content["metrics"]["layers"])
    shown = {**content, **_derived(content), "layer_rows": rows}
    workdir.write_json(folder / "metrics.json", content["metrics"])
    workdir.write_json(folder / "layers.json", rows)
    page = _environment(autoescape=True).get_template("report.html.j2")
    html = page.render(shown, pictures=pictures(content, shown["resized"]))
    (folder / "report.html").write_text(html, encoding="utf-8")
    for template, name in (("card.md.j2", "README.md"), ("summary.txt.j2", "summary.txt")):
        text = _environment(autoescape=False).get_template(template).render(shown)
        (folder / name).write_text(text, encoding="utf-8")
    history = [{"layer": k} | row for k, of in content["history"].items() for row in of]
    for name, table in (("layers.csv", rows), ("history.csv", history)):
        (folder / name).write_text(_csv(table), encoding="utf-8")


def _environment(autoescape: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("pipeline"),
        undefined=StrictUndefined,
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": _number,
        "percent": lambda share: f"{100 * share:.1f} %",
        "times": lambda ratio: f"{ratio:.3g}x",
        "spans": spans,
    }
    return environment


def _derived(content: Mapping[str, Any]) -> dict[str, Any]:
    """What the pages show of the layers' records and of the artefacts' manifests."""
    layers, manifests, metrics = content["layers"], content["manifests"], content["metrics"]
    shapes = {k: MoEShape(**layer["shape"]) for k, layer in layers.items()}
    tokens = {name: count["tokens"] for name, count in content["tokens"].items()}
    host, good = next(iter(layers.values()))["host"], metrics["good_layers"]
    encoder = "embedding_cosine" in metrics
    native = host != Host.custom.name
    settings: dict[str, Any] = dict(content["settings"])
    for manifest in manifests.values():
        settings |= manifest["settings"]
    return {
        "host": host,
        "encoder": encoder,
        "auto_class": "AutoModel" if encoder else "AutoModelForCausalLM",
        "native": native,
        "most_experts": max(len(m["routing"]["load"]) for m in metrics["layers"].values()),
        "by_shape": _by_shape(shapes),
        "budgets": _budgets(layers),
        "healed": next(iter(layers.values())).get("healing"),
        "resized": _resized(layers, shapes),
        "warnings": _warnings(layers),
        "unserved": _most_unserved(metrics["layers"], shapes),
        "verdicts": f"{good['good']} of {good['of']} layers good: cosine above "
        f"{good['cosine_above']:g}.",
        "compared": {"sparse": metrics, **metrics["controls"]},
        "against_static": _against_static(metrics),
        "no_static": "" if metrics["active_ffn_fraction"] < 1 else "; as much is run as in it",
        "trust": "" if native else ", trust_remote_code=True",
        "most_panels": MOST_PANELS,
        "routing_names": list(ROUTING),
        "judged_of": ", ".join(
            f"the first {judged:,} of {tokens[name]:,} tokens of {name}"
            for name, judged in metrics["judged_tokens"].items()
            if judged < tokens[name]
        ),
        "settings": dict(sorted(settings.items())),
        "versions": manifests["convert"]["versions"],
        "revision": manifests["dense"]["settings"]["model.revision"],
    }


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
    said = f"{said} {static:.3f}"
    if ratio >= static:
        return f"{said} where the sparse model has {ratio:.3f}: here the router is worth nothing."
    lost = (ratio - 1) / (static - 1)
    return f"{said}; the sparse model loses {lost:.0%} of what that loses."


def _lost(ours: float, static: float) -> str:
    if ours >= static:
        return "here the router is worth nothing."
    return f"it loses {ours / static:.0%} of what that loses."


def _by_shape(shapes: Mapping[int, MoEShape]) -> list[dict[str, Any]]:
    """One row for each distinct shape, in the order of its first layer."""
    return [
        {
            "configuration": _configuration(shape),
            "shape": shape,
            "layers": [k for k, other in shapes.items() if other == shape],
        }
        for shape in dict.fromkeys(shapes.values())
    ]


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


def layer_rows(layers: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One flat row per layer, in order."""
    names = ("mse", "relative_mse", "cosine_sim", "cosine_sim_p5")
    return [
        {"layer": int(k), "verdict": layers[k]["verdict"]}
        | {name: layers[k][name] for name in names}
        | {f"first_token_{name}": layers[k]["first_token"][name] for name in names[1:3]}
        | {"active_ffn_fraction": layers[k]["active_ffn_fraction"]}
        | {name: layers[k]["routing"][name] for name in ROUTING}
        for k in sorted(layers, key=int)
    ]


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    names = {name: None for row in rows for name in row}
    writer = csv.DictWriter(text, fieldnames=list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _number(value: float | None) -> str:
    """For people: 1,234,567; 12.345; 0.01230; a dash where the figure is null."""
    if value is None:
        return "\u2013"
    if isinstance(value, int):
        return f"{value:,}"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:#.4g}" if abs(value) < 1 else f"{value:.3f}"


# Pictures


def pictures(
    content: Mapping[str, Any], resized: Mapping[int, Mapping[str, Any]]
) -> dict[str, str]:
    """Name -> SVG, as it stands in the page; `widths` only where experts were `resized`.

    The first is of perplexities, or of an encoder's embeddings.
    """
    metrics, history = content["metrics"], content["history"]
    layers = {int(k): m for k, m in metrics["layers"].items()}
    rows = min(max(len(layers), 3), 16)  # room for the scale's name, and no taller than a screen
    encoder = "embedding_cosine" in metrics
    whole = {"embeddings": _embeddings} if encoder else {"perplexity": _perplexity}
    drawn = {
        **{n: _drawn(lambda ax, draw=d: draw(ax, metrics), width=3.8) for n, d in whole.items()},
        "cosine": _drawn(lambda ax: _per_layer(ax, layers, "cosine_sim", "cosine_sim_p5")),
        "error": _drawn(lambda ax: _per_layer(ax, layers, "relative_mse")),
        "training": _drawn(lambda ax: _training(ax, history), width=5.6),
        "load": _drawn(lambda ax: _load(ax, layers), width=5.6, height=1.1 + 0.22 * rows),
    }
    if resized:
        shown = dict(sorted(resized.items())[:MOST_PANELS])
        columns = min(3, len(shown))
        rows = -(-len(shown) // columns)
        drawn["widths"] = _drawn(
            lambda axes: _widths(axes.flat, shown),
            width=1.2 + 1.9 * columns,
            height=0.5 + 1.5 * rows,
            grid={"nrows": rows, "ncols": columns, "sharey": True, "squeeze": False},
        )
    return drawn


def _drawn(
    draw: Callable[[Any], None],
    width: float = 4.6,
    height: float = 2.6,
    grid: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """`draw` gets the axes: one, or a `grid` of them."""
    figure = Figure(figsize=(width, height), layout="constrained")
    draw(figure.subplots(**grid))
    out = io.StringIO()
    described = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(out, format="svg", metadata=described)
    svg = out.getvalue()
    return NOT_NEEDED.sub("", svg[svg.index("<svg") :]).replace(INK, "currentColor")


def _perplexity(ax: Axes, metrics: Mapping[str, Any]) -> None:
    texts = list(metrics["perplexity_ratio"])
    for offset, name, colour in ((-0.2, "dense", DENSE), (0.2, "sparse", SPARSE)):
        values = [metrics[name]["perplexity"][text] for text in texts]
        bars = ax.bar([i + offset for i in range(len(texts))], values, 0.38, color=colour)
        ax.bar_label(bars, fmt="%.1f", padding=2)
        bars.set_label(name)
    ax.set_xticks(range(len(texts)), texts)
    ax.set_ylabel("perplexity")
    ax.margins(y=0.12)
    _legend(ax)


def _embeddings(ax: Axes, metrics: Mapping[str, Any]) -> None:
    found = {"sparse": metrics, **metrics["controls"]}
    texts, width = list(metrics["embedding_cosine"]), 0.8 / len(found)
    for i, ((name, of), colour) in enumerate(zip(found.items(), LINES, strict=False)):
        values = [of["embedding_cosine"][text] for text in texts]
        at = [place - 0.4 + width * (i + 0.5) for place in range(len(texts))]
        bars = ax.bar(at, values, 0.95 * width, color=colour, label=name)
        ax.bar_label(bars, fmt="%.3f", padding=2)
    ax.set_xticks(range(len(texts)), texts)
    ax.set_ylabel("cosine with the dense embedding")
    ax.margins(y=0.12)
    _legend(ax, ncols=3)


def _per_layer(ax: Axes, layers: Mapping[int, Mapping[str, Any]], *names: str) -> None:
    for name, colour in zip(names, (SPARSE, DENSE), strict=False):
        values = [float("nan") if m[name] is None else m[name] for m in layers.values()]
        ax.plot(list(layers), values, "o-", color=colour, label=name, markersize=4)
    ax.set_xticks(_ticks(layers))
    ax.set_xlabel("layer")
    ax.set_ylabel(names[0])
    if len(names) > 1:
        _legend(ax)


def _training(ax: Axes, history: Mapping[int, Sequence[Mapping[str, float]]]) -> None:
    """Lines with a name each; of many layers, lines in the colour of their depth."""
    named = len(history) <= len(LINES)
    shades = mpl.colormaps["viridis"].resampled(len(history))
    for i, (layer, rows) in enumerate(sorted(history.items())):
        steps = [row["step"] for row in rows]
        errors = [row["validation_relative_mse"] for row in rows]
        style = "o-" if len(rows) == 1 else "-"
        colour = LINES[i] if named else shades(i)
        ax.plot(steps, errors, style, color=colour, linewidth=1.2, label=f"layer {layer}")
    ax.set_xlabel("step")
    ax.set_ylabel("relative_mse on validation")
    if named:
        _legend(ax, ncols=4)
    else:
        scale = ScalarMappable(Normalize(min(history), max(history)), "viridis")
        ax.figure.colorbar(scale, ax=ax, label="layer", aspect=30)


def _widths(panels: Iterable[Axes], resized: Mapping[int, Mapping[str, Any]]) -> None:
    """A line per expert, in the colour of its index."""
    panels = list(panels)
    for ax, (layer, of) in zip(panels, resized.items(), strict=False):
        steps = [row["step"] for row in of["sizes"]]
        end = max(of["steps"], steps[-1])
        experts = list(zip(*(row["widths"] for row in of["sizes"]), strict=True))
        shades = mpl.colormaps["viridis"].resampled(len(experts))
        for e, widths in enumerate(experts):
            path = {"drawstyle": "steps-post", "color": shades(e), "linewidth": 1.2}
            ax.plot([*steps, end], [*widths, widths[-1]], **path)
        ax.axvline(of["best_step"], color=INK, linestyle="--", linewidth=0.8)
        ax.set_title(f"layer {layer}", fontsize=9)
        ax.set_xlabel("step")
    for ax in panels[len(resized) :]:
        ax.set_axis_off()
    panels[0].set_ylabel("neurons of an expert")


def _load(ax: Axes, layers: Mapping[int, Mapping[str, Any]]) -> None:
    loads = [m["routing"]["load"] for m in layers.values()]
    widest = max(map(len, loads))
    shares = [
        [s * len(load) for s in load] + [float("nan")] * (widest - len(load)) for load in loads
    ]
    image = ax.imshow(shares, aspect="auto", cmap="viridis", vmin=0)
    rows = _ticks(range(len(layers)))
    ax.set_yticks(rows, [str(list(layers)[i]) for i in rows])
    ax.set_xticks(_ticks(range(widest)))
    ax.set_xlabel("expert")
    ax.set_ylabel("layer")
    ax.figure.colorbar(image, ax=ax, label="load / even load", aspect=30)


def _legend(ax: Axes, ncols: int = 2) -> None:
    """Above the picture, where nothing is drawn."""
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, ncols=ncols)


def _ticks(values: Iterable[int]) -> list[int]:
    """At most a dozen of them."""
    values = list(values)
    return values[:: -(-len(values) // 12)]
