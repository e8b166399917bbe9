"""A progress bar with the time to go, on stderr; silent when it is not wanted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["new_bar", "tracked"]

T = TypeVar("T")


def new_bar(*extra: str) -> Progress:
    """A bar with what is done, the time taken and the time left, and between them columns of rich's markup."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *map(TextColumn, extra),
               TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    return Progress(*columns, console=Console(stderr=True), speed_estimate_period=120)


def tracked(items: Iterable[T], description: str, shown: bool, total: int | None = None) -> Iterator[T]:
    """The items, with a bar that says how many are done and how long the rest will take."""
    if not shown:
        yield from items
        return
    with new_bar() as progress:
        yield from progress.track(items, total=total, description=description)
