"""Softmax attention behind one name: torch's fused operator on every device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attention"]


def attention(
    q: Tensor,  # [N, h, L, D]
    k: Tensor,  # [N, h, S, D]
    v: Tensor,  # [N, h, S, D]
    mask: Tensor | None = None,  # added to the scores, broadcast to [N, h, L, S]
    causal: bool = False,
) -> Tensor:  # [N, h, L, D]
    """``softmax(q k^T / sqrt(D) + mask) v``; probabilities are not stored.

    On tensors without storage torch would take it apart, and what is counted there would be none of what devices hold:
    there the operator of the CPU stands for all of them.
    """
    if q.is_meta:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask)[0]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
