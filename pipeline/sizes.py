"""What the formulas of `cost.py` take and give: a conversion's sizes, and what a stage costs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline import hosts
from pipeline.config import Config
from pipeline.shape import MoEShape
from pipeline.volume import ITEMSIZE

BASE = 500_000_000  # host memory of Python, torch and transformers
SMALL = 60_000_000  # host memory of a stage without torch


@dataclass(frozen=True)
class Cost:
    """Of one stage, or of `train` for one layer after the other."""

    bytes: int = 0  # on disk when it is done
    transient: int = 0  # more while it runs
    files: int = 0
    host: int = SMALL  # peak memory
    gpu: int = 0
    flops: float = 0.0

    @property
    def work(self) -> float:
        """What its time grows with: FLOPs, or bytes where there are none to speak of."""
        return self.flops or self.bytes


@dataclass(frozen=True)
class Sizes:
    """Everything that the formulas take."""

    record: Mapping[str, Any]
    shapes: Mapping[int, MoEShape]
    cfg: Config
    ratios: Mapping[str, float]
    on_gpu: bool
    card: int | None = None  # bytes of the GPU's memory; null = enough

    @property
    def itemsize(self) -> int:
        """Of the model's weights as they are loaded."""
        return ITEMSIZE[_dtype(self.record, self.cfg)]

    @property
    def padded(self) -> dict[int, MoEShape]:
        """The layers as `moe.host` stores them."""
        return hosts.padded(self.cfg.moe.host.name, self.shapes)

    @property
    def sparse(self) -> int:
        """Parameters of the sparse model, padding included."""
        return self._with(self.padded)

    @property
    def unpadded(self) -> int:
        """The same without padding."""
        return self._with(self.shapes)

    def _with(self, shapes: Mapping[int, MoEShape]) -> int:
        grown = sum(s.total_parameters - s.dense_parameters for s in shapes.values())
        return self.record["parameters"] + grown

    @property
    def head(self) -> int:
        """Outputs per token of the head: the vocabulary of a language model."""
        return self.record["vocab_size"] or 0

    def matrices(self, parameters: int) -> int:
        """Those of `parameters` that a token is multiplied with: an embedding is looked up."""
        tied = self.record["config"].get("tie_word_embeddings", False)
        return parameters - (0 if tied else self.head * self.record["d_model"])

    def tokens(self, split: str) -> int:
        length = self.cfg.data.sequence_length
        return max(1, getattr(self.cfg.data.tokens, split) // length) * length

    def split(self, model: int, **more: Any) -> Cost:
        """A cost whose `model` bytes of memory lie where the model runs."""
        if self.on_gpu:
            return Cost(host=BASE + more.pop("kept", 0), gpu=model, **more)
        return Cost(host=BASE + model + more.pop("kept", 0), **more)


def _dtype(record: Mapping[str, Any], cfg: Config) -> str:
    return record["dtype"] if cfg.model.dtype.name == "auto" else cfg.model.dtype.name
