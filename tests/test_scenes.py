"""The generated scenes: classes, splits, exact masks, the same bits everywhere, folders that are safe to repeat."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from infoclip.data import scenes as S
from infoclip.errors import ConfigError, DataError, StorageError

ROOT = Path(__file__).resolve().parent.parent


def test_classes_and_names() -> None:
    assert len(S.SCENE_CLASSES) == len(set(S.SCENE_CLASSES)) == 52
    assert "red striped circle" in S.OBJECT_CLASSES
    assert S.SCENE_CLASSES[48:] == ("grass", "sand", "water", "brick")


def test_attribute_split_hides_one_colour_and_one_shape() -> None:
    seen, unseen = S.split_classes("attribute")
    assert len(unseen) == 21
    assert all("yellow" in name or "cross" in name for name in unseen)
    assert not any("yellow" in name or "cross" in name for name in seen)
    assert sorted(seen + unseen) == sorted(S.SCENE_CLASSES)
    assert set(S.BACKGROUNDS) <= set(seen)


def test_composition_split_shows_every_attribute_and_pair_elsewhere() -> None:
    seen, unseen = S.split_classes("composition")
    assert len(unseen) == 16
    assert sorted(seen + unseen) == sorted(S.SCENE_CLASSES)
    for words in ((c, s) for c in S.COLOURS for s in S.SHAPES):
        assert sum(all(word in name.split() for word in words) for name in seen) == 2
    for texture in S.TEXTURES:
        assert any(texture in name for name in seen)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="attribute or composition"):
        S.split_classes("other")


def test_shapes_types_and_ranges() -> None:
    scenes = S.render_scenes(40, 64, (0, 3), seed=3)
    assert scenes.images.shape == (40, 3, 64, 64)
    assert scenes.images.dtype == torch.uint8
    assert scenes.masks.shape == (40, 64, 64)
    assert scenes.masks.dtype == torch.int64
    assert 0 <= int(scenes.masks.min()) <= int(scenes.masks.max()) < 52
    counts = (scenes.objects >= 0).sum(dim=1)
    assert set(counts.tolist()) == {0, 1, 2, 3}
    images, masks = S.render(40, 64, (0, 3), seed=3)
    assert torch.equal(images, scenes.images)
    assert torch.equal(masks, scenes.masks)
    assert S.render(0, 64)[0].shape == (0, 3, 64, 64)


def test_masks_hold_what_the_scene_says() -> None:
    scenes = S.render_scenes(64, 96, (1, 4), seed=5)
    hidden = 0
    for mask, objects, ground in zip(scenes.masks, scenes.objects.tolist(), scenes.backgrounds.tolist(), strict=True):
        present = set(mask.unique().tolist())
        told = {o for o in objects if o >= 0} | {48 + ground}
        assert present <= told
        hidden += len(told - present)
    assert hidden == 0  # objects keep clear of each other, so that every caption is true of its picture


def test_objects_are_large_enough_to_see() -> None:
    scenes = S.render_scenes(96, 96, (1, 4), seed=6)
    area = torch.stack([(scenes.masks[i] < 48).sum() / (scenes.objects[i] >= 0).sum() for i in range(96)])
    assert float(area.min()) > 150  # pixels an object: more than two patches of 8 x 8, also where they overlap


@pytest.mark.parametrize("shape", S.SHAPES)
def test_mask_is_the_shape_drawn(shape: str) -> None:
    """The visible object, found by its difference from the same scene's ground, is the mask but for the smooth edge."""
    scenes = S.render_scenes(32, 96, (1, 1), seed=9, classes=[f"blue plain {shape}", "sand"])
    blue = scenes.images[:, 2].int() > scenes.images[:, 0].int() + 20  # sand has far more red than blue
    wrong = blue != (scenes.masks < 48)
    border = torch.nn.functional.max_pool2d((scenes.masks < 48).float()[:, None], 3, 1, 1)[:, 0].bool() & ~(
        scenes.masks < 48
    )
    assert not bool((wrong & ~border & (scenes.masks >= 48)).any())  # nothing outside mask and its one-pixel rim
    assert float(wrong.sum()) / float((scenes.masks < 48).sum()) < 0.12


