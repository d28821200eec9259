"""Find the FFN of each layer of a dense model, and the place that a sparse layer takes.

An FFN is proposed by structure: in each layer, outside attention, the smallest module that holds
the widest pair of projections d -> f and f -> d. `pipeline/places.py` proves by numbers where in it
the FFN lies. A model on the meta device is searched the same way.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from pipeline.errors import InputError, ResourceError
from pipeline.ffn import DenseFFN
from pipeline.places import (
    Place,
    ffn_of,
    is_attention,
    is_below,
    is_pair,
    join,
    outside_attention,
    projections,
    prove,
    widest_pair,
)


class FFNSlot:
    """The place of one FFN in a model.

    Attributes:
        index: among the model's FFNs, in the order in which it runs them.
        path: of the module whose place a sparse layer takes.
        bypassed: paths of the modules that then do nothing.
        formula: the FFN, over the projections of the module at `root`.
    """

    def __init__(self, model: nn.Module, index: int, root: str, place: Place) -> None:
        self.index, self.root, self.formula = index, root, place.formula
        self.path = join(root, place.path)
        self.bypassed = tuple(join(root, path) for path in place.bypassed)
        self._model = model
        self._found = {path: model.get_submodule(path) for path in (self.path, *self.bypassed)}

    @property
    def module(self) -> nn.Module:
        """The module whose output is the FFN's: dense, or what replaced it."""
        return self._model.get_submodule(self.path)

    @property
    def entry(self) -> nn.Module:
        """The module whose input is the FFN's."""
        return self._model.get_submodule((*self.bypassed, self.path)[0])

    @property
    def d_model(self) -> int:
        return self.weights().d_model

    @property
    def d_ff(self) -> int:
        return self.weights().d_ff

    @property
    def dtype(self) -> torch.dtype:
        return self.weights().down_proj.dtype

    @property
    def has_bias(self) -> bool:
        return any(name.endswith("_bias") for name in self.weights().tensors())

    def weights(self) -> DenseFFN:
        """The dense FFN, while it is in its place, as plain tensors: views of the model's own.

        Raises:
            ResourceError: accelerate keeps them on the CPU or the disk and lends them to a pass.
        """
        root = self._model.get_submodule(self.root)
        ffn = ffn_of(root, self.formula)
        lent = any(tensor.is_meta for tensor in ffn.tensors().values())  # or a skeleton's
        if lent and any(hasattr(module, "_hf_hook") for module in root.modules()):
            raise ResourceError(
                "The weights of an FFN lie on no device.",
                value=f"layer {self.index}, {self.root}: device_map offloaded it to CPU or disk",
                rule="devices hold every FFN that is captured or replaced",
                remedy="run where the devices have room for the whole model, or on the CPU "
                "(runtime.device=cpu model.device_map=null)",
            )
        return ffn

    def replace(self, module: nn.Module) -> None:
        """Put `module`, (..., d_model) -> the same, in the FFN's place.

        The dense `slot.module` as it was found puts the dense FFN back.
        """
        for path in self.bypassed:
            back = self._found[path] if module is self._found[self.path] else nn.Identity()
            self._model.set_submodule(path, back)
        self._model.set_submodule(self.path, module)


def input_device(model: nn.Module) -> torch.device:
    """Where its token ids go: to its embedding, or the CPU where `device_map` offloaded that."""
    device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def find_ffns(model: nn.Module) -> list[FFNSlot]:
    """Every FFN, in order: an encoder's before its decoder's, a multimodal model's text model's.

    Raises:
        InputError: no FFN is found, no formula gives its numbers, or layers share one; names the
            layer's class and the projections seen.
    """
    slots, known = [], {}
    for path, layer in _layers(model):
        for root in _propose(layer):
            kind = _kind(layer.get_submodule(root))
            if kind not in known:
                known[kind] = prove(layer.get_submodule(root))
            place = known[kind]
            if place is None:
                what = type(layer.get_submodule(root)).__name__
                raise _refused(layer, f"no known formula gives what {what} computes")
            slots.append(FFNSlot(model, len(slots), join(path, root), place))
    _check_shared(model, slots)
    return slots


# Layers


