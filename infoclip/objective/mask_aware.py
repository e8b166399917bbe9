"""MAFT+'s mask-aware loss: a proposal's class score follows how well the proposal covers an object of that class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from infoclip.objective.numerics import full_precision, widened

__all__ = ["mask_aware_loss", "soft_iou"]


def _resizing(source: int, target: int, like: Tensor) -> Tensor:  # [target, source]
    """The matrix of a linear resize along one axis (``align_corners=False``)."""
    eye = torch.eye(source, dtype=like.dtype, device=like.device)
    return F.interpolate(eye[None], size=target, mode="linear", align_corners=False)[0].mT


def soft_iou(
    mask_logits: Tensor,  # [Q, h, w]
    masks: Tensor,  # [n, H, W] of 0 and 1
) -> Tensor:  # [n, Q]
    """Intersection over union of each object's mask with each proposal's probabilities, resized to the mask's size.

    The proposals are never resized: the resize R is linear, so <R m, g> = <m, R^T g>, and the n objects are brought to
    the proposals' size instead. Nothing of Q x H x W is made. No gradient.

    Raises:
        ValueError: tensors that are not three-dimensional, or empty maps.
    """
    if mask_logits.ndim != 3 or masks.ndim != 3 or 0 in (*mask_logits.shape[1:], *masks.shape[1:]):
        raise ValueError(
            f"mask_logits has shape {list(mask_logits.shape)} and masks {list(masks.shape)}; "
            "expected [Q, h, w] and [n, H, W]"
        )
    with torch.no_grad(), full_precision(mask_logits):
        proposals = widened(mask_logits).sigmoid()
        objects = masks.to(proposals.dtype)
        down, across = (_resizing(proposals.shape[i], objects.shape[i], proposals) for i in (1, 2))
        shrunk = down.mT @ objects @ across  # [n, h, w]
        ones = down.sum(dim=0)[:, None] * across.sum(dim=0)  # [h, w], the same of a mask of ones
        common = torch.einsum("nhw,qhw->nq", shrunk, proposals)
        union = objects.sum(dim=(1, 2))[:, None] + (proposals * ones).sum(dim=(1, 2)) - common
        return common / (union + 1e-7)


def mask_aware_loss(
    logits: Tensor,  # [B, Q, K + 1]
    mask_logits: Tensor,  # [B, Q, h, w]
    labels: Sequence[Tensor],  # B of [n] int64
    masks: Sequence[Tensor],  # B of [n, H, W] of 0 and 1
) -> Tensor:  # []
    """Smooth-L1 distance between the score of each object's class at each proposal and the proposal's soft
    intersection over union with the object, scaled to 0..1 over the proposals (MAFT+, L_ma): mean over all pairs.

    Scores are the softmax over the K classes, without void, the last. Masks get no gradient. A batch without any object
    gives 0; the published code stops there.

    Raises:
        ValueError: numbers of images, proposals or objects that differ, or (on the CPU) a label outside 0..K-1.
    """
    if logits.ndim != 3 or mask_logits.ndim != 4 or logits.shape[:2] != mask_logits.shape[:2] or logits.shape[2] < 2:
        raise ValueError(
            f"logits has shape {list(logits.shape)} and mask_logits {list(mask_logits.shape)}; "
            "expected [B, Q, K + 1] and [B, Q, h, w]"
        )
    if not len(labels) == len(masks) == len(logits):
        raise ValueError(
            f"there are labels of {len(labels)} and masks of {len(masks)} images; expected {len(logits)} of both"
        )
    with full_precision(logits):
        scores = widened(logits)[..., :-1].softmax(dim=-1)  # [B, Q, K]
        got, want = [], []
        for i, (label, mask) in enumerate(zip(labels, masks, strict=True)):
            if label.ndim != 1 or len(label) != len(mask):
                raise ValueError(
                    f"image {i} has labels of shape {list(label.shape)} and {len(mask)} masks; expected a label a mask"
                )
            if not len(label):
                continue
            if label.device.type == "cpu" and not 0 <= int(label.min()) <= int(label.max()) < scores.shape[-1]:
                raise ValueError(f"image {i} has a label outside 0..{scores.shape[-1] - 1}")
            iou = soft_iou(mask_logits[i], mask)  # [n, Q]
            low, high = iou.aminmax(dim=1, keepdim=True)
            want.append((iou - low) / (high - low + 1e-8))
            got.append(scores[i].mT[label.to(scores.device)])
        if not got:
            return scores.sum() * 0.0
        return F.smooth_l1_loss(torch.cat(got), torch.cat(want))
