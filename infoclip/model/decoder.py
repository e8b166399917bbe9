"""The decoder: per class, twice the resolution twice, with image guidance (CAT-Seg, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from infoclip.model.fast import fold_up

__all__ = ["DoubleConv", "UpBlock"]


class DoubleConv(nn.Module):
    """Twice: 3x3 convolution without bias, group normalisation (16 channels a group), ReLU."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        if out_dim % 16:
            raise ValueError(f"a decoder width is {out_dim}; expected a multiple of 16, the width of a group")
        self.double_conv = nn.Sequential(
            nn.Conv2d(in_dim, out_dim, 3, padding=1, bias=False),
            nn.GroupNorm(out_dim // 16, out_dim),
            nn.ReLU(),
            nn.Conv2d(out_dim, out_dim, 3, padding=1, bias=False),
            nn.GroupNorm(out_dim // 16, out_dim),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:  # [M, in, H, W] -> [M, out, H, W]
        return self.double_conv(x)


class UpBlock(nn.Module):
    """Transposed 2x2 convolution (stride 2), concatenation with the guidance, :class:`DoubleConv`.

    Args:
        in_dim: channels that enter.
        out_dim: channels that leave.
        guidance_dim: channels of the projected guidance; 0 for none. The up-sampled map has ``in_dim - guidance_dim``.
    """

    def __init__(self, in_dim: int, out_dim: int, guidance_dim: int) -> None:
        super().__init__()
        if guidance_dim >= in_dim:
            raise ValueError(f"the decoder's guidance has {guidance_dim} channels; expected fewer than {in_dim}")
        self.up = nn.ConvTranspose2d(in_dim, in_dim - guidance_dim, kernel_size=2, stride=2)
        self.conv = DoubleConv(in_dim, out_dim)

    def forward(
        self,
        x: Tensor,  # [B * T, in, H, W]
        guidance: Tensor | None,  # [B, guidance, 2H, 2W]
    ) -> Tensor:  # [B * T, out, 2H, 2W]
        x = self.up(x)
        if guidance is not None:
            classes = x.shape[0] // guidance.shape[0]
            x = torch.cat([x, guidance.repeat_interleave(classes, dim=0).to(x.dtype)], dim=1)
        return self.conv(x)

    def fold(
        self,
        guidance: Tensor | None,  # [B, guidance, 2H, 2W]
        height: int,
        width: int,
    ) -> tuple[Tensor, Tensor]:
        """What the fast form needs beside the map, the same for every class: :func:`infoclip.model.fast.fold_up`."""
        first = self.conv.double_conv[0]
        assert isinstance(first, nn.Conv2d)
        return fold_up(self.up, first, guidance, height, width)

    def norms_and_kernel(self) -> tuple[Tensor, ...]:
        """First norm's weight and bias, second convolution's kernel, second norm's weight and bias."""
        layers = self.conv.double_conv
        found = (layers[1].weight, layers[1].bias, layers[3].weight, layers[4].weight, layers[4].bias)
        return found  # type: ignore[return-value]

    @property
    def eps(self) -> tuple[float, float]:
        return self.conv.double_conv[1].eps, self.conv.double_conv[4].eps  # type: ignore[return-value]
