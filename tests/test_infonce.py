"""InfoNCE: the definition, the bound, gradients, awkward inputs; then the op's backends against the fp64 reference."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys

import open_clip
import pytest
import torch
import torch.nn.functional as F
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
from torch import Tensor

from infoclip import kernels, native
from infoclip.kernels import infonce as room
from infoclip.kernels.infonce import infonce as op
from infoclip.kernels.infonce.op import infonce as registered
from infoclip.objective import infonce
from infoclip.objective.numerics import unit

op_module = importlib.import_module("infoclip.kernels.infonce.op")
shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 6), st.integers(0, 2**31))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spelt_out(x: Tensor, y: Tensor, temperature: float, symmetric: bool) -> float:
    losses = []
    for a, b in zip(x, y, strict=True):
        for p, q in [(a, b), (b, a)] if symmetric else [(a, b)]:
            for i in range(len(p)):
                weights = [math.exp(float(p[i] @ q[j]) / temperature) for j in range(len(q))]
                losses.append(-math.log(weights[i] / sum(weights)))
    return sum(losses) / len(losses)


@given(shapes, st.floats(0.2, 5.0), st.booleans())
@settings(max_examples=30, deadline=None)
def test_the_definition(shape: tuple[int, int, int, int], temperature: float, symmetric: bool) -> None:
    B, N, D, seed = shape
    x, y = unit(draw(B, N, D, seed=seed)), unit(draw(B, N, D, seed=seed + 1))
    result = infonce(x, y, temperature, symmetric=symmetric)
    assert result.loss.item() == pytest.approx(spelt_out(x, y, temperature, symmetric), abs=1e-11)
    assert result.bound.item() == pytest.approx(math.log(N) - result.loss.item(), abs=1e-12)
    assert result.bound.item() <= math.log(N) + 1e-12
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    moved = infonce(x[:, order], y[:, order], temperature, symmetric=symmetric)
    assert moved.loss.item() == pytest.approx(result.loss.item(), abs=1e-12)


def test_directions() -> None:
    x, y = draw(2, 5, 3), draw(2, 5, 3, seed=1)
    both = infonce(x, y, 0.5).loss
    torch.testing.assert_close(both, infonce(y, x, 0.5).loss)
    one, other = (infonce(a, b, 0.5, symmetric=False).loss for a, b in ((x, y), (y, x)))
    torch.testing.assert_close(both, (one + other) / 2)
    assert abs(one - other).item() > 1e-3


def test_extremes() -> None:
    eye = torch.eye(6)[None]
    assert infonce(eye, eye, 0.01).bound.item() == pytest.approx(math.log(6), abs=1e-6)
    for x in (torch.zeros(1, 6, 4), torch.ones(1, 6, 4)):  # nothing to tell samples apart
        x.requires_grad_()
        result = infonce(x, x, 0.1)
        assert result.loss.item() == pytest.approx(math.log(6), abs=1e-6)
        result.loss.backward()
        assert x.grad is not None
        assert bool(x.grad.isfinite().all())
    assert infonce(torch.ones(2, 1, 3), torch.ones(2, 1, 3), 0.1).loss == 0  # one sample
    huge = torch.full((1, 3, 2), 1e4)
    huge[0, 1] *= -1
    assert math.isfinite(infonce(huge, huge, 0.01).loss.item())  # logits of 1e10


def test_gradients() -> None:
    x, y = draw(2, 4, 3).requires_grad_(), draw(2, 4, 3, seed=1).requires_grad_()
    for symmetric in (True, False):
        assert torch.autograd.gradcheck(lambda a, b, s=symmetric: infonce(a, b, 0.3, s).loss, (x, y))


def test_precision() -> None:
    x, y = (unit(draw(2, 144, 52, seed=s, dtype=torch.float32)) for s in (0, 1))
    want = infonce(x.double(), y.double(), 0.1).loss
    # logits up to 10 in float32: a unit in the last place is 1e-6, and the mean over 288 rows takes most of it away
    assert abs(infonce(x, y, 0.1).loss.double() - want).item() < 2e-6
    low = x.bfloat16(), y.bfloat16()
    exact = infonce(low[0].float(), low[1].float(), 0.1).loss
    assert torch.equal(infonce(*low, 0.1).loss, exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(infonce(x, y, 0.1).loss, infonce(x, y, 0.1).loss.float())
        assert abs(infonce(x, y, 0.1).loss.double() - want).item() < 2e-6


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (TypeError, ([[[1.0]]], torch.ones(1, 1, 1), 0.1)),
        (TypeError, (torch.ones(1, 2, 3, dtype=torch.int64), torch.ones(1, 2, 3), 0.1)),
        (ValueError, (torch.ones(2, 3), torch.ones(2, 3), 0.1)),
        (ValueError, (torch.ones(1, 2, 3), torch.ones(1, 3, 3), 0.1)),
        (ValueError, (torch.ones(1, 0, 3), torch.ones(1, 0, 3), 0.1)),
        (ValueError, (torch.ones(1, 2, 3), torch.ones(1, 2, 3), 0.0)),
        (ValueError, (torch.ones(1, 2, 3), torch.ones(1, 2, 3), math.nan)),
    ],
)
def test_misuse(error: type[Exception], arguments: tuple) -> None:
    with pytest.raises(error, match="expected"):
        infonce(*arguments)


# The op: every backend against the fp64 reference, and torch's own checks.
#
# Tolerance: a backend may be off from the fp64 reference by what the reference in the same dtype is off, times
# ``SLACK``, plus ``FLOOR`` + sqrt(longest sum) / 4 roundings of the largest value. The loss is a difference of logits,
# so its roundings are of the largest logit. Sums and exponentials are fp32 (fp64 for fp64); the gradients of halves are
# rounded to them, and so may be the slopes that they are made of.

SLACK = 2.0  # two orders of summation of the same terms: each is as good as the other, within a small factor
FLOOR = 6.0  # product, scale, exponential, logarithm, difference and final rounding: one unit each

kernels.ops()

# B, N, M, D. Triton's blocks are 64 x 32 or 64 x 64 and 32 deep, its gradients 128 or 256 wide; a tile on the CPU is at
# most 192 x 192, its register blocks 12 x 32, depth blocks 256.
SIZES = [
    (1, 1, 1, 1),
    (2, 31, 31, 7),
    (1, 64, 64, 64),
    (1, 63, 65, 123),
    (3, 29, 47, 31),
    (1, 193, 191, 33),
    (1, 277, 277, 61),  # primes: more than two tiles and a remainder each way
    (1, 401, 613, 5),
    (2, 37, 37, 300),  # more than one block of depths, and of the gradient's entries
    (1, 33, 37, 640),
    (1, 64, 171, 512),
    (2, 171, 171, 171),
]
if INTERPRETED:  # the interpreter walks every program in Python
    SIZES = [s for s in SIZES if s[1] * s[2] * s[3] < 1_500_000 and s[1] * s[2] < 80_000]


def samples(size, dtype=torch.float32, seed=0, paired=None):
    """Rows of length about 1 that resemble their pairs, and the pairs: given where N and M differ."""
    B, N, M, D = size
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(B, M, D, generator=generator) / D**0.5
    if paired is None:
        paired = N != M
    positive = torch.randint(0, M, (B, N), generator=generator) if paired else torch.arange(N).expand(B, N)
    noise = torch.randn(B, N, D, generator=generator) / D**0.5
    x = 0.5 * y.gather(1, positive[..., None].expand(B, N, D)) + noise
    return x.to(dtype), y.to(dtype), positive if paired else None


def run(x, y, positive, backend, temperature=0.1, symmetric=True, learn=False, incoming=1.0):
    """Loss and gradients: d_x, d_y and, with ``learn``, of the temperature."""
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    leaves = [x, y]
    if learn:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        temperature = torch.tensor(temperature, dtype=wide, device=x.device, requires_grad=True)
        leaves.append(temperature)
    result = op(x, y, temperature, symmetric, positive=positive, backend=backend)
    return result.loss.detach(), *torch.autograd.grad(incoming * result.loss, leaves)


def assert_as_good(x, y, positive, backend, temperature=0.1, symmetric=True, learn=True):
    """Loss and gradients of the backend, by the rule on top of this part."""
    settings = {"temperature": temperature, "symmetric": symmetric, "learn": learn}
    exact = run(x.double(), y.double(), positive, "reference", **settings)
    plain = run(x, y, positive, "reference", **settings)
    got = run(x, y, positive, backend, **settings)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    (_, N, D), M = x.shape, y.shape[1]
    logits = (x.double() @ y.double().mT / temperature).abs().max().item()
    # A logit is a sum of D terms whose rounding the exponential passes on, to everything.
    noise = (FLOOR + D**0.5 / 4) * EPS[wide] * max(logits, 1.0)
    names = ("loss", "d_x", "d_y", "d_temperature")
    for name, terms, want, eager, value in zip(names, (1, M, N, N * M), exact, plain, got, strict=False):
        assert value.dtype == (x.dtype if name in ("d_x", "d_y") else wide)
        assert value.shape == want.shape
        largest = want.abs().max().item()
        if name == "loss":
            rounding = noise
        else:
            # A slope is off by its logit's rounding times at most 1, also where probability and 1 cancel (one column:
            # every slope is rounding alone); the sum of them grows as sums of roundings do.
            unit = max(x.abs().max().item(), y.abs().max().item()) / (temperature * x.shape[0] * N)
            unit *= max(1.0, terms**0.5 / 4)
            rounding = (FLOOR + terms**0.5 / 4) * EPS[wide] * largest + noise * max(largest, unit)
            if x.dtype != wide and name != "d_temperature":
                rounding += FLOOR * EPS[x.dtype] * largest
        if name == "d_temperature":  # the sum over all pairs of slope times logit, over the temperature
            rounding += noise * max(logits, 1.0) / temperature
        # In float64 the reference is compared with itself: what it is off is not seen; it counts as one rounding more.
        own = rounding if x.dtype == torch.float64 else (eager.double() - want).abs().max().item()
        allowed = SLACK * own + rounding + 2 * EPS[torch.float64]
        error = (value.double() - want).abs().max().item()
        assert error <= allowed, f"{name}: off by {error:.2e}, allowed {allowed:.2e}"
        if name in ("d_x", "d_y") and x.dtype == torch.float32 and largest > rounding:
            # As a vector: one row missing, or a bias, would hide under the largest entry. Not where all is rounding.
            off = (value.double() - want).norm()
            assert off <= allowed * max(want.norm() / largest if largest else 0.0, 1.0), (
                f"{name}: off by {off:.2e} in all"
            )


@pytest.fixture(autouse=True)
def nan_filled():
    with nan_filled_memory():
        yield


def test_the_bound_and_the_second_form_by_hand() -> None:
    x, y, positive = samples((2, 5, 7, 3), torch.float64)
    logits = x @ y.mT / 0.5
    one = F.cross_entropy(logits.flatten(0, 1), positive.flatten())
    back = torch.stack([F.cross_entropy(s.T[p], torch.arange(5)) for s, p in zip(logits, positive, strict=True)]).mean()
    for symmetric, want, most in ((False, one, math.log(7)), (True, (one + back) / 2, math.log(35) / 2)):
        got = op(x, y, 0.5, symmetric, positive=positive, backend="reference")
        torch.testing.assert_close(got.loss, want, rtol=1e-13, atol=1e-13)  # fp64 sums of a few terms
        torch.testing.assert_close(got.bound, most - want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_it_is_clips_loss(backend) -> None:
    """open_clip's own loss with its learnt scale, and a process's share of a larger batch (``local_loss``)."""
    image, text = (unit(draw(48, 20, seed=s, dtype=torch.float32)).requires_grad_() for s in (0, 1))
    for log_scale in (math.log(1 / 0.07), math.log(100)):
        scale = torch.tensor(log_scale, requires_grad=True)
        leaves = (image, text, scale)
        want = open_clip.ClipLoss()(image, text, scale.exp())
        got = op(image[None], text[None], (-scale).exp(), backend=backend).loss
        # Logits of up to 100, whose rounding is 4e-6, through exponentials.
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
        slopes = torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves)
        for one, other in zip(*slopes, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5 * other.abs().max().item())
    with torch.no_grad():
        share = image[12:24]
        want = F.cross_entropy(10 * share @ text.T, torch.arange(12, 24))
        positive = torch.arange(12, 24)[None]
        got = op(share[None], text[None], 0.1, symmetric=False, positive=positive, backend=backend).loss
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size, symmetric, backend) -> None:
    assert_as_good(*samples(size), backend, symmetric=symmetric)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype, backend) -> None:
    if kernels.why_not("infonce", backend, "cpu", dtype):
        pytest.skip("not of this backend")
    for size in ((2, 70, 70, 40), (1, 33, 90, 129)):
        for symmetric in (True, False):
            assert_as_good(*samples(size, dtype), backend, symmetric=symmetric)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=5 if INTERPRETED else 40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 80), st.integers(1, 80), st.integers(1, 70)),
    temperature=st.sampled_from([0.01, 0.1, 3.0]),
    symmetric=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_size_and_temperature(backend, size, temperature, symmetric, seed) -> None:
    assert_as_good(*samples(size, seed=seed, paired=True), backend, temperature, symmetric)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend) -> None:
    x, y, _ = samples((2, 45, 45, 21))
    want = run(x, y, None, backend)
    wide = torch.zeros(2, 50, 50)
    wide[:, 3:48, 1:43:2] = x
    flat = torch.zeros(x.numel() + 1)
    flat[1:] = x.flatten()
    others = [
        x.mT.contiguous().mT,  # a map [B, D, N]
        wide[:, 3:48, 1:43:2],  # sliced, every other entry
        flat[1:].view_as(x),  # off the alignment of a vector
    ]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(want, run(other, y, None, backend), strict=True))
        assert all(
            torch.equal(a, b) for a, b in zip(run(y, x, None, backend), run(y, other, None, backend), strict=True)
        )
    one = x[:1].expand(2, -1, -1)  # stride 0 over the batch
    assert all(
        torch.equal(a, b)
        for a, b in zip(run(one.contiguous(), y, None, backend), run(one, y, None, backend), strict=True)
    )
    index = torch.randint(0, 45, (2, 45))
    want = run(x, y, index, backend)
    for same in (index.int(), index.to(torch.uint8), index.T.contiguous().T):
        assert all(torch.equal(a, b) for a, b in zip(want, run(x, y, same, backend), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_must_not_matter(backend) -> None:
    x, y, _ = samples((2, 70, 70, 33))
    want = run(x, y, None, backend, learn=True)
    # The diagonal, spelt out; sums over columns are kept apart then, so roundings may differ.
    spelt = run(x, y, torch.arange(70).expand(2, 70), backend, learn=True)
    for got, expected in zip(spelt, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())
    # A batch is the mean of its parts; axes before the last two are a batch.
    parts = [op(x[b : b + 1], y[b : b + 1], backend=backend).loss for b in range(2)]
    torch.testing.assert_close(want[0], (parts[0] + parts[1]) / 2, rtol=1e-6, atol=0)
    nested = op(x[:, None].unflatten(0, (1, 2)), y[:, None].unflatten(0, (1, 2)), backend=backend)
    assert torch.equal(nested.loss, want[0])
    # Turned round: x is y's other direction.
    turned = run(y, x, None, backend)
    torch.testing.assert_close(turned[0], want[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(turned[1], want[2], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_incoming_gradients_and_the_bound(backend) -> None:
    x, y, positive = samples((1, 33, 40, 9))
    want = run(x, y, positive, backend, learn=True)
    for got, expected in zip(run(x, y, positive, backend, learn=True, incoming=-2.5)[1:], want[1:], strict=True):
        torch.testing.assert_close(got, -2.5 * expected, rtol=1e-6, atol=1e-9)
    leaf = x.clone().requires_grad_()
    result = op(leaf, y, 0.1, positive=positive, backend=backend)
    (slope,) = torch.autograd.grad(result.bound, leaf, retain_graph=True)
    torch.testing.assert_close(slope, -want[1], rtol=1e-6, atol=1e-9)
    (both,) = torch.autograd.grad(result.loss + result.bound, leaf)
    assert not both.any()  # a constant


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_asked_for_and_twice(backend) -> None:
    x, y, positive = samples((2, 33, 40, 20))
    want = dict(zip(("x", "y", "t"), run(x, y, positive, backend, learn=True)[1:], strict=True))
    for names in (("x",), ("y",), ("t",), ("x", "t"), ("y", "t"), ("x", "y")):
        values = {"x": x.clone(), "y": y.clone(), "t": torch.tensor(0.1)}
        copies = {name: value.clone() for name, value in values.items()}
        for name in names:
            values[name].requires_grad_()
        loss = op(values["x"], values["y"], values["t"], positive=positive, backend=backend).loss
        leaves = [values[name] for name in names]
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        second = torch.autograd.grad(loss, leaves)
        for name, a, b in zip(names, first, second, strict=True):
            assert torch.equal(a, want[name])
            assert torch.equal(a, b)  # what is saved is not scaled in place
        assert all(torch.equal(copies[name], values[name]) for name in values)
    assert not op(x, y, 0.1, positive=positive, backend=backend).loss.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_awkward_values(backend) -> None:
    for x in (torch.zeros(1, 70, 4), torch.ones(2, 70, 4)):  # nothing to tell samples apart
        loss, d_x, d_y = run(x, x, None, backend)
        assert loss.item() == pytest.approx(math.log(70), abs=1e-5)
        assert bool(d_x.isfinite().all() & d_y.isfinite().all())
    x, y, _ = samples((1, 70, 70, 8))
    huge = x.clone()
    huge[0, 3] *= 1e4  # one huge logit, of either sign, in a row and in a column
    for a, b in ((huge, y), (y, huge), (-huge, y)):
        assert_as_good(a, b, None, backend, learn=False)
    # All negative with a ragged last tile: padding would be the largest.
    x, y = x.abs() + 1, -(y.abs() + 1)
    assert_as_good(x, y, None, backend, 0.01)
    assert_as_good(x[:, :67], y[:, :69], torch.randint(0, 69, (1, 67)), backend, 0.01)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_that_are_not_finite(backend) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        for side in range(2):
            pair = list(samples((2, 70, 70, 8))[:2])
            pair[side][1, 66, 3] = bad
            result = op(*pair, backend=backend)
            assert not result.loss.isfinite()
            assert not result.bound.isfinite()
    x, y, _ = samples((1, 20, 20, 8))
    for bad in (0.0, -1.0, math.nan):
        assert op(x, y, torch.tensor(bad), backend=backend).loss.isnan()
    for bad in (-1, 20, 2**40):  # an index that nobody could check: under compilation, or on a GPU
        index = torch.arange(20)[None].clone()
        index[0, 7] = bad
        assert registered(x, y, None, 10.0, index, True, backend)[0].isnan()
    assert op(x * 1e30, y * 1e30, backend=backend).loss.isfinite().logical_not()  # logits overflow


@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_the_same_bits(backend) -> None:
    x, y, positive = samples((2, 70, 90, 40))
    first, second = (run(x, y, positive, backend, learn=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend) -> None:
    torch.use_deterministic_algorithms(False)  # opcheck compares runs itself
    x, y, positive = samples((1, 5, 7, 3))
    t = torch.tensor(0.5, requires_grad=True)
    torch.library.opcheck(registered, (x.requires_grad_(), y.requires_grad_(), t, 1.0, positive, True, backend))
    torch.library.opcheck(registered, (x.detach(), y, None, 2.0, positive, False, backend))
    x, y, _ = samples((1, 5, 5, 3))
    torch.library.opcheck(registered, (x, y.requires_grad_(), None, 2.0, None, True, backend))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_compiled_equals_eager(backend) -> None:
    torch.use_deterministic_algorithms(False)
    x, y, positive = samples((2, 9, 12, 5))

    def step(x, y, t, positive):
        result = op(x, y, t, positive=positive, backend=backend)
        return result.loss * 2.0 + result.bound

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    leaves = [[v.clone().requires_grad_() for v in (x, y, torch.tensor(0.3))] for _ in range(2)]
    values = compiled(*leaves[0], positive), step(*leaves[1], positive)
    assert torch.equal(*values)
    for value in values:
        value.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(*leaves, strict=True))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_autocast_leaves_it_alone(backend) -> None:
    x, y, _ = samples((1, 33, 33, 9))
    want = run(x, y, None, backend)
    leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = op(*leaves, backend=backend).loss
    got = loss.detach(), *torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    mixed = op(x.bfloat16(), y, backend=backend)  # promoted to the wider
    assert mixed.loss.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_for_backward_are_the_samples_and_two_vectors(backend) -> None:
    x, y, _ = samples((2, 70, 70, 33))
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v.numel()) or v, lambda v: v):
        op(x.requires_grad_(), y, backend=backend)
    assert sum(saved) <= x.numel() + y.numel() + 2 * 70 + 2 * 70


class Tiled:
    """The definition of the fast forms in PyTorch, 32 x 32 tiles at a time, with an error planted in it."""

    def __init__(self, plant: str = "") -> None:
        self.plant = plant

    def tiles(self, x, y, scale, positive):
        (_, N, _), M = x.shape, y.shape[1]
        padded = [F.pad(v.double(), (0, 0, 0, -v.shape[1] % 32)) for v in (x, y)]
        pairs = torch.arange(N).expand(x.shape[:2]) if positive is None else positive
        pairs = F.pad(pairs, (0, -N % 32), value=-1)
        for i in range(0, N, 32):
            for j in range(0, M, 32):
                s = scale * padded[0][:, i : i + 32] @ padded[1][:, j : j + 32].mT
                if self.plant != "padding":  # columns of the ragged last tile are zeros, and win where all are negative
                    s[:, N - i :], s[:, :, M - j :] = -math.inf, -math.inf
                pair = pairs[:, i : i + 32, None] == torch.arange(j, j + 32)
                yield i, j, s, pair, padded

    def forward(self, x, y, temperature, scale, positive, symmetric):
        B, N, M = *x.shape[:2], y.shape[1]
        high = [torch.full((B, n + -n % 32), -math.inf, dtype=torch.float64) for n in (N, M)]
        total, count = [torch.zeros_like(h) for h in high], torch.zeros_like(high[1])
        chosen = 0.0
        for i, j, s, pair, _ in self.tiles(x, y, scale / (1.0 if temperature is None else temperature), positive):
            chosen += s[pair].sum()
            count[:, j : j + 32] += pair.sum(dim=1)
            for axis, at in ((0, i), (1, j)):
                place = slice(at, at + 32)
                old, new = high[axis][:, place], torch.maximum(high[axis][:, place], s.amax(dim=2 - axis))
                if self.plant == "max":
                    new = torch.zeros_like(new)
                zero = torch.where(new == -math.inf, 0.0, new)
                more = (s - zero.unsqueeze(2 - axis)).exp().float().double().sum(dim=2 - axis)
                kept = total[axis][:, place] * (old - zero).exp()
                total[axis][:, place] = (kept if self.plant != "rescale" else total[axis][:, place]) + more
                high[axis][:, place] = new
        rows, columns = ((h + t.log())[:, :n] for h, t, n in zip(high, total, (N, M), strict=True))
        count = count[:, :M]
        loss = (rows.sum() - chosen) / (B * N)
        if symmetric:
            loss = (loss + ((count * columns).sum() - chosen) / (B * N)) / 2
        most = (math.log(M) + math.log(N)) / 2 if symmetric else math.log(M)
        back = (columns - count.log()).float() if symmetric else x.new_empty(0)
        return loss.float(), (most - loss).float(), rows.float(), back

    def backward(self, d_loss, x, y, temperature, scale, positive, symmetric, rows, columns, *need):
        (B, N, D), M = x.shape, y.shape[1]
        scale = scale / (1.0 if temperature is None else float(temperature))
        d_x, d_y = (torch.zeros(B, n + -n % 32, D, dtype=torch.float64) for n in (N, M))
        rows = F.pad(rows.double(), (0, -N % 32), value=math.inf)
        columns = F.pad(columns.double(), (0, -M % 32), value=math.inf)
        learnt = 0.0
        for i, j, s, pair, (a, b) in self.tiles(x, y, scale, positive):
            g = (s - rows[:, i : i + 32, None]).exp()
            if symmetric:
                g = g + (s - columns[:, None, j : j + 32]).exp()
            if not (self.plant == "pair" and i == j == 32):  # the second block on the diagonal has no pairs
                g = g - (2.0 if symmetric else 1.0) * pair
            g = torch.where(s == -math.inf, 0.0, g) * (scale * d_loss.double() / (B * N * (2 if symmetric else 1)))
            learnt -= (g * torch.where(s == -math.inf, 0.0, s)).sum() / scale
            d_x[:, i : i + 32] += g @ b[:, j : j + 32]
            if not (self.plant == "last" and i + 32 >= N):  # the last rows' share of the other side is forgotten
                d_y[:, j : j + 32] += g.mT @ a[:, i : i + 32]
        found = d_x[:, :N].to(x.dtype), d_y[:, :M].to(y.dtype)
        return *found, None if temperature is None else (learnt * scale).float()


@needs_native
@pytest.mark.skipif(INTERPRETED, reason="native")
class TestNative:
    def test_gradcheck(self) -> None:
        x, y, positive = samples((2, 4, 6, 3), torch.float64)
        t = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        for symmetric in (True, False):
            torch.autograd.gradcheck(
                lambda x, y, t, s=symmetric: op(x, y, t, s, positive=positive, backend="native").loss,
                (x.requires_grad_(), y.requires_grad_(), t),
            )

    @pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_every_instruction_set_and_any_thread_count(self, monkeypatch, isa, dtype) -> None:
        if isa not in native.build_info()["isa_usable"]:
            pytest.skip(f"this CPU has no {isa}")
        forward, backward = native.infonce_forward, native.infonce_backward
        for size in ((3, 205, 230, 65), (1, 900, 1000, 40)):  # tiles of 96 and of 192, several groups
            x, y, positive = samples(size, dtype)
            first = None
            for threads in (1, 2, 5):
                chosen = {"isa": isa, "threads": threads}
                monkeypatch.setattr(native, "infonce_forward", lambda *a, c=chosen: forward(*a, **c))
                monkeypatch.setattr(native, "infonce_backward", lambda *a, c=chosen: backward(*a, **c))
                got = run(x, y, positive, "native", learn=True)
                first = first or got
                assert all(torch.equal(a, b) for a, b in zip(first, got, strict=True))
            assert_as_good(x, y, positive, "native")

    def test_groups_of_several_tiles(self) -> None:
        # 33 and 36 tiles a side: groups of two, and a last one that is not full.
        assert_as_good(*samples((1, 33 * 192 - 5, 36 * 192 + 1, 3)), "native")

    @pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is KiB on Linux")
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_peak_memory_at_16384(self, dtype) -> None:
        """The README's bound, by the peak of a fresh process; the logits alone would be 1 GiB."""
        n, d = 16384, 64
        program = (
            "import resource, torch\n"
            "from infoclip.kernels.infonce import infonce\n"
            "torch.set_num_threads(2)\n"
            "def step(n):\n"
            f"    x, y = (torch.randn(1, n, {d}, dtype=torch.{dtype}, requires_grad=True) for _ in range(2))\n"
            "    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "    infonce(x, y, backend='native').loss.backward()\n"
            "    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024\n"
            "step(200)\n"
            f"print(step({n}))\n"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        element = 4 if dtype == "float32" else 2
        # Both gradients, two packings and a sum of each side, vectors; what torch and malloc keep of it.
        bound = 2 * n * d * element + 2 * n * (2 * element * d + 4 * d) + 8 * 16 * n + 4 * 2**20
        assert int(done.stdout) <= bound < 4 * n * n / 20


@pytest.mark.skipif(INTERPRETED, reason="no kernel here")
class TestPlantedErrors:
    def check(self, monkeypatch, plant) -> None:
        monkeypatch.setitem(op_module._FORMS, "native", Tiled(plant))
        monkeypatch.setattr(room, "choose", lambda op, backend, *_: backend)
        x, y, positive = samples((2, 70, 70, 33))
        assert_as_good(x, y, None, "native")
        x, y, positive = samples((1, 75, 90, 20))
        assert_as_good(x.abs() + 1, -(y.abs() + 1), positive, "native", 0.01)  # all negative, ragged
        assert_as_good(10 * x, 10 * y, positive, "native", 0.1)

    def test_none_passes(self, monkeypatch) -> None:
        self.check(monkeypatch, "")

    @pytest.mark.parametrize("plant", ["max", "padding", "rescale", "pair", "last"])
    def test_each_is_caught(self, monkeypatch, plant) -> None:
        with pytest.raises(AssertionError, match=r"(loss|d_x|d_y): off by"):
            self.check(monkeypatch, plant)


@pytest.mark.skipif(INTERPRETED, reason="no kernel here")
class TestPublicFunction:
    def test_gradcheck_of_the_reference(self) -> None:
        x, y, positive = samples((2, 4, 6, 3), torch.float64)
        t = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        for symmetric in (True, False):
            torch.autograd.gradcheck(
                lambda x, y, t, s=symmetric: op(x, y, t, s, positive=positive, backend="reference").loss,
                (x.requires_grad_(), y.requires_grad_(), t),
            )

    @needs_native
    def test_what_auto_takes(self, monkeypatch) -> None:
        taken: list[str | None] = []
        monkeypatch.setattr(room, "choose", lambda op, backend, *_: taken.append(backend) or "reference")
        monkeypatch.delenv("INFOCLIP_BACKEND", raising=False)
        small, narrow, large = (torch.ones(1, n, d, requires_grad=True) for n, d in ((9, 384), (9, 383), (1600, 384)))
        for x in (small, narrow, large, small.detach(), small.double()):
            op(x, x)
        op(small, small, backend="native")
        assert taken == ["reference", None, None, None, None, "native"]
        monkeypatch.setenv("INFOCLIP_BACKEND", "native")
        op(small, small)
        assert taken[-1] is None

    def test_shapes_on_the_meta_device(self) -> None:
        x, y = (torch.ones(2, n, 4, device="meta", requires_grad=True) for n in (3, 5))
        positive = torch.ones(2, 3, device="meta", dtype=torch.int64)
        assert op(x, y, positive=positive, backend="reference").loss.shape == ()

    @pytest.mark.parametrize(
        ("x", "y", "message"),
        [
            ((3, 4), (3, 4), r"x: expected \[.., N, D\] with at least one leading axis, got \[3, 4\]"),
            ((1, 3, 4), (1, 3, 5), r"y: expected \[1, M, 4\] beside x \[1, 3, 4\], got \[1, 3, 5\]"),
            ((1, 3, 4), (2, 3, 4), r"y: expected \[1, M, 4\]"),
            ((1, 3, 4), (1, 5, 4), "expected as many rows in both, or positive"),
            ((0, 3, 4), (0, 3, 4), "at least one of everything"),
            ((1, 3, 0), (1, 3, 0), "at least one of everything"),
        ],
    )
    def test_bad_shapes(self, x, y, message) -> None:
        with pytest.raises(ValueError, match=message):
            op(torch.ones(x), torch.ones(y))

    def test_bad_values(self) -> None:
        x, y, positive = samples((1, 3, 5, 4))
        with pytest.raises(TypeError, match="x: expected a tensor, got list"):
            op([1.0], y)
        with pytest.raises(TypeError, match=r"y: expected float32, .* got torch.int64"):
            op(x, y.long())
        with pytest.raises(TypeError, match="positive: expected a tensor, got list"):
            op(x, y, positive=[0, 1, 2])
        with pytest.raises(TypeError, match=r"positive: expected whole numbers, got torch.float32"):
            op(x, y, positive=positive.float())
        with pytest.raises(ValueError, match=r"positive: expected \[1, 3\] beside x \[1, 3, 4\], got \[3\]"):
            op(x, y, positive=positive[0])
        for bad in (-1, 5, 2**32):
            with pytest.raises(ValueError, match=f"positive has the index {bad}: expected 0 to 4"):
                op(x, y, positive=torch.full_like(positive, bad))
        for bad in (0, -0.1, math.inf, math.nan):
            with pytest.raises(ValueError, match=f"temperature: expected a finite number above 0, got {bad}"):
                op(x, y, bad, positive=positive)
        with pytest.raises(TypeError, match="temperature: expected a number, got str"):
            op(x, y, "cold", positive=positive)
        with pytest.raises(TypeError, match=r"temperature: .* got torch.int64"):
            op(x, y, torch.tensor(1), positive=positive)
        with pytest.raises(ValueError, match=r"temperature: .* got \[1\]"):
            op(x, y, torch.ones(1), positive=positive)
        with pytest.raises(ValueError, match="backend='fast': expected auto or one of"):
            op(x, y, positive=positive, backend="fast")
        with pytest.raises(ValueError, match="x is on cpu, y on meta: expected one device"):
            op(x, y.to("meta"), positive=positive)


@pytest.mark.skipif(not INTERPRETED, reason="Triton's patches")
def test_patches_of_several_blocks(monkeypatch) -> None:
    """What many programs do at large sizes, forced at a small one: five blocks of rows and nine of columns in two."""
    monkeypatch.setattr(room.triton_impl, "GROUPS", 2)
    for symmetric in (True, False):
        assert_as_good(*samples((2, 277, 285, 9)), "triton", symmetric=symmetric)
    assert_as_good(*samples((1, 277, 277, 9), torch.bfloat16), "triton")


@pytest.mark.skipif(not INTERPRETED, reason="Triton's offsets")
def test_rows_that_lie_far_apart(monkeypatch) -> None:
    x, _, _ = samples((1, 5, 5, 3))
    far = torch.empty_strided((1, 5, 3), (0, 2**26, 1), device="meta")
    assert room.triton_impl._near(x, 64) is x
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: "copied")
    assert room.triton_impl._near(far, 64) == "copied"


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's run")
def test_triton_in_the_interpreter() -> None:
    assert_passes_in_the_interpreter(__file__)


