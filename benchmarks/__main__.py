"""The speed table: every benchmark beside its reference, on the machine at hand.

python -m benchmarks                 all, in under 20 minutes on two cores; benchmarks/results.json
python -m benchmarks layer store     some; printed only; launching, objects and closed only so
python -m benchmarks --quick         tiny sizes: whether they run
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import machine, show
from pipeline import runtime
from pipeline.config import RuntimeConfig

NAMES = (
    "layer", "store", "reading", "activations", "fitting", "sweep", "inference", "conversion",
    "startup",
)  # fmt: skip
LONGER = ("launching", "objects", "closed")
"""Run where they are named."""
OUTPUT = Path("benchmarks/results.json")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(NAMES + LONGER)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; writes no file")
    parser.add_argument("--threads", type=int, help="of torch (default: every core)")
    parser.add_argument("--output", type=Path, help=f"the JSON file (of all: {OUTPUT})")
    args = parser.parse_args()
    for name in args.names:
        if name not in NAMES + LONGER:
            parser.error(f"no benchmark {name}: one of {', '.join(NAMES + LONGER)}")
    runtime.configure(RuntimeConfig(threads=args.threads))
    began, found = time.monotonic(), []
    for name in args.names or NAMES:
        first = time.monotonic()
        found += run(name, args.quick, args.threads)
        print(f"{name}: {time.monotonic() - first:.0f} s", file=sys.stderr, flush=True)
    show(found, title=machine())
    print(f"Median (least-most) of the ratios; took {time.monotonic() - began:.0f} s.")
    output = args.output or (None if args.names or args.quick else OUTPUT)
    if output:
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"written: {output}")


def run(name: str, quick: bool, threads: int | None) -> list[dict]:
    """The rows of one benchmark, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        line = [sys.executable, "-m", "benchmarks.measure", name, "--output", str(rows)]
        line += ["--quick"] * quick + (["--threads", str(threads)] if threads else [])
        subprocess.run(line, check=True)
        return json.loads(rows.read_text())


if __name__ == "__main__":
    main()
