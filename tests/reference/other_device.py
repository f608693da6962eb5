"""A device beside the CPU with the CPU's arithmetic: the paths of a GPU, and what it refuses, where there is none.

Refuses operations on tensors of two devices, a generator of the CPU for its numbers, and NumPy; new memory holds nan.
To be used in a process of its own, as it takes PyTorch's place for a device of others for good.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map

NAME = "other"
_MOVES = ("aten._to_copy.default", "aten.copy_.default", "aten.set_.source_Tensor")
_GIVEN = ("out", "grad_input")
"""Arguments that an operation writes to and returns."""


class DeviceError(Exception):
    """What a GPU would refuse."""


class Tensor(torch.Tensor):
    """Numbers of the CPU that say they lie elsewhere."""

    numbers: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> Tensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=torch.device(NAME, 0),
        )
        tensor.numbers = numbers
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(_indices(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_indices(index), Tensor(_tensor(value, dtype=self.dtype)) if _is_number(value) else value)

    @property
    def data(self) -> torch.Tensor:
        return Tensor(self.numbers)

    @data.setter
    def data(self, value: Tensor) -> None:
        self.numbers = value.numbers

    def tolist(self) -> Any:
        return self.numbers.detach().tolist()

    def cpu(self) -> torch.Tensor:  # type: ignore[override]
        return self.to("cpu")

    def numpy(self, *arguments: Any, **settings: Any) -> Any:
        raise DeviceError("NumPy sees the memory of the CPU only")

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.numbers.untyped_storage()

    def __repr__(self, **settings: Any) -> str:  # type: ignore[override]
        return f"elsewhere {self.numbers!r}"


class _Dispatch(TorchDispatchMode):
    """Sees what is made anew, of which no argument is a `Tensor`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, kind = str(func), None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    given = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    elsewhere = [tensor for tensor in given if isinstance(tensor, Tensor)]
    strangers = [tensor for tensor in given if tensor.dim() and not isinstance(tensor, Tensor)]
    if elsewhere and strangers and name not in _MOVES and not (name.startswith("aten.index") and _index(strangers)):
        raise DeviceError(f"{name} of tensors on two devices, {elsewhere[0].shape} and {strangers[0].shape}")
    is_elsewhere = kind == NAME or (bool(elsewhere) and kind is None)
    generator = kwargs.get("generator")
    if is_elsewhere and generator is not None and generator.device.type == "cpu":
        raise DeviceError(f"{name} elsewhere with a generator of the CPU")
    settings = {**kwargs, "device": torch.device("cpu")} if kind == NAME else kwargs
    result = func(*tree_map(_numbers, args), **tree_map(_numbers, settings))
    if name == "aten.copy_.default":
        return args[0]
    if not is_elsewhere or name == "aten._local_scalar_dense.default":
        return result
    for key in _GIVEN:
        if isinstance(kwargs.get(key), Tensor):
            return kwargs[key]
    operation = name.split(".")[1]
    if operation.endswith("_") and not operation.startswith("_") and isinstance(args[0], Tensor):
        return args[0]
    if name.startswith(("aten.empty", "aten.new_empty")) and result.dtype.is_floating_point:
        result.fill_(torch.nan)
    known = {id(tensor.numbers): tensor for tensor in elsewhere}

    def returned(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        same = known.get(id(leaf))
        return Tensor(leaf) if same is None else same

    return tree_map(returned, result)


def _numbers(leaf: Any) -> Any:
    return leaf.numbers if isinstance(leaf, Tensor) else leaf


def _index(tensors: list[torch.Tensor]) -> bool:
    return all(tensor.dtype in (torch.int64, torch.bool) for tensor in tensors)


def _indices(index: Any) -> Any:
    def moved(part: Any) -> Any:
        return Tensor(_tensor(part)) if isinstance(part, list) else part

    return tuple(map(moved, index)) if isinstance(index, tuple) else moved(index)


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float)


def move(model: torch.nn.Module) -> torch.nn.Module:
    """The model with its weights there, tied ones tied."""
    moved: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                fresh = torch.nn.Parameter(Tensor(weight.data), requires_grad=False)
                module._parameters[name] = moved.setdefault(id(weight), fresh)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else Tensor(buffer)
    return model


_tensor = torch.tensor


@contextmanager
def working() -> Iterator[None]:
    """The device works inside of the `with` block."""
    torch.tensor = _make
    try:
        with _Dispatch():
            yield
    finally:
        torch.tensor = _tensor


def works() -> bool:
    """Whether it does now."""
    return torch.tensor is _make


@contextmanager
def absent() -> Iterator[None]:
    """Around what must not see the device, such as the reading of a checkpoint."""
    made, torch.tensor = torch.tensor, _tensor
    try:
        with _disable_current_modes():
            yield
    finally:
        torch.tensor = made


def _make(*arguments: Any, device: Any = None, **settings: Any) -> torch.Tensor:
    made = _tensor(*arguments, **settings)
    return Tensor(made) if device is not None and torch.device(device).type == NAME else made


def take_place() -> None:
    """Let PyTorch know the device, once in a process.

    Raises:
        ImportError: this PyTorch has no place for it.
    """
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME)
    # such tensors know no inference mode
    torch.inference_mode = lambda mode=True: torch.no_grad()  # type: ignore[assignment,misc]
