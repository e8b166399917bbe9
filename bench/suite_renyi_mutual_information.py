"""Renyi's mutual information: each backend that can run here, forward, and forward with backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.suite_cost_volume import DEVICES, timed
from infoclip import kernels
from infoclip.kernels.renyi_mutual_information import renyi_mutual_information

# name: B, N, D. Rows of an alignment map (D classes), and of CLIP's embeddings.
CASES = {
    "pixels B4 N576 T171": (4, 576, 171),
    "pixels B4 N576 d512": (4, 576, 512),
    "pixels B4 N2304 T171": (4, 2304, 171),
    "pixels B4 N2304 d512": (4, 2304, 512),
}
BACKENDS = [
    (device, dtype, backend)
    for device in DEVICES
    for dtype in (torch.float32, torch.bfloat16)
    for backend in kernels.BACKENDS
    if kernels.why_not("renyi_mutual_information", backend, device, dtype) is None
]


# The backends vary fastest: what is compared is timed side by side.
@pytest.mark.parametrize(("device", "dtype", "backend"), BACKENDS, ids=str)
@pytest.mark.parametrize("part", ["forward", "both"])
@pytest.mark.parametrize("case", CASES)
def test_renyi_mutual_information(benchmark, device, dtype, backend, case, part):
    b, n, d = CASES[case]
    generator = torch.Generator().manual_seed(0)
    x, y = (
        F.normalize(torch.randn(b, n, d, generator=generator), dim=-1).to(device, dtype).requires_grad_()
        for _ in range(2)
    )

    def value(backend: str = backend) -> torch.Tensor:
        return renyi_mutual_information(x, y, backend=backend).sum()

    got, want = value(), value("reference")
    # Four differences of logarithms near 10, in bits: fp32 sums in another order.
    assert abs(got - want) <= 1e-4
    slopes = torch.autograd.grad(got, (x, y)), torch.autograd.grad(want, (x, y))
    slack = 1e-4 if dtype == torch.float32 else 2e-2  # the same; a few roundings to bfloat16
    for one, other in zip(*slopes, strict=True):
        assert (one.float() - other.float()).norm() <= slack * other.float().norm()
    del got, want, slopes

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return value()

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(value(), (x, y))

    # Of each set one product forward and one backward, as the reference's form needs them.
    flop = 2.0 * b * n * n * d * 2 * {"forward": 1, "both": 2}[part]
    facts = {"op": "renyi_mutual_information", "dtype": str(dtype).removeprefix("torch."), "case": case, "part": part}
    timed(benchmark, {"forward": forward, "both": both}[part], device, flop, backend=backend, **facts)
