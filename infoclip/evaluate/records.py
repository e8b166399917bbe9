"""What an evaluation has counted so far, image by image, in a file that outlives the process.

``NAME.images.jsonl`` has one line an image: its number and file, its labelled pixels and those that are right, the
cells of its confusion matrix, and the seconds of reading, predicting and counting. A process appends a line when an
image is done (several processes to a file each), so that at most the image in work is lost when it is killed. The
first line says what the counts depend on; those of another model, data or settings are not taken. A panoptic evaluation
also keeps each image's matched, spurious and missed segments.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO, cast

import torch

from infoclip.errors import StorageError
from infoclip.evaluate.metrics import PairCounts
from infoclip.evaluate.panoptic import PanopticCounts

__all__ = ["ImageRecord", "Records"]

_LONGEST_LINE = 64 * 2**20


@dataclass(frozen=True)
class ImageRecord:
    """The counts of one image."""

    index: int
    file: str
    pixels: int
    """Labelled pixels."""
    right: int
    """Labelled pixels that are right."""
    pairs: PairCounts | None
    """None once they are added up."""
    segments: PanopticCounts | None = None
    """The same; only of panoptic evaluations."""

    @property
    def accuracy(self) -> float:
        return self.right / self.pixels if self.pixels else 1.0


class Records:
    """The records of one evaluation in a folder.

    Args:
        folder, name: the file is ``folder / f"{name}.images.jsonl"``.
        key: what the counts depend on; plain values.
        images: number of images.
        classes: number of classes in the confusion matrix.
        categories: number of categories of segments; 0 for records without segments.
    """

    def __init__(
        self, folder: Path, name: str, key: dict[str, Any], images: int, classes: int, categories: int = 0
    ) -> None:
        self.folder, self.name, self.key = folder, name, json.loads(json.dumps(key))
        self._images, self._classes, self._categories = images, classes, categories
        self._file: TextIO | None = None

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.images.jsonl"

    def collect(self, add: Callable[[ImageRecord], None]) -> tuple[list[ImageRecord], str]:
        """Everything that is recorded, brought into one file; and what the earlier records differ in, if they do.

        Args:
            add: takes each image's record with its counts.

        Raises:
            StorageError: the folder cannot be written.
        """
        found: dict[int, ImageRecord] = {}
        differs = ""
        parts = sorted(p for p in (self.path, *self.folder.glob(f"{self._pattern()}.images.*.jsonl")) if p.is_file())
        temporary = self.folder / f".{self.name}.images.{os.getpid()}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("w", encoding="utf-8") as out:
                out.write(json.dumps({"key": self.key}) + "\n")
                for part in parts:
                    lines = _lines(part)
                    key = _parsed(next(lines, "")).get("key")
                    if key != self.key:
                        differs = differs or _difference(key, self.key)
                        continue
                    for line in lines:
                        record = self._read(line)
                        if record is not None and record.index not in found:
                            add(record)
                            found[record.index] = replace(record, pairs=None, segments=None)
                            out.write(line + "\n")
            temporary.replace(self.path)
            for part in parts:
                if part != self.path:
                    part.unlink()
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise self._fault(error) from error
        return list(found.values()), differs

    def open(self, rank: int) -> None:
        """Start a file for what this process does; replaces one that an earlier run left."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = (self.folder / f"{self.name}.images.{rank}.jsonl").open("w", encoding="utf-8")
            self._file.write(json.dumps({"key": self.key}) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._fault(error) from error

    def append(self, record: ImageRecord, seconds: tuple[float, float, float]) -> None:
        """Add one image: the line is handed to the system at once."""
        assert self._file is not None
        assert record.pairs is not None
        line = {
            "image": record.index,
            "file": record.file,
            "pixels": record.pixels,
            "right": record.right,
            "cells": record.pairs.cells.tolist(),
            "counts": record.pairs.counts.tolist(),
            "seconds": [round(s, 4) for s in seconds],
        }
        if record.segments is not None:
            line["segments"] = record.segments._asdict()
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._fault(error) from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _pattern(self) -> str:
        return "".join(f"[{c}]" if c in "*?[" else c for c in self.name)

    def _fault(self, error: OSError) -> StorageError:
        return StorageError(f"Cannot write {self.path}: {error.strerror or error}; free some space.")

    def _read(self, line: str) -> ImageRecord | None:
        """The record of a line; None for one that was cut off or does not hold together."""
        data = _parsed(line)
        index, pixels, right = (cast(int, data.get(name)) for name in ("image", "pixels", "right"))
        cells, counts = _numbers(data.get("cells")), _numbers(data.get("counts"))
        if not all(type(n) is int for n in (index, pixels, right)) or cells is None or counts is None:
            return None
        if not 0 <= index < self._images or pixels < 0 or right < 0 or len(cells) != len(counts):
            return None
        if bool((cells >= (self._classes + 1) * self._classes).any()):
            return None
        segments = _segments(data.get("segments"), self._categories) if self._categories else None
        if self._categories and segments is None:
            return None
        return ImageRecord(index, str(data.get("file")), pixels, right, PairCounts(cells, counts), segments)


def _numbers(value: Any) -> torch.Tensor | None:
    """A list of whole numbers from 0 on; None for anything else."""
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n < 2**62 for n in value):
        return None
    return torch.tensor(value, dtype=torch.int64)


def _segments(value: Any, categories: int) -> PanopticCounts | None:
    """The segments of a record; None for what does not hold together."""

    def known(category: Any) -> bool:
        return type(category) is int and 0 <= category < categories

    def match(pair: Any) -> bool:
        return isinstance(pair, list) and len(pair) == 2 and known(pair[0]) and type(pair[1]) is float

    parts: list[Any] = [value.get(name) for name in PanopticCounts._fields] if isinstance(value, dict) else []
    if not parts or not all(isinstance(part, list) for part in parts):
        return None
    matched, spurious, missed = parts
    if not all(map(match, matched)) or not all(map(known, [*spurious, *missed])):
        return None
    return PanopticCounts([(c, iou) for c, iou in matched], spurious, missed)


def _lines(path: Path) -> Iterator[str]:
    """The whole lines of a file; the last one counts only if it ends."""
    with path.open(encoding="utf-8", errors="replace") as file:
        while line := file.readline(_LONGEST_LINE):
            if not line.endswith("\n"):
                return
            yield line[:-1]


def _parsed(line: str) -> dict[str, Any]:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _difference(old: Any, new: dict[str, Any]) -> str:
    if not isinstance(old, dict):
        return "form"
    return next((name for name in new if old.get(name) != new[name]), "settings")
