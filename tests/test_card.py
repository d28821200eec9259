"""The card is what the hub reads, says where a checkpoint comes from, and goes up with it."""

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from test_report import content, of_encoder, shown, timed

from pipeline import artifacts, card, compose, hub, pages, report
from pipeline.errors import ConfigError, ResourceError

TOKEN = "hf_thisIsNoToken0123456789"


def written(folder: Path, given: dict[str, Any]) -> str:
    folder.mkdir(exist_ok=True)
    report.write(folder, given)
    return (folder / "README.md").read_text()


def made_of(given: dict[str, Any]) -> dict[str, Any]:
    """What is known of it when it is written, before anything was measured."""
    names = ("name", "layers", "manifests", "record", "licence")
    return {n: given[n] for n in names} | {
        "source": "owner/model",
        "host": "mixtral",
        "encoder": False,
    }


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("card"), content())


# What it says


def test_card_has_the_figures_with_the_control_beside_them_and_the_configuration(evaluated: str):
    metrics = content()["metrics"]
    for side in ("dense", "sparse"):
        assert all(shown(value, evaluated) for value in metrics[side]["perplexity"].values())
    assert all(shown(v, evaluated) for v in metrics["sparse"]["parameters"].values())
    assert shown(metrics["dense"]["parameters"], evaluated)
    for value in (*metrics["cosine_sim"].values(), metrics["kl"]["mean"]):
        assert shown(value, evaluated)
    for name in ("top1_agreement", "active_ffn_fraction"):
        assert shown(metrics[name], evaluated), name
    for text, dense in metrics["dense"]["perplexity"].items():
        ratio = metrics["controls"]["static"]["perplexity_ratio"][text]
        (row,) = [r for r in evaluated.splitlines() if r.startswith(f"| perplexity, {text} |")]
        assert row.split(" | ")[-1] == f"{pages.number(dense * ratio)} |"
    block = re.search(r"```yaml\n(.*?)```", evaluated, re.DOTALL)
    assert block
    given = content()
    settings = {k: v for m in given["manifests"].values() for k, v in m["settings"].items()}
    assert yaml.safe_load(block[1]) == settings | given["settings"]


def test_card_says_how_to_load_it_where_it_comes_from_and_its_limits(evaluated: str):
    for part in (
        'AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
        "`owner/model` at `abc123`",
        "`dense/model.safetensors` `fedc89`",
        "`tokens/a.safetensors` `tokens4567`",
        "fingerprint `convert0123`, code `convertc0deconve`",
        "torch 9.8.7",
        "shares its biases",
        "not memory",
        "| 0-2 | 4 | 2 | 1024 | 0 | 4096 |",
    ):
        assert part in evaluated, part


def test_tables_of_the_card_are_whole(evaluated: str):
    """Every row has as many cells as its head, with no blank line within."""
    tables = re.findall(r"(?:^\|.*\|\n)+", evaluated, re.MULTILINE)
    assert len(tables) == 2
    for table in tables:
        cells = {row.count("|") for row in table.splitlines()}
        assert len(cells) == 1 and len(table.splitlines()) >= 3


def test_the_front_matter_is_what_the_hub_reads(evaluated: str):
    data = ModelCard(evaluated).data
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert data.base_model == "owner/model" and "mixture-of-experts" in data.tags
    metrics = content()["metrics"]
    found = {(r.dataset_split, r.metric_type): r.metric_value for r in data.eval_results}
    for text in ("heldout", "shifted"):
        assert found[text, "perplexity"] == metrics["sparse"]["perplexity"][text]
        assert found[text, "perplexity_ratio"] == metrics["perplexity_ratio"][text]
    encoder = ModelCard(card.text(made_of(content()) | {"encoder": True})).data
    assert encoder.pipeline_tag == "sentence-similarity"


def test_a_dataset_of_the_hub_is_named_in_the_front_matter():
    given = content()
    given["manifests"]["tokens"]["settings"] |= {"data.dataset": "some/text", "data.revision": "c0"}
    text = card.text(made_of(given))
    assert ModelCard(text).data.datasets == ["some/text"]
    assert "`some/text` at `c0`" in text


def test_results_of_an_encoder_are_of_its_embeddings(tmp_path: Path):
    given = of_encoder(content())
    data = ModelCard(written(tmp_path, given)).data
    assert {r.metric_type for r in data.eval_results} == {"embedding_cosine"}


