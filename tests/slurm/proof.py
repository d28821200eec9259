"""What may happen on a cluster, each once on a real Slurm; the bytes at the end are one process's.

`make test-slurm` runs this and `test_slurm.py`, in some minutes; `make test` leaves it out.
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm.cluster import Cluster
from slurm.project import SLOW, SLURM, Project

BOTH = ("-m", "layer=0,1", SLOW, *SLURM)
SOON = "prefill.lost_wait_s=5"
DONE = {"layer=0": "done", "layer=1": "done"}


@pytest.fixture(params=[False, True], ids=["without accounting", "with accounting"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    with Cluster(accounting=request.param) as made:
        monkeypatch.setenv("SLURM_CONF", made.environment["SLURM_CONF"])
        yield made


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster for one test, whose nodes are given up soon."""
    with Cluster(node_timeout_s=10) as made:
        monkeypatch.setenv("SLURM_CONF", made.environment["SLURM_CONF"])
        yield made


def check_adopted(project: Project, expected: dict[str, str]) -> None:
    """The stages find every layer and publish one process's bytes."""
    for layer in (0, 1):
        assert "found complete" in project.stage("train", SLOW, layer=layer)
    assert project.digests("train") == expected


def test_a_killed_worker_is_lost_and_its_layer_alone_is_fitted_again(
    either: Cluster, captured: Project, slow_layers: dict[str, str]
):
    launched = captured.start(*BOTH, SOON)
    os.kill(captured.in_the_midst(0), signal.SIGKILL)
    launched.ended(expect=4)
    assert captured.states() == {"layer=0": "lost", "layer=1": "done"}
    captured.prefill(*BOTH)
    assert captured.states() == DONE
    assert len(either.jobs()) == 3
    check_adopted(captured, slow_layers)


def test_a_failing_layer_ends_with_its_exit_code_and_cause_and_the_other_is_kept(
    either: Cluster, captured: Project, slow_layers: dict[str, str]
):
    ffn = captured.root / "stages/capture/ffn_1.safetensors"
    sound = ffn.read_bytes()
    replace(ffn, sound[:-1] + bytes([sound[-1] ^ 1]))
    said = captured.prefill(*BOTH, expect=5)
    assert "ffn_1.safetensors" in said and "layer 1" in said
    assert captured.states() == {"layer=0": "done", "layer=1": "failed"}
    assert "ffn_1.safetensors" in str(captured.status()["layer=1"])
    replace(ffn, sound)
    captured.prefill(*BOTH)
    assert captured.states() == DONE and len(either.jobs()) == 3
    check_adopted(captured, slow_layers)


def replace(path: Path, content: bytes) -> None:
    """A new file in its place: the old one is linked elsewhere."""
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").rename(path)


def test_jobs_outlive_their_nodes_daemon(
    own: Cluster, captured: Project, slow_layers: dict[str, str]
):
    """Slurm learns of their end when the daemon is back; the records tell it before."""
    launched = captured.start(*BOTH)
    captured.in_the_midst(0)
    for node in own.NODES:
        own.kill_daemon(node)
    launched.ended()
    assert captured.states() == DONE
    for node in own.NODES:
        own.start_node(node)
    captured.until(lambda: set(own.states().values()) == {"idle"})
    check_adopted(captured, slow_layers)


def test_a_lost_node_is_told_and_its_layer_goes_on_on_another_where_prefill_awaits_it(
    own: Cluster, captured: Project, slow_layers: dict[str, str]
):
    launched = captured.start(*BOTH)
    captured.in_the_midst(0)
    where = own.node_of(0)
    own.lose_node(where)
    captured.until(lambda: captured.states()["layer=0"] == "lost")
    launched.ended()  # Slurm puts the job into the queue again
    assert captured.states() == DONE
    assert captured.status()["layer=0"]["host"] != where
    check_adopted(captured, slow_layers)


def test_a_killed_launcher_leaves_jobs_that_finish_and_a_rerun_launches_none(
    own: Cluster, captured: Project, slow_layers: dict[str, str]
):
    launched = captured.start(*BOTH)
    captured.in_the_midst(0)
    launched.kill()
    assert captured.states()["layer=0"] == "running"
    captured.until(lambda: captured.states() == DONE)
    captured.prefill(*BOTH)
    assert len(own.jobs()) == 2
    check_adopted(captured, slow_layers)


