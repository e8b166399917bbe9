"""Amounts of memory as users write them: ``8GiB``, ``8GB``, ``512MiB``."""

from __future__ import annotations

import re

__all__ = ["format_bytes", "parse_budget"]

_UNITS = {"B": 1} | {
    f"{prefix}{middle}B": base**power
    for power, prefix in enumerate("KMGT", 1)
    for middle, base in (("", 1000), ("i", 1024))
}


def parse_budget(text: str) -> int:
    """Bytes of an amount with its unit.

    Raises:
        ValueError: no number with a unit above zero; the message says what was given and expected.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found:
        raise ValueError(f"{text!r} is no amount of memory; write a number with its unit, such as 8GiB")
    number, unit = found.groups()
    if not unit:
        raise ValueError(f"{text!r} has no unit; write {number}GiB or {number}MiB")
    units = {name.lower(): size for name, size in _UNITS.items()}
    if unit.lower() not in units:
        raise ValueError(f"{text!r} has the unknown unit {unit!r}; expected one of {', '.join(_UNITS)}")
    size = int(float(number) * units[unit.lower()])
    if size < 1:
        raise ValueError(f"{text!r} is no memory at all; write an amount such as 8GiB")
    return size


def format_bytes(size: float) -> str:
    """The size in GiB or MiB, as :func:`parse_budget` reads it."""
    return f"{size / 2**30:.2f}GiB" if size >= 2**30 else f"{size / 2**20:.0f}MiB"
