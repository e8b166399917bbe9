"""Distillation baselines of the paper's ablation: KL, MAFT and MAFT+ (representation compensation).

None of them detaches the teacher: :class:`~infoclip.objective.AlignmentObjective` hands in tensors without gradient.
Half precision is computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from infoclip.objective.numerics import full_precision, unit, widened

__all__ = ["kl_distillation", "pooled_distillation", "representation_compensation", "strip_pool"]


def kl_distillation(
    student: Tensor,  # [B, n, T]
    teacher: Tensor,  # [B, n, T]
    temperature: float,
) -> Tensor:  # []
    """KL(teacher || student) of the softmax over classes of similarity / temperature: mean over pixels, in nats, times
    the squared temperature, so that the gradient keeps its size (Hinton, Vinyals and Dean, 2015).

    InfoCLIP's ablation names KL distillation without a formula: similarities, temperature and direction are our
    reading.

    Args:
        student: cosine similarities of pixels and texts.
        teacher: the same of the frozen CLIP.
        temperature: greater than 0.

    Raises:
        ValueError: maps of different shape, or a temperature that is not positive.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; expected a finite number greater than 0")
    if student.shape != teacher.shape:
        raise ValueError(
            f"student has shape {list(student.shape)} and teacher {list(teacher.shape)}; expected the same [B, n, T]"
        )
    with full_precision(student):
        s = (widened(student) / temperature).log_softmax(dim=-1)
        t = (widened(teacher) / temperature).log_softmax(dim=-1)
        return F.kl_div(s, t, reduction="none", log_target=True).sum(dim=-1).mean() * temperature**2


def pooled_distillation(
    student: Tensor,  # [B, n, d]
    teacher: Tensor,  # [B, n, d]
) -> Tensor:  # []
    """Smooth-L1 distance of the image-level embeddings of the tuned and the frozen CLIP, mean over entries.

    After the self-distillation loss of MAFT (Jiao et al., "Learning Mask-aware CLIP Representations for Zero-Shot
    Segmentation", NeurIPS 2023), which holds the fine-tuned encoder's image-level representation to the frozen one's.
    Our reading: the mean over the patches' joint embeddings (the dense encoder leaves the class token unused),
    L2-normalised. MAFT's mask-aware loss needs mask proposals and has no place in this model.

    Raises:
        ValueError: shapes that differ or are not [B, n, d].
    """
    if student.ndim != 3 or student.shape != teacher.shape:
        raise ValueError(
            f"student has shape {list(student.shape)} and teacher {list(teacher.shape)}; expected the same [B, n, d]"
        )
    with full_precision(student):
        return F.smooth_l1_loss(unit(widened(student).mean(dim=1)), unit(widened(teacher).mean(dim=1)))


def strip_pool(
    features: Tensor,  # [B, C, h, w]
    scales: Sequence[int] = (1, 2, 4),
    *,
    kernel_from: Literal["width", "square"] = "width",
    prepare: Callable[[Tensor], Tensor] = F.relu,
) -> Tensor:  # [B, C * sum over scales of 2 * cells]
    """For each scale: average pooling, then the sums over its rows and over its columns, in one vector an image
    (MAFT+'s representation compensation and its code).

    A map that is not square is first resized (bilinear) to a square of its longer side. Kernel and stride of the
    pooling are ``side // scale``, at least 1.

    Args:
        scales: numbers of cells a side.
        kernel_from: ``width`` takes the side before the resizing, that is the width, as the published code does: a
            tall map then has more cells than ``scale`` a side, and may lose rows and columns at the end; ``square``
            takes that of the square. Sides below the largest scale, at which the published code stops, are pooled with
            a kernel of 1 at the scales that do not fit.
        prepare: applied first.

    Raises:
        ValueError: not [B, C, h, w], an empty map, no or non-positive scales, an unknown ``kernel_from``.
    """
    if features.ndim != 4 or 0 in features.shape:
        raise ValueError(f"features has shape {list(features.shape)}; expected [B, C, h, w] with nothing empty")
    if not scales or min(scales) < 1:
        raise ValueError(f"scales is {tuple(scales)}; expected numbers of at least 1")
    if kernel_from not in ("width", "square"):
        raise ValueError(f"kernel_from is {kernel_from!r}; expected 'width' or 'square'")
    with full_precision(features):
        x = prepare(widened(features))
        height, width = x.shape[-2:]
        side = max(height, width)
        if height != width:
            x = F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
        strips = []
        for scale in scales:
            pooled = F.avg_pool2d(x, max((width if kernel_from == "width" else side) // scale, 1))
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
) -> Tensor:  # []
    """MAFT+'s representation compensation: a difference of the pooled strips of two maps (MAFT+, L_rc).

    Published: ReLU, scales 1, 2 and 4, smooth-L1 averaged over entries. Lists of maps give the mean over their losses.

    Raises:
        ValueError: as :func:`strip_pool`, for maps of different shape, and for empty lists.
    """
    students = [student] if isinstance(student, Tensor) else list(student)
    teachers = [teacher] if isinstance(teacher, Tensor) else list(teacher)
    shapes = [[list(x.shape) for x in maps] for maps in (students, teachers)]
    if not students or shapes[0] != shapes[1]:
        raise ValueError(f"student has shapes {shapes[0]} and teacher {shapes[1]}; expected the same, at least one")
    losses = []
    for pair in zip(students, teachers, strict=True):
        a, b = (strip_pool(x, scales, kernel_from=kernel_from, prepare=prepare) for x in pair)
        losses.append(difference(a, b))
    return torch.stack(losses).mean()
