"""From a picture to class scores, a panoptic map or instances (FC-CLIP and MAFT+, inference; Mask2Former, appendix).

Sizes: ``Q`` proposals, ``T`` classes, ``K`` instances. Log-probabilities have void last.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from infoclip.clip.convnext import STRIDE
from infoclip.config import EvalConfig
from infoclip.evaluate.panoptic import Segment
from infoclip.model.inference import evaluating, normalize, resize_shortest_side
from infoclip.model.maftplus.segmentor import split_synonyms

if TYPE_CHECKING:
    from infoclip.clip import ConvNeXtCLIP
    from infoclip.model.maftplus.segmentor import MaskSegmentor, Vocabulary

__all__ = [
    "Instances",
    "MaskPrediction",
    "class_probabilities",
    "ensemble_probabilities",
    "instances",
    "overlapping",
    "panoptic",
    "predict_masks",
    "preprocess",
    "resize_masks",
    "semantic",
]

_CHUNK_BYTES = 2**26
"""Of the score maps that are made at once for labels."""

_EPS = 1e-8
"""Keeps the logarithm of a probability finite (published)."""


def preprocess(
    image: Tensor,  # [..., 3, H, W], RGB in 0..255
    clip: ConvNeXtCLIP,
) -> Tensor:  # [..., 3, H', W'], multiples of 32
    """Normalised pixels, padded with zeros at the right and the bottom; any size of at least 1 x 1 will do.

    Raises:
        ValueError: another shape.
    """
    if image.ndim not in (3, 4) or image.shape[-3] != 3 or 0 in image.shape:
        raise ValueError(f"image has shape {tuple(image.shape)}; expected [3, H, W] or [B, 3, H, W]")
    return F.pad(normalize(image, clip), (0, -image.shape[-1] % STRIDE, 0, -image.shape[-2] % STRIDE))


def class_probabilities(
    clip_logits: Tensor,  # [..., T + 1]
    logits: Tensor,  # [..., T + 1]
) -> Tensor:  # [..., T + 1], logarithms
    """MAFT+: classes by CLIP's features alone, void by the mask decoder."""
    void = logits.float().softmax(dim=-1)[..., -1:]
    return _with_void(clip_logits[..., :-1].float().softmax(dim=-1), void)


def ensemble_probabilities(
    clip_logits: Tensor,  # [..., Q, T + 1]
    logits: Tensor,  # [..., Q, T + 1]
    seen: Tensor,  # [T] bool
    alpha: float = 0.4,
    beta: float = 0.8,
    valid: Tensor | None = None,  # [..., Q] bool
) -> Tensor:  # [..., Q, T + 1], logarithms
    """FC-CLIP: geometric mean of both scores, ``decoder^(1 - a) clip^a``, a being alpha for seen and beta for unseen
    classes, normalised again; void by the mask decoder.

    Args:
        valid: proposals that CLIP's map shows; the others keep the decoder's score. None for all.
    """
    void = logits.float().softmax(dim=-1)[..., -1:]
    ours = logits[..., :-1].float().log_softmax(dim=-1)
    theirs = clip_logits[..., :-1].float().log_softmax(dim=-1)
    a = torch.where(seen.to(ours.device), alpha, beta)  # [T]
    if valid is not None:
        a = a * valid[..., None]
    return _with_void((ours * (1 - a) + theirs * a).softmax(dim=-1), void)


def _with_void(classes: Tensor, void: Tensor) -> Tensor:
    return (torch.cat((classes * (1 - void), void), dim=-1) + _EPS).log()


def overlapping(classes: Sequence[str], trained: Sequence[str]) -> Tensor:  # [T] bool
    """Which classes share a synonym with one that was trained on, compared as strings (FC-CLIP's seen-class mask)."""
    known = {part for name in trained for part in split_synonyms(name)}
    return torch.tensor([not known.isdisjoint(split_synonyms(name)) for name in classes])


def resize_masks(
    mask_logits: Tensor,  # [Q, h, w]
    padded: tuple[int, int],
    size: tuple[int, int],
    output: tuple[int, int],
) -> Tensor:  # [Q, *output]
    """Masks at the padded size, cut to the image's, resized to the output's; bilinear."""
    return _resize(_resize(mask_logits, padded)[:, : size[0], : size[1]], output)


