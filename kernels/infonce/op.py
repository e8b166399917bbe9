"""The op as torch knows it: schema, fake, autograd. The public function checks and promotes before it calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import native_impl, triton_impl

__all__ = ["infonce"]

_FORMS: dict[str, Any] = {"native": native_impl, "triton": triton_impl}


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.custom_op("infoclip::infonce", mutates_args=())
def infonce(
    x: Tensor,
    y: Tensor,
    temperature: Tensor | None,
    scale: float,
    positive: Tensor | None,
    symmetric: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss [], bound [], and what the backward needs: ``rows`` [B, N] and ``columns`` [B, M] (empty if one-way).

    The logits are x y^T times ``scale``, divided by ``temperature`` [] where it is given. ``rows`` is their
    log-sum-exp over each row, ``columns`` over each column less the logarithm of how many rows it is the positive of.
    """
    return _FORMS[backend].forward(x, y, temperature, scale, positive, symmetric)


@infonce.register_fake
def _(
    x: Tensor,
    y: Tensor,
    temperature: Tensor | None,
    scale: float,
    positive: Tensor | None,
    symmetric: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = {"dtype": _wide(x)}
    return (
        x.new_empty((), **like),
        x.new_empty((), **like),
        x.new_empty(x.shape[:2], **like),
        x.new_empty(y.shape[:2] if symmetric else (0,), **like),
    )


@torch.library.custom_op("infoclip::infonce_backward", mutates_args=())
def infonce_backward(
    d_loss: Tensor,
    x: Tensor,
    y: Tensor,
    temperature: Tensor | None,
    scale: float,
    positive: Tensor | None,
    symmetric: bool,
    rows: Tensor,
    columns: Tensor,
    backend: str,
    need_x: bool,
    need_y: bool,
    need_temperature: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients in x, y and the temperature; one that is not needed is an empty tensor."""
    d_x, d_y, d_temperature = _FORMS[backend].backward(
        d_loss, x, y, temperature, scale, positive, symmetric, rows, columns, need_x, need_y, need_temperature
    )
    return (
        x.new_empty(0) if d_x is None else d_x,
        y.new_empty(0) if d_y is None else d_y,
        rows.new_empty(0) if d_temperature is None else d_temperature,
    )


@infonce_backward.register_fake
def _(
    d_loss: Tensor,
    x: Tensor,
    y: Tensor,
    temperature: Tensor | None,
    scale: float,
    positive: Tensor | None,
    symmetric: bool,
    rows: Tensor,
    columns: Tensor,
    backend: str,
    need_x: bool,
    need_y: bool,
    need_temperature: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else (0,)),
        y.new_empty(y.shape if need_y else (0,)),
        rows.new_empty(() if need_temperature else (0,)),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, temperature, ctx.scale, positive, ctx.symmetric, ctx.backend = inputs
    _, _, rows, columns = output
    ctx.save_for_backward(x, y, temperature, positive, rows, columns)
    ctx.mark_non_differentiable(rows, columns)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, d_loss: Tensor | None, d_bound: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None, None]:
    x, y, temperature, positive, rows, columns = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    if d_bound is not None:  # the bound is a constant less the loss
        d_loss = -d_bound if d_loss is None else d_loss - d_bound
    if d_loss is None or not any(need):
        return None, None, None, None, None, None, None
    found = infonce_backward(
        d_loss, x, y, temperature, ctx.scale, positive, ctx.symmetric, rows, columns, ctx.backend, *need
    )
    d_x, d_y, d_temperature = (value if wanted else None for value, wanted in zip(found, need, strict=True))
    return d_x, d_y, d_temperature, None, None, None, None


infonce.register_autograd(_backward, setup_context=_setup)
