"""What is particular to the dense families that native hosts hold, and must survive in them.

Read off the dense model's configuration. A family that is not here is held by `custom` alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

Config = Mapping[str, Any]
"""Of the dense model, as `dense.describe` records it."""


def head_dim(config: Config) -> int:
    """Width of one attention head."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _no_bias(config: Config) -> str:
    return ""


def _all_or_no_bias(config: Config) -> str:
    return "qkvo" if config["attention_bias"] else ""


def _no_window(config: Config) -> set[int | None]:
    return {None}


def _one_window(config: Config) -> set[int | None]:
    return {config["sliding_window"]}


def _windows_by_layer(config: Config) -> set[int | None]:
    slides = {kind == "sliding_attention" for kind in config["layer_types"]}
    return {config["sliding_window"] if s else None for s in slides}


def _nothing_fused(config: Config) -> dict[str, dict[str, int]]:
    return {}


def _phi3_fused(config: Config) -> dict[str, dict[str, int]]:
    queries = config["num_attention_heads"] * head_dim(config)
    keys = config["num_key_value_heads"] * head_dim(config)
    d_ff = config["intermediate_size"]
    return {
        "qkv_proj": {"q_proj": queries, "k_proj": keys, "v_proj": keys},
        "gate_up_proj": {"gate_proj": d_ff, "up_proj": d_ff},
    }


@dataclass(frozen=True)
class Family:
    """Every function takes the dense model's configuration."""

    attention_bias: Callable[[Config], str] = _no_bias  # which of q, k, v, o have one
    windows: Callable[[Config], set[int | None]] = _no_window  # of any layer; null: sees all
    fused: Callable[[Config], dict[str, dict[str, int]]] = _nothing_fused  # its parts' rows


FAMILIES: dict[str, Family] = {
    "llama": Family(attention_bias=_all_or_no_bias),
    "mistral": Family(windows=_one_window),
    "qwen2": Family(attention_bias=lambda config: "qkv", windows=_windows_by_layer),
    "qwen3": Family(attention_bias=_all_or_no_bias, windows=_windows_by_layer),
    "olmo2": Family(attention_bias=_all_or_no_bias),
    "granite": Family(attention_bias=_all_or_no_bias),
    "phi3": Family(windows=_one_window, fused=_phi3_fused),
}


def pieces(family: str, config: Config, name: str) -> dict[str, tuple[int, int] | None]:
    """The dense model's tensor `name` -> a host's names for its rows (start, stop); null = all."""
    for fused, parts in FAMILIES[family].fused(config).items():
        if f".{fused}." in name:
            rows = zip(parts.items(), accumulate(parts.values()), strict=True)
            return {name.replace(fused, part): (end - n, end) for (part, n), end in rows}
    return {name: None}
