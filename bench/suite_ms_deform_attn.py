"""Multi-scale deformable attention: each backend that can run here, forward, and forward with backward."""

from __future__ import annotations

import pytest
import torch

from bench.suite_cost_volume import WHERE, timed
from infoclip import kernels
from infoclip.kernels.ms_deform_attn import ms_deform_attn

# name: B and the levels; 8 heads of 32 channels and 4 points, as published: an encoder layer, whose queries are the
# pixels of all levels (strides 32, 16 and 8).
CASES = {
    "scenes B4 96 px": (4, ((3, 3), (6, 6), (12, 12))),
    "maftplus B1 800 x 1333": (1, ((25, 42), (50, 84), (100, 168))),
}
HEADS, CHANNELS, POINTS = 8, 32, 4
BACKENDS = [
    (device, dtype, backend)
    for device, dtype in WHERE
    for backend in kernels.BACKENDS
    if kernels.why_not("ms_deform_attn", backend, device, dtype) is None
]


# The backends vary fastest: what is compared is timed side by side.
@pytest.mark.parametrize(("device", "dtype", "backend"), BACKENDS, ids=str)
@pytest.mark.parametrize("part", ["forward", "both"])
@pytest.mark.parametrize("case", CASES)
def test_ms_deform_attn(benchmark, device, dtype, backend, case, part):
    b, shapes = CASES[case]
    generator = torch.Generator().manual_seed(0)
    pixels = sum(h * w for h, w in shapes)
    value = torch.randn(b, pixels, HEADS, CHANNELS, generator=generator).to(device, dtype).requires_grad_()
    # Around each pixel's own place, a few pixels wide on every level.
    own = torch.cat([torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w) for h, w in shapes])
    near = torch.randn(b, pixels, HEADS, len(shapes), POINTS, 2, generator=generator)
    near = near * torch.tensor([(2 / w, 2 / h) for h, w in shapes])[:, None]
    locations = (own.flip(1)[:, None, None, None] + near).to(device).requires_grad_()
    weights = torch.randn(b, pixels, HEADS, len(shapes) * POINTS, generator=generator).softmax(-1)
    weights = weights.unflatten(-1, (len(shapes), POINTS)).to(device).requires_grad_()
    grad = torch.randn(b, pixels, HEADS * CHANNELS, generator=generator).to(device, dtype)
    leaves = (value, locations, weights)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return ms_deform_attn(value, shapes, locations, weights, backend=backend)

    def both(name: str = backend) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(ms_deform_attn(value, shapes, locations, weights, backend=name), leaves, grad)

    want = ms_deform_attn(value, shapes, locations, weights, backend="reference").detach()
    # Samples of coordinates up to 168 pixels, rounded in fp32; halves are rounded once more.
    assert (forward().float() - want.float()).norm() <= (1e-4 if dtype == torch.float32 else 1e-2) * want.norm()
    for got, expected in zip(both(), both("reference"), strict=True):
        assert (got.float() - expected.float()).norm() <= (1e-3 if dtype == torch.float32 else 2e-2) * expected.norm()
    del want, got, expected

    # A sample multiplies and adds four corners; backward as much twice.
    flop = 8.0 * b * pixels * HEADS * CHANNELS * len(shapes) * POINTS * (3 if part == "both" else 1)
    facts = {"op": "ms_deform_attn", "dtype": str(dtype).removeprefix("torch."), "case": case, "part": part}
    timed(benchmark, {"forward": forward, "both": both}[part], device, flop, backend=backend, **facts)
