"""The op as torch knows it: schema, fake, autograd. The forward makes the gradient in the same sweep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import native_impl, triton_impl

__all__ = ["upsample_bce"]

_FORMS: dict[str, Any] = {"native": native_impl, "triton": triton_impl}


@torch.library.custom_op("infoclip::upsample_bce", mutates_args=())
def upsample_bce(
    logits: Tensor, target: Tensor, ignore_index: int, masked: bool, need_grad: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """The loss [] of logits [B, T, h, w] and target [B, H, W], and its gradient [B, T, h, w] (empty if not needed)."""
    return _FORMS[backend].forward(logits, target, ignore_index, masked, need_grad)


@upsample_bce.register_fake
def _(
    logits: Tensor, target: Tensor, ignore_index: int, masked: bool, need_grad: bool, backend: str
) -> tuple[Tensor, Tensor]:
    precise = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return (
        logits.new_empty((), dtype=precise),
        logits.new_empty(logits.shape if need_grad else (0,), dtype=precise),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_loss: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None, None, None, None, None]:
    (grad,) = ctx.saved_tensors
    return (None if d_loss is None else (grad * d_loss).to(ctx.dtype)), None, None, None, None, None


upsample_bce.register_autograd(_backward, setup_context=_setup)
