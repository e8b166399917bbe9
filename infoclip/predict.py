"""Segment picture files: an overlay with legend, a picture of labels or segments, and JSON for each."""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infoclip.data.files import IMAGE_SUFFIXES
from infoclip.errors import ConfigError, DataError
from infoclip.progress import tracked

if TYPE_CHECKING:
    from infoclip.api import ImageLike, Model
    from infoclip.engine.serving import ServingPlan

__all__ = ["ENGINES", "KINDS", "Prediction", "Predictions", "find_pictures", "output_names", "predict",
           "predict_steps"]  # fmt: skip

ENGINES = ("local", "ray")

KINDS = {"semantic": "labels", "panoptic": "panoptic", "instance": "instances"}
"""What the second file of a task's predictions is called: ``cat.labels.png``."""

Step = tuple[str, str, dict[str, Any]]
"""A picture's path, the name of its files, and what their JSON says beside the result."""


@dataclass(frozen=True)
class Prediction:
    """What was written for one picture."""

    image: Path
    overlay: Path
    labels: Path
    """The picture of labels, or of segment ids."""
    json: Path
    shares: dict[str, float]
    """Share of the picture of each class that occurs, largest first."""
    counts: dict[str, int]
    """Number of segments or objects of each class that was found; empty for semantic results."""


@dataclass(frozen=True)
class Predictions:
    """What one call did."""

    results: list[Prediction]
    """What was segmented now."""
    kept: int
    """Pictures that an earlier call had done."""
    faults: list[str]
    """One sentence for each picture, folder or pattern that could not be used."""
    plan: ServingPlan | None = None
    """What the memory budget allowed; None without one."""


def predict(
    model_path: str | Path,
    images: Sequence[str | Path],
    classes: Sequence[str],
    out_dir: str | Path,
    *,
    task: str = "semantic",
    things: Sequence[str] | None = None,
    device: str = "auto",
    progress: bool = False,
    engine: str = "local",
    workers: int = 0,
    address: str | None = None,
    precision: str = "fp32",
    memory: str = "",
) -> Predictions:
    """Segment pictures with any classes.

    For ``cat.jpg`` it writes ``cat.overlay.png``, ``cat.labels.png`` (the index into the class list, 8-bit for up to
    255 classes, else 16-bit) and ``cat.json`` (class list, shares, sizes, model). With ``task="panoptic"`` the second
    file is ``cat.panoptic.png``, segment ids in panopticapi's colours, and the folder gets ``panoptic.json``, all its
    panoptic predictions in panopticapi's layout. With ``task="instance"`` it is ``cat.instances.png``, the number of
    the object that lies above, and the JSON holds every object's mask.

    Pictures of one name from different folders get different names (see :func:`output_names`). A picture that cannot be
    used is reported and skipped. The JSON appears last, and a picture whose JSON is there for the same file, model,
    task and classes is not segmented again: the same call goes on where an earlier one was stopped.

    Args:
        model_path: a run or model directory, or a published checkpoint.
        images: picture files, folders (searched with their sub-folders) and patterns (``photos/**/*.jpg``).
        classes: names; see :meth:`infoclip.api.Model.segment`.
        out_dir: made when missing; other files of the same names are replaced.
        task, things: see :meth:`infoclip.api.Model.segment`.
        device: ``auto``, ``cpu`` or ``cuda``.
        progress: show a progress bar.
        engine: ``local``, this process; or ``ray``, the workers of a Ray cluster (:mod:`infoclip.ray_engine`), with the
            same files as the result.
        workers: of a Ray cluster; 0 for one a GPU, or one for four CPUs.
        address: of a running Ray cluster; None takes ``RAY_ADDRESS``, or starts one on this machine.
        precision, memory: as :func:`infoclip.api.load`'s; with Ray the budget is each worker's, and cannot be ``auto``.

    Raises:
        ConfigError: an unknown engine, Ray without its package, a budget that nothing fits; a task that the model has
            not.
        DataError: no picture at all, or a class list that cannot be used.
        CheckpointError: no usable model.
        StorageError: the output cannot be written.
    """
    from infoclip.api import check_task, checked_classes, load

    paths, faults = find_pictures(images)
    if not paths:
        raise DataError(faults[0] if faults else "There is no picture to segment; name at least one image file.")
    if engine not in ENGINES:
        raise ConfigError(f"The engine is '{engine}'; expected {' or '.join(ENGINES)}.")
    if engine == "ray" and memory == "auto":
        raise ConfigError("--memory is auto, which workers of one machine would all take; name each worker's: 4GiB.")
    names = checked_classes(classes)
    options: dict[str, Any] = {"precision": precision, "memory": memory}
    model = load(model_path, device, **options) if engine == "local" else load(model_path, "cpu")
    model.check_classes(names)
    plan = model.plan(names)
    told_apart = [names[i] for i in check_task(model.tasks, task, names, things)]
    wanted = {"classes": names, "task": task} | ({"things": told_apart} if task != "semantic" else {})
    out, stamp = Path(out_dir), _stamp(Path(model_path))
    steps: list[Step] = []
    kept = 0
    for path, stem in zip(paths, output_names(paths), strict=True):
        extra = {"image": str(path), "image_stamp": _stamp(path), "model": str(model_path), "model_stamp": stamp}
        extra |= {key: wanted[key] for key in wanted if key != "classes"}
        extra |= {} if precision == "fp32" else {"precision": precision}
        if _is_done(out, stem, KINDS[task], {**extra, **wanted}):
            kept += 1
        else:
            steps.append((str(path), stem, extra))
    made: Iterable[Prediction | str]
    if engine == "ray" and steps:
        from infoclip.ray_engine import predict_all

        del model  # the workers have their own
        made = predict_all(
            steps, model_path, names, out, device=device, workers=workers, address=address, loading=options
        )
    else:
        made = predict_steps(model, names, out, steps)
    results: list[Prediction] = []
    for done in tracked(made, "segmenting", progress, total=len(steps)):
        if isinstance(done, Prediction):
            results.append(done)
        else:
            faults.append(done)
    if task == "panoptic":
        _collect(out, names, told_apart)
    return Predictions(results, kept, faults, plan)