def test_areas_follow_geometry() -> None:
    """Mask areas against the areas of the ideal shapes; a pixel count is off by about its outline's roughness, 3 %."""
    plan_radius = []
    areas: dict[str, list[float]] = {shape: [] for shape in S.SHAPES}
    allowed, grounds = S._allowed(None, 1)
    for block in range(4):
        plan = S._Plan(*S._Draws(32, 96, 100 + block).arrange(1, 1, allowed, grounds, None))
        scenes = S._paint(plan, 96)
        for i in range(32):
            r = float(plan.radius[i, 0])
            plan_radius.append(r)
            areas[S.SHAPES[int(plan.objects[i, 0]) % 4]].append(float((scenes.masks[i] < 48).sum()) / r**2)
    a, b, rho = 2 * 1.06, 2 * 0.36, 0.60
    expected = {"circle": np.pi, "square": (2 * 0.84) ** 2, "triangle": 3 * 3**0.5 * rho**2, "cross": 2 * a * b - b * b}
    for shape, values in areas.items():
        assert np.mean(values) == pytest.approx(expected[shape], rel=0.03), shape


def test_picture_depends_on_seed_and_index_alone() -> None:
    few, many = S.render_scenes(5, 64, seed=1), S.render_scenes(70, 64, seed=1)
    for a, b in zip(few, many, strict=True):
        assert torch.equal(a, b[:5])
    assert not torch.equal(S.render(5, 64, seed=2)[0], few.images)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    again = S.render_scenes(5, 64, seed=1)
    assert torch.equal(state, torch.get_rng_state())  # the caller's generator is left alone
    assert torch.equal(again.images, few.images)


_DIGEST = (
    "import hashlib, torch; from infoclip.data.scenes import render;"
    "i, m = render(64, 96, (0, 4), seed=11);"
    "print(hashlib.sha256(i.numpy().tobytes() + m.numpy().astype('uint8').tobytes()).hexdigest())"
)


def test_same_bits_for_any_thread_count_and_instruction_set() -> None:
    digests = set()
    for threads, level in (("1", "default"), ("3", "avx2"), ("2", "")):
        env = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
        if level:
            env["ATEN_CPU_CAPABILITY"] = level
        done = subprocess.run([sys.executable, "-c", _DIGEST], env=env, capture_output=True, text=True, check=True)
        digests.add(done.stdout.strip())
    images, masks = S.render(64, 96, (0, 4), seed=11)
    digests.add(hashlib.sha256(images.numpy().tobytes() + masks.numpy().astype("uint8").tobytes()).hexdigest())
    assert digests == {GOLDEN_DIGEST}, "the generator draws other pictures: raise GENERATOR_VERSION if that is meant"


# Of the pictures and masks that generator version 1 draws for seed 11.
GOLDEN_DIGEST = "1f21fb08444431bb438baf2ac5979de008f1edf2a7b28234b6773757936c806c"


def test_other_sizes_and_captions_keep_their_bytes() -> None:
    """Everything but the instances, at two more sizes, against what was drawn before there were instances."""
    digest = hashlib.sha256()
    for size, seed in ((64, 5), (192, 2)):
        scenes = S.render_scenes(40, size, (0, 4), seed=seed)
        for field in (scenes.images, scenes.masks, scenes.objects, scenes.backgrounds):
            digest.update(field.contiguous().numpy().tobytes())
        digest.update("\n".join(S.captions(scenes, seed)).encode())
    assert digest.hexdigest() == "aa834475593213ebb0eff254457d58ca6bb77eb2fd28e848acdc8cc6f77debf7"


def test_square_roots_are_those_of_ieee_754() -> None:
    """torch.sqrt does not promise them: MKL rounds 1 of 150 the wrong way on some processors, others on others."""
    x = torch.rand(100, 1000, generator=torch.Generator().manual_seed(0)) * 5000
    # The double root rounded once more is the float root: a float's root keeps 2**-50 away from halfway points.
    assert torch.equal(S._sqrt(x), torch.tensor([math.sqrt(v) for v in x.flatten().tolist()]).view_as(x))


@pytest.mark.parametrize(("size", "seed"), [(96, 11), (64, 5), (192, 2)])
def test_instances_agree_with_the_masks(size: int, seed: int) -> None:
    scenes = S.render_scenes(40, size, (0, 4), seed=seed)
    classes = scenes.instance_classes
    assert classes.shape == (40, 5)
    assert int(scenes.instances.min()) == 1
    of_pixels = classes.gather(1, scenes.instances.flatten(1) - 1).view_as(scenes.masks)
    assert torch.equal(of_pixels, scenes.masks)
    for instances, objects in zip(scenes.instances, scenes.objects, strict=True):
        assert set((instances.unique() - 2).tolist()) - {-1} <= set((objects >= 0).nonzero()[:, 0].tolist())
    assert S.render_scenes(0, 64).instances.shape == (0, 64, 64)


