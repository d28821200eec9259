"""The control of the kills: where a restore drops something, the end is another."""

import itertools
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from injection import Boundaries, Stand, tree

from pipeline import heal, pretrain, resume, shuffle, training

CHECKPOINT = "checkpoint.safetensors"
KILLED_AT = {"dense": 3, "train@0": 3, "heal": 3}
"""Before this checkpoint: the rerun goes on from the one before it."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def killed(undisturbed: Stand, tmp_path_factory) -> Callable[[str], Stand]:
    """A project in which a stage was killed in its midst, with what it left."""
    made: dict[str, Stand] = {}

    def kill(stage: str) -> Stand:
        if stage not in made:
            there = undisturbed.copy(tmp_path_factory.mktemp("killed") / "project")
            arm = Boundaries(there.root, KILLED_AT[stage], where=CHECKPOINT).arm
            assert there.run(stage, arm=arm).signal == signal.SIGKILL
            made[stage] = there
        return made[stage]

    return kill


def after_restore(act: Callable[[int, Any], object]) -> None:
    """Let `act` see the step and the optimizer of what is restored."""
    real = resume.restore

    def restore(path: Path, optimizer):
        states, kept = real(path, optimizer)
        act(kept["step"], optimizer)
        return states, kept

    resume.restore = restore


def nothing() -> None:
    pass


def optimizer() -> None:
    after_restore(lambda step, optimizer: optimizer.state.clear())


def random_state() -> None:
    """The order of the rows is the only thing that is drawn after the start."""
    real = shuffle.permutation

    def other(step: int, _) -> None:
        shuffle.permutation = lambda n, seed, *stream: real(n, seed + 1, *stream)

    after_restore(other)


def sampler_position() -> None:
    batch, batches, remaining = pretrain._batch, heal._batches, training._remaining

    def again(step: int, _) -> None:
        pretrain._batch = lambda tokens, size, seed, at: batch(tokens, size, seed, at - step)
        heal._batches = lambda blocks, size, seed, at: batches(blocks, size, seed, 0)
        training._remaining = lambda rows, cfg, seed, at, epoch: itertools.islice(
            remaining(rows, cfg, seed, 0, epoch), cfg.epochs * epoch - step
        )

    after_restore(again)


def schedule() -> None:
    rates: dict[Any, Any] = {module: module.rate for module in (pretrain, heal, training)}

    def again(step: int, _) -> None:
        for module, rate in rates.items():
            module.rate = lambda at, *rest, rate=rate: rate(at - step, *rest)

    after_restore(again)


@pytest.mark.parametrize("drop", [nothing, optimizer, random_state, sampler_position, schedule])
@pytest.mark.parametrize("stage", KILLED_AT)
def test_killed_stage_ends_as_undisturbed_only_if_nothing_is_dropped(
    undisturbed: Stand, killed, tmp_path: Path, stage: str, drop: Callable[[], None]
):
    again = killed(stage).copy(tmp_path / "project", scratch=True)
    again.run(stage, arm=drop).check()
    assert (tree(again.out(stage)) == tree(undisturbed.out(stage))) == (drop is nothing)
