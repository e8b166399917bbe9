"""Reading pictures and annotations that others wrote: bounded in memory, no code run, one sentence for every fault.

A picture may claim any size and a mask may be cut short or lie. What is larger than :data:`MAX_PIXELS` is refused from
its head, before it is decoded; only the formats named here are tried; nothing is unpickled.
"""

from __future__ import annotations

import io
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from infoclip.errors import DataError

__all__ = ["IMAGE_SUFFIXES", "MASK_SUFFIXES", "MAX_PIXELS", "below", "decode_rle", "is_file", "is_rotated",
           "read_ade_objects", "read_image", "read_label_map_mat", "read_mask", "read_segment_ids"]  # fmt: skip

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")
MAX_PIXELS = 100_000_000
"""Largest picture that is decoded (10,000 x 10,000): 300 MB as RGB, three times that while it is converted."""

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
_EXIF_ORIENTATION = 0x0112
# What Pillow's decoders raise on files that are cut short or lie; RecursionError and MemoryError on crafted ones.
_FAULTS = (OSError, ValueError, SyntaxError, TypeError, KeyError, IndexError, AttributeError, OverflowError,
           EOFError, struct.error, zlib.error, RecursionError, MemoryError, NotImplementedError, ZeroDivisionError,
           RuntimeError, Image.DecompressionBombError)  # fmt: skip


def read_image(path: str | Path) -> Tensor:
    """An image file as uint8 [3, H, W] RGB, rotated as its EXIF orientation says; 16-bit grey becomes 8-bit.

    Raises:
        DataError: a missing file, one that is not an image or is damaged, or one of more than :data:`MAX_PIXELS`.
    """
    with _open(path, "image") as picture, _decoding(path, "image"):
        upright = ImageOps.exif_transpose(picture)
        if upright.mode.startswith("I"):
            wide = np.asarray(upright).astype(np.int64)
            array = np.repeat((wide >> 8 if wide.max(initial=0) > 255 else wide)[..., None], 3, 2).astype(np.uint8)
        else:
            array = np.array(upright.convert("RGB"))
        return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def read_mask(path: str | Path) -> Tensor:
    """A mask file as int64 [H, W]: palette indices, or the values of an 8-bit or 16-bit picture of one channel.

    Raises:
        DataError: a missing, damaged or too large file, or a picture of several channels.
    """
    with _open(path, "mask") as picture:
        if picture.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N"):
            raise DataError(
                f"The mask {path} is a {picture.mode} picture; expected one channel of class indices "
                "(palette, 8-bit or 16-bit PNG or TIFF)."
            )
        with _decoding(path, "mask"):
            return torch.from_numpy(np.array(picture).astype(np.int64))


def read_segment_ids(path: str | Path) -> Tensor:
    """Segment ids of a panoptic PNG, int64 [H, W]: ``R + 256 G + 65536 B``.

    Raises:
        DataError: a missing, damaged or too large file, or a picture without colour.
    """
    with _open(path, "panoptic map") as picture:
        if picture.mode != "RGB":
            raise DataError(
                f"The panoptic map {path} is a {picture.mode} picture; expected an RGB PNG "
                "whose colours are segment ids."
            )
        with _decoding(path, "panoptic map"):
            array = np.array(picture).astype(np.int64)
            return torch.from_numpy(array[..., 0] + 256 * array[..., 1] + 65536 * array[..., 2])


