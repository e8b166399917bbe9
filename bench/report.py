"""``python -m bench report``: tables and plots of what ``bench/results/*.json`` holds.

Read are the files that ``python -m bench SUITE --json``, ``bench errors --json`` and ``bench aot --json`` write. The
tables go into ``README.md`` of the folder, between its two markers; the plots beside it, as PNG and SVG.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import harness
from infoclip import kernels
from infoclip.errors import DataError, InfoclipError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BEGIN", "END", "Results", "main", "read", "summary", "tables"]

FOLDER = Path(__file__).resolve().parent / "results"
BEGIN, END = "<!-- report:begin -->", "<!-- report:end -->"
Row = Mapping[str, Any]

HEAD = """## One table

Forward and backward at the published size (errors: one image of it; Triton's in its interpreter, at a small size).
Bytes are beyond the inputs, in float32. An empty cell is not measured yet."""
REST = """## Every figure

Times are the 20, 50 and 80 % quantiles; `x reference` and `x fp32` are ratios of medians (above 1: faster). The floor
is the larger of bytes over copy bandwidth and operations over matrix rate; what fits the caches can be faster than a
copy. Peaks are those of a fresh process beyond its inputs, results and gradients included. A case timed once is too
large for the reference."""


@dataclass
class Run:
    """One run of the benchmarks."""

    file: str
    machine: str
    command: str
    rates: dict[tuple[str, str], float]
    rows: list[dict[str, Any]]


@dataclass
class Results:
    """What a folder holds."""

    runs: list[Run] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    aot: list[dict[str, Any]] = field(default_factory=list)
    sources: list[tuple[str, str, str]] = field(default_factory=list)
    """Of errors and compiled kernels: file, command, machine."""
    foreign: list[str] = field(default_factory=list)
    """JSON of something else, left alone."""

    @property
    def empty(self) -> bool:
        return not (self.runs or self.errors or self.aot)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return merged(self.runs)

    @property
    def by_machine(self) -> dict[str, list[Run]]:
        """Machine, threads, torch and clock -> the runs there, of whatever commits."""
        found: dict[str, list[Run]] = {}
        for run in self.runs:
            where, _, rest = run.machine.partition("; commit ")
            found.setdefault("; ".join([where, *rest.split("; ")[2:]]), []).append(run)
        return found


def merged(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row a case, part and backend: what one file knows of it (its time) and what another does (its memory)."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in (row for run in runs for row in run.rows):
        key = tuple(row[name] for name in harness.KEY)
        known = found.setdefault(key, dict(row))
        if known["q50"] is None and row["q50"] is not None:
            known |= {name: row[name] for name in ("q20", "q50", "q80", "rounds", "ratio", "bf16_ratio", "share")}
        for name in ("peak", "bound"):
            known[name] = row[name] if known[name] is None else known[name]
    return list(found.values())


def read(folder: Path) -> Results:
    """What the folder's JSON files hold.

    Raises:
        DataError: no folder, or a file that is no JSON or lacks what its command writes.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; expected one with JSON files that 'python -m bench' wrote.")
    found = Results()
    for path in sorted(folder.glob("*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(data, dict):
                raise TypeError(f"a {type(data).__name__}")
            if "benchmarks" in data:
                rows, rates = harness.rows_of(data["benchmarks"]), harness.rates_of(data["benchmarks"])
                found.runs.append(Run(path.name, data["machine"], data["command"], rates, rows))
            elif "errors" in data and "summary" not in data:
                for row in data["errors"]:
                    f"{row['op']} {row['device']} {row['backend']} {row['dtype']} {row['value']:e} {row['gradient']:e}"
                found.errors += data["errors"]
                found.sources.append((path.name, data["command"], data["machine"]))
            elif "summary" in data:
                found.aot += data["summary"]
                found.sources.append((path.name, "python -m bench aot", data["machine"]))
            else:
                found.foreign.append(path.name)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(
                f"{path} is not what 'python -m bench ... --json' writes ({what}); write it again, or take it away."
            ) from error
    return found


# Tables ---------------------------------------------------------------------------------------------------------------


def _pick(rows: Iterable[Row], **wanted: Any) -> Row | None:
    return next((r for r in rows if all(r[key] == value for key, value in wanted.items())), None)


def _compiled(aot: Sequence[Row], op: str, form: str) -> str:
    mine = [r for r in aot if (r["op"], r["form"]) == (op, form)]
    if not mine:
        return ""
    count, failing = sum(r["kernels"] for r in mine), sum(r["failures"] for r in mine)
    spilling = sum(r["spilling"] for r in mine)
    archs = ", ".join(r["arch"].removeprefix("sm_") for r in mine)
    names = sorted({name for r in mine for name in r["instructions"]})
    told = f"sm {archs}: {count} kernels, {spilling or 'no'} spills" + (f", {', '.join(names)}" if names else "")
    return told + (f", **{failing} failing**" if failing else "")


def summary(found: Results) -> str:
    """Markdown: op x backend with errors, bytes, ratios, compiled kernels and GPU figure, at the published size."""
    lines = [
        "| op | backend | float32: value, gradient against float64 | bfloat16: the same | bound MB | peak MB "
        "| x reference (float32) | x reference (bfloat16) | bfloat16 x float32 | compiled ahead | on a GPU |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    published = [r for r in found.rows if r["published"] and r["part"] == "both"]
    ops = dict.fromkeys(r["op"] for r in (*found.errors, *published, *found.aot))
    rooms = {suite.title: suite.op for suites in harness.all_suites().values() for suite in suites}
    for op in ops:
        room = rooms.get(op, op)
        for backend, device in (("reference", "cpu"), ("native", "cpu"), ("native", "cuda"), ("triton", "cuda")):
            if (backend, device) == ("native", "cuda") and not _compiled(found.aot, room, "cuda"):
                continue
            if room in kernels.ops() and backend not in kernels.OPS[room].backends:
                continue

            def error(dtype: str, op: str = op, backend: str = backend, device: str = device) -> str:
                same = {"op": op, "backend": backend, "dtype": dtype}
                row = _pick(found.errors, device=device, **same)
                if row is None and backend == "triton":  # in the interpreter
                    row = _pick(found.errors, device="cpu", **same)
                return "" if row is None else f"{row['value']:.0e}, {row['gradient']:.0e}"

            single, half = (
                _pick(published, op=op, backend=backend, device=device, dtype=dtype) or {}
                for dtype in ("float32", "bfloat16")
            )
            bound, peak = (f"{single[k] / 1e6:.1f}" if single.get(k) else "" for k in ("bound", "peak"))
            ratios = [f"{x:.2f}" if x else "" for x in (single.get("ratio"), half.get("ratio"), half.get("bf16_ratio"))]
            compiled = "" if device == "cpu" else _compiled(found.aot, room, {"native": "cuda"}.get(backend, backend))
            gpu = "" if device == "cpu" else f"{single['q50']:.3f} ms" if single else "pending"
            name = f"{backend}, {device.upper()}" if backend != "reference" else backend
            lines.append(
                f"| {op} | {name} | {error('float32')} | {error('bfloat16')} | {bound} | {peak} | {' | '.join(ratios)} "
                f"| {compiled} | {gpu} |"
            )
    return "\n".join(lines)


def tables(found: Results) -> str:
    """Markdown of everything: a section a machine, whose files make one table an op, and what it rests on."""
    parts = [f"{HEAD}\n\n{summary(found)}"]
    for name, command, line in found.sources:
        parts.append(f"`{command}` ({name}): {line}")
    parts.append(REST)
    for machine, runs in found.by_machine.items():
        parts.append(f"### {machine}")
        for run in runs:
            when = run.machine.partition("; commit ")[2]
            parts.append(
                f"`{run.command}`\\\ncommit {when}\\\n" + "\\\n".join(harness.rates_line(run.rates).splitlines())
            )
        parts.append(harness.table(merged(runs)))
    return "\n\n".join(parts)


def insert(readme: Path, text: str) -> None:
    """Put the text between the markers of the file.

    Raises:
        DataError: the file, or one of its markers, is missing.
    """
    try:
        whole = readme.read_text(encoding="utf-8")
        before, rest = whole.split(BEGIN)
        _, after = rest.split(END)
    except OSError as error:
        raise DataError(f"{readme} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise DataError(f"{readme}: expected the lines {BEGIN} and {END}, once each, around the tables.") from error
    part = readme.with_suffix(".part")
    part.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    part.replace(readme)


# Plots ----------------------------------------------------------------------------------------------------------------

MARKERS = {"reference": "o", "native": "s", "triton": "^"}


def _panels(count: int, height: float = 3.4) -> tuple[Figure, list[Any]]:
    from matplotlib.figure import Figure

    from infoclip.report.curves import quiet_axes

    figure = Figure(figsize=(max(3.5 * count, 7.0) + 0.3, height), layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for axis in axes:
        quiet_axes(axis)
        axis.set_xscale("log")
        axis.set_yscale("log")
    return figure, axes


def _plain(axis: Any) -> None:
    """Numbers in place of powers."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    for each in (axis.xaxis, axis.yaxis):
        each.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        each.set_minor_formatter(NullFormatter())


def save(figure: Figure, file: Path) -> list[Path]:
    import matplotlib as mpl

    files = [file.with_suffix(".png"), file.with_suffix(".svg")]
    with mpl.rc_context({"svg.hashsalt": "infoclip", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(files[0], dpi=150, facecolor="white", metadata={"Software": None})
        figure.savefig(files[1], facecolor="white", metadata={"Date": None, "Creator": None})
    return files


def roofline(found: Results, device: str) -> Figure | None:
    """Reached operations a second over operations a byte, at the published size, under the measured roofs."""
    from infoclip.report.curves import SERIES_COLORS

    runs = [run for run in found.runs if any(where == device for where, _ in run.rates)]
    told = [r for r in found.rows if r["published"] and r["part"] == "both" and r["device"] == device and r["q50"]]
    dtypes = [d for d in harness.DTYPES if any(row["dtype"] == d for row in told)]
    if not runs or not dtypes:
        return None
    ops = list(dict.fromkeys(row["op"] for row in told))
    colors = [*SERIES_COLORS[1:], "#7b4fb3", "#8c564b", "#d62f3b"]  # one an op
    figure, axes = _panels(len(dtypes), 3.9)
    for axis, dtype in zip(axes, dtypes, strict=True):
        copy = max(run.rates.get((device, "copy"), 0.0) for run in runs)
        rate = max(run.rates.get((device, dtype), 0.0) for run in runs)
        shown = [r for r in told if r["dtype"] == dtype and r["backend"] in MARKERS]
        places = [r["flop"] / r["bytes"] for r in shown] or [1.0]
        knee = rate / copy if copy else 1.0
        xs = [min(*places, knee) / 4, knee, max(*places, knee) * 3]
        axis.plot(xs, [min(x * copy, rate) / 1e9 for x in xs], color="#555555", linewidth=1.2)
        axis.annotate(
            f"{rate / 1e9:.0f} GFLOP/s", (xs[2], rate / 1e9), ha="right", va="bottom", fontsize=8, color="#555555"
        )
        axis.annotate(
            f"{copy / 1e9:.0f} GB/s", (xs[0], xs[0] * copy / 1e9), ha="left", va="center", fontsize=8, color="#555555",
            xytext=(14, 2), textcoords="offset points",
        )  # fmt: skip
        for r in shown:
            color = colors[ops.index(r["op"]) % len(colors)]
            filled = r["backend"] != "reference"
            axis.plot(
                r["flop"] / r["bytes"], r["flop"] / r["q50"] / 1e6, MARKERS[r["backend"]], color=color, markersize=8,
                markerfacecolor=color if filled else "white", clip_on=False,
            )  # fmt: skip
        axis.set_title(f"{device}, {dtype}", fontsize=10)
        axis.set_xlabel("operations a byte")
        axis.set_ylabel("GFLOP/s")
        _plain(axis)
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], marker="s", linestyle="", color=colors[i % len(colors)], label=op) for i, op in enumerate(ops)
    ]
    backends = [b for b in MARKERS if any(r["backend"] == b and r["device"] == device for r in found.rows)]
    handles += [
        Line2D([], [], marker=MARKERS[b], linestyle="", color="#333333", label=b,
               markerfacecolor="white" if b == "reference" else "#333333")
        for b in backends
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    return figure


def over_n(found: Results, device: str, value: str, label: str, scale: float) -> Figure | None:
    """Time or bytes of forward and backward over N, a panel an op; for bytes the stated bound beside them."""
    from infoclip.report.curves import SERIES_COLORS

    mine = [
        r for r in found.rows
        if r["series"] and r["part"] == "both" and r["device"] == device and r[value] and r["backend"] in MARKERS
    ]  # fmt: skip
    ops = [op for op in dict.fromkeys(r["op"] for r in mine) if len({r["n"] for r in mine if r["op"] == op}) > 1]
    if not ops:
        return None
    figure, axes = _panels(len(ops))
    lines = dict.fromkeys((r["backend"], r["dtype"]) for r in mine)
    for axis, op in zip(axes, ops, strict=True):
        for backend, dtype in lines:
            points = sorted(
                (r["n"], r[value], r["bound"])
                for r in mine
                if (r["op"], r["backend"], r["dtype"]) == (op, backend, dtype)
            )
            if not points:
                continue
            color = SERIES_COLORS[0 if backend == "reference" else 1 + (dtype != "float32") + 2 * (backend == "triton")]
            x = [p[0] for p in points]
            style = {"marker": MARKERS[backend], "markersize": 4.5, "color": color, "label": f"{backend}, {dtype}"}
            axis.plot(x, [p[1] * scale for p in points], linestyle="-" if dtype == "float32" else (0, (5, 2)), **style)
            if value == "peak" and dtype == "float32" and all(p[2] for p in points):
                axis.plot(x, [p[2] * scale for p in points], color=color, linestyle=":", label="stated bound, float32")
        series = next(r["series"] for r in mine if r["op"] == op)
        axis.set_title(f"{op}\n({series})", fontsize=9.5)
        axis.set_xlabel("N")
        axis.set_ylabel(label)
        _plain(axis)
        ticks = sorted({r["n"] for r in mine if r["op"] == op})
        axis.set_xticks(ticks, [f"{n:,}" for n in ticks], fontsize=8)
        axis.minorticks_off()
    handles, labels = {}, []
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            if name not in labels:
                labels.append(name)
                handles[name] = handle
    figure.legend(
        [handles[name] for name in labels],
        labels,
        loc="outside lower center",
        ncols=min(5, 3 * len(axes) // 2),
        frameon=False,
        fontsize=8.5,
        handlelength=3.2,
    )
    return figure


def plots(found: Results, folder: Path) -> list[Path]:
    """Draw what there is to draw; the files."""
    files = []
    for device in dict.fromkeys(r["device"] for r in found.rows):
        figures = {
            "roofline": roofline(found, device),
            "time": over_n(found, device, "q50", "ms, forward + backward", 1.0),
            "memory": over_n(found, device, "peak", "MB beyond the inputs", 1e-6),
        }
        for name, figure in figures.items():
            if figure is not None:
                files += save(figure, folder / f"{name}.{device}.png")
    return files


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench report", description="Tables and plots of the JSON files of a folder."
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: bench/results")
    options = parser.parse_args(argv)
    try:
        found = read(options.folder)
        if found.empty:
            raise DataError(
                f"{options.folder} holds no figure; 'python -m bench all --json {options.folder}/all.json' makes some."
            )
        insert(options.folder / "README.md", tables(found))
        files = plots(found, options.folder)
    except InfoclipError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(summary(found))
    print(f"\n{options.folder / 'README.md'}, {', '.join(file.name for file in files)}")
    for name in found.foreign:
        print(f"left alone: {name} (no figures of a suite, errors or aot)")
    return 0
