"""The native form: C++ on the CPU, CUDA C++ on the GPU (``csrc/infonce``). Outputs are allocated here."""

from __future__ import annotations

import torch
from torch import Tensor

from infoclip import native
from infoclip.kernels.aot import NativeKernels
from infoclip.native import why_not

__all__ = ["AOT", "backward", "forward", "why_not"]


AOT = NativeKernels(
    matrix=(r"\bpatches<", r"\bslopes<"),
    dynamic_shared={
        r"\bpatches<[^>]*128": 69_060,
        r"\bpatches<[^>]*64": 33_700,
        r"\bslopes<": 80_608,
        r"\bslopes<[^>]*256": 95_776,
    },
)
"""Shared memory: ``Shape::SHARED`` of ``csrc/common/tile.cuh`` with a ``Room``, and ``SlopesRoom::SHARED``."""


def forward(
    x: Tensor,  # [B, N, D]
    y: Tensor,  # [B, M, D]
    temperature: Tensor | None,  # []
    scale: float,
    positive: Tensor | None,  # [B, N] int64
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    loss, bound = x.new_empty((), dtype=wide), x.new_empty((), dtype=wide)
    rows = x.new_empty(x.shape[:2], dtype=wide)
    columns = x.new_empty(y.shape[:2] if symmetric else (0,), dtype=wide)
    native.infonce_forward(x, y, temperature, scale, positive, symmetric, loss, bound, rows, columns)
    return loss, bound, rows, columns


def backward(
    d_loss: Tensor,  # []
    x: Tensor,  # [B, N, D]
    y: Tensor,  # [B, M, D]
    temperature: Tensor | None,  # []
    scale: float,
    positive: Tensor | None,  # [B, N] int64
    symmetric: bool,
    rows: Tensor,  # [B, N]
    columns: Tensor,  # [B, M], or empty
    need_x: bool,
    need_y: bool,
    need_temperature: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    d_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
    d_y = torch.empty_like(y, memory_format=torch.contiguous_format) if need_y else None
    d_temperature = rows.new_empty(()) if need_temperature else None
    native.infonce_backward(
        d_loss, x, y, temperature, scale, positive, symmetric, rows, columns, d_x, d_y, d_temperature
    )
    return d_x, d_y, d_temperature
