"""The tools beside the stages."""

import importlib
import inspect
import json
import re
import shlex
from pathlib import Path

import pytest
import transformers as tf
import yaml

from pipeline import artifacts, refusals
from pipeline.__main__ import TOOLS, main, parser

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llama": tf.LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2),
    "gpt2": tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4),
    "uneven": tf.Gemma3nTextConfig(
        **SIZES | {"num_hidden_layers": 3, "num_key_value_heads": 2, "head_dim": 8},
        intermediate_size=[48, 64, 48],
        activation_sparsity_pattern=[0.0, 0.0, 0.0],
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=64,
        laurel_rank=4,
    ),
    "mixtral": tf.MixtralConfig(**SIZES, intermediate_size=48, num_key_value_heads=2),
}


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


def model(tmp_path: Path, family: str) -> str:
    """Only a configuration: `inspect` needs neither weights nor a tokenizer."""
    MODELS[family].save_pretrained(tmp_path / family)
    return str(tmp_path / family)


def test_inspect_prints_only_json_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run("inspect", model(tmp_path, "llama"), "--json") == 0
    described = json.loads(capsys.readouterr().out)
    assert (described["family"], described["d_model"], len(described["layers"])) == ("llama", 32, 2)
    assert described["hosts"]["mixtral"] == "yes" and described["selected"] == [0, 1]


