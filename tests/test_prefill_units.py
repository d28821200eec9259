"""What a command line asks of prefill, and what is refused before anything is launched."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from pipeline import artifacts, compose, prefill, runtime
from pipeline.config import Config
from pipeline.errors import ArtifactError, ConfigError, PipelineError
from pipeline.prefill import gpus, job, launch, ledger, share, units
from pipeline.prefill.units import Unit
from pipeline.stages import CAPTURE, TOKENS

JOBLIB = "hydra/launcher=joblib"


@pytest.fixture
def here(captured_project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A captured project whose `conf/` composes to what it was made with."""
    monkeypatch.chdir(captured_project)
    for name in ("DVC_STAGE", "DVC_ROOT", "DVC_EXP_NAME"):
        monkeypatch.delenv(name, raising=False)
    made = OmegaConf.load("params.yaml")
    Path("conf/experiment/captured.yaml").write_text(
        "# @package _global_\n" + OmegaConf.to_yaml(made)
    )
    config = Path("conf/config.yaml")
    config.write_text(config.read_text().replace("experiment: null", "experiment: captured"))
    assert compose.compose([]) == made
    return captured_project


def asked(*overrides: str) -> list[Unit]:
    own, _ = units.split(list(overrides), multirun=True)
    return units.asked(own)


def test_a_sweep_is_every_combination_each_once(here: Path):
    found = asked("layer=0,1", "moe.n_experts=4,8", "seed=0")
    assert [(unit.what, unit.overrides) for unit in found] == [
        (k, (f"moe.n_experts={n}", "seed=0")) for k in "01" for n in (4, 8)
    ]
    assert {unit.cfg().moe.n_experts for unit in found} == {4, 8}
    assert [unit.what for unit in asked("layer=range(0,2)")] == ["0", "1"]


def test_what_the_capture_does_not_read_gives_no_other_part_of_it(here: Path):
    found = asked("shards=1/2,2/2", "moe.n_experts=4,8")
    assert [unit.part for unit in found] == [(1, 2), (2, 2)]


def test_a_unit_is_named_by_what_its_work_depends_on(here: Path):
    (one,) = asked("layer=0")
    same, other = asked("layer=0", "runtime.threads=1"), asked("layer=0", "train.epochs=7")
    assert same[0].id == one.id != other[0].id and same[0].overrides == ()
    assert other[0].overrides == ("train.epochs=7",)
    manifest = CAPTURE / artifacts.MANIFEST
    content = artifacts.read_sealed(manifest)
    manifest.unlink()  # hard links lead to the work folder
    artifacts.write_sealed(manifest, {**content, "files": {**content["files"], "x": "0"}})
    assert asked("layer=0")[0].id != one.id


def test_units_are_told_apart_by_what_differs():
    two = [Unit(str(n), "layer", "3", (f"moe.n_experts={n}", "seed=1"), {}) for n in (4, 8)]
    assert list(units.titles(two).values()) == [
        "layer 3 moe.n_experts=4",
        "layer 3 moe.n_experts=8",
    ]
    assert list(units.titles(two[:1]).values()) == ["layer 3"] and units.titles([]) == {}


