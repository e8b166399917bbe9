"""Bilinear upsampling and one-hot binary cross-entropy as one op: CAT-Seg's segmentation loss, section 3.4."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from infoclip.kernels import choose, register_room
from infoclip.kernels.arguments import check_floats, check_int, check_one_device, check_whole_numbers

from . import native_impl, op, triton_impl
from .reference import upsample_bce as reference

__all__ = ["upsample_bce"]

register_room(
    "upsample_bce",
    triton_impl.why_not,
    native_impl.why_not,
    {
        "cpu": "measured faster than the reference, forward and backward (python -m bench upsample_bce).",
        "cuda": "the kernels' speed on a GPU is not measured yet.",
    },
)


def upsample_bce(
    logits: Tensor,  # [B, T, h, w]
    target: Tensor,  # [B, H, W] whole numbers
    *,
    ignore_index: int = 255,
    ignored: Literal["negative", "masked"] = "negative",
    backend: str | None = None,
) -> Tensor:  # [] float32, float64 for float64 logits
    """Mean binary cross-entropy of every class at every pixel against one-hot labels, in nats.

    CAT-Seg, section 3.4: the logits are resized bilinearly (``align_corners=False``, any factor) to the labels' size
    first. No backend but the reference makes a tensor of that size: extra memory is the gradient, 4 bytes a logit (8
    for float64), and the labels. Any strides. Differentiable once in ``logits``; computed in float32 (float64 for
    float64 logits) whatever autocast says. A logit that is not finite gives a loss that is not finite.

    Args:
        ignore_index: label of pixels without a class.
        ignored: ``negative`` counts those pixels as negatives of every class (published); ``masked`` leaves them out.
            A batch without any labelled pixel then has the loss 0.
        backend: ``reference``, ``triton``, ``native`` or ``auto``; None asks ``INFOCLIP_BACKEND``, then ``auto``.

    Raises:
        TypeError: logits that are no dense floating-point tensor, or labels or an ``ignore_index`` that are not
            whole numbers.
        ValueError: shapes or devices that do not go together, an empty axis, another ``ignored``, an unknown backend
            and, for labels on the CPU, a label that is neither a class nor ``ignore_index`` (on a GPU the check would
            stall the device; such labels count as ignored there).
        infoclip.kernels.BackendUnavailableError: the backend asked for by name cannot run here.
    """
    check_floats(logits=logits)
    check_whole_numbers(target=target)
    check_int("ignore_index", ignore_index)
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index: expected a number of 64 bits, as labels are, got {ignore_index}")
    if logits.dim() != 4:
        raise ValueError(f"logits: expected [B, T, h, w], got {list(logits.shape)}")
    if target.dim() != 3 or target.shape[0] != logits.shape[0]:
        raise ValueError(f"target: expected [{logits.shape[0]}, H, W], got {list(target.shape)}")
    if not logits.numel() or not target.numel():
        raise ValueError(
            f"logits {list(logits.shape)} and target {list(target.shape)}: expected at least one of everything"
        )
    check_one_device(logits=logits, target=target)
    if ignored not in ("negative", "masked"):
        raise ValueError(f"ignored: expected 'negative' or 'masked', got {ignored!r}")
    target = target.long()
    masked = ignored == "masked"
    chosen = choose("upsample_bce", backend, logits.device.type, logits.dtype)
    if chosen == "reference":
        # The check reads the labels, which a graph under compilation cannot; there a strange label counts as ignored.
        if target.device.type == "cpu" and not torch.compiler.is_compiling():
            strange = target[((target < 0) | (target >= logits.shape[1])) & (target != ignore_index)]
            if strange.numel():
                raise native_impl.strange_label(int(strange[0]), logits.shape[1], ignore_index)
        return reference(logits, target, ignore_index, masked)
    need_grad = logits.requires_grad and torch.is_grad_enabled()
    return op.upsample_bce(logits, target, ignore_index, masked, need_grad, chosen)[0]
