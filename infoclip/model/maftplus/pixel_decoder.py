"""Multi-scale deformable-attention pixel decoder (Mask2Former, section 3.2.1; Zhu et al., Deformable DETR).

Sizes: ``L`` levels, coarsest first, of ``h_l x w_l`` pixels; ``S = sum of h_l * w_l``; ``C`` channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infoclip.config import MaskConfig
from infoclip.kernels.ms_deform_attn import ms_deform_attn
from infoclip.model.maftplus.transfer import sine_position
from infoclip.model.memory import region
from infoclip.objective.numerics import full_precision, widened

__all__ = ["LEVELS", "DeformableAttention", "PixelDecoder", "reference_points"]

LEVELS = 3
"""Maps that take part in the attention: those at strides 32, 16 and 8."""
_GROUPS = 32


def reference_points(
    shapes: Sequence[tuple[int, int]], device: torch.device | str | None = None
) -> Tensor:  # [S, 2] float32
    """Centre of every pixel of every level, x and y in 0..1."""
    rows = []
    for height, width in shapes:
        y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
        x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
        rows.append(torch.stack((x.expand(height, width), y[:, None].expand(height, width)), dim=-1).flatten(0, 1))
    return torch.cat(rows)


class DeformableAttention(nn.Module):
    """Each query reads a few points of each level, at learnt offsets from its own place (Deformable DETR, section 4.1).

    Args:
        dim: channels of queries and values.
        heads, levels, points: as ``ms_deform_attn``'s.
    """

    def __init__(self, dim: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each head looks in a direction of its own, point k at distance k + 1; all points weigh the same."""
        angle = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        ring = torch.stack((angle.cos(), angle.sin()), dim=-1)
        ring = ring / ring.abs().max(dim=-1, keepdim=True).values
        steps = torch.arange(1, self.points + 1)[:, None]
        bias = (ring[:, None, None] * steps).expand(self.heads, self.levels, self.points, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        query: Tensor,  # [B, Q, C]
        points: Tensor,  # [Q, 2] in 0..1
        value: Tensor,  # [B, S, C]
        shapes: Sequence[tuple[int, int]],
    ) -> Tensor:  # [B, Q, C]
        split = (self.heads, self.levels, self.points)
        offsets = self.sampling_offsets(query).unflatten(-1, (*split, 2)).float()  # in pixels of each level
        sizes = offsets.new_tensor([(width, height) for height, width in shapes])  # [L, 2]
        locations = points[:, None, None, None] + offsets / sizes[:, None]  # [B, Q, heads, L, points, 2]
        weights = self.attention_weights(query).float().unflatten(-1, (self.heads, -1)).softmax(dim=-1)
        values = self.value_proj(value).unflatten(-1, (self.heads, -1))  # [B, S, heads, C / heads]
        read = ms_deform_attn(values, shapes, locations, weights.unflatten(-1, split[1:]))
        return self.output_proj(read)


class _EncoderLayer(nn.Module):
    """Deformable self-attention, then a two-layer MLP, each followed by its normalisation."""

    def __init__(self, dim: int, heads: int, points: int, ffn_dim: int) -> None:
        super().__init__()
        self.self_attn = DeformableAttention(dim, heads, LEVELS, points)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(
        self,
        x: Tensor,  # [B, S, C]
        position: Tensor,  # [S, C]
        points: Tensor,  # [S, 2]
        shapes: Sequence[tuple[int, int]],
    ) -> Tensor:  # [B, S, C]
        x = self.norm1(x + self.self_attn(x + position, points, x, shapes))
        return self.norm2(x + self.linear2(F.relu(self.linear1(x))))


class _Encoder(nn.Module):
    """Holds the layers under the published names."""

    def __init__(self, config: MaskConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            _EncoderLayer(config.channels, config.attention_heads, config.num_points, config.encoder_ffn_dim)
            for _ in range(config.encoder_layers)
        )


class _Transformer(nn.Module):
    """Encoder layers, and an embedding for each level."""

    def __init__(self, config: MaskConfig) -> None:
        super().__init__()
        self.encoder = _Encoder(config)
        self.level_embed = nn.Parameter(torch.empty(LEVELS, config.channels))


