"""From an image of any size to class scores at that size: plain, or by sliding window (CAT-Seg, section 4.1).

The published pipeline: shortest side to 640 (Pillow, bilinear); for the sliding window squashed to 640 x 640, cut into
overlapping windows of 384, and the whole image as one more view; every view at the encoder's size through the model;
sigmoid scores of the windows averaged where they overlap, then with those of the whole view.

The model's logits at a quarter of the encoder's side are kept for every view; what is as large as the picture is made
for a few classes at a time, so that labels among thousands of classes take bounded memory.

Sizes: ``T`` classes, ``P`` prompts, ``V`` views, ``S`` the encoder's input side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infoclip.config import EvalConfig
from infoclip.errors import ConfigError, DataError
from infoclip.model.aggregator import DROPPED_LOGIT

if TYPE_CHECKING:
    from infoclip.clip import DenseCLIP
    from infoclip.clip.text import TextCLIP
    from infoclip.model.segmentor import Segmentor

__all__ = [
    "FULL",
    "PER_PIXEL",
    "PRECISIONS",
    "Serving",
    "best_class",
    "evaluating",
    "half_precision",
    "normalize",
    "plain_scores",
    "predict_labels",
    "predict_labels_of",
    "predict_scores",
    "preprocess",
    "resize_shortest_side",
    "sliding_window_scores",
    "window_starts",
]

PUBLISHED_MULTIPLE = 32
"""The published plain inference pads images to a multiple of this."""

_CHUNK_BYTES = {"cpu": 2**28, "cuda": 2**30}
"""Score maps that are held at a time, by kind of device; at least those of one class."""

PER_PIXEL = 64
"""Bytes a pixel that a picture, its labels and what is drawn of them take beside the score maps: 8-bit and float32
pixels (15), best score, label and their successors (33), overlay and label picture (14)."""

PRECISIONS = ("fp32", "bf16", "fp16")

_Merge = Callable[[list[Tensor]], Tensor]
"""From the logits of some classes in every view, V x [n, h, w], to their scores [n, H, W]."""


def normalize(
    image: Tensor,  # [..., 3, H, W] in 0..255
    clip: TextCLIP,
) -> Tensor:  # [..., 3, H, W] float32
    """Pixels in the units that the encoder was trained on: ``(x - 255 mean) / (255 std)``, RGB."""
    mean = torch.tensor([255.0 * m for m in clip.mean], device=image.device)[:, None, None]
    std = torch.tensor([255.0 * s for s in clip.std], device=image.device)[:, None, None]
    return (image.float() - mean) / std


def preprocess(
    image: Tensor,  # [B, 3, H, W] or [3, H, W], RGB in 0..255
    clip: DenseCLIP,
    padding: Literal["none", "published"] = "none",
) -> Tensor:  # [B, 3, S, S] or [3, S, S]
    """An image as the encoder takes it: normalised, and resized bilinearly to its input size.

    Args:
        padding: ``published`` pads with zeros to a multiple of 32 at the right and the bottom before resizing.

    Raises:
        ValueError: another shape.
    """
    _check_image(image, batched=image.dim() == 4)
    pixels = normalize(image, clip)
    if padding == "published":
        pixels = F.pad(pixels, (0, -pixels.shape[-1] % PUBLISHED_MULTIPLE, 0, -pixels.shape[-2] % PUBLISHED_MULTIPLE))
    if image.dim() == 3:
        return _resize(pixels[None], clip.image_size)[0]
    return _resize(pixels, clip.image_size)


def resize_shortest_side(
    image: Tensor,  # [3, H, W] uint8
    size: int,
    longest: int,
) -> Tensor:  # [3, H', W'] uint8
    """The image with its shortest side at ``size``, unless the longest would exceed ``longest`` (Pillow, bilinear)."""
    height, width = image.shape[-2:]
    scale = size / min(height, width)
    scale *= min(1.0, longest / (scale * max(height, width)))
    new = (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)))
    if new == (height, width):
        return image
    import numpy as np
    from PIL import Image

    picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    picture = picture.resize((new[1], new[0]), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).to(image.device)


@dataclass(frozen=True)
class Serving:
    """How pictures go through a model: its memory and speed. But for roundings the result is the same for all.

    :func:`infoclip.engine.serving.plan_serving` chooses one within a budget.
    """

    views: int = 0
    """Views that go through the model at once, of one picture or of several; 0 for the settings' ``batch_size``."""
    class_chunk: int = 0
    """Classes that the aggregation works on at once; 0 for the model's own."""
    maps: int = 0
    """Bytes for what is as large as a picture, which larger pictures are refused for; 0 for no limit."""
    precision: str = "fp32"
    """``bf16`` or ``fp16``: by autocast, as in training; norms, softmax statistics and scores stay in float32."""


