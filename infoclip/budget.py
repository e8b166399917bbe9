"""Amounts of memory as users write them: ``8GiB``, ``8GB``, ``512MiB``."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from infoclip.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["budget_bytes", "format_bytes", "hand_back", "parse_budget"]

_MMAP_THRESHOLD = -3
"""Of ``mallopt`` in malloc.h."""

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


def budget_bytes(memory: str, device: torch.device, name: str) -> int:
    """Bytes that a budget allows on a device.

    ``auto`` is nine tenths of what is free: on a GPU by its driver, else by the system and the control group.

    Args:
        name: of the setting, for messages.

    Raises:
        ConfigError: no amount, or more than a GPU has.
    """
    free = _free(device)
    if memory == "auto":
        return int(0.9 * free[0])
    try:
        budget = parse_budget(memory)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}.") from error
    if device.type == "cuda" and budget > free[1]:
        raise ConfigError(f"{name} is {memory}, but {device} has {format_bytes(free[1])}; ask for less, or auto.")
    return budget


def hand_back(device: torch.device) -> None:
    """From now on freed blocks of 1 MiB or more go back to the system at once, in this process (glibc on a CPU).

    By itself glibc keeps freed blocks of up to 32 MiB, and what it keeps in pieces no longer fits the next step's
    tensors: a step that counts 1.3 GiB took 1.8. On other systems nothing changes.
    """
    if device.type != "cpu":
        return
    try:
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, 2**20)
        library.malloc_trim(0)
    except (OSError, AttributeError, TypeError):  # no glibc
        return


def _free(device: torch.device) -> tuple[int, int]:
    """Bytes free and there at all."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    if "MemAvailable" not in values:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return pages // 2, pages
    free, total = values["MemAvailable"], values["MemTotal"]
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return free, total