class _GroupNorm(nn.GroupNorm):
    """Also of a map of one pixel, which torch's own refuses where a group is one channel."""

    def __init__(self, channels: int) -> None:
        super().__init__(_GROUPS, channels)

    def forward(self, input: Tensor) -> Tensor:  # [B, C, h, w]
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class _NormedConv(nn.Conv2d):
    """A convolution without bias and its group normalisation, under the published names."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int) -> None:
        super().__init__(inputs, outputs, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = _GroupNorm(outputs)

    def forward(self, input: Tensor) -> Tensor:  # [B, inputs, h, w] -> [B, outputs, h, w]
        return self.norm(super().forward(input))


class PixelDecoder(nn.Module):
    """From CLIP's maps to three maps for the mask decoder, and the map that masks are cut from.

    The maps at strides 32, 16 and 8 exchange what they know by deformable attention; the result at stride 8 is resized
    (bilinear) and added to the projected map at stride 4. Parameter names are those below
    ``sem_seg_head.pixel_decoder.`` in the published checkpoints. Computed in float32 also under autocast, as published.

    Args:
        config: widths and depths.
        widths: channels of the maps at strides 4, 8, 16 and 32.
    """

    def __init__(self, config: MaskConfig, widths: Sequence[int]) -> None:
        super().__init__()
        dim = config.channels
        self.memory = "fast"
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, dim, 1), _GroupNorm(dim)) for width in reversed(widths[1:])
        )
        self.transformer = _Transformer(config)
        self.mask_features = nn.Conv2d(dim, dim, 1)
        self.adapter_1 = _NormedConv(widths[0], dim, 1)
        self.layer_1 = _NormedConv(dim, dim, 3)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier and Kaiming weights as published; see also :meth:`DeformableAttention.reset_parameters`."""
        for layer in self.transformer.encoder.layers:
            for linear in (layer.linear1, layer.linear2):
                nn.init.xavier_uniform_(linear.weight)  # type: ignore[union-attr,arg-type]
        for sequence in self.input_proj:
            nn.init.xavier_uniform_(sequence[0].weight)  # type: ignore[index]
            nn.init.zeros_(sequence[0].bias)  # type: ignore[index]
        nn.init.normal_(self.transformer.level_embed)
        for conv in (self.mask_features, self.adapter_1, self.layer_1):
            nn.init.kaiming_uniform_(conv.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)  # type: ignore[arg-type]

    def forward(
        self,
        maps: Sequence[Tensor],  # [B, C_s, H / s, W / s] at strides s = 4, 8, 16, 32
    ) -> tuple[Tensor, list[Tensor]]:  # [B, C, H / 4, W / 4], [B, C, H / s, W / s] at strides 32, 16, 8
        """The map of mask features, and the maps of the three levels, coarsest first."""
        with full_precision(maps[0]):
            return self._forward([widened(x) for x in maps])

    def _forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        levels = [project(x) for project, x in zip(self.input_proj, reversed(maps[1:]), strict=True)]
        shapes = [(int(x.shape[2]), int(x.shape[3])) for x in levels]
        x = torch.cat([level.flatten(2).mT for level in levels], dim=1)  # [B, S, C]
        position = torch.cat(
            [
                sine_position(x.shape[-1], *shape, device=x.device).to(x.dtype).flatten(1).mT + embedding
                for shape, embedding in zip(shapes, self.transformer.level_embed, strict=True)
            ]
        )  # [S, C]
        points = reference_points(shapes, x.device).to(x.dtype)
        for layer in self.transformer.encoder.layers:
            x = region(self.memory, layer, x, position, points, shapes)
        out = [
            part.mT.unflatten(2, shape)
            for part, shape in zip(x.split([h * w for h, w in shapes], dim=1), shapes, strict=True)
        ]
        fine = self.adapter_1(maps[0])
        fine = fine + F.interpolate(out[-1], size=fine.shape[2:], mode="bilinear", align_corners=False)
        return region(self.memory, self._finish, fine), out

    def _finish(self, fine: Tensor) -> Tensor:  # [B, C, h, w] -> [B, C, h, w]
        return self.mask_features(F.relu(self.layer_1(fine)))
