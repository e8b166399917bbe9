"""The native form: C++ on the CPU, CUDA C++ on the GPU (``csrc/upsample_bce``). Outputs are allocated here."""

from __future__ import annotations

import torch
from torch import Tensor

from infoclip import native
from infoclip.kernels.aot import NativeKernels
from infoclip.native import why_not

__all__ = ["AOT", "forward", "strange_label", "why_not"]

AOT = NativeKernels()
"""The CUDA C++ sums in fp32 on the ordinary units: no kernel here has matrix instructions."""


def strange_label(label: int, classes: int, ignore_index: int) -> ValueError:
    """The error for a label that is neither a class nor the ignored one."""
    return ValueError(f"target has the label {label}: expected 0 to {classes - 1} or {ignore_index}")


def forward(
    logits: Tensor,  # [B, T, h, w]
    target: Tensor,  # [B, H, W] int64
    ignore_index: int,
    masked: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    precise = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss = torch.empty((), dtype=precise, device=logits.device)
    grad = torch.empty(logits.shape if need_grad else (0,), dtype=precise, device=logits.device)
    strange = native.upsample_bce(logits, target, loss, grad if need_grad else None, ignore_index, masked)
    if strange is not None:
        raise strange_label(strange, logits.shape[1], ignore_index)
    return loss, grad
