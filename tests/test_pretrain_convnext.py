"""Pretraining of the scenes' CLIP with a ConvNeXt: what is written, what is kept of the teacher, what is learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

from infoclip import pretrain_convnext as C
from infoclip.cli import app
from infoclip.clip import load_convnext_clip
from infoclip.clip.builtin import ASSETS, BuiltinClip, builtin_scenes
from infoclip.config import ClipConfig
from infoclip.data.scenes import OBJECT_CLASSES
from infoclip.errors import CheckpointError, ConfigError, DataError
from infoclip.pretrain import EvaluationSets, normalise

TINY = C.ConvNeXtPretrainConfig(steps=3, batch_size=8, eval_every=2, eval_images=6, large_share=0.34)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrain") / "clip"
    C.pretrain_scenes_convnext(out, config=TINY, progress=False)
    return out


def load(folder: Path) -> open_clip.CLIP:
    """The way that open_clip and timm themselves take."""
    config = json.loads((folder / "config.json").read_text())["model_cfg"]
    assert config["vision_cfg"]["timm_model_name"] == "local-dir:trunk"
    config["vision_cfg"]["timm_model_name"] = f"local-dir:{folder / 'trunk'}"
    clip = open_clip.CLIP(**config)
    clip.load_state_dict({key: value.float() for key, value in load_file(folder / "model.safetensors").items()})
    return clip.eval()


def test_the_folder_is_an_open_clip_model(made: Path) -> None:
    clip = load(made)
    trunk: Any = clip.visual.trunk
    assert [info["reduction"] for info in trunk.feature_info] == [4, 8, 8, 8]
    assert clip.encode_image(torch.zeros(2, 3, 96, 96)).shape == (2, 128)
    assert trunk.forward_features(torch.zeros(1, 3, 96, 96)).shape == (1, 160, 12, 12)
    provenance = json.loads((made / "PROVENANCE.json").read_text())
    assert provenance["command"] is None  # settings that the command line does not have
    assert provenance["config"] == vars(TINY)
    log = [json.loads(line) for line in (made / "log.jsonl").read_text().splitlines()]
    assert log[-1]["accuracy"] == provenance["metrics"]["accuracy"]
    assert sum(path.stat().st_size for path in made.rglob("*")) < 6_000_000


# What ships

NAME = "builtin:scenes-convnext"


@pytest.fixture(scope="module")
def shipped() -> BuiltinClip:
    return builtin_scenes("scenes-convnext")


def test_the_shipped_folder_says_how_it_was_made() -> None:
    folder = ASSETS["scenes-convnext"]
    provenance = json.loads((folder / "PROVENANCE.json").read_text())
    assert provenance["command"] == "infoclip pretrain scenes-convnext --out DIR --seed 0"
    assert provenance["config"] == vars(C.ConvNeXtPretrainConfig())
    assert json.loads((folder / "config.json").read_text()) == C.convnext_model_config()
    assert json.loads((folder / "trunk" / "config.json").read_text()) == C.TRUNK
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 6_000_000


def test_the_shipped_figures_are_found_again(shipped: BuiltinClip) -> None:
    wanted = json.loads((ASSETS["scenes-convnext"] / "PROVENANCE.json").read_text())["metrics"]
    found = C.evaluate_scenes_convnext(shipped.model, EvaluationSets(), shipped.tokenizer)
    # another convolution's rounding may turn a picture (1 of 128), an object (1 of 323) or some pixels at an edge
    room = {"accuracy": 0.8, "pooled/objects": 0.4}
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, abs=room.get(key, 0.2)), key


def test_figures_need_the_right_words(shipped: BuiltinClip) -> None:
    """The negative control of the test above."""

    def turned(texts: list[str]) -> Tensor:
        return shipped.tokenizer([*texts[7:], *texts[:7]])

    found = C.evaluate_scenes_convnext(shipped.model, EvaluationSets(16), turned)  # type: ignore[arg-type]
    assert found["accuracy"] < 20
    assert found["pooled/objects"] < 20


def test_recipes_load_it_by_name(shipped: BuiltinClip) -> None:
    settings = ClipConfig(model=NAME, pretrained=NAME, tune="frozen", image_size=96, templates="scenes")
    clip = load_convnext_clip(settings)
    image = normalise(EvaluationSets(4).single.images)
    with torch.no_grad():
        assert [tuple(x.shape[1:]) for x in clip.encode_image(image)] == [
            (40, 24, 24), (96, 12, 12), (128, 12, 12), (160, 12, 12), (160, 12, 12)
        ]  # fmt: skip
        torch.testing.assert_close(clip.encode_global(image), shipped.model.encode_image(image), rtol=1e-5, atol=1e-5)
        assert clip.text_features(list(OBJECT_CLASSES)).shape == (48, 1, 128)
    assert clip.mean == pytest.approx(shipped.mean)
    random = load_convnext_clip(ClipConfig(model=NAME, pretrained="", tune="frozen", templates="scenes"))
    assert random.arch == clip.arch
    assert not torch.equal(random.visual.head.proj.weight, clip.visual.head.proj.weight)  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"use clip\.model=builtin:scenes-convnext"):
        load_convnext_clip(ClipConfig(model="convnext_base_w_320", pretrained=NAME, tune="frozen"))


def test_words_mean_what_they_mean_to_the_vit_clip(made: Path) -> None:
    ours, theirs = load(made), builtin_scenes()
    tokens = theirs.tokenizer(["a photo of a red striped cross", "sand"])
    with torch.no_grad():
        assert torch.equal(ours.encode_text(tokens), theirs.model.encode_text(tokens))
    assert torch.equal(ours.logit_scale, theirs.model.logit_scale)


def test_the_same_seed_gives_the_same_bytes(made: Path, tmp_path: Path) -> None:
    C.pretrain_scenes_convnext(tmp_path / "again", config=TINY, progress=False)
    weights = (made / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights
    other = C.ConvNeXtPretrainConfig(**{**vars(TINY), "seed": 1, "steps": 1})
    C.pretrain_scenes_convnext(tmp_path / "other", config=other, progress=False)
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != weights


def test_the_caption_corrects_the_teacher() -> None:
    phrases = torch.eye(3)
    guide = torch.tensor([[[3.0, 4.0, 0.0]]])  # it says 1 before 0
    patches = torch.tensor([[[1.0, 0.0, 0.0]]], requires_grad=True)
    scale = torch.tensor(5.0)

    def loss(named: list[bool]) -> Tensor:
        return C.guided_patch_loss(patches, guide, phrases, torch.tensor([named]), scale)

    answer = (scale * torch.tensor([1.0, 0.0, 0.0])).log_softmax(dim=0)
    assert float(loss([True, False, True]).detach()) == pytest.approx(
        float(-((scale * torch.tensor([0.6, 0.0])).softmax(dim=0) * answer[[0, 2]]).sum()), rel=1e-6
    )
    target = (scale * torch.tensor([0.6, 0.8, 0.0])).softmax(dim=0)
    assert float(loss([True] * 3).detach()) == pytest.approx(
        float(F.cross_entropy(scale * patches.detach()[0, 0], target)), rel=1e-6
    )
    (gradient,) = torch.autograd.grad(loss([False, True, False]), patches)
    assert gradient[0, 0, 1] < 0  # descent moves towards the phrase that the caption names


def test_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size is 1"):
        C.pretrain_scenes_convnext(tmp_path / "a", batch_size=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(DataError, match="already holds files"):
        C.pretrain_scenes_convnext(tmp_path / "full", steps=1)
    with pytest.raises(CheckpointError, match="no complete CLIP of the scenes"):
        C.pretrain_scenes_convnext(tmp_path / "a", steps=1, teacher=tmp_path / "full")
    failed = CliRunner().invoke(app, ["pretrain", "scenes-convnext", "--out", str(tmp_path / "full")])
    assert failed.exit_code == 2
    assert failed.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
