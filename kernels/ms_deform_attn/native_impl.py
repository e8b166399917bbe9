"""The native form: C++ on the CPU, CUDA C++ on the GPU (``csrc/ms_deform_attn``). Outputs are allocated here."""

from __future__ import annotations

import torch
from torch import Tensor

from infoclip import native
from infoclip.native import why_not

from .cells import level_table, sort_samples

__all__ = ["backward", "forward", "why_not"]


def forward(
    value: Tensor,  # [B, S, M, D]
    shapes: list[int],
    locations: Tensor,  # [B, Q, M, L, P, 2] contiguous
    weights: Tensor,  # [B, Q, M, L, P] contiguous
) -> Tensor:  # [B, Q, M, D]
    out = value.new_empty(value.shape[0], locations.shape[1], *value.shape[2:])
    native.ms_deform_attn_forward(_rows(value), shapes, locations, weights, out, _levels(shapes, value))
    return out


def backward(
    grad: Tensor,  # [B, Q, M, D] contiguous
    value: Tensor,  # [B, S, M, D]
    shapes: list[int],
    locations: Tensor,  # [B, Q, M, L, P, 2] contiguous
    weights: Tensor,  # [B, Q, M, L, P] contiguous
    need_value: bool,
    need_points: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    d_value = torch.empty_like(value, memory_format=torch.contiguous_format) if need_value else None
    d_locations = torch.empty_like(locations) if need_points else None
    d_weights = torch.empty_like(weights) if need_points else None
    order, starts = sort_samples(tuple(shapes), locations) if need_value and value.is_cuda else (None, None)
    native.ms_deform_attn_backward(
        grad, _rows(value), shapes, locations, weights, d_value, d_locations, d_weights,
        _levels(shapes, value), order, starts,
    )  # fmt: skip
    return d_value, d_locations, d_weights


def _rows(value: Tensor) -> Tensor:
    return value if value.stride(-1) == 1 or value.shape[-1] == 1 else value.contiguous()


def _levels(shapes: list[int], value: Tensor) -> Tensor | None:
    return level_table(tuple(shapes), value.device) if value.is_cuda else None
