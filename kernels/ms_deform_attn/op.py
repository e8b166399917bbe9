"""The op as torch knows it: schema, fake, autograd. Precision is the public function's: it casts before it calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import native_impl, triton_impl

__all__ = ["ms_deform_attn"]

_FORMS: dict[str, Any] = {"native": native_impl, "triton": triton_impl}


@torch.library.custom_op("infoclip::ms_deform_attn", mutates_args=())
def ms_deform_attn(value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor, backend: str) -> Tensor:
    """Sums of samples [B, Q, M, D] of value [B, S, M, D] at locations [B, Q, M, L, P, 2]; shapes: h, w, h, w, ..."""
    return _FORMS[backend].forward(value, shapes, locations.contiguous(), weights.contiguous())


@ms_deform_attn.register_fake
def _(value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor, backend: str) -> Tensor:
    return value.new_empty(value.shape[0], locations.shape[1], *value.shape[2:])


@torch.library.custom_op("infoclip::ms_deform_attn_backward", mutates_args=())
def ms_deform_attn_backward(
    grad: Tensor,
    value: Tensor,
    shapes: list[int],
    locations: Tensor,
    weights: Tensor,
    backend: str,
    need_value: bool,
    need_points: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients in value, locations and weights; one that is not needed is an empty tensor."""
    found = _FORMS[backend].backward(
        grad.contiguous(), value, shapes, locations.contiguous(), weights.contiguous(), need_value, need_points
    )
    d_value, d_locations, d_weights = (
        like.new_empty(0) if d is None else d for d, like in zip(found, (value, locations, weights), strict=True)
    )
    return d_value, d_locations, d_weights


@ms_deform_attn_backward.register_fake
def _(
    grad: Tensor,
    value: Tensor,
    shapes: list[int],
    locations: Tensor,
    weights: Tensor,
    backend: str,
    need_value: bool,
    need_points: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        value.new_empty(value.shape if need_value else (0,)),
        locations.new_empty(locations.shape if need_points else (0,)),
        weights.new_empty(weights.shape if need_points else (0,)),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.shapes, locations, weights, ctx.backend = inputs
    ctx.save_for_backward(value, locations, weights)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
    value, locations, weights = ctx.saved_tensors
    need_value, _, need_locations, need_weights, _ = ctx.needs_input_grad
    need_points = need_locations or need_weights  # the same products give both
    d_value, d_locations, d_weights = ms_deform_attn_backward(
        grad, value, ctx.shapes, locations, weights, ctx.backend, need_value, need_points
    )
    return (
        d_value if need_value else None,
        None,
        d_locations if need_locations else None,
        d_weights if need_weights else None,
        None,
    )


ms_deform_attn.register_autograd(_backward, setup_context=_setup)
