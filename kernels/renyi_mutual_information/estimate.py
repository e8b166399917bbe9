"""Stochastic Lanczos quadrature of joint entropies of any order: no N x N matrix, and an error bound with the value."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from infoclip.kernels.numerics import full_precision

__all__ = ["joint_entropy", "quadratures"]


def joint_entropy(
    x: Tensor,  # [B, N, D] float64
    y: Tensor,  # [B, N, E] float64
    alpha: float,
    probes: int,
    steps: int,
    confidence: float,
    seed: int,
) -> tuple[Tensor, Tensor]:  # [B] each
    """The joint entropy in bits and its error bound; 0 and 0 where the joint Gram matrix is zero.

    The matrix A = (x x^T) o (y y^T) / trace meets vectors alone: (A v)_i = x_i^T (x^T diag(v) y) y_i / trace.
    """
    with full_precision(x):
        there, found, bound, gradients = _trace(x.detach(), y.detach(), alpha, probes, steps, confidence, seed)
        found = _WithGradient.apply(found, x, y, *gradients)
        if alpha == 1:
            value, error = found / math.log(2), bound / math.log(2)
        else:
            safe = torch.where(there, found, 1.0)
            value = safe.log2() / (1 - alpha)
            with torch.no_grad():
                share = bound / safe
                # On the scale of the logarithm more lies below than above.
                error = -torch.log2(1 - share.clamp(max=1)) / abs(1 - alpha)
        # NaN passes, and shows.
        return torch.where(there, value, 0.0), torch.where(there, error, 0.0).detach()


class _WithGradient(torch.autograd.Function):
    """The first argument, with given derivatives in x and y."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, x: Tensor, y: Tensor, d_x: Tensor | None, d_y: Tensor | None) -> Tensor:
        ctx.save_for_backward(d_x, d_y)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_x, d_y = ctx.saved_tensors
        factor = grad[:, None, None]
        return None, *(None if d is None else factor * d for d in (d_x, d_y)), None, None


def _function(values: Tensor, alpha: float) -> Tensor:
    """What is summed over the eigenvalues: l^alpha, or -l ln l."""
    values = values.clamp(min=0)
    return torch.special.entr(values) if alpha == 1 else values**alpha


def _quadrature(diagonal: Tensor, beside: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of tridiagonal matrices [B, k]: the quadrature of the function and of its square [B]; eigenvalues and vectors."""
    matrix = torch.diag_embed(diagonal) + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
    finite = matrix.isfinite().flatten(1).all(dim=1)  # LAPACK refuses others
    values, vectors = torch.linalg.eigh(torch.where(finite[:, None, None], matrix, 0.0))
    weights = vectors[:, 0, :].square()
    of = _function(values, alpha)
    first, second = ((weights * v).sum(dim=-1) for v in (of, of.square()))
    return torch.where(finite, first, torch.nan), torch.where(finite, second, torch.nan), values, vectors


def _core(x: Tensor, y: Tensor, v: Tensor) -> Tensor:  # [B, N, D], [B, N, E], [B, N] -> [B, D, E]
    return (x * v[..., None]).mT @ y


def quadratures(
    x: Tensor,  # [B, N, D]
    y: Tensor,  # [B, N, E]
    scale: Tensor,  # [B], of the matrix
    probe: Tensor,  # [B, N] of squared length N
    alpha: float,
    steps: int,
) -> tuple[Tensor, ...]:
    """Gauss's and Gauss-Radau's z^T f(A) z / N and Gauss's of f^2 [B]; Ritz values [B, k], vectors [B, k, k], basis."""
    B, N = probe.shape
    basis = x.new_empty(steps, B, N)
    diagonal, beside = x.new_zeros(B, steps), x.new_zeros(B, steps)
    vector = probe / math.sqrt(N)
    for k in range(steps):
        basis[k] = vector
        after = ((x @ _core(x, y, vector)) * y).sum(dim=-1) * scale[:, None]
        diagonal[:, k] = (vector * after).sum(dim=-1)
        for _twice in range(2):  # orthogonal to all before, or values already found come again
            known = basis[: k + 1]
            after = after - torch.einsum("kb,kbn->bn", torch.einsum("kbn,bn->kb", known, after), known)
        length = after.norm(dim=-1)
        # A space that is complete ends here: what follows has no weight.
        length = torch.where(length <= 1e-14, 0.0, length)
        beside[:, k] = length
        vector = after / torch.where(length == 0, 1.0, length)[:, None]
    gauss, square, values, vectors = _quadrature(diagonal, beside[:, :-1], alpha)
    # Gauss-Radau with a node at 0: the last entry that makes 0 an eigenvalue.
    pivot = diagonal[:, 0]
    for k in range(1, steps):
        pivot = diagonal[:, k] - beside[:, k - 1].square() / torch.where(pivot > 0, pivot, torch.inf)
    last = beside[:, -1].square() / torch.where(pivot > 0, pivot, torch.inf)
    radau, *_ = _quadrature(torch.cat([diagonal, last[:, None]], dim=1), beside, alpha)
    return gauss, radau, square, values, vectors, basis


def _trace(
    x: Tensor,  # [B, N, D]
    y: Tensor,  # [B, N, E]
    alpha: float,
    probes: int,
    steps: int,
    confidence: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor | None, Tensor | None]]:
    """Whether the trace is not zero, the function summed over the eigenvalues, its bound (all [B]), its gradient."""
    B, N, _ = x.shape
    own = x.square().sum(dim=-1), y.square().sum(dim=-1)  # [B, N] each
    trace = (own[0] * own[1]).sum(dim=-1)
    there = trace != 0  # NaN passes
    scale = 1 / torch.where(there, trace, 1.0)

    generator = torch.Generator().manual_seed(seed)
    # Orders up to 1 have no bounded derivative at the eigenvalue 0: the caller refuses their gradient.
    d_x, d_y = (torch.zeros_like(v) if alpha > 1 else None for v in (x, y))
    total, spread, gap, slope = (x.new_zeros(B) for _ in range(4))
    steps = min(steps, N)
    for _ in range(probes):
        # Signs, the same for the whole batch.
        probe = (torch.randint(0, 2, (N,), generator=generator) * 2 - 1).to(x).expand(B, N)
        gauss, radau, square, values, vectors, basis = quadratures(x, y, scale, probe, alpha, steps)
        total += N * (gauss + radau) / 2
        gap += N * (gauss - radau).abs() / 2
        spread += N * square
        if d_x is not None and d_y is not None:
            derivative = alpha * values.clamp(min=0) ** (alpha - 1) * vectors[:, 0, :]  # [B, k]
            inner = (vectors @ derivative[..., None])[..., 0] * math.sqrt(N)
            u = torch.einsum("bk,kbn->bn", inner, basis)  # the derivative of the function at A, times the probe
            of_probe, of_u = _core(x, y, probe), _core(x, y, u)
            factor = (scale / probes)[:, None, None]
            for one, other in ((u, of_probe), (probe, of_u)):
                d_x += factor * (one[..., None] * (y @ other.mT))
                d_y += factor * (one[..., None] * (x @ other))
            slope += (of_probe * of_u).sum(dim=(1, 2)) * scale / probes
    if d_x is not None and d_y is not None:  # through the trace: sum f'(l) l over it
        factor = 2 * (slope * scale)[:, None, None]
        d_x -= factor * own[1][..., None] * x
        d_y -= factor * own[0][..., None] * y
    # Chebyshev: the variance of a probe is at most twice the sum of the function's squares.
    chance = (2 * spread / probes / (probes * (1 - confidence))).sqrt()
    return there, total / probes, gap / probes + chance, (d_x, d_y)
