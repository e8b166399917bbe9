"""What an op declares so that its GPU kernels can be proven without a GPU (``python -m bench aot``).

``kernels/<op>/triton_impl.py`` has ``aot() -> list[AotCall]``: calls of its own launching functions on the meta device.
Every kernel that such a call launches is compiled as that launch would compile it, so nothing is declared twice.
``kernels/<op>/native_impl.py`` has ``AOT = NativeKernels(...)`` for the CUDA C++ in ``csrc/<op>/``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["AotCall", "NativeKernels", "capability", "compiling_for", "meta"]


@dataclass(frozen=True)
class AotCall:
    """One call that launches Triton kernels.

    ``name`` tells the configuration apart (sizes, dtype). ``call`` takes no argument and works on tensors of
    :func:`meta`; it is made once for each GPU generation. ``matrix`` names the kernels that must use matrix
    instructions in this call (float32 has them where it is multiplied as TF32, and none with IEEE products). ``quick``
    calls are those that the test-suite compiles too: few, and between them every kernel in float32 and in a half.
    """

    name: str
    call: Callable[[], Any]
    matrix: tuple[str, ...] = ()
    quick: bool = False


@dataclass(frozen=True)
class NativeKernels:
    """What is known of an op's CUDA C++ kernels beside their source.

    ``matrix``: regular expressions on the demangled name; a kernel that one of them matches must use matrix
    instructions. ``dynamic_shared``: the same -> bytes of dynamic shared memory that its largest launch asks for, which
    the object file does not tell. A pattern that matches no kernel is an error.
    """

    matrix: tuple[str, ...] = ()
    dynamic_shared: Mapping[str, int] = field(default_factory=dict)


_target: ContextVar[tuple[int, int] | None] = ContextVar("target", default=None)


@contextmanager
def compiling_for(target: tuple[int, int]) -> Iterator[None]:
    """:func:`capability` answers ``target`` inside."""
    token = _target.set(target)
    try:
        yield
    finally:
        _target.reset(token)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability that a launch on ``device`` is configured for: the device's, or the one compiled for.

    A launch configuration that depends on the GPU generation asks here. The interpreter's answer is (8, 0).
    """
    target = _target.get()
    if target is not None:
        return target
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor with a shape and a dtype, and no data."""
    return torch.empty(shape, dtype=dtype, device="meta")
