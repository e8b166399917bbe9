"""The specification in plain PyTorch."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor

__all__ = ["infonce"]


def infonce(
    x: Tensor,  # [B, N, D]
    y: Tensor,  # [B, M, D]
    temperature: float | Tensor,  # or []
    positive: Tensor | None,  # [B, N] int64, None: the diagonal
    symmetric: bool,
) -> tuple[Tensor, Tensor]:  # [], []: float32, float64 for float64 samples
    """Loss and bound by way of the whole [B, N, M] matrix of logits; half precision is widened to fp32."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    device = x.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        if isinstance(temperature, Tensor):
            temperature = torch.where(temperature > 0, temperature, math.nan)
        logits = x.to(wide) @ y.to(wide).mT / temperature  # [B, N, M]
        n, m = logits.shape[-2:]
        if positive is None:
            pairs = logits.diagonal(dim1=-2, dim2=-1)  # [B, N]
        else:
            known = (positive >= 0) & (positive < m)
            positive = torch.where(known, positive, 0)
            pairs = logits.gather(-1, positive[..., None])[..., 0]
            pairs = torch.where(known, pairs, math.nan)  # an index that is no sample's shows, wherever it came from
        loss = (logits.logsumexp(dim=-1) - pairs).mean()
        most = math.log(m)
        if symmetric:
            columns = logits.logsumexp(dim=-2)  # [B, M]
            if positive is not None:
                columns = columns.gather(-1, positive)  # [B, N]
            loss = 0.5 * (loss + (columns - pairs).mean())
            most = 0.5 * (most + math.log(n))
        return loss, most - loss
