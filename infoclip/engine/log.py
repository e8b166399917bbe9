"""Logs of a run: one JSON line a logging step, TensorBoard, and a progress line with the time to go."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from infoclip.engine.checkpoint import atomic_write_text, storage_errors
from infoclip.progress import new_bar

if TYPE_CHECKING:
    import numpy as np

__all__ = ["ProgressLine", "RunLog", "read_events", "read_log"]


class RunLog:
    """``log.jsonl`` and ``tensorboard/`` of a run.

    Args:
        out: the run's folder.
        start_step: the checkpoint's step; later lines of an earlier attempt are dropped, so no step appears twice.

    Raises:
        StorageError: the log cannot be written.
    """

    def __init__(self, out: Path, start_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = out / "log.jsonl"
        if self.path.exists():
            kept = [line for line in _lines(self.path) if line["step"] <= start_step]
            atomic_write_text(self.path, "".join(_dump(line) for line in kept))
        with storage_errors(str(self.path)):
            self._file = self.path.open("a", encoding="utf-8")
            self.tensorboard = SummaryWriter(
                str(out / "tensorboard"), purge_step=start_step + 1 if start_step else None
            )

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one line (``values["step"]`` numbers it) and the same scalars to TensorBoard."""
        with storage_errors(str(self.path)):
            self._file.write(_dump(values))
            self._file.flush()
        step = int(values["step"])
        for key, value in values.items():
            if key != "step":
                for name, number in value.items() if isinstance(value, Mapping) else [("", value)]:
                    self.tensorboard.add_scalar(f"{key}/{name}" if name else key, number, step)

    def event(self, step: int, text: str, values: Mapping[str, Any]) -> None:
        """Append a line about something that happened; :func:`read_log` leaves such lines out."""
        with storage_errors(str(self.path)):
            self._file.write(_dump({"step": step, "event": text, **values}))
            self._file.flush()
        self.tensorboard.add_text("events", text, step)

    def image(self, name: str, picture: np.ndarray, step: int) -> None:  # [H, W, 3] uint8
        """A picture for TensorBoard."""
        self.tensorboard.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        self._file.close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.tensorboard.close()


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The logged steps of a ``log.jsonl``; a last line cut short by a kill is left out."""
    return [line for line in _lines(Path(path)) if "event" not in line]


def read_events(path: str | Path) -> list[dict[str, Any]]:
    """What else a ``log.jsonl`` tells: memory plans and shortages, each with its ``step`` and ``event``."""
    return [line for line in _lines(Path(path)) if "event" in line]


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


class ProgressLine:
    """A bar with step, loss, images/s, the time waited for data and the time to go; silent when ``shown`` is false."""

    def __init__(self, title: str, start: int, total: int, shown: bool) -> None:
        self._progress: Any = None
        if not shown:
            return
        self._progress = new_bar("{task.fields[note]}")
        self._task = self._progress.add_task(title, total=total, completed=start, note="")

    def __enter__(self) -> ProgressLine:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self) -> None:
        if self._progress is not None:
            self._progress.advance(self._task)

    def note(self, loss: float, images_per_second: float, waited: float) -> None:
        """Show a logging step: its loss, its rate, and the share of its time that was spent waiting for data."""
        if self._progress is not None:
            text = f"loss {loss:.4f}  {images_per_second:.1f} images/s  data {waited:.0%}"
            self._progress.update(self._task, note=text)


def _dump(values: Mapping[str, Any]) -> str:
    return json.dumps(_rounded(values)) + "\n"


def _rounded(value: Any) -> Any:
    """Seven digits, more than a float32 carries; JSON knows no NaN, so it becomes null."""
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _rounded(v) for k, v in value.items()}
    return value
