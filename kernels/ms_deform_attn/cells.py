"""Samples sorted by the cell they fall into: what lets a GPU gather the value's gradient without atomics.

A level of h x w pixels has (h + 1) x (w + 1) cells, the squares between four neighbouring pixels and the border around
them; cell (i, j) has pixel (i, j) as its lower right corner. A pixel's gradient comes from the samples of four cells.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["level_table", "sort_samples"]


@functools.lru_cache(maxsize=64)
def level_table(shapes: tuple[int, ...], device: torch.device) -> Tensor:  # [L, 4] int32
    """Height, width, first pixel and first cell of each level, kept on the device for the next call."""
    rows = []
    pixel = cell = 0
    for h, w in zip(shapes[::2], shapes[1::2], strict=True):
        rows.append((h, w, pixel, cell))
        pixel, cell = pixel + h * w, cell + (h + 1) * (w + 1)
    return torch.tensor(rows, dtype=torch.int32).to(device)


def sort_samples(
    shapes: tuple[int, ...],
    locations: Tensor,  # [B, Q, M, L, P, 2]
) -> tuple[Tensor, Tensor]:
    """Indices into the flat [B, Q, M, L, P] samples, cell after cell, and where each cell begins.

    Returns:
        ``order`` [B Q M L P] int64, samples outside every map last, and ``starts`` [B M cells + 1] int64. The sort is
        stable, so that a cell's samples keep their order and a sum over them its bits.
    """
    B, M = locations.shape[0], locations.shape[2]
    table = level_table(shapes, locations.device).long()
    h, w, first = (table[:, i, None] for i in (0, 1, 3))  # [L, 1]
    cells = sum((a + 1) * (b + 1) for a, b in zip(shapes[::2], shapes[1::2], strict=True))
    x, y = locations[..., 0] * w - 0.5, locations[..., 1] * h - 0.5
    inside = (x > -1) & (y > -1) & (x < w) & (y < h)
    # What is not finite is not inside; it is kept from the conversion, which has no meaning for it.
    column = torch.where(inside, x, 0.0).floor().long() + 1
    row = torch.where(inside, y, 0.0).floor().long() + 1
    device = locations.device
    plane = torch.arange(B, device=device)[:, None, None] * M + torch.arange(M, device=device)  # [B, 1, M]
    key = plane[..., None, None] * cells + first + row * (w + 1) + column
    key = torch.where(inside, key, B * M * cells).flatten()
    key, order = torch.sort(key, stable=True)
    starts = torch.searchsorted(key, torch.arange(B * M * cells + 1, device=device))
    return order, starts
