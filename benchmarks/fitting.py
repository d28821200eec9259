"""Fitting one layer: the loader beside the compute alone, memory, and the closed form.

Training end to end reads its rows from the store, shuffled; the compute alone takes the same steps
on one batch that lies ready. The closed form is a start by clusters with a ridge router and a
least-squares refit; its reference are the dense matrix products that it cannot do without: the
hidden activations of the tokens, their Gram matrix, and their products with the outputs.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.measure import Row
from benchmarks.store import activations
from pipeline import compose, runtime
from pipeline.config import CaptureConfig, Codec, Config
from pipeline.ffn import DenseFFN
from pipeline.shape import MoEShape
from pipeline.start import start_layer
from pipeline.store import LayerReader
from pipeline.store_writer import LayerWriter
from pipeline.training import Objective, begin, fit_layer, step

SEQUENCE = 256
TRAINED = ((256, 16384), (256, 32768), (512, 16384))  # d_model, tokens
CLOSED = ((768, 2048, 8192), (768, 2048, 16384))  # d_model, d_ff, tokens
STREAMED = (65536, 262144)  # tokens, at d_model 256
TINY_TRAINED, TINY_CLOSED, TINY_STREAMED = ((32, 4096),), ((32, 64, 1024),), (2048, 4096)


def rows(quick: bool) -> Iterator[Row]:
    for d_model, tokens in TINY_TRAINED if quick else TRAINED:
        yield from _trained(d_model, tokens)
    yield _memory(*(TINY_STREAMED if quick else STREAMED))
    for size in TINY_CLOSED if quick else CLOSED:
        yield closed(*size)


def _trained(d_model: int, tokens: int) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reader, ffn, plan, cfg = prepared(folder, d_model, 4 * d_model, tokens, "random")
        ways: dict[str, Callable[[], object]] = {
            "memory": lambda: train(reader, ffn, plan, cfg, stream=False),
            "stream": lambda: train(reader, ffn, plan, cfg, stream=True),
            "compute": lambda: compute(reader, ffn, plan, cfg),
        }
        seconds = measure.turns(ways)
    steps = tokens // cfg.train.batch_size
    for way, words in (("memory", "split in memory"), ("stream", "streamed")):
        yield measure.compare(
            f"training a layer end to end, {words} / its compute alone",
            seconds[way],
            seconds["compute"],
            size=f"d {d_model}, 8 x {d_model}, top-2, {tokens} tokens",
            unit="steps/s",
            work=steps,
            reach=">= 0.9",
        )


def _memory(less: int, more: int) -> Row:
    peaks = {}
    for tokens in (less, more):
        line = [sys.executable, "-m", "benchmarks.fitting", str(tokens)]
        done = subprocess.run(line, capture_output=True, text=True, check=True)
        peaks[tokens] = int(done.stdout.split()[-1]) / 2**20
    ratio = peaks[more] / peaks[less]
    return Row(
        f"peak memory of streamed training, {more // less} times the tokens",
        f"d 256, {less} and {more} tokens",
        "MiB",
        peaks[more],
        peaks[less],
        ratio,
        (ratio, ratio),
        "<= 1.1",
    )


def closed(d_model: int, d_ff: int, tokens: int) -> Row:
    with tempfile.TemporaryDirectory() as name:
        reader, ffn, plan, cfg = prepared(Path(name), d_model, d_ff, tokens, "cluster")
        seconds = measure.turns(
            {
                "ours": lambda: start_layer(ffn, plan, cfg.moe, reader, seed=0),
                "products": lambda: products(ffn, reader),
            },
            warm_ups=0 if d_model > 1000 else 1,
        )
    return measure.compare(
        "clusters, ridge router and least-squares refit / the dense matrix products alone",
        seconds["ours"],
        seconds["products"],
        size=f"d {d_model}, d_ff {d_ff}, 8 of 16 experts, {tokens} tokens",
        reach="<= 3",
    )


def prepared(
    folder: Path, d_model: int, d_ff: int, tokens: int, init: str
) -> tuple[LayerReader, DenseFFN, dict, Config]:
    """A store of one layer, its dense FFN, its plan and the configuration."""
    clusters = ("moe.init=cluster", "moe.router_init=ridge", "moe.refit=true")
    cfg = compose.load([*clusters, "train.epochs=1", "train.warmup_steps=0"])
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    ffn = DenseFFN(
        up_proj=weight(d_ff, d_model),
        down_proj=weight(d_model, d_ff),
        gate_proj=weight(d_ff, d_model),
        up_bias=None,
        gate_bias=None,
        down_bias=None,
        activation="silu",
    )
    store(folder / "layer_0.zarr", ffn, tokens, cfg.capture)
    carved = init == "cluster"
    shape = MoEShape(
        d_model=d_model,
        d_ff=d_ff,
        d_ff_expert=d_ff // 16 if carved else d_model,
        n_experts=16 if carved else 8,
        top_k=8 if carved else 2,
        activation="silu",
        gated=True,
        bias=False,
        router_function="softmax_topk",
    )
    plan = {"layer": 0, "shape": vars(shape), "init": init, "host": "mixtral"}
    return LayerReader(folder / "layer_0.zarr"), ffn, plan, cfg


@torch.inference_mode()
def store(path: Path, ffn: DenseFFN, tokens: int, cfg: CaptureConfig) -> None:
    writer = LayerWriter.open(
        path,
        rows={"train": tokens, "validation": SEQUENCE},
        d_model=ffn.d_model,
        dtype=torch.bfloat16,
        sequence_length=SEQUENCE,
        codec=Codec.compact,
        shard_mb=cfg.shard_mb,
        chunk_mb=cfg.chunk_mb,
        attributes={},
    )
    for split, shards in writer.n_shards.items():
        for k in range(shards):
            start, stop = writer.layout.shard_range(split, k)
            x = activations(stop - start, ffn.d_model, seed=k) / 2
            writer.write_shard(split, k, x, ffn(x.float()).bfloat16())


def train(reader: LayerReader, ffn: DenseFFN, plan: dict, cfg: Config, *, stream: bool) -> None:
    wanted = replace(cfg.train, stream=stream, evaluate_every=10**9, checkpoint_every=10**9)
    reader = LayerReader(reader.path)  # which has read nothing yet
    with tempfile.TemporaryDirectory() as name:
        fit_layer(
            reader,
            ffn,
            plan,
            Path(name),
            moe_cfg=cfg.moe,
            cfg=wanted,
            seed=0,
            device=torch.device("cpu"),
            dtype=runtime.pick_dtype(cfg.train.dtype, torch.device("cpu")),
        )


def compute(reader: LayerReader, ffn: DenseFFN, plan: dict, cfg: Config) -> None:
    """The same start, validations and steps, on one batch."""
    device = torch.device("cpu")
    objective = Objective(reader, cfg.train, device, runtime.pick_dtype(cfg.train.dtype, device))
    steps = reader.rows["train"] // cfg.train.batch_size
    fit = begin(reader, ffn, plan, objective, moe_cfg=cfg.moe, seed=0, total=steps)
    batch = reader.read("train", 0, cfg.train.batch_size)
    objective.validate(fit.moe)
    for _ in range(steps):
        step(fit, objective, *batch)
    objective.validate(fit.moe)


@torch.inference_mode()
def products(ffn: DenseFFN, reader: LayerReader) -> None:
    x, y = (side.float() for side in reader.read("train"))
    hidden = ffn.hidden(x)
    hidden.T @ hidden
    hidden.T @ y


def main() -> None:
    """Stream `tokens` tokens through the training of a layer; prints the peak of this process."""
    with tempfile.TemporaryDirectory() as name:
        reader, ffn, plan, cfg = prepared(Path(name), 256, 1024, int(sys.argv[1]), "random")
        train(reader, ffn, plan, cfg, stream=True)
    print(measure.peak_bytes())


if __name__ == "__main__":
    main()
