"""The timed training step and the curves of two trainings, at sizes of a second."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image
from small_models import small_mask_config
from training_data import tiny_config, write_folders

from bench import curves, step

TINY = [
    "clip.image_size=32", "model.hidden_dim=16", "model.num_layers=1", "model.num_heads=2", "model.window_size=2",
    "model.text_guidance_proj_dim=16", "model.appearance_guidance_proj_dim=16", "model.decoder_dims=16,16",
    "model.decoder_guidance_dims=16,16", "model.decoder_guidance_proj_dims=8,8", "data.resize=36", "data.crop=32",
]  # fmt: skip


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    config = tiny_config(write_folders(tmp_path / "data"))
    return [f"clip.model={config.clip.model}", *TINY]


def test_every_form_takes_the_same_step(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "step.json"
    code = step.main(["--classes", "6", "--rounds", "2", "--device", "cpu", "--json", str(out), *settings])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    found = json.loads(out.read_text())
    assert [row["mode"] for row in found["rows"]] == list(step.MODES)
    for row in found["rows"]:
        assert len(row["seconds"]) == 2
        assert f"| {row['mode']} | {row['median_s']:.2f} |" in printed.out
        assert math.isfinite(row["loss"])
        assert row["loss"] == pytest.approx(found["rows"][0]["loss"], rel=step.SAME["float32"])
        assert row["images_per_second"] == pytest.approx(1 / row["median_s"])
        assert row["of_the_floor"] == pytest.approx(found["operations"] / found["rate"] / row["median_s"])
        assert 0 < row["of_the_floor"] < 1
    assert found["rows"][0]["ratio"] == 1
    assert "commit" in found["machine"]


def test_every_form_takes_the_same_step_of_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_mask_config(tmp_path)
    small = [
        f"mask.{key}={getattr(config.mask, key)}"
        for key in ("queries", "channels", "attention_heads", "encoder_layers", "encoder_ffn_dim", "decoder_layers",
                    "decoder_ffn_dim", "transfer_heads", "points")
    ]  # fmt: skip
    code = step.main(["--model", "maftplus-base", "--classes", "6", "--rounds", "1", "--device", "cpu",
                      f"clip.model={config.clip.model}", "clip.templates=plain", "data.crop=64", *small])  # fmt: skip
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "maftplus-base, 64 x 64 px, 6 classes" in printed.out
    assert [line.split(" ")[1] for line in printed.out.splitlines() if line.startswith("| ")][1:] == list(step.MODES)


def test_a_wrong_form_gives_no_table(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import infoclip.model.attention as attention
    import infoclip.model.fast as fast

    right = fast.guidance_product
    monkeypatch.setattr(attention, "guidance_product", lambda layer, guidance: 1.2 * right(layer, guidance))
    code = step.main(["--classes", "6", "--rounds", "1", "--modes", "plain,fast", "--device", "cpu", *settings])
    printed = capsys.readouterr()
    assert code == 1
    assert "fast: the loss is" in printed.err
    assert "| plain |" not in printed.out


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--modes", "quick"], "expected some of plain"), (["--rounds", "0"], "--rounds: expected at least 1"),
     (["data.batch=3"], "data.batch")],
)  # fmt: skip
def test_wrong_input(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = step.main(["--classes", "3", *words])
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    assert code == 2
    assert said in capsys.readouterr().err


# The curves


def test_curves_of_two_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "curves.json", tmp_path / "curves.png"
    words = ["--forms", "plain,fast,bf16", "--steps", "3", "--json", str(out), "--out", str(picture)]
    code = curves.main([*words, "data.train_images=8", "data.batch_size=2", "data.sample_classes=6"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    plain, fast, bf16 = json.loads(out.read_text())["rows"]
    assert len(plain["losses"]) == len(fast["losses"]) == 3
    assert plain["losses"][0] == pytest.approx(fast["losses"][0], rel=1e-4)
    assert plain["most"] == 0 < fast["most"]  # another arithmetic: the forms are not one
    assert fast["most"] < bf16["most"]
    assert f"| fast | {fast['losses'][-1]:.4f} | {fast['first']:.1e} |" in printed.out
    with Image.open(picture) as image:
        assert min(image.size) > 400
    assert "relative difference" in picture.with_suffix(".svg").read_text()


def test_a_curve_of_another_training_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    losses = {"plain": [1.0, 0.5, 0.25], "lean": [1.0, 0.502, 0.25]}
    monkeypatch.setattr(curves, "curve", lambda form, *_: losses[form])
    assert curves.main(["--forms", "plain,lean", "--steps", "3"]) == 1
    assert "lean is not plain: a loss of the first steps is 4.0e-03 away" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--forms", "plain"], "expected two or more of plain, fast"),
        (["--forms", "plain,quick"], "expected two or more of plain, fast"),
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--out", "nowhere/curves.png"], "--out: nowhere/curves.png: there is no folder nowhere"),
    ],
)
def test_wrong_input_of_curves(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        curves.main(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
