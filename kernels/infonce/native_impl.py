"""The native form: C++ on the CPU (``csrc/infonce``). Outputs are allocated here."""

from __future__ import annotations

import torch
from torch import Tensor

from infoclip import native

__all__ = ["backward", "forward", "why_not"]


def why_not(device: str, dtype: torch.dtype | None = None) -> str | None:
    """Why the native kernels cannot run there, or None where they can."""
    if torch.device(device).type == "cuda":
        return "there is no CUDA C++ form of it; triton and the reference run there."
    return native.why_not(device, dtype)


def forward(
    x: Tensor,  # [B, N, D]
    y: Tensor,  # [B, M, D]
    temperature: Tensor | None,  # []
    scale: float,
    positive: Tensor | None,  # [B, N] int64
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = {"dtype": torch.float64 if x.dtype == torch.float64 else torch.float32}
    loss, bound = x.new_empty((), **options), x.new_empty((), **options)
    rows = x.new_empty(x.shape[:2], **options)
    columns = x.new_empty(y.shape[:2] if symmetric else (0,), **options)
    native.infonce(x, y, temperature, scale, positive, symmetric, rows, columns, loss=loss, bound=bound)
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
    d_x = x.new_empty(x.shape) if need_x else None
    d_y = y.new_empty(y.shape) if need_y else None
    d_temperature = rows.new_empty(()) if need_temperature else None
    native.infonce(
        x, y, temperature, scale, positive, symmetric, rows, columns,
        d_loss=d_loss, d_x=d_x, d_y=d_y, d_temperature=d_temperature,
    )  # fmt: skip
    return d_x, d_y, d_temperature
