"""One run of the whole DAG in one process, which the runs on the cluster must equal."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import warm
from slurm.cluster import Cluster, or_skip
from slurm.project import SLOW, Project


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with or_skip() as made, pytest.MonkeyPatch.context() as environment:
        for name, value in made.environment.items():
            environment.setenv(name, value)
        yield made


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with warm.python(tmp_path_factory.mktemp("warm") / "bin") as made:
        yield made


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, python: Path) -> Project:
    """Every stage up to the checkpoint, each in one process."""
    made = Project(tmp_path_factory.mktemp("reference") / "project", python)
    for name in ("dense", "tokens", "capture", "budget"):
        made.stage(name)
    for layer in (0, 1):
        made.stage("train", layer=layer)
    for name in ("heal", "convert"):
        made.stage(name)
    return made


@pytest.fixture(scope="session")
def slow_layers(reference: Project) -> dict[str, str]:
    """Digests of layers 0 and 1 with the settings that take some seconds."""
    published = reference.digests("train")
    for layer in (0, 1):
        reference.stage("train", SLOW, layer=layer)
    found = reference.digests("train/layer_0", "train/layer_1")
    assert found.keys() <= published.keys()
    return found


@pytest.fixture
def project(tmp_path: Path, python: Path, reference: Project) -> Project:
    """With the dense model and the tokens, and nothing behind them."""
    made = Project(tmp_path / "project", python)
    made.adopt(reference, "dense", "tokens")
    made.stage("dense")
    made.stage("tokens")
    return made


@pytest.fixture
def captured(project: Project, reference: Project) -> Project:
    """With the activations and the budget too."""
    project.adopt(reference, "capture", "budget")
    project.stage("capture")
    project.stage("budget")
    return project
