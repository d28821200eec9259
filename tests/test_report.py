"""The page shows every figure that was measured, alone, and as text whatever it is given."""

import csv
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipeline import charts, cost, pages, record, report
from pipeline.controls import static_plan

SCRIPT = "<script>alert('x')</script>"
FILES = {"metrics.json", "headline.json", "layers.json", "layers.csv", "history.csv", "load.csv"}
FILES |= {"report.html", "README.md", "summary.txt"}


def content(n_layers: int = 3, n_experts: int = 4, name: str = "tiny") -> dict[str, Any]:
    """What `evaluation.measure` and the manifests give; every figure differs from the others."""
    rng, apart = random.Random(0), random.Random(1)

    def share() -> float:
        return rng.uniform(0.1, 0.9)

    def layer() -> dict[str, Any]:
        load = [share() for _ in range(n_experts)]
        return {
            "mse": share() * 1e-5,
            "relative_mse": share(),
            "cosine_sim": share(),
            "cosine_sim_p5": share(),
            "verdict": rng.choice(["good", "below target"]),
            "active_ffn_fraction": share(),
            "first_token": {"relative_mse": share(), "cosine_sim": share()},
            "routing": {
                "load": [part / sum(load) for part in load],
                "load_max_over_mean": 1 + share(),
                "load_entropy": share(),
                "dead_experts": rng.randrange(100, 900),
                "experts_per_token": 2 + share(),
                "unserved_tokens": 0.0,
            },
        }

    def texts(scale: float) -> dict[str, float]:
        return {"heldout": scale * share(), "shifted": scale * share()}

    def control() -> dict[str, Any]:
        figures = {"perplexity_ratio": texts(3), "kl": {"by_text": texts(2)}}
        means = ("cosine_sim", "relative_mse")
        figures["active_ffn_fraction"] = apart.uniform(0.1, 0.9)
        figures |= {name: {"mean": share(), "worst": share()} for name in means}
        layers = {str(k): {name: share() for name in means} for k in range(n_layers)}
        return figures | {"layers": layers}

    metrics = {
        "dense": {"perplexity": texts(90), "byte_perplexity": texts(9), "parameters": 34_976_123},
        "sparse": {
            "perplexity": texts(90),
            "byte_perplexity": texts(9),
            "parameters": {"total": 98_765_432, "active": 23_456_789},
        },
        "perplexity_ratio": texts(5),
        "kl": {"mean": share(), "p99": 3 * share(), "by_text": texts(1)},
        "controls": {name: control() for name in ("static", "oracle")},
        "gap_recovery": {
            "mean": share(),
            "worst": share(),
            "layers": {str(k): share() for k in range(n_layers)},
        },
        "top1_agreement": share(),
        "active_ffn_fraction": share(),
        "active_flops_fraction": share(),
        "cosine_sim": {"mean": share(), "worst": share()},
        "relative_mse": {"mean": share(), "worst": share()},
        "judged_tokens": {"heldout": 3333, "shifted": 4444},
        "good_layers": {"good": 34_567, "of": 45_678, "cosine_above": 0.875},
        "layers": {str(k): layer() for k in range(n_layers)},
    }
    shape = {"d_model": 16, "d_ff": 4096, "d_ff_expert": 1024, "n_experts": n_experts, "top_k": 2}
    shape |= {"activation": "silu", "gated": True, "bias": False, "router_function": "softmax_topk"}
    settings = {
        "dense": {
            "model.name": name,
            "model.id": "owner/model",
            "model.revision": "main",
            "seed": 7,
        },
        "train_0": {"train.batch_size": 512},
        "tokens": {"data.source": "files", "data.dataset": None, "data.files": ["a.txt"]}
        | {"data.revision": None},
        "convert": {"convert.tolerance": 1e-3},
    }
    return {
        "name": name,
        "metrics": metrics,
        "settings": {"evaluate.prompt": "Return"},
        "manifests": {
            part: {
                "settings": of,
                "fingerprint": f"{part}0123",
                "code": f"{part}c0de" * 8,
                "versions": {"torch": "9.8.7"},
                "files": {"a.safetensors": f"{part}4567"},
            }
            for part, of in settings.items()
        },
        "record": {
            "revision": "abc123",
            "digests": {"model.safetensors": "fedc89"},
            "family": "llama",
            "dtype": "float32",
            "n_layers": n_layers,
            "d_model": 16,
            "layers": [{"index": k, "bias": False} for k in range(n_layers)],
        },
        "licence": {},
        "speed": {},
        "sizes": {
            "captured_tokens": 5555,
            "train_tokens": 4444,
            "store_bytes": 66_600,
            "checkpoint_bytes": 77_700,
        },
        "left_dense": [],
        "layers": {
            k: {"layer": k, "host": "mixtral", "shape": shape, "init": "specialist"}
            | {"training": training()}
            for k in range(n_layers)
        },
        "history": {
            k: [
                {"step": 0, "validation_relative_mse": 0.9},
                {"step": 50, "loss": 0.25 + k, "validation_relative_mse": 0.5},
            ]
            for k in range(n_layers)
        },
        "samples": {"dense": "Return the list.", "sparse": "Return the tuple."},
        "tokens": {
            split: {
                "blocks": 2,
                "tokens": 1111 * (i + 1),
                "bytes": 7777 * (i + 1),
                "budget": 98_765,
            }
            for i, split in enumerate(("train", "validation", "heldout", "shifted"))
        },
    }


