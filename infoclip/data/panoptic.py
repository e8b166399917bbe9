"""Panoptic annotations in the layout of panopticapi, as COCO and ADE20K use it: read, checked and written.

One JSON file lists ``images``, ``annotations`` and ``categories``; beside it lies a folder of PNGs, one for each
annotation, whose colours are segment ids: ``id = R + 256 G + 65536 B``, 0 for pixels without a segment. The
annotation's ``segments_info`` gives each id its category. Kirillov et al., *Panoptic Segmentation*, section 3.

Below one root the published data sets are looked for where detectron2's users have them:

===================== ====================== ============================ ===========================================
name                  folder                 images                       annotations
===================== ====================== ============================ ===========================================
coco-panoptic         coco                   val2017                      annotations/panoptic_val2017.json and
                                                                          panoptic_val2017 (or below annotations)
coco-panoptic-train   coco                   train2017                    the same with train2017
ade20k-panoptic       ADEChallengeData2016   images/validation            ade20k_panoptic_val.json and
                                                                          ade20k_panoptic_val
ade20k-panoptic-train ADEChallengeData2016   images/training              the same with train
===================== ====================== ============================ ===========================================
"""

from __future__ import annotations

import difflib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision import tv_tensors

from infoclip.data.classes import check_classes
from infoclip.data.files import below, read_image, read_segment_ids
from infoclip.data.folders import PairDataset, size_message
from infoclip.errors import ConfigError, DataError

__all__ = ["MAX_SEGMENT_ID", "PANOPTIC_SETS", "VOID", "Category", "PanopticAnnotation", "PanopticAnnotations",
           "PanopticDataset", "PanopticSet", "Segment", "check_segments", "encode_segment_ids", "ids_from_masks",
           "match_categories", "open_panoptic", "panoptic_json", "read_annotations", "segments_info"]  # fmt: skip

VOID = 0
"""Segment id of pixels without a segment."""

MAX_SEGMENT_ID = 256**3 - 1


class Segment(NamedTuple):
    """One segment of a panoptic map."""

    id: int
    category: int
    """Index into the list of categories, not the id that a file gives the category."""
    crowd: bool = False
    score: float | None = None
    """Of a predicted segment, 0..1."""


@dataclass(frozen=True)
class Category:
    """One class of a panoptic data set."""

    id: int
    name: str
    isthing: bool
    """Whether it is counted by instances (a thing) or not (stuff)."""

    @property
    def prompt(self) -> str:
        """The name in words: COCO's ``sky-other-merged`` is ``sky``, ``floor-wood`` is ``floor wood``."""
        return re.sub(r"(-(other|merged|stuff))+$", "", self.name).replace("-", " ")


@dataclass(frozen=True)
class PanopticAnnotation:
    """One picture's entry."""

    image_id: int | str
    image: str
    """File name of the picture."""
    png: str
    """File name of the segment ids."""
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class PanopticAnnotations:
    """A whole file of annotations."""

    path: Path
    categories: tuple[Category, ...]
    annotations: tuple[PanopticAnnotation, ...]

    @property
    def things(self) -> list[int]:
        """Indices of the categories that are things."""
        return [i for i, category in enumerate(self.categories) if category.isthing]


class PanopticSet(NamedTuple):
    """Where a published data set lies below its folder; of several places the first that exists is taken."""

    title: str
    folder: str
    images: str
    json: str
    pngs: tuple[str, ...]
    pictures: int
    """Images of the published split."""


PANOPTIC_SETS = {
    "coco-panoptic": PanopticSet("COCO panoptic val2017", "coco", "val2017", "annotations/panoptic_val2017.json",
                                 ("panoptic_val2017", "annotations/panoptic_val2017"), 5_000),
    "coco-panoptic-train": PanopticSet("COCO panoptic train2017", "coco", "train2017",
                                       "annotations/panoptic_train2017.json",
                                       ("panoptic_train2017", "annotations/panoptic_train2017"), 118_287),
    "ade20k-panoptic": PanopticSet("ADE20K panoptic validation", "ADEChallengeData2016", "images/validation",
                                   "ade20k_panoptic_val.json", ("ade20k_panoptic_val",), 2_000),
    "ade20k-panoptic-train": PanopticSet("ADE20K panoptic training", "ADEChallengeData2016", "images/training",
                                         "ade20k_panoptic_train.json", ("ade20k_panoptic_train",), 20_210),
}  # fmt: skip


# Reading


