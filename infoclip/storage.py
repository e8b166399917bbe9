"""A folder that is complete or not there: written beside its place, flushed to the disk, and renamed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from infoclip.errors import StorageError

__all__ = ["new_directory"]


@contextlib.contextmanager
def new_directory(target: str | Path, what: str, errors: tuple[type[Exception], ...] = ()) -> Iterator[Path]:
    """A temporary folder to write into; at the end it takes the place of ``target``, in one step.

    A folder that was there is replaced, and stays as it was when anything fails; nothing else is left then.

    Args:
        what: what the folder is, for the message: ``"the model"``.
        errors: what libraries raise, beside ``OSError``, when they cannot write.

    Raises:
        StorageError: writing failed (full disk, missing permission).
    """
    target = Path(target).absolute()
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    failures: tuple[type[Exception], ...] = (OSError, *errors)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        _flush(temporary)
        _replace(temporary, target)
    except failures as error:
        reason = (os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)).rstrip(".")
        raise StorageError(
            f"Cannot write {what} {target}: {reason}; free some space or choose another place and run again."
        ) from error
    finally:
        # Also the folder that was replaced: after the exchange it bears the temporary name.
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(directory: Path) -> None:
    """Everything in the directory, and its list of names, to the disk."""
    for path in [*directory.iterdir(), directory]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _replace(new: Path, target: Path) -> None:
    """Put ``new`` in the place of ``target``, if that exists in exchange for it, and flush the parent directory."""
    if not target.exists():
        new.rename(target)
    elif not _exchange(new, target):
        # No exchange on this file system: for a moment neither is there, but both are on the disk.
        old = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.old"
        target.rename(old)
        try:
            new.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step (Linux); False where kernel, library or file system cannot."""
    at_fdcwd, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))
