"""The fast form of the cost aggregation: the plain modules' values and gradients, to rounding, with less arithmetic.

Three exact re-associations, on the parameters of the plain modules (which stay the specification):

- guidance is hoisted: ``W [x, g] = W_x x + W_g g``, and ``g`` is the same for every class (in spatial attention and
  the decoder) or every pixel (in class attention), so that ``W_g g`` is computed once;
- a transposed 2x2 convolution followed by a 3x3 convolution is one 2x2 convolution on the small grid, with an output
  for each of the four phases;
- window attention never stores its probabilities.

At the published size (171 classes, a 24 x 24 grid, C = 128) the forward takes 323 GFLOP where the plain form takes
433; a test counts them.

Sizes: ``B`` images, ``T`` classes, ``H x W`` grid, ``C`` channels, ``G`` guidance channels.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["fold_transposed", "guided_linear", "up_convolution", "window_attention"]


def guided_linear(
    layer: nn.Linear,
    x: Tensor,  # [B, N, M, C]
    guidance: Tensor | None,  # [B, 1, M, G] or [B, N, 1, G]: without the axis that it does not depend on
) -> Tensor:  # [B, N, M, out]
    """``layer([x, guidance])`` with the guidance's share computed once."""
    if guidance is None:
        return layer(x)
    dim = x.shape[-1]
    y = F.linear(x, layer.weight[:, :dim])
    return y + F.linear(guidance, layer.weight[:, dim:], layer.bias).to(y.dtype)


def window_attention(
    q: Tensor,  # [M, rows, window, columns, window, C]
    k: Tensor,  # as q
    v: Tensor,  # as q
    num_heads: int,
    mask: Tensor | None,  # [rows * columns, window**2, window**2]
) -> Tensor:  # as q
    """Softmax attention within each window; probabilities are not stored."""
    m, rows, window, columns, _, dim = q.shape
    length = window * window

    def heads(x: Tensor) -> Tensor:  # -> [M, rows * columns * heads, length, C / heads]
        x = x.view(m, rows, window, columns, window, num_heads, dim // num_heads).permute(0, 1, 3, 5, 2, 4, 6)
        return x.reshape(m, rows * columns * num_heads, length, dim // num_heads)

    q, k, v = heads(q), heads(k), heads(v)
    bias = None if mask is None else mask.to(q.dtype).repeat_interleave(num_heads, dim=0)[None]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    y = y.view(m, rows, columns, num_heads, window, window, dim // num_heads).permute(0, 1, 4, 2, 5, 3, 6)
    return y.reshape(m, rows, window, columns, window, dim)


@functools.cache
def _taps() -> tuple[tuple[int, int, int, int], ...]:
    """Along one axis: phase p of the output, tap j on the small grid, tap a of the transposed, tap d of the 3-wide.

    Row ``2 i + p`` of the result reads row ``2 i + p + d - 1`` of the up-sampled map, which is tap ``a`` of row
    ``i + e`` of the small one.
    """
    found = []
    for p in range(2):
        for d in range(3):
            e, a = divmod(p + d - 1, 2)
            found.append((p, e + 1 - p, a, d))
    return tuple(found)


def fold_transposed(
    up: Tensor,  # [C, m, 2, 2], of the transposed convolution
    kernel: Tensor,  # [out, m, 3, 3]
) -> Tensor:  # [4 * out, C, 2, 2], phases outermost
    """Both convolutions as one 2x2 convolution with an output for each phase."""
    select = up.new_zeros(2, 2, 2, 3)
    for tap in _taps():
        select[tap] = 1
    folded = torch.einsum("pjad,qkbe,cmab,omde->pqocjk", select, select, up, kernel)
    return folded.reshape(-1, up.shape[0], 2, 2)


def up_convolution(
    up: nn.ConvTranspose2d,
    conv: nn.Conv2d,
    x: Tensor,  # [B * T, C, H, W]
    guidance: Tensor | None,  # [B, G, 2H, 2W]
) -> Tensor:  # [B * T, out, 2H, 2W]
    """``conv([up(x), guidance])`` on the small grid."""
    m, _, h, w = x.shape
    assert up.bias is not None
    middle, out = up.out_channels, conv.out_channels
    place = x.device.type
    known = torch.amp.is_autocast_available(place)  # not on meta tensors
    with torch.autocast(place, enabled=False) if known else contextlib.nullcontext():  # folded in their own precision
        folded = fold_transposed(up.weight, conv.weight[:, :middle])
        # The transposed convolution's bias meets the zero padding of the next one: it is no constant at the border.
        flat = up.bias[None, :, None, None].expand(1, middle, 2 * h, 2 * w)
        shared = F.conv2d(flat, conv.weight[:, :middle], padding=1)  # [1, out, 2H, 2W]
    y = F.conv2d(x, folded, padding=1).view(m, 2, 2, out, h + 1, w + 1)
    phases = [y[:, p, q, :, p : p + h, q : q + w] for p in range(2) for q in range(2)]
    y = torch.stack(phases, dim=-1).view(m, out, h, w, 2, 2).permute(0, 1, 2, 4, 3, 5).reshape(m, out, 2 * h, 2 * w)
    if guidance is not None:
        shared = shared + F.conv2d(guidance, conv.weight[:, middle:], padding=1)
    b = shared.shape[0]
    return (y.view(b, -1, *y.shape[1:]) + shared[:, None].to(y.dtype)).flatten(0, 1)
