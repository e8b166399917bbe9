"""The Triton form. Forward: norms, product. Backward: norms, both products, both projections: a launch each.

Sizes B N T P D as in the public function, R = P * T rows of the output. ``i_`` program indices, ``o_`` offsets,
``m_`` masks, ``p_`` pointers, ``b_`` block values. A launch that serves image and text gives its first programs to
one and the rest to the other. Each result is summed by one program in one order: the same bits twice.

Halves are multiplied as they are, with fp32 sums; fp32 as three TF32 products, which keep its digits.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from infoclip.kernels.aot import AotCall, meta
from infoclip.kernels.triton_support import MISSING, interpreted, why_not

__all__ = ["aot", "backward", "forward", "why_not"]

EPS = 1e-12
ROWS = {"BR": 16, "BD": 64}
"""Rows a program of the norms and of the projection takes, and how many entries of each at a time."""
HALF = (
    {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 4},
    {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
)
SINGLE = (
    {"BM": 64, "BN": 64, "BK": 16, "num_warps": 8, "num_stages": 3},
    {"BM": 128, "BN": 64, "BK": 16, "num_warps": 8, "num_stages": 3},
)
"""Launch configurations of a product, small tiles and large ones; ``configuration`` chooses.

The three products of fp32 need the registers of 8 warps: with 4, strides that nothing divides spill on sm_80."""
ENOUGH = 264
"""Programs that fill a large GPU twice: with as many of them, tiles are large."""


def configuration(rows: int, columns: int, batches: int, dtype: torch.dtype) -> dict[str, int]:
    """The launch configuration of a product: by sizes and dtype alone, so that the same call gives the same bits."""
    small, large = SINGLE if dtype == torch.float32 else HALF
    return large if _tiles(rows, columns, batches, large) >= ENOUGH else small


def _tiles(rows: int, columns: int, batches: int, tile: dict[str, int]) -> int:
    return -(-rows // tile["BM"]) * -(-columns // tile["BN"]) * batches


if MISSING is None:
    import triton
    import triton.language as tl

    @triton.jit
    def block(i, SIZE: tl.constexpr, WIDE: tl.constexpr):
        """Indices of block i; 64 bits with WIDE, where a batch has 2^31 elements or more."""
        o = i * SIZE + tl.arange(0, SIZE)
        return o.to(tl.int64) if WIDE else o

    @triton.jit
    def offsets(o, inner, s_outer, s_inner, LINEAR: tl.constexpr):
        """Where the entries of two nested axes walked as one lie, or with LINEAR those of a single axis."""
        if LINEAR:
            return o * s_inner
        return (o // inner) * s_outer + (o % inner) * s_inner

    @triton.jit
    def inverse_norms(
        x,  # row r at offsets(r, ...)
        inverse,  # [rows] fp32, written
        i_program,
        rows,
        D,
        inner,
        s_outer,
        s_inner,
        s_d,
        LINEAR: tl.constexpr,
        WIDE: tl.constexpr,
        EPS: tl.constexpr,
        BR: tl.constexpr,
        BD: tl.constexpr,
    ):
        o_row = block(i_program, BR, WIDE)
        m_row = o_row < rows
        p_row = x + offsets(o_row, inner, s_outer, s_inner, LINEAR)
        b_sum = tl.zeros([BR], dtype=tl.float32)
        for d in range(0, D, BD):
            o_d = d + block(0, BD, WIDE)
            m_x = m_row[:, None] & (o_d < D)[None, :]
            b_x = tl.load(p_row[:, None] + o_d[None, :] * s_d, mask=m_x, other=0.0).to(tl.float32)
            b_sum += tl.sum(b_x * b_x, axis=1)
        b_norm = tl.sqrt_rn(b_sum)
        tl.store(inverse + o_row, tl.div_rn(1.0, tl.where(b_norm < EPS, EPS, b_norm)), mask=m_row)

    @triton.jit
    def norms_kernel(
        image,  # [B, N, D] by strides
        text,  # [texts, R, D] by strides
        image_inverse,  # [B, N] fp32, written
        text_inverse,  # [texts, R] fp32, written
        image_programs,  # of an image
        texts,
        N,
        R,
        T,
        D,
        i_b,
        i_n,
        i_d,
        t_b,
        t_t,
        t_p,
        t_d,
        ONE: tl.constexpr,  # P = 1: the rows of the text are one axis
        WIDE: tl.constexpr,
        EPS: tl.constexpr,
        BR: tl.constexpr,
        BD: tl.constexpr,
    ):
        i_batch = tl.program_id(1).to(tl.int64)
        i_program = tl.program_id(0)
        if i_program < image_programs:
            p_image = image + i_batch * i_b
            inverse_norms(
                p_image, image_inverse + i_batch * N, i_program, N, D, 1, 0, i_n, i_d, True, WIDE, EPS, BR, BD
            )
        elif i_batch < texts:
            p_text = text + i_batch * t_b
            p_inverse = text_inverse + i_batch * R
            inverse_norms(p_text, p_inverse, i_program - image_programs, R, D, T, t_p, t_t, t_d, ONE, WIDE, EPS, BR, BD)

    @triton.jit
    def multiply(b_a, b_b, b_acc, WIDEN: tl.constexpr):
        """``WIDEN``: halves are widened before they are multiplied; the same products, for the interpreter."""
        if WIDEN:
            return tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), b_acc, input_precision="ieee")
        return tl.dot(b_a, b_b, b_acc, input_precision="tf32x3")

    @triton.jit
    def forward_kernel(
        text,  # [texts, R, D] by strides
        image,  # [B, N, D] by strides
        text_inverse,  # [texts, R]
        image_inverse,  # [B, N]
        out,  # [B, R, N] contiguous, written with VOLUME
        highest,  # [B, R, column tiles] fp32, written with HIGHEST: the largest of each row of a tile
        N,
        R,
        T,
        D,
        scale,
        t_b,
        t_t,
        t_p,
        t_d,
        i_b,
        i_n,
        i_d,
        inverse_b,  # R, or 0 where one text serves all images
        ONE: tl.constexpr,
        WIDE: tl.constexpr,
        VOLUME: tl.constexpr,
        HIGHEST: tl.constexpr,
        WIDEN: tl.constexpr,
        BM: tl.constexpr,
        BN: tl.constexpr,
        BK: tl.constexpr,
    ):
        i_batch = tl.program_id(2).to(tl.int64)
        o_m = block(tl.program_id(1), BM, WIDE)
        o_n = block(tl.program_id(0), BN, WIDE)
        m_m = o_m < R
        m_n = o_n < N
        p_a = text + i_batch * t_b + offsets(o_m, T, t_p, t_t, ONE)
        p_b = image + i_batch * i_b + o_n * i_n
        b_acc = tl.zeros([BM, BN], dtype=tl.float32)
        for k in range(0, D, BK):
            o_k = k + block(0, BK, WIDE)
            m_k = o_k < D
            b_a = tl.load(p_a[:, None] + o_k[None, :] * t_d, mask=m_m[:, None] & m_k[None, :], other=0.0)
            b_b = tl.load(p_b[None, :] + o_k[:, None] * i_d, mask=m_k[:, None] & m_n[None, :], other=0.0)
            b_acc = multiply(b_a, b_b, b_acc, WIDEN)
        b_row = tl.load(text_inverse + i_batch * inverse_b + o_m, mask=m_m, other=0.0) * scale
        b_column = tl.load(image_inverse + i_batch * N + o_n, mask=m_n, other=0.0)
        b_acc = b_acc * b_row[:, None] * b_column[None, :]
        if VOLUME:
            p_out = out + i_batch * R * N + o_m[:, None] * N + o_n[None, :]
            tl.store(p_out, b_acc.to(out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])
        if HIGHEST:
            b_most = tl.max(tl.where(m_n[None, :], b_acc, float("-inf")), axis=1)
            b_nan = tl.max((b_acc != b_acc).to(tl.int32), axis=1)  # a maximum passes NaN by
            p_most = highest + (i_batch * R + o_m) * tl.num_programs(0) + tl.program_id(0)
            tl.store(p_most, tl.where(b_nan != 0, float("nan"), b_most), mask=m_m)

    @triton.jit
    def gradient_tile(
        a,  # incoming gradient at the first batch: element (m, k) by two nested axes each
        b,  # the other operand at the first batch: element (k, n)
        depth,  # inverse norm of depth k
        out,  # [M, D] fp32 contiguous, written
        tile,
        M,
        D,
        K,
        summands,
        scale,
        a_summand,
        m_inner,
        m_outer,
        m_step,
        k_inner,
        k_outer,
        k_step,
        b_summand,
        b_outer,
        b_step,
        b_n,
        depth_summand,
        M_LINEAR: tl.constexpr,
        K_LINEAR: tl.constexpr,
        WIDE: tl.constexpr,
        WIDEN: tl.constexpr,
        BM: tl.constexpr,
        BN: tl.constexpr,
        BK: tl.constexpr,
    ):
        """One tile of the gradient in the unit vectors: sum over k and summands of a(m, k) depth(k) b(k, n)."""
        columns = tl.cdiv(D, BN)
        o_m = block(tile // columns, BM, WIDE)
        o_n = block(tile % columns, BN, WIDE)
        m_m = o_m < M
        m_n = o_n < D
        p_a = a + offsets(o_m, m_inner, m_outer, m_step, M_LINEAR)
        b_acc = tl.zeros([BM, BN], dtype=tl.float32)
        for s in range(0, summands):
            i_s = tl.cast(s, tl.int64)
            for k in range(0, K, BK):
                o_k = k + block(0, BK, WIDE)
                m_k = o_k < K
                o_a = i_s * a_summand + offsets(o_k, k_inner, k_outer, k_step, K_LINEAR)
                o_b = i_s * b_summand + offsets(o_k, k_inner, b_outer, b_step, K_LINEAR)
                b_a = tl.load(p_a[:, None] + o_a[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
                p_b = b + o_b[:, None] + o_n[None, :] * b_n
                b_b = tl.load(p_b, mask=m_k[:, None] & m_n[None, :], other=0.0)
                b_depth = tl.load(depth + i_s * depth_summand + o_k, mask=m_k, other=0.0)
                # The smaller of the two: a unit entry has the dtype's rounding, whatever the gradient's size.
                b_b = (b_b.to(tl.float32) * b_depth[:, None]).to(b.dtype.element_ty)
                b_acc = multiply(b_a, b_b, b_acc, WIDEN)
        p_out = out + o_m[:, None] * D + o_n[None, :]
        tl.store(p_out, b_acc * scale, mask=m_m[:, None] & m_n[None, :])

    @triton.jit
    def gradients_kernel(
        grad,  # [B, P, T, N] by strides
        image,  # [B, N, D] by strides
        text,  # [texts, R, D] by strides
        image_inverse,  # [B, N]
        text_inverse,  # [texts, R]
        unit_image,  # [B, N, D] fp32, written with IMAGE
        unit_text,  # [texts, R, D] fp32, written with TEXT
        image_tiles,  # of an image; the launch's first programs
        texts,
        summands,  # B where one text serves all images, else 1
        N,
        R,
        T,
        D,
        scale,
        g_b,
        g_p,
        g_t,
        g_n,
        i_b,
        i_n,
        i_d,
        t_b,
        t_t,
        t_p,
        t_d,
        inverse_b,  # R, or 0 where one text serves all images
        ONE: tl.constexpr,
        WIDE: tl.constexpr,
        IMAGE: tl.constexpr,
        TEXT: tl.constexpr,
        WIDEN: tl.constexpr,
        BM: tl.constexpr,
        BN: tl.constexpr,
        BK: tl.constexpr,
    ):
        i_batch = tl.program_id(1).to(tl.int64)
        i_tile = tl.program_id(0)
        p_grad = grad + i_batch * g_b
        p_image = image + i_batch * i_b
        if IMAGE:  # noqa: SIM102 - decided when the kernel is compiled
            if i_tile < image_tiles:
                gradient_tile(
                    p_grad, text + i_batch * t_b, text_inverse + i_batch * inverse_b, unit_image + i_batch * N * D,
                    i_tile, N, D, R, 1, scale, 0, 1, 0, g_n, T, g_p, g_t, 0, t_p, t_t, t_d, 0,
                    True, ONE, WIDE, WIDEN, BM, BN, BK,
                )  # fmt: skip
        if TEXT:  # noqa: SIM102
            if (i_tile >= image_tiles) & (i_batch < texts):
                gradient_tile(
                    p_grad, p_image, image_inverse + i_batch * N, unit_text + i_batch * R * D,
                    i_tile - image_tiles, R, D, N, summands, scale, g_b, T, g_p, g_t, 1, 0, g_n, i_b, 0, i_n, i_d, N,
                    ONE, True, WIDE, WIDEN, BM, BN, BK,
                )  # fmt: skip

    @triton.jit
    def project_rows(
        g,  # [rows, D] fp32
        x,  # row r at offsets(r, inner, s_outer, s_inner)
        inverse,  # [rows]
        out,  # row r at offsets(r, inner, o_outer, o_inner)
        i_program,
        rows,
        D,
        inner,
        s_outer,
        s_inner,
        s_d,
        o_outer,
        o_inner,
        LINEAR: tl.constexpr,
        WIDE: tl.constexpr,
        CLAMPED: tl.constexpr,
        BR: tl.constexpr,
        BD: tl.constexpr,
    ):
        o_row = block(i_program, BR, WIDE)
        m_row = o_row < rows
        p_x = x + offsets(o_row, inner, s_outer, s_inner, LINEAR)
        p_g = g + o_row * D
        p_out = out + offsets(o_row, inner, o_outer, o_inner, LINEAR)
        b_inverse = tl.load(inverse + o_row, mask=m_row, other=0.0)
        # Where the norm was clamped it is a constant and the gradient has no projection.
        b_unit = tl.where(b_inverse >= CLAMPED, 0.0, b_inverse)
        b_dot = tl.zeros([BR], dtype=tl.float32)
        for d in range(0, D, BD):
            o_d = d + block(0, BD, WIDE)
            m_x = m_row[:, None] & (o_d < D)[None, :]
            b_x = tl.load(p_x[:, None] + o_d[None, :] * s_d, mask=m_x, other=0.0).to(tl.float32)
            b_g = tl.load(p_g[:, None] + o_d[None, :], mask=m_x, other=0.0)
            b_dot += tl.sum(b_x * b_unit[:, None] * b_g, axis=1)
        for d in range(0, D, BD):
            o_d = d + block(0, BD, WIDE)
            m_x = m_row[:, None] & (o_d < D)[None, :]
            b_x = tl.load(p_x[:, None] + o_d[None, :] * s_d, mask=m_x, other=0.0).to(tl.float32)
            b_g = tl.load(p_g[:, None] + o_d[None, :], mask=m_x, other=0.0)
            b_out = b_inverse[:, None] * (b_g - b_x * b_unit[:, None] * b_dot[:, None])
            tl.store(p_out[:, None] + o_d[None, :], b_out.to(out.dtype.element_ty), mask=m_x)

    @triton.jit
    def project_kernel(
        unit_image,  # [B, N, D] fp32
        unit_text,  # [texts, R, D] fp32
        image,  # [B, N, D] by strides
        text,  # [texts, R, D] by strides
        image_inverse,  # [B, N]
        text_inverse,  # [texts, R]
        d_image,  # [B, N, D] contiguous, written
        d_text,  # [texts, T, P, D] contiguous, written
        image_programs,  # of an image; the launch's first programs
        texts,
        N,
        R,
        T,
        P,
        D,
        i_b,
        i_n,
        i_d,
        t_b,
        t_t,
        t_p,
        t_d,
        ONE: tl.constexpr,
        WIDE: tl.constexpr,
        CLAMPED: tl.constexpr,  # 1 / eps: the inverse of a clamped norm
        BR: tl.constexpr,
        BD: tl.constexpr,
    ):
        i_batch = tl.program_id(1).to(tl.int64)
        i_program = tl.program_id(0)
        if i_program < image_programs:
            o_image = i_batch * N * D
            project_rows(
                unit_image + o_image, image + i_batch * i_b, image_inverse + i_batch * N, d_image + o_image,
                i_program, N, D, 1, 0, i_n, i_d, 0, D, True, WIDE, CLAMPED, BR, BD,
            )  # fmt: skip
        elif i_batch < texts:
            o_text = i_batch * R * D
            project_rows(
                unit_text + o_text, text + i_batch * t_b, text_inverse + i_batch * R, d_text + o_text,
                i_program - image_programs, R, D, T, t_p, t_t, t_d, D, P * D, ONE, WIDE, CLAMPED, BR, BD,
            )  # fmt: skip


class _Sizes:
    """Sizes and strides of one call; empty axes count 1 where they divide."""

    def __init__(self, image: Tensor, text: Tensor) -> None:
        self.B, self.N, self.D = image.shape
        self.T, self.P = text.shape[-3:-1]
        self.R = self.P * self.T
        self.shared = text.dim() == 3
        self.texts = 1 if self.shared else self.B
        self.batches = max(self.B, self.texts)
        self.image = image.stride()
        self.text = (0 if self.shared else text.stride(0), *text.stride()[-3:])
        # Offsets inside a batch fit 32 bits but for very large ones; the product of sizes bounds those of the outputs.
        spans = [
            sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:], strict=True)) for x in (image, text[None])
        ]
        self.wide = max(*spans, self.R * self.N, max(self.R, self.N) * self.D) >= 2**31
        self.inverse_b = 0 if self.shared else self.R

    def inverses(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse norms of both, in one launch."""
        image_inverse = torch.empty(self.B, self.N, dtype=torch.float32, device=image.device)
        text_inverse = torch.empty(self.texts, self.R, dtype=torch.float32, device=image.device)
        image_programs = triton.cdiv(self.N, ROWS["BR"]) if self.B else 0
        programs = image_programs + triton.cdiv(self.R, ROWS["BR"])
        if programs and self.batches:
            norms_kernel[(programs, self.batches)](
                image, text, image_inverse, text_inverse, image_programs, self.texts,
                self.N, self.R, max(self.T, 1), self.D, *self.image, *self.text,
                ONE=self.P == 1, WIDE=self.wide, EPS=EPS, **ROWS,
            )  # fmt: skip
        return image_inverse, text_inverse


