"""The op as torch knows it: schema, fake, autograd. The forward makes the gradients in the same sweep.

Two or three views x, y, z of the same samples; ``units``, ``weights`` as in ``reference.information``; ``need`` says
which views' gradients are made. All options are lists, one entry a view (``weights`` has the joint entropy's first).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import native_impl, reference, triton_impl

__all__ = ["renyi_information"]

_FORMS: dict[str, Any] = {"native": native_impl, "triton": triton_impl}


def _views(x: Tensor, y: Tensor, z: Tensor | None) -> list[Tensor]:
    return [x, y] if z is None else [x, y, z]


def _precise(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.custom_op("infoclip::renyi_information", mutates_args=())
def renyi_information(
    x: Tensor,
    y: Tensor,
    z: Tensor | None,
    units: Sequence[bool],
    weights: Sequence[int],
    need: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The value [B] of views [B, N, D], and its gradient in each view, in float32 or wider; empty if not needed."""
    views = _views(x, y, z)
    precise = _precise(x)
    options: dict[str, Any] = {"dtype": precise, "device": x.device}
    made = [torch.empty(v.shape, **options) if n else None for v, n in zip(views, need, strict=True)]
    value = torch.empty(x.shape[0], **options)
    if value.numel():
        _FORMS[backend].forward(views, units, weights, value, made)
    grads = [x.new_empty(0, dtype=precise) if g is None else g for g in made]
    if z is None:
        grads.append(x.new_empty(0, dtype=precise))
    return value, grads[0], grads[1], grads[2]


@renyi_information.register_fake
def _(
    x: Tensor,
    y: Tensor,
    z: Tensor | None,
    units: Sequence[bool],
    weights: Sequence[int],
    need: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = [v.new_empty(v.shape if n else (0,), dtype=_precise(v)) for v, n in zip(_views(x, y, z), need, strict=True)]
    made += [x.new_empty(0, dtype=_precise(x)) for _ in range(3 - len(made))]
    return x.new_empty(x.shape[0], dtype=_precise(x)), made[0], made[1], made[2]


@torch.library.custom_op("infoclip::renyi_information_backward", mutates_args=())
def renyi_information_backward(
    grad: Tensor,
    gradients: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    z: Tensor | None,
    units: Sequence[bool],
    weights: Sequence[int],
    need: Sequence[bool],
) -> list[Tensor]:
    """Each needed view's gradient times the incoming one [B], in the view's dtype, in order."""
    kept = [(v, g) for v, g, n in zip(_views(x, y, z), gradients, need, strict=False) if n]
    return [(g * grad[:, None, None]).to(v.dtype) for v, g in kept]


@renyi_information_backward.register_fake
def _(
    grad: Tensor,
    gradients: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    z: Tensor | None,
    units: Sequence[bool],
    weights: Sequence[int],
    need: Sequence[bool],
) -> list[Tensor]:
    return [v.new_empty(v.shape) for v, n in zip(_views(x, y, z), need, strict=True) if n]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, z, ctx.units, ctx.weights, ctx.need, _ = inputs
    ctx.save_for_backward(x, y, z, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x, y, z, *gradients = ctx.saved_tensors
    result: list[Tensor | None] = [None] * 3
    if grad is not None:
        made = renyi_information_backward(grad, gradients, x, y, z, ctx.units, ctx.weights, ctx.need)
        for i, one in zip([i for i, n in enumerate(ctx.need) if n], made, strict=True):
            result[i] = one if ctx.needs_input_grad[i] else None
    return (*result, None, None, None, None)


renyi_information.register_autograd(_backward, setup_context=_setup)


def _setup_twice(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grad, _, x, y, z, ctx.units, ctx.weights, ctx.need = inputs
    ctx.save_for_backward(grad, x, y, z)


def _backward_twice(ctx: Any, cotangents: Sequence[Tensor]) -> tuple[Any, ...]:
    """Second derivatives, rare, are the reference's."""
    grad, x, y, z = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [v.detach().requires_grad_() for v in (grad, *_views(x, y, z))]
        value = reference.information(leaves[1:], ctx.units, ctx.weights)
        wanted = [v for v, n in zip(leaves[1:], ctx.need, strict=True) if n]
        first = torch.autograd.grad(value, wanted, leaves[0], create_graph=True)
        second = torch.autograd.grad(first, leaves, list(cotangents), allow_unused=True)
    d_grad, *d_views = second
    d_views += [None] * (3 - len(d_views))
    # One entry for each of the gradients, which are constants here.
    return (d_grad, [None] * 3, *d_views, None, None, None)


renyi_information_backward.register_autograd(_backward_twice, setup_context=_setup_twice)
