"""The cost volume: every backend against the fp64 reference, gradients, strides, determinism, and torch's own checks.

Tolerances, all from one rule: a backend may be off from the fp64 reference by what the reference in the same dtype is
off, times ``SLACK``, plus ``FLOOR`` + sqrt(longest sum) / 4 units of the dtype's rounding of the largest value.
"""

from __future__ import annotations

import pytest
import torch
from kernel_checks import (
    BACKENDS,
    EPS,
    INTERPRETED,
    assert_compiles,
    assert_passes_in_the_interpreter,
    nan_filled_memory,
    needs_native,
)
from torch import Tensor

from infoclip import kernels, native
from infoclip.kernels import cost_volume as room
from infoclip.kernels.cost_volume import cost_embedding, cost_volume, cost_volume_topk
from infoclip.kernels.cost_volume.op import cost_volume as op

SLACK = 2.0  # two orders of summation of the same terms: each is as good as the other, within a small factor
FLOOR = 4.0  # norm, division, product and final rounding: one unit each; a running sum of K terms wanders by sqrt(K)


# B, N, T, P, d. A register block of AVX-512 is 12 x 32, a tile 48 x 128; Triton's is 64 x 64 x 32; depth blocks of 256.
SIZES = [
    (1, 1, 1, 1, 1),
    (2, 31, 11, 1, 7),
    (1, 32, 12, 1, 64),
    (2, 33, 13, 1, 123),
    (1, 127, 47, 1, 256),
    (1, 128, 48, 1, 257),
    (1, 277, 101, 1, 61),  # primes: more than two tiles and a remainder each way
    (3, 29, 7, 5, 31),  # several prompts
    (2, 64, 65, 2, 33),
    (1, 37, 3, 1, 640),  # more than two depth blocks and a remainder
    (0, 5, 3, 2, 8),
    (2, 0, 3, 2, 8),
    (2, 5, 0, 2, 8),
    (2, 5, 3, 0, 8),
]
if INTERPRETED:  # the interpreter walks every program in Python
    SIZES = [s for s in SIZES if s[1] * s[2] * s[4] < 150_000]


