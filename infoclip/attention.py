"""Softmax attention behind one name: torch's fused operator on every device, and its two passes by themselves."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["attention", "attention_backward", "attention_forward", "has_written_backward"]


def attention(
    q: Tensor,  # [N, h, L, D]
    k: Tensor,  # [N, h, S, D]
    v: Tensor,  # [N, h, S, D]
    mask: Tensor | None = None,  # added to the scores, broadcast to [N, h, L, S]
    causal: bool = False,
) -> Tensor:  # [N, h, L, D]
    """``softmax(q k^T / sqrt(D) + mask) v``; probabilities are not stored.

    On tensors without storage torch would take it apart, and what is counted there would be none of what devices hold:
    there the operator of the CPU stands for all of them.
    """
    if q.is_meta:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask)[0]
    half = q.dtype in (torch.bfloat16, torch.float16) and q.device.type == "cpu"
    if half and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return HalfAttention.apply(q, k, v, mask, causal)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


_aten: Any = torch.ops.aten


def has_written_backward(x: Tensor) -> bool:
    """Whether :func:`attention_forward` gives what :func:`attention_backward` wants on the tensor's device."""
    return x.device.type in ("cpu", "meta")


def attention_forward(
    q: Tensor,  # [N, h, L, D]
    k: Tensor,  # [N, h, S, D]
    v: Tensor,  # [N, h, S, D]
    mask: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor | None]:  # [N, h, L, D]; on the CPU also log-sum-exp of the scores, [N, h, L]
    """:func:`attention` outside autograd, with what its backward pass needs beside the inputs and the result."""
    if has_written_backward(q):
        return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal), None


def attention_backward(
    q: Tensor,  # [N, h, L, D]
    k: Tensor,  # [N, h, S, D]
    v: Tensor,  # [N, h, S, D]
    out: Tensor,  # [N, h, L, D]
    grad: Tensor,  # as out
    lse: Tensor | None,
    mask: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; in half precision on the CPU they are float32.

    The CPU's operator in half precision takes seven times as long as in float32, in which it is computed there. Where
    no log-sum-exp was kept the result is computed again.
    """
    if lse is None:
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        with torch.enable_grad():
            again = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return torch.autograd.grad(again, (q, k, v), grad)  # type: ignore[return-value]
    if q.dtype in (torch.bfloat16, torch.float16):
        q, k, v, out, grad = (x.float() for x in (q, k, v, out, grad))
        mask = None if mask is None else mask.float()
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, causal, attn_mask=mask
    )


class HalfAttention(torch.autograd.Function):
    """:func:`attention` in half precision on the CPU, with :func:`attention_backward`."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
    ) -> Tensor:  # each [N, h, L, D]
        out, lse = attention_forward(q, k, v, mask, causal)
        ctx.save_for_backward(q, k, v, out, lse, mask)
        ctx.causal = causal
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, lse, mask = ctx.saved_tensors
        found = attention_backward(q, k, v, out, grad, lse, mask, ctx.causal)
        return *(x.to(q.dtype) for x in found), None, None
