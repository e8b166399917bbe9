"""The proof without a GPU, each fault planted and found; and no table while an op's tests are red."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from infoclip import kernels
from infoclip.kernels.aot import AotCall, NativeKernels, meta

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from bench import __main__ as command  # noqa: E402
from bench import aot, harness  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiled ahead of time")


@triton.jit
def spilling_kernel(x, rounds, BLOCK: tl.constexpr):
    """Two blocks of 256 values a thread, alive through the loop: 512 registers where a thread has 255."""
    o = tl.arange(0, BLOCK)
    b_a = tl.load(x + o)
    b_b = tl.load(x + BLOCK + o)
    for _ in range(0, rounds):
        b_a = b_a * b_b + 1.0
        b_b = b_b * b_a + 2.0
    tl.store(x + o, b_a)
    tl.store(x + BLOCK + o, b_b)


@triton.jit
def product_kernel(x, y, z, D, SIDE: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    o = tl.arange(0, SIDE)
    o_k = tl.arange(0, BK)
    b_z = tl.zeros([SIDE, SIDE], dtype=tl.float32)
    for k in range(0, D, BK):
        b_x = tl.load(x + o[:, None] * D + (k + o_k)[None, :])
        b_y = tl.load(y + o[None, :] * D + (k + o_k)[:, None])
        b_z = tl.dot(b_x, b_y, b_z, input_precision=PRECISION)
    tl.store(z + o[:, None] * SIDE + o[None, :], b_z)


def multiply(side: int, bk: int, stages: int, dtype: torch.dtype = torch.float16, precision: str = "tf32") -> None:
    x, z = meta(side, 4096, dtype=dtype), meta(side, side)
    product_kernel[(1,)](x, x, z, 4096, SIDE=side, BK=bk, PRECISION=precision, num_stages=stages)


GOOD = AotCall("good", partial(multiply, 64, 32, 2), ("product_kernel",), quick=True)
PLANTED = {
    "spills": AotCall("planted", lambda: spilling_kernel[(1,)](meta(16384), 9, BLOCK=8192, num_warps=1)),
    "shared memory": AotCall("planted", partial(multiply, 128, 128, 6), ("product_kernel",)),
    "no matrix instruction": AotCall(
        "planted", partial(multiply, 16, 16, 1, torch.float32, "ieee"), ("product_kernel",)
    ),
}


@pytest.fixture
def planted_room(monkeypatch, tmp_path):
    """The rooms' place taken by one whose declarations the test gives; nothing is remembered from another run."""
    monkeypatch.setattr(aot, "CACHE", tmp_path / "aot")
    room = SimpleNamespace(triton_impl=SimpleNamespace(), native_impl=SimpleNamespace())
    monkeypatch.setattr(aot, "room_of", lambda op: room)
    return room


def run(*arguments: str) -> int:
    return command.main(["aot", "upsample_bce", "--form", "triton", *arguments])


def test_a_sound_kernel_passes(planted_room, capsys, tmp_path):
    planted_room.triton_impl.aot = lambda: [GOOD]
    file = tmp_path / "aot.json"
    assert run("--all", "--json", str(file)) == 0
    told = json.loads(file.read_text())
    assert [row["arch"] for row in told["rows"]] == ["sm_80", "sm_90", "sm_100"]
    hopper = told["rows"][1]
    assert hopper["registers"] > 0
    assert hopper["local"] == 0
    assert hopper["shared"] >= 2 * 2 * 64 * 32 * 2  # two stages of both operands in halves
    assert any("wgmma" in name for name in hopper["ptx"])
    assert any("HGMMA" in name for name in hopper["sass"])
    assert "FAILED" not in capsys.readouterr().out


@pytest.mark.parametrize("failure", PLANTED)
def test_a_planted_fault_is_found(planted_room, capsys, failure):
    planted_room.triton_impl.aot = lambda: [GOOD, PLANTED[failure]]
    assert run() == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 3  # for each generation, and only the planted one
    assert all("(planted)" in line and failure in line for line in failed)


def test_registers_of_a_block_are_counted():
    row = aot.Row("op", "triton", "kernel", "case", "sm_90", 1024, 0, 72, 0, {}, {}, False)
    assert row.judge().failures == ["registers: 72 x 1024 threads, there are 65536"]


