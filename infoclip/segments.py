"""What a model of mask proposals finds in a picture: segments that do not overlap, or objects with scores."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from infoclip.api import png_bytes, write_files
from infoclip.data.panoptic import Category, Segment, encode_segment_ids, segments_info

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["InstanceSegmentation", "PanopticSegmentation", "run_lengths"]


@dataclass(frozen=True)
class PanopticSegmentation:
    """Segments of one picture: one for each object of a thing, one for each kind of stuff."""

    ids: NDArray[np.int32]
    """[H, W], the segment of each pixel; 0 where there is none."""
    segments: list[Segment]
    """Every segment of the map; categories index ``classes``. Empty where nothing was found."""
    classes: list[str]
    things: list[str]
    """Classes whose objects are told apart."""
    image: NDArray[np.uint8] = field(repr=False)
    """[H, W, 3], the picture as it was segmented (upright, RGB)."""

    @property
    def categories(self) -> list[Category]:
        """The classes in panopticapi's form; ids are indices."""
        return [Category(i, name, name in self.things) for i, name in enumerate(self.classes)]

    @property
    def counts(self) -> dict[str, int]:
        """Number of segments of each class that was found."""
        return _counted(self.classes[s.category] for s in self.segments)

    @property
    def shares(self) -> dict[str, float]:
        """Share of the picture of each class that was found, largest first."""
        share: dict[str, float] = dict.fromkeys(self.counts, 0.0)
        for segment in self.segments:
            share[self.classes[segment.category]] += float((self.ids == segment.id).mean())
        return dict(sorted(share.items(), key=lambda pair: -pair[1]))

    def overlay(self, *, alpha: float = 0.6, legend: bool = True) -> Image.Image:
        """The picture under its segments, each with an outline, a colour and (with the legend) a number of its own."""
        from infoclip.report.overlay import panoptic_overlay

        return panoptic_overlay(self.image, self.ids, self.segments, self.classes, alpha=alpha, legend=legend)

    def describe(self) -> dict[str, Any]:
        """What the JSON beside the map says: size, classes, things, and panopticapi's ``segments_info``."""
        height, width = self.ids.shape
        info = segments_info(torch.from_numpy(self.ids), self.segments, self.categories)
        for entry in info:
            entry["category"] = self.classes[entry["category_id"]]
        return {"width": width, "height": height, "classes": list(self.classes), "things": list(self.things),
                "segments_info": info}  # fmt: skip

    def files(self, name: str, extra: dict[str, Any] | None = None) -> dict[str, bytes]:
        """``NAME.overlay.png``; ``NAME.panoptic.png``, the map in panopticapi's colours; ``NAME.json``."""
        png = encode_segment_ids(torch.from_numpy(self.ids))
        return _files(name, "panoptic", png, self.overlay(), self.describe(), extra)

    def save(self, directory: str | Path, name: str = "panoptic") -> list[Path]:
        """Write :meth:`files`.

        Raises:
            StorageError: the folder cannot be written; nothing half-written stays.
        """
        return write_files(Path(directory), self.files(name))


@dataclass(frozen=True)
class InstanceSegmentation:
    """Objects of one picture, best first; they may overlap. There may be none."""

    masks: NDArray[np.bool_]
    """[K, H, W]; none is empty."""
    labels: NDArray[np.int64]
    """[K], index into ``classes``."""
    scores: NDArray[np.float32]
    """[K], 0..1."""
    classes: list[str]
    image: NDArray[np.uint8] = field(repr=False)
    """[H, W, 3], the picture as it was segmented (upright, RGB)."""

    @property
    def counts(self) -> dict[str, int]:
        """Number of objects of each class that was found."""
        return _counted(self.classes[i] for i in self.labels)

    @property
    def shares(self) -> dict[str, float]:
        """Share of the picture under the objects of each class, largest first; overlaps count for both."""
        share = {name: float(self.masks[self.labels == self.classes.index(name)].any(axis=0).mean())
                 for name in self.counts}  # fmt: skip
        return dict(sorted(share.items(), key=lambda pair: -pair[1]))

    def ids(self) -> NDArray[np.int32]:  # [H, W]
        """The number of the object at each pixel, from 1, the one with the better score where several are; 0: none."""
        result = np.zeros(self.image.shape[:2], dtype=np.int32)
        for number in range(len(self.masks), 0, -1):
            result[self.masks[number - 1]] = number
        return result

    def overlay(self, *, alpha: float = 0.6, legend: bool = True) -> Image.Image:
        """The picture under its objects, the better ones above; the legend gives class and score."""
        from infoclip.report.overlay import panoptic_overlay

        segments = [Segment(i + 1, int(label), False, float(score))
                    for i, (label, score) in enumerate(zip(self.labels, self.scores, strict=True))]  # fmt: skip
        return panoptic_overlay(self.image, self.ids(), segments, self.classes, alpha=alpha, legend=legend)

    def describe(self) -> dict[str, Any]:
        """What the JSON says: size, classes, and each object as in COCO's results, masks as plain run lengths."""
        height, width = self.image.shape[:2]
        objects = []
        for mask, label, score in zip(self.masks, self.labels, self.scores, strict=True):
            rows, columns = np.nonzero(mask)
            x, y = int(columns.min()), int(rows.min())
            objects.append(
                {
                    "category_id": int(label),
                    "category": self.classes[label],
                    "score": round(float(score), 6),
                    "area": len(rows),
                    "bbox": [x, y, int(columns.max()) - x + 1, int(rows.max()) - y + 1],
                    "segmentation": {"size": [height, width], "counts": run_lengths(mask)},
                }
            )
        return {"width": width, "height": height, "classes": list(self.classes), "instances": objects}

    def files(self, name: str, extra: dict[str, Any] | None = None) -> dict[str, bytes]:
        """``NAME.overlay.png``; ``NAME.instances.png``, :meth:`ids` in panopticapi's colours; ``NAME.json``."""
        png = encode_segment_ids(torch.from_numpy(self.ids()))
        return _files(name, "instances", png, self.overlay(), self.describe(), extra)

    def save(self, directory: str | Path, name: str = "instances") -> list[Path]:
        """Write :meth:`files`.

        Raises:
            StorageError: the folder cannot be written; nothing half-written stays.
        """
        return write_files(Path(directory), self.files(name))


def run_lengths(mask: NDArray[np.bool_]) -> list[int]:  # [H, W]
    """COCO's uncompressed run-length encoding: column by column, pixels outside, inside, outside, ..."""
    flat = mask.flatten(order="F")
    ends = np.concatenate([np.flatnonzero(flat[1:] != flat[:-1]) + 1, [flat.size]])
    counts = np.diff(ends, prepend=0).tolist()
    return [0, *counts] if flat[0] else counts


def _counted(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())


def _files(
    name: str, kind: str, png: bytes, overlay: Image.Image, described: dict[str, Any], extra: dict[str, Any] | None
) -> dict[str, bytes]:
    png_name, overlay_name = f"{name}.{kind}.png", f"{name}.overlay.png"
    info = {**(extra or {}), kind: png_name, "overlay": overlay_name, **described}
    text = json.dumps(info, indent=2, ensure_ascii=False) + "\n"
    return {overlay_name: png_bytes(overlay), png_name: png, f"{name}.json": text.encode()}
