"""One interface for what holds the tuned CLIP to the frozen one: InfoCLIP's losses and the baselines."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infoclip.config import AlignConfig
from infoclip.objective.baselines import kl_distillation, pooled_distillation, representation_compensation
from infoclip.objective.entropy import compression_loss, renyi_mutual_information
from infoclip.objective.infonce import infonce
from infoclip.objective.lpam import LPAM, cosine_map

__all__ = ["AlignmentObjective", "AlignmentOutput", "Embeddings"]

MIXTURE_TEMPERATURE = 0.05
"""Of the softmax that mixes texts for a pixel, or pixels for a text, where a Gram matrix needs the other modality."""


class Embeddings(NamedTuple):
    """What a CLIP says of a batch: ``pixels`` [B, n, d] on a grid of n = h w, and ``texts`` [T, d]."""

    pixels: Tensor
    texts: Tensor


class AlignmentOutput(NamedTuple):
    """``loss``: weighted sum, differentiable; ``terms``: every unweighted term by name, detached, for the log."""

    loss: Tensor
    terms: dict[str, Tensor]


class AlignmentObjective(nn.Module):
    """The alignment terms of a step (InfoCLIP, section 3; see ``README.md`` beside this file for each reading).

    - ``infoclip``: compression ``L_c`` on the teacher's map, which teaches LPAM alone, and transfer ``L_d`` between the
      teacher's and the student's map, by Rényi's mutual information or InfoNCE.
    - ``kl``, ``maft``, ``maftplus``: the baselines, one term ``distill``.
    - ``none``: no term.

    The teacher never gets a gradient. Everything is computed in float32, also under autocast: in bfloat16 the Gram
    matrices lose two digits. With ``start_step`` and ``ramp_steps`` the weight of all terms rises linearly from 0.

    Args:
        config: the settings (:class:`infoclip.config.AlignConfig`).
        dim: d of the joint embedding.
    """

    def __init__(self, config: AlignConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        learnt = config.method == "infoclip" and config.lpam == "learnt"
        self.lpam: LPAM | None = LPAM(dim, config.lpam_init) if learnt else None

    def weight_at(self, step: int) -> float:
        """Factor of all terms at a step, from 0 to 1."""
        if step < self.config.start_step:
            return 0.0
        if self.config.ramp_steps <= 0:
            return 1.0
        return min(1.0, (step - self.config.start_step + 1) / self.config.ramp_steps)

    def forward(self, student: Embeddings, teacher: Embeddings, step: int = 0) -> AlignmentOutput:
        """The terms at a step.

        Raises:
            ValueError: embeddings of different sizes, or (``maftplus``) pixels that are not a square grid.
        """
        if student.pixels.shape != teacher.pixels.shape or student.texts.shape != teacher.texts.shape:
            raise ValueError(
                f"expected equal shapes, got pixels {list(student.pixels.shape)} and {list(teacher.pixels.shape)}, "
                f"texts {list(student.texts.shape)} and {list(teacher.texts.shape)}"
            )
        factor = self.weight_at(step)
        if self.config.method == "none" or factor == 0.0:
            return AlignmentOutput(student.pixels.new_zeros(()), {})
        with torch.autocast(student.pixels.device.type, enabled=False):
            s = Embeddings(student.pixels.float(), student.texts.float())
            t = Embeddings(teacher.pixels.detach().float(), teacher.texts.detach().float())
            weighted = self._infoclip(s, t) if self.config.method == "infoclip" else self._baseline(s, t)
            loss = s.pixels.new_zeros(())
            for weight, term in weighted.values():
                loss = loss + factor * weight * term
        return AlignmentOutput(loss, {name: term.detach() for name, (_, term) in weighted.items()})

    def alignment_maps(self, student: Embeddings, teacher: Embeddings) -> tuple[Tensor, Tensor]:
        """Maps of teacher and student, each [B, n, T], L2-normalised per image."""
        with torch.no_grad():
            return self._map(teacher), self._map(student)

    def _map(self, embeddings: Embeddings) -> Tensor:  # -> [B, n, T]
        pixels, texts = embeddings.pixels.float(), embeddings.texts.float()
        return cosine_map(pixels, texts) if self.lpam is None else self.lpam(pixels, texts)

    def _samples(self, maps: Tensor) -> Tensor:  # [B, n, T] -> [G, N, D]
        """Rows of the maps that are one sample each; of unit length for pixels and classes, as the maps for images."""
        samples = self.config.samples
        x = maps.flatten(1)[None] if samples == "batch" else maps if samples == "pixel" else maps.mT
        if self.config.center:
            x = x - x.mean(dim=1, keepdim=True)
        # a whole map has unit length already, unless it was centred
        return x if samples == "batch" and not self.config.center else F.normalize(x, dim=-1)

    def _infoclip(self, s: Embeddings, t: Embeddings) -> dict[str, tuple[float, Tensor]]:
        config = self.config
        teacher_rows = self._samples(self._map(t))
        terms: dict[str, tuple[float, Tensor]] = {}
        # without a learnt module the teacher's map is a constant, and so would L_c be
        if self.lpam is not None and config.compression_weight > 0:
            views = self._inputs(t)
            value = compression_loss(teacher_rows, *views, alpha=config.alpha).mean()
            terms["compression"] = (config.compression_weight, value)
        if config.transfer_weight > 0:
            student_rows = self._samples(self._map(s))
            if config.estimator == "infonce":
                value = infonce(teacher_rows, student_rows, config.temperature).loss
            else:
                value = -renyi_mutual_information(teacher_rows, student_rows, config.alpha).mean()
            terms["transfer"] = (config.transfer_weight, value)
        return terms

    def _inputs(self, t: Embeddings) -> list[Tensor]:
        """Rows of D_V and D_L for the samples chosen; an input that is the same for all samples drops out."""
        pixels, texts = F.normalize(t.pixels, dim=-1), F.normalize(t.texts, dim=-1).expand(len(t.pixels), -1, -1)
        if self.config.samples == "batch":
            return [t.pixels.flatten(1)[None]]
        cosine = pixels @ texts.mT / MIXTURE_TEMPERATURE  # [B, n, T]
        if self.config.samples == "pixel":
            return [pixels, cosine.softmax(dim=2) @ texts]
        return [cosine.softmax(dim=1).mT @ pixels, texts]

    def _baseline(self, s: Embeddings, t: Embeddings) -> dict[str, tuple[float, Tensor]]:
        config = self.config
        if config.method == "kl":
            maps = [F.normalize(e.pixels, dim=-1) @ F.normalize(e.texts, dim=-1).mT for e in (s, t)]
            value = kl_distillation(maps[0], maps[1], config.temperature)
        elif config.method == "maft":
            value = pooled_distillation(s.pixels, t.pixels)
        else:
            value = representation_compensation(_as_map(s.pixels), _as_map(t.pixels))
        return {"distill": (config.distill_weight, value)}


def _as_map(pixels: Tensor) -> Tensor:  # [B, n, d] -> [B, d, h, w]
    side = math.isqrt(pixels.shape[1])
    if side * side != pixels.shape[1]:
        raise ValueError(f"maftplus: expected a square grid of pixels, got {pixels.shape[1]} pixels")
    return pixels.mT.unflatten(2, (side, side))