def of_encoder(given: dict[str, Any]) -> dict[str, Any]:
    """The same, but of embeddings and not of a language model."""
    rng = random.Random(1)
    metrics = given["metrics"]
    for of in (metrics, *metrics["controls"].values()):
        for gone in ("perplexity_ratio", "kl", "top1_agreement"):
            of.pop(gone, None)
        names = ["embedding_cosine", "neighbour_agreement"]
        if of is metrics:
            names += ["embedding_cosine_p5", "neighbour_overlap"]
        for name in names:
            of[name] = {text: rng.uniform(0.1, 0.9) for text in ("heldout", "shifted")}
    for side in ("dense", "sparse"):
        for gone in ("perplexity", "byte_perplexity"):
            del metrics[side][gone]
    return given | {"samples": {}}


def training() -> dict[str, Any]:
    validation = {"step": 50, "validation_relative_mse": 0.5}
    return {"steps": 50, "best_step": 50, "validation": validation, "warnings": []}


def choosing(given: dict[str, Any], unserved: dict[int, float]) -> dict[str, Any]:
    """The same, but experts choose in every layer, and this share of tokens finds none."""
    for k, layer in given["layers"].items():
        chosen = {"routing": "expert_choice", "capacity_factor": 1.25}
        layer["shape"] = layer["shape"] | chosen
        given["metrics"]["layers"][str(k)]["routing"]["unserved_tokens"] = unserved[k]
    return given


