"""What the benchmarks' command lines share."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["output_file"]


def output_file(text: str) -> Path:
    """A file to write, refused before anything is measured where its folder is not there."""
    file = Path(text)
    if not file.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{file}: there is no folder {file.parent}")
    return file
