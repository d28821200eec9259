"""The steps between a model in memory and its trained layers, for notebooks; `docs/example.md`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline import artifacts, budget, dense, runtime, training
from pipeline.config import MoEConfig, TrainConfig
from pipeline.ffn import DenseFFN
from pipeline.moe import SparseMoE
from pipeline.store import LayerReader


def plan_layers(
    dense_model: PreTrainedModel, cfg: MoEConfig, layers: Sequence[int | str] | None = None
) -> dict[int, dict[str, Any]]:
    """Layer -> what it will be: `layer`, `shape`, `init`, `host`, as a uniform budget gives it.

    Args:
        layers: indices, or patterns of the FFNs' paths; null = all.

    Raises:
        ConfigError: sizes that do not fit the model, or no host for what is asked.
        InputError: a layer that the model does not have.
    """
    described = dense.describe(dense_model)
    chosen = dense.select_layers([ffn["path"] for ffn in described["layers"]], layers)
    return budget.uniform(described, cfg, chosen)


def train_layer(
    capture_folder: Path | str,
    plan: Mapping[str, Any],
    layers_folder: Path | str,
    *,
    moe_cfg: MoEConfig,
    cfg: TrainConfig,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    start: SparseMoE | None = None,
    store_url: str | None = None,
) -> SparseMoE:
    """Fit the layer of `plan` to its own store; it is written to `layers_folder/layer_K`.

    Args:
        capture_folder: holds `layer_K.zarr` and `ffn_K.safetensors`, of `capture_activations`.
        plan: one of `plan_layers`.
        dtype: of the matrix products; null = as `cfg.dtype` says.
        start: an untrained layer to begin with; null = as `moe_cfg.init` says.
        store_url: as `capture_activations` had it.

    An interrupted call goes on from its last checkpoint. Raises as `training.fit_layer`.
    """
    captured, layer = Path(capture_folder), plan["layer"]
    folder = Path(layers_folder) / f"layer_{layer}"
    folder.mkdir(parents=True, exist_ok=True)
    runtime.settle_kernels()
    device = torch.device(device)
    reader = LayerReader(captured / f"layer_{layer}.zarr", device, store_url)
    moe = training.fit_layer(
        reader,
        DenseFFN.load(captured / f"ffn_{layer}.safetensors"),
        plan,
        folder,
        moe_cfg=moe_cfg,
        cfg=cfg,
        seed=seed,
        device=device,
        dtype=dtype or runtime.pick_dtype(cfg.dtype, device),
        start=start,
    )
    made = {"settings": {"seed": seed}, "inputs": {"store": reader.digest()}}
    artifacts.write_manifest(folder, {"module": __name__, **made})
    return moe
