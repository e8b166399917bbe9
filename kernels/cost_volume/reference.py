"""The specification in plain PyTorch."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["cost_embedding", "cost_volume", "sweep"]


def cost_volume(
    image: Tensor,  # [B, N, d]
    text: Tensor,  # [T, P, d] or [B, T, P, d]
    scale: float = 1.0,
) -> Tensor:  # [B, P, T, N]
    """``scale`` times the cosine similarities; half precision is widened to fp32 and rounded once at the end."""
    return _wide(image, text, scale).to(image.dtype)


def sweep(
    image: Tensor,  # [B, N, d]
    text: Tensor,  # [T, P, d] or [B, T, P, d]
    scale: float,
    volume: bool,
) -> tuple[Tensor, Tensor]:  # [B, P, T, N] or empty, [B, T]
    """The volume if it is asked for, and each class's largest similarity over prompts and pixels, not rounded."""
    wide = _wide(image, text, scale)
    if wide.shape[1] and wide.shape[3]:
        highest = wide.amax(dim=(1, 3))
    else:
        highest = wide.new_full((wide.shape[0], wide.shape[2]), -torch.inf)
    return (wide.to(image.dtype, copy=True) if volume else image.new_empty(0)), highest


def cost_embedding(
    image: Tensor,  # [B, N, d] with N = h w
    text: Tensor,  # [T, P, d] or [B, T, P, d]
    weight: Tensor,  # [C, P, k, k]
    bias: Tensor | None,  # [C]
    grid: tuple[int, int],  # (h, w)
    scale: float = 1.0,
) -> Tensor:  # [B, T, C, h, w]
    """The cost map of each class through a k x k convolution over space that mixes the prompts."""
    maps = cost_volume(image, text, scale).transpose(1, 2).flatten(0, 1).unflatten(-1, grid)  # [B T, P, h, w]
    out = F.conv2d(maps, weight, bias, padding=weight.shape[-1] // 2)
    return out.unflatten(0, (image.shape[0], -1))


def _wide(image: Tensor, text: Tensor, scale: float) -> Tensor:
    wide = torch.float64 if image.dtype == torch.float64 else torch.float32
    device = image.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        image, text = F.normalize(image.to(wide), dim=-1), F.normalize(text.to(wide), dim=-1)
        cosine = torch.einsum("bnd,tpd->bptn" if text.dim() == 3 else "bnd,btpd->bptn", image, text)
        return cosine if scale == 1.0 else cosine * scale