def test_inspect_says_what_opens_the_result_and_what_a_conversion_would_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = model(tmp_path, "llama")
    assert run("inspect", path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loaders"]["mixtral"]["transformers"].startswith("tested")
    assert found["loaders"]["custom"]["vLLM"].startswith("cannot")
    assert found["loaders"].keys() == {h for h, a in found["hosts"].items() if a.startswith("yes")}
    cost, one = found["cost"], found["layers"][0]
    expert = 3 * found["d_model"] * one["d_ff"] // 2
    grown = len(found["layers"]) * (2 * expert + 4 * found["d_model"])  # four halves, a router
    assert cost["parameters"] == found["parameters"] + grown
    assert cost["active_ffn_fraction"] == 0.5
    assert cost["checkpoint_bytes"] == 4 * cost["parameters"]
    assert run("inspect", path) == 0
    shown = capsys.readouterr().out
    assert (
        "lm-evaluation-harness tested" in shown and f"parameters: {cost['parameters']:,}" in shown
    )


def test_inspect_prints_an_entry_for_conf_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = model(tmp_path, "llama")
    assert run("inspect", path) == 0
    _, _, entry = capsys.readouterr().out.partition("conf/model/:")
    given = yaml.safe_load(
        (Path(__file__).parent.parent / "conf/model/pretrained.yaml").read_text()
    )
    assert yaml.safe_load(entry) == given | {"name": "llama", "id": path, "layers": [0, 1]}


def test_inspect_chooses_layers_by_index_and_by_pattern(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = model(tmp_path, "llama")
    for which, chosen in ((["1"], [1]), (["*.0.mlp", "1"], [0, 1]), (["model.*.1.*"], [1])):
        assert run("inspect", path, "--layers", *which) == 0
        _, _, entry = capsys.readouterr().out.partition("conf/model/:")
        assert yaml.safe_load(entry)["layers"] == chosen
        assert run("inspect", path, "--json", "--layers", *which) == 0
        described = json.loads(capsys.readouterr().out)
        assert described["selected"] == chosen and len(described["layers"]) == 2
        assert (described["hosts"]["mixtral"] == "yes") == (chosen == [0, 1])


def test_inspect_refuses_layers_that_are_not_there_with_those_that_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = model(tmp_path, "gpt2")
    for which in ("2", "*.ffn"):
        assert run("inspect", path, "--layers", which) == 3
        assert "transformer.h.{0-1}.mlp" in capsys.readouterr().err


def test_inspect_shows_where_the_ffns_are_and_which_are_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run("inspect", model(tmp_path, "llama")) == 0
    said = capsys.readouterr().out
    assert "FFNs: model.layers.{0-1}.mlp" in said and "layers 0-1 (2): d_ff 48, gated" in said
    assert run("inspect", model(tmp_path, "uneven")) == 0
    said = capsys.readouterr().out
    assert "layers 0, 2 (2): d_ff 48" in said and "layers 1 (1): d_ff 64" in said


def test_inspect_says_why_no_host_can_hold_a_family(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run("inspect", model(tmp_path, "gpt2")) == 0
    out = capsys.readouterr().out
    assert "mixtral: it holds llama" in out and "and this is gpt2" in out


def test_inspect_refuses_what_is_sparse_already_and_what_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run("inspect", model(tmp_path, "mixtral"), "--json") == 3
    ended = capsys.readouterr()
    assert ended.out == "" and "already sparse" in ended.err
    assert run("inspect", str(tmp_path / "nothing")) == 3


def test_verify_ends_with_5_and_names_the_damaged_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name in ("whole", "damaged"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("content")
        artifacts.write_manifest(tmp_path / name, {})
    assert run("verify", str(tmp_path)) == 0
    (tmp_path / "damaged" / "a.txt").write_text("contenT")
    assert run("verify", str(tmp_path)) == 5
    said = capsys.readouterr()
    assert str(tmp_path / "damaged" / "a.txt") in said.out and "1 of 2" in said.err


def test_verify_of_a_folder_without_artefacts_is_refused(tmp_path: Path):
    assert run("verify", str(tmp_path)) == 5


def test_compose_prints_every_setting_and_leaves_params_yaml(
    project: Path, capsys: pytest.CaptureFixture[str]
):
    before = (project / "params.yaml").read_text()
    assert run("compose", "--print", "moe.n_experts=32") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == yaml.safe_load(before) | {"moe": printed["moe"]}
    assert printed["moe"]["n_experts"] == 32 and (project / "params.yaml").read_text() == before


def test_compose_writes_params_yaml_from_conf_and_takes_no_overrides(project: Path):
    entry = project / "conf/moe/half.yaml"
    entry.write_text(entry.read_text().replace("init_noise: 0.01", "init_noise: 0.02"))
    assert run("compose", "moe.n_experts=32") == 2
    assert run("compose") == 0
    assert yaml.safe_load((project / "params.yaml").read_text())["moe"]["init_noise"] == 0.02


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]):
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == "0.1.0"


@pytest.mark.parametrize("name", TOOLS)
def test_help_of_a_tool_has_examples_that_its_parser_takes(
    name: str, capsys: pytest.CaptureFixture[str]
):
    assert run("--help") == 0
    assert TOOLS[name].summary.split(",")[0] in capsys.readouterr().out
    assert run(name, "--help") == 0
    said = capsys.readouterr().out
    for line in TOOLS[name].examples.strip().splitlines():
        assert line in said
        if line.startswith("python -m pipeline "):
            words = shlex.split(line)[3:]
            args, flags = parser().parse_known_args(words)
            assert args.tool == name and flags == []
            for word in words:
                if re.fullmatch(r"[a-z_.]+=.*", word) and not word.startswith(
                    ("layer=", "shards=", "hydra")
                ):
                    assert word.partition("=")[0] in refusals.kinds() | dict.fromkeys(["model"])


def test_the_table_of_tools_names_bodies_that_take_its_arguments():
    for name, tool in TOOLS.items():
        body = getattr(importlib.import_module(f"pipeline.{tool.module}"), tool.act)
        assert len(inspect.signature(body).parameters) == len(tool.arguments), name


def test_flags_are_not_guessed_from_their_beginning(capsys: pytest.CaptureFixture[str]):
    assert run("compose", "--pri") == 2
    assert "--pri" in capsys.readouterr().err


def test_clean_is_a_tool(project: Path, capsys: pytest.CaptureFixture[str]):
    old = project / ".scratch/tokens/0123456789abcdef"
    old.mkdir(parents=True)
    assert run("clean", "--dry-run", "--all") == 0 and old.is_dir()
    assert run("clean", "--all", "--yes") == 0 and not old.exists()
    capsys.readouterr()
    assert run("clean", "--everything") == 2


def test_prefill_refuses_what_it_cannot_read_without_a_traceback(
    project: Path, capsys: pytest.CaptureFixture[str]
):
    for arguments in (["-m", "layer"], ["-m", "layer=0,1", "moe.n_expert=8"], ["layer=0", "~moe"]):
        assert run("prefill", *arguments) == 2
        assert "Traceback" not in capsys.readouterr().err


def test_unknown_flags_are_refused(capsys: pytest.CaptureFixture[str]):
    assert run("verify", "--quietly") == 2
    assert "--quietly" in capsys.readouterr().err
