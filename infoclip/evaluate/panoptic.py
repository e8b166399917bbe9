"""Panoptic quality (Kirillov et al., *Panoptic Segmentation*, section 4), counted as panopticapi counts it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from infoclip.data.panoptic import VOID, Segment

__all__ = ["PanopticCounts", "PanopticMetrics", "PanopticScores", "Segment"]


@dataclass(frozen=True)
class PanopticScores:
    """Means over the categories that occur, in 0..1; NaN if none does."""

    pq: float
    sq: float
    rq: float
    categories: int


class PanopticCounts(NamedTuple):
    """What is counted of one image, or of many."""

    matched: list[tuple[int, float]]
    """Category and IoU of each pair of a predicted and a true segment."""
    spurious: list[int]
    """Category of each predicted segment without a match."""
    missed: list[int]
    """Category of each true segment without a match."""


class PanopticMetrics:
    """Counts matched, spurious and missed segments of each category.

    A predicted and a true segment of one category match if their IoU is over 0.5, where the union leaves out predicted
    pixels on void. A prediction that lies on void or on a crowd of its category with more than half its area is not
    counted as spurious; a crowd never counts as missed.

    The IoUs are kept one by one and summed without rounding, so that the order of the images does not matter.

    Attributes:
        true_positives, false_positives, false_negatives: float64 [C], by category index 0 .. C-1.
    """

    def __init__(self, num_categories: int) -> None:
        self.num_categories = num_categories
        self._ious: list[list[float]] = [[] for _ in range(num_categories)]
        self.true_positives = torch.zeros(num_categories, dtype=torch.float64)
        self.false_positives = torch.zeros(num_categories, dtype=torch.float64)
        self.false_negatives = torch.zeros(num_categories, dtype=torch.float64)

    def update(
        self,
        prediction: Tensor,  # [H, W], segment ids, 0 for void
        target: Tensor,  # [H, W]
        predicted: Sequence[Segment],
        true: Sequence[Segment],
    ) -> None:
        """Add one image; raises as :meth:`count`."""
        self.add(self.count(prediction, target, predicted, true))

    @staticmethod
    def count(
        prediction: Tensor,  # [H, W], segment ids, 0 for void
        target: Tensor,  # [H, W]
        predicted: Sequence[Segment],
        true: Sequence[Segment],
    ) -> PanopticCounts:
        """The counts of one image, without adding them.

        Raises:
            ValueError: maps of different size, an id that a list names twice, or ids in a map that its list does not
                name.
        """
        if prediction.shape != target.shape:
            raise ValueError(f"prediction has shape {tuple(prediction.shape)}, target {tuple(target.shape)}")
        ours, theirs = {s.id: s for s in predicted}, {s.id: s for s in true}
        for segments, known in ((predicted, ours), (true, theirs)):
            if len(known) < len(segments):
                twice = next(s.id for i, s in enumerate(segments) if s.id in {t.id for t in segments[:i]})
                raise ValueError(f"the list of segments names the id {twice} twice; expected one entry a segment")
        pairs, counts = torch.stack([target.flatten(), prediction.flatten()]).long().unique(dim=1, return_counts=True)
        overlap = {(int(t), int(p)): int(n) for (t, p), n in zip(pairs.T, counts, strict=True)}
        area_true: dict[int, int] = {}
        area_ours: dict[int, int] = {}
        for (t, p), n in overlap.items():
            area_true[t] = area_true.get(t, 0) + n
            area_ours[p] = area_ours.get(p, 0) + n
        unknown = [i for i in area_ours if i != VOID and i not in ours] + [
            i for i in area_true if i != VOID and i not in theirs
        ]
        if unknown:
            raise ValueError(f"the map holds the segment {unknown[0]}, which its list of segments does not name")
        counts_of = PanopticCounts([], [], [])
        matched_true, matched_ours = set(), set()
        for (t, p), n in overlap.items():
            if t not in theirs or p not in ours or theirs[t].crowd or theirs[t].category != ours[p].category:
                continue
            iou = n / (area_true[t] + area_ours[p] - n - overlap.get((VOID, p), 0))
            if iou > 0.5:
                counts_of.matched.append((ours[p].category, iou))
                matched_true.add(t)
                matched_ours.add(p)
        crowds = {s.category: s.id for s in true if s.crowd}
        for segment in true:
            if segment.id not in matched_true and not segment.crowd:
                counts_of.missed.append(segment.category)
        for segment in predicted:
            if segment.id in matched_ours or segment.id not in area_ours:
                continue
            excused = overlap.get((VOID, segment.id), 0)
            if segment.category in crowds:
                excused += overlap.get((crowds[segment.category], segment.id), 0)
            if excused / area_ours[segment.id] <= 0.5:
                counts_of.spurious.append(segment.category)
        return counts_of

    def add(self, counts: PanopticCounts) -> None:
        """Add counts, such as :meth:`count`'s of an image or :meth:`counts` of another process."""
        for category, iou in counts.matched:
            self.true_positives[category] += 1
            self._ious[category].append(iou)
        for category in counts.spurious:
            self.false_positives[category] += 1
        for category in counts.missed:
            self.false_negatives[category] += 1

    def counts(self) -> PanopticCounts:
        """All counts so far."""
        every = range(self.num_categories)
        return PanopticCounts(
            [(c, iou) for c in every for iou in self._ious[c]],
            [c for c in every for _ in range(int(self.false_positives[c]))],
            [c for c in every for _ in range(int(self.false_negatives[c]))],
        )

    @property
    def iou_sum(self) -> Tensor:  # float64 [C]
        """Sum of the IoUs of each category's matches."""
        return torch.tensor([math.fsum(values) for values in self._ious], dtype=torch.float64)

    def per_category(self) -> tuple[Tensor, Tensor, Tensor]:
        """PQ, SQ and RQ of each category, float64 [C]; 0 where nothing matched, NaN where the category never occurs."""
        matched = self.true_positives
        weight = matched + (self.false_positives + self.false_negatives) / 2
        absent = weight == 0
        sq = torch.where(matched > 0, self.iou_sum / matched.clamp(min=1), 0.0).masked_fill(absent, math.nan)
        rq = (matched / weight.clamp(min=0.5)).masked_fill(absent, math.nan)
        return sq * rq, sq, rq

    def compute(self, categories: Collection[int] | None = None) -> PanopticScores:
        """Means over all categories that occur, or over some of them (things, stuff)."""
        pq, sq, rq = self.per_category()
        chosen = ~pq.isnan()
        if categories is not None:
            chosen &= torch.tensor([i in categories for i in range(self.num_categories)])
        means = [float(v[chosen].mean()) if bool(chosen.any()) else math.nan for v in (pq, sq, rq)]
        return PanopticScores(pq=means[0], sq=means[1], rq=means[2], categories=int(chosen.sum()))
