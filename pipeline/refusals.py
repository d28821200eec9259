"""What is said of a configuration that does not fit its schema: the nearest key, what is allowed.

`check_overrides` looks at a command line before Hydra does; `unfit` at what was composed. Both name
the key, the value and the choices, however the mistake came in: YAML, `key=value`, `+key`, `~key`.
"""

import difflib
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from pipeline.config import Config, EmbeddedModelConfig
from pipeline.errors import ConfigError
from pipeline.rules import RANGES

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

SHOW = "`python -m pipeline compose --print` shows every setting with its value"
OTHER_MODELS = (
    " (any other dense model is model=pretrained model.id=<hub id or folder> model.layers=[...])"
)


@cache
def kinds() -> dict[str, tuple[Any, ...]]:
    """The types of every setting by its key, `NoneType` among them where it may be null."""
    found: dict[str, tuple[Any, ...]] = {}

    def walk(schema: type, path: str) -> None:
        for name, hint in typing.get_type_hints(schema).items():
            key = f"{path}.{name}" if path else name
            each = typing.get_args(hint) if isinstance(hint, UnionType) else (hint,)
            if is_dataclass(each[0]):
                walk(typing.cast(type, each[0]), key)
            else:
                found[key] = each

    walk(Config, "")
    return found


def sections() -> set[str]:
    """Keys that hold others, which may be null as a whole (`model.embedded`)."""
    return {key[:i] for key in kinds() for i, letter in enumerate(key) if letter == "."}


def allowed(key: str) -> str:
    """What a setting takes, in words: type and range, or every value of a choice."""
    words = [_word(kind) for kind in kinds()[key] if kind is not NoneType]
    text = " or ".join(words)
    low, high = RANGES.get(key, (None, None))
    if high is not None:
        text += f" between {low} and {high}"
    elif low is not None:
        text += f", at least {low}"
    return f"{text}, or null" if NoneType in kinds()[key] else text


def _word(kind: Any) -> str:
    if typing.get_origin(kind) is list:
        (inner,) = typing.get_args(kind)
        if is_dataclass(inner):
            return f"a list of {{{', '.join(f.name for f in fields(inner))}}}"
        each = typing.get_args(inner) or (inner,)
        return f"a list, [a,b,...], each {' or '.join(map(_word, each))}"
    if _is_choice(kind):
        return f"one of {', '.join(value.name for value in kind)}"
    words = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}
    return words[kind]


def _is_choice(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def choices(key: str) -> list[str]:
    """The words that a setting takes, if it takes only some."""
    each = kinds()[key]
    found = [value.name for kind in each if _is_choice(kind) for value in kind]
    return found + ["true", "false"] * (bool in each) + ["null"] * (NoneType in each)


def groups(conf: Path) -> dict[str, list[str]]:
    """The options of every group of `conf`."""
    found: dict[str, list[str]] = {}
    for path in sorted(conf.glob("*/*.yaml")):
        found.setdefault(path.parent.name, []).append(path.stem)
    return found


def nearest(word: str, known: Collection[str]) -> str | None:
    """What was probably meant: by the whole name, or by its last part."""
    word, last = word.lower(), {name.rpartition(".")[2]: name for name in known}
    if word in last:
        return last[word]
    if near := difflib.get_close_matches(word, known, n=1):
        return near[0]
    near = difflib.get_close_matches(word.rpartition(".")[2], last, n=1)
    return last[near[0]] if near else None


def unknown_key(key: str, *, value: object = None, conf: Path | None = None) -> ConfigError:
    """The refusal of a key that no schema has; `value` is what was read, and where."""
    known = kinds()
    section = key.rpartition(".")[0]
    beside = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == section]
    tops = sorted({k.partition(".")[0] for k in known} | (groups(conf).keys() if conf else set()))
    near = nearest(key, [*known, *tops] if key.isidentifier() else known)
    same = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    near = f"{', '.join(same[:-1])} or {same[-1]}" if len(same) > 1 else near
    if section and beside:
        rule = f"in section {section}: {', '.join(beside)}"
    else:
        rule = f"the sections are {', '.join(tops)}"
    return ConfigError(
        f"There is no setting named {key}.",
        value=value or key,
        rule=rule,
        remedy=f"did you mean {near}?" if near else SHOW,
    )


def unfit(plain: Any, where: str) -> ConfigError | None:
    """The first thing in a composed configuration that its schema does not take.

    Args:
        where: what was read, for the message.
    """
    if not isinstance(plain, dict):
        return ConfigError(
            "The configuration is no mapping of settings.",
            value=f"{str(plain)[:60]!r} ({where})",
            rule="section: {key: value}",
            remedy=SHOW,
        )
    flat, known = flat_keys(plain), kinds()
    for key in sorted(flat - known.keys() - sections()):
        return unknown_key(key, value=f"{key} ({where})")
    schema = OmegaConf.structured(Config)
    schema.model.embedded = EmbeddedModelConfig()
    present = known.keys() & flat
    for key in [key for key in known if key in present]:
        value = _at(plain, key)
        if str in known[key] and isinstance(value, int | float):
            return _no_text(key, value, where)
        try:
            OmegaConf.update(schema, key, value)
        except OmegaConfBaseException as error:
            return wrong_value(key, value, where, error)
    empty = {key for key in flat & sections() if _at(plain, key) is None}
    for key in sorted(flat & sections()):
        value = _at(plain, key)
        if value not in ({}, None) or (value is None and key != "model.embedded"):
            return ConfigError(
                f"{key} is a section.",
                value=f"{key}={value} ({where})",
                rule=f"it holds {', '.join(k for k in known if k.startswith(f'{key}.'))}",
                remedy=f"set one of these, or leave {key} out",
            )
    absent = [k for k in known if k not in flat and not k.startswith(tuple(f"{e}." for e in empty))]
    if absent:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        return ConfigError(
            "A setting is missing.",
            value=f"{', '.join(absent[:5])}{more} ({where})",
            rule="every setting stands in conf/ with its default",
            remedy="put it back in conf/ and run `python -m pipeline compose`",
        )
    return None


