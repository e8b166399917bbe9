"""Where Triton kernels can run: the same answer for every op."""

from __future__ import annotations

import importlib
import os

import torch

__all__ = ["MISSING", "interpreted", "why_not"]


def _missing() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:  # Triton ships for Linux only
        return f"Triton does not import: {error}."
    return None


MISSING = _missing()
"""Why Triton does not import, or None where it does."""


def interpreted() -> bool:
    """Whether Triton's interpreter takes the place of a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(device: str, dtype: torch.dtype | None = None) -> str | None:
    """Why the Triton kernels cannot run on the device and dtype, or None where they can."""
    if MISSING:
        return MISSING
    if dtype == torch.float64:
        return "the Triton kernels take float32, float16 and bfloat16."
    if device == "cuda":
        return None if torch.cuda.is_available() else "torch sees no CUDA device."
    if device == "cpu" and interpreted():
        return None
    return f"Triton needs CUDA, not {device} (TRITON_INTERPRET=1 runs it in the interpreter, for tests)."
