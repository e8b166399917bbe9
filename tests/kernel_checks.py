"""What every op's tests do alike: uninitialised memory as NaN, Triton's interpreter, compilation without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch

__all__ = ["assert_compiles", "assert_passes_in_the_interpreter", "nan_filled_memory"]


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


def assert_compiles(
    kernel: Any,
    kinds: Mapping[str, str],
    constants: Mapping[str, Any],
    capability: int,
    launch: Mapping[str, int] | None = None,
) -> None:
    """A Triton kernel to machine code for a GPU generation; an argument that ``kinds`` does not name is an int32.

    ``launch`` are the numbers of warps and stages, Triton's own where None.
    """
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(
        fn=kernel, signature=signature, constexprs={(kernel.arg_names.index(k),): v for k, v in constants.items()}
    )
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch or {}))
    assert len(built.asm["cubin"]) > 1000
    assert built.metadata.shared <= 48 * 1024  # fits every block without asking for more
