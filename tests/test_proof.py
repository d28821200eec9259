"""A checkpoint is opened in a fresh process, and refused where it is not what was converted."""

import signal
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from test_checkpoint import CASES, SAMPLING, prepare, tiny

from pipeline import artifacts, proof, reload, sources, weights, workdir
from pipeline.checkpoint import Conversion
from pipeline.errors import ArtifactError


@pytest.fixture(scope="module")
def conversion(tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    """Read-only: of a Llama and its carved layers."""
    folders = prepare(tmp_path_factory.mktemp("prepared"), CASES["llama3-tied-carve"])
    how = {"dtype": "auto", "revision": None, "trust_remote_code": False}
    return Conversion(str(folders.dense), folders.layer_folders(), {}, how)


@pytest.fixture(scope="module")
def written(conversion: Conversion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only: its checkpoint."""
    folder = tmp_path_factory.mktemp("written") / "sparse"
    conversion.write(folder, "20KB")
    return folder


def test_reload_imports_nothing_of_this_package():
    package = Path(workdir.__file__).parent
    assert set(sources.import_closure("pipeline.reload")) == {
        package / "reload.py",
        package / "__init__.py",  # by its place; `python -I reload.py` does not see it
    }


def test_compute_continues_greedily_to_its_full_length():
    """Where the model's own generation config samples, and would end at half of all tokens."""
    model, ends = tiny("Llama"), list(range(32))
    model.generation_config = tf.GenerationConfig(**SAMPLING, eos_token_id=ends, pad_token_id=0)
    ids = proof.probe(64)
    continued = reload.compute(model, ids, 6)["generated"]
    assert continued.shape == (proof.PROBE_SEQUENCES, 6)
    with torch.no_grad():
        whole = model(input_ids=torch.cat([ids, continued], dim=1)).logits
    whole[..., ends] = -torch.inf
    assert torch.equal(whole[:, ids.shape[1] - 1 : -1].argmax(dim=-1), continued)


@pytest.mark.parametrize("family", ["Llama", "Bert"])
def test_the_first_pass_of_a_process_is_of_one_token(family: str):
    """MKL's functions are first called by one thread then (`runtime.settle_kernels`)."""
    model = tiny(family)
    shapes: list[tuple[int, ...]] = []
    embed = model.get_input_embeddings()
    embed.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    reload.compute(model, proof.probe(64), 2)
    assert shapes[0] == (1, 1)
    assert proof.probe(64).shape in shapes[1:]


def test_probe_is_always_the_same_and_within_the_vocabulary():
    assert torch.equal(proof.probe(64), proof.probe(64))
    assert proof.probe(7).unique().tolist() == list(range(7))


def computed(factor: float = 1.0, continued: int = 3) -> dict[str, torch.Tensor]:
    largest = torch.tensor([[[-4.0, 1.0, 2.0]]])
    return {"logits": largest * factor, "generated": torch.tensor([[1, continued]])}


@pytest.mark.parametrize("factor", [1.0, 1.0009, 0.9991])
def test_compare_takes_logits_within_the_tolerance(factor: float):
    proof.compare(computed(), computed(factor), 1e-3, Path("sparse"))


@pytest.mark.parametrize("factor", [1.0011, 0.9989, -1.0, float("nan"), float("inf")])
def test_compare_refuses_logits_over_the_tolerance(factor: float):
    with pytest.raises(ArtifactError, match="continuation equal") as refusal:
        proof.compare(computed(), computed(factor), 1e-3, Path("sparse"))
    assert "sparse: logits differ" in str(refusal.value)
    assert "convert.tolerance=0.001" in str(refusal.value)


def test_compare_refuses_another_continuation_at_equal_logits():
    with pytest.raises(ArtifactError, match="continuation differs"):
        proof.compare(computed(), computed(continued=4), 1e-3, Path("sparse"))


def remove_a_norm(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


def remove_an_expert(tensors: dict[str, torch.Tensor]) -> None:
    for w in ("w1", "w2", "w3"):
        del tensors[f"model.layers.1.block_sparse_moe.experts.3.{w}.weight"]


def add_a_bias(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "how", "named"),
    [
        (remove_a_norm, "compute", r"missing_keys': \['model.norm.weight'"),
        (remove_an_expert, "open", "mismatched_keys': .*model.layers.1.mlp.experts.gate_up_proj"),
        (add_a_bias, "open", r"unexpected_keys': \['model.layers.0.self_attn.q_proj.bias'"),
    ],
)
def test_a_fresh_process_refuses_a_checkpoint_with_a_tensor_too_few_or_too_many(
    conversion: Conversion, tmp_path: Path, change: Callable[[dict], None], how: str, named: str
):
    folder = tmp_path / "sparse"
    conversion.write(folder, "2GB")
    tensors = load_file(folder / weights.SINGLE)
    change(tensors)
    save_file(tensors, folder / weights.SINGLE, metadata={"format": "pt"})
    with proof.FreshProcess() as fresh, pytest.raises(ArtifactError, match=named):
        fresh.compute(folder, 64) if how == "compute" else fresh.open(folder)


@pytest.mark.slow
def test_a_fresh_process_that_is_asked_nothing_ends_with_its_context():
    with proof.FreshProcess() as fresh:
        assert fresh.process.poll() is None
    assert fresh.process.returncode is not None and not Path(fresh.scratch.name).exists()


@pytest.mark.slow
def test_a_fresh_process_that_was_interrupted_interrupts_its_parent(tmp_path: Path):
    """It may hear of Ctrl-C first: the checkpoint is not to blame."""
    with proof.FreshProcess() as fresh:
        fresh.process.send_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            fresh.open(tmp_path)


def test_a_fresh_process_whose_parent_is_gone_ends_by_itself():
    with proof.FreshProcess() as fresh:
        assert fresh.process.communicate("", timeout=300) == (None, "")
        assert fresh.process.returncode == 0


# How it is proved, and by what


@pytest.mark.slow
def test_prove_compares_the_logits_of_a_fresh_process(
    conversion: Conversion, written: Path, capsys: pytest.CaptureFixture[str]
):
    model = conversion.put_into(tf.AutoModelForCausalLM.from_pretrained(conversion.source))
    with proof.FreshProcess() as fresh:
        proof.prove(fresh, written, lambda: model.eval(), 64, 1e-4)
    assert "largest logit difference" in capsys.readouterr().out
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] += 0.1
    other = pytest.raises(ArtifactError, match="does not compute what the model in memory does")
    with proof.FreshProcess() as fresh, other:
        proof.prove(fresh, written, lambda: model, 64, 1e-4)


def test_the_logits_are_compared_where_the_model_fits_and_it_is_said(
    conversion: Conversion, capsys: pytest.CaptureFixture[str]
):
    planned = conversion.planned()
    needed = round(1.5 * 4 * sum(t.numel() for t in planned.values()))
    assert proof.fits(planned, free=needed)
    assert "the logits of a fresh process" in capsys.readouterr().out
    assert not proof.fits(planned, free=needed - 1)
    assert "every tensor as it was written, and no logits" in capsys.readouterr().out


class NoProcess(proof.FreshProcess):
    """Opens anything; `opened` says what."""

    def __init__(self) -> None:
        self.opened: list[Path] = []

    def open(self, folder: Path) -> None:
        self.opened.append(folder)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["20KB", "2GB"])
