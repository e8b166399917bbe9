"""The data sets of the papers, read from the folders that users of the published code already have.

Below one root (``DETECTRON2_DATASETS`` of the published code) each data set lies as it was downloaded, or converted
beside that in ``annotations_detectron2``. Both are read and give the same labels; where both are there the converted
masks are taken. The facts (folders, values, sizes) are those of CAT-Seg's ``datasets`` folder and of the data sets.

============ ============================================================= ============================================
name         original                                                      converted
============ ============================================================= ============================================
coco-train,  coco-stuff/{images,annotations}/{train2017,val2017}           coco-stuff/annotations_detectron2/...
coco-val
a150         ADEChallengeData2016/{images,annotations}/validation          .../annotations_detectron2/validation
a847         ADE20K_2021_17_01/images/ADE/validation/**/*{.jpg,_seg.png}   .../{images,annotations}_detectron2/...
pc59         VOCdevkit/VOC2010/{JPEGImages,trainval_merged.json}           .../annotations_detectron2/pc59_val
pc459        VOCdevkit/VOC2010/{JPEGImages,trainval/*.mat}                 .../annotations_detectron2/pc459_val
pas20        VOCdevkit/VOC2012/{JPEGImages,SegmentationClassAug}           .../annotations_detectron2/val
pas20b       as pas20                                                      .../annotations_detectron2_bg/val
============ ============================================================= ============================================

``index_ade20k.pkl`` is not read: the ``_seg.png`` files hold the object indices, and unpickling runs code.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from infoclip.data.classes import load_classes, load_label_map
from infoclip.data.files import MAX_PIXELS, below, decode_rle, is_file, read_ade_objects, read_label_map_mat, read_mask
from infoclip.data.folders import PairDataset
from infoclip.errors import ConfigError, DataError, InfoclipWarning, StorageError
from infoclip.progress import tracked

__all__ = ["BENCHMARKS", "Benchmark", "Form", "convert_benchmark", "data_cache_dir", "find_forms", "get_benchmark",
           "open_benchmark", "open_form"]  # fmt: skip

ADE_FULL_SIDE = 512
"""A-847 is evaluated on images whose sides are both longer than this with the shorter one brought to it."""


@dataclass(frozen=True)
class Benchmark:
    """One data set and where its parts lie below the root."""

    name: str
    title: str
    classes: str
    """The shipped class list."""
    folder: str
    images: str
    masks: str
    converted: str
    count: int
    """Images of the published split."""
    largest: int
    """Largest value of the original annotation (255 besides, where it is 8-bit)."""
    ignore: int = 255
    """Value without a label in the converted masks."""
    suffix: str = ".png"
    """Of the converted masks."""
    get: tuple[str, ...] = ()
    """Where the parts are to be had."""


_COCO = (
    "images: https://cocodataset.org (train2017.zip, val2017.zip)",
    "annotations: https://github.com/nightrome/cocostuff (stuffthingmaps_trainval2017.zip)",
)
_CONTEXT = "images: http://host.robots.ox.ac.uk/pascal/VOC/voc2010 (VOCtrainval_03-May-2010.tar)"
_VOC = (
    "images and val.txt: http://host.robots.ox.ac.uk/pascal/VOC/voc2012 (VOCtrainval_11-May-2012.tar)",
    "masks: SegmentationClassAug.zip, linked from https://github.com/kazuto1011/deeplab-pytorch (datasets/voc12)",
)
BENCHMARKS = {
    b.name: b
    for b in (
        *(Benchmark(f"coco-{split[:-4]}", f"COCO-Stuff {split}", "coco_stuff_171", "coco-stuff", f"images/{split}",
                    f"annotations/{split}", f"annotations_detectron2/{split}", count, 181, get=_COCO)
          for split, count in (("train2017", 118_287), ("val2017", 5_000))),
        Benchmark("a150", "A-150", "ade20k_150", "ADEChallengeData2016", "images/validation", "annotations/validation",
                  "annotations_detectron2/validation", 2_000, 150,
                  get=("http://sceneparsing.csail.mit.edu (ADEChallengeData2016.zip)",)),
        Benchmark("a847", "A-847", "ade20k_847", "ADE20K_2021_17_01", "images/ADE/validation", "images/ADE/validation",
                  "annotations_detectron2/validation", 2_000, 25 * 256 + 255, 65535, ".tif",
                  get=("https://groups.csail.mit.edu/vision/datasets/ADE20K (request the full data set of 2021)",)),
        Benchmark("pc59", "PC-59", "pascal_context_59", "VOCdevkit/VOC2010", "JPEGImages", "trainval_merged.json",
                  "annotations_detectron2/pc59_val", 5_105, 459,
                  get=(_CONTEXT, "masks: trainval_merged.json of PASCAL in Detail, https://sites.google.com/view/pasd")),
        Benchmark("pc459", "PC-459", "pascal_context_459", "VOCdevkit/VOC2010", "JPEGImages", "trainval",
                  "annotations_detectron2/pc459_val", 5_105, 460, 459, ".tif",
                  get=(_CONTEXT, "masks: https://www.cs.stanford.edu/~roozbeh/pascal-context (trainval.tar.gz)")),
        Benchmark("pas20", "PAS-20", "voc_20", "VOCdevkit/VOC2012", "JPEGImages", "SegmentationClassAug",
                  "annotations_detectron2/val", 1_449, 20, get=_VOC),
        Benchmark("pas20b", "PAS-20b", "voc_20b", "VOCdevkit/VOC2012", "JPEGImages", "SegmentationClassAug",
                  "annotations_detectron2_bg/val", 1_449, 20, get=_VOC),
    )
}  # fmt: skip
"""Every data set by its name."""


@dataclass
class Form:
    """One form in which a data set may lie below a root, and what was found of it."""

    kind: Literal["converted", "original"]
    images: Path
    masks: Path
    pairs: list[tuple[Path, Path]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """What is not there, one line each; empty where the form can be used."""

    @property
    def found(self) -> bool:
        return bool(self.pairs)


def get_benchmark(name: str) -> Benchmark:
    """The data set of a name.

    Raises:
        ConfigError: an unknown name, with the nearest one.
    """
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name, BENCHMARKS, n=1, cutoff=0.5)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        raise ConfigError(f"Unknown data set '{name}': expected one of {', '.join(BENCHMARKS)}{hint}")
    return BENCHMARKS[name]


def find_forms(name: str, root: str | Path) -> list[Form]:
    """Both forms of a data set, the converted one first, with the pairs that are there.

    Args:
        root: the folder above the data set's own, or that folder itself.

    Raises:
        ConfigError: an unknown name.
        DataError: a list of files that cannot be read, or that names files outside its folder.
    """
    return [_find(get_benchmark(name), root, kind) for kind in ("converted", "original")]


def _find(benchmark: Benchmark, root: str | Path, kind: Literal["converted", "original"]) -> Form:
    base = Path(root) / benchmark.folder
    parts = (benchmark.images, benchmark.masks, benchmark.converted)
    if not base.is_dir() and any((Path(root) / Path(part).parts[0]).exists() for part in parts):
        base = Path(root)  # the data set's own folder was named
    if kind == "original":
        form = Form(kind, base / benchmark.images, base / benchmark.masks)
        _FINDERS.get(benchmark.name, _find_folders)(benchmark, base, form)
        return form
    full = benchmark.name == "a847"
    form = Form(kind, base / benchmark.images, base / benchmark.converted)
    if full and (base / "images_detectron2/validation").is_dir():
        form.images = base / "images_detectron2/validation"
    if form.masks.is_dir():
        images = _by_stem(form.images, nested=full)
        _pair(form, images, {p.stem: p for p in _entries(form.masks, benchmark.suffix)}, None)
    else:
        form.missing.append(f"folder {form.masks}")
    return form


def open_benchmark(
    name: str,
    root: str | Path,
    train_classes: Sequence[str] | None = None,
    *,
    form: Literal["auto", "converted", "original"] = "auto",
    progress: bool = False,
) -> PairDataset:
    """The images and labels of a data set, from whichever form holds more; converted if equal.

    The masks of ``trainval_merged.json`` (pc59) are unpacked once, into :func:`data_cache_dir`; everything else is
    read as it is. A part of a data set is read with a warning, since its scores are not the benchmark's.

    Args:
        root: the folder above the data set's own, or that folder itself.
        train_classes: as :class:`~infoclip.data.folders.PairDataset`'s.
        form: take this form only.
        progress: show a bar while masks are unpacked.

    Raises:
        ConfigError: an unknown name.
        DataError: nothing to use, with what is missing.
    """
    benchmark = get_benchmark(name)
    forms: list[Form] = []
    for kind in ("converted", "original") if form == "auto" else (form,):
        forms.append(_find(benchmark, root, kind))
        if len(forms[-1].pairs) == benchmark.count and not forms[-1].missing:
            break  # whole: the other form need not be looked at
    # A conversion that was stopped holds fewer pairs than the original; the first of the fullest is taken.
    usable = max((f for f in forms if f.found and not f.missing), key=lambda f: len(f.pairs), default=None)
    if usable is None:
        partly = next((f for f in forms if f.found), None)
        what = "; or ".join(", ".join(f.missing[:3]) for f in forms)
        if partly is not None:
            what = ", ".join(partly.missing[:3]) + (" and more" if len(partly.missing) > 3 else "")
        raise DataError(
            f"{benchmark.title} is not whole below {root}: missing {what}; 'infoclip data check {name} --root {root}' "
            "says what there is and where to get the rest."
        )
    if len(usable.pairs) != benchmark.count:
        warnings.warn(
            f"{benchmark.title} has {len(usable.pairs):,} of its {benchmark.count:,} images below {root}; scores on a "
            "part are not the benchmark's.",
            InfoclipWarning,
            stacklevel=2,
        )
    return open_form(benchmark, usable, train_classes, progress=progress)


def open_form(
    benchmark: Benchmark, form: Form, train_classes: Sequence[str] | None = None, *, progress: bool = False
) -> PairDataset:
    """The dataset over one form's pairs; see :func:`open_benchmark`."""
    classes = load_classes(benchmark.classes)
    pairs, read, label_map, largest = form.pairs, read_mask, None, None
    kind: type[PairDataset] = PairDataset
    if form.kind == "original":
        largest = benchmark.largest
        if benchmark.name == "pc59":
            pairs, largest = _unpack_context(form, progress), None
        elif benchmark.name == "pc459":
            read = read_label_map_mat
        elif benchmark.name == "a847":
            read = read_ade_objects
        if benchmark.name != "pc59":
            label_map = load_label_map(benchmark.classes)
    if benchmark.name == "a847":
        kind = _AdeFull if form.kind == "original" else _AdeFullConverted
    return kind(pairs, classes, benchmark.ignore, label_map, train_classes, read, largest)


