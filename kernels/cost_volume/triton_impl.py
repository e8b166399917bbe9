"""The Triton form: row norms, one tiled product for the forward and both gradients, and the projection.

Sizes B N T P D as in the public function, R = P * T rows of the output. ``i_`` program indices, ``o_`` offsets,
``m_`` masks, ``b_`` block values. Each result is summed by one program in one order: the same bits twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infoclip.kernels.triton_support import MISSING, interpreted, why_not

__all__ = ["backward", "forward", "why_not"]

EPS = 1e-12
BM, BN, BK = 64, 64, 32
"""The fixed launch configuration: 64 x 64 results a program, 32 deep."""

if MISSING is None:
    import triton
    import triton.language as tl

    @triton.jit
    def norms_kernel(
        x,  # [batches, rows, D] by strides; row r lies at (r // inner) * s_outer + (r % inner) * s_inner
        inverse,  # [batches, rows] fp32, written
        rows,
        D,
        inner,
        s_batch,
        s_outer,
        s_inner,
        s_d,
        EPS: tl.constexpr,
        BR: tl.constexpr,
        BD: tl.constexpr,
    ):
        i_batch = tl.program_id(1).to(tl.int64)
        o_row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
        m_row = o_row < rows
        p_row = x + i_batch * s_batch + (o_row // inner) * s_outer + (o_row % inner) * s_inner
        b_sum = tl.zeros([BR], dtype=tl.float32)
        for d in range(0, D, BD):
            o_d = d + tl.arange(0, BD).to(tl.int64)
            m_x = m_row[:, None] & (o_d < D)[None, :]
            b_x = tl.load(p_row[:, None] + o_d[None, :] * s_d, mask=m_x, other=0.0).to(tl.float32)
            b_sum += tl.sum(b_x * b_x, axis=1)
        b_norm = tl.sqrt_rn(b_sum)
        tl.store(inverse + i_batch * rows + o_row, tl.div_rn(1.0, tl.where(b_norm < EPS, EPS, b_norm)), mask=m_row)

    @triton.jit
    def product_kernel(
        a,  # element (m, k): batch, summand, and two nested axes each
        b,  # element (n, k)
        out,  # [batches, M, N] contiguous
        row_inverse,  # [M] per batch, or unused
        column_inverse,  # [N] per batch, or unused
        depth_inverse,  # [K] per batch and summand, or unused
        M,
        N,
        K,
        summands,
        scale,
        a_batch,
        a_summand,
        a_inner,
        a_outer_stride,
        a_inner_stride,
        a_k_inner,
        a_k_outer_stride,
        a_k_inner_stride,
        b_batch,
        b_summand,
        b_n_stride,
        b_k_inner,
        b_k_outer_stride,
        b_k_inner_stride,
        row_batch,
        column_batch,
        depth_batch,
        depth_summand,
        SCALE_ENDS: tl.constexpr,  # row and column inverses are applied to the finished sums
        SCALE_DEPTH: tl.constexpr,  # the depth inverse is applied to a
        WIDEN: tl.constexpr,  # halves are widened before they are multiplied: the same products, for the interpreter
        PRECISION: tl.constexpr,
        BM: tl.constexpr,
        BN: tl.constexpr,
        BK: tl.constexpr,
    ):
        i_batch = tl.program_id(2).to(tl.int64)
        o_m = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
        o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
        m_m = o_m < M
        m_n = o_n < N
        p_a = a + i_batch * a_batch + (o_m // a_inner) * a_outer_stride + (o_m % a_inner) * a_inner_stride
        p_b = b + i_batch * b_batch + o_n * b_n_stride
        b_acc = tl.zeros([BM, BN], dtype=tl.float32)
        for s in range(0, summands):
            i_s = tl.cast(s, tl.int64)
            for k in range(0, K, BK):
                o_k = k + tl.arange(0, BK).to(tl.int64)
                m_k = o_k < K
                o_ak = (o_k // a_k_inner) * a_k_outer_stride + (o_k % a_k_inner) * a_k_inner_stride + i_s * a_summand
                o_bk = (o_k // b_k_inner) * b_k_outer_stride + (o_k % b_k_inner) * b_k_inner_stride + i_s * b_summand
                b_a = tl.load(p_a[:, None] + o_ak[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
                b_b = tl.load(p_b[None, :] + o_bk[:, None], mask=m_k[:, None] & m_n[None, :], other=0.0)
                if SCALE_DEPTH:
                    p_depth = depth_inverse + i_batch * depth_batch + i_s * depth_summand + o_k
                    b_depth = tl.load(p_depth, mask=m_k, other=0.0)
                    b_a = b_a.to(tl.float32) * b_depth[None, :]
                    b_b = b_b.to(tl.float32)
                elif WIDEN:
                    b_a = b_a.to(tl.float32)
                    b_b = b_b.to(tl.float32)
                b_acc = tl.dot(b_a, b_b, b_acc, input_precision=PRECISION)
        if SCALE_ENDS:
            b_row = tl.load(row_inverse + i_batch * row_batch + o_m, mask=m_m, other=0.0)
            b_column = tl.load(column_inverse + i_batch * column_batch + o_n, mask=m_n, other=0.0)
            b_acc = b_acc * b_row[:, None] * b_column[None, :]
        b_acc = b_acc * scale
        p_out = out + i_batch * M * N + o_m[:, None] * N + o_n[None, :]
        tl.store(p_out, b_acc.to(out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])

    @triton.jit
    def project_kernel(
        g,  # [batches, rows, D] fp32 contiguous
        x,  # as in norms_kernel
        inverse,  # [batches, rows]
        out,  # row r at (r // inner) * t_outer + (r % inner) * t_inner
        rows,
        D,
        inner,
        s_batch,
        s_outer,
        s_inner,
        s_d,
        t_batch,
        t_outer,
        t_inner,
        CLAMPED: tl.constexpr,  # 1 / eps: the inverse of a clamped norm
        BR: tl.constexpr,
        BD: tl.constexpr,
    ):
        i_batch = tl.program_id(1).to(tl.int64)
        o_row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
        m_row = o_row < rows
        p_x = x + i_batch * s_batch + (o_row // inner) * s_outer + (o_row % inner) * s_inner
        p_g = g + (i_batch * rows + o_row) * D
        p_out = out + i_batch * t_batch + (o_row // inner) * t_outer + (o_row % inner) * t_inner
        b_inverse = tl.load(inverse + i_batch * rows + o_row, mask=m_row, other=0.0)
        # Where the norm was clamped it is a constant and the gradient has no projection.
        b_unit = tl.where(b_inverse >= CLAMPED, 0.0, b_inverse)
        b_dot = tl.zeros([BR], dtype=tl.float32)
        for d in range(0, D, BD):
            o_d = d + tl.arange(0, BD).to(tl.int64)
            m_x = m_row[:, None] & (o_d < D)[None, :]
            b_x = tl.load(p_x[:, None] + o_d[None, :] * s_d, mask=m_x, other=0.0).to(tl.float32)
            b_g = tl.load(p_g[:, None] + o_d[None, :], mask=m_x, other=0.0)
            b_dot += tl.sum(b_x * b_unit[:, None] * b_g, axis=1)
        for d in range(0, D, BD):
            o_d = d + tl.arange(0, BD).to(tl.int64)
            m_x = m_row[:, None] & (o_d < D)[None, :]
            b_x = tl.load(p_x[:, None] + o_d[None, :] * s_d, mask=m_x, other=0.0).to(tl.float32)
            b_g = tl.load(p_g[:, None] + o_d[None, :], mask=m_x, other=0.0)
            b_out = b_inverse[:, None] * (b_g - b_x * b_unit[:, None] * b_dot[:, None])
            tl.store(p_out[:, None] + o_d[None, :], b_out.to(out.dtype.element_ty), mask=m_x)


def _norms(x: Tensor, batches: int, rows: int, inner: int, strides: tuple[int, int, int, int]) -> Tensor:
    inverse = torch.empty(batches, rows, dtype=torch.float32, device=x.device)
    if inverse.numel():
        norms_kernel[(triton.cdiv(rows, 16), batches)](
            x, inverse, rows, x.shape[-1], inner, *strides, EPS=EPS, BR=16, BD=64
        )
    return inverse


def _project(
    g: Tensor,
    x: Tensor,
    inverse: Tensor,
    out: Tensor,
    inner: int,
    strides: tuple[int, int, int, int],
    to: tuple[int, int, int],
) -> None:
    batches, rows = inverse.shape
    if inverse.numel():
        # The clamped inverse as the norms kernel rounds it.
        clamped = float(torch.tensor(1.0, dtype=torch.float32) / torch.tensor(EPS, dtype=torch.float32))
        project_kernel[(triton.cdiv(rows, 16), batches)](
            g, x, inverse, out, rows, x.shape[-1], inner, *strides, *to, CLAMPED=clamped, BR=16, BD=64
        )


def _product(out: Tensor, dims: dict[str, Any], **arguments: Any) -> None:
    batches, M, N = out.shape
    if out.numel():
        grid = (triton.cdiv(N, BN), triton.cdiv(M, BM), batches)
        # The interpreter multiplies bfloat16 as the integers that store it.
        widen = interpreted()
        product_kernel[grid](out=out, M=M, N=N, **dims, **arguments, WIDEN=widen, BM=BM, BN=BN, BK=BK)


class _Sizes:
    """Sizes and strides of one call."""

    def __init__(self, image: Tensor, text: Tensor) -> None:
        self.B, self.N, self.D = image.shape
        self.T, self.P = text.shape[-3:-1]
        self.R = self.P * self.T
        self.shared = text.dim() == 3
        self.texts = 1 if self.shared else self.B
        # Row r = p * T + t of the output; max() because an empty axis must not divide by zero.
        self.inner = max(self.T, 1)
        batch = 0 if self.shared else text.stride(0)
        self.text = (batch, text.stride(-2), text.stride(-3), text.stride(-1))
        self.image = (image.stride(0), 0, image.stride(1), image.stride(2))
        self.pixels = max(self.N, 1)

    def inverses(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return (
            _norms(image, self.B, self.N, self.pixels, self.image),
            _norms(text, self.texts, self.R, self.inner, self.text),
        )


def forward(
    image: Tensor,  # [B, N, d]
    text: Tensor,  # [T, P, d] or [B, T, P, d]
    scale: float,
) -> Tensor:  # [B, P, T, N]
    z = _Sizes(image, text)
    with torch.cuda.device_of(image):
        image_inverse, text_inverse = z.inverses(image, text)
        out = image.new_empty(z.B, z.R, z.N)
        _product(
            out,
            {"K": z.D, "summands": 1, "scale": scale},
            a=text,
            b=image,
            row_inverse=text_inverse,
            column_inverse=image_inverse,
            depth_inverse=text_inverse,
            a_batch=z.text[0],
            a_summand=0,
            a_inner=z.inner,
            a_outer_stride=z.text[1],
            a_inner_stride=z.text[2],
            a_k_inner=max(z.D, 1),
            a_k_outer_stride=0,
            a_k_inner_stride=z.text[3],
            b_batch=z.image[0],
            b_summand=0,
            b_n_stride=z.image[2],
            b_k_inner=max(z.D, 1),
            b_k_outer_stride=0,
            b_k_inner_stride=z.image[3],
            row_batch=0 if z.shared else z.R,
            column_batch=z.N,
            depth_batch=0,
            depth_summand=0,
            SCALE_ENDS=True,
            SCALE_DEPTH=False,
            PRECISION="ieee",  # of fp32 only: halves multiply exactly
        )
    return out.view(z.B, z.P, z.T, z.N)


def backward(
    grad: Tensor,  # [B, P, T, N]
    image: Tensor,  # [B, N, d]
    text: Tensor,  # [T, P, d] or [B, T, P, d]
    scale: float,
    need_image: bool,
    need_text: bool,
) -> tuple[Tensor | None, Tensor | None]:
    z = _Sizes(image, text)
    d_image = d_text = None
    s_b, s_p, s_t, s_n = grad.stride()
    # The unit gradients are fp32; halves fit TF32's mantissa, fp32 does not and keeps its own.
    common = {
        "SCALE_ENDS": False,
        "SCALE_DEPTH": True,
        "PRECISION": "ieee" if image.dtype == torch.float32 else "tf32",
        "row_batch": 0,
        "column_batch": 0,
        "a": grad,
    }
    with torch.cuda.device_of(image):
        image_inverse, text_inverse = z.inverses(image, text)
        ends = {"row_inverse": text_inverse, "column_inverse": text_inverse}
        if need_image:
            unit = torch.empty(z.B, z.N, z.D, dtype=torch.float32, device=image.device)
            d_image = image.new_empty(image.shape)
            _product(
                unit,
                {"K": z.R, "summands": 1, "scale": scale},
                b=text,
                depth_inverse=text_inverse,
                a_batch=s_b,
                a_summand=0,
                a_inner=z.pixels,
                a_outer_stride=0,
                a_inner_stride=s_n,
                a_k_inner=z.inner,
                a_k_outer_stride=s_p,
                a_k_inner_stride=s_t,
                b_batch=z.text[0],
                b_summand=0,
                b_n_stride=z.text[3],
                b_k_inner=z.inner,
                b_k_outer_stride=z.text[1],
                b_k_inner_stride=z.text[2],
                depth_batch=0 if z.shared else z.R,
                depth_summand=0,
                **ends,
                **common,
            )
            _project(unit, image, image_inverse, d_image, z.pixels, z.image, (z.N * z.D, 0, z.D))
        if need_text:
            unit = torch.empty(z.texts, z.R, z.D, dtype=torch.float32, device=image.device)
            d_text = text.new_empty(text.shape)
            _product(
                unit,
                {"K": z.N, "summands": z.B if z.shared else 1, "scale": scale},
                b=image,
                depth_inverse=image_inverse,
                a_batch=0 if z.shared else s_b,
                a_summand=s_b if z.shared else 0,
                a_inner=z.inner,
                a_outer_stride=s_p,
                a_inner_stride=s_t,
                a_k_inner=z.pixels,
                a_k_outer_stride=0,
                a_k_inner_stride=s_n,
                b_batch=0 if z.shared else z.image[0],
                b_summand=z.image[0] if z.shared else 0,
                b_n_stride=z.image[3],
                b_k_inner=z.pixels,
                b_k_outer_stride=0,
                b_k_inner_stride=z.image[2],
                depth_batch=0 if z.shared else z.N,
                depth_summand=z.N if z.shared else 0,
                **ends,
                **common,
            )
            _project(unit, text, text_inverse, d_text, z.inner, z.text, (z.R * z.D, z.D, z.P * z.D))
    return d_image, d_text
