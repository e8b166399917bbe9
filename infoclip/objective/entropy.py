"""Matrix-based Renyi entropy, mutual information, and the two losses that InfoCLIP builds on them.

For samples x_1 .. x_N (the rows of ``x``) with the linear kernel, K = x x^T and A = K / tr K. Then

    S_alpha(A) = log2(sum_i lambda_i(A)^alpha) / (1 - alpha),  S_1(A) = -sum_i lambda_i log2 lambda_i,
    S(A, B)    = S(A o B / tr(A o B)),                          I(A; B) = S(A) + S(B) - S(A, B)

in bits, o being the Hadamard product (Sanchez Giraldo, Rao and Principe, "Measures of Entropy from Data Using
Infinitely Divisible Kernels", IEEE Trans. Inf. Theory 2015). At alpha = 2, S_2(A) = -log2 ||A||_F^2 needs no
eigenvalues. Rows are used as given: whoever wants samples of equal weight normalises them before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from infoclip.objective.numerics import check_samples, full_precision, unit, widened

__all__ = [
    "compression_loss",
    "normalized_gram",
    "renyi_entropy",
    "renyi_joint_entropy",
    "renyi_mutual_information",
    "transfer_loss",
]


def renyi_entropy(
    x: Tensor,  # [..., N, D]
    alpha: float = 2.0,
) -> Tensor:  # [...]
    """Matrix-based Renyi entropy S_alpha of sample sets, in bits: from 0 (all rows parallel) to log2 min(N, D).

    Any order ``alpha > 0``; 1 is the limit (von Neumann entropy). Orders other than 2 take eigenvalues of the smaller
    of ``x x^T`` and ``x^T x``, in float64 whatever the input: in float32 the many eigenvalues near zero would decide
    the result at small orders. Eigenvalues below N times float64's epsilon (relative to their sum) count as zero, which
    also cuts the infinite slope that orders below 1 have there. Repeated eigenvalues are no matter.

    A set of zeros only has entropy 0, and passes no gradient on. The result does not depend on the scale of ``x``.
    Half-precision input is computed and returned in float32.

    Raises:
        TypeError: ``x`` is not a floating-point tensor, or ``alpha`` not a number.
        ValueError: ``x`` has no samples, or ``alpha`` is not positive and finite.
    """
    check_samples("x", x)
    _check_order(alpha)
    with full_precision(x):
        rows = _rescaled(widened(x))
        # x x^T and x^T x have the same eigenvalues but for zeros, and the same trace.
        gram = rows @ rows.mT if rows.shape[-2] <= rows.shape[-1] else rows.mT @ rows
        return _entropy(gram, alpha)[0]


def renyi_mutual_information(
    x: Tensor,  # [B, N, D] or [..., N, D]
    y: Tensor,  # [B, N, E] or [..., N, E]
    alpha: float = 2.0,
) -> Tensor:  # [B] or [...]
    """Matrix-based mutual information I_alpha between paired sample sets, in bits.

    Symmetric, independent of the order of the samples and of the scale of either set. With rows of equal length it is
    at most the smaller of the two entropies, and 0 if all rows of one set are equal. It is never negative at
    alpha = 1 with rows of equal length (subadditivity of the von Neumann entropy); at other orders it can be (at
    alpha = 2 it is log2 of E[c_x^2 c_y^2] / (E[c_x^2] E[c_y^2]) over all pairs of samples, c being their cosine).

    Where no sample is non-zero in both sets the joint Gram matrix is zero: the result is 0, without gradient.

    Raises:
        TypeError: not floating-point tensors, or ``alpha`` not a number.
        ValueError: shapes that do not go together, no samples, or ``alpha`` not positive and finite.
    """
    _check_views([x, y])
    _check_order(alpha)
    with full_precision(x):
        gram_x, gram_y = _gram(widened(x)), _gram(widened(y))
        joint, there = _entropy(gram_x * gram_y, alpha)
        value = _entropy(gram_x, alpha)[0] + _entropy(gram_y, alpha)[0] - joint
        return torch.where(there, value, 0.0)


def renyi_joint_entropy(
    *views: Tensor,  # [..., N, D_i]
    alpha: float = 2.0,
) -> Tensor:  # [...]
    """Joint entropy of several views of the same N samples, in bits; 0 where no sample is non-zero in all of them.

    Raises:
        TypeError, ValueError: as :func:`renyi_mutual_information`, or no view at all.
    """
    _check_views(views)
    _check_order(alpha)
    with full_precision(views[0]):
        return _entropy(_product([_gram(widened(x)) for x in views]), alpha)[0]


def compression_loss(
    relation: Tensor,  # [..., N, F]
    *features: Tensor,  # [..., N, D_i]
    alpha: float = 2.0,
) -> Tensor:  # [...]
    """InfoCLIP's L_c in bits: S(R) - S(V, L, R), the part of I(V, L; R) that depends on the relation R.

    At alpha = 2: -log2 ||G_R||^2 + log2 ||G_V o G_L o G_R||^2, the product normalised to trace 1. The rows of the
    ``features`` (those of V and of L) are L2-normalised here, those of ``relation`` are used as given, as in the
    relation loss of InfoSAM. A feature that is the same for all samples has a constant Gram matrix: leave it out.
    Where the joint Gram matrix is zero the result is 0, without gradient.

    Raises:
        TypeError, ValueError: as :func:`renyi_mutual_information`.
    """
    _check_views([relation, *features])
    _check_order(alpha)
    with full_precision(relation):
        gram = _gram(widened(relation))
        joint, there = _entropy(_product([*(_gram(unit(widened(x))) for x in features), gram]), alpha)
        return torch.where(there, _entropy(gram, alpha)[0] - joint, 0.0)


def transfer_loss(
    student: Tensor,  # [..., N, D]
    teacher: Tensor,  # [..., N, E]
    alpha: float = 2.0,
) -> Tensor:  # [...]
    """InfoCLIP's L_d in bits: -I(R^T; R^S).

    At alpha = 2: log2 ||G_T||^2 + log2 ||G_S||^2 - log2 ||G_T o G_S||^2. Rows are used as given (as in the distillation
    loss of InfoSAM). Neither side is detached here. The gradient does not vanish where the two agree: -I falls
    further as the student's own entropy rises.

    Raises:
        TypeError, ValueError: as :func:`renyi_mutual_information`.
    """
    return -renyi_mutual_information(teacher, student, alpha)


def normalized_gram(
    x: Tensor,  # [..., N, D]
) -> Tensor:  # [..., N, N]
    """Gram matrix of the rows with trace 1; zero for a set of zeros.

    Raises:
        TypeError, ValueError: ``x`` is not a set of samples.
    """
    check_samples("x", x)
    with full_precision(x):
        return _gram(widened(x)) / x.shape[-2]


def _check_views(views: Sequence[Tensor]) -> None:
    if not views:
        raise ValueError("there is no set of samples; expected at least one")
    for index, x in enumerate(views):
        name = f"set {index}"
        check_samples(name, x)
        if x.shape[:-1] != views[0].shape[:-1]:
            raise ValueError(
                f"{name} has shape {list(x.shape)} and set 0 {list(views[0].shape)}; "
                "expected the same batch and number of samples"
            )


def _check_order(alpha: float) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"alpha is a {type(alpha).__name__}; expected a number")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha is {alpha}; expected a finite number greater than 0")


def _rescaled(x: Tensor) -> Tensor:
    """Divided by a power of two near the largest entry of each set, so that fourth powers neither overflow nor vanish.

    No entropy depends on the scale: taking it for a constant leaves the gradient exact.
    """
    largest = x.detach().abs().amax(dim=(-2, -1), keepdim=True)
    exponent = torch.where(largest != 0, largest, 1.0).log2().floor().clamp(-126, 126)
    return x * torch.exp2(-exponent)


def _gram(x: Tensor) -> Tensor:
    """Gram matrix of trace N (0 for a set of zeros), so that Hadamard products keep their size."""
    x = _rescaled(x)
    square = x.square().sum(dim=(-2, -1), keepdim=True)
    x = x * (math.sqrt(x.shape[-2]) * torch.where(square != 0, square, 1.0).rsqrt())
    return x @ x.mT


def _product(grams: Sequence[Tensor]) -> Tensor:
    product = grams[0]
    for gram in grams[1:]:
        product = product * gram
    return product


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
    entropy = torch.where(finite, _spectrum_entropy(values, alpha), torch.nan)
    return entropy.to(gram.dtype), there


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
