"""Optimiser groups, learning-rate schedule and gradient clipping of the published training (CAT-Seg, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from infoclip.config import OptimConfig

__all__ = [
    "allocate_moments",
    "build_optimizer",
    "clip_gradients",
    "group_parameters",
    "lr_factor",
    "parameter_groups",
    "set_learning_rate",
]

KINDS = ("head", "clip", "lpam")
"""What a parameter belongs to: aggregator, decoder and up-samplers; the CLIP student; the alignment module."""

_MOMENTS = ("exp_avg", "exp_avg_sq")

_NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._NormBase,
    nn.LocalResponseNorm,
)


def parameter_groups(segmentor: nn.Module, objective: nn.Module | None, config: OptimConfig) -> list[dict[str, Any]]:
    """AdamW groups of everything that learns.

    Learning rate: ``lr`` for the head, times ``clip_lr_multiplier`` for CLIP, times ``lpam_lr_multiplier`` for the
    objective's own parameters. Weight decay: ``weight_decay_norm`` for normalisation layers, none for embedding
    tables, ``weight_decay`` for the rest, biases and padding tokens included (as published). Frozen parameters are
    left out; a parameter that several modules share counts once.

    Returns:
        Groups with ``params``, ``lr``, ``weight_decay``, ``name`` (such as ``head`` or ``clip.norm``), ``kind`` and
        ``param_names``; empty groups are left out.
    """
    modules = [("", segmentor)] + ([("objective.", objective)] if objective is not None else [])

    def kind_of(name: str) -> str:
        if name.startswith("objective."):
            return "lpam"
        return "clip" if name.startswith("clip.") else "head"

    return group_parameters(modules, kind_of, config)


def group_parameters(
    modules: Sequence[tuple[str, nn.Module]], kind_of: Callable[[str], str], config: OptimConfig
) -> list[dict[str, Any]]:
    """The groups of any modules.

    Args:
        modules: pairs of a name prefix and a module.
        kind_of: ``head``, ``clip`` or ``lpam`` for the full name of a parameter.
    """
    rates = {
        "head": config.lr,
        "clip": config.lr * config.clip_lr_multiplier,
        "lpam": config.lr * config.lpam_lr_multiplier,
    }
    decays = {"": config.weight_decay, ".norm": config.weight_decay_norm, ".embedding": 0.0}
    groups: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    for prefix, root in modules:
        for path, module in root.named_modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                if not parameter.requires_grad or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                name = prefix + (f"{path}.{leaf}" if path else leaf)
                kind = kind_of(name)
                suffix = ".norm" if isinstance(module, _NORMS) else ".embedding" if _is_table(module) else ""
                group = groups.setdefault(
                    kind + suffix,
                    {
                        "params": [],
                        "lr": rates[kind],
                        "weight_decay": decays[suffix],
                        "name": kind + suffix,
                        "kind": kind,
                        "param_names": [],
                    },
                )
                group["params"].append(parameter)
                group["param_names"].append(name)
    return list(groups.values())


def _is_table(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag))


def build_optimizer(segmentor: nn.Module, objective: nn.Module | None, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over :func:`parameter_groups`, fused where the parameters' device has it.

    Raises:
        ValueError: nothing learns.
    """
    groups = parameter_groups(segmentor, objective, config)
    if not groups:
        raise ValueError("nothing to optimise: no parameter requires a gradient")
    # torch's own list of names is per optimiser state; ours would be taken for it and reordered on loading.
    names = [g.pop("param_names") for g in groups]
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for g in groups for p in g["params"])
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
    for group, parameter_names in zip(optimizer.param_groups, names, strict=True):
        group["initial_lr"] = group["lr"]
        group["names"] = parameter_names
    return optimizer


def allocate_moments(optimizer: torch.optim.AdamW) -> None:
    """Make the moments that AdamW would make in its first step, as zeros; those that are there stay.

    Memory that does not suffice is then found before anything is learnt, not between the updates of two groups, and
    the first step takes as much as those that follow. The bits of a run are the same.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not optimizer.state[p]:
                moments = {name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in _MOMENTS}
                place = p.device if group["fused"] or group["capturable"] else None
                optimizer.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=place), **moments}


def lr_factor(
    step: int, steps: int, schedule: Literal["cosine", "poly", "step", "constant"] = "cosine", warmup_steps: int = 0
) -> float:
    """Factor on every group's learning rate for the step with this 0-based number.

    Cosine: ``(1 + cos(pi * step / steps)) / 2``, from 1 to 0 (0 from ``steps`` on). Poly:
    ``(1 - step / steps) ** 0.9`` (MAFT+). Step: 1, a tenth from 8/9 of the steps on and a hundredth from 26/27 on
    (FC-CLIP: 327,778 and 355,092 of 368,750). With warm-up, step ``k`` of the first ``warmup_steps`` has
    ``(k + 1) / (warmup_steps + 1)`` times that.

    Raises:
        ValueError: an unknown schedule, or a step or length that cannot be.
    """
    if step < 0 or steps < 1 or warmup_steps < 0:
        raise ValueError(f"step {step} of {steps} with {warmup_steps} warm-up steps; expected 0 or more of 1 or more")
    if schedule == "cosine":
        factor = 0.5 * (1.0 + math.cos(math.pi * min(step, steps) / steps))
    elif schedule == "poly":
        factor = (1.0 - min(step, steps) / steps) ** 0.9
    elif schedule == "step":
        factor = 0.1 ** ((9 * step >= 8 * steps) + (27 * step >= 26 * steps))
    elif schedule == "constant":
        factor = 1.0
    else:
        raise ValueError(f"schedule is {schedule!r}; expected 'cosine', 'poly', 'step' or 'constant'")
    return factor * min(1.0, (step + 1) / (warmup_steps + 1))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to ``factor`` times the one it started with."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def clip_gradients(
    groups: Iterable[dict[str, Any]], max_norm: float, mode: Literal["joint", "group"] = "joint"
) -> dict[str, Tensor]:
    """Scale gradients in place so that their L2 norm is at most ``max_norm``.

    The factor is ``min(1, max_norm / (norm + 1e-6))``. Nothing here waits for the device.

    Args:
        groups: of :func:`parameter_groups`, or ``optimizer.param_groups``.
        max_norm: largest norm; 0 only measures.
        mode: ``joint``, one norm over everything (published); ``group``, one for each of head, CLIP and alignment
            module, so that a large gradient in one does not shrink the steps of the others.

    Returns:
        Norms before clipping, as tensors on the gradients' device: ``joint``, or one for each kind of group.

    Raises:
        ValueError: an unknown mode or a negative norm.
    """
    if mode not in ("joint", "group"):
        raise ValueError(f"mode is {mode!r}; expected 'joint' or 'group'")
    if max_norm < 0:
        raise ValueError(f"max_norm is {max_norm}; expected 0 or more")
    members: dict[str, list[Tensor]] = {}
    for group in groups:
        members.setdefault("joint" if mode == "joint" else group["kind"], []).extend(group["params"])
    norms = {}
    for name, parameters in members.items():
        gradients = [p.grad for p in parameters if p.grad is not None]
        norms[name] = nn.utils.get_total_norm(gradients).detach()
        if max_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norms[name])
    return norms
