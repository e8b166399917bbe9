"""Inference: preprocessing, plain view and sliding window, for any image size."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from small_models import small_segmentor
from torch import Tensor, nn

from infoclip.config import EvalConfig
from infoclip.model.inference import (
    best_class,
    normalize,
    plain_scores,
    predict_labels,
    predict_scores,
    preprocess,
    resize_shortest_side,
    sliding_window_scores,
    window_starts,
)


class Mirror(nn.Module):
    """Stands in for a segmentor: its logits are the image itself, at a quarter of the encoder's size."""

    def __init__(self, image_size: int = 64, shrink: int = 4) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.clip = SimpleNamespace(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), image_size=image_size)
        self.shrink = shrink
        self.batches: list[int] = []
        self.seen: list[Tensor] = []
        self.modes: list[bool] = []

    def forward(self, image: Tensor, text: Tensor) -> SimpleNamespace:
        self.batches.append(len(image))
        self.seen.append(image)
        self.modes.append(self.training)
        assert image.shape[-2:] == (self.clip.image_size,) * 2
        small = F.avg_pool2d(image, self.shrink)
        return SimpleNamespace(logits=small[:, : text.shape[-3]])


def ramp(h: int, w: int) -> Tensor:
    """A smooth picture: red grows to the right, green downwards, blue is constant."""
    picture = torch.zeros(3, h, w)
    picture[0] = torch.linspace(0, 255, w)
    picture[1] = torch.linspace(0, 255, h)[:, None]
    picture[2] = 100
    return picture


TEXT = torch.zeros(3, 1, 12)