def test_instances_of_one_class_stay_apart_under_occlusion() -> None:
    """Each visible part is the object's own outline, less the outlines of those in front of it."""
    allowed, grounds = S._allowed(["red plain circle", "sand"], 4)
    plan = S._Plan(*S._Draws(32, 64, 3).arrange(4, 4, allowed, grounds, None))
    # Side by side objects hide nothing: here they are moved onto each other.
    plan = plan._replace(centre=32 + (plan.centre - 32) * 0.4)
    scenes = S._paint(plan, 64)
    axis = torch.arange(64) + 0.5
    inside = torch.stack([S._distance(plan, k, axis)[0] < 0 for k in range(4)], dim=1)  # [32, 4, 64, 64]
    assert int((inside.sum(dim=1) > 1).sum()) > 1000  # pixels where objects overlap
    for k in range(4):
        visible = inside[:, k] & ~inside[:, k + 1 :].any(dim=1)
        assert torch.equal(scenes.instances == k + 2, visible)
    assert torch.equal(scenes.instances == 1, scenes.masks == 49)


def test_only_the_given_classes_occur() -> None:
    seen, _ = S.split_classes("attribute")
    scenes = S.render_scenes(64, 64, (1, 3), seed=4, classes=seen)
    allowed = {S.SCENE_CLASSES.index(name) for name in seen}
    assert set(scenes.masks.unique().tolist()) <= allowed
    assert set(S.render_scenes(64, 64, (1, 1), classes=["red plain circle", "sand"]).masks.unique().tolist()) == {0, 49}
    grounds = S.render_scenes(64, 64, (0, 0), classes=["red plain circle"]).masks.unique().tolist()
    assert grounds == [48, 49, 50, 51]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="at least 32 px"):
        S.render(1, 16)
    with pytest.raises(ValueError, match="objects"):
        S.render(1, 64, (2, 9))
    with pytest.raises(ValueError, match="counts"):
        S.render_scenes(3, 64, counts=torch.tensor([1, 2]))
    with pytest.raises(DataError, match="'sky' is no class"):
        S.render(1, 64, classes=["sky"])
    with pytest.raises(DataError, match="no object class"):
        S.render(1, 64, classes=["grass"])


def test_captions_name_what_is_there() -> None:
    scenes = S.render_scenes(80, 64, (0, 3), seed=8)
    texts = S.captions(scenes, seed=8)
    named = 0
    for text, objects, ground in zip(texts, scenes.objects.tolist(), scenes.backgrounds.tolist(), strict=True):
        for name in S.OBJECT_CLASSES:
            assert text.count(name) == objects.count(S.OBJECT_CLASSES.index(name))
        others = [g for g in S.BACKGROUNDS if g != S.BACKGROUNDS[ground]]
        assert not any(other in text for other in others)
        named += S.BACKGROUNDS[ground] in text
    assert 40 < named < 80
    assert texts == S.captions(scenes, seed=8)
    assert texts != S.captions(scenes, seed=9)
    assert all(S.BACKGROUNDS[g] in t for t, g in zip(S.captions(scenes, 8, 1.0), scenes.backgrounds, strict=True))


def _files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_written_folder_is_the_rendered_scenes(tmp_path: Path) -> None:
    root = S.write_scenes(tmp_path / "a", 35, 64, 3)
    images, masks = S.render(35, 64, (1, 4), seed=3)
    assert json.loads((root / "classes.json").read_text()) == list(S.SCENE_CLASSES)
    assert json.loads((root / "scenes.json").read_text())["seed"] == 3
    assert len(list((root / "images").iterdir())) == len(list((root / "masks").iterdir())) == 35
    for i in (0, 31, 34):
        with Image.open(root / f"images/{i:06d}.png") as picture, Image.open(root / f"masks/{i:06d}.png") as mask:
            assert (picture.mode, mask.mode) == ("RGB", "L")
            assert np.array_equal(np.asarray(picture).transpose(2, 0, 1), images[i].numpy())
            assert np.array_equal(np.asarray(mask), masks[i].numpy())


