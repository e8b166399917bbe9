"""The CUDA C++ kernels without a GPU: their device code compiled as host C++ (``tests/cuda_emulation``) and run.

A block's threads are fibers; ``mma.sync``, ``ldmatrix`` and ``cp.async`` follow the PTX ISA, with the matrix units'
sums cut off at their worst. What this cannot show is speed, and faults that need threads to run at the same time.
"""

from __future__ import annotations

import ctypes
import importlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_infonce as of_infonce
import test_renyi_mutual_information as of_renyi
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


class InfoNce(ctypes.Structure):
    """As ``csrc/infonce/infonce.hpp``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "N", "M", "D")),
        ("dtype", ctypes.c_int),
        ("symmetric", ctypes.c_bool),
        ("scale", ctypes.c_double),
        ("temperature", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("x_s", ctypes.c_int64 * 3),
        ("y", ctypes.c_void_p),
        ("y_s", ctypes.c_int64 * 3),
        ("positive", ctypes.c_void_p),
        ("positive_s", ctypes.c_int64 * 2),
        *(
            (name, ctypes.c_void_p)
            for name in ("rows", "columns", "loss", "bound", "d_loss", "d_x", "d_y", "d_temperature", "work")
        ),
    ]


class RenyiInformation(ctypes.Structure):
    """As ``csrc/renyi_mutual_information/renyi.hpp``."""

    _fields_ = [
        ("B", ctypes.c_int64),
        ("N", ctypes.c_int64),
        ("views", ctypes.c_int),
        ("D", ctypes.c_int64 * 3),
        ("dtype", ctypes.c_int),
        ("x", ctypes.c_void_p * 3),
        ("x_s", (ctypes.c_int64 * 3) * 3),
        ("unit", ctypes.c_bool * 3),
        ("weights", ctypes.c_int * 4),
        ("value", ctypes.c_void_p),
        ("grad", ctypes.c_void_p * 3),
        ("work", ctypes.c_void_p),
    ]


@pytest.fixture(scope="session")
def compiler() -> str:
    found = shutil.which("g++")
    if found is None:
        pytest.skip("g++ is not on PATH")
    return found


@pytest.fixture(scope="session")
def library(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(compiler, "cost_volume", tmp_path_factory.mktemp("emulation"))


@pytest.fixture(scope="session")
def contrast(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(compiler, "infonce", tmp_path_factory.mktemp("emulation"))


@pytest.fixture(scope="session")
def information(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(compiler, "renyi_mutual_information", tmp_path_factory.mktemp("emulation"))


def build(compiler: str, op: str, folder: Path, sources: Path = ROOT / "csrc", level: str = "-O1") -> ctypes.CDLL:
    file = folder / f"{op}.so"
    here = ROOT / "tests" / "cuda_emulation"
    options = [
        "-std=c++17",
        level,
        "-shared",
        "-fPIC",
        "-fno-strict-aliasing",
        "-DINFOCLIP_FILLS_GPU=4",
        "-DINFOCLIP_GROUPS=2",
        f"-I{here}",
        f"-I{sources}",
    ]
    command = [compiler, *options, "-o", str(file), str(here / f"{op}.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = ctypes.CDLL(str(file))
    found.emulated_launches.restype = ctypes.c_size_t
    found.emulated.restype = ctypes.c_char_p
    if op != "cost_volume":
        found.work_floats.restype = ctypes.c_int64
    return found


def planted(compiler: str, op: str, folder: Path, file: str, before: str, after: str) -> ctypes.CDLL:
    """The op's library with ``before`` in a source ``file`` replaced by ``after``."""
    sources = folder / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    text = (sources / file).read_text()
    assert text.count(before) == 1
    (sources / file).write_text(text.replace(before, after))
    return build(compiler, op, folder, sources, "-O0")  # soon built, and run on little


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
    message = library.emulated(ctypes.byref(p), int(grad is not None))
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


