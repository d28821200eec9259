"""What a shell offers at the tab key."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import completion, sources

COMPOSE = "python -m pipeline compose "


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("python -m pipe", ["pipeline", *(f"pipeline.stages.{s}" for s in completion.STAGES)]),
        ("python -m pipeline.stages.tr", ["pipeline.stages.train"]),
        ("python -m pipeline co", ["compose", "completion"]),
        ("python -m pipeline --v", ["--version"]),
        ("python -m pipeline completion ", ["bash", "zsh"]),
        (COMPOSE + "--", ["--print", "--help"]),
        (COMPOSE + "mo", ["model.", "model=", "moe.", "moe="]),
        (COMPOSE + "moe.ho", ["moe.host="]),
        (COMPOSE + "moe.dyn", ["moe.dynamic."]),
        (COMPOSE + "moe.dynamic.en", ["moe.dynamic.enabled="]),
        (
            COMPOSE + "moe.dynamic.enabled=",
            ["moe.dynamic.enabled=true", "moe.dynamic.enabled=false"],
        ),
        (COMPOSE + "moe.host=mi", ["moe.host=mixtral"]),
        (COMPOSE + "train.window=", ["train.window=null"]),
        (COMPOSE + "seed=1 experiment=p", ["experiment=pico"]),
        (COMPOSE + "model=smo", ["model=smollm2-135m"]),
        ("python -m pipeline prefill -m layer=0,1 train.sch", ["train.schedule="]),
        ("python -m pipeline.stages.train --l", ["--layer"]),
        ("python -m pipeline.stages.train --layer ", ["0", "1", "2", "3"]),
        ("/some/.venv/bin/python3 -m pipeline.stages.heal heal.tok", ["heal.tokens="]),
        (COMPOSE + "moe.nothing", []),
        (COMPOSE + "moe.n_experts=", []),
        ("python -m pipeline verify st", []),
        ("python -m pipeline nothing mo", []),
        ("python -m pytest mo", []),
        ("python script.py moe.", []),
        ("", []),
    ],
)
def test_a_line_is_completed(project: Path, line: str, offered: list[str]):
    assert completion.candidates(line) == offered


def test_outside_a_project_settings_are_completed_and_layers_and_groups_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert completion.candidates("python -m pipeline.stages.train --layer ") == []
    assert completion.candidates(COMPOSE + "moe=") == []
    assert completion.candidates(COMPOSE + "moe.ho") == ["moe.host="]


def test_the_stages_are_those_of_the_package():
    assert {path.stem for path in (sources.PACKAGE / "stages").glob("[a-z]*.py")} == set(
        completion.STAGES
    )


def test_bash_gets_the_candidates_in_the_form_that_it_wants(project: Path):
    """It takes the word behind `=` for a word of its own."""
    script = completion.BASH + (
        'try() { COMP_LINE="$1"; COMP_POINT=${#1}; _sparse_distillation "$PYTHON"; '
        'echo "${COMPREPLY[*]}"; }\n'
        'try "python -m pipeline compose moe.host=mi"\n'
        'try "python -m pipeline compose moe.ho"\n'
        'try "python other.py moe.ho"\n'
    )
    done = subprocess.run(
        ["bash", "-c", script],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split("\n")[:3] == ["mixtral", "moe.host=", ""]


SETUPS = {"bash": "PS1='> '", "zsh": "PS1='> '; autoload -U compinit; compinit -u -D"}
FLAGS = {"bash": ["--norc", "-i"], "zsh": ["-f", "-i"]}


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_tab_key_completes_in_a_real_shell(project: Path, shell: str):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed here (Debian: apt-get install {shell})")
    child, terminal = pty.fork()
    if child == 0:
        os.environ |= {"TERM": "xterm", "HOME": str(project)}
        os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        os.execvp(shell, [shell, *FLAGS[shell]])

    def typed(text: str, until: str) -> None:
        os.write(terminal, text.encode())
        shown, end = b"", time.monotonic() + 30
        while until.encode() not in shown:
            assert time.monotonic() < end, shown.decode(errors="replace")
            if select.select([terminal], [], [], 1)[0]:
                shown += os.read(terminal, 4096)

    try:
        source = f"source <(python -m pipeline completion {shell})"
        typed(f"{SETUPS[shell]}; {source}; echo rea''dy\n", "ready\r\n")
        typed("python -m pipeline compose moe.host=mix\t", "moe.host=mixtral")
        typed("\x15python -m pipeline.stages.tr\t", "stages.train")
        typed("\x15python conf/config.y\t", "config.yaml")  # what is not ours goes on as before
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(terminal)
