"""One evaluation: a predictor over a dataset, with a table a class and the seen and unseen classes apart.

Counts are whole numbers, so that an evaluation that was stopped and goes on, or that several processes share, ends in
the same metrics bit for bit (given the same labels: that holds for the same device and number of threads).
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from infoclip import __version__
from infoclip.data.ahead import in_order
from infoclip.errors import ConfigError, DataError, InfoclipWarning
from infoclip.evaluate.metrics import Confusion, PairCounts, Scores, SegmentationMetrics, harmonic_mean
from infoclip.evaluate.records import ImageRecord, Records
from infoclip.progress import tracked
from infoclip.workers import Workers, joined, run_in_processes

if TYPE_CHECKING:
    from rich.table import Table

    from infoclip.clip import DenseCLIP
    from infoclip.config import EvalConfig
    from infoclip.data.folders import PairDataset
    from infoclip.model.inference import Serving
    from infoclip.model.maftplus import MaskSegmentor
    from infoclip.model.segmentor import Segmentor

__all__ = [
    "SIX",
    "ClassResult",
    "Dataset",
    "EvaluationResult",
    "Predictor",
    "Tally",
    "Throughput",
    "count_images",
    "evaluate_benchmark",
    "evaluate_benchmarks",
    "evaluate_folder",
    "evaluate_model",
    "listed",
    "model_digest",
    "percent",
    "segmentor_predictor",
    "summary_rows",
    "summary_table",
    "without_nan",
    "zero_shot_predictor",
]

Predictor = Callable[[Tensor], Tensor]
"""From an image, uint8 [3, H, W] RGB, to its labels, integer [H, W]."""


SIX = ("a847", "pc459", "a150", "pc59", "pas20", "pas20b")
"""The benchmarks of the papers' tables, in their order."""

_WORST = 20
"""Classes whose mistakes are listed."""


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
class Throughput:
    """How fast one call went: what an earlier one had done is left out."""

    images: int
    seconds: float
    """From the first image to the last, of the slowest process."""
    read_seconds: float
    """Waited for reading, which runs ahead of prediction; this and the next two summed over processes."""
    predict_seconds: float
    count_seconds: float
    processes: int = 1

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.images and self.seconds > 0 else math.nan


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics in 0..1 over all classes, over those of the training list and over the others; NaN where unmeasured."""

    overall: Scores
    seen: Scores
    unseen: Scores
    per_class: list[ClassResult]
    images: int
    throughput: Throughput
    confusions: list[Confusion] = field(default_factory=list)
    """The pairs of classes that were confused most, by pixels."""
    worst: dict[int, list[Confusion]] = field(default_factory=dict)
    """The classes with the lowest IoU, and what most of their pixels were predicted as."""
    image_records: list[ImageRecord] = field(default_factory=list, repr=False)
    settings: dict[str, Any] = field(default_factory=dict)
    """What the result depends on beside the model: folders, prompt templates, test-time settings."""
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def harmonic(self) -> float:
        """Harmonic mean of the mIoU on seen and on unseen classes."""
        return harmonic_mean(self.seen.miou, self.unseen.miou)

    @property
    def images_per_second(self) -> float:
        """Of this call, reading included; NaN if an earlier one had done everything."""
        return self.throughput.images_per_second

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what could not be measured is None. All but ``run`` is the same for every run."""
        data = {
            "overall": asdict(self.overall),
            "seen": asdict(self.seen),
            "unseen": asdict(self.unseen),
            "harmonic": self.harmonic,
            "images": self.images,
            "settings": self.settings,
            "per_class": [asdict(row) for row in self.per_class],
            "confusions": [self._named(c) for c in self.confusions],
            "worst_classes": {
                self.per_class[i].name: [self._named(c) for c in found] for i, found in self.worst.items()
            },
            "run": {
                "throughput": {**asdict(self.throughput), "images_per_second": self.images_per_second},
                "environment": self.environment,
            },
        }
        return without_nan(data)

    def _named(self, confusion: Confusion) -> dict[str, Any]:
        true, predicted = self.per_class[confusion.true], self.per_class[confusion.predicted]
        return {"class": true.name, "predicted": predicted.name, "pixels": confusion.pixels,
                "share": confusion.pixels / true.pixels}  # fmt: skip

    def save(self, folder: str | Path, name: str) -> Path:
        """Write :meth:`to_dict` as ``NAME.json``, whole or not at all.

        Raises:
            StorageError: the file cannot be written.
        """
        from infoclip.api import write_files

        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        return write_files(Path(folder), {f"{name}.json": text.encode()})[0]

    def summary_table(self) -> Table:
        """The metrics for the terminal, in percent."""
        from rich.table import Table

        speed = self.images_per_second
        done = "" if math.isnan(speed) else f", {speed:.2f} images/s"
        table = Table(title=f"{self.images} images{done}", title_justify="left")
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
            table.add_row(name, *(percent(v) for v in (s.miou, s.miou_legacy, s.fwiou, s.macc, s.pacc)))
        if len(rows) > 1:
            table.add_row("harmonic mean", percent(self.harmonic))
        table.caption = CONVENTIONS
        table.caption_justify = "left"
        return table

    def class_table(self) -> Table:
        """One row a class for the terminal, in percent."""
        from rich.markup import escape
        from rich.table import Table

        table = Table()
        table.add_column("class", overflow="fold")
        for name in ("", "IoU", "recall", "pixels"):
            table.add_column(name, justify="right")
        names = {True: "seen", False: "unseen", None: ""}
        for row in self.per_class:
            table.add_row(escape(row.name), names[row.seen], percent(row.iou), percent(row.accuracy), f"{row.pixels:,}")
        return table


