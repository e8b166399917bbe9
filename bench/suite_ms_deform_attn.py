"""Multi-scale deformable attention: an encoder layer, whose queries are the pixels of all levels."""

from __future__ import annotations

import torch

from bench.harness import ALLOCATOR, Case, Problem, Sizes, Suite
from infoclip.kernels.ms_deform_attn import ms_deform_attn

HEADS, CHANNELS, POINTS = 8, 32, 4  # as published


def cases() -> list[Case]:
    """B and the levels."""
    from bench.shapes import levels, shapes_of

    scenes = shapes_of("scenes")
    side = scenes.labels
    return [
        Case(f"scenes B{scenes.batch} {side} px", (scenes.batch, levels(side, side))),
        Case("maftplus B1 800 x 1333", (1, levels(800, 1333)), published=True),
    ]


def make(sizes: Sizes) -> Problem:
    b, shapes = sizes
    generator = torch.Generator().manual_seed(0)
    pixels = sum(h * w for h, w in shapes)
    value = torch.randn(b, pixels, HEADS, CHANNELS, generator=generator)
    # Around each pixel's own place, a few pixels wide on every level.
    own = torch.cat([torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w) for h, w in shapes])
    near = torch.randn(b, pixels, HEADS, len(shapes), POINTS, 2, generator=generator)
    near = near * torch.tensor([(2 / w, 2 / h) for h, w in shapes])[:, None]
    locations = own.flip(1)[:, None, None, None] + near
    weights = torch.randn(b, pixels, HEADS, len(shapes) * POINTS, generator=generator).softmax(-1)
    weights = weights.unflatten(-1, (len(shapes), POINTS))
    return Problem(
        lambda backend, value, locations, weights: ms_deform_attn(value, shapes, locations, weights, backend=backend),
        (value,),
        precise=(locations, weights),
        result=(b, pixels, HEADS * CHANNELS),
    )


def operations(sizes: Sizes) -> tuple[float, float]:
    """A sample multiplies and adds four corners; backward twice as much."""
    b, shapes = sizes
    samples = 8.0 * b * sum(h * w for h, w in shapes) * HEADS * CHANNELS * len(shapes) * POINTS
    return samples, 2 * samples


def traffic(sizes: Sizes, entry: int) -> tuple[float, float]:
    b, shapes = sizes
    pixels = b * sum(h * w for h, w in shapes) * HEADS
    points = 4 * 3 * len(shapes) * POINTS
    return pixels * (2 * entry * CHANNELS + points), pixels * (3 * entry * CHANNELS + 2 * points)


def bound(sizes: Sizes, device: str, dtype: str, packed: int) -> float:
    """``kernels/ms_deform_attn/README.md``: the result and the gradients; on a GPU the sort of the samples."""
    b, shapes = sizes
    entry = 4 if dtype == "float32" else 2
    pixels = b * sum(h * w for h, w in shapes) * HEADS
    samples = pixels * len(shapes) * POINTS
    results = pixels * 2 * entry * CHANNELS + 4 * 3 * samples
    if device == "cuda":
        return results + 64 * samples + 8 * b * HEADS * sum((h + 1) * (w + 1) for h, w in shapes)
    level = 0 if dtype == "float32" else 2 * 4 * CHANNELS * max(h * w for h, w in shapes)  # in fp32, one a thread
    return 1.1 * results + level + ALLOCATOR  # a tenth for pages and the allocator


SUITES = (
    Suite(
        op="ms_deform_attn",
        cases=cases,
        make=make,
        tiny=(1, ((2, 3), (4, 5), (8, 9))),
        operations=operations,
        traffic=traffic,
        bound=bound,
        widened=True,
        # Coordinates of up to 168 pixels are rounded in float32, and move their samples by as much.
        slack={"float32": 1e-3, "float16": 4e-3, "bfloat16": 2e-2},
    ),
)
