from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_models import small_clip, small_config
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

from infoclip.errors import DataError, StorageError
from infoclip.evaluate.metrics import SegmentationMetrics, harmonic_mean
from infoclip.evaluate.panoptic import PanopticMetrics, Segment
from infoclip.evaluate.run import evaluate_folder, evaluate_model
from infoclip.evaluate.zero_shot import zero_shot_scores
from infoclip.model.checkpoint import save_model
from infoclip.model.segmentor import build_segmentor

EXACT = 1e-12  # a few float64 operations on integer counts


def counted(prediction: list[int], target: list[int], classes: int) -> SegmentationMetrics:
    metrics = SegmentationMetrics(classes)
    metrics.update(torch.tensor(prediction), torch.tensor(target))
    return metrics


def test_a_case_by_hand() -> None:
    # class 0: 2 right, 1 missed; class 1: 1 right, 1 false; class 2 predicted once though absent; class 3 nowhere
    metrics = counted([0, 0, 1, 1, 2, 0], [0, 0, 0, 1, 1, 255], 4)
    scores = metrics.compute()
    assert metrics.iou().tolist()[:2] == [2 / 3, 1 / 3]
    assert metrics.iou()[2:].isnan().all()
    assert scores.miou == pytest.approx((2 / 3 + 1 / 3) / 2, abs=EXACT)
    assert scores.miou_legacy == pytest.approx((2 / 3 + 1 / 3) / 3, abs=EXACT)
    assert scores.fwiou == pytest.approx(3 / 5 * 2 / 3 + 2 / 5 * 1 / 3, abs=EXACT)
    assert scores.macc == pytest.approx((2 / 3 + 1 / 2) / 2, abs=EXACT)
    assert scores.pacc == pytest.approx(3 / 5, abs=EXACT)
    assert int(metrics.confusion[0, 4]) == 1  # the pixel without a label


def test_a_subset_keeps_the_other_classes_mistakes() -> None:
    metrics = counted([0, 0, 1, 1, 2, 0], [0, 0, 0, 1, 1, 255], 4)
    assert metrics.compute([1]).miou == pytest.approx(1 / 3, abs=EXACT)
    assert math.isnan(metrics.compute([3]).miou)
    assert math.isnan(metrics.compute([]).pacc)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 9), st.integers(0, 2**31))
