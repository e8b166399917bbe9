"""Matrix-based Rényi entropy and mutual information (Sánchez Giraldo, Rao and Príncipe 2015; InfoCLIP, section 3.3).

For samples ``x_1 .. x_N`` (the rows) with the linear kernel ``K = X X^T`` and ``A = K / tr K``:

- entropy ``S_a(A) = log2(sum_i lambda_i(A)^a) / (1 - a)``, in bits; ``S_2(A) = -log2 ||A||_F^2`` needs no eigenvalues;
- joint entropy ``S_a(A, B) = S_a(A o B / tr(A o B))`` with the Hadamard product;
- mutual information ``I_a(A; B) = S_a(A) + S_a(B) - S_a(A, B)``.

Rows are taken as given: normalise them to unit length first if every sample is to weigh the same (then ``tr K = N`` and
``0 <= I_a``, since the joint entropy is at most the sum for Gram matrices of equal diagonal). Samples that are all zero
have no entropy in the formula (0 / 0); here ``A`` is then zero and the entropy is 0, with zero gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "compression_loss",
    "entropy_of_gram",
    "normalized_gram",
    "renyi_entropy",
    "renyi_joint_entropy",
    "renyi_mutual_information",
    "transfer_loss",
]


def normalized_gram(x: Tensor) -> Tensor:  # [..., N, D] -> [..., N, N]
    """Gram matrix of the rows, divided by its trace; zero where every row is zero."""
    _check_rows(x, "x")
    return _unit_trace(x @ x.mT)


def renyi_entropy(x: Tensor, alpha: float = 2.0) -> Tensor:  # [..., N, D] -> [...]
    """Entropy of order ``alpha`` of the rows, in bits.

    At order 2 neither eigenvalues nor, where ``D < N``, the N x N matrix are needed: ``||X X^T||_F = ||X^T X||_F``.

    Args:
        x: samples as rows, [..., N, D].
        alpha: order, greater than 0; 1 is the limit, von Neumann's ``-sum lambda log2 lambda``.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: fewer than two dimensions, no sample or feature, or ``alpha`` not positive.
    """
    _check_rows(x, "x")
    _check_alpha(alpha)
    if alpha != 2:
        return entropy_of_gram(normalized_gram(x), alpha)
    smaller = x.mT @ x if x.shape[-1] < x.shape[-2] else x @ x.mT
    trace = x.square().sum(dim=(-2, -1))
    return _minus_log2(smaller.square().sum(dim=(-2, -1)), trace.square())


def renyi_joint_entropy(*xs: Tensor, alpha: float = 2.0) -> Tensor:  # [..., N, D_i] -> [...]
    """Joint entropy of several views of the same N samples, in bits.

    Raises:
        TypeError, ValueError: as :func:`renyi_entropy`, and for views with different numbers of samples.
    """
    _check_alpha(alpha)
    product: Tensor | None = None
    for index, x in enumerate(xs):
        _check_rows(x, f"view {index}")
        if x.shape[-2] != xs[0].shape[-2]:
            raise ValueError(f"expected views of the same samples, got {x.shape[-2]} and {xs[0].shape[-2]} rows")
        gram = normalized_gram(x)
        product = gram if product is None else product * gram
    if product is None:
        raise ValueError("expected at least one view")
    return entropy_of_gram(_unit_trace(product), alpha)


def renyi_mutual_information(x: Tensor, y: Tensor, alpha: float = 2.0) -> Tensor:  # [..., N, D], [..., N, E] -> [...]
    """Mutual information of order ``alpha`` between two views of the same samples, in bits.

    Symmetric in ``x`` and ``y``, and independent of the order of the samples.

    Raises:
        TypeError, ValueError: as :func:`renyi_joint_entropy`.
    """
    return renyi_entropy(x, alpha) + renyi_entropy(y, alpha) - renyi_joint_entropy(x, y, alpha=alpha)


def compression_loss(relation: Tensor, *features: Tensor, alpha: float = 2.0) -> Tensor:
    """``L_c``: what the alignment map keeps of its inputs (InfoCLIP, compression; InfoSAM, relation loss).

    ``S(R) - S(V, L, R)`` up to the terms that do not depend on the map; at order 2 it is
    ``-log2 ||G_R||_F^2 + log2 ||G_V o G_L o G_R||_F^2``, each factor and the product with trace 1.

    Args:
        relation: the map, a row a sample, [..., N, D].
        features: rows of the inputs it was made from, [..., N, D_i]; they are L2-normalised here.

    Returns:
        bits, [...].
    """
    views = [torch.nn.functional.normalize(f, dim=-1) for f in features]
    return renyi_entropy(relation, alpha) - renyi_joint_entropy(*views, relation, alpha=alpha)


def transfer_loss(student: Tensor, teacher: Tensor, alpha: float = 2.0) -> Tensor:  # [..., N, D] twice -> [...]
    """``L_d = -I(R_T; R_S)``, in bits (InfoCLIP, transfer; InfoSAM, distillation loss)."""
    return -renyi_mutual_information(teacher, student, alpha)


def entropy_of_gram(gram: Tensor, alpha: float) -> Tensor:  # [..., N, N] -> [...]
    """Entropy of a positive semi-definite matrix of trace 1, in bits."""
    if alpha == 2:
        return _minus_log2(gram.square().sum(dim=(-2, -1)), None)
    # Only eigenvalues are used, whose gradient v v^T is finite also where they repeat.
    values = torch.linalg.eigvalsh(gram.double()).clamp_min(0.0)
    # Rounding leaves eigenvalues near 1e-17 where the true one is 0; x^alpha has an infinite slope there for alpha < 1.
    positive = values > 1e-14
    safe = torch.where(positive, values, torch.ones_like(values))
    if alpha == 1:
        return -(torch.where(positive, safe * safe.log2(), 0.0)).sum(dim=-1).to(gram.dtype)
    power = torch.where(positive, safe.pow(alpha), 0.0).sum(dim=-1)
    power = torch.where(power > 0, power, torch.ones_like(power))
    return (power.log2() / (1.0 - alpha)).to(gram.dtype)


def _unit_trace(gram: Tensor) -> Tensor:  # [..., N, N]
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None]
    return gram / torch.where(trace > 0, trace, torch.ones_like(trace))


def _minus_log2(part: Tensor, whole: Tensor | None) -> Tensor:  # [...] each
    """``-log2(part / whole)``, 0 where ``part`` is 0 (all samples zero)."""
    some = part > 0
    result = -torch.where(some, part, torch.ones_like(part)).log2()
    if whole is None:
        return result
    return result + torch.where(some, whole, torch.ones_like(whole)).log2()


def _check_rows(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() < 2 or x.shape[-1] == 0 or x.shape[-2] == 0:
        raise ValueError(f"{name}: expected [..., N, D] with N and D at least 1, got {list(x.shape)}")


def _check_alpha(alpha: float) -> None:
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha: expected a finite number greater than 0, got {alpha}")
