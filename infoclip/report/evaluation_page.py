"""The report of an evaluation, semantic or panoptic: figures, every class (sortable without a script), examples."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from infoclip.report.html import Markup, Page, chip, figure
from infoclip.report.palette import hex_color, palette

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor

    from infoclip.data.panoptic import PanopticDataset, Segment
    from infoclip.evaluate.panoptic_run import PanopticEvaluation, PanopticPredictor
    from infoclip.evaluate.records import ImageRecord
    from infoclip.evaluate.run import Dataset, EvaluationResult

__all__ = ["evaluation_page", "panoptic_page", "summary_page"]

_EXAMPLES = 4
"""Images that are shown of each kind: spread over the data set, and those with the fewest right pixels."""

_SIDE = 480
"""Longest side of the pictures."""


def evaluation_page(
    title: str,
    result: EvaluationResult,
    dataset: Dataset,
    predictor: Callable[[Tensor], Tensor],
) -> str:
    """The report as one HTML file; the example images are predicted once more.

    Args:
        predictor: gives the labels [H, W] of an image, uint8 [3, H, W].
    """
    page = Page(f"{title}: {_percent(result.overall.miou)} % mIoU")
    page.paragraph(
        f"{result.images:,} images, {len(result.per_class):,} classes, "
        f"{sum(row.iou is not None for row in result.per_class):,} of them in the ground truth.",
        "lead",
    )
    page.table(*_scores(result))
    page.paragraph(
        "In percent. mIoU is the mean over the classes present in the ground truth; legacy divides the same sum by the "
        "classes present or predicted, as older evaluators do. A class is seen if one of its names is that of a class "
        "that was trained on.",
        "soft",
    )
    page.heading("Class by class")
    page.markup(_class_table(result))
    page.heading("Where the worst classes went")
    page.paragraph(
        "What the pixels of the classes with the lowest IoU were taken for; the first part is what was right."
    )
    page.markup(_worst(result))
    page.heading("The largest confusions")
    names = [row.name for row in result.per_class]
    page.table(
        ["class", "taken for", "pixels", "% of the class"],
        [
            [names[c.true], names[c.predicted], f"{c.pixels:,}", _percent(c.pixels / result.per_class[c.true].pixels)]
            for c in result.confusions[:20]
        ],
    )
    _examples(page, result, dataset, predictor)
    _how(page, result)
    return page.render()


def summary_page(model: str, results: Mapping[str, EvaluationResult], titles: Mapping[str, str]) -> str:
    """The data sets of one call side by side, with links to their reports."""
    from infoclip.evaluate.run import CONVENTIONS, SUMMARY_HEADER, summary_rows

    page = Page(f"{len(results)} data sets")
    page.paragraph(f"Model: {model}", "lead")
    page.table(SUMMARY_HEADER, summary_rows(results, titles))
    page.paragraph(f"In percent. {CONVENTIONS}.", "soft")
    page.links([(titles[name], f"{name}.html") for name in results])
    return page.render()


def panoptic_page(
    title: str, result: PanopticEvaluation, dataset: PanopticDataset, predictor: PanopticPredictor
) -> str:
    """The report of a panoptic evaluation as one HTML file; the example images are predicted once more."""
    page = Page(f"{title}: {_percent(result.overall.pq)} PQ")
    page.paragraph(
        f"{result.images:,} images, {len(result.per_class):,} classes, {result.overall.categories:,} of them in the "
        "ground truth or the predictions.",
        "lead",
    )
    page.table(["", "PQ", "SQ", "RQ", "mIoU", "occur"], result.summary_rows(_percent))
    page.paragraph(
        "In percent. PQ, SQ and RQ are means over the classes that occur in the ground truth or the prediction, mIoU "
        "over those in the ground truth. PQ is SQ, the mean IoU of the segments that were found, times RQ, the F1 of "
        "finding them. A class is seen if one of its names is that of a class that was trained on.",
        "soft",
    )
    page.heading("Class by class")
    rows = result.per_class
    kinds = {True: "thing", False: "stuff"}
    words = {True: ", seen", False: ", unseen", None: ""}
    page.markup(
        _sortable(
            ("class", "", "", "PQ", "IoU", "found / spurious / missed"),
            [
                _Row(
                    row.name, kinds[row.thing] + words[row.seen], row.pq, _percent(row.pq), _percent(row.iou),
                    f"{row.true_positives} / {row.false_positives} / {row.false_negatives}",
                )
                for row in rows
            ],
            {
                "lowest PQ": lambda i: (rows[i].pq is None, rows[i].pq or 0.0),
                "highest PQ": lambda i: (rows[i].pq is None, -(rows[i].pq or 0.0)),
                "most segments": lambda i: -(rows[i].true_positives + rows[i].false_negatives),
                "name": lambda i: rows[i].name.casefold(),
                "class number": lambda i: i,
            },
        )
    )  # fmt: skip
    for heading, indices in _chosen(result.image_records):
        page.heading(heading)
        for index in indices:
            _panoptic_example(page, result, dataset, predictor, index)
    _how(page, result)
    return page.render()


def _panoptic_example(
    page: Page, result: PanopticEvaluation, dataset: PanopticDataset, predictor: PanopticPredictor, index: int
) -> None:
    import torch
    from PIL import Image

    from infoclip.report.overlay import panoptic_overlay

    sample = dataset[index]
    pixels = sample["image"].as_subclass(torch.Tensor)
    with torch.no_grad():
        found = predictor(index, pixels)
    image = pixels.permute(1, 2, 0).numpy()
    names = [row.name for row in result.per_class]
    maps: list[tuple[str, NDArray[np.integer], Sequence[Segment]]] = [
        ("truth", sample["panoptic"].as_subclass(torch.Tensor).numpy(), sample["segments"]),
        ("segments", found.ids.cpu().numpy(), found.segments),
    ]
    # A class has the same colour in both pictures: numbered afresh, so that those of one image are far apart.
    order = list(dict.fromkeys(s.category for _, _, segments in maps for s in segments))
    number = {category: i for i, category in enumerate(order)}
    here = [names[i] for i in order]
    small = max(image.shape[:2]) < 200
    figures = [figure(_thumbnail(Image.fromarray(image)), "image", "", small)]
    for name, ids, segments in maps:
        drawn = [s._replace(category=number[s.category]) for s in segments]
        picture = panoptic_overlay(image, ids, drawn, here, alpha=0.75, legend=False)
        count = f"{len(segments)} segment{'s' * (len(segments) != 1)}"
        figures.append(figure(_thumbnail(picture), name, count, small))
    present = {s.category for s in maps[0][2]}
    unseen = {i for i, row in enumerate(result.per_class) if row.seen is False}
    chips = [chip(names[i], number[i], "unseen" if i in unseen else "") for i in order if i in present][:12]
    chips += [chip(names[i], number[i], "not in the truth", wrong=True) for i in order if i not in present][:8]
    page.panel(str(sample["file"]).replace("\\", "/").rpartition("/")[2], figures, chips)


def _how(page: Page, result: EvaluationResult | PanopticEvaluation) -> None:
    page.heading("How it was measured")
    t = result.throughput
    if t.images:
        page.paragraph(
            f"{t.images:,} images in {t.seconds:.1f} s by {t.processes} process{'es' * (t.processes > 1)}: "
            f"{t.images_per_second:.2f} images a second. Waiting for reading {t.read_seconds:.1f} s, predicting "
            f"{t.predict_seconds:.1f} s, counting {t.count_seconds:.1f} s, summed over processes."
        )
    if t.images < result.images:
        page.paragraph(f"{result.images - t.images:,} images had been counted by an earlier call.")
    page.details_code("Settings", json.dumps(result.settings, indent=1, ensure_ascii=False))
    page.details_code("Environment", json.dumps(result.environment, indent=1, ensure_ascii=False))


def _scores(result: EvaluationResult) -> tuple[list[str], list[list[str]]]:
    flags = [row.seen for row in result.per_class]
    groups = [(f"all {len(flags)} classes", result.overall)]
    if True in flags and False in flags:
        groups += [(f"{flags.count(True)} seen", result.seen), (f"{flags.count(False)} unseen", result.unseen)]
    rows = [[name, *map(_percent, (s.miou, s.miou_legacy, s.fwiou, s.macc, s.pacc))] for name, s in groups]
    if len(groups) > 1:
        rows.append(["harmonic mean", _percent(result.harmonic), "", "", "", ""])
    return ["", "mIoU", "mIoU, legacy", "fwIoU", "mACC", "pACC"], rows


class _Row(NamedTuple):
    """A line of the table of classes: its name, a word, a share drawn as a bar, and three cells."""

    name: str
    word: str
    share: float | None
    first: str
    second: str
    third: str


def _class_table(result: EvaluationResult) -> Markup:
    rows = result.per_class
    words = {True: "seen", False: "unseen", None: ""}
    return _sortable(
        ("class", "", "", "IoU", "recall", "pixels"),
        [_Row(r.name, words[r.seen], r.iou, _percent(r.iou), _percent(r.accuracy), f"{r.pixels:,}") for r in rows],
        {
            "lowest IoU": lambda i: (rows[i].iou is None, rows[i].iou or 0.0),
            "highest IoU": lambda i: (rows[i].iou is None, -(rows[i].iou or 0.0)),
            "most pixels": lambda i: -rows[i].pixels,
            "name": lambda i: rows[i].name.casefold(),
            "class number": lambda i: i,
        },
    )


def _sortable(head: Sequence[str], rows: Sequence[_Row], orders: Mapping[str, Callable[[int], Any]]) -> Markup:
    """Rows carry their place in every order; which order holds is a matter of style, chosen by radio buttons."""
    places = []
    for key in orders.values():
        place = [0] * len(rows)
        for at, i in enumerate(sorted(range(len(rows)), key=key)):
            place[i] = at
        places.append(place)
    style = "".join(f"#by{n}:checked ~ .wide .classes tbody tr {{ order: var(--o{n}); }}" for n in range(len(orders)))
    buttons = "".join(
        f'<input type="radio" name="by" id="by{n}"{" checked" * (n == 0)}><label for="by{n}">{name}</label>'
        for n, name in enumerate(orders)
    )
    body = []
    for i, row in enumerate(rows):
        where = ";".join(f"--o{n}:{place[i]}" for n, place in enumerate(places))
        bar = f'<div class="stack"><i style="width:{100 * (row.share or 0.0):.2f}%"></i></div>'
        name = html.escape(" ".join(row.name.split()))
        cells = "".join(f"<td>{cell}</td>" for cell in (row.word, bar, row.first, row.second, row.third))
        body.append(f'<tr style="{where}"><td title="{name}">{name}</td>{cells}</tr>')
    titles = "".join(f"<th>{name}</th>" for name in head)
    return Markup(
        f'<style>{style}</style><div class="sorts">sorted by {buttons}'
        f'<div class="wide"><table class="classes"><thead><tr>{titles}</tr></thead><tbody>{"".join(body)}</tbody>'
        "</table></div></div>"
    )


def _worst(result: EvaluationResult) -> Markup:
    rows = []
    for i, found in result.worst.items():
        row = result.per_class[i]
        right = round((row.accuracy or 0.0) * row.pixels)
        parts = [(right, "var(--accent)", "right")]
        parts += [
            (c.pixels, hex_color(palette(c.predicted + 1)[-1]), result.per_class[c.predicted].name) for c in found[:3]
        ]
        bar = "".join(
            f'<i style="width:{100 * n / row.pixels:.2f}%;background:{color}" title="{html.escape(name)}"></i>'
            for n, color, name in parts
        )
        words = ", ".join(f"{name} {100 * n / row.pixels:.0f} %" for n, _, name in parts[1:])
        rows.append(
            f"<tr><td>{html.escape(row.name)}</td><td>{_percent(row.iou)}</td>"
            f'<td><div class="stack">{bar}</div></td><td style="text-align:left;white-space:normal">'
            f"{html.escape(words)}</td></tr>"
        )
    head = "<tr><th>class</th><th>IoU</th><th></th><th style='text-align:left'>taken for</th></tr>"
    return Markup(f'<div class="wide"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>')


def _examples(page: Page, result: EvaluationResult, dataset: Dataset, predictor: Callable[[Tensor], Tensor]) -> None:
    import torch

    for heading, indices in _chosen(result.image_records):
        page.heading(heading)
        for index in indices:
            sample = dataset[index]
            image = sample["image"].as_subclass(torch.Tensor)
            with torch.no_grad():
                labels = predictor(image).cpu().numpy()
            truth = sample["mask"].as_subclass(torch.Tensor).numpy()
            _example(page, result, str(sample["file"]), image.permute(1, 2, 0).numpy(), truth, labels)


def _chosen(records: Sequence[ImageRecord]) -> list[tuple[str, list[int]]]:
    """Heading and indices of the images to show: some spread over the data set, and those with the fewest right."""
    spread = [records[i].index for i in np.linspace(0, len(records) - 1, min(_EXAMPLES, len(records))).astype(int)]
    spread = list(dict.fromkeys(spread))
    by_accuracy = sorted((r for r in records if r.pixels), key=lambda r: (r.accuracy, r.index))
    hardest = [r.index for r in by_accuracy if r.index not in spread][:_EXAMPLES]
    return [(name, found) for name, found in (("Examples", spread), ("The hardest images", hardest)) if found]


def _thumbnail(picture: Image.Image) -> Image.Image:
    picture.thumbnail((_SIDE, _SIDE))
    return picture


def _example(
    page: Page,
    result: EvaluationResult,
    file: str,
    image: NDArray[np.uint8],
    truth: NDArray[np.int64],
    labels: NDArray[np.int64],
) -> None:
    from PIL import Image

    from infoclip.report.overlay import overlay

    rows = result.per_class
    labelled = (truth >= 0) & (truth < len(rows))
    present = _by_size(truth[labelled])
    mistaken = [i for i in _by_size(labels) if i not in set(present)]
    # Few of the classes are in one image: numbered afresh, they get the colours that are farthest apart.
    order = [*present, *mistaken]
    number = np.full(len(rows) + 1, -1, dtype=np.int64)
    number[order] = np.arange(len(order))
    names = [rows[i].name for i in order]
    right = float((labels == truth)[labelled].mean()) if labelled.any() else math.nan
    small = max(image.shape[:2]) < 200
    figures = []
    for name, drawn in (("image", None), ("truth", number[np.where(labelled, truth, -1)]), ("labels", number[labels])):
        picture = Image.fromarray(image) if drawn is None else overlay(image, drawn, names, legend=False, alpha=0.75)
        figures.append(
            figure(_thumbnail(picture), name, f"{_percent(right)} % right" if name == "labels" else "", small)
        )
    chips = [chip(rows[i].name, int(number[i]), "unseen" if rows[i].seen is False else "") for i in present[:12]]
    shown = [i for i in mistaken if (labels == i).mean() > 0.005][:8]
    chips += [chip(rows[i].name, int(number[i]), "not in the truth", wrong=True) for i in shown]
    page.panel(file.replace("\\", "/").rpartition("/")[2], figures, chips)


def _by_size(labels: NDArray[np.int64]) -> list[int]:
    values, counts = np.unique(labels, return_counts=True)
    return [int(v) for v in values[np.argsort(-counts, kind="stable")]]


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"