def features(size: tuple[int, ...], dtype: torch.dtype, shared: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    b, n, t, p, d = size
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(b, n, d, generator=generator).to(dtype)
    text = torch.randn(*(() if shared else (b,)), t, p, d, generator=generator).to(dtype)
    grad = torch.randn(b, p, t, n, generator=generator).to(dtype)
    return image, text, grad


def allowance(dtype: torch.dtype, terms: int, eager: Tensor, want: Tensor) -> Tensor:
    """The rule on top of this file: how far off a value may be."""
    rounding = (FLOOR + terms**0.5 / 4) * EPS[dtype] * want.abs().max()
    # In float64 the reference is compared with itself: what it is off is not seen, and counted as one rounding more.
    own = rounding if dtype == torch.float64 else (eager.double() - want).abs().max()
    return SLACK * own + rounding


def run(
    image: Tensor, text: Tensor, grad: Tensor, backend: str, temperature: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    image, text = image.detach().requires_grad_(), text.detach().requires_grad_()
    out = cost_volume(image, text, temperature=temperature, backend=backend)
    d_image, d_text = torch.autograd.grad(out, (image, text), grad)
    return out.detach(), d_image, d_text


def assert_as_good(image: Tensor, text: Tensor, grad: Tensor, backend: str, temperature: float | None = None) -> None:
    """Value and gradients of the backend, by the rule on top of this file."""
    dtype = image.dtype
    exact = run(image.double(), text.double(), grad.double(), "reference", temperature)
    plain = run(image, text, grad, "reference", temperature)
    got = run(image, text, grad, backend, temperature)
    sums = (image.shape[-1], grad.shape[1] * grad.shape[2], grad.shape[0] * grad.shape[3])
    names = ("value", "d_image", "d_text")
    for name, terms, want, eager, value in zip(names, sums, exact, plain, got, strict=True):
        assert value.dtype == dtype
        assert value.shape == want.shape
        if not want.numel():
            continue
        allowed = allowance(dtype, terms, eager, want)
        error = (value.double() - want).abs().max()
        assert error <= allowed, f"{name}: off by {error:.2e}, allowed {allowed:.2e}"


@pytest.fixture(autouse=True)
def nan_filled():
    with nan_filled_memory():
        yield


def test_uninitialised_memory_is_nan_in_these_tests():
    assert torch.empty(64).isnan().all()


def test_reference_is_the_cosine():
    image, text, _ = features((2, 5, 3, 2, 7), torch.float64, shared=True)
    out = cost_volume(image, text, temperature=0.5, backend="reference")
    for b, p, t, n in ((0, 0, 0, 0), (1, 1, 2, 4), (1, 0, 1, 3)):
        want = torch.cosine_similarity(image[b, n], text[t, p], dim=0) / 0.5
        torch.testing.assert_close(out[b, p, t, n], want, rtol=1e-12, atol=1e-12)  # fp64, a sum of seven


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-image"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size, shared, backend):
    assert_as_good(*features(size, torch.float32, shared), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-image"])
def test_dtypes(dtype, shared, backend):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernels have no float64")
    assert_as_good(*features((2, 33, 13, 3, 70), dtype, shared), backend, temperature=0.07)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_any_strides(backend, dtype):
    image, text, grad = features((2, 33, 13, 2, 21), dtype, shared=True)
    assert_as_good(image.transpose(1, 2).contiguous().transpose(1, 2), text, grad, backend)  # a map [B, d, h, w]
    assert_as_good(image, text.permute(2, 0, 1).contiguous().permute(1, 2, 0), grad, backend)
    wide = torch.zeros(2, 40, 50, dtype=dtype)
    wide[:, 3:36, 1:43:2] = image
    assert_as_good(wide[:, 3:36, 1:43:2], text, grad, backend)  # sliced, every other channel
    flat = torch.zeros(image.numel() + 1, dtype=dtype)
    flat[1:] = image.flatten()
    assert_as_good(flat[1:].view_as(image), text, grad, backend)  # off the alignment of a vector
    assert_as_good(image[:1].expand(2, -1, -1), text, grad, backend)  # stride 0 over the batch
    assert_as_good(image, text[:1].expand(13, -1, -1), grad, backend)  # stride 0 over the classes: equal rows
    assert_as_good(image, text, torch.ones((), dtype=dtype).expand_as(grad), backend)  # as sum() sends it
    assert_as_good(image, text, grad.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_and_tiny_rows(backend):
    image, text, grad = features((2, 9, 5, 2, 19), torch.float32, shared=True)
    image[0, 3], text[2, 1] = 0, 0
    out, _, _ = run(image, text, grad, backend)
    assert (out[0, :, :, 3] == 0).all()
    assert (out[:, 1, 2] == 0).all()
    assert out.isfinite().all()
    image[0, 4] = 1e-14  # a norm below the clamp
    want = run(image, text, grad, "reference")
    for value, expected in zip(run(image, text, grad, backend), want, strict=True):
        # Rows of norm 0 carry gradients of 1e12 times the rest: each row by its own largest, fp32 sums of 19 terms.
        size = expected.abs().amax(dim=-1, keepdim=True)
        assert ((value - expected).abs() <= 2e-6 * size).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_stay_where_they_are(backend):
    image, text, _ = features((1, 9, 5, 1, 19), torch.float32, shared=True)
    image[0, 3, 2] = float("nan")
    out = cost_volume(image, text, backend=backend)
    assert out[..., 3].isnan().all()
    assert out[..., :3].isfinite().all()
    assert out[..., 4:].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_requested_gradient(backend):
    image, text, grad = features((2, 17, 5, 2, 13), torch.float32, shared=True)
    _, d_image, d_text = run(image, text, grad, backend)
    alone = image.clone().requires_grad_()
    (got,) = torch.autograd.grad(cost_volume(alone, text, backend=backend), alone, grad)
    assert torch.equal(got, d_image)
    alone = text.clone().requires_grad_()
    (got,) = torch.autograd.grad(cost_volume(image, alone, backend=backend), alone, grad)
    assert torch.equal(got, d_text)
    assert not cost_volume(image, text, backend=backend).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_the_same_bits_and_nothing_changed(backend):
    image, text, grad = features((2, 67, 13, 2, 33), torch.float32, shared=True)
    copies = image.clone(), text.clone(), grad.clone()
    leaf = image.clone().requires_grad_()
    out = cost_volume(leaf, text, backend=backend)
    first = torch.autograd.grad(out, leaf, grad, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out, leaf, grad)[0])
    assert torch.equal(out, cost_volume(image, text, backend=backend))
    assert all(torch.equal(a, b) for a, b in zip(copies, (image, text, grad), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuted_classes_permute_the_result(backend):
    image, text, _ = features((1, 33, 29, 1, 16), torch.float32, shared=True)
    order = torch.randperm(29, generator=torch.Generator().manual_seed(1))
    whole = cost_volume(image, text, backend=backend)
    permuted = cost_volume(image, text[order], backend=backend)
    if INTERPRETED:  # it multiplies by NumPy, whose order of summation depends on the row
        torch.testing.assert_close(permuted, whole[:, :, order], rtol=0, atol=1e-6)
    else:
        assert torch.equal(permuted, whole[:, :, order])
    assert torch.equal(cost_volume(image, text[None], backend=backend), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    image, text, _ = features((2, 9, 5, 2, 7), torch.float32, shared=True)
    torch.use_deterministic_algorithms(False)  # opcheck compares runs itself
    torch.library.opcheck(op, (image.requires_grad_(), text.requires_grad_(), 2.0, backend))


class TestTopClasses:
    """The cut to the most similar classes: which they are, and that their volume and gradients are the volume's."""

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    @pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-image"])
    def test_are_those_with_the_largest_similarity(self, shared, backend):
        image, text, _ = features((3, 70, 131, 2, 19), torch.float32, shared)  # three tiles of rows, two of columns
        whole = cost_volume(image, text, temperature=0.5, backend=backend)
        highest = cost_volume(image.double(), text.double(), backend="reference").amax(dim=(1, 3))
        for k in (1, 20, 131):
            got = cost_volume_topk(image, text, k, temperature=0.5, backend=backend)
            assert got.classes.shape == (3, k)
            assert (got.classes.diff(dim=1) > 0).all()
            border = highest.sort(dim=1, descending=True).values[:, k - 1 : k]
            assert (highest.gather(1, got.classes) >= border - 1e-6).all()  # fp32 sums of 19 terms of at most 1
            for b in range(3):
                torch.testing.assert_close(got.volume[b], whole[b, :, got.classes[b]], rtol=0, atol=1e-6)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_in_half_precision_are_chosen_before_rounding(self, dtype, backend):
        image, text, _ = features((2, 33, 40, 1, 64), dtype, shared=True)
        exact = cost_volume(image.double(), text.double(), backend="reference").amax(dim=(1, 3))
        got = cost_volume_topk(image, text, 7, backend=backend)
        assert got.volume.dtype == dtype
        border = exact.topk(7, dim=1).values[:, -1:]
        assert (exact.gather(1, got.classes) >= border - 1e-5).all()  # fp32 sums, not the dtype's 1e-3

    @pytest.mark.parametrize("backend", ["reference", *BACKENDS])
    def test_gradient_is_that_of_the_chosen(self, backend):
        image, text, _ = features((2, 17, 9, 2, 13), torch.float32, shared=True)
        leaves = image.clone().requires_grad_(), text.clone().requires_grad_()
        got = cost_volume_topk(*leaves, 4, backend=backend)
        grad = torch.randn(got.volume.shape, generator=torch.Generator().manual_seed(2))
        found = torch.autograd.grad(got.volume, leaves, grad)
        same = image.clone().requires_grad_(), text.clone().requires_grad_()
        whole = cost_volume(*same, backend="reference")
        index = got.classes[:, None, :, None].expand(-1, 2, -1, 17)
        for a, b in zip(found, torch.autograd.grad(whole.gather(2, index), same, grad), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6 * float(b.abs().max()))  # fp32 sums of 70 terms
        with torch.no_grad():
            plain = cost_volume_topk(image, text, 4, backend=backend)
        assert torch.equal(plain.classes, got.classes)
        torch.testing.assert_close(plain.volume, got.volume.detach(), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_nan_counts_as_the_largest(self, backend):
        image, text, _ = features((1, 40, 20, 1, 8), torch.float32, shared=True)
        text[13, 0, 2] = float("nan")
        assert 13 in cost_volume_topk(image, text, 1, backend=backend).classes
        for pixel in (0, 17, 37, 39):  # of a vector's lanes, of either of two vectors, of what is left over
            image, text, _ = features((1, 40, 20, 1, 8), torch.float32, shared=True)
            image[0, pixel, 3] = float("nan")
            assert room.op.sweep(image, text, 1.0, False, backend)[1].isnan().all()

    @pytest.mark.parametrize(
        ("k", "error", "message"),
        [
            (0, ValueError, "k: expected 1 to 5"),
            (6, ValueError, "k: expected 1 to 5"),
            (2.0, TypeError, "k: expected a whole number, got float"),
        ],
    )
    def test_bad_k(self, k, error, message):
        image, text, _ = features((1, 4, 5, 1, 8), torch.float32, shared=True)
        with pytest.raises(error, match=message):
            cost_volume_topk(image, text, k)

    def test_nothing_to_compare(self):
        image, text, _ = features((1, 0, 5, 1, 8), torch.float32, shared=True)
        with pytest.raises(ValueError, match="without pixels or prompts"):
            cost_volume_topk(image, text, 2)


class TestEmbedding:
    """The convolution behind the volume, a chunk of classes at a time, against volume and convolution in fp64."""

    @staticmethod
    def inputs(shared=True, dtype=torch.float32, size=(2, 30, 7, 3, 11), channels=4, side=7):
        image, text, _ = features(size, dtype, shared)
        generator = torch.Generator().manual_seed(3)
        weight = torch.randn(channels, size[3], side, side, generator=generator).mul(0.1).to(dtype)
        bias = torch.randn(channels, generator=generator).to(dtype)
        grad = torch.randn(size[0], size[2], channels, 5, 6, generator=generator).to(dtype)
        return (image, text, weight, bias), grad

    @staticmethod
    def run(tensors, grad, **options):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        out = cost_embedding(*leaves, (5, 6), **options)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-image"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("chunk", [None, 1, 3, 7, 100])
    def test_value_and_gradients(self, chunk, dtype, shared, backend):
        tensors, grad = self.inputs(shared, dtype)
        exact = self.run([x.double() for x in tensors], grad.double(), backend="reference", temperature=0.5)
        plain = self.run(tensors, grad, backend="reference", temperature=0.5)
        got = self.run(tensors, grad, backend=backend, class_chunk=chunk, temperature=0.5)
        sums = (11 * 3 * 49, 4 * 49 * 21, 4 * 49 * 60, 2 * 7 * 30, 2 * 7 * 30)
        for value, want, eager, terms in zip(got, exact, plain, sums, strict=True):
            assert value.dtype == dtype
            # Two roundings more than the volume's: its own, and that of the chunk's sum.
            assert (value.double() - want).abs().max() <= 2 * allowance(dtype, terms, eager, want)

    def test_reference_is_volume_and_convolution(self):
        (image, text, weight, bias), _ = self.inputs()
        out = cost_embedding(image, text, weight, bias, (5, 6), backend="reference")
        volume = cost_volume(image, text, backend="reference")
        for b, t in ((0, 0), (1, 6)):
            want = torch.nn.functional.conv2d(volume[b, :, t].view(1, 3, 5, 6), weight, bias, padding=3)
            torch.testing.assert_close(out[b, t], want[0], rtol=0, atol=1e-6)  # the same sums, batched otherwise

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_only_the_requested_gradients(self, backend):
        tensors, grad = self.inputs()
        every = self.run(tensors, grad, backend=backend, class_chunk=3)[1:]
        for i in range(4):
            leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate(tensors)]
            out = cost_embedding(*leaves, (5, 6), backend=backend, class_chunk=3)
            torch.testing.assert_close(torch.autograd.grad(out, leaves[i], grad)[0], every[i], rtol=0, atol=1e-5)
        without = cost_embedding(*tensors[:3], None, (5, 6), backend=backend)
        with_zero = cost_embedding(*tensors[:3], torch.zeros(4), (5, 6), backend=backend)
        torch.testing.assert_close(without, with_zero, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_opcheck_and_compile(self, backend):
        tensors, _ = self.inputs()
        torch.use_deterministic_algorithms(False)
        leaves = [x.requires_grad_() for x in tensors]
        torch.library.opcheck(room.embedding.cost_embedding, (*leaves, 5, 6, 2.0, 3, backend))
        torch.library.opcheck(room.op.sweep, (tensors[0].detach(), tensors[1].detach(), 2.0, True, backend))
        compiled = torch.compile(
            lambda *x: cost_embedding(*x, (5, 6), backend=backend, class_chunk=3), fullgraph=True, backend="aot_eager"
        )
        assert torch.equal(compiled(*leaves), cost_embedding(*leaves, (5, 6), backend=backend, class_chunk=3))

    @needs_native
    def test_the_volume_is_never_there(self, monkeypatch):
        """Counted in elements handed to the native code: no chunk is larger than asked for, forward and backward."""
        tensors, grad = self.inputs(size=(1, 30, 40, 3, 11))
        largest = []
        true = native.cost_volume_forward

        def counted(image, text, out, scale, highest=None, **more):
            largest.append(out.numel())
            true(image, text, out, scale, highest, **more)

        monkeypatch.setattr(native, "cost_volume_forward", counted)
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
            self.run(tensors, grad, backend="native", class_chunk=4)
        assert len(largest) == 20
        assert max(largest) == 4 * 3 * 30
        assert sum(saved) == sum(x.numel() for x in tensors[:3])

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"weight": torch.ones(4, 2, 7, 7)}, ValueError, r"weight: expected \[C, 3, k, k\] with an odd k"),
            ({"weight": torch.ones(4, 3, 6, 6)}, ValueError, "with an odd k"),
            ({"bias": torch.ones(5)}, ValueError, r"bias: expected \[4\], got \[5\]"),
            ({"grid": (4, 6)}, ValueError, "with h w = 30"),
            ({"class_chunk": 0}, ValueError, "class_chunk: expected at least 1"),
            ({"class_chunk": 2.0}, TypeError, "class_chunk: expected a whole number"),
            ({"weight": 3}, TypeError, "weight: expected a tensor, got int"),
        ],
    )
    def test_bad_input(self, change, error, message):
        (image, text, weight, bias), _ = self.inputs()
        arguments = {"weight": weight, "bias": bias, "grid": (5, 6), **change}
        with pytest.raises(error, match=message):
            cost_embedding(image, text, **arguments)


@needs_native
@pytest.mark.skipif(INTERPRETED, reason="native")
class TestNative:
    @pytest.mark.parametrize("shared", [True, False])
    def test_gradcheck(self, shared):
        image, text, _ = features((2, 5, 3, 2, 4), torch.float64, shared)
        for backend in ("reference", "native"):
            torch.autograd.gradcheck(
                lambda i, t, backend=backend: cost_volume(i, t, temperature=0.3, backend=backend),
                (image.requires_grad_(), text.requires_grad_()),
            )

    @pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_every_instruction_set_and_any_thread_count(self, isa, dtype):
        if isa not in native.build_info()["isa_usable"]:
            pytest.skip(f"this CPU has no {isa}")
        size = (2, 301, 83, 2, 259)  # enough operations an image for several threads
        image, text, grad = features(size, dtype, shared=True)
        exact = run(image.double(), text.double(), grad.double(), "reference")
        eager = run(image, text, grad, "reference")
        first = None
        for threads in (1, 2, 5):
            out = torch.empty_like(grad)
            d_image, d_text = torch.empty_like(image), torch.empty_like(text)
            native.cost_volume_forward(image, text, out, 1.0, isa=isa, threads=threads)
            native.cost_volume_backward(grad, image, text, d_image, d_text, 1.0, isa=isa, threads=threads)
            first = first or (out, d_image, d_text)
            assert all(torch.equal(a, b) for a, b in zip(first, (out, d_image, d_text), strict=True))
        for value, want, plain, terms in zip(first, exact, eager, (259, 166, 602), strict=True):
            assert (value.double() - want).abs().max() <= allowance(dtype, terms, plain, want)

    def test_half_conversions_are_torchs(self):
        # d = 1 and a huge scale: the result is +-scale, rounded to the dtype as torch rounds it.
        for dtype in (torch.float16, torch.bfloat16):
            for scale in (
                1.0,
                1 / 3,
                65519.0,
                65520.0,
                6.1e-5,
                5.9e-8,
                2.9e-8,
                3.1e-8,
                1.00048828125,
                1.0014648,
                1e-30,
            ):
                out = torch.empty(1, 1, 1, 1, dtype=dtype)
                one = torch.ones(1, 1, 1, dtype=dtype)
                native.cost_volume_forward(one, one, out, scale)
                assert torch.equal(out.view(()), torch.tensor(scale, dtype=torch.float32).to(dtype)), scale
            # Every half in the range where a norm is neither clamped nor overflows: x / |x| is its sign, exactly.
            bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
            bits = bits[bits.isfinite() & (bits.float().abs() > 1e-11) & (bits.float().abs() < 1e18)]
            out = torch.empty(1, 1, 1, len(bits), dtype=dtype)
            native.cost_volume_forward(bits.view(1, -1, 1), torch.ones(1, 1, 1, dtype=dtype), out, 1.0)
            assert torch.equal(out.view(-1), bits.sign())

    def test_compiled_equals_eager(self):
        image, text, grad = features((2, 17, 5, 2, 13), torch.float32, shared=True)
        torch.use_deterministic_algorithms(False)
        for backend in ("native", None):
            compiled = torch.compile(
                lambda i, t, b=backend: cost_volume(i, t, backend=b) * 2.0, fullgraph=True, backend="aot_eager"
            )
            leaf, same = image.clone().requires_grad_(), image.clone().requires_grad_()
            got, want = compiled(leaf, text), cost_volume(same, text, backend=backend) * 2.0
            assert torch.equal(got, want)
            got.backward(grad)
            want.backward(grad)
            assert torch.equal(leaf.grad, same.grad)

    def test_a_planted_error_is_caught(self, monkeypatch):
        image, text, grad = features((2, 33, 13, 1, 21), torch.float32, shared=True)
        assert_as_good(image, text, grad, "native")
        true = native.cost_volume_forward

        def one_row_short(i, t, out, scale, **more):
            true(i, t, out, scale, **more)
            out[:, :, -1] = out[:, :, -2]

        monkeypatch.setattr(native, "cost_volume_forward", one_row_short)
        with pytest.raises(AssertionError, match="value: off by"):
            assert_as_good(image, text, grad, "native")
        monkeypatch.setattr(native, "cost_volume_forward", true)
        true_backward = native.cost_volume_backward

        def forgets_the_projection(g, i, t, d_image, d_text, scale, **more):
            true_backward(g, i, t, d_image, d_text, scale, **more)
            d_image.mul_(1.001)

        monkeypatch.setattr(native, "cost_volume_backward", forgets_the_projection)
        with pytest.raises(AssertionError, match="d_image: off by"):
            assert_as_good(image, text, grad, "native")


@pytest.mark.skipif(INTERPRETED, reason="no kernel here")
class TestPublicFunction:
    @pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
    def test_autocast_takes_its_dtype(self, backend):
        image, text, _ = features((1, 9, 5, 1, 32), torch.float32, shared=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = cost_volume(image, text, backend=backend)
        assert out.dtype == torch.bfloat16
        want = cost_volume(image.bfloat16().double(), text.bfloat16().double(), backend="reference")
        # Norms and sums in fp32: only the final rounding to bfloat16 is left.
        assert (out.double() - want).abs().max() <= 1.01 * EPS[torch.bfloat16]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert cost_volume(image.double(), text, backend=backend).dtype == torch.float64

    def test_shapes_on_the_meta_device(self):
        out = cost_volume(torch.ones(2, 9, 32, device="meta"), torch.ones(5, 3, 32, device="meta"))
        assert out.shape == (2, 3, 5, 9)

    @needs_native
    def test_native_saves_its_inputs_and_nothing_else(self):
        image, text, _ = features((2, 64, 33, 1, 32), torch.float32, shared=True)
        saved: list[int] = []

        def pack(x: Tensor) -> Tensor:
            saved.append(x.numel() * x.element_size())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            cost_volume(image.requires_grad_(), text.requires_grad_(), backend="native")
        assert sum(saved) == 4 * (image.numel() + text.numel())

    def test_two_dtypes_are_promoted(self):
        image, text, _ = features((1, 9, 5, 1, 32), torch.float32, shared=True)
        assert cost_volume(image.bfloat16(), text).dtype == torch.float32

    def test_choice_of_a_backend(self, monkeypatch):
        image, text, _ = features((1, 9, 5, 1, 32), torch.float32, shared=True)
        monkeypatch.setenv("INFOCLIP_BACKEND", "reference")
        assert kernels.choose("cost_volume", None, "cpu", torch.float32) == "reference"
        monkeypatch.setenv("INFOCLIP_BACKEND", "triton")
        with pytest.raises(kernels.BackendUnavailableError, match=r"INFOCLIP_BACKEND='triton'.*TRITON_INTERPRET"):
            cost_volume(image, text)
        assert cost_volume(image, text, backend="reference").shape == (1, 1, 5, 9)
        monkeypatch.setenv("INFOCLIP_BACKEND", "fastest")
        with pytest.raises(ValueError, match="INFOCLIP_BACKEND='fastest': expected auto or one of"):
            cost_volume(image, text)
        with kernels.use_backend("reference"):  # before the variable, after the argument
            assert kernels.choose("cost_volume", None, "cpu", torch.float32) == "reference"
            with pytest.raises(kernels.BackendUnavailableError, match="TRITON_INTERPRET"):
                kernels.choose("cost_volume", "triton", "cpu", torch.float32)
        with (
            pytest.raises(ValueError, match="backend='fastest': expected auto or one of"),
            kernels.use_backend("fastest"),
        ):
            pass
        monkeypatch.delenv("INFOCLIP_BACKEND")
        expected = "native" if native.available() else "reference"
        assert kernels.choose("cost_volume", None, "cpu", torch.float32) == expected
        assert kernels.choose("cost_volume", "auto", "meta", torch.float32) == "reference"

    def test_explain_has_every_backend(self):
        rows = [row for row in kernels.explain() if row["op"] == "cost_volume"]
        assert {(row["device"], row["backend"]) for row in rows} == {
            (device, backend) for device in ("cpu", "cuda") for backend in kernels.BACKENDS
        }
        assert all(row["available"] == (row["why_not"] is None) for row in rows)
        assert sum(row["auto"] for row in rows if row["device"] == "cpu") == 1

    @pytest.mark.parametrize(
        ("image", "text", "error", "message"),
        [
            ((2, 3), (4, 1, 3), ValueError, r"image_feats: expected \[B, N, d\], got \[2, 3\]"),
            ((2, 5, 3), (4, 1, 2), ValueError, r"text_feats: expected \[T, P, 3\]"),
            ((2, 5, 3), (4, 3), ValueError, r"text_feats: expected \[T, P, 3\]"),
            ((2, 5, 3), (3, 4, 1, 3), ValueError, "expected a batch of 2 as image_feats has, got 3"),
        ],
    )
    def test_bad_shapes(self, image, text, error, message):
        with pytest.raises(error, match=message):
            cost_volume(torch.ones(image), torch.ones(text))

    def test_bad_values(self):
        image, text, _ = features((1, 9, 5, 1, 32), torch.float32, shared=True)
        with pytest.raises(TypeError, match="image_feats: expected a tensor, got list"):
            cost_volume([1.0], text)
        with pytest.raises(TypeError, match=r"text_feats: expected float32, .* got torch.int64"):
            cost_volume(image, text.long())
        with pytest.raises(ValueError, match="temperature: expected a finite number above 0, got 0"):
            cost_volume(image, text, temperature=0)
        with pytest.raises(ValueError, match="backend='fast': expected auto or one of"):
            cost_volume(image, text, backend="fast")
        with pytest.raises(ValueError, match="expected one device"):
            cost_volume(image, text.to("meta"))


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's run")
def test_triton_in_the_interpreter():
    assert_passes_in_the_interpreter(__file__)


@pytest.mark.skipif(INTERPRETED, reason="compiled ahead of time")
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_triton_compiles_without_a_gpu(capability):
    """Spills, shared memory and matrix instructions for the GPU generations that are served."""
    assert_compiles("cost_volume", capability)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_on_the_gpu(backend, dtype, shared):
    reason = kernels.why_not("cost_volume", backend, "cuda", dtype)
    if reason:
        pytest.skip(reason)
    for size in SIZES:
        image, text, grad = (x.cuda() for x in features(size, dtype, shared))
        assert_as_good(image, text, grad, backend)
        moved = image.transpose(1, 2).contiguous().transpose(1, 2)
        assert_as_good(moved, text, grad, backend)
