"""Pretraining of the scenes' CLIP with a ConvNeXt, from the shipped one with a ViT: no masks here either.

The text tower and the logit scale are the ViT CLIP's and stay as they are, so that both systems read words alike; what
learns is the image encoder, a small ConvNeXt of timm. Two losses:

- **Patches** (distillation with partial labels): what the ViT CLIP says of a patch, softmax over all phrases, with the
  phrases struck out that the picture's caption does not name, is what the ConvNeXt is to say of it. The caption
  corrects the teacher, whose own answer is wrong in two patches of five, and no mask is needed.
- **Contrastive** (as locked-image tuning, with the text locked instead): pooled picture against whole caption.

The trunk is a plain ConvNeXt with the stem's filters whitened as the ViT's, and without layer scale: from timm's start
at 1e-6 it learns half as fast here (loss of the patches at step 300: 0.32, without it 0.19). Its maps are at strides 4,
8, 8, 8: the coarsest one of a picture of 96 px is 12 x 12, as fine as the ViT's; at the usual stride of 32 it would be
3 x 3.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infoclip.clip.builtin import WordTokenizer, builtin_scenes, read_scenes_clip
from infoclip.data.scenes import CAPTION_TEMPLATES, OBJECT_CLASSES, SCENE_CLASSES, split_classes
from infoclip.errors import NonFiniteLossError
from infoclip.pretrain import (
    SIZE,
    EvaluationSets,
    PretrainCourse,
    PretrainResult,
    TrainingBatch,
    contrastive_loss,
    data_seed,
    encode_pictures,
    iou_per_class,
    math_attention,
    normalise,
    progress_bar,
    round_to_half,
    scenes_model_config,
    start_step,
    whitening_filters,
    write_clip,
    write_json,
    write_pretrained,
    write_provenance,
)

if TYPE_CHECKING:
    import open_clip

    from infoclip.clip import DenseCLIP

__all__ = ["ConvNeXtPretrainConfig", "evaluate_scenes_convnext", "pretrain_scenes_convnext"]

TRUNK = {
    "architecture": "convnext_atto",
    "pretrained_cfg": {"input_size": [3, SIZE, SIZE], "pool_size": [SIZE // 8, SIZE // 8]},
    "model_args": {
        "depths": [2, 4, 2, 1],
        "dims": [40, 96, 128, 160],
        "kernel_sizes": [7, 7, 3, 3],
        "output_stride": 8,
        "conv_mlp": False,
        "ls_init_value": None,
    },
}
"""timm's config of the image encoder, the ``config.json`` in the folder ``trunk`` beside the weights."""

_TEMPLATE = "a photo of {}"


@dataclass
class ConvNeXtPretrainConfig(PretrainCourse):
    """What decides the checkpoint; the defaults made the shipped one."""

    steps: int = 1000
    batch_size: int = 64
    contrastive_weight: float = 0.25
    unknown_share: float = 0.0


def convnext_model_config(trunk: str | Path = "trunk") -> dict[str, Any]:
    """The open_clip model config, in the hub's layout; ``trunk`` is the folder of timm's config."""
    config = scenes_model_config()
    config["model_cfg"]["vision_cfg"] = {
        "image_size": SIZE,
        "timm_model_name": f"local-dir:{trunk}",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
    }
    return config


