"""The quality benchmark writes a row for each recipe, regime and control, and makes none twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
RECIPE = "specialists, 4 of 1/4"
PICO = ["experiment=pico", "heal.tokens=1024", "heal.batch_size=8"]


def bench(output: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks.quality", "--output", str(output), *arguments]
    done = subprocess.run(
        command, cwd=PROJECT, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_quality_rows_have_their_fields_and_are_not_made_again(tmp_path: Path):
    output = tmp_path / "quality.json"
    arguments = ["--work", str(tmp_path / "work"), "--seeds", "0", "--recipes", RECIPE, *PICO]
    printed = bench(output, *arguments)
    rows = json.loads(output.read_text())["rows"]
    found = {(row["recipe"], row["regime"], row["control"]) for row in rows}
    assert found == {
        (RECIPE, "training-free", None),
        (RECIPE, "layer-wise", None),
        (RECIPE, "layer-wise", "oracle"),
        (RECIPE, "healed", None),
        ("static", "training-free", "static"),
        ("static", "layer-wise", "static"),
    }
    for row in rows:
        assert row["active_ffn_fraction"] == 0.25 and row["seed"] == 0
        assert row["parameters_factor"] == (1 if row["recipe"] == RECIPE else 0.25)
        assert row["perplexity_ratio"].keys() == {"heldout", "shifted"} == row["kl"].keys()
    error = {(row["regime"], row["control"]): row["relative_mse"] for row in rows}
    assert error["training-free", None] < error["training-free", "static"]
    assert error["layer-wise", None] <= error["training-free", None]
    assert error["layer-wise", "oracle"] < error["layer-wise", None]
    assert printed.count(f"| {RECIPE} |") == 3 and "| static (static) |" in printed
    before = output.read_bytes()
    again = bench(output, *arguments)
    assert output.read_bytes() == before and "'recipe'" not in again
