"""The report's pictures: SVG that stands in the page and takes its colours from the page's style.

Text is text in the reader's own font. Colours are the page's variables (`--ink`, `--c1` ...), so
that light, dark and print each have their own. Who is who is told by mark and dash as well.
"""

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

# Each stands for a variable of the page's style until the SVG is written.
INK, GRID = "#123456", "#123457"
COLOURS = ("#a10001", "#a20002", "#a30003", "#a40004")
VARIABLES = {INK: "currentColor", GRID: "var(--line)"}
VARIABLES |= {colour: f"var(--c{i})" for i, colour in enumerate(COLOURS)}
SERIES: dict[str, dict[str, Any]] = {
    "dense": {"color": COLOURS[0], "marker": "D", "linestyle": "-"},
    "sparse": {"color": COLOURS[1], "marker": "o", "linestyle": "-"},
    "static": {"color": COLOURS[2], "marker": "s", "linestyle": "--"},
    "oracle": {"color": COLOURS[3], "marker": "^", "linestyle": ":"},
}
DASHES = ("-", "--", ":", "-.")
SHADES = "cividis"  # read alike by the colour-blind
# The page is HTML: it needs no namespaces, and matplotlib's group names repeat in each picture.
NOT_NEEDED = re.compile(r' xmlns(:\w+)?="[^"]*"| id="[A-Za-z0-9.]+_\d+"')
MOST_PANELS = 12  # layers whose experts' widths are drawn
MOST_NAMED = 8  # layers with a line of their own name
MOST_CELLS = 10  # experts whose load is written into its cell
WIDE = 20  # of the largest value to the smallest, from which an axis is logarithmic

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
        "axes.formatter.useoffset": False,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "lines.markersize": 4,
        "lines.linewidth": 1.5,
        "legend.frameon": False,
        "savefig.transparent": True,
    }
)


