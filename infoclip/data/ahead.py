"""Work done in threads ahead of its use, in order: decoding runs outside Python's lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["in_order"]

T = TypeVar("T")
R = TypeVar("R")


def in_order(work: Callable[[T], R], items: Iterable[T], threads: int, ahead: int) -> Iterator[R]:
    """``work`` of every item, in order, never with more than ``ahead`` of them started before the first is taken.

    Raises:
        What ``work`` raises, at that item's place; what was not started by then is not done.
    """
    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(max(1, threads))
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= max(1, ahead):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
