"""Panoptic quality (Kirillov et al., *Panoptic Segmentation*, section 4), counted as panopticapi counts it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infoclip.data.panoptic import VOID, Segment

__all__ = ["PanopticMetrics", "PanopticScores", "Segment"]


@dataclass(frozen=True)
class PanopticScores:
    """Means over the categories that occur, in 0..1; NaN if none does."""

    pq: float
    sq: float
    rq: float
    categories: int


class PanopticMetrics:
    """Counts matched, spurious and missed segments of each category.

    A predicted and a true segment of one category match if their IoU is over 0.5, where the union leaves out predicted
    pixels on void. A prediction that lies on void or on a crowd of its category with more than half its area is not
    counted as spurious; a crowd never counts as missed.

    Attributes:
        iou_sum, true_positives, false_positives, false_negatives: float64 [C], by category index 0 .. C-1.
    """

    def __init__(self, num_categories: int) -> None:
        self.num_categories = num_categories
        self.iou_sum = torch.zeros(num_categories, dtype=torch.float64)
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
        """Add one image.

        Raises:
            ValueError: maps of different size, or ids in a map that its list does not name.
        """
        if prediction.shape != target.shape:
            raise ValueError(f"prediction has shape {tuple(prediction.shape)}, target {tuple(target.shape)}")
        ours, theirs = {s.id: s for s in predicted}, {s.id: s for s in true}
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
        matched_true, matched_ours = set(), set()
        for (t, p), n in overlap.items():
            if t not in theirs or p not in ours or theirs[t].crowd or theirs[t].category != ours[p].category:
                continue
            iou = n / (area_true[t] + area_ours[p] - n - overlap.get((VOID, p), 0))
            if iou > 0.5:
                self.true_positives[ours[p].category] += 1
                self.iou_sum[ours[p].category] += iou
                matched_true.add(t)
                matched_ours.add(p)
        crowds = {s.category: s.id for s in true if s.crowd}
        for segment in true:
            if segment.id not in matched_true and not segment.crowd:
                self.false_negatives[segment.category] += 1
        for segment in predicted:
            if segment.id in matched_ours or segment.id not in area_ours:
                continue
            excused = overlap.get((VOID, segment.id), 0)
            if segment.category in crowds:
                excused += overlap.get((crowds[segment.category], segment.id), 0)
            if excused / area_ours[segment.id] <= 0.5:
                self.false_positives[segment.category] += 1

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
