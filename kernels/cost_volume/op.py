"""The ops as torch knows them: schema, fake, autograd. The public functions cast, also for autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import native_impl, reference, triton_impl

__all__ = ["cost_volume", "sweep"]

_FORMS: dict[str, Any] = {"native": native_impl, "triton": triton_impl}


@torch.library.custom_op("infoclip::cost_volume", mutates_args=())
def cost_volume(image: Tensor, text: Tensor, scale: float, backend: str) -> Tensor:  # [B, P, T, N]
    """``scale`` times the cosine similarities of image [B, N, d] and text [T, P, d] or [B, T, P, d]."""
    volume, _ = _FORMS[backend].forward(image, text, scale)
    return volume


@cost_volume.register_fake
def _(image: Tensor, text: Tensor, scale: float, backend: str) -> Tensor:
    return image.new_empty(image.shape[0], text.shape[-2], text.shape[-3], image.shape[1])


@torch.library.custom_op("infoclip::cost_volume_sweep", mutates_args=())
def sweep(image: Tensor, text: Tensor, scale: float, volume: bool, backend: str) -> tuple[Tensor, Tensor]:
    """The volume [B, P, T, N] (empty unless asked for) and each class's largest entry [B, T], without gradients."""
    if backend == "reference":
        return reference.sweep(image, text, scale, volume)
    found, highest = _FORMS[backend].forward(image, text, scale, volume=volume, highest=True)
    return image.new_empty(0) if found is None else found, highest


@sweep.register_fake
def _(image: Tensor, text: Tensor, scale: float, volume: bool, backend: str) -> tuple[Tensor, Tensor]:
    batch, classes = image.shape[0], text.shape[-3]
    wide = torch.float64 if image.dtype == torch.float64 else torch.float32
    found = image.new_empty((batch, text.shape[-2], classes, image.shape[1]) if volume else (0,))
    return found, image.new_empty((batch, classes), dtype=wide)


@torch.library.custom_op("infoclip::cost_volume_backward", mutates_args=())
def cost_volume_backward(
    grad: Tensor, image: Tensor, text: Tensor, scale: float, backend: str, need_image: bool, need_text: bool
) -> tuple[Tensor, Tensor]:
    """The gradients in image and text; one that is not needed is an empty tensor."""
    d_image, d_text = _FORMS[backend].backward(grad, image, text, scale, need_image, need_text)
    return (
        image.new_empty(0) if d_image is None else d_image,
        text.new_empty(0) if d_text is None else d_text,
    )


@cost_volume_backward.register_fake
def _(
    grad: Tensor, image: Tensor, text: Tensor, scale: float, backend: str, need_image: bool, need_text: bool
) -> tuple[Tensor, Tensor]:
    return (
        image.new_empty(image.shape if need_image else (0,)),
        text.new_empty(text.shape if need_text else (0,)),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    image, text, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(image, text)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    image, text = ctx.saved_tensors
    need_image, need_text = ctx.needs_input_grad[:2]
    d_image, d_text = cost_volume_backward(grad, image, text, ctx.scale, ctx.backend, need_image, need_text)
    return d_image if need_image else None, d_text if need_text else None, None, None


cost_volume.register_autograd(_backward, setup_context=_setup)
