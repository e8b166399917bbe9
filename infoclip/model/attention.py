"""Attention of the cost aggregation: shifted windows over space, and classes at one pixel.

Both see image or text guidance in queries and keys only (CAT-Seg, section 3.2). ``forward`` is the plain form that
specifies the result: guidance is repeated and concatenated, attention probabilities are materialised; the fast form
(:mod:`infoclip.model.fast`) gives the same with less.

Sizes: ``B`` images, ``T`` classes, ``H x W`` grid, ``C`` hidden channels, ``G`` guidance channels, ``h`` heads.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infoclip.model.fast import guidance_product, guided_linear
from infoclip.model.stages import SpatialWeights, windows_of

__all__ = ["ClassAttention", "SwinBlock", "WindowAttention", "window_and_shift", "window_mask"]

MASKED = -100.0
"""Added to the score of a pair that must not attend: not minus infinity, as in the published models."""
LINEAR_EPS = 1e-6
"""Added to the denominator of linear attention."""


def window_and_shift(height: int, width: int, window: int, shift: int) -> tuple[int, int]:
    """Window side and shift on a grid: a window that reaches over the shorter side is cut to it and never shifted."""
    shorter = min(height, width)
    return (shorter, 0) if shorter <= window else (window, shift)


@functools.lru_cache(maxsize=64)
def window_mask(height: int, width: int, window: int, shift: int) -> Tensor | None:
    """Additive mask of shifted window attention, on the CPU: 0 within a region, -100 between regions.

    A side that the window does not divide is padded at its end (the published code fails there); padding is a region
    of its own, so that no true position attends to it.

    Returns:
        ``[windows, window**2, window**2]`` float32, or None where every pair of a window may attend.
    """
    padded_h, padded_w = height + -height % window, width + -width % window
    if shift == 0 and (padded_h, padded_w) == (height, width):
        return None
    region = torch.zeros(padded_h, padded_w, dtype=torch.int64, device="cpu")
    if shift > 0:
        # In the rolled frame the last window of an axis holds two stretches that are far apart on the grid.
        bounds = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
        for i, rows in enumerate(bounds):
            for j, columns in enumerate(bounds):
                region[rows, columns] = 3 * i + j
    padding = torch.ones(padded_h, padded_w, dtype=torch.bool, device="cpu")
    padding[:height, :width] = False
    region[torch.roll(padding, (-shift, -shift), (0, 1))] = -1
    windows = region.view(padded_h // window, window, padded_w // window, window).transpose(1, 2)
    windows = windows.reshape(-1, window * window)
    apart = windows[:, None, :] != windows[:, :, None]
    with torch.inference_mode(False):  # it is kept, and training may be next to need it
        return torch.zeros(apart.shape, device="cpu").masked_fill_(apart, MASKED)


class WindowAttention(nn.Module):
    """Softmax attention within a window; queries and keys also see the guidance. No relative position bias.

    Args:
        dim: hidden channels C.
        guidance_dim: guidance channels G; 0 for none.
        num_heads: heads; divides ``dim``.
    """

    def __init__(self, dim: int, guidance_dim: int, num_heads: int) -> None:
        super().__init__()
        self.dim, self.num_heads = dim, num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.q = nn.Linear(dim + guidance_dim, dim)
        self.k = nn.Linear(dim + guidance_dim, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,  # [M * windows, L, C + G]
        mask: Tensor | None,  # [windows, L, L]
    ) -> Tensor:  # [M * windows, L, C]
        n, length, _ = x.shape
        q = self.q(x).view(n, length, self.num_heads, -1).transpose(1, 2)  # [n, h, L, C/h]
        k = self.k(x).view(n, length, self.num_heads, -1).transpose(1, 2)
        v = self.v(x[..., : self.dim]).view(n, length, self.num_heads, -1).transpose(1, 2)
        scores = (q * self.scale) @ k.transpose(-2, -1)  # [n, h, L, L]
        if mask is not None:
            windows = mask.shape[0]
            scores = scores.view(-1, windows, self.num_heads, length, length) + mask[:, None]
            scores = scores.view(n, self.num_heads, length, length)
        out = scores.softmax(dim=-1).to(v.dtype) @ v
        return self.proj(out.transpose(1, 2).reshape(n, length, self.dim))


class Mlp(nn.Module):
    """Linear, GELU (exact), linear."""

    def __init__(self, dim: int, ratio: int = 4) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, ratio * dim)
        self.fc2 = nn.Linear(ratio * dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # [..., C]
        return self.fc2(F.gelu(self.fc1(x)))


class SwinBlock(nn.Module):
    """One block of windowed attention over space (Swin Transformer, section 3.2, with guidance).

    Args:
        dim: hidden channels C.
        guidance_dim: guidance channels G; 0 for none.
        num_heads: heads.
        window: side of a window; cut to the shorter side of the grid.
        shift: how far the windows are shifted; 0 for none.
        resolution: the usual grid ``(H, W)``. A block that shifts on it keeps that mask in its state dict, as
            published checkpoints do; other grids make their own.
    """

    def __init__(
        self, dim: int, guidance_dim: int, num_heads: int, window: int, shift: int, resolution: tuple[int, int]
    ) -> None:
        super().__init__()
        self.window, self.shift, self.resolution = window, shift, resolution
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, guidance_dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)
        self.attn_mask: Tensor | None
        self.register_buffer("attn_mask", None)
        self.reset_mask()

    def reset_mask(self) -> None:
        """Set the stored mask, on the parameters' device, to what the usual grid demands."""
        window, shift = window_and_shift(*self.resolution, self.window, self.shift)
        mask = window_mask(*self.resolution, window, shift) if shift > 0 else None
        # A copy: loading into the module must not change the cached mask.
        self.attn_mask = None if mask is None else mask.to(self.norm1.weight.device, copy=True)

    def mask_for(self, height: int, width: int, device: torch.device) -> Tensor | None:
        """The mask for a grid: the stored one on the usual grid, else the derived one."""
        if self.attn_mask is not None and (height, width) == self.resolution:
            return self.attn_mask
        mask = window_mask(height, width, *window_and_shift(height, width, self.window, self.shift))
        return None if mask is None else mask.to(device)

    def hoist(
        self,
        guidance: Tensor | None,  # [B, H, W, G]
        height: int,
        width: int,
        dtype: torch.dtype,
    ) -> SpatialWeights:
        """What the fast form reads beside the maps, once an image: :func:`infoclip.model.stages.spatial_block`.

        Args:
            dtype: of the computation.
        """
        attn, dim = self.attn, self.attn.dim
        device = attn.q.weight.device
        windows = windows_of(height, width, *window_and_shift(height, width, self.window, self.shift), device)
        layers = (attn.q, attn.k, attn.v)
        qkv = torch.cat([layer.weight[:, :dim] for layer in layers])
        if guidance is None:
            bias = torch.cat([layer.bias for layer in layers])
            shared = bias[None, None].expand(1, len(windows.index), -1)
        else:
            g = windows.split(guidance.flatten(1, 2))  # [B, windows * L, G]
            share = [guidance_product(layer, g) for layer in layers[:2]]
            shared = torch.cat([*share, attn.v.bias.to(share[0].dtype).expand_as(share[0])], dim=-1)
        norms = (self.norm1.weight, self.norm1.bias), (self.norm2.weight, self.norm2.bias)
        first, second = self.mlp.fc1, self.mlp.fc2
        parameters = (
            qkv, shared[:, None].to(qkv.dtype), *norms[0], attn.proj.weight, attn.proj.bias, *norms[1],
            first.weight, first.bias, second.weight, second.bias,
        )  # fmt: skip
        mask = self.mask_for(height, width, device)
        return SpatialWeights.of(
            parameters, dtype, windows=windows, mask=mask, heads=attn.num_heads, eps=(self.norm1.eps, self.norm2.eps)
        )

    def forward(
        self,
        x: Tensor,  # [M, H, W, C]
        guidance: Tensor | None,  # [M, H, W, G]
    ) -> Tensor:  # [M, H, W, C]
        m, height, width, dim = x.shape
        window, shift = window_and_shift(height, width, self.window, self.shift)
        y = self.norm1(x)
        if guidance is not None:
            y = torch.cat([y, guidance.to(y.dtype)], dim=-1)
        y = F.pad(y, (0, 0, 0, -width % window, 0, -height % window))
        if shift > 0:
            y = y.roll((-shift, -shift), (1, 2))
        rows, columns = y.shape[1] // window, y.shape[2] // window
        y = y.view(m, rows, window, columns, window, -1).transpose(2, 3).reshape(-1, window * window, y.shape[-1])
        y = self.attn(y, self.mask_for(height, width, x.device))
        y = y.view(m, rows, columns, window, window, dim).transpose(2, 3)
        y = y.reshape(m, rows * window, columns * window, dim)
        if shift > 0:
            y = y.roll((shift, shift), (1, 2))
        x = x + y[:, :height, :width]
        return x + self.mlp(self.norm2(x))