def test_a_planted_error_is_caught(compiler, tmp_path) -> None:
    """Two words of a fragment exchanged, as a wrong reading of the layout would."""
    broken = planted(
        compiler, "cost_volume", tmp_path, "common/tile.cuh",
        "lane % 16 * L::PITCH + lane / 16 * 16", "lane / 2 * L::PITCH + lane % 2 * 16",
    )  # fmt: skip
    with pytest.raises(AssertionError):
        assert_right(broken, *features((1, 20, 20, 1, 20), torch.float32, True))


# infonce: by the rule and the samples of tests/test_infonce.py, the emulated form in the place of the native one.


class Form:
    """A room's native form by the emulated library; ``launches`` of each call; no more scratch than it asks for."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.launches: list[int] = []

    def call(self, p: Any, backward: bool) -> None:
        floats = self.library.work_floats(ctypes.byref(p), int(backward))
        work = torch.full((floats + 16,), torch.nan)
        work[floats:] = 7.0
        p.work = work.data_ptr()
        before = self.library.emulated_launches()
        message = self.library.emulated(ctypes.byref(p), int(backward))
        if message is not None:
            raise ValueError(message.decode())
        assert (work[floats:] == 7.0).all()
        self.launches.append(self.library.emulated_launches() - before)


class Contrast(Form):
    def problem(self, x: Any, y: Any, temperature: Any, scale: float, positive: Any, symmetric: bool) -> InfoNce:
        p = InfoNce(*x.shape[:2], y.shape[1], x.shape[2], native.DTYPES[x.dtype], symmetric, scale)
        p.temperature = None if temperature is None else temperature.data_ptr()
        p.x, p.x_s[:] = x.data_ptr(), x.stride()
        p.y, p.y_s[:] = y.data_ptr(), y.stride()
        if positive is not None:
            p.positive, p.positive_s[:] = positive.data_ptr(), positive.stride()
        return p

    def forward(self, x, y, temperature, scale, positive, symmetric):
        loss, bound, rows = torch.full((), torch.nan), torch.full((), torch.nan), torch.full(x.shape[:2], torch.nan)
        columns = torch.full(y.shape[:2] if symmetric else (0,), torch.nan)
        p = self.problem(x, y, temperature, scale, positive, symmetric)
        p.loss, p.bound, p.rows, p.columns = (v.data_ptr() for v in (loss, bound, rows, columns))
        self.call(p, False)
        return loss, bound, rows, columns

    def backward(self, d_loss, x, y, temperature, scale, positive, symmetric, rows, columns, *need):
        d_x, d_y = (
            torch.full(v.shape, torch.nan, dtype=v.dtype) if n else None for v, n in zip((x, y), need, strict=False)
        )
        d_temperature = torch.full((), torch.nan) if need[2] else None
        p = self.problem(x, y, temperature, scale, positive, symmetric)
        p.rows, p.columns, p.d_loss = rows.data_ptr(), columns.data_ptr(), d_loss.data_ptr()
        for name, value in (("d_x", d_x), ("d_y", d_y), ("d_temperature", d_temperature)):
            setattr(p, name, None if value is None else value.data_ptr())
        self.call(p, True)
        return d_x, d_y, d_temperature


@pytest.fixture
def as_native(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Any], Any]:
    """Puts a form in the place of an op's native one, which then runs on the CPU's tensors."""

    def put(op: str, form: Any) -> Any:
        room = importlib.import_module(f"infoclip.kernels.{op}")
        monkeypatch.setitem(importlib.import_module(f"infoclip.kernels.{op}.op")._FORMS, "native", form)
        monkeypatch.setattr(room, "choose", lambda op, backend, *_: backend)
        return form

    return put


# B, N, M, D, symmetric. Tiles of logits are 64 x 64 or, here from four on, 128 x 128, by 16 floats or 32 halves; two
# patches an axis. The backward's are 64 x 128, and 64, 128, 192 or 256 entries of D a block.
CONTRASTS = [
    (1, 1, 1, 1, True),
    (2, 63, 63, 7, False),
    (1, 40, 40, 65, True),
    (1, 65, 257, 9, True),  # patches of several tiles, either way
    (1, 261, 64, 9, False),
    (1, 131, 150, 20, True),  # larger tiles, ragged
    (1, 20, 40, 140, True),
    (1, 20, 40, 257, False),  # two chunks of D
]


@DTYPES
@pytest.mark.parametrize("size", CONTRASTS, ids=str)
def test_infonce(contrast, as_native, size, dtype) -> None:
    form = as_native("infonce", Contrast(contrast))
    of_infonce.assert_as_good(*of_infonce.samples(size[:4], dtype), "native", symmetric=size[4])
    assert form.launches == [3, 2]


@DTYPES
def test_infonce_of_logits_that_lie_far_apart_and_strange_strides(contrast, as_native, dtype) -> None:
    as_native("infonce", Contrast(contrast))
    x, y, positive = of_infonce.samples((1, 67, 90, 9), dtype)
    of_infonce.assert_as_good(4 * x, 4 * y, positive, "native", 0.05)  # two exponentials, not one
    of_infonce.assert_as_good(x.abs() + 1, -(y.abs() + 1), positive, "native", 0.01)  # all negative: padding would win
    want = of_infonce.run(x, y, positive, "native")
    flat = torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view(x.shape)  # misaligned
    for other in (x.mT.contiguous().mT, x.repeat_interleave(2, dim=-1)[..., ::2], flat):
        assert all(torch.equal(a, b) for a, b in zip(want, of_infonce.run(other, y, positive, "native"), strict=True))
    turned = positive.T.contiguous().T
    assert all(torch.equal(a, b) for a, b in zip(want, of_infonce.run(x, y, turned, "native"), strict=True))


def test_infonce_of_one_column_that_is_every_rows_pair(contrast, as_native) -> None:
    """Its slopes reach the number of rows, which fp16 times 2^14 cannot hold: the lift has to follow."""
    as_native("infonce", Contrast(contrast))
    x, y, _ = of_infonce.samples((1, 200, 140, 5), torch.float16)
    positive = torch.full((1, 200), 133)
    of_infonce.assert_as_good(x, 3 * y, positive, "native")


def test_infonce_twice_the_same_bits_and_only_what_is_asked_for(contrast, as_native) -> None:
    as_native("infonce", Contrast(contrast))
    of_infonce.test_only_the_gradients_asked_for_and_twice("native")
    of_infonce.test_twice_the_same_bits("native")


def test_infonce_of_values_that_are_not_finite(contrast, as_native) -> None:
    as_native("infonce", Contrast(contrast))
    of_infonce.test_values_that_are_not_finite("native")


def test_infonce_of_sizes_beyond_32_bits(contrast, as_native) -> None:
    as_native("infonce", Contrast(contrast))
    one = torch.ones(1, 1, 1)
    for n, d, message in ((2**31, 1, "an axis of 2"), (1, 2**31, "an axis of 2")):
        x = one.expand(1, n, d)  # stride 0: it takes no memory
        p = Contrast(contrast).problem(x, x, None, 1.0, None, False)
        assert message in contrast.emulated(ctypes.byref(p), 0).decode()
        assert message in contrast.emulated(ctypes.byref(p), 1).decode()


@pytest.mark.parametrize("paired", [False, True])
def test_infonce_scratch_at_16384_and_65536(contrast, paired) -> None:
    """The README's bound on the scratch, by the sizes that the form asks for."""
    index = ctypes.c_int64()
    for n in (16384, 65536):
        p = InfoNce(1, n, n, 64, 0, True, 1.0)
        p.positive = ctypes.addressof(index) if paired else None
        floats = contrast.work_floats(ctypes.byref(p), 0)
        assert 4 * floats <= 260 * n + (516 if paired else 260) * n < 4 * n * n / 20
        p.d_temperature = ctypes.addressof(index)
        assert contrast.work_floats(ctypes.byref(p), 1) <= n // 64


