"""``python -m bench SUITE... [--json FILE]``: speed of each op against its reference, as ratios of medians in one run.

``python -m bench aot [OP...]`` compiles every GPU kernel without a GPU (``bench/aot.py``); ``python -m bench bounds``
counts what a training step of the aggregation computes and keeps (``bench/bounds.py``).

A suite is a file ``bench/suite_<name>.py`` of pytest-benchmark cases; ``all`` runs every one. A case checks its values
against the reference before it is timed, and the op's tests must pass, so there is no figure for a wrong result.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.harness import green, machine

HERE = Path(__file__).resolve().parent


def suites() -> list[str]:
    return sorted(path.stem.removeprefix("suite_") for path in HERE.glob("suite_*.py"))


def table(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a case: medians in ms, the ratio to the reference, GFLOP/s and the share of the matrix rate."""
    rates = {
        (r["extra_info"]["device"], r["extra_info"]["dtype"]): r["extra_info"]["flop"] / r["stats"]["median"]
        for r in results
        if r["extra_info"]["op"] == "matrix"
    }
    keys = ("op", "device", "dtype", "case", "part", "backend")
    medians = {tuple(r["extra_info"][key] for key in keys): r["stats"]["median"] for r in results}
    rows = []
    for r in results:
        x = r["extra_info"]
        if x["op"] == "matrix":
            continue
        median = r["stats"]["median"]
        reference = medians.get((x["op"], x["device"], x["dtype"], x["case"], x["part"], "reference"))
        rate = x["flop"] / median
        rows.append(
            {
                **{key: x[key] for key in keys},
                "median_ms": median * 1e3,
                "iqr_ms": r["stats"]["iqr"] * 1e3,
                "rounds": r["stats"]["rounds"],
                "ratio": reference / median if reference else None,
                "gflops": rate / 1e9,
                "share": rate / rates[x["device"], x["dtype"]] if (x["device"], x["dtype"]) in rates else None,
            }
        )
    return rows


def show(line: str, results: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    print(f"\n{line}\n")
    for r in results:
        x = r["extra_info"]
        if x["op"] == "matrix":
            rate = x["flop"] / r["stats"]["median"] / 1e9
            print(f"matrix rate, {x['device']} {x['dtype']}: {rate:.0f} GFLOP/s (torch.mm, {x['case']})")
    head = "| op | on | case | part | backend | median ms (IQR) | x reference | GFLOP/s | of the matrix rate |"
    print(f"\n{head}\n|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        ratio = f"{row['ratio']:.2f}" if row["ratio"] else ""
        share = f"{row['share']:.0%}" if row["share"] else ""
        print(
            f"| {row['op']} | {row['device']} {row['dtype']} | {row['case']} | {row['part']} | {row['backend']} "
            f"| {row['median_ms']:.2f} ({row['iqr_ms']:.2f}) | {ratio} | {row['gflops']:.1f} | {share} |"
        )


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["aot"]:
        from bench import aot

        return aot.main(argv[1:])
    if argv[:1] == ["bounds"]:
        from bench import bounds

        return bounds.main(argv[1:])
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__.splitlines()[0].replace("``", ""),
        epilog="python -m bench aot --help: every GPU kernel compiled without a GPU. "
        "python -m bench bounds --help: what the aggregation computes and keeps, counted.",
    )
    parser.add_argument("suite", nargs="+", choices=[*suites(), "all"], help="what to time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="CPU seconds of the process instead of the clock: for a busy machine, with OMP_NUM_THREADS=1",
    )
    arguments = parser.parse_args(argv)
    import pytest
    import torch

    if arguments.cpu_time and torch.get_num_threads() != 1:
        parser.error("--cpu-time adds up all threads: set OMP_NUM_THREADS=1")

    names = suites() if "all" in arguments.suite else arguments.suite
    red = [name for name in names if not green(name)]
    if red:
        print(f"error: the tests of {', '.join(red)} fail, so there is no table.", file=sys.stderr)
        return 1
    line = machine() + ("; CPU time" if arguments.cpu_time else "")
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        files = [str(HERE / f"suite_{name}.py") for name in names]
        options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--benchmark-only", "--benchmark-quiet"]
        if arguments.cpu_time:
            options.append("--benchmark-timer=time.process_time")
        code = pytest.main([*files, *options, f"--benchmark-json={raw}", "--benchmark-disable-gc"])
        if code != 0:
            print("error: a case failed, so there is no table.", file=sys.stderr)
            return 1
        results = json.loads(raw.read_text())["benchmarks"]
    rows = table(results)
    show(line, results, rows)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": line, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
