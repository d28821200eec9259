"""Every benchmark of speed runs and its rows are whole; how fast is not for a test to say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pretend_cuda import pretend_cuda

from benchmarks import gpu
from benchmarks.measure import compare, turns

PROJECT = Path(__file__).parents[1]
CODECS = ("none", "fast", "compact")
FIELDS = {"what", "size", "unit", "ours", "reference", "ratio", "spread", "reach", "reached"}


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_benchmark_runs_and_its_rows_have_their_fields(tmp_path):
    output, more = tmp_path / "rows.json", tmp_path / "more.json"
    printed = run("benchmarks", "--quick", "--output", str(output))
    printed += run("benchmarks", "launching", "objects", "--quick", "--output", str(more))
    rows = json.loads(output.read_text()) + json.loads(more.read_text())
    names = {row["command"].split()[-1] for row in rows}
    assert names == {
        "layer", "store", "reading", "objects", "activations", "fitting", "sweep", "inference",
        "conversion", "launching", "startup",
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
    timed = {"products", "dense", "sparse", "step", "rows", "forward", "disk"}
    assert found["ms"].keys() == timed | {f"capture, {codec}" for codec in CODECS}
    assert all(found[f"capture, {codec} / forward"] > 0 for codec in CODECS)
    assert all(found["seconds of a whole layer"][part] > 0 for part in ("start", "training"))
    if not torch.cuda.is_available():
        assert "no CUDA device" in run("benchmarks.gpu")


def test_the_gpu_benchmark_times_what_runs_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("REPEATS", "FEW", "EPOCHS"):
        monkeypatch.setattr(gpu, name, 1)
    monkeypatch.setattr("pipeline.specialists.ROUNDS", 1)
    monkeypatch.setattr("pipeline.specialists.ROUTER_STEPS", 2)
    with pretend_cuda() as device:
        found = gpu.measured(gpu.TINY, 512, cuda=True)
        assert not device.products, "a product ran on the CPU beside the device"
    assert {"fed", "resident", "step"} < found["ms"].keys() == found["peak bytes"].keys()
    assert all(found[f"{way}, of a step's speed on one batch"] > 0 for way in ("fed", "resident"))
    assert not list(tmp_path.iterdir())


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
