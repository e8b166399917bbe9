"""The mask segmentor: CLIP with a ConvNeXt, decoders, matching, losses, and results from pictures of any kind."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from small_models import randomize, small_mask_config, small_mask_segmentor
from torch import Tensor

from infoclip.clip import ConvNeXtCLIP, load_clip, load_convnext_clip
from infoclip.config import ClipConfig, Config, EvalConfig, MaskConfig, apply_overrides
from infoclip.errors import CheckpointError, ConfigError, DataError
from infoclip.model.maftplus import MaskSegmentor, build_mask_segmentor
from infoclip.model.maftplus.inference import (
    ensemble_probabilities,
    instances,
    overlapping,
    panoptic,
    predict_masks,
    preprocess,
)
from infoclip.objective import SetCriterion, hungarian_match, sample_points

EVAL = EvalConfig(resize=0, sliding_window=False)


def picture(height: int, width: int, seed: int = 0) -> Tensor:  # [3, H, W]
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


# CLIP with a ConvNeXt


def test_clip_equals_open_clip(tmp_path: Path) -> None:
    config = small_mask_config(tmp_path)
    vision = json.loads(Path(config.clip.model).read_text())
    vision["vision_cfg"]["timm_model_name"] = f"local-dir:{tmp_path / 'trunk'}"
    theirs = randomize(open_clip.CLIP(**vision)).eval()
    ours = ConvNeXtCLIP.from_open_clip(theirs, vision["vision_cfg"])
    image = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_global(image), theirs.encode_image(image), rtol=1e-5, atol=1e-5)
        tokens = open_clip.tokenize(["a cat", "two red dogs"])
        torch.testing.assert_close(ours.encode_text(tokens), theirs.encode_text(tokens), rtol=1e-5, atol=1e-5)
        features = ours.encode_image(image)
        assert [tuple(x.shape[1:]) for x in features] == [
            (8, 16, 24), (16, 8, 12), (24, 4, 6), (32, 2, 3), (32, 2, 3)
        ]  # fmt: skip
        everything = ours.embed_map(features.dense)
        torch.testing.assert_close(everything[:, :, 1, 2], ours.embed(features.dense[:, :, 1, 2]))
    assert ours.stock_state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.stock_state_dict())


@pytest.mark.parametrize("name", ["convnext_base_w_320", "convnext_large_d_320"])
def test_published_architectures(name: str) -> None:
    from infoclip.clip.architecture import model_config, read_convnext

    with torch.device("meta"):
        clip = ConvNeXtCLIP(read_convnext(model_config(name)[0], name))
        stock = open_clip.CLIP(**model_config(name)[0])
    assert {k: v.shape for k, v in clip.stock_state_dict().items()} == {
        k: v.shape for k, v in stock.state_dict().items()
    }
    learns = clip.parameter_policy("trunk")
    assert learns
    assert all(k.startswith(("visual.trunk.stem.", "visual.trunk.stages.")) for k in learns)
    assert not clip.parameter_policy("frozen")


@pytest.mark.parametrize("memory", ["fast", "balanced", "lean"])
def test_memory_modes_change_no_gradient(memory: str) -> None:
    def gradients(mode: str) -> dict[str, Tensor]:
        segmentor = small_mask_segmentor().use_memory(mode)
        vocabulary = segmentor.vocabulary(["cat", "dog,hound"])
        out = segmentor(preprocess(picture(64, 64)[None], segmentor.clip), vocabulary)
        total = sum(p.logits.sin().sum() + p.masks.sin().mean() for p in out.proposals)
        (total + out.clip_logits.sin().sum() + out.dense.sin().sum()).backward()
        return {k: p.grad for k, p in segmentor.named_parameters() if p.grad is not None}

    want, got = gradients("reference"), gradients(memory)
    assert got.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()) + 1e-7)


def test_training_mode_leaves_the_image_encoder_alone_unless_it_drops_paths() -> None:
    segmentor = small_mask_segmentor()
    assert not segmentor.train().clip.visual.training
    assert segmentor.clip.transformer.training
    segmentor.clip.drop_path = True
    assert segmentor.train().clip.visual.training


def test_wrong_clips(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no image encoder of timm; expected a ConvNeXt"):
        load_convnext_clip(ClipConfig(model="ViT-B-16", pretrained="", tune="frozen"))
    with pytest.raises(ConfigError, match="a timm image encoder; expected a plain ViT"):
        load_clip(ClipConfig(model="convnext_base_w_320", pretrained=""))
    config = small_mask_config(tmp_path)
    (tmp_path / "trunk" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"there is no .*trunk/config.json"):
        load_convnext_clip(config.clip)
    with pytest.raises(CheckpointError, match="is neither a weight file"):
        load_convnext_clip(ClipConfig(model="convnext_base_w_320", pretrained=str(tmp_path / "none.pt"), tune="frozen"))


def test_image_sides() -> None:
    segmentor = small_mask_segmentor()
    with pytest.raises(ValueError, match="multiples of 32"):
        segmentor.clip.encode_image(torch.zeros(1, 3, 48, 64))


# The decoders and their text


def test_vocabulary_and_best_synonym() -> None:
    segmentor = small_mask_segmentor()
    vocabulary = segmentor.vocabulary(["cat", "river, stream,water"])
    assert vocabulary.synonyms == (1, 3)
    assert tuple(vocabulary.rows.shape) == (4, 16)
    torch.testing.assert_close(vocabulary.rows.norm(dim=1), torch.ones(4))
    with torch.no_grad():
        pixels = preprocess(picture(64, 64)[None], segmentor.clip)
        together = segmentor(pixels, vocabulary).clip_logits
        apart = segmentor(pixels, segmentor.vocabulary(["cat", "river", "stream", "water"])).clip_logits
    torch.testing.assert_close(together[..., 1], apart[..., 1:4].max(dim=-1).values)
    for wrong in ([], ["cat", ""], ["cat, "]):
        with pytest.raises(DataError):
            segmentor.vocabulary(wrong)


def test_no_gradient_reaches_clip_through_the_decoders() -> None:
    segmentor = small_mask_segmentor()
    out = segmentor(preprocess(picture(64, 64)[None], segmentor.clip), segmentor.vocabulary(["cat"]))
    sum(p.logits.sum() + p.masks.sum() for p in out.proposals).backward(retain_graph=True)
    assert all(p.grad is None for p in segmentor.clip.parameters())
    out.clip_logits.sum().backward()
    learns = {k for k, p in segmentor.clip.named_parameters() if p.grad is not None}
    assert learns
    assert all(k.startswith("visual.trunk.st") for k in learns)


def test_frozen_clip_keeps_no_graph() -> None:
    segmentor = small_mask_segmentor(transfer=False)
    segmentor.clip.parameter_policy("frozen")
    out = segmentor(preprocess(picture(32, 32)[None], segmentor.clip), segmentor.vocabulary(["cat"]))
    assert not out.dense.requires_grad
    assert out.logits.requires_grad


# Pictures and results


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (31, 33), (64, 64)])
@pytest.mark.parametrize("transfer", [False, True])
def test_pictures_of_any_size(size: tuple[int, int], transfer: bool) -> None:
    segmentor = small_mask_segmentor(transfer=transfer).train()
    prediction = predict_masks(segmentor, picture(*size), segmentor.vocabulary(["cat", "dog"]), EVAL, ["cat"])
    assert segmentor.training
    assert prediction.semantic().shape == (2, *size)
    assert prediction.semantic(masks_first=True).shape == (2, *size)
    found, segments = prediction.panoptic({0})
    assert found.shape == size
    assert set(found.unique().tolist()) <= {0, *(s.id for s in segments)}
    objects = prediction.instances({0}, limit=5)
    assert objects.masks.shape[1:] == size
    assert bool((objects.classes == 0).all())
    assert len(objects.scores) <= 5
    assert bool((objects.scores.diff() <= 0).all())


def test_an_empty_prediction_is_an_empty_map() -> None:
    void = torch.tensor([[-9.0, -9.0, 0.0], [-9.0, -9.0, 0.0]])
    found, segments = panoptic(void, torch.randn(2, 4, 5), {0})
    assert not bool(found.any())
    assert not segments
    nowhere = torch.full((2, 4, 5), -20.0)
    found, segments = panoptic(-void, nowhere, {0})
    assert not bool(found.any())
    assert not segments
    assert len(instances(-void, nowhere, set()).scores) == 0


def test_stuff_is_merged_and_things_are_not() -> None:
    sure = torch.tensor([[10.0, 0.0, 0.0], [10.0, 0.0, 0.0], [0.0, 10.0, 0.0], [0.0, 10.0, 0.0]])
    masks = torch.full((4, 2, 8), -20.0)
    for i in range(4):
        masks[i, :, 2 * i : 2 * i + 2] = 20.0
    found, segments = panoptic(sure.log_softmax(dim=-1), masks, {0})
    assert [(s.id, s.category) for s in segments] == [(1, 0), (2, 0), (3, 1)]
    assert found[0].tolist() == [1, 1, 2, 2, 3, 3, 3, 3]


def test_wrong_pictures() -> None:
    segmentor = small_mask_segmentor()
    vocabulary = segmentor.vocabulary(["cat"])
    with pytest.raises(TypeError, match="expected uint8"):
        predict_masks(segmentor, torch.zeros(3, 8, 8), vocabulary, EVAL)
    with pytest.raises(ValueError, match=r"expected \[3, H, W\]"):
        predict_masks(segmentor, torch.zeros(1, 8, 8, dtype=torch.uint8), vocabulary, EVAL)


def test_ensemble_with_seen_classes() -> None:
    assert overlapping(["cat, kitten", "dog", "river,water"], ["kitten", "water body", "river"]).tolist() == [
        True, False, True
    ]  # fmt: skip
    clip, ours = torch.randn(3, 5), torch.randn(3, 5)
    seen = torch.tensor([True, False, True, False])
    alone = ensemble_probabilities(clip, ours, seen, alpha=0.0, beta=0.0)
    torch.testing.assert_close(alone.exp().sum(dim=-1), torch.ones(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(alone.argmax(dim=-1)[:0], alone.argmax(dim=-1)[:0])
    torch.testing.assert_close(alone[:, :4].softmax(dim=-1), ours[:, :4].softmax(dim=-1), rtol=1e-4, atol=1e-6)
    nothing_valid = ensemble_probabilities(clip, ours, seen, 0.4, 0.8, torch.zeros(3, dtype=torch.bool))
    torch.testing.assert_close(nothing_valid, alone)


# Matching and losses


def test_images_without_objects_and_more_objects_than_proposals() -> None:
    config = MaskConfig(points=16)
    logits = torch.randn(2, 3, 5, requires_grad=True)
    masks = torch.randn(2, 3, 8, 8, requires_grad=True)
    labels = [torch.zeros(0, dtype=torch.int64), torch.tensor([0, 1, 2, 3, 3])]
    objects = [torch.zeros(0, 16, 16), (torch.rand(5, 16, 16) > 0.5).to(torch.uint8)]
    losses = SetCriterion(config)([(logits, masks), (logits, masks)], labels, objects)
    assert set(losses) == {"loss_ce", "loss_mask", "loss_dice", "loss_ce_0", "loss_mask_0", "loss_dice_0"}
    torch.stack(list(losses.values())).sum().backward()
    assert bool(torch.isfinite(logits.grad).all())
    assert not bool(masks.grad[0].any())
    assert bool(masks.grad[1].any())
    rows, columns = hungarian_match(torch.rand(3, 5))
    assert len(rows) == 3
    assert len(set(columns.tolist())) == 3

    nothing = SetCriterion(config)([(logits, masks)], [labels[0]] * 2, [objects[0]] * 2)
    assert float(nothing["loss_mask"]) == 0.0
    assert float(nothing["loss_ce"]) > 0


def test_wrong_objects() -> None:
    criterion = SetCriterion(MaskConfig(points=4))
    proposals = [(torch.randn(1, 3, 5), torch.randn(1, 3, 8, 8))]
    with pytest.raises(ValueError, match=r"outside 0\.\.3"):
        criterion(proposals, [torch.tensor([4])], [torch.ones(1, 8, 8)])
    with pytest.raises(ValueError, match=r"expected \[n\] and \[n, H, W\]"):
        criterion(proposals, [torch.tensor([1, 2])], [torch.ones(1, 8, 8)])
    with pytest.raises(ValueError, match="expected 1 of both"):
        criterion(proposals, [], [])
    with pytest.raises(ValueError, match="not finite"):
        hungarian_match(torch.tensor([[float("nan")]]))


def test_points_of_one_image_and_of_each_mask_agree() -> None:
    maps, points = torch.randn(3, 5, 7), torch.rand(1, 11, 2)
    torch.testing.assert_close(sample_points(maps, points), sample_points(maps, points.expand(3, -1, -1)))


# Settings


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    config = small_mask_config(tmp_path)
    assert isinstance(build_mask_segmentor(config), MaskSegmentor)
    for override, words in (
        ("mask.channels=48", "a multiple of 32"),
        ("mask.queries=0", "at least 1"),
        ("clip.tune=full", "trunk or frozen"),
        ("data.sample_classes=4", "0 with mask proposals"),
        ("eval.overlap_threshold=2", "0 to 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            apply_overrides(config, [override])
    with pytest.raises(ConfigError, match="expected fcclip or maftplus"):
        build_mask_segmentor(Config())