def pretrain_scenes_convnext(
    out: str | Path,
    *,
    steps: int = ConvNeXtPretrainConfig.steps,
    batch_size: int = ConvNeXtPretrainConfig.batch_size,
    seed: int = 0,
    config: ConvNeXtPretrainConfig | None = None,
    teacher: str | Path | None = None,
    progress: bool = True,
) -> PretrainResult:
    """Train the ConvNeXt CLIP of the scenes and write it to a folder.

    ``out`` then holds what :func:`infoclip.pretrain.pretrain_scenes` writes, and ``trunk/config.json``.

    Args:
        out: folder to write; must not hold anything.
        steps, batch_size, seed: as :class:`ConvNeXtPretrainConfig`; ignored where ``config`` is given.
        config: every setting.
        teacher: folder of a ViT CLIP of the scenes; the shipped one by default.
        progress: show a progress bar with an estimate of the time left.

    Raises:
        CheckpointError: no CLIP in ``teacher``.
        ConfigError, DataError, NonFiniteLossError, StorageError: as :func:`infoclip.pretrain.pretrain_scenes`.
    """
    config = config or ConvNeXtPretrainConfig(steps=steps, batch_size=batch_size, seed=seed)
    read = builtin_scenes() if teacher is None else read_scenes_clip(teacher)
    from infoclip.clip import DenseCLIP

    guide = DenseCLIP.from_open_clip(
        read.model, dense="value", tokenizer=read.tokenizer, templates=(_TEMPLATE,), mean=read.mean, std=read.std
    )
    guide.eval().requires_grad_(False)
    train = functools.partial(_train, config, guide, progress=progress)
    return write_pretrained(Path(out), config, train, _save)


# Model


def _new_clip(teacher: DenseCLIP, seed: int) -> open_clip.CLIP:
    """The teacher's text tower beside a fresh ConvNeXt."""
    import tempfile

    import open_clip

    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        write_json(Path(folder) / "config.json", TRUNK)
        torch.manual_seed(seed)
        clip = open_clip.CLIP(**convnext_model_config(folder)["model_cfg"])
        _reset_visual(clip.visual, seed)
    own = clip.state_dict()
    text = {k: v for k, v in teacher.stock_state_dict().items() if not k.startswith("visual.")}
    clip.load_state_dict(own | text)
    clip.requires_grad_(False)
    clip.visual.requires_grad_(True)
    return clip.to(memory_format=torch.channels_last)


@torch.no_grad()
def _reset_visual(visual: Any, seed: int) -> None:
    """Weights at their usual scale: timm's start near zero, for a training of months."""
    stem = visual.trunk.stem[0]
    stem.weight.copy_(whitening_filters(stem.out_channels, seed, stem.kernel_size[0]))
    stem.bias.zero_()
    for name, module in visual.named_modules():
        if isinstance(module, nn.Linear):
            gain = 0.5 if name.endswith("fc2") else 1.0  # the last layer of a residual branch
            module.weight.normal_(std=gain * module.in_features**-0.5)
        elif isinstance(module, nn.Conv2d) and module is not stem:
            fan_in = module.in_channels // module.groups * module.kernel_size[0] ** 2
            module.weight.normal_(std=fan_in**-0.5)


def _maps(visual: Any, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, C, H / 8, W / 8]
    return visual.trunk.forward_features(images.contiguous(memory_format=torch.channels_last))


def _embed(visual: Any, maps: Tensor) -> Tensor:  # [B, C, h, w] -> [B, h, w, d]
    return visual.head(visual.trunk.head.norm(maps).permute(0, 2, 3, 1))


# Evaluation


