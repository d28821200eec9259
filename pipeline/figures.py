"""The figures of `metrics.json`, made of what was judged layer by layer and on each text."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pipeline import embeddings, hosts
from pipeline.comparison import TextLoss, Texts
from pipeline.controls import gap_recovery
from pipeline.embeddings import EmbeddingMatch
from pipeline.shape import MoEShape

GOOD_COSINE = 0.95
"""A layer is good where its mean cosine with the dense FFN is above this."""

HEADLINE = (
    "perplexity_ratio.heldout",
    "perplexity_ratio.shifted",
    "embedding_cosine.heldout",
    "embedding_cosine.shifted",
    "neighbour_agreement.heldout",
    "controls.static.perplexity_ratio.heldout",
    "controls.static.embedding_cosine.heldout",
    "kl.mean",
    "top1_agreement",
    "active_ffn_fraction",
    "sparse.parameters.total",
    "sparse.parameters.active",
    "cosine_sim.mean",
    "cosine_sim.worst",
    "relative_mse.mean",
    "gap_recovery.mean",
)
"""What `dvc metrics` and `dvc exp show` list: few enough to be read in one line."""


def headline(metrics: Mapping[str, Any], speed: Mapping[str, Any]) -> dict[str, Any]:
    """Of `metrics` what `HEADLINE` names and has a value, under the same names; speed ratios."""
    chosen: dict[str, Any] = {}
    for name in HEADLINE:
        value, into = metrics, chosen
        *above, last = name.split(".")
        for part in above:
            value = value.get(part, {})
        if value.get(last) is None:
            continue
        for part in above:
            into = into.setdefault(part, {})
        into[last] = value[last]
    ratios = {name: of["ratio"] for name, of in speed.get("work", {}).items()}
    return chosen | ({"speed": ratios} if ratios else {})


def model_figures(
    layers: Mapping[int, Mapping[str, Any]],
    shapes: Mapping[int, MoEShape],
    texts: Texts,
    dense_parameters: int,
    sparse_parameters: int,
    host: str,
) -> dict[str, Any]:
    """`metrics.json`: one name for each figure, as docs/design.md defines them.

    Args:
        sparse_parameters: those that `host` stores, padding included.
    """
    losses = {n: t for n, t in texts.items() if isinstance(t, TextLoss)}
    dense, sparse = (
        {
            kind: {name: getattr(text, kind)[side] for name, text in losses.items()}
            for kind in ("perplexity", "byte_perplexity")
            if losses
        }
        for side in (0, 1)
    )
    parameters = _parameters(shapes, sparse_parameters, host)
    run = {k: m["active_ffn_fraction"] for k, m in layers.items()}
    run_with_router = {
        k: share + shapes[k].active_flops_fraction - shapes[k].active_ffn_fraction
        for k, share in run.items()
    }
    good = [m for m in layers.values() if m["verdict"] == "good"]
    return {
        "dense": {**dense, "parameters": dense_parameters},
        "sparse": {**sparse, "parameters": parameters},
        "judged_tokens": {name: text.tokens for name, text in texts.items()},
        **_closeness(texts),
        "active_ffn_fraction": _by_width(run, shapes),
        "active_flops_fraction": _by_width(run_with_router, shapes),
        "cosine_sim": _mean_and_worst(layers, "cosine_sim", min),
        "relative_mse": _mean_and_worst(layers, "relative_mse", max),
        "good_layers": {"good": len(good), "of": len(layers), "cosine_above": GOOD_COSINE},
        "layers": {str(k): dict(m) for k, m in layers.items()},
    }


def _closeness(texts: Texts) -> dict[str, Any]:
    """How close the whole model comes: of a language model's predictions, or of embeddings."""
    losses = {n: t for n, t in texts.items() if isinstance(t, TextLoss)}
    if not losses:
        matches = {n: t for n, t in texts.items() if isinstance(t, EmbeddingMatch)}
        return embeddings.figures(matches)
    heldout = losses["heldout"]
    return {
        "perplexity_ratio": {n: t.perplexity[1] / t.perplexity[0] for n, t in losses.items()},
        "kl": {
            "mean": float(heldout.kl.mean()),
            "p99": float(np.quantile(heldout.kl.numpy(), 0.99)),
            "by_text": {name: float(text.kl.mean()) for name, text in losses.items()},
        },
        "top1_agreement": heldout.top1_agreement,
    }


def control_figures(
    layers: Mapping[int, Mapping[str, Any]], shapes: Mapping[int, MoEShape], texts: Texts
) -> dict[str, Any]:
    """What `metrics.json` says of one control, under the names that the sparse model has."""
    closeness = _closeness(texts)
    names = ("perplexity_ratio", "embedding_cosine", "neighbour_agreement")
    by_text = {name: closeness[name] for name in names if name in closeness}
    if "kl" in closeness:
        by_text["kl"] = {"by_text": closeness["kl"]["by_text"]}
    return {
        **by_text,
        "active_ffn_fraction": _by_width(
            {k: m["active_ffn_fraction"] for k, m in layers.items()}, shapes
        ),
        "cosine_sim": _mean_and_worst(layers, "cosine_sim", min),
        "relative_mse": _mean_and_worst(layers, "relative_mse", max),
        "layers": {
            str(k): {name: m[name] for name in ("relative_mse", "cosine_sim")}
            for k, m in layers.items()
        },
    }


def gap_figures(
    ours: Mapping[int, Mapping[str, Any]], controls: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """`gap_recovery` where both controls are there: mean, worst layer, and every layer's."""
    if not {"static", "oracle"} <= controls.keys():
        return {}
    layers = {}
    for k, m in ours.items():
        static, oracle = (controls[c]["layers"][str(k)] for c in ("static", "oracle"))
        errors = (judged["relative_mse"] for judged in (m, static, oracle))
        layers[k] = {"gap_recovery": gap_recovery(*errors)}
    known = {str(k): m["gap_recovery"] for k, m in layers.items()}
    return {"gap_recovery": {**_mean_and_worst(layers, "gap_recovery", min), "layers": known}}


def _parameters(shapes: Mapping[int, MoEShape], stored: int, host: str) -> dict[str, int]:
    """`total` counts what is stored; where some of that is padding, `unpadded` the rest.

    A host may pad to the widest expert of the layer, or of all layers.
    """
    padded = hosts.padded(host, shapes)
    padding = sum(padded[k].total_parameters - s.total_parameters for k, s in shapes.items())
    asleep = sum(s.total_parameters - s.active_parameters for s in shapes.values())
    apart = {"unpadded": stored - padding} if padding else {}
    return {"total": stored, **apart, "active": stored - padding - asleep}


def _mean_and_worst(
    layers: Mapping[int, Mapping[str, Any]], name: str, worst: Callable[[list[float]], float]
) -> dict[str, float | None]:
    """Over the layers that have the figure; null when none has."""
    known = [m[name] for m in layers.values() if m[name] is not None]
    if not known:
        return {"mean": None, "worst": None}
    return {"mean": sum(known) / len(known), "worst": worst(known)}


def _by_width(shares: Mapping[int, float], shapes: Mapping[int, MoEShape]) -> float:
    """The mean over layers of a share of the dense FFN's width."""
    widths = {k: shapes[k].d_ff for k in shares}
    return sum(share * widths[k] for k, share in shares.items()) / sum(widths.values())