@pytest.mark.slow  # each builds the library again
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("if (tile_n > first_n) join_parts(most, sum, row_parts[m]", "if (false) join_parts(most, sum, row_parts[m]"),
        ("v = there ? v * factor : nothing;", "v = v * factor;"),  # padding takes part
        ("slope -= pair[row] == n ?", "slope -= pair[row] == n + 1 ?"),
        ("column_sum[0][n] + room.column_sum[1][n]", "column_sum[0][n]"),
        ("acc[i][j][e] *= less;", "acc[i][j][e] *= 1.0f;"),  # the lift changes, the sums do not follow
    ],
    ids=["patch", "padding", "pair", "half a tile", "lift"],
)
def test_infonce_with_a_planted_error_is_caught(compiler, tmp_path, as_native, before, after) -> None:
    as_native("infonce", Contrast(planted(compiler, "infonce", tmp_path, "infonce/cuda.cu", before, after)))
    if "less" in before:
        x, y, _ = of_infonce.samples((1, 200, 140, 5), torch.float16)
        given = x, 3 * y, torch.arange(200)[None] // 100 * 133, "native"
    else:
        x, y, positive = of_infonce.samples((1, 65, 257, 9))
        given = x.abs() + 1, -(y.abs() + 1), positive, "native", 0.3
    with pytest.raises(AssertionError, match="off by"):
        of_infonce.assert_as_good(*given)


