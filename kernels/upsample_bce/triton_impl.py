"""The Triton form in three launches: labels and their count, one sweep for loss and gradient, the sum of the losses.

Sizes B T h w H W as in the public function. A cell (i, j) is the square between four neighbouring logits; its samples
are computed from those four alone. ``i_`` indices, ``o_`` offsets, ``m_`` masks, ``b_`` block values. Each result is
summed by one program in one order: the same bits twice.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from infoclip.kernels.aot import AotCall, meta
from infoclip.kernels.triton_support import MISSING, why_not

__all__ = ["aot", "forward", "why_not"]

ROWS = 8
"""Rows of the gradient a program owns; it computes the samples of one row of cells more."""
PREPARED = 1024
"""Labels a program of the first launch reads at a time."""
MOST_COUNTS = 256
"""Programs of the first launch, at most: every program of the second adds their counts up again."""

if MISSING is None:
    import triton
    import triton.language as tl

    @triton.jit
    def labels_kernel(
        target,  # [B, H, W] int64 by strides
        labels,  # [B, H, W] int32 contiguous, written: the class, or -1
        counts,  # [programs] int32, written: pixels with a class
        pixels,
        T,
        H,
        W,
        s_b,
        s_h,
        s_w,
        ignore_index,
        rounds,
        BLOCK: tl.constexpr,
    ):
        b_count = tl.zeros([BLOCK], dtype=tl.int32)
        for r in range(0, rounds):
            o = (tl.program_id(0).to(tl.int64) * rounds + r) * BLOCK + tl.arange(0, BLOCK)
            m = o < pixels
            o_row = o // W
            p_target = target + (o_row // H) * s_b + (o_row % H) * s_h + (o % W) * s_w
            b_label = tl.load(p_target, mask=m, other=-1)
            known = m & (b_label >= 0) & (b_label < T) & (b_label != ignore_index)
            tl.store(labels + o, tl.where(known, b_label, -1).to(tl.int32), mask=m)
            b_count += known.to(tl.int32)
        tl.store(counts + tl.program_id(0), tl.sum(b_count, axis=0))

    @triton.jit
    def first_sample(cell, n, N):
        """First of N samples whose cell on an axis of n logits is at least ``cell``."""
        o = (N * (2 * cell + 1) + n - 1) // (2 * n)
        o = tl.minimum(tl.maximum(o, 0), N)
        return tl.where(cell <= 0, 0, tl.where(cell >= n, N, o))

    @triton.jit
    def fraction(sample, cell, n, N):
        """Where a sample lies in its cell, 0..1, without a division by anything but the constant 2 N."""
        inside = ((2 * sample + 1) * n - N - 2 * N * cell).to(tl.float32) / (2 * N).to(tl.float32)
        return tl.where(cell >= n - 1, 0.0, tl.maximum(inside, 0.0))

    @triton.jit
    def sample_loss(z, positive):
        """Loss of logits z, and its derivative: log(1 + exp(u)) with u = -z for the pixel's class and z for others."""
        b_u = tl.where(positive, -z, z)
        b_e = tl.exp(-tl.abs(b_u))
        # log(1 + e) = 2 artanh(e / (2 + e)), seven terms for fp32
        b_s = b_e / (2.0 + b_e)
        b_q = b_s * b_s
        b_p = b_q * (1.0 / 13.0) + 1.0 / 11.0
        b_p = b_p * b_q + 1.0 / 9.0
        b_p = b_p * b_q + 1.0 / 7.0
        b_p = b_p * b_q + 1.0 / 5.0
        b_p = b_p * b_q + 1.0 / 3.0
        b_p = b_p * b_q + 1.0
        b_loss = tl.where(b_u < 0.0, 0.0, b_u) + 2.0 * b_s * b_p  # a NaN is not below 0 and stays
        b_inverse = 1.0 / (1.0 + b_e)
        b_slope = tl.where(b_u >= 0.0, b_inverse, b_e * b_inverse)
        return b_loss, tl.where(positive, -b_slope, b_slope)

    @triton.jit
    def sweep_kernel(
        logits,  # [B, T, h, w] by strides
        labels,  # [B, H, W] int32
        counts,  # [count_programs] int32
        losses,  # [B T, tiles] fp32, written
        grad,  # [B, T, h, w] fp32 contiguous, written
        T,
        h,
        w,
        H,
        W,
        s_b,
        s_t,
        s_h,
        s_w,
        tiles_x,
        tiles,
        span,
        inverse,  # 1 / samples, unless MASKED
        count_programs,
        MASKED: tl.constexpr,
        GRAD: tl.constexpr,
        ROWS: tl.constexpr,
        BJ: tl.constexpr,
        COUNTS: tl.constexpr,
    ):
        i_plane = tl.program_id(0).to(tl.int64)
        i_b = i_plane // T
        i_t = i_plane % T
        i_tile = tl.program_id(1)
        o_j = (i_tile % tiles_x) * BJ + tl.arange(0, BJ)
        i0 = (i_tile // tiles_x) * ROWS
        p_logits = logits + i_b * s_b + i_t * s_t
        p_labels = labels + i_b * H * W
        if MASKED:
            o_count = tl.arange(0, COUNTS)
            b_known = tl.sum(tl.load(counts + o_count, mask=o_count < count_programs, other=0).to(tl.int64), axis=0)
            inverse = 1.0 / tl.maximum(b_known * T, 1).to(tl.float32)

        # Column j of the gradient gathers from the cells on its left and on its right.
        x_left = first_sample(o_j - 1, w, W)
        x_right = first_sample(o_j, w, W)
        x_end = first_sample(o_j + 1, w, W)
        o_before = tl.minimum(tl.maximum(o_j - 1, 0), w - 1).to(tl.int64) * s_w
        o_here = tl.minimum(o_j, w - 1).to(tl.int64) * s_w
        o_after = tl.minimum(o_j + 1, w - 1).to(tl.int64) * s_w

        b_loss = tl.zeros([BJ], dtype=tl.float32)
        b_carry = tl.zeros([BJ], dtype=tl.float32)  # what the row of cells above gave to the row of logits below it
        for d in range(0, ROWS + 1):
            i = i0 - 1 + d
            y_first = first_sample(i, h, H)
            y_end = first_sample(i + 1, h, H)
            p_top = p_logits + tl.minimum(tl.maximum(i, 0), h - 1).to(tl.int64) * s_h
            p_bottom = p_logits + tl.minimum(tl.maximum(i, 0) + 1, h - 1).to(tl.int64) * s_h
            b_top0 = tl.load(p_top + o_before).to(tl.float32)
            b_top1 = tl.load(p_top + o_here).to(tl.float32)
            b_top2 = tl.load(p_top + o_after).to(tl.float32)
            b_bottom0 = tl.load(p_bottom + o_before).to(tl.float32)
            b_bottom1 = tl.load(p_bottom + o_here).to(tl.float32)
            b_bottom2 = tl.load(p_bottom + o_after).to(tl.float32)
            b_up = tl.zeros([BJ], dtype=tl.float32)
            b_down = tl.zeros([BJ], dtype=tl.float32)
            for y in range(y_first, y_end):
                f_y = fraction(y, i, h, H)
                b_0 = b_top0 + f_y * (b_bottom0 - b_top0)
                b_1 = b_top1 + f_y * (b_bottom1 - b_top1)
                b_2 = b_top2 + f_y * (b_bottom2 - b_top2)
                p_row = p_labels + tl.cast(y, tl.int64) * W
                b_acc = tl.zeros([BJ], dtype=tl.float32)
                for k in range(0, span):
                    o_x = x_right + k
                    m_x = o_x < x_end
                    b_label = tl.load(p_row + o_x, mask=m_x, other=-1)
                    f_x = fraction(o_x, o_j, w, W)
                    b_value, b_g = sample_loss(b_1 + f_x * (b_2 - b_1), b_label == i_t)
                    if MASKED:
                        m_x = m_x & (b_label >= 0)
                    b_loss += tl.where(m_x & (i >= i0), b_value, 0.0)
                    if GRAD:
                        b_acc += tl.where(m_x, (1.0 - f_x) * b_g, 0.0)
                        o_x = x_left + k
                        m_x = o_x < x_right
                        b_label = tl.load(p_row + o_x, mask=m_x, other=-1)
                        f_x = fraction(o_x, o_j - 1, w, W)
                        b_value, b_g = sample_loss(b_0 + f_x * (b_1 - b_0), b_label == i_t)
                        if MASKED:
                            m_x = m_x & (b_label >= 0)
                        b_acc += tl.where(m_x, f_x * b_g, 0.0)
                b_up += b_acc - f_y * b_acc
                b_down += f_y * b_acc
            if GRAD:
                p_grad = grad + (i_plane * h + i) * w + o_j
                tl.store(p_grad, (b_carry + b_up) * inverse, mask=(o_j < w) & (i >= i0) & (i < h))
                b_carry = b_down
        tl.store(losses + i_plane * tiles + i_tile, tl.sum(b_loss, axis=0) * inverse)

    @triton.jit
    def sum_kernel(losses, loss, n, BLOCK: tl.constexpr):
        b_sum = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, n, BLOCK):
            o = start + tl.arange(0, BLOCK).to(tl.int64)
            b_sum += tl.load(losses + o, mask=o < n, other=0.0)
        tl.store(loss, tl.sum(b_sum, axis=0))


