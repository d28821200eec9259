"""From trained layers to a sparse checkpoint that transformers loads.

What a conversion leaves alone goes from the dense model's files into the checkpoint's tensor by
tensor, under the names of the host architecture; the sparse layers follow one by one. Neither
model is built for that. The modelling file comes with it where the host is our own. Then it is
proved (`proof.py`) that the checkpoint computes what the layers in the dense model's place do.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)

from pipeline import artifacts, dense, hosts, pretrained, proof, weights
from pipeline.assembly import read_norms, replace_ffns, set_norms
from pipeline.errors import ArtifactError, ConfigError, InputError
from pipeline.layers import check_weights, layer_folders, load_layer, read_shape
from pipeline.moe import SparseMoE
from pipeline.record import WEIGHTS
from pipeline.shape import MoEShape

AHEAD = 2
"""Layers that are hashed while one is written: one thread waits for the disk, one computes."""


def convert_to_sparse(
    dense_model: nn.Module,
    layers_folder: Path | str,
    layers: Sequence[int] | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Put trained layers in the FFNs' places, in memory; returns the same model.

    Args:
        dense_model: of transformers; it is changed. Each layer takes its FFN's dtype and device,
            but for the router, which stays float32 where the host keeps it so.
        layers_folder: holds `layer_K/` as `train` or `heal` writes them; healed norms beside them
            are set too.
        layers: which of them; null = all that are there.
        device: where the model is moved; null = it stays.

    Raises:
        InputError: there are no such layers, or they belong to another model.
        ArtifactError: a layer is damaged.
    """
    folders = layer_folders(Path(layers_folder))
    chosen = list(folders) if layers is None else list(layers)
    absent = sorted(set(chosen) - set(folders))
    if absent:
        raise InputError(
            "Some of the layers have not been trained.",
            value=f"layers {absent}; {Path(layers_folder).absolute()} holds {list(folders)}",
            rule="every layer that is named has its folder layer_K",
            remedy="name fewer layers, or train these",
        )
    read = {k: load_layer(folders[k]) for k in chosen}
    known = {k: _host({k: record["host"]}) for k, (_, record) in read.items()}
    _replace(dense_model, {k: moe for k, (moe, _) in read.items()}, known)
    set_norms(dense_model, read_norms(Path(layers_folder)))
    return dense_model if device is None else dense_model.to(device)


