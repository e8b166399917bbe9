"""One panoptic evaluation: PQ, SQ and RQ with things and stuff, seen and unseen classes apart, and mIoU.

The predictions come from a model of mask proposals, or from a folder in panopticapi's layout that any program wrote.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from infoclip import __version__
from infoclip.data.classes import overlap, select_classes
from infoclip.data.panoptic import PanopticDataset, Segment, check_segments, read_annotations
from infoclip.errors import DataError
from infoclip.evaluate.metrics import PairCounts, Scores, SegmentationMetrics, harmonic_mean
from infoclip.evaluate.panoptic import PanopticCounts, PanopticMetrics, PanopticScores
from infoclip.evaluate.records import ImageRecord, Records
from infoclip.evaluate.run import Throughput, count_images, model_digest, percent, without_nan
from infoclip.workers import Workers, joined, run_in_processes

if TYPE_CHECKING:
    from rich.table import Table

    from infoclip.api import Model

__all__ = ["PanopticClassResult", "PanopticEvaluation", "PanopticMap", "PanopticPredictor", "evaluate_panoptic",
           "evaluate_panoptic_folder", "evaluate_panoptic_model", "folder_predictor", "is_model",
           "model_predictor"]  # fmt: skip


@dataclass(frozen=True)
class PanopticMap:
    """What a predictor answers for one picture."""

    ids: Tensor  # [H, W]
    """Segment ids, integer; 0 where there is no segment."""
    segments: Sequence[Segment]
    """Every segment of the map; categories index the data set's classes."""
    semantic: Tensor | None = None  # [H, W]
    """The class of every pixel where a model answers that too; mIoU is counted on it, otherwise on the map itself."""


PanopticPredictor = Callable[[int, Tensor], PanopticMap]
"""From a picture's index and its pixels, uint8 [3, H, W] RGB, to its map."""


@dataclass(frozen=True)
class PanopticClassResult:
    """One row of the table of classes; None for what a class that never occurs has not."""

    name: str
    thing: bool
    seen: bool | None
    """Whether the class was in the training list; None where that is not known."""
    pq: float | None
    sq: float | None
    rq: float | None
    true_positives: int
    false_positives: int
    false_negatives: int
    iou: float | None