def forward(
    logits: Tensor,  # [B, T, h, w]
    target: Tensor,  # [B, H, W] int64
    ignore_index: int,
    masked: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    B, T, h, w = logits.shape
    H, W = target.shape[1:]
    pixels = B * H * W
    device = logits.device
    rounds = triton.cdiv(pixels, PREPARED * MOST_COUNTS)
    count_programs = triton.cdiv(pixels, PREPARED * rounds)
    labels = torch.empty(B, H, W, dtype=torch.int32, device=device)
    counts = torch.empty(count_programs, dtype=torch.int32, device=device)
    width = min(max(triton.next_power_of_2(w), 32), 128)  # a warp at least
    tiles_x = triton.cdiv(w, width)
    tiles = tiles_x * triton.cdiv(h, ROWS)
    losses = torch.empty(B * T, tiles, dtype=torch.float32, device=device)
    loss = torch.empty((), dtype=torch.float32, device=device)
    grad = torch.empty(logits.shape if need_grad else (0,), dtype=torch.float32, device=device)
    # The first cell also holds what is clamped to it; any other has at most ceil(W / w) samples.
    span = W if w == 1 else max((3 * W + w - 1) // (2 * w), triton.cdiv(W, w))
    with torch.cuda.device_of(logits):
        labels_kernel[(count_programs,)](
            target, labels, counts, pixels, T, H, W, *target.stride(), ignore_index, rounds, BLOCK=PREPARED
        )
        sweep_kernel[(B * T, tiles)](
            logits, labels, counts, losses, grad, T, h, w, H, W, *logits.stride(), tiles_x, tiles, span,
            1.0 / (pixels * T), count_programs,
            MASKED=masked, GRAD=need_grad, ROWS=ROWS, BJ=width, COUNTS=MOST_COUNTS,
        )  # fmt: skip
        # The labels are checked where they can be read without stalling a device.
        sum_kernel[(1,)](losses, loss, B * T * tiles, BLOCK=1024)
    return loss, grad


def aot() -> list[AotCall]:
    """Calls that between them launch every configuration: published sizes, each narrower tile, both ways to ignore."""
    calls = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        # Tiles are 128, 64 and 32 wide.
        for b, t, h, w, H, W in ((4, 171, 96, 96, 384, 384), (2, 5, 9, 37, 35, 111), (1, 3, 7, 24, 13, 96)):
            for masked in (False, True):
                for need_grad in (True, False):
                    name = f"{str(dtype).removeprefix('torch.')} {b}x{t}x{h}x{w} to {H}x{W}"
                    name += (", masked" if masked else "") + ("" if need_grad else ", loss only")
                    logits, target = meta(b, t, h, w, dtype=dtype), meta(b, H, W, dtype=torch.int64)
                    quick = need_grad and (dtype, t, masked) in (
                        (torch.float32, 171, False), (torch.bfloat16, 5, True)
                    )  # fmt: skip
                    call = partial(forward, logits, target, 255, masked, need_grad)
                    calls.append(AotCall(name, call, quick=quick))
    return calls
