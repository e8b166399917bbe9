"""The specification in plain PyTorch."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["cost_volume"]


def cost_volume(
    image: Tensor,  # [B, N, d]
    text: Tensor,  # [T, P, d] or [B, T, P, d]
    scale: float = 1.0,
) -> Tensor:  # [B, P, T, N]
    """``scale`` times the cosine similarities; half precision is widened to fp32 and rounded once at the end."""
    dtype = image.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    device = image.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        image, text = F.normalize(image.to(wide), dim=-1), F.normalize(text.to(wide), dim=-1)
        cosine = torch.einsum("bnd,tpd->bptn" if text.dim() == 3 else "bnd,btpd->bptn", image, text)
        return (cosine if scale == 1.0 else cosine * scale).to(dtype)
