"""A CUDA device that is not there: its tensors lie on the CPU, and mix with others as CUDA's would.

A tensor lies "on `cuda:0`" when its storage is marked; every operation runs on the CPU, and what
comes out is marked as its inputs are, or as `device=` says, gradients too. `tensor.device` tells
the mark. Refused, as CUDA refuses it: tensors of two devices in one operation, but for a copy, a
CPU tensor of no dimension among pointwise operands, and CPU indices into a CUDA tensor; a generator
of the CPU that fills a CUDA tensor; NumPy's view of a CUDA tensor.

Counted are the operations for which a host waits (`Device.waits`) and the matrix products that run
on the CPU all the same (`Device.products`). A wrapper of tensors that say they lie on CUDA would be
plainer, but autograd asks such a device for its streams, and a torch without CUDA has none to give.
"""

import contextlib
import functools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import transformers as tf
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)

COPIES = {"copy_", "_to_copy", "_foreach_copy_", "_foreach_copy"}
COPIES |= {"_has_compatible_shallow_copy_type"}  # what a module asks that moves
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
TAKES_SCALARS = {"where", "masked_fill", "masked_fill_", "fill_"}  # beside what is pointwise
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2"}
PRODUCTS = {
    *("mm", "bmm", "addmm", "baddbmm", "addmm_", "_grouped_mm", "dot", "mv", "_linalg_eigh"),
    *("linalg_cholesky_ex", "_linalg_solve_ex", "cholesky_solve", "cholesky_inverse"),
}
FACTORIES = {
    *(torch.zeros, torch.ones, torch.empty, torch.full, torch.arange, torch.linspace, torch.eye),
    *(torch.randn, torch.rand, torch.randint, torch.randperm, torch.from_numpy),
}


def is_there(tensor: Tensor) -> bool:
    """Whether it lies on the pretended device."""
    return bool(_known(tensor))


def _known(tensor: Tensor) -> bool | None:
    """Null of what torch's own C++ made beside a tensor whose mark it did not see."""
    return getattr(tensor.untyped_storage(), "there", False)


def _mark(tensor: Tensor, there: bool | None) -> Tensor:
    tensor.untyped_storage().there = there  # pyright: ignore[reportAttributeAccessIssue]
    return tensor


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


class Device(TorchDispatchMode):
    """Checks where the tensors of each operation lie, marks what comes out, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.products: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        name = func._schema.name.removeprefix("aten::")
        wanted = kwargs.get("device")
        if wanted is not None and wanted.type == "cuda":
            kwargs["device"] = torch.device("cpu")
        tensors = _tensors((args, kwargs))
        there = any(map(is_there, tensors))
        if there:
            self._check(func, name, args, kwargs, tensors)
            self._count_waits(name, args)
        elif name in PRODUCTS:
            self.products[name] += 1
        found = func(*args, **kwargs)
        onto = there or (wanted is not None and wanted.type == "cuda")
        for t in _tensors(found):
            if name != "copy_" and onto:
                _mark(t, True)
            elif wanted is not None and wanted.type == "cpu" and not tensors:
                _mark(t, None)
        return found

    def _count_waits(self, name: str, args: Any) -> None:
        masked = name in INDEXING and any(t.dtype is torch.bool for t in _tensors(args[1]))
        if name in WAITS or masked or (name == "copy_" and not is_there(args[0])):
            self.waits[name] += 1

    def _check(
        self, func: Any, name: str, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> None:
        generator = kwargs.get("generator")
        if generator is not None:
            raise RuntimeError(f"{name}: Expected a 'cuda' device type for generator, found 'cpu'")
        if name in COPIES:
            return
        if name in INDEXING:
            if _known(args[0]) is False and any(map(is_there, _tensors(args[1]))):
                raise RuntimeError(f"{name}: indices should be on cpu, as the indexed tensor is")
            tensors = [args[0], *(t for t in args[2:3] if t.dim())]
        elif torch.Tag.pointwise in func.tags or name in TAKES_SCALARS:
            tensors = [t for t in tensors if t.dim() or is_there(t)]
        if len({_known(t) for t in tensors} - {None}) > 1:
            places = ", ".join(f"{'cuda' * is_there(t) or 'cpu'} {tuple(t.shape)}" for t in tensors)
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device: {places}")


class _Made(TorchFunctionMode):
    """Marks what Python makes, and so tells it from what torch's own C++ makes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        asked = (kwargs or {}).get("device")
        if asked is not None and isinstance(found, Tensor):
            _mark(found, torch.device(asked).type == "cuda")
        elif func in FACTORIES and _known(found) is None:
            _mark(found, False)
        return found


