"""What a command reads, and what it refuses."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from pipeline import compose
from pipeline.config import RANGES, Config, ConvertConfig, RuntimeConfig, leaves, select
from pipeline.errors import ConfigError

PROJECT = Path(__file__).parent.parent


def refusal(*overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        compose.load(list(overrides))
    return caught.value


def test_params_yaml_is_what_conf_composes_to():
    composed = OmegaConf.to_container(compose.compose([]))
    assert compose.differences(composed, OmegaConf.to_container(compose.read_params())) == []


def test_composed_params_are_the_bytes_that_dvc_writes(project: Path):
    from dvc.utils.hydra import compose_and_dump

    conf = str(project / "conf")
    compose_and_dump(project / "dvc.yaml", conf, None, "config", str(project), [])
    assert (project / "dvc.yaml").read_text() == compose.to_yaml(compose.compose([]))


def test_overrides_by_hand_compose_as_an_experiment_would(project: Path):
    cfg = compose.load(["moe.n_experts=32", "moe.d_ff_expert=64"])
    assert (cfg.moe.n_experts, cfg.moe.d_ff_expert) == (32, 64)


def test_without_overrides_params_yaml_is_read_as_it_stands(project: Path):
    text = (project / "params.yaml").read_text().replace("n_experts: 16", "n_experts: 8")
    (project / "params.yaml").write_text(text)
    assert compose.load([]).moe.n_experts == 8


def test_under_dvc_overrides_are_refused(project: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DVC_STAGE", "train@0")
    assert "takes no overrides" in refusal("moe.n_experts=8").what


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("moe.n_expert=8", "moe.n_experts"),
        ("+moe.n_expert=8", "moe.n_experts"),
        ("+trian.epochs=3", "train.epochs"),
        ("train.learning_rat=1", "train.learning_rate"),
    ],
)
def test_an_unknown_key_is_refused_and_the_nearest_is_named(
    project: Path, override: str, named: str
):
    assert named in str(refusal(override))


@pytest.mark.parametrize(
    "override",
    [
        "moe.n_experts=many",
        "moe.n_experts=1.5",
        "moe.host=gpt5",
        "moe.n_experts=0",
        "moe.top_k=0",
        "train.learning_rate=nan",
        "train.learning_rate=-1",
        "train.weight_decay=inf",
        "moe.init_from_dense=perhaps",
        "model.layers=[]",
        "model.layers=[0,0]",
        "model.layers=[-1]",
        "model.name=../up",
        "'model.name=a;b'",
        "data.source=files",
        "model.id=some/model",
        "seed=???",
    ],
)
def test_a_wrong_type_choice_or_range_is_refused_by_name(project: Path, override: str):
    key = override.strip("'").partition("=")[0]
    assert key.rpartition(".")[2] in str(refusal(override.strip("'")))


def test_more_experts_per_token_than_experts_is_refused(project: Path):
    error = refusal("moe.n_experts=8", "moe.top_k=9")
    assert "top_k=9" in str(error) and "n_experts=8" in str(error)


def test_an_unknown_choice_lists_the_choices(project: Path):
    error = refusal("model=gpt5")
    assert "tiny" in error.rule and "model.id" in error.remedy


@pytest.mark.parametrize("override", ["model.name=${oc.env:HOME}", "+model._target_=os.system"])
def test_configuration_reads_no_environment_and_names_no_code(project: Path, override: str):
    refusal(override)


def test_missing_values_are_refused_in_params_yaml(project: Path):
    text = (project / "params.yaml").read_text().replace("n_experts: 16", "n_experts: ???")
    (project / "params.yaml").write_text(text)
    assert "moe.n_experts" in str(refusal())


def test_an_integer_width_stays_an_integer_and_a_fraction_a_float(project: Path):
    widths = [compose.load([f"moe.d_ff_expert={w}"]).moe.d_ff_expert for w in ("2048", "1.0")]
    assert [type(w) for w in widths] == [int, float]


def test_every_number_has_a_range_and_every_range_a_number(project: Path):
    numbers = {
        key
        for key, value in leaves(
            compose.load(["train.router_learning_rate=1", "runtime.threads=1"])
        ).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    assert numbers == RANGES.keys()


def test_every_key_of_the_schema_stands_in_conf(project: Path):
    composed = OmegaConf.to_container(compose.compose([]))
    shown = leaves(compose.load([])).keys()

    def flat(node: object, path: str = "") -> set[str]:
        if not isinstance(node, dict):
            return {path}
        return {k for key, value in node.items() for k in flat(value, f"{path}.{key}".strip("."))}

    assert flat(composed) == set(shown)


@pytest.mark.parametrize("entry", sorted((PROJECT / "conf").glob("*/*.yaml")), ids=lambda p: p.name)
def test_every_entry_of_conf_composes(project: Path, entry: Path):
    extra = ["model.id=x", "model.layers=[0]"] if entry.name == "pretrained.yaml" else []
    extra += ["data.files=[x.txt]"] if entry.name == "files.yaml" else []
    extra += ["data.dataset=x"] if entry.name == "hub.yaml" else []
    compose.load([f"{entry.parent.name}={entry.stem}", *extra])


def test_the_schemas_that_stand_alone_agree_with_conf(project: Path):
    cfg = compose.load([])
    assert cfg.convert == ConvertConfig() and cfg.runtime == RuntimeConfig()


def test_every_knob_is_read_somewhere():
    sources = "\n".join(
        path.read_text()
        for path in (PROJECT / "pipeline").rglob("*.py")
        if path.name not in ("config.py", "compose.py")
    )
    unread = [
        key
        for key in leaves(Config())
        if not re.search(rf"(\.{(name := key.rpartition('.')[2])}\b|\"{name}\")", sources)
    ]
    assert unread == []


def test_select_covers_what_lies_below_a_key_and_nothing_beside_it(project: Path):
    cfg = compose.load([])
    assert select(cfg, ["moe.n_experts"]) == {"moe.n_experts": 16}
    assert set(select(cfg, ["runtime"])) == {
        "runtime.device",
        "runtime.threads",
        "runtime.lock_wait_s",
    }


def test_a_configuration_error_is_told_before_torch_is_imported(project: Path):
    code = (
        "import sys, runpy\n"
        "sys.argv = ['train', '--layer', '0', 'moe.n_expert=8']\n"
        "try: runpy.run_module('pipeline.stages.train', run_name='__main__')\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)\n"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["2", "False"]
    assert "did you mean moe.n_experts?" in done.stderr
    assert time.monotonic() - start < 15
