"""Capture and training over three nodes of a real Slurm; one worker that is killed.

`make test-slurm` runs the rest, `proof.py`.
"""

import os
import signal

import pytest
from slurm.cluster import Cluster
from slurm.project import SLOW, SLURM, Project

pytestmark = pytest.mark.slow
PARTS = "shards=1/3,2/3,3/3"
LAYERS = "layer=0,1"


def test_capture_and_training_over_three_nodes_end_with_the_bytes_of_one_process(
    cluster: Cluster, project: Project, reference: Project
):
    project.prefill("-m", PARTS, *SLURM)
    assert project.states() == dict.fromkeys(("shards=1/3", "shards=2/3", "shards=3/3"), "done")
    assert "stages/capture: found complete" in project.run("dvc repro capture")
    project.prefill("-m", LAYERS, *SLURM)
    assert {project.states()[f"layer={k}"] for k in range(2)} == {"done"}
    output = project.run("dvc repro convert")
    for layer in range(2):
        assert f"stages/train/layer_{layer}: found complete" in output
    folders = ("capture", "train", "convert")
    assert project.digests(*folders) == reference.digests(*folders)
    assert [*cluster.jobs().values()] == ["COMPLETED"] * 5


def test_a_killed_worker_is_lost_at_once_and_a_rerun_fits_its_layer_only(
    cluster: Cluster, captured: Project, slow_layers: dict[str, str]
):
    """Without accounting Slurm's own launcher would wait for ever."""
    before = len(cluster.jobs())
    asked = ("-m", "layer=0,1", SLOW, *SLURM)
    launched = captured.start(*asked, "prefill.lost_wait_s=5")
    os.kill(captured.in_the_midst(0), signal.SIGKILL)
    said = launched.ended(expect=4)
    assert "layer 0" in said and "lost" in said
    assert captured.states() == {"layer=0": "lost", "layer=1": "done"}
    captured.prefill(*asked)
    assert captured.states() == {"layer=0": "done", "layer=1": "done"}
    assert len(cluster.jobs()) - before == 3
    for layer in (0, 1):
        assert "found complete" in captured.stage("train", SLOW, layer=layer)
    assert captured.digests("train") == slow_layers
