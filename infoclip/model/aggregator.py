"""Cost aggregation over space and classes (CAT-Seg, section 3.2): the plain form, the specification, and a fast one.

Parameter names are those of the published checkpoints below ``sem_seg_head.predictor.transformer.``.

Sizes: ``B`` images, ``T`` classes, ``P`` prompts a class, ``d`` joint embedding, ``H x W`` patch grid, ``C`` hidden
channels, ``G`` projected guidance channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infoclip.config import ModelConfig
from infoclip.kernels.cost_volume import cost_volume
from infoclip.model.attention import ClassAttention, SwinBlock
from infoclip.model.decoder import UpBlock
from infoclip.model.memory import MODES, check_memory, class_chunk, region
from infoclip.model.stages import DecoderWeights, compute_dtype, decoder, spatial_block

__all__ = ["DROPPED_LOGIT", "Aggregator", "AggregatorLayer", "ClassAggregation", "SpatialAggregation"]

DROPPED_LOGIT = -100.0
"""Logit of a class that the cut to the most similar ``pad_len`` classes left out."""


def _every_cast_apart(place: str) -> contextlib.AbstractContextManager[object]:
    """Autocast without its cache of weights: the gradients of a cached one would be summed over the regions in bf16."""
    if not torch.amp.is_autocast_available(place) or not torch.is_autocast_enabled(place):
        return contextlib.nullcontext()
    return torch.autocast(place, torch.get_autocast_dtype(place), cache_enabled=False)


class SpatialAggregation(nn.Module):
    """Two Swin blocks over each class's map, the second one shifted by half a window, guided by the image."""

    def __init__(self, dim: int, guidance_dim: int, num_heads: int, window: int, resolution: tuple[int, int]) -> None:
        super().__init__()
        self.block_1 = SwinBlock(dim, guidance_dim, num_heads, window, 0, resolution)
        self.block_2 = SwinBlock(dim, guidance_dim, num_heads, window, window // 2, resolution)
        self.guidance_norm = nn.LayerNorm(guidance_dim) if guidance_dim > 0 else None

    def forward(
        self,
        x: Tensor,  # [B, C, T, H, W]
        guidance: Tensor | None,  # [B, G, H, W]
    ) -> Tensor:  # [B, C, T, H, W]
        b, c, t, h, w = x.shape
        y = x.permute(0, 2, 3, 4, 1).reshape(b * t, h, w, c)
        if guidance is not None and self.guidance_norm is not None:
            guidance = self.guidance_norm(guidance.permute(0, 2, 3, 1))
        if guidance is not None:
            guidance = guidance.repeat_interleave(t, dim=0)
        y = self.block_2(self.block_1(y, guidance), guidance)
        return y.view(b, t, h, w, c).permute(0, 4, 1, 2, 3)


class ClassAggregation(nn.Module):
    """Attention among classes on a pooled grid, padded to ``pad_len`` classes with a learnt token.

    The padding takes part in the attention, so ``pad_len`` changes the result.
    """

    def __init__(self, dim: int, guidance_dim: int, num_heads: int, attention_type: str, pad_len: int) -> None:
        super().__init__()
        self.pad_len = pad_len
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, dim)) if pad_len > 0 else None
        self.padding_guidance = (
            nn.Parameter(torch.zeros(1, 1, guidance_dim)) if pad_len > 0 and guidance_dim > 0 else None
        )
        self.attention = ClassAttention(dim, guidance_dim, num_heads, attention_type)
        self.MLP = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(
        self,
        x: Tensor,  # [B, C, T, H, W]
        guidance: Tensor | None,  # [B, T, G]
        pooling: tuple[int, int],
    ) -> Tensor:  # [B, C, T, H, W]
        b, c, t, h, w = x.shape
        maps = x.transpose(1, 2).reshape(b * t, c, h, w)
        pooled = F.avg_pool2d(maps, pooling)  # a remainder at the end of a side is dropped
        ph, pw = pooled.shape[-2:]
        y = pooled.view(b, t, c, ph, pw).permute(0, 3, 4, 1, 2).reshape(b, ph * pw, t, c)
        missing = max(self.pad_len - t, 0)
        if missing and self.padding_tokens is not None:
            y = torch.cat([y, self.padding_tokens.to(y.dtype).expand(b, ph * pw, missing, c)], dim=2)
        y = y.reshape(b * ph * pw, t + missing, c)
        if guidance is not None and missing and self.padding_guidance is not None:
            padding = self.padding_guidance.to(guidance.dtype).expand(b, missing, -1)
            guidance = torch.cat([guidance, padding], dim=1)
        if guidance is not None:
            guidance = guidance.repeat_interleave(ph * pw, dim=0)
        y = y + self.attention(self.norm1(y), guidance)
        y = y[:, :t]  # what follows is separate for each class: the padding has done its part
        y = y + self.MLP(self.norm2(y))
        y = y.view(b, ph, pw, t, c).permute(0, 3, 4, 1, 2).reshape(b * t, c, ph, pw)
        y = F.interpolate(y, size=(h, w), mode="bilinear", align_corners=True)
        return x + y.view(b, t, c, h, w).transpose(1, 2)

    def hoist(
        self,
        guidance: Tensor | None,  # [B, T, G]
    ) -> tuple[Tensor | None, Tensor | None]:  # each [B, 1, T + padding, C]
        """The guidance's share of queries and keys, once an image."""
        if guidance is not None and self.padding_guidance is not None:
            missing = max(self.pad_len - guidance.shape[1], 0)
            padding = self.padding_guidance.to(guidance.dtype).expand(guidance.shape[0], missing, -1)
            guidance = torch.cat([guidance, padding], dim=1)
        return self.attention.hoist(guidance)

    def forward_fast(
        self,
        y: Tensor,  # [B, N, T, C], N pixels of the pooled grid
        shared_q: Tensor | None,  # of hoist
        shared_k: Tensor | None,
    ) -> Tensor:  # [B, N, T, C]
        """What ``forward`` does between its pooling and its up-sampling."""
        b, n, t, c = y.shape
        if self.padding_tokens is not None:
            padding = self.padding_tokens.to(y.dtype)[None].expand(b, n, max(self.pad_len - t, 0), c)
            y = torch.cat([y, padding], dim=2)
        y = (y + self.attention.forward_fast(self.norm1(y), shared_q, shared_k))[:, :, :t]
        return y + self.MLP(self.norm2(y))