def forward(
    image: Tensor,  # [B, N, d]
    text: Tensor,  # [T, P, d] or [B, T, P, d]
    scale: float,
    volume: bool = True,
    highest: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """The volume [B, P, T, N] and each class's largest similarity [B, T] in fp32, as they are asked for."""
    z = _Sizes(image, text)
    config = configuration(z.R, z.N, z.B, image.dtype)
    across = triton.cdiv(z.N, config["BN"])
    out = image.new_empty((z.B, z.P, z.T, z.N) if volume else (0,))
    most = torch.empty((z.B, z.P, z.T, across) if highest else (0,), dtype=torch.float32, device=image.device)
    with torch.cuda.device_of(image):
        if z.B and z.N and z.R:
            image_inverse, text_inverse = z.inverses(image, text)
            forward_kernel[(across, triton.cdiv(z.R, config["BM"]), z.B)](
                text, image, text_inverse, image_inverse, out, most, z.N, z.R, z.T, z.D, scale, *z.text, *z.image,
                z.inverse_b, ONE=z.P == 1, WIDE=z.wide, VOLUME=volume, HIGHEST=highest, WIDEN=interpreted(), **config,
            )  # fmt: skip
        found = most.amax(dim=(1, 3)) if highest else None
    return out if volume else None, found


def backward(
    grad: Tensor,  # [B, P, T, N]
    image: Tensor,  # [B, N, d]
    text: Tensor,  # [T, P, d] or [B, T, P, d]
    scale: float,
    need_image: bool,
    need_text: bool,
) -> tuple[Tensor | None, Tensor | None]:
    z = _Sizes(image, text)
    device = image.device
    unit_image = torch.empty((z.B, z.N, z.D) if need_image else (0,), dtype=torch.float32, device=device)
    unit_text = torch.empty((z.texts, z.R, z.D) if need_text else (0,), dtype=torch.float32, device=device)
    d_image = image.new_empty(image.shape if need_image else (0,))
    d_text = text.new_empty(text.shape if need_text else (0,))
    # One configuration for the launch: that of the larger of the two.
    config = configuration(max(z.N * need_image, z.R * need_text), z.D, z.B, image.dtype)
    tiles = triton.cdiv(z.D, config["BN"])
    image_tiles = triton.cdiv(z.N, config["BM"]) * tiles if need_image and z.B else 0
    text_tiles = triton.cdiv(z.R, config["BM"]) * tiles if need_text else 0
    image_programs = triton.cdiv(z.N, ROWS["BR"]) if need_image and z.B else 0
    text_programs = triton.cdiv(z.R, ROWS["BR"]) if need_text else 0
    # The clamped inverse as the norms kernel rounds it.
    clamped = float(torch.tensor(1.0, dtype=torch.float32) / torch.tensor(EPS, dtype=torch.float32))
    with torch.cuda.device_of(image):
        if z.batches and image_tiles + text_tiles:
            image_inverse, text_inverse = z.inverses(image, text)
            both: tuple[Any, ...] = (z.N, z.R, max(z.T, 1))
            gradients_kernel[(image_tiles + text_tiles, z.batches)](
                grad, image, text, image_inverse, text_inverse, unit_image, unit_text, image_tiles, z.texts,
                z.B if z.shared else 1, *both, z.D, scale, *grad.stride(), *z.image, *z.text, z.inverse_b,
                ONE=z.P == 1, WIDE=z.wide, IMAGE=need_image, TEXT=need_text, WIDEN=interpreted(), **config,
            )  # fmt: skip
            project_kernel[(image_programs + text_programs, z.batches)](
                unit_image, unit_text, image, text, image_inverse, text_inverse, d_image, d_text,
                image_programs, z.texts, *both, z.P, z.D, *z.image, *z.text,
                ONE=z.P == 1, WIDE=z.wide, CLAMPED=clamped, **ROWS,
            )  # fmt: skip
    return d_image if need_image else None, d_text if need_text else None


def aot() -> list[AotCall]:
    """Calls that between them launch both tiles, one prompt and several, and sizes that nothing divides."""

    def both(b: int, n: int, t: int, p: int, d: int, dtype: torch.dtype) -> None:
        image, text = meta(b, d, n, dtype=dtype).transpose(1, 2), meta(t, p, d, dtype=dtype)
        forward(image, text, 1.0, volume=True, highest=True)
        grad, _ = forward(image, text, 1.0)
        assert grad is not None
        backward(grad, image, text, 1.0, True, True)

    calls = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for b, n, t, p, d in ((4, 576, 171, 1, 512), (4, 2304, 847, 4, 768), (3, 577, 171, 3, 511)):
            name = f"{str(dtype).removeprefix('torch.')} B{b} N{n} T{t} P{p} d{d}"
            matrix = "forward_kernel", "gradients_kernel"  # fp32 too: three TF32 products
            quick = (dtype, p) in ((torch.float32, 3), (torch.bfloat16, 1))
            calls.append(AotCall(name, partial(both, b, n, t, p, d, dtype), matrix, quick))
    return calls
