"""One colour for each class index: always the same, far apart, also for eyes that do not see red and green apart."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

__all__ = ["NO_LABEL", "hex_color", "ink", "palette"]

NO_LABEL = (128, 128, 128)
"""Colour of pixels without a label."""

_CHOSEN = 128
"""So many colours are chosen to be far apart; beyond, no choice helps and hues simply go round."""

# Linear RGB -> cone responses -> Oklab (Björn Ottosson, "A perceptual color space for image processing", 2020).
_TO_CONES = np.array(
    [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
     [0.0883024619, 0.2817188376, 0.6299787005]]
)  # fmt: skip
_TO_LAB = np.array(
    [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
     [0.0259040371, 0.7827717662, -0.8086757660]]
)  # fmt: skip
# Linear RGB as seen with full deuteranopia (Machado, Oliveira and Fernandes, "A physiologically-based model for
# simulation of color vision deficiency", 2009, table 1).
_DEUTERANOPIA = np.array(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
)


def palette(count: int) -> NDArray[np.uint8]:  # [count, 3]
    """RGB colours of the first ``count`` class indices; colour i is the same whatever ``count`` is.

    The first 128 are picked one after the other, each as far as can be from those before it (distance in Oklab, the
    smaller of that for full colour vision and that for deuteranopia, the commonest deficiency).
    """
    if count < 0:
        raise ValueError(f"count is {count}; expected 0 or more")
    chosen = _chosen()
    if count <= len(chosen):
        return chosen[:count].copy()
    index = np.arange(len(chosen), count)
    hue = (index * 0.6180339887498949) % 1.0
    value = 0.55 + 0.4 * ((index * 0.7548776662466927) % 1.0)
    channels = [value * (0.25 + 0.75 * np.clip(np.abs((hue * 6 + s) % 6 - 3) - 1, 0, 1)) for s in (0, 4, 2)]
    return np.concatenate([chosen, (np.stack(channels, axis=1) * 255).round().astype(np.uint8)])


def hex_color(rgb: tuple[int, ...] | NDArray[np.uint8]) -> str:
    """``#rrggbb``."""
    return "#{:02x}{:02x}{:02x}".format(*(int(c) for c in rgb))


def ink(rgb: tuple[int, ...] | NDArray[np.uint8]) -> tuple[int, int, int]:
    """Black or white, whichever is easier to read on the colour (WCAG contrast)."""
    luminance = float(_linear(np.asarray(rgb, dtype=np.float64) / 255) @ [0.2126, 0.7152, 0.0722])
    return (0, 0, 0) if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else (255, 255, 255)


@functools.lru_cache(maxsize=1)
def _chosen() -> NDArray[np.uint8]:
    levels = np.linspace(0, 255, 16).round()
    rgb = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    linear = _linear(rgb / 255)
    normal, deutan = _oklab(linear), _oklab((linear @ _DEUTERANOPIA.T).clip(0, 1))
    chroma = np.hypot(normal[:, 1], normal[:, 2])
    # Neither so dark or light that the picture beneath vanishes, nor grey, which stands for "no label".
    usable = (normal[:, 0] > 0.42) & (normal[:, 0] < 0.93) & (chroma > 0.07)
    rgb, normal, deutan = rgb[usable], normal[usable], deutan[usable]
    order = [int(np.abs(rgb - (230, 153, 0)).sum(axis=1).argmin())]  # an orange to begin with
    gap = np.full(len(rgb), np.inf)
    for _ in range(_CHOSEN - 1):
        last = order[-1]
        distance = np.minimum(
            np.linalg.norm(normal - normal[last], axis=1), np.linalg.norm(deutan - deutan[last], axis=1)
        )
        gap = np.minimum(gap, distance.round(9))  # the last bits must not decide
        order.append(int(gap.argmax()))
    return rgb[order].astype(np.uint8)


def _linear(srgb: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def _oklab(linear: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.cbrt(linear @ _TO_CONES.T) @ _TO_LAB.T