def segmentor_predictor(
    segmentor: Segmentor | MaskSegmentor,
    classes: Sequence[str],
    config: EvalConfig,
    trained: Sequence[str] = (),
    serving: Serving | None = None,
) -> Predictor:
    """Labels from a trained segmentor; the class embeddings are computed once, here.

    Args:
        trained: class names that a model of mask proposals was trained on, for FC-CLIP's ensemble.
        serving: of cost aggregation: precision, and what goes through the model at once.

    Raises:
        DataError: a class list that cannot be used.
    """
    from infoclip.model.maftplus import MaskSegmentor

    if isinstance(segmentor, MaskSegmentor):
        from infoclip.model.maftplus.inference import predict_masks

        masks, vocabulary = segmentor, segmentor.vocabulary(classes)

        def of_masks(image: Tensor) -> Tensor:  # [3, H, W] -> [H, W]
            return predict_masks(masks, image, vocabulary, config, trained).labels()[1]

        return of_masks
    from infoclip.model.inference import FULL, predict_labels

    cost, way = segmentor, serving or FULL
    with torch.no_grad():
        text = cost.clip.text_features(list(classes))

    def predict(image: Tensor) -> Tensor:  # [3, H, W] -> [H, W]
        return predict_labels(cost, image, text, config, way)[1]

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
    environment: dict[str, Any] | None = None,
    neither: Sequence[str] = (),
    records: Records | None = None,
    workers: Workers | None = None,
) -> EvaluationResult:
    """Run a predictor over every image and count; the next image is read meanwhile.

    Args:
        predictor: see :data:`Predictor`; it must know all of ``classes``.
        dataset: samples whose masks index ``classes``.
        seen: the classes that were trained on; the rest is unseen. None if that is not known.
        on_prediction: called with each index, sample and predicted labels [H, W].
        neither: classes that count as neither seen nor unseen.
        records: where counts are kept; images that are recorded there are not predicted again.
        workers: the processes that share the images; each calls this with the same arguments and gets the whole result.

    Raises:
        DataError: an empty dataset, or files that cannot be used.
        StorageError: the records cannot be written.
    """
    counter = SegmentationMetrics(len(classes), ignore_index)

    def count(index: int, sample: dict[str, Any]) -> tuple[ImageRecord, float]:
        start = time.perf_counter()
        labels = predictor(sample["image"].as_subclass(Tensor))
        labels = labels.cpu()  # waits for the GPU, so that the next figure is of counting alone
        seconds = time.perf_counter() - start
        mask = sample["mask"].as_subclass(Tensor)
        labelled, right = int((mask != ignore_index).sum()), int((labels == mask).sum())
        pairs = counter.count(labels, mask)
        if on_prediction is not None:
            on_prediction(index, sample, labels)
        return ImageRecord(index, Path(str(sample["file"])).name, labelled, right, pairs), seconds

    tally, images, throughput = count_images(
        dataset, count, lambda: _Labels(len(classes), ignore_index), records=records, workers=workers or Workers(),
        description=description, progress=progress,
    )  # fmt: skip
    return _result(tally.metrics, classes, seen, neither, images, throughput, settings or {}, environment or {})