def convert_benchmark(name: str, root: str | Path, *, progress: bool = True) -> tuple[Path, int, int]:
    """Write a data set's converted masks beside the original ones, as the published code's preparation leaves them.

    A mask appears when it is complete; one that is there is kept, so that a run that was stopped goes on where it was.

    Returns:
        The folder, how many masks were written, and how many were there.

    Raises:
        DataError: the original is not whole, or one of its files cannot be used (what was written before stays).
        StorageError: the folder cannot be written.
    """
    benchmark = get_benchmark(name)
    converted, original = find_forms(name, root)
    if original.missing or not original.found:
        raise DataError(
            f"{benchmark.title} cannot be converted: missing {', '.join(original.missing[:3])} below {root}."
        )
    folder = converted.masks
    dataset = open_form(benchmark, original, progress=progress)
    wide = benchmark.suffix == ".tif"
    images = original.images.parents[2] / "images_detectron2/validation" if name == "a847" else None
    made = kept = 0
    for index in tracked(range(len(dataset)), f"converting {benchmark.title}", progress):
        target = folder / f"{dataset.pairs[index][0].stem}{benchmark.suffix}"
        picture = images / f"{target.stem}.jpg" if images is not None else None
        if target.exists() and (picture is None or picture.exists()):
            kept += 1
            continue
        sample = dataset[index]
        if picture is not None:  # before the mask, which says that the pair is done; quality as published
            _write_picture(picture, sample["image"].permute(1, 2, 0).numpy(), "JPEG")
        labels = sample["mask"].numpy().astype(np.uint16 if wide else np.uint8)
        _write_picture(target, labels, "TIFF" if wide else "PNG")
        made += 1
    return folder, made, kept


