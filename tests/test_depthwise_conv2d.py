"""Depthwise convolution: every backend against the fp64 reference, and torch's own checks.

Tolerance: a gradient may be off from the fp64 reference by what the reference in the same dtype is off, times
``SLACK``, plus ``FLOOR`` + sqrt(terms of a sum) / 4 roundings of fp32, in which every form adds up, of the largest
value, plus one rounding of the dtype in which it is stored. Forward is the reference's own.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import EPS, INTERPRETED, nan_filled_memory, needs_native
from torch import nn
from torch.nn import functional as F

from infoclip import kernels, native
from infoclip.clip.convnext import DepthwiseConv2d
from infoclip.kernels.depthwise_conv2d import depthwise_conv2d
from infoclip.kernels.depthwise_conv2d.op import depthwise_conv2d_weight_grad

pytestmark = [pytest.mark.skipif(INTERPRETED, reason="no Triton form"), needs_native]

SLACK = 2.0  # two orders of summation of the same terms: each is as good as the other, within a small factor
FLOOR = 4.0  # a product, the sum of the work items' sums and a half's rounding on the way

# B, C, H, W, K, dilation: vectors of 4, 8 or 16 channels and the rest of one; work items of 32 rows; kernels wider than
# the map; rows of 7 taps and what is left of one.
SIZES = [
    (1, 1, 1, 1, 1, 1),
    (2, 5, 4, 6, 3, 1),
    (1, 16, 9, 33, 7, 1),
    (1, 35, 65, 5, 7, 1),
    (2, 8, 3, 2, 7, 1),
    (1, 18, 40, 7, 5, 2),
    (1, 3, 12, 12, 9, 1),
    (2, 4, 6, 5, 15, 3),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def case(size, dtype=torch.float32, seed=0):
    B, C, H, W, K, dilation = size
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, C, H, W, generator=generator).to(dtype)
    weight = (torch.randn(C, 1, K, K, generator=generator) / K).to(dtype)
    bias = torch.randn(C, generator=generator).to(dtype)
    grad = torch.randn(B, C, H, W, generator=generator).to(dtype)
    return (x, weight, bias), dilation, grad


def run(inputs, dilation, grad, backend):
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = depthwise_conv2d(*leaves, dilation=dilation, backend=backend)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def assert_as_good(inputs, dilation, grad, backend="native"):
    """Value and gradients of the backend, by the rule on top of this file."""
    wide = tuple(t.double() for t in inputs)
    exact = run(wide, dilation, grad.double(), "reference")
    plain = run(inputs, dilation, grad, "reference")
    got = run(inputs, dilation, grad, backend)
    dtype = inputs[0].dtype
    computed = EPS[torch.promote_types(dtype, torch.float32)]
    assert torch.equal(got[0], plain[0])
    assert torch.equal(got[1], plain[1])
    terms = grad.numel() // grad.shape[1]
    for name, want, ours, theirs in zip(("d_weight", "d_bias"), exact[2:], got[2:], plain[2:], strict=True):
        off = (ours.double() - want).abs().max()
        allowed = SLACK * (theirs.double() - want).abs().max()
        allowed += ((FLOOR + terms**0.5 / 4) * computed + (EPS[dtype] if dtype.itemsize == 2 else 0)) * want.abs().max()
        assert off <= allowed, f"{name}: off by {off:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_fp64(size, dtype):
    with nan_filled_memory():
        assert_as_good(*case(size, dtype))


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(
        st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 20),
        st.sampled_from([1, 3, 5, 7, 11]), st.integers(1, 3),
    ),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_size(size, seed):
    assert_as_good(*case(size, seed=seed))


def test_known_sums():
    """A single pixel of gradient picks its neighbourhood out of the input; outside the map there is nothing."""
    x = torch.arange(20.0).view(1, 1, 4, 5)
    weight = torch.zeros(1, 1, 3, 3, requires_grad=True)
    bias = torch.zeros(1, requires_grad=True)
    grad = torch.zeros(1, 1, 4, 5)
    grad[0, 0, 1, 2] = 2.0
    depthwise_conv2d(x, weight, bias, backend="native").backward(grad)
    assert weight.grad[0, 0].tolist() == [[2.0, 4.0, 6.0], [12.0, 14.0, 16.0], [22.0, 24.0, 26.0]]
    assert bias.grad.tolist() == [2.0]
    weight.grad = None
    grad = torch.zeros(1, 1, 4, 5)
    grad[0, 0, 3, 4] = 1.0
    depthwise_conv2d(x, weight, backend="native").backward(grad)
    assert weight.grad[0, 0].tolist() == [[13.0, 14.0, 0.0], [18.0, 19.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_and_any_thread_count(isa, dtype, monkeypatch):
    if isa not in native.build_info()["isa_usable"]:
        pytest.skip(f"this CPU has no {isa}")
    problem = case((2, 35, 70, 33, 7, 1), dtype)  # enough products for several threads
    kernel = native.depthwise_conv2d_weight_grad
    first = None
    for threads in (1, 2, 5):
        monkeypatch.setattr(
            native, "depthwise_conv2d_weight_grad", lambda *a, n=threads: kernel(*a, isa=isa, threads=n)
        )
        got = run(*problem, "native")
        first = first or got
        assert all(torch.equal(a, b) for a, b in zip(first, got, strict=True))
    assert_as_good(*problem)


def test_strides_do_not_matter():
    (x, weight, bias), dilation, grad = case((2, 18, 9, 6, 7, 1))
    want = run((x, weight, bias), dilation, grad, "native")[2:]
    wide = torch.full((2, 18, 9, 9), torch.nan)[..., 1:7]
    last = torch.channels_last
    for a, g in (
        (x.contiguous(memory_format=last), grad.contiguous(memory_format=last)),
        (wide.copy_(x), grad.contiguous(memory_format=last)),  # misaligned rows in a larger buffer
        (x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), grad),
    ):
        for ours, expected in zip(run((a, weight, bias), dilation, g, "native")[2:], want, strict=True):
            assert torch.equal(ours, expected)
    constant = torch.ones(()).expand_as(grad)  # what sum() hands to the backward
    first, second = (run((x, weight, bias), 1, g, "native")[2:] for g in (constant, torch.ones_like(grad)))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_what_is_asked_for():
    inputs, dilation, grad = case((1, 5, 6, 4, 3, 1))
    want = run(inputs, dilation, grad, "native")[1:]
    for index in range(3):
        leaves = [t.detach().clone() for t in inputs]
        leaves[index].requires_grad_()
        out = depthwise_conv2d(*leaves, backend="native")
        out.backward(grad, retain_graph=True)
        out.backward(grad)  # nothing saved was changed by the first
        torch.testing.assert_close(leaves[index].grad, 2 * want[index], rtol=1e-6, atol=1e-6)
        assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i != index)


def test_what_is_not_finite_is_seen():
    (x, weight, bias), dilation, grad = case((1, 5, 6, 4, 3, 1))
    grad[0, 2, 3, 1] = torch.nan
    _, _, d_weight, d_bias = run((x, weight, bias), dilation, grad, "native")
    assert d_weight[2].isnan().all()
    assert d_bias[2].isnan()
    kept = [0, 1, 3, 4]
    assert d_weight[kept].isfinite().all()
    assert d_bias[kept].isfinite().all()


def test_saved_memory_is_that_of_the_convolution():
    def saved(backend):
        (x, weight, bias), _, _ = case((1, 5, 6, 4, 3, 1))
        found: list[int] = []
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (found.append(t.nbytes), t)[1], lambda t: t):
            depthwise_conv2d(*leaves, backend=backend)
        return sum(found)

    assert saved("native") == saved("reference") == 4 * (5 * 6 * 4 + 5 * 9)


def test_opcheck_and_gradcheck():
    (x, weight, bias), dilation, grad = case((1, 5, 4, 3, 3, 2), torch.float64)
    torch.library.opcheck(depthwise_conv2d_weight_grad, (grad, x, 3, dilation))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    torch.autograd.gradcheck(lambda *a: depthwise_conv2d(*a, dilation=2, backend="native"), leaves)


def test_compiled_equals_eager():
    (x, weight, bias), _, grad = case((1, 5, 6, 4, 3, 1))
    weight.requires_grad_()
    compiled = torch.compile(
        lambda x: depthwise_conv2d(x, weight, bias, backend="native") * 2.0, fullgraph=True, backend="aot_eager"
    )
    gradients = []
    for form in (compiled, lambda x: depthwise_conv2d(x, weight, bias, backend="native") * 2.0):
        weight.grad = None
        form(x).backward(grad)
        gradients.append(weight.grad)
    assert torch.equal(*gradients)


def test_autocast_is_the_convolutions():
    (x, weight, bias), _, grad = case((1, 16, 9, 8, 7, 1))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    found = []
    for backend in ("native", "reference"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = depthwise_conv2d(*leaves, backend=backend)
        assert out.dtype == torch.bfloat16
        found.append(torch.autograd.grad(out, leaves, grad.bfloat16()))
    for ours, theirs, leaf in zip(*found, leaves, strict=True):
        assert ours.dtype == theirs.dtype == leaf.dtype
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-7 * float(theirs.abs().max()))


@pytest.mark.parametrize("plant", ["border", "items", "bias"])
def test_a_planted_error_is_caught(plant, monkeypatch):
    problem = case((1, 18, 40, 6, 7, 1))
    assert_as_good(*problem)
    kernel = native.depthwise_conv2d_weight_grad

    def wrong(x, grad, dilation, d_weight, d_bias):
        kernel(x, grad, dilation, d_weight, d_bias)
        if plant == "border":  # a padded column counts as its neighbour
            d_weight[:, 0, :, 0] += (grad[..., 2] * x[..., 0]).sum((0, 2))[:, None]
        elif plant == "items":  # the second work item's rows are forgotten
            kernel(x[:, :, :32].contiguous(), grad[:, :, :32].contiguous(), dilation, d_weight, None)
        else:  # the last channel belongs to no vector
            d_bias[-1] = 0

    monkeypatch.setattr(native, "depthwise_conv2d_weight_grad", wrong)
    with pytest.raises(AssertionError, match="off by"):
        assert_as_good(*problem)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x: expected \[B, C, H, W\]"),
        ({"x": torch.zeros(0, 5, 4, 4)}, "at least one of everything"),
        ({"weight": torch.zeros(5, 1, 4, 4)}, r"weight: expected \[5, 1, K, K\] with an odd K, got \[5, 1, 4, 4\]"),
        ({"weight": torch.zeros(5, 1, 3, 5)}, "with an odd K"),
        ({"weight": torch.zeros(4, 1, 3, 3)}, r"\[5, 1, K, K\]"),
        ({"bias": torch.zeros(4)}, r"bias: expected \[5\], got \[4\]"),
        ({"dilation": 0}, "dilation: expected at least 1, got 0"),
        ({"backend": "cuda"}, "expected auto or one of"),
        ({"weight": torch.zeros(5, 1, 3, 3, device="meta")}, "expected one device"),
    ],
)
def test_bad_values(change, message):
    good = {"x": torch.zeros(1, 5, 4, 4), "weight": torch.zeros(5, 1, 3, 3), "bias": None}
    with pytest.raises(ValueError, match=message):
        depthwise_conv2d(**(good | change))


def test_bad_types():
    x, weight = torch.zeros(1, 5, 4, 4), torch.zeros(5, 1, 3, 3)
    with pytest.raises(TypeError, match="x: expected a tensor, got list"):
        depthwise_conv2d([1], weight)
    with pytest.raises(TypeError, match=r"weight: expected float32.*got torch\.int64"):
        depthwise_conv2d(x, weight.long())
    with pytest.raises(TypeError, match=r"x has dtype torch\.float32, weight torch\.float16: expected one dtype"):
        depthwise_conv2d(x, weight.half())
    with pytest.raises(kernels.BackendUnavailableError, match="no triton backend"):
        depthwise_conv2d(x, weight, backend="triton")


def test_the_module_is_the_convolution_it_replaces():
    for conv in (
        nn.Conv2d(8, 8, 7, padding=3, groups=8),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8, bias=False),
    ):
        same = DepthwiseConv2d.of(conv)
        assert type(same) is DepthwiseConv2d
        assert same.weight is conv.weight
        assert same.bias is conv.bias
        x = torch.randn(1, 8, 9, 9)
        assert torch.equal(same(x), F.conv2d(x, conv.weight, conv.bias, 1, conv.padding, conv.dilation, 8))
    for conv in (
        nn.Conv2d(8, 8, 7, padding=3),
        nn.Conv2d(8, 8, 7, padding=3, groups=8, stride=2),
        nn.Conv2d(8, 8, 7, padding=2, groups=8),
        nn.Conv2d(8, 8, 4, padding=2, groups=8),
        nn.Conv2d(8, 8, (7, 3), padding=3, groups=8),
        nn.Conv2d(8, 8, 7, padding=3, groups=8, padding_mode="reflect"),
    ):
        assert DepthwiseConv2d.of(conv) is conv


def test_a_gpu_has_torchs_own():
    assert "torch's own convolution" in kernels.why_not("depthwise_conv2d", "native", "cuda")
    assert kernels.choose("depthwise_conv2d", "auto", "cuda", torch.float32) == "reference"
