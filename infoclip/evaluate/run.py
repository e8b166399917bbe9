"""One evaluation: a predictor over a dataset, with a table a class and the seen and unseen classes apart."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from infoclip.errors import DataError, StorageError
from infoclip.evaluate.metrics import Scores, SegmentationMetrics, harmonic_mean
from infoclip.progress import tracked

if TYPE_CHECKING:
    from rich.table import Table

    from infoclip.clip import DenseCLIP
    from infoclip.config import EvalConfig
    from infoclip.data.folders import PairDataset
    from infoclip.model.segmentor import Segmentor

__all__ = [
    "ClassResult",
    "Dataset",
    "EvaluationResult",
    "Predictor",
    "evaluate_benchmark",
    "evaluate_folder",
    "evaluate_model",
    "segmentor_predictor",
    "without_nan",
    "zero_shot_predictor",
]

Predictor = Callable[[Tensor], Tensor]
"""From an image, uint8 [3, H, W] RGB, to its labels, integer [H, W]."""


class Dataset(Protocol):
    """What can be evaluated: samples with ``image`` uint8 [3, H, W], ``mask`` int64 [H, W] and ``file``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


@dataclass(frozen=True)
class ClassResult:
    """One row of the table of classes."""

    name: str
    seen: bool | None
    """Whether the class was in the training list; None where that is not known."""
    iou: float | None
    """None for a class that is absent from the ground truth."""
    accuracy: float | None
    pixels: int
    """Pixels of the class in the ground truth."""
    predicted: int
    """Labelled pixels that were predicted as the class."""


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics in 0..1 over all classes, over those of the training list and over the others; NaN where unmeasured."""

    overall: Scores
    seen: Scores
    unseen: Scores
    per_class: list[ClassResult]
    images: int
    seconds: float
    """Time spent predicting and counting, without reading."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What the result depends on beside the model: folders, prompt templates, test-time settings."""

    @property
    def harmonic(self) -> float:
        """Harmonic mean of the mIoU on seen and on unseen classes."""
        return harmonic_mean(self.seen.miou, self.unseen.miou)

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds > 0 else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what could not be measured is None."""
        data = {
            "overall": asdict(self.overall),
            "seen": asdict(self.seen),
            "unseen": asdict(self.unseen),
            "harmonic": self.harmonic,
            "images": self.images,
            "seconds": self.seconds,
            "images_per_second": self.images_per_second,
            "settings": self.settings,
            "per_class": [asdict(row) for row in self.per_class],
        }
        return without_nan(data)

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_dict` as JSON, whole or not at all.

        Raises:
            StorageError: the file cannot be written.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise StorageError(f"Cannot write the evaluation {path}: {error.strerror or error}.") from error

    def summary_table(self) -> Table:
        """The metrics for the terminal, in percent."""
        from rich.table import Table

        table = Table(title=f"{self.images} images, {self.images_per_second:.2f} images/s", title_justify="left")
        table.add_column("classes")
        for name in ("mIoU", "mIoU (legacy)", "fwIoU", "mACC", "pACC"):
            table.add_column(name, justify="right")
        rows = [(f"all {len(self.per_class)}", self.overall)]
        groups = [(True, "seen", self.seen), (False, "unseen", self.unseen)]
        if all(any(row.seen is which for row in self.per_class) for which, _, _ in groups):
            rows += [
                (f"{sum(row.seen is which for row in self.per_class)} {name}", scores) for which, name, scores in groups
            ]
        for name, s in rows:
            table.add_row(name, *(_percent(v) for v in (s.miou, s.miou_legacy, s.fwiou, s.macc, s.pacc)))
        if len(rows) > 1:
            table.add_row("harmonic mean", _percent(self.harmonic))
        table.caption = "mIoU: mean over classes present in the ground truth; legacy: divided by those also predicted"
        table.caption_justify = "left"
        return table

    def class_table(self) -> Table:
        """One row a class for the terminal, in percent."""
        from rich.table import Table

        table = Table()
        table.add_column("class", overflow="fold")
        for name in ("", "IoU", "recall", "pixels"):
            table.add_column(name, justify="right")
        names = {True: "seen", False: "unseen", None: ""}
        for row in self.per_class:
            table.add_row(row.name, names[row.seen], _percent(row.iou), _percent(row.accuracy), f"{row.pixels:,}")
        return table


def segmentor_predictor(segmentor: Segmentor, classes: Sequence[str], config: EvalConfig) -> Predictor:
    """Labels from a trained segmentor; the class embeddings are computed once, here.

    Raises:
        DataError: a class list that cannot be used.
    """
    from infoclip.model.inference import predict_scores

    with torch.no_grad():
        text = segmentor.clip.text_features(list(classes))

    def predict(image: Tensor) -> Tensor:  # [3, H, W] -> [H, W]
        return predict_scores(segmentor, image, text, config).argmax(dim=0)

    return predict


def zero_shot_predictor(clip: DenseCLIP, classes: Sequence[str]) -> Predictor:
    """Labels from a CLIP as it is (see :mod:`infoclip.evaluate.zero_shot`).

    Raises:
        DataError: a class list that cannot be used.
    """
    from infoclip.clip.text_bank import TextBank, text_cache_dir
    from infoclip.evaluate.zero_shot import zero_shot_scores

    clip.eval()
    with torch.no_grad():
        text = TextBank(clip, cache_dir=text_cache_dir())(list(classes))

    def predict(image: Tensor) -> Tensor:  # [3, H, W] -> [H, W]
        return zero_shot_scores(clip, image, text).argmax(dim=0)

    return predict


def evaluate_model(
    predictor: Predictor,
    dataset: Dataset,
    classes: Sequence[str],
    seen: Sequence[str] | None = None,
    *,
    ignore_index: int = 255,
    progress: bool = True,
    description: str = "evaluating",
    on_prediction: Callable[[int, dict[str, Any], Tensor], None] | None = None,
    settings: dict[str, Any] | None = None,
) -> EvaluationResult:
    """Run a predictor over every image and count.

    Args:
        predictor: see :data:`Predictor`; it must know all of ``classes``.
        dataset: samples whose masks index ``classes``.
        seen: the classes that were trained on; the rest is unseen. None if that is not known.
        on_prediction: called with each index, sample and predicted labels [H, W].

    Raises:
        DataError: an empty dataset, or files that cannot be used.
    """
    if not len(dataset):
        raise DataError("There is no image to evaluate; expected at least one.")
    metrics = SegmentationMetrics(len(classes), ignore_index)
    seconds = 0.0
    with torch.no_grad():
        for index in tracked(range(len(dataset)), description, progress):
            sample = dataset[index]
            start = time.perf_counter()
            labels = predictor(sample["image"].as_subclass(Tensor))
            metrics.update(labels, sample["mask"].as_subclass(Tensor))
            seconds += time.perf_counter() - start
            if on_prediction is not None:
                on_prediction(index, sample, labels)
    return _result(metrics, classes, seen, len(dataset), seconds, settings or {})


def evaluate_folder(
    model: str | Path,
    images: str | Path,
    masks: str | Path,
    classes: str | Path | Sequence[str],
    *,
    label_map: str | Path | None = None,
    ignore_index: int = 255,
    seen: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    out: str | Path | None = None,
    progress: bool = True,
) -> EvaluationResult:
    """Evaluate a trained model on a folder of images and a folder of masks.

    Args:
        model: a run or model directory.
        classes: names, a shipped list (``ade20k_150``) or a file. With ``voc_20b`` every prediction from class 20 on is
            the background (CAT-Seg, section 4.1).
        label_map: shipped list or JSON file that maps annotation values to class indices; without it a mask's value is
            the index. Values that the map does not name carry no label.
        seen: names that count as seen; by default those of the model's training list that are in ``classes``.
        overrides: ``key=value`` for the model's config, such as ``eval.sliding_window=false``.
        out: file for the result as JSON.

    Raises:
        CheckpointError, ConfigError, DataError, StorageError: see the classes.
    """
    from infoclip.api import check_path
    from infoclip.data.classes import check_classes, load_classes, load_label_map
    from infoclip.data.folders import FolderDataset

    check_path(model)  # a wrong path is named before anything about the data
    names = load_classes(classes) if isinstance(classes, (str, Path)) else check_classes(classes)
    mapping = None if label_map is None else load_label_map(label_map)
    ignored = ignore_index if mapping is None else max(ignore_index, len(names))
    dataset = FolderDataset(images, masks, names, ignored, mapping)
    where = {"images": str(images), "masks": str(masks)}
    return _evaluate(model, dataset, str(classes) == "voc_20b", where, seen, overrides, device, out, progress)


def evaluate_benchmark(
    model: str | Path,
    name: str,
    root: str | Path,
    *,
    seen: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    out: str | Path | None = None,
    progress: bool = True,
) -> EvaluationResult:
    """Evaluate a trained model on a data set of the papers, in the folders that it was downloaded to or converted in.

    Args:
        model: a run or model directory.
        name: ``a150``, ``a847``, ``pc59``, ``pc459``, ``pas20``, ``pas20b``, ``coco-val``, ``coco-train``. On
            ``pas20b`` every prediction from class 20 on is the background (CAT-Seg, section 4.1).
        root: the folder above the data set's own, or that folder itself.
        seen, overrides, device, out, progress: as :func:`evaluate_folder`'s.

    Raises:
        CheckpointError, ConfigError, DataError, StorageError: see the classes.
    """
    from infoclip.api import check_path
    from infoclip.data.benchmarks import get_benchmark, open_benchmark

    get_benchmark(name)
    check_path(model)
    dataset = open_benchmark(name, root, progress=progress)
    where = {"benchmark": name, "root": str(root), "masks": str(dataset.pairs[0][1].parent)}
    return _evaluate(model, dataset, name == "pas20b", where, seen, overrides, device, out, progress)


def _evaluate(
    model: str | Path,
    dataset: PairDataset,
    background: bool,
    where: dict[str, str],
    seen: Sequence[str] | None,
    overrides: Sequence[str],
    device: str,
    out: str | Path | None,
    progress: bool,
) -> EvaluationResult:
    """Predict, count and save; with ``background`` every class from 20 on is the background, class 20."""
    from infoclip.api import load
    from infoclip.config import apply_overrides

    names, ignored = dataset.classes, dataset.ignore_index
    loaded = load(model, device=device)
    config = apply_overrides(loaded.config, list(overrides)).eval
    predict = segmentor_predictor(loaded.segmentor, names, config)
    shown = list(names)
    if background:
        shown = [*names[:20], "background"]
        all_names = predict

        def predict(image: Tensor) -> Tensor:  # [3, H, W] -> [H, W]
            return all_names(image).clamp(max=20)

    trained = set(loaded.classes if seen is None else seen)
    result = evaluate_model(
        predict,
        dataset,
        shown,
        [name for name in shown if name in trained],
        ignore_index=ignored,
        progress=progress,
        settings={"model": str(model), **where, "classes": names}
        | {"templates": list(loaded.segmentor.clip.templates), "eval": asdict(config)},
    )
    if out is not None:
        result.save(out)
    return result


def _result(
    metrics: SegmentationMetrics,
    classes: Sequence[str],
    seen: Sequence[str] | None,
    images: int,
    seconds: float,
    settings: dict[str, Any],
) -> EvaluationResult:
    known = None if seen is None else set(seen)
    flags = [None if known is None else name in known for name in classes]
    iou, accuracy = metrics.iou().tolist(), metrics.accuracy().tolist()
    true, predicted = metrics.target_pixels.tolist(), metrics.predicted_pixels.tolist()
    rows = [
        ClassResult(name, flags[i], _or_none(iou[i]), _or_none(accuracy[i]), true[i], predicted[i])
        for i, name in enumerate(classes)
    ]
    return EvaluationResult(
        overall=metrics.compute(),
        seen=metrics.compute([i for i, flag in enumerate(flags) if flag is True]),
        unseen=metrics.compute([i for i, flag in enumerate(flags) if flag is False]),
        per_class=rows,
        images=images,
        seconds=seconds,
        settings=settings,
    )


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def without_nan(value: Any) -> Any:
    """The value with every NaN in its dicts and lists as None, since JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return _or_none(value) if isinstance(value, float) else value


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"
