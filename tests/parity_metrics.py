"""Parity of the segmentation metrics: kind ``metrics``. Boundary IoU is not covered (it needs OpenCV's erosion)."""

from __future__ import annotations

import torch
from parity_common import Case, Row

from infoclip.evaluate.metrics import SegmentationMetrics
from infoclip.evaluate.panoptic import PanopticMetrics, Segment

__all__ = ["check_metrics"]


def check_metrics(case: Case) -> list[Row]:
    """mIoU in both definitions, fwIoU, mACC, pACC, per-class figures, the confusion matrix, and PQ, SQ, RQ."""
    count, ignore = case.hyper["K"], case.hyper["ignore"]
    metrics = SegmentationMetrics(count, ignore)
    for i in range(len(case.hyper["sizes"])):
        metrics.update(case.tensor(f"in.sem.{i}.pred"), case.tensor(f"in.sem.{i}.gt"))
    rows = [case.row("out.confusion_matrix", metrics.confusion)]
    scores = metrics.compute()
    for evaluator, miou in (("detectron2_head", scores.miou), ("maft_plus_v06", scores.miou_legacy)):
        want = case.data["semantic"][evaluator]
        got = {"mIoU": miou, "fwIoU": scores.fwiou, "mACC": scores.macc, "pACC": scores.pacc}
        rows += [_row(f"{evaluator}.{name}", 100 * value, want[name]) for name, value in got.items()]
        for prefix, values in (("IoU", metrics.iou()), ("ACC", metrics.accuracy())):
            recorded = [want[f"{prefix}-c{i}"] for i in range(count)]
            present = torch.tensor([v is not None for v in recorded])
            rows.append(Row(f"{evaluator}.{prefix}.present", ~values.isnan(), present))
            rows += [
                _row(f"{evaluator}.{prefix}-c{i}", 100 * float(values[i]), v)
                for i, v in enumerate(recorded)
                if v is not None
            ]
    return rows + _panoptic(case)


def _panoptic(case: Case) -> list[Row]:
    categories = {int(key): value for key, value in case.data["panoptic_categories"].items()}
    index = {key: i for i, key in enumerate(categories)}
    metrics = PanopticMetrics(len(index))
    for i, segments in enumerate(case.data["panoptic_segments"]):
        true = [Segment(s["id"], index[s["category_id"]], bool(s["iscrowd"])) for s in segments["gt"]]
        predicted = [Segment(s["id"], index[s["category_id"]]) for s in segments["pred"]]
        metrics.update(case.tensor(f"in.pan.{i}.pred"), case.tensor(f"in.pan.{i}.gt"), predicted, true)
    want = case.data["panoptic"]
    things = [index[key] for key, value in categories.items() if value["isthing"]]
    groups = {"All": None, "Things": things, "Stuff": [i for i in index.values() if i not in things]}
    rows = []
    for group, chosen in groups.items():
        got = metrics.compute(chosen)
        rows += [_row(f"{group}.{name}", getattr(got, name), want[group][name]) for name in ("pq", "sq", "rq")]
        rows.append(Row(f"{group}.n", torch.tensor(got.categories), torch.tensor(int(want[group]["n"]))))
    for key, i in index.items():
        for name, values in zip(("pq", "sq", "rq"), metrics.per_category(), strict=True):
            rows.append(_row(f"{key}.{name}", float(values[i].nan_to_num()), want["per_class"][str(key)][name]))
    return rows


def _row(name: str, got: float, want: float) -> Row:
    # Counts of integers and a few float64 operations: nothing but the last bits may differ.
    return Row(name, torch.tensor(got, dtype=torch.float64), torch.tensor(want, dtype=torch.float64))
