"""From an image of any size to class scores at that size: plain, or by sliding window (CAT-Seg, section 4.1).

The published pipeline: shortest side to 640 (Pillow, bilinear); for the sliding window squashed to 640 x 640, cut into
overlapping windows of 384, and the whole image as one more view; every view at the encoder's size through the model;
sigmoid scores of the windows averaged where they overlap, then with those of the whole view.

Sizes: ``T`` classes, ``P`` prompts, ``S`` the encoder's input side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from infoclip.config import EvalConfig

if TYPE_CHECKING:
    from infoclip.clip import DenseCLIP
    from infoclip.model.segmentor import Segmentor

__all__ = [
    "normalize",
    "plain_scores",
    "predict_scores",
    "preprocess",
    "resize_shortest_side",
    "sliding_window_scores",
    "window_starts",
]

PUBLISHED_MULTIPLE = 32
"""The published plain inference pads images to a multiple of this."""


def normalize(
    image: Tensor,  # [..., 3, H, W] in 0..255
    clip: DenseCLIP,
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


@torch.no_grad()
def predict_scores(
    segmentor: Segmentor,
    image: Tensor,  # [3, H, W] uint8, RGB
    text: Tensor,  # [T, P, d]
    eval_config: EvalConfig,
) -> Tensor:  # [T, H, W] float32, on the segmentor's device
    """Scores in 0..1 of every class at every pixel of the image; the largest gives the label.

    The segmentor is in evaluation mode meanwhile, and as before afterwards.

    Raises:
        TypeError: an image that is not uint8.
        ValueError: another shape, or text of another width or number of templates.
    """
    if image.dtype != torch.uint8:
        raise TypeError(f"image has dtype {image.dtype}; expected uint8")
    _check_image(image, batched=False)
    output = (image.shape[-2], image.shape[-1])
    if eval_config.resize > 0:
        image = resize_shortest_side(image, eval_config.resize, eval_config.resize_max)
    if not eval_config.sliding_window:
        return plain_scores(segmentor, image, text, output, padding=eval_config.padding)
    return sliding_window_scores(
        segmentor,
        image,
        text,
        output,
        size=eval_config.size,
        window=eval_config.window,
        overlap=eval_config.overlap,
        batch_size=eval_config.batch_size,
    )


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
    height, width = image.shape[-2:]
    with _evaluating(segmentor):
        scores = segmentor(preprocess(_on(image, segmentor)[None], segmentor.clip, padding), text).logits
    scores = scores.float().sigmoid()  # [1, T, 4h, 4w]
    if padding == "published":
        scores = scores[..., :height, :width]
    return _resize(scores, output_size or (height, width))[0]


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
    window = min(window, size)
    pixels = _on(image, segmentor).float()[None]
    squashed = _resize(pixels, size)
    starts = window_starts(size, window, overlap)
    corners = [(y, x) for y in starts for x in starts]
    summed = squashed.new_zeros(text.shape[-3], size, size)
    count = squashed.new_zeros(size, size)
    with _evaluating(segmentor):
        for i in range(0, len(corners), batch_size):
            chunk = corners[i : i + batch_size]
            views = torch.cat([squashed[..., y : y + window, x : x + window] for y, x in chunk])
            scores = _view_scores(segmentor, views, text)
            for (y, x), view in zip(chunk, scores, strict=True):
                summed[:, y : y + window, x : x + window] += view
                count[y : y + window, x : x + window] += 1
        whole = _view_scores(segmentor, _resize(pixels, window), text)
    scores = summed.div_(count).add_(_resize(whole, size)[0]).div_(2)  # in place: hundreds of classes are gigabytes
    return _resize(scores[None], output_size or (image.shape[-2], image.shape[-1]))[0]


def window_starts(size: int, window: int, overlap: float) -> list[int]:
    """Where windows start along a side: evenly, and one at the very end if the last one does not reach it."""
    stride = max(1, int(window * (1 - overlap)))
    starts = list(range(0, size - window + 1, stride))
    if starts[-1] + window < size:
        starts.append(size - window)
    return starts


def _view_scores(
    segmentor: Segmentor,
    views: Tensor,  # [V, 3, w, w] in 0..255
    text: Tensor,  # [T, P, d]
) -> Tensor:  # [V, T, w, w]
    """Scores of square views at their own size; logits are resized, then squashed to 0..1."""
    logits = segmentor(preprocess(views, segmentor.clip), text).logits.float()
    return _resize(logits, views.shape[-1]).sigmoid()


def _resize(x: Tensor, size: int | Sequence[int]) -> Tensor:  # [B, C, h, w] -> [B, C, H, W]
    new = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    if tuple(x.shape[-2:]) == new:
        return x
    return F.interpolate(x, size=new, mode="bilinear", align_corners=False)


def _on(image: Tensor, segmentor: Segmentor) -> Tensor:
    return image.to(next(segmentor.parameters()).device)


def _check_image(image: Tensor, batched: bool) -> None:
    wanted = "[B, 3, H, W]" if batched else "[3, H, W]"
    if image.dim() != (4 if batched else 3) or image.shape[-3] != 3 or 0 in image.shape:
        raise ValueError(f"image has shape {tuple(image.shape)}; expected {wanted}")


@contextmanager
def _evaluating(segmentor: Segmentor) -> Iterator[None]:
    """Evaluation mode, and every module's own mode again afterwards."""
    training = [m for m in segmentor.modules() if m.training]
    segmentor.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
