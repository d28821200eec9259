"""What a conversion cost and lost, on text and rows that nothing was chosen on.

Per layer, on the store's `heldout` rows; for the whole model, the dense and the sparse checkpoint
side by side on the `heldout` and `shifted` blocks.

Shapes: T tokens, D d_model, V vocab_size.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline import corpus, embeddings, workdir
from pipeline.assembly import set_norms
from pipeline.config import EvaluateConfig
from pipeline.controls import OracleMoE, gap_recovery
from pipeline.discovery import find_ffns
from pipeline.embeddings import EmbeddingMatch, compare_embeddings, is_encoder
from pipeline.errors import ArtifactError, ConfigError
from pipeline.layers import layer_folders, load_layer, read_history
from pipeline.moe import SparseMoE
from pipeline.router import routing_statistics
from pipeline.runtime import Progress, silent
from pipeline.shape import MoEShape
from pipeline.store import LayerReader

TEXTS = ("heldout", "shifted")
ROWS = 4096
"""Tokens per forward pass of one layer."""
GOOD_COSINE = 0.95
"""A layer is good where its mean cosine with the dense FFN is above this."""

# One layer


def evaluate(
    layers_folder: Path | str,
    capture_folder: Path | str,
    layers: Sequence[int] | None = None,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = ROWS,
    max_batches: int | None = None,
) -> dict[int, dict[str, Any]]:
    """`{layer: {"mse": ..., "cosine_sim": ..., ...}}` of trained layers, as `layer_metrics`.

    Args:
        layers_folder: holds `layer_K/` as `train` writes them.
        capture_folder: holds `layer_K.zarr` as `capture` writes them.
        layers: null = all that lie in `layers_folder`.
        batch_size: tokens per forward pass.
        max_batches: forward passes per layer, from the first heldout row on; null = all rows.

    Raises:
        ConfigError: `batch_size` or `max_batches` is below 1.
        InputError: there are no layers.
        ArtifactError: a layer or a store is damaged, or they do not belong together.
    """
    for name, value in (("batch_size", batch_size), ("max_batches", max_batches)):
        if value is not None and value < 1:
            raise ConfigError(
                f"{name} leaves nothing to judge.",
                value=f"{name}={value}",
                rule="at least 1",
                remedy=f"give a larger {name}"
                + (", or null for all rows" if name == "max_batches" else ""),
            )
    folder, captured = Path(layers_folder), Path(capture_folder)
    if layers is None:
        layers = list(layer_folders(folder))
    return {
        k: layer_metrics(
            load_layer(folder / f"layer_{k}")[0].to(device),
            LayerReader(captured / f"layer_{k}.zarr"),
            batch_size=batch_size,
            max_batches=max_batches,
        )
        for k in layers
    }


@torch.inference_mode()
def layer_metrics(
    moe: SparseMoE | OracleMoE,
    reader: LayerReader,
    *,
    batch_size: int = ROWS,
    max_batches: int | None = None,
) -> dict[str, Any]:
    """Reconstruction and routing on the `heldout` rows, in float32, with `moe` in evaluation mode.

    `mse` per element; `cosine_sim` the mean over tokens and `cosine_sim_p5` their 5th percentile;
    `relative_mse` = sum |y_hat - y|^2 / sum |y|^2. The first token of each sequence, whose norm can
    be enormous, counts in all of these and once more alone (`first_token`). A token whose target is
    zero has no cosine; where all are, the ratios and the verdict are null and `null_because` says
    so. `active_ffn_fraction`: true neurons of the experts that worked on a token over the dense
    FFN's, the mean over tokens.
    """
    if moe.shape.d_model != reader.d_model:
        raise ArtifactError(
            "A layer is judged on the activations of another model.",
            value=f"d_model {moe.shape.d_model}; {reader.path.absolute()} has {reader.d_model}",
            rule="a layer is judged on the store of its own dense FFN",
            remedy="name the capture that the layer was trained on",
        )
    moe.eval()
    device = moe.down_proj.device
    errors, powers, cosines, takens = [], [], [], []
    stop = None if max_batches is None else max_batches * batch_size
    x_TD, y_TD = reader.read("heldout", stop=stop)
    for x, y in zip(x_TD.split(batch_size), y_TD.split(batch_size), strict=True):
        y = y.to(device).float()
        y_hat, routing = moe.forward_routed(x.to(device).float())
        errors.append((y_hat - y).square().sum(dim=1).double().cpu())
        powers.append(y.square().sum(dim=1).double().cpu())
        cosines.append(F.cosine_similarity(y_hat, y, dim=1).double().cpu())
        takens.append(routing.taken_TE().cpu())
    error_T, power_T, cosine_T = torch.cat(errors), torch.cat(powers), torch.cat(cosines)
    taken_TE = torch.cat(takens)
    real_T = power_T > 0
    first_T = torch.zeros_like(real_T)
    first_T[:: reader.sequence_length] = True
    ratios = _ratios(error_T, power_T, cosine_T)
    return {
        "mse": float(error_T.mean()) / reader.d_model,
        **ratios,
        "cosine_sim_p5": float(cosine_T[real_T].quantile(0.05)) if real_T.any() else None,
        "verdict": _verdict(ratios["cosine_sim"]),
        "first_token": _ratios(error_T[first_T], power_T[first_T], cosine_T[first_T]),
        "active_ffn_fraction": _active_ffn_fraction(taken_TE, moe.shape),
        "routing": routing_statistics(taken_TE),
    }


def _active_ffn_fraction(taken_TE: Tensor, shape: MoEShape) -> float:
    choices_E = taken_TE.sum(dim=0).tolist()
    neurons = sum(n * width for n, width in zip(choices_E, shape.widths, strict=True))
    return (neurons / len(taken_TE) + shape.d_ff_shared) / shape.d_ff


def _verdict(cosine_sim: float | None) -> str | None:
    if cosine_sim is None:
        return None
    return "good" if cosine_sim > GOOD_COSINE else "below target"


def _ratios(error_T: Tensor, power_T: Tensor, cosine_T: Tensor) -> dict[str, Any]:
    real_T = power_T > 0
    if not real_T.any():
        reason = "the target is zero on every heldout row of it"
        return {"relative_mse": None, "cosine_sim": None, "null_because": reason}
    return {
        "relative_mse": float(error_T.sum() / power_T.sum()),
        "cosine_sim": float(cosine_T[real_T].mean()),
    }


# The whole model


@dataclass(frozen=True)
class TextLoss:
    """Both models on the same blocks."""

    perplexity: tuple[float, float]  # dense, sparse
    byte_perplexity: tuple[float, float]
    kl: Tensor  # (T,) KL(dense || sparse) of each predicted token, nats
    top1_agreement: float  # share of tokens for which both prefer the same one
    tokens: int  # of the blocks that were read


Texts = Mapping[str, TextLoss] | Mapping[str, EmbeddingMatch]
"""By the name of the text, how the dense and another model compare on it."""


@torch.inference_mode()
def compare_on_text(
    dense: nn.Module,
    sparse: nn.Module,
    blocks: Tensor,
    text_bytes: int,
    *,
    batch_size: int,
    max_batches: int | None = None,
    progress: Progress = silent,
) -> TextLoss:
    """Both models' next-token losses on (sequences, sequence_length) token ids.

    Args:
        text_bytes: UTF-8 bytes of the text in `blocks`; the share of the predicted tokens counts.
        batch_size: sequences per forward pass.
        max_batches: forward passes, from the first block on; null = all blocks.
    """
    bytes_per_token = text_bytes / blocks.numel()
    if max_batches is not None:
        blocks = blocks[: max_batches * batch_size]
    loss = torch.zeros(2, dtype=torch.float64)
    agreed, done, kls = 0, 0, []
    for batch in blocks.split(batch_size):
        logits = [_logits(model, batch) for model in (dense, sparse)]
        for tokens, *pair in zip(batch, *logits, strict=True):
            dense_TV, sparse_TV = (side[:-1].float().cpu().log_softmax(dim=-1) for side in pair)
            following = tokens[1:, None]
            for i, log_p in enumerate((dense_TV, sparse_TV)):
                loss[i] -= log_p.gather(1, following).double().sum()
            kls.append((dense_TV.exp() * (dense_TV - sparse_TV)).sum(dim=-1))
            agreed += int((dense_TV.argmax(-1) == sparse_TV.argmax(-1)).sum())
        done += batch.numel()
        progress(done, blocks.numel(), "")
    predicted = len(blocks) * (blocks.shape[1] - 1)
    d, s = (float(value) for value in (loss / predicted).exp())
    db, sb = (float(value) for value in (loss / (predicted * bytes_per_token)).exp())
    return TextLoss((d, s), (db, sb), torch.cat(kls), agreed / predicted, blocks.numel())


def replaced(
    model: PreTrainedModel,
    modules: Mapping[int, nn.Module],
    norms: Mapping[str, Tensor] | None = None,
) -> PreTrainedModel:
    """The model with other modules in its FFNs' places; its other weights are not copied.

    Args:
        norms: healed ones, in the place of the model's own.
    """
    healed = norms or {}
    kept = [p for name, p in model.named_parameters() if name not in healed]
    shared = {id(t): t for t in (*kept, *model.buffers())}
    copied = copy.deepcopy(model, shared)  # pyright: ignore[reportArgumentType]
    slots = find_ffns(copied)
    for k, module in modules.items():
        slots[k].replace(copy.deepcopy(module).to(model.dtype))
    set_norms(copied, healed)
    return copied


def _logits(model: nn.Module, batch: Tensor) -> Tensor:
    device = next(model.parameters()).device
    return model(input_ids=batch.to(device), use_cache=False).logits


def measure(
    *,
    dense: PreTrainedModel,
    sparse: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Path,
    layers: Mapping[int, Path],
    stores: Mapping[int, LayerReader],
    controls: Mapping[str, Mapping[int, SparseMoE | OracleMoE]],
    static_norms: Mapping[str, Tensor],
    cfg: EvaluateConfig,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Everything that the report tells: `metrics`, `layers`, `history`, `samples`, `tokens`.

    Args:
        tokens: the folder that `corpus.write_blocks` filled.
        layers: the trained layers' folders; each is judged on its own of `stores`.
        controls: name -> what it puts in the place of each FFN; see `pipeline.controls`.
        static_norms: of the static control, where it was healed.
    """
    counts = workdir.read_json(tokens / corpus.RECORD)["splits"]
    read = {k: load_layer(folder) for k, folder in layers.items()}
    judged = {k: layer_metrics(moe.to(dense.device), stores[k]) for k, (moe, _) in read.items()}

    how = {"batch_size": cfg.batch_size, "max_batches": cfg.max_batches, "progress": progress}
    encoder = is_encoder(dense)

    def compare(other: nn.Module) -> Texts:
        blocks = {name: corpus.read_blocks(tokens, name) for name in TEXTS}
        if encoder:
            return {n: compare_embeddings(dense, other, b, **how) for n, b in blocks.items()}
        return {
            n: compare_on_text(dense, other, b, counts[n]["bytes"], **how)
            for n, b in blocks.items()
        }

    metrics = figures(
        judged,
        {k: moe.shape for k, (moe, _) in read.items()},
        compare(sparse),
        dense.num_parameters(),
        sparse.num_parameters(),
    )
    found = {}
    for name, modules in controls.items():
        norms = static_norms if name == "static" else None
        of_layers = {k: layer_metrics(module, stores[k]) for k, module in modules.items()}
        found[name] = control_figures(of_layers, compare(replaced(dense, modules, norms)))
    metrics |= {"controls": found, **_gap_recovery(judged, found)}
    return {
        "metrics": metrics,
        "layers": {k: config for k, (_, config) in read.items()},
        "history": {k: read_history(folder) for k, folder in layers.items()},
        "samples": {
            name: continuation(model, tokenizer, cfg.prompt, cfg.new_tokens)
            for name, model in (("dense", dense), ("sparse", sparse))
            if not encoder
        },
        "tokens": counts,
    }