def test_the_legacy_mean_is_that_of_torchmetrics(classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randint(0, classes, (2, 3, 40), generator=generator)
    draw = torch.where(torch.rand(2, 3, 40, generator=generator) < 0.5, draw, draw // 2)  # some classes stay absent
    target = torch.where(torch.rand(3, 40, generator=generator) < 0.1, 255, draw[1])
    metrics = SegmentationMetrics(classes)
    for p, t in zip(draw[0], target, strict=True):
        metrics.update(p, t)
    scores = metrics.compute()
    if math.isnan(scores.miou):
        return
    theirs = multiclass_jaccard_index(draw[0], target, classes, average="macro", ignore_index=255)
    assert scores.miou_legacy == pytest.approx(float(theirs), abs=1e-6)  # they count in float32
    micro = multiclass_accuracy(draw[0], target, classes, average="micro", ignore_index=255)
    assert scores.pacc == pytest.approx(float(micro), abs=1e-6)
    assert scores.miou_legacy <= scores.miou + EXACT


def test_counts_add_up_over_images_and_processes() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randint(0, 5, (2, 4, 7, 9), generator=generator)
    whole, first, second = (SegmentationMetrics(5) for _ in range(3))
    whole.update(prediction, target)
    first.update(prediction[:1], target[:1])
    second.update(prediction[1:].to(torch.uint8), target[1:].to(torch.int32))
    first.merge([second])
    assert torch.equal(first.confusion, whole.confusion)
    with pytest.raises(ValueError, match="6 classes"):
        first.merge([SegmentationMetrics(6)])


@pytest.mark.parametrize(
    ("prediction", "target", "error", "part"),
    [
        ([0, 3], [0, 0], ValueError, "prediction holds the label 3"),
        ([0, 255], [0, 0], ValueError, "prediction holds the label 255"),
        ([0, 0], [0, -1], ValueError, "target holds the label -1"),
        ([0, 0], [0], ValueError, "shape"),
        ([0.0, 0.0], [0, 0], TypeError, "dtype"),
    ],
)
def test_labels_that_cannot_be(prediction: list[Any], target: list[Any], error: type[Exception], part: str) -> None:
    with pytest.raises(error, match=part):
        counted(prediction, target, 3)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        SegmentationMetrics(0)
    with pytest.raises(ValueError, match="one of the 300 classes"):
        SegmentationMetrics(300, ignore_index=255)


def test_harmonic_mean() -> None:
    assert harmonic_mean(0.3, 0.6) == pytest.approx(0.4, abs=EXACT)
    assert harmonic_mean(0.0, 0.0) == harmonic_mean(0.5, 0.0) == 0.0
    assert math.isnan(harmonic_mean(math.nan, 0.5))


def test_panoptic_quality_by_hand() -> None:
    true = torch.tensor([[1, 1, 1, 2, 2, 0], [1, 1, 1, 2, 2, 0]])
    ours = torch.tensor([[5, 5, 5, 6, 7, 8], [5, 5, 5, 6, 7, 8]])
    metrics = PanopticMetrics(2)
    metrics.update(
        ours, true, [Segment(5, 0), Segment(6, 1), Segment(7, 1), Segment(8, 0)], [Segment(1, 0), Segment(2, 1)]
    )
    # 5 matches 1 exactly; 6 and 7 each cover half of 2, which is no match; 8 lies on void and is excused
    assert metrics.true_positives.tolist() == [1, 0]
    assert metrics.false_positives.tolist() == [0, 2]
    assert metrics.false_negatives.tolist() == [0, 1]
    assert metrics.compute().pq == pytest.approx(0.5, abs=EXACT)
    assert metrics.compute([0]).pq == pytest.approx(1.0, abs=EXACT)
    with pytest.raises(ValueError, match="segment 9"):
        metrics.update(torch.tensor([[9]]), torch.tensor([[0]]), [], [])


# Evaluation


class Toy:
    """Three pictures of 4 x 6 pixels whose mask is their red channel."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, Any]:
        mask = torch.randint(0, 3, (4, 6), generator=torch.Generator().manual_seed(index))
        return {"image": mask.to(torch.uint8).expand(3, 4, 6), "mask": mask, "file": f"{index}.png"}


def test_evaluate_model_tells_seen_from_unseen(tmp_path: Path) -> None:
    calls: list[int] = []

    def predictor(image: Tensor) -> Tensor:
        return image[0].long().clamp(max=1)  # class 2 becomes class 1

    result = evaluate_model(
        predictor,
        Toy(),
        ["a", "b", "c"],
        ["a", "b"],
        progress=False,
        on_prediction=lambda index, sample, labels: calls.append(int(labels.max())),
    )
    assert calls == [1, 1, 1]
    by_name = {row.name: row for row in result.per_class}
    assert by_name["a"].iou == 1.0
    assert by_name["c"].iou == 0.0
    assert by_name["c"].seen is False
    assert result.unseen.miou == 0.0
    assert result.seen.miou == pytest.approx((1 + (by_name["b"].iou or 0)) / 2, abs=EXACT)
    assert result.harmonic == 0.0
    result.save(tmp_path / "deep", "result")
    saved = json.loads((tmp_path / "deep" / "result.json").read_text())
    assert saved["seen"]["miou"] == result.seen.miou
    assert saved["per_class"][2]["name"] == "c"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["result.json"]
    assert "unseen" in _printed(result.summary_table())
    assert "0.0" in _printed(result.class_table())


def test_figures_without_a_value_are_null(tmp_path: Path) -> None:
    result = evaluate_model(lambda image: image[0].long(), Toy(), ["a", "b", "c", "never"], None, progress=False)
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["unseen"]["miou"] is None
    assert data["per_class"][3]["iou"] is None
    assert data["per_class"][0]["seen"] is None
    assert data["overall"]["miou"] == 1.0
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Cannot write"):
        result.save(tmp_path / "file", "result")


def test_nothing_to_evaluate() -> None:
    with pytest.raises(DataError, match="no image"):
        evaluate_model(lambda image: image[0], [], ["a"], progress=False)


def test_evaluate_folder(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    model = build_segmentor(config)
    save_model(model, config, ["cat", "dog"], tmp_path / "model")
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for i in range(2):
        Image.fromarray(rng.integers(0, 255, (33, 41, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(rng.choice([0, 1, 2, 255], (33, 41)).astype(np.uint8)).save(tmp_path / "masks" / f"{i}.png")
    arguments = (tmp_path / "model", tmp_path / "images", tmp_path / "masks")
    result = evaluate_folder(*arguments, ["cat", "bird", "dog"], device="cpu", out=tmp_path / "o", progress=False)
    assert [row.seen for row in result.per_class] == [True, False, True]
    assert result.images == 2
    assert json.loads((tmp_path / "o/evaluation.json").read_text())["settings"]["classes"] == ["cat", "bird", "dog"]
    with pytest.raises(DataError, match="label 2"):
        evaluate_folder(*arguments, ["cat", "dog"], device="cpu", progress=False)
    # With the list of 20 objects and 39 backgrounds, whatever is a background counts as class 20.
    merged = evaluate_folder(*arguments, "voc_20b", device="cpu", progress=False)
    assert len(merged.per_class) == 21
    assert merged.per_class[20].name == "background"
    assert sum(row.predicted for row in merged.per_class) == sum(row.pixels for row in merged.per_class) > 0


# Zero-shot


def test_zero_shot_takes_the_nearest_text() -> None:
    clip = small_clip().eval()
    image = torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    text = torch.nn.functional.normalize(torch.randn(5, 2, 12, generator=torch.Generator().manual_seed(2)), dim=-1)
    scores = zero_shot_scores(clip, image, text)
    assert scores.shape == (5, 40, 56)
    assert float(scores.abs().max()) <= 1 + 1e-6
    # Text and pixels scaled, prompts in another order: the cosine of the mean stays.
    assert torch.allclose(zero_shot_scores(clip, image, 3 * text.flip(1)), scores, atol=1e-6)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.allclose(zero_shot_scores(clip, image, text[order]), scores[order], atol=1e-6)
    with pytest.raises(TypeError, match="uint8"):
        zero_shot_scores(clip, image.float(), text)


def _printed(table: Any) -> str:
    from rich.console import Console

    console = Console(width=120, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]
