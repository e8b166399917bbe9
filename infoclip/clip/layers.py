"""The transformer of both CLIP towers, with q, k and v as separate parameters.

Parameter names below a tower are those of CAT-Seg's CLIP (``resblocks.N.attn.q_proj_weight``, ``in_proj_bias``, ...),
so that its state dicts map one to one, and so that q and v can learn while k stays (CAT-Seg, section 3.4).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infoclip.attention import attention
from infoclip.clip.architecture import Activation, Tower

__all__ = ["Attention", "Block", "LayerNorm", "LayerScale", "QuickGELU", "Transformer"]


class LayerNorm(nn.LayerNorm):
    """Layer normalisation computed in float32 at least; the result has the input's dtype.

    Under bf16 autocast the statistics of a half-precision input would lose most of their digits.
    """

    def forward(self, input: Tensor) -> Tensor:  # [..., C]
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        # Autocast leaves layer_norm of a float32 input in float32 on every device.
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).to(input.dtype)


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``, the activation that the OpenAI weights were trained with."""

    def forward(self, x: Tensor) -> Tensor:  # [..., C]
        return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[Activation, Callable[[], nn.Module]] = {
    "quick_gelu": QuickGELU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
}


class LayerScale(nn.Module):
    """A learnt factor for each channel of a residual branch; few CLIPs have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-4))

    def forward(self, x: Tensor) -> Tensor:  # [..., C]
        return x * self.gamma


class _ZeroGradient(torch.autograd.Function):
    """Identity in ``x`` that gives every further argument a gradient of exact zeros.

    The value path leaves q and k of the last block without use. The published code projects them and throws them
    away, so that their gradient is zero instead of missing: AdamW then decays q, and every learning parameter takes
    part in each backward.
    """

    @staticmethod
    def forward(x: Tensor, *unused: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.shapes = [(t.shape, t.dtype, t.device) for t in inputs[1:]]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        zeros = (
            torch.zeros(shape, dtype=dtype, device=device) if needed else None
            for (shape, dtype, device), needed in zip(ctx.shapes, ctx.needs_input_grad[1:], strict=True)
        )
        return (grad, *zeros)


class Attention(nn.Module):
    """Multi-head self-attention with separate q, k, v weights and one joint bias [3 * width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"expected a width divisible by the {heads} heads, given {width}")
        self.heads = heads
        self.q_proj_weight = nn.Parameter(torch.empty(width, width))
        self.k_proj_weight = nn.Parameter(torch.empty(width, width))
        self.v_proj_weight = nn.Parameter(torch.empty(width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:  # [B, N, C] -> [B, N, C]
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, N, C / heads]
            for weight, bias in zip(weights, biases, strict=True)
        )
        y = attention(q, k, v, causal=causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def forward_prefixed(self, x: Tensor, prefix: int, texts: int) -> Tensor:  # [prefix + texts * n, C] -> the same
        """Causal attention of texts whose first ``prefix`` tokens are the same, given once, before the texts' own.

        A causal token sees nothing after it, so that the shared tokens' keys and values are the same in every text.
        """
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = self.in_proj_bias.chunk(3)
        shared, own = [], []
        for weight, bias in zip(weights, biases, strict=True):
            y = F.linear(x, weight, bias).unflatten(-1, (self.heads, -1))  # [prefix + texts * n, heads, C / heads]
            shared.append(y[:prefix].transpose(0, 1)[None])  # [1, heads, prefix, C / heads]
            own.append(y[prefix:].unflatten(0, (texts, -1)).transpose(1, 2))  # [texts, heads, n, C / heads]
        n = own[0].shape[2]
        k, v = (torch.cat([s.expand(texts, -1, -1, -1), o], dim=2) for s, o in zip(shared[1:], own[1:], strict=True))
        mask = k.new_full((n, n), float("-inf")).triu_(1)
        mask = F.pad(mask, (prefix, 0))[None, None]  # everything shared lies before
        first = attention(shared[0], shared[1], shared[2], causal=True).transpose(1, 2).flatten(2).flatten(0, 1)
        rest = attention(own[0], k, v, mask).transpose(1, 2).flatten(2).flatten(0, 1)
        return self.out_proj(torch.cat([first, rest]))

    def value_path(self, x: Tensor) -> Tensor:  # [B, N, C] -> [B, N, C]
        """``out_proj(v)`` of each token by itself: what attention gives a token that looks only at itself."""
        v = F.linear(x, self.v_proj_weight, self.in_proj_bias.chunk(3)[2])
        y = self.out_proj(v)
        if torch.is_grad_enabled() and (self.q_proj_weight.requires_grad or self.k_proj_weight.requires_grad):
            y = _ZeroGradient.apply(y, self.q_proj_weight, self.k_proj_weight)
        return y


class Block(nn.Module):
    """Pre-norm residual block: attention, then a two-layer MLP."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.attn = Attention(tower.width, tower.heads)
        self.ln_1 = LayerNorm(tower.width, eps=tower.eps)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(tower.width, tower.mlp_width),
                gelu=_ACTIVATIONS[tower.activation](),
                c_proj=nn.Linear(tower.mlp_width, tower.width),
            )
        )
        self.ln_2 = LayerNorm(tower.width, eps=tower.eps)
        self.ls_1 = LayerScale(tower.width) if tower.layer_scale else nn.Identity()
        self.ls_2 = LayerScale(tower.width) if tower.layer_scale else nn.Identity()

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:  # [B, N, C] -> [B, N, C]
        x = x + self.ls_1(self.attn(self.ln_1(x), causal))
        return x + self.ls_2(self.mlp(self.ln_2(x)))

    def forward_prefixed(self, x: Tensor, prefix: int, texts: int) -> Tensor:  # [prefix + texts * n, C] -> the same
        """:meth:`forward`, causal, for texts that begin alike (:meth:`Attention.forward_prefixed`)."""
        x = x + self.ls_1(self.attn.forward_prefixed(self.ln_1(x), prefix, texts))
        return x + self.ls_2(self.mlp(self.ln_2(x)))

    def forward_value(self, x: Tensor, class_residual: bool) -> Tensor:  # [B, N, C] -> [B, N, C]
        """The block with its attention replaced by the value path.

        Args:
            class_residual: add the class token alone to every token, as the published CAT-Seg does, instead of each
                token's own residual stream.
        """
        y = self.ls_1(self.attn.value_path(self.ln_1(x)))
        y = y + (x[:, :1] if class_residual else x)
        return y + self.ls_2(self.mlp(self.ln_2(y)))


class Transformer(nn.Module):
    """The blocks of one tower."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(tower) for _ in range(tower.layers))

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:  # [B, N, C] -> [B, N, C]
        for block in self.resblocks:
            x = block(x, causal)
        return x

    def forward_prefixed(self, x: Tensor, prefix: int) -> Tensor:  # [M, L, C] -> [M, L - prefix, C]
        """The blocks, causal, on texts whose first ``prefix`` tokens are the same: computed once for all of them."""
        texts = x.shape[0]
        x = torch.cat([x[0, :prefix], x[:, prefix:].flatten(0, 1)])
        for block in self.resblocks:
            x = block.forward_prefixed(x, prefix, texts)  # type: ignore[operator]
        return x[prefix:].unflatten(0, (texts, -1))
