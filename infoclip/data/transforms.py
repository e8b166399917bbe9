"""Training augmentation on torchvision's v2 transforms: image, mask and panoptic map move together.

The published recipe (CAT-Seg on detectron2): shortest side to 384 (longest at most 1333), random 384 crop, SSD colour
distortion, horizontal flip, then padding to the crop with grey 128 and label 255.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from infoclip.config import DataConfig

__all__ = ["PAD_VALUE", "PadTo", "RandomCropUpTo", "ResizeScale", "ResizeShortestEdge", "SSDColor", "derive_seed",
           "seeded", "training_transform"]  # fmt: skip

PAD_VALUE = 128
"""Grey level of the padding (published)."""


class ResizeShortestEdge(v2.Transform):
    """Shortest side to ``size`` pixels, keeping the shape, longest side at most ``max_size`` (0: no limit).

    Images bilinear with antialiasing (as PIL's), masks by the nearest pixel centre. Of several sizes each call draws
    one, all as likely (detectron2's ``ResizeShortestEdge`` with the sample style ``choice``).
    """

    def __init__(self, size: int | Sequence[int], max_size: int = 0) -> None:
        super().__init__()
        self.sizes, self.max_size = (size,) if isinstance(size, int) else tuple(size), max_size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = tvf.get_size(flat_inputs[0])
        # One size draws nothing, so that what follows draws the same numbers as ever.
        index = int(torch.randint(len(self.sizes), ())) if len(self.sizes) > 1 else 0
        scale = self.sizes[index] / min(height, width)
        if self.max_size and scale * max(height, width) > self.max_size:
            scale = self.max_size / max(height, width)
        return {"size": [max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return _resize(inpt, params["size"])


def _resize(inpt: Any, size: list[int]) -> Any:
    if isinstance(inpt, tv_tensors.Mask):
        # torchvision resizes masks with the legacy nearest rule, which shifts them by up to half a pixel. float32 holds
        # every class and every segment id (three bytes).
        plain = inpt.as_subclass(Tensor)[None].float()
        resized = torch.nn.functional.interpolate(plain[None], size, mode="nearest-exact")[0, 0]
        return tv_tensors.Mask(resized.to(inpt.dtype))
    return tvf.resize(inpt, size, antialias=True)


class ResizeScale(v2.Transform):
    """The largest size that fits into a square of ``size`` times a random factor in ``scales``, keeping the shape
    (large-scale jitter; detectron2's ``ResizeScale``). Interpolation as :class:`ResizeShortestEdge`'s."""

    def __init__(self, size: int, scales: tuple[float, float]) -> None:
        super().__init__()
        self.size, self.scales = size, scales

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = tvf.get_size(flat_inputs[0])
        low, high = self.scales
        side = self.size * (low + (high - low) * float(torch.rand(())))
        scale = min(side / height, side / width)
        return {"size": [max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return _resize(inpt, params["size"])


class RandomCropUpTo(v2.Transform):
    """A random window of at most ``size`` x ``size`` pixels; smaller sides are kept whole.

    Args:
        max_share: below 1, the single-category rule of detectron2's ``RandomCrop_CategoryAreaConstraint``: a window
            holds at least two classes, none with this share of its labelled pixels or more; of ten tries the last one
            is taken if none fits. 1 (published) takes the first.
        ignore_index: mask value without a label.
    """

    def __init__(self, size: int, max_share: float = 1.0, ignore_index: int = 255) -> None:
        super().__init__()
        self.size, self.max_share, self.ignore_index = size, max_share, ignore_index

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = tvf.get_size(flat_inputs[0])
        h, w = min(height, self.size), min(width, self.size)
        mask = next((x for x in flat_inputs if isinstance(x, tv_tensors.Mask)), None)
        tries = 1 if mask is None or self.max_share >= 1 else 10
        top = left = 0
        for _ in range(tries):
            top = int(torch.randint(height - h + 1, ()))
            left = int(torch.randint(width - w + 1, ()))
            if mask is not None and tries > 1:
                labels = mask.as_subclass(Tensor)[..., top : top + h, left : left + w]
                counts = labels[labels != self.ignore_index].unique(return_counts=True)[1]
                if len(counts) > 1 and int(counts.max()) < self.max_share * int(counts.sum()):
                    break
        return {"top": top, "left": left, "height": h, "width": w}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return tvf.crop(inpt, **params)


class SSDColor(v2.Transform):
    """Photometric distortion of SSD (Liu et al. 2016, as detectron2's ColorAugSSDTransform): each step with chance 1/2.

    Brightness +-32/255, contrast and saturation 0.5 to 1.5, hue +-18 of 180; contrast before or after the other two.
    Channels are never permuted, so that colour words keep their meaning.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        def draw(low: float, high: float) -> float | None:
            value = low + (high - low) * float(torch.rand(()))
            return value if float(torch.rand(())) < 0.5 else None

        return {
            "brightness": draw(-32 / 255, 32 / 255),
            "contrast": draw(0.5, 1.5),
            "contrast_first": float(torch.rand(())) < 0.5,
            "saturation": draw(0.5, 1.5),
            "hue": draw(-0.1, 0.1),
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        image = inpt.as_subclass(Tensor).float() / 255
        if params["brightness"] is not None:
            image = (image + params["brightness"]).clamp(0, 1)
        contrast = params["contrast"]
        if contrast is not None and params["contrast_first"]:
            image = (image * contrast).clamp(0, 1)
        if params["saturation"] is not None:
            image = tvf.adjust_saturation(image, params["saturation"])
        if params["hue"] is not None:
            image = tvf.adjust_hue(image, params["hue"])
        if contrast is not None and not params["contrast_first"]:
            image = (image * contrast).clamp(0, 1)
        return tv_tensors.Image((image * 255).round().to(torch.uint8))


class PadTo(v2.Transform):
    """Pad right and below to ``size`` x ``size``: images with grey 128, masks with ``ignore_index``."""

    def __init__(self, size: int, ignore_index: int) -> None:
        super().__init__()
        self.size, self.ignore_index = size, ignore_index

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        height, width = tvf.get_size(inpt)
        padding = [0, 0, max(0, self.size - width), max(0, self.size - height)]
        fill = self.ignore_index if isinstance(inpt, tv_tensors.Mask) else PAD_VALUE
        return tvf.pad(inpt, padding, fill=fill) if any(padding) else inpt


def training_transform(config: DataConfig) -> v2.Transform:
    """The augmentation that ``config`` describes; call it on a sample's image and mask through :func:`seeded`."""
    steps: list[v2.Transform] = []
    if config.scales:
        steps.append(ResizeScale(config.crop, (config.scales[0], config.scales[1])))
    elif config.min_sizes or config.resize:
        steps.append(ResizeShortestEdge(config.min_sizes or config.resize, config.resize_max))
    if config.crop:
        steps.append(RandomCropUpTo(config.crop, config.crop_max_share, config.ignore_index))
    if config.color_jitter:
        steps.append(SSDColor())
    if config.flip:
        steps.append(v2.RandomHorizontalFlip(0.5))
    if config.crop:
        steps.append(PadTo(config.crop, config.ignore_index))
    return v2.Compose(steps) if steps else v2.Identity()


def derive_seed(seed: int, purpose: str, index: int) -> int:
    """A generator seed for one use: the same on any worker, unrelated between purposes and indices."""
    digest = hashlib.blake2b(f"{seed}:{purpose}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seeded(transform: Callable[..., Any], seed: int, sample: dict[str, Any]) -> dict[str, Any]:
    """``transform`` on the sample's image, mask and (where it has one) panoptic map, all by the same numbers.

    torch's generator is set to ``seed``, and put back afterwards.
    """
    keys = [key for key in ("image", "mask", "panoptic") if key in sample]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        moved = transform(*(sample[key] for key in keys))
    return {**sample, **dict(zip(keys, moved, strict=True))}
