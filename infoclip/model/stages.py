"""The stages that every class passes, with backward passes written out: a block of spatial attention, and the decoder.

Autograd would keep the result of every operator, and checkpointing by operator pays for each of them in dispatch. A
stage keeps its input and what the memory mode names (:mod:`infoclip.model.memory`), and its backward pass computes the
rest again, in place where it can: beside matrix products a training step is bound by how much memory it touches.

Under autocast matrix products, convolutions and what is kept are in its dtype; statistics of normalisations, softmax,
sums over tokens (the gradients of biases) and everything summed over the stages (the gradients of weights and of what
the classes share) are float32. A stage's graph has no second derivative.

Sizes: ``B`` images, ``T`` classes of the stage, ``H x W`` grid, ``C`` channels, ``N = B T H W`` tokens, ``h`` heads.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from infoclip.attention import attention, attention_backward, attention_forward, has_written_backward

__all__ = ["DecoderWeights", "SpatialWeights", "Windows", "compute_dtype", "decoder", "spatial_block", "windows_of"]

_aten: Any = torch.ops.aten


def compute_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype on the tensor's device where it is on, else the tensor's."""
    place = x.device.type
    if torch.amp.is_autocast_available(place) and torch.is_autocast_enabled(place) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(place)
    return x.dtype


