"""Up-sampling and binary cross-entropy: every backend against the fp64 reference, and torch's own checks.

Tolerance: a backend may be off from the fp64 reference by what the reference in the same dtype is off, times ``SLACK``,
plus ``FLOOR`` + sqrt(longest sum) / 4 roundings (of fp32, in which every form computes; of the dtype for the gradient,
which is rounded to it at the end) of the largest value.
"""

from __future__ import annotations

import math
import resource
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
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
from infoclip.kernels.upsample_bce import upsample_bce
from infoclip.kernels.upsample_bce.op import upsample_bce as op

SLACK = 2.0  # two orders of summation of the same terms: each is as good as the other, within a small factor
FLOOR = 8.0  # two interpolations, the exponential, the logarithm, the slope and the mean: about one unit each


# B, T, h, w, H, W: Triton's programs own 8 rows x up to 128 columns of logits, CUDA's blocks 8 x 32.
SIZES = [
    (1, 1, 1, 1, 1, 1),
    (1, 2, 1, 1, 6, 7),  # one logit: every sample is clamped
    (2, 3, 5, 7, 20, 28),  # whole factor
    (2, 3, 5, 7, 13, 17),  # not whole
    (1, 2, 3, 4, 3, 4),  # no up-sampling
    (1, 2, 9, 8, 4, 3),  # down: logits that no sample touches
    (1, 2, 13, 2, 3, 29),  # down in one direction, up in the other
    (1, 3, 8, 32, 16, 64),
    (1, 2, 9, 33, 18, 65),
    (1, 2, 17, 140, 35, 281),  # two tiles and a remainder each way
]
if INTERPRETED:  # the interpreter walks every program in Python
    SIZES = [s for s in SIZES if s[1] * s[4] * s[5] < 1600]


def case(size, dtype=torch.float32, seed=0, spread=3.0):
    B, T, h, w, H, W = size
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(B, T, h, w, generator=generator)).to(dtype)
    target = torch.randint(-1, T, (B, H, W), generator=generator)
    return logits, torch.where(target < 0, 255, target)


def run(logits, target, backend, ignored="negative"):
    logits = logits.detach().requires_grad_()
    loss = upsample_bce(logits, target, ignored=ignored, backend=backend)
    (grad,) = torch.autograd.grad(loss, logits)
    assert torch.equal(
        upsample_bce(logits.detach(), target, ignored=ignored, backend=backend), loss
    )  # without gradient
    return loss.detach(), grad


def assert_as_good(logits, target, backend, ignored="negative"):
    """Value and gradient of the backend, by the rule on top of this file."""
    exact = run(logits.double(), target, "reference", ignored)
    plain = run(logits, target, "reference", ignored)
    got = run(logits, target, backend, ignored)
    up = max(target.shape[1] / logits.shape[2], 1.0) * max(target.shape[2] / logits.shape[3], 1.0)
    sums = (target.numel() * logits.shape[1], 4 * up)
    precise = torch.float64 if logits.dtype == torch.float64 else torch.float32
    for name, dtype, terms, want, eager, value in zip(
        ("loss", "grad"), (precise, logits.dtype), sums, exact, plain, got, strict=True
    ):
        assert value.dtype == dtype
        assert value.shape == want.shape
        rounding = (FLOOR + terms**0.5 / 4) * EPS[precise] + (EPS[dtype] if dtype != precise else 0.0)
        # The reference's slope is sigmoid - 1 where u is the class's: in float64 it cancels to a unit of 1.
        rounding = rounding * want.abs().max().item() + 2 * EPS[torch.float64]
        # In float64 the reference is compared with itself: what it is off is not seen; it counts as one rounding more.
        own = rounding if dtype == torch.float64 else (eager.double() - want).abs().max().item()
        error = (value.double() - want).abs().max().item()
        assert error <= SLACK * own + rounding, f"{name}: off by {error:.2e}, allowed {SLACK * own + rounding:.2e}"


@pytest.fixture(autouse=True)
def nan_filled():
    with nan_filled_memory():
        yield


