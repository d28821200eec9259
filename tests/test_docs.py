"""What the documents show is run, as it stands: commands, and the example in Python."""

import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import test_faq
import warm
from small import PROJECT, TEXT, SmallCheckout, write_dense

from pipeline import refusals
from pipeline.__main__ import TOOLS, main
from pipeline.planned import OUTPUTS


def fenced(document: str, language: str) -> list[str]:
    """The blocks of that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document, re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_the_eight_steps_run_as_they_stand(project: Path, monkeypatch, capsys):
    """But for where the dense model and the text come from."""
    write_dense(project / "dense")
    parts = [part for part in re.split(r"(?=\bclass |\bdef )", TEXT) if part.strip()]
    import datasets

    dataset = datasets.Dataset.from_dict({"text": parts * 3})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: dataset)
    document = (PROJECT / "docs" / "example.md").read_text()
    steps = fenced(document, "python")
    assert len(steps) == 8
    code = "\n".join(steps).replace('"HuggingFaceTB/SmolLM2-135M"', '"dense"')
    names: dict = {}
    exec(compile(code, "docs/example.md", "exec"), names)
    results, sparse = names["results"], names["sparse_model"]
    assert results.keys() == {0, 1}
    assert all(layer["mse"] > 0 and -1 <= layer["cosine_sim"] <= 1 for layer in results.values())
    assert {layer["verdict"] for layer in results.values()} <= {"good", "below target"}
    assert names["outputs"].logits.shape[-1] == 320
    assert "layer.safetensors" in capsys.readouterr().out
    kinds = {type(layer.mlp).__name__ for layer in sparse.model.layers}
    assert kinds == {"SparseMoE"}
    (command,) = fenced(document, "sh")
    words = shlex.split(command.replace("HuggingFaceTB/SmolLM2-135M", "dense"))
    monkeypatch.setattr(sys, "argv", words[2:])
    with pytest.raises(SystemExit) as left:
        runpy.run_module(words[2], run_name="__main__")
    assert left.value.code == 0
    assert (project / "sparse" / "config.json").is_file()


def test_every_setting_that_the_table_names_is_one(project: Path):
    """And every parameter of the original is in it."""
    from pipeline import compose
    from pipeline.config import leaves

    document = (PROJECT / "docs" / "from-the-original.md").read_text()
    known = set(leaves(compose.load([])))
    named = set(re.findall(r"`((?:moe|train|data|model|runtime|convert)\.[a-z_.]+)", document))
    assert named - known == {"convert.dense", "convert.layers", "convert.output"} - known
    moe = "n_experts moe_top_k moe_capacity_factor moe_routing d_ff_expert init_from_dense"
    training = "learning_rate use_cosine_loss cosine_loss_weight sequential_layers"
    dynamic = "dynamic_experts reallocate_every_n_steps growth_factor shrink_factor"
    original = f"{moe} {training} {dynamic} min_d_ff max_d_ff".split()
    assert [name for name in original if f"`{name}`" not in document] == []


def test_the_documents_command_lines_are_ones_that_parse():
    """Those that the end-to-end tests run at pico size."""
    document = (PROJECT / "docs" / "from-the-original.md").read_text()
    lines = [line for block in fenced(document, "") for line in block.splitlines()]
    assert [shlex.split(line)[:3] for line in lines] == [
        ["python", "-m", "pipeline"],
        ["dvc", "exp", "run"],
        ["dvc", "exp", "run"],
        ["dvc", "exp", "run"],
    ]


# The figures


def test_the_tutorials_plan_is_the_one_that_is_printed(project: Path, capsys):
    """From the sizes of SmolLM2-135M, at the defaults of `conf/`."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    sizes |= {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}
    form = {
        "model_type": "llama",
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (project / "smollm2").mkdir()
    (project / "smollm2" / "config.json").write_text(json.dumps(sizes | form))
    there = ["model=smollm2-135m", "data=wikitext2", f"model.id={project / 'smollm2'}"]
    with pytest.raises(SystemExit) as left:
        main(["plan", *there, "runtime.device=cpu"])
    assert left.value.code in (0, 4)  # 4 where there is no room for 54 GB
    lines = capsys.readouterr().out.splitlines()
    printed = [re.split(r" *[│┃] *", line.strip())[1:7] for line in lines]
    document = (PROJECT / "docs" / "tutorial.md").read_text()
    rows = re.findall(rf"^\| ((?:{'|'.join(OUTPUTS)}) \|.*) \|$", document, re.MULTILINE)
    assert len(rows) == 5
    for row in rows:
        cells = re.split(r" *\| *", row.removesuffix("|").strip())
        assert [*cells, ""][:6] in printed, row


# The commands


RUN = ("README.md", "docs/tutorial.md", "docs/loaders.md", "CONTRIBUTING.md", "docs/faq.md")
RUN += ("docs/reliability.md", "docs/sweeps.md")
DOCUMENTS = (*RUN, "docs/example.md")
"""What tells a user what to type; the example is run above."""

NOT_RUN = re.compile(r"<!-- not run: (.*?) -->\n*$")
REASONS = {
    "needs the network",
    "needs a GPU",
    "needs a cluster",
    "needs the hub and an account",
    "takes hours",
    "is what runs this",
    "the capture is there already",
    "takes away what other pages read",
}
COMMAND = re.compile(r"(python -m|dvc|make|lm_eval|pip|git) ")
QUEUE = "dvc queue start"
OUTPUT_ONLY = ("text", "yaml")
TREE = re.DOTALL | re.MULTILINE


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, and why it is not run, if it is not."""

    language: str
    code: str
    left_out: str | None

    @classmethod
    def all_of(cls, name: str) -> "list[Block]":
        text, found, end = (PROJECT / name).read_text(), [], 0
        for fence in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            marked = NOT_RUN.search(text[end : fence.start()])
            found.append(cls(fence[1], fence[2], marked and marked[1]))
            end = fence.end()
        assert text.count("<!-- not run") == sum(block.left_out is not None for block in found)
        return found


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallCheckout]:
    """With a finished demo, made by the README's own command."""
    folder = tmp_path_factory.mktemp("documents")
    with warm.python(folder / "bin") as python:
        made = SmallCheckout(folder / "checkout", python)
        made.run("make demo && git add --all && git commit -q -m demo")
        yield made


@pytest.mark.slow
@pytest.mark.parametrize(("heading", "command"), test_faq.IN_A_CHECKOUT.items())
def test_the_message_of_the_faq_is_what_the_command_says(
    checkout: SmallCheckout, heading: str, command: str
):
    output = checkout.run(command, expect=test_faq.entries()[heading])
    assert f"error: {heading}\n" in output and "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_every_command_of_the_document_runs_as_it_stands(checkout: SmallCheckout, name: str):
    """In one shell per block, in order, at pico size; see `small.py` for what stands in."""
    start = checkout.run("git rev-parse HEAD").strip()
    for block in Block.all_of(name):
        if block.left_out is not None or block.language not in ("sh", "python"):
            continue
        if QUEUE in block.code and block.code in checkout.queued:
            continue  # the same experiments, of another document: they lie there
        code = block.code
        if block.language == "python":
            code = f"python - <<'END'\n{code}\nEND"
        checkout.run(code)
        if QUEUE in code:
            checkout.wait_for_queue()
            checkout.queued.add(code)
    checkout.run(f"git reset -q --hard {start} && git clean -fdq && dvc checkout -q --force")


def test_the_blocks_that_are_not_run_are_few_and_say_why():
    blocks = [block for name in DOCUMENTS for block in Block.all_of(name)]
    left_out = [block for block in blocks if block.left_out is not None]
    assert {block.left_out for block in left_out} <= REASONS
    assert 0 < len(left_out) <= 8
    assert len([b for b in blocks if b.language == "sh" and b.left_out is None]) > 20


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_stand_only_in_blocks_that_are_run(name: str):
    for block in Block.all_of(name):
        assert block.language in ("sh", "python", *OUTPUT_ONLY), block.code
        if block.language in OUTPUT_ONLY:
            assert not any(COMMAND.match(line) for line in block.code.splitlines()), block.code


@pytest.mark.parametrize("name", [*DOCUMENTS, "docs/design.md", "docs/configuration.md"])
def test_commands_within_sentences_name_tools_stages_targets_and_settings_that_exist(name: str):
    text = re.sub(r"^```.*?^```$", "", (PROJECT / name).read_text(), flags=re.DOTALL | re.MULTILINE)
    targets = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE))
    stages = {path.stem for path in (PROJECT / "pipeline" / "stages").glob("[a-z]*.py")}
    known = {
        *refusals.kinds(),
        *refusals.groups(PROJECT / "conf"),
        "layer",
        "shards",
        "hydra/launcher",
    }
    for command in re.findall(r"`([^`\n]+)`", text):
        words = command.split()
        if words[0] == "make" and len(words) == 2:
            assert words[1] in targets, command
        elif words[:2] == ["python", "-m"] and words[2:]:
            module, _, stage = words[2].partition(".stages")
            assert module in ("pipeline", "pytest", "benchmarks", "pipeline.reference"), command
            if stage:
                assert stage in (*(f".{name}" for name in stages), ".<stage>"), command
            elif module == "pipeline" and words[3:]:
                assert words[3] in (*TOOLS, "<tool>"), command
        elif words[:2] != ["dvc", "exp"]:
            continue
        for word in words:
            key, equals, _ = word.strip("'").partition("=")
            if equals and not key.startswith("-") and "<" not in key and key != "key":
                assert key in known, command


def test_every_module_stands_once_in_the_tour():
    tree = re.search(r"^pipeline/\n(.*?)^```$", (PROJECT / "CONTRIBUTING.md").read_text(), TREE)
    assert tree
    named = re.findall(r"(?<![\w/])(\w+\.py|[a-z]+/)(?= |$)", tree[1], re.MULTILINE)
    here = (PROJECT / "pipeline").iterdir()
    there = {f"{p.name}/" if p.is_dir() else p.name for p in here if p.suffix != ".egg-info"}
    assert sorted(named) == sorted(there - {"__init__.py", "__pycache__/", "templates/"})
