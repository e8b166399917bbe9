"""The demo's report: table, curves, pictures of every method, alignment maps, and how to repeat it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from infoclip.report.html import Page

__all__ = ["demo_page", "table_header", "table_rows", "verdict"]

_PANELS = 6
_MAPS = 3

_COLUMNS = (("seen", "seen"), ("unseen", "unseen"), ("harmonic", "harmonic"))


def table_rows(results: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, bool]]]]:
    """Method names and their cells, with the best mIoU figures marked."""
    methods = results["methods"].values()
    several = len(results["seeds"]) > 1
    rows = []
    for method in methods:
        cells = []
        for key, _ in _COLUMNS:
            best = max((m["mean"][key] for m in methods if not math.isnan(m["mean"][key])), default=math.inf)
            cells.append((_figure(method, key, 1, several), method["mean"][key] >= best))
        trained = method["recipe"] is not None
        cells.append((_figure(method, "train_seconds", 0, several) if trained else "-", False))
        cells.append((_figure(method, "peak_memory_mib", 0, False), False))
        rows.append((method["name"], cells))
    return rows


def _figure(method: Mapping[str, Any], key: str, digits: int, several: bool) -> str:
    value = f"{method['mean'][key]:.{digits}f}"
    return f"{value} ± {method['std'][key]:.{digits}f}" if several else value


def table_header() -> list[str]:
    """Names of the columns: that of the method, then those of :func:`table_rows`."""
    return ["method", *(name for _, name in _COLUMNS), "train s", "peak MiB"]


def verdict(results: Mapping[str, Any]) -> str:
    """One sentence on what was seen, whichever way it went."""
    gains = results["gain_of_infoclip_over_finetune"]
    unseen, seen = (sum(g[name] for g in gains) / len(gains) for name in ("unseen", "seen"))
    better = sum(g["unseen"] > 0 for g in gains)
    count = f" (better in {better} of {len(gains)} seeds)" if len(gains) > 1 else ""
    sentence = (
        f"Against plain fine-tuning, InfoCLIP's objective changes the mIoU on unseen classes by {unseen:+.1f} points"
        f"{count} and on seen classes by {seen:+.1f}."
    )
    return sentence.replace("by -", "by \N{MINUS SIGN}")


def demo_page(results: Mapping[str, Any], folder: Path, truth: Path, try_it: str) -> str:
    """The report as one HTML file.

    Args:
        results: what ``results.json`` holds.
        folder: the runs of the first seed, ``METHOD/`` with logs and models, and ``METHOD.npz`` with the predictions.
        truth: the evaluation scenes.
        try_it: the command that predicts on one's own picture.
    """
    from infoclip.report.html import Cell, Page

    page = Page("InfoCLIP on generated scenes")
    page.paragraph(verdict(results), "lead")
    seeds = results["seeds"]
    page.paragraph(
        f"Four methods, one tiny CLIP. Each learns on {len(results['seen_classes'])} seen classes and is tested on "
        f"{results['methods']['infoclip']['runs'][0]['evaluation']['images']} other scenes with all "
        f"{len(results['seen_classes']) + len(results['unseen_classes'])} classes as candidates "
        f"({results['split']} split, "
        + (f"seeds {', '.join(map(str, seeds))}: mean ± standard deviation" if len(seeds) > 1 else f"seed {seeds[0]}")
        + ")."
    )
    page.table(table_header(), [[name, *(Cell(*cell) for cell in cells)] for name, cells in table_rows(results)])
    page.paragraph(
        "mIoU in percent, over the classes present in the ground truth. Harmonic mean of seen and unseen. Peak memory "
        "is that of the method's own process, with Python and its libraries.",
        "soft",
    )
    _charts(page, results, folder)
    _panels(page, results, folder, truth)
    _maps(page, results, folder, truth)
    _classes(page, results)
    page.heading("How to repeat it")
    page.code(f"infoclip demo --split {results['split']} --seeds {','.join(map(str, seeds))}\n{try_it}")
    page.details_code("Settings of InfoCLIP", json.dumps(results["methods"]["infoclip"]["config"], indent=1))
    page.details_code("Environment", json.dumps(results["environment"], indent=1))
    return page.render()


def _charts(page: Page, results: Mapping[str, Any], folder: Path) -> None:
    from infoclip.engine.log import read_log
    from infoclip.report.curves import SERIES_COLORS, Series, bar_chart, line_chart
    from infoclip.report.html import Markup

    methods = results["methods"]
    keys = [key for key, _ in _COLUMNS]
    bars = [(m["name"], [m["mean"][k] for k in keys], [m["std"][k] for k in keys]) for m in methods.values()]
    cards = [("Quality", Markup(bar_chart(["seen", "unseen", "harmonic mean"], bars, y_label="mIoU, %")),
              "Bars: standard deviation over seeds." if len(results["seeds"]) > 1 else "One seed.")]  # fmt: skip
    color = dict(zip(methods, SERIES_COLORS, strict=False))
    logs = {key: read_log(folder / key / "log.jsonl") for key in methods if methods[key]["recipe"]}
    task = [
        Series(methods[key]["name"], [line["step"] for line in log],
               [line["losses"].get("segmentation") or math.nan for line in log], color[key])
        for key, log in logs.items()
    ]  # fmt: skip
    cards.append(("Segmentation loss", Markup(line_chart(task, x_label="step", y_label="loss", log_y=True)),
                  f"Seed {results['seeds'][0]}, means between logging steps."))  # fmt: skip
    lines = logs["infoclip"]
    names = list(
        dict.fromkeys(name for line in lines for name in line["losses"] if name not in ("segmentation", "bound"))
    )
    for name in names:
        points = [(line["step"], line["losses"].get(name)) for line in lines]
        kept = [(step, value) for step, value in points if value is not None]
        series = Series(name, [s for s, _ in kept], [v for _, v in kept], color["infoclip"])
        cards.append((f"Alignment term: {name}",
                      Markup(line_chart([series], x_label="step", y_label=name)),
                      "InfoCLIP only, before its weight."))  # fmt: skip
    page.heading("Curves")
    page.cards(cards)


def _panels(page: Page, results: Mapping[str, Any], folder: Path, truth: Path) -> None:
    import numpy as np

    from infoclip.data.scenes import SCENE_CLASSES
    from infoclip.report.html import chip, figure
    from infoclip.report.overlay import overlay

    methods = results["methods"]
    predictions = {key: np.load(folder / f"{key}.npz")["labels"] for key in methods}
    unseen = set(results["unseen_classes"])
    page.heading("Pictures")
    page.paragraph(
        "The first test scenes that hold both seen and unseen objects, in the colours of the legend beneath each; "
        "below each prediction stands the share of its pixels that are right."
    )
    for index in _examples(truth, unseen, _PANELS):
        image, mask = _sample(truth, index)
        labels = {key: predictions[key][index] for key in methods}
        present = [int(i) for i in np.unique(mask)]
        largest = np.max([np.bincount(x.flatten(), minlength=len(SCENE_CLASSES)) for x in labels.values()], axis=0)
        mistaken = [int(i) for i in np.argsort(-largest) if int(i) not in present and largest[i] > 0]
        # Few classes of the 52 are in one scene: numbered afresh, they get the colours that are farthest apart.
        order = present + mistaken
        number = np.zeros(len(SCENE_CLASSES), dtype=np.int64)
        number[order] = np.arange(len(order))
        names = [SCENE_CLASSES[i] for i in order]
        figures = [figure(image, "image")]
        for name, drawn in [("truth", mask), *((methods[key]["name"], labels[key]) for key in methods)]:
            note = "" if name == "truth" else f"{100 * float((drawn == mask).mean()):.0f} % right"
            picture = overlay(image, number[drawn], names, legend=False, alpha=0.8)
            figures.append(figure(picture, name, note))
        chips = [
            chip(SCENE_CLASSES[i], int(number[i]), "unseen" if SCENE_CLASSES[i] in unseen else "") for i in present
        ]
        shown = [i for i in mistaken if largest[i] > 0.005 * mask.size][:8]
        chips += [chip(SCENE_CLASSES[i], int(number[i]), "not in the scene", wrong=True) for i in shown]
        page.panel("", figures, chips)


def _maps(page: Page, results: Mapping[str, Any], folder: Path, truth: Path) -> None:
    """Alignment maps of teacher and students for a few classes."""
    import numpy as np

    from infoclip.data.scenes import SCENE_CLASSES
    from infoclip.report.html import figure

    maps = _alignment_maps(folder, truth, _examples(truth, set(results["unseen_classes"]), _MAPS))
    page.heading("Alignment maps")
    page.paragraph(
        "How strongly each patch and a class's text are aligned (R of the paper): in the frozen teacher, whose map the "
        "objective hands on, and in the two fine-tuned students, seen through the same alignment module. Each map runs "
        "from its own smallest to its own largest value; three classes of each scene."
    )
    for index, rows in maps:
        image, mask = _sample(truth, index)
        order = np.argsort(-np.bincount(mask.flatten(), minlength=len(SCENE_CLASSES)))
        present = [int(i) for i in order if (mask == i).any()]
        figures = []
        for label in sorted(present, key=lambda i: SCENE_CLASSES[i] not in results["unseen_classes"])[:3]:
            unseen = SCENE_CLASSES[label] in results["unseen_classes"]
            tinted = np.where((mask == label)[..., None], image, (image * 0.35).astype(np.uint8))
            figures.append(figure(tinted, SCENE_CLASSES[label], "unseen class" if unseen else "seen class"))
            for name, values in rows.items():
                figures.append(figure(_heat(values[label]), name))
        page.panel("", figures, columns=1 + len(rows), small=True)


def _alignment_maps(
    folder: Path, truth: Path, indices: Sequence[int]
) -> list[tuple[int, dict[str, NDArray[np.float32]]]]:
    """For each scene: name -> R as [T, h, w], of the teacher and of both students."""
    import torch

    from infoclip.api import as_pixels, load
    from infoclip.clip import DenseCLIP, load_clip
    from infoclip.data.scenes import SCENE_CLASSES
    from infoclip.engine.checkpoint import latest_checkpoint, load_checkpoint
    from infoclip.errors import CheckpointError
    from infoclip.model.inference import preprocess
    from infoclip.objective import AlignmentObjective, Embeddings

    student, plain = load(folder / "infoclip", "cpu"), load(folder / "finetune", "cpu")
    ours, theirs = student.segmentor.clip, plain.segmentor.clip
    assert isinstance(ours, DenseCLIP)
    assert isinstance(theirs, DenseCLIP)
    teacher = load_clip(student.config.clip).frozen_copy()
    objective = AlignmentObjective(student.config.align, teacher.embed_dim)
    newest = latest_checkpoint(folder / "infoclip" / "checkpoints")
    if newest is None:
        raise CheckpointError(f"{folder / 'infoclip'} has no checkpoint, which holds the alignment module.")
    objective.load_state_dict(load_checkpoint(newest[1])["objective"])
    objective.eval()
    result = []
    with torch.no_grad():
        texts = [clip.text_features(SCENE_CLASSES).mean(dim=1) for clip in (teacher, ours, theirs)]
        for index in indices:
            pixels = as_pixels(truth / "images" / f"{index:06d}.png")
            views = []
            for clip, text in zip((teacher, ours, theirs), texts, strict=True):
                dense = clip.encode_image(preprocess(pixels, clip)[None]).dense
                grid = (dense.shape[2], dense.shape[3])
                views.append(Embeddings(dense.flatten(2).transpose(1, 2), text))
            of_teacher, of_student = objective.alignment_maps(views[1], views[0])
            of_plain = objective.alignment_maps(views[2], views[0])[1]
            named = {"teacher": of_teacher, "fine-tuned": of_plain, "InfoCLIP": of_student}
            result.append((index, {k: v[0].T.unflatten(1, grid).float().numpy() for k, v in named.items()}))
    return result


def _heat(values: NDArray[np.float32]) -> NDArray[np.uint8]:  # [h, w] -> [h, w, 3]
    import matplotlib as mpl
    import numpy as np

    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return (mpl.colormaps["magma"](scaled)[..., :3] * 255).round().astype(np.uint8)


def _classes(page: Page, results: Mapping[str, Any]) -> None:
    from infoclip.report.html import Cell

    methods = results["methods"].values()
    tables = [m["runs"][0]["evaluation"]["per_class"] for m in methods]
    rows = []
    for column in zip(*tables, strict=True):
        values = [row["iou"] for row in column]
        known = [v for v in values if v is not None]
        cells = [Cell("-" if v is None else f"{100 * v:.1f}", v is not None and v == max(known)) for v in values]
        rows.append([column[0]["name"], "seen" if column[0]["seen"] else "unseen", *cells])
    header = ["class", "", *(m["name"] for m in methods)]
    page.heading("Class by class")
    page.details(f"IoU in percent of all {len(rows)} classes, seed {results['seeds'][0]}", header, rows)


def _examples(truth: Path, unseen: set[str], count: int) -> list[int]:
    """The first scenes that hold a seen object and an unseen one, each over at least 2 % of the picture."""
    import numpy as np

    from infoclip.data.scenes import OBJECT_CLASSES

    total = len(list((truth / "masks").glob("*.png")))
    found = []
    for index in range(total):
        _, mask = _sample(truth, index)
        shares = np.bincount(mask.flatten(), minlength=len(OBJECT_CLASSES))[: len(OBJECT_CLASSES)] / mask.size
        kinds = {name in unseen for name, share in zip(OBJECT_CLASSES, shares, strict=True) if share >= 0.02}
        if kinds == {True, False}:
            found.append(index)
        if len(found) == count:
            break
    return found or list(range(min(count, total)))


def _sample(truth: Path, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Image [H, W, 3] and mask [H, W] of one test scene."""
    import numpy as np
    from PIL import Image

    with (
        Image.open(truth / "images" / f"{index:06d}.png") as image,
        Image.open(truth / "masks" / f"{index:06d}.png") as mask,
    ):
        return np.array(image.convert("RGB")), np.array(mask)
