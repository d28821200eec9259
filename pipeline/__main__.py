"""The tools beside the stages: `python -m pipeline <tool> --help` has examples of each.

The stages themselves are `python -m pipeline.stages.<stage>`.
"""

import argparse
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import command


class Tool(NamedTuple):
    """One tool: its body is `act` of `pipeline.<module>`, called with the arguments in order."""

    summary: str
    module: str
    act: str
    arguments: dict[str, dict[str, Any]]
    examples: str


FLAG = {"action": "store_true"}
JSON = {**FLAG, "help": "only JSON on stdout"}
OVERRIDES = {"nargs": "*", "metavar": "key=value", "help": "settings of conf/, as Hydra takes them"}

TOOLS = {
    "plan": Tool(
        "what a run will cost, and whether it fits this machine",
        "plan",
        "main",
        {
            "overrides": OVERRIDES,
            "--json": JSON,
            "--measure": {**FLAG, "help": "probe the machine for a second"},
        },
        """
python -m pipeline plan
python -m pipeline plan model=smollm2-135m data.tokens.train=10000000
python -m pipeline plan --measure --json capture.store=input""",
    ),
    "inspect": Tool(
        "what a model holds, and what can host its sparse form",
        "inspection",
        "inspect",
        {
            "model": {"help": "hub id or local folder"},
            "--revision": {"help": "commit of the hub"},
            "--json": JSON,
            "--layers": {
                "nargs": "+",
                "metavar": "K|PATTERN",
                "help": "indices, or patterns over the FFNs' paths",
            },
        },
        """
python -m pipeline inspect HuggingFaceTB/SmolLM2-135M
python -m pipeline inspect ./my-model --json
python -m pipeline inspect ./my-model --layers '*.1?.mlp' 0""",
    ),
    "compose": Tool(
        "write params.yaml from conf/, or print it",
        "compose",
        "write",
        {
            "overrides": OVERRIDES,
            "--print": {**FLAG, "help": "to stdout; params.yaml stays"},
        },
        """
python -m pipeline compose
python -m pipeline compose --print moe.n_experts=8""",
    ),
    "prefill": Tool(
        "compute layers and parts of the capture ahead, by one of Hydra's launchers",
        "prefill",
        "main",
        {
            "overrides": {**OVERRIDES, "metavar": "layer=K|shards=I/N key=value"},
            "-m": {**FLAG, "help": "several: layer=K,L,... or shards=1/N,2/N,...; of settings too"},
            "--status": {**FLAG, "help": "show how the units stand that were asked for"},
            "--json": JSON,
        },
        """
python -m pipeline prefill layer=0
python -m pipeline prefill -m layer=0,1,2,3 hydra/launcher=joblib
python -m pipeline prefill -m shards=1/4,2/4,3/4,4/4 hydra/launcher=joblib
python -m pipeline prefill -m layer=0,1,2,3 hydra/launcher=submitit_slurm moe.n_experts=8,16
python -m pipeline prefill --status""",
    ),
    "verify": Tool(
        "re-hash every artefact below a folder",
        "verify",
        "verify",
        {"folder": {"nargs": "?", "type": Path, "default": Path("stages")}},
        """
python -m pipeline verify
python -m pipeline verify ../copied/stages/convert""",
    ),
    "clean": Tool(
        "remove unfinished and outdated work; no output of a stage",
        "clean",
        "clean",
        {
            "--dry-run": {**FLAG, "help": "only show what would go"},
            "--yes": {**FLAG, "help": "do not ask"},
            "--all": {**FLAG, "help": "finished work and measurements too"},
            "--objects": {**FLAG, "help": "and the shards at capture.store_url of work that goes"},
        },
        """
python -m pipeline clean
python -m pipeline clean --dry-run --all
python -m pipeline clean --objects
python -m pipeline clean --yes""",
    ),
    "completion": Tool(
        "print what lets a shell complete commands and settings",
        "completion",
        "main",
        {
            "shell": {"choices": ["bash", "zsh"]},
            "--line": {"help": "print what completes this line instead"},
        },
        """
source <(python -m pipeline completion bash)       in ~/.bashrc
source <(python -m pipeline completion zsh)        in ~/.zshrc, after compinit
python -m pipeline completion bash --line 'python -m pipeline compose moe.ho'""",
    ),
}


def parser() -> argparse.ArgumentParser:
    """Of `python -m pipeline`."""
    how: dict[str, Any] = {
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "allow_abbrev": False,
    }
    examples = [tool.examples.strip().partition("\n")[0] for tool in TOOLS.values()]
    main_parser = argparse.ArgumentParser(
        prog="python -m pipeline",
        description=__doc__,
        epilog="\n".join(["examples:", *examples]),
        **how,
    )
    main_parser.add_argument("--version", action="version", version=version("sparse-distillation"))
    tools = main_parser.add_subparsers(required=True, dest="tool", metavar="tool")
    for name, tool in TOOLS.items():
        summary = f"{tool.summary[0].upper()}{tool.summary[1:]}."
        below = tools.add_parser(
            name,
            help=tool.summary,
            description=summary,
            epilog=f"examples:\n{tool.examples.strip()}",
            **how,
        )
        for argument, options in tool.arguments.items():
            below.add_argument(argument, **options)
    return main_parser


def main(argv: list[str] | None = None) -> None:
    main_parser = parser()
    args, more = main_parser.parse_known_args(argv)
    tool = TOOLS[args.tool]
    if "overrides" in tool.arguments:  # those behind a flag, too
        args.overrides += [word for word in more if not word.startswith("-")]
        more = [word for word in more if word.startswith("-")]
    if more:
        main_parser.error(f"unrecognized arguments: {' '.join(more)}")
    values = [getattr(args, name.lstrip("-").replace("-", "_")) for name in tool.arguments]

    def act() -> None:
        body: Callable[..., None] = getattr(import_module(f"pipeline.{tool.module}"), tool.act)
        body(*values)

    command.exit_with(act)


if __name__ == "__main__":
    main()
