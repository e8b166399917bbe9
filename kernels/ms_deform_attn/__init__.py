"""Multi-scale deformable attention (Zhu et al., *Deformable DETR*, equation 3) as one op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from infoclip.kernels import choose, register_room
from infoclip.kernels.arguments import check_floats, check_one_device

from . import native_impl, op, triton_impl
from .reference import ms_deform_attn as reference

__all__ = ["ms_deform_attn"]

register_room(
    "ms_deform_attn",
    triton_impl.why_not,
    native_impl.why_not,
    {
        "cpu": "measured faster than the reference, forward and backward (python -m bench ms_deform_attn).",
        "cuda": "the kernels' speed on a GPU is not measured yet.",
    },
)


def ms_deform_attn(
    value: Tensor,  # [B, S, M, D]
    shapes: Sequence[Sequence[int]] | Tensor,  # L pairs (h, w) with S = sum of h * w
    locations: Tensor,  # [B, Q, M, L, P, 2] x and y in 0..1
    weights: Tensor,  # [B, Q, M, L, P]
    *,
    backend: str | None = None,
) -> Tensor:  # [B, Q, M * D]
    """For each query and head, the weighted sum of P bilinear samples on each of L maps (Deformable DETR, equation 3).

    ``out[b, q, m] = sum over l, p of weights[b, q, m, l, p] * map_l(locations[b, q, m, l, p])``, where map l is the
    level's rows of ``value[b, :, m]``. Location 0 is the left (upper) edge of a map and 1 the right (lower) one; pixel
    centres lie half a pixel in (``align_corners=False``), and corners outside the map are zero. The softmax over
    levels and points is the caller's.

    Value and result share a dtype; locations and weights are taken to float32 (float64 for a float64 value) and all
    sums are in it, whatever autocast says. Any strides: what is not laid out as the kernels need is copied. A location
    that is not finite makes its query NaN. Differentiable once in value, locations and weights; the gradient needs no
    atomics and has the same bits every time, for any number of threads.

    Args:
        shapes: heights and widths, finest or coarsest first as the rows of ``value`` are; a tensor is read on the host.
        backend: ``reference``, ``triton``, ``native`` or ``auto``; None asks ``INFOCLIP_BACKEND``, then ``auto``.

    Raises:
        TypeError: an argument that is no floating-point tensor, or shapes that are not whole numbers.
        ValueError: shapes or devices that do not go together, an empty axis, an unknown backend.
        infoclip.kernels.BackendUnavailableError: the backend asked for by name cannot run here.
    """
    check_floats(value=value, locations=locations, weights=weights)
    levels = _levels(shapes)
    if value.dim() != 4:
        raise ValueError(f"value: expected [B, S, M, D], got {list(value.shape)}")
    B, S, M, _ = value.shape
    if locations.dim() != 6 or locations.shape[0] != B or locations.shape[2:4] != (M, len(levels)):
        raise ValueError(f"locations: expected [{B}, Q, {M}, {len(levels)}, P, 2], got {list(locations.shape)}")
    if locations.shape[-1] != 2 or weights.shape != locations.shape[:-1]:
        raise ValueError(
            f"locations {list(locations.shape)} and weights {list(weights.shape)}: expected [B, Q, M, L, P, 2] and "
            "the same without the last axis"
        )
    if not value.numel() or not locations.numel():
        raise ValueError(
            f"value {list(value.shape)} and locations {list(locations.shape)}: expected at least one of everything"
        )
    if sum(h * w for h, w in levels) != S:
        raise ValueError(f"shapes {levels} hold {sum(h * w for h, w in levels)} pixels; value has {S}")
    check_one_device(value=value, locations=locations, weights=weights)
    precise = torch.float64 if value.dtype == torch.float64 else torch.float32
    locations, weights = locations.to(precise), weights.to(precise)
    chosen = choose("ms_deform_attn", backend, value.device.type, value.dtype)
    if chosen == "reference":
        return reference(value, levels, locations, weights)  # float32 throughout: nothing that autocast would lower
    flat = [side for level in levels for side in level]
    return op.ms_deform_attn(value, flat, locations, weights, chosen).flatten(2)


def _levels(shapes: Sequence[Sequence[int]] | Tensor) -> list[tuple[int, int]]:
    if isinstance(shapes, Tensor):
        if shapes.is_floating_point() or shapes.dim() != 2:
            raise TypeError(f"shapes: expected whole numbers [L, 2], got {list(shapes.shape)} {shapes.dtype}")
        shapes = shapes.tolist()
    levels = [tuple(pair) for pair in shapes]
    for pair in levels:
        if len(pair) != 2 or not all(isinstance(side, (int, torch.SymInt)) for side in pair):
            raise TypeError(f"shapes: expected pairs of whole numbers, got {pair}")
        if min(pair) < 1:
            raise ValueError(f"shapes: expected heights and widths of at least 1, got {pair}")
    if not levels:
        raise ValueError("shapes: expected at least one level")
    return levels
