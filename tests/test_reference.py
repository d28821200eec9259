"""`docs/configuration.md` is what the schemas, the ranges and `conf/` say."""

from pathlib import Path

import pytest

from pipeline import compose, reference
from pipeline.config import leaves
from pipeline.rules import RANGES

PROJECT = Path(__file__).parent.parent


def test_the_page_is_the_one_that_the_code_gives(project: Path):
    written = (PROJECT / reference.PAGE).read_text()
    assert written == reference.page(), "run `make docs`"


def test_every_setting_is_on_it_with_a_meaning(project: Path):
    settings = [setting for section in reference.sections() for setting in section.settings]
    with_embedded = {key for key in leaves(compose.load([])) if key.startswith("model.embedded.")}
    assert {setting.key for setting in settings} == leaves(compose.load([])).keys() | with_embedded
    assert [setting.key for setting in settings if not setting.meaning] == []
    assert [s.path for s in reference.sections() if "Config(" in s.meaning] == []
    layers = [key for key in reference.comments() if key[0] == "LayerMoEConfig"]
    assert layers and all(reference.comments()[key] for key in layers)


def test_a_row_has_the_range_the_default_the_unit_and_the_first_stage_that_reads_it():
    text = (PROJECT / reference.PAGE).read_text()
    rows = dict(line.split(" | ", 1) for line in text.splitlines() if " | " in line)
    assert rows["| `data.tokens.train`"] == (
        "an integer, at least 1 | `262144` | tokens | the layers are fitted to them | `tokens` |"
    )
    assert rows["| `train.window`"].startswith("an integer, at least 1, or null | `null` | ")
    assert rows["| `capture.codec`"].startswith("one of compact, fast, none | `compact` | ")
    assert rows["| `runtime.threads`"].endswith(" | - |")
    assert "`moe.top_k=2`" in rows["| `moe=seed`"]


def test_the_page_follows_each_of_its_sources(project: Path, monkeypatch: pytest.MonkeyPatch):
    entry = project / "conf" / "heal" / "default.yaml"
    entry.write_text(entry.read_text().replace("warmup_steps: 20", "warmup_steps: 30"))
    monkeypatch.setitem(RANGES, "heal.batch_size", (2, None))
    said = reference.comments() | {("HealConfig", "evaluate_every"): "at times [updates]"}
    monkeypatch.setattr(reference, "comments", lambda: said)
    written = (PROJECT / reference.PAGE).read_text()
    assert sorted(set(reference.page().splitlines()) - set(written.splitlines())) == [
        "| `heal.batch_size` | an integer, at least 2 | `8` | sequences | of one step | `heal` |",
        "| `heal.evaluate_every` | an integer, at least 1 | `50` | updates | at times | `heal` |",
        "| `heal.warmup_steps` | an integer, at least 0 | `30` | steps "
        "| until the peak is reached | `heal` |",
    ]
