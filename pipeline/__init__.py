"""Turn a pretrained dense transformer into a sparse mixture-of-experts model.

Text becomes token blocks (`corpus`). The dense model reads them once, and every FFN's input and
output go to a store (`capture`, `store`). Each layer's MoE starts from the dense FFN (`experts`,
`moe`) and is fitted to its own store alone (`training`). The layers replace the FFNs, and the
result is saved in an architecture that transformers already has (`hosts`, `checkpoint`). What was
gained and lost is measured on text that nothing was chosen on (`evaluation`, `report`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.capture import capture_activations
    from pipeline.checkpoint import convert_to_sparse
    from pipeline.compose import load as load_config
    from pipeline.evaluation import evaluate
    from pipeline.notebook import plan_layers, train_layer

__all__ = [
    "capture_activations",
    "convert_to_sparse",
    "evaluate",
    "load_config",
    "plan_layers",
    "train_layer",
]

# Loaded on first use (PEP 562), so that importing one module does not import torch.
_HOMES = {
    "capture_activations": ("pipeline.capture", "capture_activations"),
    "convert_to_sparse": ("pipeline.checkpoint", "convert_to_sparse"),
    "evaluate": ("pipeline.evaluation", "evaluate"),
    "load_config": ("pipeline.compose", "load"),
    "plan_layers": ("pipeline.notebook", "plan_layers"),
    "train_layer": ("pipeline.notebook", "train_layer"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)