def resized(given: dict[str, Any], layers: list[int] | None = None) -> dict[str, Any]:
    """The same, but the experts of these layers (null = all) grew and shrank while trained."""
    for k in given["layers"] if layers is None else layers:
        layer = given["layers"][k]
        n = layer["shape"]["n_experts"]
        sizes = [
            {"step": step, "widths": [1024 + step // 20 * 8 * (e - 1 + k) for e in range(n)]}
            for step in (0, 20, 40)
        ]
        kept = [w + 3000 for w in sizes[1]["widths"]]
        layer["training"] |= {"sizes": sizes, "best_step": 30}
        layer["shape"] = layer["shape"] | {"expert_widths": kept, "d_ff_expert": max(kept)}
    given["metrics"]["sparse"]["parameters"]["unpadded"] = 87_654_321
    return given


class Page(HTMLParser):
    """Tags with their attributes, and the text outside pictures and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.hidden, self.pictures = "", 0, ""
        self.tables: list[list[list[str]]] = []  # rows of cells
        self.in_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.hidden += tag in ("svg", "style")
        if tag not in ("mark", "wbr"):
            self.text += " "  # a cell's text ends where the next one's begins
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("svg", "style")
        self.in_cell &= tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.hidden:
            self.pictures += data
        else:
            self.text += data
            if self.in_cell:
                self.tables[-1][-1][-1] += data

    def column(self, name: str) -> list[str]:
        """Below the head of that name, in the one table that has it."""
        (table,) = [table for table in self.tables if name in table[0]]
        return [row[table[0].index(name)] for row in table[1:]]

    def attributes(self, *names: str) -> list[str]:
        return [v for _, attrs in self.tags for n, v in attrs.items() if n in names and v]


def written(folder: Path, given: dict[str, Any] | None = None) -> Page:
    folder.mkdir(exist_ok=True)
    report.write(folder, given or content())
    return Page((folder / "report.html").read_text())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Reports of so many layers."""
    made = {n: tmp_path_factory.mktemp("report") / str(n) for n in (1, 3, 40)}
    for n, folder in made.items():
        written(folder, content(n))
    return made


@pytest.fixture
def folder(folders: dict[int, Path]) -> Path:
    return folders[3]


@pytest.fixture
def html(folder: Path) -> str:
    return (folder / "report.html").read_text()


@pytest.fixture
def page(html: str) -> Page:
    return Page(html)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def figures(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, below in value.items():
            yield from figures(below, f"{name}.{key}")
    elif isinstance(value, list):
        for i, below in enumerate(value):
            yield from figures(below, f"{name}.{i}")
    else:
        yield name, value


def shown(value: float | str, text: str) -> bool:
    """As a figure of its own, not as digits of another."""
    if isinstance(value, str):
        return value in text
    forms = {pages.number(value), f"{100 * value:.1f} %", f"{value:g}"}
    return any(re.search(rf"(?<![\d.,]){re.escape(form)}(?!\d)", text) for form in forms)


# The page


@pytest.mark.parametrize("n_layers", [1, 3, 40])
def test_every_figure_of_metrics_json_is_shown_on_the_page(folders, n_layers: int):
    page = Page((folders[n_layers] / "report.html").read_text())
    metrics = json.loads((folders[n_layers] / "metrics.json").read_text())
    assert metrics == content(n_layers)["metrics"]
    missing = [name for name, value in figures(metrics) if not shown(value, page.text)]
    assert missing == []


def test_every_figure_of_an_encoder_is_shown_on_the_page(tmp_path: Path):
    given = of_encoder(content())
    page = written(tmp_path, given)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    missing = [name for name, value in figures(metrics) if not shown(value, page.text)]
    assert missing == []
    assert "erplexity" not in page.text and "What they say" not in page.text
    static = metrics["controls"]["static"]["embedding_cosine"]["heldout"]
    assert f"has an embedding cosine of {static:.4f}" in page.text
    card, summary = ((tmp_path / name).read_text() for name in ("README.md", "summary.txt"))
    assert "AutoModel.from_pretrained" in card and "sentence-similarity" in card
    for text in ("heldout", "shifted"):
        assert f"{metrics['embedding_cosine'][text]:.4f}" in summary
        assert shown(metrics["embedding_cosine"][text], card)


def test_the_check_above_would_miss_a_figure_that_is_not_there(page: Page):
    other = content(n_layers=9)["metrics"]["layers"]["8"]
    measured = [v for name, v in figures(other) if v and not isinstance(v, str)]
    assert measured and not any(shown(value, page.text) for value in measured)


def test_the_page_needs_nothing_beside_it(page: Page, html: str):
    assert not {"http", "//", "@import"} & set(re.findall("http|//|@import", html))
    assert not {"script", "iframe", "object", "embed", "img"} & {tag for tag, _ in page.tags}
    links = page.attributes("href", "src", "srcset", "xlink:href", "data", "action")
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))


def test_every_reference_in_the_pictures_has_one_meaning(html: str):
    used = set(re.findall(r"(?:url\(|href=\")#([^\")]+)", html))
    defined = re.findall(r"<(\w+)[^>]*? id=\"([^\"]+)\"([^>]*>.*?)(?=<)", html, re.DOTALL)
    assert used and used <= {name for _, name, _ in defined}
    meanings: dict[str, set[str]] = {}
    for tag, name, body in defined:
        meanings.setdefault(name, set()).add(tag + body)
    assert {name for name, bodies in meanings.items() if len(bodies) > 1} == set()


def test_every_picture_has_words_and_takes_the_pages_colour(page: Page, html: str):
    labels = [a.get("aria-label") for tag, a in page.tags if a.get("role") == "img"]
    assert len(labels) == 5 and all(labels)
    assert [tag for tag, _ in page.tags].count("svg") == 5
    assert charts.INK not in html and "currentColor" in html
    assert {"perplexity", "cosine_sim", "relative_mse", "step", "expert"} <= set(
        page.pictures.split()
    )


def test_what_is_written_on_the_page_is_text_and_not_html(tmp_path: Path):
    given = content()
    places = ("name", "dense", "sparse", "value", "key", "version", "fingerprint")
    marked = {place: SCRIPT.replace("x", place) for place in places}
    given["name"] = marked["name"]
    given["samples"] = {side: marked[side] for side in ("dense", "sparse")}
    manifest = given["manifests"]["convert"]
    manifest["settings"] |= {"data.files": [marked["value"]], marked["key"]: 1}
    manifest["versions"]["torch"] = marked["version"]
    manifest["fingerprint"] = marked["fingerprint"]
    page = written(tmp_path, given)
    assert "script" not in {tag for tag, _ in page.tags}
    in_json = json.loads(re.search(r"(\[\S*alert[^]]*\])", page.text)[1])  # type: ignore[index]
    assert in_json == [marked.pop("value")]
    assert all(text in page.text for text in marked.values())


def test_the_page_shows_settings_samples_origin_and_sizes(page: Page):
    text = page.text
    for expected in ("owner/model", "abc123", '["a.txt"]', "null", "convert.tolerance"):
        assert expected in text
    for expected in ("Return the list.", "Return the tuple.", "9.8.7", "dense0123", "mixtral"):
        assert expected in text
    for expected in ("fedc89", "tokens4567", "densec0dedensec0", "77.7 KB", "66.6 KB"):
        assert expected in text
    for split in content()["tokens"].values():
        assert all(shown(split[key], text) for key in ("tokens", "bytes", "budget"))


def test_more_parameters_than_the_dense_model_are_said_and_fewer_are_not(
    page: Page, tmp_path: Path
):
    assert "not memory" in page.text
    given = content()
    given["metrics"]["sparse"]["parameters"]["total"] = 34_976_122
    assert "not memory" not in written(tmp_path, given).text


def test_null_figures_are_shown_as_a_dash_with_their_reason(tmp_path: Path):
    given = content()
    null = {"relative_mse": None, "cosine_sim": None, "null_because": "it is zero <b>"}
    below = {"cosine_sim_p5": None, "first_token": null, "verdict": None}
    given["metrics"]["layers"]["1"] |= null | below
    page = written(tmp_path, given)
    assert "Layer 1 has no relative error and no cosine: it is zero <b>." in page.text
    assert "Layer 0 has no" not in page.text
    assert page.text.count("\u2013") == 8
    assert "NaN" not in "".join(content.decode() for content in files(tmp_path).values())
    rows = list(csv.DictReader((tmp_path / "layers.csv").open()))
    assert rows[1]["relative_mse"] == rows[1]["cosine_sim"] == ""
    assert "1: \u2013" in (tmp_path / "summary.txt").read_text()


def test_a_conversion_whose_every_layer_is_null_has_a_report(tmp_path: Path):
    given = content(n_layers=1)
    null = {"relative_mse": None, "cosine_sim": None, "null_because": "zero"}
    given["metrics"]["layers"]["0"] |= null | {"cosine_sim_p5": None, "first_token": null}
    for name in ("cosine_sim", "relative_mse"):
        given["metrics"][name] = {"mean": None, "worst": None}
    assert "worst layer \u2013" in written(tmp_path, given).text


@pytest.mark.parametrize("n_layers", [8, 40])
def test_layers_are_named_up_to_eight_and_shaded_beyond(n_layers: int):
    pictures = charts.draw(content(n_layers), {})
    named = re.findall(r"layer \d+", pictures["training"])
    assert len(set(named)) == (n_layers if n_layers <= 8 else 0)
    heights = {k: float(re.search(r'height="([\d.]+)pt"', p)[1]) for k, p in pictures.items()}  # type: ignore
    assert max(heights.values()) < 400


def test_layers_may_have_unlike_numbers_of_experts_and_an_untrained_history(tmp_path: Path):
    given = content(n_layers=2, n_experts=4)
    wider = content(n_layers=1, n_experts=7)
    given["metrics"]["layers"]["1"] = wider["metrics"]["layers"]["0"]
    given["history"] = {k: rows[:1] for k, rows in given["history"].items()}
    page = written(tmp_path, given)
    missing = [n for n, v in figures(given["metrics"]) if not shown(v, page.text)]
    assert missing == []


# What each layer is judged by


def test_each_layer_has_its_verdict_and_the_page_counts_them(folder: Path, page: Page):
    metrics = content()["metrics"]
    assert page.column("verdict") == [layer["verdict"] for layer in metrics["layers"].values()]
    counted = "34567 of 45678 layers good: cosine above 0.875."
    assert counted in page.text and counted in (folder / "summary.txt").read_text()
    assert counted in (folder / "README.md").read_text()
    assert "34567 of 45678 above 0.875" in page.text


def test_layers_of_one_shape_share_a_row_of_sizes(page: Page):
    # Four experts of a quarter and two active; the router is 4 x 16 of 3 x 4,096 x 16 parameters.
    assert page.column("configuration") == ["d_ff_expert=0.25 (1024), n=4, top-2"]
    assert page.column("dense d_ff") == ["4,096"]
    assert page.column("total MoE parameters") == ["1x dense FFN"]
    assert page.column("active parameters") == ["0.5x"]
    assert page.column("layers") == ["0-2"]


def test_layers_of_unlike_shapes_and_those_left_dense_have_rows_of_their_own(tmp_path: Path):
    given = content(n_layers=5)
    shape = given["layers"][0]["shape"]
    other = {"n_experts": 32, "top_k": 3, "d_ff_expert": 1000, "router_width": 64}
    given["layers"][1]["shape"] = given["layers"][3]["shape"] = shape | other
    chosen = {"routing": "expert_choice", "capacity_factor": 1.5, "n_experts": 8}
    given["layers"][4]["shape"] = shape | chosen
    given["layers"][2]["shape"] = shape | {"balance_bias": True}
    given["left_dense"] = [5, 6, 9]
    page = written(tmp_path, given)
    assert page.column("configuration") == [
        "d_ff_expert=0.25 (1024), n=4, top-2",
        "d_ff_expert=0.2441 (1000), n=32, top-3, MLP router of 64",
        "d_ff_expert=0.25 (1024), n=4, top-2, balance bias",
        "d_ff_expert=0.25 (1024), n=8, expert choice at capacity 1.5",
        "left dense",
    ]
    # 32 x 1,000 of 4,096 neurons, 32 rows of a router, 64 x (16 + 32) of its hidden layer.
    assert page.column("total MoE parameters") == [
        "1x dense FFN",
        "7.83x dense FFN",
        "1x dense FFN",
        "2x dense FFN",
        "1x dense FFN",
    ]
    assert page.column("active parameters") == ["0.5x", "0.751x", "0.5x", "0.376x", "1x"]
    assert page.column("layers") == ["0", "1, 3", "2", "4", "5-6, 9"]


def test_layers_left_dense_are_named_where_there_are_any(folder: Path, tmp_path: Path):
    given = content()
    given["left_dense"] = [4]
    assert "Left dense: layer 4." in written(tmp_path, given).text
    given["left_dense"] = [3, 4, 5, 7]
    assert "Left dense: layers 3-5, 7." in written(tmp_path, given).text
    assert "left dense: 3-5, 7" in (tmp_path / "summary.txt").read_text()
    assert "Layers left dense: 3-5, 7." in (tmp_path / "README.md").read_text()
    for name in ("report.html", "summary.txt", "README.md"):
        assert "left dense" not in (folder / name).read_text().lower()


def test_the_warnings_of_training_stand_above_everything_but_the_answers(page: Page, tmp_path):
    given = content(n_layers=5)
    for k in (0, 1, 2, 4):
        given["layers"][k]["training"]["warnings"] = [SCRIPT]
    given["layers"][3]["training"]["warnings"] = ["step 40: the load is uneven"]
    warned = written(tmp_path, given)
    assert "script" not in {tag for tag, _ in warned.tags}
    for line in (f"layers 0-2, 4: {SCRIPT}", "layer 3: step 40: the load is uneven"):
        place = warned.text.index(f"Training, {line}")
        assert place < warned.text.index("Dense against sparse")
        assert line in (tmp_path / "summary.txt").read_text()
    assert "Warnings" in warned.text and "Warnings" not in page.text


# Experts that choose, and experts that grow


def test_experts_that_choose_come_with_a_warning_and_the_share_they_leave(folder: Path, tmp_path):
    given = choosing(content(), {0: 0.0123, 1: 0.2346, 2: 0.0456})
    page = written(tmp_path, given)
    assert page.column("unserved_tokens") == ["0.01230", "0.2346", "0.04560"]
    for part in ("token_choice is recommended", "gets zero", "later tokens", "threshold"):
        assert part in " ".join(page.text.split())
    worst = "23.5 % of the held-out tokens in layer 1, the worst"
    assert worst in page.text and worst in (tmp_path / "README.md").read_text()
    summary = (tmp_path / "summary.txt").read_text()
    assert "23.5 % in layer 1" in summary and "token_choice is recommended" in summary
    plain = "".join((folder / f).read_text() for f in ("README.md", "summary.txt", "report.html"))
    assert "recommended" not in plain and ", the worst" not in plain


def test_the_widths_of_resized_experts_are_drawn_and_tabulated(page: Page, tmp_path: Path):
    given = resized(content())
    found = written(tmp_path, given)
    labels = [a.get("aria-label") for tag, a in found.tags if a.get("role") == "img"]
    assert len(labels) == 6 and all(labels)
    for k, layer in given["layers"].items():
        start, kept = layer["training"]["sizes"][0]["widths"], layer["shape"]["expert_widths"]
        for name, widths in (("start", start), ("kept", kept)):
            cells = [f"{k},\xa0{name}", *(f"{w:,}" for w in (sum(widths), *widths))]
            assert any(cells in table for table in found.tables)
    assert "4016 to 4040, mean 4028" in found.column("configuration")[0]
    assert "87,654,321 without the padding" in found.text
    assert "Expert sizes" in found.text and "Expert sizes" not in page.text
    assert "padding" not in page.text


def drawn(given: dict[str, Any]) -> str:
    return charts.draw(given, report._derived(given)["resized"])["widths"]


def test_the_picture_of_widths_shows_each_reallocation_and_the_kept_step():
    given = resized(content())
    before = drawn(given)
    given["layers"][1]["training"]["sizes"][1]["widths"][2] += 8
    after = drawn(given)
    assert after != before
    given["layers"][2]["training"]["best_step"] = 10
    assert drawn(given) != after


def test_only_layers_whose_experts_were_resized_have_widths_and_a_dozen_is_drawn(tmp_path: Path):
    some = resized(content(5), [1, 4])
    assert set(re.findall(r"layer \d+", drawn(some))) == {"layer 1", "layer 4"}
    named = [row[0] for table in written(tmp_path, some).tables for row in table]
    assert [name for name in named if name.endswith("start")] == ["1,\xa0start", "4,\xa0start"]
    many = resized(content(40))
    assert len(set(re.findall(r"layer \d+", drawn(many)))) == 12
    assert "The first 12 of 40 layers." in written(tmp_path, many).text
    assert "The first 12" not in written(tmp_path, some).text


# How much was judged


def test_text_that_was_judged_in_part_is_told_with_how_much(folder: Path, tmp_path: Path):
    given = content()
    given["metrics"]["judged_tokens"] = {"heldout": 1234, "shifted": 4444}
    page = written(tmp_path, given)
    for text in (
        page.text,
        (tmp_path / "summary.txt").read_text(),
        (tmp_path / "README.md").read_text(),
    ):
        assert "the first 1,234 of 3,333 tokens of heldout" in text
        assert "of shifted" not in text
    assert page.column("judged") == ["", "", "1,234", "4,444"]
    for name in ("report.html", "summary.txt", "README.md"):
        assert "the first" not in (folder / name).read_text()


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], ""), ([3], "3"), ([2, 0, 1, 5], "0-2, 5"), ([0, 2, 4, 5], "0, 2, 4-5")],
)
def test_runs_of_layers_are_written_as_spans(values: list[int], expected: str):
    assert record.spans(values) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1234567, "1,234,567"),
        (0, "0"),
        (12.3456, "12.346"),
        (1.0, "1.000"),
        (0.5, "0.5000"),
        (-0.0123, "-0.01230"),
        (0.0, "0.000"),
        (5.28e-5, "5.28e-05"),
        (123456.7, "1.23e+05"),
        (None, "\u2013"),
    ],
)
def test_numbers_are_written_with_four_figures_and_integers_whole(value, expected: str):
    assert pages.number(value) == expected


