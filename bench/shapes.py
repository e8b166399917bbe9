"""Sizes of the benchmarks, from the recipes: what a training step of their settings gives to each op."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from infoclip.clip.architecture import model_config
from infoclip.clip.templates import resolve_templates
from infoclip.data.benchmarks import get_benchmark
from infoclip.data.classes import load_classes
from infoclip.recipes import get_recipe

__all__ = ["Shapes", "levels", "shapes_of", "vocabulary"]


@dataclass(frozen=True)
class Shapes:
    """The sizes of one training step."""

    batch: int
    """B, images."""
    grid: int
    """Patches along a side of the image."""
    classes: int
    """T that a step sees."""
    prompts: int
    """P, prompt templates of a class."""
    dim: int
    """d, entries of a joint embedding."""
    logits: int
    """Side of the logits: the decoder doubles the grid twice."""
    labels: int
    """Side of the labels, to which the logits are brought."""
    hidden: int
    """C, channels of the embedded cost."""
    kept: int
    """k, most similar classes that a large vocabulary is cut to; 0 where it is not."""

    @property
    def pixels(self) -> int:
        """N, patches of an image."""
        return self.grid**2


@functools.cache
def shapes_of(recipe: str) -> Shapes:
    """Sizes of the recipe's training step.

    Raises:
        ConfigError: an unknown recipe.
    """
    config = get_recipe(recipe)
    clip, _ = model_config(config.clip.model)
    grid = config.clip.image_size // clip["vision_cfg"]["patch_size"]
    return Shapes(
        batch=config.data.batch_size,
        grid=grid,
        classes=config.data.sample_classes or _training_classes(recipe),
        prompts=len(resolve_templates(config.clip.templates)),
        dim=clip["embed_dim"],
        logits=grid * 2 ** len(config.model.decoder_dims),
        labels=config.data.crop or config.clip.image_size,
        hidden=config.model.hidden_dim,
        kept=config.model.pad_len,
    )


def _training_classes(recipe: str) -> int:
    data = get_recipe(recipe).data
    return vocabulary(data.benchmark) if data.kind == "benchmark" else len(load_classes(data.classes))


def vocabulary(benchmark: str) -> int:
    """T of one of the papers' data sets, such as ``a847``."""
    return len(load_classes(get_benchmark(benchmark).classes))


def levels(height: int, width: int, strides: tuple[int, ...] = (32, 16, 8)) -> tuple[tuple[int, int], ...]:
    """Heights and widths of a pyramid over a picture that is padded to the coarsest stride, coarsest first."""
    padded = [math.ceil(side / strides[0]) * strides[0] for side in (height, width)]
    return tuple((padded[0] // stride, padded[1] // stride) for stride in strides)
