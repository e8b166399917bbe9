"""The alignment objective as a whole: its terms, what they teach, the baselines, and recorded numbers."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from parity_common import load_case
from parity_objective import check_rc, check_renyi_infosam
from torch import Tensor

from infoclip.config import AlignConfig, Config
from infoclip.errors import ConfigError
from infoclip.objective import (
    AlignmentObjective,
    Embeddings,
    compression_loss,
    infonce,
    kl_distillation,
    pooled_distillation,
    renyi_mutual_information,
    representation_compensation,
    strip_pool,
)
from infoclip.objective.numerics import unit

GOLDEN = Path(__file__).parent / "golden"
DIM, B, SIDE, T = 12, 3, 4, 5
SAMPLES, ESTIMATORS = ("batch", "pixel", "class"), ("renyi", "infonce")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def both(batch: int = B, dtype: torch.dtype = torch.float32) -> tuple[Embeddings, Embeddings]:
    """Student and teacher that have something in common, all requiring gradients."""
    pixels, texts = draw(batch, SIDE * SIDE, DIM, dtype=dtype), draw(T, DIM, seed=1, dtype=dtype)
    near = pixels + draw(*pixels.shape, seed=2, dtype=dtype), texts + 0.3 * draw(*texts.shape, seed=3, dtype=dtype)
    student, teacher = Embeddings(*near), Embeddings(pixels, texts)
    for x in (*student[:2], *teacher[:2]):
        x.requires_grad_()
    return student, teacher


def build(**settings: object) -> AlignmentObjective:
    torch.manual_seed(0)
    return AlignmentObjective(AlignConfig(**settings), DIM)  # type: ignore[arg-type]


def moved(x: Tensor | None) -> bool:
    """Whether a gradient arrived."""
    if x is not None:
        assert bool(x.isfinite().all())
    return x is not None and x.abs().max().item() > 0


def lpam_moved(objective: AlignmentObjective) -> bool:
    return any(moved(p.grad) for p in objective.parameters())


@pytest.mark.parametrize(
    ("samples", "estimator", "center"), list(itertools.product(SAMPLES, ESTIMATORS, (False, True)))
)
@pytest.mark.parametrize("lpam", ["learnt", "cosine"])
def test_what_learns(samples: str, estimator: str, center: bool, lpam: str) -> None:
    objective = build(samples=samples, estimator=estimator, center=center, lpam=lpam)
    student, teacher = both()
    result = objective(student, teacher, 0)
    result.loss.backward()
    assert moved(student.pixels.grad)
    assert moved(student.texts.grad)
    assert lpam_moved(objective) == (lpam == "learnt")
    assert teacher.pixels.grad is None
    assert teacher.texts.grad is None
    names = ({"compression"} if lpam == "learnt" else set()) | {"transfer"}
    names |= {"bound"} if estimator == "infonce" else set()
    assert result.terms.keys() == names
    assert all(v.shape == () and not v.requires_grad for v in result.terms.values())
    total = sum(v for k, v in result.terms.items() if k != "bound")
    torch.testing.assert_close(result.loss.detach(), torch.as_tensor(total))


@pytest.mark.parametrize("samples", SAMPLES)
def test_compression_teaches_the_module_alone(samples: str) -> None:
    objective = build(samples=samples, transfer_weight=0.0)
    student, teacher = both()
    result = objective(student, teacher, 0)
    assert result.terms.keys() == {"compression"}
    result.loss.backward()
    assert lpam_moved(objective)
    assert student.pixels.grad is None
    assert student.texts.grad is None


def test_what_transfer_teaches_the_module() -> None:
    grads = {}
    for to in ("both", "teacher", "student", "none"):
        objective = build(samples="pixel", compression_weight=0.0, transfer_to_lpam=to)
        student, teacher = both()
        objective(student, teacher, 0).loss.backward()
        assert lpam_moved(objective) == (to != "none")
        grads[to] = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in objective.parameters()]
        )
        if to == "both":
            want = student.pixels.grad
        torch.testing.assert_close(student.pixels.grad, want)  # the student learns the same
    torch.testing.assert_close(grads["both"], grads["teacher"] + grads["student"])
    assert not torch.allclose(grads["teacher"], grads["student"])


def test_the_samples() -> None:
    student, teacher = both()
    settings = {"lpam_init": "cosine", "temperature": 0.2}
    maps = build(**settings).alignment_maps(student, teacher)
    assert all(m.shape == (B, SIDE * SIDE, T) and not m.requires_grad for m in maps)
    cosine = unit(teacher.pixels) @ unit(teacher.texts).mT
    torch.testing.assert_close(maps[0], cosine / cosine.flatten(1).norm(dim=1)[:, None, None])
    mixed = (cosine / 0.05).softmax(dim=2) @ unit(teacher.texts)
    pooled = torch.stack([(c / 0.05).softmax(dim=0).T @ p for c, p in zip(cosine, unit(teacher.pixels), strict=True)])
    views = {
        "batch": (lambda m: m.flatten(1)[None], [teacher.pixels.flatten(1)[None]]),
        "pixel": (lambda m: m, [teacher.pixels, mixed]),
        "class": (lambda m: m.mT, [pooled, teacher.texts.expand(B, -1, -1)]),
    }
    for samples, (view, inputs) in views.items():
        for center in (False, True):
            rows = [view(m) for m in maps]
            if center:
                rows = [x - x.mean(dim=1, keepdim=True) for x in rows]
            rows = [F.normalize(x, dim=-1) for x in rows]
            objective = build(samples=samples, center=center, **settings)
            terms = objective(student, teacher, 0).terms
            torch.testing.assert_close(terms["transfer"], -renyi_mutual_information(*rows).mean())
            torch.testing.assert_close(terms["compression"], compression_loss(rows[0], *inputs).mean().detach())
            objective = build(samples=samples, center=center, estimator="infonce", **settings)
            terms = objective(student, teacher, 0).terms
            torch.testing.assert_close(terms["transfer"], infonce(*rows, 0.2).loss)
            torch.testing.assert_close(terms["bound"], math.log(rows[0].shape[1]) - terms["transfer"])


def test_alpha_reaches_both_terms() -> None:
    student, teacher = both()
    at = {alpha: build(samples="pixel", alpha=alpha)(student, teacher, 0) for alpha in (1.0, 2.0, 2.000001)}
    for name in ("compression", "transfer"):
        assert abs(at[1.0].terms[name] - at[2.0].terms[name]) > 1e-3
        torch.testing.assert_close(at[2.000001].terms[name], at[2.0].terms[name], atol=2e-5, rtol=0)


def test_weights_and_warm_start() -> None:
    student, teacher = both()
    objective = build(samples="pixel", transfer_weight=0.5, compression_weight=2.0, start_step=10, ramp_steps=4)
    assert [objective.weight_at(s) for s in (0, 9, 10, 11, 12, 13, 14, 99)] == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    off = objective(student, teacher, 9)
    assert off.loss.item() == 0
    assert off.terms == {}
    for step, factor in ((10, 0.25), (50, 1.0)):
        result = objective(student, teacher, step)
        want = factor * (0.5 * result.terms["transfer"] + 2.0 * result.terms["compression"])
        torch.testing.assert_close(result.loss.detach(), want)
    assert build(start_step=3).weight_at(2) == 0
    assert build(start_step=3).weight_at(3) == 1
    nothing = build(method="none")(student, teacher, 0)
    assert nothing.loss.item() == 0
    assert nothing.terms == {}


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", ["equal pixels", "equal texts", "zeros", "one image", "student is teacher"])
def test_finite(samples: str, center: bool, estimator: str, kind: str) -> None:
    objective = build(samples=samples, center=center, estimator=estimator)
    student, teacher = both(1 if kind == "one image" else B)
    with torch.no_grad():
        for e in (student, teacher):
            if kind == "equal pixels":
                e.pixels.copy_(e.pixels[:1, :1].clone())
            elif kind == "equal texts":
                e.texts.copy_(e.texts[:1].clone())
            elif kind == "zeros":
                e.pixels.zero_()
                e.texts.zero_()
        if kind == "student is teacher":
            student.pixels.copy_(teacher.pixels)
            student.texts.copy_(teacher.texts)
    result = objective(student, teacher, 0)
    result.loss.backward()
    assert math.isfinite(result.loss.item())
    gradients = [student.pixels.grad, student.texts.grad, *(p.grad for p in objective.parameters())]
    # Rounding noise blown up to unit length would give gradients of 1e5 and more.
    assert all(g is None or (bool(g.isfinite().all()) and g.abs().max() < 1e3) for g in gradients)


@pytest.mark.parametrize("method", ["infoclip", "kl", "maft", "maftplus"])
def test_full_precision_under_autocast(method: str) -> None:
    objective = build(method=method, samples="pixel", center=True)
    student, teacher = both()
    want = objective(student, teacher, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = objective(student, teacher, 0)
        maps = objective.alignment_maps(student, teacher)
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(maps[0], objective.alignment_maps(student, teacher)[0])
    low = Embeddings(student.pixels.detach().bfloat16().requires_grad_(), student.texts)
    result = objective(low, teacher, 0)
    result.loss.backward()
    assert result.loss.dtype == torch.float32
    assert low.pixels.grad is not None
    assert low.pixels.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("samples", SAMPLES)
def test_single_precision(samples: str) -> None:
    """Terms of up to 4 bits from maps rounded to 1e-7; the worst of 20 seeds was 7e-7."""
    values = []
    for dtype in (torch.float32, torch.float64):
        objective = build(samples=samples, center=True).to(dtype)
        single = both()
        student, teacher = (Embeddings(e.pixels.to(dtype), e.texts.to(dtype)) for e in single)
        values.append(objective(student, teacher, 0).terms)
    for name, value in values[0].items():
        assert abs(value.double() - values[1][name]).item() < 3e-6, name


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradcheck(samples: str, estimator: str) -> None:
    objective = build(samples=samples, estimator=estimator, center=True).double()
    student, teacher = both(2, torch.float64)

    def loss(pixels: Tensor, texts: Tensor, weight: Tensor) -> Tensor:
        parameters = dict(objective.named_parameters()) | {"lpam.key.weight": weight}
        return torch.func.functional_call(objective, parameters, (Embeddings(pixels, texts), teacher, 0)).loss

    weight = objective.lpam.key.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (student.pixels, student.texts, weight))


def test_transfer_falls_as_the_student_comes_near() -> None:
    """Plain descent on L_d alone recovers the teacher's cosine map."""
    objective = build(samples="pixel", estimator="infonce", lpam="cosine", center=True)
    student, teacher = both()
    optimizer = torch.optim.Adam(list(student[:2]), lr=0.02)
    losses, agreement = [], []
    for _ in range(100):
        optimizer.zero_grad()
        loss = objective(student, teacher, 0).loss
        loss.backward()
        optimizer.step()
        maps = objective.alignment_maps(student, teacher)
        losses.append(loss.item())
        agreement.append((maps[0] * maps[1]).sum().item() / B)
    assert losses[-1] < 0.5 * losses[0]
    assert agreement[-1] > agreement[0] + 0.1


