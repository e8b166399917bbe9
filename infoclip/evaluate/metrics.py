"""Segmentation metrics from one confusion matrix, with both published treatments of absent classes by name.

A class that is predicted but absent from the ground truth makes two definitions of mIoU part:

- ``miou`` (detectron2 today): mean of the IoU over the classes **present in the ground truth**;
- ``miou_legacy`` (detectron2 v0.6 and the copies of its evaluator): the same sum, **divided by the number of classes
  present in the ground truth or predicted**. Never larger than ``miou``.

``torchmetrics``' macro Jaccard index has the legacy meaning only, so that the matrix is kept here; the tests hold both
against each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Scores", "SegmentationMetrics", "harmonic_mean"]


@dataclass(frozen=True)
class Scores:
    """Metrics over a set of classes, all in 0..1; NaN where nothing could be measured."""

    miou: float
    """Mean IoU over the classes present in the ground truth."""
    miou_legacy: float
    """The same sum over the number of classes present in the ground truth or predicted."""
    fwiou: float
    """IoU weighted by the class's share of the labelled pixels."""
    macc: float
    """Mean over the classes present in the ground truth of the share of their pixels that are right (recall)."""
    pacc: float
    """Share of the labelled pixels that are right."""


class SegmentationMetrics:
    """Counts predicted and true labels; every metric follows from the counts.

    Args:
        num_classes: K; predictions are 0 .. K-1, targets too or ``ignore_index``.
        ignore_index: target value of pixels that carry no label; they count nowhere.

    Attributes:
        confusion: int64 [K + 1, K + 1] on the CPU, rows the prediction, columns the target; the last column counts
            the pixels without a label, the last row stays empty.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; expected at least 1")
        if 0 <= ignore_index < num_classes:
            raise ValueError(f"ignore_index {ignore_index} is one of the {num_classes} classes; expected another value")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.confusion = torch.zeros(num_classes + 1, num_classes + 1, dtype=torch.int64)

    def update(
        self,
        prediction: Tensor,  # [...], integer
        target: Tensor,  # [...], integer, of the same shape
    ) -> None:
        """Add the pixels of one image or of a batch.

        Raises:
            TypeError: labels that are not integers.
            ValueError: another shape, or a label out of range.
        """
        if prediction.shape != target.shape:
            raise ValueError(f"prediction has shape {tuple(prediction.shape)}, target {tuple(target.shape)}")
        for name, labels in (("prediction", prediction), ("target", target)):
            if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
                raise TypeError(f"{name} has dtype {labels.dtype}; expected integer labels")
        count = self.num_classes
        predicted, true = prediction.reshape(-1).long(), target.reshape(-1).to(prediction.device).long()
        ignored = true == self.ignore_index
        for name, wrong in (
            ("prediction", (predicted < 0) | (predicted >= count)),
            ("target", ((true < 0) | (true >= count)) & ~ignored),
        ):
            if bool(wrong.any()):
                value = int((predicted if name == "prediction" else true)[wrong][0])
                raise ValueError(f"{name} holds the label {value}; expected 0 to {count - 1}")
        cell = predicted * (count + 1) + true.masked_fill(ignored, count)
        counts = torch.bincount(cell, minlength=(count + 1) ** 2)
        self.confusion += counts.cpu().view(count + 1, count + 1)

    def merge(self, others: Iterable[SegmentationMetrics]) -> None:
        """Add the counts of metrics over the same classes, such as those of other processes."""
        for other in others:
            if other.num_classes != self.num_classes:
                raise ValueError(f"cannot add metrics over {other.num_classes} classes to {self.num_classes}")
            self.confusion += other.confusion

    @property
    def true_positives(self) -> Tensor:  # [K]
        return self.confusion.diagonal()[:-1]

    @property
    def target_pixels(self) -> Tensor:  # [K]
        """Labelled pixels of each class."""
        return self.confusion[:-1, :-1].sum(0)

    @property
    def predicted_pixels(self) -> Tensor:  # [K]
        """Labelled pixels that were predicted as each class."""
        return self.confusion[:-1, :-1].sum(1)

    def iou(self) -> Tensor:  # [K] float64
        """IoU of each class; NaN for a class that is absent from the ground truth."""
        union = self.target_pixels + self.predicted_pixels - self.true_positives
        return _ratio(self.true_positives, union).masked_fill(self.target_pixels == 0, math.nan)

    def accuracy(self) -> Tensor:  # [K] float64
        """Recall of each class; NaN for a class that is absent from the ground truth."""
        return _ratio(self.true_positives, self.target_pixels)

    def compute(self, classes: Sequence[int] | None = None) -> Scores:
        """The metrics over all classes, or over some of them (say the unseen ones).

        For a subset, IoU, recall and frequency are those of the full confusion matrix (a prediction of any class can be
        a mistake); means, weights and the pixel accuracy run over the subset's classes alone.
        """
        chosen = torch.ones(self.num_classes, dtype=torch.bool)
        if classes is not None:
            chosen[:] = False
            chosen[torch.as_tensor(list(classes), dtype=torch.int64)] = True
        present = chosen & (self.target_pixels > 0)
        seen_at_all = chosen & ((self.target_pixels > 0) | (self.predicted_pixels > 0))
        iou, pixels = self.iou()[present], self.target_pixels[present].double()
        total = float(pixels.sum())
        return Scores(
            miou=_mean(float(iou.sum()), int(present.sum())),
            miou_legacy=_mean(float(iou.sum()), int(seen_at_all.sum())),
            fwiou=_mean(float((iou * pixels).sum()), total),
            macc=_mean(float(self.accuracy()[present].sum()), int(present.sum())),
            pacc=_mean(float(self.true_positives[present].sum()), total),
        )


def harmonic_mean(a: float, b: float) -> float:
    """``2ab / (a + b)``; 0 if either is 0, NaN if either is."""
    if math.isnan(a) or math.isnan(b):
        return math.nan
    return 0.0 if a + b == 0 else 2.0 * a * b / (a + b)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part.double() / whole.clamp(min=1).double(), math.nan)


def _mean(total: float, count: float) -> float:
    return total / count if count else math.nan
