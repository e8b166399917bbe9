"""The plain PyTorch form: what every other form is held to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["upsample_bce"]


def upsample_bce(
    logits: Tensor,  # [B, T, h, w]
    target: Tensor,  # [B, H, W] int64
    ignore_index: int,
    masked: bool,
) -> Tensor:  # [] float32, float64 for float64 logits
    """Three tensors of the size of the up-sampled logits in the forward, two more in the backward."""
    classes = logits.shape[1]
    known = (target >= 0) & (target < classes) & (target != ignore_index)  # [B, H, W]
    precise = logits if logits.dtype == torch.float64 else logits.float()
    full = F.interpolate(precise, size=target.shape[-2:], mode="bilinear", align_corners=False)  # [B, T, H, W]
    one_hot = torch.zeros_like(full)
    index = torch.where(known, target, 0)[:, None]
    one_hot.scatter_(1, index, known[:, None].to(full.dtype))
    if not masked:
        return F.binary_cross_entropy_with_logits(full, one_hot)
    losses = F.binary_cross_entropy_with_logits(full, one_hot, reduction="none").sum(dim=1)  # [B, H, W]
    count = (known.sum() * classes).clamp(min=1)
    return torch.where(known, losses, 0.0).sum() / count
