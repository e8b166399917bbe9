"""The plain PyTorch form: torch's own convolution, forward and backward."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["depthwise_conv2d"]


def depthwise_conv2d(
    x: Tensor,  # [B, C, H, W]
    weight: Tensor,  # [C, 1, K, K]
    bias: Tensor | None,  # [C]
    dilation: int,
) -> Tensor:  # [B, C, H, W]
    """As the public function, which checks the arguments."""
    padding = weight.shape[-1] // 2 * dilation
    return F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=weight.shape[0])
