"""The DAG as a user runs it, with the real dvc, on two layers of width 32."""

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

PROJECT = Path(__file__).parent.parent
TRACKED = ("pipeline", "conf", "stages/README.md", "dvc.yaml", "params.yaml", ".dvc/config")
TRACKED += (".dvc/plots", ".dvc/.gitignore", ".dvcignore", ".gitignore", "pyproject.toml")
TRACKED += ("reports/README.md",)

pytestmark = pytest.mark.slow


class Checkout:
    """A repository of its own with the pico experiment chosen in conf/."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in TRACKED:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (PROJECT / name).is_dir() else shutil.copy
            copy(PROJECT / name, root / name)
        self.edit("conf/config.yaml", "experiment: null", "experiment: pico")
        self.run("python -m pipeline compose")
        self.run("git init -q -b main")
        self.commit()

    def run(self, command: str, expect: int = 0) -> str:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("DVC_")}
        names = {
            f"GIT_{who}_{what}": "a@b"
            for who in ("AUTHOR", "COMMITTER")
            for what in ("NAME", "EMAIL")
        }
        path = f"{Path(sys.executable).parent}:{inherited['PATH']}"
        done = subprocess.run(
            command,
            shell=True,
            cwd=self.root,
            env=inherited | names | {"PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == expect, f"{command}: exit {done.returncode}\n{done.stdout}"
        return done.stdout

    def commit(self) -> None:
        self.run("git add -A && git commit -q -m state")

    def edit(self, name: str, old: str, new: str) -> None:
        text = (self.root / name).read_text()
        assert old in text
        (self.root / name).write_text(text.replace(old, new))

    def json(self, name: str) -> dict:
        return json.loads((self.root / name).read_text())


def stages_run(output: str) -> set[str]:
    lines = (line for line in output.splitlines() if line.startswith("Running stage "))
    return {line.split("'")[1] for line in lines}


ALL = {
    "config",
    "dense",
    "tokens",
    "capture",
    "budget",
    "train@0",
    "train@1",
    "heal",
    "convert",
    "evaluate",
}
AFTER_MOE = {"config", "budget", "train@0", "train@1", "heal", "convert", "evaluate"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    made = Checkout(tmp_path_factory.mktemp("checkout"))
    assert stages_run(made.run("dvc repro")) == ALL
    made.commit()
    return made


def test_a_second_repro_runs_nothing(checkout: Checkout):
    assert stages_run(checkout.run("dvc repro")) == set()


def test_metrics_have_every_promised_name(checkout: Checkout):
    metrics = checkout.json("reports/metrics.json")
    for part in ("dense", "sparse"):
        assert metrics[part]["perplexity"].keys() == {"heldout", "shifted"}
    assert metrics["perplexity_ratio"].keys() == {"heldout", "shifted"}
    assert metrics["kl"].keys() >= {"mean", "p99"}
    assert metrics["sparse"]["parameters"].keys() >= {"total", "active"}
    assert metrics["active_ffn_fraction"] == 0.5
    for layer in ("0", "1"):
        assert metrics["layers"][layer].keys() >= {"mse", "cosine_sim", "relative_mse"}
    assert {"top1_agreement", "active_flops_fraction"} <= metrics.keys()
    header = checkout.run("dvc metrics show").splitlines()[0].split()
    assert {"perplexity_ratio.heldout", "active_ffn_fraction", "kl.mean"} <= set(header)
    assert len(header) <= 16 and not any(".layers." in name for name in header)


def test_plots_have_their_titles_axes_and_a_line_for_each_control(checkout: Checkout):
    specs = json.loads(checkout.run("dvc plots show --json"))["data"]
    titles = ("Error of each layer", "Cosine of each layer", "Training of each", "Load of each")
    assert [name.startswith(title) for name, title in zip(specs, titles, strict=True)] == [True] * 4
    error, _, training, load = (json.dumps(spec) for spec in specs.values())
    assert "static_relative_mse" in error and "oracle_relative_mse" in error
    assert "relative_mse on held-out rows" in error and '"load"' in load
    assert "relative_mse on validation rows" in training and '"title": "step"' in training


def test_a_push_that_is_refused_leaves_the_result_and_is_no_part_of_it(checkout: Checkout):
    """Tests run with HF_HUB_OFFLINE=1."""
    command = "python -m pipeline.stages.evaluate evaluate.push_to_hub=owner/sparse"
    output = checkout.run(command, expect=4)
    assert "stages/evaluate: found complete" in output and "only the push is repeated" in output
    assert stages_run(checkout.run("dvc repro")) == set()


def test_the_checkpoint_opens_in_a_fresh_process_and_generates(checkout: Checkout):
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained('stages/convert')\n"
        "tokenizer = AutoTokenizer.from_pretrained('stages/convert')\n"
        "ids = tokenizer('Return the', return_tensors='pt').input_ids\n"
        "out = model.generate(ids, max_new_tokens=5, do_sample=False)\n"
        "print(type(model).__name__, out.shape[1] - ids.shape[1])\n"
    )
    (checkout.root.parent / "open.py").write_text(code)
    # From a copy, in a folder where our package cannot be imported.
    shutil.copytree(checkout.root / "stages/convert", checkout.root.parent / "stages/convert")
    done = subprocess.run(
        [sys.executable, "-I", "open.py"],
        cwd=checkout.root.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[0] == "MixtralForCausalLM"


def test_an_experiment_reuses_dense_tokens_and_capture(checkout: Checkout):
    output = checkout.run("dvc exp run -n wide -S moe.n_experts=32 -S evaluate.measure_speed=true")
    assert stages_run(output) == AFTER_MOE
    assert checkout.json("stages/convert/config.json")["num_local_experts"] == 32
    shown = checkout.run("dvc exp show --csv --only-changed")
    header, *rows = csv.DictReader(shown.splitlines()), *csv.DictReader(shown.splitlines())
    assert {"perplexity_ratio.heldout", "speed.prefill_16"} <= set(header.fieldnames)
    assert checkout.json("stages/evaluate/speed.json")["work"]["decode"]["ratio"] > 0
    experts = {row["Experiment"] or row["rev"]: row["moe.n_experts"] for row in rows}
    assert {experts["main"], experts["wide"]} == {"4", "32"}
    checkout.run("git checkout -q . && dvc checkout")
    assert checkout.json("stages/convert/config.json")["num_local_experts"] == 4


def test_layers_fitted_ahead_at_once_are_adopted(checkout: Checkout):
    prefill = "python -m pipeline prefill -m layer=0,1 hydra/launcher=joblib"
    output = checkout.run(f"{prefill} moe.n_experts=8")
    assert "layer 0: complete in" in output and "layer 1: complete in" in output
    output = checkout.run("dvc exp run -S moe.n_experts=8 train@0 train@1")
    assert output.count("stages/train/layer_0: found complete") == 1
    assert output.count("stages/train/layer_1: found complete") == 1
    checkout.run("git checkout -q . && dvc checkout")


def test_windows_are_fitted_by_prefill_and_adopted(checkout: Checkout):
    """Layer 1 behind the sparse layer 0; alone it is refused, and behind another it is stale."""
    refused = checkout.run("dvc exp run -S train.window=1 train@1", expect=255)
    assert "python -m pipeline prefill" in refused
    output = checkout.run("python -m pipeline prefill train.window=1")
    assert "layer 0: complete in" in output and "layer 1: complete in" in output
    assert not (checkout.root / ".scratch/windows").exists()
    output = checkout.run("dvc exp run -S train.window=1")
    assert output.count("found complete") == 2 and "evaluate" in stages_run(output)
    assert checkout.json("stages/train/layer_1/config.json")["behind"].keys() == {"0"}
    assert "behind" not in checkout.json("stages/train/layer_0/config.json")
    other = "-S 'moe.per_layer=[{layers:[0],n_experts:8}]'"
    output = checkout.run(f"dvc exp run -S train.window=1 {other}", expect=255)
    assert "python -m pipeline prefill" in output
    checkout.run("git checkout -q . && dvc checkout")


def originals_lines() -> list[str]:
    """The original's command lines as docs/from-the-original.md gives them, at pico size."""
    document = (PROJECT / "docs" / "from-the-original.md").read_text()
    blocks = re.findall(r"^```\n(.*?)^```$", document, re.DOTALL | re.MULTILINE)
    smaller = {
        r"experiment=(\w+)": r"'experiment=[\1,pico]'",
        "layer=0,1,2,3": "layer=0,1",
        # Of four experts a random router may leave two without a token, which stops a layer.
        "every_n_steps=500": "every_n_steps=4 -S moe.dynamic.min_d_ff=8 -S moe.router_init=ridge",
    }
    lines = "".join(blocks)
    for there, here in smaller.items():
        assert re.search(there, lines)
        lines = re.sub(there, here, lines)
    return lines.splitlines()


