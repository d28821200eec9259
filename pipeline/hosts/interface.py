"""What every host is asked: can it hold a model, and how is the model written down in it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.shape import MoEShape

Record = Mapping[str, Any]
"""The dense model, as `dense.describe` gives it."""

Shapes = Mapping[int, MoEShape]
"""The sparse layers, by index."""

Tensors = dict[str, Any]
"""torch's, by name; nothing here imports torch."""

NOT_KEPT = frozenset(
    {"architectures", "auto_map", "model_type", "transformers_version", "_name_or_path"}
)
"""Fields of the dense model's configuration that name the model and say nothing of it."""


@dataclass(frozen=True, kw_only=True)
class Host(ABC):
    """One architecture."""

    name: str  # of `moe.host`
    router_function: str = "softmax_topk"  # a name in router.ROUTER_FUNCTIONS
    remote_code: bool = False  # not of transformers: opens with trust_remote_code=True
    float32: tuple[str, ...] = ()  # how those of a SparseMoE's tensors begin that are kept so
    caution: str | None = None  # what is known of other loaders

    @property
    def model_type(self) -> str:
        """Of its configuration."""
        return self.name

    @abstractmethod
    def refusal(self, record: Record, shapes: Shapes) -> str | None:
        """Why it cannot hold the dense model with these sparse layers, or None."""

    @abstractmethod
    def stored(self, shapes: Shapes) -> dict[int, MoEShape]:
        """The shapes as they lie in it, padded where it needs that."""

    @abstractmethod
    def config(self, record: Record, shapes: Shapes) -> dict[str, Any]:
        """Its configuration, without `model_type`, for layers of these shapes before padding."""

    @abstractmethod
    def pieces(self, record: Record, name: str) -> dict[str, tuple[int, int] | None]:
        """Its names for the dense model's tensor `name`, each with its rows; null = all."""

    @abstractmethod
    def layer(self, record: Record, layer: int, tensors: Tensors) -> Tensors:
        """Its tensors of a sparse layer, made of those of the SparseMoE."""

    def made_up(self, record: Record) -> dict[str, tuple[int, ...]]:
        """Names and shapes of tensors of zeros that it has and the dense model has not."""
        return {}