class Tally(Protocol):
    """Sums of what was counted of each image."""

    def add(self, record: ImageRecord) -> None:
        """Add an image's counts."""

    def state(self) -> Any:
        """All sums, to be pickled."""

    def merge(self, state: Any) -> None:
        """Add another process's :meth:`state`."""


TallyT = TypeVar("TallyT", bound=Tally)


class _Labels:
    """The confusion matrix."""

    def __init__(self, classes: int, ignore_index: int) -> None:
        self.metrics = SegmentationMetrics(classes, ignore_index)

    def add(self, record: ImageRecord) -> None:
        assert record.pairs is not None
        self.metrics.add(record.pairs)

    def state(self) -> PairCounts:
        return self.metrics.pairs()

    def merge(self, state: PairCounts) -> None:
        self.metrics.add(state)


def count_images(
    dataset: Dataset,
    count: Callable[[int, dict[str, Any]], tuple[ImageRecord, float]],
    empty: Callable[[], TallyT],
    *,
    records: Records | None,
    workers: Workers,
    description: str,
    progress: bool,
) -> tuple[TallyT, list[ImageRecord], Throughput]:
    """Predict and count every image that no record holds yet; the next image is read meanwhile.

    Args:
        count: from an index and its sample to what was counted, and the seconds of the prediction.
        empty: makes a tally without counts.
        records: where counts are kept; images that are recorded there are not predicted again.
        workers: the processes that share the images; each calls this with the same arguments and gets the whole result.

    Raises:
        DataError: an empty dataset, or files that cannot be used.
        StorageError: the records cannot be written.
    """
    total = len(dataset)
    if not total:
        raise DataError("There is no image to evaluate; expected at least one.")
    tally = empty()
    images: list[ImageRecord] = []
    if records is not None and workers.first:
        images, differs = records.collect(tally.add)
        if differs:
            warnings.warn(
                f"The earlier evaluation in {records.path} was of another kind ({differs}); it is started over.",
                InfoclipWarning,
                stacklevel=3,
            )
    done = workers.broadcast({record.index for record in images})
    if records is not None:
        records.open(workers.rank)
    mine = [i for i in range(total) if i not in done][workers.rank :: workers.count]
    read = predicted = counted = 0.0
    whole = time.perf_counter()
    try:
        with torch.no_grad():
            for index, sample, waited in tracked(
                _samples(dataset, mine), description, progress and bool(mine), total=len(mine)
            ):
                start = time.perf_counter()
                record, seconds = count(index, sample)
                tally.add(record)
                rest = time.perf_counter() - start - seconds
                if records is not None:
                    records.append(record, (waited, seconds, rest))
                images.append(replace(record, pairs=None, segments=None))
                read, predicted, counted = read + waited, predicted + seconds, counted + rest
    finally:
        if records is not None:
            records.close()
    times = (len(mine), time.perf_counter() - whole, read, predicted, counted)
    parts = workers.gather((tally.state(), images, times))
    if workers.count > 1:
        tally, images = empty(), []
        for state, part, _ in parts:
            tally.merge(state)
            images += part
    if records is not None and workers.first:
        records.collect(lambda _: None)  # into one file
    sums = [sum(column) for column in zip(*(t for _, _, t in parts), strict=True)]
    throughput = Throughput(int(sums[0]), max(t[1] for _, _, t in parts), sums[2], sums[3], sums[4], workers.count)
    return tally, sorted(images, key=lambda record: record.index), throughput


