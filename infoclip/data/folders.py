"""Any folder of images beside any folder of masks, paired by name: the way to train on your own data.

``images/park/0001.jpg`` goes with ``masks/park/0001.png``. A mask is one channel of class indices: a palette PNG, an
8-bit or 16-bit PNG or TIFF. Every fault is a :class:`~infoclip.errors.DataError` that names the file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from infoclip.data.classes import check_classes, select_classes
from infoclip.data.files import IMAGE_SUFFIXES, MASK_SUFFIXES, is_rotated, read_image, read_mask
from infoclip.errors import DataError

__all__ = ["FolderDataset", "PairDataset", "list_files", "size_message"]

_LARGEST_VALUE = 1_000_000
"""Annotation values beyond this are taken for a mistake: the table from value to class is as long as the largest."""


class PairDataset(Dataset[dict[str, Any]]):
    """Pairs of an image file and a mask file.

    A sample is ``{"image": tv_tensors.Image uint8 [3, H, W] RGB, "mask": tv_tensors.Mask int64 [H, W], "file": str}``;
    mask values index :attr:`classes`, or are ``ignore_index``.

    Args:
        pairs: image and mask files.
        classes: names of the classes that the masks' values index.
        ignore_index: mask value that carries no label.
        label_map: annotation value -> index in ``classes``; values that it does not name carry no label. Without it a
            value is the index, and a value out of range is an error.
        train_classes: the classes to keep, for training on seen classes only; pixels of the others become
            ``ignore_index``, and mask values index this list instead.
        read: from a mask file to its values, int64 [H, W].
        largest_value: with ``label_map``: larger annotation values (except ``ignore_index``) are an error.

    Raises:
        DataError: an unknown or repeated class; while reading, a file that cannot be used.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Path, Path]],
        classes: Sequence[str],
        ignore_index: int = 255,
        label_map: Mapping[int, int] | None = None,
        train_classes: Sequence[str] | None = None,
        read: Callable[[Path], Tensor] = read_mask,
        largest_value: int | None = None,
    ) -> None:
        self.source_classes = check_classes(classes)
        self.ignore_index = ignore_index
        if label_map is None and ignore_index < len(self.source_classes):
            raise DataError(
                f"The ignored mask value {ignore_index} is also the index of the class "
                f"'{self.source_classes[ignore_index]}'; choose a value of {len(self.source_classes)} or more "
                "(65535 with 16-bit masks)."
            )
        keep = list(range(len(self.source_classes)))
        self.classes = self.source_classes
        if train_classes is not None:
            self.classes = check_classes(train_classes, "the list of training classes")
            keep = select_classes(self.source_classes, self.classes)
        self._allowed = len(self.source_classes) if label_map is None else None
        if label_map is not None and largest_value is not None:
            self._allowed = largest_value + 1
        self._table = _lookup_table(len(self.source_classes), keep, ignore_index, label_map)
        self.pairs = list(pairs)
        self.read = read

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image_path, mask_path = self.pairs[index]
        image, raw = self.load_pair(image_path, mask_path)
        if raw.shape != image.shape[1:]:
            raise DataError(size_message(image_path, mask_path, image, raw))
        return {"image": tv_tensors.Image(image), "mask": tv_tensors.Mask(self._labels(raw, mask_path)),
                "file": str(image_path)}  # fmt: skip

    def load_pair(self, image: Path, mask: Path) -> tuple[Tensor, Tensor]:  # [3, H, W], [H, W]
        """The image and its mask's values as they are stored."""
        return read_image(image), self.read(mask)

    def _labels(self, raw: Tensor, path: Path) -> Tensor:  # [H, W] -> [H, W]
        if self._allowed is not None:
            wrong = ((raw >= self._allowed) | (raw < 0)) & (raw != self.ignore_index)
            if bool(wrong.any()):
                value = int(raw[wrong][0])
                raise DataError(
                    f"The mask {path} holds the label {value} at {int(wrong.sum())} pixels; with "
                    f"{len(self.source_classes)} classes expected 0 to {self._allowed - 1}, or {self.ignore_index} for "
                    "no label: mend the mask, or pass the right class list, ignore_index or label map."
                )
        last = len(self._table) - 1
        return self._table[raw.masked_fill(raw < 0, last).clamp_(max=last)]


