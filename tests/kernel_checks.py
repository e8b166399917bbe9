"""What every op's tests do alike: uninitialised memory as NaN, Triton's interpreter, compilation without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from infoclip import native

__all__ = [
    "BACKENDS",
    "EPS",
    "INTERPRETED",
    "assert_captured_within",
    "assert_compiles",
    "assert_passes_in_the_interpreter",
    "nan_filled_memory",
    "needs_native",
]

EPS = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float64: 2**-53}
"""The rounding of each dtype: half a unit in the last place of 1."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process runs Triton's kernels in the interpreter; its tests take that form alone."""
needs_native = pytest.mark.skipif(not native.available(), reason=str(native.why_not()))
BACKENDS = ["triton"] if INTERPRETED else [pytest.param("native", marks=needs_native)]
"""What an op's tests hold to its reference."""


@contextmanager
def nan_filled_memory() -> Iterator[None]:
    """``torch.empty`` is NaN inside, so that an element that nobody writes does not look right by chance."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def assert_passes_in_the_interpreter(file: str) -> None:
    """A test file again with Triton's kernels, whose interpreter must be chosen before they are defined."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout


def assert_compiles(op: str, capability: int) -> None:
    """The launches that a room declares as quick, to machine code for a GPU generation, and nothing wrong with it."""
    pytest.importorskip("triton")
    from bench import aot

    calls, _ = aot.declared(op)
    rows = aot.triton_rows(op, [call for call in calls if call.quick], [capability])
    assert rows
    failing = {f"{row.kernel} ({row.case})": row.failures for row in rows if row.failures}
    assert not failing


def assert_captured_within(step: Callable[[], Sequence[Tensor]], most: int) -> None:
    """On a GPU: the step is captured in a CUDA graph, whose replay gives the eager bits, and takes ``most`` bytes.

    ``most`` is an upper bound, and counts what the step returns too.
    """
    want = [v.clone() for v in step()]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    assert torch.cuda.max_memory_allocated() - before <= most
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # a wait for the device ends the capture with an error
        got = step()
    for v in got:
        v.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
