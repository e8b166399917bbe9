"""The Triton form in three launches: rows and their scales, values, and gradients (or the sum of the values alone).

Sizes B N D as in the public function, V views. ``i_`` indices, ``o_`` offsets, ``m_`` masks, ``b_`` block values. A
program owns a block of rows; every result is summed by one program in one order: the same bits twice.

Rows are scaled by powers of two (``pre``, exact in every dtype but float16, whose squares fit float32 as they are) so
that the mean squared length of a set is near 1, and their products by ``post``: what float16 was spared, and the length
of a row of a unit view.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from infoclip.kernels.aot import AotCall, meta
from infoclip.kernels.triton_support import MISSING, interpreted, why_not

__all__ = ["aot", "forward", "why_not"]

HALF = {"BLOCK": 64, "BK": 32, "CHUNK": 64, "num_warps": 8, "num_stages": 2}
SINGLE = {"BLOCK": 32, "BK": 16, "CHUNK": 64, "num_warps": 8, "num_stages": 2}
SINGLE_KEPT = {**SINGLE, "num_warps": 4}
"""Of halves and of fp32, whose three TF32 products take three times the registers: rows that a program owns and that it
meets at a time, the depth of a step of their products, the columns of a gradient that a program owns."""
ROWS, DEEP = 16, 64
"""Rows and columns that a program of the first launch reads at a time."""
LARGEST = 2**31
"""A set has fewer entries, so that their offsets fit 32 bits."""
SCAN = 1024
"""Rows whose scales a program adds up at a time."""

if MISSING is None:
    import triton
    import triton.language as tl

    @triton.jit
    def power(e):
        """2^e, exactly, for -126 <= e <= 127; e is clamped to that."""
        e = tl.minimum(tl.maximum(e, -126), 127)
        return ((e + 127) << 23).to(tl.float32, bitcast=True)

    @triton.jit
    def exponent(v):
        """floor(log2 v) for v >= 0, at least -126 and at most 126."""
        e = (v.to(tl.int32, bitcast=True) >> 23) - 127
        return tl.minimum(tl.maximum(e, -126), 126)

    @triton.jit
    def row_statistics(p_x, m_row, D, s_d, BR: tl.constexpr, BD: tl.constexpr):
        """Of each row: the exponent of its largest entry, and its squared length once that is divided out."""
        b_max = tl.zeros([BR], dtype=tl.float32)
        for d in range(0, D, BD):
            o_d = d + tl.arange(0, BD)
            m_x = m_row[:, None] & (o_d < D)[None, :]
            b_x = tl.load(p_x[:, None] + o_d[None, :] * s_d, mask=m_x, other=0.0).to(tl.float32)
            b_max = tl.maximum(b_max, tl.max(tl.abs(b_x), axis=1))
        b_e = exponent(b_max)
        b_scale = power(-b_e)
        b_sum = tl.zeros([BR], dtype=tl.float32)
        for d in range(0, D, BD):
            o_d = d + tl.arange(0, BD)
            m_x = m_row[:, None] & (o_d < D)[None, :]
            b_x = tl.load(p_x[:, None] + o_d[None, :] * s_d, mask=m_x, other=0.0).to(tl.float32)
            b_x = b_x * b_scale[:, None]
            b_sum += tl.sum(b_x * b_x, axis=1)
        return b_e, b_sum

    @triton.jit
    def rows_kernel(
        x, y, z,  # [B, N, D] each, by strides
        exponents,  # [B, V, N] int32, written
        squares,  # [B, V, N] fp32, written
        N, Dx, Dy, Dz,
        x_b, x_n, x_d, y_b, y_n, y_d, z_b, z_n, z_d,
        VIEWS: tl.constexpr,
        BR: tl.constexpr,
        BD: tl.constexpr,
    ):  # fmt: skip
        i_b = tl.program_id(0).to(tl.int64)
        o_row = tl.program_id(1) * BR + tl.arange(0, BR)
        m_row = o_row < N
        o_out = i_b * VIEWS * N + o_row
        b_e, b_s = row_statistics(x + i_b * x_b + o_row * x_n, m_row, Dx, x_d, BR, BD)
        tl.store(exponents + o_out, b_e, mask=m_row)
        tl.store(squares + o_out, b_s, mask=m_row)
        b_e, b_s = row_statistics(y + i_b * y_b + o_row * y_n, m_row, Dy, y_d, BR, BD)
        tl.store(exponents + o_out + N, b_e, mask=m_row)
        tl.store(squares + o_out + N, b_s, mask=m_row)
        if VIEWS == 3:
            b_e, b_s = row_statistics(z + i_b * z_b + o_row * z_n, m_row, Dz, z_d, BR, BD)
            tl.store(exponents + o_out + 2 * N, b_e, mask=m_row)
            tl.store(squares + o_out + 2 * N, b_s, mask=m_row)

    @triton.jit
    def set_exponent(exponents, squares, N, SCAN: tl.constexpr):
        """Exponent by which a set is divided, so that the mean squared length of its rows lies in [1, 4)."""
        b_top = tl.full([SCAN], -126, dtype=tl.int32)
        for n in range(0, N, SCAN):
            o_n = n + tl.arange(0, SCAN)
            b_e = tl.load(exponents + o_n, mask=o_n < N, other=-126)
            b_s = tl.load(squares + o_n, mask=o_n < N, other=0.0)
            b_top = tl.maximum(b_top, tl.where(b_s == 0, -126, b_e))
        top = tl.max(b_top, axis=0)
        b_sum = tl.zeros([SCAN], dtype=tl.float32)
        for n in range(0, N, SCAN):
            o_n = n + tl.arange(0, SCAN)
            b_e = tl.load(exponents + o_n, mask=o_n < N, other=-126)
            b_s = tl.load(squares + o_n, mask=o_n < N, other=0.0)
            b_sum += b_s * power(b_e - top) * power(b_e - top)
        mean = tl.sum(b_sum, axis=0) / N.to(tl.float32)
        # Of a set without a non-zero entry, and of one that is not finite, any exponent will do.
        return tl.minimum(tl.maximum(top + (exponent(mean) >> 1), -126), 126)

    @triton.jit
    def row_scales(exponents, squares, o, m, e_set, UNIT: tl.constexpr, HALF: tl.constexpr):
        """Of rows o: the scale before their products, that after, the whole of it, and the squared length so scaled."""
        b_e = tl.load(exponents + o, mask=m, other=0)
        b_s = tl.load(squares + o, mask=m, other=0.0)
        if UNIT:
            b_pre = power(-b_e)
            b_post = tl.where(b_s == 0, 0.0, tl.rsqrt(b_s))
            b_n = tl.where(b_s == 0, 0.0, b_s / b_s)  # NaN and infinity show
        else:
            b_pre = power(-e_set + b_e * 0)
            b_post = tl.where(m, 1.0, 0.0)
            b_n = b_s * power(b_e - e_set) * power(b_e - e_set)
        b_whole = b_pre * b_post
        if HALF:
            return b_post * 0.0 + 1.0, b_whole, b_whole, b_n
        return b_pre, b_post, b_whole, b_n

    @triton.jit
    def set_scales(
        exponents, squares, N, e_x, e_y, e_z,
        UX: tl.constexpr, UY: tl.constexpr, UZ: tl.constexpr, VIEWS: tl.constexpr, SCAN: tl.constexpr,
    ):  # fmt: skip
        """Sums over the rows of their squared lengths in all views (the product) and in each."""
        b_joint = tl.zeros([SCAN], dtype=tl.float32)
        b_x = tl.zeros([SCAN], dtype=tl.float32)
        b_y = tl.zeros([SCAN], dtype=tl.float32)
        b_z = tl.zeros([SCAN], dtype=tl.float32)
        for n in range(0, N, SCAN):
            o_n = n + tl.arange(0, SCAN)
            m_n = o_n < N
            _, _, _, b_nx = row_scales(exponents, squares, o_n, m_n, e_x, UX, False)
            _, _, _, b_ny = row_scales(exponents + N, squares + N, o_n, m_n, e_y, UY, False)
            b_n = b_nx * b_ny
            if VIEWS == 3:
                _, _, _, b_nz = row_scales(exponents + 2 * N, squares + 2 * N, o_n, m_n, e_z, UZ, False)
                b_n = b_n * b_nz
                b_z += b_nz
            b_joint += b_n
            b_x += b_nx
            b_y += b_ny
        return tl.sum(b_joint, axis=0), tl.sum(b_x, axis=0), tl.sum(b_y, axis=0), tl.sum(b_z, axis=0)

    @triton.jit
    def products(
        p_x,  # [N, D] one set of a view
        exponents, squares, e_set,
        o_i, o_j, m_i, m_j, D, s_n, s_d,
        UNIT: tl.constexpr,
        PRECISION: tl.constexpr, WIDEN: tl.constexpr, HALF: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ):  # fmt: skip
        """Products of the view's scaled rows, [BM, BN]."""
        b_pre_i, b_post_i, _, _ = row_scales(exponents, squares, o_i, m_i, e_set, UNIT, HALF)
        b_pre_j, b_post_j, _, _ = row_scales(exponents, squares, o_j, m_j, e_set, UNIT, HALF)
        p_i = p_x + o_i * s_n
        p_j = p_x + o_j * s_n
        b_c = tl.zeros([BM, BN], dtype=tl.float32)
        for d in range(0, D, BK):
            o_d = d + tl.arange(0, BK)
            m_d = o_d < D
            b_i = tl.load(p_i[:, None] + o_d[None, :] * s_d, mask=m_i[:, None] & m_d[None, :], other=0.0)
            b_j = tl.load(p_j[None, :] + o_d[:, None] * s_d, mask=m_j[None, :] & m_d[:, None], other=0.0)
            if WIDEN:
                b_i = b_i.to(tl.float32)
                b_j = b_j.to(tl.float32)
            if not HALF:  # a power of two: exact, also in bfloat16
                b_i = b_i * b_pre_i.to(b_i.dtype)[:, None]
                b_j = b_j * b_pre_j.to(b_j.dtype)[None, :]
            b_c = tl.dot(b_i, b_j, b_c, input_precision=PRECISION)
        return b_c * b_post_i[:, None] * b_post_j[None, :]

    @triton.jit
    def keep(p_kept, b_c, o_i, o_j, m_i, m_j, N, BM: tl.constexpr, BN: tl.constexpr):
        """Both halves of the symmetric matrix of products."""
        m_t = m_i[:, None] & m_j[None, :]
        tl.store(p_kept + o_i[:, None] * N + o_j[None, :], b_c, mask=m_t)
        tl.store(p_kept + o_j[None, :] * N + o_i[:, None], b_c, mask=m_t)

    @triton.jit
    def value_kernel(
        x, y, z,
        exponents, squares,
        scalars,  # [B, 8] fp32, written by the first program of a set: exponents x y z, traces joint x y z, joint scale
        sums,  # [B, programs, 4] fp32, written: sums of squares of the joint and of each view's products
        kept,  # [B, V, N, N] fp32, written if KEEP
        N, blocks, Dx, Dy, Dz,
        x_b, x_n, x_d, y_b, y_n, y_d, z_b, z_n, z_d,
        VIEWS: tl.constexpr,
        UX: tl.constexpr, UY: tl.constexpr, UZ: tl.constexpr,
        KEEP: tl.constexpr,
        PRECISION: tl.constexpr, WIDEN: tl.constexpr, HALF: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SCAN: tl.constexpr,
    ):  # fmt: skip
        i_b = tl.program_id(0).to(tl.int64)
        i_p = tl.program_id(1)
        p_e = exponents + i_b * VIEWS * N
        p_s = squares + i_b * VIEWS * N
        p_x = x + i_b * x_b
        p_y = y + i_b * y_b
        p_z = z + i_b * z_b
        p_k = kept + i_b * VIEWS * N * N
        e_x = set_exponent(p_e, p_s, N, SCAN)
        e_y = set_exponent(p_e + N, p_s + N, N, SCAN)
        e_z = e_y
        if VIEWS == 3:
            e_z = set_exponent(p_e + 2 * N, p_s + 2 * N, N, SCAN)
        t_joint, t_x, t_y, t_z = set_scales(p_e, p_s, N, e_x, e_y, e_z, UX, UY, UZ, VIEWS, SCAN)
        # Where no sample is there in all views, 2^126 would make infinities of the products of one.
        q = tl.where(t_joint == 0, 1.0, power(-exponent(t_joint / N.to(tl.float32))))
        if i_p == 0:
            p_scalars = scalars + i_b * 8
            tl.store(p_scalars, e_x.to(tl.float32))
            tl.store(p_scalars + 1, e_y.to(tl.float32))
            tl.store(p_scalars + 2, e_z.to(tl.float32))
            tl.store(p_scalars + 3, t_joint)
            tl.store(p_scalars + 4, t_x)
            tl.store(p_scalars + 5, t_y)
            tl.store(p_scalars + 6, t_z)
            tl.store(p_scalars + 7, q)
        b_joint = tl.zeros([BM], dtype=tl.float32)
        b_sx = tl.zeros([BM], dtype=tl.float32)
        b_sy = tl.zeros([BM], dtype=tl.float32)
        b_sz = tl.zeros([BM], dtype=tl.float32)
        # The products are symmetric: a row block meets those from itself on. Block p has blocks - p of them, the block
        # opposite it the rest: every program has the same work.
        first = blocks - i_p
        other = blocks - 1 - i_p
        for t in range(0, tl.where(other == i_p, first, blocks + 1)):
            i = tl.where(t < first, i_p, other)
            j = tl.where(t < first, i_p + t, other + t - first)
            o_i = i * BM + tl.arange(0, BM)
            o_j = j * BN + tl.arange(0, BN)
            m_i = o_i < N
            m_j = o_j < N
            twice = tl.where(i == j, 1.0, 2.0)
            b_c = products(p_x, p_e, p_s, e_x, o_i, o_j, m_i, m_j, Dx, x_n, x_d, UX, PRECISION, WIDEN, HALF, BM, BN, BK)
            b_p = b_c * q
            b_sx += tl.sum(b_c * b_c, axis=1) * twice
            if KEEP:
                keep(p_k, b_c, o_i, o_j, m_i, m_j, N, BM, BN)
            b_c = products(
                p_y, p_e + N, p_s + N, e_y, o_i, o_j, m_i, m_j, Dy, y_n, y_d, UY, PRECISION, WIDEN, HALF, BM, BN, BK
            )
            b_p = b_p * b_c
            b_sy += tl.sum(b_c * b_c, axis=1) * twice
            if KEEP:
                keep(p_k + N * N, b_c, o_i, o_j, m_i, m_j, N, BM, BN)
            if VIEWS == 3:
                b_c = products(
                    p_z, p_e + 2 * N, p_s + 2 * N, e_z, o_i, o_j, m_i, m_j, Dz, z_n, z_d, UZ,
                    PRECISION, WIDEN, HALF, BM, BN, BK,
                )  # fmt: skip
                b_p = b_p * b_c
                b_sz += tl.sum(b_c * b_c, axis=1) * twice
                if KEEP:
                    keep(p_k + 2 * N * N, b_c, o_i, o_j, m_i, m_j, N, BM, BN)
            b_joint += tl.sum(b_p * b_p, axis=1) * twice
        p_sums = sums + (i_b * tl.num_programs(1) + i_p) * 4
        tl.store(p_sums, tl.sum(b_joint, axis=0))
        tl.store(p_sums + 1, tl.sum(b_sx, axis=0))
        tl.store(p_sums + 2, tl.sum(b_sy, axis=0))
        tl.store(p_sums + 3, tl.sum(b_sz, axis=0))

    @triton.jit
    def total(p_sums, programs, SCAN: tl.constexpr):
        b_sum = tl.zeros([SCAN], dtype=tl.float32)
        for n in range(0, programs, SCAN):
            o_n = n + tl.arange(0, SCAN)
            b_sum += tl.load(p_sums + o_n * 4, mask=o_n < programs, other=0.0)
        return tl.sum(b_sum, axis=0)

    @triton.jit
    def weighed(ratio, trace, square, W: tl.constexpr):
        """The ratio times 2^(W times the entropy): one logarithm in the end keeps the digits of a small difference."""
        if W == 1:
            ratio = ratio * (trace / square * trace)
        if W == -1:
            ratio = ratio / (trace / square * trace)
        return ratio

    @triton.jit
    def totals(
        scalars, sums, programs,  # of one set
        VIEWS: tl.constexpr, WJ: tl.constexpr, WX: tl.constexpr, WY: tl.constexpr, WZ: tl.constexpr, SCAN: tl.constexpr,
    ):  # fmt: skip
        """The value, and the factors of the gradient: b of the joint's products, a and t of each view's."""
        t_joint = tl.load(scalars + 3)
        t_x = tl.load(scalars + 4)
        t_y = tl.load(scalars + 5)
        t_z = tl.load(scalars + 6)
        q = tl.load(scalars + 7)
        s_joint = total(sums, programs, SCAN)
        s_x = total(sums + 1, programs, SCAN)
        s_y = total(sums + 2, programs, SCAN)
        s_z = total(sums + 3, programs, SCAN)
        ratio = weighed(weighed(weighed(1.0, t_joint * q, s_joint, WJ), t_x, s_x, WX), t_y, s_y, WY)
        if VIEWS == 3:
            ratio = weighed(ratio, t_z, s_z, WZ)
        there = t_joint != 0  # NaN passes, and shows
        value = tl.where(there, tl.log2(ratio), 0.0)
        four = tl.where(there, 5.770780163555854, 0.0)  # 4 / ln 2
        t_joint = tl.where(there, t_joint, 1.0)
        b = tl.where(there, -WJ * four / s_joint, 0.0)
        a_x = tl.where(there, -WX * four / s_x, 0.0)
        a_y = tl.where(there, -WY * four / s_y, 0.0)
        t_x = tl.where(there, WX * four / t_x, 0.0)
        t_y = tl.where(there, WY * four / t_y, 0.0)
        a_z = a_y
        if VIEWS == 3:
            a_z = tl.where(there, -WZ * four / s_z, 0.0)
            t_z = tl.where(there, WZ * four / t_z, 0.0)
        return value, b, WJ * four / t_joint, q, a_x, a_y, a_z, t_x, t_y, t_z

    @triton.jit
    def finish_kernel(
        scalars, sums, value, programs,
        VIEWS: tl.constexpr, WJ: tl.constexpr, WX: tl.constexpr, WY: tl.constexpr, WZ: tl.constexpr, SCAN: tl.constexpr,
    ):  # fmt: skip
        i_b = tl.program_id(0).to(tl.int64)
        v, _, _, _, _, _, _, _, _, _ = totals(
            scalars + i_b * 8, sums + i_b * programs * 4, programs, VIEWS, WJ, WX, WY, WZ, SCAN
        )
        tl.store(value + i_b, v)

    @triton.jit
    def gradient(
        out,  # [N, D] fp32 contiguous, written: columns from o_c on of the rows from o_i on
        i, o_c, N, blocks, b, j_factor, q, a_v, t_v,
        p_v, e_v, s_v, top_v, D, v_n, v_d, UV: tl.constexpr,  # the view itself
        p_o, e_o, s_o, top_o, Do, o_n, o_d, UO: tl.constexpr,  # another one
        p_t, e_t, s_t, top_t, Dt, t_n, t_d, UT: tl.constexpr,  # the third, or unused
        k_v, k_o, k_t,
        VIEWS: tl.constexpr, KEPT: tl.constexpr,
        PRECISION: tl.constexpr, OUTER: tl.constexpr, WIDEN: tl.constexpr, HALF: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ):  # fmt: skip
        o_i = i * BM + tl.arange(0, BM)
        m_i = o_i < N
        m_c = o_c < D
        b_acc = tl.zeros([BM, o_c.shape[0]], dtype=tl.float32)
        b_diagonal = tl.zeros([BM], dtype=tl.float32)
        b_off = tl.zeros([BM], dtype=tl.float32)
        for j in range(0, blocks):
            o_j = j * BN + tl.arange(0, BN)
            m_j = o_j < N
            if KEPT:
                o_k = o_i[:, None] * N + o_j[None, :]
                m_k = m_i[:, None] & m_j[None, :]
                b_c = tl.load(k_v + o_k, mask=m_k, other=0.0)
                b_o = tl.load(k_o + o_k, mask=m_k, other=0.0) * q
                if VIEWS == 3:
                    b_o = b_o * tl.load(k_t + o_k, mask=m_k, other=0.0)
            else:
                b_o = q * products(
                    p_o, e_o, s_o, top_o, o_i, o_j, m_i, m_j, Do, o_n, o_d, UO, PRECISION, WIDEN, HALF, BM, BN, BK
                )
                if VIEWS == 3:
                    b_o = b_o * products(
                        p_t, e_t, s_t, top_t, o_i, o_j, m_i, m_j, Dt, t_n, t_d, UT, PRECISION, WIDEN, HALF, BM, BN, BK
                    )
                b_c = products(
                    p_v, e_v, s_v, top_v, o_i, o_j, m_i, m_j, D, v_n, v_d, UV, PRECISION, WIDEN, HALF, BM, BN, BK
                )
            b_w = b * (b_c * b_o) * b_o + a_v * b_c
            # The diagonal nearly cancels against the traces: it stays out of the product, whose factors are rounded.
            same = o_i[:, None] == o_j[None, :]
            b_diagonal += tl.sum(tl.where(same, b_w, 0.0), axis=1)
            b_w = tl.where(same, 0.0, b_w)
            if UV:
                b_off += tl.sum(b_w * b_c, axis=1)
            _, _, b_whole, _ = row_scales(e_v, s_v, o_j, m_j, top_v, UV, HALF)
            b_x = tl.load(p_v + o_j[:, None] * v_n + o_c[None, :] * v_d, mask=m_j[:, None] & m_c[None, :], other=0.0)
            if UV:  # the scale is no power of two: it goes to the factor that is rounded anyway
                b_pre, b_post, _, _ = row_scales(e_v, s_v, o_j, m_j, top_v, UV, False)
                b_w = b_w * b_post[None, :]
                b_x = b_x.to(tl.float32) * b_pre[:, None]
            else:
                b_x = b_x.to(tl.float32) * b_whole[:, None]
            b_acc = tl.dot(b_w, b_x, b_acc, input_precision=OUTER)
        _, _, b_whole, b_n = row_scales(e_v, s_v, o_i, m_i, top_v, UV, HALF)
        _, _, _, b_others = row_scales(e_o, s_o, o_i, m_i, top_o, UO, HALF)
        if VIEWS == 3:
            _, _, _, b_m = row_scales(e_t, s_t, o_i, m_i, top_t, UT, HALF)
            b_others = b_others * b_m
        b_own = b_diagonal + j_factor * b_others + t_v
        if UV:  # through the normalisation: what lies along the row drops out
            b_own = b_own - (b_off + b_own * b_n)
        m_o = m_i[:, None] & m_c[None, :]
        b_x = tl.load(p_v + o_i[:, None] * v_n + o_c[None, :] * v_d, mask=m_o, other=0.0).to(tl.float32)
        b_out = b_whole[:, None] * (b_acc + b_own[:, None] * (b_x * b_whole[:, None]))
        tl.store(out + o_i[:, None] * D + o_c[None, :], b_out, mask=m_o)

    @triton.jit
    def gradient_kernel(
        x, y, z,
        exponents, squares, scalars, sums, kept,
        value,  # [B] fp32, written by the first program of a set
        gx, gy, gz,  # [B, N, D] fp32 contiguous, written where NX, NY, NZ say so
        N, blocks, programs, Dx, Dy, Dz,
        x_b, x_n, x_d, y_b, y_n, y_d, z_b, z_n, z_d,
        x_chunks, y_chunks,  # programs of a row block that work on x, and on y: 0 if not needed
        VIEWS: tl.constexpr,
        UX: tl.constexpr, UY: tl.constexpr, UZ: tl.constexpr,
        NX: tl.constexpr, NY: tl.constexpr, NZ: tl.constexpr,
        WJ: tl.constexpr, WX: tl.constexpr, WY: tl.constexpr, WZ: tl.constexpr,
        KEPT: tl.constexpr,
        PRECISION: tl.constexpr, OUTER: tl.constexpr, WIDEN: tl.constexpr, HALF: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CHUNK: tl.constexpr, SCAN: tl.constexpr,
    ):  # fmt: skip
        i_b = tl.program_id(0).to(tl.int64)
        i_c = tl.program_id(1)
        i = tl.program_id(2)
        p_scalars = scalars + i_b * 8
        v, b, j_factor, q, a_x, a_y, a_z, t_x, t_y, t_z = totals(
            p_scalars, sums + i_b * programs * 4, programs, VIEWS, WJ, WX, WY, WZ, SCAN
        )
        if (i_c == 0) & (i == 0):
            tl.store(value + i_b, v)
        e_x = tl.load(p_scalars).to(tl.int32)
        e_y = tl.load(p_scalars + 1).to(tl.int32)
        e_z = tl.load(p_scalars + 2).to(tl.int32)
        p_e = exponents + i_b * VIEWS * N
        p_s = squares + i_b * VIEWS * N
        p_x = x + i_b * x_b
        p_y = y + i_b * y_b
        p_z = z + i_b * z_b
        p_k = kept + i_b * VIEWS * N * N
        o_c = tl.arange(0, CHUNK)
        if NX:  # noqa: SIM102 - decided at compile time, unlike the next
            if i_c < x_chunks:
                gradient(
                    gx + i_b * N * Dx, i, i_c * CHUNK + o_c, N, blocks, b, j_factor, q, a_x, t_x,
                    p_x, p_e, p_s, e_x, Dx, x_n, x_d, UX,
                    p_y, p_e + N, p_s + N, e_y, Dy, y_n, y_d, UY,
                    p_z, p_e + 2 * N, p_s + 2 * N, e_z, Dz, z_n, z_d, UZ,
                    p_k, p_k + N * N, p_k + 2 * N * N,
                    VIEWS, KEPT, PRECISION, OUTER, WIDEN, HALF, BM, BN, BK,
                )  # fmt: skip
        if NY:
            i_y = i_c - x_chunks
            if (i_y >= 0) & (i_y < y_chunks):
                gradient(
                    gy + i_b * N * Dy, i, i_y * CHUNK + o_c, N, blocks, b, j_factor, q, a_y, t_y,
                    p_y, p_e + N, p_s + N, e_y, Dy, y_n, y_d, UY,
                    p_x, p_e, p_s, e_x, Dx, x_n, x_d, UX,
                    p_z, p_e + 2 * N, p_s + 2 * N, e_z, Dz, z_n, z_d, UZ,
                    p_k + N * N, p_k, p_k + 2 * N * N,
                    VIEWS, KEPT, PRECISION, OUTER, WIDEN, HALF, BM, BN, BK,
                )  # fmt: skip
        if NZ:
            i_z = i_c - x_chunks - y_chunks
            if i_z >= 0:
                gradient(
                    gz + i_b * N * Dz, i, i_z * CHUNK + o_c, N, blocks, b, j_factor, q, a_z, t_z,
                    p_z, p_e + 2 * N, p_s + 2 * N, e_z, Dz, z_n, z_d, UZ,
                    p_x, p_e, p_s, e_x, Dx, x_n, x_d, UX,
                    p_y, p_e + N, p_s + N, e_y, Dy, y_n, y_d, UY,
                    p_k + 2 * N * N, p_k, p_k + N * N,
                    VIEWS, KEPT, PRECISION, OUTER, WIDEN, HALF, BM, BN, BK,
                )  # fmt: skip


