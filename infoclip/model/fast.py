"""The fast form of the cost aggregation: the plain modules' values and gradients, to rounding, with less arithmetic.

Three exact re-associations, on the parameters of the plain modules (which stay the specification):

- guidance is hoisted: ``W [x, g] = W_x x + W_g g``, and ``g`` is the same for every class (in spatial attention and
  the decoder) or every pixel (in class attention), so that ``W_g g`` is computed once;
- a transposed 2x2 convolution followed by a 3x3 convolution is one transposed 4x4 convolution of stride 2;
- window attention never stores its probabilities (:mod:`infoclip.model.stages`).

At the published size (171 classes, a 24 x 24 grid, C = 128) the forward takes 320 GFLOP where the plain form takes
433; a test counts them.

Sizes: ``B`` images, ``T`` classes, ``H x W`` grid, ``C`` channels, ``G`` guidance channels.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["fold_up", "guidance_product", "guided_linear"]


def guided_linear(
    layer: nn.Linear,
    x: Tensor,  # [..., C]
    shared: Tensor | None,  # of guidance_product, broadcast over the axis that it does not depend on
) -> Tensor:  # [..., out]
    """``layer([x, guidance])`` with the guidance's share computed before."""
    if shared is None:
        return layer(x)
    y = F.linear(x, layer.weight[:, : x.shape[-1]])
    return y + shared.to(y.dtype)


def guidance_product(
    layer: nn.Linear,
    guidance: Tensor,  # [..., G]
) -> Tensor:  # [..., out]
    """The guidance's share of ``layer([x, guidance])``, with the bias."""
    return F.linear(guidance, layer.weight[:, layer.in_features - guidance.shape[-1] :], layer.bias)


def fold_up(
    up: nn.ConvTranspose2d,
    conv: nn.Conv2d,
    guidance: Tensor | None,  # [B, G, 2H, 2W]
    height: int,
    width: int,
) -> tuple[Tensor, Tensor]:  # [C, out, 4, 4], [B or 1, out, 2H, 2W]
    """What ``conv([up(x), guidance])`` holds beside ``x``, a map of ``height x width``: the kernel and a constant.

    ``conv([up(x), guidance])`` is then ``conv_transpose2d(x, kernel, stride=2, padding=1) + constant``.
    """
    assert up.bias is not None
    middle, place = up.out_channels, up.weight.device.type
    known = torch.amp.is_autocast_available(place)  # not on meta tensors
    with torch.autocast(place, enabled=False) if known else contextlib.nullcontext():  # folded in their own precision
        # Full correlation: what the 3-wide window reads of a pixel's two copies.
        folded = F.conv2d(up.weight, conv.weight[:, :middle], padding=2)
        # The transposed convolution's bias meets the zero padding of the next one: it is no constant at the border.
        flat = up.bias[None, :, None, None].expand(1, middle, 2 * height, 2 * width)
        shared = F.conv2d(flat, conv.weight[:, :middle], padding=1)  # [1, out, 2H, 2W]
    if guidance is not None:
        shared = shared + F.conv2d(guidance, conv.weight[:, middle:], padding=1)
    return folded, shared
