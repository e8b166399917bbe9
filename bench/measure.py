"""The benchmarks as pytest-benchmark runs them: ``python -m bench`` collects this file with the suites asked for.

``test_matrix_rate`` and ``test_copy`` give the machine's own rates, for the floors; ``test_speed`` times every case,
part and backend, after its values were checked; ``test_memory`` reads the peak of both passes in a fresh process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench import harness
from bench.base import Base, compared
from bench.harness import DTYPES, PARTS, Case, Placed, Suite
from bench.peak import peak

CHOSEN = pytest.StashKey[tuple[Suite, ...]]()
"""The suites to run, and the other commit's code to run beside them; the command sets both in pytest's config."""
BASE = pytest.StashKey[Base]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = metafunc.fixturenames
    if "form" in names:
        forms = [(device, dtype, form) for device, dtype in harness.where() for form in FORMS]
        metafunc.parametrize(("device", "dtype", "form"), forms, ids="-".join)
    elif "device" in names and "suite" not in names:
        metafunc.parametrize("device", list(dict.fromkeys(device for device, _ in harness.where())))
    elif "suite" in names:
        found = []
        for suite in metafunc.config.stash[CHOSEN]:
            for case in suite.cases():
                for part in PARTS if "part" in names else ("memory",):
                    for device, dtype, backend in harness.contenders(suite):
                        if case.once and (part != "memory" or backend not in case.once):
                            continue
                        label = f"{suite.title}: {case.name}, {part}, {device} {dtype}, {backend}"
                        values = (suite, case, *([part] if "part" in names else []), device, dtype, backend)
                        found.append(pytest.param(*values, id=label))
        parts = ("part",) if "part" in names else ()
        metafunc.parametrize(("suite", "case", *parts, "device", "dtype", "backend"), found)


def _product(side: int, device: str, dtype: torch.dtype) -> tuple[Callable[[], Any], float]:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, 2.0 * side**3


def _convolution(device: str, dtype: torch.dtype) -> tuple[Callable[[], Any], float]:
    """A product of 4096 x 512 with 512 x 512 as a convolution over one pixel: on a CPU by another library."""
    x = torch.randn(4, 512, 32, 32, device=device).to(dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(512, 512, 1, 1, device=device).to(dtype)
    return lambda: F.conv2d(x, weight), 2.0 * 4 * 32 * 32 * 512 * 512


FORMS: dict[str, Callable[[str, torch.dtype], tuple[Callable[[], Any], float]]] = {
    **{f"mm {side}": functools.partial(_product, side) for side in (512, 1024, 2048)},
    "conv 1 x 1": _convolution,
    **({"mm 8192": functools.partial(_product, 8192)} if torch.cuda.is_available() else {}),
}


def _time(benchmark: Any, step: Callable[[], Any], device: str, other: Callable[[], float] | None = None) -> None:
    """Rounds of the step; with ``other``, each beside a round of another commit's code, which returns its seconds."""
    step, rounds = harness.calibrated(step, device)
    base: list[float] = []

    def before() -> None:
        if other is not None:
            base.append(other())
            step()  # what the other process took of the caches

    benchmark.pedantic(step, setup=before, rounds=rounds)
    seconds = benchmark.stats.stats.data
    benchmark.extra_info.update(harness.quantiles(seconds))
    if base:
        benchmark.extra_info["base"] = compared(seconds, base)


def test_matrix_rate(benchmark: Any, device: str, dtype: str, form: str) -> None:
    step, operations = FORMS[form](device, DTYPES[dtype])
    benchmark.extra_info.update(op="machine", device=device, dtype=dtype, case=form, amount=operations)
    _time(benchmark, step, device)


def test_copy(benchmark: Any, device: str) -> None:
    """Bytes read and written by a copy that no cache holds."""
    source = torch.ones(64 * 2**20, device=device)
    target = torch.empty_like(source)
    amount = 2 * source.numel() * source.element_size()
    benchmark.extra_info.update(op="machine", device=device, dtype="copy", case="256 MiB", amount=amount)
    _time(benchmark, lambda: target.copy_(source), device)


@functools.lru_cache(maxsize=4)  # the dtypes and devices of one case: what is compared shares its inputs
def _placed(suite: Suite, case: str, device: str, dtype: str) -> Placed:
    sizes = next(c.sizes for c in suite.cases() if c.name == case)
    return harness.place(suite, sizes, device, dtype)


_checked: set[tuple[str, str, str, str, str]] = set()


def _facts(suite: Suite, case: Case, part: str, device: str, dtype: str, backend: str) -> dict[str, Any]:
    both = {"forward": (1, 0), "backward": (0, 1)}.get(part, (1, 1))
    counted = {
        name: sum(x * y for x, y in zip(both, values, strict=True))
        for name, values in (
            ("flop", suite.operations(case.sizes)),
            ("bytes", suite.traffic(case.sizes, DTYPES[dtype].itemsize)),
        )
    }
    return {
        "op": suite.title, "device": device, "dtype": dtype, "case": case.name, "part": part, "backend": backend,
        "published": case.published, "once": bool(case.once), "series": case.series, "n": case.n,
        "arithmetic": "float32" if suite.widened else dtype, **counted,
    }  # fmt: skip


def test_speed(
    benchmark: Any, request: pytest.FixtureRequest, suite: Suite, case: Case, part: str, device: str, dtype: str,
    backend: str,
) -> None:  # fmt: skip
    placed = _placed(suite, case.name, device, dtype)
    key = (suite.title, case.name, device, dtype, backend)
    if backend != "reference" and key not in _checked:
        harness.check(placed, backend, dtype)
        _checked.add(key)
    benchmark.extra_info.update(_facts(suite, case, part, device, dtype, backend))
    base = request.config.stash.get(BASE, None)
    other = None if base is None else base.timer(suite, case, part, device, dtype, backend)
    _time(benchmark, placed.steps(backend)[part], device, other)


def test_memory(benchmark: Any, suite: Suite, case: Case, device: str, dtype: str, backend: str) -> None:
    bound = suite.bound(case.sizes, device, dtype, harness.packed_bytes(dtype))
    bounded = backend in ("native", "triton")
    found: list[tuple[int, float]] = []

    def measure() -> None:
        found.append(peak(suite.title, case.sizes, device, dtype, backend, torch.get_num_threads()))

    benchmark.pedantic(measure, rounds=1)
    bytes_, seconds = found[0]
    benchmark.extra_info.update(_facts(suite, case, "memory", device, dtype, backend))
    benchmark.extra_info.update(peak=bytes_, seconds=seconds, bound=bound if bounded else None)
    assert not bounded or bytes_ <= bound, f"the peak is {bytes_ / 1e6:.1f} MB, the stated bound {bound / 1e6:.1f} MB"
