"""The CUDA C++ kernels without a GPU: their device code compiled as host C++ (``tests/cuda_emulation``) and run.

A block's threads are fibers; ``mma.sync``, ``ldmatrix`` and ``cp.async`` follow the PTX ISA, with the matrix units'
sums cut off at their worst. What this cannot show is speed, and faults that need threads to run at the same time.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infoclip import native
from infoclip.kernels.cost_volume.reference import cost_volume as reference

ROOT = Path(__file__).resolve().parent.parent
EPS = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
DTYPES = pytest.mark.parametrize("dtype", list(EPS), ids=str)


class CostVolume(ctypes.Structure):
    """As ``csrc/cost_volume/cost_volume.hpp``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "N", "T", "P", "D")),
        ("dtype", ctypes.c_int),
        ("shared", ctypes.c_bool),
        ("scale", ctypes.c_double),
        ("image", ctypes.c_void_p),
        ("image_s", ctypes.c_int64 * 3),
        ("text", ctypes.c_void_p),
        ("text_s", ctypes.c_int64 * 4),
        ("out", ctypes.c_void_p),
        ("highest", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("grad_s", ctypes.c_int64 * 4),
        ("d_image", ctypes.c_void_p),
        ("d_text", ctypes.c_void_p),
        ("work", ctypes.c_void_p),
    ]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not on PATH")
    return build(compiler, tmp_path_factory.mktemp("emulation"))


def build(compiler: str, folder: Path, sources: Path = ROOT / "csrc") -> ctypes.CDLL:
    file = folder / "emulation.so"
    here = ROOT / "tests" / "cuda_emulation"
    options = [
        "-std=c++17",
        "-O1",
        "-shared",
        "-fPIC",
        "-fno-strict-aliasing",
        "-DINFOCLIP_FILLS_GPU=4",
        f"-I{here}",
        f"-I{sources}",
    ]
    command = [compiler, *options, "-o", str(file), str(here / "library.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = ctypes.CDLL(str(file))
    found.emulated_launches.restype = ctypes.c_size_t
    found.emulated_cost_volume.restype = ctypes.c_char_p
    return found


def emulated(
    library: ctypes.CDLL,
    image: Tensor,  # [B, N, d]
    text: Tensor,  # [T, P, d] or [B, T, P, d]
    grad: Tensor | None,  # [B, P, T, N]
    scale: float,
    need: tuple[bool, bool] = (True, True),
) -> tuple[list[Tensor], int]:
    """The volume, or with ``grad`` the gradients asked for; and how many launches it took."""
    shared = text.dim() == 3
    classes, prompts = text.shape[-3:-1]
    batch, pixels, size = image.shape
    texts = (1 if shared else batch) * classes * prompts
    p = CostVolume(batch, pixels, classes, prompts, size, native.DTYPES[image.dtype], shared, scale)
    p.image, p.image_s[:] = image.data_ptr(), image.stride()
    p.text, p.text_s[:] = text.data_ptr(), ([0, *text.stride()] if shared else text.stride())
    floats = texts + batch * pixels
    if grad is None:
        results = [image.new_full((batch, prompts, classes, pixels), torch.nan)]
        p.out = results[0].data_ptr()
    else:
        p.grad, p.grad_s[:] = grad.data_ptr(), grad.stride()
        results = []
        for field, like, rows, wanted in zip(
            ("d_image", "d_text"), (image, text), (batch * pixels, texts), need, strict=True
        ):
            if wanted:
                results.append(torch.full(like.shape, torch.nan, dtype=like.dtype))
                setattr(p, field, results[-1].data_ptr() or 16)  # an empty tensor has no address and is wanted still
                floats += rows * size
    work = torch.full((floats,), torch.nan)
    p.work = work.data_ptr()
    before = library.emulated_launches()
    message = library.emulated_cost_volume(ctypes.byref(p), int(grad is not None))
    assert message is None, message.decode()
    return results, library.emulated_launches() - before


def features(size: tuple[int, ...], dtype: torch.dtype, shared: bool) -> tuple[Tensor, Tensor, Tensor]:
    b, n, t, p, d = size
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(b, n, d, generator=generator).to(dtype)
    text = torch.randn(*(() if shared else (b,)), t, p, d, generator=generator).to(dtype)
    return image, text, torch.randn(b, p, t, n, generator=generator).to(dtype)


def want(image: Tensor, text: Tensor, grad: Tensor, scale: float) -> list[Tensor]:
    leaves = [image.detach().clone().requires_grad_(), text.detach().clone().requires_grad_()]
    unit = [F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=1e-12) for x in leaves]
    volume = torch.einsum("bnd,tpd->bptn" if text.dim() == 3 else "bnd,btpd->bptn", *unit) * scale
    gradients = torch.autograd.grad(volume, leaves, grad.to(volume.dtype))
    return [volume.detach().to(image.dtype), *gradients]


def assert_right(library: Any, image: Tensor, text: Tensor, grad: Tensor, scale: float = 1.25) -> None:
    """By the rule of tests/test_cost_volume.py: twice the reference's own error, and 4 + sqrt(terms) / 4 roundings."""
    exact = want(image.double(), text.double(), grad.double(), scale)
    plain = want(image, text, grad, scale)
    found, launches = emulated(library, image, text, None, scale)
    gradients, more = emulated(library, image, text, grad, scale)
    assert launches <= 2
    assert more <= 3
    terms = max(image.shape[2], image.shape[1] * image.shape[0], text.shape[-3] * text.shape[-2])
    for got, eager, right in zip([*found, *gradients], plain, exact, strict=True):
        if not right.numel():
            continue
        allowed = 2 * (eager.double() - right).abs().max() + (4 + terms**0.5 / 4) * EPS[image.dtype] * right.abs().max()
        error = (got.double() - right).abs().max()
        assert error <= allowed, (tuple(got.shape), float(error), float(allowed))
        bias = ((got.double() - right) * right).sum().abs()  # an error that all share hides under the largest value
        assert bias <= 16 * EPS[image.dtype] * right.square().sum() + EPS[image.dtype] ** 2


# B, N, T, P, d: a tile is 64 x 64 by 16 floats or 32 halves, a chunk of the copies 4 floats or 8 halves.
SIZES = [
    (1, 1, 1, 1, 1),
    (2, 63, 11, 1, 7),
    (1, 64, 64, 1, 64),
    (2, 65, 13, 5, 33),
    (1, 131, 67, 2, 61),  # more than two tiles and a remainder
    (1, 37, 3, 1, 257),
    (2, 40, 24, 2, 72),
    (0, 5, 3, 2, 8),
    (2, 0, 3, 2, 8),
    (2, 5, 0, 2, 8),
    (2, 5, 3, 0, 8),
]


@DTYPES
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(library, size, dtype) -> None:
    for shared in (True, False):
        assert_right(library, *features(size, dtype, shared))


@DTYPES
def test_strides_and_misaligned_bases(library, dtype) -> None:
    image, text, grad = features((2, 72, 40, 2, 40), dtype, False)
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.mT.contiguous().mT,  # neighbouring rows side by side
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view(x.shape),  # misaligned
        lambda x: F.pad(x, (1, 2), value=torch.nan)[..., 1:-2],  # rows of an odd length
        lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],  # nothing side by side
        lambda x: x[..., :1].expand(x.shape),  # stride 0
    ]
    for way in ways:
        assert_right(library, way(image), text, grad)
        assert_right(library, image, way(text), grad)
        assert_right(library, image, text, way(grad))


