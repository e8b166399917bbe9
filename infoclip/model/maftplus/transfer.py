"""Content-dependent transfer: each image gets a text classifier of its own."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ContentDependentTransfer", "sine_position"]


def sine_position(
    channels: int,
    height: int,
    width: int,
    *,
    temperature: float = 10000.0,
    device: torch.device | str | None = None,
) -> Tensor:  # [channels, height, width] float32
    """Sines and cosines of each pixel's row (first half of the channels) and column (second half), counted from 1 and
    scaled to (0, 2 pi] (Carion et al., "End-to-End Object Detection with Transformers", normalised form).

    Raises:
        ValueError: channels that are not a positive multiple of 4, or an empty map.
    """
    if channels < 4 or channels % 4:
        raise ValueError(f"channels is {channels}; expected a positive multiple of 4: a sine and a cosine an axis")
    if height < 1 or width < 1:
        raise ValueError(f"the map is {height} x {width}; expected at least 1 x 1")
    half = channels // 2
    power = torch.div(torch.arange(half, device=device), 2, rounding_mode="floor") * (2 / half)
    period = temperature**power  # [half]

    def waves(size: int) -> Tensor:  # [half, size]
        place = torch.arange(1, size + 1, dtype=torch.float32, device=device) / (size + 1e-6) * (2 * math.pi)
        angle = place / period[:, None]
        return torch.stack((angle[0::2].sin(), angle[1::2].cos()), dim=1).flatten(0, 1)

    rows = waves(height)[:, :, None].expand(half, height, width)
    columns = waves(width)[:, None, :].expand(half, height, width)
    return torch.cat((rows, columns))


class _CrossAttention(nn.Module):
    """Holds the parameters under the published names."""

    def __init__(self, dim: int, heads: int, panoptic: bool) -> None:
        super().__init__()
        self.multihead_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm = nn.LayerNorm(dim)
        self.MLP = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.multihead_attn.in_proj_weight)
        nn.init.xavier_uniform_(self.multihead_attn.out_proj.weight)
        if panoptic:
            nn.init.zeros_(self.MLP.weight)
            nn.init.zeros_(self.MLP.bias)


class ContentDependentTransfer(nn.Module):
    """Text embeddings attend to an image's dense CLIP features (MAFT+, content-dependent transfer).

    Semantic: ``norm(text + linear(attention))``. Panoptic: ``text + norm(linear(attention))``, whose linear layer
    starts at zero, so that training starts from CLIP's own text embeddings. Keys see the sine position, values and
    queries do not. The result is not normalised to length 1.

    Queries do not depend on the image: they are projected once, not once an image as published.

    Args:
        dim: size of CLIP's joint embedding; published 768 (large) and 640 (base).
        heads: attention heads; published 8.
        panoptic: the panoptic variant.

    Raises:
        ValueError: ``dim`` that is not a multiple of 4 and of ``heads``.
    """

    def __init__(self, dim: int, heads: int = 8, *, panoptic: bool = False) -> None:
        super().__init__()
        if heads < 1 or dim < 4 or dim % 4 or dim % heads:
            raise ValueError(f"dim is {dim} with {heads} heads; expected a positive multiple of 4 and of the heads")
        self.dim, self.heads, self.panoptic = dim, heads, panoptic
        self.cross_atten = _CrossAttention(dim, heads, panoptic)

    def forward(
        self,
        features: Tensor,  # [B, d, h, w]
        text: Tensor,  # [T, d]
    ) -> Tensor:  # [B, T, d]
        """The text embeddings of each image.

        Args:
            features: dense features after the visual head.
            text: rows of the text classifier, with that of void.

        Raises:
            ValueError: tensors of another shape.
        """
        if features.ndim != 4 or features.shape[1] != self.dim or 0 in features.shape[2:]:
            raise ValueError(f"features has shape {list(features.shape)}; expected [B, {self.dim}, h, w]")
        if text.ndim != 2 or text.shape[1] != self.dim:
            raise ValueError(f"text has shape {list(text.shape)}; expected [T, {self.dim}]")
        part = self.cross_atten
        attention = part.multihead_attn
        w_q, w_k, w_v = attention.in_proj_weight.chunk(3)
        b_q, b_k, b_v = attention.in_proj_bias.chunk(3)
        position = sine_position(self.dim, *features.shape[2:], device=features.device).to(features.dtype)
        values = features.flatten(2).mT  # [B, n, d]
        keys = (features + position).flatten(2).mT
        split = (-1, self.heads, self.dim // self.heads)

        q = F.linear(text, w_q, b_q).view(1, *split).transpose(1, 2)  # [1, heads, T, d / heads]
        k = F.linear(keys, w_k, b_k).unflatten(-1, split[1:]).transpose(1, 2)
        v = F.linear(values, w_v, b_v).unflatten(-1, split[1:]).transpose(1, 2)
        read = F.scaled_dot_product_attention(q.expand(len(features), -1, -1, -1), k, v)  # [B, heads, T, d / heads]
        change = part.MLP(attention.out_proj(read.transpose(1, 2).flatten(2)))  # [B, T, d]
        return text + part.norm(change) if self.panoptic else part.norm(text + change)
