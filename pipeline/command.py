"""The command line that every stage shares: help, configuration, exit codes.

0 done, 2 configuration, 3 model or data, 4 resources, 5 corrupt or stale artefact, 130 interrupted.
A user's mistake gets a message; a defect of ours keeps its traceback.
"""

import argparse
import json
import os
import shlex
import signal
import sys
import textwrap
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

from pipeline import compose, console, measured, preflight, runtime
from pipeline.config import Config, ConvertConfig, RuntimeConfig, leaves, select
from pipeline.errors import ConfigError, PipelineError

WIDTH = 100
PATHS = ("convert.dense=", "convert.layers=", "convert.output=")


def stage(
    run: Callable[..., object],
    doc: str | None,
    alone: Callable[[ConvertConfig, RuntimeConfig], None] | None = None,
) -> NoReturn:
    """Run one stage as a command.

    Args:
        run: takes the configuration, and the layer if it has one.
        alone: runs instead when one of `convert.dense`, `convert.layers` and `convert.output` is
            given: from the command line only, wherever that is.
    """
    per_layer = "layer" in run.__annotations__
    parser = argparse.ArgumentParser(
        prog=f"python -m {run.__module__ if run.__module__ != '__main__' else _main_name()}",
        description=doc,
        epilog=_epilog(run, per_layer),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if per_layer:
        parser.add_argument("--layer", type=int, required=True, help="which layer to fit")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings of conf/, as Hydra takes them; refused under DVC",
    )
    args = parser.parse_args()
    extra = {"layer": args.layer} if per_layer else {}
    if alone and any(o.startswith(PATHS) for o in args.overrides):
        exit_with(lambda: _alone(alone, args.overrides))
    exit_with(lambda: _configured(run, args.overrides, extra))


def _epilog(run: Callable[..., object], per_layer: bool) -> str:
    name, read = _name(run), ", ".join(run.__globals__.get("PARAMS", ())) or "all of them"
    lines = textwrap.wrap(f"Settings that it reads: {read}.", WIDTH, break_on_hyphens=False)
    lines.append(
        "Their values: `python -m pipeline compose --print`; meanings: docs/configuration.md."
    )
    lines.append(f"In the DAG: `dvc repro {name}{'@3' * per_layer}`.")
    lines.append(
        "Ends with 0 done, 2 configuration, 3 model or data, 4 resources, 5 artefact, 130 stopped."
    )
    return "\n".join(lines)


def _name(run: Callable[..., object]) -> str:
    """The stage, also where its module is the one that runs."""
    return Path(run.__code__.co_filename).stem


def _alone(run: Callable[[ConvertConfig, RuntimeConfig], None], overrides: list[str]) -> None:
    cfg, how = compose.standalone(overrides)
    show_settings({"convert": leaves(cfg), "runtime": leaves(how)})
    runtime.configure(how)
    run(cfg, how)


def _configured(run: Callable[..., object], overrides: list[str], extra: dict[str, Any]) -> None:
    cfg: Config = compose.load(overrides)
    for layer in extra.values():
        _check_layer(layer, cfg.model.layers)
    with console.kept("_".join(map(str, (_name(run), *extra.values())))):
        sections: dict[str, dict[str, Any]] = {}
        for key, value in select(cfg, run.__globals__.get("PARAMS", ())).items():
            section, _, rest = key.rpartition(".") if key.count(".") < 2 else key.partition(".")
            sections.setdefault(section, {})[rest] = value
        show_settings(sections)
        runtime.configure(cfg.runtime)
        run(cfg, **extra)
        measured.note(cfg)


def _check_layer(layer: int, layers: list[int]) -> None:
    if layer not in layers:
        raise ConfigError(
            f"Layer {layer} is not converted.",
            value=f"--layer {layer}",
            rule=f"a layer of model.layers={layers}",
            remedy="name one of these, or add it to model.layers",
        )


def show_settings(sections: Mapping[str, Mapping[str, Any]]) -> None:
    """Say what a run reads of its configuration, each section in a line or a few."""
    for section, values in sections.items():
        shown = " ".join(f"{key}={_plain(value)}" for key, value in values.items())
        text = f"{section}: {shown}" if section else shown
        how = {"subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}
        print("\n".join(textwrap.wrap(text, WIDTH, **how)), flush=True)  # type: ignore[arg-type]


def _plain(value: Any) -> str:
    value = value.name if isinstance(value, Enum) else value
    if isinstance(value, str) and value and not set(value) & set(" \"'"):
        return value
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _typed() -> str:
    """The command that runs here, as its user typed it."""
    if "DVC_STAGE" in os.environ:
        return "dvc exp run" if "DVC_EXP_NAME" in os.environ else "dvc repro"
    return shlex.join(["python", "-m", _main_name().removesuffix(".__main__"), *sys.argv[1:]])


def _main_name() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else sys.argv[0]


def exit_with(action: Callable[[], None]) -> NoReturn:
    """Run `action` and leave with the exit code that its outcome calls for."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        runtime.check_platform()
        action()
    except PipelineError as error:
        _leave(error)
    except KeyboardInterrupt as error:
        again = f"the same command goes on where it was: {_typed()}"
        print(f"\ninterrupted; {again}", *_notes(error), sep="\n", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:  # who read the output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(130)
    except Exception as error:
        refused = preflight.refusal(error, "this command is not finished")
        if refused is None:
            raise
        for note in getattr(error, "__notes__", ()):
            refused.add_note(note)
        _leave(refused)
    sys.exit(0)


def _notes(error: BaseException) -> list[str]:
    return [f"  {note}" for note in getattr(error, "__notes__", ())]


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _leave(error: PipelineError) -> NoReturn:
    print(f"error: {error}", *_notes(error), sep="\n", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)
