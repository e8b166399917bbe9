"""Cosine similarities of every pixel with every prompt: the cost volume of CAT-Seg, section 3.2."""

from __future__ import annotations

import torch
from torch import Tensor

from infoclip.kernels import Op, choose, register

from . import native_impl, op, triton_impl
from .reference import cost_volume as reference

__all__ = ["cost_volume"]

register(
    Op(
        name="cost_volume",
        backends={
            "reference": lambda device, dtype: None,
            "triton": triton_impl.why_not,
            "native": native_impl.why_not,
        },
        auto={"cpu": ("native", "reference"), "cuda": ("reference",)},
        reason={
            "cpu": "measured faster than the reference, forward and backward (python -m bench cost_volume).",
            "cuda": "the kernels' speed on a GPU is not measured yet; cuBLAS stays the default.",
        },
    )
)


def cost_volume(
    image_feats: Tensor,  # [B, N, d]
    text_feats: Tensor,  # [T, P, d] or [B, T, P, d]
    *,
    temperature: float | None = None,
    backend: str | None = None,
) -> Tensor:  # [B, P, T, N]
    """Cosine similarity of each of the N pixels with each of the T classes' P prompts, divided by ``temperature``.

    CAT-Seg, section 3.2: C(i, n) = D(i) . E(n) / (|D(i)| |E(n)|). Neither input need be normalised; a vector shorter
    than 1e-12 is divided by 1e-12 as in ``torch.nn.functional.normalize``, so a zero vector gives zeros. Any strides.
    Differentiable in both inputs.

    float32, float16 and bfloat16 with fp32 norms and sums, rounded once at the end; float64 in ``reference`` and
    in ``native`` on the CPU. Two dtypes are promoted to the wider. Under autocast float inputs are taken in autocast's
    dtype, as a matrix product's would be; norms and sums stay fp32.

    Args:
        backend: ``reference``, ``triton``, ``native`` or ``auto``; None asks ``INFOCLIP_BACKEND``, then ``auto``.

    Raises:
        TypeError: an input is no floating-point tensor.
        ValueError: shapes or devices do not fit, the temperature is not above 0, or the backend is unknown.
        infoclip.kernels.BackendUnavailableError: the backend asked for by name cannot run here.
    """
    for name, value in (("image_feats", image_feats), ("text_feats", text_feats)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        if value.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {value.dtype}")
    if image_feats.dim() != 3:
        raise ValueError(f"image_feats: expected [B, N, d], got {list(image_feats.shape)}")
    batch, _, dim = image_feats.shape
    if text_feats.dim() not in (3, 4) or text_feats.shape[-1] != dim:
        raise ValueError(
            f"text_feats: expected [T, P, {dim}] or [B, T, P, {dim}] beside image_feats {list(image_feats.shape)}, "
            f"got {list(text_feats.shape)}"
        )
    if text_feats.dim() == 4 and text_feats.shape[0] != batch:
        raise ValueError(f"text_feats: expected a batch of {batch} as image_feats has, got {text_feats.shape[0]}")
    if image_feats.device != text_feats.device:
        raise ValueError(
            f"image_feats is on {image_feats.device}, text_feats on {text_feats.device}: expected one device"
        )
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")

    device = image_feats.device.type
    dtype = torch.promote_types(image_feats.dtype, text_feats.dtype)
    if dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    image_feats, text_feats = image_feats.to(dtype), text_feats.to(dtype)
    scale = 1.0 if temperature is None else 1.0 / temperature
    chosen = choose("cost_volume", backend, device, dtype)
    if chosen == "reference":
        return reference(image_feats, text_feats, scale)
    return op.cost_volume(image_feats, text_feats, scale, chosen)
