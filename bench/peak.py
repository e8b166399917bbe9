"""Peak bytes of one forward and backward pass, in a process of its own (``python -m bench.peak``).

On the CPU the most that was resident beyond what was resident before the pass; on CUDA the same of torch's allocator.
The process is forked from one that has imported torch and computed nothing: no pass finds memory of another.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import os
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


@functools.cache
def _server() -> subprocess.Popen[str]:
    """A process that has imported everything and computed nothing; it forks for each request."""
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "bench.peak"]
    return subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def peak(suite: str, sizes: Any, device: str, dtype: str, backend: str, threads: int) -> tuple[int, float]:
    """Bytes that forward and backward add at their peak, and the seconds they took, in a fresh process.

    Raises:
        RuntimeError: the process failed; its last words.
    """
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps([suite, sizes, device, dtype, backend, threads]) + "\n")
    server.stdin.flush()
    line = server.stdout.readline()
    answer = json.loads(line) if line else "the process that measures memory ended; its words are above"
    if isinstance(answer, str):
        raise RuntimeError(f"{suite}, {backend}, {dtype}: {answer}")
    bytes_, seconds = answer
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


def _answer(request: str) -> str:
    """JSON: bytes and seconds, or why there are none."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            told = json.dumps(_here(*json.loads(request)))
        except Exception as error:  # whatever it is, the other process says it
            told = json.dumps(f"{type(error).__name__}: {error}"[-800:])
        os.write(writer, told.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    return told or json.dumps(f"its process ended with exit status {os.waitstatus_to_exitcode(status)} and no word")


def _serve() -> None:
    from bench.harness import all_suites
    from infoclip import kernels

    kernels.ops()
    all_suites()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for request in sys.stdin:
        answers.write(_answer(request) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