@torch.inference_mode()
def continuation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int
) -> str:
    """The prompt and what the model says next, always its first choice.

    An empty prompt is the beginning of a document: the token that ends the one before it.
    """
    if not new_tokens:
        return prompt
    ids = tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]
    input_ids = torch.tensor([ids], device=model.device)
    greedy = {"max_new_tokens": new_tokens, "do_sample": False}
    seen = torch.ones_like(input_ids)
    out = model.generate(input_ids=input_ids, attention_mask=seen, **greedy)  # type: ignore[operator]
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


# The figures


def figures(
    layers: Mapping[int, Mapping[str, Any]],
    shapes: Mapping[int, MoEShape],
    texts: Texts,
    dense_parameters: int,
    sparse_parameters: int,
) -> dict[str, Any]:
    """`metrics.json`: one name for each figure, as docs/design.md defines them."""
    losses = {n: t for n, t in texts.items() if isinstance(t, TextLoss)}
    dense, sparse = (
        {
            kind: {name: getattr(text, kind)[side] for name, text in losses.items()}
            for kind in ("perplexity", "byte_perplexity")
            if losses
        }
        for side in (0, 1)
    )
    parameters = _parameters(shapes, dense_parameters, sparse_parameters)
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
            "p99": float(heldout.kl.quantile(0.99)),
            "by_text": {name: float(text.kl.mean()) for name, text in losses.items()},
        },
        "top1_agreement": heldout.top1_agreement,
    }