def assemble(
    source: str,
    folders: Mapping[int, Path],
    folder: Path,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    norms: Mapping[str, Tensor] | None = None,
    max_shard_size: str = "2GB",
    tolerance: float = 1e-3,
) -> dict[str, str]:
    """Write the sparse checkpoint of the dense model `source` to `folder`, and prove it.

    All on the CPU: a model that fits the host's memory need not fit a GPU's. Returns the SHA-256
    of the files that were read again for the proof, by name.

    Args:
        norms: healed ones, by name; null = the dense model's own.
        tolerance: largest difference of a logit, relative to the largest logit.

    Raises:
        ConfigError: the layers' host cannot hold this model.
        InputError: the layers or the norms belong to another model.
        ArtifactError: a layer is damaged, or the reloaded checkpoint computes something else.
    """
    how = {"dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code}
    with proof.FreshProcess() as fresh:
        conversion = Conversion(source, folders, norms or {}, how)
        if not proof.fits(conversion.planned()):
            with proof.ReadBack(fresh) as read_back:
                written = conversion.write(folder, max_shard_size, read_back.follow)
                return read_back.compare(written)

        def in_memory() -> PreTrainedModel:
            return conversion.put_into(dense.load_model(source, **how))

        conversion.write(folder, max_shard_size)
        proof.prove(fresh, folder, in_memory, conversion.described["vocab_size"], tolerance)
        return {}


class Conversion:
    """A dense model, the sparse layers that take its FFNs' places, and the host of them all.

    It holds no weights but the norms: they are read when they are asked for.

    Args:
        source, folders: as `assemble` takes them.
        norms: healed ones, by name.
        how: `dtype`, `revision` and `trust_remote_code` of the dense model.

    Raises:
        ConfigError: the layers' host cannot hold this model.
        InputError: the layers or the norms belong to another model.
        ArtifactError: a layer is damaged.
    """

    def __init__(
        self,
        source: str,
        folders: Mapping[int, Path],
        norms: Mapping[str, Tensor],
        how: Mapping[str, Any],
    ) -> None:
        self.source, self.folders, self.norms, self.how = source, folders, norms, how
        self.loading = {k: v for k, v in how.items() if k != "dtype"}
        self.skeleton = dense.skeleton(source, **how)
        self.described = dense.describe(self.skeleton)
        self.dtype: torch.dtype = getattr(torch, self.described["dtype"])
        set_norms(self.skeleton, norms)
        read = {k: read_shape(path) for k, path in folders.items()}
        self.shapes = {k: shape for k, (shape, _) in read.items()}
        self.host = _host({k: record["host"] for k, (_, record) in read.items()})
        _check_host(self.host, self.described, self.shapes)
        self.stored = self.host.stored(self.shapes)
        with torch.device("meta"):
            empty = {k: SparseMoE(shape) for k, shape in self.shapes.items()}
        paths = replace_ffns(self.skeleton, empty).values()
        below = tuple(f"{path}." for path in paths)
        own = weights.persistent(self.skeleton)
        self.kept = {name: t for name, t in own.items() if not name.startswith(below)}

    def write(
        self,
        folder: Path,
        max_shard_size: str,
        final: Callable[[Path, int], object] = lambda path, end: None,
    ) -> dict[str, int]:
        """The checkpoint: configuration, weights, tokenizer; as `weights.write`."""
        config = AutoConfig.for_model(
            self.host.model_type, **self.host.config(self.described, self.shapes)
        )
        causal = self.skeleton.can_generate()
        auto_class = AutoModelForCausalLM if causal else AutoModel
        with torch.device("meta"):
            hosted = auto_class.from_config(config, dtype=self.dtype)
        if causal:
            hosted.generation_config = self._generation_config()
        tokenizer = pretrained.load_tokenizer(self.source, **self.loading)
        hosted.save_pretrained(folder, state_dict={})
        tokenizer.save_pretrained(folder)
        return weights.write(folder, self.planned(), self.tensors(), max_shard_size, final)

    def planned(self) -> dict[str, Tensor]:
        """Every tensor of the checkpoint, on the meta device."""
        found = dict(self._kept(weights.Resident(self.kept)))
        with torch.device("meta"):
            empty = {k: SparseMoE(shape) for k, shape in self.stored.items()}
        for k, moe in empty.items():
            found |= self._placed(k, moe)
        return {name: torch.empty_like(t, device="meta") for name, t in found.items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The same, one after the other; each sparse layer is read when its turn comes.

        It is held against its digest right before, while those before it are written, so that it
        comes from the disk once.
        """
        found = weights.find(self.skeleton, self.kept, self.source, self.how["revision"])
        if isinstance(found, str):
            print(f"the dense model is read as a whole, since {found}", flush=True)
            found = weights.Resident(dense.load_model(self.source, **self.how).state_dict())
        with ThreadPoolExecutor(AHEAD) as threads:
            paths = iter(self.folders.values())
            sound = deque(threads.submit(_check_exposing, path) for path in islice(paths, AHEAD))
            yield from self._kept(found)
            for k, path in self.folders.items():  # no name keeps a layer while the next is read
                sound.popleft().result()
                sound += [threads.submit(_check_exposing, path) for path in islice(paths, 1)]
                yield from self._placed(
                    k, pad_experts(load_layer(path, mapped=True)[0], self.stored[k])
                ).items()

    def put_into(self, model: PreTrainedModel) -> PreTrainedModel:
        """The same conversion in memory; returns the model, which is changed."""
        set_norms(model, self.norms)
        layers = {k: load_layer(path)[0] for k, path in self.folders.items()}
        _replace(model, layers, dict.fromkeys(layers, self.host))
        return model

    def _generation_config(self) -> GenerationConfig | None:
        try:
            return GenerationConfig.from_pretrained(self.source, revision=self.how["revision"])
        except OSError:  # it has none
            return self.skeleton.generation_config

    def _kept(self, source: weights.Weights) -> Iterator[tuple[str, Tensor]]:
        for name, like in self.kept.items():
            for there, rows in self.host.pieces(self.described, name).items():
                tensor = self.norms[name] if name in self.norms else source.read(name, rows)
                yield there, tensor.to(like.dtype)
        for name, shape in self.host.made_up(self.described).items():
            yield name, torch.zeros(shape, dtype=self.dtype)

    def _placed(self, layer: int, moe: SparseMoE) -> dict[str, Tensor]:
        tensors = {
            name: tensor if name.startswith(self.host.float32) else tensor.to(self.dtype)
            for name, tensor in moe.state_dict().items()
        }
        return self.host.layer(self.described, layer, tensors)


def _check_exposing(folder: Path) -> None:
    """`check_weights`, and DVC sees what rotted, as of any artefact."""
    try:
        check_weights(folder)
    except ArtifactError:
        artifacts.expose(folder / WEIGHTS)
        raise


def _replace(
    model: nn.Module, layers: Mapping[int, SparseMoE], known: Mapping[int, hosts.Host]
) -> None:
    """As the hosts will hold the layers: what they keep in float32 is that, the rest rounded."""
    dtype = next(model.parameters()).dtype
    for k, moe in layers.items():
        for name, tensor in moe.router.state_dict().items():
            if not f"router.{name}".startswith(known[k].float32):
                tensor.copy_(tensor.to(dtype))
    replace_ffns(model, layers, {k for k, host in known.items() if host.float32})


def _host(names: Mapping[int, str]) -> hosts.Host:
    if len(set(names.values())) > 1:
        raise InputError(
            "The layers were trained for different hosts.",
            value=", ".join(f"layer {k}: {name}" for k, name in names.items()),
            rule="one moe.host for all layers, since it fixes the router function",
            remedy="train the layers with one moe.host",
        )
    name = next(iter(names.values()))
    if name not in hosts.HOSTS:
        raise InputError(
            "The layers were trained for a host that is not known here.",
            value=name,
            rule=f"one of {', '.join(hosts.HOSTS)}",
            remedy="convert them with the version that trained them, or train them again",
        )
    return hosts.HOSTS[name]


def _check_host(
    host: hosts.Host, described: Mapping[str, Any], shapes: Mapping[int, MoEShape]
) -> None:
    functions = {k: shape.router_function for k, shape in shapes.items()}
    if set(functions.values()) != {host.router_function}:
        raise InputError(
            "The layers were trained under another router function.",
            value=", ".join(f"layer {k}: {name}" for k, name in functions.items()),
            rule=f"{host.name} has {host.router_function}",
            remedy="train the layers for this host",
        )
    refusal = hosts.can_host(host, described, shapes)
    if refusal:
        raise ConfigError(
            f"{host.name} cannot hold this conversion.",
            value=refusal,
            rule="the host of the layers holds the dense model",
            remedy="convert every layer that it needs, or train for another moe.host",
        )


def pad_experts(moe: SparseMoE, shape: MoEShape) -> SparseMoE:
    """The layer with its experts as wide as `shape` has them: neurons of zeros add nothing."""
    extra = shape.d_ff_expert - moe.shape.d_ff_expert
    shared = shape.d_ff_shared - moe.shape.d_ff_shared
    if not extra and not shared:
        return moe
    wide = SparseMoE(shape, moe.kernel)
    tensors = wide.state_dict() | moe.state_dict()
    for name, tensor in moe.state_dict().items():
        more = shared if name.startswith("shared_expert.") else extra
        if name.endswith(f"{moe.inner}_proj"):
            tensors[name] = _pad_rows(tensor, -2, more, shape.gated)
        elif name.endswith(f"{moe.inner}_bias"):
            tensors[name] = _pad_rows(tensor, -1, more, shape.gated)
        elif name.endswith("down_proj"):
            tensors[name] = F.pad(tensor, (0, more))
    wide.load_state_dict(tensors)
    return wide.train(moe.training)


def _pad_rows(tensor: Tensor, dim: int, more: int, gated: bool) -> Tensor:
    """Zeros after the rows along `dim`, after each half of them where they are gate and up."""
    below = (0, 0) * (-1 - dim) + (0, more)
    return torch.cat([F.pad(half, below) for half in tensor.chunk(1 + gated, dim)], dim)
