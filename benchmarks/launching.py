"""Two layers at once by `prefill` and joblib, beside one after the other as `dvc repro` fits them.

Whole processes, their start-up included, on activations of a random Llama over random text. At once
each layer has half of the cores. One after the other it has as many, which gives the same bytes, or
all of them, which a start by least squares uses well and steps of a small layer do not.
"""

import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.measure import Row
from benchmarks.models import VOCAB, llama
from pipeline import artifacts, compose, dense, durable, runtime
from pipeline.capture import capture_activations
from pipeline.stages import CAPTURE, DENSE, TOKENS, budget

SIZES = {128: 16384}  # d_model, tokens of train
TINY = {32: 4096}
OPTIONS = ("model=tiny", "model.layers=[0,1]", "moe=half", "capture=default", "train=default")
SEQUENCE, VALIDATION = 128, 4096
TURNS = 5


def rows(quick: bool) -> Iterator[Row]:
    for d_model, tokens in (TINY if quick else SIZES).items():
        with tempfile.TemporaryDirectory() as name:
            project = Path(name)
            shutil.copytree("conf", project / "conf")
            with contextlib.chdir(project):
                _prepare(d_model, tokens)
            half = f"runtime.threads={max(1, runtime.cores() // 2)}"
            seconds = measure.turns(
                {
                    "at once": lambda p=project: at_once(p),
                    "half": lambda p=project, h=half: in_turn(p, h),
                    "all": lambda p=project: in_turn(p),
                },
                times=1 if quick else TURNS,
                warm_ups=0,
            )
        for way, threads, reach in (("half", "equal", "<= 0.7"), ("all", "all", "")):
            yield measure.compare(
                f"two layers at once by joblib / one after the other, {threads} threads",
                seconds["at once"],
                seconds[way],
                size=f"d {d_model}, {tokens} tokens, the default recipe",
                reach=reach,
            )


def _prepare(d_model: int, tokens: int) -> None:
    """What layers are fitted to, in the folder of this process."""
    model, generator = llama(d_model, 2, torch.float32), torch.Generator().manual_seed(0)
    blocks = {
        split: torch.randint(VOCAB, (n // SEQUENCE, SEQUENCE), generator=generator)
        for split, n in (("train", tokens), ("validation", VALIDATION), ("heldout", VALIDATION))
    }
    cfg = compose.load(list(OPTIONS))
    capture_activations(model, blocks, CAPTURE, cfg=cfg.capture)
    for folder in (DENSE, TOKENS):
        folder.mkdir(parents=True)
    durable.write_json(DENSE / "dense.json", dense.describe(model))
    for folder in (DENSE, TOKENS, CAPTURE):
        artifacts.write_manifest(folder, {})
    budget.run(cfg)


def at_once(project: Path) -> None:
    _run(project, "pipeline", "prefill", "-m", "layer=0,1", "hydra/launcher=joblib")


def in_turn(project: Path, *overrides: str) -> None:
    for layer in ("0", "1"):
        _run(project, "pipeline.stages.train", "--layer", layer, *overrides)


def _run(project: Path, *line: str) -> None:
    """A command, of a project in which no layer is fitted before and after."""
    done = subprocess.run(
        [sys.executable, "-m", *line, *OPTIONS], cwd=project, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(line)}: exit {done.returncode}\n{done.stderr}")
    scratch = project / ".scratch"
    for path in (project / "stages/train", scratch / "prefill", *scratch.glob("train-*")):
        shutil.rmtree(path, ignore_errors=True)
