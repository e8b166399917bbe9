"""Bytes that a computation holds, counted without computing it, on tensors without storage: meta or fake ones.

Every storage that an operator makes is followed from its making to its freeing, through forward, recomputation and
backward, so that the largest sum is the peak of a real pass but for what operators hold inside (scratch of
convolutions) and what the allocator adds. The counts are the same on every machine.
"""

from __future__ import annotations

import copy
import functools
import weakref
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes", "meta_copy"]

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operators make while it is entered.

    Attributes:
        now: bytes alive.
        peak: the most since the start or since :meth:`reset_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def leave_out(self, *tensors: Tensor) -> None:
        """Do not count these: inputs and parameters, which are there before."""
        for x in tensors:
            storage = x.untyped_storage()
            self._known[storage._cdata] = weakref.ref(storage, functools.partial(self._gone, storage._cdata, 0))

    def reset_peak(self) -> None:
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, FakeTensor) or (isinstance(x, Tensor) and x.is_meta):
                storage = x.untyped_storage()
                key = storage._cdata
                if key not in self._known:
                    size = storage.nbytes()
                    self._known[key] = weakref.ref(storage, functools.partial(self._gone, key, size))
                    self.now += size
                    self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int, size: int, _: Any) -> None:
        self._known.pop(key, None)
        self.now -= size


def meta_copy(module: AnyModule, *shared: object) -> AnyModule:
    """A copy of a module whose parameters and buffers have no storage; ``requires_grad`` is as the module's.

    Args:
        shared: objects below the module that the copy refers to instead of copying.
    """
    memo: dict[int, Any] = {id(x): x for x in shared}
    for p in module.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    for b in module.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(module, memo)
