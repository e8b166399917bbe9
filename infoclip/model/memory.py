"""What the cost aggregation keeps for the backward pass: three modes, the same values and gradients.

Classes are independent in spatial attention and in the decoder, pixels in class attention. A region is a stretch of
the computation for some of them (a block of spatial attention, the decoder, class attention); it keeps its inputs, and
of what it computes only what the mode names. The backward pass computes the rest again, region by region: written out
in :mod:`infoclip.model.stages`, by torch's checkpointing (:func:`region`) elsewhere.

============  ==================================================  ==================================================
mode          kept beside the inputs of the regions               computed again
============  ==================================================  ==================================================
``fast``      the output of every matrix product                  normalisations, activations, copies
``balanced``  attention outputs, the decoder's convolutions       linear layers, class attention, folded up-sampling
``lean``      nothing                                             everything
============  ==================================================  ==================================================

``reference`` is the plain form that specifies the result; it keeps whatever autograd does. A graph of ``fast`` or
``balanced`` allows one backward pass, whatever ``retain_graph`` says: what it keeps is given up on the way. The number
of classes in a region changes neither what is kept nor the arithmetic, only what the backward pass holds for a moment.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

__all__ = ["MODES", "MemoryMode", "check_memory", "class_chunk", "region"]

MemoryMode = Literal["fast", "balanced", "lean", "reference"]
MODES: tuple[MemoryMode, ...] = get_args(MemoryMode)

_aten: Any = torch.ops.aten
_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
_KEPT: dict[str, tuple[str, ...]] = {
    "fast": ("mm", "addmm", "bmm", "baddbmm", "convolution", *_ATTENTION),
    "balanced": ("convolution", *_ATTENTION),
    "attention": _ATTENTION,
    "lean": (),
}
_CHUNK = {"fast": 0, "balanced": 32, "lean": 8}
_CPU_CHUNK = 4
_DEVICES = ("cpu", "cuda", "meta")

Out = TypeVar("Out")


def check_memory(mode: str, chunk: int) -> None:
    """Refuse what is no memory mode or no chunk.

    Raises:
        ValueError: another mode, or a negative chunk.
    """
    if mode not in MODES:
        raise ValueError(f"the memory mode is {mode!r}; expected one of {', '.join(MODES)}")
    if chunk < 0:
        raise ValueError(f"class_chunk is {chunk}; expected 0 or more")


def class_chunk(mode: str, chunk: int, classes: int, device: torch.device) -> int:
    """Classes of one region: ``chunk``, or for 0 the default of the mode and device.

    On a CPU a few classes, whose maps stay in its caches. Elsewhere few enough that what one region computes again
    stays below what its mode keeps.

    Raises:
        ValueError: a mode whose kept operators the device lacks.
    """
    if mode in ("fast", "balanced") and device.type not in _DEVICES:
        raise ValueError(
            f"the memory mode {mode} keeps the results of attention operators that {device.type} does not have; "
            "use lean or reference there"
        )
    size = chunk or (_CPU_CHUNK if device.type == "cpu" else _CHUNK[mode])
    return min(size or classes, classes)


def region(mode: str, function: Callable[..., Out], *inputs: Any) -> Out:
    """``function(*inputs)``, of which the backward pass finds the inputs and what ``mode`` keeps.

    ``function`` draws no random numbers. In the modes that keep anything the region's graph can be used once;
    ``reference`` keeps whatever autograd does.
    """
    if mode == "reference" or not torch.is_grad_enabled():
        return function(*inputs)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    kept = frozenset(_operators(mode))
    if kept:

        def policy(context: Any, operator: Any, *inputs: Any, **_: Any) -> CheckpointPolicy:
            # The product that narrows a hidden layer is the last of its region: what it gives is the region's output
            # but for a sum, so that nothing before it needs it, and the recomputation ends before it.
            last = operator is _aten.addmm.default and inputs[1].shape[-1] > inputs[2].shape[-1]
            return CheckpointPolicy.MUST_SAVE if operator in kept and not last else CheckpointPolicy.PREFER_RECOMPUTE

        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(function, *inputs, **options)


@functools.cache
def _operators(mode: str) -> tuple[Any, ...]:
    packets = [getattr(_aten, name) for name in _KEPT[mode] if hasattr(_aten, name)]
    return tuple(getattr(packet, overload) for packet in packets for overload in packet.overloads())
