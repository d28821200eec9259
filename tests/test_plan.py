"""What a plan says beforehand is what a run then takes; from the model's configuration alone."""

import contextlib
import json
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers as tf

from pipeline import artifacts, compose, dense, durable, measured, outline, plan, workdir
from pipeline.__main__ import main
from pipeline.config import Config, Store
from pipeline.documents import Document
from pipeline.errors import InputError
from pipeline.levers import levers
from pipeline.planned import OUTPUTS, Free, Plan, make
from pipeline.pretrain import train_tokenizer
from pipeline.stages import DENSE

PROJECT = Path(__file__).parent.parent

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
GATED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
GPT = {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
BERT = {**SIZES, "intermediate_size": 48, "max_position_embeddings": 64}
PHI = {**GATED, "pad_token_id": 0}
FAMILIES: dict[str, list[tf.PreTrainedConfig]] = {
    "llama": [
        tf.LlamaConfig(**GATED),
        tf.LlamaConfig(**GATED, tie_word_embeddings=True, mlp_bias=True, attention_bias=True),
        tf.LlamaConfig(**GATED, dtype="bfloat16", head_dim=16),
    ],
    "mistral": [tf.MistralConfig(**GATED)],
    "qwen2": [tf.Qwen2Config(**GATED)],
    "qwen3": [tf.Qwen3Config(**GATED), tf.Qwen3Config(**GATED, head_dim=8, attention_bias=True)],
    "phi3": [tf.Phi3Config(**PHI)],
    "olmo": [tf.OlmoConfig(**GATED)],
    "olmo2": [tf.Olmo2Config(**GATED)],
    "granite": [tf.GraniteConfig(**GATED, mlp_bias=True)],
    "smollm3": [tf.SmolLM3Config(**GATED, pad_token_id=0)],
    "gemma": [tf.GemmaConfig(**GATED, head_dim=8)],
    "gemma2": [tf.Gemma2Config(**GATED, head_dim=8)],
    "gemma3_text": [tf.Gemma3TextConfig(**GATED, head_dim=8)],
    "starcoder2": [tf.Starcoder2Config(**GATED), tf.Starcoder2Config(**GATED, use_bias=False)],
    "gpt2": [tf.GPT2Config(**GPT), tf.GPT2Config(**GPT, n_inner=40)],
    "gpt_neox": [tf.GPTNeoXConfig(**SIZES, intermediate_size=48)],
    "bert": [tf.BertConfig(**BERT, architectures=["BertModel"])],
    "roberta": [tf.RobertaConfig(**BERT, architectures=["RobertaModel"])],
    "xlm-roberta": [tf.XLMRobertaConfig(**BERT, architectures=["XLMRobertaModel"])],
}
TOLD = ("family", "d_model", "n_layers", "vocab_size", "dtype", "parameters")
ROOMY = Free(disk=10**13, files=None, memory=10**12, gpu=None)


# The model, from its configuration


def test_every_family_is_tried():
    assert FAMILIES.keys() == outline.FAMILIES.keys()


@pytest.mark.parametrize(
    "config", [c for of in FAMILIES.values() for c in of], ids=lambda c: c.model_type
)
def test_outline_is_what_the_built_model_is(tmp_path: Path, config: tf.PreTrainedConfig):
    config.save_pretrained(tmp_path)
    found = outline.outline(outline.read_config(str(tmp_path), None))
    built = dense.inspect(str(tmp_path))
    assert {key: found[key] for key in TOLD} == {key: built[key] for key in TOLD}
    for ours, theirs in zip(found["layers"], built["layers"], strict=True):
        assert ours == {key: theirs[key] for key in ours}


def test_the_embedded_models_outline_is_what_is_trained(project: Path):
    from pipeline.pretrain import build

    cfg = compose.load(["model=tiny"])
    assert cfg.model.embedded
    documents = [Document(str(i), f"{i} word{i * i}") for i in range(2000)]
    model = build(cfg.model.embedded, train_tokenizer(documents, cfg.model.embedded.vocab_size))
    found = outline.record_of(cfg, DENSE)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["vocab_size"] == model.config.vocab_size


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "mamba"}, "model_type mamba"),
        ({"model_type": "llama", "hidden_size": 8}, "lacks intermediate_size"),
        ({"model_type": "llama", **GATED, "hidden_act": "selu"}, "with selu"),
        (None, "config.json"),
        ("{", "config.json"),
        ([], "config.json"),
    ],
)
def test_what_cannot_be_told_from_a_configuration_ends_with_3(
    tmp_path: Path, config: Any, told: str
):
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=told) as refused:
        outline.outline(outline.read_config(str(tmp_path), None))
    assert refused.value.exit_code == 3 and str(refused.value.remedy)


