"""Every heading of `docs/faq.md` is the first line of a message that is provoked here."""

import errno
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from small import write_dense
from test_start import dense_ffn, write_store
from test_training import fit

from pipeline import (
    artifacts,
    budget,
    command,
    compose,
    corpus,
    dense,
    documents,
    durable,
    lineage,
    locks,
    objects,
    prefill,
    preflight,
    pretrained,
    record,
    runtime,
    store,
    workdir,
)
from pipeline.config import Device, RuntimeConfig, select
from pipeline.errors import PipelineError
from pipeline.prefill import launch, ledger, outcome
from pipeline.prefill.units import Unit
from pipeline.stages import DENSE, TOKENS
from pipeline.stages import config as config_stage

FAQ = (Path(__file__).parent.parent / "docs" / "faq.md").read_text()
Provocation = Callable[[Path, pytest.MonkeyPatch], object]


def entries() -> dict[str, int]:
    """Heading -> the exit code of its section."""
    found, code = {}, 0
    for level, text in re.findall(r"^(##+) (.*)$", FAQ, re.MULTILINE):
        if level == "##":
            code = int(text.split(":")[0])
        else:
            found[text] = code
    return found


def overrides(*given: str) -> Provocation:
    return lambda project, patch: compose.load(list(given))


def plan(*given: str) -> Provocation:
    """What `budget` says of one layer of width 64."""
    layer = {"index": 0, "d_ff": 64, "gated": True, "activation": "silu", "bias": False}
    described = {"family": "llama", "d_model": 32, "n_layers": 1, "layers": [layer]}
    described["config"] = {"attention_bias": False}
    return lambda project, patch: budget.uniform(described, compose.load(list(given)).moe, [0])


def edited_conf(project: Path, patch: pytest.MonkeyPatch) -> None:
    entry = project / "conf" / "train" / "default.yaml"
    entry.write_text(entry.read_text().replace("epochs: 3", "epochs: 4"))
    config_stage.run(compose.load([]))


