"""Masked-attention transformer decoder with a text classifier (Cheng et al., Mask2Former, section 3.2; FC-CLIP, 3.3).

Sizes: ``Q`` queries, ``C`` channels, ``d`` CLIP's joint width, ``T`` classes with ``N`` synonyms and void together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infoclip.config import MaskConfig
from infoclip.model.maftplus.classifier import class_logits, mask_pooling
from infoclip.model.maftplus.pixel_decoder import LEVELS
from infoclip.model.maftplus.transfer import sine_position
from infoclip.model.memory import region

__all__ = ["MaskDecoder", "Proposals"]


class Proposals(NamedTuple):
    """Masks and their classes, as the decoder sees them after a layer."""

    logits: Tensor  # [B, Q, T + 1], void last
    masks: Tensor  # [B, Q, h, w] mask logits


class _SelfAttentionLayer(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:  # [B, Q, C], [Q, C]
        q = x + position
        return self.norm(x + _attend(self.self_attn, q, q, x))


class _CrossAttentionLayer(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.multihead_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self,
        x: Tensor,  # [B, Q, C]
        position: Tensor,  # [Q, C]
        keys: Tensor,  # [B, n, C]
        values: Tensor,  # [B, n, C]
        seen: Tensor,  # [B, Q, n] bool
    ) -> Tensor:  # [B, Q, C]
        return self.norm(x + _attend(self.multihead_attn, x + position, keys, values, seen[:, None]))


class _FFNLayer(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:  # [B, Q, C]
        return self.norm(x + self.linear2(F.relu(self.linear1(x))))


class _MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:  # [..., widths[0]] -> [..., widths[-1]]
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def _attend(
    attention: nn.MultiheadAttention,
    query: Tensor,  # [B, Q, C]
    key: Tensor,  # [B, n, C]
    value: Tensor,  # [B, n, C]
    seen: Tensor | None = None,  # [B, 1, Q, n] bool
) -> Tensor:  # [B, Q, C]
    """Multi-head attention with the module's parameters, without keeping its probabilities."""
    heads = attention.num_heads
    parts = zip((query, key, value), attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
    q, k, v = (F.linear(x, weight, bias).unflatten(-1, (heads, -1)).transpose(1, 2) for x, weight, bias in parts)
    return attention.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))


class MaskDecoder(nn.Module):
    """Queries read the pixel decoder's maps where their own masks are, and give masks and classes after every layer.

    A query's class is scored by its similarity with the text classifier, read from its own state plus the mean of the
    mask features under its mask. A query whose mask is empty at a level reads all of it. Parameter names are those
    below ``sem_seg_head.predictor.`` in the published checkpoints.

    Args:
        config: widths and depths.
        embed_dim: d.
    """

    def __init__(self, config: MaskConfig, embed_dim: int) -> None:
        super().__init__()
        dim, heads, layers = config.channels, config.attention_heads, config.decoder_layers
        self.memory = "fast"
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.transformer_self_attention_layers = nn.ModuleList(_SelfAttentionLayer(dim, heads) for _ in range(layers))
        self.transformer_cross_attention_layers = nn.ModuleList(_CrossAttentionLayer(dim, heads) for _ in range(layers))
        self.transformer_ffn_layers = nn.ModuleList(_FFNLayer(dim, config.decoder_ffn_dim) for _ in range(layers))
        self.decoder_norm = nn.LayerNorm(dim)
        self.query_feat = nn.Embedding(config.queries, dim)
        self.query_embed = nn.Embedding(config.queries, dim)
        self.level_embed = nn.Embedding(LEVELS, dim)
        self.mask_embed = _MLP(dim, dim, dim, dim)
        self._mask_pooling_proj = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim))
        self.class_embed = _MLP(dim, dim, dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier weights in the layers, as published."""
        for layers in (
            self.transformer_self_attention_layers,
            self.transformer_cross_attention_layers,
            self.transformer_ffn_layers,
        ):
            for parameter in layers.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)

    def forward(
        self,
        levels: Sequence[Tensor],  # [B, C, h_l, w_l], coarsest first
        mask_features: Tensor,  # [B, C, h, w]
        text: Tensor,  # [N, d], rows of length 1: the synonyms of each class one after the other, void last
        synonyms: Sequence[int],
    ) -> list[Proposals]:
        """What the decoder sees before its first layer and after each one; the last is the result."""
        sizes = [(int(x.shape[2]), int(x.shape[3])) for x in levels]
        values, keys = [], []
        for x, size, embedding in zip(levels, sizes, self.level_embed.weight, strict=True):
            value = x.flatten(2).mT + embedding  # [B, n, C]
            position = sine_position(x.shape[1], *size, device=x.device).to(x.dtype)
            values.append(value)
            keys.append(value + position.flatten(1).mT)
        position = self.query_embed.weight
        x = self.query_feat.weight.expand(len(mask_features), -1, -1)

        proposals = []
        for i in range(len(self.transformer_ffn_layers) + 1):
            logits, masks = region(self.memory, self._predict, x, mask_features, text, synonyms)
            proposals.append(Proposals(logits, masks))
            if i == len(self.transformer_ffn_layers):
                return proposals
            level = i % LEVELS
            seen = _attention_mask(masks, sizes[level])
            x = region(self.memory, self._layer, i, x, position, keys[level], values[level], seen)
        raise AssertionError("unreachable")

    def _layer(self, i: int, x: Tensor, position: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        x = self.transformer_cross_attention_layers[i](x, position, keys, values, seen)
        x = self.transformer_self_attention_layers[i](x, position)
        return self.transformer_ffn_layers[i](x)

    def _predict(
        self,
        x: Tensor,  # [B, Q, C]
        mask_features: Tensor,  # [B, C, h, w]
        text: Tensor,  # [N, d]
        synonyms: Sequence[int],
    ) -> tuple[Tensor, Tensor]:  # [B, Q, T + 1], [B, Q, h, w]
        x = self.decoder_norm(x)
        masks = torch.einsum("bqc,bchw->bqhw", self.mask_embed(x), mask_features)
        pooled = self._mask_pooling_proj(mask_pooling(mask_features, masks))
        return class_logits(self.class_embed(x + pooled), text, synonyms, self.logit_scale), masks


@torch.no_grad()
def _attention_mask(
    masks: Tensor,  # [B, Q, h, w]
    size: tuple[int, int],
) -> Tensor:  # [B, Q, n] bool
    """Where a query may look: under its mask at this size, or everywhere if that is empty."""
    inside = F.interpolate(masks.float(), size=size, mode="bilinear", align_corners=False).flatten(2) >= 0
    return inside | ~inside.any(dim=-1, keepdim=True)
