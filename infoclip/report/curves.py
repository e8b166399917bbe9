"""Charts as inline SVG: no file, no script, and text that takes the page's colour in light and dark."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SERIES_COLORS", "Series", "bar_chart", "line_chart", "quiet_axes"]

SERIES_COLORS = ("#8a8f98", "#3b8bd6", "#e07a1f", "#1fa37a", "#c45ab3", "#b59a12")
"""Colours of series in their order: readable on white and on black, and apart for colour-blind eyes."""

_STYLES = ("-", (0, (6, 2)), (0, (2, 1.5)), "-", (0, (6, 2)), (0, (2, 1.5)))
_numbers = itertools.count()


@dataclass(frozen=True)
class Series:
    """One line: y over x; values that are not finite leave a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: str = ""


def line_chart(
    series: Sequence[Series], *, x_label: str, y_label: str, log_y: bool = False, size: tuple[float, float] = (6.4, 3.2)
) -> str:
    """Lines in one chart, with a legend for several, as an ``<svg>`` element.

    Args:
        log_y: logarithmic axis, where every value is positive; else it stays linear.
        size: width and height in inches; the page scales the chart to its own width.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator

    figure, axes = _figure(size)
    for i, line in enumerate(series):
        color = line.color or SERIES_COLORS[i % len(SERIES_COLORS)]
        y = [v if v is not None and math.isfinite(v) else math.nan for v in line.y]
        # A single point makes no line.
        marker = "o" if len(y) == 1 else None
        axes.plot(line.x, y, label=line.name, color=color, linestyle=_STYLES[i % len(_STYLES)], marker=marker)
    if log_y and all(v > 0 for line in series for v in line.y if math.isfinite(v)):
        axes.set_yscale("log")
        for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis(lambda value, _: f"{value:g}")  # plain numbers: powers of ten would be drawn as paths
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=9)
    return _svg(figure, f"{y_label} over {x_label}")


def bar_chart(
    groups: Sequence[str],
    bars: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    *,
    y_label: str,
    colors: Sequence[str] = SERIES_COLORS,
    size: tuple[float, float] = (6.4, 3.2),
) -> str:
    """Bars side by side in groups, as an ``<svg>`` element.

    Args:
        groups: names on the axis, G.
        bars: for each series its name, its G values and its G spreads (0 for none).
    """
    figure, axes = _figure(size)
    width = 0.8 / max(1, len(bars))
    for i, (name, values, spreads) in enumerate(bars):
        x = [g + (i - (len(bars) - 1) / 2) * width for g in range(len(groups))]
        heights = [v if math.isfinite(v) else 0.0 for v in values]
        errors = [s if math.isfinite(s) else 0.0 for s in spreads]
        color = colors[i % len(colors)]
        shown = axes.bar(x, heights, width * 0.92, label=name, color=color)
        if any(errors):
            axes.errorbar(x, heights, errors, fmt="none", ecolor="#000000", elinewidth=1, capsize=3)
        labels = [f"{v:.1f}" if math.isfinite(v) else "-" for v in values]
        axes.bar_label(shown, labels, fontsize=7.5, padding=4 if any(errors) else 2)
    axes.set_xticks(range(len(groups)), groups)
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel(y_label)
    axes.margins(y=0.12)
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return _svg(figure, f"{y_label}: " + ", ".join(name for name, _, _ in bars))


def _figure(size: tuple[float, float]) -> tuple[Figure, Any]:
    # The object interface draws without pyplot's global state, so that a caller's own figures are left alone.
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    quiet_axes(axes, "y")
    return figure, axes


def quiet_axes(axes: Any, grid: Literal["both", "x", "y"] = "both") -> None:
    """The look of every plot: no frame above and on the right, a faint grid behind what is drawn."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis=grid, color="#888888", alpha=0.25, linewidth=0.7)
    axes.set_axisbelow(True)


def _svg(figure: Figure, label: str) -> str:
    import html

    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "infoclip", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Black is what nobody chose: axes and their text, which follow the page instead.
    text = text.replace("#000000", "currentColor").replace("<text ", '<text fill="currentColor" ')
    prefix = f"chart{next(_numbers)}-"  # ids of several charts on one page must differ
    text = re.sub(r'(\bid="|url\(#|href="#)', lambda m: m.group(1) + prefix, text)
    text = re.sub(r'\swidth="[^"]*pt"', "", re.sub(r'\sheight="[^"]*pt"', "", text, count=1), count=1)
    return text.replace("<svg", f'<svg class="chart" role="img" aria-label="{html.escape(label)}"', 1)