def sparse_already(project: Path, patch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    tf.MixtralForCausalLM(tf.MixtralConfig(**sizes, **heads)).save_pretrained(project / "m")
    dense.inspect(str(project / "m"))


def data_file(text: str, column: str = "text") -> Provocation:
    def provoke(project: Path, patch: pytest.MonkeyPatch) -> None:
        (project / "rows.jsonl").write_text(text)
        list(documents.file_documents([str(project / "rows.jsonl")], column))

    return provoke


def too_little(project: Path, patch: pytest.MonkeyPatch) -> None:
    write_dense(project / "dense")
    short = [documents.Document("a", "word")]
    corpus.pack(pretrained.load_tokenizer(str(project / "dense")), short, 512, name="validation")


def fitted(**changed: object) -> Provocation:
    def provoke(project: Path, patch: pytest.MonkeyPatch) -> None:
        ffn = dense_ffn()
        fit((ffn, write_store(project / "layer_3.zarr", ffn)), project / "fit", **changed)

    return provoke


def no_gpu(project: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: False)
    runtime.pick_device(RuntimeConfig(device=Device.cuda))


def locked(project: Path, patch: pytest.MonkeyPatch) -> None:
    path = Path(".scratch/locks/train-layer_0")
    with locks.lock(path, 0), locks.lock(path, 0):
        pass


def not_installed(project: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(launch, "find_spec", lambda name: None)
    prefill.main(["layer=0", "hydra/launcher=ray"], True)


def no_slurm(project: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("PATH", "")
    prefill.main(["layer=0", "hydra/launcher=submitit_slurm"], True)


def units_that(begun: bool, timed_out: bool = False) -> Provocation:
    """What a call says of a unit that has not ended."""

    def provoke(project: Path, patch: pytest.MonkeyPatch) -> None:
        unit = Unit("layer_0-0", "layer", "0", (), {})
        ledger.record([unit])
        if begun:
            ledger.begin(unit, None)
        outcome.conclude([ledger.look(unit)], timed_out, "joblib")

    return provoke


def lost(out: Path, error: Exception) -> Provocation:
    """A stage in which that happens."""

    def compute(folder: Path) -> None:
        raise error

    return lambda project, patch: workdir.produce(
        out, module="pipeline.stages.train", settings={}, inputs={}, compute=compute, lock_wait_s=0
    )


def damaged(project: Path, patch: pytest.MonkeyPatch) -> None:
    (project / "made").mkdir()
    (project / "made" / "file").write_text("one")
    artifacts.write_manifest(project / "made", {})
    (project / "made" / "file").write_text("two")
    artifacts.verify(project / "made")


def damaged_store(project: Path, patch: pytest.MonkeyPatch) -> None:
    reader = write_store(project / "layer_0.zarr", dense_ffn())
    shard = project / "layer_0.zarr" / "train" / "input" / "c.0.0"
    shard.write_bytes(shard.read_bytes()[:-1])
    reader.read("train")


def changed_model(project: Path, patch: pytest.MonkeyPatch) -> None:
    (project / "model").mkdir()
    (project / "model" / "config.json").write_text("{}")
    DENSE.mkdir(parents=True)
    digests = {"config.json": "0" * 64}
    durable.write_json(DENSE / "dense.json", {"digests": digests, "revision": None})
    artifacts.write_manifest(DENSE, {})
    cfg = compose.load(["model=pretrained", f"model.id={project / 'model'}", "model.layers=[0]"])
    record.source(cfg.model, DENSE)


def shards_elsewhere(project: Path, patch: pytest.MonkeyPatch) -> None:
    write_store(project / "layer_0.zarr", dense_ffn())
    durable.write_json(project / "layer_0.zarr" / "shards.json", {"below": "print/layer_0.zarr"})
    store.digest(project / "layer_0.zarr")
    store.LayerReader(project / "layer_0.zarr")


def no_server(project: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(objects, "RETRY", {"max_retries": 0})
    for name, value in {"ENDPOINT_URL": "http://127.0.0.1:9", "ALLOW_HTTP": "true"}.items():
        patch.setenv(f"AWS_{name}", value)
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        patch.setenv(f"AWS_{name}", "x")
    objects.Objects("s3://bucket", "print/layer_0.zarr").sizes()


def other_settings(project: Path, patch: pytest.MonkeyPatch) -> None:
    TOKENS.mkdir(parents=True)
    artifacts.write_manifest(TOKENS, {"settings": select(compose.load([]), ["data"])})
    lineage.check(compose.load(["data.sequence_length=16"]), [TOKENS])


def behind_another(project: Path, patch: pytest.MonkeyPatch) -> None:
    for k, behind in ((0, {}), (1, {"0": "0" * 64})):
        folder = project / f"layer_{k}"
        folder.mkdir()
        (folder / record.WEIGHTS).write_bytes(b"")
        artifacts.write_sealed(folder / record.CONFIG, {"behind": behind})
    record.check_behind({k: project / f"layer_{k}" for k in (0, 1)})


PROVOKED: dict[str, Provocation] = {
    "There is no setting named train.epoch.": overrides("train.epoch=3"),
    "No such choice: model=tinny.": overrides("model=tinny"),
    "train.epochs does not take this value.": overrides("train.epochs=many"),
    "train.epochs is out of range.": overrides("train.epochs=-1"),
    "A setting has no value.": overrides("model=pretrained"),
    "moe.n_experts takes one value here.": overrides("moe.n_experts=8,16"),
    "params.yaml is not what conf/ composes to.": edited_conf,
    "More experts per token than there are experts.": overrides("moe.top_k=5"),
    "moe.d_ff_expert gives no expert width: 0.3 x 64 = 19.2 is not a whole width.": plan(
        "moe.d_ff_expert=0.3"
    ),
    "The groups of dense neurons do not share out evenly among the experts.": plan(
        "moe.init=slice", "moe.n_experts=6", "moe.d_ff_expert=0.25"
    ),
    "No architecture can hold this conversion.": plan("moe.router=mlp", "moe.host=mixtral"),
    "Remote code is asked for without saying which.": lambda project, patch: dense.load_model(
        "some/model", trust_remote_code=True
    ),
    "It is not said which units to run.": lambda project, patch: prefill.main([]),
    "There is no such part of the shards.": lambda project, patch: prefill.main(["shards=3/2"]),
    "Several units are a sweep.": lambda project, patch: prefill.main(["layer=0,1"]),
    "The launcher ray is not installed.": not_installed,
    "There is no Slurm here.": no_slurm,
    "The launcher does not take these settings.": lambda project, patch: prefill.main(
        ["layer=0", "hydra/launcher=joblib", "hydra.launcher.njobs=2"], True
    ),
    "capture.store_url is no address of an object store.": overrides("capture.store_url=bucket"),
    "capture.store_url holds more than an address.": overrides(
        "capture.store_url='s3://key:secret@bucket/prefix'"
    ),
    "The shards of a store lie on an object store that is not named.": shards_elsewhere,
    "The dense model cannot be loaded.": lambda project, patch: dense.inspect("nowhere/none"),
    "No dense FFN was found in MixtralDecoderLayer: it is already sparse.": sparse_already,
    "The model does not have these layers.": lambda project, patch: record.check_layers([4], 4),
    "The dataset cannot be read.": lambda project, patch: list(
        documents.hub_documents(compose.load(["data=hub", "data.dataset=nowhere/none"]).data)
    ),
    "There is no such file.": lambda project, patch: list(
        documents.file_documents(["none.txt"], "text")
    ),
    "The data has no such column of text.": data_file('{"text": "a"}\n', "body"),
    "There is no text in the data.": data_file('{"text": " "}\n'),
    "There is too little text for one block of validation.": too_little,
    "There are fewer training tokens than one batch.": fitted(batch_size=513),
    "There is no room for the activations.": lambda project, patch: preflight.check_disk(
        "the activations", project, 10**18, ["data.tokens.train=1000"]
    ),
    "Out of memory: train-layer_0 is not finished, what it had done is kept.": lost(
        Path("stages/train/layer_0"), MemoryError()
    ),
    "The machine refused: capture is not finished, what it had done is kept.": lost(
        Path("stages/capture"), OSError(errno.ENOSPC, "No space left on device")
    ),
    "The object store cannot be used: ...": no_server,
    "There is no CUDA device.": no_gpu,
    "Another run works on .../.scratch/locks/train-layer_0.": locked,
    "Units of work were lost.": units_that(begun=True),
    "Units of work were not begun.": units_that(begun=False),
    "The time is up, and units of work are not done.": units_that(begun=False, timed_out=True),
    "A file of an artefact cannot be read.": lambda project, patch: record.read(DENSE),
    "An artefact is damaged or incomplete.": damaged,
    "An activation store is damaged or incomplete.": damaged_store,
    "The dense model changed after it was recorded.": changed_model,
    "stages/tokens was made with other settings.": other_settings,
    "Layer 1 was fitted to make up for another layer 0.": behind_another,
    "Training of layer 3 diverged at step 1.": fitted(
        learning_rate=1e30, warmup_steps=0, evaluate_every=1
    ),
}
IN_A_CHECKOUT = {
    "Layer 1 is to be fitted behind sparse layers, and has not been.": (
        "python -m pipeline.stages.train --layer 1 train.window=1"
    ),
}
"""What needs everything that the stages write: `test_docs.py` runs it."""
INTERRUPTED = "interrupted; the same command goes on where it was: ..."


def test_every_heading_is_a_message_that_is_provoked_here():
    assert entries().keys() == {*PROVOKED, *IN_A_CHECKOUT, INTERRUPTED}
    anchors = set(re.findall(r"\]\(#([^)]*)\)", FAQ))
    sections = re.findall(r"^## (.*)$", FAQ, re.MULTILINE)
    assert anchors == {re.sub(r"[^a-z0-9 ]", "", s.lower()).replace(" ", "-") for s in sections}


@pytest.mark.parametrize("heading", PROVOKED)
def test_the_message_reads_as_its_heading_and_ends_with_its_sections_code(
    project: Path, monkeypatch: pytest.MonkeyPatch, heading: str
):
    with pytest.raises(PipelineError) as caught:
        PROVOKED[heading](project, monkeypatch)
    assert re.fullmatch(re.escape(heading).replace(r"\.\.\.", ".*"), caught.value.what)
    assert caught.value.exit_code == entries()[heading]


def test_an_interrupted_command_says_so(capsys: pytest.CaptureFixture[str]):
    def act() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as left:
        command.exit_with(act)
    assert left.value.code == entries()[INTERRUPTED]
    assert INTERRUPTED.removesuffix("...") in capsys.readouterr().err
