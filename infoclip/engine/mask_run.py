"""A training run of mask proposals: MAFT+, FC-CLIP, and plain fine-tuning of FC-CLIP's CLIP.

The loop, logs, checkpoints and the exact resume are those of every run (:mod:`infoclip.engine.train`); here is what a
step computes. The random points at which masks are compared come from the seed and the step's number, so that a step
that is repeated, or resumed, compares the same ones.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infoclip.clip.convnext import STRIDE
from infoclip.config import MaskConfig
from infoclip.data.objects import Objects, object_masks
from infoclip.data.transforms import derive_seed
from infoclip.engine.distributed import WholeBatch
from infoclip.engine.planner import Plan, make_mask_plan
from infoclip.engine.train import Run, fingerprint, panel
from infoclip.errors import InfoclipWarning

__all__ = ["MaskRun", "shares"]

_KINDS = {"loss_ce": "class", "loss_mask": "mask", "loss_dice": "dice"}
"""Names in the log of the set criterion's losses, each summed over the decoder's layers."""


class MaskRun(Run):
    """Set criterion on the proposals of every layer; for MAFT+ the mask-aware loss and, where CLIP learns, the
    representation compensation against a frozen copy."""

    def _build(self) -> None:
        from infoclip.clip import TextBank, text_cache_dir
        from infoclip.model.maftplus import build_mask_segmentor

        config, device = self.config, self.device
        self.segmentor = build_mask_segmentor(config).to(device).train()
        self.ranks.same_weights(self.segmentor)
        clip = self.segmentor.clip
        self.bank = TextBank(clip, self.templates, text_cache_dir())
        self.vocabulary = self.segmentor.vocabulary(self.classes, embed=self.bank)
        self.teacher = None
        if config.system == "maftplus" and config.mask.compensation_weight > 0 and config.clip.tune != "frozen":
            self.teacher = clip.frozen_copy()
            self.teacher.drop_path = config.mask.teacher_drop_path
            self.teacher.train(config.mask.teacher_drop_path)
            self.teacher_hash = fingerprint(self.teacher)
        self.crowded = False

    def _make_plan(self, budget: int) -> Plan:
        return make_mask_plan(budget, self._share, self.segmentor, self.teacher, self.vocabulary, self._largest())

    def _largest(self) -> tuple[int, int]:
        """Height and width that the network sees of the largest batch that the augmentation can make."""
        data = self.config.data
        if data.crop:
            sides = (data.crop, data.crop)
        elif data.resize and data.batch_size == 1 and data.resize_max:
            sides = (data.resize, data.resize_max)
        elif data.resize and data.resize_max:
            sides = (data.resize_max, data.resize_max)  # a wide and a tall one together
        else:  # sizes of the user's own: as the first image's, and the first step is measured
            sides = (max(self.dataset[0]["image"].shape[-2:]),) * 2
        return sides[0] + -sides[0] % STRIDE, sides[1] + -sides[1] % STRIDE

    def _step_down(self, shortage: str, classes: int) -> None:
        super()._step_down(shortage, 1)  # no classes one by one: leaner modes, then smaller micro-batches

    @property
    def _smaller(self) -> str:
        return "data.batch_size, data.crop or data.resize"

    def _gradients(
        self, batches: list[dict[str, Any]], wholes: list[WholeBatch], chosen: Tensor | None
    ) -> tuple[dict[str, Tensor], Any]:
        config = self.config
        mine = f" of process {self.ranks.workers.rank}" if self.ranks.workers.rank else ""  # each draws its own
        generator = torch.Generator(self.device).manual_seed(derive_seed(config.train.seed, f"points{mine}", self.step))
        if config.mask.student_drop_path or config.mask.teacher_drop_path:
            torch.manual_seed(derive_seed(config.train.seed, f"drop path{mine}", self.step))
        totals: dict[str, Tensor] = {}
        picture = None
        for batch, whole in zip(batches, wholes, strict=True):
            self._count_objects(batch)
            size = self.settings.micro_batch
            for start in range(0, len(batch["image"]), size):
                part = {key: value[start : start + size] for key, value in batch.items()}
                terms, draw = self._losses(part, generator)
                share = shares(part["objects"], whole.objects, config.mask)
                weighted = {name: value * (share[name] / len(batches)) for name, value in terms.items()}
                loss = torch.stack(list(weighted.values())).sum()
                loss.backward()
                for name, value in {"loss": loss, **weighted}.items():
                    totals[name] = totals.get(name, 0.0) + value.detach()
                picture = picture or draw
                del terms, weighted, loss
        return totals, picture

    def _losses(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[dict[str, Tensor], Any]:
        """The weighted losses of a micro-batch by name, and a function that draws its first pictures."""
        from infoclip.model.maftplus.inference import preprocess
        from infoclip.objective import SetCriterion, mask_aware_loss, representation_compensation

        config = self.config.mask
        pixels = preprocess(batch["image"].to(self.device, non_blocking=True), self.segmentor.clip)
        padding = [0, pixels.shape[-1] - batch["map"].shape[-1], 0, pixels.shape[-2] - batch["map"].shape[-2]]
        maps = F.pad(batch["map"].to(self.device, non_blocking=True), padding, value=self.ignore_index)
        labels = [objects.labels.to(self.device) for objects in batch["objects"]]
        masks = [object_masks(one, objects) for one, objects in zip(maps, batch["objects"], strict=True)]
        with self._autocast():
            output = self.segmentor(pixels, self.vocabulary)

        def draw_points(*shape: int, device: Any = None) -> Tensor:
            return torch.rand(*shape, generator=generator, device=device)

        terms: dict[str, Tensor] = {}
        for name, value in SetCriterion(config, draw_points)(output.proposals, labels, masks).items():
            kind = _KINDS["_".join(name.split("_")[:2])]
            terms[kind] = terms[kind] + value if kind in terms else value
        if self.segmentor.cdt is not None and config.mask_aware_weight > 0:
            loss = mask_aware_loss(output.clip_logits, output.masks, labels, masks)
            terms["mask_aware"] = config.mask_aware_weight * loss
        if self.teacher is not None:
            dense = self._teacher_features(pixels)
            loss = representation_compensation(output.dense, dense, kernel_from=config.compensation_kernel)
            terms["compensation"] = config.compensation_weight * loss
        logits, proposed = (x[:4].detach() for x in (self._class_logits(output), output.masks))

        def draw() -> Any:
            from infoclip.model.maftplus.inference import semantic

            # At the masks' size, a quarter: at the picture's own, the scores of each class take as much as a picture.
            height, width = batch["mask"].shape[-2:]
            coarse = torch.stack(
                [
                    semantic(one.float().log_softmax(dim=-1), masks.float()).argmax(dim=0).cpu()
                    for one, masks in zip(logits, proposed, strict=True)
                ]
            )
            fine = coarse.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
            return panel(batch["image"], batch["mask"], fine[:, :height, :width], self.classes)

        return terms, draw

    def _class_logits(self, output: Any) -> Tensor:  # [B, Q, T + 1]
        """What the logged pictures show: CLIP's scores where they are taught, else the decoder's."""
        return output.logits if self.segmentor.cdt is None else output.clip_logits

    def _count_objects(self, batch: dict[str, Any]) -> None:
        """Warn once of a picture that holds more objects than there are proposals: some of them teach nothing."""
        queries = self.config.mask.queries
        for file, objects in zip(batch["files"], batch["objects"], strict=True):
            if len(objects.labels) > queries and not self.crowded:
                self.crowded = True
                warnings.warn(
                    f"{file} holds {len(objects.labels)} objects and mask.queries is {queries}: those that no proposal "
                    "is near stay without one, here and in other such pictures; set mask.queries higher.",
                    InfoclipWarning,
                    stacklevel=2,
                )


def shares(part: list[Objects], whole: list[Objects], config: MaskConfig) -> dict[str, float]:
    """Of each loss, the share that a micro-batch has in its batch's: what the loss averages over there, by what in the
    batch. The shares of all micro-batches of a batch add up to 1 (but where a batch has no object, and so no loss)."""

    def weight(images: list[Objects]) -> float:
        matched = sum(min(len(objects.labels), config.queries) for objects in images)
        return matched + config.no_object_weight * (len(images) * config.queries - matched)

    def count(images: list[Objects]) -> int:
        return sum(len(objects.labels) for objects in images)

    objects = max(count(part), 1) / max(count(whole), 1)
    return {
        "class": weight(part) / weight(whole),
        "mask": objects,
        "dice": objects,
        "mask_aware": count(part) / max(count(whole), 1),
        "compensation": len(part) / len(whole),
    }
