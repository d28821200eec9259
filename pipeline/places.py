"""Prove by numbers where in a module its FFN lies, on random weights and input.

Two kinds of place are known:

- The module is the FFN: a formula over its projections gives its output. The formula also settles
  which projection is the gate, and the activation function. A sparse layer takes its place.
- The FFN is a chain up -> act -> down within a module that does more (OPT's layer; BERT's, with
  the chain in two modules; Bloom's, which adds the residual). A sparse layer takes the place of
  down, and nn.Identity that of whatever leads there, so that down(act(up(x))) becomes moe(x). It is
  proved twice: the chain gives the formula's output, and the whole module computes the same with
  the formula in that place.
"""

import copy
import inspect
import itertools
from collections.abc import Iterator, Mapping, ValuesView
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from pipeline.ffn import ACTIVATIONS, DenseFFN
from pipeline.runtime import settle_kernels

TOLERANCE = 1e-4
"""Largest error of a formula in float32, relative to the largest output."""

PERIOD, OFFSET = 131_071, 7919
"""Of the noise in trial weights, and from one weight's to the next's. Prime: no row repeats.

To draw every number took twice the time of all the rest (d_model 2048, d_ff 8192); so many stay in
a core's cache, which halves the search against a million."""


@dataclass(frozen=True)
class Formula:
    """Which projections of a module make its FFN, by their names in it."""

    up: str
    down: str
    gate: str | None
    activation: str
    fused: bool = False  # gate and up are the halves of one projection: `gate_first` says which
    gate_first: bool = True


@dataclass(frozen=True)
class Place:
    """Where the FFN lies in a module; all paths are relative to it."""

    formula: Formula
    path: str  # what a sparse layer takes the place of
    bypassed: tuple[str, ...] = ()  # what leads there, in order; nn.Identity beside a sparse layer


def prove(module: nn.Module) -> Place | None:
    """The place in `module`, all of which is the FFN, or a chain in it; None where neither is."""
    settle_kernels()
    trial = _trial(module)
    formula = _formula_of_all(trial)
    return _chain(trial) if formula is None else Place(formula, "")


# Projections


def is_attention(path: str) -> bool:
    return any("attn" in part or "attention" in part for part in path.lower().split("."))


