"""What every op refuses in the same words: no tensor, another dtype or layout, several devices."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["check_floats", "check_int", "check_one_device", "check_scale", "check_tensors", "check_whole_numbers"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensors(**values: Tensor) -> None:
    """Refuse what is no dense tensor.

    Raises:
        TypeError: another type, or a sparse or otherwise packed layout.
    """
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        if value.layout != torch.strided:
            raise TypeError(f"{name}: expected a dense tensor, got the layout {value.layout}")


def check_floats(**values: Tensor) -> None:
    """Refuse what is no dense tensor of floating-point numbers.

    Raises:
        TypeError: as :func:`check_tensors`, or another dtype.
    """
    check_tensors(**values)
    for name, value in values.items():
        if value.dtype not in _FLOATS:
            raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {value.dtype}")


def check_whole_numbers(**values: Tensor) -> None:
    """Refuse what is no dense tensor of whole numbers.

    Raises:
        TypeError: as :func:`check_tensors`, or another dtype; bool is one.
    """
    check_tensors(**values)
    for name, value in values.items():
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name}: expected whole numbers, got {value.dtype}")


def check_one_device(**values: Tensor) -> None:
    """Refuse tensors that do not lie together.

    Raises:
        ValueError: several devices.
    """
    if len({value.device for value in values.values()}) > 1:
        (first, where), *others = ((name, value.device) for name, value in values.items())
        places = "".join(f", {name} on {device}" for name, device in others)
        raise ValueError(f"{first} is on {where}{places}: expected one device")


def check_int(name: str, value: int) -> None:
    """Refuse what is no whole number.

    Raises:
        TypeError: another type; bool is one.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a whole number, got {type(value).__name__}")


def check_scale(name: str, value: float) -> None:
    """Refuse what is no finite number above 0, as a temperature must be.

    Raises:
        TypeError: no number.
        ValueError: not above 0, infinite or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")