@pytest.mark.parametrize("method", ["kl", "maft", "maftplus"])
def test_baselines(method: str) -> None:
    objective = build(method=method, distill_weight=3.0, temperature=0.5)
    assert not list(objective.parameters())
    student, teacher = both()
    result = objective(student, teacher, 0)
    assert result.terms.keys() == {"distill"}
    assert result.terms["distill"].item() > 0
    torch.testing.assert_close(result.loss.detach(), 3 * result.terms["distill"])
    result.loss.backward()
    assert moved(student.pixels.grad)
    assert moved(student.texts.grad) == (method == "kl")
    assert teacher.pixels.grad is None
    assert teacher.texts.grad is None
    if method == "kl":
        logs = [(unit(e.pixels) @ unit(e.texts).T / 0.5).softmax(dim=-1).log() for e in (student, teacher)]
        want = 0.25 * (logs[1].exp() * (logs[1] - logs[0])).sum(dim=-1).mean()
    elif method == "maft":
        means = [F.normalize(e.pixels.mean(dim=1), dim=-1) for e in (student, teacher)]
        want = F.smooth_l1_loss(*means)
    else:
        maps = [e.pixels.mT.reshape(B, DIM, SIDE, SIDE) for e in (student, teacher)]
        want = representation_compensation(*maps)
    torch.testing.assert_close(result.terms["distill"], want.detach())
    same = objective(teacher, teacher, 0)
    assert abs(same.loss.item()) < 1e-6


