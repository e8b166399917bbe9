"""The native form: C++ on the CPU, CUDA C++ on the GPU (``csrc/cost_volume``). Outputs are allocated here."""

from __future__ import annotations

import torch
from torch import Tensor

from infoclip import native
from infoclip.kernels.aot import NativeKernels
from infoclip.native import why_not

__all__ = ["AOT", "backward", "forward", "why_not"]

AOT = NativeKernels(
    matrix=(r"\bproducts<",),
    dynamic_shared={r"\bproducts<[^>]*128": 61_824, r"\bproducts<[^>]*64": 31_104},
)
"""Shared memory: ``Shape::SHARED`` of ``csrc/common/tile.cuh``."""


def forward(
    image: Tensor,  # [B, N, d]
    text: Tensor,  # [T, P, d] or [B, T, P, d]
    scale: float,
    volume: bool = True,
    highest: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """The volume [B, P, T, N] and each class's largest similarity [B, T] in fp32 (fp64), as they are asked for."""
    classes, prompts = text.shape[-3:-1]
    wide = torch.float64 if image.dtype == torch.float64 else torch.float32
    apart = highest and image.is_cuda  # the CUDA form writes the volume alone
    out = most = None
    if volume or apart:
        out = image.new_empty(image.shape[0], prompts, classes, image.shape[1])
    if highest and not apart:
        most = image.new_empty((image.shape[0], classes), dtype=wide)
    native.cost_volume_forward(image, text, out, scale, highest=most)
    if apart and out is not None:
        most = out.amax(dim=(1, 3)).to(wide)
    return out if volume else None, most


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
