"""Matrix-based Renyi entropy, mutual information, and the two losses that InfoCLIP builds on them.

For samples x_1 .. x_N (the rows of ``x``) with the linear kernel, K = x x^T and A = K / tr K. Then

    S_alpha(A) = log2(sum_i lambda_i(A)^alpha) / (1 - alpha),  S_1(A) = -sum_i lambda_i log2 lambda_i,
    S(A, B)    = S(A o B / tr(A o B)),                          I(A; B) = S(A) + S(B) - S(A, B)

in bits, o being the Hadamard product (Sanchez Giraldo, Rao and Principe, "Measures of Entropy from Data Using
Infinitely Divisible Kernels", IEEE Trans. Inf. Theory 2015). At alpha = 2, S_2(A) = -log2 ||A||_F^2 needs no
eigenvalues, and no N x N matrix: that order is the op, with ``backend`` as everywhere. Other orders, and joint
entropies of more than three sets, are the reference's. Rows are used as given: whoever wants samples of equal weight
normalises them before.

Everything is computed and returned in float32 (float64 for float64 sets) whatever autocast says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from infoclip.kernels import BackendUnavailableError, choose, register_room
from infoclip.kernels.arguments import check_one_device
from infoclip.kernels.numerics import check_samples

from . import estimate, native_impl, op, reference, triton_impl

__all__ = [
    "RenyiEstimate",
    "compression_loss",
    "estimate_renyi_mutual_information",
    "normalized_gram",
    "renyi_entropy",
    "renyi_joint_entropy",
    "renyi_mutual_information",
    "transfer_loss",
]

register_room(
    "renyi_mutual_information",
    triton_impl.why_not,
    native_impl.why_not,
    {
        "cpu": "measured faster than the reference, value and gradient.",
        "cuda": "the kernels' speed on a GPU is not measured yet; cuBLAS stays the default.",
    },
)


def renyi_entropy(
    x: Tensor,  # [..., N, D]
    alpha: float = 2.0,
) -> Tensor:  # [...]
    """Matrix-based Renyi entropy S_alpha of sample sets, in bits: from 0 (all rows parallel) to log2 min(N, D).

    Any order ``alpha > 0``; 1 is the limit (von Neumann entropy). Orders other than 2 take eigenvalues of the smaller
    of ``x x^T`` and ``x^T x``, in float64 whatever the input: in float32 the many eigenvalues near zero would decide
    the result at small orders. Eigenvalues below N times float64's epsilon (relative to their sum) count as zero, which
    also cuts the infinite slope that orders below 1 have there. Repeated eigenvalues are no matter. At alpha = 2 two
    products of torch's are all there is to do, on the smaller of the two matrices: it has no backend to choose.

    A set of zeros only has entropy 0, and passes no gradient on. The result does not depend on the scale of ``x``.
    Half-precision input is computed and returned in float32.

    Raises:
        TypeError: ``x`` is not a floating-point tensor, or ``alpha`` not a number.
        ValueError: ``x`` has no samples, or ``alpha`` is not positive and finite.
    """
    check_samples("x", x)
    _check_order(alpha)
    return reference.entropy(x, alpha)


def renyi_mutual_information(
    x: Tensor,  # [B, N, D] or [..., N, D]
    y: Tensor,  # [B, N, E] or [..., N, E]
    alpha: float = 2.0,
    *,
    backend: str | None = None,
) -> Tensor:  # [B] or [...]
    """Matrix-based mutual information I_alpha between paired sample sets, in bits.

    Symmetric, independent of the order of the samples and of the scale of either set. With rows of equal length it is
    at most the smaller of the two entropies, and 0 if all rows of one set are equal. It is never negative at
    alpha = 1 with rows of equal length (subadditivity of the von Neumann entropy); at other orders it can be (at
    alpha = 2 it is log2 of E[c_x^2 c_y^2] / (E[c_x^2] E[c_y^2]) over all pairs of samples, c being their cosine).

    Where no sample is non-zero in both sets the joint Gram matrix is zero: the result is 0, without gradient. A set
    with a value that is not finite gives NaN, and leaves the rest of the batch alone. Any strides; two dtypes are
    promoted to the wider. The gradient is made with the value, in one sweep; second derivatives are the reference's.

    Args:
        backend: ``reference``, ``triton``, ``native`` or ``auto``; None asks ``INFOCLIP_BACKEND``, then ``auto``. It
            chooses at alpha = 2; other orders have the reference alone.

    Raises:
        TypeError: not floating-point tensors, or ``alpha`` not a number.
        ValueError: shapes or devices that do not go together, no samples, ``alpha`` not positive and finite, or an
            unknown backend.
        infoclip.kernels.BackendUnavailableError: the backend asked for by name cannot run here, or has not this order.
    """
    return _information([x, y], [False, False], [-1, 1, 1], alpha, backend)


def renyi_joint_entropy(
    *views: Tensor,  # [..., N, D_i]
    alpha: float = 2.0,
    backend: str | None = None,
) -> Tensor:  # [...]
    """Joint entropy of several views of the same N samples, in bits; 0 where no sample is non-zero in all of them.

    Two and three views at alpha = 2 are the op; others are the reference's.

    Raises:
        TypeError, ValueError, infoclip.kernels.BackendUnavailableError: as :func:`renyi_mutual_information`, or no view
            at all.
    """
    return _information(views, [False] * len(views), [1] + [0] * len(views), alpha, backend)


def compression_loss(
    relation: Tensor,  # [..., N, F]
    *features: Tensor,  # [..., N, D_i]
    alpha: float = 2.0,
    backend: str | None = None,
) -> Tensor:  # [...]
    """InfoCLIP's L_c in bits: S(R) - S(V, L, R), the part of I(V, L; R) that depends on the relation R.

    At alpha = 2: -log2 ||G_R||^2 + log2 ||G_V o G_L o G_R||^2, the product normalised to trace 1. The rows of the
    ``features`` (those of V and of L) are L2-normalised here, without a normalised copy but in the reference; those of
    ``relation`` are used as given, as in the relation loss of InfoSAM. A feature that is the same for all samples has a
    constant Gram matrix: leave it out. Where the joint Gram matrix is zero the result is 0, without gradient. One and
    two features at alpha = 2 are the op; other numbers are the reference's.

    Raises:
        TypeError, ValueError, infoclip.kernels.BackendUnavailableError: as :func:`renyi_mutual_information`.
    """
    others = len(features)
    return _information([relation, *features], [False] + [True] * others, [-1, 1] + [0] * others, alpha, backend)


def transfer_loss(
    student: Tensor,  # [..., N, D]
    teacher: Tensor,  # [..., N, E]
    alpha: float = 2.0,
    *,
    backend: str | None = None,
) -> Tensor:  # [...]
    """InfoCLIP's L_d in bits: -I(R^T; R^S).

    At alpha = 2: log2 ||G_T||^2 + log2 ||G_S||^2 - log2 ||G_T o G_S||^2. Rows are used as given (as in the distillation
    loss of InfoSAM). Neither side is detached here. The gradient does not vanish where the two agree: -I falls
    further as the student's own entropy rises.

    Raises:
        TypeError, ValueError, infoclip.kernels.BackendUnavailableError: as :func:`renyi_mutual_information`.
    """
    return -renyi_mutual_information(teacher, student, alpha, backend=backend)


def normalized_gram(
    x: Tensor,  # [..., N, D]
) -> Tensor:  # [..., N, N]
    """Gram matrix of the rows with trace 1; zero for a set of zeros.

    Raises:
        TypeError, ValueError: ``x`` is not a set of samples.
    """
    check_samples("x", x)
    return reference.normalized_gram(x)


class RenyiEstimate(NamedTuple):
    """An estimate of mutual information, and how far off it may be."""

    value: Tensor  # [B], bits
    error: Tensor  # [B], bits, without gradient; infinite where the probes say too little


def estimate_renyi_mutual_information(
    x: Tensor,  # [B, N, D]
    y: Tensor,  # [B, N, E]
    alpha: float,
    *,
    probes: int = 64,
    steps: int = 16,
    confidence: float = 0.95,
    seed: int = 0,
) -> RenyiEstimate:
    """Mutual information of any order without an N x N matrix: for many samples, where eigenvalues cost N^3.

    At alpha = 2 :func:`renyi_mutual_information` is exact without one: take that. The single entropies are exact here
    too, by the smaller side, O(N D min(N, D)) operations. Of the joint entropy, the sum of f(l) over the eigenvalues
    of A = (x x^T) o (y y^T) / trace with f = l^alpha (-l ln l at 1) is the mean of z^T f(A) z over ``probes`` vectors
    of random signs, each by ``steps`` steps of Lanczos: stochastic Lanczos quadrature (Ubaru, Chen and Saad, SIAM J.
    Matrix Anal. Appl. 2017). A meets vectors alone: 4 N D E operations a step, O(N (D + E + steps) + D E) memory.

    ``error`` adds two parts and carries them through the logarithm. The quadrature's: even derivatives of f have one
    sign on l > 0 and odd ones the other, so the Gauss rule and the Gauss-Radau rule with a node at 0 have z^T f(A) z
    between them (Golub and Meurant, "Matrices, Moments and Quadrature", 1994); their middle is taken and half their
    distance added (both exact, and equal, for whole orders up to 2 steps - 1). The probes': a probe's variance is
    2 (||f(A)||_F^2 - sum_i f(A)_ii^2) (Hutchinson 1990), so by Chebyshev's inequality the mean is off by more than
    sqrt(2 sum f(l)^2 / (probes (1 - confidence))) with a probability of at most 1 - ``confidence``; the sum of squares
    is taken from the same quadrature.

    Computed in float64, returned in float32 or wider. The same ``seed`` gives the same bits. Differentiable once, for
    orders above 1: the gradient is an unbiased estimate up to the quadrature's error. A set with a value that is not
    finite gives NaN; where the joint Gram matrix is zero, value and error are 0.

    Args:
        probes: random vectors, at least 1; the error falls as their root.
        steps: Lanczos steps of each, at least 2; orders far below 1 want more.
        confidence: probability, between 0 and 1, that the exact value lies within ``error``.
        seed: of the signs.

    Raises:
        TypeError: as :func:`renyi_mutual_information`; ``probes``, ``steps`` or ``seed`` not a whole number.
        ValueError: as :func:`renyi_mutual_information`; sets that are not [B, N, D]; a number out of range; a gradient
            wanted for ``alpha`` of at most 1.
    """
    _check_views([x, y])
    _check_order(alpha)
    if x.ndim != 3:
        raise ValueError(f"set 0 has shape {list(x.shape)}; expected [B, N, D]")
    for name, number, least in (("probes", probes, 1), ("steps", steps, 2), ("seed", seed, 0)):
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name} is a {type(number).__name__}; expected a whole number")
        if number < least:
            raise ValueError(f"{name} is {number}; expected at least {least}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; expected a number between 0 and 1")
    if alpha <= 1 and torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        raise ValueError(
            f"alpha is {alpha}; expected more than 1 where a gradient is wanted: detach the sets, or take "
            "renyi_mutual_information"
        )
    wide = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
    x, y = (reference.rescaled(v.double()) for v in (x, y))
    joint, error = estimate.joint_entropy(x, y, alpha, probes, steps, confidence, seed)
    value = reference.entropy(x, alpha) + reference.entropy(y, alpha) - joint
    # Where no sample is there in both, as everywhere.
    there = (x.detach().square().sum(dim=-1) * y.detach().square().sum(dim=-1)).sum(dim=-1) != 0
    return RenyiEstimate(torch.where(there, value, 0.0).to(wide), error.to(wide))


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
    check_one_device(**{f"set {index}": x for index, x in enumerate(views)})


def _check_order(alpha: float) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"alpha is a {type(alpha).__name__}; expected a number")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha is {alpha}; expected a finite number greater than 0")


def _information(
    views: Sequence[Tensor],  # [..., N, D_i] each
    units: list[bool],
    weights: list[int],
    alpha: float,
    backend: str | None,
) -> Tensor:  # [...]
    _check_views(views)
    _check_order(alpha)
    first = views[0]
    dtype = views[0].dtype
    for x in views[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    views = [x.to(dtype) for x in views]
    if alpha != 2 or len(views) not in (2, 3):
        if backend not in (None, "auto", "reference"):
            choose("renyi_mutual_information", backend, first.device.type, dtype)  # an unknown name is a ValueError
            raise BackendUnavailableError(
                f"renyi_mutual_information: backend={backend!r} has order 2 and two or three sets only, "
                f"not order {alpha} of {len(views)}; use the reference."
            )
        return reference.information(views, units, weights, alpha)
    chosen = choose("renyi_mutual_information", backend, first.device.type, dtype)
    if chosen == "reference":
        return reference.information(views, units, weights)
    sets = [x.reshape(-1, *x.shape[-2:]) for x in views]
    need = [x.requires_grad and torch.is_grad_enabled() for x in sets]
    third = sets[2] if len(sets) == 3 else None
    return op.renyi_information(sets[0], sets[1], third, units, weights, need, chosen)[0].reshape(first.shape[:-2])
