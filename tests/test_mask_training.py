"""Training by masks: MAFT+, FC-CLIP and plain fine-tuning on panoptic and on semantic data."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import small_mask_config
from torch import Tensor
from torchvision import tv_tensors
from training_data import CLASSES, weights, write_folders, write_panoptic

import infoclip
import infoclip.engine.train as engine
from bench.bounds import MASK_BOUNDS, broken_masks, count_masks
from infoclip.config import Config, DataConfig, MaskConfig, OptimConfig, TrainConfig, apply_overrides
from infoclip.data.objects import Objects, find_objects, object_masks
from infoclip.data.panoptic import Segment, open_panoptic
from infoclip.data.transforms import seeded, training_transform
from infoclip.engine.log import read_log
from infoclip.engine.mask_run import MaskRun, shares
from infoclip.engine.planner import Settings
from infoclip.engine.train import train
from infoclip.errors import ConfigError, DataError, InfoclipWarning, OutOfMemoryError
from infoclip.model.maftplus import MaskSegmentor
from infoclip.objective import SetCriterion, mask_aware_loss
from infoclip.recipes import get_recipe


def mask_config(folder: Path, system: str = "maftplus", panoptic: bool = True, **train: Any) -> Config:
    """A run of seconds on one of the two kinds of data."""
    config = small_mask_config(folder, system)
    values: dict[str, Any] = {"steps": 4, "checkpoint_every": 2, "log_every": 1, "image_every": 0}
    config.train = TrainConfig(**{**values, "threads": 1, "device": "cpu", **train})
    config.optim = OptimConfig(lr=1e-3, clip_lr_multiplier=0.1, schedule="poly")
    common: dict[str, Any] = {"crop": 64, "color_jitter": False, "batch_size": 2, "workers": 0, "images": "images"}
    if panoptic:
        root = write_panoptic(folder / "panoptic-data")
        config.data = DataConfig(
            kind="panoptic", benchmark="", root=str(root), masks="panoptic", classes="", scales=(0.5, 2.0), **common
        )
    else:
        root = write_folders(folder / "data")
        config.data = DataConfig(root=str(root), masks="masks", classes=str(root / "classes.txt"), resize=48, **common)
    return config.validate()


# What learns


@pytest.mark.parametrize(
    ("system", "tune", "panoptic", "terms"),
    [
        ("maftplus", "trunk", True, {"class", "mask", "dice", "mask_aware", "compensation"}),
        ("maftplus", "frozen", False, {"class", "mask", "dice", "mask_aware"}),
        ("fcclip", "frozen", True, {"class", "mask", "dice"}),
        ("fcclip", "trunk", False, {"class", "mask", "dice"}),
    ],
)
def test_a_run(tmp_path: Path, system: str, tune: str, panoptic: bool, terms: set[str]) -> None:
    config = mask_config(tmp_path, system, panoptic, image_every=2)
    config.clip.tune = tune  # type: ignore[assignment]
    before = engine.build_run(config, tmp_path / "never", torch.device("cpu")).segmentor.state_dict()
    result = train(config, tmp_path / "run", progress=False)
    lines = read_log(result.out / "log.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert set(lines[0]["losses"]) == terms
    for line in lines:
        assert sum(line["losses"].values()) == pytest.approx(line["loss"], rel=1e-5)
    model = infoclip.load(result.out)
    assert isinstance(model.segmentor, MaskSegmentor)
    assert (model.segmentor.cdt is not None) == (system == "maftplus")
    assert model.classes == (["person", "dog", "sky"] if panoptic else CLASSES)
    after = model.segmentor.state_dict()
    moved = {k for k in after if not torch.equal(before[k].cpu(), after[k])}
    trunk = {k for k in moved if k.startswith("clip.")}
    assert bool(trunk) == (tune == "trunk")
    assert all(k.startswith(("clip.visual.trunk.stem.", "clip.visual.trunk.stages.")) for k in trunk)
    heads = {k.split(".")[0] for k in moved - trunk}
    assert heads == {"pixel_decoder", "mask_decoder", "void_embedding"} | ({"cdt"} if system == "maftplus" else set())


def test_published_rates() -> None:
    """Groups of the published optimiser (golden ``optim.maft`` has its arithmetic), by our names."""
    base, large, frozen = (get_recipe(name) for name in ("maftplus-base", "maftplus-large", "fcclip-large"))
    assert (base.train.steps, large.train.steps, frozen.train.steps) == (60_000, 55_000, 368_750)
    o, d = base.optim, base.data
    assert (o.lr, o.clip_lr_multiplier, o.weight_decay, o.schedule, o.clip_grad_norm) == (1e-4, 0.1, 2e-5, "poly", 0.01)
    assert (d.resize, d.resize_max, d.crop, d.flip, d.color_jitter, d.batch_size) == (800, 1333, 0, True, False, 8)
    assert (frozen.optim.weight_decay, frozen.data.scales, frozen.data.crop) == (0.05, (0.1, 2.0), 1024)
    assert (base.mask.queries, frozen.mask.queries, frozen.data.batch_size) == (100, 250, 16)
    assert (base.mask.mask_aware_weight, base.mask.compensation_weight) == (1.0, 0.1)


def test_the_teacher_is_steady_unless_asked(tmp_path: Path) -> None:
    """The published code puts its frozen CLIP into training mode, where it drops paths at random."""
    config = mask_config(tmp_path)
    for noisy in (False, True):
        config.mask.teacher_drop_path = noisy
        run = engine.build_run(config, tmp_path / "run", torch.device("cpu"))
        assert isinstance(run, MaskRun)
        image = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(0)
        first, second = (run.teacher.encode_image(image).dense for _ in range(2))
        assert torch.equal(first, second) != noisy
        assert not any(p.requires_grad for p in run.teacher.parameters())


# Exact resume


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    step = engine.Run._train_step

    def limited(self: Any) -> Any:
        if self.step == steps:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(engine.Run, "_train_step", limited)


@pytest.mark.parametrize(
    "changes",
    [
        ["model.memory=balanced", "train.grad_accumulation=2", "data.workers=1"],
        ["model.memory=lean", "mask.teacher_drop_path=true", "mask.student_drop_path=true"],
        ["model.memory=8GiB"],
    ],
)
def test_a_resumed_run_has_the_same_bits(tmp_path: Path, changes: list[str]) -> None:
    config = apply_overrides(mask_config(tmp_path), changes)
    train(config, tmp_path / "whole", progress=False)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "cut", progress=False)
    train(config, tmp_path / "cut", resume=True, progress=False)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert [k for k in whole if not torch.equal(whole[k], cut[k])] == []
    lines = [read_log(tmp_path / name / "log.jsonl") for name in ("whole", "cut")]
    assert [line["losses"] for line in lines[0]] == [line["losses"] for line in lines[1]]


# Memory


def test_at_most_half_of_the_plain_form_is_kept() -> None:
    """At the published size, counted; the recipes take ``balanced``. ``python -m bench bounds`` counts all modes."""
    assert {
        get_recipe(f"{name}-{size}").model.memory for name in ("maftplus", "fcclip") for size in ("base", "large")
    } == {"balanced"}
    kept = count_masks("maftplus-base", ("reference", "balanced"))
    assert broken_masks(kept) == []
    assert kept["balanced"] < MASK_BOUNDS["balanced"] * 10e9  # and the plain form is no larger than it should be


def test_a_budget_chooses_mode_and_micro_batch(tmp_path: Path) -> None:
    config = apply_overrides(mask_config(tmp_path), ["data.batch_size=4"])
    run = engine.build_run(config, tmp_path / "run", torch.device("cpu"))
    wide = run._make_plan(2**40)
    assert wide.settings == Settings("fast", 0, 4)
    tight = run._make_plan(wide.footprint.total - 1)
    assert tight.footprint.total < wide.footprint.total
    assert tight.settings != wide.settings
    with pytest.raises(ConfigError, match=r"leanest step .*64 x 64 pixels\) needs (\d+)MiB; .*data.crop") as refused:
        run._make_plan(2**20)
    least = int(str(refused.value).split("needs ")[1].split("MiB")[0]) * 2**20
    assert run._make_plan(least).settings.micro_batch == 1
    with pytest.raises(ConfigError, match="needs"):
        run._make_plan(least - 2**20)


def test_the_largest_batch_is_planned_for(tmp_path: Path) -> None:
    config = mask_config(tmp_path)
    for changes, size in (
        ([], (64, 64)),
        (["data.scales=", "data.crop=0", "data.resize=40", "data.resize_max=70"], (96, 96)),
        (["data.scales=", "data.crop=0", "data.resize=40", "data.resize_max=70", "data.batch_size=1"], (64, 96)),
        (["data.scales=", "data.crop=0", "data.resize=0"], (64, 64)),  # the pictures are 40 x 56
    ):
        run = engine.build_run(apply_overrides(config, changes), tmp_path / "run", torch.device("cpu"))
        assert run._largest() == size


def test_out_of_memory_repeats_the_step_with_the_same_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = mask_config(tmp_path, steps=2)
    train(apply_overrides(config, ["model.memory=lean"]), tmp_path / "lean", progress=False)
    losses, left = MaskRun._losses, [2]

    def failing(self: Any, *args: Any) -> Any:
        terms, draw = losses(self, *args)
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return terms, draw

    monkeypatch.setattr(MaskRun, "_losses", failing)
    with pytest.warns(InfoclipWarning, match="out of memory at step 1 with"):
        train(config, tmp_path / "run", progress=False)
    a, b = weights(tmp_path / "lean"), weights(tmp_path / "run")
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    left[0] = 99
    with pytest.warns(InfoclipWarning), pytest.raises(OutOfMemoryError, match=r"lower data.batch_size, data.crop or"):
        train(config, tmp_path / "never", progress=False)


# Micro-batches


def test_shares_of_micro_batches_add_up_to_the_batch() -> None:
    generator = torch.Generator().manual_seed(3)
    config = MaskConfig(queries=4, points=8)
    logits = torch.randn(4, 4, 6, generator=generator, dtype=torch.float64)
    mask_logits = torch.randn(4, 4, 8, 8, generator=generator, dtype=torch.float64)
    counts = (2, 0, 6, 1)  # one picture without objects, one with more than proposals
    masks = [(torch.rand(n, 16, 16, generator=generator) > 0.5) for n in counts]
    labels = [torch.arange(n) % 5 for n in counts]
    objects = [Objects(label, label) for label in labels]

    def points(*shape: int, device: Any = None) -> Tensor:  # the same for each mask, however they are divided
        line = torch.linspace(0.03, 0.97, shape[1], dtype=torch.float64)
        return torch.stack((line, (line * 7) % 1), dim=-1).expand(*shape)

    def losses(start: int, stop: int) -> dict[str, Tensor]:
        part = slice(start, stop)
        found = SetCriterion(config, points)([(logits[part], mask_logits[part])], labels[part], masks[part])
        ranking = mask_aware_loss(logits[part], mask_logits[part], labels[part], masks[part])
        return {
            "class": found["loss_ce"],
            "mask": found["loss_mask"],
            "dice": found["loss_dice"],
            "mask_aware": ranking,
        }

    for size in (1, 2, 3):
        total: dict[str, Any] = {}
        for start in range(0, 4, size):
            share = shares(objects[start : start + size], objects, config)
            for name, value in losses(start, start + size).items():
                total[name] = total.get(name, 0.0) + share[name] * value
        for name, value in losses(0, 4).items():
            # In float64, but void's weight of 0.1 is a float32 number there: its relative error is 1.5e-8.
            torch.testing.assert_close(total[name], value, rtol=2e-8, atol=1e-12)


# Data


def test_objects_move_with_their_picture(tmp_path: Path) -> None:
    dataset = open_panoptic(write_panoptic(tmp_path))
    config = DataConfig(crop=48, scales=(0.5, 2.0), color_jitter=False, ignore_index=dataset.ignore_index)
    transform = training_transform(config)
    seen: dict[int, int] = {}
    for seed in range(12):
        sample = seeded(transform, seed, dataset[seed % 5])
        picture, objects = find_objects(sample, dataset.ignore_index)
        assert sample["image"].shape[1:] == picture.shape == (48, 48)
        masks = object_masks(picture, objects)
        assert masks.flatten(1).any(dim=1).all()
        assert int(masks.sum(dim=0).max()) <= 1
        for label, mask in zip(objects.labels.tolist(), masks, strict=True):
            assert set(sample["mask"][mask].tolist()) == {label}
            ids = set(sample["panoptic"][mask].tolist())
            assert len(ids) == 1  # one instance each
            assert 77 not in ids  # crowds are no objects
            # The red channel shows the segment: its mean inside the mask is its value, but for pixels that
            # interpolation mixed at the border.
            red = sample["image"][0][mask].float()
            if mask.sum() > 60:
                value = next(iter(ids)) % 251
                assert abs(float(red.median()) - value) <= 1
            seen[label] = seen.get(label, 0) + 1
    assert set(seen) == {0, 1, 2}
    assert seen[0] > seen[2]  # two persons in most pictures


def test_an_id_like_the_ignored_label_and_a_padded_border() -> None:
    mask = torch.tensor([[0, 0, 255], [1, 1, 255]])
    panoptic = torch.tensor([[255, 255, 255], [4, 9, 255]])  # the last column is padding, filled as masks are
    sample = {
        "mask": tv_tensors.Mask(mask),
        "panoptic": tv_tensors.Mask(panoptic),
        "segments": (Segment(255, 0), Segment(4, 1), Segment(9, 1)),
    }
    picture, objects = find_objects(sample, 255)
    assert objects.labels.tolist() == [1, 1, 0]
    assert object_masks(picture, objects).long().flatten(1).sum(dim=1).tolist() == [1, 1, 2]
    assert (picture[:, 2] == 255).all()
    plain, objects = find_objects({"mask": tv_tensors.Mask(mask)}, 255)
    assert torch.equal(plain, mask)
    assert objects.labels.tolist() == [0, 1]


def test_pictures_without_objects_and_with_too_many(tmp_path: Path) -> None:
    config = mask_config(tmp_path, panoptic=False, steps=3)
    for path in Path(config.data.root, "masks").glob("*.png"):
        Image.fromarray(np.full((40, 48), 255, dtype=np.uint8)).save(path)
    result = train(config, tmp_path / "none", progress=False)
    line = read_log(result.out / "log.jsonl")[-1]
    assert line["losses"]["class"] > 0
    assert line["losses"]["mask"] == line["losses"]["dice"] == line["losses"]["mask_aware"] == 0.0

    config = apply_overrides(mask_config(tmp_path, panoptic=False, steps=2), ["mask.queries=2"])
    write_folders(Path(config.data.root))
    with pytest.warns(InfoclipWarning, match=r"5 objects and mask.queries is 2.*set mask.queries higher"):
        train(config, tmp_path / "many", progress=False)


def test_lists_that_do_not_match(tmp_path: Path) -> None:
    config = mask_config(tmp_path)
    names = tmp_path / "names.txt"
    names.write_text("person\ndog\n")
    with pytest.raises(DataError, match=r"2 names and .*panoptic.json 3 categories"):
        train(apply_overrides(config, [f"data.classes={names}"]), tmp_path / "a", progress=False)
    path = Path(config.data.root) / "panoptic.json"
    data = json.loads(path.read_text())
    del data["categories"][1]["isthing"]
    path.write_text(json.dumps(data))
    with pytest.raises(DataError, match=r"'dog' in .* does not say whether it is a thing"):
        train(config, tmp_path / "b", progress=False)
    assert not (tmp_path / "a" / "config.json").exists()


def test_seen_classes_alone_become_objects(tmp_path: Path) -> None:
    config = mask_config(tmp_path)
    seen = tmp_path / "seen.txt"
    seen.write_text("person\nsky\n")
    run = engine.build_run(
        apply_overrides(config, [f"data.train_classes={seen}"]), tmp_path / "run", torch.device("cpu")
    )
    assert run.classes == ["person", "sky"]
    labels = {label for _ in range(3) for objects in next(run.loader)["objects"] for label in objects.labels.tolist()}
    assert labels <= {0, 1}
    assert labels


def test_scenes_with_instances(tmp_path: Path) -> None:
    config = mask_config(tmp_path)
    config.data = DataConfig(
        kind="scenes", root=str(tmp_path), train_images=3, resize=0, crop=0, batch_size=2, workers=0
    )
    run = engine.build_run(config, tmp_path / "run", torch.device("cpu"))
    batch = next(run.loader)
    assert sum(len(objects.labels) for objects in batch["objects"]) >= 2
    assert batch["map"].shape == batch["mask"].shape


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    config = mask_config(tmp_path)
    for override, words in (
        ("data.scales=2,1", "the smaller first"),
        ("data.scales=1", "two factors"),
        ("mask.no_object_weight=0", "greater than 0"),
        ("clip.tune=attention", "trunk or frozen"),
    ):
        with pytest.raises(ConfigError, match=words):
            apply_overrides(config, [override])
    assert dataclasses.replace(config, data=dataclasses.replace(config.data, scales=())).validate()
