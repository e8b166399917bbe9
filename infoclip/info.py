"""``infoclip info``: versions, hardware, the native build, every op's backends and the attention that is chosen."""

from __future__ import annotations

import contextlib
import importlib
import io
import json as json_module
import logging
import os
import platform
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["attention_backend", "collect", "show"]

_PACKAGES = ("infoclip", "torch", "torchvision", "triton", "open_clip_torch", "xformers", "torchmetrics", "numpy")
_FLAGS = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd", "sve")
"""CPU flags worth showing, as Linux names them."""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    import torch

    model, flags = platform.processor() or platform.machine(), set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    return {
        "model": model,
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": [flag for flag in _FLAGS if flag in flags],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _driver() -> str | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/driver/nvidia/version").read_text().splitlines():
            if "Kernel Module" in line:
                words = line.split()
                return next((word for word in words if word[:1].isdigit() and "." in word), None)
    return None


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    return found


def attention_backend() -> dict[str, str]:
    """Which attention is chosen and why; keys ``backend`` (``xformers`` or ``sdpa``) and ``reason``.

    xformers is imported only where a CUDA device is there, and quietly: its own C++ may be built for another torch, but
    the operators that it lists as available use torch's kernels.
    """
    import torch

    if not torch.cuda.is_available():
        return {"backend": "sdpa", "reason": "xformers' operators need a CUDA device; torch sees none."}
    quiet = logging.getLogger("xformers")
    level = quiet.level
    try:
        quiet.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            fmha = importlib.import_module("xformers.ops.fmha")
            names = [str(op.NAME) for op in (*fmha.ALL_FW_OPS, *fmha.ALL_BW_OPS) if op.is_available()]
    except Exception as error:  # a broken optional package must not take the command down
        return {"backend": "sdpa", "reason": f"xformers does not import: {type(error).__name__}: {error}"}
    finally:
        quiet.setLevel(level)
    if not names:
        return {"backend": "sdpa", "reason": "xformers lists no operator as available with this torch."}
    return {"backend": "xformers", "reason": "operators available: " + ", ".join(sorted(set(names)))}


def collect() -> dict[str, Any]:
    """Everything that ``show`` prints, ready for JSON.

    Keys: ``versions``, ``cpu``, ``gpus``, ``cuda`` (driver and torch's toolkit), ``native`` (available or why not, per
    device, and the build's facts), ``ops`` (rows of ``infoclip.kernels.explain``), ``attention``, ``variables``.
    """
    import torch

    from infoclip import kernels, native

    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "platform": platform.platform(),
        "cpu": _cpu(),
        "gpus": _gpus(),
        "cuda": {"driver": _driver(), "torch": torch.version.cuda},
        "native": {
            "why_not": {device: native.why_not(device) for device in ("cpu", "cuda")},
            "build": native.build_info(),
        },
        "ops": kernels.explain(),
        "attention": attention_backend(),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith("INFOCLIP_") or name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "TRITON_INTERPRET")
        },
    }


def _native_text(native: dict[str, Any]) -> str:
    build = native["build"]
    if not build:
        return str(native["why_not"]["cpu"])
    cuda = f"CUDA {build['nvcc']} ({build['cuda_architectures']})" if build["cuda"] else "no CUDA"
    sets = ", ".join(build["isa_compiled"])
    return f"{build['version']}, compiler {build['compiler']}, CPU {sets} (runs {build['isa']}), {cuda}"


def show(json: bool = False) -> None:
    """Print what ``collect`` found: tables, or JSON."""
    found = collect()
    if json:
        print(json_module.dumps(found, indent=2))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    cpu, cuda = found["cpu"], found["cuda"]
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    versions = [f"{name} {version or 'not installed'}" for name, version in found["versions"].items()]
    rows = {
        "versions": ", ".join(versions),
        "CPU": f"{cpu['model']}, {cpu['usable_cores']} of {cpu['cores']} cores, {cpu['threads']} threads",
        "instructions": ", ".join(cpu["instructions"]) or "none of the listed",
        "GPU": "; ".join(f"{g['name']}, {g['memory_gib']} GiB, capability {g['capability']}" for g in found["gpus"])
        or "none",
        "driver": f"{cuda['driver'] or 'none'} (torch is built for CUDA {cuda['torch'] or 'none'})",
        "native module": _native_text(found["native"]),
        "attention": f"{found['attention']['backend']}: {found['attention']['reason']}",
        "variables": ", ".join(f"{name}={value}" for name, value in found["variables"].items()) or "none set",
    }
    for name, value in rows.items():
        facts.add_row(name, escape(value))
    console.print(facts)
    table = Table(title="Ops and their backends", title_justify="left")
    for column in ("op", "device", "backend", "state"):
        table.add_column(column, no_wrap=column != "state", overflow="fold")
    for row in found["ops"]:
        state = "available" if row["available"] else f"no: {row['why_not']}"
        if row["auto"]:
            state += f"; auto takes it: {row['reason']}" if row["reason"] else "; auto takes it"
        table.add_row(row["op"], row["device"], row["backend"], escape(state), style="bold" if row["auto"] else None)
    console.print(table)
