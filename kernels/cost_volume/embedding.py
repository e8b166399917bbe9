"""The cost volume with its embedding convolution behind it, a chunk of classes at a time: the volume is never stored.

Backward computes each chunk's volume again. Every chunk runs through the backend's own forms and torch's convolution.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native_impl, triton_impl

__all__ = ["CHUNK_BYTES", "classes_at_once", "cost_embedding"]

CHUNK_BYTES = {"cpu": 8 * 2**20, "cuda": 64 * 2**20}
"""A chunk's volume is at most this large, or one class: near the CPU's caches, enough work for a GPU."""

_FORMS: dict[str, Any] = {"native": native_impl, "triton": triton_impl}


def classes_at_once(image: Tensor, text: Tensor) -> int:
    """How many classes' volumes of image [B, N, d] and text [..., T, P, d] fit CHUNK_BYTES, at least one."""
    of_one = image.shape[0] * image.shape[1] * text.shape[-2] * image.element_size()
    room = CHUNK_BYTES["cuda" if image.is_cuda else "cpu"]
    return max(1, min(text.shape[-3], room // max(of_one, 1)))


def _chunk(text: Tensor, start: int, length: int) -> tuple[Tensor, int]:
    """The text of some classes, prompts and classes swapped: its volume lies as the convolution reads it."""
    length = min(length, text.shape[-3] - start)
    return text.narrow(-3, start, length).transpose(-3, -2), length


def _maps(backend: str, image: Tensor, swapped: Tensor, scale: float, grid: tuple[int, int]) -> Tensor:
    """The maps [B t, P, h, w] of a chunk of t classes."""
    volume, _ = _FORMS[backend].forward(image, swapped, scale)  # [B, t, P, N]
    return volume.flatten(0, 1).unflatten(-1, grid)


@torch.library.custom_op("infoclip::cost_embedding", mutates_args=())
def cost_embedding(
    image: Tensor,
    text: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    height: int,
    width: int,
    scale: float,
    class_chunk: int,
    backend: str,
) -> Tensor:  # [B, T, C, h, w]
    """The k x k convolution (weight [C, P, k, k], bias [C]) of the cost maps of image [B, h w, d] and text."""
    classes = text.shape[-3]
    shape = (image.shape[0], classes, weight.shape[0], height, width)
    if not image.shape[0] or not classes:
        return image.new_empty(shape)
    out = None
    for start in range(0, classes, class_chunk):
        swapped, length = _chunk(text, start, class_chunk)
        maps = _maps(backend, image, swapped, scale, (height, width))
        embedded = F.conv2d(maps, weight, bias, padding=weight.shape[-1] // 2).unflatten(0, (-1, length))
        if length == classes:
            return embedded.contiguous()
        if out is None:
            out = image.new_empty(shape)
        out.narrow(1, start, length).copy_(embedded)
    assert out is not None
    return out


@cost_embedding.register_fake
def _(
    image: Tensor,
    text: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    height: int,
    width: int,
    scale: float,
    class_chunk: int,
    backend: str,
) -> Tensor:
    return image.new_empty(image.shape[0], text.shape[-3], weight.shape[0], height, width)


@torch.library.custom_op("infoclip::cost_embedding_backward", mutates_args=())
def cost_embedding_backward(
    grad: Tensor,
    image: Tensor,
    text: Tensor,
    weight: Tensor,
    scale: float,
    class_chunk: int,
    backend: str,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients in image, text, weight and bias; one that is not needed is an empty tensor."""
    need_image, need_text, need_weight, need_bias = need
    # Sums over the chunks are kept in fp32, also of halves.
    wide = torch.float64 if image.dtype == torch.float64 else torch.float32
    d_image = image.new_zeros(image.shape if need_image else (0,), dtype=wide)
    d_text = text.new_empty(text.shape if need_text else (0,))
    d_weight = weight.new_zeros(weight.shape if need_weight else (0,), dtype=wide)
    d_bias = weight.new_zeros(weight.shape[:1] if need_bias else (0,), dtype=wide)
    if text.dim() == 3 and need_text and not image.shape[0]:
        d_text.zero_()
    pad = weight.shape[-1] // 2
    grid = (grad.shape[-2], grad.shape[-1])
    for start in range(0, text.shape[-3] if grad.numel() else 0, class_chunk):
        swapped, length = _chunk(text, start, class_chunk)
        # Without the weight's gradient the convolution's input is only asked for its size.
        maps = (
            _maps(backend, image, swapped, scale, grid)
            if need_weight
            else image.new_empty(1).expand(image.shape[0] * length, text.shape[-2], *grid)
        )
        d_maps, chunk_weight, chunk_bias = torch.ops.aten.convolution_backward(
            grad.narrow(1, start, length).flatten(0, 1), maps, weight, [weight.shape[0]] if need_bias else None,
            [1, 1], [pad, pad], [1, 1], False, [0, 0], 1, [need_image or need_text, need_weight, need_bias],
        )  # fmt: skip
        if need_weight:
            d_weight += chunk_weight
        if need_bias:
            d_bias += chunk_bias
        if need_image or need_text:
            incoming = d_maps.flatten(-2).unflatten(0, (-1, length))  # [B, t, P, N]
            i, t = _FORMS[backend].backward(incoming, image, swapped, scale, need_image, need_text)
            if need_image:
                d_image += i
            if need_text:
                d_text.narrow(-3, start, length).copy_(t.transpose(-3, -2))
    return d_image.to(image.dtype), d_text, d_weight.to(weight.dtype), d_bias.to(weight.dtype)


@cost_embedding_backward.register_fake
def _(
    grad: Tensor,
    image: Tensor,
    text: Tensor,
    weight: Tensor,
    scale: float,
    class_chunk: int,
    backend: str,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = (image.shape, text.shape, weight.shape, weight.shape[:1])
    d_image, d_text, d_weight, d_bias = (
        like.new_empty(shape if wanted else (0,))
        for like, shape, wanted in zip((image, text, weight, weight), shapes, need, strict=True)
    )
    return d_image, d_text, d_weight, d_bias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    image, text, weight, _, _, _, ctx.scale, ctx.class_chunk, ctx.backend = inputs
    ctx.save_for_backward(image, text, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    image, text, weight = ctx.saved_tensors
    need = list(ctx.needs_input_grad[:4])
    found = cost_embedding_backward(grad, image, text, weight, ctx.scale, ctx.class_chunk, ctx.backend, need)
    return (*(x if wanted else None for x, wanted in zip(found, need, strict=True)), None, None, None, None, None)


cost_embedding.register_autograd(_backward, setup_context=_setup)
