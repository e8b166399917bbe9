"""``infoclip data check``: is a data set whole, and can every pair of it be used?"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from infoclip.data.ahead import in_order
from infoclip.data.folders import PairDataset
from infoclip.errors import DataError, StorageError
from infoclip.progress import tracked

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["CheckReport", "check_dataset", "draw_report"]

_SAMPLES = 6
"""Pairs that are drawn."""


@dataclass
class CheckReport:
    """What reading every pair of a dataset showed."""

    title: str
    classes: list[str]
    pixels: NDArray[np.int64]  # [K + 1]
    """Pixels of each class, and last those without a label."""
    images: int = 0
    """Pairs that can be used."""
    faults: list[str] = field(default_factory=list)
    """One sentence for each pair that cannot."""
    seconds: float = 0.0

    @property
    def absent(self) -> list[str]:
        """Classes without a single pixel."""
        return [name for name, count in zip(self.classes, self.pixels, strict=False) if count == 0]


class _Outcome(NamedTuple):
    counts: NDArray[np.int64] | None
    fault: str


def check_dataset(dataset: PairDataset, title: str, *, workers: int = 4, progress: bool = True) -> CheckReport:
    """Read every pair: image and mask can be decoded, have one size, and hold no value that means nothing.

    Args:
        workers: threads that read (decoding runs outside Python's lock).
    """
    classes = len(dataset.classes)
    report = CheckReport(title, dataset.classes, np.zeros(classes + 1, dtype=np.int64))
    start = time.perf_counter()

    def check(index: int) -> _Outcome:
        try:
            mask = dataset[index]["mask"].numpy()
        except DataError as error:
            return _Outcome(None, str(error))
        labels = np.where(mask == dataset.ignore_index, classes, mask)
        return _Outcome(np.bincount(labels.ravel(), minlength=classes + 1), "")

    outcomes = in_order(check, range(len(dataset)), workers, ahead=4 * workers)
    for counts, fault in tracked(outcomes, f"checking {title}", progress, total=len(dataset)):
        if counts is None:
            report.faults.append(fault)
        else:
            report.images += 1
            report.pixels += counts
    report.seconds = time.perf_counter() - start
    return report


def draw_report(report: CheckReport, dataset: PairDataset, path: Path) -> None:
    """A picture of some pairs under their labels and of how often each class occurs.

    Raises:
        StorageError: the picture cannot be written.
    """
    from matplotlib.figure import Figure

    from infoclip.report.overlay import overlay, panoptic_overlay
    from infoclip.report.palette import hex_color, palette

    figure = Figure(figsize=(15, 9), layout="constrained")
    figure.suptitle(
        f"{report.title}: {report.images:,} pairs can be used, {len(report.faults):,} cannot; "
        f"{len(report.classes) - len(report.absent)} of {len(report.classes)} classes occur"
    )
    grid = figure.add_gridspec(2, 1, height_ratios=[2, 1])
    above, below = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    axes = above.subplots(2, _SAMPLES // 2).ravel()
    for axis in axes:
        axis.axis("off")
    shown = iter(axes)
    for index in np.linspace(0, len(dataset) - 1, min(4 * _SAMPLES, len(dataset))).astype(int):
        try:
            sample = dataset[int(index)]
        except DataError:
            continue
        axis = next(shown, None)
        if axis is None:
            break
        image = sample["image"].permute(1, 2, 0).numpy()
        picture: Image.Image
        if "panoptic" in sample:
            ids = sample["panoptic"].numpy()
            picture = panoptic_overlay(image, ids, sample["segments"], dataset.classes, legend=True)
        else:
            picture = overlay(image, sample["mask"].numpy(), dataset.classes, legend=False)
        picture.thumbnail((640, 640))
        axis.imshow(picture)
        axis.set_title(_plain(Path(sample["file"]).name), fontsize=8)
    order = np.argsort(-report.pixels[:-1])[:40]
    share = report.pixels[order] / max(1, int(report.pixels.sum()))
    axis = below.subplots()
    colors = [hex_color(palette(int(i) + 1)[-1]) for i in order]
    axis.bar(range(len(order)), 100 * share, color=colors)
    axis.set_xticks(range(len(order)), [_plain(report.classes[i]) for i in order], rotation=60, ha="right", fontsize=7)
    axis.set_ylabel("% of pixels")
    axis.set_title(f"the {len(order)} most frequent classes", fontsize=9)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=90)
    except OSError as error:
        raise StorageError(f"Cannot write {path}: {error.strerror or error}.") from error


def _plain(name: str) -> str:
    """A name as one short line; ``$`` would start a formula."""
    line = " ".join(name.split()).replace("$", r"\$")
    return line if len(line) <= 28 else line[:27] + "…"
