"""The speed table: streaming training as the original does it, and ours from stored activations.

Three ways to train every layer, each in a process of its own, taking turns: streaming in parallel
(all layers step on each dense forward pass), streaming sequentially (one layer after the other,
dense passes for each), and offline (one dense pass into the stores, then each layer from its own).
Measured: wall time up to some numbers of epochs, medians and spread over the repeats, the ratios
within each repeat; bytes on disk; peak memory. The models have random weights and the text is
random: speed only. Validations and the reading of text are left out of every way. And that the
three give the same losses and weights, bit for bit, is checked in float32.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import runtime
from pipeline.config import RuntimeConfig

WAYS = ("parallel", "sequential", "offline")
OUTPUT = Path("benchmarks/results/streaming.json")


@dataclass(frozen=True)
class Setting:
    """What one table is measured on."""

    name: str
    overrides: tuple[str, ...]  # of conf/
    steps: int  # of an epoch
    epochs: tuple[int, ...]
    sequential_epochs: int  # the slowest way is run no further


LARGER = (
    "model.embedded.d_model=256",
    "model.embedded.d_ff=1024",
    "model.embedded.n_layers=8",
    "model.embedded.n_heads=8",
    "model.embedded.n_kv_heads=4",
    "model.embedded.vocab_size=8192",
    "model.layers=[0,1,2,3,4,5,6,7]",
)
FULL = (Setting("tiny", (), 4, (1, 3, 10), 3), Setting("larger", LARGER, 2, (1, 3), 1))
QUICK = (Setting("tiny", (), 2, (1, 3), 1),)


class Worker:
    """A process that runs one way as often as it is asked to; see `benchmarks/worker.py`."""

    def __init__(self, **job: Any) -> None:
        line = [sys.executable, "-m", "benchmarks.worker", json.dumps(job)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(line, stdin=pipe, stdout=pipe, text=True)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a worker ended early; its error stands above")
        return json.loads(line)

    def run(self) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()


def measure(setting: Setting, repeats: int) -> dict[str, Any]:
    """One table: what the workers said, and its figures."""
    with ExitStack() as stack:
        workers = {}
        for way in WAYS:
            last = setting.sequential_epochs if way == "sequential" else max(setting.epochs)
            job = {"way": way, "overrides": setting.overrides, "steps": setting.steps}
            workers[way] = stack.enter_context(Worker(**job, epochs=last))
        ready = {way: worker.answer() for way, worker in workers.items()}
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for repeat in range(repeats):
            turn = repeat % len(WAYS)
            for way in (*WAYS[turn:], *WAYS[:turn]):
                runs[way].append(workers[way].run())
                took = runs[way][-1]["seconds"][-1]
                print(f"{setting.name}: {repeat + 1}/{repeats} {way} {took:.1f} s", file=sys.stderr)
    about = ready["offline"]
    first = runs["offline"][0]
    return {
        "model": {name: about[name] for name in ("layers", "parameters")},
        "shape": about["shape"],
        "tokens_per_epoch": about["tokens"],
        "tokens_per_step": about["step_tokens"],
        "dtype": about["dtype"],
        "machine": about["machine"],
        "epochs": {str(epochs): _figures(runs, epochs) for epochs in setting.epochs},
        "capture_seconds": _spread([run["capture_seconds"] for run in runs["offline"]]),
        "disk_bytes": first["disk_bytes"],
        "store_bytes_per_token_and_layer": round(
            first["store_bytes"] / about["tokens"] / about["layers"], 1
        ),
        "peak_bytes_above_the_loaded_model": {
            way: max(run["peak_bytes"] for run in runs[way]) - ready[way]["base_bytes"]
            for way in WAYS
        },
    }


def _figures(runs: dict[str, list[dict[str, Any]]], epochs: int) -> dict[str, Any]:
    """Seconds of each way, and the ratios within a repeat; only of what was run that far."""
    seconds = {
        way: [run["seconds"][epochs - 1] for run in runs[way]]
        for way in WAYS
        if len(runs[way][0]["seconds"]) >= epochs
    }
    seconds["second"] = seconds["offline"]
    captures = [run["capture_seconds"] for run in runs["offline"]]
    seconds["offline"] = [c + s for c, s in zip(captures, seconds["second"], strict=True)]
    ratios = {
        f"{way}/{ours}": _spread(
            [a / b for a, b in zip(seconds[way], seconds[ours], strict=True)], digits=2
        )
        for way in ("parallel", "sequential")
        for ours in ("offline", "second")
        if way in seconds
    }
    return {"seconds": {way: _spread(s) for way, s in seconds.items()}, "ratios": ratios}


def _spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in found.items()}


COLUMNS = {
    "parallel": "parallel s",
    "sequential": "sequential s",
    "offline": "offline s",
    "second": "second point s",
    "parallel/offline": "par / off",
    "sequential/offline": "seq / off",
    "parallel/second": "par / second",
    "sequential/second": "seq / second",
}


def table(name: str, measured: dict[str, Any]) -> str:
    """One setting's measurements as text."""
    shape, peaks = measured["shape"], measured["peak_bytes_above_the_loaded_model"]
    rows = [["epochs", *COLUMNS.values()]]
    for epochs, figures in measured["epochs"].items():
        found = figures["seconds"] | figures["ratios"]
        rows.append([epochs, *(_cell(found.get(column)) for column in COLUMNS)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    mib = {way: f"{peak / 2**20:.0f}" for way, peak in peaks.items()}
    return "\n".join(
        [
            f"{name}: {measured['model']['layers']} layers, d_model {shape['d_model']}, d_ff "
            f"{shape['d_ff']}, {measured['model']['parameters'] / 1e6:.1f} M parameters; "
            f"{shape['n_experts']} experts of {shape['d_ff_expert']}, top-{shape['top_k']}; "
            f"{measured['tokens_per_epoch']:,} tokens an epoch, {measured['tokens_per_step']:,} "
            f"a step; {measured['dtype']}",
            *lines,
            f"capture, once: {_cell(measured['capture_seconds'])} s and "
            f"{measured['disk_bytes'] / 1e6:.1f} MB of disk "
            f"(stores: {measured['store_bytes_per_token_and_layer']:.0f} bytes per token and "
            "layer; the rest are the FFNs' weights); streaming: none",
            f"peak memory above the loaded model: parallel {mib['parallel']} MiB, "
            f"sequential {mib['sequential']} MiB, offline {mib['offline']} MiB",
        ]
    )


def _cell(spread: dict[str, float] | None) -> str:
    """Median (least-most)."""
    if spread is None:
        return "-"
    return "{median:.2f} ({min:.2f}-{max:.2f})".format(**spread)


def agreement() -> dict[str, Any]:
    """Whether the ways give the same, bit for bit, for each kind of layer."""
    job = {"way": "equal", "overrides": ["train.batch_size=512"], "steps": 3}
    with Worker(**job) as worker:
        worker.answer()
        return worker.run()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="about a minute; writes no file")
    parser.add_argument("--repeats", type=int, default=3, help="of every way (default 3)")
    parser.add_argument("--threads", type=int, help="of torch (default: every core)")
    parser.add_argument("--output", type=Path, help=f"the JSON file (default {OUTPUT})")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats is at least 1")
    runtime.configure(RuntimeConfig(threads=args.threads))
    began, load = time.perf_counter(), os.getloadavg()[0]
    equal = agreement()
    for kind, found in equal.items():
        if found["different"]:
            raise SystemExit(f"{kind}: the ways differ: {found['different'][:5]}")
        print(f"{kind}: {found['losses']} losses and all weights equal, bit for bit, in every way")
    measured = {}
    for setting in QUICK if args.quick else FULL:
        measured[setting.name] = measure(setting, args.repeats)
        print(f"\n{table(setting.name, measured[setting.name])}", flush=True)
    machines = [found.pop("machine") for found in measured.values()]
    machine = machines[0]
    print(
        f"\n{machine['cpu']}; {machine['cores']} cores, torch {machine['torch']}, "
        f"threads: {machine['threads']}; load average before: {load:.1f}\n"
        f"Median (least-most) of {args.repeats} repeats; `second point`: the next fit from the "
        f"same stores. Took {time.perf_counter() - began:.0f} s."
    )
    if args.quick and not args.output:
        return
    result = {
        "machine": machine,
        "load_average_before": round(load, 1),
        "repeats": args.repeats,
        "equal": equal,
        "settings": measured,
    }
    output = args.output or OUTPUT
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {output}")


if __name__ == "__main__":
    main()