def semantic(
    log_probabilities: Tensor,  # [Q, T + 1]
    mask_logits: Tensor,  # [Q, H, W]
) -> Tensor:  # [T, H, W]
    """Score of each class at each pixel: the sum over the proposals of class probability times mask probability."""
    classes = log_probabilities.softmax(dim=-1)[:, :-1]  # [Q, T]
    return torch.einsum("qt,qhw->thw", classes, mask_logits.sigmoid())


def panoptic(
    log_probabilities: Tensor,  # [Q, T + 1]
    mask_logits: Tensor,  # [Q, H, W]
    things: Collection[int],
    object_threshold: float = 0.0,
    overlap_threshold: float = 0.8,
) -> tuple[Tensor, list[Segment]]:  # [H, W] int32
    """Segments that do not overlap: each pixel goes to the proposal of largest class times mask probability.

    A proposal takes part with a best class other than void and a score over ``object_threshold``. It becomes a segment
    if at least ``overlap_threshold`` of the pixels where its mask is over one half are its own. Segments of one class
    of stuff are one.

    Returns:
        The map of segment ids, 0 where there is none, and the segments, numbered from 1. Without any proposal that
        takes part, the map is all 0 and the list empty.
    """
    scores, labels = log_probabilities.softmax(dim=-1).max(dim=-1)
    keep = (labels != log_probabilities.shape[-1] - 1) & (scores > object_threshold)
    result = torch.zeros(mask_logits.shape[1:], dtype=torch.int32, device=mask_logits.device)
    segments: list[Segment] = []
    if not bool(keep.any()):
        return result, segments
    masks = mask_logits[keep].sigmoid()
    owner = (scores[keep, None, None] * masks).argmax(dim=0)  # [H, W]
    stuff: dict[int, int] = {}
    for k, label in enumerate(labels[keep].tolist()):
        solid = masks[k] >= 0.5
        own = owner == k
        area, whole, mine = int(own.sum()), int(solid.sum()), own & solid
        if not area or not whole or not bool(mine.any()) or area / whole < overlap_threshold:
            continue
        if label not in things and label in stuff:
            result[mine] = stuff[label]
            continue
        number = len(segments) + 1
        result[mine] = number
        segments.append(Segment(number, label))
        if label not in things:
            stuff[label] = number
    return result, segments


class Instances(NamedTuple):
    """Objects of the classes of things, best first; they may overlap."""

    masks: Tensor  # [K, H, W] bool
    classes: Tensor  # [K] int64
    scores: Tensor  # [K] float32


def instances(
    log_probabilities: Tensor,  # [Q, T + 1]
    mask_logits: Tensor,  # [Q, H, W]
    things: Collection[int],
    limit: int = 100,
) -> Instances:
    """The ``limit`` best pairs of proposal and class, of which those of things stay; the score is the class's times the
    mean mask probability inside the mask."""
    classes = log_probabilities.softmax(dim=-1)[:, :-1]  # [Q, T]
    scores, index = classes.flatten().topk(min(limit, classes.numel()))
    rows, labels = index // classes.shape[1], index % classes.shape[1]
    wanted = torch.tensor(sorted(things), device=labels.device, dtype=labels.dtype)
    keep = torch.isin(labels, wanted)
    scores, rows, labels = scores[keep], rows[keep], labels[keep]
    inside = mask_logits[rows] > 0  # [K, H, W]
    sure = (mask_logits[rows].sigmoid() * inside).flatten(1).sum(dim=1) / (inside.flatten(1).sum(dim=1) + 1e-6)
    order = (scores * sure).argsort(descending=True, stable=True)
    return Instances(inside[order], labels[order], (scores * sure)[order])