FULL = Serving()


def predict_scores(
    segmentor: Segmentor,
    image: Tensor,  # [3, H, W] uint8, RGB
    text: Tensor,  # [T, P, d]
    eval_config: EvalConfig,
    serving: Serving = FULL,
) -> Tensor:  # [T, H, W] float32, on the segmentor's device
    """Scores in 0..1 of every class at every pixel of the image; the largest gives the label.

    The result alone takes ``4 T H W`` bytes; :func:`predict_labels` does without. The segmentor is in evaluation mode
    meanwhile, and as before afterwards.

    Raises:
        TypeError: an image that is not uint8.
        ValueError: another shape, or text of another width or number of templates.
        ConfigError: half precision that the device lacks.
    """
    with torch.no_grad():
        task = _task(segmentor, image, eval_config)
        return _merged(_logits(segmentor, task.views, text, eval_config.batch_size, serving), task)


def predict_labels(
    segmentor: Segmentor,
    image: Tensor,  # [3, H, W] uint8, RGB
    text: Tensor,  # [T, P, d]
    eval_config: EvalConfig,
    serving: Serving = FULL,
) -> tuple[Tensor, Tensor]:  # [H, W] float32, [H, W] int64, on the segmentor's device
    """The best score of every pixel and the class that has it (the first of several), as :func:`predict_scores`'s.

    Beside the logits of a batch of views (``4 T (S/4)^2`` bytes each and what the aggregation holds meanwhile), memory
    grows only with the classes that any view kept in its cut to the most similar ``pad_len``: the others have one score
    everywhere, the same for all of them, and the first of them stands for all.

    Raises:
        TypeError, ValueError, ConfigError: as :func:`predict_scores`.
        DataError: a picture too large for ``serving.maps``.
    """
    return predict_labels_of(segmentor, [image], text, eval_config, serving)[0]