def text_config(model: nn.Module) -> Any:
    """The model's configuration; of a multimodal one that of its text model."""
    config: Any = model.config
    return config if config.is_encoder_decoder else config.get_text_config(decoder=True)


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers and their paths, those of an encoder first."""
    stacks = list(_stacks(model, ""))
    text = text_config(model)
    if text is not model.config:
        n, d = text.num_hidden_layers, text.hidden_size
        stacks = [s for s in stacks if len(s[1]) == n and d in widest_pair(s[1][0])]
    if not stacks:
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
        n = getattr(text, "num_hidden_layers", None)
        longest = max(lists, key=lambda m: (len(m) == n, len(m)), default=[model])
        example = next((layer for layer in longest if not widest_pair(layer)), longest[0])
        _check_dense(example)
        raise _refused(example, "no module outside attention holds an FFN's projections")
    stacks.sort(key=lambda stack: "decoder" in stack[0])
    return [(f"{p}.{k}", layer) for p, layers in stacks for k, layer in enumerate(layers)]


def _stacks(module: nn.Module, path: str) -> Iterator[tuple[str, nn.ModuleList | nn.Sequential]]:
    """The innermost lists all of whose members hold an FFN's projections."""
    for name, child in module.named_children():
        if is_attention(name) or "expert" in name:
            continue
        below = list(_stacks(child, join(path, name)))
        yield from below
        if not below and isinstance(child, nn.ModuleList | nn.Sequential) and len(child):
            yield from [(join(path, name), child)] if all(map(widest_pair, child)) else []


def _check_shared(model: nn.Module, slots: list[FFNSlot]) -> None:
    """Refuse a model that runs one FFN in several layers."""
    n_layers = getattr(text_config(model), "num_hidden_layers", None) or 0
    n_ffns = len({id(slot.module) for slot in slots})
    if n_ffns < max(n_layers, len(slots)):
        why = f"{max(n_layers, len(slots))} layers share {n_ffns}"
        raise _refused(model.get_submodule(slots[0].root), why)


# Proposals


def _propose(layer: nn.Module) -> list[str]:
    """Paths in the layer of the smallest modules that hold a pair of the widest kind."""
    _check_dense(layer)
    d, f = widest_pair(layer)
    below: dict[str, list[tuple[int, int]]] = {}
    for name, shape in outside_attention(layer).items():
        parts = name.split(".")
        for k in range(len(parts)):
            below.setdefault(".".join(parts[:k]), []).append(shape)
    holding = [path for path, shapes in below.items() if is_pair(shapes, d, f)]
    return [p for p in holding if not any(is_below(q, p) for q in holding)]


def _check_dense(layer: nn.Module) -> None:
    """Refuse a layer that has experts already."""
    if any("experts" in name for name in outside_attention(layer)) or _stacked(layer):
        raise _refused(layer, "it is already sparse")


def _stacked(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of experts that are kept in one tensor."""
    return {
        f"{path}.{name}": tuple(parameter.shape)
        for path, module in layer.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and min(parameter.shape) > 1
        if not isinstance(module, _ConvNd) and not is_attention(path)
    }


def _kind(module: nn.Module) -> tuple[object, ...]:
    """Equal for modules that compute the same from weights of the same shapes."""
    shapes = tuple((n, tuple(p.shape)) for n, p in module.named_parameters())
    settings = {n: v for n, v in vars(module).items() if isinstance(v, bool | int | float | str)}
    settings.pop("layer_idx", None)
    return type(module), repr(module), shapes, tuple(sorted(settings.items()))


def _refused(layer: nn.Module, why: str) -> InputError:
    shapes = {n: f"{i} -> {o}" for n, (o, i) in projections(layer).items()}
    stacked = _stacked(layer)
    return InputError(
        f"No dense FFN was found in {type(layer).__name__}: {why}.",
        value=f"projections {shapes}" + (f"; stacked experts {stacked}" if stacked else ""),
        rule="each layer has an FFN of two or three projections, plain or gated, of its own",
        remedy="set model.id to a dense model (`python -m pipeline inspect <model>` tells); for "
        "another kind of FFN see `A family` in CONTRIBUTING.md",
    )
