"""What every op refuses in the same words, and sizes that no memory holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_checks import needs_native
from torch import Tensor

from infoclip.engine.train import _is_shortage
from infoclip.kernels.cost_volume import cost_embedding, cost_volume, cost_volume_topk
from infoclip.kernels.depthwise_conv2d import depthwise_conv2d
from infoclip.kernels.infonce import infonce
from infoclip.kernels.ms_deform_attn import ms_deform_attn
from infoclip.kernels.renyi_mutual_information import compression_loss, renyi_mutual_information
from infoclip.kernels.upsample_bce import upsample_bce

IMAGE, TEXT = torch.ones(1, 6, 8), torch.ones(3, 1, 8)
LABELS = torch.zeros(1, 8, 8, dtype=torch.int64)
Call = tuple[Callable[..., Any], dict[str, Any], dict[str, str]]
"""An op, good arguments, and the tensors among them by the name that its messages give them."""
CALLS: dict[str, Call] = {
    "cost_volume": (cost_volume, {"image_feats": IMAGE, "text_feats": TEXT}, {}),
    "cost_volume_topk": (cost_volume_topk, {"image_feats": IMAGE, "text_feats": TEXT, "k": 2}, {}),
    "cost_embedding": (cost_embedding, {"image_feats": IMAGE, "text_feats": TEXT, "weight": torch.ones(4, 1, 7, 7),
                                        "bias": torch.ones(4), "grid": (2, 3)}, {}),
    "infonce": (infonce, {"x": IMAGE, "y": IMAGE, "temperature": torch.tensor(0.1),
                          "positive": torch.zeros(1, 6, dtype=torch.int64)}, {}),
    "renyi_mutual_information": (renyi_mutual_information, {"x": IMAGE, "y": IMAGE}, {"x": "set 0", "y": "set 1"}),
    "compression_loss": (lambda *, relation, feature, backend: compression_loss(relation, feature, backend=backend),
                         {"relation": IMAGE, "feature": IMAGE}, {"relation": "set 0", "feature": "set 1"}),
    "upsample_bce": (upsample_bce, {"logits": torch.ones(1, 3, 4, 4), "target": LABELS}, {}),
    "ms_deform_attn": (ms_deform_attn, {"value": torch.ones(1, 6, 2, 4), "shapes": [(2, 3)],
                                        "locations": torch.ones(1, 5, 2, 1, 4, 2),
                                        "weights": torch.ones(1, 5, 2, 1, 4)}, {}),
    "depthwise_conv2d": (depthwise_conv2d, {"x": torch.ones(1, 3, 4, 4), "weight": torch.ones(3, 1, 3, 3),
                                            "bias": torch.ones(3)}, {}),
}  # fmt: skip
TENSORS = [
    (op, name) for op, (_, good, _) in CALLS.items() for name, value in good.items() if isinstance(value, Tensor)
]


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_a_tensor_that_is_none_of_ours(op: str, name: str, backend: str) -> None:
    call, good, names = CALLS[op]
    call(**good, backend=backend)
    value, said = good[name], names.get(name, name)
    optional = "a number" if name == "temperature" else "a tensor"
    wrong: list[tuple[Any, type[Exception], str]] = [
        ([1.0], TypeError, f"{said}: expected {optional}, got list"),
        (value.to(torch.complex64), TypeError, rf"{said}: expected .*, got torch\.complex64"),
        (value.bool(), TypeError, rf"{said}: expected .*, got torch\.bool"),
    ]
    if value.dim():
        wrong.append(
            (value.to_sparse(), TypeError, f"{said}: expected a dense tensor, got the layout torch.sparse_coo")
        )
    if len([v for v in good.values() if isinstance(v, Tensor)]) > 1:
        wrong.append((value.to("meta"), ValueError, "on cpu.*: expected one device|on meta.*: expected one device"))
    for bad, error, message in wrong:
        with pytest.raises(error, match=message):
            call(**{**good, name: bad}, backend=backend)


@pytest.mark.parametrize(
    ("op", "change", "error", "message"),
    [
        ("cost_volume", {"temperature": "1"}, TypeError, "temperature: expected a number, got str"),
        ("cost_volume", {"temperature": float("inf")}, ValueError, "temperature: expected a finite number above 0"),
        ("cost_volume", {"temperature": float("nan")}, ValueError, "temperature: expected a finite number above 0"),
        ("cost_volume_topk", {"k": 2.0}, TypeError, "k: expected a whole number, got float"),
        ("cost_embedding", {"grid": "23"}, TypeError, r"grid: expected two whole numbers \(h, w\), got '23'"),
        ("cost_embedding", {"grid": (2.0, 3.0)}, TypeError, r"grid: expected two whole numbers \(h, w\)"),
        ("infonce", {"symmetric": "no"}, TypeError, "symmetric: expected True or False, got 'no'"),
        ("infonce", {"temperature": True}, TypeError, "temperature: expected a number, got bool"),
        ("upsample_bce", {"ignore_index": "x"}, TypeError, "ignore_index: expected a whole number, got str"),
        ("upsample_bce", {"ignore_index": 2**70}, ValueError, "ignore_index: expected a number of 64 bits"),
        ("depthwise_conv2d", {"dilation": 1.5}, TypeError, "dilation: expected a whole number, got float"),
    ],
)
def test_other_arguments(op: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    call, good, _ = CALLS[op]
    with pytest.raises(error, match=message):
        call(**{**good, **change})


def huge(*sizes: int) -> Tensor:
    """A tensor of stride 0, which takes no memory whatever its sizes are."""
    return torch.ones(()).expand(*sizes)


@needs_native
@pytest.mark.parametrize(
    "call",
    [
        lambda: cost_volume(huge(1, 2**40, 8), huge(2**40, 1, 8), backend="native"),
        lambda: cost_volume(huge(1, 2, 2**40), huge(1, 1, 2**40), backend="native"),
        lambda: cost_volume_topk(huge(1, 2**40, 8), TEXT, 2, backend="native"),
        lambda: infonce(huge(1, 2**40, 8), huge(1, 2**40, 8), 0.1, backend="native"),
        lambda: infonce(huge(2**40, 4, 8), huge(2**40, 4, 8), 0.1, backend="native"),
        lambda: renyi_mutual_information(huge(1, 2**40, 8), huge(1, 2**40, 8), backend="native"),
        lambda: renyi_mutual_information(huge(1, 2, 2**40), huge(1, 2, 2**40), backend="native"),
        lambda: upsample_bce(huge(1, 2**20, 2**14, 2**14), LABELS[:, :1, :1].expand(1, 2**20, 2**20), backend="native"),
        lambda: ms_deform_attn(huge(1, 6, 2, 4), [(2, 3)], huge(1, 2**40, 2, 1, 4, 2), huge(1, 2**40, 2, 1, 4),
                               backend="native"),
    ],
)  # fmt: skip
def test_sizes_that_no_memory_holds(call: Callable[[], Any]) -> None:
    """Terabytes, or a number of entries beyond 64 bits: an error that says so, and the process lives on."""
    with pytest.raises(
        (ValueError, RuntimeError), match=r"allocate \d+ bytes|overflowed|2\^31|infoclip._C: out of memory"
    ):
        call()
    cost_volume(IMAGE, TEXT, backend="native")


@needs_native
def test_a_shortage_of_the_native_code_is_one() -> None:
    """The training engine repeats a step that ran out of memory with leaner settings: it must know this error too."""
    with pytest.raises(
        RuntimeError, match=r"infoclip._C: out of memory for a buffer of \d+ entries of \d bytes"
    ) as said:
        cost_volume(huge(1, 2, 2**40), huge(1, 1, 2**40), backend="native")
    assert _is_shortage(said.value)
