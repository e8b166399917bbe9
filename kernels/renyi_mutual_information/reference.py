"""The specification in plain PyTorch: Gram matrices and their entropies, of any order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from infoclip.kernels.numerics import full_precision, unit, widened

__all__ = ["entropy", "information", "normalized_gram", "rescaled"]


def entropy(
    x: Tensor,  # [..., N, D]
    alpha: float,
) -> Tensor:  # [...]
    """Entropy of single sets, by the smaller of the two Gram matrices."""
    with full_precision(x):
        rows = rescaled(widened(x))
        # x x^T and x^T x have the same eigenvalues but for zeros, and the same trace.
        gram = rows @ rows.mT if rows.shape[-2] <= rows.shape[-1] else rows.mT @ rows
        return _entropy(gram, alpha)[0]


def information(
    views: Sequence[Tensor],  # [..., N, D_i] each
    units: Sequence[bool],
    weights: Sequence[int],
    alpha: float = 2.0,
) -> Tensor:  # [...]
    """``weights[0]`` times the views' joint entropy, plus ``weights[1 + i]`` times the entropy of view i, in bits.

    The rows of a view whose ``units`` entry is set are L2-normalised first. Where the joint Gram matrix is zero the
    result is 0, without gradient.
    """
    with full_precision(views[0]):
        wide = [widened(x) for x in views]
        grams = [_gram(unit(x) if normal else x) for x, normal in zip(wide, units, strict=True)]
        joint, there = _entropy(math.prod(grams[1:], start=grams[0]), alpha)
        value = weights[0] * joint
        for weight, gram in zip(weights[1:], grams, strict=True):
            if weight:
                value = value + weight * _entropy(gram, alpha)[0]
        return torch.where(there, value, 0.0)


def normalized_gram(
    x: Tensor,  # [..., N, D]
) -> Tensor:  # [..., N, N]
    """Gram matrix of the rows with trace 1; zero for a set of zeros."""
    with full_precision(x):
        return _gram(widened(x)) / x.shape[-2]


def rescaled(x: Tensor) -> Tensor:
    """Divided by a power of two near the largest entry of each set, so that fourth powers neither overflow nor vanish.

    No entropy depends on the scale: taking it for a constant leaves the gradient exact.
    """
    largest = x.detach().abs().amax(dim=(-2, -1), keepdim=True)
    exponent = torch.where(largest != 0, largest, 1.0).log2().floor().clamp(-126, 126)
    return x * torch.exp2(-exponent)


def _gram(x: Tensor) -> Tensor:
    """Gram matrix of trace N (0 for a set of zeros), so that Hadamard products keep their size."""
    x = rescaled(x)
    square = x.square().sum(dim=(-2, -1), keepdim=True)
    x = x * (math.sqrt(x.shape[-2]) * torch.where(square != 0, square, 1.0).rsqrt())
    return x @ x.mT


def _entropy(gram: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Entropy [...] of positive semidefinite matrices [..., N, N], and whether their trace is not zero."""
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    there = trace != 0  # NaN passes, and shows
    normal = gram / torch.where(there, trace, 1.0)[..., None, None]
    if alpha == 2:
        total = normal.square().sum(dim=(-2, -1))
        return -torch.where(there, total, 1.0).log2(), there
    # A zero matrix becomes one of rank 1: entropy 0. torch.where keeps the gradient off it.
    corner = torch.zeros_like(normal)
    corner[..., 0, 0] = 1.0
    normal = torch.where(there[..., None, None], normal, corner)
    finite = normal.isfinite().all(dim=-1).all(dim=-1)  # LAPACK refuses others
    safe = torch.where(finite[..., None, None], normal, corner).double()
    values = torch.linalg.eigvalsh(safe)  # its gradient has no 1 / (l_i - l_j): repeated values are no matter
    spectrum = torch.where(finite, _spectrum_entropy(values, alpha), torch.nan)
    return spectrum.to(gram.dtype), there


def _spectrum_entropy(values: Tensor, alpha: float) -> Tensor:
    """Renyi entropy [...] in bits of eigenvalues [..., N] that sum to 1."""
    positive = values > values.shape[-1] * torch.finfo(values.dtype).eps
    logs = torch.where(positive, values, 1.0).log()
    kept = torch.where(positive, values, 0.0)
    if alpha == 1:
        return -(kept * logs).sum(dim=-1) / math.log(2)
    if abs(alpha - 1) < 0.5:
        # log(sum l^alpha) = log(1 + sum l (l^(alpha-1) - 1)) as sum l = 1: exact digits however near alpha is to 1.
        nats = (kept * torch.expm1((alpha - 1) * logs)).sum(dim=-1).log1p() / (1 - alpha)
    else:
        nats = torch.where(positive, alpha * logs, -torch.inf).logsumexp(dim=-1) / (1 - alpha)
    return nats / math.log(2)
