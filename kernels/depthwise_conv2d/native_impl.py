"""The native form: the gradient in weights and bias in C++ (``csrc/depthwise_conv2d``), on the CPU alone."""

from __future__ import annotations

import torch
from torch import Tensor

from infoclip import native

__all__ = ["weight_grad", "why_not"]


def why_not(device: str, dtype: torch.dtype | None) -> str | None:
    """Why the native form cannot run there, or None where it can."""
    if torch.device(device).type == "cuda":
        return "there is no native kernel of it for cuda, where torch's own convolution is taken."
    return native.why_not(device, dtype)


def weight_grad(grad: Tensor, x: Tensor, side: int, dilation: int) -> tuple[Tensor, Tensor]:
    """[C, 1, K, K] and [C], float32 (float64 for float64), of grad and x [B, C, H, W] with any strides."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    d_weight = torch.empty(x.shape[1], 1, side, side, dtype=wide)
    d_bias = torch.empty(x.shape[1], dtype=wide)
    native.depthwise_conv2d_weight_grad(x, grad, dilation, d_weight, d_bias)
    return d_weight, d_bias