def wrong_value(key: str, value: Any, where: str, error: Exception | None = None) -> ConfigError:
    """The refusal of a value that is of another type or none of the choices."""
    near = nearest(str(value), choices(key))
    shown = "null" if value is None else value
    inner = getattr(error, "key", None) if isinstance(error, ConfigKeyError) else None
    return ConfigError(
        f"{key} does not take this value." if not inner else f"{key} has no setting named {inner}.",
        value=f"{key}={shown} ({where})",
        rule=allowed(key),
        remedy=f"did you mean {key}={near}?" if near else f"give {key} such a value",
    )


def _no_text(key: str, value: float, where: str) -> ConfigError:
    """OmegaConf would make a text of it, but not the one that was written: `2024_12`, `007`."""
    return ConfigError(
        f"{key} is read as {'true or false' if isinstance(value, bool) else 'a number'}.",
        value=f"{key}={value} ({where})",
        rule="a text; YAML reads digits, and words such as `no`, as something else",
        remedy=f'quote it: `{key.rpartition(".")[2]}: "..."` in a file, '
        f"`'{key}=\"...\"'` on the command line",
    )


def check_overrides(overrides: Iterable[str], conf: Path) -> None:
    """Refuse what no composition of `conf` takes; raises `ConfigError`."""
    options = groups(conf)
    for text, override in parsed(overrides, conf).items():
        _check_override(override, text, options, conf)


def parsed(overrides: Iterable[str], conf: Path) -> dict[str, "Override"]:
    """Each as Hydra reads it; raises `ConfigError`."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, found = OverridesParser.create(), {}
    for text in overrides:
        try:
            (found[text],) = parser.parse_overrides([text])
        except HydraException:
            known = text in kinds().keys() | groups(conf).keys()
            raise ConfigError(
                "A setting on the command line cannot be read.",
                value=repr(text),
                rule="key=value; quote what the shell or Hydra would take apart: 'key=\"a b\"'",
                remedy=f"write {text}=<value>" if known else SHOW,
            ) from None
    return found


def _check_override(
    override: "Override", text: str, options: Mapping[str, list[str]], conf: Path
) -> None:
    key = override.key_or_group
    if key.partition("/")[0].partition(".")[0] == "hydra":
        raise ConfigError(
            "Hydra's own settings have no meaning here.",
            value=text,
            rule="hydra.* and hydra/launcher belong to `python -m pipeline prefill`",
            remedy=f"leave {text} out",
        )
    if override.package or key not in kinds().keys() | sections() | options.keys():
        raise unknown_key(text.lstrip("+~").partition("=")[0], value=text, conf=conf)
    if override.is_delete():
        raise ConfigError(
            "A setting cannot be removed.",
            value=text,
            rule="every setting has a value",
            remedy=f"leave {text} out, or set {key}=<value>",
        )
    if override.is_add() or (override.is_force_add() and key in options):
        raise ConfigError(
            f"{key} is there already.",
            value=text,
            rule="a key of conf/ is set as key=value, with no +",
            remedy=f"write {text.lstrip('+')}",
        )
    if override.is_sweep_override():
        raise ConfigError(
            f"{key} takes one value here.",
            value=text,
            rule="several values are a sweep, which is several runs",
            remedy=f"`dvc exp run --queue -S '{text}'`, or quote a value that has commas",
        )
    value = override.value()
    if key in options:
        _check_group(key, value, text, options[key])
    elif key in kinds() and isinstance(value, dict):
        raise wrong_value(key, value, "on the command line")
    for below in flat_keys(value, key) - {key}:
        if below not in kinds():
            raise unknown_key(below, value=text, conf=conf)


def _check_group(group: str, value: Any, text: str, options: list[str]) -> None:
    several = value if isinstance(value, list) and group == "experiment" else [value]
    for name in several:
        if name in options:
            continue
        near = nearest(str(name), options)
        remedy = f"did you mean {group}={near}?" if near else f"choose one, {group}={options[0]}"
        raise ConfigError(
            f"No such choice: {group}={name}.",
            value=text,
            rule=f"one of {', '.join(options)}",
            remedy=remedy + OTHER_MODELS * (group == "model"),
        )


def flat_keys(node: Any, path: str = "") -> set[str]:
    """The dotted keys of what holds no others."""
    if not isinstance(node, dict) or not node:
        return {path}
    return {k for key, below in node.items() for k in flat_keys(below, f"{path}.{key}".strip("."))}


def _at(plain: Any, key: str) -> Any:
    for part in key.split("."):
        plain = plain[part]
    return plain
