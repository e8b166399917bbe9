"""Renyi's mutual information of the same sample sets as ``suite_infonce``, at order 2."""

from __future__ import annotations

from bench.harness import ALLOCATOR, Problem, Sizes, Suite
from bench.suite_infonce import sample_set_cases, sample_sets, traffic
from infoclip.kernels.renyi_mutual_information import renyi_mutual_information


def operations(sizes: Sizes) -> tuple[float, float]:
    """Of each of the two symmetric Gram matrices half a product, and two products backward."""
    b, n, d = sizes
    product = 2.0 * b * n * n * d
    return product, 2 * product


def bound(sizes: Sizes, device: str, dtype: str, packed: int) -> float:
    """``kernels/renyi_mutual_information/README.md``: the gradients as made and as handed out, and the sweep's own."""
    b, n, d = sizes
    results = (
        (4 + (4 if dtype == "float32" else 6)) * 2 * b * n * d
    )  # for a half, its product in fp32 is there a moment
    views, entries = 2, 2 * d
    if device == "cuda":
        return results + b * ((4 * views * n * n if views * n <= 4 * entries else 0) + 9 * views * n + 16384)
    n, d = -(-n // 96) * 96, -(-d // 32) * 32
    if views * n <= 4 * entries:
        own = 2 * views * n * (n + 192)
    else:
        blocks = n // 96
        own = 16 * n * 2 * d + 12 * 2 * d * d + 100 * n + 16 * blocks * (blocks + 1)
    together = min(b, max(1, 4096 // n))  # sets in work at once
    return results + together * own + ALLOCATOR


SUITES = (
    Suite(
        op="renyi_mutual_information",
        cases=sample_set_cases,
        make=lambda sizes: Problem(
            lambda backend, x, y: renyi_mutual_information(x, y, backend=backend), sample_sets(sizes)
        ),
        tiny=(2, 200, 24),
        operations=operations,
        traffic=traffic,
        bound=bound,
        # The value is a difference of logarithms near 10, in bits: float32 sums in another order.
        slack={"float32": 1e-4, "float16": 4e-3, "bfloat16": 2e-2},
    ),
)