def test_a_requeued_job_goes_on_from_its_checkpoint_and_is_awaited(
    own: Cluster, captured: Project, slow_layers: dict[str, str]
):
    launched = captured.start(*BOTH)
    captured.in_the_midst(0)
    (array,) = {job.partition("_")[0] for job in own.jobs()}
    own.run("scontrol", "requeue", f"{array}_0")
    captured.until(lambda: captured.states()["layer=0"] == "lost")
    launched.ended()
    assert captured.states() == DONE and len(own.jobs()) == 2
    check_adopted(captured, slow_layers)


def test_a_preempted_job_puts_itself_back_and_goes_on_from_its_checkpoint(
    own: Cluster, captured: Project, slow_layers: dict[str, str]
):
    """Slurm sends the same signal before a job's time is over."""
    launched = captured.start(*BOTH)
    captured.in_the_midst(0)
    (array,) = {job.partition("_")[0] for job in own.jobs()}
    own.run("scancel", "--signal=USR2", f"{array}_0")
    captured.until(lambda: captured.states()["layer=0"] == "lost")
    launched.ended()
    assert captured.states() == DONE and len(own.jobs()) == 2
    check_adopted(captured, slow_layers)


def test_what_waits_for_nodes_is_told_when_the_time_is_over_and_runs_later(
    own: Cluster, captured: Project, slow_layers: dict[str, str]
):
    for node in own.NODES:
        own.run("scontrol", "update", f"nodename={node}", "state=drain", "reason=test")
    said = captured.prefill(*BOTH, "prefill.timeout_s=10", expect=4)
    assert "prefill.timeout_s" in said
    assert set(captured.states().values()) == {"waiting"}
    for node in own.NODES:
        own.run("scontrol", "update", f"nodename={node}", "state=resume")
    captured.until(lambda: captured.states() == DONE)
    check_adopted(captured, slow_layers)


def test_a_killed_part_of_capture_is_done_again_alone(
    own: Cluster, project: Project, reference: Project
):
    parts = ("-m", "shards=1/3,2/3,3/3", *SLURM)
    launched = project.start(*parts, SOON)
    project.until(lambda: project.states().get("shards=2/3") == "running")
    os.kill(project.status()["shards=2/3"]["pid"], signal.SIGKILL)
    launched.ended(expect=4)
    assert project.states()["shards=2/3"] == "lost"
    project.prefill(*parts)
    assert len(own.jobs()) == 4
    assert "found complete" in project.stage("capture")
    assert project.digests("capture") == reference.digests("capture")


def test_the_tiny_model_over_three_nodes_ends_with_the_bytes_of_one_process(
    own: Cluster, tmp_path: Path
):
    python = Path(sys.executable)
    alone, over = Tiny(tmp_path / "alone", python), Tiny(tmp_path / "over", python)
    alone.run("dvc repro convert")
    over.adopt(alone, "dense", "tokens")
    over.run("dvc repro tokens")
    over.prefill("-m", "shards=1/6,2/6,3/6,4/6,5/6,6/6", *SLURM, seconds=1800)
    over.run("dvc repro capture")
    over.prefill("-m", "layer=0,1,2,3", *SLURM, seconds=1800)
    assert set(over.states().values()) == {"done"}
    output = over.run("dvc repro convert")
    for layer in range(4):
        assert f"stages/train/layer_{layer}: found complete" in output
    folders = ("capture", "train", "convert")
    assert over.digests(*folders) == alone.digests(*folders)


class Tiny(Project):
    """The embedded default, its dense model trained for 200 steps and each layer for one epoch."""

    def _shrink(self) -> None:
        for name, there, here in (
            ("model/tiny", "max_steps: 2000", "max_steps: 200"),
            ("train/default", "epochs: 3", "epochs: 1"),
        ):
            path = self.root / f"conf/{name}.yaml"
            assert there in path.read_text()
            path.write_text(path.read_text().replace(there, here))
