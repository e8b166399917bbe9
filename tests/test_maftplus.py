"""MAFT+'s parts against plain forms of the same formulas; ``test_parity.py`` compares them with recorded numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from infoclip.model.maftplus import ContentDependentTransfer, class_logits, mask_pooling, sine_position
from infoclip.objective import mask_aware_loss, soft_iou

# float32 rounds to 6e-8 of a number; the sums here have a few hundred terms of mixed signs.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("panoptic", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (5, 8)])
def test_transfer_is_torch_attention(panoptic: bool, size: tuple[int, int]) -> None:
    torch.manual_seed(1)
    module = ContentDependentTransfer(16, 4, panoptic=panoptic)
    for weight in module.parameters():  # none is zero or one
        torch.nn.init.normal_(weight, std=0.5)
    features, text = draw(3, 16, *size), draw(7, 16, seed=2)
    keys = (features + sine_position(16, *size)).flatten(2).mT
    part = module.cross_atten
    read, _ = part.multihead_attn(text.expand(3, -1, -1), keys, features.flatten(2).mT, need_weights=False)
    change = part.MLP(read)
    want = text + part.norm(change) if panoptic else part.norm(text + change)
    torch.testing.assert_close(module(features, text), want, **CLOSE)


def test_the_panoptic_transfer_starts_as_clip() -> None:
    text = draw(5, 16)
    assert torch.equal(ContentDependentTransfer(16, 4, panoptic=True)(draw(2, 16, 3, 4), text), text.expand(2, -1, -1))
    assert not torch.allclose(ContentDependentTransfer(16, 4)(draw(2, 16, 3, 4), text), text.expand(2, -1, -1))


def test_transfer_refuses() -> None:
    with pytest.raises(ValueError, match="multiple of 4 and of the heads"):
        ContentDependentTransfer(18, 2)
    with pytest.raises(ValueError, match="multiple of 4 and of the heads"):
        ContentDependentTransfer(16, 3)
    module = ContentDependentTransfer(16, 4)
    with pytest.raises(ValueError, match=r"features has shape \[2, 8, 3, 3\]; expected \[B, 16, h, w\]"):
        module(draw(2, 8, 3, 3), draw(5, 16))
    with pytest.raises(ValueError, match=r"text has shape \[2, 5, 16\]; expected \[T, 16\]"):
        module(draw(2, 16, 3, 3), draw(2, 5, 16))
    with pytest.raises(ValueError, match="0 x 3"):
        sine_position(8, 0, 3)
    with pytest.raises(ValueError, match="channels is 6"):
        sine_position(6, 2, 3)


@pytest.mark.parametrize("size", [(6, 7), (13, 9)])
def test_pooling_is_the_mean_under_each_mask(size: tuple[int, int]) -> None:
    features, logits = draw(2, 5, 6, 7), draw(2, 4, *size, seed=3)
    logits[1, 2] = -1.0
    same = F.interpolate(logits, size=(6, 7), mode="bilinear", align_corners=False)
    pooled = mask_pooling(features, logits)
    for b in range(2):
        for q in range(4):
            under = features[b][:, same[b, q] > 0]
            want = under.mean(dim=1) if under.numel() else torch.zeros(5)
            torch.testing.assert_close(pooled[b, q], want, **CLOSE)
    assert torch.equal(pooled[1, 2], torch.zeros(5))


def test_pooling_in_half_precision() -> None:
    """An empty mask stays zero, and a sum above float16's largest number does not become infinite."""
    features = torch.full((1, 2, 300, 300), 3.0, dtype=torch.float16)
    logits = torch.ones(1, 2, 300, 300, dtype=torch.float16)
    logits[:, 1] = -1.0
    pooled = mask_pooling(features, logits)
    assert pooled.dtype == torch.float16
    want = torch.tensor([[[3.0, 3.0], [0.0, 0.0]]], dtype=torch.float16)
    assert torch.equal(pooled, want)  # 270,000 is a number of float32


def test_a_class_scores_as_its_best_synonym() -> None:
    synonyms = [1, 3, 2, 1]
    x, text = draw(2, 5, 8), draw(2, 8, 8, seed=4)
    got = class_logits(x, text, synonyms, 1.3)
    cosine = F.normalize(x, dim=-1) @ text.mT * torch.tensor(1.3).exp()
    parts = cosine.split([*synonyms, 1], dim=-1)
    torch.testing.assert_close(got, torch.stack([p.amax(dim=-1) for p in parts], dim=-1), **CLOSE)
    torch.testing.assert_close(class_logits(x, text[0], synonyms, 1.3)[0], got[0], **CLOSE)
    one_each = class_logits(x, text, [1] * 7, 1.3)
    torch.testing.assert_close(one_each, cosine, **CLOSE)


def test_an_empty_embedding_scores_zero_and_passes_no_gradient() -> None:
    x = torch.zeros(1, 2, 8, requires_grad=True)
    out = class_logits(x, draw(4, 8), [2, 1], torch.tensor(9.0))
    out.sum().backward()
    assert torch.equal(out, torch.zeros(1, 2, 3))
    assert torch.equal(x.grad, torch.zeros(1, 2, 8))


