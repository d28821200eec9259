"""A dense FFN as plain tensors: the formula that every sparse layer is measured against.

`y = down_proj(act(gate_proj x) * (up_proj x))`, or `y = down_proj(act(up_proj x))` where there is
no gate. Kept apart from transformers, so that a layer can be trained where only torch is installed.

Shapes: T tokens, D d_model, F d_ff.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from pipeline import preflight
from pipeline.errors import ArtifactError, InputError

HEADER = "dense_ffn"
"""The one entry of a file's metadata."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
"""Activation functions by the name under which they are stored."""


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation function stored under `name`; `InputError` when it is not one of ours."""
    if name not in ACTIVATIONS:
        raise InputError(
            "The FFN's activation function is not known.",
            value=name,
            rule=f"one of {', '.join(sorted(ACTIVATIONS))}",
            remedy="add it to ACTIVATIONS in pipeline/ffn.py",
        )
    return ACTIVATIONS[name]


@dataclass(frozen=True)
class DenseFFN:
    """The weights of one dense FFN, all of one dtype on one device."""

    up_proj: Tensor  # (F, D)
    down_proj: Tensor  # (D, F)
    gate_proj: Tensor | None = None  # (F, D)
    up_bias: Tensor | None = None  # (F,)
    down_bias: Tensor | None = None  # (D,)
    gate_bias: Tensor | None = None  # (F,)
    activation: str = "silu"

    @property
    def d_model(self) -> int:
        return self.up_proj.shape[1]

    @property
    def d_ff(self) -> int:
        return self.up_proj.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that this FFN has, by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "DenseFFN":
        moved = {name: t.to(device, dtype) for name, t in self.tensors().items()}
        return DenseFFN(**moved, activation=self.activation)

    def take(self, neurons_N: Tensor) -> "DenseFFN":
        """The same of some of its neurons; the output bias stays."""
        kept = {
            name: t[:, neurons_N] if name == "down_proj" else t[neurons_N]
            for name, t in self.tensors().items()
            if name != "down_bias"
        }
        return DenseFFN(**kept, down_bias=self.down_bias, activation=self.activation)

    def hidden(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, F): each neuron's activation, the input of `down_proj`."""
        up = F.linear(x, self.up_proj, self.up_bias)
        if self.gate_proj is None:
            return self.bend(up)
        return self.bend(up, F.linear(x, self.gate_proj, self.gate_bias))

    def bend(self, up: Tensor, gate: Tensor | None = None) -> Tensor:
        """What `hidden` makes of the products of `up_proj` and `gate_proj`, (T, F) each."""
        act = activation(self.activation)
        return act(up) if gate is None else act(gate) * up

    def __call__(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        return F.linear(self.hidden(x), self.down_proj, self.down_bias)

    def save(self, path: Path) -> None:
        """As safetensors; the header names the activation and the SHA-256 of the tensors.

        In one entry: several have no order, and equal weights would not be equal bytes.
        """
        tensors = {name: t.contiguous() for name, t in self.tensors().items()}
        told = {"activation": self.activation, "sha256": _digest(tensors)}
        save_file(tensors, path, metadata={HEADER: json.dumps(told)})

    @classmethod
    def load(cls, path: Path) -> "DenseFFN":
        """What `save` wrote; `ArtifactError` where the file is missing, damaged or another's."""
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                told = json.loads(file.metadata()[HEADER])
            if told["sha256"] != _digest(tensors):
                raise ValueError("its tensors have not the SHA-256 that its header names")
            return cls(**tensors, activation=told["activation"])
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            preflight.let_through(error)
            raise ArtifactError(
                "The weights of a dense FFN cannot be read.",
                value=f"{path.absolute()}: {error}",
                rule="a safetensors file, as `capture` wrote it",
                remedy="run `dvc repro -f -s capture`, or capture the layer again",
            ) from None


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().view(torch.uint8).numpy().data)
    return found.hexdigest()