@torch.no_grad()
def evaluate_scenes_convnext(
    clip: open_clip.CLIP,
    sets: EvaluationSets,
    tokenizer: WordTokenizer,
) -> dict[str, float]:
    """Zero-shot figures in percent, template "a photo of {}"; seen and unseen are those of the attribute split.

    Returns:
        ``accuracy``: one-object pictures whose own embedding is nearest to their object among the 48. On pictures with
        1 to 4 objects: ``dense/seen_miou`` and ``dense/unseen_miou``, each pixel's own arg max over the 52 classes
        (bilinear); ``pooled/seen_miou`` and ``pooled/unseen_miou``, the true masks of ground and objects named by their
        mean feature (what a perfect proposal could reach); ``pooled/objects``, the share of objects named right.
    """
    visual: Any = clip.visual
    text = F.normalize(clip.encode_text(tokenizer([_TEMPLATE.format(name) for name in SCENE_CLASSES])).float(), dim=-1)
    objects = len(OBJECT_CLASSES)
    hits = 0
    for images, truth in zip(sets.single.images.split(64), sets.single.objects.split(64), strict=True):
        pooled = _embed(visual, _maps(visual, normalise(images)).mean(dim=(2, 3), keepdim=True)).flatten(1)
        hits += int(((F.normalize(pooled, dim=-1) @ text[:objects].T).argmax(dim=1) == truth[:, 0]).sum())
    labels, named, right, count = [], [], 0, 0
    scenes = sets.several
    for images, instances, classes in zip(
        scenes.images.split(64), scenes.instances.split(64), scenes.instance_classes.split(64), strict=True
    ):
        maps = _maps(visual, normalise(images))
        scores = torch.einsum("bhwd,td->bthw", F.normalize(_embed(visual, maps), dim=-1), text)
        labels.append(F.interpolate(scores, images.shape[-2:], mode="bilinear", align_corners=False).argmax(dim=1))
        masks = F.one_hot(instances, classes.shape[1] + 1)[..., 1:].permute(0, 3, 1, 2)  # [b, 5, S, S]
        weights = F.interpolate(masks.float(), maps.shape[-2:], mode="area")
        means = torch.einsum("bchw,bkhw->bkc", maps, weights) / weights.sum(dim=(2, 3)).clamp(min=1e-6)[..., None]
        embedded = _embed(visual, means.permute(0, 2, 1)[..., None]).squeeze(2)  # [b, 5, d]
        nearest = (F.normalize(embedded, dim=-1) @ text.T).argmax(dim=-1)  # [b, 5]
        named.append(nearest.gather(1, (instances - 1).flatten(1)).view_as(instances))
        visible = (masks.sum(dim=(2, 3)) > 0)[:, 1:]
        right += int((nearest == classes)[:, 1:][visible].sum())
        count += int(visible.sum())
    result = {"accuracy": 100 * hits / len(sets.single.images)}
    seen, unseen = ([SCENE_CLASSES.index(n) for n in names] for names in split_classes("attribute"))
    for kind, answers in (("dense", labels), ("pooled", named)):
        iou = iou_per_class(torch.cat(answers), scenes.masks)
        result[f"{kind}/seen_miou"] = 100 * float(iou[seen].nanmean())
        result[f"{kind}/unseen_miou"] = 100 * float(iou[unseen].nanmean())
    result["pooled/objects"] = 100 * right / count
    return result


# Training


