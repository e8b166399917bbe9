"""Labels drawn over their picture, with a legend of the classes that occur.

Regions are tinted with their class's colour and outlined; the legend names them from the largest to the smallest, with
their share of the picture. Each class also has a number, in the legend and on its largest region, so that the picture
can be read without telling the colours apart.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from infoclip.report.palette import NO_LABEL, ink, palette

if TYPE_CHECKING:
    from infoclip.data.panoptic import Segment

__all__ = ["class_shares", "color_labels", "legend_font", "overlay", "panoptic_overlay", "segment_colors"]

_SMALL = 512
"""With a legend, pictures whose longer side is shorter are magnified by a whole number, to make room for it."""

_TAG_SHARE = 0.002
"""Regions of at least this share of the picture get their number drawn."""


_COLUMNS = 3
"""The legend's largest number of columns; what does not fit becomes one line that says how many there are."""

_TRACE = 5e-4
"""Pixels without a label are mentioned from this share on."""


class _Line(NamedTuple):
    label: int | None  # of the class; -1 for no label, None for a line without a colour
    text: str
    share: float


class _Entry(NamedTuple):
    label: int
    share: float


def class_shares(labels: NDArray[np.integer], count: int) -> list[tuple[int, float]]:
    """Index and share of all pixels of the classes that occur, largest first, among those below ``count``."""
    values, pixels = np.unique(labels, return_counts=True)
    found = [(int(v), int(n) / labels.size) for v, n in zip(values, pixels, strict=True) if 0 <= v < count]
    return sorted(found, key=lambda pair: (-pair[1], pair[0]))


def color_labels(labels: NDArray[np.integer], count: int) -> NDArray[np.uint8]:  # [H, W] -> [H, W, 3]
    """The labels as plain colours; those outside ``0 .. count-1`` in the grey that stands for no label."""
    return _colored(labels, palette(count))


def _colored(labels: NDArray[np.integer], colors: NDArray[np.uint8]) -> NDArray[np.uint8]:
    count = len(colors)
    index = np.where((labels >= 0) & (labels < count), labels, count).astype(np.int64)
    return np.concatenate([colors, np.array([NO_LABEL], dtype=np.uint8)])[index]