@torch.no_grad()
def predict_labels_of(
    segmentor: Segmentor,
    images: Sequence[Tensor],  # each [3, H, W] uint8, RGB; of any sizes
    text: Tensor,  # [T, P, d]
    eval_config: EvalConfig,
    serving: Serving = FULL,
) -> list[tuple[Tensor, Tensor]]:
    """:func:`predict_labels` of each image, with the views of all of them in the same batches.

    Raises:
        TypeError, ValueError, ConfigError, DataError: as :func:`predict_labels`.
    """
    tasks = [_task(segmentor, image, eval_config) for image in images]
    for task in tasks:
        _map_bytes(task, serving)  # too large a picture is refused before anything is computed
    inputs = [view for task in tasks for view in task.views]
    views = iter(_logits(segmentor, inputs, text, eval_config.batch_size, serving))
    del inputs
    results = []
    for task in tasks:
        own = [next(views) for _ in task.views]
        task.views.clear()
        device = own[0].rows.device
        chosen = torch.cat([view.classes for view in own]).unique()  # sorted
        others = torch.ones(text.shape[-3], dtype=torch.bool, device=device)
        others[chosen] = False
        chosen = torch.cat([chosen, others.nonzero()[:1, 0]]).sort().values
        parts = chosen.split(max(1, _map_bytes(task, serving) // task.per_class))
        scores = ((classes, task.merge([view.take(classes) for view in own])) for classes in parts)
        results.append(_best(scores, task.output, device))
    return results


@torch.no_grad()
def best_class(
    logits: Tensor,  # [T, h, w] float32
    size: Sequence[int],  # (H, W)
) -> Tensor:  # [H, W] int64
    """The class with the largest logit at every pixel after bilinear resizing, a bounded number of maps at a time."""
    step = max(1, _CHUNK_BYTES["cpu"] // (8 * size[0] * size[1]))
    parts = torch.arange(len(logits), device=logits.device).split(step)
    return _best(((classes, _resize_maps(logits[classes], size)) for classes in parts), size, logits.device)[1]


def _best(
    chunks: Iterable[tuple[Tensor, Tensor]],  # classes [n] in ascending order, their scores [n, H, W]
    size: Sequence[int],
    device: torch.device,
) -> tuple[Tensor, Tensor]:  # [H, W] float32, [H, W] int64
    """The best score of every pixel and the class that has it, the first of several."""
    best = torch.full(tuple(size), -torch.inf, device=device)
    labels = torch.zeros(best.shape, dtype=torch.int64, device=device)
    for classes, scores in chunks:
        value, index = scores.max(dim=0)
        del scores
        better = value > best
        best = torch.where(better, value, best)
        labels = torch.where(better, classes[index], labels)
    return best, labels


@torch.no_grad()
def plain_scores(
    segmentor: Segmentor,
    image: Tensor,  # [3, H, W] in 0..255
    text: Tensor,  # [T, P, d]
    output_size: tuple[int, int] | None = None,
    padding: Literal["none", "published"] = "none",
) -> Tensor:  # [T, *output_size]
    """Scores from one view of the whole image, resized bilinearly.

    Args:
        output_size: size of the result; None for the image's own.
        padding: ``none`` squashes the image itself to the encoder's size; ``published`` pads it to a multiple of 32
            first and treats the score map as if there were no padding (and cuts maps larger than the image).
    """
    _check_image(image, batched=False)
    size = output_size or (image.shape[-2], image.shape[-1])
    task = _plain_task(segmentor, image, size, padding)
    return _merged(_logits(segmentor, task.views, text, 1, FULL), task)


@torch.no_grad()
def sliding_window_scores(
    segmentor: Segmentor,
    image: Tensor,  # [3, H, W] in 0..255
    text: Tensor,  # [T, P, d]
    output_size: tuple[int, int] | None = None,
    *,
    size: int = 640,
    window: int = 384,
    overlap: float = 0.333,
    batch_size: int = 1,
) -> Tensor:  # [T, *output_size]
    """Mean of the scores from overlapping windows and of those from the whole image.

    Args:
        output_size: size of the result; None for the image's own.
        size: side to which the image is squashed before it is cut into windows.
        window: side of a window; at most ``size`` is used.
        overlap: share of a window that the next one covers again. Windows start every ``int(window * (1 - overlap))``
            pixels; where that leaves a rest at the end (it does not for the published sizes), one more ends there.
        batch_size: views that go through the model at once; it bounds the memory and does not change the result.

    Raises:
        ValueError: sizes that cannot be.
    """
    _check_image(image, batched=False)
    if size < 1 or window < 1 or batch_size < 1 or not 0 <= overlap < 1:
        raise ValueError(
            f"size {size}, window {window}, overlap {overlap}, batch_size {batch_size}; expected positive sizes and an"
            " overlap of at least 0 and below 1"
        )
    output = output_size or (image.shape[-2], image.shape[-1])
    task = _window_task(segmentor, image, (output[0], output[1]), size, window, overlap)
    return _merged(_logits(segmentor, task.views, text, batch_size, FULL), task)


class _View:
    """The logits of one view; classes that its cut left out (all their logits are ``DROPPED_LOGIT``) are not kept.

    Attributes:
        classes: int64 [n], ascending, the classes that are kept.
        rows: float32 [n, h, w], their logits.
    """

    def __init__(self, logits: Tensor) -> None:  # [T, h, w]
        kept = ~(logits.flatten(1).amax(dim=1) <= DROPPED_LOGIT)  # not a number is kept
        self.count = len(logits)
        self.classes = kept.nonzero()[:, 0]
        self.rows = logits.float() if bool(kept.all()) else logits[self.classes].float()

    def take(self, classes: Tensor) -> Tensor:  # [m] int64 -> [m, h, w]
        """The logits of some classes, those that were left out too."""
        if len(self.classes) == self.count:
            return self.rows[classes]
        place = torch.searchsorted(self.classes, classes).clamp_(max=max(0, len(self.classes) - 1))
        rows = self.rows.new_full((len(classes), *self.rows.shape[1:]), DROPPED_LOGIT)
        if len(self.classes):
            here = self.classes[place] == classes
            rows[here] = self.rows[place[here]]
        return rows


@dataclass
class _Task:
    """One picture's way through the model."""

    views: list[Tensor]  # each [3, S, S]
    merge: _Merge
    per_class: int
    """Bytes that the merging of one class holds."""
    output: tuple[int, int]
    device: torch.device


def _task(segmentor: Segmentor, image: Tensor, config: EvalConfig) -> _Task:
    """The views of the image that the settings ask for, and how their scores are merged."""
    if image.dtype != torch.uint8:
        raise TypeError(f"image has dtype {image.dtype}; expected uint8")
    _check_image(image, batched=False)
    output = (image.shape[-2], image.shape[-1])
    if config.resize > 0:
        image = resize_shortest_side(image, config.resize, config.resize_max)
    if not config.sliding_window:
        return _plain_task(segmentor, image, output, config.padding)
    return _window_task(segmentor, image, output, config.size, config.window, config.overlap)


def _logits(segmentor: Segmentor, views: list[Tensor], text: Tensor, batch_size: int, serving: Serving) -> list[_View]:
    """The model's logits of every view, in batches."""
    size = serving.views or batch_size
    found: list[_View] = []
    with evaluating(segmentor), torch.inference_mode(), _served(segmentor, serving, views[0].device):
        for start in range(0, len(views), size):
            found += map(_View, segmentor(torch.stack(views[start : start + size]), text).logits)
    return found


@contextmanager
def _served(segmentor: Segmentor, serving: Serving, device: torch.device) -> Iterator[None]:
    """The model with a class chunk and in a precision."""
    dtype = half_precision(serving.precision, device)
    aggregator = segmentor.aggregator if serving.class_chunk else None
    earlier = 0 if aggregator is None else aggregator.class_chunk
    try:
        if aggregator is not None:
            aggregator.class_chunk = serving.class_chunk
        with torch.autocast(device.type, dtype) if dtype is not None else nullcontext():
            yield
    finally:
        if aggregator is not None:
            aggregator.class_chunk = earlier


def half_precision(precision: str, device: torch.device) -> torch.dtype | None:
    """The type of matrix products; None for float32.

    Raises:
        ConfigError: another precision, or ``fp16`` on a CPU.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"The precision is '{precision}'; expected {', '.join(PRECISIONS)}.")
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("The precision fp16 is for GPUs; on a CPU take bf16.")
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _map_bytes(task: _Task, serving: Serving) -> int:
    """Bytes of score maps that may be held at a time."""
    default = _CHUNK_BYTES[task.device.type]
    if not serving.maps:
        return default
    height, width = task.output
    left = serving.maps - PER_PIXEL * height * width
    if left < task.per_class:
        needed = -(-(PER_PIXEL * height * width + task.per_class - serving.maps) // 2**20)
        raise DataError(
            f"A picture of {width} x {height} pixels takes {needed}MiB more than the memory budget leaves; "
            "raise the budget, or make the picture smaller."
        )
    return min(default, left)


def _merged(views: list[_View], task: _Task) -> Tensor:  # -> [T, H, W]
    """The scores of all classes, made in chunks of a bounded size."""
    count, device = views[0].count, views[0].rows.device
    scores = torch.empty(count, *task.output, device=device)
    step = max(1, _CHUNK_BYTES[device.type] // (16 * task.output[0] * task.output[1]))
    for start in range(0, count, step):
        classes = torch.arange(start, min(count, start + step), device=device)
        scores[start : start + step] = task.merge([view.take(classes) for view in views])
    return scores


def _plain_task(
    segmentor: Segmentor, image: Tensor, output: tuple[int, int], padding: Literal["none", "published"]
) -> _Task:
    height, width = image.shape[-2:]

    def merge(rows: list[Tensor]) -> Tensor:
        scores = rows[0].sigmoid()
        if padding == "published":
            scores = scores[..., :height, :width]
        return _resize_maps(scores, output)

    view = preprocess(_on(image, segmentor), segmentor.clip, padding)
    return _Task([view], merge, 8 * output[0] * output[1], output, view.device)


def _window_task(
    segmentor: Segmentor, image: Tensor, output: tuple[int, int], size: int, window: int, overlap: float
) -> _Task:
    window = min(window, size)
    pixels = _on(image, segmentor).float()[None]
    squashed = _resize(pixels, size)
    starts = window_starts(size, window, overlap)
    corners = [(y, x) for y in starts for x in starts]
    cuts = [squashed[0, :, y : y + window, x : x + window] for y, x in corners]
    views = [preprocess(cut, segmentor.clip) for cut in (*cuts, _resize(pixels, window)[0])]

    def merge(rows: list[Tensor]) -> Tensor:
        """Logits are resized, then squashed to 0..1; windows averaged where they overlap, then with the whole view."""
        summed = rows[0].new_zeros(len(rows[0]), size, size)
        count = rows[0].new_zeros(size, size)
        for (y, x), logits in zip(corners, rows[:-1], strict=True):
            summed[:, y : y + window, x : x + window] += _resize_maps(logits, window).sigmoid_()
            count[y : y + window, x : x + window] += 1
        last = _resize_maps(_resize_maps(rows[-1], window).sigmoid_(), size)
        return _resize_maps(summed.div_(count).add_(last).div_(2), output)

    return _Task(views, merge, 4 * (2 * size**2 + 2 * window**2 + output[0] * output[1]), output, pixels.device)


def window_starts(size: int, window: int, overlap: float) -> list[int]:
    """Where windows start along a side: evenly, and one at the very end if the last one does not reach it."""
    stride = max(1, int(window * (1 - overlap)))
    starts = list(range(0, size - window + 1, stride))
    if starts[-1] + window < size:
        starts.append(size - window)
    return starts


def _resize(x: Tensor, size: int | Sequence[int]) -> Tensor:  # [B, C, h, w] -> [B, C, H, W]
    new = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    if tuple(x.shape[-2:]) == new:
        return x
    return F.interpolate(x, size=new, mode="bilinear", align_corners=False)


def _resize_maps(x: Tensor, size: int | Sequence[int]) -> Tensor:  # [n, h, w] -> [n, H, W]
    """Maps resized one by one: torch's CPU code rounds otherwise for three channels, and how many go together here
    must not matter."""
    return _resize(x[:, None], size)[:, 0]


def _on(image: Tensor, segmentor: Segmentor) -> Tensor:
    return image.to(next(segmentor.parameters()).device)


def _check_image(image: Tensor, batched: bool) -> None:
    wanted = "[B, 3, H, W]" if batched else "[3, H, W]"
    if image.dim() != (4 if batched else 3) or image.shape[-3] != 3 or 0 in image.shape:
        raise ValueError(f"image has shape {tuple(image.shape)}; expected {wanted}")


@contextmanager
def evaluating(segmentor: nn.Module) -> Iterator[None]:
    """Evaluation mode, and every module's own mode again afterwards."""
    training = [m for m in segmentor.modules() if m.training]
    segmentor.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
