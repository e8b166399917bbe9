"""What the ops on sample sets share: full precision, checks of the sets, unit rows."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from infoclip.kernels.arguments import check_floats

__all__ = ["check_samples", "full_precision", "unit", "widened"]


def full_precision(x: Tensor) -> AbstractContextManager[None]:
    """A context without autocast: entropies of bf16 Gram matrices are off by 1e-2 bit, of fp32 ones by 4e-7."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def widened(x: Tensor) -> Tensor:
    """Half-precision tensors as float32, others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def unit(x: Tensor) -> Tensor:
    """Rows (last dimension) scaled to length 1; a zero row stays zero and passes no gradient on.

    No epsilon, unlike ``F.normalize``, whose gradient at a zero row is 1e12 times the incoming one. The largest entry
    is divided out first, so that squares neither overflow nor vanish.
    """
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    x = x / torch.where(largest != 0, largest, 1.0)
    square = x.square().sum(dim=-1, keepdim=True)
    there = square != 0  # NaN passes, and shows
    return torch.where(there, x, 0.0) * torch.where(there, square, 1.0).rsqrt()


def check_samples(name: str, x: Tensor) -> None:
    """Refuse what is not a set of samples ``[..., N, D]``.

    Raises:
        TypeError: not a dense tensor of floating-point numbers.
        ValueError: fewer than two dimensions, no sample, or samples without entries.
    """
    check_floats(**{name: x})
    if x.ndim < 2 or x.shape[-2] == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} has shape {list(x.shape)}; expected [..., N, D] with N and D of at least 1")
