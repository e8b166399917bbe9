"""LPAM: its formula, its initial maps, its size, awkward inputs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infoclip.objective import LPAM, cosine_map


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_size() -> None:
    for init in ("default", "cosine"):
        assert sum(p.numel() for p in LPAM(512, init).parameters()) == 527_360  # 0.53 M as published
    assert not list(LPAM(512, learnt=False).parameters())
    assert not LPAM(512, learnt=False).state_dict()


@pytest.mark.parametrize("init", ["default", "cosine"])
def test_formula(init: str) -> None:
    torch.manual_seed(0)
    module = LPAM(8, init).double()  # type: ignore[arg-type]
    for p in module.parameters():
        torch.nn.init.normal_(p)
    pixels, texts = draw(2, 6, 8, dtype=torch.float64), draw(2, 3, 8, seed=1, dtype=torch.float64)
    maps = module(pixels, texts)
    for b in range(2):
        if init == "default":
            p, t = F.layer_norm(pixels[b], (8,)), F.layer_norm(texts[b], (8,))
        else:  # length sqrt(d), not centred
            p, t = (math.sqrt(8) * F.normalize(x[b], dim=-1) for x in (pixels, texts))
        p = p * module.norm_pixel.weight + module.norm_pixel.bias
        t = t * module.norm_text.weight + module.norm_text.bias
        q, k = F.linear(t, module.query.weight, module.query.bias), F.linear(p, module.key.weight, module.key.bias)
        scores = k @ q.T / math.sqrt(8) + p @ t.T
        torch.testing.assert_close(maps[b], scores / scores.norm())
    shared = module(pixels, texts[0])
    torch.testing.assert_close(shared[0], maps[0])
    torch.testing.assert_close(shared[1:], module(pixels[1:], texts[:1]))


@pytest.mark.parametrize("learnt", [True, False])
def test_cosine_start_is_exactly_the_cosine_map(learnt: bool) -> None:
    torch.manual_seed(0)
    module = LPAM(64, "cosine", learnt=learnt).double()
    pixels, texts = 5 + draw(2, 12, 64, dtype=torch.float64), 0.01 * draw(7, 64, seed=1, dtype=torch.float64)
    want = F.cosine_similarity(pixels[:, :, None], texts[None, None], dim=-1)
    torch.testing.assert_close(cosine_map(pixels, texts), want)
    want = want / want.flatten(1).norm(dim=1)[:, None, None]
    torch.testing.assert_close(module(pixels, texts), want, atol=1e-14, rtol=1e-12)  # float64 rounding
    # with the published normalisation, the mean of 5 of the pixels is taken out
    assert (LPAM(64).double()(pixels, texts) - want).abs().max().item() > 1e-3


def test_cosine_start_learns() -> None:
    torch.manual_seed(0)
    module = LPAM(16, "cosine")
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    pixels, texts, goal = draw(2, 5, 16), draw(3, 16, seed=1), draw(2, 5, 3, seed=2)
    for step in range(2):
        optimizer.zero_grad()
        (module(pixels, texts) * goal).sum().backward()
        assert module.key.weight.grad is not None
        assert module.key.weight.grad.abs().max() > 0
        assert module.query.weight.grad is not None
        assert bool(module.query.weight.grad.abs().max() > 0) == (step > 0)
        optimizer.step()


@pytest.mark.parametrize("init", ["default", "cosine"])
@pytest.mark.parametrize("learnt", [True, False])
def test_maps_have_norm_one_for_each_image(init: str, learnt: bool) -> None:
    torch.manual_seed(0)
    maps = LPAM(16, init, learnt=learnt)(draw(3, 10, 16), draw(4, 16, seed=1))  # type: ignore[arg-type]
    assert maps.shape == (3, 10, 4)
    torch.testing.assert_close(maps.flatten(1).norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("init", ["default", "cosine"])
@pytest.mark.parametrize("learnt", [True, False])
@pytest.mark.parametrize("kind", ["zeros", "equal", "zero row"])
def test_finite(init: str, learnt: bool, kind: str) -> None:
    torch.manual_seed(0)
    module = LPAM(16, init, learnt=learnt)  # type: ignore[arg-type]
    pixels, texts = draw(2, 5, 16), draw(3, 16, seed=1)
    if kind == "zeros":
        pixels, texts = torch.zeros_like(pixels), torch.zeros_like(texts)
    elif kind == "equal":
        pixels, texts = torch.ones_like(pixels), torch.ones_like(texts)
    else:
        pixels[:, 1], texts[0] = 0, 0
    pixels, texts = pixels.requires_grad_(), texts.requires_grad_()
    maps = module(pixels, texts)
    (maps * draw(2, 5, 3, seed=2)).sum().backward()
    for x in (maps, pixels.grad, texts.grad, *(p.grad for p in module.parameters())):
        assert x is not None
        assert bool(x.isfinite().all())


def test_gradients() -> None:
    torch.manual_seed(0)
    pixels = draw(2, 3, 5, dtype=torch.float64).requires_grad_()
    texts = draw(4, 5, seed=1, dtype=torch.float64).requires_grad_()
    for module in (LPAM(5), LPAM(5, "cosine"), LPAM(5, learnt=False)):
        assert torch.autograd.gradcheck(module.double(), (pixels, texts))


def test_full_precision_under_autocast() -> None:
    torch.manual_seed(0)
    pixels, texts = draw(2, 9, 32), draw(4, 32, seed=1)
    for module in (LPAM(32), LPAM(32, learnt=False)):
        want = module(pixels, texts)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(module(pixels, texts), want)
        low = module(pixels.bfloat16(), texts.bfloat16())
        assert low.dtype == torch.float32
        assert torch.equal(low, module(pixels.bfloat16().float(), texts.bfloat16().float()))


def test_one_init_reads_the_weights_of_the_other() -> None:
    assert LPAM(8).state_dict().keys() == LPAM(8, "cosine").state_dict().keys()


def test_misuse() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        LPAM(0)
    with pytest.raises(ValueError, match="'cosine'"):
        LPAM(4, "zero")  # type: ignore[arg-type]
    module = LPAM(4)
    for pixels, texts in (((2, 3, 5), (2, 4)), ((3, 4), (2, 4)), ((2, 3, 4), (2, 5)), ((2, 3, 4), (3, 2, 4))):
        with pytest.raises(ValueError, match="expected"):
            module(torch.ones(pixels), torch.ones(texts))
