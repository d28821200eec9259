"""What docs/clusters.md shows is run, section by section, in its small form.

On a real Slurm of three nodes, on processes, on a ray of this machine; see `small.py` for what
stands in for the model. Blocks that are marked are not run, and say why.
"""

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_docs
import warm
from slurm.cluster import or_skip
from slurm.project import Project
from test_docs import COMMAND, OUTPUT_ONLY, PROJECT, fenced

from benchmarks import s3
from pipeline import refusals

TEXT = (PROJECT / "docs" / "clusters.md").read_text()
NOT_RUN = re.compile(r"^<!-- not run: ([^\n]+) -->\n```sh\n.*?^```$", re.DOTALL | re.MULTILINE)
REASONS = {"needs more machines", "ends every ray of the machine", "takes minutes"}
SMALLER = {
    "layer=0,1,2,3": "layer=0,1",
    "shards=1/4,2/4,3/4,4/4": "shards=1/2,2/2",
    "RAY_AUTH_MODE=token ray start --head --port=6379": "",  # by the test, which can end it
    "ray.remote.num_gpus=1": "ray.remote.num_cpus=1",
    "runtime.threads=8": "runtime.threads=1",
    "moe.n_experts=8,16": "moe.n_experts=8",
    "dvc exp run -S moe.n_experts=16": "",
}
"""What this machine has in place of what the document's has."""
BEFORE, SLURM, BOX, RAY, OBJECTS, WATCHING = (
    "Before you begin",
    "Slurm",
    "One box with 8 GPUs",
    "ray on cloud machines",
    "Capture on an object store",
    "Watching",
)


def commands(heading: str) -> list[str]:
    """The blocks of a section that are run, in their small form."""
    (body,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)
    blocks = fenced(NOT_RUN.sub("", body), "sh")
    for there, here in SMALLER.items():
        blocks = [block.replace(there, here) for block in blocks]
    return blocks


def test_every_block_is_run_or_says_why_not():
    """And what is smaller here stands in the document."""
    ran = sum(len(commands(name)) for name in (BEFORE, SLURM, BOX, RAY, OBJECTS, WATCHING))
    assert ran + len(NOT_RUN.findall(TEXT)) == len(fenced(TEXT, "sh"))
    assert set(NOT_RUN.findall(TEXT)) == REASONS
    assert [there for there in SMALLER if there not in TEXT] == []
    languages = set(re.findall(r"^```(\w+)$", TEXT, re.MULTILINE))
    assert languages <= {"sh", *OUTPUT_ONLY}
    shown = [line for kind in OUTPUT_ONLY for b in fenced(TEXT, kind) for line in b.splitlines()]
    assert [line for line in shown if COMMAND.match(line)] == []


def test_commands_within_its_sentences_are_ones_that_exist():
    name = "docs/clusters.md"
    test_docs.test_commands_within_sentences_name_tools_stages_targets_and_settings_that_exist(name)
    named = set(re.findall(r"`((?:prefill|runtime|capture)\.[a-z_]+)", TEXT))
    assert named <= refusals.kinds().keys()


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """Where what stands before the sections has been done."""
    folder = tmp_path_factory.mktemp("clusters")
    with warm.python(folder / "bin") as python:
        made = Project(folder / "checkout", python)
        for block in commands(BEFORE):
            made.run(block)
        yield made


@pytest.fixture
def checkout(begun: Project) -> Project:
    """That, with nothing captured or fitted."""
    begun.run("git checkout -q . && rm -rf .dvc/cache .dvc/tmp stages/capture stages/train")
    for unit in ("capture*", "budget*", "train-*", "heal*", "convert*", "evaluate*", "prefill"):
        for left in (begun.root / ".scratch").glob(unit):
            shutil.rmtree(left)
    return begun


def run(checkout: Project, *headings: str) -> str:
    """What the blocks print, `Watching` last."""
    return "".join(
        checkout.run(block) for name in (*headings, WATCHING) for block in commands(name)
    )


def check_adopted(output: str) -> None:
    assert "stages/capture: found complete" in output
    assert [k for k in range(2) if f"layer_{k}: found complete" not in output] == []


@pytest.mark.slow
def test_the_commands_for_slurm_run_as_they_stand(checkout: Project, monkeypatch):
    with or_skip() as cluster:
        monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
        output = run(checkout, SLURM)
        check_adopted(output)
        assert [*cluster.jobs().values()] == ["COMPLETED"] * 7
    assert "6 of 6 done" in output
    submitted = checkout.root / ".scratch/prefill"
    assert submitted.stat().st_mode & 0o777 == 0o700
    assert list(submitted.rglob("*.pkl"))


@pytest.mark.slow
def test_the_commands_for_one_box_run_as_they_stand(checkout: Project):
    output = run(checkout, BOX)
    check_adopted(output)
    assert "10 of 10 done" in output


@pytest.mark.slow
def test_the_commands_for_an_object_store_run_as_they_stand(checkout: Project, monkeypatch):
    with s3.serve("my-bucket") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        output = run(checkout, OBJECTS)
    assert "stages/capture: found complete" in output and "2 of 2 done" in output
    assert not list((checkout.root / "stages/capture/layer_0.zarr").rglob("c/*"))


@pytest.mark.slow
@pytest.mark.usefixtures("head")
def test_the_commands_for_ray_run_as_they_stand(checkout: Project):
    output = run(checkout, RAY)
    assert "Connecting to existing Ray cluster" in output
    check_adopted(output)
    assert "4 of 4 done" in output


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The first machine of a ray, as the document starts it, with a port and folder of its own."""
    with socket.socket() as link:
        link.bind(("127.0.0.1", 0))
        port = link.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="ray-")  # a short name, for its sockets
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    smaller = ["--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=2"]
    smaller += ["--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={folder}"]
    started = subprocess.Popen(
        [Path(sys.executable).parent / "ray", "start", "--head", "--block", *smaller],
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        | {"RAY_AUTH_MODE": "token"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 120
        while not _answers(port):
            assert started.poll() is None and time.monotonic() < until
            time.sleep(0.2)
        yield
    finally:
        started.terminate()
        started.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _answers(port: int) -> bool:
    with socket.socket() as link:
        return link.connect_ex(("127.0.0.1", port)) == 0
