"""What the benchmarks share: a suite's form, what is timed and checked, the table, the machine's line.

A suite is a file ``bench/suite_<op>.py`` whose ``SUITES`` state cases, inputs, arithmetic, traffic and the byte bound
of an op; everything else is here. Cases take their sizes from the recipes (``bench/shapes.py``).
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infoclip import kernels

__all__ = ["PARTS", "Case", "Problem", "Suite", "all_suites", "contenders", "green", "machine", "rows_of", "table"]

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("forward", "backward", "both")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ALLOCATOR = 4 * 2**20
"""Bytes that threads and the allocator may keep of a step on the CPU, whatever its size: a part of every bound."""

Sizes = Any
"""The numbers of a case, of lists and whole numbers: they travel to other processes as JSON."""


@dataclass(frozen=True)
class Case:
    """One size at which an op is measured."""

    name: str
    sizes: Sizes
    published: bool = False
    """The size that stands for the op in summaries."""
    once: tuple[str, ...] = ()
    """Backends that take it, once each, in the process that reads its memory, values unchecked: a case too large for
    rounds, or for the others. Empty: all of them, in rounds."""
    series: str = ""
    """Cases of one series differ in ``n`` alone and become a line in the plots."""
    n: int = 0


@dataclass(frozen=True)
class Problem:
    """The inputs of one case in float32 on the CPU, and the call on them.

    ``call`` takes the backend, then ``leaves``, ``precise`` and ``fixed``. Leaves are brought to the dtype that is
    measured; ``precise`` stay float32, ``fixed`` are moved alone and need no gradient. ``result`` is the shape of the
    incoming gradient; None for a result that is a loss, whose gradient is one.
    """

    call: Callable[..., Tensor]
    leaves: tuple[Tensor, ...]
    precise: tuple[Tensor, ...] = ()
    fixed: tuple[Any, ...] = ()
    result: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Suite:
    """An op, or one form of it, as it is measured."""

    op: str
    """The op whose tests must be green."""
    cases: Callable[[], Sequence[Case]]
    make: Callable[[Sizes], Problem]
    tiny: Sizes
    """A size of the same form that takes no time: for what is set up at the first call, and for interpreters."""
    operations: Callable[[Sizes], tuple[float, float]]
    """Floating-point operations that forward and backward cannot do without."""
    traffic: Callable[[Sizes, int], tuple[float, float]]
    """Bytes that forward and backward must read and write, each tensor once, with ``n`` bytes an entry of the dtype."""
    bound: Callable[[Sizes, str, str, int], float]
    """Stated bytes that forward and backward may add beyond the inputs, results and gradients included; from sizes,
    device, dtype and the bytes of a packed entry on this CPU."""
    name: str = ""
    """Of a form of the op; empty for the op itself."""
    slack: Mapping[str, float] = field(default_factory=lambda: {"float32": 1e-5, "float16": 4e-3, "bfloat16": 2e-2})
    """Relative distance (L2) of value and gradients to the reference in the same dtype above which there is no figure:
    float32 sums in another order, and a few roundings to a half."""
    widened: bool = False
    """The arithmetic is float32's whatever the dtype: its floor is float32's too."""
    rivals: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    """Other forms to time on a GPU: name -> what takes the arguments of ``Problem.call`` but the backend."""

    @property
    def title(self) -> str:
        return self.name or self.op


def all_suites() -> dict[str, tuple[Suite, ...]]:
    """Name of the file after ``suite_`` -> its suites."""
    names = sorted(path.stem.removeprefix("suite_") for path in Path(__file__).parent.glob("suite_*.py"))
    return {name: importlib.import_module(f"bench.suite_{name}").SUITES for name in names}


def find_suite(title: str, module: str | None = None) -> Suite:
    """The suite of that title; where its module is named, no other suite's is imported."""
    files = all_suites().values() if module is None else [importlib.import_module(module).SUITES]
    return next(suite for suites in files for suite in suites if suite.title == title)


