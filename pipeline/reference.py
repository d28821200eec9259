"""`docs/configuration.md`: every setting, from its schema, its range and its default.

The meaning of a setting is the comment beside its field in `pipeline/config.py`, or directly above
it; a unit stands in brackets at its end. Run: `python -m pipeline.reference`, or `make docs`.
"""

import ast
import io
import itertools
import tokenize
import typing
from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pipeline import compose, config, refusals

PAGE = Path("docs/configuration.md")
STAGES = ("dense", "tokens", "capture", "budget", "train", "heal", "convert", "evaluate")
MANY = 10
"""Settings that an option may change before the table names its file instead."""

HEAD = f"""# Configuration

`make docs` writes this page from `pipeline/config.py` (types and meanings), `pipeline/rules.py`
(ranges) and `conf/` (defaults). What a command would read is shown by
`python -m pipeline compose --print`, with its overrides.

Where to choose: for good in `conf/`, then `python -m pipeline compose`; for one experiment
`dvc exp run -S key=value`; for one command `python -m pipeline.stages.<stage> key=value`. An
unknown key, a wrong type and a value out of range end with exit code 2.

"Runs again" names the first stage that reads a setting. When the setting changes, that stage and
those behind it run again and those before it are reused, in the order
{", ".join(STAGES)}. At a dash nothing runs again.
"""


@dataclass(frozen=True)
class Setting:
    """One row; `meaning` is without its unit, and with that of every value of a choice."""

    key: str
    meaning: str
    unit: str


@dataclass(frozen=True)
class Section:
    """A group of settings, those of its own subgroups apart."""

    path: str
    meaning: str
    settings: list[Setting]


def comments() -> dict[tuple[str, str], str]:
    """(class, field or member) in `pipeline/config.py` -> its comment."""
    source = Path(config.__file__).read_text(encoding="utf-8")
    above: dict[int, str] = {}
    beside: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            kept = above if token.line.lstrip().startswith("#") else beside
            kept[token.start[0]] = token.string.removeprefix("#").strip()
    found = {}
    classes = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    for schema, line in ((node, line) for node in classes for line in node.body):
        if isinstance(line, ast.AnnAssign | ast.Assign):
            target = line.target if isinstance(line, ast.AnnAssign) else line.targets[0]
            first, last = line.lineno, line.end_lineno or line.lineno
            while first - 1 in above:
                first -= 1
            lines = [above.get(n) or beside.get(n) for n in range(first, last + 1)]
            found[schema.name, ast.unparse(target)] = " ".join(filter(None, lines))
    return found


def sections() -> list[Section]:
    """Every setting, in the order of the schema."""
    said, found = comments(), []

    def walk(schema: type, path: str) -> None:
        section = Section(path, (schema.__doc__ or "") if path else "", [])
        found.append(section)
        for name, hint in typing.get_type_hints(schema).items():
            key = f"{path}.{name}" if path else name
            if key not in refusals.kinds():
                each = typing.get_args(hint) or (hint,)
                walk(each[0], key)
                continue
            meaning, unit = said[schema.__name__, name], ""
            if meaning.endswith("]"):
                meaning, _, unit = meaning[:-1].rpartition(" [")
            values = ((value, said.get((each.__name__, value))) for each, value in _values(key))
            more = [f"`{value}`: {text}" for value, text in values if text]
            section.settings.append(Setting(key, "; ".join([meaning, *more]), unit))

    walk(config.Config, "")
    return found


def _values(key: str) -> list[tuple[type, str]]:
    """The words that a setting takes, each with the class that says what it means."""
    kinds = [k for k in refusals.kinds()[key] if isinstance(k, type) and issubclass(k, Enum)]
    return [(kind, value) for kind in kinds for value in kind.__members__]


def page() -> str:
    """The whole document; called in the project's folder."""
    defaults, readers = _composed(), _readers()
    parts = [HEAD]
    for section in sections():
        parts.append(f"\n## {section.path or 'The whole'}\n\n{section.meaning}\n".rstrip() + "\n\n")
        parts += _options(section.path, defaults)
        parts.append("| key | allowed | default | unit | meaning | runs again |\n")
        parts.append("|---|---|---|---|---|---|\n")
        for setting in section.settings:
            row = (
                f"`{setting.key}`",
                refusals.allowed(setting.key),
                f"`{_shown(defaults[setting.key])}`",
                setting.unit,
                setting.meaning,
                f"`{first}`" if (first := _first(setting.key, readers)) else "-",
            )
            parts.append("| " + " | ".join(map(_cell, row)) + " |\n")
    parts.append(
        "\n## experiment\n\nSeveral choices in one word; `experiment=[seed,pico]` takes two.\n\n"
    )
    parts += _options("experiment", defaults)
    return "".join(parts).rstrip() + "\n"


def _composed(*overrides: str) -> dict[str, Any]:
    """Leaf -> value of what `conf/` composes to."""
    found: dict[str, Any] = {}

    def walk(node: Any, path: str) -> None:
        if not isinstance(node, dict):
            found[path] = node
            return
        for key, value in node.items():
            walk(value, f"{path}.{key}" if path else str(key))

    walk(OmegaConf.to_container(compose.compose(list(overrides))), "")
    return found


def _readers() -> dict[str, tuple[str, ...]]:
    return {name: import_module(f"pipeline.stages.{name}").PARAMS for name in STAGES}


def _first(key: str, readers: dict[str, tuple[str, ...]]) -> str | None:
    for stage, keys in readers.items():
        if any(key == k or key.startswith(f"{k}.") for k in keys):
            return stage
    return None


def _options(group: str, defaults: dict[str, Any]) -> list[str]:
    """The files of a group, and what each changes."""
    files = sorted((compose.CONF / group).glob("*.yaml")) if group else []
    if len(files) < 2 and group != "experiment":
        return []
    rows = ["| option | what it is | what it changes |\n", "|---|---|---|\n"]
    for file in files:
        changed = {
            key: value
            for key, value in _composed(f"{group}={file.stem}").items()
            if defaults.get(key) != value
        }
        shown = ", ".join(f"`{key}={_shown(value)}`" for key, value in changed.items())
        if len(changed) > MANY:
            shown = f"{len(changed)} settings: `{file}`"
        row = (f"`{group}={file.stem}`", _said(file), shown or "the default")
        rows.append("| " + " | ".join(map(_cell, row)) + " |\n")
    return [*rows, "\n"]


def _cell(text: str) -> str:
    """Markdown takes `|` for a border, and `<` outside code for a tag."""
    parts = text.replace("|", "\\|").split("`")
    return "`".join(p if n % 2 else p.replace("<", "\\<") for n, p in enumerate(parts))


def _said(file: Path) -> str:
    """The comment at the head of a file."""
    head = itertools.takewhile(
        lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines()
    )
    lines = [line.removeprefix("#").strip() for line in head]
    return " ".join(line for line in lines if not line.startswith("@package"))


def _shown(value: Any) -> str:
    if isinstance(value, list) and len(value) > 2 and value == [*range(len(value))]:
        return f"[0,...,{len(value) - 1}]"
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