@pytest.mark.parametrize("synonyms", [[], [0, 3], [2, 2], [1, 1]])
def test_rows_that_do_not_match_the_classes_are_refused(synonyms: list[int]) -> None:
    with pytest.raises(ValueError, match="and text has 4"):
        class_logits(draw(1, 2, 8), draw(4, 8), synonyms, 1.0)


def test_classifier_refuses_shapes() -> None:
    with pytest.raises(ValueError, match="text is of 3 images and embeddings of 1"):
        class_logits(draw(1, 2, 8), draw(3, 4, 8), [3], 1.0)
    with pytest.raises(ValueError, match="embeddings has shape"):
        class_logits(draw(1, 2, 8), draw(4, 7), [3], 1.0)
    with pytest.raises(ValueError, match="mask_logits"):
        mask_pooling(draw(2, 3, 4, 4), draw(1, 3, 4, 4))


def plain_iou(mask_logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Every proposal at the mask's size, as the formula reads."""
    probability = mask_logits.sigmoid()[None].double()
    large = F.interpolate(probability, size=masks.shape[1:], mode="bilinear", align_corners=False)[0].flatten(1)
    masks = masks.double().flatten(1)
    common = masks @ large.T
    return common / (masks.sum(1)[:, None] + large.sum(1) - common + 1e-7)


@pytest.mark.parametrize("size", [(7, 9), (20, 33), (3, 4)])
def test_overlap_without_resizing_the_proposals(size: tuple[int, int]) -> None:
    logits, masks = draw(6, 7, 9), (draw(4, *size, seed=5) > 0).float()
    masks[2] = 0
    torch.testing.assert_close(soft_iou(logits, masks).double(), plain_iou(logits, masks), **CLOSE)


def test_loss_is_that_of_the_formula() -> None:
    logits, mask_logits = draw(3, 6, 5).requires_grad_(), draw(3, 6, 7, 9, seed=6).requires_grad_()
    labels = [torch.tensor([0, 3, 3]), torch.tensor([], dtype=torch.int64), torch.tensor([2])]
    masks = [(draw(3, 14, 18, seed=7) > 0), torch.zeros(0, 14, 18), (draw(1, 21, 11, seed=8) > 0.5)]
    terms = []
    for i in (0, 2):
        iou = plain_iou(mask_logits[i].detach(), masks[i])
        for n, label in enumerate(labels[i].tolist()):
            target = (iou[n] - iou[n].min()) / (iou[n].max() - iou[n].min() + 1e-8)
            score = logits[i, :, :4].double().softmax(-1)[:, label]
            terms.append(F.smooth_l1_loss(score, target, reduction="none"))
    want = torch.cat(terms).mean()
    got = mask_aware_loss(logits, mask_logits, labels, masks)
    torch.testing.assert_close(got.double(), want, **CLOSE)
    (grad,) = torch.autograd.grad(got, logits)
    (expected,) = torch.autograd.grad(want, logits)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)
    assert not grad[1].any()
    assert not grad[..., -1].any()  # void takes no part
    assert mask_aware_loss(logits.detach(), mask_logits, labels, masks).requires_grad is False


def test_a_batch_without_objects_has_no_loss() -> None:
    logits = draw(2, 6, 5).requires_grad_()
    nothing = [torch.tensor([], dtype=torch.int64)] * 2
    loss = mask_aware_loss(logits, draw(2, 6, 7, 9), nothing, [torch.zeros(0, 14, 18)] * 2)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros(2, 6, 5))


def test_no_proposal_is_held_at_the_size_of_the_image() -> None:
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, torch.Tensor):
                    self.elements = max(self.elements, x.numel())
            return out

    queries, low, high, objects = 100, (25, 40), (200, 320), 3
    logits, mask_logits = draw(1, queries, 5), draw(1, queries, *low)
    masks = [draw(objects, *high) > 0]
    with Largest() as largest:
        mask_aware_loss(logits, mask_logits, [torch.tensor([0, 1, 2])], masks)
    # Twice: torch may lay a broadcast product of objects and proposals out once more.
    assert largest.elements <= 2 * max(objects * high[0] * high[1], queries * low[0] * low[1])
    assert largest.elements < queries * high[0] * high[1] / 10


def test_loss_refuses() -> None:
    logits, mask_logits, mask = draw(1, 6, 5), draw(1, 6, 7, 9), torch.ones(1, 14, 18)
    with pytest.raises(ValueError, match=r"a label outside 0\.\.3"):
        mask_aware_loss(logits, mask_logits, [torch.tensor([4])], [mask])
    with pytest.raises(ValueError, match="expected a label a mask"):
        mask_aware_loss(logits, mask_logits, [torch.tensor([1, 2])], [mask])
    with pytest.raises(ValueError, match="labels of 2 and masks of 1 images; expected 1"):
        mask_aware_loss(logits, mask_logits, [torch.tensor([1])] * 2, [mask])
    with pytest.raises(ValueError, match="mask_logits"):
        mask_aware_loss(logits, draw(1, 5, 7, 9), [torch.tensor([1])], [mask])
    with pytest.raises(ValueError, match="masks"):
        soft_iou(draw(6, 7, 9), torch.ones(14, 18))
