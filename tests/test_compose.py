"""What a command reads, and what it refuses."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from pipeline import budget, compose, refusals
from pipeline.__main__ import TOOLS
from pipeline.config import Config, ConvertConfig, RuntimeConfig, leaves, select
from pipeline.errors import ConfigError
from pipeline.rules import RANGES
from pipeline.shape import MoEShape

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
    text = (project / "params.yaml").read_text().replace("n_experts: 4", "n_experts: 8")
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


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["moe.per_layer=[{layers:[9],n_experts:8}]"], "layers [9] are not converted"),
        (["moe.per_layer=[{layers:[0]},{layers:[0,1]}]"], "layers [0] twice"),
        (["moe.per_layer=[{layers:[0],top_k:5}]"], "top_k=5, n_experts=4"),
        (["moe.per_layer=[{layers:[0],n_experts:0}]"], "moe.n_experts is out of range"),
        (
            ["moe.n_experts=8", "moe.top_k=4", "moe.per_layer=[{layers:[0],n_experts:2}]"],
            "top_k=4, n_experts=2",
        ),
        (["model.embedded.d_model=72", "model.embedded.n_heads=8"], "d_model=72"),
        (["moe.per_layer=[{layers:[0],n_expertz:8}]"], "n_expertz"),
        (["moe.routing=expert_choice", "moe.capacity_factor=17"], "moe.capacity_factor=17"),
        (
            [
                "moe.routing=expert_choice",
                "moe.capacity_factor=0.5",
                "moe.n_experts=1",
                "moe.top_k=1",
            ],
            "One expert has no tokens to choose",
        ),
        (
            [
                "moe.routing=expert_choice",
                "moe.capacity_factor=3",
                "moe.per_layer=[{layers:[0],n_experts:2}]",
            ],
            "moe.capacity_factor=3.0, moe.per_layer of layers [0]: n_experts=2",
        ),
        (["moe.routing=expert_choice", "moe.balance_bias=true"], "moe.balance_bias=true"),
        (["moe.routing=expert_choice", "moe.virtual_groups=true"], "moe.virtual_groups=true"),
        (["moe.dynamic.enabled=true", "moe.dynamic.min_d_ff=9000"], "min_d_ff=9000"),
        (["moe.dynamic.enabled=true", "moe.dynamic.max_d_ff=1001"], "max_d_ff=1001"),
        (["convert.max_shard_size=lots"], "max_shard_size=lots"),
        (["convert.max_shard_size=0GB"], "max_shard_size=0GB"),
        (["convert.max_shard_size=-2GB"], "max_shard_size=-2GB"),
        (["model.device_map=foo"], "foo"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    project: Path, overrides: list[str], named: str
):
    assert named in str(refusal(*overrides))


SEED = {  # the original's table of parameters, and what its trainer does besides
    "moe.n_experts": 16,
    "moe.top_k": 2,
    "moe.capacity_factor": 1.25,
    "moe.routing": "token_choice",
    "moe.d_ff_expert": None,
    "moe.init_from_dense": True,
    "moe.init_noise": 0.01,
    "moe.router": "linear",
    "moe.balance_bias": False,
    "moe.per_layer": [],
    "moe.dynamic.enabled": False,
    "moe.dynamic.reallocate_every_n_steps": 500,
    "moe.dynamic.n_reallocated": 2,
    "moe.dynamic.growth_factor": 1.25,
    "moe.dynamic.shrink_factor": 0.8,
    "moe.dynamic.min_d_ff": 256,
    "moe.dynamic.max_d_ff": 8192,
    "moe.dynamic.growth": "interpolate",
}
SEED_TRAINING = {
    "train.epochs": 3,
    "train.learning_rate": 1e-4,
    "train.router_learning_rate": None,
    "train.use_cosine_loss": True,
    "train.cosine_loss_weight": 0.1,
    "train.normalize_mse": False,
    "train.load_balance_coef": 0.01,
    "train.router_z_coef": 0.001,
    "train.weight_decay": 0.01,
    "train.warmup_steps": 100,
    "train.schedule": "constant",
    "train.grad_clip": 1.0,
    "train.data_free": False,
}


def test_moe_seed_has_the_originals_defaults_and_leaves_the_training(project: Path):
    chosen = select(compose.load(["moe=seed"]), ["moe", "train"])
    assert {key: chosen[key] for key in SEED} == SEED
    assert chosen["train.normalize_mse"] is True


@pytest.mark.parametrize(
    ("experiment", "d_ff_expert", "total", "active"),
    [("seed", None, 16, 2), ("seed_half", 0.5, 8, 1), ("seed_quarter", 0.25, 4, 0.5)],
)
def test_experiment_seed_is_the_original_in_one_word(
    project: Path, experiment: str, d_ff_expert: float | None, total: float, active: float
):
    """And its table of parameters: total and active, in dense FFNs, the router left out."""
    cfg = compose.load([f"experiment={experiment}"])
    wanted = SEED | SEED_TRAINING | {"moe.d_ff_expert": d_ff_expert}
    chosen = select(cfg, wanted)
    assert {key: chosen[key] for key in wanted} == wanted
    layers = [{"d_ff": 8192, "gated": True, "activation": "silu", "bias": False}]
    record = {
        "family": "llama",
        "d_model": 3072,
        "n_layers": 1,
        "layers": layers,
        "config": {"attention_bias": False},
    }
    shape = MoEShape(**budget.uniform(record, cfg.moe, [0])[0]["shape"])
    experts, dense = shape.total_parameters - shape.router_parameters, shape.dense_parameters
    assert experts / dense == total and shape.active_ffn_fraction == active


def test_experiments_combine(project: Path):
    cfg = compose.load(["experiment=[seed_half,pico]", "moe.d_ff_expert=0.5"])
    assert (cfg.model.name, cfg.train.normalize_mse, cfg.moe.d_ff_expert) == ("pico", False, 0.5)


def test_an_unknown_choice_lists_the_choices(project: Path):
    error = refusal("model=gpt5")
    assert "tiny" in error.rule and "model.id" in error.remedy


@pytest.mark.parametrize("override", ["model.name=${oc.env:HOME}", "+model._target_=os.system"])
def test_configuration_reads_no_environment_and_names_no_code(project: Path, override: str):
    refusal(override)


def test_missing_values_are_refused_in_params_yaml(project: Path):
    text = (project / "params.yaml").read_text().replace("n_experts: 4", "n_experts: ???")
    (project / "params.yaml").write_text(text)
    assert "moe.n_experts" in str(refusal())


def test_an_integer_width_stays_an_integer_and_a_fraction_a_float(project: Path):
    widths = [compose.load([f"moe.d_ff_expert={w}"]).moe.d_ff_expert for w in ("2048", "1.0")]
    assert [type(w) for w in widths] == [int, float]


def test_every_number_has_a_range_and_every_range_a_number(project: Path):
    numbers = {
        key
        for key, value in leaves(
            compose.load(
                [
                    "train.router_learning_rate=1",
                    "train.window=1",
                    "heal.router_learning_rate=1",
                    "runtime.threads=1",
                    "prefill.timeout_s=1",
                    "data.max_samples=1",
                    "evaluate.max_batches=1",
                ]
            )
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
    assert select(cfg, ["moe.n_experts"]) == {"moe.n_experts": 4}
    assert set(select(cfg, ["runtime"])) == {
        "runtime.device",
        "runtime.threads",
        "runtime.lock_wait_s",
        "runtime.logger",
    }


OFTEN_MEANT = [
    ("~moe.n_expert", "did you mean moe.n_experts?"),
    ("++moe.n_expert=8", "did you mean moe.n_experts?"),
    ("n_experts=8", "did you mean moe.n_experts?"),
    ("trian=default", "did you mean train?"),
    ("experimet=pico", "did you mean experiment?"),
    ("model@x=tiny", "no setting named model@x"),
    ("data.tokens={trian:5}", "did you mean data.tokens.train?"),
    ("moe.per_layer=[{layers:[0],n_expertz:8}]", "moe.per_layer has no setting named n_expertz"),
    ("moe.host=mixtrl", "did you mean moe.host=mixtral?"),
    ("moe.host=x", "one of auto, mixtral, granitemoe,"),
    ("train.dtype=FLOAT32", "did you mean train.dtype=float32?"),
    ("moe.n_experts=many", "an integer, at least 1"),
    ("moe.dynamic.shrink_factor=x", "a number between 0.01 and 1"),
    ("moe.d_ff_expert=wide", "an integer or a number, at least 0, or null"),
    ("moe.refit=perhaps", "true or false"),
    ("model.layers=3", "a list, [a,b,...], each an integer"),
    ("model.layers={a:1}", "a list, [a,b,...], each an integer"),
    ("data.tokens=5", "data.tokens is a section"),
    ("model=tinny", "did you mean model=tiny?"),
    ("experiment=[pico,sed]", "did you mean experiment=seed?"),
    ("moe={}", "one of half, seed"),
    ("moe=null", "one of half, seed"),
    ("experiment=null", "one of pico, seed"),
    ("moe.n_experts=8,16", "dvc exp run --queue -S 'moe.n_experts=8,16'"),
    ("moe.n_experts", "write moe.n_experts=<value>"),
    ("=3", "no setting named"),
    ('model.name=a b"', "cannot be read"),
    ("~moe.n_experts", "cannot be removed"),
    ("~runtime", "cannot be removed"),
    ("+moe.n_experts=8", "write moe.n_experts=8"),
    ("++model=tiny", "write model=tiny"),
    ("hydra.job.name=x", "belong to `python -m pipeline prefill`"),
    ("hydra/launcher=joblib", "belong to `python -m pipeline prefill`"),
    ("dtype=float32", "model.dtype, capture.dtype, train.dtype or heal.dtype"),
]


@pytest.mark.parametrize(("override", "said"), OFTEN_MEANT)
def test_a_mistake_on_the_command_line_is_answered_with_what_was_meant(
    project: Path, override: str, said: str
):
    assert said in str(refusal(override))


def test_a_key_is_set_by_force_as_any_other(project: Path):
    assert compose.load(["++moe.n_experts=8"]).moe.n_experts == 8


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("n_experts: 4", "n_expert: 4", "did you mean moe.n_experts?"),
        ("n_experts: 4", "n_experts: 4\n  n_experts: 8", "found duplicate key"),
        ("n_experts: 4", "n_experts: [4", "params.yaml is not YAML"),
        ("n_experts: 4", "n_experts: vier", "an integer, at least 1"),
        ("  n_experts: 4\n", "", "A setting is missing"),
        ("n_experts: 4", "4: n_experts", "no setting named moe.4"),
        ("kernel: auto", "kernel: ${nope}", "nope"),
    ],
)
def test_a_mistake_in_params_yaml_is_named_with_its_file(
    project: Path, old: str, new: str, said: str
):
    text = (project / "params.yaml").read_text()
    assert text.count(old) == 1
    (project / "params.yaml").write_text(text.replace(old, new))
    error = refusal()
    assert said in str(error) and "params.yaml" in str(error)


@pytest.mark.parametrize("content", [b"", b"- 1", b"moe", b"\xff\xfe", b"moe: &a [*a]", b"{"])
def test_what_is_no_mapping_of_settings_is_refused(project: Path, content: bytes):
    (project / "params.yaml").write_bytes(content)
    assert "params.yaml" in str(refusal())
    (project / "params.yaml").unlink()
    (project / "params.yaml").mkdir()
    assert "params.yaml" in str(refusal())


@pytest.mark.parametrize("content", [b"n_experts: [", b"\xff", b"a: 1\na: 2", b"- 1"])
def test_a_file_of_conf_that_is_no_yaml_is_refused_by_name(project: Path, content: bytes):
    (project / "conf/moe/half.yaml").write_bytes(content)
    assert "conf" in str(refusal("seed=1"))


def test_a_key_that_conf_lacks_is_missed_and_one_too_many_is_named(project: Path):
    entry = project / "conf/heal/default.yaml"
    text = entry.read_text()
    entry.write_text(text + "tokenz: 3\n")
    assert "did you mean heal.tokens?" in str(refusal("seed=1"))
    entry.write_text("\n".join(x for x in text.splitlines() if not x.startswith("grad_clip")))
    assert "heal.grad_clip" in str(refusal("seed=1").value)


def test_a_conversion_on_its_own_takes_its_own_settings_only():
    cfg, how = compose.standalone(["convert.dense=a=b", "runtime.threads=2"])
    assert (cfg.dense, how.threads) == ("a=b", 2)
    for override, said in (
        ("convert.dens=x", "did you mean convert.dense=...?"),
        ("moe.n_experts=8", "has no setting named moe.n_experts"),
        ("convert.dense", "each as key=value"),
        ("convert.tolerance=-1", "convert.tolerance is out of range"),
        ("runtime.device=gpu", "one of auto, cpu, cuda"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            compose.standalone([override])


@pytest.mark.parametrize("name", ["2024_12_01", "0123456", "12e4567", "no", "1.0", "[a]"])
def test_a_conversion_on_its_own_takes_a_text_as_it_is_written(name: str):
    assert compose.standalone([f"convert.output={name}"])[0].output == name
    assert compose.standalone([f"convert.revision={name}"])[0].revision == name


@pytest.mark.parametrize("value", ["2024_12_01", "12e4567", "true"])
def test_a_text_that_would_be_read_as_something_else_is_refused(project: Path, value: str):
    assert "quote it" in str(refusal(f"model.revision={value}"))
    assert compose.load([f'model.revision="{value}"']).model.revision == value


def test_every_setting_says_what_it_takes():
    assert {key for key in refusals.kinds() if ".embedded." not in key} | {"model.embedded"} == set(
        leaves(Config())
    )
    for key in refusals.kinds():
        assert all(choice in refusals.allowed(key) for choice in refusals.choices(key)), key
        assert (f"{RANGES[key][0]}" if key in RANGES else "") in refusals.allowed(key), key


STARTS = """
import json, os, runpy, sys
def start(module, *arguments):
    read, write = os.pipe()
    if os.fork():
        os.close(write)
        with os.fdopen(read) as answer:
            print(answer.read())
        os.wait()
        return
    code = None
    sys.argv = [module, *arguments]
    sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        code = end.code
    heavy = [name for name in ("torch", "transformers", "datasets", "zarr") if name in sys.modules]
    os.write(write, json.dumps([[module, *arguments], code, heavy]).encode())
    os._exit(0)
