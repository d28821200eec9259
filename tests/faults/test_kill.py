"""SIGKILL at the boundaries of every stage's writes; the same command then ends as if undisturbed.

Here a seeded sample of them, the first and the last always; `make soak` takes them all.
"""

import random

import pytest
import soak
from injection import STAGES, Stand, Sweep

SAMPLE = 2
"""Boundaries beside the first and the last."""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [s for s in STAGES if s != "train@1"])
def test_kill_at_a_boundary_then_the_same_command_gives_the_undisturbed_bytes(
    stand: Stand, stage: str
):
    """Published folder, manifest, and every other folder: nothing is left out of the comparison."""
    sweep = Sweep(stand, stage, stand.published())
    n = len(sweep.count())
    sample = 1 if stage == "convert" else SAMPLE  # it opens a fresh process each time
    inner = random.Random(f"kill {stage}").sample(range(2, n), min(sample, n - 2))
    for at in (1, *sorted(inner), n):
        sweep.kill(at, torn=at % 2 == 0)


@pytest.mark.slow
def test_kill_of_many_in_a_row_over_the_whole_dag_ends_as_undisturbed(undisturbed, tmp_path):
    """The soak in small: 20 of its kills."""
    tally = soak.Tally()
    soak.rounds(undisturbed, tmp_path, 20, random.Random(0), tally)
    assert tally.kills() == 20
    assert {stage: row.mismatches for stage, row in tally.rows.items() if row.mismatches} == {}
