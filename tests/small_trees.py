"""Small trees in the layouts and file formats of the published data sets, with labels that are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import scipy.io
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco

from infoclip.data.classes import load_label_map

__all__ = ["write_tree"]

NAMES = {
    "coco-train": ("000000000009", "000000000025"),
    "coco-val": ("000000000139", "000000000285"),
    "a150": ("ADE_val_00000001", "ADE_val_00000002"),
    "a847": ("ADE_val_00000001", "ADE_val_00000002"),
    "pc59": ("2008_000002", "2008_000003"),
    "pc459": ("2008_000002", "2008_000003"),
    "pas20": ("2007_000033", "2007_000042"),
    "pas20b": ("2007_000033", "2007_000042"),
}


def write_tree(name: str, root: Path, size: tuple[int, int] = (40, 56)) -> list[NDArray[np.int64]]:
    """Write two pairs of the data set in its original form; returns the labels that must be read, by pair.

    One image is a greyscale JPEG, one (of A-150) CMYK, one (of COCO) turned by its EXIF orientation.
    """
    rng = np.random.default_rng(sum(map(ord, name)))
    write = {"pc59": _context_59, "pc459": _context_459, "a847": _ade_full}.get(name)
    if write is not None:
        return write(root, rng, size)
    folder, images, masks = {
        "coco-train": ("coco-stuff", "images/train2017", "annotations/train2017"),
        "coco-val": ("coco-stuff", "images/val2017", "annotations/val2017"),
        "a150": ("ADEChallengeData2016", "images/validation", "annotations/validation"),
    }.get(name, ("VOCdevkit/VOC2012", "JPEGImages", "SegmentationClassAug"))
    base, expected = root / folder, []
    for i, stem in enumerate(NAMES[name]):
        turned = name.startswith("coco") and i == 1
        _image(base / images / f"{stem}.jpg", rng, size, {0: "L", 1: "CMYK" if name == "a150" else "RGB"}[i], turned)
        if name.startswith("coco"):
            values = rng.choice([0, 1, 12, 91, 181, 255, 11], size)  # 11 and 12 are ids that COCO-Stuff does not use
            table = {v: load_label_map("coco_stuff_171").get(int(v), 255) for v in np.unique(values)}
        elif name == "a150":
            values = rng.integers(0, 151, size)
            table = {v: v - 1 if v else 255 for v in range(151)}
        else:
            values = rng.choice([*range(21), 255], size)
            table = {v: v - 1 for v in range(1, 21)} | {0: 20 if name == "pas20b" else 255, 255: 255}
        _mask(base / masks / f"{stem}.png", values, palette=name.startswith("pas"))
        expected.append(np.vectorize(lambda v, t=table: t[v])(values).astype(np.int64))
    if name.startswith("pas"):
        (base / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (base / "ImageSets/Segmentation/val.txt").write_text("\n".join(NAMES[name]) + "\n")
    return expected


def _ade_full(root: Path, rng: np.random.Generator, size: tuple[int, int]) -> list[NDArray[np.int64]]:
    """_seg.png with the object index in R and G, below a folder a scene; the blue channel holds instances."""
    ids = load_label_map("ade20k_847")
    expected = []
    for stem, scene in zip(NAMES["a847"], ("urban/street", "home_or_hotel/bedroom"), strict=True):
        folder = root / "ADE20K_2021_17_01/images/ADE/validation" / scene
        _image(folder / f"{stem}.jpg", rng, size)
        objects = rng.choice([*list(ids)[:30], 0, 3687], size)  # 0: nothing; 3687: an object outside the 847
        colours = np.stack([objects // 256 * 10 + rng.integers(0, 9, size), objects % 256, rng.integers(0, 255, size)])
        Image.fromarray(colours.transpose(1, 2, 0).astype(np.uint8)).save(folder / f"{stem}_seg.png")
        expected.append(np.vectorize(lambda v: ids.get(int(v), 65535))(objects).astype(np.int64))
    (root / "ADE20K_2021_17_01/index_ade20k.pkl").write_bytes(b"never read")
    return expected


def _context_459(root: Path, rng: np.random.Generator, size: tuple[int, int]) -> list[NDArray[np.int64]]:
    base = root / "VOCdevkit/VOC2010"
    (base / "trainval").mkdir(parents=True, exist_ok=True)
    expected = []
    for stem, compressed in zip(NAMES["pc459"], (False, True), strict=True):
        _image(base / f"JPEGImages/{stem}.jpg", rng, size)
        values = rng.integers(1, 461, size).astype(np.uint16)  # 460 stands for an unknown object
        scipy.io.savemat(base / f"trainval/{stem}.mat", {"LabelMap": values}, do_compression=compressed)
        expected.append(values.astype(np.int64) - 1)
    (base / "pascalcontext_val.txt").write_text("\n".join(NAMES["pc459"]) + "\n")
    return expected


def _context_59(root: Path, rng: np.random.Generator, size: tuple[int, int]) -> list[NDArray[np.int64]]:
    """Compressed and plain runs; later masks lie over earlier ones; a training image that must not be read."""
    base = root / "VOCdevkit/VOC2010"
    ids = load_label_map("pascal_context_59")
    images, entries, expected = [], [], []
    for number, stem in enumerate(NAMES["pc59"], start=2008_000_002):
        _image(base / f"JPEGImages/{stem}.jpg", rng, size)
        images.append({"file_name": f"{stem}.jpg", "image_id": number, "height": size[0], "width": size[1],
                       "phase": "val"})  # fmt: skip
        labels = np.full(size, 255, dtype=np.int64)
        for category in [*rng.choice(list(ids), 5), 1]:  # 1: a category outside the 59
            part = rng.random(size) < 0.4
            runs = coco.encode(np.asfortranarray(part.astype(np.uint8)))
            code: dict[str, object] = {"size": list(size), "counts": runs["counts"].decode()}
            if category == 1:
                flat = part.T.ravel()
                ends = np.flatnonzero(np.diff(flat.astype(int))) + 1
                lengths = np.diff([0, *ends, flat.size]).tolist()
                code["counts"] = [0, *lengths] if flat[0] else lengths
            entries.append({"image_id": number, "category_id": int(category), "segmentation": code})
            labels[part] = ids.get(int(category), 255)
        expected.append(labels)
    images.append({"file_name": "2008_000019.jpg", "image_id": 1, "height": 3, "width": 3, "phase": "train"})
    (base / "trainval_merged.json").write_text(json.dumps({"images": images, "annos_segmentation": entries}))
    return expected


def _image(
    path: Path, rng: np.random.Generator, size: tuple[int, int], mode: str = "RGB", turned: bool = False
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = size[::-1] if turned else size
    picture = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).convert(mode)
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6
    picture.save(path, exif=exif)


def _mask(path: Path, values: NDArray[np.int64], palette: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(values.astype(np.uint8), mode="P" if palette else "L")
    if palette:
        picture.putpalette([i * 7 % 256 for i in range(768)])
    picture.save(path)