for module, *arguments in json.loads(sys.argv[1]):
    start(module, *arguments)
"""


@pytest.mark.slow
def test_help_plan_and_refusals_of_the_configuration_import_nothing_heavy(project: Path):
    stages = ["config", "dense", "tokens", "capture", "budget", "train", "heal", "convert"]
    modules = [f"pipeline.stages.{name}" for name in [*stages, "evaluate"]]
    helps = [[module, "--help"] for module in ["pipeline", *modules]]
    helps += [["pipeline", tool, "--help"] for tool in TOOLS] + [["pipeline", "compose", "--print"]]
    train = ["pipeline.stages.train", "--layer"]
    refused = [
        [*train, "0", "moe.n_expert=8"],
        [*train, "0", "model=tinny"],
        [*train, "0", "moe.host=mixtrl"],
        [*train, "99"],
        [*train, "0", "runtime.logger=mlfow"],
        ["pipeline.stages.capture", "moe.top_k=99"],
        ["pipeline", "compose", "+moe.n_experts=8"],
        ["pipeline", "plan", "moe.n_expert=8"],
        ["pipeline", "prefill", "-m", "layer"],
        ["pipeline.stages.convert", "convert.dense=x", "convert.dens=x"],
    ]
    told = subprocess.run(
        [sys.executable, "-c", STARTS, json.dumps(helps + refused + [["pipeline", "plan"]])],
        capture_output=True,
        text=True,
        check=True,
    )
    ended = [json.loads(line) for line in told.stdout.splitlines()]
    assert [argv for argv, _, heavy in ended if heavy] == []
    codes = {" ".join(argv): code for argv, code, _ in ended}
    assert {codes[" ".join(argv)] for argv in helps} == {0}
    assert {
        " ".join(argv): codes[" ".join(argv)] for argv in refused if codes[" ".join(argv)] != 2
    } == {}
    assert codes["pipeline plan"] in (0, 4)


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
