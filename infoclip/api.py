"""The Python API: ``infoclip.load(path)`` gives a model, ``model.segment(image, classes)`` a segmentation.

A model of mask proposals (FC-CLIP, MAFT+) also gives panoptic and instance results: ``model.segment(image, classes,
task="panoptic", things=["dog"])``.
"""

from __future__ import annotations

import difflib
import io
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infoclip.budget import budget_bytes, hand_back
from infoclip.errors import ConfigError, DataError, StorageError

if TYPE_CHECKING:
    from PIL import Image

    from infoclip.config import Config, EvalConfig
    from infoclip.engine.serving import ServingPlan
    from infoclip.model.inference import Serving
    from infoclip.model.maftplus import MaskSegmentor, Vocabulary
    from infoclip.model.segmentor import Segmentor
    from infoclip.segments import InstanceSegmentation, PanopticSegmentation

__all__ = ["MAX_CLASSES", "TASKS", "ImageLike", "Model", "Segmentation", "check_path", "check_task", "load",
           "png_bytes", "write_files"]  # fmt: skip

TASKS = ("semantic", "panoptic", "instance")
"""A class for every pixel; segments that do not overlap; objects with scores, which may."""

MAX_CLASSES = 65535
"""Labels are 16-bit; the largest value is kept free for pixels without a label."""

ImageLike = Any
"""A path, a ``PIL.Image.Image``, a uint8 array [H, W, 3] or a uint8 tensor [3, H, W], RGB."""


@dataclass(frozen=True)
class Segmentation:
    """The labels of one picture, together with the class list that they index."""

    labels: NDArray[np.uint16]
    """[H, W], index into ``classes``."""
    scores: NDArray[np.float32]
    """[H, W], the score of each pixel's label: 0..1; of a model of mask proposals, whose scores add up over the
    proposals, 0 or more."""
    classes: list[str]
    image: NDArray[np.uint8] = field(repr=False)
    """[H, W, 3], the picture as it was segmented (upright, RGB)."""

    @property
    def counts(self) -> dict[str, int]:
        """Number of segments of each class: none are told apart here."""
        return {}

    @property
    def shares(self) -> dict[str, float]:
        """Share of the picture of each class that occurs, largest first."""
        from infoclip.report.overlay import class_shares

        return {self.classes[i]: share for i, share in class_shares(self.labels, len(self.classes))}

    def overlay(self, *, alpha: float = 0.6, legend: bool = True) -> Image.Image:
        """The picture under its labels, with a legend of the classes that occur."""
        from infoclip.report.overlay import overlay

        return overlay(self.image, self.labels, self.classes, alpha=alpha, legend=legend)

    def label_image(self) -> Image.Image:
        """The labels as a picture of one channel: 8-bit for up to 255 classes, else 16-bit."""
        from PIL import Image

        narrow = len(self.classes) <= 255
        return Image.fromarray(self.labels.astype(np.uint8) if narrow else self.labels)

    def describe(self) -> dict[str, Any]:
        """What the JSON beside a label picture says."""
        height, width = self.labels.shape
        index = {name: i for i, name in enumerate(self.classes)}
        found = [
            {"index": index[name], "name": name, "share": round(share, 6)}
            | {"mean_score": round(float(self.scores[self.labels == index[name]].mean()), 6)}
            for name, share in self.shares.items()
        ]
        return {"width": width, "height": height, "classes": list(self.classes), "found": found}

    def files(self, name: str, extra: dict[str, Any] | None = None) -> dict[str, bytes]:
        """The three files of a prediction: ``NAME.overlay.png``, ``NAME.labels.png`` and ``NAME.json``."""
        labels = f"{name}.labels.png"
        info = {**(extra or {}), "labels": labels, "overlay": f"{name}.overlay.png", **self.describe()}
        return {
            f"{name}.overlay.png": png_bytes(self.overlay()),
            labels: png_bytes(self.label_image()),
            f"{name}.json": (json.dumps(info, indent=2, ensure_ascii=False) + "\n").encode(),
        }

    def save(self, directory: str | Path, name: str = "segmentation") -> list[Path]:
        """Write overlay, labels and class list as ``NAME.overlay.png``, ``NAME.labels.png`` and ``NAME.json``.

        Raises:
            StorageError: the folder cannot be written; nothing half-written stays.
        """
        return write_files(Path(directory), self.files(name))