def projections(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Name -> (out, in) of every linear projection below a module."""
    found = [n for n, m in module.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    return {name: tuple(_weight(module, name).shape) for name in found}  # pyright: ignore


def outside_attention(layer: nn.Module) -> dict[str, tuple[int, int]]:
    """`projections`, those of attention left out."""
    return {n: shape for n, shape in projections(layer).items() if not is_attention(n)}


def is_pair(shapes: list[tuple[int, int]], d: int, f: int) -> bool:
    """Whether there are an f -> d, and another that is d -> f or d -> 2f."""
    n_up = shapes.count((f, d)) + shapes.count((2 * f, d))
    return (d, f) in shapes and n_up > (1 if d == f else 0)


def widest_pair(layer: nn.Module) -> tuple[int, ...]:
    """(d, f) of the largest pair outside attention; () where there is none."""
    shapes = list(outside_attention(layer).values())
    pairs = [(d, f) for d, f in shapes if is_pair(shapes, d, f)]
    return max(pairs, key=lambda pair: (pair[0] * pair[1], pair[1]), default=())


def is_below(path: str, above: str) -> bool:
    """Whether the module at `path` is a part of that at `above`."""
    return path != above and (not above or path.startswith(f"{above}."))


def join(path: str, below: str) -> str:
    """Either may be empty: the module itself."""
    return f"{path}.{below}" if path and below else path or below


# Proofs


def _trial(module: nn.Module) -> nn.Module:
    """A copy in float32 on the CPU, with random weights large enough that activations bend.

    It has none of accelerate's hooks, which fetch the module's weights and send its input away.
    """
    noise = torch.randn(PERIOD, generator=torch.Generator().manual_seed(0))
    own: dict[int, Any] = {}  # in the place of the module's, none of which is copied first
    for k, parameter in enumerate(module.parameters()):
        rolled, std = noise.roll(k * OFFSET), 2 * parameter.shape[-1] ** -0.5
        flat = torch.empty(parameter.numel())
        for piece in flat.split(PERIOD):
            torch.mul(rolled[: len(piece)], std, out=piece)
        own[id(parameter)] = nn.Parameter(flat.view(parameter.shape))
    for buffer in module.buffers():
        kept = torch.zeros_like(buffer, device="cpu") if buffer.is_meta else buffer.cpu().clone()
        own[id(buffer)] = kept.float() if kept.is_floating_point() else kept
    hooks = [m._hf_hook for m in module.modules() if hasattr(m, "_hf_hook")]
    if not hooks:
        return copy.deepcopy(module, own).eval()
    from accelerate.hooks import ModelHook, remove_hook_from_submodules  # not all have it

    own |= {id(hook): ModelHook() for hook in hooks}  # theirs would put weights back
    trial = copy.deepcopy(module, own).eval()
    remove_hook_from_submodules(trial)
    return trial


def _input(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


def _formula_of_all(trial: nn.Module) -> Formula | None:
    """The formula that gives the module's own output from its only input."""
    shapes = projections(trial)
    if len(shapes) > 3:
        return None
    for d in dict.fromkeys(i for _, i in shapes.values()):
        x = _input(1, 8, d)
        try:
            with torch.inference_mode():
                y = trial(x)
        except Exception:  # whatever it says to an input that it does not take
            continue
        if isinstance(y, Tensor) and y.shape == x.shape:
            return _best(trial, _candidates(shapes, d), x, y)
    return None


def _best(trial: nn.Module, candidates: Iterator[Formula], x: Tensor, y: Tensor) -> Formula | None:
    """The nearest to y, not the first that is good enough: the two kinds of gelu are that close.

    A product of a projection serves all the formulas that it is in: reading its weights is what a
    few rows cost.
    """
    products: dict[tuple[int, torch.Size], Tensor] = {}

    def product(weight: Tensor, bias: Tensor | None) -> Tensor:
        key = weight.data_ptr(), weight.shape
        if key not in products:
            products[key] = F.linear(x, weight, bias)
        return products[key]

    bent: dict[str, dict[Formula, Tensor]] = {}  # by the projection that they go through at last
    with torch.inference_mode():
        for c in candidates:
            ffn = ffn_of(trial, c)
            gate = None if ffn.gate_proj is None else product(ffn.gate_proj, ffn.gate_bias)
            hidden = ffn.bend(product(ffn.up_proj, ffn.up_bias), gate)
            bent.setdefault(c.down, {})[c] = hidden
        errors: dict[Formula, float] = {}
        for down, hidden in bent.items():
            weight, bias = _weight(trial, down), _bias(trial, down)
            given = F.linear(torch.stack([*hidden.values()]), weight, bias)
            errors |= {
                c: float((one - y).abs().max()) for c, one in zip(hidden, given, strict=True)
            }
    best = min(errors, key=lambda c: errors[c], default=None)
    return best if best and errors[best] <= TOLERANCE * float(y.abs().max()) else None


def _candidates(shapes: dict[str, tuple[int, int]], d_model: int) -> Iterator[Formula]:
    """Every formula over all of the projections that their shapes allow."""
    for *inner, down in itertools.permutations(shapes):
        d_ff = shapes[down][1]
        widths = [shapes[name] for name in inner]
        if shapes[down][0] != d_model:
            continue
        for act in ACTIVATIONS:
            if widths == [(d_ff, d_model)]:
                yield Formula(inner[0], down, None, act)
            if widths == [(d_ff, d_model)] * 2:
                yield Formula(inner[1], down, inner[0], act)
            if widths == [(2 * d_ff, d_model)]:
                for first in (True, False):
                    yield Formula(inner[0], down, inner[0], act, fused=True, gate_first=first)


def _chain(trial: nn.Module) -> Place | None:
    """The place of an up -> act -> down that lies in a larger module."""
    d, f = widest_pair(trial)
    shapes = outside_attention(trial)
    for width, inner in ((d, f), (f, d)):
        for up, down in itertools.permutations(shapes, 2):
            if (shapes[up], shapes[down]) != ((inner, width), (width, inner)):
                continue
            parts = up.split(".")
            for first in (".".join(parts[: k + 1]) for k in range(len(parts))):
                if first != down and not is_below(down, first):
                    found = (_chain_from(run, first, up, down) for run in _runs(trial, width))
                    place = next(filter(None, found), None)
                    if place is not None:
                        return place
    return None


def _chain_from(run: "_Run", first: str, up: str, down: str) -> Place | None:
    """The place at `down`, if all that runs from `first` to there is that chain."""
    seen = _watch(run, first, down)
    if seen is None:
        return None
    acts = (Formula(up, down, None, act) for act in ACTIVATIONS)
    formula = _best(run.module, acts, seen.x, seen.y)
    if formula is None or any([*run.module.get_submodule(m).parameters()] for m in seen.between):
        return None
    place = Place(formula, down, (first, *seen.between))
    replaced = _copied(run.module)
    for path in place.bypassed:
        replaced.set_submodule(path, nn.Identity())
    replaced.set_submodule(down, _Applied(ffn_of(run.module, formula)))
    again = _watch(_Run(replaced, run.states, run.others), first, down)
    if again is None or not seen.output or not all(map(_close, again.output, seen.output)):
        return None
    return place


@dataclass
class _Run:
    """A call that a module may take: `states`, and the same value for whatever else it needs."""

    module: nn.Module
    states: Tensor
    others: Tensor | None

    def __call__(self) -> object:
        _, *rest = inspect.signature(self.module.forward).parameters.values()
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        needed = [p.name for p in rest if p.default is p.empty and p.kind in kinds]
        return self.module(self.states, **dict.fromkeys(needed, self.others))


def _runs(trial: nn.Module, d_model: int) -> Iterator[_Run]:
    """Ways to run a module of which only the code is known, whatever its attention needs."""
    states = _input(1, 8, d_model)
    parts = [path for path, module in trial.named_modules() if [*module.children()]]  # no norms
    attention = [path for path in parts if is_attention(path)]
    outermost = [p for p in attention if not any(is_below(p, q) for q in attention)]
    for outputs in (states, (states,), (states, None), (states, None, None)):
        module = _copied(trial)
        for path in outermost:  # what it looks up of them, it finds
            module.get_submodule(path).forward = lambda *_, outputs=outputs, **__: outputs
        yield from (_Run(module, states, others) for others in (None, states))


def _copied(module: nn.Module) -> nn.Module:
    """Modules of its own, the same tensors."""
    return copy.deepcopy(module, {id(t): t for t in (*module.parameters(), *module.buffers())})


class _Applied(nn.Module):
    """An FFN's formula as a module."""

    def __init__(self, ffn: DenseFFN) -> None:
        super().__init__()
        self.ffn = ffn

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(x)


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= TOLERANCE * b.abs().max())