def read_annotations(path: str | Path, categories: Sequence[Category] | None = None) -> PanopticAnnotations:
    """Read and check a JSON file of panopticapi's layout; the PNGs are not opened.

    Args:
        path: the file. Ground truth holds ``images``, ``annotations`` and ``categories``; a file of predictions may
            hold the annotations alone.
        categories: those of the ground truth, for predictions. A file that names categories of its own must name the
            same ones.

    Raises:
        DataError: a missing file or another form; the same image, segment id or category twice; the id 0, which is
            void; a segment of an unknown category; other things and stuff than ``categories``.
    """
    path = Path(path)
    data = _load(path)
    own = _categories(data, path) if "categories" in data or categories is None else None
    if own is not None and categories is not None:
        match_categories(own, categories, str(path))
    known = tuple(categories) if categories is not None else own or ()
    index = {category.id: i for i, category in enumerate(known)}
    pictures: dict[Any, str] = {}
    for entry in _list(data, "images", path) if "images" in data else []:
        pictures[_field(entry, "id", (int, str), path, "an image")] = _field(entry, "file_name", str, path, "an image")
    if categories is None and not pictures:
        raise DataError(f"{path} names no images; expected panopticapi's layout with images and their file names.")
    found: dict[Any, PanopticAnnotation] = {}
    for entry in _list(data, "annotations", path):
        image_id = _field(entry, "image_id", (int, str), path, "an annotation")
        if image_id in found:
            raise DataError(f"{path} annotates the image {image_id!r} twice; remove one annotation.")
        if pictures and image_id not in pictures:
            raise DataError(f"{path} annotates the image {image_id!r}, which is not among its images.")
        png = _field(entry, "file_name", str, path, f"the annotation of image {image_id!r}")
        segments = _segments(entry, index, path, png)
        found[image_id] = PanopticAnnotation(image_id, pictures.get(image_id, ""), png, segments)
    if not found:
        raise DataError(f"{path} holds no annotation; expected one for each image.")
    return PanopticAnnotations(path, known, tuple(found.values()))


def match_categories(given: Sequence[Category], truth: Sequence[Category], source: str) -> None:
    """Refuse a list of categories that is not the ground truth's.

    Raises:
        DataError: a category that one of the lists lacks, or that is a thing in one and stuff in the other.
    """
    ours, theirs = {c.id: c for c in given}, {c.id: c for c in truth}
    for category in truth:
        if category.id not in ours:
            raise DataError(
                f"The categories of {source} are not the ground truth's: '{category.name}' (id {category.id}) "
                "is missing."
            )
    for category in given:
        other = theirs.get(category.id)
        if other is None:
            raise DataError(
                f"The categories of {source} are not the ground truth's: it knows no '{category.name}' "
                f"(id {category.id})."
            )
        if category.isthing != other.isthing:
            kind = ("stuff", "a thing")
            raise DataError(
                f"The categories of {source} are not the ground truth's: '{category.name}' is "
                f"{kind[category.isthing]} there and {kind[other.isthing]} in the ground truth."
            )


def check_segments(ids: Tensor, segments: Sequence[Segment], source: str) -> None:  # [H, W]
    """Refuse a map and a list of segments that do not belong together.

    Raises:
        DataError: an id in the map that the list lacks, or one in the list without a pixel.
    """
    present = set(ids.unique().tolist()) - {VOID}
    listed = {segment.id for segment in segments}
    if present - listed:
        raise DataError(
            f"{source} holds the segment {min(present - listed)}, which its segments_info does not name; "
            "the PNG and the JSON do not belong together."
        )
    if listed - present:
        raise DataError(
            f"{source} has no pixel of the segment {min(listed - present)}, which its segments_info names; "
            "the PNG and the JSON do not belong together."
        )


def _load(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"There is no file of panoptic annotations {path}; check the path.") from error
    except OSError as error:
        raise DataError(f"Cannot read the panoptic annotations {path}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); expected panoptic annotations.") from error
    if not isinstance(data, dict):
        raise DataError(f"{path} holds no panoptic annotations; expected an object with images and annotations.")
    return data


def _list(data: Mapping[str, Any], key: str, path: Path) -> list[dict[str, Any]]:
    values = data.get(key)
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise DataError(f"{path} holds no list of {key}; expected panopticapi's layout.")
    return values


def _field(entry: Mapping[str, Any], key: str, kind: Any, path: Path, what: str) -> Any:
    value = entry.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{what[0].upper()}{what[1:]} in {path} has no usable {key} ({value!r:.40}).")
    return value


def _categories(data: Mapping[str, Any], path: Path) -> tuple[Category, ...]:
    categories: dict[int, Category] = {}
    for entry in _list(data, "categories", path):
        number = _field(entry, "id", int, path, "a category")
        name = _field(entry, "name", str, path, f"category {number}")
        if entry.get("isthing") not in (0, 1):
            raise DataError(f"The category '{name}' in {path} does not say whether it is a thing (isthing 0 or 1).")
        if number in categories:
            raise DataError(f"{path} has the category id {number} twice ('{categories[number].name}' and '{name}').")
        categories[number] = Category(number, name, bool(entry["isthing"]))
    if not categories:
        raise DataError(f"{path} names no category; expected a list with id, name and isthing.")
    return tuple(categories[number] for number in sorted(categories))