class Model:
    """A trained segmentor, ready for pictures of any size and any class names.

    Attributes:
        segmentor: the network, in evaluation mode.
        config: the settings it was trained with; ``config.eval`` says how pictures are cut and resized.
        classes: the class names it was trained on.
    """

    def __init__(
        self,
        segmentor: Segmentor | MaskSegmentor,
        config: Config,
        classes: Sequence[str],
        *,
        precision: str = "fp32",
        memory: str = "",
        share: int = 1,
    ) -> None:
        from infoclip.model.inference import half_precision
        from infoclip.model.maftplus import MaskSegmentor

        half_precision(precision, next(segmentor.parameters()).device)
        if isinstance(segmentor, MaskSegmentor) and (memory or precision != "fp32"):
            raise ConfigError("This is a model of mask proposals; --memory and --precision are for cost aggregation.")
        self.segmentor: Any = segmentor.eval()
        self.config = config
        self.classes = list(classes)
        self.precision, self.memory, self.share = precision, memory, share
        self._plan: tuple[tuple[int, int, str], ServingPlan] | None = None
        self._text: tuple[tuple[str, ...], Tensor | Vocabulary] | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """What it gives, of :data:`TASKS`: all for a model of mask proposals, else ``semantic`` alone."""
        from infoclip.model.maftplus import MaskSegmentor

        return TASKS if isinstance(self.segmentor, MaskSegmentor) else TASKS[:1]

    @overload
    def segment(
        self, image: ImageLike, classes: Sequence[str] | None = None, task: Literal["semantic"] = "semantic"
    ) -> Segmentation: ...
    @overload
    def segment(
        self,
        image: ImageLike,
        classes: Sequence[str] | None = None,
        task: Literal["panoptic"] = ...,
        things: Sequence[str] | None = None,
    ) -> PanopticSegmentation: ...
    @overload
    def segment(
        self,
        image: ImageLike,
        classes: Sequence[str] | None = None,
        task: Literal["instance"] = ...,
        things: Sequence[str] | None = None,
    ) -> InstanceSegmentation: ...
    @overload
    def segment(
        self, image: ImageLike, classes: Sequence[str] | None, task: str, things: Sequence[str] | None = None
    ) -> Segmentation | PanopticSegmentation | InstanceSegmentation: ...

    def segment(
        self,
        image: ImageLike,
        classes: Sequence[str] | None = None,
        task: str = "semantic",
        things: Sequence[str] | None = None,
    ) -> Segmentation | PanopticSegmentation | InstanceSegmentation:
        """Give every pixel one of the classes, or find segments or objects.

        Args:
            image: a path, a ``PIL.Image.Image``, a uint8 array [H, W, 3] or a uint8 tensor [3, H, W], RGB. Pictures are
                turned upright as their EXIF data say.
            classes: any names, 1 to 65535 different ones; the training classes by default. Of ``"sofa, couch"`` a model
                of mask proposals takes the synonym that fits best, another one the first.
            task: ``semantic``; ``panoptic`` (segments that do not overlap) and ``instance`` (objects, best first) for
                :attr:`tasks` that have them.
            things: the classes whose objects are told apart, among ``classes``; all by default. The others are stuff:
                one segment each, and no instances.

        Returns:
            A :class:`Segmentation`, or a result of :mod:`infoclip.segments`.

        Raises:
            ConfigError: a task that the model has not, or things without objects to tell apart.
            DataError: a missing or unreadable picture; no, repeated or too many classes; a name longer than the text
                encoder's context; things that are none of the classes.
            TypeError, ValueError: an image of another type, dtype or shape.
        """
        names = self.classes if classes is None else classes
        indices = check_task(self.tasks, task, names, things)
        names, text = self.embed(names)
        if isinstance(text, Tensor):
            return self.segment_together([image], names)[0]
        pixels = as_pixels(image)
        picture = pixels.permute(1, 2, 0).contiguous().numpy()
        config = self.config.eval
        from infoclip.model.maftplus.inference import predict_masks
        from infoclip.segments import InstanceSegmentation, PanopticSegmentation

        found = predict_masks(self.segmentor, pixels, text, config, self.classes)
        if task == "semantic":
            best, labels = found.labels()
            return Segmentation(labels.cpu().numpy().astype(np.uint16), best.cpu().numpy(), names, picture)
        things = [names[i] for i in indices]
        if task == "panoptic":
            ids, segments = found.panoptic(indices, config.object_threshold, config.overlap_threshold)
            return PanopticSegmentation(ids.cpu().numpy(), segments, names, things, picture)
        objects = found.instances(indices, config.instances)
        kept = (objects.scores >= config.instance_threshold) & objects.masks.flatten(1).any(dim=1)
        return InstanceSegmentation(
            objects.masks[kept].cpu().numpy(),
            objects.classes[kept].cpu().numpy(),
            objects.scores[kept].cpu().numpy(),
            names,
            picture,
        )

    def segment_together(self, images: Sequence[ImageLike], classes: Sequence[str]) -> list[Segmentation]:
        """:meth:`segment` of several pictures of any sizes, whose views go through the model in the same batches.

        Only for models of cost aggregation.

        Raises:
            DataError, TypeError, ValueError: as :meth:`segment`; a picture for which the memory budget leaves no room.
        """
        names, text = self.embed(classes)
        assert isinstance(text, Tensor)
        pixels = [as_pixels(image) for image in images]
        from infoclip.model.inference import predict_labels_of

        found = predict_labels_of(self.segmentor, pixels, text, self.config.eval, self.serving(names))
        return [
            Segmentation(
                labels.cpu().numpy().astype(np.uint16),
                best.cpu().numpy(),
                names,
                x.permute(1, 2, 0).contiguous().numpy(),
            )
            for x, (best, labels) in zip(pixels, found, strict=True)
        ]

    def plan(self, classes: Sequence[str], config: EvalConfig | None = None) -> ServingPlan | None:
        """What the memory budget allows for so many and so long classes; None without a budget.

        Raises:
            ConfigError: nothing fits the budget.
        """
        if not self.memory:
            return None
        from infoclip.engine.serving import plan_serving

        config = config or self.config.eval
        key = (len(classes), self.segmentor.clip.prompt_length(classes), repr(config))
        if self._plan is None or self._plan[0] != key:
            plan = plan_serving(self.memory, self.segmentor, *key[:2], config, self.precision, self.share)
            self._plan = (key, plan)
        return self._plan[1]

    def serving(self, classes: Sequence[str], config: EvalConfig | None = None) -> Serving:
        """How pictures go through the model: as :meth:`plan` says, or as the settings do."""
        from infoclip.model.inference import Serving

        plan = self.plan(classes, config)
        return Serving(precision=self.precision) if plan is None else plan.serving

    def proposals(self, task: str, classes: Sequence[str]) -> tuple[MaskSegmentor, Vocabulary]:
        """The network and the embedded class names, for a task that needs mask proposals.

        Raises:
            ConfigError: a model that has none.
            DataError: a list that cannot be used.
        """
        check_task(self.tasks, task, classes, None)
        vocabulary: Any = self.embed(classes)[1]
        return self.segmentor, vocabulary

    def check_classes(self, classes: Sequence[str]) -> list[str]:
        """The names as :meth:`segment` uses them; raises the same :class:`DataError` for a list that cannot be used."""
        return self.embed(classes)[0]

    def embed(self, classes: Sequence[str]) -> tuple[list[str], Tensor | Vocabulary]:
        """Checked names, and their embeddings [T, P, d] (of mask proposals: a vocabulary), kept for the next call.

        Raises :class:`DataError` for a list that cannot be used.
        """
        from infoclip.model.maftplus import MaskSegmentor

        names = checked_classes(classes)
        if self._text is None or self._text[0] != tuple(names):
            self.plan(names)  # a budget that nothing fits is refused before it is spent
            self._text = None
            with torch.no_grad():
                masks = isinstance(self.segmentor, MaskSegmentor)
                embed = self.segmentor.vocabulary if masks else self.segmentor.clip.text_features
                self._text = (tuple(names), embed(names))
        return names, self._text[1]

    def __repr__(self) -> str:
        return f"Model({self.config.name!r}, trained on {len(self.classes)} classes)"


