"""Cosine similarities of every pixel with every prompt: the cost volume of CAT-Seg, section 3.2.

``cost_volume`` gives all of it, ``cost_volume_topk`` that of each image's most similar classes, ``cost_embedding`` its
convolution without ever storing it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from infoclip.kernels import choose, register_room
from infoclip.kernels.arguments import check_floats, check_int, check_one_device, check_scale

from . import embedding, native_impl, op, reference, triton_impl

__all__ = ["TopClasses", "cost_embedding", "cost_volume", "cost_volume_topk"]

register_room(
    "cost_volume",
    triton_impl.why_not,
    native_impl.why_not,
    {
        "cpu": "measured faster than the reference, forward and backward (python -m bench cost_volume).",
        "cuda": "the kernels' speed on a GPU is not measured yet; cuBLAS stays the default.",
    },
)


def cost_volume(
    image_feats: Tensor,  # [B, N, d]
    text_feats: Tensor,  # [T, P, d] or [B, T, P, d]
    *,
    temperature: float | None = None,
    backend: str | None = None,
) -> Tensor:  # [B, P, T, N]
    """Cosine similarity of each of the N pixels with each of the T classes' P prompts, divided by ``temperature``.

    CAT-Seg, section 3.2: C(i, n) = D(i) . E(n) / (|D(i)| |E(n)|). Neither input need be normalised; a vector shorter
    than 1e-12 is divided by 1e-12 as in ``torch.nn.functional.normalize``, so a zero vector gives zeros. Any strides.
    Differentiable in both inputs.

    float32, float16 and bfloat16 with fp32 norms and sums, rounded once at the end; float64 in ``reference`` and
    in ``native`` on the CPU. Two dtypes are promoted to the wider. Under autocast float inputs are taken in autocast's
    dtype, as a matrix product's would be; norms and sums stay fp32.

    Args:
        backend: ``reference``, ``triton``, ``native`` or ``auto``; None asks ``INFOCLIP_BACKEND``, then ``auto``.

    Raises:
        TypeError: an input is no dense floating-point tensor, or the temperature no number.
        ValueError: shapes or devices do not fit, the temperature is not finite and above 0, or the backend is unknown.
        infoclip.kernels.BackendUnavailableError: the backend asked for by name cannot run here.
    """
    image_feats, text_feats, dtype, scale = _inputs(image_feats, text_feats, temperature)
    chosen = choose("cost_volume", backend, image_feats.device.type, dtype)
    if chosen == "reference":
        return reference.cost_volume(image_feats, text_feats, scale)
    return op.cost_volume(image_feats, text_feats, scale, chosen)


class TopClasses(NamedTuple):
    """The volume of each image's most similar classes, and which they are."""

    volume: Tensor  # [B, P, k, N]
    classes: Tensor  # [B, k] int64, ascending


def cost_volume_topk(
    image_feats: Tensor,  # [B, N, d]
    text_feats: Tensor,  # [T, P, d] or [B, T, P, d]
    k: int,
    *,
    temperature: float | None = None,
    backend: str | None = None,
) -> TopClasses:
    """The cost volume of the ``k`` classes of each image with the largest similarity over prompts and pixels.

    CAT-Seg's cut for large vocabularies (A-847 and PC-459 keep 256). The largest similarity of a class is found in the
    sweep that computes it, in fp32; on a tie the choice is torch's. Where nothing needs a gradient that sweep stores
    the volume too and the classes are picked from it; otherwise it stores nothing, and what is computed again, kept
    and differentiated is the chosen classes' alone. Differentiable as :func:`cost_volume`, not through the choice.

    Args:
        k: classes to keep, 1 to T.
        backend: as :func:`cost_volume`.

    Raises:
        TypeError, ValueError: as :func:`cost_volume`; ``k`` is no whole number or out of range; N or P is 0.
    """
    image_feats, text_feats, dtype, scale = _inputs(image_feats, text_feats, temperature)
    total = text_feats.shape[-3]
    check_int("k", k)
    if not 1 <= k <= total:
        raise ValueError(f"k: expected 1 to {total}, the number of classes, got {k}")
    if not image_feats.shape[1] or not text_feats.shape[-2]:
        raise ValueError("without pixels or prompts no class is more similar than another; expected at least one each")
    chosen = choose("cost_volume", backend, image_feats.device.type, dtype)
    differentiable = torch.is_grad_enabled() and (image_feats.requires_grad or text_feats.requires_grad)
    volume, highest = op.sweep(image_feats.detach(), text_feats.detach(), scale, not differentiable, chosen)
    classes = highest.topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    if not differentiable:
        index = classes[:, None, :, None].expand(-1, volume.shape[1], -1, volume.shape[3])
        return TopClasses(volume.gather(2, index), classes)
    kept = text_feats.expand(image_feats.shape[0], *text_feats.shape[-3:])
    kept = kept.gather(1, classes[:, :, None, None].expand(-1, -1, *kept.shape[2:]))
    return TopClasses(cost_volume(image_feats, kept, temperature=temperature, backend=chosen), classes)


