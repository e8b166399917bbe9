"""Peak bytes of one forward and backward pass, in a process of its own (``python -m bench.peak``).

On the CPU the most that was resident beyond what was resident before the pass; on CUDA the same of torch's allocator.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

__all__ = ["give_back", "peak", "reset_peak", "resident"]


def resident(key: str) -> int:
    """Resident bytes of this process: ``VmRSS`` now, ``VmHWM`` at most since the last reset."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def give_back() -> None:
    """Hand what the allocator holds on to back to the system: memory of a step before would hide this one's peak."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def reset_peak() -> None:
    """The peak of resident memory starts anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak(suite: str, sizes: Any, device: str, dtype: str, backend: str, threads: int) -> tuple[int, float]:
    """Bytes that forward and backward add at their peak, and the seconds they took, in a fresh process.

    Raises:
        RuntimeError: the process failed; its last words.
    """
    request = json.dumps([suite, sizes, device, dtype, backend, threads])
    command = [sys.executable, "-m", "bench.peak", request]
    done = subprocess.run(
        command, cwd=Path(__file__).resolve().parent.parent, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{suite}, {backend}, {dtype}: {(done.stderr or done.stdout).strip()[-800:]}")
    bytes_, seconds = json.loads(done.stdout.splitlines()[-1])
    return bytes_, seconds


def _here(suite: str, sizes: Any, device: str, dtype: str, backend: str, threads: int) -> tuple[int, float]:
    import torch

    from bench.harness import find_suite, place

    torch.set_num_threads(threads)
    found = find_suite(suite)
    place(found, found.tiny, device, dtype).steps(backend)["both"]()  # threads and libraries
    step = place(found, sizes, device, dtype).steps(backend)["both"]
    give_back()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        reset_peak()
        before = resident("VmRSS")
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, time.perf_counter() - start
    seconds = time.perf_counter() - start
    return resident("VmHWM") - before, seconds


if __name__ == "__main__":
    print(json.dumps(_here(*json.loads(sys.argv[1]))))
