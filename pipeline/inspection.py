"""What a model holds, what can host its sparse form, and what a conversion would cost."""

import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import compose
from pipeline.errors import ConfigError


def inspect(model: str, revision: str | None, as_json: bool, layers: list[str] | None) -> None:
    """Print it; only JSON with `as_json`. Raises `InputError` where the model cannot be used."""
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