def load(path: str | Path, device: str = "auto", *, precision: str = "fp32", memory: str = "", share: int = 1) -> Model:
    """Load a trained model.

    Args:
        path: a run directory, a model directory, or a checkpoint file of the published CAT-Seg, FC-CLIP or MAFT+
            (``model_final.pth``); for one with other sizes than the published models' see :mod:`infoclip.convert`.
        device: ``auto`` (CUDA if there is one), ``cpu`` or ``cuda``.
        precision: ``fp32``, or matrix products in ``bf16`` or (on a GPU) ``fp16``. This and the next are for models of
            cost aggregation.
        memory: a budget such as ``4GiB``, or ``auto``, within which pictures are segmented
            (:mod:`infoclip.engine.serving`); empty for none.
        share: processes that share the budget.

    Raises:
        CheckpointError: no model there, or one that is incomplete, damaged or of another architecture.
        ConfigError: an unknown device or precision, CUDA without a GPU, or a budget that is no amount.
    """
    place = _device(device)
    options: dict[str, Any] = {"precision": precision, "memory": memory, "share": share}
    if memory:
        budget_bytes(memory, place, "--memory")  # what is no amount is said before anything is read
        hand_back(place)
    if _is_published(Path(path)):
        from infoclip.convert import read_published

        published = read_published(path)
        return Model(published.segmentor.to(place), published.config, published.classes, **options)
    from infoclip.model.checkpoint import load_model

    loaded = load_model(path)
    return Model(loaded.segmentor.to(place), loaded.config, loaded.classes, **options)


