"""The memory planner of inference: views, class chunk and pictures at once within a budget of bytes.

Bytes are counted on tensors without storage (:mod:`infoclip.model.footprint`): the weights (twice while they are read
from their file), the embeddings of the classes, what a batch of views holds on its way through the model, the logits
that are kept of it. What is left is for score maps, which are as large as a picture: a picture too large for that is
refused by name. Half precision is counted in float32, an upper bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from infoclip.budget import budget_bytes, format_bytes, hand_back
from infoclip.config import EvalConfig
from infoclip.engine.planner import CONSTANT, SHARE, shared_bytes
from infoclip.errors import ConfigError
from infoclip.model.footprint import LiveBytes, meta_copy
from infoclip.model.inference import PER_PIXEL, Serving, half_precision, window_starts
from infoclip.model.memory import class_chunk
from infoclip.model.segmentor import Segmentor

__all__ = ["ServingPlan", "count_views", "plan_serving"]

PICTURE = 1280 * 960
"""Pixels of a picture that every plan has room for."""
MAPS = 2**28
"""Bytes of score maps at a time beside that, where they are there: more does not pay."""
VIEWS = (16, 8, 4, 2, 1)
"""Views at once that are tried, on a GPU: on a CPU one view fills the cores, and more only leave its caches."""
PROMPTS = 512
"""Prompts that go through the text tower at once."""


@dataclass(frozen=True)
class ServingPlan:
    """The planner's choice and the bytes it counted."""

    serving: Serving
    pictures: int
    """Pictures whose views share batches."""
    weights: int
    text: int
    """Embeddings of the classes."""
    kept: int
    """Logits of the pictures' views."""
    activations: int
    """The most that a batch of views holds in the model."""
    total: int
    """The most at any time, loading and embedding the classes included, with the allowance for what is no tensor."""
    budget: int

    def __str__(self) -> str:
        chunk = f"{self.serving.class_chunk} classes" if self.serving.class_chunk else "all classes"
        views = "1 view" if self.serving.views == 1 else f"{self.serving.views} views"
        pictures = "1 picture" if self.pictures == 1 else f"{self.pictures} pictures"
        return (
            f"memory plan: {views} of {pictures} at once, {chunk} at once; {format_bytes(self.total)} of "
            f"{format_bytes(self.budget)}"
        )


def plan_serving(
    memory: str,
    segmentor: Segmentor,
    classes: int,
    prompt_length: int,
    config: EvalConfig,
    precision: str = "fp32",
    share: int = 1,
) -> ServingPlan:
    """The fastest way through the model whose counted bytes stay within the budget.

    On a CPU the process also hands freed memory back from here on (:func:`infoclip.budget.hand_back`).

    Args:
        memory: a budget such as ``4GiB``, for everything of the model and its pictures; or ``auto``.
        segmentor: on the device where it will run.
        classes: T.
        prompt_length: tokens of the longest prompt.
        share: processes that share the budget.

    Raises:
        ConfigError: no amount, or nothing fits it; the message names the smallest that something does. Half precision
            that the device lacks.
    """
    if not isinstance(segmentor, Segmentor):
        raise ConfigError("--memory counts models of cost aggregation; leave it out for mask proposals.")
    device = next(segmentor.parameters()).device
    half_precision(precision, device)
    budget = budget_bytes(memory, device, "--memory") // share
    hand_back(device)
    aggregator = segmentor.aggregator
    own = class_chunk(aggregator.memory, aggregator.class_chunk, classes, device)
    chunks = sorted({min(own, size) for size in (own, 32, 4)}, reverse=True)
    most = VIEWS if device.type != "cpu" else (1,)
    bare = meta_copy(segmentor, segmentor.clip.tokenizer, segmentor.clip._tokens)
    weights, prompts = shared_bytes(segmentor), segmentor.num_templates
    text = 4 * classes * prompts * segmentor.clip.embed_dim
    # Embedding: the chunks and their concatenation, the token ids, and a chunk's way through the tower.
    embedding = weights + 2 * text + 8 * classes * prompts * segmentor.clip.context_length
    embedding += int((1 + SHARE) * _count_text(bare, min(PROMPTS, classes * prompts), prompt_length))
    before = max(2 * weights, embedding) + CONSTANT
    views = 1 if not config.sliding_window else len(window_starts(config.size, min(config.window, config.size),
                                                                  config.overlap)) ** 2 + 1  # fmt: skip
    kept_classes = min(classes, segmentor.config.pad_len) if segmentor.config.pad_len else classes
    side = 4 * (segmentor.clip.image_size // segmentor.clip.patch_size)
    least_maps = PER_PIXEL * PICTURE + _per_class(config)
    leanest: int | None = None
    for chunk in chunks:
        # Linear in the views but for what classes share: two counts are a bound for more.
        first = count_views(bare, classes, chunk, 1)
        slope = count_views(bare, classes, chunk, 2) - first if most[0] > 1 else 0
        for size in most:
            pictures = max(1, size // views)
            kept = 4 * pictures * views * (kept_classes * side**2 + 3 * segmentor.clip.image_size**2)
            held = int((1 + SHARE) * (first + (size - 1) * slope))
            steady = weights + text + kept + CONSTANT
            total = max(before, steady + max(held, least_maps))
            if total <= budget:
                room = budget - steady
                maps = min(room, least_maps + MAPS)
                total = max(before, steady + max(held, maps))
                serving = Serving(size, chunk, maps, precision)
                return ServingPlan(serving, pictures, weights, text, kept, held, total, budget)
            leanest = total if leanest is None else min(leanest, total)
    assert leanest is not None
    raise ConfigError(
        f"--memory is {format_bytes(budget)}{f' for each of {share} processes' if share > 1 else ''}, but this model "
        f"with {classes} classes needs {math.ceil(leanest / 2**20)}MiB; ask for that, or for fewer classes."
    )


def count_views(segmentor: Segmentor, classes: int, chunk: int, views: int) -> int:
    """The most bytes that so many views hold at a time on their way through the model.

    Args:
        segmentor: on the meta device; its memory mode is kept.
    """
    side = segmentor.clip.image_size
    segmentor.eval()
    aggregator = segmentor.aggregator
    earlier, aggregator.class_chunk = aggregator.class_chunk, chunk
    try:
        image = torch.empty(views, 3, side, side, device="meta")
        text = torch.empty(classes, segmentor.num_templates, segmentor.clip.embed_dim, device="meta")
        with torch.no_grad(), LiveBytes() as live:
            live.leave_out(text, *segmentor.parameters(), *segmentor.buffers())
            segmentor(image, text)
        return live.peak
    finally:
        aggregator.class_chunk = earlier


def _count_text(segmentor: nn.Module, prompts: int, length: int) -> int:
    tokens = torch.empty(prompts, length, dtype=torch.int64, device="meta")
    with torch.no_grad(), LiveBytes() as live:
        live.leave_out(*segmentor.parameters(), *segmentor.buffers())
        segmentor.clip.encode_text(tokens)  # type: ignore[union-attr,operator]
    return live.peak


def _per_class(config: EvalConfig) -> int:
    """Bytes that merging one class holds for a picture of :data:`PICTURE` pixels."""
    if not config.sliding_window:
        return 8 * PICTURE
    window = min(config.window, config.size)
    return 4 * (2 * config.size**2 + 2 * window**2 + PICTURE)
