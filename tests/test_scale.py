"""`docs/scale.md`: what it says of a large model is what `plan` says, and what it shows works."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small import PROJECT

from pipeline import compose, outline, planned
from pipeline.config import Config
from pipeline.preflight import size
from pipeline.sizes import Cost
from pipeline.stages import DENSE

DOCUMENT = (PROJECT / "docs" / "scale.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^```(yaml|bash)\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE))
LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
NODE = planned.Free(disk=10**15, files=None, memory=2 * 10**12, gpu=80 * 10**9)


def flat(settings: dict, above: str = "") -> list[str]:
    """Overrides of a nested mapping."""
    found = []
    for key, value in settings.items():
        if isinstance(value, dict):
            found += flat(value, f"{above}{key}.")
        else:
            found.append(f"{above}{key}={str(value).lower()}")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama-70b")
    (folder / "config.json").write_text(json.dumps(LLAMA_70B))
    return folder


def configured(folder: Path, *more: str) -> Config:
    layers = str(list(range(80))).replace(" ", "")
    model = ["model=pretrained", f"model.id={folder}", f"model.layers={layers}"]
    text = ["data=hub", "data.dataset=any"]
    return compose.load([*model, *text, *flat(yaml.safe_load(BLOCKS["yaml"])), *more])


def costs(folder: Path, *more: str) -> dict[str, Cost]:
    cfg = configured(folder, *more)
    return planned.make(cfg, outline.record_of(cfg, DENSE, online=False), NODE).costs


def cells(name: str, c: Cost) -> list[str]:
    more = size(c.transient) if c.transient else ""
    gpu, flops = (size(c.gpu) if c.gpu else ""), (f"{c.flops:.1e}" if c.flops else "")
    return [f"`{name}`", size(c.bytes), more, f"{c.files:,}", size(c.host), gpu, flops]


def test_the_table_is_what_plan_says(folder: Path):
    head = "| stage | stays | more while it runs |"
    lines = DOCUMENT[DOCUMENT.index(head) :].splitlines()[2:]
    found = [[c.strip() for c in line[1:-1].split("|")] for line in lines[:8]]
    expected = [cells(name, c) for name, c in costs(folder).items()]
    assert found == expected, "\n".join(f"| {' | '.join(row)} |" for row in expected)


def test_the_other_figures_of_plan_are_what_it_says(folder: Path):
    inputs = costs(folder, "capture.store=input")["capture"]
    assert f"has {size(inputs.bytes)} and {inputs.files:,} files of capture" in DOCUMENT
    half = costs(folder, "train.static_control=false")["train"]
    assert f"`train` takes {half.flops:.1e} FLOPs" in DOCUMENT
    ten = costs(folder, f"model.layers={str(list(range(10))).replace(' ', '')}")["capture"]
    assert f"the store is {size(ten.bytes)}" in DOCUMENT


@pytest.mark.slow
def test_windows_of_layers_make_one_checkpoint(tmp_path: Path):
    """The block of commands, of a model with two layers."""
    for name in ("conf", "params.yaml"):
        (tmp_path / name).symlink_to(PROJECT / name)
    small = "experiment=pico runtime.threads=1 train.epochs=0"
    stage = re.compile(r"(python -m pipeline\.stages\.(?:capture|budget|train) .*)")
    script = stage.sub(rf"\1 {small}", BLOCKS["bash"]).replace(
        "python -m", f"PYTHONPATH={PROJECT} {sys.executable} -m"
    )
    first = [f"PYTHONPATH={PROJECT} {sys.executable} -m pipeline.stages.{s} {small}\n"
             for s in ("dense", "tokens")]  # fmt: skip
    done = subprocess.run(
        ["bash", "-euc", "".join(first) + script],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    config = json.loads((tmp_path / "sparse" / "config.json").read_text())
    assert config["model_type"] == "qwen2_moe" and config["num_hidden_layers"] == 2
    assert config["mlp_only_layers"] == []