class AggregatorLayer(nn.Module):
    """Spatial, then class aggregation."""

    def __init__(self, config: ModelConfig, appearance_dim: int, text_dim: int, resolution: tuple[int, int]) -> None:
        super().__init__()
        dim, heads = config.hidden_dim, config.num_heads
        self.swin_block = SpatialAggregation(dim, appearance_dim, heads, config.window_size, resolution)
        self.attention = ClassAggregation(dim, text_dim, heads, config.attention_type, config.pad_len)

    def forward(
        self,
        x: Tensor,  # [B, C, T, H, W]
        appearance: Tensor | None,  # [B, G, H, W]
        text: Tensor | None,  # [B, T, G]
        pooling: tuple[int, int],
    ) -> Tensor:  # [B, C, T, H, W]
        return self.attention(self.swin_block(x, appearance), text, pooling)


class Aggregator(nn.Module):
    """From image and text embeddings to one logit map a class (CAT-Seg, section 3).

    Args:
        config: widths, layers, window, pooling, ``pad_len``. ``decoder_guidance_dims`` of zero leave the decoder
            without guidance.
        text_dim: width d of the text embeddings that guide class attention; 0 for no text guidance.
        appearance_dim: channels of the image map that guides spatial attention; 0 for no image guidance.
        num_templates: prompts a class, P.
        resolution: the usual grid ``(H, W)``; it only decides which window masks the state dict holds.

    Raises:
        ValueError: widths that do not go together.
    """

    def __init__(
        self,
        config: ModelConfig,
        text_dim: int,
        appearance_dim: int,
        num_templates: int = 1,
        resolution: tuple[int, int] = (24, 24),
    ) -> None:
        super().__init__()
        if config.hidden_dim % config.num_heads:
            raise ValueError(f"hidden_dim {config.hidden_dim} is not a multiple of num_heads {config.num_heads}")
        if num_templates < 1:
            raise ValueError(f"num_templates is {num_templates}; expected at least 1")
        self.config, self.num_templates, self.resolution = config, num_templates, tuple(resolution)
        dim = config.hidden_dim
        image_proj = config.appearance_guidance_proj_dim if appearance_dim > 0 else 0
        text_proj = config.text_guidance_proj_dim if text_dim > 0 else 0
        self.appearance_dim, self.text_dim = appearance_dim, text_dim
        self.guidance_projection = (
            nn.Sequential(nn.Conv2d(appearance_dim, image_proj, 3, padding=1), nn.ReLU()) if image_proj > 0 else None
        )
        self.text_guidance_projection = (
            nn.Sequential(nn.Linear(text_dim, text_proj), nn.ReLU()) if text_proj > 0 else None
        )
        guided = all(d > 0 for d in (*config.decoder_guidance_dims, *config.decoder_guidance_proj_dims))
        self.decoder_guidance_projection = (
            nn.ModuleList(
                nn.Sequential(nn.Conv2d(wide, narrow, 3, padding=1), nn.ReLU())
                for wide, narrow in zip(config.decoder_guidance_dims, config.decoder_guidance_proj_dims, strict=True)
            )
            if guided
            else None
        )
        self.conv1 = nn.Conv2d(num_templates, dim, kernel_size=7, padding=3)
        self.layers = nn.ModuleList(
            AggregatorLayer(config, image_proj, text_proj, (resolution[0], resolution[1]))
            for _ in range(config.num_layers)
        )
        first, second = config.decoder_dims
        narrow = config.decoder_guidance_proj_dims if guided else (0, 0)
        self.decoder1 = UpBlock(dim, first, narrow[0])
        self.decoder2 = UpBlock(first, second, narrow[1])
        self.head = nn.Conv2d(second, 1, kernel_size=3, padding=1)
        # A budget is for the planner of a training run to translate; without one the default holds.
        self.memory: str = config.memory if config.memory in MODES else "fast"
        self.class_chunk = config.class_chunk

    def use_memory(self, mode: str, class_chunk: int = 0) -> Aggregator:
        """Choose what the backward pass finds and what it computes again (:mod:`infoclip.model.memory`).

        Every mode reads the same weights and gives the same values and gradients to rounding. A graph of ``fast`` or
        ``balanced`` allows one backward pass, whatever ``retain_graph`` says.

        Args:
            mode: ``fast``, ``balanced``, ``lean``, or ``reference``, the plain form that specifies the result.
            class_chunk: classes worked on at once; 0 for the mode's own.

        Raises:
            ValueError: another mode, or a negative chunk.
        """
        check_memory(mode, class_chunk)
        self.memory, self.class_chunk = mode, class_chunk
        return self

    def forward(
        self,
        image_feats: Tensor,  # [B, d, H, W]
        text_feats: Tensor,  # [T, P, d] or [B, T, P, d]
        guidance: Sequence[Tensor] = (),  # [B, appearance_dim, H, W], [B, g1, 2H, 2W], [B, g2, 4H, 4W]
        pooling: int | tuple[int, int] | None = None,
    ) -> Tensor:  # [B, T, 4H, 4W]
        """Logits of every class.

        Embeddings need not be normalised. With more than ``pad_len`` classes (and ``pad_len > 0``) each image keeps
        those with the largest similarity over prompts and positions; the others get the logit -100.

        Args:
            pooling: pooling before class attention; None takes ``pooling_train`` in training mode and
                ``pooling_eval`` in evaluation mode.

        Raises:
            ValueError: shapes that do not go together.
        """
        self._check(image_feats, text_feats, guidance)
        if pooling is None:
            pooling = self.config.pooling_train if self.training else self.config.pooling_eval
        window = (pooling, pooling) if isinstance(pooling, int) else (int(pooling[0]), int(pooling[1]))
        b, _, h, w = image_feats.shape
        if not (1 <= window[0] <= h and 1 <= window[1] <= w):
            raise ValueError(f"pooling {window} does not fit the grid {(h, w)}")
        cost = self.correlation(image_feats, text_feats)  # [B, P, T, H, W]
        classes, pad_len = cost.shape[2], self.config.pad_len
        kept = None
        if 0 < pad_len < classes:
            kept = self.kept_classes(cost)  # [B, K]
            cost = cost.gather(2, kept[:, None, :, None, None].expand(-1, cost.shape[1], -1, h, w))
            text = F.normalize(text_feats, dim=-1)
            text = text.expand(b, *text.shape[-3:])
            text_feats = text.gather(1, kept[:, :, None, None].expand(-1, -1, *text.shape[2:]))
        appearance = self.guidance_projection(guidance[0]) if self.guidance_projection is not None else None
        text_guidance = self.text_guidance(text_feats, b)
        if self.memory == "reference":
            x = self.embed(cost)  # [B, C, T, H, W]
            for layer in self.layers:
                x = cast(AggregatorLayer, layer)(x, appearance, text_guidance, window)
            logits = self.decode(x, guidance[1:])
        else:
            with _every_cast_apart(cost.device.type):
                logits = self._in_regions(cost, appearance, text_guidance, guidance[1:], window)
        if kept is not None:
            full = logits.new_full((b, classes, *logits.shape[2:]), DROPPED_LOGIT)
            logits = full.scatter(1, kept[:, :, None, None].expand_as(logits), logits)
        return logits

    def correlation(
        self,
        image_feats: Tensor,  # [B, d, H, W]
        text_feats: Tensor,  # [T, P, d] or [B, T, P, d]
    ) -> Tensor:  # [B, P, T, H, W]
        """Cost volume: the cosine of every pixel with every prompt of every class."""
        return cost_volume(image_feats.flatten(2).transpose(1, 2), text_feats).unflatten(-1, image_feats.shape[-2:])

    def kept_classes(self, cost: Tensor) -> Tensor:  # [B, P, T, H, W] -> [B, pad_len] int64
        """Per image the ``pad_len`` classes with the largest cosine over prompts and positions, in no order."""
        return cost.detach().amax(dim=(1, 3, 4)).topk(self.config.pad_len, dim=1, sorted=False).indices

    def embed(self, cost: Tensor) -> Tensor:  # [B, P, T, H, W] -> [B, C, T, H, W]
        """The cost map of each class, embedded by a 7x7 convolution."""
        b, p, t, h, w = cost.shape
        x = self.conv1(cost.transpose(1, 2).reshape(b * t, p, h, w))
        return x.view(b, t, -1, h, w).transpose(1, 2)

    def text_guidance(
        self,
        text_feats: Tensor,  # [T, P, d] or [B, T, P, d]
        batch: int,
    ) -> Tensor | None:  # [B, T, G]
        """The mean over the prompts, normalised and projected."""
        if self.text_guidance_projection is None:
            return None
        projected = self.text_guidance_projection(F.normalize(text_feats.mean(dim=-2), dim=-1))
        return projected.expand(batch, *projected.shape[-2:])

    def decode(
        self,
        x: Tensor,  # [B, C, T, H, W]
        guidance: Sequence[Tensor],  # [B, g1, 2H, 2W], [B, g2, 4H, 4W]
    ) -> Tensor:  # [B, T, 4H, 4W]
        """The decoder, class by class."""
        b, c, t, h, w = x.shape
        projected = self._decoder_guidance(guidance)
        y = x.transpose(1, 2).reshape(b * t, c, h, w)
        y = self.decoder2(self.decoder1(y, projected[0]), projected[1])
        # The bias apart from the convolution: its gradient sums every logit of the batch, which the convolution's own
        # backward does term by term on the CPU and addition's backward pairwise, with far less rounding.
        assert self.head.bias is not None
        y = F.conv2d(y, self.head.weight, padding=1)[:, 0] + self.head.bias
        return y.view(b, t, *y.shape[-2:])

    def _decoder_guidance(self, guidance: Sequence[Tensor]) -> list[Tensor | None]:
        if self.decoder_guidance_projection is None:
            return [None, None]
        return [p(g) for p, g in zip(self.decoder_guidance_projection, guidance, strict=True)]

    def _in_regions(
        self,
        cost: Tensor,  # [B, P, T, H, W]
        appearance: Tensor | None,  # [B, G, H, W]
        text: Tensor | None,  # [B, T, G]
        guidance: Sequence[Tensor],  # [B, g1, 2H, 2W], [B, g2, 4H, 4W]
        pooling: tuple[int, int],
    ) -> Tensor:  # [B, T, 4H, 4W]
        """Embedding, layers and decoder with what the classes share computed first and the rest in regions."""
        t, h, w = cost.shape[2:]
        chunk = class_chunk(self.memory, self.class_chunk, t, cost.device)
        dtype = compute_dtype(cost)
        maps: list[Tensor] = list(cost.transpose(1, 2).split(chunk, dim=1))  # [B, chunk, P, H, W]
        maps = [self.embed(x.transpose(1, 2)).permute(0, 2, 3, 4, 1) for x in maps]  # [B, chunk, H, W, C]
        (kh, kw), ph, pw = pooling, h // pooling[0], w // pooling[1]
        for each in self.layers:
            layer = cast(AggregatorLayer, each)
            spatial, classes = layer.swin_block, layer.attention
            g = appearance
            if g is not None and spatial.guidance_norm is not None:
                g = spatial.guidance_norm(g.permute(0, 2, 3, 1))
            blocks = [block.hoist(g, h, w, dtype) for block in (spatial.block_1, spatial.block_2)]
            pooled = []
            for j, x in enumerate(maps):
                for block in blocks:
                    x = spatial_block(block, self.memory, x)
                maps[j] = x
                # As a mean over views, which keeps nothing for the backward pass; a remainder of a side is dropped.
                cells = x[:, :, : ph * kh, : pw * kw].unflatten(3, (pw, kw)).unflatten(2, (ph, kh))
                pooled.append(cells.mean(dim=(3, 5)).flatten(2, 3))
            y = torch.cat(pooled, dim=1).transpose(1, 2)  # [B, ph * pw, T, C]
            del pooled
            q, k = classes.hoist(text)
            pixels = max(1, -(-ph * pw * chunk // t))  # the same share of the pixels
            parts = [region(self.memory, classes.forward_fast, part, q, k) for part in y.split(pixels, dim=1)]
            added = torch.cat(parts, dim=1).transpose(1, 2).split(chunk, dim=1)  # [B, chunk, ph * pw, C]
            for j, (x, z) in enumerate(zip(maps, added, strict=True)):
                wide = z.flatten(0, 1).unflatten(1, (ph, pw)).permute(0, 3, 1, 2)
                wide = F.interpolate(wide, size=(h, w), mode="bilinear", align_corners=True)
                maps[j] = x + wide.permute(0, 2, 3, 1).view(x.shape)

        projected = self._decoder_guidance(guidance)
        up = (self.decoder1, self.decoder2)
        folds = [block.fold(g, s * h, s * w) for block, g, s in zip(up, projected, (1, 2), strict=True)]
        parameters = [p for block, fold in zip(up, folds, strict=True) for p in (*fold, *block.norms_and_kernel())]
        groups = (self.config.decoder_dims[0] // 16, self.config.decoder_dims[1] // 16)
        weights = DecoderWeights.of([*parameters, self.head.weight], dtype, groups=groups, eps=(*up[0].eps, *up[1].eps))
        assert self.head.bias is not None
        return torch.cat([decoder(weights, self.memory, x) for x in maps], dim=1) + self.head.bias

    def _check(self, image_feats: Tensor, text_feats: Tensor, guidance: Sequence[Tensor]) -> None:
        if image_feats.dim() != 4:
            raise ValueError(f"image_feats has shape {tuple(image_feats.shape)}; expected [B, d, H, W]")
        b, d, h, w = image_feats.shape
        shape = tuple(text_feats.shape)
        if len(shape) not in (3, 4) or (len(shape) == 4 and shape[0] != b):
            raise ValueError(f"text_feats has shape {shape}; expected [T, P, d] or [{b}, T, P, d]")
        if shape[-3] < 1:
            raise ValueError("text_feats has no class; expected at least one")
        if shape[-2:] != (self.num_templates, d):
            raise ValueError(
                f"text_feats has shape {shape}; expected {self.num_templates} prompts a class of width {d}"
                f" (the model was built for {self.num_templates} templates)"
            )
        if self.text_guidance_projection is not None and d != self.text_dim:
            raise ValueError(f"the embeddings have width {d}; the model was built for {self.text_dim}")
        wanted: list[tuple[int, ...]] = []
        if self.guidance_projection is not None or self.decoder_guidance_projection is not None:
            wanted.append((b, self.appearance_dim, h, w) if self.guidance_projection is not None else ())
        if self.decoder_guidance_projection is not None:
            wanted += [(b, g, s * h, s * w) for g, s in zip(self.config.decoder_guidance_dims, (2, 4), strict=True)]
        if len(guidance) < len(wanted):
            raise ValueError(f"guidance has {len(guidance)} maps; expected {len(wanted)}")
        for i, (g, size) in enumerate(zip(guidance, wanted, strict=False)):
            if size and tuple(g.shape) != size:
                raise ValueError(f"guidance[{i}] has shape {tuple(g.shape)}; expected {list(size)}")