# Beside the page


def test_write_gives_these_files_and_the_same_bytes_in_any_process(folder: Path, tmp_path: Path):
    expected = files(folder)
    assert expected.keys() == FILES
    code = "import sys, pathlib, test_report as t; t.written(pathlib.Path(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        env=os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).parent)},
        check=True,
    )
    assert files(tmp_path) == expected
    written(tmp_path)
    assert files(tmp_path) == expected


def test_another_figure_gives_other_bytes(folder: Path, tmp_path: Path):
    given = content()
    given["metrics"]["layers"]["2"]["cosine_sim"] = 0.123456
    written(tmp_path, given)
    before, after = files(folder), files(tmp_path)
    same = {"history.csv", "load.csv", "headline.json", "README.md"}
    assert {name for name in FILES if before[name] == after[name]} == same


def test_tables_of_layers_agree_with_metrics(folders):
    folder = folders[40]
    metrics = json.loads((folder / "metrics.json").read_text())
    layers = metrics["layers"]
    table = list(csv.DictReader((folder / "layers.csv").open()))
    rows = json.loads((folder / "layers.json").read_text())
    assert [int(row["layer"]) for row in table] == [row["layer"] for row in rows] == [*range(40)]
    for row, text in zip(rows, table, strict=True):
        of = layers[str(row["layer"])]
        expected = {name: of[name] for name in ("mse", "relative_mse", "cosine_sim")}
        expected |= {"cosine_sim_p5": of["cosine_sim_p5"], "layer": row["layer"]}
        expected |= {name: of[name] for name in ("verdict", "active_ffn_fraction")}
        expected |= {f"first_token_{name}": value for name, value in of["first_token"].items()}
        expected |= {name: value for name, value in of["routing"].items() if name != "load"}
        for control in ("static", "oracle"):
            found = metrics["controls"][control]["layers"][str(row["layer"])]
            expected |= {f"{control}_{name}": value for name, value in found.items()}
        assert row == expected
        assert text.pop("verdict") == expected.pop("verdict")
        assert {name: float(value) for name, value in text.items()} == expected