def data_cache_dir() -> Path:
    """Where unpacked masks are kept: ``data`` below ``$INFOCLIP_CACHE``, else below the user's cache folder."""
    from infoclip.clip.text_bank import text_cache_dir

    return text_cache_dir() / "data"


# What lies where


def _find_folders(benchmark: Benchmark, base: Path, form: Form) -> None:
    """Masks of one folder and images of another, of the same names."""
    for what in (form.images, form.masks):
        if not what.is_dir():
            form.missing.append(f"folder {what}")
    if not form.missing:
        images = _by_stem(form.images)
        _pair(form, images, {p.stem: p for p in _entries(form.masks, ".png")}, sorted(images))


def _find_ade_full(benchmark: Benchmark, base: Path, form: Form) -> None:
    if not form.images.is_dir():
        form.missing.append(f"folder {form.images}")
        return
    images = _by_stem(form.images, nested=True)
    masks = {stem: path.with_name(f"{stem}_seg.png") for stem, path in images.items()}
    _pair(form, images, {stem: path for stem, path in masks.items() if is_file(path)}, sorted(images))
    if not images:
        form.missing.append(f"images in {form.images}")


def _find_listed(benchmark: Benchmark, base: Path, form: Form) -> None:
    """Images and masks that a list names: VOC's val.txt, and Pascal Context's, which is shipped."""
    for what in (form.images, form.masks):
        if not what.is_dir():
            form.missing.append(f"folder {what}")
    suffix = ".mat" if benchmark.name == "pc459" else ".png"
    own = base / ("pascalcontext_val.txt" if benchmark.name == "pc459" else "ImageSets/Segmentation/val.txt")
    if not own.is_file() and benchmark.name != "pc459":
        form.missing.append(f"file {own}")
    if form.missing:
        return
    if own.is_file():
        names = _read_list(own)
    else:
        shipped = resources.files("infoclip") / "data" / "classes" / "pascal_context_val.txt"
        names = shipped.read_text(encoding="utf-8").split()
    images = {name: below(form.images, f"{name}.jpg", own) for name in names}
    masks = {name: below(form.masks, f"{name}{suffix}", own) for name in names}
    there = [{k: v for k, v in found.items() if is_file(v)} for found in (images, masks)]
    _pair(form, there[0], there[1], names)


