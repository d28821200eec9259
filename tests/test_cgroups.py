"""Limits of a container or of a cluster's job are those of the process, not the machine's."""

import os
from pathlib import Path

import pytest

from pipeline import cgroups, preflight, runtime

GB = 10**9
JOB = "system.slice/slurmstepd.scope/job_7/step_0"


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of what stands for Linux's /sys and /proc."""
    monkeypatch.setattr(cgroups, "Path", lambda name: tmp_path / name.lstrip("/"))
    (tmp_path / "proc/self").mkdir(parents=True)
    return tmp_path


def group(system: Path, path: str, **files: str) -> None:
    folder = system / "sys/fs/cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def member(system: Path, *lines: str) -> None:
    (system / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))


def test_without_groups_there_is_no_limit(system: Path):
    assert (cgroups.free_memory(), cgroups.cores()) == (None, None)
    member(system, "0::/")
    assert (cgroups.free_memory(), cgroups.cores()) == (None, None)


def test_a_container_sees_its_group_as_the_root(system: Path):
    member(system, "0::/")
    stat = "anon 1\ninactive_file 1000000000"
    group(system, "", memory__max=f"{8 * GB}", memory__current=f"{3 * GB}", memory__stat=stat)
    group(system, "", cpu__max="150000 100000")
    assert (cgroups.free_memory(), cgroups.cores()) == (6 * GB, 1.5)


def test_a_jobs_limit_holds_for_the_groups_below_it(system: Path):
    member(system, f"0::/{JOB}")
    used = {"memory__current": f"{1 * GB}", "memory__stat": "inactive_file 0"}
    group(system, JOB, memory__max="max", cpu__max="max 100000", **used)
    group(system, str(Path(JOB).parent), memory__max=f"{4 * GB}", cpu__max="300000 100000", **used)
    group(system, "system.slice", memory__max=f"{9 * GB}", cpu__max="800000 100000", **used)
    assert (cgroups.free_memory(), cgroups.cores()) == (3 * GB, 3)


def test_groups_of_version_1_are_known_by_their_controller(system: Path):
    member(system, "4:memory:/slurm/job_7", "1:cpu,cpuacct:/slurm/job_7", "0::/")
    stat = f"inactive_file 1\ntotal_inactive_file {GB}"
    none = {"memory__limit_in_bytes": "9223372036854771712", "memory__usage_in_bytes": "5"}
    group(system, "memory", **none, memory__stat=stat)
    group(system, "memory/slurm/job_7", memory__limit_in_bytes=f"{4 * GB}")
    group(system, "memory/slurm/job_7", memory__usage_in_bytes=f"{2 * GB}", memory__stat=stat)
    group(system, "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    group(system, "cpu/slurm/job_7", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    assert (cgroups.free_memory(), cgroups.cores()) == (3 * GB, 0.5)


def test_what_is_used_beyond_the_limit_leaves_nothing(system: Path):
    member(system, "0::/")
    group(system, "", memory__max="5", memory__current="7", memory__stat="inactive_file 0")
    assert cgroups.free_memory() == 0


def test_plan_and_threads_follow_the_limits(system: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    assert runtime.cores() == 8
    member(system, "0::/")
    group(system, "", memory__max="4096", memory__current="96", memory__stat="inactive_file 0")
    for quota, cores in (("150000 100000", 2), ("10000 100000", 1), ("2000000 100000", 8)):
        group(system, "", cpu__max=quota)
        assert runtime.cores() == cores
    assert preflight.free_memory() == 4000