# What is measured -----------------------------------------------------------------------------------------------------


def bf16_on_cpu() -> bool:
    """Whether the CPU multiplies bfloat16 as it is (AVX512-BF16), so that a time in it means something."""
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def packed_bytes(dtype: str) -> int:
    """Bytes of an entry as the native products on this CPU pack it."""
    return 2 if dtype == "bfloat16" and bf16_on_cpu() else 4


def where() -> list[tuple[str, str]]:
    """Devices and dtypes to measure."""
    found = [("cpu", "float32"), *([("cpu", "bfloat16")] if bf16_on_cpu() else [])]
    if torch.cuda.is_available():
        found += [("cuda", "float32"), ("cuda", "bfloat16")]
    return found


def contenders(suite: Suite) -> list[tuple[str, str, str]]:
    """Device, dtype and backend of all that can run here; on a GPU also the compiled reference and the rivals."""
    kernels.ops()
    found = []
    for device, dtype in where():
        names = [b for b in kernels.BACKENDS if kernels.why_not(suite.op, b, device, DTYPES[dtype]) is None]
        found += [(device, dtype, name) for name in names]
        if device == "cuda":
            found += [(device, dtype, name) for name in ("compiled", *suite.rivals)]
    return found


@dataclass
class Placed:
    """A problem on a device in a dtype, with its incoming gradient."""

    suite: Suite
    call: Callable[..., Tensor]
    arguments: list[Any]
    leaves: list[Tensor]
    grad: Tensor | None

    def run(self, backend: str) -> Tensor:
        if backend == "compiled":
            return _compiled(self.call)(*self.arguments)
        if backend in self.suite.rivals:
            return self.suite.rivals[backend](*self.arguments)
        return self.call(backend, *self.arguments)

    def gradients(self, out: Tensor, keep: bool = False) -> tuple[Tensor, ...]:
        grad = torch.ones_like(out) if self.grad is None else self.grad
        return torch.autograd.grad(out, self.leaves, grad, retain_graph=keep)

    def steps(self, backend: str) -> dict[str, Callable[[], Any]]:
        """What is timed, by part. The graph of ``backward`` is kept between calls, and made at the first."""
        kept: list[Tensor] = []

        def forward() -> Tensor:
            with torch.no_grad():
                return self.run(backend)

        def backward() -> tuple[Tensor, ...]:
            if not kept:
                kept.append(self.run(backend))
            return self.gradients(kept[0], keep=True)

        return {"forward": forward, "backward": backward, "both": lambda: self.gradients(self.run(backend))}