def draw(content: Mapping[str, Any], resized: Mapping[int, Mapping[str, Any]]) -> dict[str, str]:
    """Name -> SVG, as it stands in the page; `widths` only where experts were `resized`.

    The first is of perplexities, or of an encoder's embeddings. `training` only where a layer was
    trained beyond its start.
    """
    metrics, history = content["metrics"], content["history"]
    layers = {int(k): m for k, m in metrics["layers"].items()}
    compared = {"sparse": metrics, **metrics["controls"]}
    encoder = "embedding_cosine" in metrics
    whole = {"embeddings": _embeddings} if encoder else {"perplexity": _perplexity}
    drawn = {
        **{name: _drawn(lambda ax, of=of: of(ax, metrics)) for name, of in whole.items()},
        "error": _drawn(lambda ax: _per_layer(ax, compared, "relative_mse")),
        "cosine": _drawn(lambda ax: _per_layer(ax, compared, "cosine_sim", "cosine_sim_p5")),
    }
    if any(len(rows) > 1 for rows in history.values()):
        drawn["training"] = _drawn(lambda ax: _training(ax, history))
    tall = min(max(len(layers), 3), 16)  # room for the scale's name, no taller than a screen
    drawn["load"] = _drawn(lambda ax: _load(ax, layers), height=1.1 + 0.24 * tall)
    if resized:
        shown = dict(sorted(resized.items())[:MOST_PANELS])
        columns = min(2, len(shown))
        rows = -(-len(shown) // columns)
        drawn["widths"] = _drawn(
            lambda axes: _widths(axes.flat, shown),
            height=0.5 + 1.5 * rows,
            grid={"nrows": rows, "ncols": columns, "sharey": True, "squeeze": False},
        )
    return drawn


def _drawn(
    draw: Callable[[Any], None],
    width: float = 4.6,
    height: float = 2.7,
    grid: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """`draw` gets the axes: one, or a `grid` of them."""
    figure = Figure(figsize=(width, height), layout="constrained")
    draw(figure.subplots(**grid))
    out = io.StringIO()
    described = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(out, format="svg", metadata=described)
    svg = out.getvalue()
    svg = NOT_NEEDED.sub("", svg[svg.index("<svg") :])
    for placeholder, variable in VARIABLES.items():
        svg = svg.replace(placeholder, variable)
    return svg


def _perplexity(ax: Axes, metrics: Mapping[str, Any]) -> None:
    texts = list(metrics["perplexity_ratio"])
    found = {side: metrics[side]["perplexity"] for side in ("dense", "sparse")}
    for name, of in metrics["controls"].items():
        found[name] = {t: found["dense"][t] * of["perplexity_ratio"][t] for t in texts}
    _bars(ax, found, texts, "%.1f")
    ax.set_ylabel("perplexity")


def _embeddings(ax: Axes, metrics: Mapping[str, Any]) -> None:
    found = {"sparse": metrics, **metrics["controls"]}
    texts = list(metrics["embedding_cosine"])
    _bars(ax, {name: of["embedding_cosine"] for name, of in found.items()}, texts, "%.3f")
    ax.set_ylabel("cosine with the dense embedding")


def _bars(
    ax: Axes, found: Mapping[str, Mapping[str, float]], texts: Sequence[str], form: str
) -> None:
    width = 0.84 / len(found)
    for i, (name, of) in enumerate(found.items()):
        at = [place - 0.42 + width * (i + 0.5) for place in range(len(texts))]
        colour = SERIES[name]["color"]
        bars = ax.bar(at, [of[t] for t in texts], 0.92 * width, color=colour, label=name)
        ax.bar_label(bars, fmt=form, padding=2, fontsize=8)
    ax.set_xticks(range(len(texts)), texts)
    ax.grid(axis="y")
    ax.margins(y=0.08)
    _legend(ax, ncols=len(found))


def _per_layer(
    ax: Axes, compared: Mapping[str, Mapping[str, Any]], name: str, low: str | None = None
) -> None:
    """One figure of each layer, of the sparse model and its controls; `low` of the sparse only."""
    layers = [int(k) for k in compared["sparse"]["layers"]]
    for who, of in compared.items():
        ax.plot(layers, _known(of["layers"], name), **SERIES[who], label=who)
    if low:
        how: dict[str, Any] = SERIES["sparse"] | {"linestyle": "-.", "marker": "v"}
        label = "sparse, 5th percentile"
        ax.plot(layers, _known(compared["sparse"]["layers"], low), **how, label=label)
    ax.set_xticks(_ticks(layers))
    ax.set_xlabel("layer")
    ax.set_ylabel(name)
    ax.grid(axis="y")
    values = [v for line in ax.lines for v in line.get_ydata() if v > 0]  # pyright: ignore
    if name == "relative_mse" and values and max(values) > WIDE * min(values):
        ax.set_yscale("log")
    _legend(ax, ncols=2 if low else 3)


def _known(layers: Mapping[str, Mapping[str, Any]], name: str) -> list[float]:
    return [float("nan") if m[name] is None else m[name] for m in layers.values()]


def _training(ax: Axes, history: Mapping[int, Sequence[Mapping[str, float]]]) -> None:
    """Lines with a name each; of many layers, lines in the colour of their depth."""
    named = len(history) <= MOST_NAMED
    shades = mpl.colormaps[SHADES].resampled(len(history))
    for i, (layer, rows) in enumerate(sorted(history.items())):
        steps = [row["step"] for row in rows]
        errors = [row["validation_relative_mse"] for row in rows]
        how: dict[str, Any] = {"marker": "o"} if len(rows) == 1 else {}
        if named:
            how |= {"color": COLOURS[i % 4], "linestyle": DASHES[(i + i // 4) % 4]}
        else:
            how |= {"color": shades(i)}
        ax.plot(steps, errors, **how, label=f"layer {layer}")
    ax.set_xlabel("step")
    ax.set_ylabel("relative_mse on validation")
    ax.grid(axis="y")
    if named:
        _legend(ax, ncols=4)
    else:
        scale = ScalarMappable(Normalize(min(history), max(history)), SHADES)
        ax.figure.colorbar(scale, ax=ax, label="layer", aspect=30)


def _widths(panels: Iterable[Axes], resized: Mapping[int, Mapping[str, Any]]) -> None:
    """A line per expert, in the colour of its index."""
    panels = list(panels)
    for ax, (layer, of) in zip(panels, resized.items(), strict=False):
        steps = [row["step"] for row in of["sizes"]]
        end = max(of["steps"], steps[-1])
        experts = list(zip(*(row["widths"] for row in of["sizes"]), strict=True))
        shades = mpl.colormaps[SHADES].resampled(len(experts))
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
    most = max(share for row in shares for share in row if share == share)
    image = ax.imshow(shares, aspect="auto", cmap=SHADES, vmin=0, vmax=most)
    if widest <= MOST_CELLS and len(layers) <= 16:
        for row, values in enumerate(shares):
            for e, share in enumerate(values):
                if share == share:
                    colour = "black" if share > 0.5 * most else "white"
                    at = {"ha": "center", "va": "center", "fontsize": 8}
                    ax.text(e, row, f"{share:.2f}", color=colour, **at)
    rows = _ticks(range(len(layers)))
    ax.set_yticks(rows, [str(list(layers)[i]) for i in rows])
    ax.set_xticks(_ticks(range(widest)))
    ax.set_xlabel("expert")
    ax.set_ylabel("layer")
    ax.figure.colorbar(image, ax=ax, label="load / even load", aspect=30)


def _legend(ax: Axes, ncols: int) -> None:
    """Above the picture, where nothing is drawn."""
    ax.figure.legend(loc="outside upper left", ncols=ncols, fontsize=8, handlelength=2.6)


def _ticks(values: Iterable[int]) -> list[int]:
    """At most a dozen of them."""
    values = list(values)
    return values[:: -(-len(values) // 12)]