def _find_context_json(benchmark: Benchmark, base: Path, form: Form) -> None:
    """The validation images of trainval_merged.json; masks are unpacked from it when the data set is opened."""
    if not form.images.is_dir():
        form.missing.append(f"folder {form.images}")
    if not form.masks.is_file():
        form.missing.append(f"file {form.masks}")
    if form.missing:
        return
    cached = _context_cache(form.masks)
    if (cached / "complete.json").is_file():
        names = [p.stem for p in _entries(cached, ".png")]
    else:
        names = [Path(str(image["file_name"])).stem for image in _context_images(_read_context(form.masks), form.masks)]
    images = {name: below(form.images, f"{name}.jpg", form.masks) for name in names}
    there = {name: path for name, path in images.items() if is_file(path)}
    _pair(form, there, {name: form.masks for name in names}, names)


_FINDERS: dict[str, Callable[[Benchmark, Path, Form], None]] = {
    "a847": _find_ade_full,
    "pc59": _find_context_json,
    "pc459": _find_listed,
    "pas20": _find_listed,
    "pas20b": _find_listed,
}


def _pair(form: Form, images: dict[str, Path], masks: dict[str, Path], names: Sequence[str] | None) -> None:
    """Fill the pairs; ``names`` are those that must be there, by default those of the masks."""
    wanted = sorted(masks) if names is None else names
    form.pairs = [(images[name], masks[name]) for name in wanted if name in images and name in masks]
    for kind, there, where in (("images", images, form.images), ("masks", masks, form.masks)):
        lost = [name for name in wanted if name not in there]
        if lost:
            form.missing.append(f"{len(lost):,} of {len(wanted):,} {kind} in {where} (first {lost[0]})")
    if not wanted:
        form.missing.append(f"masks in {form.masks}")


def _entries(folder: Path, suffix: str) -> list[Path]:
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.name.endswith(suffix) and not e.name.startswith(".")]
    return [folder / name for name in sorted(names)]


def _by_stem(folder: Path, nested: bool = False) -> dict[str, Path]:
    if not folder.is_dir():
        return {}
    if not nested:
        return {p.stem: p for p in _entries(folder, ".jpg")}
    walked = (Path(parent) / name for parent, _, names in os.walk(folder) for name in names if name.endswith(".jpg"))
    return {path.stem: path for path in sorted(walked)}


