"""The door to the ops: which there are, which backend a call takes, and why.

Each op is a package ``infoclip.kernels.<op>`` with up to three backends: ``reference`` (plain PyTorch, any device),
``triton`` (CUDA, or Triton's interpreter) and ``native`` (C++ on the CPU, CUDA C++ on the GPU). A call takes its
``backend=`` argument, else that of the innermost :func:`use_backend`, else the variable ``INFOCLIP_BACKEND``, else
``auto``. A backend asked for by name works or raises ``BackendUnavailableError`` with the reason; ``auto`` takes the
first of its list that can run.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

__all__ = ["BACKENDS", "OPS", "BackendUnavailableError", "Op", "choose", "explain", "ops", "register", "register_room",
           "use_backend", "why_not"]  # fmt: skip

BACKENDS = ("reference", "triton", "native")
ROOMS = ("cost_volume", "depthwise_conv2d", "infonce", "ms_deform_attn", "renyi_mutual_information", "upsample_bce")

# In a bare checkout the rooms lie in the sibling folder kernels/ and nobody has mapped them.
_rooms = Path(__file__).resolve().parent.parent.parent / "kernels"
if (_rooms / ROOMS[0] / "op.py").is_file() and not (Path(__file__).parent / ROOMS[0]).exists():
    __path__.append(str(_rooms))

WhyNot = Callable[[str, torch.dtype | None], str | None]
"""Device type and dtype (None: any that the backend takes) -> why the backend cannot run, None where it can."""


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run; the message says why."""


def _anywhere(device: str, dtype: torch.dtype | None) -> str | None:
    return None


@dataclass(frozen=True)
class Op:
    """One op at the door.

    ``backends``: name -> why it cannot run on a device and dtype. ``auto``: device type -> the order that ``auto``
    tries, the measured fastest first; a device that is not listed takes the reference. ``reason``: device type -> what
    the order rests on.
    """

    name: str
    backends: Mapping[str, WhyNot]
    auto: Mapping[str, tuple[str, ...]]
    reason: Mapping[str, str] = field(default_factory=dict)


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Put an op on the list. Raises ``ValueError`` for a second one of the name or an unknown backend."""
    if op.name in OPS:
        raise ValueError(f"op {op.name!r} is registered already")
    unknown = set(op.backends) - set(BACKENDS) or {b for order in op.auto.values() for b in order} - set(op.backends)
    if unknown:
        raise ValueError(f"op {op.name!r} names unknown backends {sorted(unknown)}; expected some of {BACKENDS}")
    OPS[op.name] = op
    return op


def register_room(name: str, triton: WhyNot | None, native: WhyNot, reason: Mapping[str, str]) -> Op:
    """Register an op with a reference, a native form and, unless it is None, a Triton form.

    ``auto`` takes ``native`` on the CPU, where each is measured, and the reference on a GPU, where none is yet.
    """
    backends = {"reference": _anywhere, **({"triton": triton} if triton else {}), "native": native}
    return register(Op(name, backends, {"cpu": ("native", "reference"), "cuda": ("reference",)}, reason))


def ops() -> dict[str, Op]:
    """Every op, its room imported."""
    for room in ROOMS:
        importlib.import_module(f"{__name__}.{room}")
    return OPS


def why_not(op: str, backend: str, device: str, dtype: torch.dtype | None = None) -> str | None:
    """Why this backend of the op cannot run there, or None where it can."""
    check = OPS[op].backends.get(backend)
    return f"{op} has no {backend} backend." if check is None else check(device, dtype)


_within: ContextVar[str | None] = ContextVar("backend", default=None)


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Calls inside take this backend unless they name another: ``with use_backend("reference"): ...``.

    Raises ``ValueError`` for an unknown name.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend={backend!r}: expected auto or one of {', '.join(BACKENDS)}")
    token = _within.set(backend)
    try:
        yield
    finally:
        _within.reset(token)


@torch.compiler.assume_constant_result
def choose(op: str, backend: str | None, device: str, dtype: torch.dtype) -> str:
    """The backend that a call takes. ``torch.compile`` asks once, when it traces.

    Raises ``ValueError`` for an unknown name and ``BackendUnavailableError`` for a named backend that cannot run.
    """
    asked, source = backend or _within.get(), "backend"
    if asked is None:
        asked, source = os.environ.get("INFOCLIP_BACKEND", "").strip() or "auto", "INFOCLIP_BACKEND"
    if asked != "auto":
        if asked not in BACKENDS:
            raise ValueError(f"{source}={asked!r}: expected auto or one of {', '.join(BACKENDS)}")
        reason = why_not(op, asked, device, dtype)
        if reason is not None:
            raise BackendUnavailableError(f"{op}: {source}={asked!r} cannot run on {device} with {dtype}: {reason}")
        return asked
    for candidate in OPS[op].auto.get(device, ()):
        if why_not(op, candidate, device, dtype) is None:
            return candidate
    return "reference"


def explain() -> list[dict[str, Any]]:
    """A row for each op, device and backend: available or why not, and whether ``auto`` takes it (for float32).

    Keys: ``op``, ``device``, ``backend``, ``available``, ``why_not``, ``auto``, ``reason``.
    """
    rows = []
    for op in ops().values():
        for device in ("cpu", "cuda"):
            missing = None if device == "cpu" or torch.cuda.is_available() else "torch sees no CUDA device."
            taken = None if missing else choose(op.name, "auto", device, torch.float32)
            for backend in op.backends:
                reason = missing or why_not(op.name, backend, device)
                rows.append(
                    {
                        "op": op.name,
                        "device": device,
                        "backend": backend,
                        "available": reason is None,
                        "why_not": reason,
                        "auto": backend == taken,
                        "reason": op.reason.get(device) if backend == taken else None,
                    }
                )
    return rows