class ClassAttention(nn.Module):
    """Attention among the classes at one pixel; no output projection (CAT-Seg, section 3.2).

    Args:
        dim: hidden channels C.
        guidance_dim: guidance channels G; 0 for none.
        num_heads: heads; divides ``dim``.
        attention_type: ``linear`` (feature map elu + 1) or ``full`` (softmax with 1/sqrt(C/h)).
    """

    def __init__(self, dim: int, guidance_dim: int, num_heads: int, attention_type: str) -> None:
        super().__init__()
        if attention_type not in ("linear", "full"):
            raise ValueError(f"attention_type is {attention_type!r}; expected 'linear' or 'full'")
        self.num_heads, self.attention_type = num_heads, attention_type
        self.q = nn.Linear(dim + guidance_dim, dim)
        self.k = nn.Linear(dim + guidance_dim, dim)
        self.v = nn.Linear(dim, dim)

    def hoist(
        self,
        guidance: Tensor | None,  # [B, T, G]
    ) -> tuple[Tensor | None, Tensor | None]:  # each [B, 1, T, C]
        """The guidance's share of queries and keys, once an image."""
        if guidance is None:
            return None, None
        return guidance_product(self.q, guidance)[:, None], guidance_product(self.k, guidance)[:, None]

    def forward_fast(
        self,
        x: Tensor,  # [B, N, T, C], the pixels of an image together
        shared_q: Tensor | None,  # of hoist
        shared_k: Tensor | None,
    ) -> Tensor:  # [B, N, T, C]
        """The same, with the guidance's products once an image."""
        q, k = guided_linear(self.q, x, shared_q), guided_linear(self.k, x, shared_k)
        q, k, v = (z.flatten(0, 1).unflatten(-1, (self.num_heads, -1)) for z in (q, k, self.v(x)))
        attend = linear_attention if self.attention_type == "linear" else full_attention
        return attend(q, k, v).reshape(x.shape)

    def forward(
        self,
        x: Tensor,  # [M, T, C]
        guidance: Tensor | None,  # [M, T, G]
    ) -> Tensor:  # [M, T, C]
        m, classes, dim = x.shape
        y = x if guidance is None else torch.cat([x, guidance.to(x.dtype)], dim=-1)
        q = self.q(y).view(m, classes, self.num_heads, -1)
        k = self.k(y).view(m, classes, self.num_heads, -1)
        v = self.v(x).view(m, classes, self.num_heads, -1)
        attend = linear_attention if self.attention_type == "linear" else full_attention
        return attend(q, k, v).reshape(m, classes, dim)


def linear_attention(
    q: Tensor,  # [M, T, h, D]
    k: Tensor,  # [M, T, h, D]
    v: Tensor,  # [M, T, h, D]
) -> Tensor:  # [M, T, h, D]
    """Attention with the feature map elu + 1 (Katharopoulos et al. 2020), linear in the number of classes."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    length = v.shape[1]
    # Divided by the length and multiplied back: keeps the sums in the range of half precision.
    summary = torch.einsum("mshd,mshv->mhdv", k, v / length)
    denominator = torch.einsum("mlhd,mhd->mlh", q, k.sum(dim=1)) + LINEAR_EPS
    return torch.einsum("mlhd,mhdv->mlhv", q, summary) / denominator[..., None] * length


def full_attention(
    q: Tensor,  # [M, T, h, D]
    k: Tensor,  # [M, T, h, D]
    v: Tensor,  # [M, T, h, D]
) -> Tensor:  # [M, T, h, D]
    """Softmax attention with scale 1/sqrt(D)."""
    scores = torch.einsum("mlhd,mshd->mhls", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("mhls,mshd->mlhd", scores.softmax(dim=-1).to(v.dtype), v)