def _exactly(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """No autocast: a stage says the dtype of everything itself."""
    known = torch.amp.is_autocast_available(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if known else contextlib.nullcontext()


def _sum(x: Tensor, like: Tensor, axis: int | tuple[int, ...] = 0) -> Tensor:
    """Sum in float32 at least, for the gradient of ``like``."""
    return x.sum(axis, dtype=torch.promote_types(x.dtype, torch.float32)).to(like.dtype)


# Normalisations: half precision with float32 weights is an operator of the CPU alone.


def _widened(x: Tensor, weight: Tensor) -> Tensor:
    return x if x.device.type == "cpu" or x.dtype == weight.dtype else x.to(weight.dtype)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = torch.native_layer_norm(_widened(x, weight), weight.shape, weight, bias, eps)
    return y.to(x.dtype), mean, rstd


def _layer_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    wide, grad = _widened(x, weight), _widened(grad, weight)
    dx, dw, db = _aten.native_layer_norm_backward(
        grad, wide, weight.shape, mean, rstd, weight, bias, (True, True, True)
    )
    return dx.to(x.dtype), dw, db


def _group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    m, c, h, w = x.shape
    y, mean, rstd = torch.native_group_norm(_widened(x, weight), weight, bias, m, c, h * w, groups, eps)
    return y.to(x.dtype), mean, rstd


def _group_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    m, c, h, w = x.shape
    wide, grad = _widened(x, weight), _widened(grad, weight)
    dx, dw, db = _aten.native_group_norm_backward(
        grad, wide, mean, rstd, weight, m, c, h * w, groups, (True, True, True)
    )
    return dx.to(x.dtype), dw, db


# Spatial attention


@dataclass(frozen=True)
class Windows:
    """Where the tokens of a grid go when it is cut into (shifted) windows: positions and back."""

    index: Tensor  # [windows * L] int64, into the H W positions; padding reads position 0
    back: Tensor  # [H * W] int64, into the windows' tokens
    padding: Tensor | None  # [windows * L] bool
    count: int

    def split(self, x: Tensor) -> Tensor:  # [M, H * W, c] -> [M, windows * L, c]; padding is zero
        y = x.index_select(1, self.index)
        return y if self.padding is None else y.masked_fill_(self.padding[:, None], 0)

    def join(self, y: Tensor) -> Tensor:  # [M, windows * L, c] -> [M, H * W, c]
        return y.index_select(1, self.back)


@functools.lru_cache(maxsize=64)
def windows_of(height: int, width: int, window: int, shift: int, device: torch.device) -> Windows:
    """The windows of a grid; a side that the window does not divide is padded at its end."""
    rows, columns = -(-height // window), -(-width // window)
    grid = np.full((rows * window, columns * window), -1, dtype=np.int64)
    grid[:height, :width] = np.arange(height * width).reshape(height, width)
    grid = np.roll(grid, (-shift, -shift), (0, 1))
    index = grid.reshape(rows, window, columns, window).swapaxes(1, 2).ravel()
    there = index >= 0
    back = np.empty(height * width, dtype=np.int64)
    back[index[there]] = np.flatnonzero(there)
    with torch.inference_mode(False):  # what inference makes here must serve a later training step
        padding = None if there.all() else torch.tensor(~there, device=device)
        there_and_back = torch.tensor(index.clip(0), device=device), torch.tensor(back, device=device)
        return Windows(*there_and_back, padding, rows * columns)


@dataclass(frozen=True)
class SpatialWeights:
    """What a block of spatial attention reads beside the classes' maps, the same for all of them."""

    parameters: tuple[Tensor, ...]
    """qkv [3C, C], shared [B or 1, 1, windows * L, 3C] (the guidance's share and the biases), norm1 weight and bias,
    proj weight and bias, norm2 weight and bias, fc1 weight [4C, C] and bias, fc2 weight and bias: with gradients."""
    windows: Windows
    mask: Tensor | None  # [windows, L, L], in the dtype computed in
    heads: int
    eps: tuple[float, float]
    cast: tuple[Tensor, ...]
    """The same, without gradient; matrices, their biases and ``shared`` in the dtype computed in."""

    @classmethod
    def of(cls, parameters: Sequence[Tensor], dtype: torch.dtype, mask: Tensor | None, **rest: Any) -> SpatialWeights:
        norms = (2, 3, 6, 7)
        cast = tuple(p.detach() if i in norms else p.detach().to(dtype) for i, p in enumerate(parameters))
        if mask is not None:
            # The published -100 leaves a masked pair e^-100 of the others' weight, less than float32's smallest normal
            # number. Products of such numbers give nothing but take a processor six times as long: it is zero here.
            mask = (mask * 100).to(dtype)
        return cls(parameters=tuple(parameters), cast=cast, mask=mask, **rest)


def _heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:  # [n, L, 3C] -> each [n, h, L, C / h]
    x = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return x[0], x[1], x[2]


def _pieces(w: SpatialWeights, *tensors: Tensor) -> list[tuple[tuple[Tensor, ...], Tensor | None]]:
    """Tensors [M, windows * L, c] as what attention takes at once: all windows, or, masked, the same window of all."""
    split = [x.unflatten(1, (w.windows.count, -1)) for x in tensors]
    if w.mask is None:
        return [(tuple(x.flatten(0, 1) for x in split), None)]
    return [(tuple(x[:, i] for x in split), w.mask[i][None, None]) for i in range(w.windows.count)]


def _spatial_qkv(w: SpatialWeights, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [M, H * W, C]
    """Queries, keys and values [M, windows * L, 3C]; the tokens they are of; mean and deviation of the norm."""
    qkv, shared, weight, bias = w.cast[:4]
    y, mean, rstd = _layer_norm(x, weight, bias, w.eps[0])
    y = w.windows.split(y)
    out = (y @ qkv.t()).unflatten(0, (shared.shape[0], -1)).add_(shared).flatten(0, 1)
    return out, y, mean, rstd


def _spatial_attend(w: SpatialWeights, qkv: Tensor, keep: bool = True) -> tuple[Tensor, list[Tensor]]:
    """The heads' results [M, windows * L, C], and (``keep``) what the backward pass wants beside them."""
    outs, extra = [], []
    for (piece,), mask in _pieces(w, qkv):
        q, k, v = _heads(piece, w.heads)
        out, lse = attention_forward(q, k, v, mask) if keep else (attention(q, k, v, mask), None)
        outs.append(out.transpose(1, 2).flatten(2))
        extra += [] if lse is None else [lse]
    m = qkv.shape[0]
    joined = outs[0].view(m, -1, outs[0].shape[-1]) if w.mask is None else torch.stack(outs, dim=1).flatten(1, 2)
    return joined, extra


def _spatial_attend_backward(
    w: SpatialWeights, grad: Tensor, qkv: Tensor, attended: Tensor, extra: Sequence[Tensor]
) -> Tensor:  # [M, windows * L, 3C]
    result = torch.empty_like(qkv)
    for i, ((into, piece, out, g), mask) in enumerate(_pieces(w, result, qkv, attended, grad)):
        out, g = (x.unflatten(-1, (w.heads, -1)).transpose(1, 2) for x in (out, g))
        gradients = attention_backward(*_heads(piece, w.heads), out, g, extra[i] if extra else None, mask)
        for target, value in zip(_heads(into, w.heads), gradients, strict=True):
            target.copy_(value)
    return result


def _hidden(w: SpatialWeights, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [M, H * W, C]
    """Before the activation [M, H * W, 4C]; the normalised tokens; mean and deviation of the norm."""
    weight, bias, fc1, b1 = w.cast[6:10]
    y, mean, rstd = _layer_norm(x, weight, bias, w.eps[1])
    return F.linear(y, fc1, b1), y, mean, rstd


def _spatial(w: SpatialWeights, x: Tensor, keep: bool) -> tuple[Tensor, list[Tensor]]:  # [M, H * W, C]
    """The block's result, and: qkv, attended, between the two halves, hidden, and attention's extra tensors."""
    qkv, _, _, _ = _spatial_qkv(w, x)
    attended, extra = _spatial_attend(w, qkv, keep)
    middle = w.windows.join(F.linear(attended, w.cast[4], w.cast[5])).add_(x)
    hidden, _, _, _ = _hidden(w, middle)
    out = F.linear(F.gelu(hidden), w.cast[10], w.cast[11]).add_(middle)
    return out, [qkv, attended, middle, hidden, *extra]


class _Spatial(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: SpatialWeights, mode: str, x: Tensor, *parameters: Tensor) -> Tensor:
        with _exactly(x):
            out, found = _spatial(w, x, True)
        written = has_written_backward(x)
        kept = {"fast": found, "balanced": [found[1], *found[4:]] if written else [], "lean": []}[mode]
        ctx.w, ctx.mode = w, mode
        ctx.save_for_backward(x, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        w, mode = ctx.w, ctx.mode
        x, *kept = ctx.saved_tensors
        with _exactly(x):
            _, shared, norm1, bias1, proj, _, norm2, bias2, fc1, _, fc2, _ = w.cast
            like = w.parameters
            if mode == "fast":
                qkv, attended, middle, hidden, *extra = kept
                tokens, mean1, rstd1 = _layer_norm(x, norm1, bias1, w.eps[0])
                tokens = w.windows.split(tokens)
                normed, mean2, rstd2 = _layer_norm(middle, norm2, bias2, w.eps[1])
            else:
                qkv, tokens, mean1, rstd1 = _spatial_qkv(w, x)
                if kept:
                    attended, *extra = kept
                else:
                    attended, extra = _spatial_attend(w, qkv)
                middle = w.windows.join(F.linear(attended, proj, w.cast[5])).add_(x)
                hidden, normed, mean2, rstd2 = _hidden(w, middle)
            grad = grad.contiguous()
            c = x.shape[-1]

            def rows(z: Tensor) -> Tensor:  # [..., c] -> [N, c]
                return z.reshape(-1, z.shape[-1])

            active = F.gelu(hidden)
            d_fc2, d_b2 = rows(grad).t() @ rows(active), _sum(rows(grad), like[11])
            d = torch.mm(rows(grad), fc2, out=rows(active))
            d = _aten.gelu_backward(d, rows(hidden))
            d_fc1, d_b1 = d.t() @ rows(normed), _sum(d, like[9])
            d_middle, d_n2, d_nb2 = _layer_norm_backward((d @ fc1).view_as(x), middle, mean2, rstd2, norm2, bias2)
            d_middle += grad
            del active, d, hidden, normed

            d_joined = w.windows.split(d_middle)
            d_proj, d_pb = rows(d_joined).t() @ rows(attended), _sum(rows(d_joined), like[5])
            d_qkv = _spatial_attend_backward(w, d_joined @ proj, qkv, attended, extra)
            b = shared.shape[0]
            d_shared = _sum(d_qkv.view(b, -1, d_qkv[0].numel()), like[1], 1).view_as(like[1])
            d_weight = rows(d_qkv).t() @ rows(tokens)
            d_x = w.windows.join((rows(d_qkv) @ w.cast[0]).view(*d_qkv.shape[:2], c))
            d_x, d_n1, d_nb1 = _layer_norm_backward(d_x, x, mean1, rstd1, norm1, bias1)
            d_x += d_middle
        found = (d_weight, d_shared, d_n1, d_nb1, d_proj, d_pb, d_n2, d_nb2, d_fc1, d_b1, d_fc2, d_b2)
        return None, None, d_x, *(g.to(p.dtype) for g, p in zip(found, like, strict=True))


def spatial_block(
    w: SpatialWeights,
    mode: str,
    x: Tensor,  # [B, T, H, W, C]
) -> Tensor:  # as x, in the dtype computed in
    """One block of spatial attention for some classes; ``mode`` names what the backward pass finds."""
    y = x.flatten(2, 3).flatten(0, 1).to(w.cast[0].dtype).contiguous()
    if torch.is_grad_enabled():
        return _Spatial.apply(w, mode, y, *w.parameters).view(x.shape)
    with _exactly(x):
        return _spatial(w, y, False)[0].view(x.shape)


# The decoder


@dataclass(frozen=True)
class DecoderWeights:
    """What the decoder reads beside the classes' maps, the same for all of them."""

    parameters: tuple[Tensor, ...]
    """Twice: up [in, out, 4, 4] and shared [B or 1, out, 2H, 2W] (:func:`infoclip.model.fast.fold_up`), norm weight and
    bias, convolution [out, out, 3, 3], norm weight and bias; then the head [1, out, 3, 3]: with their gradients."""
    groups: tuple[int, int]
    eps: tuple[float, float, float, float]
    cast: tuple[Tensor, ...]
    """The same, without gradient; all but the norms in the dtype computed in."""

    @classmethod
    def of(cls, parameters: Sequence[Tensor], dtype: torch.dtype, **rest: Any) -> DecoderWeights:
        def cast(i: int, p: Tensor) -> Tensor:
            p = p.detach()
            return p if p.dim() == 1 else p.to(dtype).contiguous(memory_format=torch.channels_last)

        return cls(parameters=tuple(parameters), cast=tuple(cast(i, p) for i, p in enumerate(parameters)), **rest)


def _up(x: Tensor, kernel: Tensor, shared: Tensor) -> Tensor:  # [M, in, H, W] -> [M, out, 2H, 2W], channels last
    y = F.conv_transpose2d(x, kernel, stride=2, padding=1).contiguous(memory_format=torch.channels_last)
    return y.unflatten(0, (shared.shape[0], -1)).add_(shared[:, None]).flatten(0, 1)


def _activated(w: DecoderWeights, stage: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Group normalisation and ReLU after convolution ``stage``; mean and deviation of the norm."""
    half, second = divmod(stage, 2)
    at = 7 * half + (5 if second else 2)
    y, mean, rstd = _group_norm(x, w.cast[at], w.cast[at + 1], w.groups[half], w.eps[stage])
    return y.relu_(), mean, rstd


def _convolved(w: DecoderWeights, stage: int, x: Tensor) -> Tensor:
    half, second = divmod(stage, 2)
    if second:
        return F.conv2d(x, w.cast[7 * half + 4], padding=1)
    return _up(x, w.cast[7 * half], w.cast[7 * half + 1])


def _decoder(w: DecoderWeights, x: Tensor, keep: Sequence[int] = ()) -> tuple[Tensor, list[Tensor]]:
    """Logits [M, 1, 4H, 4W], and the results of the convolutions ``keep``."""
    kept = []
    for stage in range(4):
        x = _convolved(w, stage, x)
        kept += [x] if stage in keep else []
        x = _activated(w, stage, x)[0]
    return F.conv2d(x, w.cast[14], padding=1), kept


_DECODER_KEPT = {"fast": (0, 1, 2, 3), "balanced": (1, 3), "lean": ()}


class _Decoder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: DecoderWeights, mode: str, x: Tensor, *parameters: Tensor) -> Tensor:
        with _exactly(x):
            out, kept = _decoder(w, x, _DECODER_KEPT[mode])
        ctx.w, ctx.mode = w, mode
        ctx.save_for_backward(x, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        w: DecoderWeights = ctx.w
        x, *kept = ctx.saved_tensors
        found: list[Any] = [None] * 15
        with _exactly(x):
            maps: dict[int, Tensor] = dict(zip(_DECODER_KEPT[ctx.mode], kept, strict=True))
            for stage in range(4):
                if stage not in maps:
                    before = x if stage == 0 else _activated(w, stage - 1, maps[stage - 1])[0]
                    maps[stage] = _convolved(w, stage, before)
            active, mean, rstd = _activated(w, 3, maps[3])
            grad = grad.contiguous(memory_format=torch.channels_last)
            d, found[14], _ = _aten.convolution_backward(
                grad, active, w.cast[14], None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (True, True, False)
            )
            for stage in (3, 2, 1, 0):
                half, second = divmod(stage, 2)
                at = 7 * half
                norm = at + (5 if second else 2)
                d = _aten.threshold_backward(d, active, 0)
                d, found[norm], found[norm + 1] = _group_norm_backward(
                    d, maps.pop(stage), mean, rstd, w.cast[norm], w.groups[half]
                )
                active, mean, rstd = _activated(w, stage - 1, maps[stage - 1]) if stage else (x, mean, rstd)
                if second:
                    d, found[at + 4], _ = _aten.convolution_backward(
                        d, active, w.cast[at + 4], None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (True, True, False)
                    )
                else:
                    shared = w.parameters[at + 1]
                    # Flat, channels last: the reduction of torch over the view of maps is ten times slower.
                    flat = d.permute(0, 2, 3, 1).reshape(shared.shape[0], -1, d[0].numel())
                    found[at + 1] = _sum(flat, shared, 1).unflatten(1, (*d.shape[2:], -1)).permute(0, 3, 1, 2)
                    d, found[at], _ = _aten.convolution_backward(
                        d, active, w.cast[at], None, (2, 2), (1, 1), (1, 1), True, (0, 0), 1, (True, True, False)
                    )
        return None, None, d, *(g.to(p.dtype) for g, p in zip(found, w.parameters, strict=True))


def decoder(
    w: DecoderWeights,
    mode: str,
    x: Tensor,  # [B, T, H, W, C]
) -> Tensor:  # [B, T, 4H, 4W], in the dtype computed in
    """Logits of some classes, but for the head's bias; ``mode`` names what the backward pass finds."""
    y = x.flatten(0, 1).to(w.cast[0].dtype).contiguous().permute(0, 3, 1, 2)
    if torch.is_grad_enabled():
        out = _Decoder.apply(w, mode, y, *w.parameters)
    else:
        with _exactly(x):
            out = _decoder(w, y)[0]
    return out[:, 0].unflatten(0, (x.shape[0], -1))