def _patches(device: Device) -> dict[str, Any]:
    """Methods of a tensor that ask where it lies, or move it."""
    to, numpy, deepcopy, place_of = Tensor.to, Tensor.numpy, Tensor.__deepcopy__, Tensor.device

    def moved(tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        place, dtype, _, form = torch._C._nn._parse_to(*args, **kwargs)  # type: ignore
        if place is not None and place.type == "meta":
            return to(tensor, *args, **kwargs)
        there, more = is_there(tensor), {} if form is None else {"memory_format": form}
        onto = there if place is None else place.type == "cuda"
        found = to(tensor, dtype or tensor.dtype, copy=copy or onto != there, **more)
        if onto == there:
            return found
        device.waits["to"] += there
        return _mark(found, onto)

    def array(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if is_there(tensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return numpy(tensor, *args, **kwargs)

    return {
        "to": moved,
        "cpu": lambda tensor, *_, **__: moved(tensor, "cpu"),
        "cuda": lambda tensor, *_, **__: moved(tensor, CUDA),
        "numpy": array,
        "device": property(lambda tensor: CUDA if is_there(tensor) else place_of.__get__(tensor)),
        "is_cuda": property(is_there),
        "pin_memory": lambda tensor: tensor.clone(),
        "record_stream": lambda tensor, stream: None,
        "__deepcopy__": lambda tensor, memo: _mark(deepcopy(tensor, memo), is_there(tensor)),
    }


def _grouped(group: Callable[..., dict[Any, Any]]) -> Callable[..., dict[Any, Any]]:
    """Of what sorts tensors by device and dtype without asking `Tensor.device`."""

    def grouped(*args: Any) -> dict[Any, Any]:
        found = group(*args).items()
        return {(lists[0][0].device, dtype): (lists, at) for (_, dtype), (lists, at) in found}

    return grouped


def _moving(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Of what makes a tensor and copies it to a device without asking `Tensor.to`."""

    def made(
        data: Any, *, device: Any = None, requires_grad: bool = False, **kwargs: Any
    ) -> Tensor:
        modes = reversed(_get_current_function_mode_stack())
        around = next((mode.device for mode in modes if isinstance(mode, DeviceContext)), None)
        # a device is named, so that `with torch.device(...)` leaves it to the move
        found = make(data, device="cpu", **kwargs)
        if device is not None or around is not None:
            found = found.to(around if device is None else device)
        return found.requires_grad_() if requires_grad else found

    return made


class Autocast(torch.autocast):
    """That of the pretended device is that of the CPU too, where its products run."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(device_type, *args, **kwargs)
        self.beneath = Autocast("cpu", *args, **kwargs) if device_type == "cuda" else None

    def __enter__(self) -> Any:
        if self.beneath:
            self.beneath.__enter__()
        return super().__enter__()

    def __exit__(self, *args: Any) -> Any:
        found = super().__exit__(*args)
        if self.beneath:
            self.beneath.__exit__(*args)
        return found


class Stream:
    """Work in order; here all of it is done when it is asked for."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None: ...

    def wait_event(self, event: "Event") -> None: ...

    def wait_stream(self, stream: "Stream") -> None: ...

    def record_event(self, event: "Event | None" = None) -> "Event":
        return event or Event()

    def synchronize(self) -> None: ...


class Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, stream: Stream | None = None) -> None: ...

    def wait(self, stream: Stream | None = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


@functools.cache
def load_before() -> None:
    """transformers' first load of a model in this process, not on the pretended device.

    It would keep what it found there: in every later load, buffers that are not stored stay unset.
    """
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
    with tempfile.TemporaryDirectory() as folder:
        config = tf.LlamaConfig(**sizes, num_attention_heads=1)
        tf.LlamaForCausalLM(config).save_pretrained(folder)
        tf.LlamaForCausalLM.from_pretrained(folder)


@contextlib.contextmanager
def pretend_cuda(memory: int = 10**11) -> Iterator[Device]:
    """A CUDA device of `memory` bytes, within the context and on its thread.

    Other threads may write to tensors that lie there; they can make none. Models are loaded before
    it: within it, transformers' `from_pretrained` leaves buffers that are not stored unset.
    """
    load_before()
    properties = SimpleNamespace(name="pretended", total_memory=memory, major=9, minor=0)
    said: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: False,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: properties.name,
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (9, 0),
        "mem_get_info": lambda *_: (memory, memory),
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "_lazy_init": lambda: None,
        "Stream": Stream,
        "Event": Event,
        "stream": lambda stream: stream,
        "current_stream": lambda *_: Stream(),
    }
    with contextlib.ExitStack() as stack:
        for name, value in said.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch, "autocast", Autocast))
        for name in ("tensor", "as_tensor"):
            made = _moving(getattr(torch, name))
            stack.enter_context(mock.patch.object(torch, name, made))
        group = "_group_tensors_by_device_and_dtype"
        grouped = _grouped(getattr(torch._C, group))
        stack.enter_context(mock.patch.object(torch._C, group, grouped))
        device = Device()
        for name, value in _patches(device).items():
            stack.enter_context(mock.patch.object(Tensor, name, value))
        stack.enter_context(device)
        stack.enter_context(_Made())
        yield device
