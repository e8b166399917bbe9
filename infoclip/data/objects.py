"""The objects of a picture, which training by masks compares with proposals: their classes, and where they are.

A picture with a panoptic map has one object a segment: an instance of a thing, or all of a kind of stuff. A picture
with a label map alone has one a class that occurs (as MAFT+ trains on COCO-Stuff).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Objects", "find_objects", "object_masks"]


class Objects(NamedTuple):
    """The ``n`` objects of a picture, by the values that mark them in its map. ``n`` may be 0."""

    labels: Tensor  # [n] int64, the class of each
    values: Tensor  # [n] int64, its value in the map, ascending


def find_objects(sample: Mapping[str, Any], ignore_index: int) -> tuple[Tensor, Objects]:  # map [H, W]
    """A sample's map of objects, and the objects in it: those that augmentation has left a pixel of.

    Segments that stand for a crowd are no objects, as published; neither are pixels without a label.

    Args:
        sample: of a :class:`~infoclip.data.folders.PairDataset` or a :class:`~infoclip.data.panoptic.PanopticDataset`.
        ignore_index: value of ``sample["mask"]`` without a label; such pixels have it in the map too.
    """
    mask = sample["mask"].as_subclass(Tensor)
    if "panoptic" not in sample:
        labels = mask.unique()
        labels = labels[labels != ignore_index]
        return mask, Objects(labels, labels)
    # Numbered anew, since a segment's id may be any number, also that of a pixel without a label.
    ids = sample["panoptic"].as_subclass(Tensor)
    known, place = ids.unique(return_inverse=True)
    numbers = torch.arange(len(known)) + (ignore_index + 1)
    crowds = torch.tensor([segment.id for segment in sample["segments"] if segment.crowd], dtype=torch.int64)
    numbers[torch.isin(known, crowds) | (known == 0)] = ignore_index
    found = torch.where(mask == ignore_index, ignore_index, numbers[place])
    labels = torch.full_like(known, ignore_index)
    there = found != ignore_index
    labels[place[there]] = mask[there]  # one class a segment: whichever pixel comes last says the same
    kept = labels != ignore_index
    return found, Objects(labels[kept], numbers[kept])


def object_masks(
    picture: Tensor,  # [H, W], a map of objects
    objects: Objects,  # of n
) -> Tensor:  # [n, H, W] bool
    """Where each object is, on the map's device."""
    return picture == objects.values.to(picture.device)[:, None, None]
