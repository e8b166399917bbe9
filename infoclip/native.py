"""The native module ``infoclip._C``: this file alone loads it and takes the address of a tensor's data.

The module is built by ``pip install .`` from ``csrc/``; it knows nothing of torch, so one build serves every torch.
Where it is missing or does not load, its place is taken by a ``MissingBuild`` that raises, when used, with the reason
and the remedy.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "MissingBuild",
    "NativeUnavailableError",
    "available",
    "build_info",
    "cost_volume_backward",
    "cost_volume_forward",
    "depthwise_conv2d_weight_grad",
    "infonce_backward",
    "infonce_forward",
    "ms_deform_attn_backward",
    "ms_deform_attn_forward",
    "renyi_information",
    "upsample_bce",
    "why_not",
]

DTYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
"""The dtypes that the native kernels take, by their code in ``csrc/``; float64 on the CPU only."""


ENTRIES = (
    "build_info",
    "cost_volume_forward",
    "depthwise_conv2d_weight_grad",
    "infonce_forward",
    "ms_deform_attn_forward",
    "renyi_information",
    "upsample_bce",
)
"""What a build of these sources has, one name an op: a module that lacks one is a build of older sources."""


class NativeUnavailableError(RuntimeError):
    """The native module was used where it cannot run; the message says why and how to mend it."""


class MissingBuild:
    """Stands for a native module that did not load: any use raises ``NativeUnavailableError``."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NativeUnavailableError(self.reason)