def test_history_csv_holds_every_validation_of_every_layer(folder: Path):
    table = list(csv.DictReader((folder / "history.csv").open()))
    found = [{name: float(value) for name, value in row.items() if value} for row in table]
    expected = [{"layer": k, **row} for k, of in content()["history"].items() for row in of]
    assert found == expected


def test_only_a_checkpoint_of_our_own_architecture_asks_for_remote_code(folder: Path, tmp_path):
    given = content()
    for layer in given["layers"].values():
        layer["host"] = "custom"
    page, card = written(tmp_path, given), (tmp_path / "README.md").read_text()
    assert card.count('from_pretrained("path/to/this/folder", trust_remote_code=True)') == 2
    assert "stock" not in card and "lets `transformers` run that file" in card
    assert "trust_remote_code=True" in page.text
    assert "needs trust_remote_code" in (tmp_path / "summary.txt").read_text()
    assert "It opens with stock `transformers`:" in (folder / "README.md").read_text()
    for name in ("report.html", "summary.txt", "README.md"):
        assert "remote" not in (folder / name).read_text()


def test_summary_has_the_figures_that_decide(folder: Path):
    summary, metrics = (folder / "summary.txt").read_text(), content()["metrics"]
    for text in ("heldout", "shifted"):
        (line,) = [line for line in summary.splitlines() if line.startswith(f"perplexity {text}")]
        found = [float(word) for word in line.split()[2:]]
        sides = [metrics[side]["perplexity"][text] for side in ("dense", "sparse")]
        assert found == pytest.approx([*sides, metrics["perplexity_ratio"][text]], abs=0.01)
    for name in ("active_ffn_fraction", "active_flops_fraction"):
        assert shown(metrics[name], summary)
    assert all(shown(v, summary) for v in metrics["sparse"]["parameters"].values())
    assert shown(metrics["dense"]["parameters"], summary)
    for k, layer in metrics["layers"].items():
        assert f"{k}: {pages.number(layer['cosine_sim'])}" in summary
    assert "3 layers, mixtral" in summary and "report.html" in summary