def control_figures(layers: Mapping[int, Mapping[str, Any]], texts: Texts) -> dict[str, Any]:
    """What `metrics.json` says of one control, under the names that the sparse model has."""
    closeness = _closeness(texts)
    names = ("perplexity_ratio", "embedding_cosine", "neighbour_agreement")
    by_text = {name: closeness[name] for name in names if name in closeness}
    if "kl" in closeness:
        by_text["kl"] = {"by_text": closeness["kl"]["by_text"]}
    return {
        **by_text,
        "cosine_sim": _mean_and_worst(layers, "cosine_sim", min),
        "relative_mse": _mean_and_worst(layers, "relative_mse", max),
        "layers": {
            str(k): {name: m[name] for name in ("relative_mse", "cosine_sim")}
            for k, m in layers.items()
        },
    }


def _gap_recovery(
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


def _parameters(shapes: Mapping[int, MoEShape], dense: int, stored: int) -> dict[str, int]:
    """`total` counts what is stored; where some of that is padding, `unpadded` the rest."""
    asleep = sum(s.total_parameters - s.active_parameters for s in shapes.values())
    if all(s.expert_widths is None for s in shapes.values()):
        return {"total": stored, "active": stored - asleep}
    # From the dense side: a host may pad to the widest expert of the layer, or of all layers.
    unpadded = dense + sum(s.total_parameters - s.dense_parameters for s in shapes.values())
    apart = {"unpadded": unpadded} if unpadded != stored else {}
    return {"total": stored, **apart, "active": unpadded - asleep}


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
