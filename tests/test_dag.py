"""The frame itself: what dvc.yaml says a stage depends on is what its code uses."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import compose, sources
from pipeline.config import leaves, select

PROJECT = Path(__file__).parent.parent
STAGES = yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"]
NAMES = ("config", "dense", "tokens", "capture", "budget", "train", "heal", "convert", "evaluate")


def test_the_dag_has_the_stages_of_the_package():
    modules = {p.stem for p in (PROJECT / "pipeline" / "stages").glob("[a-z]*.py")}
    assert tuple(STAGES) == NAMES and modules == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_deps_are_the_import_closure_of_the_stage(name: str):
    closure = {
        str(path.relative_to(PROJECT)) for path in sources.import_closure(f"pipeline.stages.{name}")
    }
    listed = {dep for dep in STAGES[name]["deps"] if dep.endswith(".py")}
    assert listed == closure


@pytest.mark.parametrize("name", [name for name in NAMES if name != "config"])
def test_params_are_what_the_stage_declares(name: str):
    module = importlib.import_module(f"pipeline.stages.{name}")
    assert set(STAGES[name]["params"]) == set(module.PARAMS)


def test_every_stage_has_the_one_shape():
    for name in NAMES:
        doc = importlib.import_module(f"pipeline.stages.{name}").__doc__ or ""
        assert all(f"\n{word}:" in doc for word in ("Reads", "Writes", "Cost", "Run")), name


ELSEWHERE = {f"convert.{name}" for name in ("dense", "revision", "layers", "output")}
ELSEWHERE |= {f"data.{name}" for name in ("dataset", "subset", "revision", "split", "streaming")}
ELSEWHERE |= {"data.files", "data.text_column", "runtime.threads", "moe.capacity_factor"}
ELSEWHERE |= {f"prefill.{name}" for name in ("timeout_s", "lost_wait_s", "layers_per_gpu")}
"""Read by a conversion on its own, by another choice, before a stage: in other tests."""


OUTSIDE = ("runtime.", "capture.store_url")
"""How and where, not what: of no stage's fingerprint."""


class Traced:
    """A configuration that notes every leaf that is read of it."""

    def __init__(self, node: Any, read: set[str], path: str = "") -> None:
        self.node, self.read, self.path = node, read, path

    def __getattr__(self, name: str) -> Any:
        value, path = getattr(self.node, name), f"{self.path}.{name}".strip(".")
        if dataclasses.is_dataclass(value):
            return Traced(value, self.read, path)
        self.read.add(path)
        return value


@pytest.mark.slow
def test_params_cover_every_key_that_a_stage_reads_and_every_key_is_read(
    project: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each stage runs for real on a configuration that notes what is asked of it."""
    options = ["enabled=true", "min_d_ff=8", "reallocate_every_n_steps=4"]
    options = [f"moe.dynamic.{option}" for option in options]
    options += ["moe.router=mlp", "moe.balance_bias=true", "moe.init=slice", "heal.tokens=1024"]
    options += ["moe.budget.by=kl", "moe.budget.vary=n_experts", "moe.n_experts=8"]
    options += ["moe.budget.candidates=[4,16]"]
    cfg = compose.load(["experiment=pico", *options])
    unread = set(leaves(cfg))
    for name in NAMES[1:]:
        module = importlib.import_module(f"pipeline.stages.{name}")
        monkeypatch.setattr(module, "select", lambda traced, keys: select(traced.node, keys))
        read: set[str] = set()
        for layer in [{"layer": k} for k in cfg.model.layers] if name == "train" else [{}]:
            module.run(Traced(cfg, read), **layer)
        declared = select(cfg, module.PARAMS).keys()
        foreign = {key for key in read - declared if not key.startswith(OUTSIDE)}
        assert foreign == set(), f"{name} reads what it does not declare"
        unread -= read
    assert unread == ELSEWHERE
