"""The native form: C++ on the CPU, CUDA C++ on the GPU (``csrc/renyi_mutual_information``).

Outputs are allocated by the op.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from infoclip import native
from infoclip.kernels.aot import NativeKernels
from infoclip.native import why_not

__all__ = ["AOT", "forward", "why_not"]


AOT = NativeKernels(
    matrix=(r"\bvalues<", r"\bgradients<"),
    dynamic_shared={
        r"\bvalues<": 32_160,
        r"\bgradients<": 84_512,
    },
)
"""Shared memory: ``VALUES_SHARED`` and ``GradientShared::SHARED`` of ``csrc/renyi_mutual_information/cuda.cu``."""


def forward(
    views: Sequence[Tensor],  # [B, N, D_i] each
    units: Sequence[bool],
    weights: Sequence[int],
    value: Tensor,  # [B], written
    grads: Sequence[Tensor | None],  # [B, N, D_i] contiguous, written
) -> None:
    native.renyi_information(views, units, weights, value, grads)
