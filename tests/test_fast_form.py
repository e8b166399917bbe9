"""The fast form of the cost aggregation against the plain one: values, gradients, recorded numbers and operations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from parity_common import load_case
from parity_model import check_aggregator
from small_models import randomize, small_model_config

from bench import __main__ as command
from bench import bounds
from bench.bounds import broken, count
from infoclip.config import Config, apply_overrides
from infoclip.errors import ConfigError
from infoclip.model.aggregator import Aggregator
from infoclip.model.decoder import UpBlock
from infoclip.model.memory import MODES

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
    for mode in MODES:
        leaves = [x.clone().requires_grad_() for x in (image, text, *guidance[1:])]
        out = model.use_memory(mode, 2)(leaves[0], leaves[1], [leaves[0], *leaves[2:]] if guided else (), pooling=1)
        wanted = [*leaves[: 4 if guided else 2], *model.parameters()]
        found.append([out, *torch.autograd.grad((out * out).mean(), wanted)])
    for other in found[:-1]:
        for plain, fast in zip(found[-1], other, strict=True):
            # float64 in another order of summation; key biases have a gradient of exactly zero, hence the floor
            assert (plain - fast).norm() <= 1e-11 * plain.norm() + 1e-14


@pytest.mark.parametrize("guided", [True, False])
def test_folded_convolution(guided: bool) -> None:
    torch.manual_seed(0)
    block = UpBlock(8, 16, 3 if guided else 0).double()
    x = torch.randn(2, 8, 4, 5, dtype=torch.float64)
    guidance = torch.randn(2, 3, 8, 10, dtype=torch.float64) if guided else None
    up = block.up(x)
    want = block.conv.double_conv[0](up if guidance is None else torch.cat([up, guidance], dim=1))
    kernel, shared = block.fold(guidance, 4, 5)
    got = F.conv_transpose2d(x, kernel, stride=2, padding=1) + shared
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)  # float64 in another order of summation


@pytest.mark.parametrize("name", sorted(p.stem for p in GOLDEN.glob("aggregator.*.json")))
@pytest.mark.parametrize("mode", ["balanced", "lean", "reference"])
def test_other_modes_meet_the_recorded_numbers_too(name: str, mode: str, monkeypatch) -> None:
    torch.set_num_threads(2)  # as recorded
    monkeypatch.setattr(Aggregator, "load_state_dict", _in_mode(Aggregator.load_state_dict, mode))
    rows = check_aggregator(load_case(GOLDEN / f"{name}.json"))
    assert rows
    assert not [row.name for row in rows if not row.ok]


def _in_mode(load, mode):
    def wrapped(self, *args, **options):
        self.use_memory(mode)
        return load(self, *args, **options)

    return wrapped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bounds_at_the_published_size(dtype: torch.dtype) -> None:
    counts = {mode: count(mode, 171, dtype, chunk=86) for mode in MODES}
    assert not broken(counts, half=dtype == torch.bfloat16)
    assert counts["reference"].forward >= 430e9  # 433 counted: the bound means something
    if dtype == torch.float32:
        assert counts["reference"].kept > 5e9  # and the counter sees what is kept
        worse = {**counts, "lean": counts["balanced"], "balanced": counts["fast"], "fast": counts["reference"]}
        assert len(broken(worse)) >= 4


@pytest.mark.parametrize("mode", ["fast", "balanced", "lean"])
def test_classes_at_once_do_not_change_the_result(mode: str) -> None:
    torch.manual_seed(0)
    model = Aggregator(small_model_config(), 12, 12, 2, (8, 8)).double()
    randomize(model)
    image, text = torch.randn(2, 12, 6, 7, dtype=torch.float64), torch.randn(5, 2, 12, dtype=torch.float64)
    guidance = [torch.randn(2, g, s * 6, s * 7, dtype=torch.float64) for g, s in ((10, 2), (6, 4))]
    found = []
    for chunk in (5, 1, 2, 9, 0):  # T, one, one that leaves a rest, more than T, the mode's own
        leaves = [x.clone().requires_grad_() for x in (image, text)]
        out = model.use_memory(mode, chunk)(leaves[0], leaves[1], [leaves[0], *guidance])
        found.append([out, *torch.autograd.grad((out * out).mean(), [*leaves, *model.parameters()])])
    for other in found[1:]:
        for want, got in zip(found[0], other, strict=True):
            # float64 in another order of summation; key biases have a gradient of exactly zero, hence the floor
            assert (want - got).norm() <= 1e-11 * want.norm() + 1e-14


def test_fewer_classes_at_once_are_separate_regions(monkeypatch) -> None:
    calls = []
    whole = Aggregator.embed
    monkeypatch.setattr(Aggregator, "embed", lambda self, cost: (calls.append(cost.shape[2]), whole(self, cost))[1])
    model = Aggregator(small_model_config(), 12, 12, 2, (8, 8))
    guidance = [torch.randn(1, 12, 6, 6), torch.randn(1, 10, 12, 12), torch.randn(1, 6, 24, 24)]
    with torch.no_grad():
        model.use_memory("lean", 2)(guidance[0], torch.randn(5, 2, 12), guidance)
    assert calls == [2, 2, 1]


@pytest.mark.parametrize("mode", ["fast", "balanced", "lean", "reference"])
def test_second_backward_of_a_graph(mode: str) -> None:
    torch.manual_seed(0)
    model = Aggregator(small_model_config(), 12, 12, 2, (8, 8)).use_memory(mode)
    guidance = [torch.randn(1, 12, 6, 6), torch.randn(1, 10, 12, 12), torch.randn(1, 6, 24, 24)]
    loss = model(guidance[0], torch.randn(5, 2, 12), guidance).square().mean()
    wanted = list(model.parameters())
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    if mode == "fast":  # class attention's products are given up on the way
        with pytest.raises(RuntimeError, match="backward"):
            torch.autograd.grad(loss, wanted)
    else:
        assert all(map(torch.equal, first, torch.autograd.grad(loss, wanted)))


def test_config_chooses_the_mode() -> None:
    config = apply_overrides(Config(), ["model.memory=lean", "model.class_chunk=3"]).validate()
    model = Aggregator(config.model, 512, 512)
    assert (model.memory, model.class_chunk) == ("lean", 3)
    for override, words in (
        ("model.memory=quick", "model.memory"),
        ("model.class_chunk=-1", "model.class_chunk"),
        ("model.class_chunk=two", "model.class_chunk"),
    ):
        with pytest.raises(ConfigError, match=words):
            apply_overrides(Config(), [override]).validate()


def test_command_prints_the_counts_and_fails_on_a_broken_bound(monkeypatch, capsys) -> None:
    plain = {"reference": 10**10, "fast": 5 * 10**9, "balanced": 10**9, "lean": 10**9}
    monkeypatch.setattr(bounds, "count_masks", lambda recipe: plain)
    monkeypatch.setattr(bounds, "count", lambda mode, classes, dtype, chunk: bounds.Counts(3e11, 9e11, 10**8))
    assert command.main(["bounds"]) == 0
    assert "| lean | bf16 | 300 | 900 | 1.00 | 0.10 |" in capsys.readouterr().out
    monkeypatch.setattr(bounds, "count", lambda mode, classes, dtype, chunk: bounds.Counts(3e11, 9e11, 2 * 10**9))
    assert command.main(["bounds"]) == 1
    assert "BROKEN fp32, lean: 2.00 GB kept, more than 0.35" in capsys.readouterr().out
    assert command.main(["bounds", "--classes", "150"]) == 0
    assert "stated for 171 classes: not checked" in capsys.readouterr().out


def test_command_times_the_modes_and_tells_no_figure_of_other_values(monkeypatch, capsys) -> None:
    monkeypatch.setattr(bounds, "ORDER", ("reference", "lean"))
    assert command.main(["bounds", "--time", "1", "--classes", "2"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| reference", "| lean"))]
    assert len(rows) == 2
    whole = Aggregator.decode  # of the plain form alone
    monkeypatch.setattr(Aggregator, "decode", lambda self, x, guidance: 1.001 * whole(self, x, guidance))
    assert command.main(["bounds", "--time", "1", "--classes", "2"]) == 1
    printed = capsys.readouterr()
    assert "| lean" not in printed.out
    assert "error: lean: the logits differ by" in printed.err


@pytest.mark.parametrize("arguments", [["--classes", "0"], ["--classes", "x"], ["--chunk", "-1"], ["--mode", "lean"]])
def test_command_refuses_in_one_sentence(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["bounds", *arguments])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("python -m bench bounds: error:")


def test_unknown_mode_and_negative_chunk_are_named() -> None:
    with pytest.raises(ValueError, match="the memory mode is 'quick'; expected one of fast, balanced, lean"):
        Aggregator(small_model_config(), 12, 12).use_memory("quick")
    with pytest.raises(ValueError, match="class_chunk is -1; expected 0 or more"):
        Aggregator(small_model_config(), 12, 12).use_memory("fast", -1)
