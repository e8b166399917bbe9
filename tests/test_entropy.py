"""Matrix-based Renyi entropy and mutual information: known values, identities, gradients, awkward inputs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infoclip.objective import (
    compression_loss,
    normalized_gram,
    renyi_entropy,
    renyi_joint_entropy,
    renyi_mutual_information,
    transfer_loss,
)
from infoclip.objective.numerics import unit

ORDERS = (0.5, 0.9, 1.0, 1.01, 1.5, 2.0, 3.0, 20.0)

shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
thorough = settings(max_examples=40, deadline=None)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spelt_out(x: Tensor, alpha: float) -> float:
    """The definition, one matrix, float64."""
    gram = x.double() @ x.double().T
    values = torch.linalg.eigvalsh(gram / gram.trace()).clamp(min=0)
    values = values[values > 1e-13]
    if alpha == 1:
        return float(-(values * values.log2()).sum())
    return float((values**alpha).sum().log2() / (1 - alpha))


@pytest.mark.parametrize("alpha", ORDERS)
@pytest.mark.parametrize("size", [(5, 3), (3, 5), (4, 4), (1, 3), (3, 1)])
def test_the_definition(alpha: float, size: tuple[int, int]) -> None:
    x = draw(2, *size)
    want = torch.tensor([spelt_out(m, alpha) for m in x], dtype=torch.float64)
    torch.testing.assert_close(renyi_entropy(x, alpha), want, atol=1e-11, rtol=0)  # float64, a few dozen operations


@pytest.mark.parametrize("alpha", ORDERS)
def test_known_values(alpha: float) -> None:
    eye = torch.eye(8, dtype=torch.float64)
    assert renyi_entropy(eye, alpha).item() == pytest.approx(3.0, abs=1e-12)
    assert renyi_entropy(torch.ones(8, 3), alpha).item() == pytest.approx(0.0, abs=1e-6)
    # two independent fair bits in four samples: 1 bit each, 2 together, none shared
    first, second = eye[[0, 0, 1, 1]], eye[[0, 1, 0, 1]]
    assert renyi_joint_entropy(first, second, alpha=alpha).item() == pytest.approx(2.0, abs=1e-12)
    assert renyi_mutual_information(first[None], second[None], alpha).item() == pytest.approx(0.0, abs=1e-12)
    assert renyi_mutual_information(first[None], first[None], alpha).item() == pytest.approx(1.0, abs=1e-12)


@given(shapes)
@thorough
def test_eigenvalues_and_fast_form_agree(shape: tuple[int, int, int, int, int]) -> None:
    B, N, D, E, seed = shape
    x, y = draw(B, N, D, seed=seed), draw(B, N, E, seed=seed + 1)
    near = 2 + 1e-9  # dS / d alpha is of order 1: 1e-9 apart
    torch.testing.assert_close(renyi_entropy(x, near), renyi_entropy(x, 2), atol=1e-7, rtol=0)
    pair = renyi_mutual_information(x, y, near), renyi_mutual_information(x, y, 2)
    torch.testing.assert_close(*pair, atol=1e-7, rtol=0)


def test_orders_run_into_one_another() -> None:
    x = draw(3, 30, 7)
    at_one = renyi_entropy(x, 1)
    for step in (1e-3, 1e-6, 1e-9, 1e-13):
        for alpha in (1 - step, 1 + step):
            # The slope at 1 is below 5 here; without care the digits lost would be 1e-16 / step.
            torch.testing.assert_close(renyi_entropy(x, alpha), at_one, atol=5 * step + 1e-12, rtol=0)
    # the two formulas for orders near and far from 1 meet at 0.5 and 1.5
    for edge in (0.5, 1.5):
        pair = renyi_entropy(x, edge - 1e-10), renyi_entropy(x, edge + 1e-10)
        torch.testing.assert_close(*pair, atol=1e-8, rtol=0)
    values = torch.stack([renyi_entropy(x, alpha) for alpha in ORDERS])
    assert bool((values[1:] <= values[:-1] + 1e-12).all())  # entropy falls with the order


@given(shapes, st.sampled_from(ORDERS))
@thorough
def test_properties(shape: tuple[int, int, int, int, int], alpha: float) -> None:
    B, N, D, E, seed = shape
    x, y = unit(draw(B, N, D, seed=seed)), unit(draw(B, N, E, seed=seed + 1))
    entropy_x, entropy_y = renyi_entropy(x, alpha), renyi_entropy(y, alpha)
    shared = renyi_mutual_information(x, y, alpha)
    # float64, and eigenvalues of up to 1e-15 cut off: 1e-7 bit at order 0.5
    tolerance = 1e-6
    assert entropy_x.shape == shared.shape == (B,)
    assert bool((entropy_x >= -tolerance).all())
    assert bool((entropy_x <= math.log2(min(N, D)) + tolerance).all())
    torch.testing.assert_close(shared, renyi_mutual_information(y, x, alpha), atol=tolerance, rtol=0)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        shared, renyi_mutual_information(x[:, order], y[:, order], alpha), atol=tolerance, rtol=0
    )
    torch.testing.assert_close(shared, renyi_mutual_information(x * 3e-7, y * 5e9, alpha), atol=tolerance, rtol=0)
    # Rows of equal length: a Hadamard product with a correlation matrix only raises the entropy
    assert bool((shared <= torch.minimum(entropy_x, entropy_y) + tolerance).all())
    joint = renyi_joint_entropy(x, y, alpha=alpha)
    torch.testing.assert_close(entropy_x + entropy_y - joint, shared, atol=tolerance, rtol=0)
    if alpha == 1:  # subadditivity of the von Neumann entropy
        assert bool((shared >= -tolerance).all())


@given(shapes)
@thorough
def test_sign_at_order_two(shape: tuple[int, int, int, int, int]) -> None:
    """For unit rows I_2 = log2 E[c_x^2 c_y^2] / (E[c_x^2] E[c_y^2]) over all pairs, so I_2(x; x) >= 0."""
    B, N, D, E, seed = shape
    x, y = unit(draw(B, N, D, seed=seed)), unit(draw(B, N, E, seed=seed + 1))
    a, b = (x @ x.mT).square(), (y @ y.mT).square()
    over = [m.mean(dim=(1, 2)) for m in (a * b, a, b)]
    torch.testing.assert_close(renyi_mutual_information(x, y), (over[0] / over[1] / over[2]).log2(), atol=1e-12, rtol=0)
    assert bool((renyi_mutual_information(x, x) >= -1e-12).all())


def test_information_of_order_two_can_be_negative() -> None:
    """Renyi's entropy of order 2 is not subadditive, not even for unit rows."""
    eye = torch.eye(2, dtype=torch.float64)
    x, y = eye[[0, 0, 0, 1]][None], eye[[0, 0, 1, 0]][None]
    assert renyi_mutual_information(x, y).item() == pytest.approx(math.log2(0.375 / 0.625**2), abs=1e-12)
    assert renyi_mutual_information(x, y).item() < 0 < renyi_mutual_information(x, y, 1).item()


