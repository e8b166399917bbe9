"""The op as torch knows it: torch's convolution with another gradient in the weights.

An autograd function around ``aten::convolution``, not an operator of its own, so that what counts operations or chooses
what is kept sees the convolution that it is; the gradient in the weights is an operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import native_impl
from .reference import depthwise_conv2d as reference

__all__ = ["DepthwiseConv2dFunction", "depthwise_conv2d_weight_grad"]


@torch.library.custom_op("infoclip::depthwise_conv2d_weight_grad", mutates_args=())
def depthwise_conv2d_weight_grad(grad: Tensor, x: Tensor, side: int, dilation: int) -> tuple[Tensor, Tensor]:
    """Gradients [C, 1, K, K] and [C] in weights and bias, of grad and x [B, C, H, W]; float32, float64 for float64."""
    return native_impl.weight_grad(grad, x, side, dilation)


@depthwise_conv2d_weight_grad.register_fake
def _(grad: Tensor, x: Tensor, side: int, dilation: int) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    channels = x.shape[1]
    return x.new_empty(channels, 1, side, side, dtype=wide), x.new_empty(channels, dtype=wide)


class DepthwiseConv2dFunction(torch.autograd.Function):
    """``apply(x, weight, bias, dilation)``; keeps x and weight, as torch's own convolution does."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
        return reference(x, weight, bias, dilation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.dilation = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        side, channels = weight.shape[-1], weight.shape[0]
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            padding, dilation = [side // 2 * ctx.dilation] * 2, [ctx.dilation] * 2
            d_x = torch.ops.aten.convolution_backward(
                grad, x, weight, None, [1, 1], padding, dilation, False, [0, 0], channels, [True, False, False]
            )[0]
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            d_weight, d_bias = depthwise_conv2d_weight_grad(grad, x, side, ctx.dilation)
            d_weight = d_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None
            d_bias = d_bias.to(weight.dtype) if ctx.needs_input_grad[2] else None
        return d_x, d_weight, d_bias, None