def _segments(entry: Mapping[str, Any], index: Mapping[int, int], path: Path, png: str) -> tuple[Segment, ...]:
    segments: dict[int, Segment] = {}
    for info in _list(entry, "segments_info", path):
        number = _field(info, "id", int, path, f"a segment of {png}")
        category = _field(info, "category_id", int, path, f"the segment {number} of {png}")
        if not VOID < number <= MAX_SEGMENT_ID:
            raise DataError(f"{path} gives a segment of {png} the id {number}; expected 1 to {MAX_SEGMENT_ID:,}.")
        if number in segments:
            raise DataError(f"{path} lists the segment {number} of {png} twice; ids must differ within an image.")
        if category not in index:
            raise DataError(f"{path} gives the segment {number} of {png} the unknown category {category}.")
        score = info.get("score")
        segments[number] = Segment(
            number, index[category], bool(info.get("iscrowd", 0)), score if isinstance(score, float) else None
        )
    return tuple(segments.values())


# Writing


def encode_segment_ids(ids: Tensor) -> bytes:  # [H, W]
    """The PNG of a panoptic map.

    Raises:
        ValueError: ids that three bytes cannot hold.
    """
    from PIL import Image

    low, high = (int(ids.min()), int(ids.max())) if ids.numel() else (0, 0)
    if low < 0 or high > MAX_SEGMENT_ID:
        raise ValueError(f"the map holds the segment ids {low} to {high}; expected 0 to {MAX_SEGMENT_ID}")
    wide = ids.cpu().long()
    colours = torch.stack([wide & 255, wide >> 8 & 255, wide >> 16], dim=-1).to(torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colours.numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def segments_info(
    ids: Tensor,  # [H, W]
    segments: Sequence[Segment],
    categories: Sequence[Category],
) -> list[dict[str, Any]]:
    """The ``segments_info`` of a map: id, category, area, box (x, y, width, height) and crowd flag of each segment.

    Raises:
        DataError: a map and a list of segments that do not belong together.
    """
    check_segments(ids, segments, "the map")
    entries = []
    for segment in segments:
        rows, columns = (ids == segment.id).nonzero().unbind(dim=1)
        x, y = int(columns.min()), int(rows.min())
        entry: dict[str, Any] = {
            "id": segment.id,
            "category_id": categories[segment.category].id,
            "area": len(rows),
            "bbox": [x, y, int(columns.max()) - x + 1, int(rows.max()) - y + 1],
            "iscrowd": int(segment.crowd),
        }
        if segment.score is not None:
            entry["score"] = round(segment.score, 6)
        entries.append(entry)
    return entries


def panoptic_json(
    images: Sequence[Mapping[str, Any]],
    annotations: Sequence[Mapping[str, Any]],
    categories: Sequence[Category],
    supercategory: Mapping[bool, str] | None = None,
) -> dict[str, Any]:
    """The JSON of a panoptic data set: what :func:`read_annotations` and panopticapi read."""
    groups = supercategory or {True: "thing", False: "stuff"}
    return {
        "images": list(images),
        "annotations": list(annotations),
        "categories": [
            {"id": c.id, "name": c.name, "supercategory": groups[c.isthing], "isthing": int(c.isthing)}
            for c in categories
        ],
    }


def ids_from_masks(masks: Tensor) -> Tensor:  # [K, H, W] bool -> [H, W] int64
    """The panoptic map of masks, segment k + 1 for mask k.

    Raises:
        TypeError: masks that are not boolean.
        DataError: two masks that share a pixel: a pixel of a panoptic map belongs to one segment.
    """
    if masks.dtype != torch.bool:
        raise TypeError(f"masks have dtype {masks.dtype}; expected bool")
    twice = masks.sum(dim=0) > 1
    if bool(twice.any()):
        y, x = (int(v) for v in twice.nonzero()[0])
        first, second = masks[:, y, x].nonzero()[:2, 0].tolist()
        raise DataError(
            f"The masks {first} and {second} overlap (first at row {y}, column {x}); in a panoptic map a pixel belongs "
            "to one segment, so decide which one it is."
        )
    numbers = torch.arange(1, len(masks) + 1, device=masks.device)[:, None, None]
    return (masks * numbers).sum(dim=0)


# Data sets


class PanopticDataset(PairDataset):
    """Pictures with panoptic maps.

    A sample is that of :class:`~infoclip.data.folders.PairDataset` (``mask`` holds the category of every pixel) and
    beside it ``panoptic``, the segment ids, ``tv_tensors.Mask`` int64 [H, W], and ``segments``, a tuple of
    :class:`Segment` whose categories index :attr:`classes`.

    Args:
        annotations: see :func:`read_annotations`.
        images: folder of the pictures.
        pngs: folder of the maps.
        classes: names for the categories, in the order of their ids; by default the categories' own in words.
        ignore_index: value of ``mask`` where there is no segment.
        train_classes: the classes to keep, for training on seen ones only; segments of others become void.

    Raises:
        DataError: another number of classes than categories, an unknown or repeated class; while reading, a file that
            cannot be used or a map that its segments_info does not describe.
    """

    def __init__(
        self,
        annotations: PanopticAnnotations,
        images: str | Path,
        pngs: str | Path,
        classes: Sequence[str] | None = None,
        ignore_index: int = 255,
        train_classes: Sequence[str] | None = None,
    ) -> None:
        names = list(classes) if classes is not None else [c.prompt for c in annotations.categories]
        if len(names) != len(annotations.categories):
            raise DataError(
                f"The class list has {len(names)} names and {annotations.path} {len(annotations.categories)} "
                "categories; expected one name for each category, in the order of their ids."
            )
        ignored = max(ignore_index, len(names))
        pairs = [
            (below(Path(images), a.image, annotations.path), below(Path(pngs), a.png, annotations.path))
            for a in annotations.annotations
        ]
        super().__init__(pairs, check_classes(names), ignored, None, train_classes, read_segment_ids)
        self.annotations = annotations
        kept = {self.source_classes.index(name): i for i, name in enumerate(self.classes)}
        self._category = [kept.get(i) for i in range(len(names))]
        self.things = [kept[i] for i in annotations.things if i in kept]
        """Indices in :attr:`classes` of the classes that are things."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        image_path, map_path = self.pairs[index]
        image, ids = read_image(image_path), read_segment_ids(map_path)
        if ids.shape != image.shape[1:]:
            raise DataError(size_message(image_path, map_path, image, ids))
        listed = self.annotations.annotations[index].segments
        check_segments(ids, listed, str(map_path))
        values, places = ids.unique(return_inverse=True)
        labels = torch.full_like(values, self.ignore_index)
        numbers = torch.zeros_like(values)
        where = {value: i for i, value in enumerate(values.tolist())}
        kept = []
        for segment in listed:
            category = self._category[segment.category]
            if category is not None:
                labels[where[segment.id]], numbers[where[segment.id]] = category, segment.id
                kept.append(segment._replace(category=category))
        return {
            "image": tv_tensors.Image(image),
            "mask": tv_tensors.Mask(labels[places]),
            "panoptic": tv_tensors.Mask(numbers[places]),
            "segments": tuple(kept),
            "file": str(image_path),
        }


def open_panoptic(
    root: str | Path,
    name: str = "",
    *,
    images: str = "images",
    pngs: str = "panoptic",
    annotations: str = "panoptic.json",
    classes: Sequence[str] | None = None,
    train_classes: Sequence[str] | None = None,
) -> PanopticDataset:
    """A published data set by name, or the folders of one's own.

    Args:
        root: the folder above the data set's own, or that folder itself; for one's own data the folder of the others.
        name: of :data:`PANOPTIC_SETS`; empty for one's own data.
        images, pngs, annotations: of one's own data, below the root (as ``infoclip.data.scenes.write_scenes`` writes).
        classes, train_classes: as :class:`PanopticDataset`'s.

    Raises:
        ConfigError: an unknown name.
        DataError: something that is missing or cannot be used.
    """
    base = Path(root)
    places: tuple[str, ...] = (pngs,)
    if name:
        if name not in PANOPTIC_SETS:
            near = difflib.get_close_matches(name, PANOPTIC_SETS, n=1, cutoff=0.4)
            hint = f"; did you mean '{near[0]}'?" if near else "."
            raise ConfigError(f"Unknown panoptic data set '{name}': expected one of {', '.join(PANOPTIC_SETS)}{hint}")
        known = PANOPTIC_SETS[name]
        base = base / known.folder if (base / known.folder).is_dir() else base
        images, annotations, places = known.images, known.json, known.pngs
    folder = next((base / place for place in places if (base / place).is_dir()), base / places[0])
    missing = [f"folder {path}" for path in (base / images, folder) if not path.is_dir()]
    if not (base / annotations).is_file():
        missing.append(f"file {base / annotations}")
    if missing:
        raise DataError(f"{known.title if name else 'The panoptic data'} is not whole: missing {', '.join(missing)}.")
    return PanopticDataset(read_annotations(base / annotations), base / images, folder, classes, 255, train_classes)
