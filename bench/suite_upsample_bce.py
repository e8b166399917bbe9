"""Up-sampling and cross-entropy at the sizes of the recipes. The gradient is made in the forward."""

from __future__ import annotations

import torch

from bench.harness import ALLOCATOR, Case, Problem, Sizes, Suite
from infoclip.kernels.upsample_bce import upsample_bce

OPERATIONS = 20.0
"""Arithmetic of a sample's loss, and as much again of its slope, by count in the source: a yardstick."""


def cases() -> list[Case]:
    """B, T, side of the logits, side of the labels."""
    from bench.shapes import shapes_of

    scenes, base = shapes_of("scenes"), shapes_of("catseg-vitb16-coco")
    return [
        Case(
            f"{name} B{b} T{shapes.classes} {shapes.logits} to {shapes.labels}",
            (b, shapes.classes, shapes.logits, shapes.labels),
            published=shapes is base and b > 1,
        )
        for name, shapes, b in (("scenes", scenes, scenes.batch), ("vitb16", base, 1), ("vitb16", base, base.batch))
    ]


def make(sizes: Sizes) -> Problem:
    b, t, side, full = sizes
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(b, t, side, side, generator=generator)
    target = torch.randint(0, t, (b, full, full), generator=generator)
    return Problem(
        lambda backend, logits, target: upsample_bce(logits, target, backend=backend), (logits,), fixed=(target,)
    )


def operations(sizes: Sizes) -> tuple[float, float]:
    b, t, _, full = sizes
    return b * t * full**2 * OPERATIONS, b * t * full**2 * OPERATIONS


def traffic(sizes: Sizes, entry: int) -> tuple[float, float]:
    b, t, side, full = sizes
    return entry * b * t * side**2 + 8 * b * full**2, 2 * entry * b * t * side**2


def bound(sizes: Sizes, device: str, dtype: str, packed: int) -> float:
    """``kernels/upsample_bce/README.md``: the gradient as made and as handed out, and the labels as int32."""
    b, t, side, full = sizes
    return (4 + (4 if dtype == "float32" else 6)) * b * t * side**2 + 4 * b * full**2 + ALLOCATOR


SUITES = (
    Suite(
        op="upsample_bce",
        cases=cases,
        make=make,
        tiny=(2, 3, 8, 20),
        operations=operations,
        traffic=traffic,
        bound=bound,
        widened=True,
    ),
)
