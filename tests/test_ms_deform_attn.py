"""Multi-scale deformable attention: every backend against the fp64 reference, and torch's own checks.

Tolerance: a backend may be off from the fp64 reference by what the reference in the same dtype is off, times ``SLACK``,
plus ``FLOOR`` + sqrt(longest sum) / 4 roundings of fp32, in which every form computes, of the largest value or term,
plus one rounding of the dtype in which a result is stored.
"""

from __future__ import annotations

import resource
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
    assert_compiles,
    assert_passes_in_the_interpreter,
    nan_filled_memory,
    needs_native,
)

from infoclip import kernels, native
from infoclip.kernels import ms_deform_attn as room
from infoclip.kernels.ms_deform_attn import ms_deform_attn
from infoclip.kernels.ms_deform_attn.op import ms_deform_attn as op

SLACK = 2.0  # two orders of summation of the same terms: each is as good as the other, within a small factor
# A pixel coordinate, two interpolations, the weight and a product: about one unit each. The coordinate of a location is
# rounded at the size of the map, which the slope between two pixels then carries.
FLOOR = 8.0


# B, M, D, Q, P, levels: vectors of 4, 8 or 16 channels, 4, 2 or 1 at a time and the rest one by one; runs of 32
# queries on the CPU, programs of 16 in Triton.
SIZES = [
    (1, 1, 1, 1, 1, ((1, 1),)),
    (2, 4, 5, 11, 3, ((6, 9), (3, 5), (7, 1))),
    (1, 2, 32, 17, 4, ((2, 3), (5, 4), (9, 7))),
    (1, 1, 7, 33, 2, ((4, 4),)),
    (2, 1, 64, 3, 1, ((1, 8), (3, 1), (2, 2), (5, 3))),
    (1, 3, 123, 5, 2, ((3, 4), (2, 5))),
    (1, 2, 31, 70, 5, ((5, 6),)),
]
if INTERPRETED:  # the interpreter walks every program in Python
    SIZES = [(1, 1, 1, 1, 1, ((1, 1),)), (2, 2, 5, 17, 2, ((3, 4), (4, 1))), (1, 1, 33, 5, 3, ((3, 3),))]


def case(size, dtype=torch.float32, seed=0, spread=0.8):
    """Random inputs; about a quarter of the points lie outside the maps, some on pixel centres and on their edges."""
    B, M, D, Q, P, shapes = size
    generator = torch.Generator().manual_seed(seed)
    precise = torch.promote_types(dtype, torch.float32)
    pixels = sum(h * w for h, w in shapes)
    value = torch.randn(B, pixels, M, D, generator=generator).to(dtype)
    locations = 0.5 + spread * (torch.rand(B, Q, M, len(shapes), P, 2, generator=generator) - 0.5) * 2
    weights = torch.randn(B, Q, M, len(shapes) * P, generator=generator).softmax(-1).view(B, Q, M, len(shapes), P)
    grad = torch.randn(B, Q, M * D, generator=generator).to(dtype)
    return (value, shapes, locations.to(precise), weights.to(precise)), grad


