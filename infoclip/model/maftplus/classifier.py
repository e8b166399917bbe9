"""What scores a mask: the mean of dense features under it, and its similarity to each class's best synonym."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from infoclip.objective.numerics import full_precision, unit, widened

__all__ = ["class_logits", "mask_pooling"]


def mask_pooling(
    features: Tensor,  # [B, C, h, w]
    mask_logits: Tensor,  # [B, Q, H, W]
) -> Tensor:  # [B, Q, C]
    """Mean of the features where a mask's logit is above 0; zeros for a mask that is empty (FC-CLIP, mask pooling).

    Masks of another size are resized first (bilinear). They get no gradient. Sums are in float32 for half precision
    too: in float16, an empty mask's count would be a division by zero.

    Raises:
        ValueError: tensors of another shape, or of different numbers of images.
    """
    if features.ndim != 4 or mask_logits.ndim != 4 or len(features) != len(mask_logits):
        raise ValueError(
            f"features has shape {list(features.shape)} and mask_logits {list(mask_logits.shape)}; "
            "expected [B, C, h, w] and [B, Q, H, W]"
        )
    with full_precision(features):
        x = widened(features)
        with torch.no_grad():
            logits = widened(mask_logits)
            if logits.shape[2:] != x.shape[2:]:
                logits = F.interpolate(logits, size=x.shape[2:], mode="bilinear", align_corners=False)
            # Written as numbers at once, and divided by after the product: a pass over all pixels less, twice.
            inside = torch.gt(logits, 0, out=torch.empty_like(logits)).flatten(2)  # [B, Q, n]
            pixels = inside.sum(dim=-1, keepdim=True) + 1e-8
        # In this order the gradient comes out as the features lie.
        return (torch.bmm(x.flatten(2), inside.mT).mT / pixels).to(features.dtype)


def class_logits(
    embeddings: Tensor,  # [B, Q, d]
    text: Tensor,  # [N, d] or [B, N, d]
    synonyms: Sequence[int],
    logit_scale: Tensor | float,  # []
) -> Tensor:  # [B, Q, T + 1]
    """Scaled similarity of each embedding with the best synonym of each class, and with void (FC-CLIP; MAFT+ with a
    text classifier for each image).

    Args:
        embeddings: normalised to length 1 here.
        text: rows of the classifier, used as they are: the synonyms of each class one after the other, void last.
        synonyms: number of rows of each of the T classes; their sum is N - 1.
        logit_scale: logarithm of the scale, which is at most 100.

    Raises:
        ValueError: shapes or numbers that do not go together.
    """
    if embeddings.ndim != 3 or text.ndim not in (2, 3) or text.shape[-1] != embeddings.shape[-1]:
        raise ValueError(
            f"embeddings has shape {list(embeddings.shape)} and text {list(text.shape)}; "
            "expected [B, Q, d] and [N, d] or [B, N, d]"
        )
    if text.ndim == 3 and len(text) != len(embeddings):
        raise ValueError(f"text is of {len(text)} images and embeddings of {len(embeddings)}; expected the same")
    if not synonyms or min(synonyms) < 1 or sum(synonyms) + 1 != text.shape[-2]:
        raise ValueError(
            f"synonyms are {sum(synonyms)} rows of {len(synonyms)} classes and text has {text.shape[-2]}; "
            "expected at least one row a class, and one more for void"
        )
    with full_precision(embeddings):
        scale = torch.as_tensor(logit_scale, device=embeddings.device).exp().clamp(max=100)
        scores = scale * torch.matmul(unit(widened(embeddings)), widened(text).mT)  # [B, Q, N]
        if max(synonyms) == 1:
            return scores
        # Each class's rows, filled up with its first one: a maximum that is reached twice passes its gradient once.
        counts = torch.tensor(synonyms, device=scores.device)[:, None]
        first = counts.cumsum(0) - counts
        offset = torch.arange(max(synonyms), device=scores.device)
        rows = torch.where(offset < counts, first + offset, first)  # [T, most synonyms]
        return torch.cat((scores[..., rows].max(dim=-1).values, scores[..., -1:]), dim=-1)
