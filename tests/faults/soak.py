"""Kill the stages of a small project again and again, and see that the end is always the same.

    python tests/faults/soak.py [--kills N] [--seed N] [--boundaries all] [--dvc N]

1. With --boundaries all: every stage is killed before every change that it makes to the disk, half
   of the times with the file that it was about to write left torn, and run again.
2. Rounds through all stages, each of them killed several times first: SIGKILL before a random
   change or at a random moment, to the process alone or to its group; until there were N kills.
3. A `dvc repro` that is killed --dvc times, alone or with its stage, and then comes to its end. A
   stage that survives its dvc runs on beside the next one.

Whatever happened, every published file must be as in an undisturbed run, and after each kill the
stage's folder is absent or whole. Ends with 1 where one was not. A copy of the project is used.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

PROJECT = Path(__file__).parents[2]
COPIED = ("pipeline", "conf", "tests/faults", "dvc.yaml", "params.yaml", "stages/README.md")
COPIED += (".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore", "pyproject.toml")
COPIED += ("reports/README.md",)
DVC = "dvc repro"
DVC_S = (2.0, 25.0)
"""When a `dvc repro` is killed; it adopts what was done before, so that all stages get a turn."""


@dataclass
class Row:
    """What was done to a stage, and what came of it."""

    every: int = 0  # boundaries that were swept one by one
    boundary: int = 0  # kills at a random one
    moment: int = 0  # at a random moment, of the process
    group: int = 0  # of its group
    reruns: int = 0
    mismatches: int = 0


@dataclass
class Tally:
    rows: dict[str, Row] = field(default_factory=dict)
    say: Callable[[str], None] = print

    def of(self, stage: str) -> Row:
        return self.rows.setdefault(stage, Row())

    def kills(self) -> int:
        return sum(row.boundary + row.moment + row.group for row in self.rows.values())

    def mismatch(self, stage: str, what: object) -> None:
        self.of(stage).mismatches += 1
        self.say(f"MISMATCH {stage}: {what}")

    def table(self) -> str:
        names = [f.name for f in fields(Row)]
        total = Row(*(sum(getattr(row, name) for row in self.rows.values()) for name in names))
        lines = [["stage", *names], ["---", *["---:"] * len(names)]]
        for stage, row in {**self.rows, "all": total}.items():
            lines.append([stage, *(str(getattr(row, name)) for name in names)])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def sweep(undisturbed, folder: Path, tally: Tally) -> None:
    """Kill every stage before every change that it makes."""
    from injection import STAGES, Sweep

    wanted = undisturbed.published()
    for stage in [s for s in STAGES if s != "train@1"]:  # the same code on another layer
        swept = Sweep(undisturbed.copy(folder / f"sweep {stage}"), stage, wanted)
        n = len(swept.count())
        for at in range(1, n + 1):
            try:
                swept.kill(at, torn=at % 2 == 0)
            except AssertionError as error:
                tally.mismatch(stage, error)
            tally.of(stage).every += 1
            tally.of(stage).reruns += 1
        tally.say(f"{stage}: killed at each of {n} boundaries")


def rounds(undisturbed, folder: Path, kills: int, rng: random.Random, tally: Tally) -> None:
    """Walk through the DAG, killing on the way, as often as it takes."""
    from injection import STAGES, Stand, Sweep

    wanted = undisturbed.published()
    known: dict[str, tuple[int, float]] = {}
    for number in range(1, kills + 1):
        stand = Stand(folder / f"round {number}" / "project", undisturbed.library)
        for stage in STAGES:
            look = Sweep(stand, stage, wanted)
            if stage not in known:
                measured = Sweep(undisturbed.copy(folder / f"count {stage}"), stage, wanted)
                began = time.monotonic()
                known[stage] = len(measured.count()), time.monotonic() - began
            for _ in range(rng.randint(1, 4)):
                if tally.kills() < kills:
                    try:
                        _kill_once(stand, stage, *known[stage], rng, tally.of(stage))
                        look.look()
                    except AssertionError as error:
                        tally.mismatch(stage, error)
            ended = stand.run(stage)
            tally.of(stage).reruns += 1
            if ended.code:
                tally.mismatch(stage, ended)
                return
        try:
            Sweep(stand, "evaluate", wanted).compare()
        except AssertionError as error:
            tally.mismatch("evaluate", error)
        tally.say(f"round {number}: {tally.kills()} kills")
        shutil.rmtree(stand.root.parent)
        if tally.kills() >= kills:
            return


def _kill_once(
    stand, stage: str, boundaries: int, duration_s: float, rng: random.Random, row: Row
) -> None:
    """Start a stage and kill it, which may come too late: then it has ended as it should."""
    from injection import Boundaries

    if rng.random() < 0.5:  # as DVC does before it starts a stage
        shutil.rmtree(stand.out(stage), ignore_errors=True)
    how = rng.choice(("boundary", "moment", "group"))
    if how == "boundary":
        at, torn = rng.randint(1, boundaries), rng.random() < 0.5
        ended = stand.run(stage, arm=Boundaries(stand.root, at, torn=torn).arm)
    else:
        child = stand.start(stage)
        time.sleep(rng.uniform(0, duration_s))
        (os.kill if how == "moment" else os.killpg)(child.pid, signal.SIGKILL)
        ended = child.wait()
    if ended.signal == signal.SIGKILL:
        setattr(row, how, getattr(row, how) + 1)
    else:
        ended.check()


def by_dvc(undisturbed, folder: Path, kills: int, rng: random.Random, tally: Tally) -> None:
    """The same with the real dvc, which is killed and started again."""
    from injection import Stand

    stand = Stand(folder / "dvc" / "project", undisturbed.library)
    for name in set(COPIED) - {"conf", "params.yaml", "tests/faults"}:
        copy_part(name, stand.root)
    subprocess.run(["git", "init", "-q", stand.root], check=True)
    environment, row = stand.environment({}), tally.of(DVC)
    log = (stand.outputs / "dvc.txt").open("w")

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            DVC.split(),
            cwd=stand.root,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    for number in range(kills):
        process = start()
        time.sleep(rng.uniform(*DVC_S))
        if process.poll() is not None:  # the kill comes too late
            if process.returncode:
                tally.mismatch(DVC, f"exit {process.returncode}")
            continue
        alone = number % 2 == 0
        (os.kill if alone else os.killpg)(process.pid, signal.SIGKILL)
        process.wait()
        row.moment, row.group = row.moment + alone, row.group + (not alone)
        tally.say(f"{DVC}: killed {number + 1} times, {'alone' if alone else 'with its stage'}")
    code = start().wait()
    row.reruns += kills + 1
    found, wanted = stand.published(), undisturbed.published()
    for name in ("stages/README.md", "reports/README.md"):
        found.pop(name.removeprefix("stages/"), None)
    found = {name: c for name, c in found.items() if not name.endswith(".gitignore")}
    differing = sorted(k for k in wanted.keys() | found if wanted.get(k) != found.get(k))
    if code or differing:
        tally.mismatch(DVC, f"exit {code}, {differing}\n{Path(log.name).read_text()[-3000:]}")


def copy_part(name: str, to: Path) -> None:
    (to / name).parent.mkdir(parents=True, exist_ok=True)
    if (PROJECT / name).is_dir():
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PROJECT / name, to / name, dirs_exist_ok=True, ignore=ignored)
    else:
        shutil.copy(PROJECT / name, to / name)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--kills", type=int, default=200, metavar="N", help="of step 2 (200)")
    made.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is random (0)")
    made.add_argument("--boundaries", choices=("all", "none"), default="none", help="step 1 (none)")
    made.add_argument("--dvc", type=int, default=8, metavar="N", help="kills of step 3 (8)")
    return made


def main(folder: Path, args: argparse.Namespace) -> int:
    """Soak the project that this file is a part of."""
    import injection
    from shrinking import small_library

    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {text}", flush=True)

    tally = Tally(say=say)
    injection.preload()
    library = small_library(folder / "library")
    undisturbed = injection.Stand(folder / "undisturbed" / "project", library).run_all()
    say("an undisturbed run of all stages")
    rng = random.Random(args.seed)
    if args.boundaries == "all":
        sweep(undisturbed, folder, tally)
    if args.kills:
        rounds(undisturbed, folder, args.kills, rng, tally)
    if args.dvc:
        by_dvc(undisturbed, folder, args.dvc, rng, tally)
    print(tally.table())
    return int(any(row.mismatches for row in tally.rows.values()))


INSIDE = "SOAKED_COPY"
"""Environment variable that says that this is the copy already."""

if __name__ == "__main__":
    options = parser().parse_args()
    if INSIDE in os.environ:
        sys.exit(main(Path(os.environ[INSIDE]), options))
    with tempfile.TemporaryDirectory(prefix="soak-") as made:
        copy = Path(made) / "copy"
        for part in COPIED:
            copy_part(part, copy)
        environment = os.environ | {INSIDE: made, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        environment |= {"HF_HUB_OFFLINE": "1"}
        here = copy / Path(__file__).relative_to(PROJECT)
        command = [sys.executable, str(here), *sys.argv[1:]]
        sys.exit(subprocess.run(command, cwd=copy, env=environment).returncode)
