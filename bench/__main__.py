"""``python -m bench SUITE... [--base REF] [--json FILE]``: speed and memory of each op beside its reference and bounds.

    python -m bench report    tables and plots of bench/results/*.json            (bench/report.py)
    python -m bench errors    each op's distance to float64                       (bench/errors.py)
    python -m bench aot       every GPU kernel compiled without a GPU             (bench/aot.py)
    python -m bench bounds    what the aggregation computes and keeps, counted    (bench/bounds.py)
    python -m bench plan      a training step's memory beside its budget          (bench/plan.py)
    python -m bench inference a picture: ours against the plain form, memory      (bench/inference.py)
    python -m bench curves    the loss of two trainings, plain and fast           (bench/curves.py)
    python -m bench step      a whole training step, against the plain form       (bench/step.py)

A suite is a file ``bench/suite_<op>.py``; ``all`` runs every one on pytest-benchmark. The op's tests must pass and a
case checks its values against the reference before it is timed, so there is no figure for a wrong result.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.arguments import output_file

HERE = Path(__file__).resolve().parent
COMMANDS = ("report", "errors", "aot", "bounds", "plan", "inference", "curves", "step")
"""Modules of this folder with a ``main``."""


def suites() -> list[str]:
    return sorted(path.stem.removeprefix("suite_") for path in HERE.glob("suite_*.py"))


def green(op: str) -> bool:
    from bench import harness

    return harness.green(op)


class _Session:
    """Gives pytest the suites and shows how far it is."""

    def __init__(self, chosen: Any, base: Any) -> None:
        from infoclip.progress import new_bar

        self.chosen, self.base = chosen, base
        self.failed: list[str] = []
        self.bar = new_bar("{task.fields[case]}")

    def pytest_configure(self, config: Any) -> None:
        from bench import measure

        config.stash[measure.CHOSEN] = self.chosen
        if self.base is not None:
            config.stash[measure.BASE] = self.base

    def pytest_collection_finish(self, session: Any) -> None:
        self.task = self.bar.add_task("bench", total=len(session.items), case="")
        self.bar.start()

    def pytest_runtest_logstart(self, nodeid: str, location: Any) -> None:
        name = nodeid.partition("[")[2].removesuffix("]") or nodeid.rpartition("::")[2]
        self.bar.update(self.task, case=name.replace("[", r"\["))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call":
            self.bar.advance(self.task)
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failed.append(f"{report.nodeid.partition('::')[2]}: {crash.message if crash else report.longrepr}")

    def pytest_sessionfinish(self) -> None:
        self.bar.stop()


def tidy(raw: dict[str, Any], line: str, command: str) -> dict[str, Any]:
    """pytest-benchmark's JSON without the machine's name and what fills pages: single times, processor flags."""
    for r in raw["benchmarks"]:
        r["stats"].pop("data", None)
        r.pop("params", None)
    raw["machine_info"].pop("node", None)
    raw["machine_info"].get("cpu", {}).pop("flags", None)
    raw["commit_info"] = {key: raw["commit_info"].get(key) for key in ("id", "time", "dirty")}
    return {"machine": line, "command": command, **raw}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        code: int = importlib.import_module(f"bench.{argv[0]}").main(argv[1:])
        return code
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=(__doc__ or "").replace("``", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suite", nargs="+", choices=[*suites(), "all"], help="what to measure")
    parser.add_argument(
        "--base", metavar="REF", help="also time the code of another commit, round by round; exit 1 if slower"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="X",
        help="with --base: slower by how much, beyond the spread (default: 0.05)",
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="also write pytest-benchmark's JSON, for report"
    )
    parser.add_argument(
        "-k", metavar="EXPRESSION", default="", help='a part of the cases, as in pytest: "both and not memory"'
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="CPU seconds of the process instead of the clock: for a busy machine, with OMP_NUM_THREADS=1",
    )
    options = parser.parse_args(argv)
    import torch

    from infoclip.errors import InfoclipError

    if options.cpu_time and torch.get_num_threads() != 1:
        parser.error("--cpu-time adds up all threads: set OMP_NUM_THREADS=1")
    if options.threshold is not None and not options.base:
        parser.error("--threshold is the regression gate's: it needs --base")
    if options.threshold is not None and not options.threshold >= 0:
        parser.error(f"--threshold: expected 0 or more, got {options.threshold}")
    try:
        return run(options, f"python -m bench {' '.join(argv)}")
    except InfoclipError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped: no table.", file=sys.stderr)
        return 130


def run(options: argparse.Namespace, command: str) -> int:
    import pytest

    from bench import base as other
    from bench import harness

    if options.base:
        other.resolve(options.base)  # a wrong name is said at once
    found = harness.all_suites()
    names = list(found) if "all" in options.suite else list(dict.fromkeys(options.suite))
    chosen = tuple(suite for name in names for suite in found[name])
    red = [op for op in dict.fromkeys(suite.op for suite in chosen) if not green(op)]
    if red:
        print(f"error: the tests of {', '.join(red)} fail, so there is no table.", file=sys.stderr)
        return 1
    line = harness.machine() + ("; CPU time" if options.cpu_time else "")
    timer = "process_time" if options.cpu_time else "perf_counter"
    # A terminated run, too, leaves no checkout behind.
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            other.opened(options.base, timer) if options.base else contextlib.nullcontext() as base,
        ):
            raw = Path(folder) / "raw.json"
            arguments = [
                str(HERE / "measure.py"), "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-x", "--timeout=0",
                "--benchmark-only", "--benchmark-quiet", f"--benchmark-timer=time.{timer}", f"--benchmark-json={raw}",
                "--benchmark-disable-gc", "-k", f"({options.k}) or matrix_rate or test_copy" if options.k else "",
            ]  # fmt: skip
            session = _Session(chosen, base)
            told = io.StringIO()
            with contextlib.redirect_stdout(told):
                code = pytest.main(arguments, plugins=[session])
            if code == pytest.ExitCode.INTERRUPTED:
                raise KeyboardInterrupt
            if code != pytest.ExitCode.OK:
                print("\n".join(session.failed) or told.getvalue()[-2000:], file=sys.stderr)
                print("error: a case failed, so there is no table.", file=sys.stderr)
                return 1
            result = tidy(json.loads(raw.read_text()), line, command)
            missing = {} if base is None else base.missing
    finally:
        signal.signal(signal.SIGTERM, before)
    rows = harness.rows_of(result["benchmarks"])
    print(f"{line}\n{command}\n\n{harness.rates_line(harness.rates_of(result['benchmarks']))}\n\n{harness.table(rows)}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if base is None:
        return 0
    threshold = other.THRESHOLD if options.threshold is None else options.threshold
    print(f"\n{other.comparison(rows, base.commit, threshold)}")
    for what, why in missing.items():
        print(f"not in {base.commit[:9]}: {what} ({why})")
    slow = other.regressions(rows, threshold)
    if slow:
        print(f"error: {len(slow)} of the cases are slower than {base.commit[:9]} by more than {threshold:.0%}.",
              file=sys.stderr)  # fmt: skip
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
