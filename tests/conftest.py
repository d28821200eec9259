"""Fixtures that many tests share. Threads are told to sleep before anything imports torch."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets  # noqa: F401 - its logger keeps the stream that it finds: not one of a single test
import pytest

PROJECT = Path(__file__).parent.parent
THREADS = os.environ["OMP_NUM_THREADS"]


@pytest.fixture(autouse=True)
def threads_of_processes() -> Iterator[None]:
    """Those of a test are not what an earlier one configured in this process."""
    os.environ["OMP_NUM_THREADS"] = THREADS
    yield
    os.environ["OMP_NUM_THREADS"] = THREADS


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a copy of `conf/` and `params.yaml`, and the process in it."""
    import shutil

    shutil.copytree(PROJECT / "conf", tmp_path / "conf")
    shutil.copy(PROJECT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("DVC_STAGE", "DVC_ROOT", "DVC_EXP_NAME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def captured_project(captured: Path, tmp_path: Path) -> Path:
    """A project whose params.yaml is a small pico, run up to `budget`; TensorBoard logs `dense`."""
    import shutil

    return shutil.copytree(captured, tmp_path / "project")


@pytest.fixture(scope="session")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one that `captured_project` copies."""
    import contextlib
    import importlib
    import pydoc_data.topics
    import shutil
    import sysconfig

    from faults.shrinking import shrink, small_library

    folder = tmp_path_factory.mktemp("captured")
    shutil.copytree(PROJECT / "conf", folder / "conf")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as environment:
        for name in ("DVC_STAGE", "DVC_ROOT", "DVC_EXP_NAME"):
            environment.delenv(name, raising=False)
        environment.setattr(sysconfig, "get_path", sysconfig.get_path)  # to be put back
        environment.setattr(pydoc_data.topics, "topics", pydoc_data.topics.topics)
        shrink(small_library(tmp_path_factory.mktemp("library")))
        from pipeline import compose

        options = ["experiment=pico", "train.epochs=1", "train.evaluate_every=4", "heal.tokens=512"]
        options += ["heal.batch_size=4", "heal.evaluate_every=2", "runtime.logger=tensorboard"]
        composed = compose.compose([*options, "data.tokens.train=4096"])
        compose.PARAMS.write_text(compose.to_yaml(composed), encoding="utf-8")
        cfg = compose.checked(composed)
        for name in ("dense", "tokens", "capture", "budget"):
            importlib.import_module(f"pipeline.stages.{name}").run(cfg)
    return folder