def read_ade_objects(path: str | Path) -> Tensor:
    """Object indices of an ``_seg.png`` of ADE20K_2021_17_01, int64 [H, W]: ``R // 10 * 256 + G``.

    Raises:
        DataError: a missing, damaged or too large file, or a picture without colour.
    """
    with _open(path, "mask") as picture:
        if picture.mode not in ("RGB", "RGBA"):
            raise DataError(f"The mask {path} is a {picture.mode} picture; expected the colours of an ADE20K _seg.png.")
        with _decoding(path, "mask"):
            array = np.array(picture)[..., :2].astype(np.int64)
            return torch.from_numpy(array[..., 0] // 10 * 256 + array[..., 1])


def is_file(path: Path) -> bool:
    """Whether a file is there; a name from a list that no file can have (too long) is none, not an error."""
    try:
        return path.is_file()
    except OSError:
        return False


def read_label_map_mat(path: str | Path) -> Tensor:
    """The ``LabelMap`` of a MATLAB file of Pascal Context (``trainval/*.mat``), int64 [H, W].

    Raises:
        DataError: a missing, damaged or too large file, or one without such a map.
    """
    import scipy.io

    try:
        content = _inflated_mat(Path(path).read_bytes())
        with _quiet():
            array = scipy.io.loadmat(io.BytesIO(content), variable_names=["LabelMap"]).get("LabelMap")
    except FileNotFoundError as error:
        raise DataError(f"There is no mask {path}; check the path.") from error
    except (*_FAULTS, scipy.io.matlab.MatReadError, UnboundLocalError) as error:  # the last: an unknown class of array
        raise DataError(f"The mask {path} is damaged ({_reason(error)}); copy it again or remove it.") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "uif" or not array.size:
        raise DataError(f"The mask {path} holds no LabelMap of numbers; expected a MATLAB file of Pascal Context.")
    if array.dtype.kind == "f" and not (np.isfinite(array).all() and (array == np.round(array)).all()):
        raise DataError(f"The LabelMap of {path} holds numbers that are not whole; expected class numbers.")
    return torch.from_numpy(array.astype(np.int64))


def decode_rle(rle: Mapping[str, Any], height: int, width: int, source: str) -> NDArray[np.bool_]:  # [H, W]
    """A run-length encoded mask of COCO's kind (compressed or plain): runs down the columns, the first one empty.

    pycocotools' decoder is not used on files that others wrote: where the runs fall short of the image, the rest of
    its answer is uninitialised memory (seen with 2.0.11).

    Raises:
        DataError: another size than the image's, or runs that do not cover it exactly; names ``source``.
    """
    size, counts = rle.get("size"), rle.get("counts")
    if size != [height, width]:
        raise DataError(f"A mask in {source} has the size {str(size)[:40]}; expected {[height, width]}, the image's.")
    runs = _runs(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(n) is int and 0 <= n <= height * width for n in runs):
        raise DataError(f"A mask in {source} is damaged: its counts are no run-length code; copy the file again.")
    if sum(runs) != height * width:
        raise DataError(f"A mask in {source} is damaged: its runs do not cover the image; copy the file again.")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _runs(text: str) -> list[int] | None:
    """Run lengths of the compressed form: five bits a character, and from the third run on the difference to the run
    two before; None for a text that is no such code."""
    if not re.fullmatch(r"(?:[P-o]{0,6}[0-O])+", text):
        return None
    runs: list[int] = []
    value = shift = 0
    for code in text.encode():
        bits = code - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits < 32:  # the last character of a number; its highest bit is the sign
            if bits & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def is_rotated(path: str | Path) -> bool:
    """Whether an image's EXIF orientation exchanges its sides."""
    with _open(path, "image") as picture:
        return picture.getexif().get(_EXIF_ORIENTATION, 1) >= 5


def below(root: Path, name: str, source: str | Path) -> Path:
    """``root / name`` for a name that a list or manifest gives.

    Raises:
        DataError: the name is absolute, climbs out of ``root`` or holds a character that no file name may.
    """
    parts = PurePosixPath(name.replace("\\", "/"))
    if not name.strip() or parts.is_absolute() or ".." in parts.parts or "\0" in name or ":" in parts.parts[0]:
        raise DataError(f"{source} names the file {name!r}, which is outside {root}; expected names below it.")
    return root / parts


def _open(path: str | Path, kind: str) -> Image.Image:
    try:
        with _quiet():  # our own limit is checked below
            picture = Image.open(path, formats=_FORMATS)
    except FileNotFoundError as error:
        raise DataError(f"There is no {kind} {path}; check the path.") from error
    except _FAULTS as error:
        reason = "it is not a picture in a known format"
        if isinstance(error, Image.DecompressionBombError):
            reason = f"it claims more than {MAX_PIXELS:,} pixels"
        elif getattr(error, "strerror", None) and not isinstance(error, UnidentifiedImageError):
            reason = str(error.strerror)  # type: ignore[union-attr]
        raise DataError(f"Cannot read the {kind} {path}: {reason}; replace or remove it.") from error
    if picture.width * picture.height > MAX_PIXELS:
        size = f"{picture.width} x {picture.height}"
        picture.close()
        raise DataError(
            f"Cannot read the {kind} {path}: it claims {size}, more than {MAX_PIXELS:,} pixels; cut it into parts."
        )
    return picture


@contextmanager
def _decoding(path: str | Path, kind: str) -> Iterator[None]:
    try:
        with _quiet():
            yield
    except DataError:
        raise
    except _FAULTS as error:
        raise DataError(f"The {kind} {path} is damaged ({_reason(error)}); replace or remove it.") from error


_QUIET = threading.Lock()
_quiet_depth = 0
_quiet_filters = warnings.catch_warnings()


@contextmanager
def _quiet() -> Iterator[None]:
    """Pillow's and scipy's remarks on odd files are for developers. The filters of warnings belong to the whole process
    and readers may be threads: the first one in changes them, the last one out puts them back."""
    global _quiet_depth, _quiet_filters
    with _QUIET:
        _quiet_depth += 1
        if _quiet_depth == 1:
            _quiet_filters = warnings.catch_warnings()
            _quiet_filters.__enter__()
            warnings.filterwarnings("ignore", module=r"(PIL|scipy)\.")
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    try:
        yield
    finally:
        with _QUIET:
            _quiet_depth -= 1
            if _quiet_depth == 0:
                _quiet_filters.__exit__(None, None, None)


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _inflated_mat(data: bytes) -> bytes:
    """A MATLAB 5 file with its compressed elements inflated, each bounded, so that scipy meets no bomb."""
    if len(data) < 128 or data[126:128] not in (b"IM", b"MI"):
        raise ValueError("it is not a MATLAB 5 file")
    order = "<" if data[126:128] == b"IM" else ">"
    limit = 8 * MAX_PIXELS  # float64, the widest that a map is stored in
    parts, position, total = [data[:128]], 128, 0
    while position + 8 <= len(data):
        kind, size = struct.unpack(order + "II", data[position : position + 8])
        body = data[position + 8 : position + 8 + size]
        if len(body) < size:
            raise ValueError("it is cut short")
        position += 8 + size
        if kind == 15:  # compressed
            inflate = zlib.decompressobj()
            body = inflate.decompress(body, limit - total + 1)
            if not inflate.eof:
                raise ValueError("its content is cut short or larger than a map can be")
        else:
            body = struct.pack(order + "II", kind, size) + body
            body += b"\0" * (-len(body) % 8)
            position += -size % 8
        total += len(body)
        if total > limit:
            raise ValueError("its content is larger than a map can be")
        _check_mat_element(body, order)
        parts.append(body)
    return b"".join(parts)


def _check_mat_element(body: bytes, order: str) -> None:
    """The length that an element states must be the one that it has: scipy allocates what it states."""
    if len(body) < 8:
        raise ValueError("it is cut short")
    kind, size = struct.unpack(order + "II", body[:8])
    if kind != 14 or not 0 <= len(body) - 8 - size < 8:  # 14: a matrix
        raise ValueError("its elements do not have the lengths that they state")
