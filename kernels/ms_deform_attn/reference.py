"""The plain PyTorch form: what every other form is held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ms_deform_attn"]


def ms_deform_attn(
    value: Tensor,  # [B, S, M, D]
    shapes: Sequence[tuple[int, int]],  # height and width of each level
    locations: Tensor,  # [B, Q, M, L, P, 2] x and y in 0..1
    weights: Tensor,  # [B, Q, M, L, P]
) -> Tensor:  # [B, Q, M * D]
    """One ``grid_sample`` a level; all samples of all levels are held at once."""
    B, _, M, D = value.shape
    Q = locations.shape[1]
    precise = torch.promote_types(value.dtype, torch.float32)
    grid = 2 * locations.to(precise) - 1
    maps = value.to(precise).permute(0, 2, 3, 1).reshape(B * M, D, -1)  # [B M, D, S]
    sampled = []
    start = 0
    for level, (h, w) in enumerate(shapes):
        at = grid[:, :, :, level].transpose(1, 2).flatten(0, 1)  # [B M, Q, P, 2]
        image = maps[..., start : start + h * w].reshape(B * M, D, h, w)
        sampled.append(F.grid_sample(image, at, mode="bilinear", padding_mode="zeros", align_corners=False))
        start += h * w
    weight = weights.to(precise).permute(0, 2, 1, 3, 4).reshape(B * M, 1, Q, -1)
    out = (torch.cat(sampled, dim=-1) * weight).sum(dim=-1)  # [B M, D, Q]
    return out.reshape(B, M * D, Q).transpose(1, 2).to(value.dtype).contiguous()