def test_panoptic_folder_holds_the_instances(tmp_path: Path) -> None:
    root = S.write_scenes(tmp_path / "a", 35, 64, 3)
    plain = _files(root)
    S.write_scenes(root, 35, 64, 3, panoptic=True)
    files = _files(root)
    assert plain.items() <= files.items()  # added to the folder, nothing else changed
    assert _files(S.write_scenes(tmp_path / "b", 35, 64, 3, panoptic=True)) == files
    scenes = S.render_scenes(35, 64, (1, 4), seed=3)
    truth = json.loads((root / "panoptic.json").read_text())
    assert [(c["id"], c["name"]) for c in truth["categories"]] == list(enumerate(S.SCENE_CLASSES))
    assert [c["isthing"] for c in truth["categories"]] == [1] * 48 + [0] * 4
    assert [image["id"] for image in truth["images"]] == [a["image_id"] for a in truth["annotations"]]
    for index, annotation in enumerate(truth["annotations"]):
        with Image.open(root / "panoptic" / annotation["file_name"]) as picture:
            assert picture.mode == "RGB"
            colour = np.asarray(picture).astype(np.int64)
        ids = colour @ np.array([1, 256, 65536])
        assert np.array_equal(ids, scenes.instances[index].numpy())
        segments = annotation["segments_info"]
        assert sorted(s["id"] for s in segments) == sorted(set(ids.flatten().tolist()))
        assert sum(s["area"] for s in segments) == 64 * 64
        for s in segments:
            part = ids == s["id"]
            assert s["area"] == part.sum()
            assert set(scenes.masks[index].numpy()[part].tolist()) == {s["category_id"]}
            x, y, w, h = s["bbox"]
            assert part[y : y + h, x : x + w].sum() == s["area"]
            assert part[[y, y + h - 1]].any(axis=1).all()  # the box is tight
            assert part[:, [x, x + w - 1]].any(axis=0).all()


def test_writing_again_changes_nothing_and_mends_what_is_missing(tmp_path: Path) -> None:
    root = S.write_scenes(tmp_path, 6, 64, 0)
    before = _files(root)
    times = {p: p.stat().st_mtime_ns for p in root.rglob("*.*")}
    S.write_scenes(root, 6, 64, 0)
    assert times == {p: p.stat().st_mtime_ns for p in root.rglob("*.*")}
    (root / "images/000002.png").unlink()
    (root / "masks/000003.png").write_bytes(before["masks/000003.png"][:40])  # cut off, as a power cut leaves it
    (root / "images/000004.png").write_bytes(b"")
    S.write_scenes(root, 6, 64, 0)
    assert _files(root) == before


def test_interrupted_writing_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _files(S.write_scenes(tmp_path / "whole", 6, 64, 0))
    real, calls = S._write_png, []

    def stop(path: Path, *rest: object) -> None:
        calls.append(path)
        if len(calls) == 6:
            raise KeyboardInterrupt
        real(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(S, "_write_png", stop)
    with pytest.raises(KeyboardInterrupt):
        S.write_scenes(tmp_path / "part", 6, 64, 0)
    monkeypatch.setattr(S, "_write_png", real)
    assert 0 < len(_files(tmp_path / "part")) < len(whole)
    assert _files(S.write_scenes(tmp_path / "part", 6, 64, 0)) == whole


def test_folder_with_other_contents_is_refused(tmp_path: Path) -> None:
    root = S.write_scenes(tmp_path / "a", 4, 64, 0)
    before = _files(root)
    for arguments, what in (((4, 64, 1), "seed is 0 there and 1 here"), ((5, 64, 0), "count"), ((4, 96, 0), "size")):
        with pytest.raises(DataError, match=what):
            S.write_scenes(root, *arguments)
    with pytest.raises(DataError, match="classes"):
        S.write_scenes(root, 4, 64, 0, classes=["red plain circle"])
    assert _files(root) == before

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "holiday.png").write_bytes(b"picture")
    with pytest.raises(DataError, match=r"holiday\.png"):
        S.write_scenes(mine, 4, 64, 0)
    assert _files(mine) == {"holiday.png": b"picture"}

    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(DataError, match="is a file"):
        S.write_scenes(file, 4, 64, 0)


def test_changed_picture_is_refused(tmp_path: Path) -> None:
    root = S.write_scenes(tmp_path, 4, 64, 0)
    Image.new("RGB", (64, 64)).save(root / "images/000001.png")
    with pytest.raises(DataError, match=r"000001\.png is not the picture"):
        S.write_scenes(root, 4, 64, 0)


def test_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Image.Image, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(StorageError, match="No space left"):
        S.write_scenes(tmp_path / "a", 4, 64, 0)
    assert not list((tmp_path / "a").rglob("*.png*"))