# Controls


def controlled(ours: float, static: float) -> dict[str, Any]:
    given = content()
    given["metrics"]["perplexity_ratio"]["heldout"] = ours
    given["metrics"]["controls"]["static"]["perplexity_ratio"]["heldout"] = static
    return given


def html_of(folder: Path, given: dict[str, Any]) -> str:
    written(folder, given)
    return (folder / "report.html").read_text()


def test_controls_stand_beside_the_sparse_model(tmp_path: Path):
    given = content()
    page = html_of(tmp_path, given)
    for name, control in given["metrics"]["controls"].items():
        assert f'<tr><th scope="row">{name}</th>' in page
        for figures in (control["perplexity_ratio"], control["kl"]["by_text"]):
            assert all(pages.number(figure) in page for figure in figures.values())
        assert pages.number(control["relative_mse"]["mean"]) in page
    assert f"{100 * given['metrics']['gap_recovery']['mean']:.1f} %" in page
    summary = (tmp_path / "summary.txt").read_text()
    static = given["metrics"]["controls"]["static"]["perplexity_ratio"]
    assert f"heldout {static['heldout']:.3f}, shifted {static['shifted']:.3f}" in summary


def test_the_report_says_what_the_router_is_worth(tmp_path: Path):
    page = html_of(tmp_path, controlled(1.03, 1.06))
    assert (
        "has 1.060 times the dense perplexity where the sparse model has 1.030: it loses 50%"
        in page
    )
    assert "loses 50% of what that loses" in (tmp_path / "README.md").read_text()
    page = html_of(tmp_path, controlled(1.07, 1.06))
    assert "here the router is worth nothing" in page


def test_nothing_is_said_of_the_router_where_neither_loses_anything(tmp_path: Path):
    apart = "neither loses anything that can be told apart"
    assert apart in html_of(tmp_path, controlled(1.00001, 1.00002))
    page = html_of(tmp_path, controlled(1.07, 1.00002))
    assert apart not in page and "here the router is worth nothing" in page


def test_a_layer_whose_static_control_is_the_dense_ffn_is_named(tmp_path: Path):
    given = content()
    assert "static is that FFN" not in html_of(tmp_path, given)
    one = (tmp_path / "report.html").read_text()
    given["layers"][1]["shape"] = given["layers"][1]["shape"] | {"top_k": 4}
    page = html_of(tmp_path, given)
    assert "In layer 1 as much is run as in the dense FFN, and static is that FFN." in page
    assert given["layers"][0]["shape"]["top_k"] == 2 and one != page


def test_the_card_has_the_active_share_of_each_side(tmp_path: Path):
    given = content()
    written(tmp_path, given)
    card = (tmp_path / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if line.startswith("| active neurons")]
    metrics = given["metrics"]
    sides = metrics["active_ffn_fraction"], metrics["controls"]["static"]["active_ffn_fraction"]
    assert line.endswith("| 100 % | {:.1f} % | {:.1f} % |".format(*(100 * s for s in sides)))


def test_the_dense_ffn_has_no_biases_that_compensation_gave_its_experts(tmp_path: Path):
    def dense_of(given: dict[str, Any]) -> list[str]:
        (row,) = [r for t in written(tmp_path, given).tables for r in t if "converted FFNs" in r[0]]
        return row

    plain, biased = content(), content()
    for layer in biased["layers"].values():
        layer["shape"] = layer["shape"] | {"bias": True}
    assert dense_of(plain)[1] == dense_of(biased)[1] == pages.number(3 * 3 * 16 * 4096)
    assert dense_of(plain)[3] != dense_of(biased)[3]


def test_the_error_at_the_best_step_is_that_of_the_state_that_was_kept(tmp_path: Path):
    given = content()
    given["history"][0].insert(1, {"step": 20, "validation_relative_mse": 0.375})
    assert written(tmp_path, given).column("at the best step") == [pages.number(0.5)] * 3


def test_a_layer_worse_than_plain_pruning_is_named(tmp_path: Path):
    given = content()
    assert "worse than plain pruning" not in html_of(tmp_path, given)
    given["metrics"]["gap_recovery"]["worst"] = -0.1
    assert "worse than plain pruning" in html_of(tmp_path, given)


