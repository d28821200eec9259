"""What can be computed ahead, and how a command line names it.

A unit is one layer of `train` (`layer=3`) or one part of `capture` (`shards=1/4`), under one
configuration: sweeps of settings give several units of the same name. Everything that can be
refused is refused here, before anything is launched.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from omegaconf import OmegaConf

from pipeline import artifacts, compose, lineage, refusals, sources
from pipeline.config import Config, select
from pipeline.errors import ConfigError
from pipeline.locks import Part
from pipeline.stages import CAPTURE, DENSE, TOKENS, budget, capture, train

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

KINDS = ("layer", "shards")
HOW = ("runtime.", "prefill.")
"""Overrides that change no result."""
READS = {"layer": (DENSE, TOKENS, CAPTURE), "shards": (DENSE, TOKENS)}
SETTINGS = {"layer": (*budget.PARAMS, *train.PARAMS), "shards": capture.PARAMS}
CODE = {
    "layer": ("pipeline.stages.budget", "pipeline.stages.train"),
    "shards": ("pipeline.stages.capture",),
}


@dataclass(frozen=True)
class Unit:
    """One piece of work, as it is recorded.

    Two units have one `id` where they would compute the same: it covers the settings that the unit
    reads, the manifests of its inputs and its code.
    """

    id: str
    kind: str  # of KINDS
    what: str  # "3" or "1/4"
    overrides: tuple[str, ...]  # the user's that say what is computed, without those of units
    settings: dict[str, Any]  # the whole configuration
    threads: int | None = None  # where the launcher decides; see `launch.spread`
    gpu_bytes: int | None = None  # that a layer takes, where several share a GPU; see `gpus`

    @property
    def name(self) -> str:
        return f"{self.kind} {self.what}"

    @property
    def part(self) -> Part:
        """Of a part of `capture`: (i, n), from 1."""
        i, _, n = self.what.partition("/")
        return int(i), int(n)

    def cfg(self) -> Config:
        """Raises `ConfigError` where the record is of another version of the schema."""
        return compose.checked(OmegaConf.create(self.settings), f"of unit {self.id}")


def titles(units: "Iterable[Unit]") -> dict[str, str]:
    """What tells units apart, by id: the name, and the overrides that not all of them have."""
    units = list(units)
    shared = set.intersection(*(set(unit.overrides) for unit in units)) if units else set()
    return {
        unit.id: " ".join([unit.name, *(o for o in unit.overrides if o not in shared)])
        for unit in units
    }


def split(overrides: list[str], multirun: bool) -> tuple[dict[str, "Override"], list[str]]:
    """A command line: what says which units, as Hydra reads it, and what is for Hydra itself.

    Raises:
        ConfigError: it cannot be read, or names no kind of unit, or two.
    """
    parsed = refusals.parsed(overrides, compose.CONF)
    hydras = [text for text, o in parsed.items() if is_hydras(o)]
    own = {text: o for text, o in parsed.items() if text not in hydras}
    _check_kinds(own, multirun)
    return own, hydras


def asked(own: "Mapping[str, Override]") -> list[Unit]:
    """The units that are asked for, each once, in order.

    Raises:
        ConfigError: a setting, a layer or a part that there is not.
        ArtifactError: what a unit would read is missing, or made with other settings.
    """
    lines: list[tuple[str, str, tuple[str, ...]]] = []
    composed: dict[tuple[str, ...], tuple[Config, dict[str, Any]]] = {}
    for line in _product(own.values()):
        (name,) = (text for text in line if text.startswith(tuple(f"{k}=" for k in KINDS)))
        kind, what = name.split("=", 1)
        rest = tuple(text for text in line if text != name)
        if rest not in composed:
            found = compose.compose(list(rest))
            plain = cast(dict[str, Any], OmegaConf.to_container(found))
            composed[rest] = compose.checked(found), plain
        lines.append((kind, what.strip("'\""), rest))
        check(*lines[-1][:2], composed[rest][0].model.layers)
    made_of = {rest: _made_of(lines[0][0], cfg) for rest, (cfg, _) in composed.items()}
    units: dict[str, Unit] = {}
    for kind, what, rest in lines:
        digest = hashlib.sha256(f"{kind}={what} {made_of[rest]}".encode()).hexdigest()[:10]
        said = tuple(text for text in rest if not text.startswith(HOW))
        name = f"{kind}_{what.replace('/', '_of_')}-{digest}"
        units.setdefault(name, Unit(name, kind, what, said, composed[rest][1]))
    return list(units.values())


def _made_of(kind: str, cfg: Config) -> str:
    """What the work of any unit of a kind depends on, under one configuration."""
    lineage.check(cfg, READS[kind])
    made_of = {
        "settings": select(cfg, SETTINGS[kind]),
        "inputs": [artifacts.file_digest(folder / artifacts.MANIFEST) for folder in READS[kind]],
        "code": [sources.code_digest(module) for module in CODE[kind]],
    }
    return json.dumps(made_of, sort_keys=True)


def is_hydras(override: "Override") -> bool:
    return override.key_or_group.partition("/")[0].partition(".")[0] == "hydra"


def _check_kinds(own: "Mapping[str, Override]", multirun: bool) -> None:
    kinds = [o for o in own.values() if o.get_key_element() in KINDS]
    if len(kinds) != 1:
        raise ConfigError(
            "It is not said which units to run.",
            value=" ".join(own) or "no arguments",
            rule="either layer=K, a layer of `train`, or shards=I/N, a part of `capture`; with -m "
            "several, layer=K,L,... or shards=1/N,2/N,...",
            remedy="for example -m layer=0,1,2,3 hydra/launcher=joblib",
        )
    swept = [text for text, o in own.items() if o.is_sweep_override()]
    if swept and not multirun:
        raise ConfigError(
            "Several units are a sweep.",
            value=" ".join(swept),
            rule="one unit without -m, several with it",
            remedy=f"add -m, and a launcher to run them at once: -m {' '.join(own)} "
            "hydra/launcher=joblib",
        )


def _product(overrides: "Iterable[Override]") -> list[list[str]]:
    """Every combination of the values of sweeps, as Hydra's own sweeper would give it."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    overrides = list(overrides)
    for override in overrides:
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise ConfigError(
                "A sweep has no end.",
                value=override.input_line,
                rule="values with commas, range(0,4) or choice(a,b)",
                remedy="list the values",
            )
    (batch,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    return batch


def check(kind: str, what: str, layers: list[int]) -> None:
    """Refuse a layer or a part that there is not; raises `ConfigError`."""
    if kind == "layer" and (not what.isdecimal() or int(what) not in layers):
        raise ConfigError(
            f"Layer {what} is not converted.",
            value=f"layer={what}",
            rule=f"a layer of model.layers={layers}",
            remedy="name one of these, or add it to model.layers",
        )
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", what)
    if kind == "shards" and (not match or int(match[1]) > int(match[2])):
        raise ConfigError(
            "There is no such part of the shards.",
            value=f"shards={what}",
            rule="shards=I/N, part I of N, counted from 1: I <= N",
            remedy="for example -m shards=1/4,2/4,3/4,4/4",
        )
