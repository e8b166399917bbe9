"""What the benchmarks share."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

__all__ = ["green", "machine"]

ROOT = Path(__file__).resolve().parent.parent


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