@DTYPES
def test_large_tiles(library, dtype) -> None:
    """The larger tiles, which the library built for the suite takes from four of them on; ragged in all axes."""
    image, text, grad = features((1, 131, 130, 1, 137), dtype, True)
    assert_right(library, image, text, grad)
    assert_right(library, image.mT.contiguous().mT, text, grad)


def test_the_same_bits_twice_and_only_what_is_asked_for(library) -> None:
    image, text, grad = features((2, 65, 13, 2, 33), torch.float32, True)
    both, _ = emulated(library, image, text, grad, 1.0)
    again, _ = emulated(library, image, text, grad, 1.0)
    first, launches = emulated(library, image, text, grad, 1.0, need=(True, False))
    second, _ = emulated(library, image, text, grad, 1.0, need=(False, True))
    assert launches == 3
    for a, b, c in zip(both, again, [*first, *second], strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_zero_rows_and_no_numbers(library) -> None:
    image, text, grad = features((1, 66, 5, 1, 8), torch.float32, True)
    image[0, 3], image[0, 64] = 0, torch.nan
    (volume,), _ = emulated(library, image, text, None, 1.0)
    assert (volume[..., 3] == 0).all()
    assert volume.isnan().sum() == volume[..., 64].isnan().sum() == 5
    grad[..., 64] = 0
    image[0, 64] = 1
    gradients, _ = emulated(library, image, text, grad, 1.0)
    for got, right in zip(gradients, want(image.double(), text.double(), grad.double(), 1.0)[1:], strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-5)


def test_long_sums_do_not_drift(library) -> None:
    """All terms positive: the matrix units' truncation would show as a bias that grows with the length."""
    generator = torch.Generator().manual_seed(0)
    image, text = torch.rand(1, 8, 4096, generator=generator), torch.rand(8, 1, 4096, generator=generator)
    (found,), _ = emulated(library, image, text, None, 1.0)
    exact = reference(image.double(), text.double(), 1.0)
    bias = float(((found.double() - exact) / exact).mean())
    assert abs(bias) < 4 * EPS[torch.float32]


def test_a_planted_error_is_caught(library, tmp_path) -> None:
    """Two words of a fragment exchanged, as a wrong reading of the layout would."""
    sources = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    tile = sources / "common" / "tile.cuh"
    before = tile.read_text()
    after = before.replace("lane % 16 * L::PITCH + lane / 16 * 16", "lane / 2 * L::PITCH + lane % 2 * 16")
    assert after != before
    tile.write_text(after)
    broken = build(str(shutil.which("g++")), tmp_path, sources)
    with pytest.raises(AssertionError):
        assert_right(broken, *features((1, 20, 20, 1, 20), torch.float32, True))