def test_reference_against_the_formula():
    logits, _ = case((2, 3, 4, 5, 8, 9), torch.float64)
    target = torch.tensor([0, 1, 2, 255])[torch.randint(0, 4, (2, 8, 9), generator=torch.Generator().manual_seed(1))]
    full = F.interpolate(logits, size=(8, 9), mode="bilinear", align_corners=False)
    terms, kept = [], []
    for b in range(2):
        for i in range(8):
            for j in range(9):
                for c in range(3):
                    p = 1 / (1 + math.exp(-full[b, c, i, j].item()))
                    term = -math.log(p if target[b, i, j] == c else 1 - p)
                    terms.append(term)
                    if target[b, i, j] != 255:
                        kept.append(term)
    got = upsample_bce(logits, target, backend="reference").item()
    assert got == pytest.approx(sum(terms) / len(terms), rel=1e-12)
    masked = upsample_bce(logits, target, ignored="masked", backend="reference").item()
    assert masked == pytest.approx(sum(kept) / len(kept), rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ignored", ["negative", "masked"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size, ignored, backend):
    assert_as_good(*case(size), backend, ignored)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype, backend):
    if kernels.why_not("upsample_bce", backend, "cpu", dtype):
        pytest.skip("not of this backend")
    for ignored in ("negative", "masked"):
        assert_as_good(*case((1, 2, 5, 7, 13, 11), dtype), backend, ignored)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=4 if INTERPRETED else 40, deadline=None)
