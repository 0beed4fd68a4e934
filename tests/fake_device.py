"""A device of type ``mps`` on any machine: its tensors' numbers are in CPU memory, and a float64 one is an error, as on
Apple's GPUs."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

MPS = torch.device("mps:0")
_FROM_TWO_DEVICES = ("aten::_to_copy", "aten::copy_", "aten::index", "aten::_unsafe_index", "aten::_index_put")


@contextmanager
def fake_mps() -> Iterator[str]:
    """In this block the device ``mps:0``, which it returns, can be used in every thread that starts. A float64 tensor
    there is a ``TypeError``, and so is what takes tensors of two devices."""
    run = threading.Thread.run

    def with_device(thread: threading.Thread) -> None:
        with _Mode():  # type: ignore[no-untyped-call]
            run(thread)

    # torch.tensor makes its tensor on the CPU first, where the mode sees it move.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with patch.object(threading.Thread, "run", with_device), _Mode():  # type: ignore[no-untyped-call]
            yield str(MPS)
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


class _OnDevice(Tensor):
    """A tensor of the pretended device; ``held`` has its numbers. Autograd takes it for a meta tensor."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> _OnDevice:
        if held.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"MPS has no {held.dtype}")
        wrapper: _OnDevice = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=torch.device("meta")
        )
        wrapper.held = held
        return wrapper

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return MPS

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"_OnDevice({self.held})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        return _call(func, args, kwargs or {})


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = any(isinstance(tensor, _OnDevice) for tensor in given)
    strays = [tensor for tensor in given if tensor.dim() and not isinstance(tensor, _OnDevice)]
    if there and strays and not func.name().startswith(_FROM_TWO_DEVICES):
        raise TypeError(f"{func}: all tensors must be on the same device, but there are cpu and mps")
    if any(tensor.is_meta for tensor in given):
        raise TypeError(f"{func}: a list that indexes a tensor has no numbers here; index with a tensor of the device")
    target = kwargs.get("device")
    if target is not None:
        there, kwargs = torch.device(target).type in ("mps", "meta"), {**kwargs, "device": "cpu"}
    results = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    # What an operation changes in place stays the same object.
    same = {id(_held(tensor)): tensor for tensor in given}

    def wrapped(result: Any) -> Any:
        if not isinstance(result, Tensor):
            return result
        return same[id(result)] if id(result) in same else _OnDevice(result) if there else result

    return tree_map(wrapped, results)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, _OnDevice) else value
