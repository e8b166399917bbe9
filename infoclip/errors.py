"""Errors that end in one sentence for the user instead of a traceback.

Every class here carries ``exit_code``: 2 for a mistake that the user can mend (a wrong file, class list, recipe or
key), 1 for a run that had to stop (a full disk, a non-finite loss). The command line prints the message and exits
with that code; from Python they are ordinary exceptions, and also a ``ValueError``, ``OSError`` or ``RuntimeError``
as the kind of mistake demands.
"""

from __future__ import annotations

__all__ = ["CheckpointError", "ConfigError", "DataError", "InfoclipError", "InfoclipWarning", "LostProcessError",
           "NonFiniteLossError", "OutOfMemoryError", "StorageError"]  # fmt: skip


class InfoclipWarning(UserWarning):
    """Something the user should know that stops nothing; the command line prints it in one line."""


class InfoclipError(Exception):
    """Base class: a message of one sentence that names what was expected and what to do.

    It is one line, whatever names it quotes: line breaks and other control characters in them are shown as escapes.
    """

    exit_code: int = 2
    shared: bool = False
    """Whether every process of the run ends with this error, so that one of them speaks for all."""

    def __init__(self, message: str = "") -> None:
        super().__init__(
            "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in message)
        )


class ConfigError(InfoclipError, ValueError):
    """An unknown recipe, key or value, or settings that do not go together."""


class DataError(InfoclipError, ValueError):
    """A missing, unreadable or inconsistent image, mask, manifest or class list."""


class CheckpointError(InfoclipError, ValueError):
    """A missing, damaged or foreign checkpoint, or one of another architecture."""


class StorageError(InfoclipError, OSError):
    """Writing failed (full disk, missing permission); nothing half-written is left behind."""

    exit_code = 1


class NonFiniteLossError(InfoclipError, RuntimeError):
    """The loss became NaN or infinite; names the step, the batch's files and the last good checkpoint."""

    exit_code = 1


class OutOfMemoryError(InfoclipError, RuntimeError):
    """Memory ran out and there is no leaner way to take the step."""

    exit_code = 1


class LostProcessError(InfoclipError, RuntimeError):
    """Another process of the same run has ended, so that this one cannot go on."""

    exit_code = 1
    shared = True
