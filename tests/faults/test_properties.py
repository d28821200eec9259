"""Laws that hold for any input: the store under any history, routing, the configuration."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline import compose, refusals
from pipeline.config import Codec, leaves
from pipeline.errors import ArtifactError, ConfigError
from pipeline.moe import SparseMoE
from pipeline.router import (
    ROUTER_FUNCTIONS,
    capacity,
    choose_experts,
    choose_tokens,
    choose_tokens_alone,
    expert_load,
    load_balance_loss,
    router_z_loss,
    routing_statistics,
    thresholds,
)
from pipeline.shape import MoEShape
from pipeline.store import LayerReader
from pipeline.store_writer import LayerWriter

PROJECT = Path(__file__).parents[2]

# The store


@st.composite
def layouts(draw: st.DrawFn) -> dict:
    """Settings of a store of any small size."""
    length = draw(st.sampled_from([1, 3, 4, 8]))
    rows = {name: length * draw(st.integers(1, 12)) for name in ("train", "validation")}
    return {
        "rows": rows,
        "d_model": draw(st.integers(1, 5)),
        "dtype": draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32])),
        "sequence_length": length,
        "codec": draw(st.sampled_from(list(Codec))),
        "shard_mb": draw(st.floats(1e-6, 1e-3)),
        "chunk_mb": draw(st.floats(1e-6, 1e-3)),
        "attributes": {"model": "m"},
    }


def data_of(layout: dict) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    size = lambda split: (layout["rows"][split], layout["d_model"])  # noqa: E731
    return {
        split: tuple(
            torch.randn(size(split), generator=generator).to(layout["dtype"]) for _ in range(2)
        )
        for split in layout["rows"]
    }


def write_some(path: Path, layout: dict, data: dict, order: list[int] | None) -> None:
    """The shards that are not there, in any order: the first ones of `order`; null = all."""
    writer = LayerWriter.open(path, **layout)
    missing = [
        (split, k) for split, n in writer.n_shards.items() for k in range(n)
        if k not in writer.committed(split)
    ]  # fmt: skip
    for i in range(len(missing)) if order is None else dict.fromkeys(j % 50 for j in order):
        if i < len(missing):
            split, k = missing[i]
            start, stop = writer.layout.shard_range(split, k)
            writer.write_shard(split, k, *(side[start:stop] for side in data[split]))


def is_right(path: Path, data: dict) -> bool:
    """Whether all of a store, in order and by ranges, is what was written; raises if refused."""
    reader = LayerReader(path)
    for split, pair in data.items():
        rows = len(pair[0])
        for start, stop in ((0, rows), (rows // 3, rows - rows // 4)):
            found = reader.read(split, start, stop)
            if not all(map(torch.equal, found, [side[start:stop] for side in pair])):
                return False
        batch = max(1, rows // 3)
        seen = sorted(
            (x.float().tolist(), y.float().tolist())
            for xs, ys in reader.batches(split, batch, seed=0, epoch=0, in_memory=False)
            for x, y in zip(xs, ys, strict=True)
        )
        known = {
            str((x.tolist(), y.tolist())) for x, y in zip(*(s.float() for s in pair), strict=True)
        }
        if len(seen) != rows // batch * batch or not all(str(row) in known for row in seen):
            return False
    return True


EVENTS = st.one_of(
    st.tuples(st.just("write"), st.lists(st.integers(0, 49), max_size=4)),
    st.tuples(st.just("flip"), st.tuples(st.integers(0, 10**6), st.integers(0, 10**6))),
    st.tuples(st.just("cut"), st.tuples(st.integers(0, 10**6), st.integers(0, 10**6))),
    st.tuples(st.just("remove"), st.tuples(st.integers(0, 10**6), st.just(0))),
    st.tuples(st.just("swap"), st.tuples(st.integers(0, 10**6), st.integers(0, 10**6))),
)


def damage(path: Path, event: str, which: int, where: int) -> None:
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name != "zarr.json")
    if not files:
        return
    file, content = files[which % len(files)], bytearray(files[which % len(files)].read_bytes())
    if event == "remove":
        file.unlink()
    elif event == "swap":
        other = files[where % len(files)]
        second = other.read_bytes()
        other.write_bytes(content)
        file.write_bytes(second)
    elif event == "cut":
        file.write_bytes(content[: where % (len(content) + 1)])
    elif content:
        content[where % len(content)] ^= 1 << where % 8
        file.write_bytes(content)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(layout=layouts(), events=st.lists(EVENTS, max_size=6))
def test_a_store_of_any_layout_and_history_is_right_or_refused_and_can_be_finished(layout, events):
    data = data_of(layout)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer_0.zarr"
        for event, what in events:
            if event == "write":
                write_some(path, layout, data, what)
            elif path.exists():
                damage(path, event, *what)
            with contextlib.suppress(ArtifactError):
                assert is_right(path, data)
        write_some(path, layout, data, None)
        assert is_right(path, data)
        LayerReader(path).verify()


# Routing

SIZES = st.tuples(st.integers(1, 24), st.integers(1, 9), st.integers(0, 10**6))  # T, E, seed


def logits_of(size: tuple[int, int, int]) -> Tensor:
    """(T, E) without ties."""
    T, E, seed = size
    return torch.randn(T, E, generator=torch.Generator().manual_seed(seed)) * (1 + seed % 7)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    size=SIZES,
    k=st.integers(1, 9),
    biased=st.booleans(),
    name=st.sampled_from(sorted(ROUTER_FUNCTIONS)),
)
def test_each_token_takes_its_best_experts_with_the_weights_of_its_function(size, k, biased, name):
    logits = logits_of(size)
    T, E = logits.shape
    k = min(k, E)
    bias = torch.linspace(-0.3, 0.3, E) if biased else None
    routing = choose_experts(logits, k, name, bias)
    taken = routing.taken_TE()
    assert taken.sum(dim=1).tolist() == [k] * T  # k different ones
    score, _ = ROUTER_FUNCTIONS[name]
    selecting = score(logits) if bias is None else score(logits) + bias
    worst = selecting.masked_fill(~taken, torch.inf).amin(dim=1)
    best_left = selecting.masked_fill(taken, -torch.inf).amax(dim=1)
    assert bool((worst >= best_left).all())
    weights = routing.weights_TE()
    assert bool((weights >= 0).all()) and bool((weights[~taken] == 0).all())
    total = weights.sum(dim=1)
    if name == "softmax":
        assert bool((total <= 1 + 1e-5).all())
        torch.testing.assert_close(weights[taken], logits.softmax(dim=1)[taken])
    else:
        torch.testing.assert_close(total, torch.ones(T))
    load = expert_load(routing.expert_ids, E)
    assert torch.equal(load, taken.sum(dim=0).float()) and int(load.sum()) == T * k
    assert bool(router_z_loss(routing) >= 0)
    balance = float(load_balance_loss(routing))
    assert 0 < balance <= E + 1e-4


@settings(max_examples=50, deadline=None, derandomize=True)
@given(size=SIZES, k=st.integers(1, 9), name=st.sampled_from(sorted(ROUTER_FUNCTIONS)))
def test_no_order_of_tokens_or_experts_matters_to_token_choice(size, k, name):
    logits = logits_of(size)
    T, E = logits.shape
    weights = choose_experts(logits, min(k, E), name).weights_TE()
    generator = torch.Generator().manual_seed(size[2])
    tokens, experts = (torch.randperm(n, generator=generator) for n in (T, E))
    moved = choose_experts(logits[tokens][:, experts], min(k, E), name).weights_TE()
    torch.testing.assert_close(moved, weights[tokens][:, experts])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(size=SIZES, factor=st.floats(0.1, 9))
def test_each_expert_takes_its_capacity_of_the_best_tokens(size, factor):
    logits = logits_of(size)
    T, E = logits.shape
    factor = min(factor, E)
    routing = choose_tokens(logits, factor)
    taken, n = routing.taken_TE(), capacity(T, factor, E)
    assert 1 <= n <= T and taken.sum(dim=0).tolist() == [n] * E
    scores = logits.softmax(dim=1)
    worst = scores.masked_fill(~taken, torch.inf).amin(dim=0)
    best_left = scores.masked_fill(taken, -torch.inf).amax(dim=0)
    assert bool((worst >= best_left).all())
    torch.testing.assert_close(routing.weights_TE()[taken], scores[taken])
    assert float(load_balance_loss(routing)) == 0
    if E > 1:  # the scores of one expert are all 1
        tokens = torch.randperm(T, generator=torch.Generator().manual_seed(size[2]))
        moved = choose_tokens(logits[tokens], factor).weights_TE()
        torch.testing.assert_close(moved, routing.weights_TE()[tokens])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(size=SIZES, factor=st.floats(0.1, 9), share=st.floats(0, 1))
def test_at_inference_no_token_depends_on_another(size, factor, share):
    logits = logits_of(size)
    limits = thresholds(logits, min(factor, size[1]))
    whole = choose_tokens_alone(logits, limits).weights_TE()
    part = logits[: max(1, int(share * len(logits)))]
    torch.testing.assert_close(choose_tokens_alone(part, limits).weights_TE(), whole[: len(part)])
    scores = logits.softmax(dim=1)
    assert torch.equal(whole > 0, (scores >= limits) & (scores > 0))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(size=SIZES, density=st.floats(0, 1))
@example(size=(5, 4, 0), density=0.0)
def test_statistics_of_any_routing_are_within_their_bounds(size, density):
    T, E, seed = size
    taken = torch.rand(T, E, generator=torch.Generator().manual_seed(seed)) < density
    found = routing_statistics(taken)
    choices = taken.sum(dim=0)
    assert sum(found["load"]) == pytest.approx(1 if choices.sum() else 0)
    assert 0 <= found["load_entropy"] <= 1 + 1e-9
    assert found["dead_experts"] == int((choices == 0).sum())
    assert found["experts_per_token"] == pytest.approx(float(choices.sum()) / T)
    assert found["unserved_tokens"] == pytest.approx(float((~taken.any(dim=1)).float().mean()))
    if choices.sum():
        assert 1 - 1e-9 <= found["load_max_over_mean"] <= E + 1e-9


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 12),
    experts=st.integers(1, 6),
    k=st.integers(1, 6),
    gated=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_a_layer_gives_the_same_in_any_order_of_its_tokens_and_experts(
    tokens, experts, k, gated, seed
):
    shape = MoEShape(
        d_model=8,
        d_ff=16,
        d_ff_expert=8,
        n_experts=experts,
        top_k=min(k, experts),
        activation="silu",
        gated=gated,
        bias=False,
        router_function="softmax_topk",
    )
    generator = torch.Generator().manual_seed(seed)
    moe, other = SparseMoE(shape).eval(), SparseMoE(shape).eval()
    order = torch.randperm(experts, generator=generator)
    with torch.no_grad():
        for name, weight in moe.named_parameters():
            weight.normal_(generator=generator)
            other.get_parameter(name).copy_(weight[order])
        x = torch.randn(tokens, 8, generator=generator)
        y = moe(x)
        torch.testing.assert_close(other(x), y, rtol=1e-4, atol=1e-4)
        moved = torch.randperm(tokens, generator=generator)
        torch.testing.assert_close(moe(x[moved]), y[moved], rtol=1e-4, atol=1e-4)


# The configuration


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(PROJECT / "conf", folder / "conf")
    shutil.copy(PROJECT / "params.yaml", folder)
    return folder


KEYS = sorted(refusals.kinds())
GROUPS = sorted(path.parent.name for path in (PROJECT / "conf").glob("*/*.yaml"))
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
WORDS = """1 0 -1 2 8 0.5 1e9 nan inf null true false ??? [] [0] [0,1] {} {a:1} auto pico tiny kl
    n_experts 1,2 ${seed} ${moe.n_experts} ${a.b} ${ 'a "a a:b range(3) @x expert_choice custom
    [{layers:[0],n_experts:8}] 99999999999999999999 1_0""".split()  # noqa: SIM905
VALUES = st.one_of(
    st.sampled_from(["", "'a b'", *WORDS]),
    st.integers().map(str),
    st.floats().map(str),
    TEXTS,
)
OVERRIDES = st.one_of(
    st.builds(
        "{}{}={}".format,
        st.sampled_from(["", "", "", "", "+", "++", "~"]),
        st.one_of(st.sampled_from(KEYS), st.sampled_from(GROUPS), TEXTS),
        VALUES,
    ),
    TEXTS,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(overrides=st.lists(OVERRIDES, min_size=1, max_size=3))
def test_any_overrides_are_a_configuration_that_survives_params_yaml_or_exit_2(root, overrides):
    with inside(root):
        try:
            composed = compose.compose(overrides)
            cfg = compose.checked(composed)
        except ConfigError as error:
            assert error.exit_code == 2 and str(error.rule) and str(error.remedy)
            return
        text = compose.to_yaml(composed)
        (root / "params.yaml").write_text(text, encoding="utf-8")
        again = compose.load([])
        assert leaves(again) == leaves(cfg)
        assert compose.to_yaml(compose.read_params()) == text


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    overrides=st.lists(
        st.one_of(
            st.builds("{}={}".format, st.sampled_from([k for k in KEYS if k[0] in "cr"]), VALUES),
            TEXTS,
        ),
        max_size=3,
    )
)
def test_any_overrides_of_a_conversion_alone_are_taken_or_exit_2(overrides):
    try:
        convert, runtime = compose.standalone(overrides)
    except ConfigError as error:
        assert error.exit_code == 2 and str(error.rule) and str(error.remedy)
    else:
        assert convert.tolerance >= 0 and runtime.lock_wait_s >= 0


def test_some_overrides_of_the_property_compose(root: Path):
    """So that it is not one of refusals alone."""
    with inside(root):
        assert compose.load(["moe.n_experts=8", "evaluate.prompt='a b'"]).moe.n_experts == 8
