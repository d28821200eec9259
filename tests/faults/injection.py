"""A project of the smallest size, its stages in forked children, and how one is made to die there.

The children are forked after the imports, so that a stage takes its own time only, and each ends as
its command would. The text is a part of the standard library's, see `shrinking`.
"""

import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from shrinking import shrink
from tqdm import tqdm

from pipeline import command, compose, sources
from pipeline.config import Config

HERE = Path(__file__).parent
PROJECT = HERE.parents[1]
STAGES = (
    "config",
    "dense",
    "tokens",
    "capture",
    "budget",
    "train@0",
    "train@1",
    "heal",
    "convert",
    "evaluate",
)
"""In the order of the DAG, as dvc.yaml names them."""

SECRETS = {
    "HF_TOKEN": "hf_qXzOfTheHub0001",
    "AWS_SECRET_ACCESS_KEY": "qXzOfTheCloud0002",
    "WANDB_API_KEY": "qXzOfTheLogger0003",
}
"""Stand in the environment of that run: no artefact may hold them."""

NAMES = dict.fromkeys(stage.partition("@")[0] for stage in STAGES)
MODULES = tuple(f"pipeline.stages.{name}" for name in NAMES)
SMALLER = """\
# @package _global_
data:
  tokens: {train: 4096, validation: 1024, heldout: 1024, shifted: 1024}
capture:
  shard_mb: 0.125
  heldout_tokens: 1024
model:
  embedded: {max_steps: 24, evaluate_every: 6, checkpoint_every: 6}
train: {epochs: 2, batch_size: 512, evaluate_every: 4, checkpoint_every: 4}
heal: {tokens: 2048, batch_size: 8, evaluate_every: 2, checkpoint_every: 2, train_norms: true}
runtime: {threads: 1}
"""
LIMIT_S = 300.0
TORN = b"\0torn"


def preload() -> None:
    """Import all that a stage imports, once, and take the code's digests."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    for path in sorted((PROJECT / "pipeline").glob("*.py")):
        if path.stem not in ("__main__", "reload"):
            importlib.import_module(f"pipeline.{path.stem}")
    for name in (
        *("datasets", "matplotlib.pyplot", "matplotlib.backends.backend_svg", "zarr", "hydra"),
        *("transformers.models.llama.modeling_llama", "transformers.models.mixtral"),
        *("transformers.models.mixtral.modeling_mixtral", "tokenizers", "accelerate"),
    ):
        importlib.import_module(name)
    for name in MODULES:
        importlib.import_module(name)
        sources.code_digest(name)
    tqdm.set_lock(threading.RLock())  # its own one is shared by forks: a killed one would keep it


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, or the signal that killed it; and what it said."""

    code: int | None
    signal: int | None
    said: str

    def check(self, code: int = 0) -> "Ended":
        assert (self.code, self.signal) == (code, None), f"{self.code}, {self.signal}\n{self.said}"
        return self


