"""InfoNCE, the contrastive lower bound on mutual information (van den Oord, Li and Vinyals 2018, eq. 4 and 5)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["InfoNCE", "infonce"]


class InfoNCE(NamedTuple):
    """The loss in nats, mean over batch and directions, and the bound ``log N - loss`` on the mutual information."""

    loss: Tensor
    bound: Tensor


def infonce(x: Tensor, y: Tensor, temperature: float = 0.1, symmetric: bool = True) -> InfoNCE:
    """Row i of ``x`` against row i of ``y``, the other rows as negatives.

    Rows are taken as given (normalise them for cosine similarities).

    Args:
        x: [B, N, D].
        y: [B, N, D].
        temperature: similarities are divided by it; greater than 0.
        symmetric: mean of both directions; otherwise only ``x`` looks for its row of ``y``.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: other shapes, or ``temperature`` not positive.
    """
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {getattr(value, 'dtype', type(value))}")
    if x.dim() != 3 or x.shape != y.shape or 0 in x.shape:
        raise ValueError(f"expected x and y of one shape [B, N, D], none of them 0, got {list(x.shape)} and {list(y.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number greater than 0, got {temperature}")
    B, N, _ = x.shape
    logits = (x @ y.mT) / temperature  # [B, N, N]
    target = torch.arange(N, device=x.device).expand(B, N)
    loss = F.cross_entropy(logits.mT, target)  # class dimension second: columns of y
    if symmetric:
        loss = (loss + F.cross_entropy(logits, target)) / 2
    return InfoNCE(loss, math.log(N) - loss)
