"""What runs on a GPU, on a pretended one: nothing mixes devices, nothing waits in a loop."""

import contextlib
import copy
import threading
from collections.abc import Generator, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import test_heal
import test_input_store
import test_modeling
import torch
import transformers as tf
from accelerate import dispatch_model
from pretend_cuda import CUDA, Device, is_there, pretend_cuda
from test_start import PLAIN as MOE
from test_start import D, F, dense_ffn, plan_of, write_store
from test_training import PLAIN, Stored
from torch import nn
from torch.utils._pytree import tree_leaves

from pipeline import (
    comparison,
    embeddings,
    evaluation,
    footprint,
    heal,
    resident,
    sensitivity,
    specialists,
)
from pipeline import fit as fit_module
from pipeline import start as start_module
from pipeline.capture import capture_activations
from pipeline.config import Growth, Kernel, RouterInit, Store
from pipeline.controls import OracleMoE
from pipeline.discovery import find_ffns
from pipeline.ffn import DenseFFN
from pipeline.layers import load_layer, read_history
from pipeline.moe import SparseMoE
from pipeline.resume import CHECKPOINT
from pipeline.shape import MoEShape
from pipeline.start import start_layer
from pipeline.store import LayerReader
from pipeline.training import Objective, begin, fit_layer, step
from pipeline.windows import forward_behind

DYNAMIC = replace(MOE, dynamic=replace(MOE.dynamic, enabled=True))


@pytest.fixture
def device() -> Iterator[Device]:
    with pretend_cuda() as device:
        yield device


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Stored:
    ffn = dense_ffn(bias=True)
    return ffn, write_store(tmp_path_factory.mktemp("stored") / "layer_3.zarr", ffn)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.specialists.ROUNDS", 2)
    monkeypatch.setattr("pipeline.specialists.ROUTER_STEPS", 20)


class Killed(BaseException):
    pass


# The pretended device itself


def test_tensors_of_two_devices_do_not_mix(device):
    here, there = torch.randn(4, 4), torch.randn(4, 4, device="cuda")
    assert there.device == CUDA and here.device.type == "cpu"
    bad = [
        lambda: here + there,
        lambda: there + here,
        lambda: there @ here,
        lambda: there[0, 0] + here,  # a CUDA tensor of no dimension is no scalar
        lambda: torch.cat([there, here]),
        lambda: torch.stack([there.sum(), torch.tensor(1.0)]),
        lambda: here[there[:, 0] > 0],
        lambda: torch.where(here > 0, there, 0.0),
        lambda: there.index_select(0, torch.tensor([1])),
        lambda: there.gather(0, torch.zeros(1, 4, dtype=torch.long)),
        lambda: there.add_(here),
        lambda: nn.functional.linear(there, here),
        lambda: nn.Linear(4, 4)(there),
    ]
    for mixed in bad:
        with pytest.raises(RuntimeError, match=r"device|indices"):
            mixed()
    with pytest.raises(RuntimeError, match="generator"):
        there.normal_(generator=torch.Generator())
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()


def test_what_cuda_allows_is_allowed(device):
    here, there = torch.randn(4, 4), torch.randn(4, 4, device="cuda")
    rows = torch.tensor([2, 0])
    found = [
        there * torch.tensor(2.0),
        there[rows],
        there[[1, 2]],
        there.index_put((rows,), there[rows]),
    ]
    found += [
        there.new_zeros(2),
        torch.zeros_like(there),
        there.double(),
        there.to(here.to("cuda")),
    ]
    found += [
        torch.ones(2, device=CUDA),
        here.cuda(),
        here.to("cuda", torch.float64),
        there.t()[1:],
    ]
    with torch.device("cuda"):
        found.append(torch.arange(3))
    assert all(t.device == CUDA and t.is_cuda for t in found)
    there[1:] = torch.tensor(3.0)
    there.copy_(here)
    assert torch.equal(there.cpu(), here) and not is_there(there.cpu()) and is_there(there)
    assert there.to("cuda") is there and here.to("cpu") is here
    assert there.to("cpu", torch.float64).dtype is torch.float64