class FolderDataset(PairDataset):
    """Images and masks of two folders, paired by path without suffix; images decide, spare masks are left alone.

    Args:
        images: folder of images (searched with its sub-folders).
        masks: folder of masks with the same sub-folders and names.
        classes, ignore_index, label_map, train_classes: as :class:`PairDataset`'s.

    Raises:
        DataError: a missing or empty folder, an image without mask, two files of one name, or an unknown or repeated
            class.
    """

    def __init__(
        self,
        images: str | Path,
        masks: str | Path,
        classes: Sequence[str],
        ignore_index: int = 255,
        label_map: Mapping[int, int] | None = None,
        train_classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__([], classes, ignore_index, label_map, train_classes)
        self.pairs = _pair(Path(images), Path(masks))


def _lookup_table(count: int, keep: Sequence[int], ignore: int, label_map: Mapping[int, int] | None) -> Tensor:
    """Mask value -> training label, [V]; its last entry is ``ignore``, for every value beyond."""
    final = {source: new for new, source in enumerate(keep)}
    mapping = {i: i for i in range(count)} if label_map is None else label_map
    for value, index in mapping.items():
        if not 0 <= value <= _LARGEST_VALUE or not 0 <= index < count:
            raise DataError(
                f"The label map sends {value} to class {index}; expected values from 0 to {_LARGEST_VALUE:,} and "
                f"classes from 0 to {count - 1}."
            )
    table = torch.full((max(mapping, default=0) + 2,), ignore, dtype=torch.int64)
    for value, index in mapping.items():
        table[value] = final.get(index, ignore)
    if label_map is None and ignore < len(table):
        table[ignore] = ignore
    return table


def _pair(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    by_name, masks_by_name = list_files(images, IMAGE_SUFFIXES, "image"), list_files(masks, MASK_SUFFIXES, "mask")
    missing = [path for name, path in by_name.items() if name not in masks_by_name]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(by_name)} images in {images} have no mask in {masks}, first {missing[0]}; "
            f"expected a mask of the same name ({', '.join(MASK_SUFFIXES)})."
        )
    return [(path, masks_by_name[name]) for name, path in sorted(by_name.items())]


def list_files(folder: Path, suffixes: tuple[str, ...], kind: str) -> dict[str, Path]:
    """Relative path without suffix -> file, of a folder and its sub-folders (links to folders are not followed).

    Raises:
        DataError: no such folder, none of the wanted files in it, or two of one name.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder of {kind}s {folder}; check data.root, data.images and data.masks.")
    found: dict[str, Path] = {}
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(parent) / name
            if path.suffix.lower() not in suffixes or name.startswith("."):
                continue
            key = path.relative_to(folder).with_suffix("").as_posix()
            if key in found:
                raise DataError(f"Two {kind}s have one name: {found[key]} and {path}; remove or rename one.")
            found[key] = path
    if not found:
        raise DataError(f"There is no {kind} in {folder}; expected {', '.join(suffixes)} files.")
    return found


def size_message(image_path: Path, mask_path: Path, image: Tensor, mask: Tensor) -> str:
    """What is wrong with a mask that has another size than its image, and why that may be."""
    height, width = image.shape[1:]
    text = (
        f"The mask {mask_path} is {mask.shape[1]}x{mask.shape[0]} pixels, its image {image_path} {width}x{height}; "
        "expected the same size"
    )
    if is_rotated(image_path) and tuple(mask.shape) == (width, height):
        return text + ": the image has an EXIF rotation, which is applied, so draw the mask on the upright picture."
    return text + "."