def test_grid_of_the_pixels() -> None:
    objective = build(method="maftplus")
    student, teacher = both()
    wide = objective(student._replace(grid=(2, 8)), teacher._replace(grid=(2, 8)), 0).terms["distill"]
    maps = [e.pixels.mT.reshape(B, DIM, 2, 8) for e in (student, teacher)]
    torch.testing.assert_close(wide, representation_compensation(*maps).detach())
    for e in (student._replace(grid=(3, 5)), student._replace(pixels=student.pixels[:, :15])):
        other = teacher._replace(pixels=teacher.pixels[:, : e.pixels.shape[1]])
        with pytest.raises(ValueError, match="grid"):
            objective(e, other, 0)


def test_misuse() -> None:
    objective = build()
    student, teacher = both()
    with pytest.raises(ValueError, match="expected the same"):
        objective(student, teacher._replace(texts=teacher.texts[:2]), 0)
    with pytest.raises(ValueError, match="expected the same"):
        kl_distillation(torch.ones(1, 2, 3), torch.ones(1, 2, 4), 0.1)
    with pytest.raises(ValueError, match="greater than 0"):
        kl_distillation(torch.ones(1, 2, 3), torch.ones(1, 2, 3), 0.0)
    with pytest.raises(ValueError, match="expected the same"):
        pooled_distillation(torch.ones(1, 2, 3), torch.ones(1, 3, 3))
    for name, value in (("start_step", -1), ("ramp_steps", -1), ("alpha", 0.0), ("temperature", 0.0)):
        config = Config()
        setattr(config.align, name, value)
        with pytest.raises(ConfigError, match=name):
            config.validate()


