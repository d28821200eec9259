"""Settings that would lower what does not fit, each with what it leaves."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from pipeline.config import Codec, Config, Store
from pipeline.planned import Plan, make
from pipeline.preflight import size

ENOUGH = 0.97  # of what is needed: a lever that leaves more is not told


def levers(cfg: Config, record: Mapping[str, Any], found: Plan) -> list[str]:
    """What would lower what is lacking, each with what it leaves; first what alone suffices."""
    offers: list[tuple[int, str]] = []
    for text, changed in _changes(cfg, record, found):
        other = make(changed, record, found.free)
        worse, told = other.lacking(), []
        if other.disk < ENOUGH * found.disk > ENOUGH * found.free.disk:
            told.append(f"disk {size(other.disk)}")
        most = found.free.files
        if most is not None and other.files < ENOUGH * found.files > ENOUGH * most:
            told.append(f"{other.files:,} files")
        for kind, free in (("host", found.free.memory), ("gpu", found.free.gpu)):
            for name, c in found.left.items():
                lower = getattr(other.costs[name], kind)
                if free is not None and lower < ENOUGH * getattr(c, kind) > ENOUGH * free:
                    told.append(f"{name} {size(lower)}")
        if told:
            enough = "" if worse else ", which fits"
            offers.append((len(worse), f"{text} ({', '.join(told)}{enough})"))
    return [text for _, text in sorted(offers, key=lambda offer: offer[0])]


def _changes(cfg: Config, record: Mapping[str, Any], found: Plan) -> list[tuple[str, Config]]:
    changes: list[tuple[str, Config]] = []

    def offer(key: str, value: Any, shown: object = None) -> None:
        section, _, name = key.partition(".")
        changed = copy.deepcopy(cfg)
        at = getattr(changed, section)
        if "." in name:
            inner, _, name = name.partition(".")
            at = getattr(at, inner)
        if getattr(at, name) != value:
            setattr(at, name, value)
            changes.append((f"{key}={value if shown is None else shown}", changed))

    if fewer := _tokens_that_fit(cfg, record, found):
        offer("data.tokens.train", fewer)
    offer("capture.store", Store.input, "input")
    if cfg.capture.codec is not Codec.compact:
        offer("capture.codec", Codec.compact, "compact")
    if len(cfg.model.layers) > 1:
        half = cfg.model.layers[: len(cfg.model.layers) // 2]
        offer("model.layers", half, str(half).replace(" ", ""))
    offer("train.static_control", False, "false")
    offer("capture.shard_mb", min(cfg.capture.shard_mb, 16.0))
    offer("train.stream", True, "true")
    for section in ("capture", "heal", "evaluate"):
        offer(f"{section}.batch_size", 1)
    offer("train.batch_size", min(cfg.train.batch_size, 512))
    return changes


def _tokens_that_fit(cfg: Config, record: Mapping[str, Any], found: Plan) -> int | None:
    """The most training tokens, in whole batches, that fit; or that fit the disk at least."""

    def most(fits: Callable[[Plan], bool]) -> int:
        low, high = 0, cfg.data.tokens.train // cfg.train.batch_size
        changed = copy.deepcopy(cfg)
        while high - low > 1:
            middle = (low + high) // 2
            changed.data.tokens.train = middle * cfg.train.batch_size
            enough = fits(make(changed, record, found.free))
            low, high = (middle, high) if enough else (low, middle)
        return low * cfg.train.batch_size

    return most(lambda p: not p.lacking()) or most(lambda p: p.disk <= p.free.disk) or None
