"""One interface for what holds the tuned CLIP to the frozen one: InfoCLIP's losses and the baselines."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from infoclip.config import AlignConfig
from infoclip.kernels.renyi_mutual_information import compression_loss, transfer_loss
from infoclip.objective.baselines import kl_distillation, pooled_distillation, representation_compensation
from infoclip.objective.infonce import infonce
from infoclip.objective.lpam import LPAM, cosine_map
from infoclip.objective.numerics import full_precision, unit, widened

__all__ = ["AlignmentObjective", "AlignmentOutput", "Embeddings"]

MIXTURE_TEMPERATURE = 0.05
"""Of the softmax that mixes texts for a pixel, or pixels for a text, where a Gram matrix needs the other modality."""


class Embeddings(NamedTuple):
    """What a CLIP says of a batch. Nothing has to be normalised."""

    pixels: Tensor  # [B, n, d], row by row
    texts: Tensor  # [T, d]
    grid: tuple[int, int] | None = None  # (h, w) with n = h w, for maftplus; None: a square


class AlignmentOutput(NamedTuple):
    """What one step's objective gives."""

    loss: Tensor  # [], weighted sum of the terms
    terms: dict[str, Tensor]  # unweighted values by name, [] each, detached


class AlignmentObjective(nn.Module):
    """The alignment terms of a step (InfoCLIP, section 3; ``README.md`` beside this file has every formula).

    - ``infoclip``: ``compression`` L_c on the teacher's map, and ``transfer`` L_d between the maps of teacher and
      student, by Renyi's mutual information or as InfoNCE loss (``bound`` is logged too then: log N - loss, in nats).
      L_c is always Renyi's, since a lower bound is nothing to minimise.
    - ``kl``, ``maft``, ``maftplus``: the baselines, as ``distill``.
    - ``none``: no term.

    What gets a gradient: L_c teaches LPAM alone, its other inputs being the frozen teacher's. L_d and the baselines
    teach the student, pixels and texts (MAFT and MAFT+ pixels alone); L_d teaches LPAM through the maps that
    ``transfer_to_lpam`` names. The teacher's embeddings never get one. Without a learnt LPAM nothing could learn from
    L_c: it is left out then, as is every term of InfoCLIP whose weight is 0. Everything is computed in float32, also
    under autocast.

    The samples of ``batch`` are the images handed in: gradient accumulation and several devices do not add to them, and
    a single image has nothing to be told from (its mutual information is 0, without gradient).

    Args:
        config: the settings (:class:`infoclip.config.AlignConfig`).
        dim: d of the joint embedding.

    Raises:
        ValueError: ``dim`` below 1.
    """

    def __init__(self, config: AlignConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        learnt = config.method == "infoclip" and config.lpam == "learnt"
        self.lpam = LPAM(dim, config.lpam_init, learnt)

    def weight_at(self, step: int) -> float:
        """Factor of all weights at a step: 0 before ``start_step``, then 1/``ramp_steps``, 2/``ramp_steps`` .. 1."""
        if step < self.config.start_step:
            return 0.0
        if self.config.ramp_steps <= 0:
            return 1.0
        return min(1.0, (step - self.config.start_step + 1) / self.config.ramp_steps)

    def forward(self, student: Embeddings, teacher: Embeddings, step: int = 0) -> AlignmentOutput:
        """The terms at a step; no terms and a loss of 0 with the method ``none`` and before ``start_step``.

        Raises:
            ValueError: embeddings of different sizes, or (``maftplus``) pixels without a grid that are no square.
        """
        if student.pixels.shape != teacher.pixels.shape or student.texts.shape != teacher.texts.shape:
            raise ValueError(
                f"student has pixels {list(student.pixels.shape)} and texts {list(student.texts.shape)}, teacher "
                f"{list(teacher.pixels.shape)} and {list(teacher.texts.shape)}; expected the same"
            )
        factor = self.weight_at(step)
        with full_precision(student.pixels):
            student = _widened(student)
            teacher = _widened(teacher)._replace(
                pixels=widened(teacher.pixels).detach(), texts=widened(teacher.texts).detach()
            )
            loss = student.pixels.new_zeros(())
            logged: dict[str, Tensor] = {}
            if self.config.method == "none" or factor == 0.0:
                return AlignmentOutput(loss, logged)
            terms = self._infoclip if self.config.method == "infoclip" else self._baseline
            for name, (weight, value) in terms(student, teacher).items():
                logged[name] = value.detach()
                if weight:
                    loss = loss + factor * weight * value
        return AlignmentOutput(loss, logged)

    def alignment_maps(self, student: Embeddings, teacher: Embeddings) -> tuple[Tensor, Tensor]:
        """Maps of teacher and student, each [B, n, T], of norm 1 for each image; without gradient."""
        with torch.no_grad():
            return self.lpam(teacher.pixels, teacher.texts), self.lpam(student.pixels, student.texts)

    def _infoclip(self, student: Embeddings, teacher: Embeddings) -> dict[str, tuple[float, Tensor]]:
        config = self.config
        terms: dict[str, tuple[float, Tensor]] = {}
        relation = self.lpam(teacher.pixels, teacher.texts)  # [B, n, T]
        if self.lpam.learnt and config.compression_weight:
            value = compression_loss(self._samples(relation), *self._inputs(teacher), alpha=config.alpha).mean()
            terms["compression"] = (config.compression_weight, value)
        if config.transfer_weight:
            if config.transfer_to_lpam not in ("both", "teacher"):
                relation = relation.detach()
            if config.transfer_to_lpam in ("both", "student"):
                guess = self.lpam(student.pixels, student.texts)
            else:  # the gradient passes through the module to the student, not into its weights
                fixed = {name: p.detach() for name, p in self.lpam.named_parameters()}
                guess = functional_call(self.lpam, fixed, (student.pixels, student.texts))
            rows_t, rows_s = self._samples(relation), self._samples(guess)
            if config.estimator == "infonce":
                result = infonce(rows_t, rows_s, config.temperature)
                terms["transfer"] = (config.transfer_weight, result.loss)
                terms["bound"] = (0.0, result.bound)
            else:
                terms["transfer"] = (config.transfer_weight, transfer_loss(rows_s, rows_t, config.alpha).mean())
        return terms

    def _samples(self, maps: Tensor) -> Tensor:  # [B, n, T] -> [1, B, n T], [B, n, T] or [B, T, n]
        """The maps' samples as rows of unit length, after centring if asked for."""
        kind = self.config.samples
        x = maps.flatten(1)[None] if kind == "batch" else maps if kind == "pixel" else maps.mT
        if self.config.center:
            centred = x - x.mean(dim=1, keepdim=True)
            # Where all samples agree the difference is rounding; blown up to unit length it would be a signal of noise.
            noise = 16 * torch.finfo(x.dtype).eps * x.detach().norm(dim=-1, keepdim=True)
            x = torch.where(centred.detach().norm(dim=-1, keepdim=True) <= noise, 0.0, centred)
        return unit(x)

    def _inputs(self, teacher: Embeddings) -> list[Tensor]:  # [G, N, D] each
        """Rows of D_V and D_L for the samples chosen; an input that is the same for all samples drops out."""
        if self.config.samples == "batch":
            return [teacher.pixels.flatten(1)[None]]
        pixels = unit(teacher.pixels)
        texts = unit(teacher.texts).expand(len(pixels), -1, -1)
        cosine = cosine_map(pixels, texts) / MIXTURE_TEMPERATURE  # [B, n, T]
        if self.config.samples == "pixel":
            return [pixels, cosine.softmax(dim=2) @ texts]
        return [cosine.softmax(dim=1).mT @ pixels, texts]

    def _baseline(self, student: Embeddings, teacher: Embeddings) -> dict[str, tuple[float, Tensor]]:
        config = self.config
        if config.method == "kl":
            maps = [cosine_map(e.pixels, e.texts) for e in (student, teacher)]
            value = kl_distillation(maps[0], maps[1], config.temperature)
        elif config.method == "maft":
            value = pooled_distillation(student.pixels, teacher.pixels)
        else:
            value = representation_compensation(_as_map(student), _as_map(teacher))
        return {"distill": (config.distill_weight, value)}


def _widened(embeddings: Embeddings) -> Embeddings:
    return embeddings._replace(pixels=widened(embeddings.pixels), texts=widened(embeddings.texts))


def _as_map(embeddings: Embeddings) -> Tensor:  # [B, d, h, w]
    n = embeddings.pixels.shape[1]
    side = math.isqrt(n)
    height, width = embeddings.grid or (side, side)
    if height * width != n:
        raise ValueError(f"maftplus: the {n} pixels are no grid of {height} x {width}; name theirs in Embeddings.grid")
    return embeddings.pixels.mT.unflatten(2, (height, width))
