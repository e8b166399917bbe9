"""Published checkpoints of FC-CLIP and MAFT+: key for key in and out, full-size key lists, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import randomize, small_mask_config
from torch import Tensor
from typer.testing import CliRunner

import infoclip
from infoclip.cli import app
from infoclip.config import apply_overrides
from infoclip.convert import convert_masks, mask_config, read_masks, write_catseg, write_masks
from infoclip.errors import CheckpointError, ConfigError, DataError
from infoclip.model.checkpoint import save_model
from infoclip.model.maftplus import MaskSegmentor, build_mask_segmentor
from infoclip.recipes import get_recipe

PIXEL = "sem_seg_head.pixel_decoder."
TEACHER, CLIP = "backbone_t.clip_model.", "backbone.clip_model."


@pytest.mark.parametrize(
    ("recipe", "entries", "parameters"),
    [("maftplus-large", 1397, 727_144_687), ("maftplus-base", 1297, None), ("fcclip-large", None, None)],
)
def test_every_entry_of_a_full_size_checkpoint(recipe: str, entries: int | None, parameters: int | None) -> None:
    """Counts of the published models, taken from the published classes; settings follow from the shapes alone."""
    wanted = apply_overrides(get_recipe(recipe), ["clip.pretrained=", "mask.queries=100"])
    with torch.device("meta"):
        segmentor = build_mask_segmentor(wanted)
        state = segmentor.published_state_dict()
    teacher = {TEACHER + k.removeprefix(CLIP): v for k, v in state.items() if k.startswith(CLIP)}
    if entries is not None:
        assert len(state) + len(teacher) + 1 == entries  # and the loss's weights of the classes
    if parameters is not None:
        assert sum(v.numel() for v in (*state.values(), *teacher.values())) + 172 == parameters
    config = mask_config(state, wanted.system, "model_final.pth")
    assert (config.clip.model, config.clip.tune) == (wanted.clip.model, wanted.clip.tune)
    sizes = ("queries", "channels", "attention_heads", "encoder_layers", "encoder_ffn_dim", "num_points",
             "decoder_layers", "decoder_ffn_dim", "transfer_heads")  # fmt: skip
    assert [getattr(config.mask, k) for k in sizes] == [getattr(wanted.mask, k) for k in sizes]
    assert config.mask.transfer_features == "reinterpreted"


def small(folder: Path, system: str) -> tuple[MaskSegmentor, list[str]]:
    """A model folder ``folder/run/model`` with the published number of heads, and what its weights cannot tell."""
    config = small_mask_config(folder, system, attention_heads=8, transfer_features="reinterpreted")
    segmentor = build_mask_segmentor(config)
    randomize(segmentor)
    save_model(segmentor, config, ["a", "b, c"], folder / "run" / "model")
    return segmentor, [f"clip.model={config.clip.model}", "mask.transfer_heads=2", "clip.templates=plain"]


def same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in state.items())


@pytest.mark.parametrize("system", ["maftplus", "fcclip"])
def test_round_trip_is_exact(tmp_path: Path, system: str) -> None:
    segmentor, settings = small(tmp_path, system)
    run, names = CliRunner(), tmp_path / "names.txt"
    names.write_text("a\nb, c\n")
    answer = run.invoke(app, ["convert", f"to-{system}", str(tmp_path / "run"), str(tmp_path / "final.pth")])
    assert answer.exit_code == 0, answer.output
    stored = torch.load(tmp_path / "final.pth", weights_only=True)["model"]
    wanted = segmentor.published_state_dict()
    teacher = {k for k in stored if k.startswith(TEACHER)}
    assert bool(teacher) == (system == "maftplus")
    assert stored["criterion.empty_weight"].tolist() == pytest.approx([1, 1, 0.1])
    assert stored.keys() == wanted.keys() | teacher | {"criterion.empty_weight"}
    assert f"{len(stored)} entries" in answer.output
    assert same({k: v for k, v in stored.items() if k in wanted}, wanted)

    torch.save({"model": stored, "iteration": 54_999}, tmp_path / "final.pth")
    command = ["convert", system, str(tmp_path / "final.pth"), str(tmp_path / "again"), *settings]
    answer = run.invoke(app, [*command, "--classes", str(names)])
    assert answer.exit_code == 0, answer.output
    assert f"{len(wanted)} entries loaded, {len(teacher) + 1} of the frozen CLIP and the loss checked" in answer.output
    assert "not needed: iteration" in answer.output
    back = infoclip.load(tmp_path / "again", device="cpu")
    assert back.classes == ["a", "b, c"]
    assert same(back.segmentor.published_state_dict(), wanted)
    # no list of COCO's has two classes
    with pytest.raises(ConfigError, match="trained on 2 classes of its own; name them with --classes"):
        read_masks(tmp_path / "final.pth", system, settings)
    with pytest.raises(DataError, match=r"3 names and .* was trained on 2"):
        read_masks(tmp_path / "final.pth", system, settings, ["a", "b", "c"])


def test_straight_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file by itself, with COCO's list by the number of classes; the small CLIP stands for one of open_clip's."""
    import infoclip.convert as convert

    segmentor, settings = small(tmp_path, "maftplus")
    write_masks(tmp_path / "run", tmp_path / "final.pth", "maftplus")
    state = torch.load(tmp_path / "final.pth", weights_only=True)["model"]
    made = mask_config

    def with_clip(state: Any, system: str, source: str, overrides: Any = ()) -> Any:
        return made(state, system, source, [*settings, *overrides])

    with pytest.raises(ConfigError, match=r"starts at width 8\) is none that open_clip names.*clip.model=FILE.json"):
        infoclip.load(tmp_path / "final.pth", device="cpu")
    monkeypatch.setattr(convert, "mask_config", with_clip)
    for count, first, last in ((133, "person", "rug"), (171, "person", "wood")):
        state["criterion.empty_weight"] = torch.tensor([1.0] * count + [0.1])
        torch.save({"model": state}, tmp_path / "final.pth")
        model = infoclip.load(tmp_path / "final.pth", device="cpu")
        assert (model.classes[0], model.classes[-1], len(model.classes)) == (first, last, count)
        assert same(model.segmentor.published_state_dict(), segmentor.published_state_dict())