def predict_steps(
    model: Model,
    classes: Sequence[str],
    out: Path,
    steps: Sequence[Step],
) -> Iterator[Prediction | str]:
    """Segment pictures and write their files, or say in a sentence why one cannot be used.

    As many go through the model together as its memory budget allows, one without a budget. The task and its things
    are what the steps' JSON is to say.
    """
    from infoclip.api import as_pixels

    plan = model.plan(classes)
    size = 1 if plan is None else plan.pictures
    for start in range(0, len(steps), size):
        usable: list[tuple[Step, ImageLike]] = []
        for step in steps[start : start + size]:
            try:
                usable.append((step, as_pixels(step[0])))
            except DataError as error:
                yield str(error)
        if len(usable) > 1:
            try:
                results = model.segment_together([pixels for _, pixels in usable], classes)
            except DataError:
                pass  # one of them is at fault: each for itself
            else:
                for (step, _), result in zip(usable, results, strict=True):
                    yield _written(out, step, result)
                continue
        for step, pixels in usable:
            try:
                found = model.segment(pixels, classes, step[2]["task"], step[2].get("things"))
            except DataError as error:
                yield str(error)
            else:
                yield _written(out, step, found)


def _written(out: Path, step: Step, result: Any) -> Prediction:
    from infoclip.api import write_files

    path, stem, extra = step
    overlay, labels, info = write_files(out, result.files(stem, extra))
    return Prediction(Path(path), overlay, labels, info, result.shares, result.counts)


def _collect(out: Path, classes: Sequence[str], things: Sequence[str]) -> None:
    """All panoptic predictions of a folder that were made with these classes, as one file in panopticapi's layout."""
    from infoclip.api import write_files
    from infoclip.data.panoptic import Category, panoptic_json

    images, annotations = [], []
    for path in sorted(out.glob("*.json")):
        found = _read(path)
        if found.get("task") != "panoptic" or found.get("classes") != classes or found.get("things") != things:
            continue
        if not isinstance(found.get("segments_info"), list) or not (out / str(found.get("panoptic"))).is_file():
            continue
        name = Path(str(found.get("image"))).name
        images.append({"id": path.stem, "file_name": name, "width": found.get("width"), "height": found.get("height")})
        annotations.append(
            {"image_id": path.stem, "file_name": found["panoptic"], "segments_info": found["segments_info"]}
        )
    categories = [Category(i, name, name in things) for i, name in enumerate(classes)]
    text = json.dumps(panoptic_json(images, annotations, categories), ensure_ascii=False) + "\n"
    write_files(out, {"panoptic.json": text.encode()})


def find_pictures(named: Sequence[str | Path]) -> tuple[list[Path], list[str]]:
    """The picture files that files, folders and patterns name, each once, and a sentence for each that names none.

    Folders are searched with their sub-folders, by suffix; links to folders are not followed, so that loops end.
    """
    found: dict[Path, None] = {}
    faults: list[str] = []
    for name in named:
        path = Path(name)
        if path.is_dir():
            walked = (Path(parent) / file for parent, _, files in os.walk(path) for file in files)
            inside = sorted(p for p in walked if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
            if not inside:
                faults.append(f"There is no picture in the folder {path}; expected {', '.join(IMAGE_SUFFIXES)}.")
        elif path.exists() or not glob.has_magic(str(name)):
            inside = [path]
        else:
            inside = [p for p in map(Path, sorted(glob.glob(str(name), recursive=True))) if p.is_file()]  # noqa: PTH207
            if not inside:
                faults.append(f"No file matches {name}; check the pattern.")
        found.update(dict.fromkeys(inside))
    return list(found), faults


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


def _stamp(path: Path) -> list[int]:
    """Size and time of a file, or of a model's weights: it changes when the content does."""
    for file in (path, path / "model.safetensors", path / "model" / "model.safetensors"):
        if file.is_file():
            state = file.stat()
            return [state.st_size, state.st_mtime_ns]
    return []


def _is_done(folder: Path, stem: str, kind: str, wanted: dict[str, Any]) -> bool:
    """Whether the three files of a prediction are there and were made from the same."""
    if not all((folder / f"{stem}.{end}").is_file() for end in ("overlay.png", f"{kind}.png", "json")):
        return False
    found = _read(folder / f"{stem}.json")
    return all(found.get(key) == value for key, value in wanted.items())


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
