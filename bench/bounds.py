"""``python -m bench bounds``: what training steps compute and keep, counted, per memory mode: of the cost aggregation,
and of MAFT+.

No number is computed: tensors without storage (fake tensors) go through the forward and the backward pass of one image
at the published size, and the counts are the same on every machine. Kept for the backward pass is every storage that
lives on between the two, inputs and parameters aside. ``--time`` runs the passes on the CPU instead.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_backward_flop_count, sdpa_flop_count

from bench.peak import give_back, reset_peak, resident
from infoclip.config import ModelConfig
from infoclip.model.aggregator import Aggregator
from infoclip.model.attention import window_mask
from infoclip.model.footprint import LiveBytes
from infoclip.model.memory import MODES, MemoryMode
from infoclip.model.stages import windows_of

__all__ = ["BOUNDS", "MASK_BOUNDS", "MASK_SIZE", "ORDER", "PUBLISHED", "Counts", "Timed", "broken", "broken_masks",
           "count", "count_masks", "main", "times"]  # fmt: skip

ORDER: tuple[MemoryMode, ...] = ("reference", *(mode for mode in MODES if mode != "reference"))
PUBLISHED = 171
"""Classes for which the bounds are stated."""
FORWARD = 335e9
"""FLOP of the forward pass of every mode but the plain form, at 171 classes."""
BOUNDS = {"fast": (3.2e9, 1.0), "balanced": (1.0e9, 1.25), "lean": (0.35e9, 1.45)}
"""Bytes kept in float32 (half of it in bfloat16), and FLOP of forward and backward in those of ``fast``."""
MASK_SIZE = (800, 1216)
"""A COCO picture of 640 x 427 as MAFT+ trains on it: shortest side 800, padded to multiples of 32."""
MASK_OBJECTS = 8
MASK_BOUNDS = {"fast": 0.5, "balanced": 0.2, "lean": 0.14}
"""Bytes that a step of MAFT+ keeps, as a share of the plain form's."""


@dataclass(frozen=True)
class Counts:
    """Of one image: FLOP of the forward pass, of both passes, and bytes kept between them."""

    forward: float
    both: float
    kept: int


