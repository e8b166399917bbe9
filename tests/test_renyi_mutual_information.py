"""The op of Renyi's mutual information: every backend against the fp64 reference, and torch's own checks.

The definition, its identities and orders other than 2 are in ``test_entropy.py``. Tolerance: the README of the room.
"""

from __future__ import annotations

import importlib
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import (
    BACKENDS,
    EPS,
    INTERPRETED,
    assert_captured_within,
    assert_compiles,
    assert_passes_in_the_interpreter,
    nan_filled_memory,
    needs_native,
)

from infoclip import kernels, native
from infoclip.kernels import renyi_mutual_information as room
from infoclip.kernels.renyi_mutual_information import compression_loss, renyi_mutual_information, transfer_loss
from infoclip.kernels.renyi_mutual_information.op import renyi_information as registered

op_module = importlib.import_module("infoclip.kernels.renyi_mutual_information.op")
reference = importlib.import_module("infoclip.kernels.renyi_mutual_information.reference")

SLACK = 4.0  # other orders of summation, and single entropies by the other side: as good, within a small factor
FLOOR = 8.0  # two or three products, scale, square, sum, ratio, logarithm and final rounding: one unit each

kernels.ops()

# B, N, D, E. A block is 96 rows on the CPU (two packed panels of 12 and 32), 64 in Triton, its gradients 128 wide. Wide
# sets keep their products; long ones do not.
SIZES = [
    (1, 1, 1, 1),
    (2, 31, 7, 64),
    (1, 63, 123, 5),
    (2, 64, 64, 31),
    (1, 65, 300, 40),
    (3, 95, 33, 20),
    (1, 96, 7, 7),
    (1, 97, 13, 512),
    (2, 211, 11, 17),  # primes: more than two blocks and a remainder
    (1, 211, 171, 171),
    (1, 401, 61, 5),
]
if INTERPRETED:  # the interpreter walks every program in Python
    SIZES = [s for s in SIZES if s[1] * s[1] * (s[2] + s[3]) < 700_000]


