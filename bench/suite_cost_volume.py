"""The cost volume at the sizes of the recipes: each pixel's cosine similarity with each prompt.

Beside it the two forms of the room: the volume of the most similar classes alone, and the volume with its embedding
convolution behind it, which never stores it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.harness import ALLOCATOR, Case, Problem, Sizes, Suite
from infoclip.kernels import BACKENDS
from infoclip.kernels.cost_volume import cost_embedding, cost_volume, cost_volume_topk
from infoclip.kernels.cost_volume.embedding import CHUNK_BYTES

KERNEL = 7  # of the embedding, as published


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


def features(b: int, n: int, t: int, p: int, d: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    # The image features are a map [B, d, h, w], read as [B, N, d] without a copy, as the model passes them.
    image = torch.randn(b, d, n, generator=generator).transpose(1, 2)
    return image, torch.randn(t, p, d, generator=generator)


def make(sizes: Sizes) -> Problem:
    b, n, t, p, _ = sizes
    return Problem(
        lambda backend, image, text: cost_volume(image, text, backend=backend), features(*sizes), result=(b, p, t, n)
    )


def operations(sizes: Sizes) -> tuple[float, float]:
    b, n, t, p, d = sizes
    product = 2.0 * b * n * t * p * d
    return product, 2 * product


def traffic(sizes: Sizes, entry: int) -> tuple[float, float]:
    b, n, t, p, d = sizes
    inputs, volume = b * n * d + t * p * d, b * p * t * n
    return entry * (inputs + volume), entry * (2 * inputs + volume)


def bytes_of(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def bound(sizes: Sizes, device: str, dtype: str, packed: int) -> float:
    """``kernels/cost_volume/README.md``: the volume and both gradients, and what forward and backward hold."""
    b, n, t, p, d = sizes
    entry = bytes_of(dtype)
    rows = t * p
    results = entry * (b * rows * n + b * n * d + rows * d)
    if device == "cuda":
        return results + 4 * (b * n + rows) + 4 * (b * n * d + rows * d)
    n, rows, d = (-(-side // 32) * 32 for side in (n, rows, d))  # panels are rounded up to the register block
    own = packed * (2 * rows * n + rows * d + n * d) + 4 * (rows * d + n * d) + 4 * (rows + n)
    return results + own + ALLOCATOR


# The most similar classes ---------------------------------------------------------------------------------------------


def top_cases() -> list[Case]:
    """B, N, T, P, d, k: the vocabulary of A-847 cut to the recipe's number of classes, and the scenes' to a half."""
    from bench.shapes import shapes_of, vocabulary

    scenes, base, classes = shapes_of("scenes"), shapes_of("catseg-vitb16-coco"), vocabulary("a847")

    def case(name, shapes, batch, t, k, **more) -> Case:  # type: ignore[no-untyped-def]
        sizes = (batch, shapes.pixels, t, shapes.prompts, shapes.dim, k)
        return Case(f"{name} B{batch} N{shapes.pixels} T{t} k{k} d{shapes.dim}", sizes, n=shapes.pixels, **more)

    return [
        case("scenes", scenes, scenes.batch, scenes.classes, scenes.classes // 2),
        case("vitb16", base, 1, classes, base.kept),
        case("vitb16", base, base.batch, classes, base.kept, published=True),
    ]


def make_top(sizes: Sizes) -> Problem:
    *shape, k = sizes
    b, n, _, p, _ = shape
    return Problem(
        lambda backend, image, text: cost_volume_topk(image, text, k, backend=backend).volume,
        features(*shape),
        result=(b, p, k, n),
    )


def top_operations(sizes: Sizes) -> tuple[float, float]:
    """Every class forward, the chosen ones backward."""
    b, n, t, p, d, k = sizes
    return operations((b, n, t, p, d))[0], operations((b, n, k, p, d))[1]


def top_traffic(sizes: Sizes, entry: int) -> tuple[float, float]:
    b, n, t, p, d, k = sizes
    inputs, volume = b * n * d + t * p * d, b * p * k * n
    return entry * (inputs + volume), entry * (2 * inputs + volume)


def top_bound(sizes: Sizes, device: str, dtype: str, packed: int) -> float:
    """``kernels/cost_volume/README.md``: the volume of the chosen classes with what it holds, its text an image's own
    and picked by an index as large, and the text's gradient before it is summed over images; the sweep's panels are
    gone by then, but malloc keeps them.
    """
    b, n, t, p, d, k = sizes
    entry = bytes_of(dtype)
    chosen = entry * (2 * b * k * p * d + b * t * p * d + t * p * d) + 8 * b * k * p * d
    if device == "cuda":
        return bound((b, n, k, p, d), device, dtype, packed) + chosen + entry * b * p * t * n
    rows, pixels, d = (-(-side // 32) * 32 for side in (t * p, n, d))
    sweep = packed * (rows + pixels) * d + 4 * (rows + pixels) + 4 * rows * -(-pixels // 128) + 4 * b * t
    return bound((b, n, k, p, d), device, dtype, packed) + chosen + sweep


# The embedded volume --------------------------------------------------------------------------------------------------


def embedding_cases() -> list[Case]:
    """B, side of the grid, T, P, d, C: 80 prompts a class; A-847 is too large for rounds."""
    from bench.shapes import shapes_of, vocabulary
    from infoclip.clip.templates import resolve_templates

    scenes, base = shapes_of("scenes"), shapes_of("catseg-vitb16-coco")
    prompts = len(resolve_templates("imagenet"))

    def case(name, shapes, batch, t, p, **more) -> Case:  # type: ignore[no-untyped-def]
        sizes = (batch, shapes.grid, t, p, shapes.dim, shapes.hidden)
        return Case(f"{name} B{batch} N{shapes.pixels} T{t} P{p} d{shapes.dim}", sizes, n=shapes.pixels, **more)

    return [
        case("scenes", scenes, scenes.batch, scenes.classes, prompts),
        case("vitb16", base, 1, base.classes, base.prompts),
        case("vitb16", base, 1, vocabulary("pc59"), prompts),
        case("vitb16", base, 1, vocabulary("a847"), prompts, once=BACKENDS, published=True),
    ]


def make_embedding(sizes: Sizes) -> Problem:
    b, side, t, p, d, c = sizes
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(c, p, KERNEL, KERNEL, generator=generator) / (p * KERNEL**2) ** 0.5
    return Problem(
        lambda backend, image, text, weight, bias: cost_embedding(
            image, text, weight, bias, (side, side), backend=backend
        ),
        (*features(b, side * side, t, p, d), weight, torch.randn(c, generator=generator)),
        result=(b, t, c, side, side),
    )


def embedding_operations(sizes: Sizes) -> tuple[float, float]:
    """Volume and convolution; backward both gradients of each."""
    b, side, t, p, d, c = sizes
    once = 2.0 * b * side**2 * t * p * (d + c * KERNEL**2)
    return once, 2 * once


def embedding_traffic(sizes: Sizes, entry: int) -> tuple[float, float]:
    b, side, t, p, d, c = sizes
    inputs, result = b * side**2 * d + t * p * d + c * p * KERNEL**2, b * t * c * side**2
    return entry * (inputs + result), entry * (2 * inputs + result)


def embedding_bound(sizes: Sizes, device: str, dtype: str, packed: int) -> float:
    """``kernels/cost_volume/README.md``: result and gradients (summed in fp32), and of a chunk of classes the volume
    three times, its part of the result twice, and what making it and its gradient hold."""
    b, side, t, p, d, c = sizes
    entry, n = bytes_of(dtype), side * side
    weight = c * p * KERNEL**2
    chunk = max(1, min(t, CHUNK_BYTES[device] // (b * n * p * entry)))
    results = entry * b * t * c * n + (entry + 4) * (b * n * d + weight) + entry * t * p * d
    of_chunk = entry * b * chunk * n * (3 * p + 2 * c)
    return results + of_chunk + bound((b, n, chunk, p, d), device, dtype, packed) + 3 * 4 * weight


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
    Suite(
        op="cost_volume",
        name="cost_volume_topk",
        cases=top_cases,
        make=make_top,
        tiny=(2, 40, 12, 2, 16, 5),
        operations=top_operations,
        traffic=top_traffic,
        bound=top_bound,
    ),
    Suite(
        op="cost_volume",
        name="cost_embedding",
        cases=embedding_cases,
        make=make_embedding,
        tiny=(2, 6, 5, 3, 16, 8),
        operations=embedding_operations,
        traffic=embedding_traffic,
        bound=embedding_bound,
    ),
)