def overlay(
    image: NDArray[np.uint8],  # [H, W, 3], RGB
    labels: NDArray[np.integer],  # [H, W]
    classes: Sequence[str],
    *,
    colors: NDArray[np.uint8] | None = None,  # [T, 3]
    alpha: float = 0.6,
    legend: bool = True,
) -> Image.Image:
    """The picture under its labels.

    Args:
        labels: index into ``classes``; other values mean no label and leave the picture grey.
        colors: of the classes; by default those of :func:`infoclip.report.palette.palette`.
        alpha: weight of the class colours over the picture, 0 to 1.
        legend: add names, colours and shares at the right, and numbers on the regions; small pictures are magnified by
            a whole number. Without it the result has exactly the picture's size.

    Raises:
        ValueError: shapes that do not go together.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image is {image.dtype} {image.shape}; expected uint8 [H, W, 3]")
    if labels.shape != image.shape[:2]:
        raise ValueError(f"labels have shape {labels.shape}; expected the image's {image.shape[:2]}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; expected 0 to 1")
    chosen = palette(len(classes)) if colors is None else colors
    # Tinting a grey version keeps the class colours true; a little of the picture's own colour keeps it recognisable.
    grey = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    base = 0.35 * image + 0.65 * grey[..., None]
    tinted = (1 - alpha) * base + alpha * _colored(labels, chosen)
    picture = Image.fromarray(tinted.round().clip(0, 255).astype(np.uint8))
    if not legend:
        return picture
    factor = max(1, _SMALL // max(picture.size))
    if factor > 1:
        enlarged = Image.fromarray(base.round().astype(np.uint8)).resize(
            (picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC
        )
        smooth = np.asarray(enlarged)
        labels = labels.repeat(factor, axis=0).repeat(factor, axis=1)
        tinted = (1 - alpha) * smooth + alpha * _colored(labels, chosen).astype(np.float32)
        picture = Image.fromarray(tinted.round().clip(0, 255).astype(np.uint8))
    entries = [_Entry(i, share) for i, share in class_shares(labels, len(classes))]
    size = max(14, round(max(picture.size) / 42))
    picture = _outlined(picture, labels, width=max(1, size // 12))
    unlabelled = 1.0 - sum(entry.share for entry in entries)
    per_column = max(4, (picture.height - size) // _row(size))
    listed = len(entries)
    if listed + (unlabelled > _TRACE) > per_column * _COLUMNS:
        listed = per_column * _COLUMNS - 1 - (unlabelled > _TRACE)
    _tag(picture, labels, entries[:listed], chosen, size)
    lines = [_Line(entry.label, classes[entry.label], entry.share) for entry in entries[:listed]]
    if listed < len(entries):
        lines.append(_Line(None, f"{len(entries) - listed} more", sum(e.share for e in entries[listed:])))
    if unlabelled > _TRACE:
        lines.append(_Line(-1, "no label", unlabelled))
    return _with_legend(picture, [lines[i : i + per_column] for i in range(0, len(lines), per_column)], chosen, size)


def segment_colors(segments: Sequence[Segment]) -> NDArray[np.uint8]:  # [S, 3]
    """A colour for each segment: its class's, and for further ones of a class lighter and darker shades of it."""
    before: dict[int, int] = {}
    colors = np.zeros((len(segments), 3), dtype=np.uint8)
    for i, segment in enumerate(segments):
        k = before.get(segment.category, 0)
        before[segment.category] = k + 1
        share = (0.25 + 0.35 * ((k - 1) // 2 * 0.6180339887498949 % 1.0)) if k else 0.0
        towards = 255.0 if k % 2 else 0.0
        colors[i] = ((1 - share) * palette(segment.category + 1)[-1] + share * towards).round()
    return colors


def panoptic_overlay(
    image: NDArray[np.uint8],  # [H, W, 3], RGB
    ids: NDArray[np.integer],  # [H, W]
    segments: Sequence[Segment],
    classes: Sequence[str],
    *,
    alpha: float = 0.6,
    legend: bool = True,
) -> Image.Image:
    """The picture under its segments: each instance with an outline, a shade of its class's colour, and a number.

    Args:
        ids: segment ids; pixels of none of the segments are grey.
        segments: whose categories index ``classes``; the legend gives the score of those that have one.
        alpha, legend: as :func:`overlay`'s.

    Raises:
        ValueError: shapes that do not go together.
    """
    labels = np.full(ids.shape, -1, dtype=np.int64)
    for index, segment in enumerate(segments):
        labels[ids == segment.id] = index
    names = [classes[s.category] + ("" if s.score is None else f" ({100 * s.score:.0f})") for s in segments]
    return overlay(image, labels, names, colors=segment_colors(segments), alpha=alpha, legend=legend)


def _outlined(picture: Image.Image, labels: NDArray[np.integer], width: int) -> Image.Image:
    edge = np.zeros(labels.shape, dtype=bool)
    down, right = labels[1:] != labels[:-1], labels[:, 1:] != labels[:, :-1]
    edge[1:] |= down
    edge[:, 1:] |= right
    for _ in range(width - 1):
        edge[:-1] |= edge[1:]
        edge[:, :-1] |= edge[:, 1:]
    pixels = np.array(picture)
    pixels[edge] = (255, 255, 255)
    return Image.fromarray(pixels)


def _tag(
    picture: Image.Image,
    labels: NDArray[np.integer],
    entries: Sequence[_Entry],
    colors: NDArray[np.uint8],
    size: int,
) -> None:
    """Each class's number at the place that lies deepest inside one of its regions."""
    step = max(1, max(labels.shape) // 192)
    small = labels[::step, ::step]
    draw = ImageDraw.Draw(picture)
    font = legend_font(max(11, round(0.85 * size)))
    for number, entry in enumerate(entries, start=1):
        if entry.share < _TAG_SHARE:
            continue
        y, x = _deepest(small == entry.label)
        color = tuple(int(c) for c in colors[entry.label])
        text = str(number)
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        half_w, half_h = (right - left) / 2 + size * 0.3, (bottom - top) / 2 + size * 0.24
        cx = min(max((x + 0.5) * step, half_w + 1), picture.width - half_w - 2)
        cy = min(max((y + 0.5) * step, half_h + 1), picture.height - half_h - 2)
        box = (cx - half_w, cy - half_h, cx + half_w, cy + half_h)
        draw.rounded_rectangle(box, radius=size * 0.25, fill=color, outline=(255, 255, 255))
        draw.text((cx - (left + right) / 2, cy - (top + bottom) / 2), text, font=font, fill=ink(color))


def _deepest(inside: NDArray[np.bool_]) -> tuple[int, int]:
    """Row and column of a pixel with the largest distance (in steps of king's moves) to the outside."""
    left = np.pad(inside, 1)
    alive = left
    while True:
        rows = alive[:-2] & alive[1:-1] & alive[2:]
        core = rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]
        if not core.any():
            break
        alive = np.pad(core, 1)
    ys, xs = np.nonzero(alive[1:-1, 1:-1])
    # Of several, the one nearest to their middle row and column; a plateau then gets its number at its centre.
    best = int(np.argmin(np.abs(ys - np.median(ys)) + np.abs(xs - np.median(xs))))
    return int(ys[best]), int(xs[best])


def _with_legend(
    picture: Image.Image, columns: Sequence[Sequence[_Line]], colors: NDArray[np.uint8], size: int
) -> Image.Image:
    font, small, row, pad = legend_font(size), legend_font(max(10, round(0.85 * size))), _row(size), round(size * 0.8)
    swatch, gap = round(size * 1.75), size * 0.6
    draw = ImageDraw.Draw(picture)
    limit = max(size * 12, picture.width / (2 if len(columns) == 1 else 3.5))
    share_width = draw.textlength("100.0 %", font=font) + size
    widths = [
        round(swatch + gap + max(draw.textlength(_fitted(draw, line.text, font, limit), font=font) for line in column))
        for column in columns
    ]
    panel = sum(round(width + share_width) for width in widths) + pad * (len(columns) + 1)
    tallest = max(len(column) for column in columns) * row + size
    canvas = Image.new("RGB", (picture.width + panel, max(picture.height, tallest)), (255, 255, 255))
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    x, number = picture.width + pad, 0
    for column, width in zip(columns, widths, strict=True):
        for i, line in enumerate(column):
            middle = size / 2 + (i + 0.5) * row
            if line.label is not None:
                color = NO_LABEL if line.label < 0 else tuple(int(c) for c in colors[line.label])
                box = (x, middle - size * 0.62, x + swatch, middle + size * 0.62)
                draw.rounded_rectangle(box, radius=size * 0.25, fill=color, outline=(90, 90, 90))
                if line.label >= 0:
                    number += 1
                    draw.text((x + swatch / 2, middle), str(number), font=small, fill=ink(color), anchor="mm")
            text = _fitted(draw, line.text, font, limit)
            draw.text((x + swatch + gap, middle), text, font=font, fill=(25, 25, 25), anchor="lm")
            share = _share_text(line.share)
            draw.text((x + width + share_width, middle), share, font=font, fill=(110, 110, 110), anchor="rm")
        x += round(width + share_width) + pad
    return canvas


def _row(size: int) -> int:
    return round(size * 1.7)


def _share_text(share: float) -> str:
    return "< 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def _fitted(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, limit: float) -> str:
    text = " ".join(text.split())
    if draw.textlength(text, font=font) <= limit:
        return text
    while text and draw.textlength(text + "…", font=font) > limit:
        text = text[:-1]
    return text.rstrip() + "…"


@functools.lru_cache(maxsize=16)
def legend_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along: it covers Latin, Greek and Cyrillic."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