def _train(
    config: ConvNeXtPretrainConfig, teacher: DenseCLIP, record: Callable[..., None], progress: bool
) -> tuple[open_clip.CLIP, dict[str, float]]:
    clip = _new_clip(teacher, config.seed)
    visual: Any = clip.visual
    tokenizer = teacher.tokenizer
    assert isinstance(tokenizer, WordTokenizer)
    optimisers = _optimisers(visual, config)
    sets = EvaluationSets(config.eval_images, config.eval_seed)
    scale = teacher.logit_scale.exp()
    with torch.no_grad():
        bank = torch.stack(  # [P, T, d]: every class in every caption's template
            [
                F.normalize(teacher.encode_text(tokenizer([t.format(n) for n in SCENE_CLASSES])), dim=-1)
                for t in CAPTION_TEMPLATES
            ]
        )
    metrics: dict[str, float] = {}
    started = time.monotonic()
    clip.train()
    with progress_bar(config.steps, progress) as advance, math_attention():
        for step in range(config.steps):
            batch = TrainingBatch(config, step, tokenizer)
            rate = start_step(optimisers, step, config)
            draw = torch.randint(
                len(bank), (bank.shape[1],), generator=torch.Generator().manual_seed(data_seed(config.seed, step))
            )
            phrases = bank[draw, torch.arange(bank.shape[1])]  # [T, d]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                with torch.no_grad():
                    _, guide = encode_pictures(teacher, batch.images, batch.window, "value")
                    texts = teacher.encode_text(batch.tokens)
                maps = _maps(visual, batch.images)
                patches = _embed(visual, maps).flatten(1, 2)
                pooled = _embed(visual, maps.mean(dim=(2, 3), keepdim=True)).flatten(1)
            assert guide is not None
            terms = {
                "patches": guided_patch_loss(patches, guide, phrases, batch.named, scale),
                "contrastive": contrastive_loss(pooled, texts, scale),
            }
            loss = terms["patches"] + config.contrastive_weight * terms["contrastive"]
            if not bool(torch.isfinite(loss)):
                raise NonFiniteLossError(f"The loss is {float(loss.detach())} at step {step}; nothing was written.")
            loss.backward()
            norm = nn.utils.clip_grad_norm_(visual.parameters(), config.clip_grad_norm)
            for optimiser in optimisers:
                optimiser.step()
            done = step + 1
            if done % 20 == 0 or done == config.steps:
                values = {key: round(float(value.detach()), 4) for key, value in terms.items()}
                record(step=done, **values, gradient=round(float(norm), 3), lr=rate,
                       seconds=round(time.monotonic() - started, 1))  # fmt: skip
            if done % config.eval_every == 0 or done == config.steps:
                if done == config.steps:
                    round_to_half(clip)  # the figures are those of the weights that are written
                found = evaluate_scenes_convnext(clip.eval(), sets, tokenizer)
                metrics = {key: round(value, 2) for key, value in found.items()}
                clip.train()
                record(step=done, **metrics)
            figures = "".join(f"  {key} {value:.0f} %" for key, value in metrics.items() if "unseen" in key)
            advance(f"loss {float(loss.detach()):.2f}{figures}")
    return clip.eval(), metrics


def guided_patch_loss(
    patches: Tensor,  # [B, n, d]
    guide: Tensor,  # [B, n, d]
    phrases: Tensor,  # [T, d]
    named: Tensor,  # [B, T] bool
    scale: Tensor,
) -> Tensor:
    """Cross-entropy against the teacher's answer among the phrases that the picture's caption names.

    Args:
        patches, guide: embeddings of the patches, the student's and the teacher's, not normalised.
        phrases: unit embeddings of all phrases.
        named: whether a picture's caption names a phrase; at least one each.
        scale: of the cosines in the softmax over phrases.
    """
    asked = scale * F.normalize(guide.float(), dim=-1) @ phrases.T  # [B, n, T]
    target = asked.masked_fill(~named[:, None], -torch.inf).softmax(dim=-1)
    answer = (scale * F.normalize(patches.float(), dim=-1) @ phrases.T).log_softmax(dim=-1)
    return -(target * answer).sum(dim=-1).mean()


def _optimisers(visual: nn.Module, config: ConvNeXtPretrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW without decay for all else."""
    matrices = {name for name, p in visual.named_parameters() if p.ndim == 2 and ".mlp." in name}
    rest = [p for name, p in visual.named_parameters() if name not in matrices]
    adamw = torch.optim.AdamW(
        [{"params": rest, "base_lr": config.lr}], lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0
    )
    muon = torch.optim.Muon(
        [{"params": [visual.get_parameter(name) for name in sorted(matrices)], "base_lr": config.lr_muon}],
        lr=config.lr_muon,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return [adamw, muon]


def _save(
    clip: open_clip.CLIP, config: ConvNeXtPretrainConfig, metrics: dict[str, float], seconds: float, folder: Path
) -> None:
    write_clip(folder, clip.state_dict(), convnext_model_config())
    (folder / "trunk").mkdir()
    write_json(folder / "trunk" / "config.json", TRUNK)
    note = (
        "The text tower is that of the scenes' ViT CLIP; the ConvNeXt was trained to say of each patch what that CLIP "
        "says among the things that the caption names. Generated pictures and captions alone, no masks."
    )
    write_provenance(folder, "scenes-convnext", config, metrics, seconds, note)
