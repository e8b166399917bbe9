"""InfoNCE: contrast each sample's pair with all other samples, a lower bound on mutual information."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from infoclip.objective.numerics import check_samples, full_precision, widened

__all__ = ["InfoNCE", "infonce"]


class InfoNCE(NamedTuple):
    """The loss, and the bound on mutual information that it stands for."""

    loss: Tensor  # [], nats
    bound: Tensor  # [], nats: log N - loss, at most log N


def infonce(
    x: Tensor,  # [B, N, D]
    y: Tensor,  # [B, N, D]
    temperature: float = 0.1,
    symmetric: bool = True,
) -> InfoNCE:
    """InfoNCE loss between paired sample sets (van den Oord, Li and Vinyals, 2018, eq. 4), with rows used as given.

    Sample i of ``x`` is to be told from the N - 1 others by its similarity with sample i of ``y``:
    loss = -mean_i log softmax_j(x_i . y_j / temperature)[i], averaged over the batch and, if ``symmetric``, with the
    same in the other direction. The bound I >= log N - loss is a lower one and never exceeds log N.
    Equal rows give log N, zero rows too; both have finite gradients. Half precision is computed in float32.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes that are not the same [B, N, D], no samples, or a temperature that is not positive.
    """
    check_samples("x", x)
    check_samples("y", y)
    if x.ndim != 3 or x.shape != y.shape:
        raise ValueError(f"x has shape {list(x.shape)} and y {list(y.shape)}; expected the same [B, N, D]")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; expected a finite number greater than 0")
    with full_precision(x):
        logits = widened(x) @ widened(y).mT / temperature  # [B, N, N]
        pairs = logits.diagonal(dim1=-2, dim2=-1)  # [B, N]
        loss = (logits.logsumexp(dim=-1) - pairs).mean()
        if symmetric:
            loss = 0.5 * (loss + (logits.logsumexp(dim=-2) - pairs).mean())
        return InfoNCE(loss, math.log(x.shape[-2]) - loss)
