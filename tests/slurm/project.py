"""A small checkout on the cluster, and what a run of one process makes of the same settings."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from small import SmallCheckout, edit

SLURM = ("hydra/launcher=submitit_slurm", "hydra.launcher.gres=gpu:1")
"""One job at a time on each node."""
SLOW = "train.epochs=200"
"""Layers that take some seconds: there is time to disturb them."""
LIMIT_S = 300.0


class Project(SmallCheckout):
    """Two layers; one thread, so that the bytes are those of one process."""

    def __init__(self, root: Path, python: Path) -> None:
        super().__init__(root, python)
        edit(root / "conf/runtime/default.yaml", {"threads": 1})
        self.run("python -m pipeline compose && git commit -q -a -m threads")

    def _environment(self) -> None:
        """With a process of its own for `prefill`, which may leave its launcher's thread behind."""
        super()._environment()
        python = self.root / ".venv/bin/python"
        python.unlink()
        python.write_text(
            "#!/bin/sh\n"
            f'case "$*" in "-m pipeline prefill"*) exec {sys.executable} "$@" ;; esac\n'
            f'exec {self.python} "$@"\n'
        )
        python.chmod(0o755)

    def _shrink(self) -> None:
        super()._shrink()
        few = {"layers": [0, 1], "embedded": {"n_layers": 2}}
        edit(self.root / "conf/model/tiny.yaml", few)

    def _stand_in(self) -> None:
        """Nothing comes from the hub."""

    def adopt(self, other: "Project", *units: str) -> None:
        """Take finished work of the other: `dense`, `tokens`."""
        for unit in units:
            scratch = Path(".scratch") / unit
            shutil.copytree(other.root / scratch, self.root / scratch, copy_function=os.link)

    def stage(self, name: str, *overrides: str, layer: int | None = None) -> str:
        """Run one stage without DVC."""
        which = f"--layer {layer}" if layer is not None else ""
        return self.run(f"python -m pipeline.stages.{name} {which} {' '.join(overrides)}")

    def start(self, *arguments: str) -> "Prefill":
        return Prefill(self.root, arguments)

    def prefill(self, *arguments: str, expect: int = 0, seconds: float = LIMIT_S) -> str:
        return self.start(*arguments).ended(expect, seconds)

    def status(self) -> dict[str, dict]:
        """Unit -> its record, as `prefill --status --json` tells it."""
        command = [sys.executable, "-m", "pipeline", "prefill", "--status", "--json"]
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True)
        assert done.stdout, done.stderr
        return {unit["unit"]: unit for unit in json.loads(done.stdout)}

    def states(self) -> dict[str, str]:
        return {name: unit["state"] for name, unit in self.status().items()}

    def until(self, reached: Callable[[], bool], every_s: float = 0.5) -> None:
        end = time.monotonic() + LIMIT_S
        while not reached():
            assert time.monotonic() < end, f"after {LIMIT_S} s: {self.status()}"
            time.sleep(every_s)

    def in_the_midst(self, layer: int) -> int:
        """The pid of the worker that fits this layer, once it has saved a checkpoint."""
        work = self.root / ".scratch" / f"train-layer_{layer}"
        self.until(lambda: any(work.rglob("*checkpoint*")), every_s=0.05)
        unit = self.status()[f"layer={layer}"]
        assert unit["state"] == "running", unit
        return unit["pid"]

    def digests(self, *folders: str) -> dict[str, str]:
        """Path below `stages/` -> SHA-256, of every file there."""
        found = {}
        for folder in folders:
            for path in sorted((self.root / "stages" / folder).rglob("*")):
                if path.is_file():
                    name = str(path.relative_to(self.root / "stages"))
                    found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        assert found
        return found


class Prefill:
    """`python -m pipeline prefill` as a process of its own."""

    def __init__(self, folder: Path, arguments: tuple[str, ...]) -> None:
        self.output = folder.with_name(f"{folder.name}-prefill-{time.monotonic_ns()}.out")
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipeline", "prefill", *arguments],
                cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def ended(self, expect: int = 0, seconds: float = LIMIT_S) -> str:
        """What it printed, when it has ended with that code."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"prefill did not end in {seconds} s\n{self.said()}") from None
        assert code == expect, f"exit {code}, not {expect}\n{self.said()}"
        return self.said()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def said(self) -> str:
        return self.output.read_text(errors="replace")
