"""InfoNCE: each backend that can run here, forward, and forward with backward, at the objective's sizes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from bench.suite_cost_volume import DEVICES, timed
from infoclip import kernels
from infoclip.kernels.infonce import infonce

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
    if kernels.why_not("infonce", backend, device, dtype) is None
]
LARGE = 65536


def chunked(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Both directions by torch's own chunked linear cross-entropy, image by image, at temperature 0.1."""
    target = torch.arange(x.shape[1], device=x.device)
    options = torch.nn.LinearCrossEntropyOptions()
    losses = [
        F.linear_cross_entropy(a / 0.1, b, target, options=options)
        for one, other in zip(x, y, strict=True)
        for a, b in ((one, other), (other, one))
    ]
    return torch.stack(losses).mean()


if hasattr(F, "linear_cross_entropy") and "cuda" in DEVICES:
    BACKENDS += [("cuda", dtype, "torch-chunked") for dtype in (torch.float32, torch.bfloat16)]


# The backends vary fastest: what is compared is timed side by side.
@pytest.mark.parametrize(("device", "dtype", "backend"), BACKENDS, ids=str)
@pytest.mark.parametrize("part", ["forward", "both"])
@pytest.mark.parametrize("case", CASES)
def test_infonce(benchmark, device, dtype, backend, case, part):
    b, n, d = CASES[case]
    generator = torch.Generator().manual_seed(0)
    x, y = (
        F.normalize(torch.randn(b, n, d, generator=generator), dim=-1).to(device, dtype).requires_grad_()
        for _ in range(2)
    )

    def loss(x: torch.Tensor, y: torch.Tensor, backend: str = backend) -> torch.Tensor:
        return chunked(x, y) if backend == "torch-chunked" else infonce(x, y, backend=backend).loss

    got, want = loss(x, y), loss(x, y, "reference")
    slack = 1e-5 if dtype == torch.float32 else 2e-2  # fp32 sums in another order; a few roundings to bfloat16
    assert abs(got - want) <= slack * want
    slopes = torch.autograd.grad(got, (x, y)), torch.autograd.grad(want, (x, y))
    for one, other in zip(*slopes, strict=True):
        assert (one.float() - other.float()).norm() <= slack * other.float().norm()
    del got, want, slopes

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return loss(x, y)

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss(x, y), (x, y))

    # One product forward, two backward: what the form with the matrix of logits multiplies.
    flop = 2.0 * b * n * n * d * {"forward": 1, "both": 3}[part]
    facts = {"op": "infonce", "dtype": str(dtype).removeprefix("torch."), "case": case, "part": part}
    timed(benchmark, {"forward": forward, "both": both}[part], device, flop, backend=backend, **facts)


@pytest.mark.skipif(kernels.why_not("infonce", "native", "cpu") is not None, reason="no native build")
def test_memory_at_65536(benchmark):
    """Peak resident bytes of forward and backward in a fresh process, beside the bound; the logits alone are 16 GiB."""
    d = 32
    program = (
        "import resource, torch\n"
        "from infoclip.kernels.infonce import infonce\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "def step(n):\n"
        f"    x, y = (torch.randn(1, n, {d}, requires_grad=True) for _ in range(2))\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "    infonce(x, y, backend='native').loss.backward()\n"
        "    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024\n"
        "step(200)\n"
        f"print(step({LARGE}))\n"
    )
    measured: list[int] = []

    def run() -> None:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        measured.append(int(done.stdout))

    # Gradients, two packings and the sums of both sides, vectors, and 4 MiB for threads and the allocator.
    bound = 2 * LARGE * d * 4 * 4 + 8 * 16 * LARGE + 4 * 2**20
    benchmark.extra_info.update(
        op="infonce", device="cpu", dtype="float32", case=f"N{LARGE} d{d}", part="memory", backend="native",
        flop=2.0 * LARGE**2 * d * 3, bound_bytes=bound,
    )  # fmt: skip
    benchmark.pedantic(run, rounds=1)
    benchmark.extra_info["peak_bytes"] = measured[0]
    assert measured[0] <= bound