def _attention(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward(d: Any, q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(d, q, k, v)


def _convolution_backward(grad: Any, x: Any, weight: Any, *args: Any, out_shape: Any = None) -> int:
    # Each gradient takes as much as forward. torch counts a weight's as that of a convolution that mixes all groups: of
    # a depthwise one C times too much.
    *_, transposed, _, _, mask = args
    return int((mask[0] + mask[1]) * conv_flop_count(x, weight, grad, transposed))


_COUNTED = {  # torch counts the attention kernels of GPUs alone
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten.convolution_backward: _convolution_backward,
}


@contextmanager
def _fake() -> Iterator[None]:
    caches = (window_mask, windows_of)
    for cache in caches:  # what is cached belongs to where it was made
        cache.cache_clear()
    try:
        with FakeTensorMode():
            yield
    finally:
        for cache in caches:
            cache.cache_clear()


@contextmanager
def counted_flops() -> Iterator[FlopCounterMode]:
    """Operations of torch's own matrix products, attention and convolutions; ops of ours only as their references."""
    with FlopCounterMode(display=False, custom_mapping=_COUNTED) as counter:
        yield counter


def count(mode: str, classes: int = 171, dtype: torch.dtype = torch.float32, chunk: int = 0) -> Counts:
    """Counts of one image on a 24 x 24 grid with the published widths (embeddings of 512 channels).

    Args:
        mode: a memory mode (:mod:`infoclip.model.memory`).
        classes: T.
        dtype: ``torch.bfloat16`` for autocast.
        chunk: classes worked on at once; 0 for the mode's own choice on a CPU.
    """
    config = ModelConfig(memory=mode, class_chunk=chunk)  # type: ignore[arg-type]
    with _fake():
        model = Aggregator(config, 512, 512)
        dense, text = torch.empty(1, 512, 24, 24), torch.empty(classes, 1, 512)
        guidance = [dense, torch.empty(1, 256, 48, 48), torch.empty(1, 128, 96, 96)]
        leaves = [x.requires_grad_() for x in (dense, text, *guidance[1:])]
        with counted_flops() as counter:
            with LiveBytes() as live, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                live.leave_out(*leaves, *model.parameters(), *model.buffers())
                logits = model(dense, text, guidance)
            forward = counter.get_total_flops()
            gc.collect()
            kept = live.now - logits.numel() * logits.element_size()
            logits.float().sum().backward()
        both = counter.get_total_flops()
    return Counts(forward, both, kept)


def broken(counts: dict[str, Counts], half: bool = False) -> list[str]:
    """One sentence for each bound that the counts at 171 classes break."""
    faults = []
    for mode, (kept, ratio) in BOUNDS.items():
        x = counts[mode]
        kept /= 2 if half else 1
        if x.forward > FORWARD:
            faults.append(f"{mode}: {x.forward / 1e9:.0f} GFLOP forward, more than {FORWARD / 1e9:.0f}")
        if x.kept > kept:
            faults.append(f"{mode}: {x.kept / 1e9:.2f} GB kept, more than {kept / 1e9:.2f}")
        if x.both > 1.0001 * ratio * counts["fast"].both:
            faults.append(f"{mode}: {x.both / counts['fast'].both:.2f} x the FLOP of fast, more than {ratio}")
    return faults


def count_masks(recipe: str, modes: Sequence[str] = ORDER) -> dict[str, int]:
    """Bytes that a training step of MAFT+ keeps between its passes, by mode: one image of the published size, CLIP,
    decoders, criterion and the paper's losses, in float32."""
    from infoclip.config import apply_overrides
    from infoclip.engine.planner import count_mask_step
    from infoclip.model.maftplus import Vocabulary, build_mask_segmentor
    from infoclip.recipes import get_recipe

    config = apply_overrides(get_recipe(recipe), ["clip.pretrained="])
    with torch.device("meta"):
        segmentor = build_mask_segmentor(config)
    width = segmentor.clip.embed_dim
    vocabulary = Vocabulary(torch.empty(PUBLISHED, width, device="meta"), (1,) * PUBLISHED, ("",) * PUBLISHED)
    parts = (segmentor, segmentor.clip.frozen_copy(), config, vocabulary, MASK_SIZE)
    return {mode: count_mask_step(*parts, mode, objects=MASK_OBJECTS).kept for mode in modes}


def broken_masks(kept: dict[str, int]) -> list[str]:
    """One sentence for each mode that keeps more than its share of the plain form's bytes."""
    plain = kept["reference"]
    return [
        f"MAFT+, {mode}: {kept[mode] / plain:.1%} of the plain form's bytes kept, more than {share:.0%}"
        for mode, share in MASK_BOUNDS.items()
        if mode in kept and kept[mode] > share * plain
    ]


@dataclass
class Timed:
    """Of one mode: relative difference of the logits to the plain form's, seconds a round, and resident bytes added."""

    difference: float = 0.0
    seconds: list[float] = field(default_factory=list)
    peak: int = 0


def times(classes: int, rounds: int, chunk: int = 0) -> dict[str, Timed]:
    """Forward and backward of one image on the CPU in float32.

    The modes take turns, so that what the machine does beside them meets all alike. Above a difference of 1e-4 (float32
    in another order) there is no figure. The peak is the most that was resident beyond what was before the pass.

    Raises:
        RuntimeError: a mode gives other logits than the plain form.
    """
    torch.manual_seed(0)
    model = Aggregator(ModelConfig(), 512, 512)
    image, text = torch.randn(1, 512, 24, 24), torch.randn(classes, 1, 512)
    guidance = [image, torch.randn(1, 256, 48, 48), torch.randn(1, 128, 96, 96)]
    found: dict[str, Timed] = {mode: Timed() for mode in ORDER}
    plain = None
    for mode in ORDER:  # what is set up at the first call
        model.use_memory(mode)(image, text[:2], guidance).sum().backward()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("forward and backward", total=rounds * len(ORDER))
        for _ in range(rounds):
            for mode in ORDER:
                model.use_memory(mode, chunk).zero_grad()
                give_back()
                reset_peak()
                before, start = resident("VmRSS"), time.perf_counter()
                logits = model(image, text, guidance)
                logits.square().mean().backward()
                seconds = time.perf_counter() - start
                logits = logits.detach()
                plain = logits if plain is None else plain
                x = found[mode]
                x.peak = max(x.peak, resident("VmHWM") - before)
                x.seconds.append(seconds)
                x.difference = max(x.difference, float((logits - plain).norm() / plain.norm()))
                if x.difference > 1e-4:
                    raise RuntimeError(f"{mode}: the logits differ by {x.difference:.1e} from the plain form's")
                progress.advance(task)
    return found


def _show_times(classes: int, rounds: int, chunk: int) -> int:
    from bench.harness import machine

    try:
        found = times(classes, rounds, chunk)
    except RuntimeError as error:
        print(f"error: {error}, so there is no table.", file=sys.stderr)
        return 1
    plain = statistics.median(found["reference"].seconds)
    print(f"{machine()}\n\none image, {classes} classes, float32, forward and backward\n")
    print("| mode | median s | rounds s | x reference | peak GB | logits differ by |\n|---|---|---|---|---|---|")
    for mode, x in found.items():
        median = statistics.median(x.seconds)
        each = ", ".join(f"{seconds:.2f}" for seconds in x.seconds)
        print(f"| {mode} | {median:.2f} | {each} | {plain / median:.2f} | {x.peak / 1e9:.2f} | {x.difference:.0e} |")
    return 0


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isascii() or not text.removeprefix("-").isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
        return int(text)

    return parse


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 when a bound is broken."""
    parser = argparse.ArgumentParser(
        prog="python -m bench bounds",
        description="What a training step of the aggregation computes and keeps for the backward pass, and what one of "
        "MAFT+ keeps, counted without computing: one image, published size, every memory mode. Fails when a bound is "
        "broken.",
    )
    parser.add_argument("--classes", type=_at_least(1), default=PUBLISHED, metavar="T", help="default: 171")
    parser.add_argument(
        "--chunk",
        type=_at_least(0),
        metavar="N",
        help="classes worked on at once; 0: the mode's own, which counts the same, but slower (default: 86; timed: 0)",
    )
    parser.add_argument(
        "--time",
        type=_at_least(1),
        metavar="ROUNDS",
        help="instead of counting, time forward and backward on the CPU (about a minute a round and 10 GB on 2 cores)",
    )
    options = parser.parse_args(argv)
    if options.time:
        return _show_times(options.classes, options.time, options.chunk or 0)
    chunk = 86 if options.chunk is None else options.chunk
    print(f"one image, {options.classes} classes, grid 24 x 24, 128 channels; torch {torch.__version__}\n")
    print("| mode | precision | forward GFLOP | forward + backward | x fast | kept for backward GB |")
    print("|---|---|---|---|---|---|")
    faults = []
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        counts = {mode: count(mode, options.classes, dtype, chunk) for mode in ORDER}
        for mode, x in counts.items():
            ratio = x.both / counts["fast"].both
            print(
                f"| {mode} | {name} | {x.forward / 1e9:.0f} | {x.both / 1e9:.0f} | {ratio:.2f} | {x.kept / 1e9:.2f} |",
                flush=True,
            )
        if options.classes == PUBLISHED:
            faults += [f"{name}, {fault}" for fault in broken(counts, half=dtype == torch.bfloat16)]
    for recipe in ("maftplus-base", "maftplus-large"):
        height, width = MASK_SIZE
        print(f"\n{recipe}, one image of {height} x {width}, {PUBLISHED} classes, {MASK_OBJECTS} objects, fp32\n")
        print("| mode | kept for backward GB | x reference |\n|---|---|---|")
        kept = count_masks(recipe)
        for mode, size in kept.items():
            print(f"| {mode} | {size / 1e9:.2f} | {size / kept['reference']:.2f} |", flush=True)
        faults += broken_masks(kept)
    print()
    if options.classes != PUBLISHED:
        print(f"The aggregation's bounds are stated for {PUBLISHED} classes: not checked.")
    if faults or options.classes == PUBLISHED:
        print("\n".join(f"BROKEN {fault}" for fault in faults) or "Every bound is kept.")
    return 1 if faults else 0
