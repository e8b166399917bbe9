"""Pretraining of the tiny CLIP of the scenes: two losses on pictures and captions, no masks.

A plain contrastive training of so small a CLIP gives features that leak: every patch of a picture, also of its
background, names the picture's object, because nothing but the mean over the patches is ever compared with a text. So
the patches are trained on the captions too. Both losses see captions alone, never a mask:

- **Contrastive** (CLIP): the mean over the patches against the whole caption, over the batch, symmetric.
- **Phrases and patches** (the idea of FILIP and PACL, here as learning from partial labels): each patch is compared
  with every phrase, that is, the name of every thing. The softmax over phrases must lie on those that the patch's own
  caption names (the *consistent* term), and each phrase of a caption must own some patches (the *coverage* term).
  What a patch shows itself explains its caption sooner than what attention could carry to it from afar.

The patches of the second loss leave the last block by its value path (``DenseCLIP``'s dense mode ``value``), so that
what is trained is what a segmentor reads; the first loss runs the block as open_clip does.
"""

from __future__ import annotations

import functools
import json
import math
import platform
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infoclip.clip.builtin import END, PAD, START, UNKNOWN, WordTokenizer
from infoclip.data.scenes import (
    CAPTION_TEMPLATES,
    GENERATOR_VERSION,
    OBJECT_CLASSES,
    SCENE_CLASSES,
    Scenes,
    captions,
    render_scenes,
)
from infoclip.errors import ConfigError, DataError, NonFiniteLossError, StorageError
from infoclip.kernels.infonce import infonce
from infoclip.progress import new_bar

if TYPE_CHECKING:
    from infoclip.clip import DenseCLIP, DenseMode

__all__ = [
    "EvaluationSets",
    "PretrainConfig",
    "PretrainResult",
    "evaluate_scenes_clip",
    "pretrain_scenes",
    "scenes_model_config",
    "scenes_vocabulary",
]

ModelT = TypeVar("ModelT")
CourseT = TypeVar("CourseT", bound="PretrainCourse")

MEAN = (0.45, 0.45, 0.38)
STD = (0.26, 0.25, 0.26)
SIZE = 96
PATCH = 8
CONTEXT = 32
_TEMPLATE = "a photo of {}"
# Words of the prompt templates that people use most, beside those of the captions.
_EXTRA_WORDS = ("small", "medium", "large", "the", "an", "image", "with")


@dataclass
class PretrainCourse:
    """What both trainings of the scenes share: their length, rates, pictures and tests."""

    steps: int = 1500
    batch_size: int = 128
    seed: int = 0
    lr: float = 1e-3
    """Of AdamW: embeddings, norms, biases, projections into the joint space."""
    lr_muon: float = 3e-3
    """Of Muon: the matrices of the blocks."""
    weight_decay: float = 0.05
    warmup: int = 50
    clip_grad_norm: float = 1.0
    single_share: float = 0.15
    """First share of the steps: pictures with one object."""
    empty_share: float = 0.06
    """Share of pictures without an object."""
    large_share: float = 0.1
    """Last share of the steps, at 96 px with up to 4 objects; before, 64 px with up to 3."""
    name_background: float = 1.0
    unknown_share: float = 0.01
    """Share of the words that are read as ``<unk>``, so that unknown words are something the model has met."""
    eval_every: int = 250
    eval_images: int = 128
    eval_seed: int = 7_777_777


@dataclass
class PretrainConfig(PretrainCourse):
    """What decides the checkpoint; the defaults made the shipped one."""

    patch_weight: float = 1.0
    """Of the phrases-and-patches loss; 0 leaves the contrastive loss alone."""
    coverage_weight: float = 1.0
    coverage_patches: int = 3
    """A phrase must own this many patches, on average over the best ones."""
    patch_mode: str = "value"
    """Path through the last block for the second loss: ``value`` or ``attention``."""


@dataclass
class PretrainResult:
    """Where the checkpoint is and what it can do."""

    out: Path
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)


