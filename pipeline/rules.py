"""What a configuration must keep to beyond its types: ranges, and rules that cross fields.

Imports neither torch nor transformers, as `pipeline.config`.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from pipeline.config import (
    BudgetBy,
    BudgetVary,
    Config,
    DataConfig,
    DataSource,
    EmbeddedModelConfig,
    MoEConfig,
    Routing,
    leaves,
)
from pipeline.errors import ConfigError

# Smallest and largest allowed value of every number; None = no bound.
RANGES: dict[str, tuple[float | None, float | None]] = {
    "seed": (0, 2**63 - 1),
    "model.embedded.vocab_size": (300, None),
    "model.embedded.d_model": (8, None),
    "model.embedded.d_ff": (8, None),
    "model.embedded.n_layers": (1, None),
    "model.embedded.n_heads": (1, None),
    "model.embedded.n_kv_heads": (1, None),
    "model.embedded.sequence_length": (2, None),
    "model.embedded.batch_tokens": (2, None),
    "model.embedded.max_steps": (1, None),
    "model.embedded.learning_rate": (0, None),
    "model.embedded.weight_decay": (0, None),
    "model.embedded.warmup_steps": (0, None),
    "model.embedded.evaluate_every": (1, None),
    "model.embedded.patience": (1, None),
    "model.embedded.checkpoint_every": (1, None),
    "data.max_samples": (1, None),
    "data.sequence_length": (2, None),
    "data.tokens.train": (1, None),
    "data.tokens.validation": (1, None),
    "data.tokens.heldout": (1, None),
    "data.tokens.shifted": (1, None),
    "capture.shard_mb": (0.001, None),
    "capture.chunk_mb": (0.001, 1024),  # Blosc, and one read, end at 2 GiB
    "capture.batch_size": (1, None),
    "capture.heldout_tokens": (1, None),
    "moe.n_experts": (1, None),
    "moe.top_k": (1, None),
    "moe.capacity_factor": (0.01, None),
    "moe.d_ff_expert": (0, None),
    "moe.shared_expert": (0, None),
    "moe.init_noise": (0, None),
    "moe.router_width": (1, None),
    "moe.dynamic.reallocate_every_n_steps": (1, None),
    "moe.dynamic.n_reallocated": (1, None),
    "moe.dynamic.growth_factor": (1, None),
    "moe.dynamic.shrink_factor": (0.01, 1),
    "moe.dynamic.min_d_ff": (8, None),
    "moe.dynamic.max_d_ff": (8, None),
    "moe.budget.tokens": (1, None),
    "train.epochs": (0, None),
    "train.batch_size": (1, None),
    "train.learning_rate": (0, None),
    "train.router_learning_rate": (0, None),
    "train.weight_decay": (0, None),
    "train.warmup_steps": (0, None),
    "train.grad_clip": (0, None),
    "train.cosine_loss_weight": (0, None),
    "train.load_balance_coef": (0, None),
    "train.router_z_coef": (0, None),
    "train.balance_bias_rate": (0, None),
    "train.evaluate_every": (1, None),
    "train.patience": (0, None),
    "train.window": (1, None),
    "train.checkpoint_every": (1, None),
    "heal.tokens": (0, None),
    "heal.batch_size": (1, None),
    "heal.learning_rate": (0, None),
    "heal.router_learning_rate": (0, None),
    "heal.weight_decay": (0, None),
    "heal.warmup_steps": (0, None),
    "heal.grad_clip": (0, None),
    "heal.load_balance_coef": (0, None),
    "heal.router_z_coef": (0, None),
    "heal.evaluate_every": (1, None),
    "heal.checkpoint_every": (1, None),
    "convert.tolerance": (0, None),
    "evaluate.batch_size": (1, None),
    "evaluate.max_batches": (1, None),
    "evaluate.new_tokens": (0, None),
    "runtime.threads": (1, None),
    "runtime.lock_wait_s": (0, None),
    "prefill.timeout_s": (0, None),
    "prefill.lost_wait_s": (0, None),
    "prefill.layers_per_gpu": (1, None),
}


def validate(cfg: Config) -> None:
    """Check what types cannot; raises `ConfigError`."""
    _check_lists(cfg)
    check_numbers(leaves(cfg))
    _check_moe(cfg.moe)
    _check_per_layer(cfg.moe, cfg.model.layers)
    if cfg.moe.budget.by is BudgetBy.kl:
        _check_candidates(cfg.moe)
    if cfg.train.window is not None and cfg.train.data_free:
        raise ConfigError(
            "Layers behind sparse ones cannot be fitted without captured rows.",
            value=f"train.window={cfg.train.window}, train.data_free=true",
            rule="what earlier layers lose is seen only where the model runs",
            remedy="set train.window=null or train.data_free=false",
        )
    _check_layers(cfg.model.layers)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", cfg.model.name):
        raise ConfigError(
            "model.name is not a plain word.",
            value=cfg.model.name,
            rule="letters, digits, '.', '_' and '-', beginning with a letter or a digit",
            remedy="choose another model.name",
        )
    _check_repository(cfg.evaluate.push_to_hub)
    if cfg.capture.store_url is not None:
        check_store_url(cfg.capture.store_url)
    if (cfg.model.id is None) == (cfg.model.embedded is None):
        raise ConfigError(
            "It is not clear which dense model is meant.",
            value=f"model.id={cfg.model.id}, model.embedded={cfg.model.embedded}",
            rule="either model.id names a model, or model.embedded says how to train one",
            remedy="choose model=tiny, or model=pretrained model.id=<hub id or folder>",
        )
    if cfg.model.embedded:
        _check_heads(cfg.model.embedded)
    _check_source(cfg.data)
    check_shard_size(cfg.convert.max_shard_size)
    if cfg.model.device_map is not None:
        _check_device_map(cfg.model.device_map)
    if cfg.convert.dense or cfg.convert.layers or cfg.convert.output:
        raise ConfigError(
            "The paths of a conversion on its own stand in the configuration.",
            value=f"dense={cfg.convert.dense}, layers={cfg.convert.layers}",
            rule="convert.dense, convert.layers and convert.output are null in conf/",
            remedy="give them on the command line of `python -m pipeline.stages.convert`",
        )


def _check_lists(cfg: Config) -> None:
    """OmegaConf takes a list or a mapping for an element of any list."""
    lists = {key: value for key, value in leaves(cfg).items() if isinstance(value, list)}
    lists |= {f"moe.per_layer[{i}].layers": of.layers for i, of in enumerate(cfg.moe.per_layer)}
    for key, values in lists.items():
        nested = [value for value in values if isinstance(value, list | dict)]
        if nested:
            raise ConfigError(
                f"{key} holds what is no value.",
                value=nested[0],
                rule="a list of numbers or texts",
                remedy=f"write {nested[0]} out, one value after the other",
            )


def check_numbers(values: Mapping[str, Any]) -> None:
    """Every number in its range; raises `ConfigError`."""
    for key, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            _check_number(key, value)


def _check_number(key: str, value: float) -> None:
    low, high = RANGES[key]
    inside = math.isfinite(value) and (low is None or value >= low)
    if not inside or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ConfigError(
            f"{key} is out of range.",
            value=value,
            rule=f"a finite number, {bounds}",
            remedy=f"set {key} within its range",
        )


def _check_moe(moe: MoEConfig) -> None:
    if moe.top_k > moe.n_experts:
        raise ConfigError(
            "More experts per token than there are experts.",
            value=f"moe.top_k={moe.top_k}, moe.n_experts={moe.n_experts}",
            rule="moe.top_k <= moe.n_experts",
            remedy=f"set moe.top_k={moe.n_experts} or less",
        )
    if moe.routing is Routing.expert_choice:
        _check_capacity(moe.capacity_factor, moe.n_experts, f"moe.n_experts={moe.n_experts}")
        for name in ("balance_bias", "virtual_groups"):
            if getattr(moe, name):
                raise ConfigError(
                    f"moe.{name} has no meaning where the experts choose.",
                    value=f"moe.routing=expert_choice, moe.{name}=true",
                    rule=f"moe.{name} is an option of moe.routing=token_choice",
                    remedy=f"set moe.{name}=false, or moe.routing=token_choice (recommended)",
                )
    low, high = moe.dynamic.min_d_ff, moe.dynamic.max_d_ff
    if moe.dynamic.enabled and (low > high or low % 8 or high % 8):
        raise ConfigError(
            "The bounds of dynamic experts hold no width.",
            value=f"moe.dynamic.min_d_ff={low}, moe.dynamic.max_d_ff={high}",
            rule="min_d_ff <= max_d_ff, both multiples of 8",
            remedy="for example moe.dynamic.min_d_ff=256 moe.dynamic.max_d_ff=8192",
        )


def _check_per_layer(moe: MoEConfig, layers: list[int]) -> None:
    named = [layer for other in moe.per_layer for layer in other.layers]
    absent = sorted(set(named) - set(layers))
    twice = sorted({layer for layer in named if named.count(layer) > 1})
    if absent or twice:
        raise ConfigError(
            "moe.per_layer does not say clearly which layers it means.",
            value=f"layers {absent} are not converted" if absent else f"layers {twice} twice",
            rule=f"layers of model.layers={layers}, each in one entry",
            remedy="correct moe.per_layer, for example moe.per_layer=[{layers:[0],n_experts:8}]",
        )
    for other in moe.per_layer:
        for name in ("n_experts", "top_k", "d_ff_expert", "shared_expert"):
            value = getattr(other, name)
            if value is not None:
                _check_number(f"moe.{name}", value)
        n_experts = moe.n_experts if other.n_experts is None else other.n_experts
        top_k = moe.top_k if other.top_k is None else other.top_k
        if top_k > n_experts:
            raise ConfigError(
                "More experts per token than there are experts.",
                value=f"moe.per_layer of layers {other.layers}: top_k={top_k}, "
                f"n_experts={n_experts}",
                rule="top_k <= n_experts, in every layer",
                remedy=f"add top_k:{n_experts} to that entry",
            )
        if moe.routing is Routing.expert_choice:
            where = f"moe.per_layer of layers {other.layers}: n_experts={n_experts}"
            _check_capacity(moe.capacity_factor, n_experts, where)


def _check_capacity(capacity_factor: float, n_experts: int, where: str) -> None:
    if n_experts == 1:
        raise ConfigError(
            "One expert has no tokens to choose.",
            value=f"moe.routing=expert_choice, {where}",
            rule="a token's score is its share among the experts, and with one expert all have 1",
            remedy="set n_experts=2 or more there, or moe.routing=token_choice (recommended)",
        )
    if capacity_factor > n_experts:
        raise ConfigError(
            "Each expert would take more tokens than there are.",
            value=f"moe.capacity_factor={capacity_factor}, {where}",
            rule="an expert takes capacity_factor / n_experts of the tokens",
            remedy=f"set moe.capacity_factor={n_experts} or less",
        )


def _check_candidates(moe: MoEConfig) -> None:
    """What can be said of them without the model; the rest in `pipeline.budget`."""
    name, least = moe.budget.vary.name, 0.0
    kinds: tuple[type, ...] = (int, float)
    if moe.budget.vary is BudgetVary.n_experts:
        kinds = (int,)
        varied = [other.top_k or 0 for other in moe.per_layer if other.n_experts is None]
        least = max([moe.top_k, *varied])
        if moe.routing is Routing.expert_choice:
            least = max(2, moe.capacity_factor)
    for value in moe.budget.candidates:
        if type(value) not in kinds or value < least:
            raise ConfigError(
                f"moe.budget.candidates holds no value of moe.{name}.",
                value=value,
                rule=f"values as moe.{name} takes them"
                + (", as many experts as work on a token or more" if least else ""),
                remedy="correct moe.budget.candidates, or moe.budget.vary",
            )
        _check_number(f"moe.{name}", value)


def _check_layers(layers: list[int]) -> None:
    if not layers or sorted(set(layers)) != sorted(layers) or min(layers) < 0:
        raise ConfigError(
            "model.layers is not a set of layers.",
            value=layers,
            rule="at least one index, none twice, counted from 0",
            remedy="list each layer to convert once, for example model.layers=[0,1,2,3]",
        )


def _check_repository(name: str | None) -> None:
    part = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
    if name is not None and not re.fullmatch(f"{part}/{part}", name):
        raise ConfigError(
            "evaluate.push_to_hub is not the name of a repository.",
            value=name,
            rule="owner/name: letters, digits, '.', '_' and '-', none of these three at an end",
            remedy="correct evaluate.push_to_hub, or set it to null",
        )


def check_store_url(url: str) -> None:
    """Refuse what is no address of an object store, or holds more than that."""
    if set(url.partition("://")[2]) & set("@?:#"):
        raise ConfigError(
            "capture.store_url holds more than an address.",
            value="one with '@', '?', ':' or '#', which is not repeated here",
            rule="no configuration holds credentials: it lies in files, and some of them in git",
            remedy="write the address alone, and give credentials in the environment",
        )
    part = r"[A-Za-z0-9_=+-][A-Za-z0-9._=+-]*"
    bucket = rf"(s3|gs)://[a-z0-9][a-z0-9._-]+(/{part})*/?"
    if not re.fullmatch(rf"{bucket}|file:///[^\x00-\x1f]+", url):
        raise ConfigError(
            "capture.store_url is no address of an object store.",
            value=url,
            rule="s3://bucket/prefix, gs://bucket/prefix or file:///folder; prefixes of letters, "
            "digits, '.', '_', '=', '+' and '-'",
            remedy="correct capture.store_url, or set it to null",
        )


def check_shard_size(size: str) -> None:
    """Refuse what is no size of the checkpoint's files; raises `ConfigError`."""
    if not re.fullmatch(r"\s*0*[1-9]\d*\s*[KMGT]B\s*", size, re.IGNORECASE):
        raise ConfigError(
            "The files cannot be split by this size.",
            value=f"convert.max_shard_size={size}",
            rule="a whole number, at least 1, and one of KB, MB, GB, TB",
            remedy="for example convert.max_shard_size=2GB",
        )


