"""LPAM, the learnable pixel-text alignment module (InfoCLIP, section 3.2; InfoSAM's relation module with other roles)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LPAM", "cosine_map"]


class LPAM(nn.Module):
    """Alignment map of pixels and texts: ``q(LN(text)) . k(LN(pixel)) / sqrt(d) + LN(text) . LN(pixel)``.

    The map of an image is L2-normalised as a whole. One module serves teacher and student. At d = 512 it has 0.53 M
    parameters.

    Args:
        dim: d, the joint embedding's size.
        init: ``default`` as published (torch's initial values of a linear layer), or ``cosine``: the key projection
            starts at zero, so that the first map is the residual similarity alone, which is the cosine of the centred
            pixels and texts up to one factor per image (LayerNorm removes a vector's mean and scales it to length
            ``sqrt(d)``).

    Raises:
        ValueError: ``dim`` below 1 or another ``init``.
    """

    def __init__(self, dim: int, init: Literal["default", "cosine"] = "default") -> None:
        super().__init__()
        if dim < 1 or init not in ("default", "cosine"):
            raise ValueError(f"expected dim >= 1 and init default or cosine, got {dim} and {init!r}")
        self.dim = dim
        self.norm_text = nn.LayerNorm(dim)
        self.norm_pixel = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        if init == "cosine":
            nn.init.zeros_(self.key.weight)
            nn.init.zeros_(self.key.bias)

    def forward(self, pixels: Tensor, texts: Tensor) -> Tensor:  # [B, n, d], [T, d] | [B, T, d] -> [B, n, T]
        """The map of each image.

        Raises:
            ValueError: sizes that do not fit.
        """
        texts = _batched(pixels, texts, self.dim)
        text, pixel = self.norm_text(texts), self.norm_pixel(pixels)
        # the residual is not scaled, as in InfoSAM's code
        scores = self.key(pixel) @ self.query(text).mT * self.dim**-0.5 + pixel @ text.mT
        return unit_map(scores)


def cosine_map(pixels: Tensor, texts: Tensor) -> Tensor:  # [B, n, d], [T, d] | [B, T, d] -> [B, n, T]
    """The map without parameters: cosine similarities, L2-normalised per image."""
    texts = _batched(pixels, texts, pixels.shape[-1])
    return unit_map(F.normalize(pixels, dim=-1) @ F.normalize(texts, dim=-1).mT)


def unit_map(scores: Tensor) -> Tensor:  # [B, n, T] -> [B, n, T]
    """Each image's map divided by its length; a zero map stays zero."""
    return scores / torch.linalg.vector_norm(scores, dim=(-2, -1), keepdim=True).clamp_min(1e-12)


def _batched(pixels: Tensor, texts: Tensor, dim: int) -> Tensor:
    if pixels.dim() != 3 or pixels.shape[-1] != dim:
        raise ValueError(f"pixels: expected [B, n, {dim}], got {list(pixels.shape)}")
    if texts.dim() == 2:
        texts = texts.expand(pixels.shape[0], *texts.shape)
    if texts.dim() != 3 or texts.shape[-1] != dim or texts.shape[0] != pixels.shape[0]:
        raise ValueError(f"texts: expected [T, {dim}] or [{pixels.shape[0]}, T, {dim}], got {list(texts.shape)}")
    return texts