@pytest.mark.parametrize("alpha", ORDERS)
@pytest.mark.parametrize("kind", ["random", "equal rows", "one zero row", "repeated eigenvalues"])
def test_gradients(alpha: float, kind: str) -> None:
    x, y = draw(2, 4, 3), draw(2, 4, 2, seed=1)
    if kind == "equal rows":
        x = x[:, :1].expand(-1, 4, -1).clone()
    elif kind == "one zero row":
        x[:, 1] = 0
    elif kind == "repeated eigenvalues":
        x, y = torch.eye(4, dtype=torch.float64)[None], torch.eye(4, dtype=torch.float64).roll(1, 0)[None]
    x, y = x.requires_grad_(), y.requires_grad_()
    if kind == "random" and alpha >= 1:
        assert torch.autograd.gradcheck(lambda a: renyi_entropy(a, alpha), (x,))
        assert torch.autograd.gradcheck(lambda a, b: renyi_mutual_information(a, b, alpha), (x, y))
    value = renyi_entropy(x, alpha).sum() + renyi_mutual_information(x, y, alpha).sum()
    value.backward()
    assert math.isfinite(value.item())
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    assert y.grad is not None
    assert bool(y.grad.isfinite().all())
    if kind == "repeated eigenvalues":  # the largest entropy there is, at all orders: flat
        assert x.grad.abs().max().item() < 1e-10


def test_gram_matrix() -> None:
    x = draw(2, 5, 3) * 1e-9
    want = x @ x.mT / x.square().sum(dim=(1, 2))[:, None, None]
    torch.testing.assert_close(normalized_gram(x), want, atol=1e-14, rtol=0)  # entries up to 1, float64
    assert torch.equal(normalized_gram(torch.zeros(4, 3)), torch.zeros(4, 4))


def test_gradients_of_the_losses_and_the_gram_matrix() -> None:
    x, y, z = (draw(2, 5, d, seed=d).requires_grad_() for d in (3, 4, 6))
    assert torch.autograd.gradcheck(lambda r, a, b: compression_loss(r, a, b), (x, y, z))
    assert torch.autograd.gradcheck(transfer_loss, (x, y))
    assert torch.autograd.gradcheck(normalized_gram, (x,))
    assert torch.autograd.gradgradcheck(renyi_mutual_information, (x, y))


