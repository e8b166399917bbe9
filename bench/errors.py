"""``python -m bench errors``: each op's distance to float64 at the published size, by backend and dtype.

Inputs are rounded to the dtype first; the reference then computes value and gradients in float64 from the very same
numbers. Told is the relative distance (L2), of the gradients the largest. Triton's kernels run on a GPU, or else in its
interpreter, at a small size.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.arguments import output_file
from bench.harness import DTYPES, Suite, all_suites, distance, machine, place
from infoclip import kernels

__all__ = ["collect", "main", "table"]


def of_suite(suite: Suite, device: str, dtype: str, backends: Sequence[str], small: bool) -> list[dict[str, Any]]:
    """A row a backend; one image of the published size, or the suite's small one.

    A published case that is taken once is too large for float64: the largest of the others stands for it.
    """
    cases = suite.cases()
    published = next(case for case in cases if case.published)
    if published.once:
        published = max((case for case in cases if not case.once), key=lambda case: sum(suite.operations(case.sizes)))
    sizes = suite.tiny if small else (1, *published.sizes[1:])
    placed = place(suite, sizes, device, dtype)
    wide = [x.detach().double().requires_grad_() for x in placed.leaves]
    truth = dataclasses.replace(
        placed,
        arguments=[*wide, *placed.arguments[len(wide) :]],
        leaves=wide,
        grad=None if placed.grad is None else placed.grad.double(),
    )
    want = truth.run("reference")
    slopes = truth.gradients(want)
    rows = []
    for backend in backends:
        got = placed.run(backend)
        errors = [distance(*pair) for pair in zip(placed.gradients(got), slopes, strict=True)]
        rows.append(
            {
                "op": suite.title, "device": device, "dtype": dtype, "backend": backend,
                "case": "small" if small else published.name.replace(f"B{published.sizes[0]}", "B1"),
                "value": distance(got.detach(), want.detach()), "gradient": max(errors),
            }
        )  # fmt: skip
    return rows


def collect(names: Sequence[str], interpreted: bool) -> list[dict[str, Any]]:
    """Rows of the suites on every device; in Triton's interpreter of its kernels alone."""
    from infoclip.progress import tracked

    kernels.ops()
    wanted = []
    devices = ["cpu"] if interpreted or not torch.cuda.is_available() else ["cpu", "cuda"]
    for suite in (suite for name in names for suite in all_suites()[name]):
        for device in devices:
            for dtype, kind in DTYPES.items():
                able = [b for b in kernels.BACKENDS if kernels.why_not(suite.op, b, device, kind) is None]
                able = [b for b in able if (b == "triton") == interpreted or device == "cuda"]
                if able:
                    wanted.append((suite, device, dtype, able, interpreted))
    description = "errors, Triton's interpreter" if interpreted else "errors"
    return [row for item in tracked(wanted, description, True) for row in of_suite(*item)]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row an op, backend and dtype."""
    lines = ["| op | on | backend | case | dtype | value | gradient |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        where = f"{r['op']} | {r['device']} | {r['backend']} | {r['case']} | {r['dtype']}"
        lines.append(f"| {where} | {r['value']:.1e} | {r['gradient']:.1e} |")
    return "\n".join(lines)


def _in_the_interpreter(names: Sequence[str]) -> list[dict[str, Any]]:
    """The same command in a process in which Triton's interpreter was chosen before its kernels were defined."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "errors.json"
        command = [sys.executable, "-m", "bench", "errors", *names, "--interpreted", "--json", str(file)]
        subprocess.run(
            command, env={**os.environ, "TRITON_INTERPRET": "1"}, stdout=subprocess.DEVNULL, check=True,
            cwd=Path(__file__).resolve().parent.parent,
        )  # fmt: skip
        rows: list[dict[str, Any]] = json.loads(file.read_text())["errors"]
        return rows


def main(argv: list[str] | None = None) -> int:
    names = list(all_suites())
    parser = argparse.ArgumentParser(
        prog="python -m bench errors", description="Distance of every op, backend and dtype to float64."
    )
    parser.add_argument("op", nargs="*", metavar="OP", help=f"any of {', '.join(names)} (default: all)")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write the rows as JSON, for report")
    parser.add_argument("--interpreted", action="store_true", help="Triton's kernels alone, in its interpreter")
    options = parser.parse_args(argv)
    for op in options.op:
        if op not in names:
            parser.error(f"unknown op {op!r}: expected some of {', '.join(names)}")
    if options.interpreted and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--interpreted: set TRITON_INTERPRET=1, which chooses the interpreter before kernels are defined")
    chosen = options.op or names
    rows = collect(chosen, options.interpreted)
    if not options.interpreted and not torch.cuda.is_available():
        from infoclip.kernels.triton_support import MISSING

        if MISSING:
            print(f"not looked at: Triton kernels: {MISSING}", file=sys.stderr)
        else:
            rows += _in_the_interpreter(chosen)
    line, command = machine(), " ".join(["python -m bench errors", *(argv or [])])
    print(f"{line}\n{command}\n\n{table(rows)}")
    if options.json:
        facts = {"machine": line, "command": command, "errors": rows}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    return 0