@dataclass(frozen=True)
class PanopticEvaluation:
    """Metrics in 0..1; NaN where nothing could be measured."""

    overall: PanopticScores
    things: PanopticScores
    stuff: PanopticScores
    seen: PanopticScores
    unseen: PanopticScores
    semantic: Scores
    semantic_seen: Scores
    semantic_unseen: Scores
    per_class: list[PanopticClassResult]
    images: int
    throughput: Throughput
    image_records: list[ImageRecord] = field(default_factory=list, repr=False)
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def harmonic(self) -> float:
        """Harmonic mean of the PQ on seen and on unseen classes."""
        return harmonic_mean(self.seen.pq, self.unseen.pq)

    @property
    def semantic_harmonic(self) -> float:
        """Harmonic mean of the mIoU on seen and on unseen classes."""
        return harmonic_mean(self.semantic_seen.miou, self.semantic_unseen.miou)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what could not be measured is None. All but ``run`` is the same for every run."""
        data = asdict(replace(self, image_records=[])) | {
            "harmonic": self.harmonic,
            "semantic_harmonic": self.semantic_harmonic,
        }
        speed = {**data.pop("throughput"), "images_per_second": self.throughput.images_per_second}
        data["run"] = {"throughput": speed, "environment": data.pop("environment")}
        del data["image_records"]
        return without_nan(data)

    def save(self, folder: str | Path, name: str = "evaluation") -> Path:
        """Write :meth:`to_dict` as ``NAME.json``, whole or not at all.

        Raises:
            StorageError: the folder cannot be written.
        """
        from infoclip.api import write_files

        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        return write_files(Path(folder), {f"{name}.json": text.encode()})[0]

    def summary_table(self) -> Table:
        """The metrics for the terminal, in percent."""
        from rich.table import Table

        speed = self.throughput.images_per_second
        done = "" if math.isnan(speed) else f", {speed:.2f} images/s"
        table = Table(title=f"{self.images} images{done}", title_justify="left")
        table.add_column("classes")
        for name in ("PQ", "SQ", "RQ", "mIoU", "occur"):
            table.add_column(name, justify="right")
        for row in self.summary_rows(percent):
            table.add_row(*row)
        table.caption = (
            "means over the classes that occur in the ground truth or the prediction (PQ), in the truth (mIoU)"
        )
        table.caption_justify = "left"
        return table

    def summary_rows(self, written: Callable[[float], str]) -> list[list[str]]:
        """A row a group of classes: what it is, PQ, SQ, RQ and mIoU as ``written``, and how many classes occur."""
        rows: list[tuple[str, PanopticScores, float | None]] = [
            (f"all {len(self.per_class)}", self.overall, self.semantic.miou),
            (f"{sum(row.thing for row in self.per_class)} things", self.things, None),
            (f"{sum(not row.thing for row in self.per_class)} stuff", self.stuff, None),
        ]
        known = [(True, "seen", self.seen, self.semantic_seen), (False, "unseen", self.unseen, self.semantic_unseen)]
        both = all(any(row.seen is which for row in self.per_class) for which, *_ in known)
        if both:
            rows += [
                (f"{sum(row.seen is which for row in self.per_class)} {name}", scores, semantic.miou)
                for which, name, scores, semantic in known
            ]
        found = [
            [name, *(written(v) for v in (s.pq, s.sq, s.rq)), "" if miou is None else written(miou), str(s.categories)]
            for name, s, miou in rows
        ]
        if both:
            found.append(["harmonic mean", written(self.harmonic), "", "", written(self.semantic_harmonic), ""])
        return found

    def class_table(self) -> Table:
        """One row a class for the terminal, in percent."""
        from rich.markup import escape
        from rich.table import Table

        table = Table()
        table.add_column("class", overflow="fold")
        for name in ("", "", "PQ", "SQ", "RQ", "found", "spurious", "missed", "IoU"):
            table.add_column(name, justify="right")
        names = {True: "seen", False: "unseen", None: ""}
        for row in self.per_class:
            table.add_row(
                escape(row.name), "thing" if row.thing else "stuff", names[row.seen],
                *map(percent, (row.pq, row.sq, row.rq)),
                *map(str, (row.true_positives, row.false_positives, row.false_negatives)), percent(row.iou),
            )  # fmt: skip
        return table


def evaluate_panoptic(
    predictor: PanopticPredictor,
    dataset: PanopticDataset,
    seen: Sequence[str] | None = None,
    *,
    progress: bool = True,
    description: str = "evaluating",
    on_prediction: Callable[[int, dict[str, Any], PanopticMap], None] | None = None,
    settings: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None,
    records: Records | None = None,
    workers: Workers | None = None,
) -> PanopticEvaluation:
    """Run a predictor over every picture and count; the next picture is read meanwhile.

    Args:
        predictor: see :data:`PanopticPredictor`.
        seen: the classes that were trained on; the rest is unseen. None if that is not known.
        on_prediction: called with each index, sample and map.
        records, workers: as :func:`infoclip.evaluate.run.evaluate_model`'s.

    Raises:
        DataError: an empty data set, files that cannot be used, or a predicted map that its segments do not describe.
        StorageError: the records cannot be written.
    """
    count = len(dataset.classes)
    # One more class than there are: what a map leaves without a segment is a wrong answer, but of no class.
    labels = SegmentationMetrics(count + 1, dataset.ignore_index + 1)

    def count_one(index: int, sample: dict[str, Any]) -> tuple[ImageRecord, float]:
        start = time.perf_counter()
        found = predictor(index, sample["image"].as_subclass(Tensor))
        ids, truth = found.ids.cpu().long(), sample["panoptic"].as_subclass(Tensor)
        seconds = time.perf_counter() - start
        if ids.shape != truth.shape:
            raise DataError(
                f"The predicted map of {sample['file']} is {ids.shape[1]}x{ids.shape[0]} pixels, the image "
                f"{truth.shape[1]}x{truth.shape[0]}; expected the same size."
            )
        try:
            segments = PanopticMetrics.count(ids, truth, found.segments, sample["segments"])
        except ValueError as error:
            raise DataError(f"The prediction for {sample['file']} cannot be counted: {error}.") from error
        mask = sample["mask"].as_subclass(Tensor)
        semantic = _category_map(ids, found.segments, count) if found.semantic is None else found.semantic.cpu()
        labelled, right = mask != dataset.ignore_index, semantic == mask
        pairs = labels.count(semantic, torch.where(labelled, mask, labels.ignore_index))
        if on_prediction is not None:
            on_prediction(index, sample, found)
        record = ImageRecord(index, Path(str(sample["file"])).name, int(labelled.sum()), int(right.sum()), pairs)
        return replace(record, segments=segments), seconds

    tally, images, throughput = count_images(
        dataset, count_one, lambda: _Both(count, labels.ignore_index), records=records, workers=workers or Workers(),
        description=description, progress=progress,
    )  # fmt: skip
    return _result(tally, dataset, seen, images, throughput, settings or {}, environment or {})


class _Both:
    """Segments and labels."""

    def __init__(self, categories: int, ignore_index: int) -> None:
        self.quality = PanopticMetrics(categories)
        self.labels = SegmentationMetrics(categories + 1, ignore_index)

    def add(self, record: ImageRecord) -> None:
        assert record.segments is not None
        assert record.pairs is not None
        self.merge((record.segments, record.pairs))

    def state(self) -> tuple[PanopticCounts, PairCounts]:
        return self.quality.counts(), self.labels.pairs()

    def merge(self, state: tuple[PanopticCounts, PairCounts]) -> None:
        self.quality.add(state[0])
        self.labels.add(state[1])


def evaluate_panoptic_model(
    model: str | Path,
    dataset: PanopticDataset,
    seen: Sequence[str] | None = None,
    *,
    name: str = "evaluation",
    overrides: Sequence[str] = (),
    device: str = "auto",
    out: str | Path | None = None,
    processes: int = 1,
    progress: bool = True,
) -> PanopticEvaluation:
    """Evaluate a trained model of mask proposals.

    Args:
        model: a run or model directory, or a published checkpoint.
        dataset: whose classes are the model's vocabulary.
        seen: names that count as seen; by default those of the model's training list
            (:func:`infoclip.data.classes.overlap`).
        name: of the files in ``out``.
        overrides: ``key=value`` for the model's config, such as ``eval.object_threshold=0.2``.
        out: folder for ``NAME.json``, the report ``NAME.html`` and ``NAME.images.jsonl``, from which the same call goes
            on where it was stopped.
        device, processes, progress: as :func:`infoclip.evaluate.run.evaluate_folder`'s.

    Raises:
        CheckpointError, DataError, StorageError: see the classes.
        ConfigError: a model without mask proposals, or settings that cannot be.
    """
    from infoclip.api import check_path, load
    from infoclip.config import apply_overrides
    from infoclip.engine.environment import collect_environment
    from infoclip.evaluate.run import listed

    check_path(model)
    if processes > 1:
        return run_in_processes(
            processes, evaluate_panoptic_model, model, dataset, seen, name=name, overrides=overrides, device=device,
            out=out, progress=progress,
        )  # fmt: skip
    with joined() as workers:
        loaded = load(model, device=workers.device(device))
        loaded.config = apply_overrides(loaded.config, list(overrides))
        predictor = model_predictor(loaded, dataset)
        names = dataset.classes
        settings: dict[str, Any] = {"model": str(model), "annotations": str(dataset.annotations.path), "classes": names}
        settings |= {"templates": list(loaded.segmentor.clip.templates), "eval": asdict(loaded.config.eval)}
        records = None
        if out is not None:
            key = {
                "infoclip": __version__,
                "task": "panoptic",
                "weights": workers.broadcast(model_digest(loaded.segmentor) if workers.first else ""),
                "data": listed(dataset),
                "classes": hashlib.sha256(json.dumps([names, dataset.things, loaded.classes]).encode()).hexdigest(),
                **{part: settings[part] for part in ("templates", "eval")},
            }
            records = Records(Path(out), name, key, len(dataset), len(names) + 1, len(names))
        known = overlap(names, loaded.classes if seen is None else list(seen))
        result = evaluate_panoptic(
            predictor,
            dataset,
            [part for part, flag in zip(names, known, strict=True) if flag],
            progress=progress and workers.first,
            description="evaluating" if workers.count == 1 else f"evaluating (process 1 of {workers.count})",
            settings=settings,
            environment=collect_environment(),
            records=records,
            workers=workers,
        )
        if out is not None and workers.first:
            _write(Path(out), name, result, dataset, predictor)
    return result


def model_predictor(model: Model, dataset: PanopticDataset) -> PanopticPredictor:
    """The maps of a model of mask proposals, with the data set's classes as its vocabulary.

    Raises:
        ConfigError: a model without mask proposals.
        DataError: class names that cannot be used.
    """
    from infoclip.model.maftplus.inference import predict_masks

    segmentor, vocabulary = model.proposals("panoptic", dataset.classes)
    config = model.config.eval

    def predict(index: int, image: Tensor) -> PanopticMap:  # [3, H, W]
        found = predict_masks(segmentor, image, vocabulary, config, model.classes)
        ids, segments = found.panoptic(dataset.things, config.object_threshold, config.overlap_threshold)
        return PanopticMap(ids, segments, found.labels(masks_first=True)[1])

    return predict


def is_model(path: str | Path) -> bool:
    """Whether a path is a model (a run, a model folder, a checkpoint file) and not predictions."""
    path = Path(path)
    if path.is_file():
        return path.suffix != ".json"
    return (
        any((path / name).exists() for name in ("model", "model.safetensors")) and not (path / "panoptic.json").exists()
    )


def evaluate_panoptic_folder(
    predictions: str | Path,
    dataset: PanopticDataset,
    seen: Sequence[str] | None = None,
    *,
    out: str | Path | None = None,
    progress: bool = True,
) -> PanopticEvaluation:
    """Count the predictions of a folder in panopticapi's layout; see :func:`folder_predictor`.

    Args:
        seen: as :func:`evaluate_panoptic`'s.
        out: folder for ``evaluation.json`` and the report ``evaluation.html``.

    Raises:
        DataError: as :func:`evaluate_panoptic` and :func:`folder_predictor`; a name in ``seen`` that is none of the
            data's classes.
        StorageError: ``out`` cannot be written.
    """
    path = Path(predictions)
    if not path.exists():
        raise DataError(f"There are no predictions {path}; expected a folder with panoptic.json and PNGs, or the JSON.")
    if path.is_dir() and not (path / "panoptic.json").exists():
        raise DataError(
            f"{path} holds no panoptic.json; expected predictions in panopticapi's layout: panoptic.json, and PNGs of "
            "segment ids beside it or in the folder panoptic; or a model's folder."
        )
    if seen is not None:
        select_classes(dataset.classes, seen)
    predictor = folder_predictor(path, dataset)
    result = evaluate_panoptic(
        predictor, dataset, seen, progress=progress,
        settings={"predictions": str(path), "annotations": str(dataset.annotations.path), "classes": dataset.classes},
    )  # fmt: skip
    if out is not None:
        _write(Path(out), "evaluation", result, dataset, predictor)
    return result


def _write(
    out: Path, name: str, result: PanopticEvaluation, dataset: PanopticDataset, predictor: PanopticPredictor
) -> None:
    from infoclip.api import write_files
    from infoclip.report.evaluation_page import panoptic_page

    write_files(out, {f"{name}.html": panoptic_page(name, result, dataset, predictor).encode()})
    result.save(out, name)


def folder_predictor(path: str | Path, dataset: PanopticDataset) -> PanopticPredictor:
    """The maps of a folder in panopticapi's layout: ``panoptic.json`` and the PNGs beside it or in ``panoptic``.

    Args:
        path: the folder, or its JSON file with the PNGs in the folder of the same name (``x.json`` and ``x/``).

    Raises:
        DataError: a missing file, other categories than the data set's, or pictures without a prediction.
    """
    path = Path(path)
    annotations = path / "panoptic.json" if path.is_dir() else path
    folders = [path / "panoptic", path] if path.is_dir() else [path.with_suffix(""), path.parent]
    found = read_annotations(annotations, dataset.annotations.categories)
    by_image = {a.image_id: a for a in found.annotations}
    missing = [a for a in dataset.annotations.annotations if a.image_id not in by_image]
    if missing:
        raise DataError(
            f"{annotations} has no prediction for {len(missing):,} of {len(dataset):,} images "
            f"(first: image {missing[0].image_id!r}); predict them all."
        )

    def predict(index: int, image: Tensor) -> PanopticMap:  # [3, H, W]
        from infoclip.data.files import below, read_segment_ids

        entry = by_image[dataset.annotations.annotations[index].image_id]
        places = [below(folder, entry.png, annotations) for folder in folders]
        place = next((p for p in places if p.exists()), places[0])
        ids = read_segment_ids(place)
        check_segments(ids, entry.segments, str(place))
        return PanopticMap(ids, entry.segments)

    return predict


def _category_map(ids: Tensor, segments: Sequence[Segment], void: int) -> Tensor:  # [H, W] -> [H, W]
    """The class of every pixel of a map, ``void`` where there is no segment."""
    category = {segment.id: segment.category for segment in segments}
    values, places = ids.unique(return_inverse=True)
    return torch.tensor([category.get(value, void) for value in values.tolist()])[places]


def _result(
    tally: _Both,
    dataset: PanopticDataset,
    seen: Sequence[str] | None,
    images: list[ImageRecord],
    throughput: Throughput,
    settings: dict[str, Any],
    environment: dict[str, Any],
) -> PanopticEvaluation:
    quality, labels = tally.quality, tally.labels
    names, things = dataset.classes, set(dataset.things)
    known = None if seen is None else set(seen)
    flags = [None if known is None else name in known for name in names]
    pq, sq, rq = (without_nan(values.tolist()) for values in quality.per_category())
    iou = without_nan(labels.iou().tolist())
    counts = [v.long().tolist() for v in (quality.true_positives, quality.false_positives, quality.false_negatives)]
    rows = [
        PanopticClassResult(name, i in things, flags[i], pq[i], sq[i], rq[i],
                            counts[0][i], counts[1][i], counts[2][i], iou[i])
        for i, name in enumerate(names)
    ]  # fmt: skip
    every = range(len(names))
    groups = {which: [i for i in every if flags[i] is which] for which in (True, False)}
    return PanopticEvaluation(
        overall=quality.compute(),
        things=quality.compute(things),
        stuff=quality.compute([i for i in every if i not in things]),
        seen=quality.compute(groups[True]),
        unseen=quality.compute(groups[False]),
        semantic=labels.compute(list(every)),
        semantic_seen=labels.compute(groups[True]),
        semantic_unseen=labels.compute(groups[False]),
        per_class=rows,
        images=len(images),
        throughput=throughput,
        image_records=images,
        settings=settings,
        environment=environment,
    )
