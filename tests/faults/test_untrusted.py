"""What a stranger may have written is data: it is refused or read, and none of it is run.

Rows 28 to 32 of docs/reliability.md.
"""

import ast
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers as tf
import yaml
from injection import SECRETS, Stand, tree
from packaging.requirements import Requirement
from packaging.version import Version

from pipeline import artifacts, commits, compose, corpus, dense, documents, pretrained
from pipeline.config import DataConfig, DataSource
from pipeline.errors import ArtifactError, ConfigError, InputError
from pipeline.layers import layer_folders, load_layer
from pipeline.store import LayerReader

PROJECT = Path(__file__).parents[2]
SMALL = tf.LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)

# Pickles


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def save_model(folder: Path) -> Path:
    torch.manual_seed(0)
    tf.LlamaForCausalLM(SMALL).save_pretrained(folder)
    return folder


PICKLES = ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt", "scheduler.pkl")


def set_traps(folder: Path, mark: Path) -> None:
    for name in PICKLES:
        (folder / name).write_bytes(pickle.dumps(Trap(mark)))


def test_the_trap_springs_where_a_pickle_is_opened(tmp_path: Path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


def test_a_pickle_beside_the_weights_is_not_opened(tmp_path: Path):
    folder = save_model(tmp_path / "model")
    set_traps(folder, tmp_path / "mark")
    dense.load_model(str(folder))
    dense.resolve(str(folder))
    assert not (tmp_path / "mark").exists()


def test_a_pickle_in_place_of_the_weights_is_not_opened(tmp_path: Path):
    folder = save_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    set_traps(folder, tmp_path / "mark")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    for name in ("pytorch_model.bin.index.json", pretrained.INDEX):
        (folder / name).write_text(json.dumps(index))
        with pytest.raises(InputError):
            dense.load_model(str(folder))
    assert not (tmp_path / "mark").exists()


def test_an_adapter_that_names_another_model_is_refused(tmp_path: Path):
    folder = save_model(tmp_path / "model")
    set_traps(folder, tmp_path / "mark")
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "mark")))
    other = {"base_model_name_or_path": str(tmp_path / "elsewhere"), "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(other))
    for read in (dense.load_model, dense.inspect, pretrained.load_tokenizer):
        with pytest.raises(InputError, match="adapter"):
            read(str(folder))
    assert not (tmp_path / "mark").exists()


def test_a_pickle_is_no_layer_no_checkpoint_and_no_text(tmp_path: Path, undisturbed: Stand):
    folder = shutil.copytree(undisturbed.root / "stages/train/layer_0", tmp_path / "layer_0")
    trap = pickle.dumps(Trap(tmp_path / "mark"))
    (folder / "layer.safetensors").unlink()
    for name in ("layer.safetensors", "layer.pt", "layer.bin"):
        (folder / name).write_bytes(trap)
        with pytest.raises(ArtifactError):
            load_layer(folder)
    for name in ("text.pkl", "text.pt", "text.parquet", "text.jsonl"):
        (tmp_path / name).write_bytes(trap)
        cfg = DataConfig(source=DataSource.files, files=[str(tmp_path / name)])
        with pytest.raises(InputError):
            list(documents.read_documents(cfg))
    (tmp_path / "train.safetensors").write_bytes(trap)
    with pytest.raises(ArtifactError):
        corpus.read_blocks(tmp_path, "train")
    assert not (tmp_path / "mark").exists()


UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {
    ("torch", "load"),
    ("np", "load"),
    ("pd", "read_pickle"),
    ("yaml", "load"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
    ("os", "system"),
}


def unsafe(source: str) -> list[str]:
    """What in a module opens pickles, runs text, or passes one to a shell."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            found += [n for n in names if n.split(".")[0] in UNPICKLERS]
        if isinstance(node, ast.Call):
            f = node.func
            if isinstance(f, ast.Name) and f.id in CALLS:
                found.append(f.id)
            if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name):
                found += [f"{f.value.id}.{f.attr}"] * ((f.value.id, f.attr) in METHODS)
            found += ["shell=True"] * any(k.arg == "shell" for k in node.keywords)
    return found


def test_no_module_opens_a_pickle_or_runs_text():
    assert unsafe("import pickle\ntorch.load(x)\neval(y)\nrun(z, shell=True)") == [
        "pickle",
        "torch.load",
        "eval",
        "shell=True",
    ]
    paths = sorted((PROJECT / "pipeline").rglob("*.py"))
    assert {p.name: unsafe(p.read_text()) for p in paths if unsafe(p.read_text())} == {}


# Code of a model, and weights elsewhere, from a folder and from the hub's cache

AS_A_STRANGER_WROTE_IT = """
import json, os, sys
from pathlib import Path
from pipeline import dense
from pipeline.errors import PipelineError

mark, results = Path(sys.argv[1]), {}
REVISION = "0123456789012345678901234567890123456789"

def attempt(name, source, **how):
    mark.unlink(missing_ok=True)
    try:
        dense.load_model(source, **how)
        ended = 0
    except PipelineError as error:
        ended = error.exit_code
        print(name, error, file=sys.stderr)
    results[name] = [ended, mark.exists()]

folder = sys.argv[2]
attempt("folder, not trusted", folder)
attempt("folder, trusted", folder, trust_remote_code=True)
attempt("hub, not trusted", "a/code")
attempt("hub, pinned and not trusted", "a/code", revision=REVISION)
attempt("hub, trusted and not pinned", "a/code", trust_remote_code=True)
attempt("hub, trusted and pinned", "a/code", trust_remote_code=True, revision=REVISION)
attempt("hub, weights above", "a/above")
attempt("hub, weights anywhere", "a/anywhere")
print(json.dumps(results))
"""
MODELLING = """
from pathlib import Path
from transformers import LlamaForCausalLM

Path({mark!r}).touch()

class OwnForCausalLM(LlamaForCausalLM):
    pass
"""


@pytest.fixture(scope="module")
def attempts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """How each ended: exit code, and whether the model's code ran."""
    root = tmp_path_factory.mktemp("stranger")
    mark, revision = root / "mark", "0123456789012345678901234567890123456789"
    folder = save_model(root / "folder")
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    own_config = config | {"auto_map": own, "architectures": ["OwnForCausalLM"]}
    own_config["model_type"] = "own"
    own["AutoConfig"] = "modeling_own.OwnConfig"
    (folder / "config.json").write_text(json.dumps(own_config))
    code = MODELLING.format(mark=str(mark)) + textwrap.dedent(
        """
        from transformers import LlamaConfig

        class OwnConfig(LlamaConfig):
            model_type = "own"

        OwnForCausalLM.config_class = OwnConfig
        """
    )
    (folder / "modeling_own.py").write_text(code)
    hub = root / "home/hub"
    for name in ("code", "above", "anywhere"):
        cached = hub / f"models--a--{name}"
        shutil.copytree(folder, cached / "snapshots" / revision)
        (cached / "refs").mkdir()
        (cached / "refs/main").write_text(revision)
    for name, where in (("above", "../../../../outside"), ("anywhere", str(root / "outside"))):
        snapshot = hub / f"models--a--{name}" / "snapshots" / revision
        (snapshot / "config.json").write_text(json.dumps(config))
        weights = snapshot / "model.safetensors"
        weights.rename((snapshot / where).with_suffix(".safetensors"))
        tensors = tf.LlamaForCausalLM(SMALL).state_dict()
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, f"{where}.safetensors")}
        (snapshot / pretrained.INDEX).write_text(json.dumps(index))
    done = subprocess.run(
        [sys.executable, "-c", AS_A_STRANGER_WROTE_IT, str(mark), str(folder)],
        env=os.environ
        | {"HF_HOME": str(root / "home"), "HF_HUB_OFFLINE": "1"}
        | {"HF_MODULES_CACHE": str(root / "modules"), "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("The model's weights lie outside its folder") == 2, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("attempt", "ended"),
    [
        ("folder, not trusted", [3, False]),
        ("hub, not trusted", [3, False]),
        ("hub, pinned and not trusted", [3, False]),
        ("hub, trusted and not pinned", [2, False]),
        ("hub, trusted and pinned", [0, True]),
        ("folder, trusted", [0, True]),  # its revision are the digests of its files
    ],
)
def test_code_of_a_model_runs_only_where_it_is_trusted_and_pinned(attempts, attempt, ended):
    assert attempts[attempt] == ended


@pytest.mark.parametrize("attempt", ["hub, weights above", "hub, weights anywhere"])
def test_weights_outside_of_a_cached_model_are_refused(attempts, attempt):
    assert attempts[attempt] == [3, False]


def test_the_digests_of_a_models_code_are_recorded(tmp_path: Path):
    folder = save_model(tmp_path / "model")
    (folder / "modeling_own.py").write_text("x = 1\n")
    assert "modeling_own.py" in dense.resolve(str(folder))["digests"]


def test_the_card_records_whether_code_of_the_model_was_trusted(undisturbed: Stand):
    card = (undisturbed.root / "stages/evaluate/README.md").read_text()
    assert "model.trust_remote_code: false" in card and "model.revision: null" in card


# Names that lead out of a folder


def test_a_layer_that_is_a_link_out_of_its_folder_is_refused(undisturbed: Stand, tmp_path: Path):
    (tmp_path / "layers").mkdir()
    (tmp_path / "layers/layer_0").symlink_to(undisturbed.root / "stages/train/layer_0")
    with pytest.raises(InputError, match="lies outside its folder"):
        layer_folders(tmp_path / "layers")


@pytest.mark.parametrize("name", ["layer.safetensors", "history.csv"])
def test_a_file_of_an_artefact_that_is_a_link_out_of_it_is_refused(
    undisturbed: Stand, tmp_path: Path, name: str
):
    """With the bytes that it should have, too; a link into DVC's cache is DVC's own."""
    folder = shutil.copytree(undisturbed.root / "stages/train/layer_0", tmp_path / "layer_0")
    for aside in (tmp_path / "aside", tmp_path / "cache/files/md5/0f" / ("a" * 30)):
        aside.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(undisturbed.root / "stages/train/layer_0" / name, aside)
        (folder / name).unlink()
        (folder / name).symlink_to(aside)
        if "cache" in aside.parts:
            artifacts.verify(folder)
            continue
        with pytest.raises(ArtifactError, match=f"{name}: it is a link to {aside}"):
            artifacts.verify(folder)


def test_a_manifest_that_names_files_above_its_folder_is_refused(tmp_path: Path):
    (tmp_path / "secret.txt").write_text("secret")
    folder = tmp_path / "artefact"
    folder.mkdir()
    for name in ("../secret.txt", str(tmp_path / "secret.txt"), "a/../../secret.txt"):
        artifacts.write_manifest(folder, {})
        manifest = artifacts.read_manifest(folder)
        manifest["files"] = {name: artifacts.file_digest(tmp_path / "secret.txt")}
        artifacts.write_sealed(folder / artifacts.MANIFEST, manifest)
        for patterns in ((), ("*",), (name,)):
            with pytest.raises(ArtifactError, match="it is missing"):
                artifacts.verify(folder, *patterns)


def test_a_commit_that_names_files_above_its_store_is_refused(undisturbed: Stand, tmp_path: Path):
    store = shutil.copytree(undisturbed.root / "stages/capture/layer_0.zarr", tmp_path / "0.zarr")
    (path, *_) = sorted((store / "commits").glob("train_*.json"))
    commit = json.loads(path.read_text())
    del commit["crc32c"]
    shutil.copy(store / "train/input/c.0.0", tmp_path / "c.0.0")
    commit["objects"]["../c.0.0"] = commit["objects"].pop("train/input/c.0.0")
    commit["crc32c"] = commits._checksum(commit)
    path.write_text(json.dumps(commit))
    with pytest.raises(ArtifactError, match=path.name):
        LayerReader(store)


def test_a_conversion_alone_refuses_layers_that_lead_elsewhere(undisturbed: Stand, tmp_path: Path):
    """By the command, from a folder of its own."""
    shutil.copytree(undisturbed.root / "stages/dense/model", tmp_path / "dense")
    (tmp_path / "layers").mkdir()
    for k in (0, 1):
        (tmp_path / f"layers/layer_{k}").symlink_to(undisturbed.root / f"stages/train/layer_{k}")
    paths = ["convert.dense=dense", "convert.layers=layers", "convert.output=sparse"]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.stages.convert", *paths],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3 and "lies outside its folder" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "sparse").exists()


# Configuration

ENVIRONMENT = [
    "${oc.env:HF_TOKEN}",
    "${ oc.env:HF_TOKEN}",
    "a-${oc.env:HF_TOKEN,none}",
    "${oc.decode:${oc.env:HF_TOKEN}}",
    "${oc.${data.text_column}:HF_TOKEN}",
    "${oc.create:{a:1}}",
]


@pytest.mark.parametrize("text", ENVIRONMENT)
@pytest.mark.parametrize("key", ["model.name", "evaluate.prompt", "data.text_column"])
def test_the_environment_is_read_by_no_setting(
    project: Path, monkeypatch: pytest.MonkeyPatch, key: str, text: str
):
    """On the command line, in conf/, in params.yaml, and without any of them."""
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    said = []
    with pytest.raises(ConfigError) as caught:
        compose.load([f"{key}='{text}'"])
    said.append(caught.value)
    params = yaml.safe_load((project / "params.yaml").read_text())
    section, name = key.split(".")
    params[section][name] = text
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(ConfigError) as caught:
        compose.load([])
    said.append(caught.value)
    path = project / "conf/experiment/evil.yaml"
    path.write_text("# @package _global_\n" + yaml.safe_dump({section: {name: text}}))
    with pytest.raises(ConfigError) as caught:
        compose.load(["experiment=evil"])
    said.append(caught.value)
    with pytest.raises(ConfigError) as caught:
        compose.standalone([f"convert.dense={text}"])
    said.append(caught.value)
    assert not any(SECRETS["HF_TOKEN"] in str(error) for error in said)


@pytest.mark.parametrize(
    "override",
    [
        "+model._target_=os.system",
        "++train._target_=os.system",
        "+_target_=os.system",
        "moe.per_layer=[{layers:[0],_target_:os.system}]",
        "hydra.launcher._target_=os.system",
        "+hydra.callbacks.x._target_=os.system",
        "hydra.searchpath=[file:///tmp]",
    ],
)
def test_code_is_named_by_no_override(project: Path, override: str):
    with pytest.raises(ConfigError):
        compose.load([override])


def test_code_is_named_by_no_yaml(project: Path):
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(
        text.replace("train:\n", "train:\n  _target_: os.system\n")
    )
    with pytest.raises(ConfigError, match="_target_"):
        compose.load([])
    (project / "params.yaml").write_text("!!python/object/apply:os.system ['touch mark']\n")
    with pytest.raises(ConfigError):
        compose.load([])
    (project / "conf/experiment/evil.yaml").write_text(
        "# @package _global_\nmodel:\n  name: !!python/object/apply:os.system ['touch mark']\n"
    )
    with pytest.raises(ConfigError):
        compose.load(["experiment=evil"])
    assert not (project / "mark").exists()


@pytest.mark.parametrize(
    "name", ["../up", "a/b", "a;b", "$(touch mark)", "`touch mark`", "a b", "", ".", "-rf", "a\nb"]
)
def test_a_name_with_a_path_or_a_shell_in_it_is_refused(project: Path, name: str):
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["model"]["name"] = name
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(ConfigError, match=r"model\.name"):
        compose.load([])


def test_no_secret_of_the_environment_is_in_any_artefact(undisturbed: Stand):
    """All stages ran with these set; the logs that they printed do not hold them either."""
    found = tree(undisturbed.root) | tree(undisturbed.outputs)
    assert len(found) > 100
    leaked = [n for n, content in found.items() for s in SECRETS.values() if s.encode() in content]
    assert leaked == []


# What is shown

HOSTILE = (
    "<script>alert(1)</script>\n---\nlicense: mit\n---\n```\n# [x](javascript:alert(1))\n| a |"
)


@pytest.mark.slow
def test_text_in_the_report_and_in_the_card_is_text(stand: Stand):
    """A prompt that is HTML, Markdown and YAML, and what the models say to it."""
    chosen = yaml.safe_load((stand.root / "params.yaml").read_text())
    chosen["evaluate"]["prompt"] = HOSTILE
    (stand.root / "params.yaml").write_text(yaml.safe_dump(chosen))
    stand.run("evaluate").check()
    folder = stand.root / "stages/evaluate"
    page, card = (folder / "report.html").read_text(), (folder / "README.md").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front).get("license") != "mit"
    outside = re.sub(r"```.*?^```$", "", body, flags=re.DOTALL | re.MULTILINE)
    outside = re.sub(r"`[^`\n]*`", "", outside)
    assert "<script" not in outside and "javascript:" not in outside
    for path in folder.rglob("*.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)


# Floors

FLOORS = {"transformers": "5.5", "torch": "2.10", "hydra-core": "1.3.6", "jinja2": "3.1.6"}


def test_floors_against_published_vulnerabilities_stand_with_their_reason():
    text = (PROJECT / "pyproject.toml").read_text()
    lines = [line for line in text.splitlines() if line.strip().startswith('"') and ">=" in line]
    marked = {}
    for line in lines:
        requirement = Requirement(line.strip().split('"')[1])
        if "(security)" in line:
            marked[requirement.name] = str(requirement.specifier).removeprefix(">=")
    assert marked == FLOORS
    assert "published vulnerabilities below them" in text


def test_what_is_installed_is_at_or_above_its_floor():
    from importlib.metadata import requires, version

    stated = [Requirement(line) for line in requires("sparse-distillation") or []]
    needed = [r for r in stated if r.marker is None]
    assert len(needed) > 10
    below = [str(r) for r in needed if Version(version(r.name)) not in r.specifier]
    assert below == []
