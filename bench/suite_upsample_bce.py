"""Up-sampling and cross-entropy: each backend that can run here, forward, and forward with backward."""

from __future__ import annotations

import pytest
import torch

from bench.suite_cost_volume import WHERE, timed
from infoclip import kernels
from infoclip.kernels.upsample_bce import upsample_bce

# name: B, T, side of the logits, side of the labels
CASES = {
    "scenes B4 T16 24 to 96": (4, 16, 24, 96),
    "vitb16 B1 T171 96 to 384": (1, 171, 96, 384),
    "vitb16 B4 T171 96 to 384": (4, 171, 96, 384),
}
BACKENDS = [
    (device, dtype, backend)
    for device, dtype in WHERE
    for backend in kernels.BACKENDS
    if kernels.why_not("upsample_bce", backend, device, dtype) is None
]
OPERATIONS = 40.0
"""Arithmetic of a sample with its gradient, by count in the source: a yardstick, not a hardware counter."""


# The backends vary fastest: what is compared is timed side by side.
@pytest.mark.parametrize(("device", "dtype", "backend"), BACKENDS, ids=str)
@pytest.mark.parametrize("part", ["forward", "both"])  # the gradient is made in the forward
@pytest.mark.parametrize("case", CASES)
def test_upsample_bce(benchmark, device, dtype, backend, case, part):
    b, t, side, full = CASES[case]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(b, t, side, side, generator=generator).to(device, dtype).requires_grad_()
    target = torch.randint(0, t, (b, full, full), generator=generator).to(device)

    got, want = (upsample_bce(logits, target, backend=name) for name in (backend, "reference"))
    assert abs(got - want) <= 1e-5 * want  # fp32 sums of 10^8 terms in another order
    slopes = [torch.autograd.grad(value, logits)[0].float() for value in (got, want)]
    assert (slopes[0] - slopes[1]).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * slopes[1].norm()
    del got, want, slopes

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return upsample_bce(logits, target, backend=backend)

    def both() -> torch.Tensor:
        return torch.autograd.grad(upsample_bce(logits, target, backend=backend), logits)[0]

    flop = b * t * full * full * OPERATIONS
    facts = {"op": "upsample_bce", "dtype": str(dtype).removeprefix("torch."), "case": case, "part": part}
    timed(benchmark, {"forward": forward, "both": both}[part], device, flop, backend=backend, **facts)