def test_a_card_without_figures_says_where_they_will_be():
    text = card.text(made_of(content()))
    assert "None yet" in text and "python -m pipeline.stages.evaluate" in text
    assert ModelCard(text).data.eval_results is None and "| perplexity" not in text


def test_speed_stands_on_the_card_only_where_it_was_measured(tmp_path: Path, evaluated: str):
    assert "Above 1x" not in evaluated
    assert "0.7x (0.61x to 0.89x)" in written(tmp_path, timed(content()))


@pytest.mark.parametrize("host", ["mixtral", "custom"])
def test_only_our_own_architecture_asks_for_remote_code(host: str):
    text = card.text(made_of(content()) | {"host": host})
    assert text.count("trust_remote_code=True)") == (2 if host == "custom" else 0)
    assert ("Read it first" in text) == (host == "custom")
    assert ("stock `transformers`" in text) == (host == "mixtral")


def test_a_dense_model_that_ran_its_own_code_is_named_as_such(evaluated: str):
    given = content()
    given["manifests"]["dense"]["settings"]["model.trust_remote_code"] = True
    assert "ran code of its own repository" in card.text(made_of(given))
    assert "ran code of its own repository" not in evaluated


def test_nothing_that_is_shown_becomes_markup(tmp_path: Path):
    """Neither in the front matter nor in the text: not of names, data or settings."""
    evil = "a` <script>x</script> [b](http://c)\n---\nlicense: mit"
    given = content()
    given["manifests"]["tokens"]["settings"] |= {"data.dataset": evil, "data.files": [evil]}
    text = card.text(made_of(given) | {"source": evil, "licence": {"license": evil}})
    data = ModelCard(text).data
    assert data.license == evil and data.datasets == [evil] and data.base_model is None
    body = text.split("\n---\n", 1)[1] if text.count("---\n") == 2 else text
    outside = re.sub(r"```.*?```|`[^`]*`", "", body.split("# tiny, sparse")[1], flags=re.DOTALL)
    assert "script" not in outside and "http" not in outside


# The licence


def test_the_licence_is_carried_over_from_the_dense_models_card(tmp_path: Path):
    front = "license: other\nlicense_name: own\nlicense_link: LICENSE\nlanguage: en"
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n\n# A model\n")
    found = card.licence(str(tmp_path), None)
    assert found == {"license": "other", "license_name": "own", "license_link": "LICENSE"}
    text = card.text(made_of(content()) | {"licence": found})
    data = ModelCard(text).data
    assert (data.license, data.license_name, data.license_link) == ("other", "own", "LICENSE")
    assert "licence: `other`, carried over" in text


@pytest.mark.parametrize("text", [None, "# no front matter\n", "---\n[: broken\n---\n", "\xff"])
def test_a_card_that_names_no_licence_gives_none(tmp_path: Path, text: str | None):
    if text is not None:
        (tmp_path / "README.md").write_bytes(text.encode("latin-1"))
    assert card.licence(str(tmp_path), None) == {}
    assert "names none" in card.text(made_of(content()))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("owner/model", "owner/model"), ("tiny", None), ("package:x/y", None), ("../a/b", None)],
)
def test_only_a_name_of_the_hub_is_a_base_model(name: str, expected: str | None):
    assert card.hub_id(name) == expected


def test_a_folder_is_no_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("owner/model").mkdir(parents=True)
    assert card.hub_id("owner/model") is None


# To the hub


class Hub(ThreadingHTTPServer):
    """Stands in for the hub: takes what is pushed, and records every call."""

    def __init__(self, status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.calls: list[tuple[str, str, str | None]] = []
        self.files: dict[str, bytes] = {}
        self.bodies: list[bytes] = []
        self.status = status

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.calls.append((self.command, self.path, self.headers.get("Authorization")))
        self.server.bodies.append(body)
        reply = json.dumps(self.reply(self.path.split("?")[0], body)).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def reply(self, path: str, body: bytes) -> dict[str, Any]:
        if self.server.status != 200:
            return {"error": "You may not write here"}
        if path.endswith("/repos/create"):
            return {"url": f"{self.server.endpoint}/owner/{json.loads(body)['name']}"}
        if path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]
            ]
            return {"files": [f | {"shouldIgnore": False} for f in files]}
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            return {
                "commitUrl": f"{self.server.endpoint}/owner/sparse/commit/c0",
                "commitOid": "c0",
            }
        return {"sha": "c0", "siblings": [], "id": "owner/sparse", "warnings": [], "errors": []}

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def stand_in() -> Iterator[Hub]:
    server = Hub()
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "convert"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("# without figures\n")
    artifacts.write_manifest(folder, {"module": "pipeline.stages.convert", "settings": {}})
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# with figures\n")
    return folder