def test_what_is_written_is_read_again_and_opened(
    conversion: Conversion, tmp_path: Path, size: str
):
    folder = tmp_path / "sparse"
    with proof.FreshProcess() as fresh, proof.ReadBack(fresh) as read_back:
        digests = read_back.compare(conversion.write(folder, size, read_back.follow))
        assert fresh.process.returncode == 0
    assert digests == {p.name: artifacts.file_digest(p) for p in folder.glob("*.safetensors")}


@pytest.mark.parametrize("wrong", ["missing_keys", "nothing"])
def test_a_checkpoint_that_does_not_open_is_refused(
    conversion: Conversion, written: Path, tmp_path: Path, wrong: str
):
    def no_process(folder: Path) -> None:
        raise ArtifactError("It does not open.", value=wrong, rule="", remedy="")

    fresh = NoProcess()
    fresh.open = no_process if wrong == "missing_keys" else fresh.open
    with proof.ReadBack(fresh) as read_back:
        crcs = conversion.write(tmp_path / "sparse", "20KB", read_back.follow)
        if wrong == "missing_keys":
            with pytest.raises(ArtifactError, match="missing_keys"):
                read_back.compare(crcs)
        else:
            read_back.compare(crcs)
            assert fresh.opened == [tmp_path / "sparse"]


def test_reading_waits_for_what_is_not_written_yet(tmp_path: Path):
    """A tensor is read once it is there, and one that never comes holds nobody up."""
    path, tensors = tmp_path / weights.SINGLE, {"a": torch.ones(4), "b": torch.zeros(4)}
    save_file(tensors, path)
    begins = path.stat().st_size - 32
    with proof.ReadBack(NoProcess()) as read_back:
        read_back.follow(path, begins + 16)
        read = read_back._reads[path]
        with pytest.raises(TimeoutError):
            read.result(timeout=0.3)
        with path.open("r+b") as file:
            file.seek(begins + 16)
            file.write(torch.ones(4).numpy().tobytes())
        read_back.follow(path, begins + 32)
        assert read.result(timeout=60)[1] == artifacts.file_digest(path)
    with pytest.raises(KeyboardInterrupt), proof.ReadBack(NoProcess()) as read_back:
        read_back.follow(path, begins)
        raise KeyboardInterrupt
    with pytest.raises(CancelledError):
        read_back._reads[path].result(timeout=60)


@pytest.mark.parametrize("wrong", ["values", "left over", "missing", "no header", "short"])
def test_read_back_refuses_what_was_not_written(conversion: Conversion, tmp_path: Path, wrong: str):
    def read_back(crcs: Mapping[str, int]) -> None:
        with proof.ReadBack(NoProcess()) as again:
            for path in files:
                again.follow(path, path.stat().st_size)
            again.compare(crcs)

    written = conversion.write(tmp_path / "sparse", "20KB")
    files = sorted((tmp_path / "sparse").glob("*.safetensors"))
    read_back(written)
    path = next(p for p in files if "model.norm.weight" in weights.checksums(p)[0])
    named, content = r"model\.norm\.weight", load_file(path)
    if wrong == "values":
        content["model.norm.weight"] = content["model.norm.weight"].roll(1)
        save_file(content, path)
    elif wrong == "left over":
        del written["model.norm.weight"]
    elif wrong == "missing":
        del content["model.norm.weight"]
        save_file(content, path)
    elif wrong == "no header":
        path.write_bytes(b"\xff" * path.stat().st_size)
        named = path.name
    else:
        path.write_bytes(path.read_bytes()[:-4])
        named = "differ from what was written"
    with pytest.raises(ArtifactError, match=named):
        read_back(written)
