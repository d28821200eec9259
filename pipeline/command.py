"""The command line that every stage shares: help, configuration, exit codes.

0 done, 2 configuration, 3 model or data, 4 resources, 5 corrupt or stale artefact, 130 interrupted.
A user's mistake gets a message; a defect of ours keeps its traceback.
"""

import argparse
import errno
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from pipeline import compose, runtime
from pipeline.config import Config, ConvertConfig, RuntimeConfig
from pipeline.errors import PipelineError, ResourceError

PATHS = ("convert.dense=", "convert.layers=", "convert.output=")
RESOURCE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE)


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
        formatter_class=argparse.RawDescriptionHelpFormatter,
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


def _alone(run: Callable[[ConvertConfig, RuntimeConfig], None], overrides: list[str]) -> None:
    cfg, how = compose.standalone(overrides)
    runtime.configure(how)
    run(cfg, how)


def _configured(run: Callable[..., object], overrides: list[str], extra: dict[str, Any]) -> None:
    cfg: Config = compose.load(overrides)
    runtime.configure(cfg.runtime)
    run(cfg, **extra)


def _main_name() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else sys.argv[0]


def exit_with(action: Callable[[], None]) -> NoReturn:
    """Run `action` and leave with the exit code that its outcome calls for."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        action()
    except PipelineError as error:
        _leave(error)
    except KeyboardInterrupt:
        again = "the same command goes on where it was"
        print(f"\ninterrupted; {again}", file=sys.stderr, flush=True)
        sys.exit(130)
    except MemoryError as error:
        _leave(_resource(f"out of memory: {error}", "memory", "lower the batch size or the budget"))
    except OSError as error:
        if error.errno not in RESOURCE_ERRNOS:
            raise
        remedy = "free space or fix the permission, then run the same command again"
        _leave(_resource(str(error), "a writable disk with room", remedy))
    sys.exit(0)


def _resource(value: str, rule: str, remedy: str) -> ResourceError:
    return ResourceError("The machine ran out of something.", value=value, rule=rule, remedy=remedy)


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _leave(error: PipelineError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)
