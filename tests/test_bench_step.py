"""The timed training step, at sizes of a second."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from small_models import small_mask_config
from training_data import tiny_config, write_folders

from bench import step

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
    assert "maftplus-base, 64 px, 6 classes" in printed.out
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