def forward(
    views: Sequence[Tensor],  # [B, N, D_i] each
    units: Sequence[bool],
    weights: Sequence[int],
    value: Tensor,  # [B] fp32, written
    grads: Sequence[Tensor | None],  # [B, N, D_i] fp32 contiguous, written
) -> None:
    # Offsets inside a set are 32 bits: one whose rows lie further apart is copied.
    spans = [sum((n - 1) * s for n, s in zip(v.shape[1:], v.stride()[1:], strict=True)) for v in views]
    views = [v if span < LARGEST else v.contiguous() for v, span in zip(views, spans, strict=True)]
    if any(v.shape[1] * v.shape[2] >= LARGEST for v in views):
        raise ValueError(f"the Triton form takes sets of fewer than {LARGEST} numbers; use the reference")
    x, y, z = (*views, views[0])[:3]
    V = len(views)
    B, N, _ = x.shape
    device = x.device
    needed = [g is not None for g in grads]
    depth = sum(v.shape[2] for v in views)
    # N x N products are kept where they are no more than four times the views themselves in fp32.
    kept_there = any(needed) and 4 * depth >= V * N
    single = SINGLE_KEPT if kept_there and V == 2 else SINGLE
    config = single if x.dtype == torch.float32 else HALF
    blocks = triton.cdiv(N, config["BLOCK"])
    programs = triton.cdiv(blocks, 2)
    exponents = torch.empty(B, V, N, dtype=torch.int32, device=device)
    squares = torch.empty(B, V, N, dtype=torch.float32, device=device)
    scalars = torch.empty(B, 8, dtype=torch.float32, device=device)
    sums = torch.empty(B, programs, 4, dtype=torch.float32, device=device)
    kept = torch.empty((B, V, N, N) if kept_there else (1,), dtype=torch.float32, device=device)
    third = bool(units[2]) if V == 3 else False
    constants: dict[str, Any] = {"VIEWS": V, "UX": bool(units[0]), "UY": bool(units[1]), "UZ": third}
    weigh = dict(zip(("WJ", "WX", "WY", "WZ"), (*weights, 0)[:4], strict=True))
    tiles: dict[str, Any] = {
        "PRECISION": "tf32x3" if x.dtype == torch.float32 else "ieee",  # halves multiply exactly
        # The interpreter multiplies bfloat16 as the integers that store it.
        "WIDEN": interpreted(),
        "HALF": x.dtype == torch.float16,
        "BM": config["BLOCK"],
        "BN": config["BLOCK"],
        "BK": config["BK"],
        "num_warps": config["num_warps"],
        "num_stages": config["num_stages"],
    }
    sizes = (x.shape[2], y.shape[2], z.shape[2], *x.stride(), *y.stride(), *z.stride())
    with torch.cuda.device_of(x):
        rows_kernel[(B, triton.cdiv(N, ROWS))](x, y, z, exponents, squares, N, *sizes, VIEWS=V, BR=ROWS, BD=DEEP)
        value_kernel[(B, programs)](
            x, y, z, exponents, squares, scalars, sums, kept, N, blocks, *sizes,
            KEEP=kept_there, SCAN=SCAN, **constants, **tiles,
        )  # fmt: skip
        if not any(needed):
            finish_kernel[(B,)](scalars, sums, value, programs, VIEWS=V, SCAN=SCAN, **weigh)
            return
        chunks = [triton.cdiv(v.shape[2], config["CHUNK"]) if n else 0 for v, n in zip(views, needed, strict=True)]
        out = [value if g is None else g for g in (*grads, None)[:3]]
        gradient_kernel[(B, sum(chunks), blocks)](
            x, y, z, exponents, squares, scalars, sums, kept, value, *out, N, blocks, programs, *sizes, *chunks[:2],
            **dict(zip(("NX", "NY", "NZ"), (*needed, False)[:3], strict=True)),
            KEPT=kept_there, CHUNK=config["CHUNK"], SCAN=SCAN,
            OUTER="tf32x3" if x.dtype == torch.float32 else "tf32",  # a half fits TF32's mantissa
            **constants, **weigh, **tiles,
        )  # fmt: skip


def aot() -> list[AotCall]:
    """Calls that between them launch two views and three, kept products and none, unit rows, and no gradients."""

    def one(b: int, n: int, widths: tuple[int, ...], units: tuple[bool, ...], need: bool, dtype: torch.dtype) -> None:
        views = [meta(b, n, d, dtype=dtype) for d in widths]
        weights = (-1, *(1 for _ in widths))
        forward(views, units, weights, meta(b), [meta(b, n, d) if need else None for d in widths])

    calls = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for b, n, widths, units, need in (
            (4, 576, (171, 171), (False, False), True),
            (4, 2304, (171, 171), (False, False), True),
            (4, 2304, (171, 171), (False, False), False),
            (4, 576, (171, 512, 512), (False, True, True), True),
            (3, 577, (67, 31), (True, False), True),
        ):
            name = f"{str(dtype).removeprefix('torch.')} B{b} N{n} D{'+'.join(map(str, widths))}"
            name += "" if need else ", value alone"
            matrix = ("value_kernel", "gradient_kernel") if need else ("value_kernel",)
            quick = need and (dtype, n) in ((torch.float32, 577), (torch.bfloat16, 2304))
            calls.append(AotCall(name, partial(one, b, n, widths, units, need, dtype), matrix, quick))
    return calls