@given(
    size=st.tuples(*(st.integers(1, n) for n in (2, 3, 9, 9, 20, 20))),
    spread=st.sampled_from([0.1, 3.0, 60.0]),
    seed=st.integers(0, 9),
)
def test_any_size_and_logits(backend, size, spread, seed):
    assert_as_good(*case(size, seed=seed, spread=spread), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_and_label_types(backend):
    logits, target = case((1, 2, 3, 4, 7, 9))
    want = run(logits, target, backend)
    for other in (
        logits.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        logits.to(memory_format=torch.channels_last),
        torch.stack([logits, logits], dim=-1)[..., 1],
    ):
        assert not other.is_contiguous()
        assert all(torch.equal(a, b) for a, b in zip(want, run(other, target, backend), strict=True))
    turned = target.transpose(1, 2).contiguous().transpose(1, 2)
    one = torch.zeros(1, 1, 1, dtype=torch.int64).expand_as(target)  # stride 0
    assert torch.equal(run(logits, turned, backend)[0], want[0])
    assert torch.equal(run(logits, one, backend)[1], run(logits, one.contiguous(), backend)[1])
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(run(logits, target.to(dtype), backend)[1], want[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_which_labels_count(backend):
    logits, target = case((1, 3, 4, 4, 8, 8))
    # The ignored label may be a class's number: then that class is nobody's.
    for ignore in (2, 255, -100):
        marked = torch.where(target == 255, ignore, target)
        want = upsample_bce(logits, marked, ignore_index=ignore, ignored="masked", backend="reference")
        got = upsample_bce(logits, marked, ignore_index=ignore, ignored="masked", backend=backend)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)  # a dozen fp32 roundings
    nothing = torch.full((1, 8, 8), 255)
    loss, grad = run(logits, nothing, backend, "masked")
    assert loss == 0
    assert not grad.any()
    assert run(logits, nothing, backend)[0] > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_and_non_finite_logits(backend):
    target = torch.tensor([[[0, 1], [255, 1]]])
    for size in (88.0, 1e4, 1e36):  # exp would overflow or vanish
        logits = torch.tensor([size, -size])[None, :, None, None].expand(1, 2, 2, 2)
        for ignored in ("negative", "masked"):
            got, want = run(logits, target, backend, ignored), run(logits.double(), target, "reference", ignored)
            torch.testing.assert_close(got[0].double(), want[0], rtol=1e-6, atol=0)
            torch.testing.assert_close(got[1].double(), want[1], rtol=1e-6, atol=1e-30)
    for bad in (math.nan, math.inf):
        logits = torch.zeros(1, 2, 2, 2)
        logits[0, 0, 0, 1] = bad
        assert not upsample_bce(logits, target, backend=backend).isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_confident_model_keeps_its_digits(backend):
    # max(z, 0) - y z + log(1 + exp(-|z|)) cancels for y = 1; the right answer is 2e-9 a sample here.
    logits = torch.tensor([20.0, -20.0])[None, :, None, None].expand(1, 2, 3, 3)
    loss, grad = run(logits, torch.zeros(1, 6, 6, dtype=torch.int64), backend)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-20)), rel=1e-5)
    assert grad[0, 0].sum().item() == pytest.approx(-0.5 / (1 + math.exp(20)), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_the_same_bits_and_nothing_changed(backend):
    logits, target = case((2, 2, 9, 4, 11, 9) if INTERPRETED else (2, 5, 9, 10, 21, 33))
    copies = logits.clone(), target.clone()
    first, second = run(logits, target, backend), run(logits, target, backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(copies, (logits, target), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    logits, target = case((1, 2, 3, 2, 5, 3))
    torch.use_deterministic_algorithms(False)  # opcheck compares runs itself
    torch.library.opcheck(op, (logits.requires_grad_(), target, 255, False, True, backend))
    torch.library.opcheck(op, (logits.detach(), target, 255, True, False, backend))


@needs_native
@pytest.mark.skipif(INTERPRETED, reason="native")
class TestNative:
    @pytest.mark.parametrize("ignored", ["negative", "masked"])
    def test_gradcheck(self, ignored):
        logits, target = case((2, 3, 4, 5, 9, 7), torch.float64)
        for backend in ("reference", "native"):
            torch.autograd.gradcheck(
                lambda x, b=backend: upsample_bce(x, target, ignored=ignored, backend=b), logits.requires_grad_()
            )

    @pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_every_instruction_set_and_any_thread_count(self, isa, dtype):
        if isa not in native.build_info()["isa_usable"]:
            pytest.skip(f"this CPU has no {isa}")
        logits, target = case((2, 5, 16, 16, 93, 81), dtype)  # enough samples for several threads
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        want_loss, want_grad = run(logits.double(), target, "reference")
        first = None
        for threads in (1, 2, 5):
            loss, grad = torch.empty((), dtype=precise), torch.empty(logits.shape, dtype=precise)
            assert native.upsample_bce(logits, target, loss, grad, 255, False, isa=isa, threads=threads) is None
            first = first or (loss, grad)
            assert torch.equal(first[0], loss)
            assert torch.equal(first[1], grad)
        # As in assert_as_good; the reference's own error in float64, unseen, counts twice as much again. Sums of 75,330
        # and of some 120 terms.
        slack = 1 + (SLACK if precise == torch.float64 else 0)
        assert abs(first[0].double() - want_loss) <= slack * (FLOOR + 69) * EPS[precise] * want_loss
        worst = (first[1].double() - want_grad).abs().max()
        assert worst <= slack * (FLOOR + 3) * EPS[precise] * want_grad.abs().max()

    def test_compiled_equals_eager(self):
        logits, target = case((2, 3, 4, 5, 8, 9))
        torch.use_deterministic_algorithms(False)
        for backend in ("native", None):
            compiled = torch.compile(
                lambda x, b=backend: upsample_bce(x, target, backend=b) * 2.0, fullgraph=True, backend="aot_eager"
            )
            leaf, same = logits.clone().requires_grad_(), logits.clone().requires_grad_()
            got, want = compiled(leaf), upsample_bce(same, target, backend=backend) * 2.0
            assert torch.equal(got, want)
            got.backward()
            want.backward()
            assert torch.equal(leaf.grad, same.grad)

    @pytest.mark.parametrize("plant", ["loss", "border", "shift"])
    def test_a_planted_error_is_caught(self, monkeypatch, plant):
        logits, target = case((2, 3, 5, 7, 13, 17))
        assert_as_good(logits, target, "native")
        true = native.upsample_bce

        def wrong(x, t, loss, grad, *more, **settings):
            true(x, t, loss, grad, *more, **settings)
            if plant == "loss":  # one sample in a thousand forgotten
                loss.mul_(1 - 1e-3)
            elif grad is not None and plant == "border":  # the clamped samples of the border left out
                grad[..., 0] *= 0.999
            elif grad is not None:  # align_corners mixed up: a fraction of the gradient goes to the neighbour
                grad.add_(0.001 * (grad.roll(1, -1) - grad))

        monkeypatch.setattr(native, "upsample_bce", wrong)
        with pytest.raises(AssertionError, match=f"{'loss' if plant == 'loss' else 'grad'}: off by"):
            assert_as_good(logits, target, "native")

    def test_saved_and_extra_memory_are_the_gradient(self):
        logits, target = case((1, 40, 24, 24, 96, 96))
        saved: list[int] = []

        def pack(x):
            saved.append(x.numel() * x.element_size())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            upsample_bce(logits.requires_grad_(), target, backend="native")
        assert sum(saved) == 4 * logits.numel()

    @pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is KiB on Linux")
    def test_peak_memory_at_the_published_size(self):
        """4 x 171 x 96 x 96 -> 384 x 384: at most 5 % of what the eager form allocates beyond its inputs.

        Eager holds at the least the up-sampled logits, the one-hot target and the gradient of the up-sampled logits at
        once, 4 bytes each; the peaks are those of two fresh processes.
        """
        program = (
            "import sys, resource, torch\n"
            "from infoclip.kernels.upsample_bce import upsample_bce\n"
            "torch.set_num_threads(2)\n"
            "small = torch.randn(1, 2, 4, 4, requires_grad=True)\n"
            "upsample_bce(small, torch.zeros(1, 8, 8, dtype=torch.long), backend='native').backward()\n"
            "x = torch.randn(4, 171, 96, 96, requires_grad=True)\n"
            "t = torch.randint(0, 171, (4, 384, 384))\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "upsample_bce(x, t, backend='native').backward()\n"
            "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)\n"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        eager = 3 * 4 * 4 * 171 * 384 * 384
        extra = int(done.stdout)
        # The gradient (fp32), its product with the incoming one, the labels as int32.
        assert extra <= 0.05 * eager
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0

    def test_strange_labels_are_named(self):
        logits, target = case((1, 3, 4, 4, 8, 8))
        for backend in ("native", "reference"):
            with pytest.raises(ValueError, match="target has the label 3: expected 0 to 2 or 255"):
                upsample_bce(logits, target * 0 + 3, backend=backend)
            with pytest.raises(ValueError, match="target has the label -1: expected 0 to 2 or 255"):
                upsample_bce(logits, target * 0 - 1, backend=backend)
            with pytest.raises(ValueError, match="label 4294967297"):  # not wrapped to 1
                upsample_bce(logits, target * 0 + 2**32 + 1, backend=backend)


@pytest.mark.skipif(INTERPRETED, reason="no kernel here")
class TestPublicFunction:
    @pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
    def test_halves_and_autocast_are_computed_in_float32(self, backend):
        logits, target = case((1, 3, 4, 4, 8, 8), torch.bfloat16)
        loss = upsample_bce(logits, target, backend=backend)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, upsample_bce(logits.float(), target, backend=backend))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(loss, upsample_bce(logits.float(), target, backend=backend))

    @needs_native
    def test_a_small_gradient_of_a_half_survives_loss_scaling(self):
        logits, target = case((1, 64, 16, 16, 64, 64), torch.float16)
        scale = 2.0**16
        got = {}
        for backend in ("native", "reference"):
            leaf = logits.detach().requires_grad_()
            (upsample_bce(leaf, target, backend=backend) * scale).backward()
            got[backend] = leaf.grad
        # Two roundings to float16 of nearly the same number.
        torch.testing.assert_close(got["native"], got["reference"], rtol=2**-10, atol=2**-24)
        assert got["native"].count_nonzero() == got["reference"].count_nonzero()

    def test_shapes_on_the_meta_device(self):
        logits = torch.ones(2, 3, 4, 5, device="meta", requires_grad=True)
        assert upsample_bce(logits, torch.ones(2, 8, 9, device="meta", dtype=torch.int64)).shape == ()

    @pytest.mark.parametrize(
        ("logits", "target", "message"),
        [
            ((3, 4, 4), (1, 8, 8), r"logits: expected \[B, T, h, w\], got \[3, 4, 4\]"),
            ((1, 3, 4, 4), (8, 8), r"target: expected \[1, H, W\], got \[8, 8\]"),
            ((2, 3, 4, 4), (1, 8, 8), r"target: expected \[2, H, W\]"),
            ((1, 0, 4, 4), (1, 8, 8), "at least one of everything"),
            ((1, 3, 4, 4), (1, 0, 8), "at least one of everything"),
        ],
    )
    def test_bad_shapes(self, logits, target, message):
        with pytest.raises(ValueError, match=message):
            upsample_bce(torch.ones(logits), torch.zeros(target, dtype=torch.int64))

    def test_bad_values(self):
        logits, target = case((1, 3, 4, 4, 8, 8))
        with pytest.raises(TypeError, match="logits: expected a tensor, got list"):
            upsample_bce([1.0], target)
        with pytest.raises(TypeError, match=r"logits: expected float32, .* got torch.int64"):
            upsample_bce(logits.long(), target)
        with pytest.raises(TypeError, match=r"target: expected whole numbers, got torch.float32"):
            upsample_bce(logits, target.float())
        with pytest.raises(TypeError, match=r"target: expected whole numbers, got torch.bool"):
            upsample_bce(logits, target > 0)
        with pytest.raises(ValueError, match="ignored: expected 'negative' or 'masked', got 'maybe'"):
            upsample_bce(logits, target, ignored="maybe")
        with pytest.raises(ValueError, match="backend='fast': expected auto or one of"):
            upsample_bce(logits, target, backend="fast")
        with pytest.raises(ValueError, match="expected one device"):
            upsample_bce(logits, target.to("meta"))


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's run")
def test_triton_in_the_interpreter():
    assert_passes_in_the_interpreter(__file__)


@pytest.mark.skipif(INTERPRETED, reason="compiled ahead of time")
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_triton_compiles_without_a_gpu(capability):
    """Spills, shared memory and matrix instructions for the GPU generations that are served."""
    assert_compiles("upsample_bce", capability)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ignored", ["negative", "masked"])
def test_on_the_gpu(backend, dtype, ignored):
    reason = kernels.why_not("upsample_bce", backend, "cuda", dtype)
    if reason:
        pytest.skip(reason)
    for size in SIZES:
        logits, target = (x.cuda() for x in case(size, dtype))
        assert_as_good(logits, target, backend, ignored)