# renyi_mutual_information: the same, by tests/test_renyi_mutual_information.py.


class Information(Form):
    def problem(self, views: Any, units: Any, weights: Any) -> RenyiInformation:
        p = RenyiInformation(*views[0].shape[:2], len(views))
        p.dtype = native.DTYPES[views[0].dtype]
        p.weights[: len(weights)] = weights
        for v, x in enumerate(views):
            p.D[v], p.x[v], p.x_s[v][:], p.unit[v] = x.shape[2], x.data_ptr(), x.stride(), units[v]
        return p

    def forward(self, views, units, weights, value, grads):
        p = self.problem(views, units, weights)
        p.value = value.data_ptr()
        for v, grad in enumerate(grads):
            p.grad[v] = None if grad is None else grad.data_ptr()
        self.call(p, False)


# B, N, widths. Tiles of values are 64 x 64; the gradients' 64 x 128, and 64, 128, 192 or 256 entries of D a block.
# Products are kept where V N <= 4 (D + E).
INFORMATION = [
    (1, 1, 1, 1),
    (2, 65, 40, 13),  # kept
    (1, 131, 5, 9),
    (1, 100, 140, 3),  # kept
    (2, 130, 7, 12),
    (1, 140, 13, 257),  # two chunks of D, and kept
    (1, 70, 9, 4, 6),
]


@DTYPES
@pytest.mark.parametrize("size", INFORMATION, ids=str)
def test_renyi(information, as_native, size, dtype) -> None:
    form = as_native("renyi_mutual_information", Information(information))
    views = of_renyi.samples(*size, dtype=dtype)
    if len(views) == 2:
        of_renyi.assert_as_good(views, "native")
    of_renyi.assert_as_good(views, "native", of_renyi.compression_loss)  # all but the first are unit rows
    assert set(form.launches) == {3}


def test_renyi_of_scales_that_leave_the_range(information, as_native) -> None:
    """Operands are scaled before they meet: rows of 1e18 and 1e-18, of a view as given and of unit rows."""
    as_native("renyi_mutual_information", Information(information))
    x, y = of_renyi.samples(1, 70, 9, 12)
    for form in (of_renyi.renyi_mutual_information, of_renyi.compression_loss):
        value, d_x, d_y = of_renyi.run(form, (x, y), "native")
        got, e_x, e_y = of_renyi.run(form, (x * 1e18, y * 1e-18), "native")
        # In bits; 1e18 is no power of two: one rounding of each entry.
        torch.testing.assert_close(got, value, rtol=0, atol=1e-5)
        torch.testing.assert_close(e_x * 1e18, d_x, rtol=1e-4, atol=1e-5 * d_x.abs().max().item())
        torch.testing.assert_close(e_y * 1e-18, d_y, rtol=1e-4, atol=1e-5 * d_y.abs().max().item())
    low = [v.bfloat16() * 2.0**60 for v in (x, y)]
    of_renyi.assert_as_good(low, "native", of_renyi.compression_loss)