@dataclass(frozen=True)
class Child:
    """A stage that runs; it leads a process group of its own."""

    pid: int
    output: Path

    def wait(self, limit_s: float = LIMIT_S) -> Ended:
        until = time.monotonic() + limit_s
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > until:
                os.killpg(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise TimeoutError(f"a child ran for {limit_s} s\n{self.said()}")
            time.sleep(0.002)
        code = os.waitstatus_to_exitcode(status)
        return Ended(*((code, None) if code >= 0 else (None, -code)), self.said())

    def said(self) -> str:
        return self.output.read_text(errors="replace")


class Stand:
    """A project in a folder: conf/, params.yaml and what its stages write there."""

    def __init__(self, root: Path, library: Path) -> None:
        self.root, self.library = root, library
        self.outputs = root.with_name(f"{root.name}.outputs")
        self.outputs.mkdir(parents=True)
        shutil.copytree(PROJECT / "conf", root / "conf")
        (root / "conf/experiment/smaller.yaml").write_text(SMALLER)
        chosen = root / "conf/config.yaml"
        before = chosen.read_text()
        assert "experiment: null" in before
        chosen.write_text(before.replace("experiment: null", "experiment: [pico, smaller]"))
        with contextlib.chdir(root):
            Path("params.yaml").write_text(compose.to_yaml(compose.compose([])))

    def copy(self, root: Path, *, scratch: bool = False) -> "Stand":
        """The same project with what is published; the unfinished work where it is asked for."""
        new = object.__new__(Stand)
        new.root, new.library = root, self.library
        new.outputs = root.with_name(f"{root.name}.outputs")
        new.outputs.mkdir(parents=True)
        for name in ("conf", "stages", "reports", *[".scratch"] * scratch):
            shutil.copytree(self.root / name, root / name)
        shutil.copy(self.root / "params.yaml", root)
        return new

    def start(
        self,
        stage: str,
        overrides: Iterable[str] = (),
        *,
        arm: Callable[[], object] = lambda: None,
        environment: Mapping[str, str] | None = None,
        published: bool = True,
        part: tuple[int, int] | None = None,
    ) -> Child:
        """The stage in a child of this process; `arm` is called in it before anything else."""
        name, _, layer = stage.partition("@")
        module = sys.modules[f"pipeline.stages.{name}"]
        more = {"layer": int(layer)} if layer else {}
        more |= {} if published and part is None else {"published": False}
        more |= {} if part is None else {"part": part}

        def act() -> None:
            cfg = compose.load(list(overrides))
            self._run(module.run, cfg, more)

        output = self.outputs / f"{stage}.{time.monotonic_ns()}.txt"
        output.touch()
        return Child(_fork(act, self.root, output, self.library, arm, environment or {}), output)

    @staticmethod
    def _run(run: Callable[..., object], cfg: Config, more: Mapping[str, object]) -> None:
        run(cfg, **more)

    def run(self, stage: str, overrides: Iterable[str] = (), **how) -> Ended:
        """The same, and wait for its end."""
        return self.start(stage, overrides, **how).wait()

    def command(
        self, stage: str, *overrides: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """The stage as its user starts it: a new interpreter, which leads a group of its own."""
        name, _, layer = stage.partition("@")
        words = ["-m", f"pipeline.stages.{name}", *(["--layer", layer] if layer else [])]
        return subprocess.Popen(
            [sys.executable, *words, *overrides],
            cwd=self.root,
            env=self.environment(environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def environment(self, changed: Mapping[str, str]) -> dict[str, str]:
        """For a new interpreter, which takes the small library for the standard one too."""
        site = self.outputs / "site"
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(
            f"import sys\nfrom pathlib import Path\nsys.path.append({str(HERE)!r})\n"
            f"from shrinking import shrink\nshrink(Path({str(self.library)!r}))\n"
        )
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("DVC_")}
        paths = {
            "PYTHONPATH": f"{site}:{PROJECT}",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        return inherited | paths | dict(changed)

    def run_all(self, **how) -> "Stand":
        for stage in STAGES:
            self.run(stage, **how).check()
        return self

    def published(self) -> dict[str, bytes]:
        """Every file that the stages have put where a reader looks."""
        return tree(self.root / "stages") | {
            f"reports/{name}": content for name, content in tree(self.root / "reports").items()
        }

    def out(self, stage: str) -> Path:
        name, _, layer = stage.partition("@")
        return self.root / "stages" / (f"{name}/layer_{layer}" if layer else name)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def _fork(
    act: Callable[[], None],
    root: Path,
    output: Path,
    library: Path,
    arm: Callable[[], object],
    environment: Mapping[str, str],
) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside zarr's idle threads
        pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        os.chdir(root)
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(descriptor, number)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        for name in [name for name in os.environ if name.startswith("DVC_")]:
            del os.environ[name]
        os.environ.update(environment)
        shrink(library)
        arm()
        command.exit_with(act)
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# Boundaries

CHANGES = ("os.rename", "os.remove", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.truncate")
"""Audit events of what changes names or sizes; `open` for writing and fsync are added."""


class Boundaries:
    """Counts what this process is about to change on the disk below `root`, and acts at one.

    What Python does is announced by its own audit events, before it is done; fsync and the writers
    that are no Python are wrapped. Lives as long as its process.

    Args:
        at: calls `act` before the `at`-th change; 0 = never.
        where: only changes of a path with this ending count.
        act: by default SIGKILL.
        torn: leave half of the file that is to be written there, as a kill in its midst does.
        record: a file outside of `root` that gets (event, path) of every change, line by line.
    """

    def __init__(
        self,
        root: Path,
        at: int = 0,
        act: Callable[[], object] = lambda: os.kill(os.getpid(), signal.SIGKILL),
        torn: bool = False,
        where: str = "",
        record: Path | None = None,
    ) -> None:
        self.root, self.at, self.act = str(root), at, act
        self.torn, self.where = torn, where
        self.seen = 0
        self.record = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if record else None

    def arm(self) -> None:
        import safetensors.torch
        import transformers

        real_fsync = os.fsync
        real_write = safetensors.torch.serialize_file  # pyright: ignore

        def fsync(descriptor: int) -> None:
            self._reach("fsync", opened(descriptor))
            real_fsync(descriptor)

        def serialize_file(tensors, path, *args, **kwargs) -> None:
            def half() -> None:
                real_write(tensors, path, *args, **kwargs)
                os.truncate(path, Path(path).stat().st_size // 2)

            self._reach("serialize", str(Path(path).absolute()), half)
            real_write(tensors, path, *args, **kwargs)

        os.fsync = fsync
        safetensors.torch.serialize_file = serialize_file  # pyright: ignore
        real_save = transformers.PreTrainedTokenizerFast._save_pretrained

        def save(*args, **kwargs):
            path = str(Path(kwargs["save_directory"], "tokenizer.json").absolute())
            self._reach("tokenizer", path, lambda: tear(path))
            return real_save(*args, **kwargs)

        transformers.PreTrainedTokenizerFast._save_pretrained = save
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple) -> None:
        if event == "open":
            path, _, flags = args
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR):
                return
            if isinstance(path, int):
                return
            where = str(Path(os.fsdecode(path)).absolute())
            fresh = flags & (os.O_TRUNC | os.O_EXCL) or not Path(where).exists()
            self._reach("open", where, (lambda: tear(where)) if fresh else None)
        elif event in CHANGES:
            two = event in ("os.rename", "os.link", "os.symlink")
            folder = args[3 if two else -1] if event not in ("os.truncate", "os.symlink") else -1
            base = opened(folder) if folder != -1 else ""
            self._reach(event, str(Path(base, os.fsdecode(args[1 if two else 0])).absolute()))

    def _reach(self, event: str, path: str, half: Callable[[], object] | None = None) -> None:
        if not f"{path}/".startswith(f"{self.root}/") or not path.endswith(self.where):
            return
        self.seen += 1
        if self.record is not None:
            os.write(self.record, f"{json.dumps([event, path])}\n".encode())
        if self.seen == self.at:
            if self.torn and half:
                half()
            self.act()


def opened(descriptor: int) -> str:
    """The path of an open file or folder."""
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


def tear(path: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.write(descriptor, TORN)
    os.close(descriptor)


# Kills

OLD = {"manifest.json": b"{}\n", "old.txt": b"an earlier artefact\n"}


@dataclass
class Sweep:
    """A stage that is killed again and again, over an artefact that was there before."""

    stand: Stand
    stage: str
    wanted: Mapping[str, bytes]  # all that is published in the end

    def begin(self) -> None:
        """No unfinished work, an older artefact in the stage's place, no reports of it."""
        shutil.rmtree(self.stand.root / ".scratch", ignore_errors=True)
        out = self.stand.out(self.stage)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        for name, content in OLD.items():
            (out / name).write_bytes(content)

    def count(self) -> list[tuple[str, str]]:
        """(event, path) of each boundary of an undisturbed run, which must end as wanted."""
        self.begin()
        record = self.stand.outputs / f"{self.stage}.boundaries"
        record.unlink(missing_ok=True)
        arm = lambda: Boundaries(self.stand.root, record=record).arm()  # noqa: E731
        self.stand.run(self.stage, arm=arm).check()
        self.compare()
        events = [tuple(json.loads(line)) for line in record.read_text().splitlines()]
        self._check(events)
        return events

    def _check(self, events: list[tuple[str, str]]) -> None:
        """Every file that is there was announced, and every one that is published made durable."""
        root, out = self.stand.root, self.stand.out(self.stage)
        new = out if self.stage == "config" else out.with_name(f".{out.name}.new.tmp")
        written = {root / ".scratch" / name for name in tree(root / ".scratch")}
        written |= {
            new / name for name in tree(out).keys() - {"old.txt"}
        }  # renamed with its folder
        if self.stage == "config":
            written.discard(new / "manifest.json")
        missed = {str(path) for path in written} - {path for _, path in events}
        assert not missed, f"writes that were not counted: {sorted(missed)}"
        durable = {path for event, path in events if event == "fsync"}
        if self.stage != "config":
            (work,) = (root / ".scratch" / self.stage.replace("@", "-layer_")).iterdir()
            files = {str(work / name) for name in tree(out).keys() - {"manifest.json"}}
            assert not files - durable, "published and not durable"
        for i, (event, path) in enumerate(events):  # a layer's record says that it is complete
            if event == "os.rename" and path.endswith("/config.json"):
                for name in ("layer.safetensors", "history.csv"):
                    beside = path.replace("config.json", name)
                    assert ("fsync", beside) in events[:i], f"{beside} is not durable yet"

    def kill(self, at: int, torn: bool) -> None:
        """Die at a boundary, see that nothing half-written is published, and run again."""
        self.begin()
        arm = lambda: Boundaries(self.stand.root, at, torn=torn).arm()  # noqa: E731
        ended = self.stand.run(self.stage, arm=arm)
        assert ended.signal == signal.SIGKILL, f"boundary {at}: {ended}"
        self.look()
        self.stand.run(self.stage).check()
        self.compare()

    def look(self) -> None:
        """What a reader finds after a kill: the old artefact, the new one or none."""
        out = self.stand.out(self.stage)
        own = f"{out.relative_to(self.stand.root / 'stages')}/"
        new = {name.removeprefix(own): c for name, c in self.wanted.items() if name.startswith(own)}
        found = tree(out)
        if self.stage == "config":  # the one that writes into its folder
            found = {n: c for n, c in found.items() if n not in OLD and not n.endswith(".partial")}
        assert found in ({}, OLD, new), f"{self.stage}: half of it is published"
        for name, content in tree(self.stand.root / "reports").items():
            if not name.endswith(".partial"):
                assert content == self.wanted[f"reports/{name}"], f"reports/{name} is half written"

    def compare(self) -> None:
        wanted = dict(self.wanted)
        if self.stage == "config":
            wanted |= {f"config/{name}": content for name, content in OLD.items()}
        found = self.stand.published()
        differing = sorted(k for k in wanted.keys() | found if wanted.get(k) != found.get(k))
        assert not differing, f"{self.stage}: not as in an undisturbed run: {differing}"
