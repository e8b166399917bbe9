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

from infoclip.attention import attention

__all__ = ["fold_transposed", "fold_up", "guidance_product", "guided_linear", "up_convolution", "window_attention"]


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


def window_attention(
    q: Tensor,  # [windows, M, L, C]
    k: Tensor,  # as q
    v: Tensor,  # as q
    num_heads: int,
    mask: Tensor | None,  # [windows, L, L]
) -> Tensor:  # as q
    """Softmax attention within each window; probabilities are not stored."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:  # [N, L, C] -> [N, L, C]
        q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        return attention(q, k, v, mask).transpose(1, 2).flatten(2)

    if mask is None:
        return attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), None).view_as(q)
    # A window at a time: its mask is then the same for all, and need not be repeated.
    return torch.stack([attend(q[w], k[w], v[w], mask[w].to(q.dtype)[None, None]) for w in range(q.shape[0])])


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


def fold_up(
    up: nn.ConvTranspose2d,
    conv: nn.Conv2d,
    guidance: Tensor | None,  # [B, G, 2H, 2W]
    height: int,
    width: int,
) -> tuple[Tensor, Tensor]:  # [4 * out, C, 2, 2], [B or 1, out, 2H, 2W]
    """What ``conv([up(x), guidance])`` holds beside ``x``, a map of ``height x width``: the kernel and a constant."""
    assert up.bias is not None
    middle, place = up.out_channels, up.weight.device.type
    known = torch.amp.is_autocast_available(place)  # not on meta tensors
    with torch.autocast(place, enabled=False) if known else contextlib.nullcontext():  # folded in their own precision
        folded = fold_transposed(up.weight, conv.weight[:, :middle])
        # The transposed convolution's bias meets the zero padding of the next one: it is no constant at the border.
        flat = up.bias[None, :, None, None].expand(1, middle, 2 * height, 2 * width)
        shared = F.conv2d(flat, conv.weight[:, :middle], padding=1)  # [1, out, 2H, 2W]
    if guidance is not None:
        shared = shared + F.conv2d(guidance, conv.weight[:, middle:], padding=1)
    return folded, shared


def up_convolution(
    x: Tensor,  # [B * T, C, H, W]
    folded: Tensor,  # [4 * out, C, 2, 2], of fold_up
    shared: Tensor,  # [B or 1, out, 2H, 2W], of fold_up
) -> Tensor:  # [B * T, out, 2H, 2W], channels last
    """``conv([up(x), guidance])`` on the small grid."""
    m, _, h, w = x.shape
    out, b = shared.shape[1], shared.shape[0]
    y = F.conv2d(x, folded, padding=1).permute(0, 2, 3, 1).unflatten(-1, (2, 2, out))
    rows = [torch.stack([y[:, p : p + h, q : q + w, p, q] for q in range(2)], dim=3) for p in range(2)]
    y = torch.stack(rows, dim=2).view(b, m // b, 2 * h, 2 * w, out)
    return (y + shared.permute(0, 2, 3, 1)[:, None].to(y.dtype)).flatten(0, 1).permute(0, 3, 1, 2)
