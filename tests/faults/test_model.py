"""A dense model that cannot be used ends a command with 3, before any work.

Rows 5 to 8 of docs/reliability.md, on model folders and a hub that are made here.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import transformers as tf
from injection import Stand

PROJECT = Path(__file__).parents[2]
SIZES = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def given(stand: Stand, model: tf.PreTrainedModel, tokenizer: bool = True) -> list[str]:
    """The overrides that take that model, with the project's tokenizer, for the dense one."""
    folder = stand.root / "given"
    model.save_pretrained(folder)
    if tokenizer:
        for path in (stand.root / "stages/dense/model").glob("tokenizer*"):
            shutil.copy(path, folder)
    small = (stand.root / "conf/experiment/smaller.yaml").read_text()
    lines = [line for line in small.splitlines() if not line.startswith(("model:", "  embedded:"))]
    (stand.root / "conf/experiment/given.yaml").write_text("\n".join(lines))
    named = ["model.name=given", f"model.id={folder}", "model.layers=[0,1]"]
    return ["experiment=[pico,given]", "model=pretrained", *named]


def tiny(family: str = "Llama", **changed) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(tf, f"{family}Config")(**SIZES | {"intermediate_size": 48} | changed)
    return tf.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("Mixtral", ["already sparse", "MixtralDecoderLayer"]),
        ("Mamba", ["MambaBlock", "in_proj"]),
    ],
)
def test_a_model_whose_ffns_are_not_known_is_refused_with_what_was_seen(
    stand: Stand, family: str, said: list[str]
):
    changed = {"state_size": 4} if family == "Mamba" else {"num_key_value_heads": 2}
    overrides = given(stand, tiny(family, **changed))
    ended = stand.run("dense", overrides).check(3)
    assert all(words in ended.said for words in said), ended.said
    assert "Traceback" not in ended.said and "remedy:" in ended.said


def test_layers_that_the_model_lacks_are_refused(stand: Stand):
    ended = stand.run("budget", ["model.layers=[0,7]"]).check(3)
    assert "the model has 2 layers: 0 to 1" in ended.said and "[0, 7]" in ended.said


def test_a_model_without_a_tokenizer_is_refused_before_anything_is_captured(stand: Stand):
    overrides = given(stand, tiny(), tokenizer=False)
    stand.run("dense", overrides).check()
    ended = stand.run("tokens", overrides).check(3)
    assert str(stand.root / "given") in ended.said and "tokenizer" in ended.said


def test_a_tokenizer_with_more_ids_than_embedding_rows_is_refused_with_both_numbers(stand: Stand):
    overrides = given(stand, tiny(vocab_size=100))
    for stage in ("dense", "tokens"):
        stand.run(stage, overrides).check()
    ended = stand.run("capture", overrides).check(3)
    assert "100 embedding rows" in ended.said and "token id " in ended.said


# The hub


class Hub(BaseHTTPRequestHandler):
    """Says of every model that it is gated, or that there is none."""

    def do_HEAD(self) -> None:
        gated = "/org/gated/" in f"{self.path}/"
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


ASKING = """
import json, sys
from pipeline import dense
from pipeline.errors import PipelineError
said = {}
for source in sys.argv[1:]:
    try:
        dense.inspect(source)
    except PipelineError as error:
        said[source] = [error.exit_code, str(error)]
print(json.dumps(said))
"""


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_model_that_the_hub_does_not_give_is_refused_with_the_token_hint(
    hub: str, tmp_path: Path, offline: str
):
    names = ["org/gated", "org/none"]
    done = subprocess.run(
        [sys.executable, "-c", ASKING, *names],
        env=os.environ
        | {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": offline}
        | {"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    for name in names:
        code, message = said[name]
        assert code == 3 and name in message and "HF_TOKEN" in message
        (value,) = [line for line in message.splitlines() if line.startswith("  value:")]
        assert len(value) < 500
    if offline == "0":
        assert "gated" in said["org/gated"][1].lower()