PARALLEL, STANDARD, SEQUENTIAL, DYNAMIC = range(4)


def test_the_originals_standard_and_parallel_lines_run(checkout: Checkout):
    lines = originals_lines()
    ahead = checkout.run(lines[PARALLEL])
    assert "layer 0: complete in" in ahead and "layer 1: complete in" in ahead
    output = checkout.run(lines[STANDARD])
    assert "train/layer_0: found complete" in output and "train/layer_1: found complete" in output
    record = checkout.json("stages/train/layer_0/config.json")
    assert record["host"] == "mixtral" and record["training"]["steps"] > 0
    ran = stages_run(checkout.run(lines[SEQUENTIAL]))
    assert {"train@0", "train@1", "convert", "evaluate"} <= ran <= AFTER_MOE
    checkout.run("git checkout -q . && dvc checkout")


def test_the_originals_dynamic_line_runs_and_its_sizes_are_reported(checkout: Checkout):
    checkout.run(originals_lines()[DYNAMIC])
    for layer in (0, 1):
        record = checkout.json(f"stages/train/layer_{layer}/config.json")
        sizes = [entry["widths"] for entry in record["training"]["sizes"]]
        assert len({tuple(widths) for widths in sizes}) > 1
        assert {sum(widths) for widths in sizes} == {sum(sizes[0])}
    page = (checkout.root / "stages/evaluate/report.html").read_text()
    assert "Expert sizes" in page
    assert checkout.json("stages/convert/config.json")["model_type"] == "mixtral"
    checkout.run("git checkout -q . && dvc checkout")