def _check_device_map(name: str) -> None:
    ways = ("auto", "balanced", "balanced_low_0", "sequential")
    if name not in ways and not re.fullmatch(r"(cpu|cuda|mps|xpu|npu|hpu|mlu)(:\d+)?", name):
        raise ConfigError(
            "model.device_map names no way to place a model.",
            value=name,
            rule=f"{', '.join(ways)}, or a device such as cuda:1",
            remedy="set model.device_map=auto, or null for one device",
        )


def _check_heads(model: EmbeddedModelConfig) -> None:
    if model.d_model % (2 * model.n_heads) or model.n_heads % model.n_kv_heads:
        raise ConfigError(
            "The sizes of the embedded model do not divide.",
            value=f"model.embedded.d_model={model.d_model}, n_heads={model.n_heads}, "
            f"n_kv_heads={model.n_kv_heads}",
            rule="d_model is n_heads times an even number, and n_heads a multiple of n_kv_heads",
            remedy=f"for example model.embedded.d_model={64 * model.n_heads} "
            f"model.embedded.n_kv_heads={model.n_heads}",
        )


def _check_source(data: DataConfig) -> None:
    needed = {DataSource.hub: ("dataset", data.dataset), DataSource.files: ("files", data.files)}
    name, value = needed.get(data.source, ("", True))
    if not value:
        raise ConfigError(
            f"data.source={data.source.name} names nothing to read.",
            value=f"data.{name}={value}",
            rule=f"data.{name} is needed with data.source={data.source.name}",
            remedy=f"set data.{name}",
        )