@functools.cache
def _load() -> Any:
    try:
        module = importlib.import_module("infoclip._C")
        lacking = [name for name in ENTRIES if not hasattr(module, name)]
        if lacking:
            return MissingBuild(
                f"the native module was built from other sources ({lacking[0]} is not in it): build it again with "
                "'make setup', or 'pip install --no-build-isolation --no-deps -e .' in the source tree."
            )
        return module
    except ModuleNotFoundError as error:
        if error.name != "infoclip._C":
            return MissingBuild(f"the native module did not load: {error}.")
        return MissingBuild(
            "the native module infoclip._C is not built for this Python: run 'make setup', or "
            "'pip install --no-build-isolation --no-deps -e .' in the source tree (a C++17 compiler is needed)."
        )
    except ImportError as error:
        return MissingBuild(f"the native module did not load: {error}. Build it again with 'make setup'.")


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def why_not(device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> str | None:
    """Why the native kernels cannot run on tensors of this kind of device and dtype, or None where they can."""
    if torch.device(device).type == "cuda" and dtype == torch.float64:
        return "float64 runs on the CPU only; use the reference."
    module = _load()
    if isinstance(module, MissingBuild):
        return module.reason
    kind = torch.device(device).type
    if kind == "cpu":
        return None
    if kind != "cuda":
        return f"there is no native kernel for {kind}; there is one for cpu and cuda."
    info = module.build_info()
    if not info["cuda"]:
        return "built without CUDA: put nvcc on PATH and build again with INFOCLIP_CUDA=1."
    if not info["cuda_driver"]:
        return "there is no NVIDIA driver on this machine."
    if info["cuda_driver"] < info["cuda_runtime"] // 1000 * 1000:
        return (
            f"built with CUDA {_cuda_version(info['cuda_runtime'])}, but the driver only serves "
            f"{_cuda_version(info['cuda_driver'])}: update the driver or build with an older nvcc."
        )
    if not torch.cuda.is_available():
        return "torch sees no CUDA device."
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"built for compute capability 8.0 and above; this GPU has {major}.{minor}."
    return None


def available(device: str | torch.device = "cpu") -> bool:
    """Whether the native kernels run on tensors of this kind of device."""
    return why_not(device) is None


def build_info() -> dict[str, Any]:
    """What was built (compiler, instruction sets, CUDA) and what of it this CPU can use; ``{}`` without a build."""
    module = _load()
    return {} if isinstance(module, MissingBuild) else dict(module.build_info())


def _strides(tensor: Tensor) -> list[int]:
    # An axis of length 1 or an empty tensor may carry any stride; it is never multiplied by anything but 0.
    return list(tensor.stride())


def _text_view(text: Tensor) -> tuple[Tensor, list[int], bool]:
    shared = text.dim() == 3
    return text, [0, *_strides(text)] if shared else _strides(text), shared


def _stream(tensor: Tensor) -> int:
    return int(torch.cuda.current_stream(tensor.device).cuda_stream) if tensor.is_cuda else 0


def _work(module: Any, like: Tensor, sizes: list[int], shared: bool, **flags: bool) -> Tensor | None:
    if not like.is_cuda:
        return None
    floats = module.cost_volume_work_floats(sizes, shared, **flags)
    return torch.empty(floats, dtype=torch.float32, device=like.device)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _arguments(image: Tensor, text: Tensor, scale: float, isa: str, threads: int | None) -> dict[str, Any]:
    text, text_strides, shared = _text_view(text)
    classes, templates = text.shape[-3:-1]
    return {
        "cuda": image.is_cuda,
        "sizes": [image.shape[0], image.shape[1], classes, templates, image.shape[2]],
        "dtype": DTYPES[image.dtype],
        "shared": shared,
        "scale": scale,
        "image": image.data_ptr(),
        "image_s": _strides(image),
        "text": text.data_ptr(),
        "text_s": text_strides,
        "isa": isa,
        "threads": threads if threads is not None else torch.get_num_threads(),
        "stream": _stream(image),
    }


def cost_volume_forward(
    image: Tensor,  # [B, N, d]
    text: Tensor,  # [T, P, d] or [B, T, P, d]
    out: Tensor | None,  # [B, P, T, N] contiguous, written
    scale: float,
    highest: Tensor | None = None,  # [B, T] contiguous fp32 (float64 for float64), written; CPU only
    *,
    isa: str = "auto",
    threads: int | None = None,
) -> None:
    """Write ``scale`` times the cosine similarities into ``out``, and each class's largest into ``highest``.

    The tensors share device and, but for ``highest``, dtype; what is None is not written.

    ``isa`` is ``auto``, ``baseline``, ``avx2``, ``avx512``, ``avx512_bf16`` or ``amx_bf16``; ``threads`` None is
    torch's number.
    Raises ``NativeUnavailableError`` without a build and ``ValueError`` for an instruction set that the CPU lacks.
    """
    module = _load()
    arguments = _arguments(image, text, scale, isa, threads)
    with torch.cuda.device_of(image):
        work = _work(module, image, arguments["sizes"], arguments["shared"], backward=False)
        module.cost_volume_forward(**arguments, out=_address(out), highest=_address(highest), work=_address(work))


def cost_volume_backward(
    grad: Tensor,  # [B, P, T, N]
    image: Tensor,  # [B, N, d]
    text: Tensor,  # [T, P, d] or [B, T, P, d]
    d_image: Tensor | None,  # [B, N, d] contiguous, written
    d_text: Tensor | None,  # as text, contiguous, written
    scale: float,
    *,
    isa: str = "auto",
    threads: int | None = None,
) -> None:
    """Write the gradients of ``cost_volume_forward``; one that is None is not computed. Raises as the forward."""
    module = _load()
    arguments = _arguments(image, text, scale, isa, threads)
    wanted = {"d_image": d_image is not None, "d_text": d_text is not None}
    with torch.cuda.device_of(image):
        work = _work(module, image, arguments["sizes"], arguments["shared"], backward=True, **wanted)
        module.cost_volume_backward(
            **arguments,
            grad=grad.data_ptr(),
            grad_s=_strides(grad),
            d_image=_address(d_image),
            d_text=_address(d_text),
            work=_address(work),
        )


def _infonce(
    x: Tensor,
    y: Tensor,
    temperature: Tensor | None,
    scale: float,
    positive: Tensor | None,
    symmetric: bool,
    rows: Tensor,
    columns: Tensor,
    isa: str,
    threads: int | None,
) -> dict[str, Any]:
    return {
        "cuda": x.is_cuda,
        "sizes": [x.shape[0], x.shape[1], y.shape[1], x.shape[2]],
        "dtype": DTYPES[x.dtype],
        "symmetric": symmetric,
        "scale": scale,
        "temperature": _address(temperature),
        "x": x.data_ptr(),
        "x_s": _strides(x),
        "y": y.data_ptr(),
        "y_s": _strides(y),
        "positive": _address(positive),
        "positive_s": [0, 0] if positive is None else _strides(positive),
        "rows": rows.data_ptr(),
        "columns": _address(columns if symmetric else None),
        "isa": isa,
        "threads": threads if threads is not None else torch.get_num_threads(),
        "stream": _stream(x),
    }


def _infonce_work(module: Any, like: Tensor, arguments: dict[str, Any], backward: bool, learns: bool) -> Tensor | None:
    if not like.is_cuda:
        return None
    floats = module.infonce_work_floats(
        sizes=arguments["sizes"],
        symmetric=arguments["symmetric"],
        paired=bool(arguments["positive"]),
        backward=backward,
        learns=learns,
    )
    return torch.empty(floats, dtype=torch.float32, device=like.device)


def infonce_forward(
    x: Tensor,  # [B, N, D]
    y: Tensor,  # [B, M, D]
    temperature: Tensor | None,  # []
    scale: float,
    positive: Tensor | None,  # [B, N] int64
    symmetric: bool,
    loss: Tensor,  # [], written
    bound: Tensor,  # [], written
    rows: Tensor,  # [B, N] contiguous, written
    columns: Tensor,  # [B, M] contiguous, written if symmetric
    *,
    isa: str = "auto",
    threads: int | None = None,
) -> None:
    """Write InfoNCE's loss, bound and log-sum-exps. All but x and y are float32, float64 for float64.

    ``isa``, ``threads`` and errors as :func:`cost_volume_forward`.
    """
    module = _load()
    arguments = _infonce(x, y, temperature, scale, positive, symmetric, rows, columns, isa, threads)
    with torch.cuda.device_of(x):
        work = _infonce_work(module, x, arguments, backward=False, learns=False)
        module.infonce_forward(**arguments, loss=loss.data_ptr(), bound=bound.data_ptr(), work=_address(work))


def infonce_backward(
    d_loss: Tensor,  # []
    x: Tensor,  # [B, N, D]
    y: Tensor,  # [B, M, D]
    temperature: Tensor | None,  # []
    scale: float,
    positive: Tensor | None,  # [B, N] int64
    symmetric: bool,
    rows: Tensor,  # [B, N]
    columns: Tensor,  # [B, M]
    d_x: Tensor | None,  # [B, N, D] contiguous, written
    d_y: Tensor | None,  # [B, M, D] contiguous, written
    d_temperature: Tensor | None,  # [], written
    *,
    isa: str = "auto",
    threads: int | None = None,
) -> None:
    """Write the gradients of :func:`infonce_forward`; one that is None is not computed."""
    module = _load()
    arguments = _infonce(x, y, temperature, scale, positive, symmetric, rows, columns, isa, threads)
    with torch.cuda.device_of(x):
        work = _infonce_work(module, x, arguments, backward=True, learns=d_temperature is not None)
        module.infonce_backward(
            **arguments,
            d_loss=d_loss.data_ptr(),
            d_x=_address(d_x),
            d_y=_address(d_y),
            d_temperature=_address(d_temperature),
            work=_address(work),
        )


def upsample_bce(
    logits: Tensor,  # [B, T, h, w]
    target: Tensor,  # [B, H, W] int64
    loss: Tensor,  # [] float32 (float64 for float64 logits), written
    grad: Tensor | None,  # [B, T, h, w] contiguous, dtype as loss, written
    ignore_index: int,
    masked: bool,
    *,
    isa: str = "auto",
    threads: int | None = None,
) -> int | None:
    """Write the loss and, unless it is None, its gradient.

    Returns a label that is neither a class nor ``ignore_index``, in which case nothing is written; None where all is
    well and always on a GPU, where such labels count as ignored. ``isa``, ``threads`` and errors as
    :func:`cost_volume_forward`.
    """
    module = _load()
    sizes = [*logits.shape, *target.shape[1:]]
    with torch.cuda.device_of(logits):
        work = None
        if logits.is_cuda:
            work = torch.empty(module.upsample_bce_work_bytes(sizes), dtype=torch.uint8, device=logits.device)
        strange: int | None = module.upsample_bce(
            cuda=logits.is_cuda,
            sizes=sizes,
            dtype=DTYPES[logits.dtype],
            logits=logits.data_ptr(),
            logits_s=_strides(logits),
            target=target.data_ptr(),
            target_s=_strides(target),
            ignore_index=ignore_index,
            masked=masked,
            loss=loss.data_ptr(),
            grad=_address(grad),
            work=_address(work),
            isa=isa,
            threads=threads if threads is not None else torch.get_num_threads(),
            stream=_stream(logits),
        )
    return strange


def _deform_arguments(
    value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor, levels: Tensor | None
) -> dict[str, Any]:
    return {
        "cuda": value.is_cuda,
        "sizes": [*value.shape, locations.shape[1], locations.shape[4]],
        "shapes": shapes,
        "dtype": DTYPES[value.dtype],
        "value": value.data_ptr(),
        "value_s": _strides(value)[:3],
        "locations": locations.data_ptr(),
        "weights": weights.data_ptr(),
        "levels": _address(levels),
        "stream": _stream(value),
    }


def ms_deform_attn_forward(
    value: Tensor,  # [B, S, M, D], channels side by side
    shapes: list[int],  # height and width of each level
    locations: Tensor,  # [B, Q, M, L, P, 2] contiguous float32 (float64 for float64)
    weights: Tensor,  # [B, Q, M, L, P] contiguous, dtype as locations
    out: Tensor,  # [B, Q, M, D] contiguous, dtype as value, written
    levels: Tensor | None = None,  # [L, 4] int32, on a GPU
    *,
    isa: str = "auto",
    threads: int | None = None,
) -> None:
    """Write the sums of samples. ``isa``, ``threads`` and errors as :func:`cost_volume_forward`."""
    arguments = _deform_arguments(value, shapes, locations, weights, levels)
    count = threads if threads is not None else torch.get_num_threads()
    with torch.cuda.device_of(value):
        _load().ms_deform_attn_forward(**arguments, out=out.data_ptr(), isa=isa, threads=count)


def ms_deform_attn_backward(
    grad: Tensor,  # [B, Q, M, D] contiguous, dtype as value
    value: Tensor,  # [B, S, M, D], channels side by side
    shapes: list[int],
    locations: Tensor,  # [B, Q, M, L, P, 2] contiguous
    weights: Tensor,  # [B, Q, M, L, P] contiguous
    d_value: Tensor | None,  # [B, S, M, D] contiguous, dtype as value, written
    d_locations: Tensor | None,  # as locations, written; None together with d_weights
    d_weights: Tensor | None,  # as weights, written
    levels: Tensor | None = None,  # [L, 4] int32, on a GPU
    order: Tensor | None = None,  # samples by cell, on a GPU with d_value
    starts: Tensor | None = None,  # first sample of each cell, on a GPU with d_value
    *,
    isa: str = "auto",
    threads: int | None = None,
) -> None:
    """Write the gradients of :func:`ms_deform_attn_forward`; one that is None is not computed."""
    arguments = _deform_arguments(value, shapes, locations, weights, levels)
    with torch.cuda.device_of(value):
        _load().ms_deform_attn_backward(
            **arguments,
            grad=grad.data_ptr(),
            d_value=_address(d_value),
            d_locations=_address(d_locations),
            d_weights=_address(d_weights),
            order=_address(order),
            starts=_address(starts),
            isa=isa,
            threads=threads if threads is not None else torch.get_num_threads(),
        )


def depthwise_conv2d_weight_grad(
    x: Tensor,  # [B, C, H, W]
    grad: Tensor,  # [B, C, H, W], dtype as x
    dilation: int,
    d_weight: Tensor,  # [C, 1, K, K] contiguous float32 (float64 for float64), written
    d_bias: Tensor | None,  # [C] contiguous, dtype as d_weight, written
    *,
    isa: str = "auto",
    threads: int | None = None,
) -> None:
    """Write the gradients in the weights and, unless it is None, in the bias; on the CPU.

    ``isa``, ``threads`` and errors as :func:`cost_volume_forward`.
    """
    _load().depthwise_conv2d_weight_grad(
        sizes=[*x.shape, d_weight.shape[-1]],
        dilation=dilation,
        dtype=DTYPES[x.dtype],
        x=x.data_ptr(),
        x_s=_strides(x),
        grad=grad.data_ptr(),
        grad_s=_strides(grad),
        d_weight=d_weight.data_ptr(),
        d_bias=_address(d_bias),
        isa=isa,
        threads=threads if threads is not None else torch.get_num_threads(),
    )


def renyi_information(
    views: Sequence[Tensor],  # [B, N, D_i] each
    units: Sequence[bool],
    weights: Sequence[int],
    value: Tensor,  # [B] wide contiguous: float32, float64 for float64 views; written
    grads: Sequence[Tensor | None],  # [B, N, D_i] wide contiguous; written
    *,
    isa: str = "auto",
    threads: int | None = None,
) -> None:
    """Write the weighted entropies of order 2 and their gradients in the views whose entry is not None.

    Two or three views of one dtype. ``units`` names those whose rows are L2-normalised first; ``weights`` are -1, 0 or
    1, of the joint entropy and of each view's. ``isa``, ``threads`` and errors as :func:`cost_volume_forward`.
    """
    module = _load()
    first = views[0]
    sizes, widths = list(first.shape[:2]), [v.shape[2] for v in views]
    with torch.cuda.device_of(first):
        work = None
        if first.is_cuda:
            needed = any(g is not None for g in grads)
            floats = module.renyi_information_work_floats(sizes=sizes, widths=widths, needed=needed)
            work = torch.empty(floats, dtype=torch.float32, device=first.device)
        module.renyi_information(
            cuda=first.is_cuda,
            sizes=sizes,
            dtype=DTYPES[first.dtype],
            widths=widths,
            x=[v.data_ptr() for v in views],
            x_s=[_strides(v) for v in views],
            unit=list(units),
            weights=list(weights),
            value=value.data_ptr(),
            grad=[_address(g) for g in grads],
            work=_address(work),
            isa=isa,
            threads=threads if threads is not None else torch.get_num_threads(),
            stream=_stream(first),
        )
