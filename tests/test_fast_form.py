"""The fast form of the cost aggregation against the plain one: values, gradients, recorded numbers and operations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from parity_common import load_case
from parity_model import check_aggregator
from small_models import randomize, small_model_config
from torch.utils.flop_counter import FlopCounterMode

from infoclip.config import ModelConfig
from infoclip.model.aggregator import Aggregator
from infoclip.model.fast import fold_transposed

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize(("h", "w"), [(8, 8), (6, 10), (5, 7), (1, 1)])
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("attention_type", ["linear", "full"])
def test_same_values_and_gradients_in_float64(h: int, w: int, guided: bool, attention_type: str) -> None:
    torch.manual_seed(0)
    off = {} if guided else {"decoder_guidance_dims": (0, 0), "decoder_guidance_proj_dims": (0, 0)}
    width = 12 if guided else 0
    model = Aggregator(small_model_config(attention_type=attention_type, **off), width, width, 2, (8, 8)).double()
    randomize(model)
    image, text = torch.randn(2, 12, h, w, dtype=torch.float64), torch.randn(5, 2, 12, dtype=torch.float64)
    guidance = [image, *(torch.randn(2, g, s * h, s * w, dtype=torch.float64) for g, s in ((10, 2), (6, 4)))]
    found = []
    for form in ("reference", "fast"):
        leaves = [x.clone().requires_grad_() for x in (image, text, *guidance[1:])]
        out = model.use_form(form)(leaves[0], leaves[1], [leaves[0], *leaves[2:]] if guided else (), pooling=1)
        wanted = [*leaves[: 4 if guided else 2], *model.parameters()]
        found.append([out, *torch.autograd.grad((out * out).mean(), wanted)])
    for plain, fast in zip(*found, strict=True):
        # float64 in another order of summation; key biases have a gradient of exactly zero, hence the floor
        assert (plain - fast).norm() <= 1e-11 * plain.norm() + 1e-14


def test_folded_convolution() -> None:
    torch.manual_seed(0)
    x, up, kernel = torch.randn(2, 3, 4, 5), torch.randn(3, 4, 2, 2), torch.randn(6, 4, 3, 3)
    want = F.conv2d(F.conv_transpose2d(x, up, stride=2), kernel, padding=1)
    y = F.conv2d(x, fold_transposed(up, kernel), padding=1).view(2, 2, 2, 6, 5, 6)
    for p in range(2):
        for q in range(2):
            got = y[:, p, q, :, p : p + 4, q : q + 5]
            torch.testing.assert_close(got, want[:, :, p::2, q::2], rtol=1e-5, atol=1e-5)  # float32, 16 to 48 terms


@pytest.mark.parametrize("name", sorted(p.stem for p in GOLDEN.glob("aggregator.*.json")))
def test_plain_form_meets_the_recorded_numbers_too(name: str, monkeypatch) -> None:
    torch.set_num_threads(2)  # as recorded
    monkeypatch.setattr(Aggregator, "load_state_dict", _plain(Aggregator.load_state_dict))
    rows = check_aggregator(load_case(GOLDEN / f"{name}.json"))
    assert rows
    assert not [row.name for row in rows if not row.ok]


def _plain(load):
    def wrapped(self, *args, **options):
        self.use_form("reference")
        return load(self, *args, **options)

    return wrapped


def count(form: str) -> float:
    with torch.device("meta"):
        model = Aggregator(ModelConfig(), 512, 512).use_form(form)
        dense = torch.empty(1, 512, 24, 24)
        guidance = [dense, torch.empty(1, 256, 48, 48), torch.empty(1, 128, 96, 96)]
        with FlopCounterMode(display=False) as counter:
            model(dense, torch.empty(171, 1, 512), guidance)
    return counter.get_total_flops() / 1e9


def test_forward_operations_at_the_published_size() -> None:
    # On meta tensors fused attention runs as the plain products, so both counts hold it.
    assert count("fast") <= 335  # 323 counted
    assert count("reference") >= 430  # 433 counted: the bound means something


def test_unknown_form_is_named() -> None:
    with pytest.raises(ValueError, match="the form is 'quick'; expected 'fast' or 'reference'"):
        Aggregator(small_model_config(), 12, 12).use_form("quick")
