"""The memory planner: memory mode, class chunk and micro-batch of a training step within a budget of bytes.

Bytes are counted on tensors without storage (:mod:`infoclip.model.footprint`): weights, gradients, optimiser moments,
what a micro-batch keeps between its passes and what it holds for a moment. What operators hold inside and what an
allocator wastes is no tensor; a share and a constant on top stand for it, and the first real step is measured.

A micro-batch is a part of a batch whose gradients are summed. Every loss but one is a mean over images or labelled
pixels, so the sum is the batch's gradient to rounding; the alignment over the samples of a ``batch`` couples the
images, and such a batch is not divided.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from infoclip.budget import budget_bytes, format_bytes
from infoclip.errors import ConfigError
from infoclip.model.footprint import LiveBytes, meta_copy
from infoclip.model.memory import MODES, class_chunk

if TYPE_CHECKING:
    from rich.table import Table

    from infoclip.clip import ConvNeXtCLIP, DenseCLIP
    from infoclip.config import Config
    from infoclip.model.maftplus import MaskSegmentor, Vocabulary
    from infoclip.model.segmentor import Segmentor

__all__ = ["Footprint", "Plan", "Settings", "budget_of", "count_mask_step", "count_step", "couples", "lower",
           "make_mask_plan", "make_plan", "shared_bytes"]  # fmt: skip

SHARE, CONSTANT, AGAIN = 0.1, 128 * 2**20, 192 * 2**20
"""On top of the counted bytes: of all that is not weights, gradients or moments; for libraries; where activations are
computed again, for the holes that what lives for a moment leaves in malloc's heap (``python -m bench plan``)."""
COST = {"fast": 1.0, "balanced": 1.25, "lean": 1.35}
"""Time of a step by its counted arithmetic, with CLIP's; orders the choices."""
HALVING = 1.03
"""What halving the micro-batch costs beside that; less arithmetic at once, no more of it."""
REGIONS = 10
"""A count divides the classes into at most about so many regions; smaller chunks are inferred from two such counts."""
OBJECTS = 64
"""Of a picture, where a plan must assume a number: few hold more."""
PROMPTS = 16
"""Prompts whose text features are computed again at once in ``balanced`` and ``lean``."""


@dataclass(frozen=True)
class Settings:
    """How a step is taken."""

    mode: str
    chunk: int
    """Classes at once; 0 for the mode's own."""
    micro_batch: int
    """Images whose passes run together."""

    def __str__(self) -> str:
        chunk = "all its classes" if not self.chunk else f"{self.chunk} classes"
        return f"{self.mode}, {chunk} at once, micro-batch {self.micro_batch}"


@dataclass(frozen=True)
class Footprint:
    """Counted bytes of a step."""

    weights: int
    gradients: int
    optimizer: int
    kept: int
    """Of one micro-batch, between its forward and its backward pass."""
    transient: int
    """The most beyond all that."""
    allowance: int
    """For what is no tensor; not counted."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.kept + self.transient + self.allowance


@dataclass(frozen=True)
class Plan:
    """The planner's choice."""

    settings: Settings
    footprint: Footprint
    budget: int
    classes: int
    batch: int
    coupled: bool

    def table(self) -> Table:
        """One row a part, for the terminal."""
        from rich.table import Table

        table = Table(title=f"memory plan: {self.settings}", title_justify="left")
        table.add_column("part")
        table.add_column("counted", justify="right")
        for name, size in asdict(self.footprint).items():
            table.add_row({"kept": "kept activations"}.get(name, name), format_bytes(size))
        table.add_row("in all", format_bytes(self.footprint.total))
        table.add_row("budget", format_bytes(self.budget))
        if self.coupled:
            table.caption = "align.samples=batch couples the images of a batch: it is not divided."
        return table

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.footprint.total}


def budget_of(memory: str, device: torch.device) -> int | None:
    """Bytes that ``model.memory`` allows on a device; None where it names a mode.

    Raises:
        ConfigError: no amount, or more than a GPU has.
    """
    return None if memory in MODES else budget_bytes(memory, device, "model.memory")


def couples(config: Config) -> bool:
    """Whether a loss compares the images of a batch, so that the batch cannot be divided."""
    return config.align.method == "infoclip" and config.align.samples == "batch"


