"""The frame itself: what dvc.yaml says a stage depends on is what its code uses."""

import importlib
from pathlib import Path

import pytest
import yaml

from pipeline import workdir

PROJECT = Path(__file__).parent.parent
STAGES = yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"]
NAMES = ("config", "dense", "tokens", "capture", "budget", "train", "heal", "convert", "evaluate")


def test_the_dag_has_the_stages_of_the_package():
    modules = {p.stem for p in (PROJECT / "pipeline" / "stages").glob("[a-z]*.py")}
    assert tuple(STAGES) == NAMES and modules == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_deps_are_the_import_closure_of_the_stage(name: str):
    closure = {
        str(path.relative_to(PROJECT)) for path in workdir.import_closure(f"pipeline.stages.{name}")
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
