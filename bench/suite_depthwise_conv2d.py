"""Depthwise convolution: the blocks of a ConvNeXt's four stages."""

from __future__ import annotations

import torch

from bench.harness import ALLOCATOR, Case, Problem, Sizes, Suite
from infoclip.kernels.depthwise_conv2d import depthwise_conv2d

SIDE = 7  # of the kernel, as published
ROWS = 32  # of a work item: csrc/depthwise_conv2d/cpu.cpp


def cases() -> list[Case]:
    """B, channels, height and width: a stage halves the map, and widens it."""
    from bench.shapes import levels, shapes_of
    from infoclip.recipes import get_recipe

    scenes = get_recipe("maftplus-scenes")
    side = shapes_of("scenes").labels // 4
    small = (scenes.data.batch_size, _widths(scenes.clip.model)[0], side, side)
    maps = levels(800, 1333, (32, 16, 8, 4))[::-1]
    stages = [(1, width, *size) for width, size in zip(_widths("convnext_base_w_320"), maps, strict=True)]
    published = [Case(f"maftplus B1 800 x 1333, stage {i}", sizes, published=i == 2) for i, sizes in enumerate(stages)]
    return [Case(f"scenes B{small[0]}, stage 0", small), *published]


def _widths(model: str) -> tuple[int, ...]:
    from infoclip.clip.architecture import model_config, read_convnext

    return read_convnext(model_config(model)[0], model).widths


def make(sizes: Sizes) -> Problem:
    generator = torch.Generator().manual_seed(0)
    # Channels last, as the blocks lay it out.
    x = torch.randn(sizes, generator=generator).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(sizes[1], 1, SIDE, SIDE, generator=generator) / SIDE
    bias = torch.randn(sizes[1], generator=generator)
    return Problem(
        lambda backend, x, weight, bias: depthwise_conv2d(x, weight, bias, backend=backend),
        (x, weight, bias),
        result=sizes,
    )


def operations(sizes: Sizes) -> tuple[float, float]:
    """A product and a sum a tap and pixel; backward twice as much."""
    products = 2.0 * torch.Size(sizes).numel() * SIDE**2
    return products, 2 * products


def traffic(sizes: Sizes, entry: int) -> tuple[float, float]:
    pixels, weights = entry * torch.Size(sizes).numel(), entry * sizes[1] * (SIDE**2 + 1)
    return 2 * pixels + weights, 3 * pixels + 2 * weights


def bound(sizes: Sizes, device: str, dtype: str, packed: int) -> float:
    """``kernels/depthwise_conv2d/README.md``: the result, the gradients, the incoming one laid out as ``x`` (the
    harness gives it channels first), and the sums of every work item."""
    entry = 4 if dtype == "float32" else 2
    b, c, h, w = sizes
    channels = -(-c // 16) * 16
    sums = 4 * (SIDE**2 + 1) * channels * b * -(-h // ROWS)
    packing = 4 * 16 * (SIDE + 1) * (w + SIDE)  # of a thread
    return 1.1 * (3 * entry * b * c * h * w + sums) + 2 * packing + ALLOCATOR


SUITES = (
    Suite(
        op="depthwise_conv2d",
        cases=cases,
        make=make,
        tiny=(1, 5, 4, 6),
        operations=operations,
        traffic=traffic,
        bound=bound,
        widened=True,
    ),
)
