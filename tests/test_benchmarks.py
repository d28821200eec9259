"""Every benchmark of speed runs and its rows are whole; how fast is not for a test to say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.measure import compare, turns

PROJECT = Path(__file__).parents[1]
FIELDS = {"what", "size", "unit", "ours", "reference", "ratio", "spread", "reach", "reached"}


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_benchmark_runs_and_its_rows_have_their_fields(tmp_path):
    output = tmp_path / "rows.json"
    printed = run("benchmarks", "--quick", "--output", str(output))
    rows = json.loads(output.read_text())
    names = {row["command"].split()[-1] for row in rows}
    assert names == {
        "layer", "store", "activations", "fitting", "sweep", "inference", "conversion", "startup",
    }  # fmt: skip
    for row in rows:
        assert row.keys() == FIELDS | {"command", "machine"}
        low, high = row["spread"]
        assert 0 < low <= high and row["ours"] > 0 and row["reference"] > 0
        assert (row["reached"] is None) == (not row["reach"])
    assert all(row["what"].split()[0] in printed for row in rows)


@pytest.mark.slow
def test_the_gpu_benchmark_runs_tiny_on_any_device_and_explains_itself_without_a_gpu(tmp_path):
    run("benchmarks.gpu", "--quick", "--output", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["ms"].keys() == {"products", "dense", "sparse", "step", "training"}
    assert found["capture / forward"] > 0
    if not torch.cuda.is_available():
        assert "no CUDA device" in run("benchmarks.gpu")


def test_turns_begin_with_another_way_each_time():
    called: list[str] = []
    ways = {name: lambda n=name: called.append(n) for name in "abc"}
    seconds = turns(ways, 3, warm_ups=0)
    assert "".join(called) == "abcbcacab"
    assert all(len(found) == 3 for found in seconds.values())


def test_compare_takes_ratios_within_a_turn_and_judges_by_the_goal():
    ours, theirs = [1.0, 4.0, 3.0], [2.0, 4.0, 3.0]
    times = compare("", ours, theirs, reach="<= 1.0")
    assert (times.ratio, times.spread, times.reached) == (1.0, (0.5, 1.0), True)
    rates = compare("", ours, theirs, work=8, reach=">= 1.5")
    assert (rates.ours, rates.ratio, rates.reached) == (8 / 3, 1.0, False)
    assert compare("", ours, theirs).reached is None
