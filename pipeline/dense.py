"""The dense model: load it, find the FFN of each layer, and replace it.

An FFN is proposed by structure: in each layer, outside attention, the outermost module that holds a
d -> f and an f -> d projection. It is accepted by numbers: a formula over its projections must give
the module's own output on random weights and input, which also settles which one is the gate and
what the activation function is. A model on the meta device is described the same way.
"""

import contextlib
import copy
import fnmatch
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from pipeline import modeling, record, workdir
from pipeline.errors import ConfigError, InputError
from pipeline.ffn import ACTIVATIONS, DenseFFN

INDEX = "model.safetensors.index.json"
TOLERANCE = 1e-4
"""Largest error of a formula in float32, relative to the largest output."""

modeling.register()  # a converted model can be opened here too, with no code of its folder

# Loading


def load_model(
    source: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal LM from a local folder or the hub, in evaluation mode, from safetensors only.

    Args:
        device: where it goes, unless `device_map` spreads it as transformers does.

    Raises:
        ConfigError: remote code without a pinned revision.
        InputError: the model is missing, gated or unusable; one line says why.
    """
    _check_source(source, revision, trust_remote_code)
    with _explained(source):
        loaded = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # named below, as what is missing is
        )
    model, info = loaded  # type: ignore[misc]
    wrong = {kind: info[kind] for kind in ("missing_keys", "mismatched_keys") if info[kind]}
    if wrong:
        raise InputError(
            "The dense model lacks weights.",
            value=f"{source}: " + "; ".join(f"{k} {sorted(map(str, v))}" for k, v in wrong.items()),
            rule="every tensor that the configuration asks for is there, in its shape",
            remedy="fetch the model again: what is missing would be filled with random numbers",
        )
    return model.eval() if device_map else model.eval().to(device)  # pyright: ignore


def load_tokenizer(
    source: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; `InputError` when there is none."""
    _check_source(source, revision, trust_remote_code)
    with _explained(source):
        return AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )


def resolve(
    source: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """The record of a dense model: pinned revision, SHA-256 of its files, `describe`.

    Reads every byte of the files once.
    """
    described = inspect(source, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)
    commit = described["revision"]
    with _explained(source):
        folder = Path(source if commit is None else snapshot_download(source, revision=commit))
    files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".model"))
    return {"digests": {p.name: workdir.file_digest(p) for p in files}, **described}


def inspect(
    source: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """`describe` and the pinned revision, from the configuration alone: no weight is read."""
    _check_source(source, revision, trust_remote_code)
    with _explained(source):
        config = AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )
        with torch.device("meta"):
            stored = config.dtype or torch.float32
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=stored if dtype == "auto" else getattr(torch, dtype),
                trust_remote_code=trust_remote_code,
            )
    return {
        "revision": None if Path(source).is_dir() else config._commit_hash,
        **describe(model),
    }


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """What a model holds, as JSON values: family, sizes, each layer's FFN, its configuration."""
    slots = find_ffns(model)
    return {
        "family": model.config.model_type,
        "d_model": slots[0].d_model,
        "n_layers": len(slots),
        "vocab_size": model.config.get_text_config().vocab_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": [
            {"index": s.index, "path": s.path, "d_ff": s.d_ff}
            | {"gated": s.formula.gate is not None}
            | {"activation": s.formula.activation, "bias": s.has_bias}
            for s in slots
        ],
        "config": json.loads(model.config.to_json_string(use_diff=False)),
    }


