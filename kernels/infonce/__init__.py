"""InfoNCE: contrast each sample's pair with all other samples. CLIP's own contrastive loss is a case of it."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from infoclip.kernels import choose, register_room
from infoclip.kernels.arguments import check_floats, check_one_device, check_scale, check_whole_numbers

from . import native_impl, op, triton_impl
from .reference import infonce as reference

__all__ = ["InfoNCE", "infonce"]

CACHED, WIDE = 8 * 2**20, 384
"""Bytes of logits, at most, and entries of a row, at least, for which the reference is faster on the CPU."""

register_room(
    "infonce",
    triton_impl.why_not,
    native_impl.why_not,
    {
        "cpu": "measured faster, and without the logits; gradients of float32 rows of 384 entries or more, "
        "whose logits fill at most 8 MiB, are the reference's (python -m bench infonce).",
        "cuda": "the kernels' speed on a GPU is not measured yet.",
    },
)


class InfoNCE(NamedTuple):
    """The loss, and the bound on mutual information that it stands for. float32; float64 for float64 samples."""

    loss: Tensor  # [], nats
    bound: Tensor  # [], nats: log M - loss with M candidates, the mean of log M and log N if symmetric; a lower bound


def infonce(
    x: Tensor,  # [.., N, D]
    y: Tensor,  # [.., M, D]
    temperature: float | Tensor = 0.1,  # or []
    symmetric: bool = True,
    *,
    positive: Tensor | None = None,  # [.., N] whole numbers
    backend: str | None = None,
) -> InfoNCE:
    """InfoNCE loss between sample sets (van den Oord, Li and Vinyals, 2018, eq. 4), with rows used as given.

    Row i of ``x`` is to tell its pair p(i), ``positive[i]`` or by default i, from the other rows of ``y`` by their
    inner products: loss = -mean_i log softmax_j(x_i . y_j / temperature)[p(i)], over the batch too. If ``symmetric``,
    the mean of this and of the other direction, in which row p(i) of ``y`` is to tell i from the other rows of ``x``:
    -mean_i log softmax_k(x_k . y_p(i) / temperature)[i]. A row of ``y`` may be nobody's pair, or several rows' (it
    counts once for each). The bound I >= log M - loss is a lower one.

    CLIP's loss (Radford et al., 2021, section 2.3; open_clip's ``ClipLoss``) of unit embeddings [N, D] and the learnt
    ``logit_scale`` is ``infonce(image[None], text[None], (-logit_scale).exp()).loss``; of a process that holds rows
    r N to r N + N of a larger batch, one way, with ``positive = r N + arange(N)``.

    No backend but the reference makes anything of size N x M, in forward or backward. Any strides. Differentiable once
    (the reference: any number of times) in ``x``, ``y`` and a ``temperature`` tensor. float32, float16 and bfloat16
    with fp32 sums and exponentials, float64 in ``reference`` and in ``native`` on the CPU; two dtypes are promoted to
    the wider. Under autocast inputs are taken as they are. Equal and zero rows are fine; a sample that is not finite
    gives a loss that is not finite (but see the README) and gradients that are not.

    Args:
        x, y: samples of one dtype and device, with the same leading axes, at least one.
        temperature: above 0; a tensor of no axes gets a gradient where it requires one, and gives NaN where it is
            not above 0.
        positive: each row's pair; None: N = M, row i's is row i.
        backend: ``reference``, ``triton``, ``native`` or ``auto``; None asks ``INFOCLIP_BACKEND``, then ``auto``.

    Raises:
        TypeError: samples that are no dense floating-point tensors, indices that are no whole numbers, a temperature
            that is no number, or ``symmetric`` that is no bool.
        ValueError: shapes or devices that do not go together, an empty axis, a number as temperature that is not above
            0, an unknown backend and, on the CPU, an index outside 0 .. M - 1 (on a GPU the check would stall the
            device; such an index gives a loss that is NaN there).
        infoclip.kernels.BackendUnavailableError: the backend asked for by name cannot run here.
    """
    check_floats(x=x, y=y)
    if not isinstance(symmetric, bool):
        raise TypeError(f"symmetric: expected True or False, got {symmetric!r}")
    if x.dim() < 3:
        raise ValueError(f"x: expected [.., N, D] with at least one leading axis, got {list(x.shape)}")
    if y.dim() != x.dim() or y.shape[:-2] != x.shape[:-2] or y.shape[-1] != x.shape[-1]:
        want = ", ".join([*map(str, x.shape[:-2]), "M", str(x.shape[-1])])
        raise ValueError(f"y: expected [{want}] beside x {list(x.shape)}, got {list(y.shape)}")
    if not x.numel() or not y.numel():
        raise ValueError(f"x {list(x.shape)} and y {list(y.shape)}: expected at least one of everything")
    check_one_device(x=x, y=y)
    if positive is None:
        if x.shape != y.shape:
            raise ValueError(
                f"x {list(x.shape)} and y {list(y.shape)}: expected as many rows in both, or positive, which names the "
                "row of y that belongs to each row of x"
            )
    else:
        positive = _checked_positive(positive, x, y)
    wide = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
    temperature = _checked_temperature(temperature, x, wide)

    dtype = torch.promote_types(x.dtype, y.dtype)
    x, y = x.to(dtype).flatten(0, -3), y.to(dtype).flatten(0, -3)
    if positive is not None:
        positive = positive.flatten(0, -2)
    chosen = choose("infonce", _measured(x, y) if backend is None else backend, x.device.type, dtype)
    if chosen == "reference":
        return InfoNCE(*reference(x, y, temperature, positive, symmetric))
    if isinstance(temperature, Tensor):
        loss, bound, _, _ = op.infonce(x, y, temperature, 1.0, positive, symmetric, chosen)
    else:
        loss, bound, _, _ = op.infonce(x, y, None, 1.0 / temperature, positive, symmetric, chosen)
    return InfoNCE(loss, bound)


def _measured(x: Tensor, y: Tensor) -> str | None:
    """What is faster where nobody asks: the reference for gradients of wide rows whose logits fit into the cache.

    Its backward takes two products where a form without the matrix takes three, and nothing but products counts there.
    """
    learns = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
    fits = 4 * x.shape[0] * x.shape[1] * y.shape[1] <= CACHED and x.shape[2] >= WIDE
    small = fits and learns and x.dtype == torch.float32 and x.device.type == "cpu"
    return "reference" if small and os.environ.get("INFOCLIP_BACKEND", "auto").strip() in ("", "auto") else None


def _checked_positive(positive: Tensor, x: Tensor, y: Tensor) -> Tensor:
    check_whole_numbers(positive=positive)
    if positive.shape != x.shape[:-1]:
        raise ValueError(
            f"positive: expected {list(x.shape[:-1])} beside x {list(x.shape)}, got {list(positive.shape)}"
        )
    check_one_device(x=x, positive=positive)
    positive = positive.long()
    # The check reads the indices, which a graph under compilation cannot.
    if positive.device.type == "cpu" and not torch.compiler.is_compiling():
        strange = positive[(positive < 0) | (positive >= y.shape[-2])]
        if strange.numel():
            raise ValueError(f"positive has the index {int(strange[0])}: expected 0 to {y.shape[-2] - 1}")
    return positive


def _checked_temperature(temperature: float | Tensor, x: Tensor, wide: torch.dtype) -> float | Tensor:
    if isinstance(temperature, Tensor):
        if not temperature.is_floating_point():
            raise TypeError(f"temperature: expected a number or a floating-point tensor, got {temperature.dtype}")
        if temperature.dim() != 0:
            raise ValueError(f"temperature: expected a number or a tensor of no axes, got {list(temperature.shape)}")
        check_one_device(x=x, temperature=temperature)
        return temperature.to(wide)  # whether it is above 0 is not read: that would stall a device
    check_scale("temperature", temperature)
    return temperature
