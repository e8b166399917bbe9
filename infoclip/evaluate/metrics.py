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
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Confusion", "PairCounts", "Scores", "SegmentationMetrics", "harmonic_mean"]

_DENSE_CELLS = 4_000_000
"""Up to so many cells the confusion matrix is one tensor (32 MB); beyond (2,000 classes), only cells that occur."""


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


@dataclass(frozen=True)
class Confusion:
    """Pixels of one class that were predicted as another."""

    true: int
    predicted: int
    pixels: int


class PairCounts(NamedTuple):
    """How often pairs of prediction and target occur, say in one image: the cells of a confusion matrix that are not 0.

    A cell is ``prediction * (K + 1) + target``, where the target K stands for no label.
    """

    cells: Tensor  # int64 [n], ascending
    counts: Tensor  # int64 [n]


class SegmentationMetrics:
    """Counts predicted and true labels; every metric follows from the counts, in any order of the images.

    Memory: 8 bytes a cell of the matrix up to 2,000 classes, beyond that 16 bytes a pair of classes that occurs.

    Args:
        num_classes: K; predictions are 0 .. K-1, targets too or ``ignore_index``.
        ignore_index: target value of pixels that carry no label; they count nowhere.

    Attributes:
        true_positives, target_pixels, predicted_pixels: int64 [K] on the CPU: labelled pixels of each class that are
            right, that are in the ground truth, that were predicted.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; expected at least 1")
        if 0 <= ignore_index < num_classes:
            raise ValueError(f"ignore_index {ignore_index} is one of the {num_classes} classes; expected another value")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.true_positives, self.target_pixels, self.predicted_pixels = torch.zeros(3, num_classes, dtype=torch.int64)
        self._is_dense = (num_classes + 1) ** 2 <= _DENSE_CELLS
        self._dense = torch.zeros((num_classes + 1) ** 2 if self._is_dense else 0, dtype=torch.int64)
        self._sparse = [PairCounts(self._dense[:0], self._dense[:0])]

    def update(
        self,
        prediction: Tensor,  # [...], integer
        target: Tensor,  # [...], integer, of the same shape
    ) -> None:
        """Add the pixels of one image or of a batch; raises as :meth:`count`."""
        self.add(self.count(prediction, target))

    def count(
        self,
        prediction: Tensor,  # [...], integer
        target: Tensor,  # [...], integer, of the same shape
    ) -> PairCounts:
        """The counts of one image or of a batch, without adding them.

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
        if self._is_dense:
            counts = torch.bincount(cell, minlength=(count + 1) ** 2)
            cells = counts.nonzero()[:, 0]
            counts = counts[cells]
        else:
            cells, counts = cell.unique(return_counts=True)
        return PairCounts(cells.cpu(), counts.cpu())

    def add(self, pairs: PairCounts) -> None:
        """Add counts of this class list, such as :meth:`count`'s of an image or :meth:`pairs` of another process.

        Raises:
            ValueError: cells outside the matrix, or counts below 0.
        """
        cells, counts = pairs
        side = self.num_classes + 1
        if len(cells) and (
            int(cells.min()) < 0 or int(cells.max()) >= side * self.num_classes or int(counts.min()) < 0
        ):
            raise ValueError(f"the counts are not those of {self.num_classes} classes")
        predicted, true = cells // side, cells % side
        labelled = true < self.num_classes
        right = predicted == true
        self.target_pixels.index_add_(0, true[labelled], counts[labelled])
        self.predicted_pixels.index_add_(0, predicted[labelled], counts[labelled])
        self.true_positives.index_add_(0, true[right], counts[right])
        if self._is_dense:
            self._dense.index_add_(0, cells, counts)
            return
        self._sparse.append(pairs)
        if sum(len(p.cells) for p in self._sparse[1:]) > max(1_000_000, len(self._sparse[0].cells)):
            self.pairs()

    def pairs(self) -> PairCounts:
        """All counts so far."""
        if self._is_dense:
            cells = self._dense.nonzero()[:, 0]
            return PairCounts(cells, self._dense[cells])
        if len(self._sparse) > 1:
            cells, place = torch.cat([p.cells for p in self._sparse]).unique(return_inverse=True)
            counts = torch.zeros_like(cells).index_add_(0, place, torch.cat([p.counts for p in self._sparse]))
            self._sparse = [PairCounts(cells, counts)]
        return self._sparse[0]

    def merge(self, others: Iterable[SegmentationMetrics]) -> None:
        """Add the counts of metrics over the same classes, such as those of other processes."""
        for other in others:
            if other.num_classes != self.num_classes:
                raise ValueError(f"cannot add metrics over {other.num_classes} classes to {self.num_classes}")
            self.add(other.pairs())

    @property
    def confusion(self) -> Tensor:  # int64 [K + 1, K + 1] on the CPU
        """The whole matrix: rows the prediction, columns the target; the last column counts the pixels without a
        label, the last row stays empty."""
        side = self.num_classes + 1
        if self._is_dense:
            return self._dense.view(side, side)
        pairs = self.pairs()
        return torch.zeros(side * side, dtype=torch.int64).index_add_(0, *pairs).view(side, side)

    def confusions(self, limit: int, true: int | None = None) -> list[Confusion]:
        """The most frequent mistakes, most pixels first, at most ``limit`` of them: of all classes, or of one."""
        side = self.num_classes + 1
        cells, counts = self.pairs()
        predicted, target = cells // side, cells % side
        wrong = (target < self.num_classes) & (predicted != target)
        if true is not None:
            wrong &= target == true
        order = counts[wrong].sort(descending=True, stable=True).indices[:limit]
        rows = (values[wrong][order].tolist() for values in (target, predicted, counts))
        return [Confusion(*row) for row in zip(*rows, strict=True)]

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
