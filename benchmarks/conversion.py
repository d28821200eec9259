"""A conversion beside a copy of the bytes that it makes, and what memory it takes.

A Llama of random weights in several shards, and layers of four experts of a quarter, one per token:
as many bytes out as in. It is all that `python -m pipeline.stages.convert` does with three paths,
but for imports: the dense model and the layers (twice the bytes, in float32) are hashed and read,
the checkpoint is written, proved tensor by tensor as where no model fits the memory, and sealed.
The copy is made durable too.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from benchmarks import measure
from benchmarks.measure import Row
from benchmarks.models import VOCAB, llama
from pipeline import artifacts, preflight
from pipeline.config import ConvertConfig, RuntimeConfig
from pipeline.layers import save_layer
from pipeline.moe import SparseMoE
from pipeline.shape import MoEShape
from pipeline.stages import convert

SIZES = ((2048, 12), (2048, 48))  # d_model, layers
TINY = ((64, 2),)


def rows(quick: bool) -> Iterator[Row]:
    for d_model, n_layers in TINY if quick else SIZES:
        with tempfile.TemporaryDirectory() as name:
            yield from _rows(Path(name), d_model, n_layers)


def _rows(folder: Path, d_model: int, n_layers: int) -> Iterator[Row]:
    make(folder, d_model, n_layers)
    line = [sys.executable, "-m", "benchmarks.conversion", str(folder)]  # converts once
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    made = sum(p.stat().st_size for p in (folder / "sparse").glob("*.safetensors")) / 1e9
    size = f"{n_layers} layers, d {d_model}, {made:.2g} GB"
    seconds = measure.turns(
        {
            "ours": lambda: convert_alone(folder),
            "copy": lambda: copy(folder / "sparse", folder / "copy"),
        },
        warm_ups=0,
    )
    yield measure.compare(
        "conversion, from three paths to a sealed checkpoint / a durable copy of its bytes",
        seconds["ours"],
        seconds["copy"],
        size=size,
        reach="<= 3",
    )
    peak = json.loads(done.stdout.splitlines()[-1])
    layer = peak["layer"] / 2**30
    yield Row(
        "conversion, peak memory / 2 GiB and one layer",
        size,
        "GiB",
        peak["bytes"] / 2**30,
        2 + layer,
        peak["bytes"] / 2**30 / (2 + layer),
        (peak["bytes"] / 2**30 / (2 + layer),) * 2,
        "<= 1",
    )


def make(folder: Path, d_model: int, n_layers: int) -> None:
    """A dense checkpoint and its layers."""
    model = llama(d_model, n_layers, torch.bfloat16)
    model.save_pretrained(folder / "dense", max_shard_size="200MB")
    word = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=word).save_pretrained(folder / "dense")
    shape = MoEShape(
        d_model=d_model,
        d_ff=4 * d_model,
        d_ff_expert=d_model,
        n_experts=4,
        top_k=1,
        activation="silu",
        gated=True,
        bias=False,
        router_function="softmax_topk",
    )
    for k in range(n_layers):
        moe = SparseMoE(shape)
        for parameter in moe.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        (folder / f"layer_{k}").mkdir()
        save_layer(moe, folder / f"layer_{k}", {"layer": k, "host": "mixtral"})
        artifacts.write_manifest(folder / f"layer_{k}", {"module": "pipeline.stages.train"})


def convert_alone(folder: Path) -> None:
    """As where the memory would not hold one model."""
    shutil.rmtree(folder / "sparse", ignore_errors=True)
    paths = {"dense": folder / "dense", "layers": folder, "output": folder / "sparse"}
    given = {name: str(path) for name, path in paths.items()}
    cfg = ConvertConfig(**given, max_shard_size="200MB")
    with mock.patch.object(preflight, "free_memory", lambda: 0):
        convert.run_alone(cfg, RuntimeConfig())


def copy(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    for path in target.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def main() -> None:
    """Convert what lies in a folder; prints this process's peak and the size of a layer."""
    folder = Path(sys.argv[1])
    convert_alone(folder)
    peak = measure.peak_bytes()
    layer = sum(p.stat().st_size for p in (folder / "layer_0").iterdir())
    print(json.dumps({"bytes": peak, "layer": layer}))


if __name__ == "__main__":
    main()