@dataclass(frozen=True)
class MaskPrediction:
    """The proposals of one picture, from which each kind of result is made."""

    log_probabilities: Tensor  # [Q, T + 1]
    mask_logits: Tensor  # [Q, h, w], at a quarter of the padded size
    padded: tuple[int, int]
    """Size at which the network saw the picture, padding included."""
    size: tuple[int, int]
    """The same without the padding."""
    output: tuple[int, int]
    """Size of the picture itself."""

    def masks(self) -> Tensor:  # [Q, H, W]
        """Mask logits at the picture's size."""
        return resize_masks(self.mask_logits, self.padded, self.size, self.output)

    def semantic(self, masks_first: bool = False) -> Tensor:  # [T, H, W]
        """Class scores at the picture's size.

        Args:
            masks_first: resize the masks before they are scored, as published where panoptic or instance results are
                wanted too; else scores are made at the network's size and resized (published for semantic results).
        """
        if masks_first:
            return semantic(self.log_probabilities, self.masks())
        scores = semantic(self.log_probabilities, _resize(self.mask_logits, self.padded))
        return _resize(scores[:, : self.size[0], : self.size[1]], self.output)

    def labels(self, masks_first: bool = False) -> tuple[Tensor, Tensor]:  # [H, W] float32, [H, W] int64
        """The largest score of every pixel and the class that has it (the first of several), as :meth:`semantic`'s, a
        few classes at a time: the scores of all are never made."""
        masks = self.masks() if masks_first else _resize(self.mask_logits, self.padded)
        masks = masks.sigmoid()
        classes = self.log_probabilities.softmax(dim=-1)[:, :-1]  # [Q, T]
        best = torch.full(self.output, -torch.inf, device=masks.device)
        labels = torch.zeros(self.output, dtype=torch.int64, device=masks.device)
        largest = max(masks[0].numel(), self.output[0] * self.output[1])
        start = 0
        for part in classes.split(max(1, _CHUNK_BYTES // (8 * largest)), dim=1):
            scores = torch.einsum("qt,qhw->thw", part, masks)
            if not masks_first:
                scores = _resize(scores[:, : self.size[0], : self.size[1]], self.output)
            value, index = scores.max(dim=0)
            better = value > best
            best, labels = torch.where(better, value, best), torch.where(better, index + start, labels)
            start += part.shape[1]
        return best, labels

    def panoptic(
        self, things: Collection[int], object_threshold: float = 0.0, overlap_threshold: float = 0.8
    ) -> tuple[Tensor, list[Segment]]:  # [H, W] int32
        """As the function of this name; ``things`` are the classes whose objects are told apart."""
        return panoptic(self.log_probabilities, self.masks(), things, object_threshold, overlap_threshold)

    def instances(self, things: Collection[int], limit: int = 100) -> Instances:
        """As the function of this name."""
        return instances(self.log_probabilities, self.masks(), things, limit)


@torch.no_grad()
def predict_masks(
    segmentor: MaskSegmentor,
    image: Tensor,  # [3, H, W] uint8, RGB
    vocabulary: Vocabulary,
    eval_config: EvalConfig,
    trained: Sequence[str] = (),
) -> MaskPrediction:
    """Proposals of a picture of any size; the segmentor is in evaluation mode meanwhile, and as before afterwards.

    Args:
        vocabulary: of ``segmentor.vocabulary(classes)``.
        trained: class names that the model was trained on, for FC-CLIP's ensemble.

    Raises:
        TypeError: an image that is not uint8.
        ValueError: another shape.
    """
    if image.dtype != torch.uint8:
        raise TypeError(f"image has dtype {image.dtype}; expected uint8")
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"image has shape {tuple(image.shape)}; expected [3, H, W]")
    output = (int(image.shape[1]), int(image.shape[2]))
    if eval_config.resize > 0:
        image = resize_shortest_side(image, eval_config.resize, eval_config.resize_max)
    size = (int(image.shape[1]), int(image.shape[2]))
    pixels = preprocess(image.to(segmentor.void_embedding.weight.device)[None], segmentor.clip)
    with evaluating(segmentor):
        out = segmentor(pixels, vocabulary)
    if segmentor.cdt is not None:
        log_probabilities = class_probabilities(out.clip_logits, out.logits)
    else:
        valid = None
        if eval_config.ensemble_on_valid_mask:
            shown = F.interpolate(out.masks, size=out.dense.shape[2:], mode="bilinear", align_corners=False)
            valid = (shown > 0).flatten(2).any(dim=-1)
        log_probabilities = ensemble_probabilities(
            out.clip_logits,
            out.logits,
            overlapping(vocabulary.classes, trained),
            eval_config.ensemble_alpha,
            eval_config.ensemble_beta,
            valid,
        )
    padded = (int(pixels.shape[2]), int(pixels.shape[3]))
    return MaskPrediction(log_probabilities[0], out.masks[0].float(), padded, size, output)


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:  # [C, h, w] -> [C, H, W]
    if tuple(x.shape[-2:]) == size:
        return x
    return F.interpolate(x[None], size=size, mode="bilinear", align_corners=False)[0]
