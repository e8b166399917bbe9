"""The native form: C++ on the CPU (``csrc/renyi_mutual_information``). Outputs are allocated by the op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from infoclip import native

__all__ = ["forward", "why_not"]


def why_not(device: str, dtype: torch.dtype | None = None) -> str | None:
    """Why the native kernels cannot run there, or None where they can."""
    if torch.device(device).type == "cuda":
        return "there is no CUDA C++ form of it yet; triton and the reference run there."
    return native.why_not(device, dtype)


def forward(
    views: Sequence[Tensor],  # [B, N, D_i] each
    units: Sequence[bool],
    weights: Sequence[int],
    value: Tensor,  # [B], written
    grads: Sequence[Tensor | None],  # [B, N, D_i] contiguous, written
) -> None:
    native.renyi_information(views, units, weights, value, grads)
