"""The cost volume at the sizes of the recipes: each pixel's cosine similarity with each prompt."""

from __future__ import annotations

import torch

from bench.harness import ALLOCATOR, Case, Problem, Sizes, Suite
from infoclip.kernels.cost_volume import cost_volume


def cases() -> list[Case]:
    """B, N, T, P, d."""
    from bench.shapes import shapes_of, vocabulary

    scenes, base, large = (shapes_of(name) for name in ("scenes", "catseg-vitb16-coco", "catseg-vitl14-coco"))

    def case(name, shapes, batch, times=1, classes=None, **more) -> Case:  # type: ignore[no-untyped-def]
        b, n, t = batch, shapes.pixels * times**2, classes or shapes.classes
        sizes = (b, n, t, shapes.prompts, shapes.dim)
        return Case(f"{name} B{b} N{n} T{t} d{shapes.dim}", sizes, n=n, **more)

    series = {"series": "one image"}
    return [
        case("scenes", scenes, scenes.batch),
        case("vitb16", base, 1, **series),
        case("vitb16", base, base.batch, published=True),
        case("vitb16", base, base.batch, times=2),
        case("vitb16", base, 1, times=4, **series),
        case("vitb16", base, 1, times=8, **series),
        case("vitl14", large, 1, classes=vocabulary("a847")),
    ]


def make(sizes: Sizes) -> Problem:
    b, n, t, p, d = sizes
    generator = torch.Generator().manual_seed(0)
    # The image features are a map [B, d, h, w], read as [B, N, d] without a copy, as the model passes them.
    image = torch.randn(b, d, n, generator=generator).transpose(1, 2)
    text = torch.randn(t, p, d, generator=generator)
    return Problem(
        lambda backend, image, text: cost_volume(image, text, backend=backend), (image, text), result=(b, p, t, n)
    )


def operations(sizes: Sizes) -> tuple[float, float]:
    b, n, t, p, d = sizes
    product = 2.0 * b * n * t * p * d
    return product, 2 * product


def traffic(sizes: Sizes, entry: int) -> tuple[float, float]:
    b, n, t, p, d = sizes
    inputs, volume = b * n * d + t * p * d, b * p * t * n
    return entry * (inputs + volume), entry * (2 * inputs + volume)


def bound(sizes: Sizes, device: str, dtype: str, packed: int) -> float:
    """``kernels/cost_volume/README.md``: the volume and both gradients, and what forward and backward hold."""
    b, n, t, p, d = sizes
    entry = 4 if dtype == "float32" else 2
    rows = t * p
    results = entry * (b * rows * n + b * n * d + rows * d)
    if device == "cuda":
        return results + 4 * (b * n + rows) + 4 * (b * n * d + rows * d)
    n, rows, d = (-(-side // 32) * 32 for side in (n, rows, d))  # panels are rounded up to the register block
    own = packed * (2 * rows * n + rows * d + n * d) + 4 * (rows * d + n * d) + 4 * (rows + n)
    return results + own + ALLOCATOR


SUITES = (
    Suite(
        op="cost_volume",
        cases=cases,
        make=make,
        tiny=(2, 40, 5, 1, 16),
        operations=operations,
        traffic=traffic,
        bound=bound,
    ),
)
