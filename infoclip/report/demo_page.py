"""The demos' report: table, curves, pictures of every method, alignment maps or instances, and how to repeat it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from infoclip.data.panoptic import Segment
    from infoclip.report.html import Page

__all__ = ["demo_page", "demo_picture", "measures", "table_header", "table_rows", "verdict"]

_PANELS = 6
_MAPS = 3
_SCENES = 4

_TASK_LOSSES = ("segmentation", "class", "mask", "dice")
"""Losses above 0 that are drawn on a logarithmic scale."""

_NAMES = {"seen": "seen", "unseen": "unseen", "harmonic": "harmonic", "pq_seen": "PQ seen", "pq_unseen": "PQ unseen",
          "pq_harmonic": "PQ harmonic"}  # fmt: skip
"""Columns by the figures' names; those that were not measured are left out."""


def _columns(results: Mapping[str, Any]) -> list[str]:
    ours = results["methods"][results["system"]]["mean"]
    return [key for key in _NAMES if key in ours]


def measures(results: Mapping[str, Any]) -> str:
    """What is compared: ``mIoU``, or ``mIoU and PQ``."""
    return "mIoU and PQ" if "pq_seen" in _columns(results) else "mIoU"


def table_rows(results: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, bool]]]]:
    """Method names and their cells, with the best mIoU figures marked."""
    methods = results["methods"].values()
    several = len(results["seeds"]) > 1
    rows = []
    for method in methods:
        cells = []
        for key in _columns(results):
            best = max((m["mean"][key] for m in methods if not math.isnan(m["mean"][key])), default=math.inf)
            known = key in method["runs"][0]  # a system without panoptic results has no PQ
            cells.append((_figure(method, key, 1, several) if known else "-", method["mean"][key] >= best))
        trained = method["recipe"] is not None
        cells.append((_figure(method, "train_seconds", 0, several) if trained else "-", False))
        cells.append((_figure(method, "peak_memory_mib", 0, False), False))
        rows.append((method["name"], cells))
    return rows


def _figure(method: Mapping[str, Any], key: str, digits: int, several: bool) -> str:
    value = f"{method['mean'][key]:.{digits}f}"
    return f"{value} ± {method['std'][key]:.{digits}f}" if several else value


def table_header(results: Mapping[str, Any]) -> list[str]:
    """Names of the columns: that of the method, then those of :func:`table_rows`."""
    return ["method", *(_NAMES[key] for key in _columns(results)), "train s", "peak MiB"]


def verdict(results: Mapping[str, Any]) -> str:
    """One sentence on what was seen, whichever way it went."""
    gains = results["gain_over_finetune"]
    unseen, seen = (sum(g[name] for g in gains) / len(gains) for name in ("unseen", "seen"))
    ours = results["methods"][results["system"]]["name"]
    better = sum(g["unseen"] > 0 for g in gains)
    count = f" (better in {better} of {len(gains)} seeds)" if len(gains) > 1 else ""
    sentence = (
        f"Against plain fine-tuning, {ours}'s objective changes the mIoU on unseen classes by {unseen:+.1f} points"
        f"{count} and on seen classes by {seen:+.1f}"
    )
    if "pq_unseen" in gains[0]:
        unseen, seen = (sum(g[name] for g in gains) / len(gains) for name in ("pq_unseen", "pq_seen"))
        sentence += f", the panoptic quality by {unseen:+.1f} and by {seen:+.1f}"
    sentence += "."
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

    ours = results["methods"][results["system"]]
    page = Page(f"{ours['name']} on generated scenes")
    page.paragraph(verdict(results), "lead")
    seeds = results["seeds"]
    page.paragraph(
        f"{len(results['methods'])} methods, tiny CLIPs. Each learns on {len(results['seen_classes'])} seen classes "
        f"and is tested on {ours['runs'][0]['evaluation']['images']} other scenes with all "
        f"{len(results['seen_classes']) + len(results['unseen_classes'])} classes as candidates "
        f"({results['split']} split, "
        + (f"seeds {', '.join(map(str, seeds))}: mean ± standard deviation" if len(seeds) > 1 else f"seed {seeds[0]}")
        + ")."
    )
    page.table(table_header(results), [[name, *(Cell(*cell) for cell in cells)] for name, cells in table_rows(results)])
    page.paragraph(
        "mIoU in percent, over the classes present in the ground truth"
        + (" (PQ: panoptic quality, over the classes that occur)" if "pq_seen" in _columns(results) else "")
        + ". Harmonic mean of seen and unseen. Peak memory is that of the method's own process, with Python and its "
        "libraries.",
        "soft",
    )
    _charts(page, results, folder)
    _panels(page, results, folder, truth)
    if results["system"] == "infoclip":
        _maps(page, results, folder, truth)
    else:
        _instances(page, results, folder, truth)
    _classes(page, results)
    page.heading("How to repeat it")
    page.code(
        f"infoclip demo --system {results['system']} --split {results['split']} --seeds {','.join(map(str, seeds))}\n"
        f"{try_it}"
    )
    page.details_code(f"Settings of {ours['name']}", json.dumps(ours["config"], indent=1))
    page.details_code("Environment", json.dumps(results["environment"], indent=1))
    return page.render()


