"""Matching of proposals with objects, and the losses of the matched ones (Cheng et al., Mask2Former, section 3.3).

Sizes: ``Q`` proposals, ``T`` classes and void, ``n`` objects of an image, ``P`` points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from infoclip.config import MaskConfig
from infoclip.objective.numerics import full_precision, widened

__all__ = ["SetCriterion", "hungarian_match", "matching_cost", "sample_points"]

Draw = Callable[..., Tensor]
"""From sizes to uniform numbers in 0..1, as ``torch.rand``."""


def sample_points(
    maps: Tensor,  # [N, H, W]
    points: Tensor,  # [N, P, 2] or [1, P, 2], x and y in 0..1
) -> Tensor:  # [N, P]
    """Bilinear samples of each map; pixel centres lie half a pixel in, outside is zero (``align_corners=False``)."""
    if not len(maps):
        return maps.new_zeros(0, points.shape[1])
    if points.shape[0] == 1:  # the same places on all maps: these are the channels of one image
        return F.grid_sample(maps[None], 2 * points[:, None] - 1, align_corners=False)[0, :, 0]
    return F.grid_sample(maps[:, None], 2 * points[:, None] - 1, align_corners=False)[:, 0, 0]


@torch.no_grad()
def matching_cost(
    logits: Tensor,  # [Q, T + 1]
    mask_logits: Tensor,  # [Q, h, w]
    labels: Tensor,  # [n] int64
    masks: Tensor,  # [n, H, W] of 0 and 1
    points: Tensor,  # [1, P, 2] in 0..1
    config: MaskConfig,
) -> Tensor:  # [Q, n] float32
    """What each object costs at each proposal: class, and cross entropy and dice of the mask at the points."""
    with full_precision(logits):
        probability = widened(logits).softmax(dim=-1)[:, labels]  # [Q, n]
        x = sample_points(widened(mask_logits), points)  # [Q, P]
        y = sample_points(masks.to(x.dtype), points)  # [n, P]
        # bce(x, 1) y + bce(x, 0) (1 - y) = softplus(x) - x y
        entropy = (F.softplus(x).sum(dim=-1, keepdim=True) - x @ y.mT) / x.shape[1]
        s = x.sigmoid()
        dice = 1 - (2 * (s @ y.mT) + 1) / (s.sum(dim=-1, keepdim=True) + y.sum(dim=-1) + 1)
        return config.mask_weight * entropy - config.class_weight * probability + config.dice_weight * dice


def hungarian_match(cost: Tensor) -> tuple[Tensor, Tensor]:  # [Q, n] -> [m], [m] int64 on the CPU
    """Proposals and their objects, m = min(Q, n): the assignment of least total cost.

    With more objects than proposals, those that cost the most stay without one.

    Raises:
        ValueError: a cost that is not finite.
    """
    from scipy.optimize import linear_sum_assignment

    if not bool(torch.isfinite(cost).all()):
        raise ValueError("the matching cost is not finite: the predicted classes or masks are not")
    rows, columns = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(rows, dtype=torch.int64), torch.as_tensor(columns, dtype=torch.int64)


class SetCriterion:
    """Losses of classes and masks after each decoder layer, each with a matching of its own.

    ``loss_ce`` is the cross entropy of every proposal with its object's class, or with void at ``no_object_weight``;
    ``loss_mask`` and ``loss_dice`` compare the matched masks at points of which a share is chosen where the mask is
    uncertain. Sums over objects are divided by their number in the batch, at least 1. An image without objects teaches
    its proposals void, and nothing else.

    Args:
        config: weights of the losses and of the matching, and the points.
        draw: source of random points.
    """

    def __init__(self, config: MaskConfig, draw: Draw = torch.rand) -> None:
        self.config, self.draw = config, draw

    def __call__(
        self,
        proposals: Sequence[tuple[Tensor, Tensor]],  # of [B, Q, T + 1] and [B, Q, h, w]
        labels: Sequence[Tensor],  # B of [n] int64
        masks: Sequence[Tensor],  # B of [n, H, W] of 0 and 1
    ) -> dict[str, Tensor]:
        """Weighted losses by name: ``loss_ce``, ``loss_mask``, ``loss_dice`` of the last proposals, and the same with
        ``_0``, ``_1``, ... of the earlier ones.

        Raises:
            ValueError: numbers of images or objects that differ, or (on the CPU) a label outside 0..T-1.
        """
        logits = proposals[-1][0]
        if not len(labels) == len(masks) == len(logits):
            raise ValueError(
                f"there are labels of {len(labels)} and masks of {len(masks)} images; expected {len(logits)} of both"
            )
        for i, (label, mask) in enumerate(zip(labels, masks, strict=True)):
            if label.ndim != 1 or mask.ndim != 3 or len(label) != len(mask):
                raise ValueError(
                    f"image {i} has labels of shape {list(label.shape)} and masks of {list(mask.shape)}; "
                    "expected [n] and [n, H, W]"
                )
            if label.device.type != "cpu" or not len(label):
                continue
            if not 0 <= int(label.min()) <= int(label.max()) < logits.shape[-1] - 1:
                raise ValueError(f"image {i} has a label outside 0..{logits.shape[-1] - 2}")
        losses: dict[str, Tensor] = {}
        order = [len(proposals) - 1, *range(len(proposals) - 1)]  # as published, which decides what is drawn for which
        for i in order:
            suffix = "" if i == order[0] else f"_{i}"
            found = self._losses(proposals[i][0], proposals[i][1], labels, masks)
            losses |= {f"{name}{suffix}": value for name, value in found.items()}
        return losses

    def match(
        self, logits: Tensor, mask_logits: Tensor, labels: Sequence[Tensor], masks: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """For each image the matched proposals and their objects."""
        found = []
        for one in zip(logits, mask_logits, labels, masks, strict=True):
            points = self.draw(1, self.config.points, 2, device=logits.device)
            found.append(hungarian_match(matching_cost(*one, points, self.config)))
        return found

    def _losses(
        self,
        logits: Tensor,  # [B, Q, T + 1]
        mask_logits: Tensor,  # [B, Q, h, w]
        labels: Sequence[Tensor],
        masks: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        config = self.config
        matches = self.match(logits, mask_logits, labels, masks)
        with full_precision(logits):
            void = logits.shape[-1] - 1
            wanted = torch.full(logits.shape[:2], void, dtype=torch.int64, device=logits.device)
            for i, (rows, columns) in enumerate(matches):
                wanted[i, rows.to(wanted.device)] = labels[i][columns.to(labels[i].device)].to(wanted.device)
            weight = logits.new_ones(void + 1, dtype=torch.float32)
            weight[void] = config.no_object_weight
            x = widened(logits)
            entropy = F.cross_entropy(x.mT, wanted, weight.to(x.dtype))

            count = max(sum(len(label) for label in labels), 1)
            images = torch.cat([torch.full_like(rows, i) for i, (rows, _) in enumerate(matches)])
            rows = torch.cat([rows for rows, _ in matches])
            chosen = widened(mask_logits[images.to(logits.device), rows.to(logits.device)])  # [N, h, w]
            if len(chosen):
                points = self._points(chosen.detach())  # [N, P, 2]
                got = sample_points(chosen, points)
                want = torch.cat(
                    [
                        sample_points(mask[columns.to(mask.device)].to(got), part)
                        for mask, (_, columns), part in zip(
                            masks, matches, points.split([len(rows) for rows, _ in matches]), strict=True
                        )
                        if len(columns)
                    ]
                )
                mask_loss = F.binary_cross_entropy_with_logits(got, want, reduction="none").mean(dim=1).sum() / count
                s = got.sigmoid()
                dice = 1 - (2 * (s * want).sum(dim=1) + 1) / (s.sum(dim=1) + want.sum(dim=1) + 1)
                dice_loss = dice.sum() / count
            else:
                mask_loss = dice_loss = mask_logits.sum() * 0.0
        return {
            "loss_ce": config.class_weight * entropy,
            "loss_mask": config.mask_weight * mask_loss,
            "loss_dice": config.dice_weight * dice_loss,
        }

    @torch.no_grad()
    def _points(self, mask_logits: Tensor) -> Tensor:  # [N, h, w] -> [N, P, 2]
        """Points of each mask: a share where its logit is nearest to 0, the others anywhere (PointRend)."""
        config, count, device = self.config, len(mask_logits), mask_logits.device
        candidates = self.draw(count, int(config.points * config.oversample), 2, device=device)
        certain = sample_points(mask_logits, candidates).abs()
        near = int(config.importance * config.points)
        index = certain.topk(near, dim=1, largest=False).indices
        points = candidates.gather(1, index[..., None].expand(-1, -1, 2))
        if near == config.points:
            return points
        return torch.cat((points, self.draw(count, config.points - near, 2, device=device)), dim=1)