def test_renyi_of_fp16_rows_of_very_different_lengths(information, as_native) -> None:
    as_native("renyi_mutual_information", Information(information))
    x, y = of_renyi.samples(1, 40, 9, 12)
    y *= torch.logspace(-3, 3, 40)[:, None]
    of_renyi.assert_as_good((x.half(), y.half()), "native", of_renyi.compression_loss)


@DTYPES
def test_renyi_of_any_strides(information, as_native, dtype) -> None:
    as_native("renyi_mutual_information", Information(information))
    x, y = of_renyi.samples(2, 66, 12, 7, dtype=dtype)
    want = of_renyi.run(of_renyi.renyi_mutual_information, (x, y), "native")
    flat = torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view(x.shape)  # misaligned
    for other in (x.mT.contiguous().mT, x.repeat_interleave(2, dim=-1)[..., ::2], flat):
        got = of_renyi.run(of_renyi.renyi_mutual_information, (other, y), "native")
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize(
    "case",
    [of_renyi.test_awkward_values, of_renyi.test_incoming_gradients_only_those_asked_for_and_twice],
    ids=lambda case: case.__name__,
)
def test_renyi_as_every_backend(information, as_native, case) -> None:
    """Equal, zero and missing rows, NaN and infinity; one gradient at a time, twice the same bits, none at all."""
    as_native("renyi_mutual_information", Information(information))
    case("native")


def test_renyi_of_sizes_beyond_32_bits(information) -> None:
    one = torch.ones(1, 1, 1)
    for n, d in ((2**31, 1), (1, 2**31)):
        x = one.expand(1, n, d)  # stride 0: it takes no memory
        p = Information(information).problem((x, x), (False, False), (-1, 1, 1))
        assert "an axis of 2" in information.emulated(ctypes.byref(p), 0).decode()


def test_renyi_scratch_at_16384_and_65536(information) -> None:
    """The README's bound on the scratch, by the sizes that the form asks for; and of the products that are kept."""
    for n, d, kept in ((16384, 64, False), (65536, 171, False), (576, 171, True), (2304, 512, False)):
        p = Information(information).problem([torch.empty(1, n, d, device="meta")] * 2, (False,) * 2, (-1, 1, 1))
        p.grad[0] = 16
        most = 9 * 2 * n + 16384 + (4 * 2 * n * n if kept else 0)
        assert 4 * information.work_floats(ctypes.byref(p), 0) <= most
        assert most <= 16 * n * 2 * d + 9 * 2 * n + 16384


@pytest.mark.slow  # each builds the library again
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("const float times = i == j ? 1.0f : 2.0f;", "const float times = 2.0f;"),
        ("room.diagonal[m] = w, w = 0.0f;", "room.diagonal[m] = w;"),  # counted twice
        ("own -= off + own * f.square;", "own -= own * f.square;"),
        ("room.before[r] = f.before,", "room.before[r] = 1.0f,"),
    ],
    ids=["half", "diagonal", "unit", "scale"],
)
def test_renyi_with_a_planted_error_is_caught(compiler, tmp_path, as_native, before, after) -> None:
    file = "renyi_mutual_information/cuda.cu"
    library = planted(compiler, "renyi_mutual_information", tmp_path, file, before, after)
    as_native("renyi_mutual_information", Information(library))
    views = of_renyi.samples(1, 66, 7, 9)
    with pytest.raises(AssertionError, match="off by"):
        of_renyi.assert_as_good(views, "native", of_renyi.compression_loss)