def cost_embedding(
    image_feats: Tensor,  # [B, N, d] with N = h w
    text_feats: Tensor,  # [T, P, d] or [B, T, P, d]
    weight: Tensor,  # [C, P, k, k], k odd
    bias: Tensor | None,  # [C]
    grid: tuple[int, int],  # (h, w)
    *,
    temperature: float | None = None,
    class_chunk: int | None = None,
    backend: str | None = None,
) -> Tensor:  # [B, T, C, h, w]
    """The cost volume through CAT-Seg's embedding: per class a k x k convolution (padded by zeros) over space.

    CAT-Seg, section 3.2, the convolution that mixes the P prompts into C channels. ``reference`` stores the volume; the
    others hold a chunk of classes of it and compute it again in backward: extra memory is a chunk's volume, its
    gradient and its part of the result, whatever T is. Differentiable in all four tensors; gradients of weight and bias
    are summed in fp32. Dtypes as :func:`cost_volume`, whose result's dtype weight and bias are taken in.

    Args:
        class_chunk: classes at a time; None for as many as fit 8 MiB (64 on a GPU). Results differ by roundings.
        backend: as :func:`cost_volume`.

    Raises:
        TypeError, ValueError: as :func:`cost_volume`; weight, bias or grid do not fit; ``class_chunk`` below 1.
    """
    image_feats, text_feats, dtype, scale = _inputs(image_feats, text_feats, temperature)
    learnt = {"weight": weight} | ({} if bias is None else {"bias": bias})
    check_floats(**learnt)
    check_one_device(image_feats=image_feats, **learnt)
    prompts = text_feats.shape[-2]
    if weight.dim() != 4 or weight.shape[1] != prompts or weight.shape[2] != weight.shape[3] or not weight.shape[2] % 2:
        raise ValueError(f"weight: expected [C, {prompts}, k, k] with an odd k, got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected [{weight.shape[0]}], got {list(bias.shape)}")
    if not isinstance(grid, (tuple, list)) or not all(isinstance(side, (int, torch.SymInt)) for side in grid):
        raise TypeError(f"grid: expected two whole numbers (h, w), got {grid!r}")
    if len(grid) != 2 or grid[0] * grid[1] != image_feats.shape[1] or min(grid) < 1:
        raise ValueError(f"grid: expected (h, w) with h w = {image_feats.shape[1]}, got {tuple(grid)}")
    if not weight.shape[0] or not prompts or not image_feats.shape[-1]:
        raise ValueError("weight, prompts and embeddings: expected at least one channel, prompt and entry")
    if class_chunk is not None:
        check_int("class_chunk", class_chunk)
        if class_chunk < 1:
            raise ValueError(f"class_chunk: expected at least 1, got {class_chunk}")
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    chosen = choose("cost_volume", backend, image_feats.device.type, dtype)
    size = (int(grid[0]), int(grid[1]))
    if chosen == "reference":
        return reference.cost_embedding(image_feats, text_feats, weight, bias, size, scale)
    chunk = embedding.classes_at_once(image_feats, text_feats) if class_chunk is None else class_chunk
    return embedding.cost_embedding(image_feats, text_feats, weight, bias, *size, scale, chunk, chosen)


def _inputs(
    image_feats: Tensor,  # [B, N, d]
    text_feats: Tensor,  # [T, P, d] or [B, T, P, d]
    temperature: float | None,
) -> tuple[Tensor, Tensor, torch.dtype, float]:
    """Both in the dtype of the call, that dtype, and the factor of the cosine."""
    check_floats(image_feats=image_feats, text_feats=text_feats)
    if image_feats.dim() != 3:
        raise ValueError(f"image_feats: expected [B, N, d], got {list(image_feats.shape)}")
    batch, _, dim = image_feats.shape
    if text_feats.dim() not in (3, 4) or text_feats.shape[-1] != dim:
        raise ValueError(
            f"text_feats: expected [T, P, {dim}] or [B, T, P, {dim}] beside image_feats {list(image_feats.shape)}, "
            f"got {list(text_feats.shape)}"
        )
    if text_feats.dim() == 4 and text_feats.shape[0] != batch:
        raise ValueError(f"text_feats: expected a batch of {batch} as image_feats has, got {text_feats.shape[0]}")
    check_one_device(image_feats=image_feats, text_feats=text_feats)
    if temperature is not None:
        check_scale("temperature", temperature)

    device = image_feats.device.type
    dtype = torch.promote_types(image_feats.dtype, text_feats.dtype)
    if dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return image_feats.to(dtype), text_feats.to(dtype), dtype, 1.0 if temperature is None else 1.0 / temperature
