"""Distillation baselines of the paper's ablation: KL, MAFT and MAFT+ (representation compensation)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["kl_distillation", "pooled_distillation", "representation_compensation", "strip_pool"]


def kl_distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:  # [B, n, T] twice -> []
    """KL divergence of the student's class distribution from the teacher's, mean over pixels (nats).

    Args:
        student: cosine similarities of pixels and texts.
        teacher: the same of the frozen CLIP.
        temperature: both are divided by it before the softmax; the loss is multiplied by its square, so that the
            gradient keeps its size (Hinton, Vinyals and Dean 2015).
    """
    s = (student / temperature).log_softmax(dim=-1)
    t = (teacher / temperature).log_softmax(dim=-1)
    return F.kl_div(s, t, reduction="none", log_target=True).sum(dim=-1).mean() * temperature**2


def pooled_distillation(student: Tensor, teacher: Tensor) -> Tensor:  # [B, n, d] twice -> []
    """MAFT's self-distillation: smooth-L1 between the two CLIPs' image embeddings (Jiao et al., NeurIPS 2023, sec. 3.3).

    MAFT compares feature maps pooled to a few sizes; without its mask branch we compare the mean over pixels of the
    joint embeddings, L2-normalised.
    """
    return F.smooth_l1_loss(F.normalize(student.mean(dim=1), dim=-1), F.normalize(teacher.mean(dim=1), dim=-1))


def strip_pool(
    features: Tensor,  # [B, C, h, w]
    scales: Sequence[int] = (1, 2, 4),
    *,
    kernel_from: Literal["width", "square"] = "width",
    prepare: Callable[[Tensor], Tensor] = F.relu,
) -> Tensor:
    """Pooled strips of a map, [B, K] (MAFT+, section 3.3 and its code).

    A map that is not square is resized bilinearly to a square of its longer side; for each scale it is average-pooled
    (kernel = stride = side // scale), and the sums over rows and over columns are joined.

    Args:
        kernel_from: ``width`` takes the width before squaring, as the published code does, so that tall maps are
            pooled with a smaller kernel; ``square`` takes the squared side.
        prepare: applied first.

    Raises:
        ValueError: not four dimensions, or a map narrower than the largest scale.
    """
    if features.dim() != 4:
        raise ValueError(f"features: expected [B, C, h, w], got {list(features.shape)}")
    x = prepare(features)
    h, w = x.shape[-2:]
    side = max(h, w)
    base = w if kernel_from == "width" else side
    if base < max(scales):
        raise ValueError(f"features: expected a map at least {max(scales)} wide, got {h} x {w}")
    if h != w:
        x = F.interpolate(x, (side, side), mode="bilinear", align_corners=False)
    strips = []
    for scale in scales:
        kernel = base // scale
        pooled = F.avg_pool2d(x, kernel, kernel)
        strips += [pooled.sum(dim=2).flatten(1), pooled.sum(dim=3).flatten(1)]
    return torch.cat(strips, dim=1)


def representation_compensation(
    student: Tensor | Sequence[Tensor],  # [B, C, h, w]
    teacher: Tensor | Sequence[Tensor],  # [B, C, h, w]
    *,
    scales: Sequence[int] = (1, 2, 4),
    kernel_from: Literal["width", "square"] = "width",
    prepare: Callable[[Tensor], Tensor] = F.relu,
    difference: Callable[[Tensor, Tensor], Tensor] = F.smooth_l1_loss,
) -> Tensor:
    """MAFT+'s representation compensation: a difference of the pooled strips of two maps (MAFT+, eq. of L_rc).

    Lists of maps give the mean over their losses.

    Raises:
        ValueError: as :func:`strip_pool`, and for maps of different shape.
    """
    students = [student] if isinstance(student, Tensor) else list(student)
    teachers = [teacher] if isinstance(teacher, Tensor) else list(teacher)
    if not students or [s.shape for s in students] != [t.shape for t in teachers]:
        raise ValueError(
            f"expected maps of equal shapes, got {[list(s.shape) for s in students]} and {[list(t.shape) for t in teachers]}"
        )
    losses = [
        difference(
            strip_pool(s, scales, kernel_from=kernel_from, prepare=prepare),
            strip_pool(t, scales, kernel_from=kernel_from, prepare=prepare),
        )
        for s, t in zip(students, teachers, strict=True)
    ]
    return torch.stack(losses).mean()
