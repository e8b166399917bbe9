"""InfoNCE: the definition, the bound, gradients, awkward inputs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infoclip.objective import infonce
from infoclip.objective.numerics import unit

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