def _samples(dataset: Dataset, indices: Sequence[int]) -> Iterator[tuple[int, dict[str, Any], float]]:
    """Each sample with its index and the seconds that it was waited for."""

    def read(index: int) -> tuple[int, dict[str, Any]]:
        return index, dataset[index]

    samples = in_order(read, indices, threads=1, ahead=2)
    while True:
        start = time.perf_counter()
        try:
            index, sample = next(samples)
        except StopIteration:
            return
        yield index, sample, time.perf_counter() - start


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
    processes: int = 1,
    progress: bool = True,
    precision: str = "fp32",
    memory: str = "",
) -> EvaluationResult:
    """Evaluate a trained model on a folder of images and a folder of masks.

    Args:
        model: a run or model directory.
        classes: names, a shipped list (``ade20k_150``) or a file. With ``voc_20b`` every prediction from class 20 on is
            the background (CAT-Seg, section 4.1).
        label_map: shipped list or JSON file that maps annotation values to class indices; without it a mask's value is
            the index. Values that the map does not name carry no label.
        seen: names that count as seen; by default those of the model's training list
            (:func:`infoclip.data.classes.overlap`).
        overrides: ``key=value`` for the model's config, such as ``eval.sliding_window=false``.
        out: folder for ``evaluation.json``, the report ``evaluation.html`` and ``evaluation.images.jsonl``, from which
            the same call goes on where it was stopped.
        processes: so many share the images; within ``torchrun`` its processes do.
        precision, memory: as :func:`infoclip.api.load`'s; processes share the budget in equal parts.

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
    if processes > 1:
        return run_in_processes(
            processes, evaluate_folder, model, images, masks, classes, label_map=label_map, ignore_index=ignore_index,
            seen=seen, overrides=overrides, device=device, out=out, progress=progress, precision=precision,
            memory=memory,
        )  # fmt: skip
    where = {"images": str(images), "masks": str(masks)}
    chosen = _Set("evaluation", Path(images).name, dataset, str(classes) == "voc_20b", where)
    return _evaluate(model, [chosen], seen, overrides, device, out, progress, precision, memory)[chosen.name]


def evaluate_benchmark(model: str | Path, name: str, root: str | Path, **options: Any) -> EvaluationResult:
    """:func:`evaluate_benchmarks` on one data set."""
    return evaluate_benchmarks(model, [name], root, **options)[name]


def evaluate_benchmarks(
    model: str | Path,
    names: Sequence[str],
    root: str | Path,
    *,
    seen: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    out: str | Path | None = None,
    processes: int = 1,
    progress: bool = True,
    precision: str = "fp32",
    memory: str = "",
) -> dict[str, EvaluationResult]:
    """Evaluate a trained model on data sets of the papers, in the folders that they were downloaded to or converted in.

    Every data set is looked for before the first image is predicted.

    Args:
        model: a run or model directory, or a published checkpoint.
        names: of ``a150``, ``a847``, ``pc59``, ``pc459``, ``pas20``, ``pas20b``, ``coco-val``, ``coco-train``;
            :data:`SIX` are those of the papers. On ``pas20b`` every prediction from class 20 on is the background
            (CAT-Seg, section 4.1), which counts as neither seen nor unseen.
        root: the folder above the data sets' own, or that folder itself.
        out: folder for ``NAME.json``, ``NAME.html`` and ``NAME.images.jsonl`` of each, from which the same call goes on
            where it was stopped; for several also ``summary.json`` and ``summary.html``.
        seen, overrides, device, processes, progress, precision, memory: as :func:`evaluate_folder`'s.

    Raises:
        CheckpointError, ConfigError, DataError, StorageError: see the classes.
    """
    from infoclip.api import check_path
    from infoclip.data.benchmarks import get_benchmark, open_benchmark

    if not names or len(set(names)) != len(names):
        raise ConfigError(f"The data sets are '{','.join(names)}'; expected one or more different names.")
    for name in names:
        get_benchmark(name)
    check_path(model)
    sets, faults = [], []
    for name in names:
        try:
            dataset = open_benchmark(name, root, progress=progress)
        except DataError as error:
            faults.append(str(error))
            continue
        where = {"benchmark": name, "root": str(root), "masks": str(dataset.pairs[0][1].parent)}
        sets.append(_Set(name, get_benchmark(name).title, dataset, name == "pas20b", where))
    if faults:
        rest = f" (and {len(faults) - 1} more of the {len(names)} data sets have faults)" if len(faults) > 1 else ""
        raise DataError(faults[0].rstrip(".") + rest + ".")
    if processes > 1:
        return run_in_processes(
            processes, evaluate_benchmarks, model, names, root, seen=seen, overrides=overrides, device=device, out=out,
            progress=progress, precision=precision, memory=memory,
        )  # fmt: skip
    return _evaluate(model, sets, seen, overrides, device, out, progress, precision, memory)


@dataclass(frozen=True)
class _Set:
    """One data set to evaluate on."""

    name: str
    """Of the files."""
    title: str
    dataset: PairDataset
    background: bool
    """Whether every class from 20 on is the background, class 20."""
    where: dict[str, str]


def _evaluate(
    model: str | Path,
    sets: Sequence[_Set],
    seen: Sequence[str] | None,
    overrides: Sequence[str],
    device: str,
    out: str | Path | None,
    progress: bool,
    precision: str,
    memory: str,
) -> dict[str, EvaluationResult]:
    """Predict, count and report; the model is loaded once."""
    from infoclip.api import load, write_files
    from infoclip.config import apply_overrides
    from infoclip.data.classes import overlap
    from infoclip.engine.environment import collect_environment
    from infoclip.report.evaluation_page import evaluation_page, summary_page

    results: dict[str, EvaluationResult] = {}
    folder = None if out is None else Path(out)
    with joined() as workers:
        loaded = load(model, workers.device(device), precision=precision, memory=memory, share=workers.count)
        config = apply_overrides(loaded.config, list(overrides)).eval
        environment = collect_environment()
        weights = model_digest(loaded.segmentor) if folder is not None and workers.first else ""
        trained = loaded.classes if seen is None else list(seen)
        for chosen in sets:
            names = chosen.dataset.classes
            plan = loaded.plan(names, config)
            if plan is not None and progress and workers.first:
                print(plan, file=sys.stderr)
            way = loaded.serving(names, config)
            predict = segmentor_predictor(loaded.segmentor, names, config, loaded.classes, way)
            if chosen.background:
                predict = _with_background(predict)
            shown = [*names[:20], "background"] if chosen.background else list(names)
            settings: dict[str, Any] = {"model": str(model), **chosen.where, "classes": names}
            settings |= {"templates": list(loaded.segmentor.clip.templates), "eval": asdict(config)}
            settings["precision"] = precision
            records = None
            if folder is not None:
                key = {
                    "infoclip": __version__,
                    "weights": workers.broadcast(weights),
                    "data": listed(chosen.dataset),
                    "classes": hashlib.sha256(json.dumps([names, shown, loaded.classes]).encode()).hexdigest(),
                    **{name: settings[name] for name in ("templates", "eval", "precision")},
                }
                records = Records(folder, chosen.name, key, len(chosen.dataset), len(shown))
            share = "" if workers.count == 1 else f" (process 1 of {workers.count})"
            result = evaluate_model(
                predict,
                chosen.dataset,
                shown,
                [name for name, known in zip(shown, overlap(shown, trained), strict=True) if known],
                ignore_index=chosen.dataset.ignore_index,
                progress=progress and workers.first,
                description=f"evaluating {chosen.title}{share}",
                settings=settings,
                environment=environment,
                neither=["background"] if chosen.background else [],
                records=records,
                workers=workers,
            )
            results[chosen.name] = result
            if folder is not None and workers.first:
                page = evaluation_page(chosen.title, result, chosen.dataset, predict)
                write_files(folder, {f"{chosen.name}.html": page.encode()})
                result.save(folder, chosen.name)
        if folder is not None and workers.first and len(sets) > 1:
            summary = {
                name: {**asdict(r.overall), "seen": asdict(r.seen), "unseen": asdict(r.unseen)}
                | {"harmonic": r.harmonic, "images": r.images}
                for name, r in results.items()
            }
            text = json.dumps(without_nan(summary), indent=2) + "\n"
            titles = {chosen.name: chosen.title for chosen in sets}
            write_files(
                folder,
                {"summary.html": summary_page(str(model), results, titles).encode(), "summary.json": text.encode()},
            )
    return results


def _with_background(every: Predictor) -> Predictor:
    """Labels of which every class from 20 on is the background, class 20."""

    def predict(image: Tensor) -> Tensor:  # [3, H, W] -> [H, W]
        return every(image).clamp(max=20)

    return predict


def model_digest(module: torch.nn.Module) -> str:
    """Of all weights and buffers: records of one model are not those of another."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def listed(dataset: PairDataset) -> str:
    """Of the pairs' names and the masks' sizes on disk."""
    digest = hashlib.sha256()
    for image, mask in dataset.pairs:
        size = mask.stat().st_size if mask.exists() else -1
        digest.update(f"{image.name}\0{mask.name}\0{size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _result(
    metrics: SegmentationMetrics,
    classes: Sequence[str],
    seen: Sequence[str] | None,
    neither: Sequence[str],
    images: list[ImageRecord],
    throughput: Throughput,
    settings: dict[str, Any],
    environment: dict[str, Any],
) -> EvaluationResult:
    known = None if seen is None else set(seen)
    flags = [None if known is None or name in neither else name in known for name in classes]
    iou, accuracy = metrics.iou().tolist(), metrics.accuracy().tolist()
    true, predicted = metrics.target_pixels.tolist(), metrics.predicted_pixels.tolist()
    rows = [
        ClassResult(name, flags[i], _or_none(iou[i]), _or_none(accuracy[i]), true[i], predicted[i])
        for i, name in enumerate(classes)
    ]
    present = [i for i, row in enumerate(rows) if row.iou is not None]
    worst = sorted(present, key=lambda i: (rows[i].iou, -rows[i].pixels, i))[:_WORST]
    return EvaluationResult(
        overall=metrics.compute(),
        seen=metrics.compute([i for i, flag in enumerate(flags) if flag is True]),
        unseen=metrics.compute([i for i, flag in enumerate(flags) if flag is False]),
        per_class=rows,
        images=len(images),
        throughput=throughput,
        confusions=metrics.confusions(100),
        worst={i: metrics.confusions(5, true=i) for i in worst},
        image_records=images,
        settings=settings,
        environment=environment,
    )