@pytest.mark.parametrize("alpha", ORDERS)
def test_sets_of_zeros(alpha: float) -> None:
    x, y = torch.zeros(2, 4, 3, requires_grad=True), draw(2, 4, 3, dtype=torch.float32).requires_grad_()
    values = [renyi_entropy(x, alpha), renyi_mutual_information(x, y, alpha), compression_loss(x, y, alpha=alpha)]
    # no sample that is non-zero in both
    half = torch.tensor([1.0, 1.0, 0.0, 0.0])[:, None]
    values.append(renyi_mutual_information(y * half, y * (1 - half), alpha))
    torch.stack(values).sum().backward()
    for value in values:
        assert value.tolist() == [0.0, 0.0]
    assert x.grad is not None
    assert y.grad is not None
    assert x.grad.abs().max() == y.grad.abs().max() == 0


def test_one_set_of_a_batch_does_not_touch_another() -> None:
    x = draw(3, 5, 4, dtype=torch.float32)
    x[1] = 0
    y = draw(3, 5, 4, seed=1, dtype=torch.float32)
    whole = renyi_mutual_information(x, y)
    assert whole[1] == 0
    torch.testing.assert_close(whole[2:], renyi_mutual_information(x[2:], y[2:]))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_show(alpha: float, bad: float) -> None:
    x = draw(2, 4, 3, dtype=torch.float32)
    x[0, 1, 1] = bad
    value = renyi_mutual_information(x, x, alpha)
    assert value.isnan().tolist() == [True, False]
    assert renyi_entropy(x, alpha).isnan().tolist() == [True, False]


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_single_precision(scale: float) -> None:
    """Unit rows as the objective has them, at any scale: three entropies of up to 8 bits, each rounded to 5e-7, and
    their sums; the worst of 20 seeds was 1.2e-6 bit."""
    x = unit(draw(2, 144, 52, dtype=torch.float32)) * scale
    y = unit(0.5 * x / scale + unit(draw(2, 144, 52, seed=1, dtype=torch.float32)))
    want = renyi_mutual_information(x.double(), y.double())
    torch.testing.assert_close(renyi_mutual_information(x, y).double(), want, atol=3e-6, rtol=0)
    torch.testing.assert_close(
        compression_loss(x, y).double(), compression_loss(x.double(), y.double()), atol=3e-6, rtol=0
    )


def test_half_precision_is_computed_in_single() -> None:
    x, y = draw(2, 64, 16).bfloat16(), draw(2, 64, 16, seed=1).bfloat16()
    want = renyi_mutual_information(x.float(), y.float())
    assert torch.equal(renyi_mutual_information(x, y), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(renyi_mutual_information(x.float(), y.float()), want)
        assert torch.equal(renyi_entropy(x.float()), renyi_entropy(x))


def test_losses_are_the_published_formulas() -> None:
    relation, pixels, texts = draw(6, 10), draw(6, 7, seed=1), draw(6, 3, seed=2)

    def gram(x: Tensor) -> Tensor:
        return x @ x.T / x.square().sum()

    def log_norm(a: Tensor) -> Tensor:
        return a.square().sum().log2()

    g_r, g_v, g_l = gram(relation), gram(unit(pixels)), gram(unit(texts))
    joint = g_v * g_l * g_r
    want = -log_norm(g_r) + log_norm(joint / joint.trace())
    torch.testing.assert_close(compression_loss(relation, pixels, texts), want)
    same = texts[:1].expand(6, -1)  # one text for all samples drops out
    torch.testing.assert_close(compression_loss(relation, pixels, same), compression_loss(relation, pixels))
    other = draw(6, 10, seed=3)
    joint = gram(relation) * gram(other)
    want = log_norm(gram(relation)) + log_norm(gram(other)) - log_norm(joint / joint.trace())
    torch.testing.assert_close(transfer_loss(other, relation), want)


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (TypeError, ([[1.0]],)),
        (TypeError, (torch.ones(2, 2, dtype=torch.int64),)),
        (TypeError, (torch.ones(2, 2), "2")),
        (TypeError, (torch.ones(2, 2), True)),
        (ValueError, (torch.ones(2),)),
        (ValueError, (torch.ones(0, 2),)),
        (ValueError, (torch.ones(2, 0),)),
        (ValueError, (torch.ones(2, 2), 0.0)),
        (ValueError, (torch.ones(2, 2), math.inf)),
        (ValueError, (torch.ones(2, 2), math.nan)),
    ],
)
def test_misuse(error: type[Exception], arguments: tuple) -> None:
    with pytest.raises(error, match="expected"):
        renyi_entropy(*arguments)


def test_misuse_of_pairs() -> None:
    for y in (torch.ones(2, 4, 3), torch.ones(1, 3, 3)):
        with pytest.raises(ValueError, match=r"\[2, 3, 5\]"):
            renyi_mutual_information(torch.ones(2, 3, 5), y)
    with pytest.raises(ValueError, match="at least one"):
        renyi_joint_entropy()
    assert renyi_mutual_information(torch.ones(0, 3, 2), torch.ones(0, 3, 2)).shape == (0,)
