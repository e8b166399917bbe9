"""The cost volume: each backend that can run here, forward, backward and both, at sizes that the models have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from infoclip import kernels
from infoclip.kernels.cost_volume import cost_volume

kernels.ops()

# name: B, N, T, P, d. The image features are a map [B, d, h, w], read as [B, N, d] without a copy.
CASES = {
    "scenes B16 N196 T52 d128": (16, 196, 52, 1, 128),
    "vitb16 B1 N576 T171 d512": (1, 576, 171, 1, 512),
    "vitb16 B4 N576 T171 d512": (4, 576, 171, 1, 512),
    "vitl14 B1 N576 T847 P4 d768": (1, 576, 847, 4, 768),
}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = {"cpu": [torch.float32], "cuda": [torch.float32, torch.bfloat16]}
WHERE = [(device, dtype) for device in DEVICES for dtype in DTYPES[device]]
BACKENDS = [
    (device, dtype, backend)
    for device, dtype in WHERE
    for backend in kernels.BACKENDS
    if kernels.why_not("cost_volume", backend, device, dtype) is None
]


def timed(benchmark: Any, call: Callable[[], Any], device: str, flop: float, **facts: Any) -> None:
    def step() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info.update(device=device, flop=flop, **facts)
    rounds = 30 if device == "cuda" or flop < 3e9 else 7
    benchmark.pedantic(step, rounds=rounds, warmup_rounds=3)


@pytest.mark.parametrize(("device", "dtype"), WHERE, ids=str)
def test_matrix_rate(benchmark, device, dtype):
    """What torch's own matrix product reaches: the yardstick of the table."""
    side = 1024 if device == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    name = str(dtype).removeprefix("torch.")
    timed(
        benchmark, lambda: a @ b, device, 2.0 * side**3, op="matrix", dtype=name, case=f"{side}^3", part="", backend=""
    )


# The backends vary fastest: what is compared is timed side by side.
@pytest.mark.parametrize(("device", "dtype", "backend"), BACKENDS, ids=str)
@pytest.mark.parametrize("part", ["forward", "backward", "both"])
@pytest.mark.parametrize("case", CASES)
def test_cost_volume(benchmark, device, dtype, backend, case, part):
    b, n, t, p, d = CASES[case]
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(b, d, n, generator=generator).to(device, dtype).transpose(1, 2).requires_grad_()
    text = torch.randn(t, p, d, generator=generator).to(device, dtype).requires_grad_()
    grad = torch.randn(b, p, t, n, generator=generator).to(device, dtype)

    out = cost_volume(image, text, backend=backend)
    want = cost_volume(image, text, backend="reference")
    # Cosines are at most 1: a few roundings of the dtype at most.
    assert (out.float() - want.float()).abs().max() <= (1e-5 if dtype == torch.float32 else 1e-2)
    for got, expected in zip(
        torch.autograd.grad(out, (image, text), grad, retain_graph=True),
        torch.autograd.grad(want, (image, text), grad),
        strict=True,
    ):
        assert (got.float() - expected.float()).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * expected.norm()
    del want

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return cost_volume(image, text, backend=backend)

    calls = {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(out, (image, text), grad, retain_graph=True),
        "both": lambda: torch.autograd.grad(cost_volume(image, text, backend=backend), (image, text), grad),
    }
    flop = 2.0 * b * n * t * p * d * {"forward": 1, "backward": 2, "both": 3}[part]
    facts = {"op": "cost_volume", "dtype": str(dtype).removeprefix("torch."), "case": case, "part": part}
    timed(benchmark, calls[part], device, flop, backend=backend, **facts)
