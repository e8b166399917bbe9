"""The Triton form: one launch forward; backward one for locations and weights, one for the value.

Sizes B S M D Q L P as in the public function. ``i_`` indices, ``o_`` offsets, ``m_`` masks, ``b_`` block values. The
value's gradient is gathered from samples sorted by cell (``cells.py``); each result is summed by one program in one
order: the same bits twice.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from infoclip.kernels.aot import AotCall, meta
from infoclip.kernels.triton_support import MISSING, why_not

from .cells import level_table, sort_samples

__all__ = ["aot", "backward", "forward", "why_not"]

QUERIES = 16
"""Queries a program of the forward, and of the gradient of locations and weights, owns."""
SAMPLES = 16
"""Samples that the gradient of the value reads at a time."""

if MISSING is None:
    import triton
    import triton.language as tl

    @triton.jit
    def corner(p_map, row, there, s_s, o_d, m_d):
        """Rows of the value at some pixels, fp32 [BQ, BD]; zeros where there is no pixel."""
        o = tl.where(there, row, 0).to(tl.int64) * s_s
        return tl.load(p_map + o[:, None] + o_d[None, :], mask=there[:, None] & m_d[None, :], other=0.0).to(tl.float32)

    @triton.jit
    def place(px, py, h, w):
        """Upper left pixel, fractions, and whether a sample lies on the map, and whether it is finite."""
        x = px * w.to(tl.float32) - 0.5
        y = py * h.to(tl.float32) - 0.5
        finite = (x - x == 0.0) & (y - y == 0.0)
        inside = finite & (x > -1.0) & (y > -1.0) & (x < w.to(tl.float32)) & (y < h.to(tl.float32))
        x = tl.where(inside, x, 0.0)
        y = tl.where(inside, y, 0.0)
        x0 = tl.floor(x)
        y0 = tl.floor(y)
        return x0.to(tl.int32), y0.to(tl.int32), x - x0, y - y0, inside, finite

    @triton.jit
    def forward_kernel(
        value,  # [B, S, M, D] by strides, channels side by side
        locations,  # [B, Q, M, L, P, 2] fp32
        weights,  # [B, Q, M, L, P] fp32
        levels,  # [L, 4] int32: height, width, first pixel, first cell
        out,  # [B, Q, M, D] written
        Q,
        M,
        D,
        L,
        P,
        s_b,
        s_s,
        s_m,
        BQ: tl.constexpr,
        BD: tl.constexpr,
    ):
        i_b = tl.program_id(0).to(tl.int64) // M
        i_m = tl.program_id(0).to(tl.int64) % M
        o_q = tl.program_id(1) * BQ + tl.arange(0, BQ)
        o_d = tl.arange(0, BD)
        m_q = o_q < Q
        m_d = o_d < D
        o_row = (i_b * Q + o_q) * M + i_m
        p_value = value + i_b * s_b + i_m * s_m
        b_sum = tl.zeros([BQ, BD], dtype=tl.float32)
        for i_l in range(0, L):
            h = tl.load(levels + 4 * i_l)
            w = tl.load(levels + 4 * i_l + 1)
            p_map = p_value + tl.load(levels + 4 * i_l + 2).to(tl.int64) * s_s
            for k in range(0, P):
                o = (o_row * L + i_l) * P + k
                px = tl.load(locations + 2 * o, mask=m_q, other=-2.0)
                py = tl.load(locations + 2 * o + 1, mask=m_q, other=-2.0)
                b_w = tl.load(weights + o, mask=m_q, other=0.0)
                x, y, fx, fy, inside, finite = place(px, py, h, w)
                left = inside & (x >= 0)
                right = inside & (x + 1 < w)
                pixel = y * w + x
                b_00 = corner(p_map, pixel, left & (y >= 0), s_s, o_d, m_d)
                b_01 = corner(p_map, pixel + 1, right & (y >= 0), s_s, o_d, m_d)
                b_10 = corner(p_map, pixel + w, left & (y + 1 < h), s_s, o_d, m_d)
                b_11 = corner(p_map, pixel + w + 1, right & (y + 1 < h), s_s, o_d, m_d)
                b_upper = b_00 * (1.0 - fx)[:, None] + b_01 * fx[:, None]
                b_lower = b_10 * (1.0 - fx)[:, None] + b_11 * fx[:, None]
                b_sample = b_upper * (1.0 - fy)[:, None] + b_lower * fy[:, None]
                b_w = tl.where(inside, b_w, 0.0)
                b_w = tl.where(finite, b_w, float("nan"))
                b_sum += b_w[:, None] * b_sample
        p_out = out + o_row[:, None] * D + o_d[None, :]
        tl.store(p_out, b_sum.to(out.dtype.element_ty), mask=m_q[:, None] & m_d[None, :])

    @triton.jit
    def points_kernel(
        grad,  # [B, Q, M, D]
        value,  # [B, S, M, D] by strides, channels side by side
        locations,  # [B, Q, M, L, P, 2] fp32
        weights,  # [B, Q, M, L, P] fp32
        levels,  # [L, 4] int32
        d_locations,  # as locations, written
        d_weights,  # as weights, written
        Q,
        M,
        D,
        L,
        P,
        s_b,
        s_s,
        s_m,
        BQ: tl.constexpr,
        BD: tl.constexpr,
    ):
        i_b = tl.program_id(0).to(tl.int64) // M
        i_m = tl.program_id(0).to(tl.int64) % M
        o_q = tl.program_id(1) * BQ + tl.arange(0, BQ)
        o_d = tl.arange(0, BD)
        m_q = o_q < Q
        m_d = o_d < D
        o_row = (i_b * Q + o_q) * M + i_m
        p_value = value + i_b * s_b + i_m * s_m
        p_grad = grad + o_row[:, None] * D + o_d[None, :]
        b_g = tl.load(p_grad, mask=m_q[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        for i_l in range(0, L):
            h = tl.load(levels + 4 * i_l)
            w = tl.load(levels + 4 * i_l + 1)
            p_map = p_value + tl.load(levels + 4 * i_l + 2).to(tl.int64) * s_s
            for k in range(0, P):
                o = (o_row * L + i_l) * P + k
                px = tl.load(locations + 2 * o, mask=m_q, other=-2.0)
                py = tl.load(locations + 2 * o + 1, mask=m_q, other=-2.0)
                b_w = tl.load(weights + o, mask=m_q, other=0.0)
                x, y, fx, fy, inside, finite = place(px, py, h, w)
                left = inside & (x >= 0)
                right = inside & (x + 1 < w)
                pixel = y * w + x
                t_00 = tl.sum(b_g * corner(p_map, pixel, left & (y >= 0), s_s, o_d, m_d), axis=1)
                t_01 = tl.sum(b_g * corner(p_map, pixel + 1, right & (y >= 0), s_s, o_d, m_d), axis=1)
                t_10 = tl.sum(b_g * corner(p_map, pixel + w, left & (y + 1 < h), s_s, o_d, m_d), axis=1)
                t_11 = tl.sum(b_g * corner(p_map, pixel + w + 1, right & (y + 1 < h), s_s, o_d, m_d), axis=1)
                d_w = (1.0 - fy) * ((1.0 - fx) * t_00 + fx * t_01) + fy * ((1.0 - fx) * t_10 + fx * t_11)
                d_x = w.to(tl.float32) * b_w * ((1.0 - fy) * (t_01 - t_00) + fy * (t_11 - t_10))
                d_y = h.to(tl.float32) * b_w * ((1.0 - fx) * (t_10 - t_00) + fx * (t_11 - t_01))
                tl.store(d_weights + o, tl.where(finite, d_w, float("nan")), mask=m_q)
                tl.store(d_locations + 2 * o, tl.where(finite, d_x, float("nan")), mask=m_q)
                tl.store(d_locations + 2 * o + 1, tl.where(finite, d_y, float("nan")), mask=m_q)

    @triton.jit
    def pixels_kernel(
        grad,  # [B, Q, M, D]
        locations,  # [B, Q, M, L, P, 2] fp32
        weights,  # [B, Q, M, L, P] fp32
        levels,  # [L, 4] int32
        order,  # [B Q M L P] int64, samples by cell
        starts,  # [B M cells + 1] int64
        d_value,  # [B, S, M, D] contiguous, written
        S,
        Q,
        M,
        D,
        L,
        P,
        cells,
        BN: tl.constexpr,
        BD: tl.constexpr,
    ):
        i_item = tl.program_id(0).to(tl.int64)  # image, pixel, head
        i_m = i_item % M
        i_s = (i_item // M) % S
        i_b = i_item // M // S
        level = 0
        for i_l in range(1, L):
            level = tl.where(i_s >= tl.load(levels + 4 * i_l + 2), i_l, level)
        w = tl.load(levels + 4 * level + 1)
        h = tl.load(levels + 4 * level)
        i_pixel = (i_s - tl.load(levels + 4 * level + 2)).to(tl.int32)
        o_d = tl.arange(0, BD)
        o_n = tl.arange(0, BN)
        m_d = o_d < D
        i_cells = (i_b * M + i_m) * cells + tl.load(levels + 4 * level + 3)
        b_sum = tl.zeros([BD], dtype=tl.float32)
        for c in range(0, 4):  # the cells whose lower right, lower left, upper right, upper left corner this is
            i_y = i_pixel // w + c // 2
            i_x = i_pixel % w + c % 2
            i_cell = i_cells + i_y * (w + 1) + i_x
            first = tl.load(starts + i_cell)
            end = tl.load(starts + i_cell + 1)
            for i in range(first, end, BN):
                m_n = i + o_n < end
                b_id = tl.load(order + i + o_n, mask=m_n, other=0)
                fx = tl.load(locations + 2 * b_id, mask=m_n, other=0.0) * w.to(tl.float32) - 0.5 - (i_x - 1)
                fy = tl.load(locations + 2 * b_id + 1, mask=m_n, other=0.0) * h.to(tl.float32) - 0.5 - (i_y - 1)
                b_x = tl.where(c % 2 == 1, 1.0 - fx, fx)
                b_y = tl.where(c // 2 == 1, 1.0 - fy, fy)
                b_w = tl.load(weights + b_id, mask=m_n, other=0.0) * b_x * b_y
                o_row = (b_id // (M * L * P)) * M + i_m  # images and queries lie one after the other
                p_grad = grad + o_row[:, None] * D + o_d[None, :]
                b_g = tl.load(p_grad, mask=m_n[:, None] & m_d[None, :], other=0.0).to(tl.float32)
                b_sum += tl.sum(tl.where(m_n, b_w, 0.0)[:, None] * b_g, axis=0)
        tl.store(d_value + i_item * D + o_d, b_sum.to(d_value.dtype.element_ty), mask=m_d)


def forward(
    value: Tensor,  # [B, S, M, D]
    shapes: list[int],
    locations: Tensor,  # [B, Q, M, L, P, 2] contiguous
    weights: Tensor,  # [B, Q, M, L, P] contiguous
) -> Tensor:  # [B, Q, M, D]
    B, _, M, D = value.shape
    Q, L, P = locations.shape[1], locations.shape[3], locations.shape[4]
    value = _rows(value)
    out = torch.empty(B, Q, M, D, dtype=value.dtype, device=value.device)
    with torch.cuda.device_of(value):
        forward_kernel[(B * M, triton.cdiv(Q, QUERIES))](
            value, locations, weights, level_table(tuple(shapes), value.device), out,
            Q, M, D, L, P, *value.stride()[:3], BQ=QUERIES, BD=triton.next_power_of_2(D),
        )  # fmt: skip
    return out


def backward(
    grad: Tensor,  # [B, Q, M, D] contiguous
    value: Tensor,  # [B, S, M, D]
    shapes: list[int],
    locations: Tensor,  # [B, Q, M, L, P, 2] contiguous
    weights: Tensor,  # [B, Q, M, L, P] contiguous
    need_value: bool,
    need_points: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    B, S, M, D = value.shape
    Q, L, P = locations.shape[1], locations.shape[3], locations.shape[4]
    value = _rows(value)
    levels = level_table(tuple(shapes), value.device)
    wide = triton.next_power_of_2(D)
    d_value = d_locations = d_weights = None
    with torch.cuda.device_of(value):
        if need_points:
            d_locations, d_weights = torch.empty_like(locations), torch.empty_like(weights)
            points_kernel[(B * M, triton.cdiv(Q, QUERIES))](
                grad, value, locations, weights, levels, d_locations, d_weights,
                Q, M, D, L, P, *value.stride()[:3], BQ=QUERIES, BD=wide,
            )  # fmt: skip
        if need_value:
            d_value = torch.empty(value.shape, dtype=value.dtype, device=value.device)
            order, starts = sort_samples(tuple(shapes), locations)
            pixels_kernel[(B * S * M,)](
                grad, locations, weights, levels, order, starts, d_value,
                S, Q, M, D, L, P, (starts.numel() - 1) // (B * M), BN=SAMPLES, BD=wide,
                num_warps=1,  # of a small tile; with 4, the divisions spill on sm_100
            )  # fmt: skip
    return d_value, d_locations, d_weights


def _rows(value: Tensor) -> Tensor:
    return value if value.stride(-1) == 1 or value.shape[-1] == 1 else value.contiguous()


def aot() -> list[AotCall]:
    """Calls that launch every kernel at the published size, and with a head size that nothing divides."""

    def both(b: int, q: int, heads: int, d: int, points: int, shapes: list[int], dtype: torch.dtype) -> None:
        pixels = sum(h * w for h, w in zip(shapes[::2], shapes[1::2], strict=True))
        levels = len(shapes) // 2
        value = meta(b, pixels, heads, d, dtype=dtype)
        locations, weights = meta(b, q, heads, levels, points, 2), meta(b, q, heads, levels, points)
        out = forward(value, shapes, locations, weights)
        backward(out, value, shapes, locations, weights, True, True)

    calls = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for b, q, heads, d, points, shapes in (
            (2, 5376, 8, 32, 4, [64, 64, 32, 32, 16, 16]),
            (1, 77, 3, 19, 5, [9, 7, 5, 3]),
        ):
            name = f"{str(dtype).removeprefix('torch.')} B{b} Q{q} M{heads} D{d} P{points}"
            call = partial(both, b, q, heads, d, points, shapes, dtype)
            calls.append(AotCall(name, call, quick=(dtype, d) in ((torch.float32, 19), (torch.bfloat16, 32))))
    return calls