@dataclass
class _Seen:
    """What went through a chain: x in, y out, and which other modules ran between its ends."""

    x: Tensor
    y: Tensor
    between: list[str]
    output: list[Tensor]  # of the module that was called


def _watch(run: _Run, first: str, down: str) -> _Seen | None:
    """Run it with random input at `first`; None where it does not run through the chain."""
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    ran: list[str] = []

    def give(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        xs.append(_input(*args[0].shape))
        ran.clear()
        return (xs[-1], *args[1:])

    def take(_: nn.Module, args: object, y: Tensor) -> None:
        ys.append(y)
        ran.append(down)

    with ExitStack() as stack:
        for path, part in run.module.named_modules():
            if path == first:
                stack.callback(part.register_forward_pre_hook(give).remove)
            elif path == down:
                stack.callback(part.register_forward_hook(take).remove)
            elif not path.startswith(f"{first}.") and not [*part.children()]:
                note = partial(_note, ran, path)
                stack.callback(part.register_forward_pre_hook(note).remove)
        try:
            with torch.inference_mode():
                output = run()
        except Exception:  # whatever it says to arguments that it does not take
            return None
    if not xs or down not in ran or xs[-1].shape != ys[-1].shape:
        return None
    return _Seen(xs[-1], ys[-1], ran[: ran.index(down)], _tensors(output))


def _note(ran: list[str], path: str, module: nn.Module, args: object) -> None:
    ran.append(path)


def _tensors(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output
    if not isinstance(parts, tuple | list | ValuesView):
        return []
    return [tensor for part in parts for tensor in _tensors(part)]


# Weights


def ffn_of(module: nn.Module, formula: Formula) -> DenseFFN:
    """The FFN that a formula makes of a module's projections: views of its tensors."""
    up, up_bias = _weight(module, formula.up), _bias(module, formula.up)
    gate = gate_bias = None
    if formula.fused:
        halves = up.chunk(2) if formula.gate_first else up.chunk(2)[::-1]
        gate, up = halves
        if up_bias is not None:
            halves = up_bias.chunk(2) if formula.gate_first else up_bias.chunk(2)[::-1]
            gate_bias, up_bias = halves
    elif formula.gate is not None:
        gate, gate_bias = _weight(module, formula.gate), _bias(module, formula.gate)
    down, down_bias = _weight(module, formula.down), _bias(module, formula.down)
    return DenseFFN(up, down, gate, up_bias, down_bias, gate_bias, formula.activation)


def _weight(module: nn.Module, name: str) -> Tensor:
    """(out, in), whichever way the projection keeps it."""
    projection = module.get_submodule(name)
    weight = projection.get_parameter("weight").data
    return weight.t() if isinstance(projection, Conv1D) else weight


def _bias(module: nn.Module, name: str) -> Tensor | None:
    bias = module.get_submodule(name).bias
    return None if bias is None else bias.data  # type: ignore[union-attr, return-value]