def check_path(path: str | Path) -> None:
    """Refuse a path that :func:`load` would refuse for what lies there, without reading weights.

    Raises:
        CheckpointError: neither a file nor a model directory.
    """
    if not _is_published(Path(path)):
        from infoclip.model.checkpoint import find_model

        find_model(Path(path))


def _is_published(path: Path) -> bool:
    """Whether a path is a checkpoint file by itself; weights with a config beside them are read with it, by folder."""
    return path.is_file() and not (path.parent / "config.json").is_file()


def check_task(tasks: Sequence[str], task: str, classes: Sequence[str], things: Sequence[str] | None) -> list[int]:
    """Refuse a task that a model has not; the indices of the things among the classes.

    Args:
        tasks: what the model has.
        things: names; None for all classes.

    Raises:
        ConfigError: an unknown task or one that the model has not; things of semantic results.
        DataError: a thing that is none of the classes.
    """
    if task not in TASKS:
        raise ConfigError(f"The task is '{task}'; expected {', '.join(TASKS[:-1])} or {TASKS[-1]}.")
    if task not in tasks:
        raise ConfigError(
            f"This model gives no {task} results, since it has no mask proposals; use the task {' or '.join(tasks)}, "
            "or a model of the systems fcclip or maftplus."
        )
    if things is None:
        return list(range(len(classes)))
    if task == "semantic":
        raise ConfigError("Things are told apart by the tasks panoptic and instance; leave them out of semantic ones.")
    unknown = [name for name in things if name not in classes]
    if unknown:
        near = difflib.get_close_matches(unknown[0], classes, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "name them as the classes are named."
        raise DataError(f"'{unknown[0]}' is to be a thing, but is none of the classes; {hint}")
    return [i for i, name in enumerate(classes) if name in things]


def checked_classes(classes: Sequence[str]) -> list[str]:
    """The names without surrounding blanks.

    Raises:
        DataError: no class, an empty name, the same name twice, or more than 65535.
        TypeError: one string in place of a list, or names that are not strings.
    """
    from infoclip.data.classes import check_classes

    if isinstance(classes, str):
        raise TypeError("classes is a single string; expected a list of names")
    names = list(classes)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"classes holds {name!r}; expected names")
    if len(names) > MAX_CLASSES:
        raise DataError(f"The class list has {len(names)} names; expected at most {MAX_CLASSES} (labels are 16-bit).")
    return check_classes(names)


def as_pixels(image: ImageLike) -> Tensor:  # -> [3, H, W] uint8, RGB
    """A picture in any accepted form as a tensor on the CPU; the caller's data stay as they are.

    Raises:
        DataError: a file that is missing or is no picture.
        TypeError, ValueError: another type, dtype or shape.
    """
    if isinstance(image, (str, os.PathLike)):
        from infoclip.data.files import read_image

        return read_image(Path(image))
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8:
            raise TypeError(f"the image tensor has dtype {image.dtype}; expected uint8 in 0..255")
        if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ValueError(f"the image tensor has shape {tuple(image.shape)}; expected [3, H, W]")
        return image.detach().cpu().clone()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise TypeError(f"the image array has dtype {image.dtype}; expected uint8 in 0..255")
        if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(f"the image array has shape {image.shape}; expected [H, W, 3]")
        return torch.from_numpy(image.transpose(2, 0, 1).copy())
    from PIL import Image, ImageOps

    if isinstance(image, Image.Image):
        try:
            upright = np.array(ImageOps.exif_transpose(image).convert("RGB"))
        except (OSError, SyntaxError) as error:
            raise DataError(f"The image {getattr(image, 'filename', '') or image!r} is damaged ({error}).") from error
        if 0 in upright.shape:
            raise ValueError(f"the image is {image.size[0]} x {image.size[1]} pixels; expected at least one")
        return torch.from_numpy(upright).permute(2, 0, 1).contiguous()
    raise TypeError(f"image is a {type(image).__name__}; expected a path, a PIL image, an array or a tensor")


def write_files(directory: Path, files: dict[str, bytes]) -> list[Path]:
    """Write files into a folder: all are complete under temporary names before the first appears under its own.

    Raises:
        StorageError: the folder cannot be made or written (full disk, missing permission).
    """
    temporary = directory / f".{uuid.uuid4().hex[:8]}.tmp"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        return [(temporary / name).replace(directory / name) for name in files]
    except OSError as error:
        raise StorageError(
            f"Cannot write to {directory}: {error.strerror or error}; free some space or choose another folder."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"The device is '{name}'; expected auto, cpu or cuda.") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"The device is '{name}'; expected auto, cpu or cuda.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"The device is '{name}', but torch finds no CUDA device; use cpu.")
    return device


def png_bytes(image: Image.Image) -> bytes:
    """A picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
