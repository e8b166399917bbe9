"""InfoNCE as a term of the objective: the op, in full precision."""

from __future__ import annotations

from torch import Tensor

from infoclip.kernels.infonce import InfoNCE
from infoclip.kernels.infonce import infonce as op
from infoclip.objective.numerics import check_samples, widened

__all__ = ["InfoNCE", "infonce"]


def infonce(
    x: Tensor,  # [B, N, D]
    y: Tensor,  # [B, N, D]
    temperature: float = 0.1,
    symmetric: bool = True,
) -> InfoNCE:
    """:func:`infoclip.kernels.infonce.infonce` of samples widened to float32, in which every term is computed.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes that are not the same [B, N, D], no samples, or a temperature that is not positive.
    """
    check_samples("x", x)
    check_samples("y", y)
    return op(widened(x), widened(y), temperature, symmetric)
