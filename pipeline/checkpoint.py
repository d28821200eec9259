"""From trained layers to a sparse checkpoint that transformers loads.

The layers take the FFNs' places in the dense model; its tensors are renamed into the host
architecture without a copy and saved as `save_pretrained` does, the modelling file with them where
the host is our own. Then a fresh process that knows nothing of this package opens the folder, and
its logits and greedy continuation must be those of the model in memory. Both sides compute in
float32, on equal weights as stored.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipeline import dense, hosts, reload
from pipeline.assembly import read_norms, replace_ffns, set_norms
from pipeline.errors import ArtifactError, ConfigError, InputError
from pipeline.layers import layer_folders, load_layer
from pipeline.moe import SparseMoE
from pipeline.shape import MoEShape

PROBE_SEQUENCES, PROBE_TOKENS, NEW_TOKENS = 2, 32, 16


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
    replace_ffns(
        dense_model,
        {k: moe for k, (moe, _) in read.items()},
        {k for k, host in known.items() if host.float32_router},
    )
    set_norms(dense_model, read_norms(Path(layers_folder)))
    return dense_model if device is None else dense_model.to(device)


def assemble(
    source: str,
    folders: Mapping[int, Path],
    folder: Path,
    *,
    device: torch.device,
    revision: str | None = None,
    dtype: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
    norms: Mapping[str, Tensor] | None = None,
    max_shard_size: str = "2GB",
    tolerance: float = 1e-3,
) -> None:
    """Write the sparse checkpoint of the dense model `source` to `folder`, and verify it.

    Args:
        norms: healed ones, by name; null = the dense model's own.
        tolerance: largest difference of a logit, relative to the largest logit.

    Raises:
        ConfigError: the layers' host cannot hold this model.
        InputError: the layers or the norms belong to another model.
        ArtifactError: a layer is damaged, or the reloaded checkpoint computes something else.
    """
    loading = {"revision": revision, "trust_remote_code": trust_remote_code}
    model = dense.load_model(source, dtype=dtype, device=device, device_map=device_map, **loading)
    described = dense.describe(model)
    set_norms(model, norms or {})
    read = {k: load_layer(path) for k, path in folders.items()}
    host = _host({k: record["host"] for k, (_, record) in read.items()})
    shapes = {k: moe.shape for k, (moe, _) in read.items()}
    refusal = hosts.can_host(host, described, shapes)
    if refusal:
        raise ConfigError(
            f"{host.name} cannot hold this conversion.",
            value=refusal,
            rule="the host of the layers holds the dense model",
            remedy="convert every layer that it needs, or train for another moe.host",
        )
    stored = host.store(shapes)
    moes = {k: pad_experts(moe, stored[k]) for k, (moe, _) in read.items()}
    paths = replace_ffns(model, moes, moes if host.float32_router else ())
    tensors = _hosted_tensors(model, host, paths)
    fields = host.config(described, stored)
    save_hosted(model, tensors, host, fields, folder, max_shard_size)
    tokenizer = dense.load_tokenizer(source, **loading)
    tokenizer.save_pretrained(folder)
    expected = reload.compute(model.float(), probe(described["vocab_size"]), NEW_TOKENS)
    del model, read, moes
    gc.collect()
    compare(expected, reload_elsewhere(folder, described["vocab_size"]), tolerance, folder)


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


def pad_experts(moe: SparseMoE, shape: MoEShape) -> SparseMoE:
    """The layer with its experts as wide as `shape` has them: neurons of zeros add nothing."""
    extra = shape.d_ff_expert - moe.shape.d_ff_expert
    if not extra:
        return moe
    wide, tensors = SparseMoE(shape, moe.kernel), moe.state_dict()
    tensors["down_proj"] = F.pad(moe.down_proj, (0, extra))
    for name, below in ((f"{moe.inner}_proj", (0, 0, 0, extra)), (f"{moe.inner}_bias", (0, extra))):
        if name in tensors:
            halves = tensors[name].chunk(2 if shape.gated else 1, dim=1)
            tensors[name] = torch.cat([F.pad(half, below) for half in halves], dim=1)
    wide.load_state_dict(tensors)
    return wide.train(moe.training)


def _hosted_tensors(
    model: nn.Module, host: hosts.Host, paths: Mapping[int, str]
) -> dict[str, Tensor]:
    """The model's tensors, not copied, under the host's names."""
    given, tensors = dict(model.state_dict()), {}
    for k, path in paths.items():
        for name in [name for name in given if name.startswith(f"{path}.")]:
            below = name.removeprefix(f"{path}.")
            tensors[hosts.rename(host, k, path, below)] = given.pop(name)
    return tensors | {host.prefix + name: tensor for name, tensor in given.items()}


def save_hosted(
    model: PreTrainedModel,
    tensors: dict[str, Tensor],
    host: hosts.Host,
    fields: Mapping[str, Any],
    folder: Path,
    max_shard_size: str,
) -> None:
    """Save `tensors` as a model of the host, with the generation config of `model`."""
    config = AutoConfig.for_model(host.name, **fields)
    with torch.device("meta"):
        hosted = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    _check_names(set(hosted.state_dict()), set(tensors))
    hosted.load_state_dict(tensors, assign=True)
    hosted.tie_weights()
    hosted.generation_config = model.generation_config
    hosted.save_pretrained(folder, max_shard_size=max_shard_size)


def _check_names(wanted: set[str], given: set[str]) -> None:
    if wanted != given:
        raise ArtifactError(
            "The tensors are not those of the host.",
            value=f"missing {sorted(wanted - given)}, left over {sorted(given - wanted)}",
            rule="every tensor of the host is given, and none besides",
            remedy="this is a defect of ours: please report it with the model's name",
        )


# Verification


def probe(vocab_size: int) -> Tensor:
    """(sequences, tokens) random token ids, always the same."""
    generator = torch.Generator().manual_seed(0)
    size = (PROBE_SEQUENCES, PROBE_TOKENS)
    return torch.randint(vocab_size, size, generator=generator)


def reload_elsewhere(folder: Path, vocab_size: int) -> dict[str, Tensor]:
    """`logits` and `generated` of a checkpoint in a fresh process without this package.

    Raises:
        ArtifactError: it cannot be opened, or a tensor is missing or left over.
    """
    with TemporaryDirectory() as scratch:
        out = Path(scratch) / "computed.safetensors"
        ids = json.dumps(probe(vocab_size).tolist())
        arguments = [str(folder.absolute()), ids, str(NEW_TOKENS), str(out)]
        done = subprocess.run(
            [sys.executable, "-I", reload.__file__, *arguments],
            env=os.environ | {"HF_MODULES_CACHE": scratch},  # where modelling files are copied to
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ArtifactError(
                "The checkpoint does not open in a fresh process.",
                value=(done.stderr.strip().splitlines() or ["no message"])[-1],
                rule="AutoModelForCausalLM opens it with every tensor found and none left over",
                remedy="this is a defect of ours: please report it with the model's name",
            )
        return load_file(out)


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