def summary_rows(results: Mapping[str, EvaluationResult], titles: Mapping[str, str]) -> list[list[str]]:
    """One row a data set: title, images, mIoU, mIoU (legacy), fwIoU, mACC, pACC, mIoU seen and unseen, images/s."""
    rows = []
    for name, r in results.items():
        o = r.overall
        figures = [percent(v) for v in (o.miou, o.miou_legacy, o.fwiou, o.macc, o.pacc, r.seen.miou, r.unseen.miou)]
        speed = "-" if math.isnan(r.images_per_second) else f"{r.images_per_second:.2f}"
        rows.append([titles[name], f"{r.images:,}", *figures, speed])
    return rows


SUMMARY_HEADER = ("data set", "images", "mIoU", "legacy", "fwIoU", "mACC", "pACC", "seen", "unseen", "images/s")
"""Names of :func:`summary_rows`'s columns."""


def summary_table(results: Mapping[str, EvaluationResult], titles: Mapping[str, str]) -> Table:
    """Several data sets for the terminal, in percent."""
    from rich import box
    from rich.table import Table

    table = Table(caption=CONVENTIONS, caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(SUMMARY_HEADER):  # 80 columns hold it
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in summary_rows(results, titles):
        table.add_row(*row)
    return table


CONVENTIONS = "mIoU: mean over classes present in the ground truth; legacy: divided by those also predicted"


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def without_nan(value: Any) -> Any:
    """The value with every NaN in its dicts and lists as None, since JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return _or_none(value) if isinstance(value, float) else value


def percent(value: float | None) -> str:
    """A value in 0..1 for a table; a dash for what could not be measured."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"