def run(inputs, grad, backend):
    value, shapes, locations, weights = inputs
    leaves = [x.detach().requires_grad_() for x in (value, locations, weights)]
    out = ms_deform_attn(leaves[0], shapes, leaves[1], leaves[2], backend=backend)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def assert_as_good(inputs, grad, backend):
    """Value and gradients of the backend, by the rule on top of this file."""
    value, shapes, locations, weights = inputs
    exact = run((value.double(), shapes, locations.double(), weights.double()), grad.double(), "reference")
    plain = run(inputs, grad, "reference")
    got = run(inputs, grad, backend)
    Q, _, L, P, _ = locations.shape[1:]
    D, side = value.shape[-1], max(max(pair) for pair in shapes)
    precise = torch.promote_types(value.dtype, torch.float32)
    # Longest sums: samples of a query, all samples for one pixel, channels of a corner.
    terms = (4 * L * P, 4 * Q * P, 4 * D, 4 * D)
    names = ("out", "d_value", "d_locations", "d_weights")
    # Terms of a sum may cancel: its rounding is that of the largest, however small the sum.
    v, w, g = (x.double().abs().max().item() for x in (value, weights, grad))
    largest = (v * w, g * w, g * v * w * side, g * v)
    for name, count, term, want, eager, result in zip(names, terms, largest, exact, plain, got, strict=True):
        assert result.shape == want.shape
        dtype = value.dtype if name in ("out", "d_value") else precise
        assert result.dtype == dtype
        # Coordinates reach `side` pixels, and their rounding moves a sample by as much.
        rounding = (FLOOR + side + count**0.5 / 4) * EPS[precise] + (EPS[dtype] if dtype != precise else 0.0)
        rounding *= max(want.abs().max().item(), term)
        # In float64 the reference is compared with itself: what it is off is not seen; it counts as one rounding more.
        own = rounding if dtype == torch.float64 else (eager.double() - want).abs().max().item()
        error = (result.double() - want).abs().max().item()
        assert error <= SLACK * own + rounding, f"{name}: off by {error:.2e}, allowed {SLACK * own + rounding:.2e}"


@pytest.fixture(autouse=True)
def nan_filled():
    with nan_filled_memory():
        yield