def test_every_entry_must_fit(tmp_path: Path) -> None:
    _, settings = small(tmp_path, "maftplus")
    write_masks(tmp_path / "run", tmp_path / "good.pth", "maftplus")
    good = torch.load(tmp_path / "good.pth", weights_only=True)["model"]
    weight = good["criterion.empty_weight"]
    key = "visual.trunk.stem.0.bias"
    cases: dict[str, dict[str, Tensor]] = {
        "unknown .sem_seg_head.extra": {**good, "sem_seg_head.extra": torch.zeros(1)},
        "missing .void_embedding.weight": {k: v for k, v in good.items() if k != "void_embedding.weight"},
        "lacks .*query_feat.weight": {k: v for k, v in good.items() if "query_feat" not in k},
        "two CLIPs differ at visual.trunk.stem.0.bias": {k: v for k, v in good.items() if k != TEACHER + key},
        "two CLIPs differ at extra": {**good, f"{TEACHER}extra": torch.zeros(1)},
        "backbone_t.*not finite": {**good, TEACHER + key: good[TEACHER + key] * float("nan")},
        "cdt.*not finite": {**good, "cdt.cross_atten.norm.bias": torch.full((16,), float("inf"))},
        "weighs classes in its loss": {**good, "criterion.empty_weight": weight * 2},
        "deformable attention has 2 levels": {**good, f"{PIXEL}transformer.level_embed": torch.zeros(2, 32)},
    }  # fmt: skip
    for words, state in cases.items():
        torch.save({"model": state}, tmp_path / "bad.pth")
        with pytest.raises(CheckpointError, match=words) as caught:
            convert_masks(tmp_path / "bad.pth", tmp_path / "out", "maftplus", settings, ["a", "b"])
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_systems_are_not_mixed_up(tmp_path: Path) -> None:
    _, settings = small(tmp_path, "fcclip")
    write_masks(tmp_path / "run", tmp_path / "final.pth", "fcclip")
    with pytest.raises(CheckpointError, match="is a checkpoint of FC-CLIP, not of MAFT"):
        read_masks(tmp_path / "final.pth", "maftplus", settings)
    with pytest.raises(ConfigError, match=r"is a model of FC-CLIP, not of MAFT\+; use 'infoclip convert to-fcclip'"):
        write_masks(tmp_path / "run", tmp_path / "x.pth", "maftplus")
    with pytest.raises(ConfigError, match="is a model of FC-CLIP, not of CAT-Seg"):
        write_catseg(tmp_path / "run", tmp_path / "x.pth")
    with pytest.raises(DataError, match="is a file; expected a folder"):
        convert_masks(tmp_path / "final.pth", tmp_path / "final.pth", "fcclip")
    assert not (tmp_path / "x.pth").exists()