def _check_source(source: str, revision: str | None, trust_remote_code: bool) -> None:
    if trust_remote_code and revision is None and not Path(source).is_dir():
        raise ConfigError(
            "Remote code is asked for without saying which.",
            value=f"{source}, revision null",
            rule="code of the hub runs only from a pinned commit",
            remedy="set model.revision to a commit, or model.trust_remote_code=false",
        )
    folder = Path(source)
    if not folder.is_dir():
        return
    names = {p.name for p in folder.glob("*.safetensors")}
    if (folder / INDEX).is_file():
        names |= set(workdir.read_json(folder / INDEX)["weight_map"].values())
    for name in sorted(names):
        inside = (folder / name).resolve().parent == folder.resolve()
        if Path(name).name != name or not inside:
            raise InputError(
                "The model's weights lie outside its folder.",
                value=f"{name} -> {(folder / name).resolve()}",
                rule="weight files are plain names of files in the model's folder",
                remedy="copy the file into the folder, or do not use this model",
            )


@contextlib.contextmanager
def _explained(source: str) -> Iterator[None]:
    """transformers' many ways to fail on a missing or gated model, as one `InputError`."""
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise InputError(
            "The dense model cannot be loaded.",
            value=f"{source}: {first.strip()[:300]}",
            rule="a hub id, or a folder with config.json, safetensors and a tokenizer",
            remedy="check the name; a gated model needs `hf auth login` or HF_TOKEN; "
            "HF_HUB_OFFLINE=1 finds only what is cached",
        ) from None


# Finding


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
class FFNSlot:
    """The place of one layer's FFN in a model."""

    index: int
    path: str  # of the module in the model
    parent: nn.Module
    formula: Formula

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def module(self) -> nn.Module:
        return getattr(self.parent, self.name)

    @property
    def d_model(self) -> int:
        return _weight(self.module, self.formula.down).shape[0]

    @property
    def d_ff(self) -> int:
        return _weight(self.module, self.formula.down).shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return _weight(self.module, self.formula.down).dtype

    @property
    def has_bias(self) -> bool:
        names = {self.formula.up, self.formula.down, self.formula.gate or self.formula.up}
        return any(_bias(self.module, name) is not None for name in names)

    def weights(self) -> DenseFFN:
        """The FFN as plain tensors: views of the model's own."""
        return _apply(self.module, self.formula)

    def replace(self, module: nn.Module) -> None:
        setattr(self.parent, self.name, module)


def find_ffns(model: nn.Module) -> list[FFNSlot]:
    """The FFN of every layer, in order.

    Raises:
        InputError: no FFN is found, or no formula gives its numbers; names the layer's class and
            the projections seen.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    slots, known = [], {}
    for index, (path, layer) in enumerate(_layers(model, config.num_hidden_layers)):
        below = _propose(layer, config.hidden_size)
        module = layer.get_submodule(below)
        kind = _kind(module)
        if kind not in known:
            known[kind] = _verified_formula(module, layer, config.hidden_size)
        parent = layer.get_submodule(below.rpartition(".")[0])
        slots.append(FFNSlot(index, f"{path}.{below}", parent, known[kind]))
    return slots


def select_layers(paths: Sequence[str], which: Iterable[int | str] | None) -> list[int]:
    """Indices of the layers that are meant, ascending and each once.

    Args:
        paths: of each layer's FFN, as `find_ffns` gives them.
        which: indices, and patterns of `fnmatch` over the whole path (`*.1?.mlp`); None = all.

    Raises:
        InputError: an index that the model does not have, or a pattern that matches no path.
    """
    chosen: set[int] = set()
    for wanted in range(len(paths)) if which is None else which:
        if isinstance(wanted, int):
            found = [wanted] if 0 <= wanted < len(paths) else []
        else:
            found = [k for k, path in enumerate(paths) if fnmatch.fnmatchcase(path, wanted)]
        if not found:
            raise InputError(
                "The model does not have this layer.",
                value=wanted,
                rule=f"an index from 0 to {len(paths) - 1}, or a pattern over the FFNs' paths: "
                + path_pattern(paths),
                remedy="name a layer that is there; `*` stands for anything, dots too",
            )
        chosen.update(found)
    return sorted(chosen)


def path_pattern(paths: Sequence[str]) -> str:
    """The layers' paths in short: `model.layers.{0..3}.mlp`."""
    alike: dict[tuple[str, str], list[int]] = {}
    for index, path in enumerate(paths):
        head, _, tail = path.partition(f".{index}.")
        alike.setdefault((head, tail), []).append(index)
    return ", ".join(f"{h}.{{{record.spans(indices)}}}.{t}" for (h, t), indices in alike.items())