@pytest.mark.skipif(INTERPRETED, reason="compiled ahead of time")
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_triton_compiles_without_a_gpu(capability) -> None:
    """Spills, shared memory and matrix instructions for the GPU generations that are served."""
    assert_compiles("infonce", capability)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_on_the_gpu(backend, dtype, symmetric) -> None:
    reason = kernels.why_not("infonce", backend, "cuda", dtype)
    if reason:
        pytest.skip(reason)
    for size in SIZES:
        x, y, positive = (v if v is None else v.cuda() for v in samples(size, dtype))
        assert_as_good(x, y, positive, backend, symmetric=symmetric)
        assert_as_good(x.mT.contiguous().mT, y, positive, backend, symmetric=symmetric)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_the_gpu_in_a_graph_within_the_byte_bound(backend, dtype) -> None:
    """The README's bound at N = 16,384 by torch's allocator; the logits alone would be 1 GiB."""
    reason = kernels.why_not("infonce", backend, "cuda", dtype)
    if reason:
        pytest.skip(reason)
    torch.use_deterministic_algorithms(False)  # no NaN is filled in here: filling takes launches of its own
    x, y, _ = samples((1, 16384, 16384, 64), dtype)
    x, y = x.cuda().requires_grad_(), y.cuda().requires_grad_()

    def step():
        loss = op(x, y, backend=backend).loss
        return loss.detach(), *torch.autograd.grad(loss, (x, y))

    results = 2 * x.numel() * x.element_size() + 4 * 2 * 16384  # gradients, and the vectors that are saved
    assert_captured_within(step, results + 260 * 2 * 16384 + 16 * 512)  # the allocator rounds each up to 512