def scenes_vocabulary() -> list[str]:
    """Every word of the captions and of common templates, by id; the end token has the largest."""
    texts = [*CAPTION_TEMPLATES, *SCENE_CLASSES, "a and on", *_EXTRA_WORDS]
    words = sorted({word for text in texts for word in WordTokenizer.words(text.replace("{}", ""))})
    return [PAD, UNKNOWN, *words, START, END]


def scenes_model_config() -> dict[str, Any]:
    """The open_clip model config of the tiny CLIP, in the hub's layout with the pixels' statistics."""
    return {
        "model_cfg": {
            "embed_dim": 128,
            "vision_cfg": {
                "image_size": SIZE,
                "patch_size": PATCH,
                "width": 128,
                "layers": 4,
                "head_width": 32,
                "mlp_ratio": 4.0,
                "pool_type": "avg",
            },
            "text_cfg": {
                "context_length": CONTEXT,
                "vocab_size": len(scenes_vocabulary()),
                "width": 128,
                "heads": 4,
                "layers": 2,
            },
        },
        "preprocess_cfg": {"mean": list(MEAN), "std": list(STD)},
    }


# Model


def _new_clip(seed: int) -> DenseCLIP:
    """A fresh CLIP: open_clip's distributions, a whitening patch embedding and sine-cosine positions."""
    from infoclip.clip import DenseCLIP
    from infoclip.clip.architecture import read_architecture

    arch = read_architecture(scenes_model_config()["model_cfg"], "scenes")
    tokenizer = WordTokenizer(scenes_vocabulary(), CONTEXT)
    clip = DenseCLIP(arch, dense="value", tokenizer=tokenizer, templates=(_TEMPLATE,), mean=MEAN, std=STD)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip.reset_parameters()
    with torch.no_grad():
        clip.visual.conv1.weight.copy_(whitening_filters(clip.vision_width, seed))
        positions = clip.visual.positional_embedding
        positions[0].zero_()
        positions[1:] = 0.5 * _sine_positions(SIZE // PATCH, clip.vision_width)
    clip.requires_grad_(True)
    return clip


def whitening_filters(width: int, seed: int, patch: int = PATCH) -> Tensor:  # -> [width, 3, P, P]
    """The leading principal components of patches, scaled to equal variance.

    From random filters the small model finds colours at once and shapes never: the fine structure that tells them has a
    hundredth of the colours' variance.
    """
    images = normalise(render_scenes(256, 64, (0, 3), seed=data_seed(seed, -1)).images)
    patches = images.unfold(2, patch, patch).unfold(3, patch, patch)  # [n, 3, h, w, P, P]
    rows = patches.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1).double()  # [n * h * w, 3 P P]
    rows = rows - rows.mean(dim=0)
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    values, vectors = values.flip(0)[:width], vectors.flip(1)[:, :width]
    vectors = vectors * vectors.sum(dim=0).sign()  # an eigenvector's sign is the library's whim
    filters = (vectors / (values + 1e-3).sqrt()).T
    return filters.reshape(width, 3, patch, patch).float()


def _sine_positions(side: int, width: int) -> Tensor:  # -> [side * side, width]
    """Two-dimensional sine-cosine code with wavelengths from 4 to about 64 patches."""
    quarter = width // 4
    frequency = (2 * math.pi / 4) * (1 / 16) ** (torch.arange(quarter) / (quarter - 1))
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequency for axis in (x, y)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)


def normalise(images: Tensor) -> Tensor:  # [n, 3, S, S] uint8 -> float
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def _tokens(clip: DenseCLIP, images: Tensor, window: tuple[int, int]) -> Tensor:  # [B, 3, S, S] -> [B, 1 + n, C]
    """Embedded patches. A picture smaller than the model's own takes a window of the positions, not a resized grid."""
    visual = clip.visual
    side, grid = images.shape[-1] // PATCH, visual.grid[0]
    x = visual.conv1(images).flatten(2).transpose(1, 2)  # [B, n, C]
    positions = visual.positional_embedding
    if side == grid:
        patches = positions[1:]
    else:
        top, left = window
        patches = positions[1:].unflatten(0, visual.grid)[top : top + side, left : left + side].flatten(0, 1)
    token = (visual.class_embedding + positions[0]).expand(x.shape[0], 1, -1)
    return visual.ln_pre(torch.cat([token, (x + patches).to(token.dtype)], dim=1))