@functools.lru_cache(maxsize=4)
def _compiled(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(functools.partial(call, "reference"), fullgraph=True)


def place(suite: Suite, sizes: Sizes, device: str, dtype: str | torch.dtype) -> Placed:
    kind = DTYPES[dtype] if isinstance(dtype, str) else dtype
    problem = suite.make(sizes)
    wide = torch.float64 if kind == torch.float64 else torch.float32
    leaves = [x.to(device, kind).requires_grad_() for x in problem.leaves]
    leaves += [x.to(device, wide).requires_grad_() for x in problem.precise]
    fixed = [x.to(device) if isinstance(x, Tensor) else x for x in problem.fixed]
    grad = None
    if problem.result is not None:
        grad = torch.randn(problem.result, generator=torch.Generator().manual_seed(1)).to(device, kind)
    return Placed(suite, problem.call, [*leaves, *fixed], leaves, grad)


def distance(got: Tensor, want: Tensor) -> float:
    """Relative L2 distance."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def check(placed: Placed, backend: str, dtype: str) -> None:
    """Raise ``AssertionError`` where value or gradients are not the reference's."""
    out, want = placed.run(backend), placed.run("reference")
    slack = placed.suite.slack[dtype]
    pairs = [("value", out.detach(), want.detach())]
    gradients = zip(placed.gradients(out), placed.gradients(want), strict=True)
    pairs += [(f"gradient {i}", *pair) for i, pair in enumerate(gradients)]
    for name, got, expected in pairs:
        assert distance(got, expected) <= slack, (
            f"{placed.suite.title}, {backend}, {dtype}: the {name} is off by {distance(got, expected):.1e} of the "
            f"reference's, more than {slack:.0e}"
        )


def calibrated(
    step: Callable[[], Any], device: str, budget: float = 1.0, most: int = 40
) -> tuple[Callable[[], Any], int]:
    """The step with its device waited for, warm, and how many rounds of it fit the budget (seconds): at least 5.

    A step of a second or more is warm after one call.
    """

    def waited() -> None:
        step()
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        start = time.perf_counter()
        waited()
        seconds = time.perf_counter() - start
        if seconds >= 1:
            break
    return waited, max(5, min(most, int(budget / max(seconds, 1e-9))))


# The table ------------------------------------------------------------------------------------------------------------

KEY = ("op", "device", "dtype", "case", "part", "backend")


def rates_of(benchmarks: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    """(device, dtype) -> FLOP/s, and (device, "copy") -> bytes/s: of several forms the best median of the run."""
    rates: dict[tuple[str, str], float] = {}
    for r in benchmarks:
        x = r["extra_info"]
        if x["op"] == "machine":
            key = (x["device"], x["dtype"])
            rates[key] = max(rates.get(key, 0.0), x["amount"] / r["stats"]["median"])
    return rates


def rows_of(benchmarks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a case, part and backend, from the JSON of one run of pytest-benchmark.

    Times in ms at the 20, 50 and 80 % quantiles; ``ratio`` to the reference and ``bf16_ratio`` to the same backend in
    float32, of medians; ``share`` of the floor, which is the larger of bytes over copy bandwidth and operations over
    matrix rate; peak and bound in bytes, beside "both". What was not timed has None.
    """
    rates = rates_of(benchmarks)
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    memory: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for r in benchmarks:
        x = r["extra_info"]
        if x["op"] == "machine":
            continue
        key = tuple(x[name] for name in KEY)
        if x["part"] == "memory":
            memory[(*key[:4], "both", key[5])] = x
            continue
        rows[key] = {
            **{name: x[name] for name in (*KEY, "published", "series", "n", "flop", "bytes", "arithmetic")},
            **{q: x[q] * 1e3 for q in ("q20", "q50", "q80")},
            "rounds": r["stats"]["rounds"],
            **({"base": x["base"]} if "base" in x else {}),
        }
    for key, x in memory.items():
        if key not in rows:
            facts = {name: x[name] for name in ("published", "series", "n", "flop", "bytes", "arithmetic")}
            # The one pass of a case that is too large for rounds; others were timed elsewhere, or not at all.
            once = 1e3 * x["seconds"] if x["once"] else None
            rows[key] = {**dict(zip(KEY, key, strict=True)), **facts, "rounds": 1}
            rows[key] |= dict.fromkeys(("q20", "q50", "q80"), once)
        rows[key] |= {"peak": x["peak"], "bound": x["bound"]}
    for key, row in rows.items():
        op, device, dtype, case, part, backend = key
        reference = rows.get((op, device, dtype, case, part, "reference"))
        single = rows.get((op, device, "float32", case, part, backend))
        floor = max(
            row["bytes"] / rates.get((device, "copy"), float("inf")),
            row["flop"] / rates.get((device, row["arithmetic"]), float("inf")),
        )
        time_ = row["q50"]
        row["ratio"] = reference["q50"] / time_ if reference and time_ else None
        row["bf16_ratio"] = single["q50"] / time_ if single and time_ and dtype == "bfloat16" else None
        row["share"] = 1e3 * floor / time_ if floor and time_ else None
        row.setdefault("peak", None)
        row.setdefault("bound", None)
    return list(rows.values())


def _megabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:.1f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def rates_line(rates: Mapping[tuple[str, str], float]) -> str:
    """One sentence a device: matrix rates and copy bandwidth of the run."""
    lines = []
    for device in dict.fromkeys(device for device, _ in rates):
        mine = {kind: rate for (where, kind), rate in rates.items() if where == device}
        products = ", ".join(f"{kind} {rate / 1e9:.0f} GFLOP/s" for kind, rate in mine.items() if kind != "copy")
        copy = f"; copy {mine['copy'] / 1e9:.1f} GB/s" if "copy" in mine else ""
        lines.append(f"{device}: matrix rate {products}{copy} (the best of several forms, in this run)")
    return "\n".join(lines)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a table for each op and device."""
    lines = []
    for op, device in dict.fromkeys((row["op"], row["device"]) for row in rows):
        lines += [
            f"**{op}**, {device}\n",
            "| case | part | dtype | backend | 20 / 50 / 80 % ms | x reference | x fp32 | GFLOP/s | of the floor "
            "| peak MB | bound MB |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for r in rows:
            if (r["op"], r["device"]) != (op, device):
                continue
            times, speed = "", ""
            if r["q50"] is not None:
                speed = f"{r['flop'] / r['q50'] / 1e6:.1f}"
                times = " / ".join(f"{r[q]:.2f}" for q in ("q20", "q50", "q80"))
                times = f"{r['q50']:.0f} once" if r["rounds"] == 1 else times
            share = "" if r["share"] is None else f"{r['share']:.0%}"
            lines.append(
                f"| {r['case']} | {r['part']} | {r['dtype']} | {r['backend']} | {times} | {_ratio(r['ratio'])} "
                f"| {_ratio(r['bf16_ratio'])} | {speed} | {share} | {_megabytes(r['peak'])} "
                f"| {_megabytes(r['bound'])} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """The 20, 50 and 80 % quantiles, linear between samples."""
    if len(seconds) == 1:
        return dict.fromkeys(("q20", "q50", "q80"), seconds[0])
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    return {"q20": cuts[1], "q50": cuts[4], "q80": cuts[7]}


# Machine and tests ----------------------------------------------------------------------------------------------------


def machine() -> str:
    """One line: what ran this, and which commit."""
    from infoclip.engine.environment import collect_environment

    found = collect_environment()
    gpus = ", ".join(gpu["name"] for gpu in found["gpus"]) or "no GPU"
    commit = str(found["git_commit"] or "no commit")
    return (
        f"{found['cpu']}, {found['cpu_count']} cores, {found['threads']} threads; {gpus}; "
        f"torch {found['packages']['torch']}; commit {commit}; {found['started']}"
    )


def green(op: str, root: Path = ROOT) -> bool:
    """Whether the tests of an op pass: no speed is told of a wrong result.

    They run once for each content of what they test: the room, its C++ and the built module, the tests, torch.
    """
    import torch

    tests = root / "tests" / f"test_{op}.py"
    found = hashlib.sha256(f"{torch.__version__} {torch.cuda.is_available()}".encode())
    files = [tests, root / "tests" / "kernel_checks.py", *(root / "infoclip").glob("_C*.so")]
    for folder in (root / "kernels" / op, root / "csrc" / op, root / "csrc" / "common", root / "infoclip" / "kernels"):
        files += [file for file in folder.rglob("*") if file.suffix != ".pyc"]
    for file in sorted(file for file in files if file.is_file()):
        found.update(str(file.relative_to(root)).encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    passed = root / "build" / "bench" / f"{op}.green"
    if passed.is_file() and passed.read_text() == found.hexdigest():
        return True
    print(f"{op}: running its tests first ({tests.relative_to(root)}) ...", file=sys.stderr)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-2000:], file=sys.stderr)
        return False
    passed.parent.mkdir(parents=True, exist_ok=True)
    passed.write_text(found.hexdigest())
    return True
