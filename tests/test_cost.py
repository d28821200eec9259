"""What a conversion costs is what comes of it."""

from dataclasses import replace

import pytest
from test_budget import record_of

from pipeline import budget, compose, footprint, hosts
from pipeline.config import Codec, Config, Dtype
from pipeline.cost import cost, train_layer
from pipeline.moe import SparseMoE
from pipeline.shape import MoEShape
from pipeline.sizes import Cost, Sizes

RECORD = record_of(64, 64, 64) | {"parameters": 100_000, "dtype": "float32"}


@pytest.fixture(scope="module")
def cfg() -> Config:
    return compose.load([])


def costs(cfg: Config, layers: tuple[int, ...] = (0, 1, 2)) -> dict[str, int | float]:
    return cost(RECORD, budget.uniform(RECORD, cfg.moe, layers), cfg)


def test_parameters_are_those_of_the_layers_in_the_ffns_places(cfg):
    plans = budget.uniform(RECORD, cfg.moe, [0, 2])
    shape = MoEShape(**plans[0]["shape"])
    layer = sum(p.numel() for p in SparseMoE(shape).parameters())
    found = costs(cfg, (0, 2))
    assert found["parameters"] == 100_000 + 2 * (layer - 3 * 32 * 64)
    asleep = 3 * 3 * 32 * shape.d_ff_expert  # of the four experts of a layer
    assert found["parameters_per_token"] == found["parameters"] - 2 * asleep
    assert found["active_ffn_fraction"] == 0.5


def test_a_named_host_stores_the_padding_of_unlike_layers_and_no_token_runs_it():
    unlike = "moe.per_layer=[{layers: [0], d_ff_expert: 1.0}]"
    found = {}
    for host in ("mixtral", "custom"):
        cfg = compose.load(["moe.d_ff_expert=0.25", unlike, f"moe.host={host}"])
        plans = budget.uniform(RECORD, cfg.moe, [0, 1, 2])
        shapes = {k: MoEShape(**plan["shape"]) for k, plan in plans.items()}
        stored = hosts.HOSTS[host].stored(shapes).values()
        layers = sum(p.numel() for s in stored for p in SparseMoE(s).parameters())
        found[host] = cost(RECORD, plans, cfg)
        assert found[host]["parameters"] == 100_000 + layers - 3 * 3 * 32 * 64
        assert found[host]["checkpoint_bytes"] == 4 * found[host]["parameters"]
    assert found["mixtral"]["parameters"] > found["custom"]["parameters"]
    names = ("parameters_per_token", "active_ffn_fraction", "training_flops")
    assert len({tuple(of[name] for name in names) for of in found.values()}) == 1


def test_the_store_grows_with_tokens_layers_and_dtype_and_shrinks_by_its_codec(cfg):
    tokens = cfg.data.tokens.train + cfg.data.tokens.validation + cfg.capture.heldout_tokens

    def stored(layers: tuple[int, ...] = (0, 1, 2), **capture: object) -> float:
        return costs(replace(cfg, capture=replace(cfg.capture, **capture)), layers)["store_bytes"]

    assert stored(codec=Codec.none) == tokens * 3 * 2 * 32 * 2
    assert stored((1,), codec=Codec.none) * 3 == stored(codec=Codec.none)
    assert stored(codec=Codec.none, dtype=Dtype.float32) == 2 * stored(codec=Codec.none)
    assert stored(codec=Codec.compact) < stored(codec=Codec.fast) < stored(codec=Codec.none)


def test_training_costs_nothing_without_epochs_and_twice_as_much_for_two(cfg):
    def flops(epochs: int) -> float:
        return costs(replace(cfg, train=replace(cfg.train, epochs=epochs)))["training_flops"]

    assert flops(0) == 0 < flops(1) and flops(2) == 2 * flops(1)


def test_a_start_is_counted_where_it_is_made(cfg):
    """On the GPU where its card has room, else on the host; the training always on the GPU."""
    shape = MoEShape(**budget.uniform(RECORD, cfg.moe, [0])[0]["shape"])
    rows = cfg.data.tokens.train, cfg.data.tokens.validation
    start = footprint.start(shape, "specialist", *rows, 2, refitted=False)
    training = footprint.training(shape, cfg.train.batch_size, rows[1])

    def layer(card: int | None) -> Cost:
        sizes = Sizes(RECORD | {"dtype": "bfloat16"}, {0: shape}, cfg, {}, True, card)
        return train_layer(sizes, 0)

    there, here = layer(int(start / 0.89)), layer(int(start / 0.91))
    assert there.gpu == max(start, training) > here.gpu == training
    assert here.host > there.host
    assert layer(None) == there


def test_a_start_at_the_width_of_70b_fits_an_h200():
    """d_model 8192, d_ff 28672: 54 GB of it are sums."""
    plain = MoEShape(8192, 28672, 14336, 16, 2, "silu", True, False, "softmax_topk")
    assert footprint.specialist_sums(plain) == pytest.approx(54.5e9, rel=0.01)
    given = (plain, "specialist", 2**21, 2**16, 2)
    assert 60e9 < footprint.start(*given, refitted=False) < 0.9 * 141e9
    assert footprint.start(*given, refitted=True) >= footprint.start(*given, refitted=False)
    assert footprint.start(plain, "slice", *given[2:], refitted=False) < 70e9