# Patches that go through the image encoder at once: more make buffers that the allocator maps anew in every step.
_CHUNK = 64 * (SIZE // PATCH) ** 2


def encode_pictures(
    clip: DenseCLIP, images: Tensor, window: tuple[int, int], patch_mode: str | None
) -> tuple[Tensor, Tensor | None]:
    """As :func:`_encode_part`, in parts where the pictures are large."""
    size = max(1, _CHUNK // (images.shape[-1] // PATCH) ** 2)
    parts = [_encode_part(clip, part, window, patch_mode) for part in images.split(size)]
    patches = [part[1] for part in parts if part[1] is not None]
    return torch.cat([part[0] for part in parts]), torch.cat(patches) if patches else None


def _encode_part(
    clip: DenseCLIP, images: Tensor, window: tuple[int, int], patch_mode: str | None
) -> tuple[Tensor, Tensor | None]:
    """The pictures' embeddings [B, d] and, where asked for, those of their patches [B, n, d]."""
    visual = clip.visual
    x = _tokens(clip, images, window)
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        x = block(x)
    own = last(x)
    pooled = visual.ln_post(own)[:, 1:].mean(dim=1) @ visual.proj
    if patch_mode is None:
        return pooled, None
    if patch_mode == "value":
        own = last.forward_value(x, class_residual=False)  # type: ignore[operator]
    return pooled, visual.ln_post(own)[:, 1:] @ visual.proj


# Losses


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:  # [B, d], [B, d] -> scalar
    """CLIP's symmetric loss (Radford et al., section 2.3)."""
    images, texts = F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
    return infonce(images[None], texts[None], 1 / scale).loss


def phrase_patch_loss(
    patches: Tensor,  # [B, n, d]
    phrases: Tensor,  # [T, d]
    named: Tensor,  # [B, T] bool
    scale: Tensor,
    coverage_patches: int,
) -> tuple[Tensor, Tensor]:
    """The consistent and the coverage term, see the module's text.

    Args:
        patches: embeddings of the patches, not normalised.
        phrases: embeddings of the phrases, not normalised.
        named: whether a picture's caption names a phrase; at least one each.
        scale: of the cosines in the softmax over phrases.
        coverage_patches: k of the mean over the k best patches of a phrase.
    """
    cosine = F.normalize(patches.float(), dim=-1) @ F.normalize(phrases.float(), dim=-1).T  # [B, n, T]
    log_share = (scale * cosine).log_softmax(dim=-1)
    inside = log_share.masked_fill(~named[:, None], -torch.inf).logsumexp(dim=-1)  # [B, n]
    rows, columns = named.nonzero(as_tuple=True)
    own = log_share.transpose(1, 2)[rows, columns]  # [M, n], patches for each named phrase
    best = own.topk(min(coverage_patches, own.shape[1]), dim=1).values
    covered = best.logsumexp(dim=1) - math.log(best.shape[1])
    return -inside.mean(), -covered.mean()


# Data


class TrainingBatch:
    """Pictures, captions and phrases of one step; depends on the config's seed and the step alone."""

    def __init__(self, config: PretrainCourse, step: int, tokenizer: WordTokenizer) -> None:
        seed = data_seed(config.seed, step)
        generator = torch.Generator().manual_seed(seed)
        n = config.batch_size
        large = step >= config.steps * (1 - config.large_share)
        size = SIZE if large else 64
        self.scenes: Scenes = render_scenes(n, size, seed=seed, counts=_object_counts(config, step, large, generator))
        side = size // PATCH
        room = SIZE // PATCH - side + 1
        top, left = torch.randint(room, (2,), generator=generator).tolist()
        self.window = (top, left)
        self.images = normalise(self.scenes.images)
        self.texts = captions(self.scenes, seed, config.name_background)
        self.tokens = self._ids(self.texts, tokenizer, generator, config.unknown_share)
        article = torch.rand(len(SCENE_CLASSES), generator=generator) < 0.5
        template = torch.randint(len(CAPTION_TEMPLATES), (len(SCENE_CLASSES),), generator=generator)
        phrases = [
            CAPTION_TEMPLATES[int(template[i])].format(f"a {name}" if article[i] and i < len(OBJECT_CLASSES) else name)
            for i, name in enumerate(SCENE_CLASSES)
        ]
        self.phrases = self._ids(phrases, tokenizer, generator, 0.0)
        self.named = torch.zeros(n, len(SCENE_CLASSES), dtype=torch.bool)
        rows, slots = (self.scenes.objects >= 0).nonzero(as_tuple=True)
        self.named[rows, self.scenes.objects[rows, slots]] = True
        self.named[torch.arange(n), self.scenes.backgrounds + len(OBJECT_CLASSES)] = True

    @staticmethod
    def _ids(texts: list[str], tokenizer: WordTokenizer, generator: torch.Generator, unknown: float) -> Tensor:
        ids = tokenizer(texts)
        special = (ids == 0) | (ids >= tokenizer.vocab_size - 2)
        drop = (torch.rand(ids.shape, generator=generator) < unknown) & ~special
        return torch.where(drop, 1, ids)


def _object_counts(config: PretrainCourse, step: int, large: bool, generator: torch.Generator) -> Tensor:
    """Objects in each picture: one at first, then a ramp to 40, 35 and 25 % of one, two and three (1-4 when large)."""
    single = config.steps * config.single_share
    ramp = min(1.0, max(0.0, (step - single) / max(1.0, config.steps * 0.35)))
    target = torch.tensor([0.28, 0.27, 0.25, 0.20] if large else [0.40, 0.35, 0.25, 0.0])
    share = (1 - ramp) * torch.tensor([1.0, 0.0, 0.0, 0.0]) + ramp * target
    edges = share.cumsum(0)
    draw = torch.rand(config.batch_size, 2, generator=generator)
    counts = 1 + (draw[:, :1] >= edges[:3]).sum(dim=1)
    return torch.where(draw[:, 1] < config.empty_share, 0, counts)


def data_seed(seed: int, step: int) -> int:
    return (seed + 1) * 1_000_003 + step


# Evaluation


class EvaluationSets:
    """Fixed pictures of 96 px: with one object, and with one to four."""

    def __init__(self, images: int = 128, seed: int = 7_777_777, size: int = SIZE) -> None:
        self.single = render_scenes(images, size, (1, 1), seed)
        self.several = render_scenes(images, size, (1, 4), seed + 1)


@torch.no_grad()
def evaluate_scenes_clip(
    clip: DenseCLIP, sets: EvaluationSets, modes: tuple[DenseMode, ...] = ("value",)
) -> dict[str, float]:
    """Zero-shot figures in percent, with the template "a photo of {}".

    Returns:
        ``accuracy``: one-object pictures whose own embedding is nearest to their object among the 48. For each dense
        mode: ``MODE/object_miou`` and ``MODE/background_miou`` (pictures with 1 to 4 objects, arg max over all 52
        classes, bilinear), ``MODE/background_recall`` and ``MODE/object_recall`` (one-object pictures: background
        pixels called a background; object pixels called that object).
    """
    was: DenseMode = clip.dense
    text = F.normalize(clip.text_features(list(SCENE_CLASSES), (_TEMPLATE,)).mean(dim=1), dim=-1)  # [52, d]
    objects = len(OBJECT_CLASSES)
    result: dict[str, float] = {}
    hits = 0
    for start in range(0, len(sets.single.images), 64):
        image = normalise(sets.single.images[start : start + 64])
        nearest = (F.normalize(clip.encode_global(image), dim=-1) @ text[:objects].T).argmax(dim=1)
        hits += int((nearest == sets.single.objects[start : start + 64, 0]).sum())
    result["accuracy"] = 100 * hits / len(sets.single.images)
    try:
        for mode in modes:
            clip.dense = mode
            labels = _dense_labels(clip, sets.several.images, text)
            iou = iou_per_class(labels, sets.several.masks)
            result[f"{mode}/object_miou"] = 100 * float(iou[:objects].nanmean())
            result[f"{mode}/background_miou"] = 100 * float(iou[objects:].nanmean())
            labels, truth = _dense_labels(clip, sets.single.images, text), sets.single.masks
            ground = truth >= objects
            result[f"{mode}/background_recall"] = 100 * float((labels[ground] >= objects).double().mean())
            result[f"{mode}/object_recall"] = 100 * float((labels == truth)[~ground].double().mean())
    finally:
        clip.dense = was
    return result


def _dense_labels(clip: DenseCLIP, images: Tensor, text: Tensor) -> Tensor:  # [n, 3, S, S] uint8 -> [n, S, S]
    labels = []
    for part in images.split(32):
        dense = F.normalize(clip.encode_image(normalise(part)).dense, dim=1)  # [b, d, h, w]
        scores = torch.einsum("bdhw,td->bthw", dense, text)
        labels.append(F.interpolate(scores, part.shape[-2:], mode="bilinear", align_corners=False).argmax(dim=1))
    return torch.cat(labels)


def iou_per_class(labels: Tensor, truth: Tensor) -> Tensor:  # -> [52], NaN for classes that are in neither
    n = len(SCENE_CLASSES)
    matrix = torch.bincount((truth * n + labels).flatten(), minlength=n * n).view(n, n).double()
    both = matrix.diagonal()
    return both / (matrix.sum(dim=0) + matrix.sum(dim=1) - both)


# Training


def pretrain_scenes(
    out: str | Path,
    *,
    steps: int = 1500,
    batch_size: int = 128,
    seed: int = 0,
    config: PretrainConfig | None = None,
    progress: bool = True,
) -> PretrainResult:
    """Train the tiny CLIP of the scenes and write it to a folder.

    ``out`` then holds ``config.json`` (open_clip's model config), ``model.safetensors`` (float16, open_clip's layout),
    ``vocabulary.json``, ``log.jsonl`` and ``PROVENANCE.json`` (command, seed, versions, figures). The folder appears as
    a whole at the end; :func:`infoclip.clip.builtin.read_scenes_clip` reads it.

    Args:
        out: folder to write; must not hold anything.
        steps, batch_size, seed: as :class:`PretrainConfig`; ignored where ``config`` is given.
        config: every setting.
        progress: show a progress bar with an estimate of the time left.

    Raises:
        ConfigError: settings that cannot work.
        DataError: ``out`` is a file, or a folder that holds something.
        NonFiniteLossError: the loss became NaN or infinite.
        StorageError: ``out`` cannot be written.
    """
    config = config or PretrainConfig(steps=steps, batch_size=batch_size, seed=seed)
    if config.patch_mode not in ("value", "attention"):
        raise ConfigError(f"patch_mode is '{config.patch_mode}'; expected value or attention.")
    return write_pretrained(Path(out), config, functools.partial(_train, config, progress=progress), _save)


def write_pretrained(
    out: Path,
    config: CourseT,
    train: Callable[[Callable[..., None]], tuple[ModelT, dict[str, float]]],
    save: Callable[[ModelT, CourseT, dict[str, float], float, Path], None],
) -> PretrainResult:
    """Train and write a folder that appears as a whole at the end.

    Args:
        train: from the function that writes a line of ``log.jsonl`` to the model and its figures.
        save: writes model, settings, figures and seconds into a folder.

    Raises:
        ConfigError, DataError, StorageError: as :func:`pretrain_scenes`.
    """
    _check(config, out)
    partial = out.with_name(out.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with (partial / "log.jsonl").open("w", encoding="utf-8") as log:

            def record(**entry: Any) -> None:
                log.write(json.dumps(entry) + "\n")
                log.flush()

            started = time.monotonic()
            model, metrics = train(record)
        seconds = time.monotonic() - started
        save(model, config, metrics, seconds, partial)
        if out.exists():
            out.rmdir()
        partial.replace(out)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"Cannot write the CLIP to {out}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return PretrainResult(out, seconds, metrics)


def _check(config: PretrainCourse, out: Path) -> None:
    if config.steps < 1 or config.batch_size < 2:
        raise ConfigError(
            f"steps is {config.steps} and batch_size is {config.batch_size}; expected at least 1 and at least 2."
        )
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; expected a folder for the CLIP.")
    if out.is_dir() and any(out.iterdir()):
        raise DataError(f"{out} already holds files; choose another folder for the CLIP, or delete this one.")


def _train(config: PretrainConfig, record: Callable[..., None], progress: bool) -> tuple[DenseCLIP, dict[str, float]]:
    clip = _new_clip(config.seed)
    tokenizer = clip.tokenizer
    assert isinstance(tokenizer, WordTokenizer)
    optimisers = _optimisers(clip, config)
    sets = EvaluationSets(config.eval_images, config.eval_seed)
    mode = config.patch_mode if config.patch_weight > 0 else None
    metrics: dict[str, float] = {}
    shown = ("accuracy", "value/object_miou", "value/background_recall")
    started = time.monotonic()
    with progress_bar(config.steps, progress) as advance, math_attention():
        for step in range(config.steps):
            batch = TrainingBatch(config, step, tokenizer)
            rate = start_step(optimisers, step, config)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                pooled, patches = encode_pictures(clip, batch.images, batch.window, mode)
                texts = clip.encode_text(batch.tokens)
                phrases = clip.encode_text(batch.phrases) if mode else None
            scale = clip.logit_scale.exp()
            terms = {"contrastive": contrastive_loss(pooled, texts, scale)}
            loss = terms["contrastive"]
            if patches is not None and phrases is not None:
                terms["consistent"], terms["coverage"] = phrase_patch_loss(
                    patches, phrases, batch.named, scale, config.coverage_patches
                )
                loss = loss + config.patch_weight * (terms["consistent"] + config.coverage_weight * terms["coverage"])
            if not bool(torch.isfinite(loss)):
                raise NonFiniteLossError(f"The loss is {float(loss.detach())} at step {step}; nothing was written.")
            loss.backward()
            norm = nn.utils.clip_grad_norm_(clip.parameters(), config.clip_grad_norm)
            for optimiser in optimisers:
                optimiser.step()
            with torch.no_grad():
                clip.logit_scale.clamp_(max=math.log(100))
            done = step + 1
            if done % 20 == 0 or done == config.steps:
                values = {key: round(float(value.detach()), 4) for key, value in terms.items()}
                record(step=done, **values, scale=round(float(scale.detach()), 2), gradient=round(float(norm), 3),
                       lr=rate, seconds=round(time.monotonic() - started, 1))  # fmt: skip
            if done % config.eval_every == 0 or done == config.steps:
                last = done == config.steps
                if last:
                    round_to_half(clip)  # the figures are those of the weights that are written
                modes: tuple[DenseMode, ...] = ("value-cls", "value", "attention") if last else ("value",)
                metrics = {k: round(v, 2) for k, v in evaluate_scenes_clip(clip.eval(), sets, modes).items()}
                clip.train()
                record(step=done, **metrics)
            figures = "".join(f"  {key} {metrics[key]:.0f} %" for key in shown if key in metrics)
            advance(f"loss {float(loss.detach()):.2f}{figures}")
    return clip.eval(), metrics


def _optimisers(clip: DenseCLIP, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for all else; no decay on vectors, embeddings and the scale."""
    matrices, decayed, plain = [], [], []
    for name, parameter in clip.named_parameters():
        if "resblocks" in name and parameter.ndim == 2:
            matrices.append(parameter)
        elif name in ("visual.proj", "text_projection", "visual.conv1.weight"):
            decayed.append(parameter)
        else:
            plain.append(parameter)
    adamw = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay, "base_lr": config.lr},
            {"params": plain, "weight_decay": 0.0, "base_lr": config.lr},
        ],
        lr=config.lr,
        betas=(0.9, 0.98),
    )
    muon = torch.optim.Muon(
        [{"params": matrices, "base_lr": config.lr_muon}],
        lr=config.lr_muon,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return [adamw, muon]


def schedule(step: int, config: PretrainCourse) -> float:
    """Share of the full rate: linear warm-up, then half a cosine to zero."""
    warm = min(config.warmup, config.steps // 4)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, config.steps - warm)))


def start_step(optimisers: Sequence[torch.optim.Optimizer], step: int, config: PretrainCourse) -> float:
    """Clear the gradients and set the step's rates; returns their share of the full ones."""
    rate = schedule(step, config)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["base_lr"] * rate
        optimiser.zero_grad(set_to_none=True)
    return rate


@contextmanager
def math_attention() -> Iterator[None]:
    """Attention in its plain form: for a hundred tokens its backward is 1.7 times as fast as the tiled one here."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def progress_bar(total: int, show: bool) -> Iterator[Callable[[str], None]]:
    if not show:
        yield lambda note: None
        return
    with new_bar("{task.fields[note]}") as bar:
        task = bar.add_task("pretraining", total=total, note="")
        yield lambda note: bar.update(task, advance=1, note=note)


@torch.no_grad()
def round_to_half(clip: nn.Module) -> None:
    for parameter in clip.parameters():
        parameter.copy_(parameter.half())


def write_clip(folder: Path, state: Mapping[str, Tensor], model_config: dict[str, Any]) -> None:
    """Weights in half precision, open_clip's model config, vocabulary."""
    from safetensors.torch import save_file

    half = {key: value.half().contiguous() for key, value in state.items()}
    weights = folder / "model.safetensors"
    # One entry: safetensors writes several in random order, and the same training is to give the same bytes.
    save_file(half, weights, metadata={"quick_gelu": "false"})
    weights.chmod(0o644)  # safetensors writes for the owner alone; a package is for everybody
    write_json(folder / "config.json", model_config)
    write_json(folder / "vocabulary.json", scenes_vocabulary())


def _save(clip: DenseCLIP, config: PretrainConfig, metrics: dict[str, float], seconds: float, folder: Path) -> None:
    write_clip(folder, clip.stock_state_dict(), scenes_model_config())
    note = (
        "Trained on generated pictures and their captions alone. The patches were trained with the last block "
        "in its value path, so that clip.dense=value reads what was trained."
    )
    write_provenance(folder, "scenes", config, metrics, seconds, note)


def write_provenance(
    folder: Path, name: str, config: PretrainCourse, metrics: dict[str, float], seconds: float, note: str
) -> None:
    """``PROVENANCE.json``: the command, the settings, the figures, and what it was run with."""
    import open_clip

    from infoclip import __version__

    default = type(config)()
    command = ["infoclip", "pretrain", name, "--out", "DIR", "--seed", str(config.seed)]
    for option in ("steps", "batch_size"):
        if getattr(config, option) != getattr(default, option):
            command += [f"--{option.replace('_', '-')}", str(getattr(config, option))]
    others = {k: v for k, v in asdict(config).items() if v != getattr(default, k)}
    from_command_line = set(others) <= {"steps", "batch_size", "seed"}
    write_json(
        folder / "PROVENANCE.json",
        {
            "command": shlex.join(command) if from_command_line else None,
            "config": asdict(config),
            "metrics": metrics,
            "seconds": round(seconds, 1),
            "threads": torch.get_num_threads(),
            "scenes_generator": GENERATOR_VERSION,
            "versions": {
                "infoclip": __version__,
                "torch": torch.__version__,
                "open_clip": open_clip.__version__,
                "python": platform.python_version(),
            },
            "processor": torch.backends.cpu.get_cpu_capability(),
            "note": note,
        },
    )


def write_json(path: Path, data: Any) -> None:
    """Indented JSON with a last line feed."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
