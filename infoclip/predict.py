"""Segment picture files: an overlay with legend, a label picture, and JSON with the class list for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from infoclip.errors import DataError
from infoclip.progress import tracked

__all__ = ["Prediction", "output_names", "predict"]


@dataclass(frozen=True)
class Prediction:
    """What was written for one picture."""

    image: Path
    overlay: Path
    labels: Path
    json: Path
    shares: dict[str, float]
    """Share of the picture of each class that occurs, largest first."""


def predict(
    model_path: str | Path,
    images: Sequence[str | Path],
    classes: Sequence[str],
    out_dir: str | Path,
    *,
    device: str = "auto",
    progress: bool = False,
) -> list[Prediction]:
    """Segment pictures with any classes.

    For ``cat.jpg`` it writes ``cat.overlay.png``, ``cat.labels.png`` (the index into the class list, 8-bit for up to
    255 classes, else 16-bit) and ``cat.json`` (class list, shares, sizes, model). Pictures of one name from different
    folders get different names (see :func:`output_names`). All that can be wrong is checked before anything is written:
    every picture is opened once at the start.

    Args:
        model_path: a run or model directory.
        images: picture files.
        classes: names; see :meth:`infoclip.api.Model.segment`.
        out_dir: made when missing; files of the same names are replaced.
        device: ``auto``, ``cpu`` or ``cuda``.
        progress: show a progress bar.

    Raises:
        DataError: no picture, a missing or unreadable one, or a class list that cannot be used.
        CheckpointError: no usable model.
        StorageError: the output cannot be written.
    """
    from infoclip.api import checked_classes, load, write_files

    paths = [Path(image) for image in images]
    if not paths:
        raise DataError("There is no picture to segment; name at least one image file.")
    names = checked_classes(classes)
    for path in paths:
        _check_picture(path)
    model = load(model_path, device)
    model.check_classes(names)
    stems = output_names(paths)
    results = []
    steps = list(zip(paths, stems, strict=True))
    for path, stem in tracked(steps, "segmenting", progress):
        result = model.segment(path, names)
        extra = {"image": str(path), "model": str(model_path)}
        overlay, labels, info = write_files(Path(out_dir), result.files(stem, extra))
        results.append(Prediction(path, overlay, labels, info, result.shares))
    return results


def output_names(paths: Sequence[Path]) -> list[str]:
    """The name that each picture's files get: its own without suffix, made unique where several are alike.

    ``a/cat.jpg`` and ``b/cat.jpg`` become ``a_cat`` and ``b_cat``; ``cat.jpg`` and ``cat.png`` become ``cat_jpg`` and
    ``cat_png``; what is still alike (one picture named twice) gets ``-2``, ``-3``. Names that differ in capitals only
    count as alike, since some file systems do not tell them apart.
    """
    makers = (
        lambda p: p.stem,
        lambda p: f"{p.absolute().parent.name}_{p.stem}".lstrip("_"),
        lambda p: f"{p.stem}_{p.suffix.lstrip('.')}".rstrip("_"),
        lambda p: f"{p.absolute().parent.name}_{p.stem}_{p.suffix.lstrip('.')}".strip("_"),
    )
    stems = Counter(p.stem.lower() for p in paths)
    names: list[str] = []
    for path in paths:
        alike = [other for other in paths if other.stem.lower() == path.stem.lower()]
        maker = makers[0]
        if stems[path.stem.lower()] > 1:
            distinct = len({other.absolute() for other in alike})
            counts = [len({make(other).lower() for other in alike}) for make in makers]
            maker = next((m for m, count in zip(makers, counts, strict=True) if count == distinct), makers[-1])
        names.append(maker(path))
    used: set[str] = set()
    unique = []
    for name in names:
        candidate, number = name, 2
        while candidate.lower() in used or (number > 2 and candidate.lower() in {n.lower() for n in names}):
            candidate, number = f"{name}-{number}", number + 1
        used.add(candidate.lower())
        unique.append(candidate)
    return unique


def _check_picture(path: Path) -> None:
    """Refuse what is missing or no picture, reading no more than its head."""
    from PIL import Image, UnidentifiedImageError

    if path.is_dir():
        raise DataError(f"{path} is a folder; name the image files in it.")
    if not path.exists():
        raise DataError(f"There is no image {path}; check the path.")
    try:
        with Image.open(path) as picture:
            picture.verify()
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "it is not a picture in a known format, or it is damaged"
        raise DataError(f"Cannot read the image {path}: {reason}; replace or remove it.") from error