REFUSED: dict[str, tuple[list[str], str]] = {
    "no unit": ([], "not said which units"),
    "both": (["layer=0", "shards=1/2"], "not said which units"),
    "added": (["+layer=0"], "no setting named"),
    "layer": (["layer=0,7", JOBLIB], "Layer 7 is not converted"),
    "negative": (["layer=-1"], "Layer -1 is not converted"),
    "list": (["layer=[0,1]"], "is not converted"),
    "beyond": (["shards=3/2"], "no such part"),
    "from 0": (["shards=0/2"], "no such part"),
    "words": (["shards=all"], "no such part"),
    "endless": (["layer=interval(0,1)"], "no end"),
    "setting": (["layer=0,1", JOBLIB, "moe.n_expert=8"], "no setting named"),
    "one of two": (["layer=0,1", "moe.top_k=1,99"], "More experts per token"),
    "launcher": (["layer=0", "hydra/launcher=dask"], "no launcher dask"),
    "its setting": (["layer=0", JOBLIB, "hydra.launcher.njobs=2"], "does not take these"),
    "its setting alone": (["layer=0", "hydra.launcher.n_jobs=2"], "which launcher is meant"),
    "window": (["layer=0", "train.window=1"], "not fitted at once"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_refused_before_anything_is_recorded(here: Path, case: str):
    arguments, text = REFUSED[case]
    with pytest.raises(ConfigError, match=text) as caught:
        prefill.main(arguments, multirun=True)
    assert caught.value.remedy and not ledger.root().exists()


def test_several_units_need_their_flag(here: Path):
    with pytest.raises(ConfigError, match="Several units") as caught:
        prefill.main(["layer=0,1"])
    assert "-m layer=0,1" in caught.value.remedy


def test_what_is_hydras_may_be_added_to(here: Path):
    gpus_of_ray = "+hydra.launcher.ray.remote.num_gpus=1"
    assert prefill._in_windows(["layer=0", "hydra/launcher=ray", gpus_of_ray], True) is None
    assert launch.settings(["hydra/launcher=ray", gpus_of_ray]).launcher.ray.remote.num_gpus == 1


def test_a_launcher_that_is_not_installed_names_its_extra(
    here: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    for name, extra in launch.EXTRAS.items():
        with pytest.raises(ConfigError) as caught:
            prefill.main(["layer=0", f"hydra/launcher={name}"], multirun=True)
        assert f"'sparse-distillation[{extra}]'" in caught.value.remedy


def test_slurm_is_refused_where_there_is_none(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="no Slurm here"):
        prefill.main(["layer=0", "hydra/launcher=submitit_slurm"], multirun=True)


def test_what_a_unit_would_read_must_lie_there_and_belong_to_it(here: Path):
    with pytest.raises(ArtifactError, match=r"32 there, 16 here"):
        prefill.main(["layer=0,1", JOBLIB, "data.sequence_length=16"], multirun=True)
    (CAPTURE / artifacts.MANIFEST).unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        prefill.main(["layer=0,1", JOBLIB], multirun=True)
    assert asked("shards=1/1")
    (TOKENS / artifacts.MANIFEST).unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        asked("shards=1/1")
    assert not ledger.root().exists()


# In this process, with no launcher


def test_units_are_computed_here_and_found_by_their_stage(
    here: Path, capsys: pytest.CaptureFixture[str]
):
    from pipeline.stages import train

    prefill.main(["layer=0"])
    assert "layer 0: complete in" in capsys.readouterr().out
    assert not Path("stages/train").exists()
    train.run(compose.load([]), 0)
    assert "stages/train/layer_0: found complete" in capsys.readouterr().out


def test_a_unit_that_fails_stops_no_other_and_decides_the_end(
    here: Path, capsys: pytest.CaptureFixture[str]
):
    damage(CAPTURE / "ffn_0.safetensors")
    with pytest.raises(ArtifactError, match=r"ffn_0"):
        prefill.main(["layer=0,1"], multirun=True)
    states = {seen.unit.what: seen.state.name for seen in ledger.every()}
    assert states == {"0": "failed", "1": "done"}
    assert "1 of 2 done, 1 failed" in capsys.readouterr().err


def test_time_is_bounded_here_too(here: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(PipelineError, match="time is up") as caught:
        prefill.main(["layer=0,1", "train.epochs=3000", "prefill.timeout_s=0.5"], multirun=True)
    assert caught.value.exit_code == 4
    assert [seen.state.name for seen in ledger.every()] == ["lost", "waiting"]
    time.sleep(0.6)  # no alarm is left


def test_lost_units_are_awaited_as_configured_where_a_scheduler_may_begin_them_again():
    for seconds in (7.0, 90.0):
        cfg = compose.load([f"prefill.lost_wait_s={seconds}"])
        assert prefill._lost_wait_s("submitit_slurm", cfg) == seconds
        assert prefill._lost_wait_s("joblib", cfg) == prefill.QUIET_S


def damage(path: Path) -> None:
    """Another file in its place: the old one is linked elsewhere."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content + b"x")


def test_a_job_that_slurm_puts_back_is_not_written_as_failed():
    back = subprocess.CalledProcessError(-15, ["scontrol", "requeue", "1_0"])
    unit = Unit("u", "layer", "0", (), {})
    assert isinstance(job._told(back, unit), KeyboardInterrupt)
    other = subprocess.CalledProcessError(1, ["scontrol", "show"])
    assert job._told(other, unit) is other
    assert "not finished" in str(job._told(MemoryError(), unit))


@pytest.mark.parametrize(
    ("number", "state"), [(signal.SIGTERM, "lost"), (signal.SIGINT, "lost"), (None, "failed")]
)
def test_a_job_that_is_told_to_end_is_interrupted_whatever_that_raises(
    here: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals | None, state: str
):
    """In the midst of an import it comes out as an ImportError, say; a failure stays one."""

    def compute(unit: Unit, cfg: Config) -> Path:
        with contextlib.suppress(KeyboardInterrupt):
            if number:
                signal.raise_signal(number)
        raise ImportError("half of a module")

    monkeypatch.setattr(job, "_compute", compute)
    unit = asked("layer=0")[0]
    ledger.record([unit])
    kept = {one: signal.signal(one, default) for one, default in job.ENDING.items()}
    try:
        with contextlib.suppress(KeyboardInterrupt):
            job.run(OmegaConf.create({"root": str(here), "unit": unit.id}))
    finally:
        for one, handler in kept.items():
            signal.signal(one, handler)
    assert ledger.look(unit).state.name == state


# Sharing a machine


def shared(
    launcher: str,
    patch: pytest.MonkeyPatch,
    n: int,
    *,
    cores: int,
    hydras: tuple[str, ...] = (),
    **how,
) -> share.Share:
    patch.setattr(runtime, "cores", lambda: cores)
    cfg = compose.load([f"{key.replace('__', '.')}={value}" for key, value in how.items()] or [])
    plain = compose.compose([f"{k.replace('__', '.')}={v}" for k, v in how.items()])
    settings = OmegaConf.to_container(plain)
    assert isinstance(settings, dict)
    found = [Unit(f"layer_{k}-0", "layer", str(k), (), settings) for k in range(n)]  # type: ignore
    told = launch.settings([f"hydra/launcher={launcher}", *hydras])
    return share.among(found, launcher, told, cfg)


@pytest.mark.parametrize(
    ("launcher", "n", "how", "workers", "threads"),
    [
        ("joblib", 4, {}, 4, 2),
        ("joblib", 3, {}, 3, 2),
        ("joblib", 99, {}, 8, 1),
        ("joblib", 4, {"runtime__threads": 4}, 2, 4),
        ("joblib", 4, {"hydras": ("hydra.launcher.n_jobs=2",)}, 2, 4),
        ("submitit_local", 99, {}, 8, 1),
        ("submitit_local", 99, {"hydras": ("hydra.sweeper.max_batch_size=2",)}, 2, 4),
    ],
)
def test_cores_are_divided_and_never_given_twice(
    project: Path, monkeypatch: pytest.MonkeyPatch, launcher, n, how, workers, threads
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = shared(launcher, monkeypatch, n, cores=8, **how)
    assert found.overrides == [f"{share.COUNTS[launcher]}={workers}"]
    assert {unit.threads for unit in found.units} == {threads} and workers * threads <= 8


def test_ray_gives_what_it_counts(project: Path, monkeypatch: pytest.MonkeyPatch):
    assert {u.threads for u in shared("ray", monkeypatch, 4, cores=8).units} == {1}
    hydras = ("+hydra.launcher.ray.remote.num_cpus=4",)
    assert {u.threads for u in shared("ray", monkeypatch, 4, cores=8, hydras=hydras).units} == {4}


def test_bytes_that_will_differ_are_warned_of_once(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    shared("joblib", monkeypatch, 4, cores=8)
    assert capsys.readouterr().err.count("runtime.threads=2 in both") == 1
    shared("joblib", monkeypatch, 4, cores=8, runtime__threads=2)
    assert capsys.readouterr().err == ""
    hydras = ("hydra.launcher.n_jobs=8",)
    shared("joblib", monkeypatch, 8, cores=8, hydras=hydras, runtime__threads=2)
    assert "8 workers with runtime.threads=2 are more than 8 cores" in capsys.readouterr().err


@pytest.mark.parametrize(("per_gpu", "workers"), [(1, 2), (2, 4)])
def test_workers_are_as_many_as_the_gpus_have_slots(
    project: Path, monkeypatch: pytest.MonkeyPatch, per_gpu: int, workers: int
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    found = shared("joblib", monkeypatch, 9, cores=16, prefill__layers_per_gpu=per_gpu)
    assert found.overrides == [f"hydra.launcher.n_jobs={workers}"]
    on_cpu = shared("joblib", monkeypatch, 9, cores=16, runtime__device="cpu")
    assert on_cpu.overrides == ["hydra.launcher.n_jobs=9"]


@pytest.mark.parametrize(
    ("overrides", "shared_out", "slurm", "threads"),
    [
        (["runtime.threads=2"], 3, {"SLURM_CPUS_PER_TASK": "5"}, 2),
        ([], 3, {"SLURM_CPUS_PER_TASK": "5"}, 3),
        ([], None, {"SLURM_CPUS_PER_TASK": "5", "SLURM_CPUS_ON_NODE": "7"}, 5),
        ([], None, {"SLURM_CPUS_ON_NODE": "64"}, 8),
        ([], None, {}, None),
    ],
)
def test_a_job_has_the_threads_that_it_was_given(
    project: Path, monkeypatch: pytest.MonkeyPatch, overrides, shared_out, slurm, threads
):
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runtime, "cores", lambda: 8)
    plain = OmegaConf.to_container(compose.compose(overrides))
    unit = Unit("u", "layer", "0", (), plain, threads=shared_out)  # type: ignore[arg-type]
    assert job._threads(unit, unit.cfg())[0] == threads


# GPUs

TAKE = """
import os, sys, time
from pipeline import compose
from pipeline.prefill import gpus
from pipeline.prefill.units import Unit
from omegaconf import OmegaConf
plain = OmegaConf.to_container(compose.compose(sys.argv[2:]))
kind, what = sys.argv[1].split("=")
gpus.take(Unit("u", kind, what, (), plain))
print(os.environ["CUDA_VISIBLE_DEVICES"], "torch" in sys.modules, flush=True)
sys.stdin.read()
"""


def taking(
    visible: str, unit: str = "layer=0", *overrides: str, **env: str
) -> subprocess.Popen[str]:
    """A worker that takes a slot and keeps it."""
    return subprocess.Popen(
        [sys.executable, "-c", TAKE, unit, *overrides],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": visible, **env},
    )  # fmt: skip


def last(worker: subprocess.Popen[str]) -> str:
    """What a worker says once it has its slot."""
    assert worker.stdout
    for line in worker.stdout:
        if not line.startswith("GPU"):
            return line.strip()
    raise AssertionError("it ended")


def test_each_worker_sees_a_gpu_of_its_own_before_torch_is_imported(project: Path):
    first, second = taking("3,5"), taking("3,5")
    assert {last(first), last(second)} == {"3 False", "5 False"}
    third = taking("3,5")
    assert third.stdout and "waiting" in third.stdout.readline()
    first.kill()  # its slot is free with it
    assert last(third) in ("3 False", "5 False")
    for worker in (second, third):
        worker.communicate()
    first.wait()


def test_several_layers_share_a_gpu_and_a_part_of_the_capture_has_it_alone(project: Path):
    two = [taking("0", "layer=0", "prefill.layers_per_gpu=2") for _ in range(2)]
    assert [last(worker) for worker in two] == ["0 False"] * 2
    part = taking("0", "shards=1/2", "prefill.layers_per_gpu=2")
    assert part.stdout and "waiting" in part.stdout.readline()
    for worker in (*two, part):
        worker.kill()
        worker.wait()


def test_jobs_of_slurm_count_their_own_gpus_from_0(project: Path):
    workers = [taking("0", SLURM_JOB_ID=str(n)) for n in (1, 2)]
    assert [last(worker) for worker in workers] == ["0 False"] * 2
    for worker in workers:
        worker.communicate()


@pytest.mark.parametrize("visible", ["", "-1"])
def test_without_a_gpu_nothing_happens(project: Path, visible: str):
    worker = taking(visible)
    assert last(worker) == f"{visible} False".strip()
    worker.communicate()
    assert not (ledger.root() / "gpus").exists()


def test_as_many_layers_share_a_gpu_as_its_memory_holds(
    project: Path, monkeypatch: pytest.MonkeyPatch
):
    plain = OmegaConf.to_container(compose.compose(["prefill.layers_per_gpu=null"]))
    assert isinstance(plain, dict)
    unit = Unit("u", "layer", "0", (), plain, gpu_bytes=3 * 2**30)  # type: ignore
    for memory, slots in ((80 * 1024, "24"), (1024, "1"), (None, "1")):
        fake = f"#!/bin/sh\necho {memory}\n" if memory else "#!/bin/sh\nexit 1\n"
        (project / "nvidia-smi").write_text(fake)
        (project / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{project}:{os.environ['PATH']}")
        assert str(gpus.slots("0", unit, unit.cfg())) == slots


def test_the_largest_layer_decides_how_many_share_a_gpu(here: Path):
    small, large = asked("layer=0", "prefill.layers_per_gpu=null", "moe.n_experts=4,64")
    told = launch.settings([JOBLIB])
    each = [share.among([u], "joblib", told, u.cfg()).units[0].gpu_bytes for u in (small, large)]
    both = share.among([small, large], "joblib", told, small.cfg()).units
    assert each[0] < each[1] and {u.gpu_bytes for u in both} == {each[1]}


def test_a_layer_without_a_control_stands_for_itself_before_later_controls(here: Path):
    """It runs as much as its dense FFN, so that no static control of its size is plainer."""
    whole = "moe.per_layer=[{layers:[0],n_experts:4,top_k:4,d_ff_expert:0.25}]"
    others = here / ".scratch/windows/of-another-run/layer_1-0123"
    others.mkdir(parents=True)
    told = subprocess.run(
        [sys.executable, "-m", "pipeline", "prefill", "train.window=1", whole],
        cwd=here,
        env=os.environ | {"PYTHONPATH": str(Path(prefill.__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stdout + told.stderr
    (second,) = here.glob(".scratch/train-layer_1/*/static/config.json")
    assert (second.parent / "layer.safetensors").is_file()
    assert not list(here.glob(".scratch/train-layer_0/*/static"))
    assert list(here.glob(".scratch/windows/*/*")) == [others]  # its own rows are gone
