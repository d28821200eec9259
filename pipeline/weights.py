"""Weights in safetensors files, one tensor in memory at a time.

A model may be larger than memory: what a conversion leaves alone goes from the dense model's files
to the sparse checkpoint's tensor by tensor, and a file is written at its full size before its
first tensor is there. Checksums are taken of what is written, so that the files can be held against
it without making any of it again.
"""

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from crc32c import crc32c
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from pipeline import artifacts, durable, preflight, rules

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
READ_BLOCK = 1 << 20  # bytes: stays in the cache between the read and its checksum

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""As safetensors spells them."""


class Weights(Protocol):
    """A model's tensors by its own names."""

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor, or its rows from the first up to the second."""
        ...


class Resident:
    """In memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        return self.tensors[name][slice(*rows) if rows else slice(None)]


class Filed:
    """In safetensors files, opened once and read when they are asked for."""

    def __init__(self, places: Mapping[str, tuple[Path, str]]) -> None:
        """`places`: name -> the file, and the name in it."""
        self.places = places

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        path, inside = self.places[name]
        with safe_open(path, framework="pt") as file:
            if rows is None:
                return file.get_tensor(inside)
            return file.get_slice(inside)[slice(*rows)]


def persistent(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors that a checkpoint of `model` holds: those that are tied once."""
    found: dict[int, str] = {}
    tensors = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        found.setdefault(id(tensor), name)
    return {name: tensors[name].detach() for name in found.values()}


def find(
    model: PreTrainedModel, wanted: Mapping[str, Tensor], source: str, revision: str | None
) -> Filed | str:
    """Those tensors of `model` in the files of `source`; or why they cannot be told there.

    transformers may rename tensors when it loads them: where the names in the files are not the
    model's own, but for the prefix of its base model, only a model in memory has them for sure.

    Args:
        model: a skeleton, on the meta device.
        wanted: of `persistent(model)`.
    """
    if model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict:
        return "some of its modules are kept in float32"
    inside: dict[str, tuple[Path, list[int]]] = {}
    for path in _files(source, revision):
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            inside |= {name: (path, file.get_slice(name).get_shape()) for name in names}
    prefix, places = f"{model.base_model_prefix}.", {}
    for name, tensor in wanted.items():
        named = [n for n in (name, prefix + name, name.removeprefix(prefix)) if n in inside]
        if not named or inside[named[0]][1] != list(tensor.shape):
            return f"its files have no {name} of its shape"
        places[name] = inside[named[0]][0], named[0]
    twice = sorted((set(model.state_dict()) - set(persistent(model))) & inside.keys())
    if twice:
        return f"its files have {', '.join(twice)} too, which is tied to another"
    return Filed(places)


def _files(source: str, revision: str | None) -> list[Path]:
    """Of a folder or of the hub; none where the model is kept otherwise."""

    def get(name: str) -> Path | None:
        found = cached_file(
            source, name, revision=revision, _raise_exceptions_for_missing_entries=False
        )
        return Path(found) if found else None

    single, index = get(SINGLE), get(INDEX)
    if single or not index:
        return [single] if single else []
    names = sorted(set(artifacts.read_json(index)["weight_map"].values()))
    return [path for path in map(get, names) if path]


def write(
    folder: Path,
    planned: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_size: str,
    final: Callable[[Path, int], object] = lambda path, end: None,
) -> dict[str, int]:
    """Write safetensors files as `save_pretrained` names them, one tensor after the other.

    Returns the crc32c of each tensor's bytes, by name.

    Args:
        planned: every tensor of the checkpoint, on the meta device.
        tensors: all of them, in any order, with the shapes and dtypes of `planned`.
        final: told with each tensor how far from its beginning a file is as it will be. The index,
            and the headers of all files, are there before.

    Raises:
        ConfigError: `max_shard_size` is no size.
        ResourceError: there is no room for them.
    """
    rules.check_shard_size(max_shard_size)
    pattern = "model{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(
        dict(planned), filename_pattern=pattern, max_shard_size=max_shard_size
    )
    here = [folder / name for name in split.filename_to_tensors]
    taken = sum(512 * p.stat().st_blocks for p in here if p.exists())  # by an interrupted call
    total = sum(t.numel() * t.itemsize for t in planned.values())
    lever = "fewer or narrower experts (moe.n_experts, moe.d_ff_expert) take less in proportion"
    preflight.check_disk("the checkpoint", folder, max(0, total - taken), [lever])
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        durable.write_json(folder / INDEX, index)
    written: dict[str, int] = {}
    with ExitStack() as opened:
        files: dict[str, _Growing] = {}
        for filename, names in split.filename_to_tensors.items():
            file = opened.enter_context((folder / filename).open("wb"))
            growing = _Growing(file, {name: planned[name] for name in names})
            files |= dict.fromkeys(names, growing)
        for name, tensor in tensors:
            file = files.pop(name)
            assert (tensor.shape, tensor.dtype) == (planned[name].shape, planned[name].dtype), name
            raw = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            file.put(name, raw)
            written[name] = crc32c(raw)
            final(file.path, file.final)
        assert not files, f"not given: {', '.join(files)}"
    return written


class _Growing:
    """A safetensors file at its full size, its header written, that takes tensors in any order."""

    def __init__(self, file: BinaryIO, planned: Mapping[str, Tensor]) -> None:
        self.path = Path(file.name)
        self._file = file
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in sorted(planned.items(), key=lambda item: -item[1].itemsize):  # aligned
            start, end = end, end + tensor.itemsize * math.prod(tensor.shape)
            header[name] = {
                "dtype": DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(struct.pack("<Q", len(text)) + text)
        below = file.tell()
        self._size = below + end
        file.truncate(self._size)
        del header["__metadata__"]
        self._starts = {name: below + told["data_offsets"][0] for name, told in header.items()}

    def put(self, name: str, raw: memoryview) -> None:
        self._file.seek(self._starts.pop(name))
        self._file.write(raw)
        self._file.flush()

    @property
    def final(self) -> int:
        """Where the first tensor begins that is not there yet."""
        return next(iter(self._starts.values()), self._size)


def checksums(
    path: Path, wait: Callable[[int], object] = lambda end: None
) -> tuple[dict[str, int], str]:
    """As `write` returns them, of a file on disk, and the SHA-256 of all of it: it is read once.

    Args:
        wait: called before a tensor is read, with where it ends.

    Raises:
        ValueError: it is no safetensors file.
    """
    whole, found, end = hashlib.sha256(), {}, 0
    with path.open("rb", buffering=0) as file:

        def read(size: int) -> bytes:
            block = file.read(size)
            whole.update(block)
            return block

        size = int.from_bytes(read(8), "little")
        header = json.loads(read(min(size, path.stat().st_size)))
        header.pop("__metadata__", None)
        for name, described in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = described["data_offsets"]
            if first != end:
                raise ValueError(f"{name} does not begin where the tensor before it ends")
            wait(8 + size + last)
            crc, left, end = 0, last - first, last
            while left and (block := read(min(READ_BLOCK, left))):
                crc, left = crc32c(block, crc), left - len(block)
            found[name] = crc
        if read(1):
            raise ValueError("something follows its tensors")
    return found, whole.hexdigest()
