"""InfoNCE of the objective's sample sets: the pixels of an alignment map (T entries each) and CLIP's embeddings (d)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import ALLOCATOR, Case, Problem, Sizes, Suite
from infoclip.kernels.infonce import infonce

TEMPERATURE = 0.1


def sample_set_cases() -> list[Case]:
    """B, N, D: the recipe's maps and embeddings, on its grid and one of twice the side; one image to N = 65536."""
    from bench.shapes import shapes_of

    base = shapes_of("infoclip-vitb16-coco")

    def case(b: int, n: int, d: int, **more: Any) -> Case:
        return Case(f"B{b} N{n} D{d}", (b, n, d), n=n, **more)

    found = [
        case(base.batch, base.pixels * times**2, d, published=times == 1 and d == base.classes)
        for times in (1, 2)
        for d in (base.classes, base.dim)
    ]
    series: dict[str, Any] = {"series": f"one image, {base.classes} classes"}
    found += [case(1, base.pixels * times**2, base.classes, **series) for times in (1, 2, 4)]
    return [*found, case(1, 65536, base.classes, once=("native", "triton"), **series)]


def sample_sets(sizes: Sizes) -> tuple[Tensor, Tensor]:
    b, n, d = sizes
    generator = torch.Generator().manual_seed(0)
    x, y = (F.normalize(torch.randn(b, n, d, generator=generator), dim=-1) for _ in range(2))
    return x, y


def chunked(x: Tensor, y: Tensor) -> Tensor:
    """Both directions by torch's own chunked linear cross-entropy, image by image."""
    target = torch.arange(x.shape[1], device=x.device)
    options = torch.nn.LinearCrossEntropyOptions()
    losses = [
        F.linear_cross_entropy(a / TEMPERATURE, b, target, options=options)
        for one, other in zip(x, y, strict=True)
        for a, b in ((one, other), (other, one))
    ]
    return torch.stack(losses).mean()


def operations(sizes: Sizes) -> tuple[float, float]:
    """One product forward and two backward, as with the matrix of logits at hand; without it there is one more."""
    b, n, d = sizes
    product = 2.0 * b * n * n * d
    return product, 2 * product


def traffic(sizes: Sizes, entry: int) -> tuple[float, float]:
    b, n, d = sizes
    return entry * 2 * b * n * d, entry * 4 * b * n * d


def bound(sizes: Sizes, device: str, dtype: str, packed: int) -> float:
    """``kernels/infonce/README.md``: both gradients, what the backward holds, what malloc keeps of the forward."""
    b, n, d = sizes
    entry = 4 if dtype == "float32" else 2
    results = entry * 2 * b * n * d + 4 * 2 * b * n  # with the vectors that are saved
    if device == "cuda":
        return results + 260 * 2 * b * n
    together = min(b, max(1, 4096 // n))  # images in work at once
    n, d = -(-n // 192) * 192, -(-d // 32) * 32
    own = together * (3 * packed * 2 * n * d + 4 * 2 * n * d + 4 * 4 * 2 * n)
    return results + own + 2 * 288 * 1024 + ALLOCATOR


SUITES = (
    Suite(
        op="infonce",
        cases=sample_set_cases,
        make=lambda sizes: Problem(lambda backend, x, y: infonce(x, y, TEMPERATURE, backend=backend).loss,
                                   sample_sets(sizes)),
        tiny=(2, 200, 24),
        operations=operations,
        traffic=traffic,
        bound=bound,
        rivals={"torch-chunked": chunked} if hasattr(F, "linear_cross_entropy") else {},
    ),
)  # fmt: skip
