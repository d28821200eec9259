"""What a conversion cost and lost, on text and rows that nothing was chosen on.

Per layer, on the store's `heldout` rows; for the whole model, the dense and the sparse checkpoint
side by side on the `heldout` and `shifted` blocks.

Shapes: T tokens, D d_model.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline import artifacts, corpus, finite, runtime
from pipeline.comparison import Texts, compare_on_text, continuation, replaced
from pipeline.config import EvaluateConfig
from pipeline.controls import OracleMoE
from pipeline.discovery import input_device
from pipeline.embeddings import compare_embeddings, is_encoder
from pipeline.errors import ArtifactError, ConfigError
from pipeline.figures import GOOD_COSINE, control_figures, gap_figures, model_figures
from pipeline.layers import layer_folders, load_layer, read_history
from pipeline.moe import SparseMoE
from pipeline.progress import Progress, silent
from pipeline.router import routing_statistics
from pipeline.shape import MoEShape
from pipeline.store import LayerReader

TEXTS = ("heldout", "shifted")
ROWS = 4096
"""Tokens per forward pass of one layer."""

# One layer


def evaluate(
    layers_folder: Path | str,
    capture_folder: Path | str,
    layers: Sequence[int] | None = None,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = ROWS,
    max_batches: int | None = None,
    store_url: str | None = None,
) -> dict[int, dict[str, Any]]:
    """`{layer: {"mse": ..., "cosine_sim": ..., ...}}` of trained layers, as `layer_metrics`.

    Args:
        layers_folder: holds `layer_K/` as `train` writes them.
        capture_folder: holds `layer_K.zarr` as `capture` writes them.
        layers: null = all that lie in `layers_folder`.
        batch_size: tokens per forward pass.
        max_batches: forward passes per layer, from the first heldout row on; null = all rows.
        store_url: `capture.store_url`, where the shards lie in an object store.

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
    runtime.settle_kernels()
    folder, captured = Path(layers_folder), Path(capture_folder)
    if layers is None:
        layers = list(layer_folders(folder))
    return {
        k: layer_metrics(
            load_layer(folder / f"layer_{k}")[0].to(device),
            LayerReader(captured / f"layer_{k}.zarr", device, store_url),
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
        finite.check(y_hat, "A layer", f"batch {len(errors)} of {reader.path.absolute()}")
        errors.append((y_hat - y).double().square().sum(dim=1).cpu())
        powers.append(y.double().square().sum(dim=1).cpu())
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
        "cosine_sim_p5": float(np.quantile(cosine_T[real_T], 0.05)) if real_T.any() else None,
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
    counts = artifacts.read_json(tokens / corpus.RECORD)["splits"]
    read = {k: load_layer(folder) for k, folder in layers.items()}
    device = input_device(dense)
    judged = {k: layer_metrics(moe.to(device), stores[k]) for k, (moe, _) in read.items()}

    how = {"batch_size": cfg.batch_size, "max_batches": cfg.max_batches, "progress": progress}
    encoder = is_encoder(dense)

    def compare(other: nn.Module) -> Texts:
        blocks = {name: corpus.read_blocks(tokens, name) for name in TEXTS}
        if encoder:
            return {n: compare_embeddings(dense, other, b, **how) for n, b in blocks.items()}
        return {
            n: compare_on_text(dense, other, b, counts[n]["bytes"], name=n, **how)
            for n, b in blocks.items()
        }

    shapes = {k: moe.shape for k, (moe, _) in read.items()}
    metrics = model_figures(
        judged,
        shapes,
        compare(sparse),
        dense.num_parameters(),
        sparse.num_parameters(),
        next(iter(read.values()))[1]["host"],
    )
    found = {}
    for name, modules in controls.items():
        norms = static_norms if name == "static" else None
        of_layers = {k: layer_metrics(module, stores[k]) for k, module in modules.items()}
        found[name] = control_figures(of_layers, shapes, compare(replaced(dense, modules, norms)))
    metrics |= {"controls": found, **gap_figures(judged, found)}
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
