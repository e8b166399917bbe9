"""The report of an evaluation: figures, every class (sortable without a script), the worst confusions, and examples."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from infoclip.report.html import Markup, Page, chip, figure
from infoclip.report.palette import hex_color, palette

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from infoclip.evaluate.run import Dataset, EvaluationResult

__all__ = ["evaluation_page", "summary_page"]

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
    page.heading("How it was measured")
    t = result.throughput
    if t.images:
        page.paragraph(
            f"{t.images:,} images in {t.seconds:.1f} s by {t.processes} process{'es' * (t.processes > 1)}: "
            f"{result.images_per_second:.2f} images a second. Waiting for reading {t.read_seconds:.1f} s, predicting "
            f"{t.predict_seconds:.1f} s, counting {t.count_seconds:.1f} s, summed over processes."
        )
    if t.images < result.images:
        page.paragraph(f"{result.images - t.images:,} images had been counted by an earlier call.")
    page.details_code("Settings", json.dumps(result.settings, indent=1, ensure_ascii=False))
    page.details_code("Environment", json.dumps(result.environment, indent=1, ensure_ascii=False))
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


def _scores(result: EvaluationResult) -> tuple[list[str], list[list[str]]]:
    flags = [row.seen for row in result.per_class]
    groups = [(f"all {len(flags)} classes", result.overall)]
    if True in flags and False in flags:
        groups += [(f"{flags.count(True)} seen", result.seen), (f"{flags.count(False)} unseen", result.unseen)]
    rows = [[name, *map(_percent, (s.miou, s.miou_legacy, s.fwiou, s.macc, s.pacc))] for name, s in groups]
    if len(groups) > 1:
        rows.append(["harmonic mean", _percent(result.harmonic), "", "", "", ""])
    return ["", "mIoU", "mIoU, legacy", "fwIoU", "mACC", "pACC"], rows


def _class_table(result: EvaluationResult) -> Markup:
    """Rows carry their place in every order; which order holds is a matter of style, chosen by radio buttons."""
    rows = result.per_class
    count = range(len(rows))

    def places(key: Callable[[int], Any]) -> list[int]:
        place = [0] * len(rows)
        for at, i in enumerate(sorted(count, key=key)):
            place[i] = at
        return place

    orders = {
        "lowest IoU": places(lambda i: (rows[i].iou is None, rows[i].iou or 0.0)),
        "highest IoU": places(lambda i: (rows[i].iou is None, -(rows[i].iou or 0.0))),
        "most pixels": places(lambda i: -rows[i].pixels),
        "name": places(lambda i: rows[i].name.casefold()),
        "class number": list(count),
    }
    style = "".join(f"#by{n}:checked ~ .wide .classes tbody tr {{ order: var(--o{n}); }}" for n in range(len(orders)))
    buttons = "".join(
        f'<input type="radio" name="by" id="by{n}"{" checked" * (n == 0)}><label for="by{n}">{name}</label>'
        for n, name in enumerate(orders)
    )
    words = {True: "seen", False: "unseen", None: ""}
    body = []
    for i, row in enumerate(rows):
        at = ";".join(f"--o{n}:{place[i]}" for n, place in enumerate(orders.values()))
        bar = f'<div class="stack"><i style="width:{100 * (row.iou or 0.0):.2f}%"></i></div>'
        name = html.escape(" ".join(row.name.split()))
        body.append(
            f'<tr style="{at}"><td title="{name}">{name}</td><td>{words[row.seen]}</td><td>{bar}</td>'
            f"<td>{_percent(row.iou)}</td><td>{_percent(row.accuracy)}</td><td>{row.pixels:,}</td></tr>"
        )
    head = "".join(f"<th>{name}</th>" for name in ("class", "", "", "IoU", "recall", "pixels"))
    return Markup(
        f'<style>{style}</style><div class="sorts">sorted by {buttons}'
        f'<div class="wide"><table class="classes"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'
        "</div></div>"
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

    records = result.image_records
    spread = [records[i].index for i in np.linspace(0, len(records) - 1, min(_EXAMPLES, len(records))).astype(int)]
    by_accuracy = sorted((r for r in records if r.pixels), key=lambda r: (r.accuracy, r.index))
    hardest = [r.index for r in by_accuracy if r.index not in spread][:_EXAMPLES]
    for heading, indices in (("Examples", spread), ("The hardest images", hardest)):
        if indices:
            page.heading(heading)
        for index in dict.fromkeys(indices):
            sample = dataset[index]
            image = sample["image"].as_subclass(torch.Tensor)
            with torch.no_grad():
                labels = predictor(image).cpu().numpy()
            truth = sample["mask"].as_subclass(torch.Tensor).numpy()
            _example(page, result, str(sample["file"]), image.permute(1, 2, 0).numpy(), truth, labels)


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
        picture.thumbnail((_SIDE, _SIDE))
        figures.append(figure(picture, name, f"{_percent(right)} % right" if name == "labels" else "", small))
    chips = [chip(rows[i].name, int(number[i]), "unseen" if rows[i].seen is False else "") for i in present[:12]]
    shown = [i for i in mistaken if (labels == i).mean() > 0.005][:8]
    chips += [chip(rows[i].name, int(number[i]), "not in the truth", wrong=True) for i in shown]
    page.panel(file.replace("\\", "/").rpartition("/")[2], figures, chips)


def _by_size(labels: NDArray[np.int64]) -> list[int]:
    values, counts = np.unique(labels, return_counts=True)
    return [int(v) for v in values[np.argsort(-counts, kind="stable")]]


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"