def test_kernels_without_a_declaration_fail(planted_room, capsys):
    planted_room.triton_impl.some_kernel = product_kernel
    assert run() == 1
    assert "has Triton kernels (some_kernel) and no aot()" in capsys.readouterr().err


def test_a_room_without_kernels_is_only_named(planted_room, capsys):
    assert run() == 0
    assert "launches no kernel of its own" in capsys.readouterr().out


def test_wrong_declarations(planted_room, capsys):
    planted_room.triton_impl.aot = lambda: [AotCall("idle", lambda: None)]
    assert run() == 1
    assert "'idle' launches no Triton kernel" in capsys.readouterr().err
    planted_room.triton_impl.aot = lambda: [AotCall("good", GOOD.call, ("sweep_kernel",))]
    assert run() == 1
    assert "declares ['sweep_kernel'], but launches ['product_kernel']" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["nothing"], ["--form", "opencl"], ["--json", "no/such/folder/aot.json"]])
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["aot", *arguments])
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.skipif(aot.tool("nvcc") is None, reason="no nvcc")
def test_planted_faults_of_cuda_kernels(tmp_path, monkeypatch):
    monkeypatch.setattr(aot, "CACHE", tmp_path / "aot")
    source = tmp_path / "planted.cu"
    source.write_text(
        "__global__ void sound(float* x) { x[threadIdx.x] *= 2.0f; }\n"
        "__global__ void spilling(float* x, const int* at, int n) {\n"
        "  float kept[64];\n"
        "  for (int i = 0; i < 64; ++i) kept[i] = x[i * 32 + threadIdx.x];\n"
        "  for (int i = 0; i < n; ++i) kept[at[i] & 63] += kept[at[i + 1] & 63];\n"
        "  for (int i = 0; i < 64; ++i) x[i * 32 + threadIdx.x] = kept[i];\n"
        "}\n"
        "__global__ void large(float* x) { extern __shared__ float s[]; s[threadIdx.x] = x[0]; x[1] = s[0]; }\n"
    )
    native = NativeKernels(matrix=("^sound",), dynamic_shared={"^large": 300_000})
    failures = {row.kernel: row.failures for row in aot.cuda_rows("op", native, [source], ["90"], tmp_path)}
    assert failures["sound"] == ["declared a matrix kernel, but it has no matrix instruction"]
    assert failures["spilling"] == ["spills: 256 bytes of local memory a thread"]
    assert failures["large"] == ["shared memory: 300000 bytes, a block may have 232448"]
    with pytest.raises(RuntimeError, match="no CUDA kernel is called 'tiny'"):
        aot.cuda_rows("op", NativeKernels(matrix=("tiny",)), [source], ["90"], tmp_path)


def test_every_room_declares_its_launches():
    for op in kernels.ROOMS:
        calls, nothing = aot.declared(op)
        assert nothing or any(call.quick for call in calls), f"{op}: no call is quick, so no test compiles any"
        assert len({call.name for call in calls}) == len(calls)
    assert (Path(aot.ROOT) / "CMakeLists.txt").is_file()
    assert aot.cuda_targets()


def test_no_table_while_tests_are_red(tmp_path, monkeypatch, capsys):
    (tmp_path / "tests").mkdir()
    (tmp_path / "kernels" / "some_op").mkdir(parents=True)
    tests = tmp_path / "tests" / "test_some_op.py"
    tests.write_text("def test_it():\n    assert 1 + 1 == 3\n")
    assert not harness.green("some_op", tmp_path)
    assert "1 failed" in capsys.readouterr().err
    assert not harness.green("some_op", tmp_path)  # red is not remembered
    tests.write_text("def test_it():\n    assert 1 + 1 == 2\n")
    assert harness.green("some_op", tmp_path)
    capsys.readouterr()
    assert harness.green("some_op", tmp_path)
    assert "running its tests" not in capsys.readouterr().err  # green is
    (tmp_path / "kernels" / "some_op" / "op.py").write_text("x = 1\n")
    assert harness.green("some_op", tmp_path)
    assert "running its tests" in capsys.readouterr().err  # until something changes

    monkeypatch.setattr(command, "green", lambda op: False)
    assert command.main(["upsample_bce"]) == 1
    told = capsys.readouterr()
    assert "the tests of upsample_bce fail, so there is no table" in told.err
    assert "|" not in told.out