def test_normalisation_is_the_published_one() -> None:
    clip = SimpleNamespace(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    mean = torch.tensor([122.7709383, 116.7460125, 104.09373615])[:, None, None]
    std = torch.tensor([68.5005327, 66.6321579, 70.323163])[:, None, None]
    torch.testing.assert_close(normalize(image, clip), (image.float() - mean) / std)


@pytest.mark.parametrize("size", [(64, 64), (70, 100), (31, 5), (1, 1)])
def test_preprocess(size: tuple[int, int]) -> None:
    clip = Mirror().clip
    image = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    assert preprocess(image, clip).shape == (2, 3, 64, 64)
    torch.testing.assert_close(preprocess(image[1], clip), preprocess(image, clip)[1])
    padded = F.pad(image.float() / 255, (0, -size[1] % 32, 0, -size[0] % 32))
    want = F.interpolate(padded, size=(64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(preprocess(image, clip, padding="published"), want)
    with pytest.raises(ValueError, match=r"expected \[B, 3, H, W\]"):
        preprocess(image[:, :2], clip)


def test_shortest_side() -> None:
    image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    assert resize_shortest_side(image, 80, 2560).shape == (3, 80, 120)
    assert resize_shortest_side(image, 80, 100).shape == (3, 67, 100)  # 66.7 and 100
    assert resize_shortest_side(image, 20, 2560).shape == (3, 20, 30)
    assert resize_shortest_side(image, 40, 2560) is image
    assert resize_shortest_side(image[:, :1], 10, 100).shape == (3, 2, 100)  # 1.67 and 100
    flat = torch.full((3, 40, 60), 7, dtype=torch.uint8)
    assert (resize_shortest_side(flat, 33, 999) == 7).all()


def test_window_starts() -> None:
    assert window_starts(640, 384, 0.333) == [0, 256]  # as published
    assert window_starts(64, 64, 0.333) == [0]
    assert window_starts(100, 40, 0.0) == [0, 40, 60]
    assert window_starts(10, 1, 0.9) == list(range(10))
    for size, window, overlap in ((97, 31, 0.333), (640, 336, 0.5), (12, 5, 0.99)):
        starts = window_starts(size, window, overlap)
        covered = {i for s in starts for i in range(s, s + window)}
        assert covered == set(range(size))


@pytest.mark.parametrize("size", [(50, 50), (40, 90), (200, 60), (7, 3), (1, 1)])
@pytest.mark.parametrize("sliding", [True, False])
def test_any_image_size(size: tuple[int, int], sliding: bool) -> None:
    config = EvalConfig(resize=0, sliding_window=sliding, size=96, window=64)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    scores = predict_scores(small_segmentor(), image, torch.randn(4, 1, 12), config)
    assert scores.shape == (4, *size)
    assert scores.dtype == torch.float32
    assert ((scores > 0) & (scores < 1)).all()


@pytest.mark.parametrize("size", [(64, 64), (48, 96), (120, 50)])
@pytest.mark.parametrize(
    "sliding", [{"size": 96, "window": 64}, {"size": 160, "window": 64, "overlap": 0.5}, {"size": 64, "window": 64}]
)
def test_every_pixel_lands_in_its_place(size: tuple[int, int], sliding: dict) -> None:
    """A model that only repeats the image must give the image back, up to the blur of resizing."""
    image = ramp(*size)
    got = sliding_window_scores(Mirror(), image, TEXT, **sliding)
    want = (image / 255).sigmoid()
    inner = (slice(None), slice(8, -8), slice(8, -8))  # resizing repeats border pixels
    assert (got - want)[inner].abs().max() < 0.02
    assert (got - want).abs().max() < 0.06
    plain = plain_scores(Mirror(), image, TEXT)
    assert (plain - want)[inner].abs().max() < 0.02


def test_padding_is_not_left_in_the_labels() -> None:
    image = ramp(70, 100)
    want = (image / 255).sigmoid()
    ours = plain_scores(Mirror(), image, TEXT)
    published = plain_scores(Mirror(), image, TEXT, padding="published")
    assert (ours - want).abs().max() < 0.03
    # 70 x 100 in 96 x 128: the published map is squeezed, and the padding's score (0.5) shows.
    assert (published - want).abs().max() > 0.15
    assert published[2, -1, -1] == pytest.approx(0.5, abs=0.02)


def test_views_of_the_published_sliding_window() -> None:
    mirror = Mirror(image_size=384, shrink=16)
    image = torch.rand(3, 500, 700) * 255
    sliding_window_scores(mirror, image, TEXT, batch_size=5)
    assert mirror.batches == [5]
    squashed = F.interpolate(image[None], size=(640, 640), mode="bilinear", align_corners=False)[0] / 255
    for view, (y, x) in zip(mirror.seen[0][:4], [(0, 0), (0, 256), (256, 0), (256, 256)], strict=True):
        torch.testing.assert_close(view, squashed[:, y : y + 384, x : x + 384])
    whole = F.interpolate(image[None], size=(384, 384), mode="bilinear", align_corners=False) / 255
    torch.testing.assert_close(mirror.seen[0][4:], whole)


def test_windows_are_resized_to_an_encoder_of_another_size() -> None:
    mirror = Mirror(image_size=336, shrink=14)
    sliding_window_scores(mirror, torch.rand(3, 50, 70) * 255, TEXT)
    assert mirror.batches == [1] * 5
    assert all(seen.shape[-2:] == (336, 336) for seen in mirror.seen)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_batch_size_bounds_the_views_and_changes_nothing(batch_size: int) -> None:
    segmentor = small_segmentor()
    image = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8)
    text = torch.randn(4, 1, 12)
    options = {"size": 96, "window": 48}
    want = sliding_window_scores(segmentor, image, text, **options)
    got = sliding_window_scores(segmentor, image, text, batch_size=batch_size, **options)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # another order of summation in matrix products
    mirror = Mirror()
    sliding_window_scores(mirror, image, TEXT, batch_size=batch_size, **options)
    assert max(mirror.batches) <= batch_size
    assert sum(mirror.batches) == 10


def test_mode_is_evaluation_meanwhile_and_restored() -> None:
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    mirror = Mirror().train()
    predict_scores(mirror, image, TEXT, EvalConfig(size=96, window=64))
    assert mirror.modes == [False] * 5
    assert mirror.training
    segmentor = small_segmentor().train()
    segmentor.clip.eval()
    predict_scores(segmentor, image, torch.randn(1, 1, 12), EvalConfig(resize=0, sliding_window=False))
    assert segmentor.training
    assert segmentor.aggregator.training
    assert not segmentor.clip.training


def test_resizing_comes_first() -> None:
    image = torch.randint(0, 256, (3, 100, 150), dtype=torch.uint8)
    mirror = Mirror()
    scores = predict_scores(mirror, image, TEXT, EvalConfig(resize=64, sliding_window=False))
    assert scores.shape == (3, 100, 150)
    small = resize_shortest_side(image, 64, 2560)
    torch.testing.assert_close(mirror.seen[0][0], preprocess(small, mirror.clip))


def test_order_of_classes_does_not_change_scores() -> None:
    segmentor = small_segmentor()
    image = torch.randint(0, 256, (3, 40, 70), dtype=torch.uint8)
    text, order = torch.randn(12, 1, 12), torch.randperm(12)  # more than pad_len = 8: the cut is in play
    config = EvalConfig(resize=0, size=96, window=64)
    first, second = (predict_scores(segmentor, image, t, config) for t in (text, text[order]))
    torch.testing.assert_close(first[order], second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sliding", [True, False])
@pytest.mark.parametrize("classes", [5, 8, 40])
def test_labels_are_those_of_the_best_scores(sliding: bool, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, however few classes are worked on at once; with 40 classes the cut to 8 is in play."""
    from infoclip.model import inference

    segmentor = small_segmentor()
    generator = torch.Generator().manual_seed(classes)
    image = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8, generator=generator)
    text = torch.nn.functional.normalize(torch.randn(classes, 1, 12, generator=generator), dim=-1)
    text[3] = text[1]  # a tie everywhere: the first has it
    config = EvalConfig(resize=0, size=96, window=48, sliding_window=sliding)
    best, labels = predict_scores(segmentor, image, text, config).max(dim=0)
    for size in (2**28, 2**17, 1):
        monkeypatch.setitem(inference._CHUNK_BYTES, "cpu", size)
        got = predict_labels(segmentor, image, text, config)
        assert torch.equal(got[0], best)
        assert torch.equal(got[1], labels)
        assert torch.equal(predict_scores(segmentor, image, text, config).max(dim=0).indices, labels)
    assert len(labels.unique()) > 1


@pytest.mark.parametrize("classes", [1, 7])
def test_the_best_class_is_that_of_all_maps_at_once(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from infoclip.model import inference

    logits = torch.randn(classes, 5, 6)
    want = F.interpolate(logits[:, None], size=(20, 31), mode="bilinear", align_corners=False)[:, 0].argmax(dim=0)
    for size in (2**28, 2**14, 1):
        monkeypatch.setitem(inference._CHUNK_BYTES, "cpu", size)
        assert torch.equal(best_class(logits, (20, 31)), want)


def test_labels_where_every_view_leaves_a_class_out() -> None:
    """The first class that no view kept stands for all of those: it has their score, were it ever the best."""

    class Dropping(Mirror):
        def forward(self, image: Tensor, text: Tensor) -> SimpleNamespace:
            self.batches.append(len(image))
            logits = torch.full((len(image), 7, 16, 16), -100.0)
            logits[:, 6] = -200.0  # kept nowhere either
            logits[len(self.batches) % 2 :, 4, :8] = 3.0
            return SimpleNamespace(logits=logits)

    config = EvalConfig(resize=0, size=96, window=64)
    image, text = torch.zeros(3, 40, 50, dtype=torch.uint8), torch.zeros(7, 1, 12)
    labels = predict_labels(Dropping(), image, text, config)[1]
    assert torch.equal(labels, predict_scores(Dropping(), image, text, config).argmax(dim=0))
    assert labels.unique().tolist() == [0, 4] or labels.unique().tolist() == [4]


def test_wrong_input_is_named() -> None:
    config = EvalConfig()
    with pytest.raises(TypeError, match=r"torch.float32; expected uint8"):
        predict_scores(Mirror(), torch.zeros(3, 8, 8), TEXT, config)
    with pytest.raises(ValueError, match=r"\(8, 8, 3\); expected \[3, H, W\]"):
        predict_scores(Mirror(), torch.zeros(8, 8, 3, dtype=torch.uint8), TEXT, config)
    with pytest.raises(ValueError, match=r"overlap 1\.0"):
        sliding_window_scores(Mirror(), torch.zeros(3, 8, 8), TEXT, overlap=1.0)
    with pytest.raises(ValueError, match="batch_size 0"):
        sliding_window_scores(Mirror(), torch.zeros(3, 8, 8), TEXT, batch_size=0)
