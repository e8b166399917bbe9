"""The Triton form: three launches forward, one backward (two where the temperature learns).

Sizes B N M D as in the public function. Forward: a program sweeps a patch of row blocks x column blocks and leaves the
patch's log-sum-exp of every row and column in two parts, the largest logit and the sum; a second launch joins patches,
a third adds up. Backward: a program owns a block of samples of either side and some of their D entries, sweeps the
other side and computes the logits again. ``i_`` program indices, ``o_`` offsets, ``m_`` masks, ``b_`` block values.
Each result is summed by one program in one order: the same bits twice.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from infoclip.kernels.aot import AotCall, meta
from infoclip.kernels.triton_support import MISSING, interpreted, why_not

__all__ = ["aot", "backward", "config", "forward", "why_not"]

GROUPS = 32
"""Patches along an axis, at most: each row keeps two numbers for each."""
JOINED = 256
"""Rows or columns that a program of the second launch joins."""

if MISSING is None:
    import triton
    import triton.language as tl

    @triton.jit
    def factor_of(temperature, scale, TEMPERATURE: tl.constexpr):
        """What the inner products are multiplied by."""
        if TEMPERATURE:
            b_t = tl.load(temperature)
            return tl.where(b_t > 0.0, tl.div_rn(1.0, b_t), float("nan"))
        return scale

    @triton.jit
    def inner_products(
        a,  # the first row of a block of one side
        b,  # and of the other
        a_rows,  # rows left on that side, from the block on
        b_rows,
        D,
        a_n,
        a_d,
        b_n,
        b_d,
        WIDEN: tl.constexpr,  # halves are widened before they are multiplied: the same products, for the interpreter
        PRECISION: tl.constexpr,
        BM: tl.constexpr,
        BN: tl.constexpr,
        BK: tl.constexpr,
    ):
        o_a = tl.arange(0, BM)
        o_b = tl.arange(0, BN)
        o_k = tl.arange(0, BK)
        o_a_n = (o_a * a_n)[:, None]
        o_b_n = (o_b * b_n)[None, :]
        m_a = (o_a < a_rows)[:, None]
        m_b = (o_b < b_rows)[None, :]
        b_s = tl.zeros([BM, BN], dtype=tl.float32)
        for k in range(0, D, BK):
            m_k = o_k < D - k
            b_a = tl.load(a + (o_a_n + ((k + o_k) * a_d)[None, :]), mask=m_a & m_k[None, :], other=0.0)
            b_b = tl.load(b + (o_b_n + ((k + o_k) * b_d)[:, None]), mask=m_b & m_k[:, None], other=0.0)
            if WIDEN:
                b_a = b_a.to(tl.float32)
                b_b = b_b.to(tl.float32)
            b_s = tl.dot(b_a, b_b, b_s, input_precision=PRECISION)
        return b_s

    @triton.jit
    def joined(b_high, b_sum, b_more_high, b_more_sum):
        """Two log-sum-exps in parts, of which one or both may be of nothing (-inf, 0)."""
        b_new = tl.maximum(b_high, b_more_high)
        b_zero = tl.where(b_new == float("-inf"), 0.0, b_new)
        return b_new, b_sum * tl.exp(b_high - b_zero) + b_more_sum * tl.exp(b_more_high - b_zero)

    @triton.jit
    def sweep_kernel(
        x,  # [B, N, D] by strides
        y,  # [B, M, D] by strides
        temperature,  # [] or unused
        positive,  # [B, N] int64 by strides, or unused
        pairs,  # [B, N] fp32, written: the logit of each row's pair
        row_parts,  # [2, B, column_groups, N] fp32, written: largest logit, sum
        column_parts,  # [2 or 4, B, row_groups, M] fp32, written: the same, how many rows' pair, their logits' sum
        B,
        N,
        M,
        D,
        scale,
        x_b,
        x_n,
        x_d,
        y_b,
        y_m,
        y_d,
        p_b,
        p_n,
        row_groups,
        column_groups,
        row_span,  # blocks of a patch
        column_span,
        TEMPERATURE: tl.constexpr,
        POSITIVE: tl.constexpr,
        SYMMETRIC: tl.constexpr,
        WIDEN: tl.constexpr,
        PRECISION: tl.constexpr,
        BM: tl.constexpr,
        BN: tl.constexpr,
        BK: tl.constexpr,
    ):
        i_b = tl.program_id(1).to(tl.int64)
        i_r = tl.program_id(0) // column_groups
        i_c = tl.program_id(0) % column_groups
        factor = factor_of(temperature, scale, TEMPERATURE)
        rows = tl.cast(B, tl.int64) * column_groups * N  # from one part to the next
        columns = tl.cast(B, tl.int64) * row_groups * M
        p_rows = row_parts + (i_b * column_groups + i_c) * N
        p_columns = column_parts + (i_b * row_groups + i_r) * M
        for j in range(i_c * column_span, tl.minimum((i_c + 1) * column_span, tl.cdiv(M, BN))):
            o_j = j * BN + tl.arange(0, BN)
            m_j = o_j < M
            b_column_high = tl.full([BN], float("-inf"), dtype=tl.float32)
            b_column_sum = tl.zeros([BN], dtype=tl.float32)
            b_count = tl.zeros([BN], dtype=tl.float32)
            b_chosen = tl.zeros([BN], dtype=tl.float32)
            for i in range(i_r * row_span, tl.minimum((i_r + 1) * row_span, tl.cdiv(N, BM))):
                o_i = i * BM + tl.arange(0, BM)
                m_i = o_i < N
                i_0 = tl.cast(i, tl.int64) * BM
                j_0 = tl.cast(j, tl.int64) * BN
                b_s = inner_products(
                    x + i_b * x_b + i_0 * x_n, y + i_b * y_b + j_0 * y_m, N - i_0, M - j_0, D, x_n, x_d, y_m, y_d,
                    WIDEN, PRECISION, BM, BN, BK,
                )  # fmt: skip
                # Outside is -inf before any maximum is taken.
                b_s = tl.where(m_i[:, None] & m_j[None, :], b_s * factor, float("-inf"))

                o_pair = o_i
                if POSITIVE:
                    o_pair = tl.load(positive + i_b * p_b + o_i * p_n, mask=m_i, other=-1)
                m_pair = m_i[:, None] & (o_pair[:, None] == o_j[None, :])
                if POSITIVE or (i * BM < (j + 1) * BN and j * BN < (i + 1) * BM):
                    b_pair = tl.where(m_pair, b_s, 0.0)
                    m_here = m_i & (o_pair >= j * BN) & (o_pair < tl.minimum((j + 1) * BN, M))
                    tl.store(pairs + i_b * N + o_i, tl.sum(b_pair, axis=1), mask=m_here)
                    if POSITIVE and SYMMETRIC:
                        b_count += tl.sum(m_pair.to(tl.float32), axis=0)
                        b_chosen += tl.sum(b_pair, axis=0)

                b_high = tl.max(b_s, axis=1)
                b_zero = tl.where(b_high == float("-inf"), 0.0, b_high)
                b_sum = tl.sum(tl.exp(b_s - b_zero[:, None]), axis=1)
                later = m_i & (j > i_c * column_span)
                b_old_high = tl.load(p_rows + o_i, mask=later, other=float("-inf"))
                b_old_sum = tl.load(p_rows + rows + o_i, mask=later, other=0.0)
                b_high, b_sum = joined(b_old_high, b_old_sum, b_high, b_sum)
                tl.store(p_rows + o_i, b_high, mask=m_i)
                tl.store(p_rows + rows + o_i, b_sum, mask=m_i)
                if SYMMETRIC:
                    b_high = tl.max(b_s, axis=0)
                    b_zero = tl.where(b_high == float("-inf"), 0.0, b_high)
                    b_sum = tl.sum(tl.exp(b_s - b_zero[None, :]), axis=0)
                    b_column_high, b_column_sum = joined(b_column_high, b_column_sum, b_high, b_sum)
            if SYMMETRIC:
                tl.store(p_columns + o_j, b_column_high, mask=m_j)
                tl.store(p_columns + columns + o_j, b_column_sum, mask=m_j)
                if POSITIVE:
                    tl.store(p_columns + 2 * columns + o_j, b_count, mask=m_j)
                    tl.store(p_columns + 3 * columns + o_j, b_chosen, mask=m_j)
            tl.debug_barrier()  # the next column block reads what other threads of the program wrote of the rows

    @triton.jit
    def join_kernel(
        row_parts,
        column_parts,
        pairs,
        positive,
        rows,  # [B, N] fp32, written: log-sum-exp
        columns,  # [B, M] fp32, written: log-sum-exp less the logarithm of how many rows' pair
        losses,  # [B, programs] fp32, written
        B,
        N,
        M,
        p_b,
        p_n,
        row_groups,
        column_groups,
        POSITIVE: tl.constexpr,
        SYMMETRIC: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        i_b = tl.program_id(1).to(tl.int64)
        i_program = tl.program_id(0)
        row_programs = tl.cdiv(N, BLOCK)
        b_high = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
        b_sum = tl.zeros([BLOCK], dtype=tl.float32)
        if i_program < row_programs:
            o = i_program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            m = o < N
            part = tl.cast(B, tl.int64) * column_groups * N
            for g in range(0, column_groups):
                p = row_parts + (i_b * column_groups + g) * N + o
                b_more_high = tl.load(p, mask=m, other=float("-inf"))
                b_high, b_sum = joined(b_high, b_sum, b_more_high, tl.load(p + part, mask=m, other=0.0))
            b_rows = b_high + tl.log(tl.where(m, b_sum, 1.0))
            tl.store(rows + i_b * N + o, b_rows, mask=m)
            b_loss = b_rows - tl.load(pairs + i_b * N + o, mask=m, other=0.0)
            if POSITIVE:  # nothing was written for an index that is no column's
                o_pair = tl.load(positive + i_b * p_b + o * p_n, mask=m, other=0)
                b_loss = tl.where((o_pair >= 0) & (o_pair < M), b_loss, float("nan"))
            b_loss = tl.where(m, b_loss, 0.0)
            tl.store(losses + i_b * tl.num_programs(0) + i_program, tl.sum(b_loss, axis=0))
        else:
            o = (i_program - row_programs).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            m = o < M
            part = tl.cast(B, tl.int64) * row_groups * M
            b_count = tl.zeros([BLOCK], dtype=tl.float32)
            b_chosen = tl.zeros([BLOCK], dtype=tl.float32)
            for g in range(0, row_groups):
                p = column_parts + (i_b * row_groups + g) * M + o
                b_more_high = tl.load(p, mask=m, other=float("-inf"))
                b_high, b_sum = joined(b_high, b_sum, b_more_high, tl.load(p + part, mask=m, other=0.0))
                if POSITIVE:
                    b_count += tl.load(p + 2 * part, mask=m, other=0.0)
                    b_chosen += tl.load(p + 3 * part, mask=m, other=0.0)
            b_columns = b_high + tl.log(tl.where(m, b_sum, 1.0))
            if POSITIVE:
                b_loss = tl.where(b_count > 0.0, b_count * b_columns - b_chosen, 0.0)
                b_columns = tl.where(b_count > 0.0, b_columns - tl.log(tl.maximum(b_count, 1.0)), float("inf"))
            else:
                b_loss = b_columns - tl.load(pairs + i_b * N + o, mask=m, other=0.0)
            tl.store(columns + i_b * M + o, b_columns, mask=m)
            b_loss = tl.where(m, b_loss, 0.0)
            tl.store(losses + i_b * tl.num_programs(0) + i_program, tl.sum(b_loss, axis=0))

    @triton.jit
    def total_kernel(
        parts,  # [n] fp32
        total,  # [] written: the sum times factor and, where they are given, d_loss and -1 / temperature
        bound,  # [] written: most - total, unless BACKWARD
        d_loss,
        temperature,
        n,
        factor,
        most,
        BACKWARD: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        b_sum = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, n, BLOCK):
            o = start + tl.arange(0, BLOCK).to(tl.int64)
            b_sum += tl.load(parts + o, mask=o < n, other=0.0)
        b_total = tl.sum(b_sum, axis=0) * factor
        if BACKWARD:
            tl.store(total, -b_total * tl.load(d_loss) / tl.load(temperature))
        else:
            tl.store(total, b_total)
            tl.store(bound, most - b_total)

    @triton.jit
    def side(
        own,  # [rows, D] of one batch, by strides
        other,  # [others, D]
        out,  # [rows, D] contiguous, written if STORE
        parts,  # where this program's part of the temperature's gradient goes, if TEMPERATURE_PART
        own_lse,  # [rows]
        other_lse,  # [others]
        positive,  # of the batch
        i_block,
        rows,
        others,
        D,
        own_n,
        own_d,
        other_n,
        other_d,
        p_n,
        factor,
        gain,  # of the finished sums
        OWN_IS_X: tl.constexpr,
        POSITIVE: tl.constexpr,
        SYMMETRIC: tl.constexpr,
        STORE: tl.constexpr,
        TEMPERATURE_PART: tl.constexpr,
        WIDEN: tl.constexpr,
        PRECISION: tl.constexpr,
        NARROW: tl.constexpr,  # the slopes are multiplied in the samples' dtype, not in fp32
        LIFT: tl.constexpr,  # a power of two that keeps small slopes inside the range of fp16
        BM: tl.constexpr,
        BN: tl.constexpr,
        BK: tl.constexpr,
        BD: tl.constexpr,
    ):
        o_i = i_block * BM + tl.arange(0, BM)
        m_i = o_i < rows
        p_own = own + i_block.to(tl.int64) * BM * own_n
        o_d = tl.program_id(1) * BD + tl.arange(0, BD)
        m_d = o_d < D
        directions = 2.0 if SYMMETRIC else 1.0
        b_own = tl.zeros([BM], dtype=tl.float32)
        if SYMMETRIC or OWN_IS_X:
            b_own = tl.load(own_lse + o_i, mask=m_i, other=0.0)
        if OWN_IS_X:
            o_pair = o_i
            if POSITIVE:
                o_pair = tl.load(positive + o_i * p_n, mask=m_i, other=-1)
        b_acc = tl.zeros([BM, BD], dtype=tl.float32)
        b_part = tl.zeros([BM], dtype=tl.float32)
        for j in range(0, others, BN):
            o_j = j + tl.arange(0, BN)
            m_j = o_j < others
            p_block = other + tl.cast(j, tl.int64) * other_n
            b_s = factor * inner_products(
                p_own, p_block, rows - i_block * BM, others - j, D, own_n, own_d, other_n, other_d,
                WIDEN, PRECISION, BM, BN, BK,
            )  # fmt: skip
            b_g = tl.zeros([BM, BN], dtype=tl.float32)
            if SYMMETRIC or OWN_IS_X:
                b_g += tl.exp(b_s - b_own[:, None])
            if SYMMETRIC or not OWN_IS_X:
                b_g += tl.exp(b_s - tl.load(other_lse + o_j, mask=m_j, other=0.0)[None, :])
            if OWN_IS_X:
                m_pair = o_pair[:, None] == o_j[None, :]
            else:
                o_pair = o_j
                if POSITIVE:
                    o_pair = tl.load(positive + o_j * p_n, mask=m_j, other=-1)
                m_pair = o_i[:, None] == o_pair[None, :]
            b_g = tl.where(m_pair, b_g - directions, b_g)
            b_g = tl.where(m_i[:, None] & m_j[None, :], b_g, 0.0)
            if TEMPERATURE_PART:
                b_part += tl.sum(b_g * b_s, axis=1)
            if STORE:
                p_other = p_block + ((tl.arange(0, BN) * other_n)[:, None] + (o_d * other_d)[None, :])
                b_other = tl.load(p_other, mask=m_j[:, None] & m_d[None, :], other=0.0)
                if NARROW:
                    b_g = (b_g * LIFT).to(b_other.dtype)
                if WIDEN or not NARROW:
                    b_g = b_g.to(tl.float32)
                    b_other = b_other.to(tl.float32)
                b_acc = tl.dot(b_g, b_other, b_acc, input_precision=PRECISION)
        if STORE:
            b_acc = b_acc * (gain / LIFT)
            p_out = out + i_block.to(tl.int64) * BM * D + ((tl.arange(0, BM) * D)[:, None] + o_d[None, :])
            tl.store(p_out, b_acc.to(out.dtype.element_ty), mask=m_i[:, None] & m_d[None, :])
        if TEMPERATURE_PART and tl.program_id(1) == 0:
            tl.store(parts, tl.sum(b_part, axis=0))

    @triton.jit
    def backward_kernel(
        x,
        y,
        temperature,
        positive,
        rows,  # [B, N] fp32
        columns,  # [B, M] fp32
        d_loss,  # [] fp32
        d_x,  # [B, N, D] contiguous, written
        d_y,  # [B, M, D] contiguous, written
        parts,  # [B, x_programs] fp32, written
        N,
        M,
        D,
        scale,
        inverse,  # 1 / (B N directions)
        x_b,
        x_n,
        x_d,
        y_b,
        y_m,
        y_d,
        p_b,
        p_n,
        x_programs,  # blocks of x come first; 0 where neither x nor the temperature needs them
        TEMPERATURE: tl.constexpr,
        POSITIVE: tl.constexpr,
        SYMMETRIC: tl.constexpr,
        NEED_X: tl.constexpr,
        NEED_TEMPERATURE: tl.constexpr,
        WIDEN: tl.constexpr,
        PRECISION: tl.constexpr,
        NARROW: tl.constexpr,
        LIFT: tl.constexpr,
        BM: tl.constexpr,
        BN: tl.constexpr,
        BK: tl.constexpr,
        BD: tl.constexpr,
    ):
        i_program = tl.program_id(0)
        i_b = tl.program_id(2).to(tl.int64)
        factor = factor_of(temperature, scale, TEMPERATURE)
        gain = tl.load(d_loss) * factor * inverse
        b_x = x + i_b * x_b
        b_y = y + i_b * y_b
        b_positive = positive + i_b * p_b
        if i_program < x_programs:
            side(
                b_x, b_y, d_x + i_b * N * D, parts + i_b * x_programs + i_program, rows + i_b * N, columns + i_b * M,
                b_positive, i_program, N, M, D, x_n, x_d, y_m, y_d, p_n, factor, gain,
                True, POSITIVE, SYMMETRIC, NEED_X, NEED_TEMPERATURE, WIDEN, PRECISION, NARROW, LIFT, BM, BN, BK, BD,
            )  # fmt: skip
        else:
            side(
                b_y, b_x, d_y + i_b * M * D, parts, columns + i_b * M, rows + i_b * N,
                b_positive, i_program - x_programs, M, N, D, y_m, y_d, x_n, x_d, p_n, factor, gain,
                False, POSITIVE, SYMMETRIC, True, False, WIDEN, PRECISION, NARROW, LIFT, BM, BN, BK, BD,
            )  # fmt: skip


class Config(NamedTuple):
    """A fixed launch configuration: constants of the kernels, and how they are launched."""

    sweep: dict[str, Any]
    sweep_launch: dict[str, int]
    backward: dict[str, Any]
    backward_launch: dict[str, int]


def config(dtype: torch.dtype, D: int, positive: bool, symmetric: bool) -> Config:
    """For samples of a dtype. Halves multiply exactly in their own dtype; fp32 as three products of TF32.

    The blocks are the largest that no GPU generation has to spill registers for, whatever the strides.
    """
    half = dtype != torch.float32
    # Slopes lie in -2 .. 2, but where a column is several rows' pair they reach their number, which fp16 may not hold.
    narrow = half and not (dtype == torch.float16 and positive and symmetric)
    lift = 2.0**14 if narrow and dtype == torch.float16 else 1.0
    entries = max(min(1 << max(D - 1, 1).bit_length(), 256 if narrow else 128), 32)
    common = {"PRECISION": "tf32x3"}
    return Config(
        {**common, "BM": 64, "BN": 64 if half else 32, "BK": 32},
        {"num_warps": 8, "num_stages": 3 if half else 2},
        {**common, "NARROW": narrow, "LIFT": lift, "BM": 64, "BN": 32 if narrow else 16, "BK": 32, "BD": entries},
        {"num_warps": 8, "num_stages": 3 if narrow else 2},
    )


def _near(x: Tensor, block: int) -> Tensor:
    """The samples, copied where the rows of a block lie too far apart for an offset of 32 bits."""
    apart = (block - 1) * x.stride(1) + (x.shape[2] - 1) * x.stride(2)
    return x if apart < 2**31 else x.contiguous()


def _constants(x: Tensor, temperature: Tensor | None, positive: Tensor | None, symmetric: bool) -> dict[str, Any]:
    return {
        "TEMPERATURE": temperature is not None,
        "POSITIVE": positive is not None,
        "SYMMETRIC": symmetric,
        # The interpreter multiplies bfloat16 as the integers that store it.
        "WIDEN": interpreted(),
    }


def forward(
    x: Tensor,  # [B, N, D]
    y: Tensor,  # [B, M, D]
    temperature: Tensor | None,  # []
    scale: float,
    positive: Tensor | None,  # [B, N] int64
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, N, D = x.shape
    M = y.shape[1]
    settings = config(x.dtype, D, positive is not None, symmetric)
    x, y = _near(x, settings.sweep["BM"]), _near(y, settings.sweep["BN"])
    row_blocks, column_blocks = triton.cdiv(N, settings.sweep["BM"]), triton.cdiv(M, settings.sweep["BN"])
    row_span, column_span = triton.cdiv(row_blocks, GROUPS), triton.cdiv(column_blocks, GROUPS)
    row_groups, column_groups = triton.cdiv(row_blocks, row_span), triton.cdiv(column_blocks, column_span)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    pairs, loss, bound, rows = empty(B, N), empty(), empty(), empty(B, N)
    columns = empty(B, M) if symmetric else empty(0)
    row_parts = empty(2, B, column_groups, N)
    column_parts = empty(2 if positive is None else 4, B, row_groups, M) if symmetric else empty(0)
    programs = triton.cdiv(N, JOINED) + (triton.cdiv(M, JOINED) if symmetric else 0)
    losses = empty(B, programs)
    p_strides = (0, 0) if positive is None else positive.stride()
    index = rows if positive is None else positive
    most = (math.log(M) + math.log(N)) / 2 if symmetric else math.log(M)
    with torch.cuda.device_of(x):
        sweep_kernel[(row_groups * column_groups, B)](
            x, y, rows if temperature is None else temperature, index, pairs, row_parts, column_parts,
            B, N, M, D, scale, *x.stride(), *y.stride(), *p_strides, row_groups, column_groups, row_span, column_span,
            **_constants(x, temperature, positive, symmetric), **settings.sweep, **settings.sweep_launch,
        )  # fmt: skip
        join_kernel[(programs, B)](
            row_parts, column_parts, pairs, index, rows, columns, losses,
            B, N, M, *p_strides, row_groups, column_groups,
            POSITIVE=positive is not None, SYMMETRIC=symmetric, BLOCK=JOINED,
        )  # fmt: skip
        total_kernel[(1,)](
            losses, loss, bound, loss, loss, B * programs, 1.0 / (B * N * (2 if symmetric else 1)), most,
            BACKWARD=False, BLOCK=1024,
        )  # fmt: skip
    return loss, bound, rows, columns


def backward(
    d_loss: Tensor,  # []
    x: Tensor,  # [B, N, D]
    y: Tensor,  # [B, M, D]
    temperature: Tensor | None,  # []
    scale: float,
    positive: Tensor | None,  # [B, N] int64
    symmetric: bool,
    rows: Tensor,  # [B, N]
    columns: Tensor,  # [B, M], or empty
    need_x: bool,
    need_y: bool,
    need_temperature: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    B, N, D = x.shape
    M = y.shape[1]
    settings = config(x.dtype, D, positive is not None, symmetric)
    constants = settings.backward
    x, y = _near(x, constants["BM"]), _near(y, constants["BM"])
    x_programs = triton.cdiv(N, constants["BM"]) if need_x or need_temperature else 0
    y_programs = triton.cdiv(M, constants["BM"]) if need_y else 0
    d_x = x.new_empty(x.shape) if need_x else None
    d_y = y.new_empty(y.shape) if need_y else None
    parts = rows.new_empty((B, x_programs) if need_temperature else (0,))
    d_temperature = rows.new_empty(()) if need_temperature else None
    p_strides = (0, 0) if positive is None else positive.stride()
    inverse = 1.0 / (B * N * (2 if symmetric else 1))
    entries = triton.cdiv(D, constants["BD"]) if need_x or need_y else 1
    with torch.cuda.device_of(x):
        backward_kernel[(x_programs + y_programs, entries, B)](
            x, y, rows if temperature is None else temperature, rows if positive is None else positive, rows, columns,
            d_loss, rows if d_x is None else d_x, rows if d_y is None else d_y, parts,
            N, M, D, scale, inverse, *x.stride(), *y.stride(), *p_strides, x_programs,
            **_constants(x, temperature, positive, symmetric), NEED_X=need_x, NEED_TEMPERATURE=need_temperature,
            **constants, **settings.backward_launch,
        )  # fmt: skip
        if d_temperature is not None:
            total_kernel[(1,)](
                parts, d_temperature, rows, d_loss, temperature, parts.numel(), inverse, 0.0, BACKWARD=True, BLOCK=1024
            )
    return d_x, d_y, d_temperature


def aot() -> list[AotCall]:
    """Calls that between them launch each width of a block, both kinds of pairs, one direction and two."""

    def both(b: int, n: int, m: int, d: int, learns: bool, paired: bool, symmetric: bool, dtype: torch.dtype) -> None:
        # As the objective passes maps: [B, D, N] seen as [B, N, D]; with indices as CLIP passes rows.
        x, y = (meta(b, k, d, dtype=dtype) if paired else meta(b, d, k, dtype=dtype).transpose(1, 2) for k in (n, m))
        temperature = meta() if learns else None
        positive = meta(b, n, dtype=torch.int64) if paired else None
        loss, _, rows, columns = forward(x, y, temperature, 10.0, positive, symmetric)
        backward(loss, x, y, temperature, 10.0, positive, symmetric, rows, columns, True, True, learns)

    calls = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for b, n, m, d, learns, paired, symmetric in (
            (4, 576, 576, 171, False, False, True),
            (4, 2304, 2304, 512, False, False, True),
            (1, 1024, 4096, 512, True, True, False),
            (3, 277, 285, 67, True, True, True),
            (2, 130, 130, 31, True, False, True),
        ):
            name = f"{str(dtype).removeprefix('torch.')} B{b} N{n} M{m} D{d}"
            name += (", learnt temperature" if learns else "") + (", pairs by index" if paired else "")
            name += "" if symmetric else ", one direction"
            call = partial(both, b, n, m, d, learns, paired, symmetric, dtype)
            quick = (dtype, d) in ((torch.float32, 67), (torch.bfloat16, 512)) and symmetric
            calls.append(AotCall(name, call, ("sweep_kernel", "backward_kernel"), quick))
    return calls