def test_modules_move_learn_and_give_what_they_give_on_the_cpu(device):
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    two, x = copy.deepcopy(one).to("cuda"), torch.randn(16, 4)
    for model, given in ((one, x), (two, x.to("cuda"))):
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for _ in range(3):
            optimizer.zero_grad()
            model(given).square().mean().backward()
            optimizer.step()
        moments = optimizer.state[next(model.parameters())]
        assert all(m.device == given.device for m in moments.values())
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert b.grad is not None and b.device == b.grad.device == CUDA
        assert torch.equal(a, b.cpu())
    assert all(map(is_there, copy.deepcopy(two).parameters()))
    assert not any(map(is_there, two.cpu().parameters()))


def test_waiting_and_products_on_the_cpu_are_counted(device):
    there, here = torch.randn(4, 4, device="cuda"), torch.randn(4, 4)
    there.mm(there).add(there.sum())
    assert not device.waits and not device.products
    for waiting in (lambda: there.sum().item(), there.cpu, there.nonzero, lambda: there[there > 0]):
        before = device.waits.total()
        waiting()
        assert device.waits.total() > before
    here.mm(here)
    assert device.products == {"mm": 1}


# A layer


def fit(
    stored: Stored,
    folder: Path,
    init: str = "slice",
    *,
    at: str = "cuda",
    moe_cfg: Any = MOE,
    shape: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    killed_at: int | None = None,
    **changed: Any,
) -> SparseMoE:
    ffn, reader = stored
    folder.mkdir(exist_ok=True)
    plan = plan_of(ffn, F if init == "copy" else F // 4, 8, 2, init)
    plan["shape"] |= shape or {}

    def progress(done: int, total: int, note: str) -> None:
        if done == killed_at:
            raise Killed

    return fit_layer(
        LayerReader(reader.path, at),
        ffn,
        plan,
        folder,
        moe_cfg=moe_cfg,
        cfg=replace(PLAIN, **changed),
        seed=0,
        device=torch.device(at),
        dtype=dtype,
        progress=progress,
    )


CHOICE = {"routing": "expert_choice", "capacity_factor": 1.25}
LAYERS: dict[str, dict[str, Any]] = {
    "copy": {"init": "copy"},
    "slice": {},
    "cluster": {"init": "cluster"},
    "specialist": {"init": "specialist"},
    "random": {"init": "random"},
    "refit": {"moe_cfg": replace(MOE, refit=True)},
    "noise": {"moe_cfg": replace(MOE, init_noise=0.1)},
    "zero_router": {"moe_cfg": replace(MOE, router_init=RouterInit.zero)},
    "random_router": {"moe_cfg": replace(MOE, router_init=RouterInit.random)},
    "mlp_router": {"shape": {"router_width": 8}},
    "mean": {"moe_cfg": replace(MOE, mean_compensation=True), "shape": {"bias": True}},
    "shared": {"init": "specialist", "shape": {"d_ff_shared": 32}},
    "shared_slice": {"shape": {"d_ff_shared": 32}},
    "one_specialist": {"init": "specialist", "shape": {"n_experts": 1, "top_k": 1}},
    "held": {"init": "specialist", "shape": {"top_k": 1}},
    "expert_choice": {"shape": CHOICE},
    "choosing_specialists": {"init": "specialist", "shape": CHOICE},
    "balance_bias": {"shape": {"balance_bias": True}},
    "sigmoid": {"shape": {"router_function": "sigmoid"}},
    "split": {"moe_cfg": DYNAMIC},
    "interpolate": {
        "moe_cfg": replace(DYNAMIC, dynamic=replace(DYNAMIC.dynamic, growth=Growth.interpolate))
    },
    "padded": {"kernel": Kernel.padded},
    "loop": {"kernel": Kernel.loop},
    "grouped": {"kernel": Kernel.grouped},
    "stream": {"stream": True},
    "data_free": {"data_free": True},
}
SHORT = ("cluster", "specialist", "shared", "expert_choice", "split", "refit", "mean", "stream")
SHORT += ("mlp_router", "padded", "data_free")


@pytest.mark.parametrize(
    "name", [n if n in SHORT else pytest.param(n, marks=pytest.mark.slow) for n in LAYERS]
)
def test_a_layer_is_made_and_trained_on_the_device_as_on_the_cpu(stored, tmp_path, name):
    """Of equal arithmetic, so that the layers are the same up to what one order of sums changes."""
    given = {"epochs": 1, **LAYERS[name]}
    with pretend_cuda() as device:
        there = fit(stored, tmp_path / "there", **given)
        assert {t.device for t in there.state_dict().values()} == {CUDA}
    small = {"mm"} if name == "cluster" else set()  # the exchange of neurons between groups
    assert not device.products.keys() - small, "a product ran on the CPU beside the device"
    here = fit(stored, tmp_path / "here", at="cpu", **given)
    one, two = (load_layer(tmp_path / side)[0].state_dict() for side in ("here", "there"))
    assert here.shape == there.shape
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
    for row, other in zip(*map(read_history, (tmp_path / "here", tmp_path / "there")), strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-4)


def test_the_start_runs_on_the_device_and_is_that_of_the_cpu(stored):
    ffn, reader = stored
    plan = plan_of(ffn, F // 4, 8, 2, "specialist")
    with pretend_cuda() as device:
        there = start_layer(ffn, plan, MOE, reader, seed=0, device="cuda")
        assert there.down_proj.device == CUDA and not device.products
    here = start_layer(ffn, plan, MOE, reader, seed=0)
    torch.testing.assert_close(here.state_dict(), there.state_dict(), rtol=1e-4, atol=1e-5)


def test_rows_of_a_start_are_copied_once_where_they_are_few_and_by_the_chunk_where_not(
    stored, monkeypatch
):
    ffn, reader = stored
    plan, found = plan_of(ffn, F // 4, 8, 2, "specialist"), []
    for kept, place in ((2**31, "cuda"), (10, "cpu")):
        monkeypatch.setattr(specialists, "KEPT_BYTES", kept)
        with pretend_cuda():
            rows = specialists.HiddenRows(ffn.to("cuda", torch.float32), *reader.read("train"))
            assert rows.x_TD.device.type == rows.y_TD.device.type == place
            found.append(start_layer(ffn, plan, MOE, reader, seed=0, device="cuda").state_dict())
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_start_that_may_not_fit_the_card_is_made_on_the_cpu_and_says_so(stored, capsys):
    ffn, reader = stored
    plan = plan_of(ffn, F // 4, 8, 2, "specialist")
    rows = (reader.rows["train"], reader.rows["validation"])
    need = footprint.start(MoEShape(**plan["shape"]), "specialist", *rows, 4, refitted=False)
    for card, beside, place in ((2 * need, 0, "cuda"), (need, 0, "cpu"), (2 * need, need, "cpu")):
        with pretend_cuda(card):
            moe = start_layer(ffn, plan, MOE, reader, seed=0, device="cuda", beside=beside)
            assert moe.down_proj.device.type == place
        said = capsys.readouterr().out
        where = "on the GPU (" if place == "cuda" else "on the CPU ("
        assert f"start of layer 3: {where}" in said
        assert ("does not fit 90% of the card" in said) == (place == "cpu")


def test_a_layer_whose_start_had_no_room_is_trained_on_the_device(stored, tmp_path):
    with pretend_cuda(3 * 10**6):
        moe = fit(stored, tmp_path, "specialist", epochs=1)
        assert moe.down_proj.device == CUDA


@pytest.mark.parametrize(
    ("name", "waits"),
    [
        *((n, 0) for n in ("slice", "expert_choice", "balance_bias", "sigmoid", "mlp_router")),
        *((n, 0) for n in ("held", "split", "shared_slice")),
        *(("padded", 1), ("loop", 8)),  # for the fullest load; for each expert's tokens
    ],
)
def test_a_step_does_not_wait_for_the_device(stored, device, name, waits):
    ffn, reader = stored
    given = dict(LAYERS[name])
    plan = plan_of(ffn, F // 4, 8, 2, given.pop("init", "slice"))
    plan["shape"] |= given.pop("shape", {})
    moe_cfg = given.pop("moe_cfg", MOE)
    cfg = replace(PLAIN, **given)
    objective = Objective(reader, cfg, CUDA, torch.bfloat16)
    fitted = begin(reader, ffn, plan, objective, moe_cfg=moe_cfg, seed=0, total=1000)
    batch = [side.to("cuda") for side in reader.read("train", 0, 32)]
    step(fitted, objective, *batch)
    device.waits.clear()
    for _ in range(3):
        step(fitted, objective, *batch)
    assert device.waits.total() == 3 * waits
    moments = fitted.optimizer.state[fitted.moe.down_proj]
    assert all(moment.device == CUDA for moment in moments.values())


@pytest.mark.parametrize("name", ["slice", "split", "expert_choice"])
def test_a_run_goes_on_from_its_checkpoint_on_the_device(stored, tmp_path, name):
    given = {"epochs": 1, **LAYERS[name]}
    with pretend_cuda():
        whole = fit(stored, tmp_path / "whole", **given)
        with pytest.raises(Killed):
            fit(stored, tmp_path / "killed", killed_at=9, **given)
        assert (tmp_path / "killed" / CHECKPOINT).is_file()
        again = fit(stored, tmp_path / "killed", **given)
        assert again.down_proj.device == CUDA
    torch.testing.assert_close(whole.state_dict(), again.state_dict(), rtol=0, atol=0)
    assert read_history(tmp_path / "whole") == read_history(tmp_path / "killed")


@pytest.mark.parametrize(("first", "then"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_checkpoint_of_one_device_goes_on_on_the_other(stored, tmp_path, first, then):
    with pretend_cuda():
        with pytest.raises(Killed):
            fit(stored, tmp_path, at=first, killed_at=9)
        moe = fit(stored, tmp_path, at=then)
        assert moe.down_proj.device.type == then


def test_bf16_is_multiplied_where_it_is_asked_for(stored, tmp_path):
    with pretend_cuda():
        found = fit(stored, tmp_path / "bf16", dtype=torch.bfloat16, epochs=1)
        fit(stored, tmp_path / "fp32", epochs=1)
        assert found.down_proj.dtype is torch.float32
    one, two = (read_history(tmp_path / name)[-1]["loss"] for name in ("bf16", "fp32"))
    assert one == pytest.approx(two, rel=0.02) and one != two


# Rows


ORDERS = [{"epoch": 0}, {"epoch": 1}, {"epoch": 1, "skip": 5}, {"epoch": 0, "skip": 15}]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("way", ["gathered", "fed", "streamed"])
def test_batches_on_the_device_are_those_of_the_store_in_its_order(stored, device, way, order):
    reader = stored[1]
    given = {"seed": 3, "in_memory": way != "streamed", **order}
    wanted = list(reader.batches("train", 32, **given))
    if way == "gathered":
        batches = resident.gathered(resident.upload(reader, "train", CUDA))
    else:
        batches = resident.fed(reader, CUDA)
    found = []
    for pair in batches("train", 32, **given):
        assert all(side.device == CUDA for side in pair)
        found.append([side.cpu() for side in pair])
    assert len(found) == len(wanted) == 16 - order.get("skip", 0)
    for one, two in zip(found, wanted, strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_rows_are_uploaded_in_parts(stored, device, monkeypatch):
    reader = stored[1]
    monkeypatch.setattr(resident, "UPLOADED", 100)
    for side, wanted in zip(
        resident.upload(reader, "train", CUDA), reader.read("train"), strict=True
    ):
        assert side.device == CUDA and torch.equal(side.cpu(), wanted)


def test_batches_ahead_leave_no_thread_when_the_loop_ends_early(stored, device):
    before = threading.active_count()
    batches = resident.fed(stored[1], CUDA)("train", 32, seed=0, epoch=0)
    next(batches)
    assert isinstance(batches, Generator)
    batches.close()
    assert threading.active_count() == before


def test_rows_lie_on_the_device_where_they_fit_and_say_why(stored, tmp_path, capsys):
    shape = MoEShape(**plan_of(stored[0], F // 4, 8, 2)["shape"])
    training = footprint.training(shape, PLAIN.batch_size, 256)
    rows = footprint.pair(D, 4, 512 + 256)
    for name, card, stream in (
        ("room", (training + rows) / 0.89, False),
        ("none", (training + rows) / 0.91, False),
        ("stream", 1e11, True),
        ("cpu", None, False),
    ):
        with contextlib.ExitStack() as stack:
            if card:
                stack.enter_context(pretend_cuda(int(card)))
            at = "cuda" if card else "cpu"
            fit(stored, tmp_path / name, at=at, epochs=1, stream=stream)
        said = [x for x in capsys.readouterr().out.splitlines() if x.startswith("rows of layer 3")]
        assert len(said) == bool(card), said
        assert all(("on the GPU" in line) == (name == "room") for line in said)
    assert read_history(tmp_path / "room") == read_history(tmp_path / "none")


def test_what_plan_counts_of_a_start_is_what_the_start_does():
    counted = footprint.START_ROWS, footprint.ROUND_ROWS
    assert counted == (specialists.MAX_ROWS, specialists.ROUND_ROWS)
    assert footprint.KEPT_BYTES == specialists.KEPT_BYTES
    assert footprint.CHUNK == specialists.CHUNK
    assert footprint.BLOCK_FEATURES == fit_module.BLOCK_FEATURES
    assert footprint.RIDGE_ROWS == start_module.RIDGE_ROWS


# Models


@pytest.fixture(scope="module")
def model() -> tf.PreTrainedModel:
    return test_heal.tiny("Llama")


def moved(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
    return copy.deepcopy(model).to("cuda")  # pyright: ignore[reportArgumentType]


def spread(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
    """Over two devices, as a `device_map` spreads it: accelerate's hooks move what passes."""
    there = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0"), "cuda:0")
    here = dict.fromkeys(("model.layers.1", "model.norm", "lm_head"), "cpu")
    placed = dispatch_model(copy.deepcopy(model), there | here, main_device="cpu")
    devices = [slot.weights().up_proj.device for slot in find_ffns(placed)]
    assert devices == [CUDA, torch.device("cpu")]
    return placed  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("place", [moved, spread])
@pytest.mark.parametrize("store", Store)
def test_capture_on_the_device_stores_what_it_stores_on_the_cpu(model, tmp_path, store, place):
    blocks = {"train": test_heal.BLOCKS["train"], "validation": test_heal.BLOCKS["validation"]}
    cfg = replace(test_input_store.CONFIG, store=store)
    capture_activations(model, blocks, tmp_path / "here", cfg=cfg)
    reader = LayerReader(tmp_path / "here" / "layer_1.zarr")
    wanted = {split: reader.read(split) for split in blocks}
    with pretend_cuda() as device:
        capture_activations(place(model), blocks, tmp_path / "there", cfg=cfg)
        assert place is spread or not device.products
        device.products.clear()
        found = LayerReader(tmp_path / "there" / "layer_1.zarr", "cuda")
        for split in blocks:
            for one, two in zip(found.read(split), wanted[split], strict=True):
                torch.testing.assert_close(one, two)
        assert not device.products, "the dense FFN of a store of inputs ran on the CPU"


@pytest.mark.parametrize("changes", [{}, test_heal.EXPERT_CHOICE, {"balance_bias": True}])
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_healing_on_the_device_goes_as_on_the_cpu(model, tmp_path, changes, dtype):
    trained = test_heal.write_layers(model, tmp_path / "trained", **changes)
    small: dict[str, Any] = {
        "tokens": 6 * test_heal.BATCH * test_heal.SEQUENCE,
        "evaluate_every": 3,
    }
    here = test_heal.healed(model, trained, tmp_path / "here", dtype=dtype, **small)
    with pretend_cuda() as device:
        there = test_heal.healed(moved(model), trained, tmp_path / "there", dtype=dtype, **small)
        assert not device.products
    tolerance = 1e-3 if dtype is torch.float32 else 0.05
    for row, other in zip(*map(read_history, (here, there)), strict=True):
        assert row == pytest.approx(other, rel=tolerance, abs=tolerance)


def test_a_step_of_healing_does_not_wait_for_the_device(model, tmp_path, device):
    read = test_heal.write_layers(model, tmp_path)
    moes = {k: load_layer(path)[0] for k, path in read.items()}
    healing = heal._begin(moved(model), moes, test_heal.HEALING, 0.01, torch.float32, 100)
    batch = test_heal.BLOCKS["train"][:4].to("cuda")
    heal._step(healing, batch)
    device.waits.clear()
    heal._step(healing, batch)
    # transformers asks in each forward pass whether sequences are packed
    assert device.waits == {"_local_scalar_dense": 2}


def test_a_model_is_judged_on_the_device_as_on_the_cpu(model, tmp_path):
    """Layers, the oracle and both models on text."""
    trained = test_heal.write_layers(model, tmp_path / "trained")
    blocks = {**test_heal.BLOCKS, "heldout": test_heal.BLOCKS["validation"]}
    capture_activations(model, blocks, tmp_path / "captured", cfg=test_input_store.CONFIG)

    def judged(place: str) -> list[Any]:
        dense = moved(model) if place == "cuda" else model
        folder = tmp_path / "captured"
        found: list[Any] = [evaluation.evaluate(tmp_path / "trained", folder, device=place)]
        oracles, moes = {}, {}
        for k, path in trained.items():
            moes[k] = load_layer(path)[0].to(place)
            ffn = DenseFFN.load(folder / f"ffn_{k}.safetensors")
            oracles[k] = OracleMoE(moes[k], ffn)
            reader = LayerReader(folder / f"layer_{k}.zarr", place)
            found.append(evaluation.layer_metrics(oracles[k], reader))
        for modules in (moes, oracles):
            other = comparison.replaced(dense, modules)
            text = comparison.compare_on_text(dense, other, blocks["heldout"], 999, batch_size=4)
            found += [text.perplexity, text.kl.tolist(), text.top1_agreement]
        return found

    with pretend_cuda() as device:
        there = judged("cuda")
        assert not device.products
    here = judged("cpu")
    numbers = [[x for x in tree_leaves(found) if isinstance(x, float)] for found in (there, here)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=1e-5) and len(numbers[0]) > 50


def test_a_model_spread_over_devices_is_judged_as_on_the_cpu(model, tmp_path):
    """Whatever device its controls lie on, each goes to that of the FFN that it replaces."""
    trained = test_heal.write_layers(model, tmp_path)
    tokens, ffns = test_heal.BLOCKS["validation"], [s.weights() for s in find_ffns(model)]

    def judged(dense: tf.PreTrainedModel, place: str) -> list[Any]:
        moes = {k: load_layer(path)[0].to(place) for k, path in trained.items()}
        oracles = {k: OracleMoE(moe, ffns[k]) for k, moe in moes.items()}
        found = []
        for modules in (moes, oracles):
            other = comparison.replaced(dense, modules)
            text = comparison.compare_on_text(dense, other, tokens, 999, batch_size=4)
            found += [text.perplexity, text.kl.tolist(), text.top1_agreement]
        for slot in find_ffns(dense):
            moe = copy.deepcopy(moes[slot.index])
            found.append(sensitivity.layer_kl(dense, slot, moe, tokens))
        return tree_leaves(found)

    with pretend_cuda():
        there = [judged(spread(model), place) for place in ("cuda", "cpu")]
    for found in there:
        assert found == pytest.approx(judged(model, "cpu"), rel=1e-4, abs=1e-5)


def test_an_encoder_spread_over_devices_gives_the_embeddings_of_one_device():
    config = tf.BertConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    torch.manual_seed(0)
    encoder = tf.AutoModel.from_config(config).eval()
    tokens = test_heal.BLOCKS["validation"]
    wanted = embeddings.embed(encoder, tokens, 4)
    with pretend_cuda():
        where = {"embeddings": "cuda:0", "encoder.layer.0": "cuda:0"}
        where |= {"encoder.layer.1": "cpu", "pooler": "cpu"}
        dense = dispatch_model(copy.deepcopy(encoder), where, main_device="cpu")
        torch.testing.assert_close(embeddings.embed(dense, tokens, 4), wanted)
        ffns = {slot.index: slot.weights() for slot in find_ffns(dense)}
        assert [ffn.up_proj.device.type for ffn in ffns.values()] == ["cuda", "cpu"]
        whole = {k: test_heal.sliced(f.to("cpu", torch.float32)) for k, f in ffns.items()}
        sparse = comparison.replaced(dense, whole)  # pyright: ignore[reportArgumentType]
        assert embeddings.embed(sparse, tokens, 4).isfinite().all()


def test_candidates_of_a_budget_are_made_and_judged_on_the_device(model, tmp_path):
    blocks = test_heal.BLOCKS
    cfg = replace(test_input_store.CONFIG, store=Store.input)
    capture_activations(model, blocks, tmp_path, cfg=cfg)
    shape = asdict(test_heal.sliced(find_ffns(model)[0].weights()).shape)
    plans = {
        k: {i: {"layer": k, "shape": shape, "init": i} for i in ("slice", "specialist")}
        for k in (0, 1)
    }

    def measured(place: str) -> Any:
        dense = moved(model) if place == "cuda" else model
        known, given = tmp_path / f"{place}.json", {"moe_cfg": MOE, "seed": 0}
        return sensitivity.measure(dense, plans, tmp_path, blocks["validation"], known, **given)

    with pretend_cuda() as device:
        there = measured("cuda")
        assert not device.products
    torch.testing.assert_close(there, measured("cpu"), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["everything-at-once", "expert-choice-mlp-router", "plain"])
def test_the_modelling_file_runs_on_the_device_as_on_the_cpu(device, name):
    shape = replace(test_modeling.PLAIN, **test_modeling.FEATURES[name])
    ffn, x = test_modeling.copy_of(test_modeling.trained(shape)), test_modeling.inputs()[None]
    wanted = ffn(x)
    device.products.clear()
    found = copy.deepcopy(ffn).to("cuda")(x.to("cuda"))
    assert found.device == CUDA and not device.products
    torch.testing.assert_close(found.cpu(), wanted)


@pytest.mark.parametrize("place", [moved, spread])
def test_rows_behind_sparse_layers_are_made_on_the_device(model, tmp_path, place):
    trained = test_heal.write_layers(model, tmp_path / "trained", (0,))
    found = []
    for at in ("cpu", "cuda"):
        with pretend_cuda() as device:
            dense = place(model) if at == "cuda" else model
            device.products.clear()
            behind = forward_behind(
                dense, {0: load_layer(trained[0])[0]}, test_heal.BLOCKS["train"][:1]
            )
            with torch.inference_mode():
                pair = behind(test_heal.BLOCKS["validation"].to(at), [1])[1]
            found.append([side.cpu() for side in pair])
            assert at == "cpu" or place is spread or not device.products
    torch.testing.assert_close(*found)