def _read_list(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read the list {path}: {getattr(error, 'strerror', None) or 'not text'}.") from error
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


#


class _AdeFull(PairDataset):
    """Image and object indices, both brought to the published size (as OpenCV's linear and nearest do it)."""

    def load_pair(self, image: Path, mask: Path) -> tuple[Tensor, Tensor]:
        pixels, values = super().load_pair(image, mask)
        if pixels.shape[1:] == values.shape:  # a pair of different sizes is refused as it is
            size = _ade_size(*values.shape)
            values = F.interpolate(values[None, None].double(), size, mode="nearest")[0, 0].long()
            pixels = _shrink(pixels, size)
        return pixels, values


class _AdeFullConverted(PairDataset):
    """Converted masks with their images; an original image is brought to its mask's size."""

    def load_pair(self, image: Path, mask: Path) -> tuple[Tensor, Tensor]:
        pixels, values = super().load_pair(image, mask)
        if pixels.shape[1:] != values.shape and _ade_size(*pixels.shape[1:]) == tuple(values.shape):
            pixels = _shrink(pixels, tuple(values.shape))
        return pixels, values


def _ade_size(height: int, width: int) -> tuple[int, int]:
    side = ADE_FULL_SIDE
    if min(height, width) <= side:
        return height, width
    return (side, round(width / height * side)) if width >= height else (round(height / width * side), side)


def _shrink(image: Tensor, size: tuple[int, ...]) -> Tensor:  # [3, H, W] -> [3, h, w] uint8
    if tuple(image.shape[1:]) == size:
        return image
    scaled = F.interpolate(image[None].float(), size, mode="bilinear", align_corners=False)[0]
    return scaled.round().clamp_(0, 255).to(torch.uint8)


# PC-59


def _unpack_context(form: Form, progress: bool) -> list[tuple[Path, Path]]:
    """The pairs with masks unpacked from the json into the cache, one PNG an image; done once, resumable."""
    folder = _context_cache(form.masks)
    if not (folder / "complete.json").is_file():
        data = _read_context(form.masks)
        table = {**load_label_map("pascal_context_59")}
        images = {image["image_id"]: image for image in _context_images(data, form.masks)}
        masks: dict[Any, list[dict[str, Any]]] = {}
        for entry in data["annos_segmentation"]:
            if isinstance(entry, dict) and isinstance(entry.get("image_id"), (int, str)):
                masks.setdefault(entry["image_id"], []).append(entry)
        for key, image in tracked(images.items(), "unpacking PC-59", progress, total=len(images)):
            target = folder / f"{Path(image['file_name']).stem}.png"
            if not target.exists():
                _write_picture(target, _paint(image, masks.get(key, []), table, form.masks), "PNG")
        _write(folder / "complete.json", json.dumps({"images": len(images)}).encode())
    return [(image, folder / f"{image.stem}.png") for image, _ in form.pairs]


def _paint(
    image: dict[str, Any], entries: list[dict[str, Any]], table: dict[int, int], source: Path
) -> NDArray[np.uint8]:  # [H, W]
    """Labels of one image: later entries over earlier ones, pixels without one carry none."""
    height, width = image["height"], image["width"]
    labels = np.full((height, width), 255, dtype=np.uint8)
    for entry in entries:
        segmentation, category = entry.get("segmentation"), entry.get("category_id")
        if not isinstance(segmentation, dict) or not isinstance(category, int):
            raise DataError(f"An annotation of {image['file_name']} in {source} has no mask or category.")
        labels[decode_rle(segmentation, height, width, str(source))] = table.get(category, 255)
    return labels


def _read_context(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"Cannot read {path}: {error}; copy the file again.") from error
    if not isinstance(data, dict) or not all(isinstance(data.get(k), list) for k in ("images", "annos_segmentation")):
        raise DataError(f"{path} is not the json of PASCAL in Detail: expected 'images' and 'annos_segmentation'.")
    return data


def _context_images(data: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """The validation images, checked."""
    images = [image for image in data["images"] if isinstance(image, dict) and image.get("phase") == "val"]
    for image in images:
        height, width, name = image.get("height"), image.get("width"), image.get("file_name")
        sizes = isinstance(height, int) and isinstance(width, int) and 0 < height * width <= MAX_PIXELS and height > 0
        if not sizes or not isinstance(name, str) or "image_id" not in image:
            raise DataError(f"{path} holds an image without file_name, image_id or a usable size: {str(image)[:80]}.")
        if not isinstance(image["image_id"], (int, str)) or below(path.parent, name, path).name != name:
            raise DataError(f"{path} names the image {name!r}; expected plain file names.")
    return images


def _context_cache(path: Path) -> Path:
    stat = path.stat()
    key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    return data_cache_dir() / f"pc59-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


# Writing


def _write_picture(path: Path, pixels: NDArray[Any], kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    _write(path, buffer.getvalue())


def _write(path: Path, content: bytes) -> None:
    """A whole file or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(
            f"Cannot write {path}: {error.strerror or error}; free some space or choose another folder."
        ) from error