def test_a_report_without_a_static_control_says_so(tmp_path: Path):
    given = content()
    given["metrics"]["controls"] = {}
    del given["metrics"]["gap_recovery"]
    page = html_of(tmp_path, given)
    assert "No static control" in page and "Against controls" not in page
    given["metrics"]["active_ffn_fraction"] = 2.0
    assert "as much is run as in it" in html_of(tmp_path, given)


# Speed


def timed(given: dict[str, Any]) -> dict[str, Any]:
    """The same, timed: slower one by one, faster together, undecided in writing."""
    ratios = {"prefill_1": (0.7, 0.61, 0.89), "prefill_16": (1.3, 1.21, 1.42)}
    ratios |= {"decode": (1.02, 0.93, 1.11)}
    work = {
        name: dict(zip(("ratio", "least", "most"), of, strict=True))
        | {"dense": 1000 * (i + 1.4), "sparse": 1e5 * (i + 1)}
        for i, (name, of) in enumerate(ratios.items())
    }
    where = {"device": "cpu", "threads": 2, "dtype": "float32", "rounds": 9}
    return given | {"speed": {"work": work, **where}}


def test_speed_is_told_with_its_spread_and_a_word_that_goes_by_it(tmp_path: Path):
    given = timed(content())
    page = written(tmp_path, given)
    assert page.column("in a word") == ["slower", "faster", "no clear difference"]
    assert page.column("speed ratio, median") == ["0.7x", "1.3x", "1.02x"]
    assert page.column("least") == ["0.61x", "1.21x", "0.93x"]
    assert page.column("most") == ["0.89x", "1.42x", "1.11x"]
    assert page.column("dense, tokens/s") == ["1,400", "2,400", "3,400"]
    assert "9 times, on this machine: cpu, 2 threads, float32" in page.text
    assert "Fewer FLOPs are not less time by themselves" in page.text
    for name in ("README.md", "summary.txt"):
        assert "1.3x (1.21x to 1.42x)" in (tmp_path / name).read_text()
    assert json.loads((tmp_path / "speed.json").read_text()) == given["speed"]
    told = json.loads((tmp_path / "headline.json").read_text())["speed"]
    assert told == {"prefill_1": 0.7, "prefill_16": 1.3, "decode": 1.02}


def test_only_what_a_clock_makes_differs_between_two_timings(folder: Path, tmp_path: Path):
    written(tmp_path, timed(content()))
    before, after = files(folder), files(tmp_path)
    differing = {name for name in after if before.get(name) != after[name]}
    told = {"report.html", "README.md", "summary.txt", "headline.json", "speed.json"}
    assert differing == told


def test_a_report_without_timings_says_so_and_why(page: Page, folder: Path):
    assert "evaluate.measure_speed is off" in page.text and "in a word" not in page.text
    assert not (folder / "speed.json").exists()
    assert "speed" not in json.loads((folder / "headline.json").read_text())


# For everyone


