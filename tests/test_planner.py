"""The memory planner, running out of memory, and what a budget may look like."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from training_data import INFOCLIP, tiny_config, weights, write_folders

from infoclip import budget as amounts
from infoclip.budget import format_bytes, parse_budget
from infoclip.config import AlignConfig, Config, apply_overrides
from infoclip.engine import planner
from infoclip.engine import train as engine
from infoclip.engine.log import read_events, read_log
from infoclip.engine.planner import Settings, budget_of, count_step, lower, make_plan
from infoclip.engine.train import train
from infoclip.errors import ConfigError, InfoclipWarning, OutOfMemoryError
from infoclip.model.footprint import LiveBytes, meta_copy
from infoclip.model.memory import class_chunk
from infoclip.model.segmentor import build_segmentor

CPU = torch.device("cpu")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_folders(tmp_path / "data")


# Amounts


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 8 * 2**30), ("8GB", 8 * 10**9), ("1.5 gib", 3 * 2**29), ("512MiB", 2**29), ("7B", 7)]
)
def test_amounts(text: str, size: int) -> None:
    assert parse_budget(text) == size


@pytest.mark.parametrize(
    ("text", "words"),
    [("8", "no unit; write 8GiB"), ("8XB", "unknown unit 'XB'"), ("-1GiB", "is no amount"), ("0GiB", "no memory")],
)
def test_wrong_amounts_are_one_sentence(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_budget(text)
    with pytest.raises(ConfigError, match=r"model\.memory"):
        apply_overrides(Config(), [f"model.memory={text}"])


def test_an_unknown_mode_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'leen'; expected one of fast, balanced, lean.*did you mean 'lean'"):
        apply_overrides(Config(), ["model.memory=leen"])


def test_a_device_without_the_operators_of_a_mode_is_named() -> None:
    with pytest.raises(ValueError, match=r"balanced keeps .* mps does not have; use lean or reference"):
        class_chunk("balanced", 0, 5, torch.device("mps"))
    assert class_chunk("lean", 0, 5, torch.device("mps")) == 5


def test_budget_of_a_mode_and_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert budget_of("lean", CPU) is None
    assert 0 < budget_of("auto", CPU) < 2**50
    assert budget_of("2GiB", CPU) == 2**31
    monkeypatch.setattr(amounts, "_free", lambda device: (2**30, 2**33))
    with pytest.raises(ConfigError, match=r"16GiB, but cuda has 8\.00GiB"):
        budget_of("16GiB", torch.device("cuda"))


# Counting


def test_live_bytes_follow_making_and_freeing() -> None:
    with LiveBytes() as live:
        x = torch.empty(1000, device="meta")
        y = x.view(10, 100) + 1
        assert live.now == 8000
        del x
        assert (live.now, live.peak) == (4000, 8000)
        y.mul_(2)
        assert live.now == 4000
        (y @ y.T).sum()
        assert live.now == 4000
    assert live.peak == 8000


def planned(config: Config, budget: int, classes: int = 5) -> planner.Plan:
    return make_plan(budget, config, build_segmentor(config), None, None, classes, 8, CPU)


def test_less_is_counted_from_mode_to_mode_and_for_smaller_micro_batches(data: Path) -> None:
    config = apply_overrides(tiny_config(data), ["data.batch_size=4"])
    model = build_segmentor(config)
    model = meta_copy(model, model.clip.tokenizer)
    sizes = {
        (mode, micro): count_step(model, None, None, config, 5, 8, Settings(mode, 2, micro)).kept
        for mode in ("fast", "balanced", "lean")
        for micro in (1, 2, 4)
    }
    for mode in ("fast", "balanced", "lean"):
        assert sizes[mode, 1] < sizes[mode, 2] < sizes[mode, 4]
    for micro in (1, 2, 4):
        assert sizes["lean", micro] < sizes["balanced", micro] < sizes["fast", micro]


def test_the_fastest_that_fits_and_a_refusal_that_names_the_smallest(data: Path) -> None:
    config = apply_overrides(tiny_config(data), ["data.batch_size=4"])
    wide = planned(config, 2**40)
    assert wide.settings == Settings("fast", 4, 4)
    assert wide.footprint.gradients * 2 == wide.footprint.optimizer
    tight = planned(config, wide.footprint.total - 1)
    assert tight.settings != wide.settings
    assert tight.footprint.total < wide.footprint.total
    with pytest.raises(ConfigError, match=r"model\.memory is 1MiB, but the leanest step .* needs (\d+)MiB") as refused:
        planned(config, 2**20)
    named = parse_budget(str(refused.value).split("needs ")[1].split(";")[0])
    assert planned(config, named).footprint.total <= named
    with pytest.raises(ConfigError, match="needs"):
        planned(config, named - 2**20)


def test_a_loss_over_the_batch_is_not_divided(data: Path) -> None:
    config = apply_overrides(tiny_config(data, AlignConfig(samples="batch")), ["data.batch_size=4"])
    assert lower(Settings("lean", 1, 4), 5, True, CPU) is None
    with pytest.raises(ConfigError, match="micro-batch 4"):
        planned(config, 2**20)


# Dividing a batch


@pytest.mark.parametrize("method", ["none", "infoclip", "kl", "maft", "maftplus"])
@pytest.mark.parametrize("ignored", ["negative", "masked"])
def test_micro_batches_give_the_batch(
    data: Path, tmp_path: Path, method: str, ignored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(data, AlignConfig(method=method, samples="pixel"), steps=1, ignored=ignored)  # type: ignore[arg-type]
    config = apply_overrides(config, ["data.batch_size=4", "data.workers=0"])
    train(config, tmp_path / "whole", progress=False)
    use = engine.Run._use
    monkeypatch.setattr(
        engine.Run, "_use", lambda self, settings: use(self, dataclasses.replace(settings, micro_batch=3))
    )
    train(config, tmp_path / "parts", progress=False)
    a, b = (read_log(tmp_path / name / "log.jsonl")[0] for name in ("whole", "parts"))
    for name, value in {"loss": a["loss"], **a["losses"]}.items():
        assert {"loss": b["loss"], **b["losses"]}[name] == pytest.approx(value, rel=1e-5), name
    for kind, norm in a["grad_norm"].items():
        assert b["grad_norm"][kind] == pytest.approx(norm, rel=1e-3), kind  # float32 in another order


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["balanced", "lean"])
def test_modes_that_recompute_clip_give_the_same_step(data: Path, tmp_path: Path, mode: str, precision: str) -> None:
    for name in ("fast", mode):
        config = apply_overrides(tiny_config(data, INFOCLIP, steps=1, precision=precision), [f"model.memory={name}"])
        train(config, tmp_path / name, progress=False)
    a, b = (read_log(tmp_path / name / "log.jsonl")[0] for name in ("fast", mode))
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
    for kind, norm in a["grad_norm"].items():  # sums in another order; bfloat16 keeps 8 bits
        assert b["grad_norm"][kind] == pytest.approx(norm, rel=1e-4 if precision == "fp32" else 0.02), kind


# Running out


def run_out(monkeypatch: pytest.MonkeyPatch, step: int, times: int, error: BaseException) -> None:
    """Memory runs out in the backward pass of a step, some times."""
    forward, left = engine.Run._forward, [times]

    def failing(self: Any, *args: Any) -> Any:
        terms, draw = forward(self, *args)
        if self.step == step and left[0]:
            left[0] -= 1
            terms["segmentation"].backward(retain_graph=True)  # gradients that must not count
            raise error
        return terms, draw

    monkeypatch.setattr(engine.Run, "_forward", failing)


SHORTAGES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."
    ),
    RuntimeError("infoclip._C: out of memory for a buffer of 9 entries of 4 bytes"),
]


@pytest.mark.parametrize("error", SHORTAGES, ids=["cuda", "cpu", "native"])
def test_out_of_memory_repeats_the_step_one_mode_down(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    config = tiny_config(data, INFOCLIP, steps=4)
    lower_mode = apply_overrides(config, ["model.memory=lean"])
    train(lower_mode, tmp_path / "lean", progress=False)
    run_out(monkeypatch, 0, 2, error)
    random_state = torch.get_rng_state()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(config, tmp_path / "run", progress=False)
    assert torch.equal(random_state, torch.get_rng_state())
    said = [str(w.message) for w in caught if issubclass(w.category, InfoclipWarning)]
    assert len(said) == 2
    assert "out of memory at step 1 with fast" in said[0]
    assert "repeated with lean" in said[1]
    events = read_events(tmp_path / "run" / "log.jsonl")
    assert [event["settings"]["mode"] for event in events] == ["balanced", "lean"]
    assert [line["step"] for line in read_log(tmp_path / "run" / "log.jsonl")] == [1, 2, 3, 4]
    a, b = weights(tmp_path / "lean"), weights(tmp_path / "run")
    assert all(torch.equal(a[name], b[name]) for name in a)  # from the first step on it was that mode


def test_out_of_memory_later_changes_nothing_but_rounding(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(data, INFOCLIP, steps=4)
    train(config, tmp_path / "whole", progress=False)
    run_out(monkeypatch, 2, 1, SHORTAGES[1])
    with pytest.warns(InfoclipWarning, match="step 3"):
        train(config, tmp_path / "run", progress=False)
    a, b = (read_log(tmp_path / name / "log.jsonl") for name in ("whole", "run"))
    for one, other in zip(a, b, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "run")
    for name, value in first.items():
        # AdamW's step is the sign of a gradient where it is noise: of a few weights whatever the precision
        assert (value - second[name]).abs().mean() <= 1e-4 * (1 + value.abs().mean()), name


def test_out_of_the_last_settings_is_one_sentence(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_out(monkeypatch, 0, 99, SHORTAGES[0])
    with pytest.warns(InfoclipWarning), pytest.raises(OutOfMemoryError) as stopped:
        train(tiny_config(data, steps=1), tmp_path / "run", progress=False)
    assert "Out of memory at step 1 with the leanest settings (lean, 1 classes at once, micro-batch 1)" in str(
        stopped.value
    )
    assert "lower data.sample_classes" in str(stopped.value)


def test_other_errors_are_not_taken_for_a_shortage(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_out(monkeypatch, 0, 1, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train(tiny_config(data, steps=1), tmp_path / "run", progress=False)


def test_out_of_memory_for_the_moments_is_one_sentence_before_anything(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(optimizer: object) -> None:
        raise SHORTAGES[1]

    monkeypatch.setattr(engine, "allocate_moments", fail)
    with pytest.raises(OutOfMemoryError, match=r"moments .*which no leaner setting makes smaller.*clip\.tune"):
        train(tiny_config(data, steps=1), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", SHORTAGES, ids=["cuda", "cpu", "native"])
def test_out_of_memory_in_the_update_keeps_the_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """The weights may be half new: the run stops, and goes on from its checkpoint to the same bits."""
    config = tiny_config(data, INFOCLIP, steps=4)
    train(config, tmp_path / "whole", progress=False)
    update, left = torch.optim.AdamW.step, [3]

    def fail(self: Any, *args: Any) -> Any:
        update(self, *args)
        if not left[0]:
            raise error
        left[0] -= 1

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", fail)
        with pytest.raises(OutOfMemoryError, match=r"step 4, which is not kept.*step_000003 with --resume"):
            train(config, tmp_path / "cut", progress=False)
    train(config, tmp_path / "cut", resume=True, progress=False)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(a[name], b[name]) for name in a)


# A run with a budget


def test_a_run_with_a_budget_resumes_with_its_plan(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = apply_overrides(tiny_config(data, INFOCLIP, steps=4), ["model.memory=2GiB"])
    train(config, tmp_path / "whole", progress=True)
    assert "memory plan: fast" in capsys.readouterr().err
    assert read_events(tmp_path / "whole" / "log.jsonl")[0]["event"] == "memory plan"
    step, left = engine.Run._train_step, [3]

    def stop(self: Any) -> Any:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(engine.Run, "_train_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "cut", progress=False)
    monkeypatch.setattr(engine, "make_plan", lambda *args: pytest.fail("planned again"))
    train(config, tmp_path / "cut", resume=True, progress=False)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_an_impossible_budget_leaves_nothing_behind(data: Path, tmp_path: Path) -> None:
    config = apply_overrides(tiny_config(data, steps=1), ["model.memory=2MiB"])
    with pytest.raises(ConfigError, match="needs"):
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_first_step_over_the_budget_lowers_the_settings(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = apply_overrides(tiny_config(data, steps=2), ["model.memory=2GiB"])
    seen = iter([2**30, 2**40, 2**40])
    monkeypatch.setattr(engine.Run, "_peak", lambda self: next(seen, 2**40))
    with pytest.warns(InfoclipWarning, match="the first step took .* goes on with balanced"):
        train(config, tmp_path / "run", progress=False)


def test_sizes_are_written_as_they_are_read() -> None:
    for size in (2**30, 3 * 2**20, 8 * 2**30):
        assert parse_budget(format_bytes(size)) == size


def test_the_commands_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from infoclip.cli import app

    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (line,) = (x.strip() for x in readme.splitlines() if "infoclip train scenes model.memory=" in x)
    command = line.replace("runs/small", str(tmp_path / "run")).split()[1:]
    done = CliRunner().invoke(app, [*command, "data.train_images=8"])
    assert done.exit_code == 0, done.output
    assert "memory plan: fast" in done.output
    done = CliRunner().invoke(app, ["train", "scenes", "model.memory=8", "--out", str(tmp_path / "other")])
    assert done.exit_code == 2
    assert "no unit; write 8GiB" in done.output
    assert not (tmp_path / "other").exists()
