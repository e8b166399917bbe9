"""Depthwise convolution whose gradient in the weights is a kernel: what a ConvNeXt learns slowest on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from infoclip.kernels import choose, register_room
from infoclip.kernels.arguments import check_floats, check_int, check_one_device

from . import native_impl, op
from .reference import depthwise_conv2d as reference

__all__ = ["depthwise_conv2d"]

register_room(
    "depthwise_conv2d",
    None,
    native_impl.why_not,
    {
        "cpu": "measured faster than the reference, forward and backward (python -m bench depthwise_conv2d).",
        "cuda": "torch's own convolution.",
    },
)


def depthwise_conv2d(
    x: Tensor,  # [B, C, H, W]
    weight: Tensor,  # [C, 1, K, K], K odd
    bias: Tensor | None = None,  # [C]
    *,
    dilation: int = 1,
    backend: str | None = None,
) -> Tensor:  # [B, C, H, W]
    """Every channel convolved with a kernel of its own, stride 1, zeros around the map (Liu et al., *A ConvNet for the
    2020s*, section 2.6).

    Forward and the gradient in ``x`` are torch's own in every backend, autocast included; ``native`` computes the
    gradient in weights and bias, on the CPU, summed in float32 (float64 for float64) in one order: the same bits twice
    and for any number of threads. Any strides. Differentiable once outside the reference. A gradient that is not finite
    makes its channel's not finite.

    Args:
        dilation: pixels between the taps of the kernel.
        backend: ``reference``, ``native`` or ``auto``; None asks ``INFOCLIP_BACKEND``, then ``auto``.

    Raises:
        TypeError: an argument that is no dense floating-point tensor, unlike dtypes (outside autocast), or a dilation
            that is no whole number.
        ValueError: shapes or devices that do not go together, an empty axis, an even kernel, a dilation below 1, an
            unknown backend.
        infoclip.kernels.BackendUnavailableError: the backend asked for by name cannot run here.
    """
    given = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    check_floats(**given)
    check_one_device(**given)
    check_int("dilation", dilation)
    if x.dim() != 4 or not x.numel():
        raise ValueError(f"x: expected [B, C, H, W] with at least one of everything, got {list(x.shape)}")
    channels = x.shape[1]
    side = weight.shape[-1] if weight.dim() == 4 else 0
    if side % 2 == 0 or weight.shape != (channels, 1, side, side):
        raise ValueError(f"weight: expected [{channels}, 1, K, K] with an odd K, got {list(weight.shape)}")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias: expected [{channels}], got {list(bias.shape)}")
    if dilation < 1:
        raise ValueError(f"dilation: expected at least 1, got {dilation}")
    kind = x.device.type
    lowered = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    for name, tensor in given.items():
        if tensor.dtype != x.dtype and not lowered:
            raise TypeError(f"x has dtype {x.dtype}, {name} {tensor.dtype}: expected one dtype")
    chosen = choose("depthwise_conv2d", backend, kind, x.dtype)
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (weight, bias))
    if chosen == "reference" or not learns:
        return reference(x, weight, bias, dilation)
    if lowered and x.dtype != torch.float64:  # here and not inside, so that the casts have their gradients
        x, weight = (t.to(torch.get_autocast_dtype(kind)) for t in (x, weight))
        bias = None if bias is None else bias.to(x.dtype)
    result: Tensor = op.DepthwiseConv2dFunction.apply(x, weight, bias, dilation)
    return result