def samples(B, N, *widths, dtype=torch.float32, seed=0):
    """Sets that know of each other, with rows of unequal length about 1."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(B, N, 3, generator=generator)
    found = []
    for D in widths:
        x = torch.randn(B, N, D, generator=generator) + shared @ torch.randn(3, D, generator=generator)
        found.append((x / (2 * D**0.5)).to(dtype))
    return found


def run(form, views, backend, incoming=None):
    """Value and gradients of a loss of the views."""
    views = [v.detach().requires_grad_() for v in views]
    value = form(*views, backend=backend)
    incoming = torch.ones_like(value) if incoming is None else incoming
    return value.detach(), *torch.autograd.grad(value, views, incoming)


def assert_as_good(views, backend, form=renyi_mutual_information):
    exact = run(form, [v.double() for v in views], "reference")
    plain = run(form, views, "reference")
    got = run(form, views, backend)
    dtype = views[0].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    _, N, _ = views[0].shape
    longest = max(N, *(v.shape[2] for v in views))
    for index, (want, eager, value) in enumerate(zip(exact, plain, got, strict=True)):
        name = f"d_{index}" if index else "value"
        assert value.dtype == (dtype if index else wide)
        assert value.shape == want.shape
        largest = max(want.abs().max().item(), 0.0 if index else 1.0)
        rounding = (FLOOR + longest**0.5 / 4) * EPS[wide] * largest
        if index:
            # Two terms of about the row's length times 4 / ln 2 over the trace cancel in a gradient.
            lengths = views[index - 1].double().square().sum(dim=-1)
            term = (
                4 / math.log(2) * views[index - 1].double().abs().amax() / lengths.sum(dim=-1).amin().clamp(min=1e-300)
            )
            rounding += (FLOOR + longest**0.5 / 4) * EPS[wide] * min(term.item(), 1e30)
            if dtype != wide:
                rounding += 6 * EPS[dtype] * largest
        allowed = SLACK * (eager.double() - want).abs().max().item() + rounding
        if dtype == torch.float64:  # the reference is compared with itself: what it is off is not seen
            allowed *= 8
        off = (value.double() - want).abs().max().item()
        assert off <= allowed, f"{name}: off by {off:.2e}, allowed {allowed:.2e}"
        if index and dtype == torch.float32 and N > 1:
            # As a vector: one row missing, or a bias, would hide under the largest entry.
            off, size = (value.double() - want).norm().item(), want.norm().item()
            assert off <= allowed * max(size / largest if largest else 0.0, 1.0) * 2, f"{name}: off by {off:.2e} in all"


@pytest.fixture(autouse=True)
def nan_filled():
    with nan_filled_memory():
        yield


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size, backend) -> None:
    views = samples(*size)
    assert_as_good(views, backend)
    assert_as_good(views, backend, compression_loss)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "size", [(2, 40, 9, 33, 5), (1, 130, 5, 7, 3), (1, 100, 70, 40, 30)][: 1 if INTERPRETED else 3], ids=str
)
def test_three_views(size, backend) -> None:
    assert_as_good(samples(*size), backend, compression_loss)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype, backend) -> None:
    if kernels.why_not("renyi_mutual_information", backend, "cpu", dtype):
        pytest.skip("not of this backend")
    for size in (
        ((2, 70, 40, 5), (1, 33, 129, 64)) if INTERPRETED else ((2, 70, 40, 5), (1, 230, 129, 64), (1, 300, 20, 9))
    ):
        views = samples(*size, dtype=dtype)
        assert_as_good(views, backend)
        assert_as_good(views, backend, compression_loss)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=5 if INTERPRETED else 40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 100), st.integers(1, 70), st.integers(1, 70)),
    seed=st.integers(0, 9),
)
def test_any_size(backend, size, seed) -> None:
    assert_as_good(samples(*size, seed=seed), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend) -> None:
    x, y = samples(2, 45, 21, 30)
    want = run(renyi_mutual_information, (x, y), backend)
    wide = torch.zeros(2, 50, 50)
    wide[:, 3:48, 1:43:2] = x
    flat = torch.zeros(x.numel() + 1)
    flat[1:] = x.flatten()
    for other in (x.mT.contiguous().mT, wide[:, 3:48, 1:43:2], flat[1:].view_as(x)):
        got = run(renyi_mutual_information, (other, y), backend)
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    one = x[:1].expand(2, -1, -1)  # stride 0 over the batch
    pair = (run(renyi_mutual_information, (v, y), backend) for v in (one.contiguous(), one))
    assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_must_not_matter(backend) -> None:
    x, y = samples(2, 70, 33, 20)
    value = renyi_mutual_information(x, y, backend=backend)
    near = {"rtol": 0, "atol": 1e-5}  # bits: fp32 sums of 70^2 terms in another order
    torch.testing.assert_close(renyi_mutual_information(y, x, backend=backend), value, **near)
    torch.testing.assert_close(renyi_mutual_information(x * 1e18, y * 1e-18, backend=backend), value, **near)
    order = torch.randperm(70)
    torch.testing.assert_close(renyi_mutual_information(x[:, order], y[:, order], backend=backend), value, **near)
    for b in range(2):
        assert torch.equal(renyi_mutual_information(x[b], y[b], backend=backend), value[b])
    assert torch.equal(transfer_loss(y, x, backend=backend), -value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_incoming_gradients_only_those_asked_for_and_twice(backend) -> None:
    x, y = samples(2, 70, 33, 20)
    want = run(renyi_mutual_information, (x, y), backend)
    incoming = torch.tensor([-2.5, 0.5])
    for got, expected in zip(run(renyi_mutual_information, (x, y), backend, incoming)[1:], want[1:], strict=True):
        torch.testing.assert_close(got, incoming[:, None, None] * expected, rtol=1e-6, atol=0)
    for index in range(2):
        views = [x.clone(), y.clone()]
        views[index].requires_grad_()
        value = renyi_mutual_information(*views, backend=backend).sum()
        first, second = (torch.autograd.grad(value, views[index], retain_graph=True)[0] for _ in range(2))
        torch.testing.assert_close(first, want[1 + index], rtol=1e-5, atol=1e-8)
        assert torch.equal(first, second)
        assert torch.equal(views[0].detach(), x)
        assert torch.equal(views[1].detach(), y)
    assert not renyi_mutual_information(x, y, backend=backend).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_awkward_values(backend) -> None:
    x, y = samples(3, 70, 8, 12)
    x[0], x[1, 5:] = 1.0, 0.0  # equal rows; few that are not zero
    y[0] = torch.nn.functional.normalize(y[0], dim=-1)  # with rows of one length nothing is known of what never changes
    value, d_x, d_y = run(renyi_mutual_information, (x, y), backend)
    assert abs(value[0].item()) < 1e-5  # bits; fp32 sums of 4,900 terms
    assert bool(d_x.isfinite().all() & d_y.isfinite().all())
    assert_as_good((x, y), backend)
    y[1, :5] = 0  # no sample is there in both
    for bad in (math.nan, math.inf, -math.inf):
        x[2, 66, 3] = bad
        value, d_x, d_y = run(renyi_mutual_information, (x, y), backend)
        assert value[1] == 0
        assert not d_x[1].any()
        assert not d_y[1].any()
        assert value[2].isnan()
        assert bool(value[0].isfinite() & d_x[0].isfinite().all())
    assert renyi_mutual_information(x[:0], y[:0], backend=backend).shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_the_same_bits(backend) -> None:
    for size in ((2, 100, 70, 40), (1, 130, 7, 9)):
        pair = (run(renyi_mutual_information, samples(*size), backend) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend) -> None:
    torch.use_deterministic_algorithms(False)  # opcheck compares runs itself
    x, y, z = samples(2, 5, 3, 4, 2)
    x, y = x.requires_grad_(), y.requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    first = (x, y, None, [False, False], [-1, 1, 1], [True, True], backend)
    torch.library.opcheck(registered, first, test_utils=tests)
    second = (x, y.detach(), z, [False, True, True], [-1, 1, 0, 0], [True, False, False], backend)
    torch.library.opcheck(registered, second, test_utils=tests)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_compiled_equals_eager(backend) -> None:
    torch.use_deterministic_algorithms(False)

    def step(x, y):
        return 2 * renyi_mutual_information(x, y, backend=backend) + compression_loss(x, y, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    leaves = [[v.requires_grad_() for v in samples(2, 9, 5, 12)] for _ in range(2)]
    values = compiled(*leaves[0]), step(*leaves[1])
    assert torch.equal(*values)
    for value in values:
        value.sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(*leaves, strict=True))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_autocast_leaves_it_alone(backend) -> None:
    x, y = samples(1, 33, 9, 9)
    want = renyi_mutual_information(x, y, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(renyi_mutual_information(x, y, backend=backend), want)
    assert renyi_mutual_information(x.bfloat16(), y, backend=backend).dtype == torch.float32


@needs_native
@pytest.mark.skipif(INTERPRETED, reason="native")
class TestNative:
    def test_gradcheck(self) -> None:
        x, y, z = (v.requires_grad_() for v in samples(2, 5, 3, 4, 2, dtype=torch.float64))
        assert torch.autograd.gradcheck(lambda *v: renyi_mutual_information(*v, backend="native"), (x, y))
        assert torch.autograd.gradcheck(lambda *v: compression_loss(*v, backend="native"), (x, y, z))

    @pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_every_instruction_set_and_any_thread_count(self, monkeypatch, isa, dtype) -> None:
        if isa not in native.build_info()["isa_usable"]:
            pytest.skip(f"this CPU has no {isa}")
        form = native.renyi_information
        for size in ((3, 205, 65, 80), (2, 400, 20, 33)):  # products kept, and the tournament
            views = samples(*size, dtype=dtype)
            first = None
            for threads in (1, 2, 5):
                chosen = {"isa": isa, "threads": threads}
                monkeypatch.setattr(native, "renyi_information", lambda *a, c=chosen: form(*a, **c))
                got = run(renyi_mutual_information, views, "native")
                first = first or got
                assert all(torch.equal(a, b) for a, b in zip(first, got, strict=True))
            assert_as_good(views, "native")

    @pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is KiB on Linux")
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_peak_memory_at_16384(self, dtype) -> None:
        """The README's bound, by the peak of a fresh process; one Gram matrix alone would be 1 GiB."""
        n, d = 16384, 64
        program = (
            "import resource, torch\n"
            "from infoclip.kernels.renyi_mutual_information import renyi_mutual_information\n"
            "torch.set_num_threads(2)\n"
            "def step(n):\n"
            f"    x, y = (torch.randn(1, n, {d}, dtype=torch.{dtype}, requires_grad=True) for _ in range(2))\n"
            "    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "    renyi_mutual_information(x, y, backend='native').sum().backward()\n"
            "    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024\n"
            "step(200)\n"
            f"print(step({n}))\n"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        # Gradients in fp32 and scaled by the incoming one; the room's own; 32 bytes a pair of blocks; malloc's.
        blocks = -(-n // 96)
        bound = 2 * 8 * n * d + 16 * n * 2 * d + 24 * d * d + 100 * n + 16 * blocks * (blocks + 1) + 4 * 2**20
        assert int(done.stdout) <= bound < 4 * n * n / 15


class Planted:
    """The formulas of the README in PyTorch, with an error in them."""

    def __init__(self, plant: str) -> None:
        self.plant = plant

    def forward(self, views, units, weights, value, grads) -> None:
        lengths = [v.double().norm(dim=-1, keepdim=True) for v in views]
        rows = [v.double() / n if u else v.double() for v, n, u in zip(views, lengths, units, strict=True)]
        products = [x @ x.mT for x in rows]
        own = [c.diagonal(dim1=1, dim2=2) for c in products]
        if self.plant == "block":  # the last pair of blocks counted once in place of twice
            products[0][:, :6, 64:] *= 0.5**0.5
        joint = math.prod(products)
        traces = [math.prod(own).sum(dim=1), *(o.sum(dim=1) for o in own)]
        squares = [c.square().sum(dim=(1, 2)) for c in (joint, *products)]
        terms = [w * (t.square() / s).log2() for w, t, s in zip(weights, traces, squares, strict=True)]
        value.copy_(sum(terms))
        weighed = [(w / s)[:, None, None] for w, s in zip(weights, squares, strict=True)]
        for v, to in enumerate(grads):
            if to is None:
                continue
            others = math.prod(c for o, c in enumerate(products) if o != v)
            other = math.prod(c for o, c in enumerate(own) if o != v)
            g = -(weighed[0] * products[v] * others.square() + weighed[1 + v] * products[v]) @ rows[v]
            diagonal = (weights[0] / traces[0])[:, None] * other
            if self.plant != "trace":
                diagonal = diagonal + (weights[1 + v] / traces[1 + v])[:, None]
            g = 4 / math.log(2) * (g + diagonal[..., None] * rows[v])
            if units[v]:
                if self.plant != "unit":  # what lies along a row stays
                    g = g - rows[v] * (rows[v] * g).sum(dim=-1, keepdim=True)
                g = g / lengths[v]
            to.copy_(g)
            if self.plant == "row":
                to[:, -1] = 0


@pytest.mark.skipif(INTERPRETED, reason="no kernel here")
class TestPlantedErrors:
    def check(self, monkeypatch, plant) -> None:
        monkeypatch.setitem(op_module._FORMS, "native", Planted(plant))
        monkeypatch.setattr(room, "choose", lambda op, backend, *_: backend)
        views = samples(2, 70, 33, 20)
        assert_as_good(views, "native")
        assert_as_good(views, "native", compression_loss)

    def test_none_passes(self, monkeypatch) -> None:
        self.check(monkeypatch, "")

    @pytest.mark.parametrize("plant", ["block", "row", "trace", "unit"])
    def test_each_is_caught(self, monkeypatch, plant) -> None:
        with pytest.raises(AssertionError, match=r"(value|d_\d): off by"):
            self.check(monkeypatch, plant)


@pytest.mark.skipif(INTERPRETED, reason="no kernel here")
def test_bad_values() -> None:
    x, y = samples(1, 3, 4, 5)
    with pytest.raises(TypeError, match="expected a tensor"):
        renyi_mutual_information([1.0], y)
    with pytest.raises(TypeError, match=r"set 1: expected float32, .* got torch.int64"):
        renyi_mutual_information(x, y.long())
    with pytest.raises(ValueError, match="expected the same batch"):
        renyi_mutual_information(x, y[:, :2])
    with pytest.raises(ValueError, match=r"expected \[..., N, D\]"):
        renyi_mutual_information(x[:, :0], y[:, :0])
    with pytest.raises(ValueError, match="expected one device"):
        renyi_mutual_information(x, y.to("meta"))
    with pytest.raises(ValueError, match="backend='fast'"):
        renyi_mutual_information(x, y, backend="fast")
    if native.available():
        many = x[:, :1].expand(1, 2**40, 4)  # stride 0: it takes no memory
        with pytest.raises(ValueError, match=r"2\^31 samples"):
            renyi_mutual_information(many, many, backend="native")
        with pytest.raises(kernels.BackendUnavailableError, match="order 2"):
            renyi_mutual_information(x, y, 3.0, backend="native")


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's run")
def test_triton_in_the_interpreter() -> None:
    assert_passes_in_the_interpreter(__file__)


@pytest.mark.skipif(INTERPRETED, reason="compiled ahead of time")
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_triton_compiles_without_a_gpu(capability) -> None:
    """Spills, shared memory and matrix instructions for the GPU generations that are served."""
    assert_compiles("renyi_mutual_information", capability)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_the_gpu(backend, dtype) -> None:
    reason = kernels.why_not("renyi_mutual_information", backend, "cuda", dtype)
    if reason:
        pytest.skip(reason)
    for size in (*SIZES, (2, 130, 9, 33, 5), (4, 576, 171, 171)):
        views = [v.cuda() for v in samples(*size, dtype=dtype)]
        if len(views) == 2:
            assert_as_good(views, backend)
        assert_as_good([v.mT.contiguous().mT for v in views], backend, compression_loss)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_the_gpu_in_a_graph_within_the_byte_bound(backend, dtype) -> None:
    """The README's bound at N = 16,384 by torch's allocator; one Gram matrix alone would be 1 GiB."""
    reason = kernels.why_not("renyi_mutual_information", backend, "cuda", dtype)
    if reason:
        pytest.skip(reason)
    torch.use_deterministic_algorithms(False)  # no NaN is filled in here: filling takes launches of its own
    x, y = (v.cuda().requires_grad_() for v in samples(1, 16384, 64, 64, dtype=dtype))

    def step():
        value = renyi_mutual_information(x, y, backend=backend)
        return value.detach(), *torch.autograd.grad(value, (x, y), torch.ones_like(value))

    # Both gradients as made (fp32), times the incoming one (fp32 for a moment), and handed out; a few small tensors.
    results = (4 + 4 + x.element_size()) * 2 * x.numel()
    assert_captured_within(step, results + 9 * 2 * 16384 + 16384 + 16 * 512)