def _kind(module: nn.Module) -> tuple[object, ...]:
    """Equal for modules that compute the same from weights of the same shapes."""
    shapes = tuple((n, tuple(p.shape)) for n, p in module.named_parameters())
    settings = {n: v for n, v in vars(module).items() if isinstance(v, bool | int | float | str)}
    return type(module), repr(module), shapes, tuple(sorted(settings.items()))


def _layers(model: nn.Module, n_layers: int) -> list[tuple[str, nn.Module]]:
    """The layers and their paths in the model."""
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return [(f"{path}.{index}", layer) for index, layer in enumerate(module)]
    raise _refused(model, model, "it has no list of num_hidden_layers layers")


def _projections(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Name -> (out, in) of every linear projection below a module."""
    found = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    return {n: (_weight(module, n).shape[0], _weight(module, n).shape[1]) for n in found}


def _propose(layer: nn.Module, d_model: int) -> str:
    """The path of the FFN in its layer."""
    for path, module in layer.named_modules():  # outermost first
        if not path or any("attn" in part or "attention" in part for part in path.split(".")):
            continue
        shapes = set(_projections(module).values())
        widens = any(i == d_model for _, i in shapes)
        narrows = any(o == d_model for o, _ in shapes)
        if len(_projections(module)) > 1 and widens and narrows:
            return path
    raise _refused(layer, layer, "no module outside attention holds an FFN's projections")


def _verified_formula(module: nn.Module, layer: nn.Module, d_model: int) -> Formula:
    """The formula that gives the module's own output, in float32 on the CPU.

    On random weights, large enough that activation functions differ where they bend.
    """
    trial = copy.deepcopy(module).to_empty(device="cpu").float().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in trial.parameters():
        parameter.data.normal_(std=2 * d_model**-0.5, generator=generator)
    x = torch.randn(1, 8, d_model, generator=generator)
    with torch.inference_mode():
        try:
            y = trial(x)
        except TypeError as error:
            raise _refused(layer, module, f"it takes more than its input ({error})") from None
        if not isinstance(y, Tensor) or y.shape != x.shape:
            raise _refused(layer, module, "it does not map (tokens, d_model) to the same")
        candidates = list(_candidates(_projections(trial), d_model))
        errors = [float((_apply(trial, c)(x) - y).abs().max()) for c in candidates]
        # The best, not the first that is good enough: the two kinds of gelu are that close.
        if errors and min(errors) <= TOLERANCE * float(y.abs().max()):
            return candidates[errors.index(min(errors))]
    raise _refused(layer, module, "no known formula gives its output")


def _candidates(shapes: dict[str, tuple[int, int]], d_model: int) -> Iterator[Formula]:
    """Every formula that the shapes allow."""
    for order in itertools.permutations(shapes, len(shapes)):
        *inner, down = order
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


def _apply(module: nn.Module, formula: Formula) -> DenseFFN:
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


def _refused(layer: nn.Module, module: nn.Module, why: str) -> InputError:
    shapes = {n: f"{i} -> {o}" for n, (o, i) in _projections(layer).items()}
    stacked = {n: tuple(p.shape) for n, p in layer.named_parameters() if p.dim() == 3}
    return InputError(
        f"No dense FFN was found in {type(layer).__name__}: {why}.",
        value=f"{type(module).__name__}; projections {shapes}"
        + (f"; stacked experts {stacked}: already sparse" if stacked else ""),
        rule="each layer has one FFN of two or three projections, plain or gated",
        remedy="use a dense model of a supported family; docs/design.md lists them",
    )
