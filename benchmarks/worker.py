"""One way to train, in a process of its own: its time and its peak memory.

Takes a job (JSON) as its argument, says when it is ready, then answers each line of its input with
a line of JSON: a run of the whole way. So several ways can take turns, each warm and each with the
peak of its own process.
"""

import contextlib
import gc
import io
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from benchmarks import streaming
from benchmarks.streaming import Recipe, Trained
from pipeline import budget, compose, dense, runtime
from pipeline.capture import capture_activations
from pipeline.config import Codec, Config, Dtype, EmbeddedModelConfig
from pipeline.store import LayerReader

EQUAL = {
    "top-k": [],
    "expert choice": ["moe.routing=expert_choice"],
    "dynamic experts": [
        "moe.dynamic.enabled=true",
        "moe.dynamic.reallocate_every_n_steps=2",
        "moe.dynamic.min_d_ff=8",
    ],
}
"""What the ways are compared on, bit for bit; settings of `conf/`."""


class Bench:
    """A dense model of random weights, random tokens, and the recipe for its layers."""

    def __init__(self, overrides: list[str], steps: int, epochs: int, folder: Path) -> None:
        # A ridge router would read training rows that streaming does not have beforehand.
        self.cfg: Config = compose.load(["moe.router_init=random", *overrides])
        assert self.cfg.model.embedded
        self.folder = folder
        self.model = build(self.cfg.model.embedded)
        self.device = runtime.pick_device(self.cfg.runtime)
        self.model.to(self.device)  # pyright: ignore[reportArgumentType]
        self.base = peak_bytes()
        length = self.cfg.data.sequence_length
        sequences = self.cfg.train.batch_size // length
        self.blocks = self._tokens(steps * sequences, length, seed=1)
        plans = budget.uniform(dense.describe(self.model), self.cfg.moe, self.cfg.model.layers)
        validation = {"validation": self._tokens(sequences, length, seed=2)}
        capture_activations(self.model, validation, folder / "starts", cfg=self.cfg.capture)
        starts = {k: LayerReader(folder / "starts" / f"layer_{k}.zarr") for k in plans}
        train = replace(self.cfg.train, epochs=epochs)
        dtype = runtime.pick_dtype(train.dtype, self.device)
        self.recipe = Recipe(
            plans, starts, self.cfg.moe, train, self.cfg.seed, dtype=dtype, device=self.device
        )

    def _tokens(self, sequences: int, length: int, seed: int) -> Tensor:
        assert self.cfg.model.embedded
        generator = torch.Generator().manual_seed(seed)
        vocab_size = self.cfg.model.embedded.vocab_size
        return torch.randint(vocab_size, (sequences, length), generator=generator)

    def streamed(self, recipe: Recipe, blocks: Tensor, sequential: bool) -> Trained:
        return streaming.stream(self.model, blocks, recipe, sequential=sequential)

    def offline(
        self, recipe: Recipe, blocks: Tensor, in_order: bool = False
    ) -> tuple[Trained, dict[str, Any]]:
        """One dense pass and the training from it; and what the store took."""
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            began = time.perf_counter()
            streaming.store(self.model, blocks, recipe, Path(name), self.cfg.capture)
            seconds = time.perf_counter() - began
            disk_bytes = {
                f"{kind}_bytes": sum(
                    p.stat().st_size for p in Path(name).glob(pattern) if p.is_file()
                )
                for kind, pattern in {"disk": "**/*", "store": "layer_*.zarr/**/*"}.items()
            }
            trained = streaming.train_stored(Path(name), recipe, in_order=in_order)
        return trained, {"capture_seconds": seconds, **disk_bytes}

    def timed(self, way: str, recipe: Recipe, blocks: Tensor) -> dict[str, Any]:
        if way == "offline":
            trained, extra = self.offline(recipe, blocks)
        else:
            trained, extra = self.streamed(recipe, blocks, way == "sequential"), {}
        return {"seconds": trained.seconds, **extra}

    def warm_up(self, way: str) -> None:
        """One step: the first products of a process take longer."""
        recipe = replace(self.recipe, train=replace(self.recipe.train, epochs=1))
        sequences = recipe.train.batch_size // self.blocks.shape[1]
        self.timed(way, recipe, self.blocks[:sequences])

    def equal(self) -> dict[str, Any]:
        """How many values the two kinds of streaming and the stored shards agree on, in float32."""
        exact = replace(self.cfg.capture, dtype=Dtype.float32, codec=Codec.compact)
        self.cfg.capture = exact
        recipe = replace(self.recipe, dtype=torch.float32)
        one = self.streamed(recipe, self.blocks, False)
        others = [
            self.streamed(recipe, self.blocks, True),
            self.offline(recipe, self.blocks, in_order=True)[0],
        ]
        losses = sum(len(terms) for curve in one.curves.values() for terms in curve)
        different = [text for other in others for text in streaming.differences(one, other)]
        return {"losses": losses, "different": different}


def build(cfg: EmbeddedModelConfig) -> tf.PreTrainedModel:
    """The embedded model's architecture, as one that was loaded."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.d_model,
        intermediate_size=cfg.d_ff,
        num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads,
        num_key_value_heads=cfg.n_kv_heads,
        tie_word_embeddings=True,
    )
    return tf.LlamaForCausalLM(config).eval()


def peak_bytes() -> int:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures hold for, in words."""
    flags = {
        "AVX2": torch.cpu._is_avx2_supported(),
        "AVX-512": torch.cpu._is_avx512_supported(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "AMX": torch.cpu._is_amx_tile_supported(),
    }
    has, lacks = ([name for name, it in flags.items() if it is there] for there in (True, False))
    words = f"{platform.machine()} with {', '.join(has) or 'no vector units known here'}"
    if lacks:
        words += f"; without {', '.join(lacks)}"
    if device.type == "cuda":
        words += f"; {torch.cuda.get_device_name()}"
    return {
        "cpu": words,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "torch": torch.__version__,
    }


def serve(ready: dict[str, Any], answer: Callable[[], dict[str, Any]]) -> None:
    print(json.dumps(ready), flush=True)
    for _ in sys.stdin:
        gc.collect()
        with contextlib.redirect_stdout(io.StringIO()):
            answered = answer()
        print(json.dumps(answered), flush=True)


def main() -> None:
    job = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory() as name:
        with contextlib.redirect_stdout(io.StringIO()):
            if job["way"] == "equal":
                benches = {
                    kind: Bench([*job["overrides"], *more], job["steps"], 2, Path(name) / kind)
                    for kind, more in EQUAL.items()
                }
            else:
                bench = Bench(job["overrides"], job["steps"], job["epochs"], Path(name))
                bench.warm_up(job["way"])
        if job["way"] == "equal":
            serve({}, lambda: {kind: bench.equal() for kind, bench in benches.items()})
            return
        ready = {
            "machine": machine(bench.device),
            "dtype": str(bench.recipe.dtype).removeprefix("torch."),
            "tokens": bench.blocks.numel(),
            "step_tokens": bench.recipe.train.batch_size,
            "shape": next(iter(bench.recipe.plans.values()))["shape"],
            "layers": len(bench.recipe.plans),
            "parameters": sum(p.numel() for p in bench.model.parameters()),
            "base_bytes": bench.base,
        }

        def answer() -> dict[str, Any]:
            return bench.timed(job["way"], bench.recipe, bench.blocks) | {
                "peak_bytes": peak_bytes()
            }

        serve(ready, answer)


if __name__ == "__main__":
    main()