def test_compensation_of_tall_and_wide_maps() -> None:
    tall = draw(1, 2, 12, 8)
    cells = {"width": 1 + 3 + 6, "square": 1 + 2 + 4}
    for kind, n in cells.items():
        assert strip_pool(tall, kernel_from=kind).shape == (1, 2 * 2 * n)  # type: ignore[arg-type]
    other = draw(1, 2, 12, 8, seed=1)
    values = [representation_compensation(tall, other, kernel_from=k) for k in cells]  # type: ignore[arg-type]
    assert abs(values[0] - values[1]).item() > 1e-3
    wide = draw(1, 2, 8, 12)
    assert torch.equal(strip_pool(wide, kernel_from="width"), strip_pool(wide, kernel_from="square"))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (3, 2), (3, 3), (8, 1), (1, 8)])
@pytest.mark.parametrize("kernel_from", ["width", "square"])
def test_compensation_of_small_maps(size: tuple[int, int], kernel_from: str) -> None:
    a, b = draw(2, 3, *size).requires_grad_(), draw(2, 3, *size, seed=1)
    loss = representation_compensation(a, b, kernel_from=kernel_from)  # type: ignore[arg-type]
    loss.backward()
    assert math.isfinite(loss.item())
    assert moved(a.grad)
    assert representation_compensation(b, b, kernel_from=kernel_from).item() == 0  # type: ignore[arg-type]


def test_compensation_misuse() -> None:
    x = torch.ones(1, 2, 4, 4)
    with pytest.raises(ValueError, match="expected the same"):
        representation_compensation(x, torch.ones(1, 2, 4, 5))
    with pytest.raises(ValueError, match="at least one"):
        representation_compensation([], [])
    with pytest.raises(ValueError, match="B, C, h, w"):
        strip_pool(torch.ones(2, 4, 4))
    with pytest.raises(ValueError, match="scales"):
        strip_pool(x, scales=(0,))
    with pytest.raises(ValueError, match="kernel_from"):
        strip_pool(x, kernel_from="height")  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "check"), [("renyi_infosam", check_renyi_infosam), ("rc", check_rc)])
def test_recorded_numbers(name: str, check) -> None:
    case = load_case(GOLDEN / f"{name}.json")
    rows = check(case)
    failed = [f"{r.name}: {r.error:.2e} over {r.tolerance:.2e}" for r in rows if not r.ok]
    assert not failed
    recorded = {n for n in case.tensors if n.startswith(("out.", "grad."))}
    assert recorded == {r.name for r in rows}  # every recorded tensor is compared
