"""The segmentation loss: binary cross-entropy of every class at every pixel (CAT-Seg, section 3.4)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["segmentation_loss"]


def segmentation_loss(
    logits: Tensor,  # [B, T, h, w]
    target: Tensor,  # [B, H, W] int64
    ignore_index: int = 255,
    ignored: Literal["negative", "masked"] = "negative",
) -> Tensor:  # []
    """Mean binary cross-entropy against one-hot labels, after bilinear up-sampling to the labels' size.

    Computed in float32 (float64 for float64 logits).

    Args:
        ignore_index: label of pixels without a class.
        ignored: ``negative`` counts those pixels as negatives of every class (published); ``masked`` leaves them out.
            A batch without any labelled pixel then has the loss 0.

    Raises:
        TypeError: labels that are not whole numbers.
        ValueError: shapes that do not go together, another ``ignored``, and, for labels on the CPU, a label that is
            neither a class nor ``ignore_index`` (on a GPU the check would stall the device; such labels count as
            ignored there).
    """
    if logits.dim() != 4:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; expected [B, T, h, w]")
    if target.dim() != 3 or target.shape[0] != logits.shape[0]:
        raise ValueError(f"target has shape {tuple(target.shape)}; expected [{logits.shape[0]}, H, W]")
    if target.is_floating_point() or target.dtype == torch.bool:
        raise TypeError(f"target has dtype {target.dtype}; expected whole numbers")
    if ignored not in ("negative", "masked"):
        raise ValueError(f"ignored is {ignored!r}; expected 'negative' or 'masked'")
    classes = logits.shape[1]
    target = target.long()
    known = (target >= 0) & (target < classes) & (target != ignore_index)  # [B, H, W]
    if target.device.type == "cpu":
        strange = target[~known & (target != ignore_index)]
        if strange.numel():
            raise ValueError(f"target has the label {int(strange[0])}; expected 0 to {classes - 1} or {ignore_index}")
    precise = logits if logits.dtype == torch.float64 else logits.float()
    full = F.interpolate(precise, size=target.shape[-2:], mode="bilinear", align_corners=False)  # [B, T, H, W]
    one_hot = torch.zeros_like(full)
    index = torch.where(known, target, 0)[:, None]
    one_hot.scatter_(1, index, known[:, None].to(full.dtype))
    if ignored == "negative":
        return F.binary_cross_entropy_with_logits(full, one_hot)
    losses = F.binary_cross_entropy_with_logits(full, one_hot, reduction="none").sum(dim=1)  # [B, H, W]
    count = (known.sum() * classes).clamp(min=1)
    return torch.where(known, losses, 0.0).sum() / count
