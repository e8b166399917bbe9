"""The native module's one gate: what it says when it is there, and when it is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from infoclip import kernels, native

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def missing(monkeypatch):
    gone = native.MissingBuild("the native module is not built: run 'make setup'.")
    monkeypatch.setattr(native, "_load", lambda: gone)
    return gone


def test_the_build_is_there():
    """The suite runs on a built tree; a silent fall-back to the reference would hide a broken build."""
    assert native.why_not("cpu") is None
    info = native.build_info()
    assert info["isa"] in info["isa_usable"]
    assert set(info["isa_usable"]) <= set(info["isa_compiled"])
    assert native.available("cpu")
    assert not native.available("mps")


def test_cuda_is_there_or_says_why_not():
    reason = native.why_not("cuda")
    assert (reason is None) == native.available("cuda")
    if not torch.cuda.is_available():
        assert reason is not None
        assert reason.endswith(".")


def test_a_driver_older_than_the_toolkit_is_named(monkeypatch):
    class Old:
        def build_info(self) -> dict[str, object]:
            return {"cuda": True, "cuda_driver": 12040, "cuda_runtime": 13000}

    monkeypatch.setattr(native, "_load", Old)
    assert native.why_not("cuda") == (
        "built with CUDA 13.0, but the driver only serves 12.4: update the driver or build with an older nvcc."
    )


def test_without_a_build_auto_steps_down_and_a_name_raises(missing):
    assert native.build_info() == {}
    assert kernels.ops()
    assert kernels.choose("cost_volume", None, "cpu", torch.float32) == "reference"
    with pytest.raises(kernels.BackendUnavailableError, match="make setup"):
        kernels.choose("cost_volume", "native", "cpu", torch.float32)
    with pytest.raises(native.NativeUnavailableError, match="make setup"):
        missing.cost_volume_forward()
    x = torch.ones(1, 1, 1)
    with pytest.raises(native.NativeUnavailableError, match="make setup"):
        native.cost_volume_forward(x, x, x[None], 1.0)


def test_a_build_of_older_sources_says_so(monkeypatch):
    class Older:
        def build_info(self) -> dict[str, object]:
            return {}

    monkeypatch.setitem(sys.modules, "infoclip._C", Older())
    native._load.cache_clear()
    try:
        reason = native.why_not("cpu")
        assert reason is not None
        assert "built from other sources (cost_volume_forward is not in it)" in reason
        assert "make setup" in reason
        assert kernels.choose("cost_volume", None, "cpu", torch.float32) == "reference"
    finally:
        native._load.cache_clear()


def test_a_build_for_another_machine_says_so(monkeypatch):
    def refused(name):
        raise ImportError("_C.so: wrong ELF class: ELFCLASS32")

    monkeypatch.setattr(native.importlib, "import_module", refused)
    native._load.cache_clear()
    try:
        reason = native.why_not("cpu")
        assert reason == (
            "the native module did not load: _C.so: wrong ELF class: ELFCLASS32. Build it again with 'make setup'."
        )
        assert kernels.choose("cost_volume", None, "cpu", torch.float32) == "reference"
        with pytest.raises(kernels.BackendUnavailableError, match="wrong ELF class"):
            kernels.choose("cost_volume", "native", "cpu", torch.float32)
    finally:
        native._load.cache_clear()


def test_an_instruction_set_that_is_not_there():
    x = torch.ones(1, 1, 1)
    with pytest.raises(ValueError, match="unknown instruction set 'mmx'"):
        native.cost_volume_forward(x, x, x[None], 1.0, isa="mmx")


def test_the_door_refuses_a_second_op_of_a_name():
    kernels.ops()
    with pytest.raises(ValueError, match="registered already"):
        kernels.register(kernels.OPS["cost_volume"])
    with pytest.raises(ValueError, match="unknown backends"):
        kernels.register(kernels.Op("other", {"magic": lambda device, dtype: None}, {}))


def test_importing_infoclip_loads_neither_torch_nor_the_module():
    code = "import sys, infoclip; print('torch' in sys.modules, 'infoclip._C' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_bare_checkout_finds_the_rooms(tmp_path):
    """Only the two source folders on the path, no build and no install: the reference runs."""
    (tmp_path / "infoclip").mkdir()
    for name in ("infoclip/__init__.py", "infoclip/native.py", "infoclip/errors.py"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for folder in ("infoclip/kernels", "kernels/cost_volume"):
        (tmp_path / folder).mkdir(parents=True)
        for file in (ROOT / folder).glob("*.py"):
            (tmp_path / folder / file.name).write_bytes(file.read_bytes())
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f)];"
        f"sys.path.insert(0, {str(tmp_path)!r});"
        "import infoclip, torch; from infoclip import kernels, native;"
        "from infoclip.kernels.cost_volume import cost_volume;"
        "print(infoclip.__file__, cost_volume(torch.ones(1, 2, 3), torch.ones(4, 1, 3)).shape, native.why_not())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout
    assert "[1, 1, 4, 2]" in done.stdout
    assert "is not built" in done.stdout


def in_a_process(code: str) -> str:
    """What a Python process prints that has used torch's pool of two threads and defines ``volume()``, a call of the
    native code that is worth two."""
    setup = (
        "import os, sys, torch\n"
        "from infoclip.kernels.cost_volume import cost_volume\n"
        "torch.set_num_threads(2)\n"
        "image, text = torch.ones(2, 600, 256), torch.ones(200, 1, 256)\n"
        "(image @ image.mT).exp()\n"
        "def volume(): return cost_volume(image, text, backend='native')\n"
    )
    command = [sys.executable, "-c", setup + code]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_the_threads_are_those_of_torch():
    """Threads of its own would share their cores with torch's, which go on turning for a while after their work."""
    counts = in_a_process(
        "before = len(os.listdir('/proc/self/task'))\n"
        "for _ in range(20): volume()\n"
        "print(before, len(os.listdir('/proc/self/task')))\n"
    ).split()
    assert counts[0] == counts[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_has_threads_of_its_own():
    """The copy of a pool has no threads in it: a region that waited for them would never end."""
    printed = in_a_process(
        "want = volume().numpy().tobytes()\n"
        "sys.stdout.flush()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if volume().numpy().tobytes() == want else 1)\n"
        "print(os.waitpid(child, 0)[1])\n"
    )
    assert printed.split() == ["0"]