def test_reference_against_the_formula():
    (value, shapes, locations, weights), _ = case((1, 2, 3, 4, 2, ((3, 4), (2, 1))), torch.float64)
    want = torch.zeros(1, 4, 2, 3, dtype=torch.float64)
    start = 0
    for level, (h, w) in enumerate(shapes):
        for q in range(4):
            for m in range(2):
                for p in range(2):
                    x, y = (locations[0, q, m, level, p] * torch.tensor([w, h]) - 0.5).tolist()
                    for i in range(h):
                        for j in range(w):
                            share = max(0.0, 1 - abs(x - j)) * max(0.0, 1 - abs(y - i))
                            want[0, q, m] += weights[0, q, m, level, p] * share * value[0, start + i * w + j, m]
        start += h * w
    got = ms_deform_attn(value, shapes, locations, weights, backend="reference")
    torch.testing.assert_close(got, want.flatten(2), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size, backend):
    assert_as_good(*case(size), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype, backend):
    if kernels.why_not("ms_deform_attn", backend, "cpu", dtype):
        pytest.skip("not of this backend")
    for size in SIZES[1:3]:
        assert_as_good(*case(size, dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=4 if INTERPRETED else 40, deadline=None)
@given(
    size=st.tuples(*(st.integers(1, n) for n in (2, 3, 40, 9, 4))),
    shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4),
    spread=st.sampled_from([0.3, 0.8, 3.0]),
    seed=st.integers(0, 9),
)
def test_any_size(size, shapes, spread, seed, backend):
    assert_as_good(*case((*size, tuple(shapes)), seed=seed, spread=spread), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_points_on_pixels_and_edges(backend):
    """Where two cells meet the value is one, and the slope is that of the cell to the lower right."""
    value = torch.arange(12.0).view(1, 12, 1, 1)
    at = torch.tensor([[0.5, 0.5], [1.5, 0.5], [3.5, 2.5], [0.0, 0.0], [-0.5, 0.5], [4.5, 0.5], [1.0, 3.5]])
    locations = (at / torch.tensor([4.0, 3.0])).view(1, 7, 1, 1, 1, 2)
    weights = torch.ones(1, 7, 1, 1, 1)
    out, d_value, d_locations, _ = run((value, ((3, 4),), locations, weights), torch.ones(1, 7, 1), backend)
    want = torch.tensor([0.0, 1.0, 11.0, 0.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(out.flatten(), want, rtol=0, atol=1e-5)
    # x: 4 pixels wide, so 4 times the difference to the right neighbour; the last column falls to the zero outside.
    torch.testing.assert_close(d_locations[0, :3, 0, 0, 0, 0], torch.tensor([4.0, 4.0, -44.0]), rtol=0, atol=1e-3)
    assert d_value.flatten()[[0, 1, 11]].tolist() == pytest.approx([1.25, 1.0, 1.0], abs=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_value_that_no_sample_touches_does_not_count(backend):
    """NaN and infinity in pixels outside every sample's cell stay there, and their gradient is zero."""
    (value, shapes, locations, weights), grad = case((1, 2, 5, 6, 2, ((4, 6),)))
    locations = 0.1 + 0.2 * locations.clamp(0, 1)  # the upper left corner
    clean = run((value, shapes, locations, weights), grad, backend)
    dirty = value.clone()
    dirty.view(1, 4, 6, 2, 5)[:, 3] = torch.nan
    dirty.view(1, 4, 6, 2, 5)[:, :, 4:] = torch.inf
    for a, b in zip(run((dirty, shapes, locations, weights), grad, backend), clean, strict=True):
        assert torch.equal(a, b)
    assert not clean[1].view(1, 4, 6, 2, 5)[:, 3].any()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_location_that_is_not_finite_is_seen(bad, backend):
    (value, shapes, locations, weights), _ = case((1, 2, 5, 4, 2, ((3, 4),)))
    locations[0, 1, 1, 0, 1, 0] = bad
    out = ms_deform_attn(value, shapes, locations, weights, backend=backend).view(4, 2, 5)
    assert out[1, 1].isnan().all()
    assert out.isnan().sum() == 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_away_is_zero(backend):
    (value, shapes, locations, weights), grad = case((1, 1, 4, 3, 2, ((3, 4),)))
    locations = torch.full_like(locations, 1e30)
    locations[0, 0] = -1e30
    for result in run((value, shapes, locations, weights), grad, backend):
        assert not result.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend):
    (value, shapes, locations, weights), grad = case((2, 3, 6, 5, 2, ((3, 4), (2, 2))))
    want = run((value, shapes, locations, weights), grad, backend)
    wide = torch.full((2, 16, 3, 8), torch.nan)[..., 1:7]
    for odd in (
        wide.copy_(value),  # misaligned rows in a larger buffer
        value.transpose(1, 2).contiguous().transpose(1, 2),  # heads outside pixels
        value.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),  # channels far apart
    ):
        spread_out = locations.transpose(0, 1).contiguous().transpose(0, 1)
        for a, b in zip(run((odd, shapes, spread_out, weights), grad, backend), want, strict=True):
            assert torch.equal(a, b)
    one = value[:1].expand(2, -1, -1, -1)  # one value for all images: stride 0
    (d_value,) = torch.autograd.grad(
        ms_deform_attn(leaf := one.detach().requires_grad_(), shapes, locations, weights, backend=backend), leaf, grad
    )
    assert d_value.shape == value.shape
    constant = torch.ones(()).expand_as(grad)  # what sum() hands to the backward
    first, second = (run((value, shapes, locations, weights), g, backend) for g in (constant, torch.ones_like(grad)))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_asked_for(backend):
    (value, shapes, locations, weights), grad = case((1, 2, 5, 6, 2, ((3, 4),)))
    want = run((value, shapes, locations, weights), grad, backend)[1:]
    for index in range(3):
        leaves = [x.detach().clone() for x in (value, locations, weights)]
        leaves[index].requires_grad_()
        out = ms_deform_attn(leaves[0], shapes, leaves[1], leaves[2], backend=backend)
        out.backward(grad, retain_graph=True)
        out.backward(grad)  # nothing saved was changed by the first
        assert torch.equal(leaves[index].grad, 2 * want[index])
        assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i != index)


@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_the_same_bits_and_nothing_changed(backend):
    inputs, grad = case((2, 2, 9, 7, 3, ((3, 4), (2, 5))))
    copies = [x.clone() for x in (inputs[0], *inputs[2:], grad)]
    first, second = run(inputs, grad, backend), run(inputs, grad, backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(copies, (inputs[0], *inputs[2:], grad), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    (value, shapes, locations, weights), _ = case((1, 2, 3, 4, 2, ((2, 3), (1, 2))))
    torch.use_deterministic_algorithms(False)  # opcheck compares runs itself
    flat = [side for pair in shapes for side in pair]
    leaves = [x.requires_grad_() for x in (value, locations, weights)]
    torch.library.opcheck(op, (leaves[0], flat, leaves[1], leaves[2], backend))
    torch.library.opcheck(op, (leaves[0].detach(), flat, leaves[1], leaves[2].detach(), backend))


def test_samples_are_sorted_by_cell():
    (_, shapes, locations, _), _ = case((2, 2, 1, 9, 3, ((3, 4), (2, 1))))
    locations[0, 0, 0, 0, 0, 0] = torch.nan
    flat = tuple(side for pair in shapes for side in pair)
    order, starts = room.cells.sort_samples(flat, locations)
    cells = 4 * 5 + 3 * 2
    assert starts.shape == (2 * 2 * cells + 1,)
    assert order.sort().values.tolist() == list(range(locations.numel() // 2))
    points = locations.flatten(0, -2)
    kept = 0
    for b in range(2):
        for m in range(2):
            for first, (h, w) in zip((0, 20), shapes, strict=True):
                for i in range(h + 1):
                    for j in range(w + 1):
                        cell = (b * 2 + m) * cells + first + i * (w + 1) + j
                        ids = order[starts[cell] : starts[cell + 1]]
                        assert ids.tolist() == sorted(ids.tolist())
                        kept += len(ids)
                        for x, y in points[ids].tolist():
                            assert j - 1 <= x * w - 0.5 < j
                            assert i - 1 <= y * h - 0.5 < i
    assert kept == int(starts[-1])


@needs_native
@pytest.mark.skipif(INTERPRETED, reason="native")
class TestNative:
    def test_gradcheck(self):
        (value, shapes, locations, weights), _ = case((2, 2, 5, 4, 2, ((3, 4), (2, 1))), torch.float64)
        leaves = [x.requires_grad_() for x in (value, locations, weights)]
        for backend in ("reference", "native"):
            torch.autograd.gradcheck(lambda v, x, w, b=backend: ms_deform_attn(v, shapes, x, w, backend=b), leaves)

    @pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_every_instruction_set_and_any_thread_count(self, isa, dtype, monkeypatch):
        if isa not in native.build_info()["isa_usable"]:
            pytest.skip(f"this CPU has no {isa}")
        inputs, grad = case((2, 2, 53, 2100, 2, ((3, 4), (2, 5))), dtype)  # enough samples for several threads
        forward, backward = native.ms_deform_attn_forward, native.ms_deform_attn_backward
        first = None
        for threads in (1, 2, 5):
            chosen = {"isa": isa, "threads": threads}
            monkeypatch.setattr(native, "ms_deform_attn_forward", lambda *a, k=chosen: forward(*a, **k))
            monkeypatch.setattr(native, "ms_deform_attn_backward", lambda *a, k=chosen: backward(*a, **k))
            got = run(inputs, grad, "native")
            first = first or got
            assert all(torch.equal(a, b) for a, b in zip(first, got, strict=True))
        assert_as_good(inputs, grad, "native")

    def test_compiled_equals_eager(self):
        (value, shapes, locations, weights), grad = case((2, 2, 5, 4, 2, ((3, 4), (2, 1))))
        torch.use_deterministic_algorithms(False)
        for backend in ("native", None):
            compiled = torch.compile(
                lambda v, x, w, b=backend: ms_deform_attn(v, shapes, x, w, backend=b) * 2.0,
                fullgraph=True,
                backend="aot_eager",
            )
            leaf, same = value.clone().requires_grad_(), value.clone().requires_grad_()
            got = compiled(leaf, locations, weights)
            want = ms_deform_attn(same, shapes, locations, weights, backend=backend) * 2.0
            assert torch.equal(got, want)
            got.backward(grad)
            want.backward(grad)
            assert torch.equal(leaf.grad, same.grad)

    @pytest.mark.parametrize("plant", ["out", "d_value", "d_locations"])
    def test_a_planted_error_is_caught(self, monkeypatch, plant):
        inputs, grad = case((1, 2, 32, 17, 4, ((5, 4), (9, 7))))
        assert_as_good(inputs, grad, "native")
        forward, backward = native.ms_deform_attn_forward, native.ms_deform_attn_backward

        def wrong_forward(value, shapes, locations, weights, out, levels):
            forward(value, shapes, locations, weights, out, levels)
            if plant == "out":  # one query's share of the border clamped
                out[0, 3] *= 1.001

        def wrong_backward(grad, value, shapes, locations, weights, d_value, d_locations, d_weights, *more):
            backward(grad, value, shapes, locations, weights, d_value, d_locations, d_weights, *more)
            if plant == "d_value":  # the last pixel of a level forgotten
                d_value[:, 19] = 0
            elif plant == "d_locations":  # x and y mixed up for one query
                d_locations[0, 3] = d_locations[0, 3].flip(-1)

        monkeypatch.setattr(native, "ms_deform_attn_forward", wrong_forward)
        monkeypatch.setattr(native, "ms_deform_attn_backward", wrong_backward)
        with pytest.raises(AssertionError, match=f"{plant}: off by"):
            assert_as_good(inputs, grad, "native")

    def test_saved_memory_is_the_inputs(self):
        (value, shapes, locations, weights), _ = case((1, 4, 32, 50, 4, ((5, 4), (9, 7))))
        saved: list[int] = []

        def pack(x):
            saved.append(x.numel() * x.element_size())
            return x

        leaves = [x.requires_grad_() for x in (value, locations, weights)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            ms_deform_attn(leaves[0], shapes, leaves[1], leaves[2], backend="native")
        assert sum(saved) == 4 * sum(x.numel() for x in leaves)

    @pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is KiB on Linux")
    def test_peak_memory_at_the_published_size(self):
        """An encoder layer at 800 x 1333: forward and backward need the result and the gradients, and no more."""
        program = (
            "import resource, torch\n"
            "from infoclip.kernels.ms_deform_attn import ms_deform_attn\n"
            "torch.set_num_threads(2)\n"
            "def go(shapes):\n"
            "    n = sum(h * w for h, w in shapes)\n"
            "    leaves = [torch.rand(1, n, 8, 32), torch.rand(1, n, 8, 3, 4, 2), torch.rand(1, n, 8, 3, 4)]\n"
            "    grad = torch.ones(1, n, 256)\n"
            "    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "    leaves = [x.requires_grad_() for x in leaves]\n"
            "    ms_deform_attn(leaves[0], shapes, *leaves[1:], backend='native').backward(grad)\n"
            "    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before), n\n"
            "go([(2, 3), (4, 5), (8, 9)])\n"
            "print(*go([(25, 42), (50, 84), (100, 167)]))\n"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        extra, pixels = map(int, done.stdout.split())
        results = 4 * pixels * 8 * (32 + 32 + 8 * 3)  # out, d_value, d_locations and d_weights
        assert extra <= 1.1 * results + 2**22  # pages, allocator and threads
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0


@pytest.mark.skipif(INTERPRETED, reason="no kernel here")
class TestPublicFunction:
    @pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
    def test_halves_and_autocast(self, backend):
        (value, shapes, locations, weights), _ = case((1, 2, 8, 4, 2, ((3, 4),)), torch.bfloat16)
        out = ms_deform_attn(value, shapes, locations, weights, backend=backend)
        assert out.dtype == torch.bfloat16
        precise = ms_deform_attn(value.float(), shapes, locations, weights, backend=backend)
        assert torch.equal(out, precise.bfloat16())  # one rounding, at the end
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(precise, ms_deform_attn(value.float(), shapes, locations, weights, backend=backend))
        leaf = locations.half().requires_grad_()
        ms_deform_attn(value, shapes, leaf, weights.half(), backend=backend).float().sum().backward()
        assert leaf.grad.dtype == torch.float16

    def test_shapes_as_a_tensor_and_on_the_meta_device(self):
        (value, shapes, locations, weights), _ = case((1, 2, 4, 5, 2, ((3, 4), (2, 2))))
        want = ms_deform_attn(value, shapes, locations, weights)
        assert torch.equal(want, ms_deform_attn(value, torch.tensor(shapes), locations, weights))
        meta = [x.to("meta") for x in (value, locations, weights)]
        assert ms_deform_attn(meta[0], shapes, *meta[1:]).shape == want.shape

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"value": (2, 12, 4)}, r"value: expected \[B, S, M, D\], got \[2, 12, 4\]"),
            ({"value": (1, 11, 2, 4)}, r"shapes \[\(3, 4\)\] hold 12 pixels; value has 11"),
            ({"value": (1, 12, 2, 0)}, "at least one of everything"),
            ({"locations": (1, 5, 3, 1, 2, 2)}, r"locations: expected \[1, Q, 2, 1, P, 2\]"),
            ({"locations": (1, 5, 2, 1, 2, 3), "weights": (1, 5, 2, 1, 2)}, "the same without the last axis"),
            ({"weights": (1, 5, 2, 1, 3)}, "the same without the last axis"),
            ({"locations": (1, 0, 2, 1, 2, 2), "weights": (1, 0, 2, 1, 2)}, "at least one of everything"),
        ],
    )
    def test_bad_shapes(self, change, message):
        sizes = {"value": (1, 12, 2, 4), "locations": (1, 5, 2, 1, 2, 2), "weights": (1, 5, 2, 1, 2)} | change
        with pytest.raises(ValueError, match=message):
            ms_deform_attn(**{name: torch.ones(size) for name, size in sizes.items()}, shapes=[(3, 4)])

    def test_bad_values(self):
        (value, _, locations, weights), _ = case((1, 2, 4, 5, 2, ((3, 4),)))
        with pytest.raises(TypeError, match="value: expected a tensor, got list"):
            ms_deform_attn([1.0], [(3, 4)], locations, weights)
        with pytest.raises(TypeError, match=r"weights: expected float32, .* got torch.int64"):
            ms_deform_attn(value, [(3, 4)], locations, weights.long())
        with pytest.raises(TypeError, match="shapes: expected pairs of whole numbers"):
            ms_deform_attn(value, [(3.0, 4.0)], locations, weights)
        with pytest.raises(TypeError, match=r"shapes: expected whole numbers \[L, 2\]"):
            ms_deform_attn(value, torch.tensor([3, 4]), locations, weights)
        with pytest.raises(ValueError, match="heights and widths of at least 1"):
            ms_deform_attn(value, [(0, 4)], locations, weights)
        with pytest.raises(ValueError, match="at least one level"):
            ms_deform_attn(value, [], locations, weights)
        with pytest.raises(ValueError, match="backend='fast': expected auto or one of"):
            ms_deform_attn(value, [(3, 4)], locations, weights, backend="fast")
        with pytest.raises(ValueError, match="expected one device"):
            ms_deform_attn(value, [(3, 4)], locations.to("meta"), weights)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's run")
def test_triton_in_the_interpreter():
    assert_passes_in_the_interpreter(__file__)


@pytest.mark.skipif(INTERPRETED, reason="compiled ahead of time")
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_triton_compiles_without_a_gpu(capability):
    """Spills, shared memory and matrix instructions for the GPU generations that are served."""
    assert_compiles("ms_deform_attn", capability)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_the_gpu(backend, dtype):
    reason = kernels.why_not("ms_deform_attn", backend, "cuda", dtype)
    if reason:
        pytest.skip(reason)
    for size in SIZES:
        (value, shapes, locations, weights), grad = case(size, dtype)
        assert_as_good((value.cuda(), shapes, locations.cuda(), weights.cuda()), grad.cuda(), backend)
