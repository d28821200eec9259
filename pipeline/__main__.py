"""The tools beside the stages.

python -m pipeline compose                         conf/ -> params.yaml
python -m pipeline compose --print moe.n_experts=8 the whole configuration with its values
python -m pipeline inspect HuggingFaceTB/SmolLM2-135M
python -m pipeline inspect ./my-model --json
python -m pipeline inspect ./my-model --layers '*.1?.mlp' 0      only some layers
python -m pipeline verify stages                   re-hash every artefact below a folder
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline import command, compose, workdir
from pipeline.errors import ArtifactError, ConfigError


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version("sparse-distillation"))
    tools = parser.add_subparsers(required=True, dest="tool", metavar="tool")

    tool = tools.add_parser("compose", help="write params.yaml from conf/, or print it")
    tool.add_argument("--print", action="store_true", help="to stdout; params.yaml stays")
    tool.add_argument("overrides", nargs="*", metavar="key=value")
    tool.set_defaults(act=lambda a: _compose(a.overrides, a.print))

    tool = tools.add_parser("inspect", help="what a model holds, and what can host its sparse form")
    tool.add_argument("model", help="hub id or local folder")
    tool.add_argument("--json", action="store_true", help="only JSON on stdout")
    tool.add_argument("--revision", help="commit of the hub")
    tool.add_argument(
        "--layers", nargs="+", metavar="K|PATTERN", help="indices, or patterns over the FFNs' paths"
    )
    tool.set_defaults(act=lambda a: _inspect(a.model, a.revision, a.json, a.layers))

    tool = tools.add_parser("verify", help="re-hash every artefact below a folder")
    tool.add_argument("folder", nargs="?", type=Path, default=Path("stages"))
    tool.set_defaults(act=lambda a: _verify(a.folder))

    tool = tools.add_parser("prefill", help="fit layers at once, by one of Hydra's launchers")
    tool.add_argument("overrides", nargs="*", metavar="-m layer=K,L key=value")
    tool.set_defaults(act=lambda a: _prefill([*a.flags, *a.overrides]))

    args, args.flags = parser.parse_known_args(argv)
    if args.flags and args.tool != "prefill":  # which passes Hydra's flags on
        parser.error(f"unrecognized arguments: {' '.join(args.flags)}")
    command.exit_with(lambda: args.act(args))


def _compose(overrides: list[str], to_stdout: bool) -> None:
    composed = compose.compose(overrides)
    compose.checked(composed)
    if to_stdout:
        print(compose.to_yaml(composed), end="")
    elif overrides:
        raise ConfigError(
            "params.yaml is written without overrides.",
            value=" ".join(overrides),
            rule="params.yaml is what conf/ alone composes to",
            remedy="make the choice in conf/, use `dvc exp run -S`, or add --print",
        )
    else:
        compose.PARAMS.write_text(compose.to_yaml(composed), encoding="utf-8")
        print(f"wrote {compose.PARAMS}")


def _inspect(model: str, revision: str | None, as_json: bool, layers: list[str] | None) -> None:
    from pipeline import dense, hosts, loaders, record

    described = dense.inspect(record.located(model), revision=revision)
    paths = [layer["path"] for layer in described["layers"]]
    which = layers and [int(k) if k.isdecimal() else k for k in layers]
    described["selected"] = dense.select_layers(paths, which)
    meant = [described["layers"][k] for k in described["selected"]]
    described["hosts"] = hosts.explain({**described, "layers": meant})
    able = [host for host, answer in described["hosts"].items() if answer.startswith("yes")]
    described["loaders"] = {host: loaders.loaders(host) for host in able}
    described["cost"] = _cost(described)
    if as_json:
        print(json.dumps(described, indent=1, sort_keys=True))
        return
    print(f"{model}: {described['family']}, {described['parameters']:,} parameters")
    print(f"{described['n_layers']} layers, d_model {described['d_model']}, {described['dtype']}")
    print(f"FFNs: {dense.path_pattern(paths)}")
    for kind, alike in _alike(described["layers"]).items():
        print(f"  layers {record.spans(alike)} ({len(alike)}): {kind}")
    print("hosts of the sparse model:")
    for host, answer in described["hosts"].items():
        print(f"  {host}: {answer}")
        if known := described["loaders"].get(host):
            print("    " + "; ".join(f"{loader} {how}" for loader, how in known.items()))
    print("a conversion at the configured settings:")
    for name, figure in described["cost"].items():
        print(f"  {name}: {figure if isinstance(figure, str) else format(figure, ',')}")
    print("\nas an entry of conf/model/:\n" + _conf_entry(model, described), end="")


def _cost(described: Mapping[str, Any]) -> dict[str, Any]:
    """What `cost.cost` says, or under `none` why there is nothing to say."""
    from pipeline import budget, cost

    if not compose.CONF.is_dir():
        return {"none": "there is no conf/ here"}
    cfg = compose.load([])
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where it names the host
            plans = budget.uniform(described, cfg.moe, described["selected"])
    except ConfigError as error:
        return {"none": f"{error.what} {error.value}"}
    return cost.cost(described, plans, cfg)


def _alike(layers: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Layer indices by what their FFN is."""
    kinds: dict[str, list[int]] = {}
    for layer in layers:
        kind = f"d_ff {layer['d_ff']}, {'gated ' * layer['gated']}{layer['activation']}"
        kinds.setdefault(kind + ", biases" * layer["bias"], []).append(layer["index"])
    return kinds


def _conf_entry(model: str, described: dict[str, Any]) -> str:
    entry = {
        "name": Path(model).name.lower(),
        "id": model,
        "revision": described["revision"],
        "dtype": "auto",
        "device_map": None,
        "trust_remote_code": False,
        "layers": described["selected"],
        "embedded": None,
    }
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in entry.items())


def _prefill(arguments: list[str]) -> None:
    from pipeline import prefill

    prefill.main(arguments)


def _verify(folder: Path) -> None:
    manifests = sorted(folder.rglob(workdir.MANIFEST))
    if not manifests:
        raise ArtifactError(
            "There is no artefact to verify.",
            value=folder.absolute(),
            rule=f"an artefact is a folder with a {workdir.MANIFEST}",
            remedy="name a folder that holds artefacts, for example stages",
        )
    damaged = []
    for manifest in manifests:
        try:
            workdir.verify(manifest.parent)
            print(f"ok       {manifest.parent}")
        except ArtifactError as error:
            damaged.append(str(error.value))
            print(f"DAMAGED  {manifest.parent}\n{error}")
    if damaged:
        raise ArtifactError(
            f"{len(damaged)} of {len(manifests)} artefacts are damaged.",
            value="; ".join(damaged),
            rule="every file has the digest that its manifest recorded",
            remedy="remove the damaged folders and run `dvc repro`",
        )


if __name__ == "__main__":
    main()
