"""LPAM, the learnable pixel-text alignment module (InfoCLIP, section 3)."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, nn

from infoclip.objective.numerics import full_precision, unit, widened

__all__ = ["LPAM", "cosine_map"]


class _LengthNorm(nn.LayerNorm):
    """LayerNorm without the mean: rows of length sqrt(d), then weight and bias. Dot products of its rows are d cos."""

    def forward(self, input: Tensor) -> Tensor:
        return unit(input) * math.sqrt(input.shape[-1]) * self.weight + self.bias


class LPAM(nn.Module):
    """Pixels and texts into an alignment map: how much each pixel has to do with each text.

        q = W_q norm(t) + b_q,  k = W_k norm'(p) + b_k
        scores = q k^T / sqrt(d) + norm(t) norm'(p)^T,  R = scores / ||scores||_F per image

    The second term, the residual similarity of the normalised inputs, is not scaled (as in the relation module of
    InfoSAM, from which LPAM comes: text takes the place of the mask token, pixels that of the image feature). Two
    linear layers and two LayerNorms: 0.53 M parameters at d = 512.

    Args:
        dim: d, the size of CLIP's joint embedding.
        init: ``default`` is torch's of ``nn.Linear`` and ``nn.LayerNorm``, as in InfoSAM. The first map is then nearly
            the residual alone: its entries, d times the correlation of the two embeddings, dwarf those of the first
            term, of order 1. ``cosine`` starts W_k and b_k at zero and has normalisations that do not subtract the
            mean (rows scaled to length sqrt(d), no epsilon; same parameters), so that the first map is exactly the
            cosine similarities over their norm. With LayerNorms it would be the centred cosine, that is correlation.
            W_q gets its first gradient one step after W_k.
        learnt: ``False`` fixes the module to the cosine map; it then has no parameters and ``init`` is not used.

    Raises:
        ValueError: a ``dim`` below 1 or an unknown ``init``.
    """

    def __init__(self, dim: int, init: Literal["default", "cosine"] = "default", learnt: bool = True) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim is {dim}; expected at least 1")
        if init not in ("default", "cosine"):
            raise ValueError(f"init is {init!r}; expected 'default' or 'cosine'")
        self.dim = dim
        self.init = init
        self.learnt = learnt
        if not learnt:
            return
        norm = nn.LayerNorm if init == "default" else _LengthNorm
        self.norm_text = norm(dim)
        self.norm_pixel = norm(dim)
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        if init == "cosine":
            nn.init.zeros_(self.key.weight)
            nn.init.zeros_(self.key.bias)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, init={self.init!r}, learnt={self.learnt}"

    def forward(
        self,
        pixels: Tensor,  # [B, n, d]
        texts: Tensor,  # [T, d] or [B, T, d]
    ) -> Tensor:  # [B, n, T]
        """The alignment map R, of Frobenius norm 1 for each image (0 where all scores are), in float32 or wider.

        Neither input has to be normalised.

        Raises:
            ValueError: shapes that do not go together.
        """
        _check(pixels, texts, self.dim)
        with full_precision(pixels):
            pixels, texts = widened(pixels), widened(texts)
            if self.learnt:
                p, t = self.norm_pixel(pixels), self.norm_text(texts)
                scores = self.key(p) @ self.query(t).mT * self.dim**-0.5 + p @ t.mT
            else:
                scores = cosine_map(pixels, texts)
            return unit(scores.flatten(1)).view_as(scores)


def cosine_map(
    pixels: Tensor,  # [B, n, d]
    texts: Tensor,  # [T, d] or [B, T, d]
) -> Tensor:  # [B, n, T]
    """Cosine of every pixel with every text, in float32 or wider; not normalised over the image.

    Raises:
        ValueError: shapes that do not go together.
    """
    _check(pixels, texts, pixels.shape[-1])
    with full_precision(pixels):
        return unit(widened(pixels)) @ unit(widened(texts)).mT


def _check(pixels: Tensor, texts: Tensor, dim: int) -> None:
    if pixels.ndim != 3 or pixels.shape[-1] != dim:
        raise ValueError(f"pixels has shape {list(pixels.shape)}; expected [B, n, {dim}]")
    if texts.ndim not in (2, 3) or texts.shape[-1] != dim or (texts.ndim == 3 and len(texts) != len(pixels)):
        raise ValueError(
            f"texts has shape {list(texts.shape)}; expected [T, {dim}] or [B, T, {dim}] with B = {len(pixels)}"
        )