def test_a_model_of_the_hub_that_is_not_here_ends_with_3(monkeypatch: pytest.MonkeyPatch):
    for online in (True, False):
        with pytest.raises(InputError, match="HF_TOKEN"):
            outline.read_config("nobody/nothing", None, online=online)


def test_an_unknown_family_is_planned_for_by_what_dense_recorded(project: Path):
    DENSE.mkdir(parents=True)
    (project / "model").mkdir()
    (project / "model/config.json").write_text('{"model_type": "mamba"}')
    more = ["model=pretrained", f"model.id={project}/model", "model.layers=[0,1]"]
    cfg = compose.load(more)
    with pytest.raises(InputError, match="dvc repro dense"):
        outline.record_of(cfg, DENSE)
    known = outline.outline({"model_type": "llama", **GATED, "hidden_act": "silu"})
    durable.write_json(DENSE / "dense.json", known)
    from pipeline.config import select

    settings = select(cfg, ["model"])
    artifacts.write_manifest(DENSE, {"settings": settings})
    assert outline.record_of(cfg, DENSE) == known
    with pytest.raises(InputError):  # of another model
        outline.record_of(compose.load([*more, "model.revision=abc"]), DENSE)


# A real run


WITH_PEAK = """
import atexit, runpy, sys
def tell():
    with open("/proc/self/status") as status:
        print(next(line for line in status if line.startswith("VmHWM")).split()[1])
atexit.register(tell)
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
"""A module as `python -m` runs it, and the largest kilobytes of memory that it had."""


class Run:
    """A project with a small model of its own, whose stages are run as commands."""

    def __init__(self, root: Path) -> None:
        self.root = root
        numbers = random.Random(0)
        texts = [" ".join(str(numbers.randrange(10**4)) for _ in range(300)) for _ in range(200)]
        documents = [Document(str(i), text) for i, text in enumerate(texts)]
        tokenizer = train_tokenizer(documents, 500)
        tf.AutoModelForCausalLM.from_config(
            tf.LlamaConfig(**GATED | {"vocab_size": 500}, tie_word_embeddings=True)
        ).save_pretrained(root / "dense")
        tokenizer.save_pretrained(root / "dense")
        for k, document in enumerate(documents):
            (root / f"text{k}.txt").write_text(document.text)
        self.settings = [
            "experiment=pico",
            "model=pretrained",
            f"model.id={root}/dense",
            "model.layers=[0,2]",
            "data=files",
            f"data.files=[{root}/text*.txt]",
            f"data.shifted_files=[{root}/text0.txt]",
            "data.sequence_length=32",
            "data.tokens={train: 16384, validation: 2048, heldout: 2048, shifted: 512}",
        ]
        self.memory: dict[str, int] = {}

    def plan(self, *more: str, free: Free = ROOMY) -> Plan:
        cfg = self.cfg(*more)
        return make(cfg, outline.record_of(cfg, DENSE), free)

    def cfg(self, *more: str) -> Config:
        return compose.load([*self.settings, *more])

    def stage(self, name: str, *more: str) -> None:
        """Run it as its command does, and keep the peak of its memory."""
        stage, _, layer = name.partition("@")
        words = [f"pipeline.stages.{stage}", *(["--layer", layer] if layer else [])]
        called = [sys.executable, "-c", WITH_PEAK, *words, *self.settings, *more]
        done = subprocess.run(called, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        peak = 1024 * int(done.stdout.split()[-1])
        self.memory[stage] = max(self.memory.get(stage, 0), peak)


def sizes(folder: Path) -> list[int]:
    return [p.stat().st_size for p in folder.rglob("*") if p.is_file()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("run")
    shutil.copytree(PROJECT / "conf", root / "conf")
    shutil.copy(PROJECT / "params.yaml", root)
    with contextlib.chdir(root), pytest.MonkeyPatch.context() as patch:
        for name in ("DVC_STAGE", "DVC_ROOT", "DVC_EXP_NAME"):
            patch.delenv(name, raising=False)
        yield Run(root)


@pytest.fixture(scope="module")
def planned(run: Run) -> Plan:
    """The plan from `config.json` alone, then the run."""
    assert not Path("stages").exists()
    found = run.plan()
    for name in ("dense", "tokens", "capture", "budget", "train@0", "train@2"):
        run.stage(name)
    run.stage("heal")
    run.stage("convert")
    return found


MADE = ("tokens", "capture", "train", "convert")


@pytest.mark.slow
@pytest.mark.parametrize("stage", MADE)
def test_planned_bytes_and_files_are_those_of_the_run(planned: Plan, stage: str):
    real, cost = sizes(Path("stages") / stage), planned.costs[stage]
    assert cost.files == len(real)
    assert cost.bytes == pytest.approx(sum(real), rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("stage", MADE)
def test_planned_memory_bounds_that_of_the_run(planned: Plan, run: Run, stage: str):
    assert run.memory[stage] <= planned.costs[stage].host < 3 * run.memory[stage]


@pytest.mark.slow
def test_the_ratio_of_a_store_that_is_there_corrects_the_plan(planned: Plan, run: Run):
    real = sum(sizes(Path("stages/capture")))
    assert run.plan().costs["capture"].bytes == pytest.approx(real, rel=0.02)
    assert abs(planned.costs["capture"].bytes - real) > 0.04 * real
    raw = run.plan("capture.codec=none").costs["capture"]  # of another codec nothing is known
    assert raw.bytes > 1.2 * real
    other = run.plan("model.name=another").costs["capture"]
    assert other.bytes == planned.costs["capture"].bytes


@pytest.mark.slow
def test_finished_stages_cost_no_more_and_lend_their_time(planned: Plan, run: Run):
    found = run.plan()
    assert found.there == list(OUTPUTS)[:-1] and found.left.keys() == {"evaluate"}
    assert found.disk < 4_000_000 and not planned.there
    taken = measured.read(Path(".scratch"))
    assert taken.keys() >= {"capture", "train-layer_0", "train-layer_2", "convert"}
    again = run.plan("train.epochs=4").seconds
    trained = sum(taken[f"train-layer_{k}"][0] for k in (0, 2))
    assert again.keys() == {"train", "heal", "convert"}
    assert trained < again["train"] < 2.01 * trained
    assert again["convert"] == pytest.approx(taken["convert"][0])
    assert planned.seconds == {}


# What it says


def wide(*more: str) -> tuple[Config, dict[str, Any]]:
    cfg = compose.load(["model=tiny", "data.tokens.train=4194304", *more])
    return cfg, outline.record_of(cfg, DENSE)


def test_shards_on_an_object_store_take_no_disk_and_are_told(
    project: Path, capsys: pytest.CaptureFixture[str]
):
    here, apart = (make(*wide(*url), ROOMY) for url in ([], ["capture.store_url=s3://bucket/a"]))
    cost = apart.costs["capture"]
    assert cost.bytes + apart.apart == pytest.approx(here.costs["capture"].bytes, rel=0.001)
    assert cost.bytes < 0.05 * apart.apart and cost.files < here.costs["capture"].files / 2
    assert here.apart == 0
    plan.main(["capture.store_url=s3://bucket/a", "experiment=pico"], as_json=False, measure=False)
    assert re.search(r"capture\.store_url takes .* of shards", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("stage", "always", "less"),
    [
        ("capture", [], ["model.layers=[0]"]),
        ("heal", ["heal.tokens=65536"], ["train.static_control=false"]),
        ("train", ["train.evaluate_every=1"], ["train.evaluate_every=1000000"]),
    ],
)
def test_what_is_not_computed_costs_nothing(
    project: Path, stage: str, always: list[str], less: list[str]
):
    """The layers behind the last that is captured; a control healed; a validation."""
    most, least = (make(*wide(*always, *more), ROOMY).costs[stage].flops for more in ([], less))
    assert least < most


def test_a_store_of_inputs_takes_half(project: Path):
    both, half = (
        make(*wide(f"capture.store={store.name}"), ROOMY).costs["capture"] for store in Store
    )
    assert half.bytes == pytest.approx(both.bytes / 2, rel=0.05) and half.files < both.files


@pytest.mark.parametrize(
    ("setting", "stage", "what"),
    [
        ("train.batch_size=8192", "train", "host"),
        ("train.static_control=false", "train", "bytes"),
        ("train.stream=true", "train", "host"),
        ("moe.n_experts=8", "train", "transient"),
        ("capture.batch_size=64", "capture", "host"),
        ("capture.shard_mb=0.01", "capture", "files"),
        ("capture.chunk_mb=8", "capture", "host"),
        ("heal.tokens=65536", "heal", "flops"),
        ("evaluate.max_batches=1", "evaluate", "flops"),
        ("evaluate.batch_size=64", "evaluate", "host"),
        ("moe.budget.by=kl", "budget", "flops"),
        ("convert.max_shard_size=1MB", "convert", "files"),
        ("data.tokens.shifted=65536", "tokens", "bytes"),
        ("model.embedded.max_steps=10", "dense", "flops"),
    ],
)
def test_what_a_setting_costs_is_in_the_plan(project: Path, setting: str, stage: str, what: str):
    before, after = (make(*wide(*more), ROOMY).costs for more in ([], [setting]))
    assert getattr(before[stage], what) != getattr(after[stage], what)
    lower = ("false", "stream", "max_batches", "max_steps")
    assert (getattr(after[stage], what) < getattr(before[stage], what)) == any(
        word in setting for word in lower
    )


def test_a_conversion_that_pads_to_the_widest_layer_is_planned_for_as_if_all_were_so(
    project: Path,
):
    unlike = ["moe.d_ff_expert=0.25", "moe.per_layer=[{layers: [0], d_ff_expert: 1.0}]"]
    padded, alike, apart = (
        make(*wide(*more), ROOMY).costs["convert"]
        for more in (["moe.host=mixtral", *unlike], ["moe.d_ff_expert=1.0"], unlike)
    )
    assert padded == alike
    assert padded.bytes > apart.bytes and padded.host > apart.host


def test_on_a_gpu_the_models_lie_there(project: Path):
    cfg, record = wide("heal.tokens=65536")
    here, there = (make(cfg, record, replace(ROOMY, gpu=gpu)).costs for gpu in (None, 8 * 10**10))
    for stage in ("dense", "capture", "train", "heal", "evaluate"):
        assert here[stage].gpu == 0 < there[stage].gpu
        assert there[stage].host < here[stage].host


def test_every_lever_lowers_what_is_lacking_by_its_number(project: Path):
    cfg, record = wide()
    free = Free(disk=2 * 10**9, files=1000, memory=10**12, gpu=None)
    found = make(cfg, record, free)
    assert [text.split(":")[0] for text in found.lacking()] == ["disk", "files"]
    offers = levers(cfg, record, found)
    assert offers[0].startswith("data.tokens.train=") and "which fits" in offers[0]
    tokens = int(offers[0].partition("=")[2].partition(" ")[0])
    fits = make(*wide(f"data.tokens.train={tokens}"), free)
    assert not fits.lacking()
    more = f"data.tokens.train={tokens + cfg.train.batch_size}"
    assert make(*wide(more), free).lacking()
    assert any(text.startswith("capture.store=input (disk ") for text in offers)
    assert any(text.startswith("model.layers=[0,1] (disk ") for text in offers)


def test_memory_has_levers_of_its_own(project: Path):
    cfg, record = wide("train.batch_size=65536")
    found = make(cfg, record, replace(ROOMY, memory=2_500_000_000))
    assert any("memory of train" in text for text in found.lacking())
    offers = levers(cfg, record, found)
    assert any(text.startswith("train.stream=true (train ") for text in offers)
    assert any(text.startswith("train.batch_size=512 (train ") for text in offers)


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *arguments])
    return int(ended.value.code or 0)


def test_plan_ends_with_0_and_a_verdict_where_it_fits(
    project: Path, capsys: pytest.CaptureFixture[str]
):
    assert call("experiment=pico") == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1].startswith("It fits: ")
    for stage in OUTPUTS:
        assert f" {stage} " in said


def test_plan_ends_with_4_and_levers_where_it_does_not(
    project: Path, capsys: pytest.CaptureFixture[str]
):
    assert call("experiment=pico", "data.tokens.train=100000000000000") == 4
    told = capsys.readouterr()
    assert "needed" in told.out and "It fits" not in told.out
    assert "error: This does not fit the machine." in told.err
    assert "disk: " in told.err and "capture.store=input (disk " in told.err


def test_plan_prints_only_json_when_asked(project: Path, capsys: pytest.CaptureFixture[str]):
    assert call("--json", "experiment=pico") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["stages"].keys() == OUTPUTS.keys()
    assert found["need"]["disk"] > sum(c["bytes"] for c in found["stages"].values())
    assert {c["seconds"] for c in found["stages"].values()} == {None}
    assert call("--json", "--measure", "experiment=pico") == 0
    found = json.loads(capsys.readouterr().out)
    assert all(c["seconds"] > 0 for c in found["stages"].values())


def test_plan_refuses_what_budget_would(project: Path, capsys: pytest.CaptureFixture[str]):
    assert call("moe.init=slice", "moe.d_ff_expert=300") == 2
    assert "does not divide" in capsys.readouterr().err


def test_plan_imports_neither_torch_nor_transformers(project: Path):
    code = (
        "import sys; from pipeline import plan; plan.main(['experiment=pico'], False, False); "
        "print(sorted({'torch', 'transformers', 'zarr'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_measured_times_of_another_version_are_left_out(
    project: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = project / ".scratch" / measured.FOLDER
    folder.mkdir(parents=True)
    monkeypatch.setattr(workdir, "computed", {"train-layer_1": 12.5})
    measured.note(compose.load(["experiment=pico"]))
    kept = json.loads((folder / "train-layer_1.json").read_text())
    kept["configuration"]["train"]["gone"] = 1
    (folder / "dense.json").write_text(json.dumps(kept))
    (folder / "heal.json").write_text("{")
    found = measured.read(project / ".scratch")
    assert found.keys() == {"train-layer_1"} and found["train-layer_1"][0] == 12.5
    assert found["train-layer_1"][1] == compose.load(["experiment=pico"])


def test_a_time_that_cannot_be_kept_fails_no_stage(project: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workdir, "computed", {"train-layer_1": 12.5})
    (project / ".scratch").mkdir()
    (project / ".scratch" / measured.FOLDER).write_text("")  # no folder
    measured.note(compose.load(["experiment=pico"]))
    assert measured.read(project / ".scratch") == {}


@pytest.mark.parametrize(
    ("stage", "asked"), [("heal", "heal.tokens=20000"), ("budget", "moe.budget.by=kl")]
)
def test_a_stage_that_had_nothing_to_compute_lends_no_time(
    project: Path, monkeypatch: pytest.MonkeyPatch, stage: str, asked: str
):
    monkeypatch.setattr(workdir, "computed", {stage: 0.05})
    measured.note(wide()[0])
    assert make(*wide(), ROOMY).seconds.keys() == {stage}
    assert make(*wide(asked), ROOMY).seconds == {}


def test_only_what_was_computed_from_its_beginning_is_measured(project: Path):
    killed = True

    def compute(folder: Path) -> None:
        (folder / "half").write_text("")
        if killed:
            raise InputError("no", rule="", remedy="")

    def produce(**settings: int) -> None:
        workdir.produce(
            Path("stages/dense"),
            module="pipeline.stages.dense",
            settings=settings,
            inputs={},
            compute=compute,
            lock_wait_s=1,
        )

    workdir.computed.pop("dense", None)
    with pytest.raises(InputError):
        produce()
    killed = False
    produce()
    assert "dense" not in workdir.computed
    produce(other=1)
    assert workdir.computed.pop("dense") > 0