def lower(settings: Settings, classes: int, coupled: bool, device: torch.device) -> Settings | None:
    """The next setting that takes less: one mode down, then half the class chunk, then half the micro-batch."""
    order = ("reference", "fast", "balanced", "lean")
    if settings.mode != "lean":
        return Settings(order[order.index(settings.mode) + 1], settings.chunk, settings.micro_batch)
    chunk = class_chunk(settings.mode, settings.chunk, classes, device)
    if chunk > 1:
        return Settings(settings.mode, chunk // 2, settings.micro_batch)
    if settings.micro_batch > 1 and not coupled:
        return Settings(settings.mode, chunk, settings.micro_batch // 2)
    return None


def _micro_batches(batch: int, coupled: bool) -> Iterator[int]:
    yield batch
    while batch > 1 and not coupled:
        batch //= 2
        yield batch


def make_plan(
    budget: int,
    config: Config,
    segmentor: Segmentor,
    teacher: DenseCLIP | None,
    objective: nn.Module | None,
    classes: int,
    prompt_length: int,
    device: torch.device,
) -> Plan:
    """The fastest settings whose counted bytes stay within the budget.

    Args:
        budget: bytes for everything of the run: weights, gradients, optimiser and activations.
        classes: T of a step.
        prompt_length: tokens of the longest prompt.
        device: where it will run; it decides the class chunk.

    Raises:
        ConfigError: not even the leanest settings fit; the message names what they need.
    """
    batch, coupled, asked = config.data.batch_size, couples(config), config.model.class_chunk
    found: list[tuple[float, Settings]] = []
    for mode, cost in COST.items():
        own = class_chunk(mode, asked, classes, device)
        for micro in _micro_batches(batch, coupled):
            for chunk in dict.fromkeys((own, min(own, 4))):
                price = cost * HALVING ** (batch / micro - 1) * (1.05 if chunk < own else 1.0)
                found.append((price, Settings(mode, chunk, micro)))
    smallest = min(_micro_batches(batch, coupled))
    found.sort(key=lambda entry: entry[0])
    choices = [settings for _, settings in found]
    if (last := Settings("lean", 1, smallest)) not in choices:
        choices.append(last)
    parts = (meta_copy(segmentor, segmentor.clip.tokenizer, segmentor.clip._tokens),
             None if teacher is None else meta_copy(teacher, teacher.tokenizer, teacher._tokens),
             None if objective is None else meta_copy(objective))  # fmt: skip
    place = shared_bytes(segmentor, teacher, objective)

    def count(settings: Settings) -> Footprint:
        return count_step(*parts, config, classes, prompt_length, settings, weights=place)

    found_plan, needed, least = _first_that_fits(budget, choices, count)
    if found_plan is not None:
        return Plan(*found_plan, budget, classes, batch, coupled)
    raise ConfigError(
        f"model.memory is {format_bytes(budget)}, but the leanest step of this model ({least}; {classes} classes) "
        f"needs {needed}MiB; ask for that, or for fewer classes (data.sample_classes)."
    )


def make_mask_plan(
    budget: int,
    config: Config,
    segmentor: MaskSegmentor,
    teacher: ConvNeXtCLIP | None,
    vocabulary: Vocabulary,
    size: tuple[int, int],
) -> Plan:
    """The fastest settings of a step of mask proposals whose counted bytes stay within the budget.

    Args:
        size: height and width that the largest batch can have, multiples of 32.

    Raises:
        ConfigError: not even the leanest settings fit; the message names what they need.
    """
    batch = config.data.batch_size
    prices = [(cost * HALVING ** (batch / micro - 1), Settings(mode, 0, micro))
              for mode, cost in COST.items() for micro in _micro_batches(batch, False)]  # fmt: skip
    choices = [settings for _, settings in sorted(prices, key=lambda entry: entry[0])]
    parts = (meta_copy(segmentor, segmentor.clip.tokenizer, segmentor.clip._tokens),
             None if teacher is None else meta_copy(teacher, teacher.tokenizer, teacher._tokens))  # fmt: skip
    place = shared_bytes(segmentor, teacher)

    @functools.cache
    def image(mode: str) -> Footprint:
        return count_mask_step(*parts, config, vocabulary, size, mode, weights=place)

    def count(settings: Settings) -> Footprint:
        # A micro-batch takes as much for each image, or less: what the text and the layers take is there once. Beside
        # it the batch waits, and the micro-batch's part of it is copied: 3 bytes of colour, 8 of class, 8 of object.
        one, micro = image(settings.mode), settings.micro_batch
        waiting = 19 * size[0] * size[1] * (batch + micro)
        return replace(one, kept=micro * one.kept, transient=micro * one.transient + waiting)

    found, needed, least = _first_that_fits(budget, choices, count)
    if found is not None:
        return Plan(*found, budget, 1, batch, False)
    raise ConfigError(
        f"model.memory is {format_bytes(budget)}, but the leanest step of this model ({least.mode}, micro-batch "
        f"{least.micro_batch}; {size[0]} x {size[1]} pixels) needs {needed}MiB; ask for that, or for smaller images "
        "(data.crop, data.resize_max)."
    )


def _first_that_fits(
    budget: int, choices: Sequence[Settings], count: Callable[[Settings], Footprint]
) -> tuple[tuple[Settings, Footprint] | None, int, Settings]:
    """The first choice within the budget; and of all that were counted, MiB of the least one, and which that is."""
    least: tuple[int, Settings] | None = None
    for settings in choices:
        counted = count(settings)
        if least is None or counted.total < least[0]:
            least = counted.total, settings
        if counted.total <= budget:
            return (settings, counted), -(-least[0] // 2**20), least[1]
    assert least is not None
    return None, -(-least[0] // 2**20), least[1]


def shared_bytes(*modules: nn.Module | None) -> int:
    """Bytes of all parameters and buffers, what modules share once."""
    found: dict[int, int] = {}
    for module in modules:
        if module is not None:
            for x in (*module.parameters(), *module.buffers()):
                found[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
    return sum(found.values())


def count_step(
    segmentor: Segmentor,
    teacher: DenseCLIP | None,
    objective: nn.Module | None,
    config: Config,
    classes: int,
    prompt_length: int,
    settings: Settings,
    *,
    weights: int | None = None,
) -> Footprint:
    """Counted bytes of one step.

    Args:
        segmentor, teacher, objective: on the meta device.
        weights: bytes of the parameters where modules share some; None adds up those of the segmentor.
    """
    chunk = settings.chunk or classes
    kept_most = min(classes, config.model.pad_len) if config.model.pad_len else classes
    coarse = max(chunk, -(-kept_most // REGIONS))
    parts = (segmentor, teacher, objective, config, classes, prompt_length, settings.mode, settings.micro_batch)
    kept, peak = _pass(*parts, coarse)
    if coarse > chunk:
        # The peak is convex in the chunk: four fifths of the slope above keep the inferred one on the safe side.
        _, above = _pass(*parts, 2 * coarse)
        peak = max(kept, peak - int(0.8 * (above - peak) / coarse * (coarse - chunk)))
    return _footprint((segmentor, objective), weights, kept, peak, settings.mode)


def count_mask_step(
    segmentor: MaskSegmentor,
    teacher: ConvNeXtCLIP | None,
    config: Config,
    vocabulary: Vocabulary,
    size: tuple[int, int],
    mode: str,
    *,
    objects: int = OBJECTS,
    weights: int | None = None,
) -> Footprint:
    """Counted bytes of a step of mask proposals on one image, in float32.

    Args:
        segmentor, teacher: on the meta device.
        size: height and width of the image, multiples of 32.
        mode: a memory mode.
        objects: in the image.
        weights: as :func:`count_step`'s.
    """
    segmentor.use_memory(mode).train()
    with _counting(segmentor, teacher) as live:
        kept = _mask_pass(live, segmentor, teacher, config, vocabulary, size, objects)
    return _footprint((segmentor,), weights, kept, live.peak, mode)


def _footprint(learning: Sequence[nn.Module | None], weights: int | None, kept: int, peak: int, mode: str) -> Footprint:
    """``learning``: the segmentor first, whose parameters are the weights where their bytes are not given."""
    weights = shared_bytes(learning[0]) if weights is None else weights
    learnt = [p for m in learning if m is not None for p in m.parameters() if p.requires_grad]
    size = sum(p.numel() * p.element_size() for p in learnt)
    allowance = int(SHARE * max(kept, peak)) + CONSTANT + (AGAIN if mode in ("balanced", "lean") else 0)
    return Footprint(weights, size, 2 * size, kept, max(0, peak - kept), allowance)


@contextmanager
def _counting(*modules: nn.Module | None) -> Iterator[LiveBytes]:
    """Counts what is made inside, but for parameters, gradients and buffers of modules on the meta device."""
    there: list[Tensor] = []  # before, and counted apart
    for module in modules:
        if module is not None:
            for p in module.parameters():
                p.grad = torch.empty_like(p) if p.requires_grad else None
                there += [p] if p.grad is None else [p, p.grad]
            there += module.buffers()
    with LiveBytes() as live:
        live.leave_out(*there)
        yield live


def _mask_pass(
    live: LiveBytes,
    segmentor: MaskSegmentor,
    teacher: ConvNeXtCLIP | None,
    config: Config,
    vocabulary: Vocabulary,
    size: tuple[int, int],
    objects: int,
) -> int:
    """Forward and backward of one image on the meta device; bytes kept between the two."""
    from infoclip.objective import SetCriterion, mask_aware_loss, representation_compensation

    class AnyMatch(SetCriterion):
        def match(self, logits: Any, mask_logits: Any, labels: Any, masks: Any) -> list[tuple[Tensor, Tensor]]:
            count = min(objects, self.config.queries)
            return [(torch.arange(count), torch.arange(count))]

    def draw(*shape: int, device: Any = None) -> Tensor:
        return torch.empty(*shape, device="meta")

    image = torch.empty(1, 3, *size, device="meta")
    rows = torch.empty(vocabulary.rows.shape, device="meta")
    labels = [torch.empty(objects, dtype=torch.int64, device="meta")]
    masks = [torch.empty(objects, *size, dtype=torch.bool, device="meta")]
    output = segmentor(image, vocabulary._replace(rows=rows))
    terms = list(AnyMatch(config.mask, draw)(output.proposals, labels, masks).values())
    if segmentor.cdt is not None:
        terms.append(mask_aware_loss(output.clip_logits, output.masks, labels, masks))
    if teacher is not None:
        with torch.no_grad():
            dense = teacher.encode_image(image).dense
        terms.append(representation_compensation(output.dense, dense))
        del dense
    loss = torch.stack(terms).sum()
    del output, terms
    kept = live.now
    torch.autograd.backward(loss)
    return kept


def _pass(
    segmentor: Segmentor,
    teacher: DenseCLIP | None,
    objective: nn.Module | None,
    config: Config,
    classes: int,
    length: int,
    mode: str,
    micro: int,
    chunk: int,
) -> tuple[int, int]:
    """Bytes kept between the passes of a micro-batch, and the most alive at a time, beside weights and gradients.

    In float32: for a step in half precision an upper bound.
    """
    clip, side = segmentor.clip, config.clip.image_size
    prompts = segmentor.num_templates
    segmentor.use_memory(mode, chunk).train()
    recompute = mode in ("balanced", "lean")
    with _counting(segmentor, teacher, objective) as live:
        image = torch.empty(micro, 3, side, side, device="meta")
        frozen = clip.text_frozen
        keep = torch.is_grad_enabled() and not frozen and not recompute
        tokens = torch.empty(classes * prompts, length, dtype=torch.int64, device="meta")
        text = torch.empty(classes, prompts, clip.embed_dim, device="meta")
        graph: Tensor | None = None
        if keep:
            graph = nn.functional.normalize(clip.encode_text(tokens).float(), dim=-1)
        elif not frozen:
            with torch.no_grad():
                clip.encode_text(tokens[:512])
        leaf = text.requires_grad_(not frozen)
        output = segmentor(image, leaf)
        loss = (output.logits.float() * 2).sum()
        if teacher is not None and objective is not None:
            from infoclip.objective import Embeddings

            with torch.no_grad():
                dense = teacher.encode_image(image).dense
            teacher_text = torch.empty(classes, clip.embed_dim, device="meta")
            pixels = [x.flatten(2).transpose(1, 2).float() for x in (output.dense, dense)]
            result = objective(
                student=Embeddings(pixels[0], leaf.mean(dim=1).float()),
                teacher=Embeddings(pixels[1], teacher_text),
                step=config.align.start_step + config.align.ramp_steps,
            )
            loss = loss + result.loss
            del dense, pixels, result
        logits = output.logits.numel() * 4
        kept = live.now
        del output
        torch.autograd.backward(loss)
        del loss
        # The loss itself: the labels (8 bytes a pixel), and its gradient beside the logits.
        extra = 8 * micro * side * side + logits
        if graph is not None:
            torch.autograd.backward(graph, torch.empty_like(graph))
        elif not frozen:
            for part in tokens.split(PROMPTS)[:1]:
                features = nn.functional.normalize(clip.encode_text(part).float(), dim=-1)
                torch.autograd.backward(features, torch.empty_like(features))
    return kept, live.peak + extra
