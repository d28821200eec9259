"""The proof that a checkpoint is what was converted, at the end of every conversion.

A fresh process that knows nothing of this package opens the folder; no tensor may be missing, left
over or of another shape, and its logits and greedy continuation must be those of the sparse layers
in the dense model's place, in memory. Both compute in float32, on equal weights as stored, and one
after the other, so that one model is in memory at a time. The process is started before the
checkpoint is written: importing transformers takes seconds.

Where even one does not fit, the logits are left out: every file is read again while it is
written, each tensor held against the checksum that was taken when it was written, and the fresh
process opens the checkpoint by the headers of its files.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from pipeline import preflight, reload, weights
from pipeline.errors import ArtifactError

PROBE_SEQUENCES, PROBE_TOKENS, NEW_TOKENS = 2, 32, 16

NEEDED = 1.5
"""Memory for a model that computes in float32, over the bytes of its weights in float32."""


class FreshProcess:
    """Opens one checkpoint, knowing nothing of this package; it waits until it is told which."""

    def __enter__(self) -> Self:
        self.scratch = TemporaryDirectory()
        self.process = subprocess.Popen(
            [sys.executable, "-I", reload.__file__],
            env=os.environ | {"HF_MODULES_CACHE": self.scratch.name},  # for modelling files' copies
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *raised: object) -> None:
        with self.process as process:
            process.kill()
        self.scratch.cleanup()

    def compute(self, folder: Path, vocab_size: int) -> dict[str, Tensor]:
        """`logits` and `generated` of a checkpoint.

        Raises:
            ArtifactError: it cannot be opened, or a tensor is missing or left over.
        """
        out = Path(self.scratch.name) / "computed.safetensors"
        ids = probe(vocab_size).tolist()
        self._ask(folder, ids=ids, new_tokens=NEW_TOKENS, output=str(out))
        return load_file(out)

    def open(self, folder: Path) -> None:
        """Open a checkpoint without its weights; raises as `compute`."""
        self._ask(folder)

    def _ask(self, folder: Path, **computing: Any) -> None:
        job = json.dumps({"checkpoint": str(folder.absolute()), **computing})
        _, told = self.process.communicate(job)
        if self.process.returncode == -signal.SIGINT:  # Ctrl-C reaches both, and it came first
            raise KeyboardInterrupt
        if self.process.returncode:
            raise ArtifactError(
                "The checkpoint does not open in a fresh process.",
                value=(told.strip().splitlines() or ["no message"])[-1],
                rule="transformers opens it with every tensor found and none left over",
                remedy="this is a defect of ours: please report it with the model's name",
            )


def fits(planned: Mapping[str, Tensor], free: int | None = None) -> bool:
    """Whether a model of these tensors can compute here, in float32; tells what is proved then.

    Args:
        free: bytes of memory that may be used; null = what the system says.
    """
    needed = round(NEEDED * 4 * sum(tensor.numel() for tensor in planned.values()))
    free = preflight.free_memory() if free is None else free
    if free is None or needed <= free:
        print("proof: the logits of a fresh process against those in memory", flush=True)
        return True
    sizes = f"{needed / 1e9:.2g} GB in float32, {free / 1e9:.2g} GB of memory are free"
    print(f"proof: every tensor as it was written, and no logits ({sizes})", flush=True)
    return False


def prove(
    fresh: FreshProcess,
    folder: Path,
    in_memory: Callable[[], PreTrainedModel],
    vocab_size: int,
    tolerance: float,
) -> None:
    """Raise `ArtifactError` where the checkpoint in `folder` does not compute what was converted.

    Args:
        in_memory: gives the model to compare with.
    """
    expected = reload.compute(in_memory().float(), probe(vocab_size), NEW_TOKENS)
    gc.collect()
    compare(expected, fresh.compute(folder, vocab_size), tolerance, folder)


class ReadBack:
    """A checkpoint's files, read again close behind their writer, and opened without weights.

    Args:
        fresh: opens the checkpoint when the first tensor is there.
    """

    def __init__(self, fresh: FreshProcess) -> None:
        self._fresh = fresh
        self._opened: Future[None] | None = None
        self._reads: dict[Path, Future[tuple[dict[str, int], str]]] = {}
        self._ends: dict[Path, int] = {}
        self._grown = threading.Condition()
        self._complete = self._left = False

    def __enter__(self) -> Self:
        self._threads = ThreadPoolExecutor(2)  # one opens, one reads file after file
        return self

    def __exit__(self, *raised: object) -> None:
        with self._grown:
            self._left = True
            self._grown.notify_all()
        self._threads.shutdown(wait=False, cancel_futures=True)  # its process is ended after it

    def follow(self, path: Path, end: int) -> None:
        """Up to `end` a file is as it will be; returns at once."""
        with self._grown:
            self._ends[path] = end
            self._grown.notify_all()
        self._opened = self._opened or self._threads.submit(self._fresh.open, path.parent)
        if path not in self._reads:
            read = self._threads.submit(weights.checksums, path, partial(self._wait, path))
            self._reads[path] = read

    def _wait(self, path: Path, end: int) -> None:
        with self._grown:
            self._grown.wait_for(lambda: self._left or self._complete or self._ends[path] >= end)
        if self._left:
            raise CancelledError

    def compare(self, written: Mapping[str, int]) -> dict[str, str]:
        """Raise `ArtifactError` where the files do not hold what was written, or do not open.

        All of them are written by then. Returns the SHA-256 of each file by name.

        Args:
            written: what `weights.write` returned for them.
        """
        with self._grown:
            self._complete = True
            self._grown.notify_all()
        found: dict[str, int] = {}
        digests: dict[str, str] = {}
        for path, read in self._reads.items():
            try:
                tensors, digests[path.name] = read.result()
            except ValueError as error:
                raise _other(f"{path.name}: {error}") from None
            found |= tensors
        differing = sorted(name for name, _ in found.items() ^ written.items())
        if differing:
            raise _other(f"{', '.join(dict.fromkeys(differing))} differ from what was written")
        if self._opened:
            self._opened.result()
        return digests


def probe(vocab_size: int) -> Tensor:
    """(sequences, tokens) random token ids, always the same."""
    generator = torch.Generator().manual_seed(0)
    size = (PROBE_SEQUENCES, PROBE_TOKENS)
    return torch.randint(vocab_size, size, generator=generator)


def compare(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], tolerance: float, folder: Path
) -> None:
    """Raise `ArtifactError` where the reloaded model's logits or continuation differ."""
    largest = float(expected["logits"].abs().max())
    difference = float((expected["logits"] - found["logits"]).abs().max()) / largest
    same = torch.equal(expected["generated"], found["generated"])
    print(f"reloaded: largest logit difference {difference:.1e} of the largest logit", flush=True)
    if not difference <= tolerance or not same:
        raise ArtifactError(
            "The reloaded checkpoint does not compute what the model in memory does.",
            value=f"{folder}: logits differ by {difference:.2e} of the largest, "
            f"greedy continuation {'equal' if same else 'differs'}",
            rule=f"at most convert.tolerance={tolerance}, and the same continuation",
            remedy="this is a defect of ours: please report it with the model's name",
        )


def _other(what: str) -> ArtifactError:
    return ArtifactError(
        "The checkpoint on disk is not what was written.",
        value=what,
        rule="every tensor is there as it was converted, and none besides",
        remedy="check the disk, remove the folder and convert again",
    )