def variables(css: str) -> dict[str, tuple[float, ...]]:
    found = re.findall(r"(--\w+): #(\w{6})", css)
    return {name: tuple(int(h[i : i + 2], 16) / 255 for i in (0, 2, 4)) for name, h in found}


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Of two colours, as WCAG 2.2 defines it."""

    def luminance(colour: tuple[float, ...]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_and_lines_stand_out_in_light_dark_and_print(html: str):
    assert contrast((0, 0, 0), (1, 1, 1)) == pytest.approx(21)
    themes = re.findall(r":root \{([^}]*)\}", html)
    assert len(themes) == 3
    for theme in themes:
        colours = variables(theme)
        shown = [n for n in colours if n not in ("--page", "--card", "--line")]
        assert {"--ink", "--soft", "--accent", "--warn", "--c0", "--c3"} <= set(shown)
        for ground in ("--page", "--card"):
            weak = [n for n in shown if contrast(colours[n], colours[ground]) < 4.5]
            assert weak == [], (theme, ground)


def test_every_colour_of_a_line_is_the_pages_own(html: str):
    for placeholder in charts.VARIABLES:
        assert placeholder not in html
    for name in ("--c0", "--c1", "--c2", "--c3", "--line"):
        assert f"var({name})" in html


def test_headings_follow_in_order_and_the_contents_lead_to_them(page: Page):
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    places = {a["id"] for tag, a in page.tags if tag == "h2" and "id" in a}
    targets = {a["href"] for tag, a in page.tags if tag == "a"}
    assert targets == {f"#{place}" for place in places} and len(targets) >= 9


def test_every_table_has_heads_of_rows_and_columns_and_can_be_scrolled_by_keyboard(page: Page):
    heads = [a.get("scope") for tag, a in page.tags if tag == "th"]
    assert set(heads) == {"col", "row"}
    scrolled = [a for tag, a in page.tags if a.get("class") == "scroll"]
    assert len(scrolled) >= 9
    assert all(a.get("tabindex") == "0" and a.get("aria-label") for a in scrolled)
    assert dict(page.tags[0][1]) == {"lang": "en"}


def test_the_words_of_the_pictures_hold_their_figures(page: Page):
    metrics = content()["metrics"]
    words = " ".join(a["aria-label"] or "" for _, a in page.tags if a.get("role") == "img")
    assert pages.number(metrics["sparse"]["perplexity"]["shifted"]) in words
    assert f"2: {pages.number(metrics['layers']['2']['cosine_sim'])}" in words


# The rest


def test_where_the_samples_part_is_marked(tmp_path: Path, html: str):
    assert "Return the <mark>list.</mark>" in html and "Return the <mark>tuple.</mark>" in html
    same = content() | {"samples": {"dense": "Return it.", "sparse": "Return it."}}
    page = written(tmp_path, same)
    assert "They do not part." in page.text and "mark" not in {tag for tag, _ in page.tags}


def test_layers_that_were_never_trained_have_no_picture_of_it(tmp_path: Path):
    given = content()
    given["history"] = {k: rows[:1] for k, rows in given["history"].items()}
    page = written(tmp_path, given)
    assert "No layer was trained beyond its start" in page.text
    assert page.column("last") == page.column("relative_mse at the start") == ["0.9000"] * 3


def test_cost_is_reckoned_from_sizes(tmp_path: Path):
    given = content(n_layers=2)
    metrics = given["metrics"]
    page = written(tmp_path, given)
    assert page.column("tokens read")[:3] == ["5,555", "", f"{2 * 50 * 512:,}"]
    shape = report.MoEShape(**given["layers"][0]["shape"])
    flops = 2 * 2 * 6 * 50 * 512 * shape.active_parameters  # two layers, each with its control
    captured = 2 * metrics["dense"]["parameters"] * 5555
    starts = f"{2 * sum(starts_of(given['layers'][0])):.3g}"
    assert page.column("FLOPs")[:3] == [f"{captured:.3g}", starts, f"{flops:.3g}"]
    assert page.column("sparse, per token")[1:3] == [
        f"{2 * shape.active_parameters:,}",
        f"{2 * 2 * shape.active_parameters:,}",
    ]


def starts_of(layer: dict[str, Any]) -> list[float]:
    """FLOPs, as `plan` has them, of the layer's start and of its static control's."""
    plans = (layer, static_plan(layer))
    return [cost.start_flops(report.MoEShape(**p["shape"]), p["init"], 4444) for p in plans if p]


def costs_of(folder: Path, given: dict[str, Any]) -> dict[str, str]:
    """What each row of "What it cost" names, and its FLOPs."""
    page = written(folder, given)
    (table,) = [table for table in page.tables if "tokens read" in table[0]]
    return {row[0]: row[table[0].index("FLOPs")] for row in table[1:]}


def test_starts_are_counted_as_plan_counts_them_with_those_of_the_control(tmp_path: Path):
    ours, static = starts_of(content()["layers"][0])
    assert 0 < static < ours
    named = "starts of the layers, and of their static control"
    assert costs_of(tmp_path, content())[named] == f"{3 * (ours + static):.3g}"
    assert costs_of(tmp_path, resized(content()))[named] == f"{3 * (ours + static):.3g}"
    alone = content()
    del alone["metrics"]["controls"]["static"]
    assert costs_of(tmp_path, alone)["starts of the layers"] == f"{3 * ours:.3g}"
    sliced = content()
    for layer in sliced["layers"].values():
        layer["init"] = "slice"
    assert costs_of(tmp_path, sliced)[named] == f"{3 * static:.3g}"
    del sliced["metrics"]["controls"]["static"]
    assert not any(name.startswith("starts") for name in costs_of(tmp_path, sliced))


def test_healing_costs_as_much_again_for_the_static_control(tmp_path: Path):
    given = content()
    for layer in given["layers"].values():
        validation = {"kl": {"before": 0.5, "after": 0.25}}
        layer["healing"] = {"tokens": 2048, "validation": validation}
    parameters = given["metrics"]["dense"]["parameters"]
    active = given["metrics"]["sparse"]["parameters"]["active"]
    flops = 2048 * (2 * parameters + 6 * active)
    both = costs_of(tmp_path, given)
    assert both["healed together, and their static control"] == f"{2 * flops:.3g}"
    del given["metrics"]["controls"]["static"]
    assert costs_of(tmp_path, given)["healed together"] == f"{flops:.3g}"


def test_the_padding_of_unlike_layers_is_among_what_is_stored_of_the_ffns(tmp_path: Path):
    given = content(n_layers=2)
    shapes = [report.MoEShape(**given["layers"][0]["shape"] | {"d_ff_expert": w}) for w in (8, 24)]
    for k, shape in enumerate(shapes):
        given["layers"][k]["shape"] = vars(shape)
    stored = written(tmp_path, given).column("sparse, stored")
    assert stored[1] == f"{2 * shapes[1].total_parameters:,}"


def test_the_headline_has_the_names_of_metrics_json_and_fits_a_line(folder: Path, tmp_path: Path):
    metrics = content()["metrics"]
    told = dict(figures(json.loads((folder / "headline.json").read_text())))
    assert told.items() <= dict(figures(metrics)).items() and 8 <= len(told) <= 14
    assert {".perplexity_ratio.heldout", ".kl.mean", ".sparse.parameters.active"} <= told.keys()
    written(tmp_path, of_encoder(content()))
    told = dict(figures(json.loads((tmp_path / "headline.json").read_text())))
    assert ".embedding_cosine.heldout" in told and ".kl.mean" not in told


def test_the_load_of_every_expert_stands_in_its_table(folder: Path):
    rows = list(csv.DictReader((folder / "load.csv").open()))
    layers = content()["metrics"]["layers"]
    expected = [4 * share for k in sorted(layers) for share in layers[k]["routing"]["load"]]
    assert [float(row["load"]) for row in rows] == expected
    assert [(row["layer"], row["expert"]) for row in rows][3:5] == [("0", "3"), ("1", "0")]


def test_plain_pruning_that_loses_nothing_decides_nothing(tmp_path: Path):
    assert "so that this says nothing" in html_of(tmp_path, controlled(0.9999, 1.00001))


@pytest.mark.parametrize(
    ("n", "expected"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 KB"), (999_700, "1 MB"), (2e13, "20 TB")],
)
def test_sizes_are_written_in_powers_of_a_thousand(n: float, expected: str):
    assert pages.size(n) == expected
