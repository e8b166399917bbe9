"""The native form: C++ on the CPU, CUDA C++ on the GPU (``csrc/cost_volume``). Outputs are allocated here."""

from __future__ import annotations

from torch import Tensor

from infoclip import native
from infoclip.native import why_not

__all__ = ["backward", "forward", "why_not"]


def forward(
    image: Tensor,  # [B, N, d]
    text: Tensor,  # [T, P, d] or [B, T, P, d]
    scale: float,
) -> Tensor:  # [B, P, T, N]
    classes, prompts = text.shape[-3:-1]
    out = image.new_empty(image.shape[0], prompts, classes, image.shape[1])
    native.cost_volume_forward(image, text, out, scale)
    return out


def backward(
    grad: Tensor,  # [B, P, T, N]
    image: Tensor,  # [B, N, d]
    text: Tensor,  # [T, P, d] or [B, T, P, d]
    scale: float,
    need_image: bool,
    need_text: bool,
) -> tuple[Tensor | None, Tensor | None]:
    d_image = image.new_empty(image.shape) if need_image else None
    d_text = text.new_empty(text.shape) if need_text else None
    native.cost_volume_backward(grad, image, text, d_image, d_text, scale)
    return d_image, d_text