def _charts(page: Page, results: Mapping[str, Any], folder: Path) -> None:
    from infoclip.engine.log import read_log
    from infoclip.report.curves import SERIES_COLORS, Series, bar_chart, line_chart
    from infoclip.report.html import Markup

    methods = results["methods"]
    keys = ["seen", "unseen", "harmonic"]
    bars = [(m["name"], [m["mean"][k] for k in keys], [m["std"][k] for k in keys]) for m in methods.values()]
    cards = [("Quality", Markup(bar_chart(["seen", "unseen", "harmonic mean"], bars, y_label="mIoU, %")),
              "Bars: standard deviation over seeds." if len(results["seeds"]) > 1 else "One seed.")]  # fmt: skip
    color = dict(zip(methods, SERIES_COLORS, strict=False))
    logs = {key: read_log(folder / key / "log.jsonl") for key in methods if methods[key]["recipe"]}
    if "pq_seen" in _columns(results):
        keys = ["pq_seen", "pq_unseen", "pq_harmonic"]
        with_pq = [m for m in methods.values() if "pq_seen" in m["runs"][0]]
        bars = [(m["name"], [m["mean"][k] for k in keys], [m["std"][k] for k in keys]) for m in with_pq]
        cards.append(("Panoptic quality", Markup(bar_chart(["seen", "unseen", "harmonic mean"], bars, y_label="PQ, %")),
                      cards[0][2]))  # fmt: skip
    lines = [line for log in logs.values() for line in log]
    for name in dict.fromkeys(name for line in lines for name in line["losses"] if name != "bound"):
        having = [key for key, log in logs.items() if any(line["losses"].get(name) is not None for line in log)]
        series = []
        for key in having:
            points = [(line["step"], line["losses"].get(name)) for line in logs[key]]
            kept = [(step, value) for step, value in points if value is not None]
            series.append(Series(methods[key]["name"], [s for s, _ in kept], [v for _, v in kept], color[key]))
        chart = line_chart(series, x_label="step", y_label="loss", log_y=name in _TASK_LOSSES)
        note = f"{methods[having[0]]['name']} only." if len(having) == 1 else f"Seed {results['seeds'][0]}."
        cards.append((f"Loss: {name.replace('_', ' ')}", Markup(chart), f"{note} Means between logging steps."))
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


def _instances(page: Page, results: Mapping[str, Any], folder: Path, truth: Path) -> None:
    """Panoptic maps of the truth and of every method that gives them."""
    from infoclip.report.html import figure

    page.heading("Segments and instances")
    page.paragraph(
        "Panoptic maps of some of the same scenes: each object has a number, an outline and a shade of its class's "
        "colour; the legend gives its class and its share of the picture."
    )
    for index in _examples(truth, set(results["unseen_classes"]), _SCENES):
        drawn = _panoptic_pictures(results, folder, truth, index)
        page.panel("", [figure(picture, name, pixelated=False) for name, picture in drawn], columns=2)


def _panoptic_pictures(
    results: Mapping[str, Any], folder: Path, truth: Path, index: int
) -> list[tuple[str, Image.Image]]:
    """Overlays of one scene with their titles: the truth, then each method that gives panoptic maps."""
    import numpy as np

    from infoclip.data.panoptic import Segment, open_panoptic
    from infoclip.data.scenes import SCENE_CLASSES
    from infoclip.report.overlay import panoptic_overlay

    unseen = set(results["unseen_classes"])
    names = [f"{name} (unseen)" if name in unseen else name for name in SCENE_CLASSES]
    sample = open_panoptic(truth, classes=SCENE_CLASSES)[index]
    image, _ = _sample(truth, index)
    maps: list[tuple[str, Any, list[Segment]]] = [("truth", sample["panoptic"].numpy(), list(sample["segments"]))]
    for key, method in results["methods"].items():
        if "pq_seen" in method["runs"][0]:
            found = np.load(folder / f"{key}.npz")
            segments = [Segment(i, category) for i, category in json.loads(str(found["segments"]))[index]]
            maps.append((method["name"], found["ids"][index], segments))
    return [(title, panoptic_overlay(image, ids, segments, names)) for title, ids, segments in maps]


def demo_picture(results: Mapping[str, Any], folder: Path, truth: Path) -> Image.Image:
    """Two scenes, a column each: panoptic maps of the truth and of the methods, one below the other."""
    from PIL import Image, ImageDraw

    from infoclip.report.overlay import legend_font

    columns = [
        _panoptic_pictures(results, folder, truth, index)
        for index in _examples(truth, set(results["unseen_classes"]), 2)
    ]
    every = [picture for column in columns for _, picture in column]
    width, height, title = max(p.width for p in every), max(p.height for p in every), 30
    canvas = Image.new("RGB", (len(columns) * (width + 16), len(columns[0]) * (height + title + 8)), (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    for x, column in enumerate(columns):
        for y, (name, picture) in enumerate(column):
            left, top = x * (width + 16), y * (height + title + 8)
            draw.text((left + 4, top + 4), name, font=legend_font(20), fill=(25, 25, 25))
            canvas.paste(picture, (left, top + title))
    return canvas


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