OPEN_ELSEWHERE = """
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("convert", trust_remote_code=True)
try:
    AutoModelForCausalLM.from_pretrained("convert", trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
model = AutoModelForCausalLM.from_pretrained("convert", trust_remote_code=True)
ids = tokenizer("Return the", return_tensors="pt").input_ids
out = model.generate(ids, max_new_tokens=5, do_sample=False)
print(type(model).__name__, out.shape[1] - ids.shape[1])
"""


def test_what_no_native_architecture_holds_comes_with_our_modelling_file(
    checkout: Checkout, tmp_path: Path
):
    """Experts that choose, an MLP router, and a layer that differs, in one checkpoint."""
    options = "-S moe.routing=expert_choice -S moe.router=mlp "
    options += "-S 'moe.per_layer=[{layers:[1],n_experts:8}]' -S evaluate.max_batches=3"
    output = checkout.run(f"dvc exp run {options}")
    assert "token_choice is recommended" in output and "trust_remote_code" in output
    metrics = checkout.json("reports/metrics.json")["layers"]
    assert [len(metrics[k]["routing"]["load"]) for k in ("0", "1")] == [4, 8]
    assert all(0 < metrics[k]["routing"]["unserved_tokens"] < 1 for k in ("0", "1"))
    shutil.copytree(checkout.root / "stages/convert", tmp_path / "convert")
    (tmp_path / "open.py").write_text(OPEN_ELSEWHERE)
    done = subprocess.run(
        [sys.executable, "-I", "open.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "SparseDistilledForCausalLM"
    checkout.run("git checkout -q . && dvc checkout")


def test_the_evaluation_harness_gives_our_perplexity_of_what_was_converted(checkout: Checkout):
    """By the lines of docs/loaders.md, without a network."""
    document = (PROJECT / "docs" / "loaders.md").read_text()
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", document, re.DOTALL | re.MULTILINE)
    (line,) = re.findall(r"^HF_HUB_OFFLINE=1 lm_eval .*$", document, re.MULTILINE)
    checkout.run(f"python - <<'END'\n{snippet}\nEND")
    line = line.replace("docs/lm_eval", str(PROJECT / "docs" / "lm_eval"))
    output = checkout.run(line.replace("lm_eval ", "python -m lm_eval ", 1))
    (found,) = re.findall(r"byte_perplexity\|↓ *\|([\d.]+)", output)
    where = checkout.root / "stages/convert"
    tokenizer = AutoTokenizer.from_pretrained(where)
    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
    loss, size = 0.0, 0
    for text in (checkout.root / "heldout.jsonl").read_text().splitlines():
        text = json.loads(text)["text"]
        ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            logits = model(input_ids=ids[None, :-1]).logits[0]
        loss += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
        size += len(text.encode())
    assert float(found) == pytest.approx(math.exp(loss / size), rel=1e-4)
    (checkout.root / "heldout.jsonl").unlink()


def test_layers_are_not_fitted_ahead_to_activations_of_another_configuration(checkout: Checkout):
    output = checkout.run("python -m pipeline prefill layer=0 data.sequence_length=16", expect=5)
    assert "data.sequence_length: 32 there, 16 here" in output and "Traceback" not in output


def test_queued_experiments_run(checkout: Checkout):
    checkout.run("dvc exp run --queue -S 'moe.n_experts=8,16'")
    checkout.run("dvc queue start")
    for _ in range(150):
        status = checkout.run("dvc queue status")
        if "Queued" not in status and "Running" not in status:
            break
        time.sleep(2)
    assert status.count("Success") == 2, status
    assert "Failed" not in status


def test_an_edited_conf_is_refused_with_the_remedy(checkout: Checkout):
    checkout.edit("conf/moe/half.yaml", "init_noise: 0.01", "init_noise: 0.02")
    output = checkout.run("dvc repro", expect=255)
    assert "python -m pipeline compose" in output and "moe.init_noise" in output
    checkout.run("git checkout -q .")
    assert stages_run(checkout.run("dvc repro")) == set()


def test_every_artefact_verifies_also_in_a_moved_copy(checkout: Checkout, tmp_path: Path):
    assert "DAMAGED" not in checkout.run("python -m pipeline verify")
    shutil.copytree(checkout.root / "stages", tmp_path / "elsewhere")
    checkout.run(f"python -m pipeline verify {tmp_path / 'elsewhere'}")


def test_what_rots_on_the_disk_is_made_again_by_the_command_that_is_named(checkout: Checkout):
    """One bit, with the time and the mode that DVC trusts; its cache holds the same file."""
    path = checkout.root / "stages/train/layer_1/layer.safetensors"
    wanted, before = path.read_bytes(), path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(bytes([wanted[0] ^ 1]))
    path.chmod(before.st_mode & 0o777)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert stages_run(checkout.run("dvc repro")) == set()
    (command,) = re.findall(
        r"`(dvc repro -f -s [^`]*)`", checkout.run("python -m pipeline verify", expect=5)
    )[-1:]
    assert command == "dvc repro -f -s train@1"
    assert stages_run(checkout.run(command)) == {"train@1"}
    assert path.read_bytes() == wanted
    assert "DAMAGED" not in checkout.run("python -m pipeline verify")
    assert stages_run(checkout.run("dvc repro")) == set()


def test_conversion_alone_needs_only_three_paths(checkout: Checkout, tmp_path: Path):
    shutil.copytree(checkout.root / "stages/dense/model", tmp_path / "dense")
    shutil.copytree(checkout.root / "stages/train", tmp_path / "layers")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DVC_")}
    paths = ["convert.dense=dense", "convert.layers=layers", "convert.output=sparse"]
    subprocess.run(
        [sys.executable, "-m", "pipeline.stages.convert", *paths],
        cwd=tmp_path,
        env=environment,
        check=True,
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "layers", "sparse"]
    name = "model.safetensors"
    alone, inside = tmp_path / "sparse" / name, checkout.root / "stages/convert" / name
    assert alone.read_bytes() == inside.read_bytes()


def test_outs_are_what_the_stages_write(checkout: Checkout):
    locked = yaml.safe_load((checkout.root / "dvc.lock").read_text())["stages"]
    outs = {out["path"] for stage in locked.values() for out in stage["outs"]}
    assert all((checkout.root / out).exists() for out in outs)
    written = {
        p.relative_to(checkout.root)
        for folder in ("stages", "reports")
        for p in (checkout.root / folder).rglob("*")
        if p.is_file() and p.name != "README.md"
    }
    stray = [str(p) for p in written if not {str(p), *map(str, p.parents)} & outs]
    assert stray == []


@pytest.mark.parametrize(
    ("command", "code", "named"),
    [
        ("pipeline.stages.train --layer 0 moe.n_expert=8", 2, "did you mean moe.n_experts?"),
        ("pipeline.stages.budget moe.n_experts=4 moe.top_k=5", 2, "moe.top_k <= moe.n_experts"),
        ("pipeline.stages.budget moe.d_ff_expert=0.3", 2, "moe.d_ff_expert=19"),
        ("pipeline.stages.budget model.layers=[0,7]", 3, "the model has 2 layers: 0 to 1"),
        (
            "pipeline.stages.dense model=pretrained model.id=nowhere/none model.layers=[0]",
            3,
            "nowhere/none",
        ),
        ("pipeline.stages.tokens data=files data.files=[empty.txt]", 3, "every row is blank"),
        ("pipeline.stages.tokens data=files data.files=[none.txt]", 3, "no such file"),
        ("pipeline.stages.train --layer 5", 2, "Layer 5 is not converted"),
    ],
)
def test_a_mistake_ends_with_its_exit_code_and_names_the_rule(
    checkout: Checkout, command: str, code: int, named: str
):
    (checkout.root / "empty.txt").write_text("\n\n  \n")
    before = stamps(checkout.root / "stages")
    output = checkout.run(f"python -m {command}", expect=code)
    assert named in output and "remedy:" in output and "Traceback" not in output
    assert stamps(checkout.root / "stages") == before


def stamps(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