def pushed(folder: Path, endpoint: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """By a process of its own: huggingface_hub reads its environment when it is imported."""
    code = (
        "from pathlib import Path\nfrom pipeline import command, hub\n"
        "command.exit_with(lambda: hub.push(Path('convert'), Path('README.md'), 'owner/sparse'))"
    )
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "DVC_"))}
    given = {"HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(folder.parent / "hf")}
    given |= {"PYTHONPATH": str(Path(hub.__file__).parents[1])} | environment
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder.parent,
        env=inherited | given,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_push_makes_a_private_repository_and_uploads_the_checkpoint_with_the_full_card(
    checkpoint: Path, stand_in: Hub
):
    before = {p.name: p.read_bytes() for p in checkpoint.iterdir()}
    done = pushed(checkpoint, stand_in.endpoint)
    assert done.returncode == 0, done.stderr
    assert "pushed to" in done.stdout
    card_text = (checkpoint.parent / "README.md").read_bytes()
    assert stand_in.files == before | {"README.md": card_text}
    assert {p.name: p.read_bytes() for p in checkpoint.iterdir()} == before
    (created,) = [
        json.loads(body)
        for (_, path, _), body in zip(stand_in.calls, stand_in.bodies, strict=True)
        if path.endswith("/repos/create")
    ]
    assert created["visibility"] == "private" and created["name"] == "sparse"
    assert {who for _, path, who in stand_in.calls if "commit" in path} == {f"Bearer {TOKEN}"}
    assert not any(TOKEN.encode() in body for body in stand_in.bodies)
    left = [p for p in checkpoint.parent.rglob("*") if p.is_file()]
    assert not any(TOKEN.encode() in p.read_bytes() for p in left)
    assert not any(p.name.startswith("push-") for p in (checkpoint.parent / ".scratch").iterdir())


@pytest.mark.slow
def test_a_hub_that_refuses_ends_with_exit_4_and_how_to_repeat_only_the_push(
    checkpoint: Path, stand_in: Hub
):
    stand_in.status = 403
    done = pushed(checkpoint, stand_in.endpoint)
    assert done.returncode == 4 and "Traceback" not in done.stderr
    assert "owner/sparse" in done.stderr and "only the push is repeated" in done.stderr
    assert TOKEN not in done.stderr


def test_without_a_network_nothing_is_pushed_and_the_checkpoint_stays(checkpoint: Path):
    """Tests run with HF_HUB_OFFLINE=1."""
    with pytest.raises(ResourceError, match="HF_HUB_OFFLINE") as refusal:
        hub.push(checkpoint, checkpoint.parent / "README.md", "owner/sparse")
    assert refusal.value.exit_code == 4
    artifacts.verify(checkpoint)


def test_a_damaged_checkpoint_is_not_pushed(checkpoint: Path):
    (checkpoint / "config.json").write_text("{ }")
    with pytest.raises(Exception, match=r"config\.json"):
        hub.push(checkpoint, checkpoint.parent / "README.md", "owner/sparse")


@pytest.mark.parametrize("name", ["sparse", "owner/", "a/b/c", "owner/x y", "../x", "o/-x"])
def test_a_name_that_is_no_repository_is_refused(project: Path, name: str):
    with pytest.raises(ConfigError, match="push_to_hub"):
        compose.load([f"evaluate.push_to_hub='{name}'"])


def test_layers_without_recorded_settings_have_a_card():
    """Those of `train_layer`, which a conversion on its own takes."""
    given = made_of(content()) | {"manifests": {"train_0": {"files": {}}}, "source": "dense"}
    text = card.text(given)
    assert "`dense`" in text and "- text:" not in text and ModelCard(text).data.base_model is None


@pytest.mark.parametrize("source", ["/no/such/folder", "no name", "nobody/nothing"])
def test_a_model_that_is_not_here_has_no_licence(source: str):
    assert card.licence(source, None) == {}
