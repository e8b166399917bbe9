from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from training_data import CLASSES, write_folders

from infoclip.config import Config, DataConfig, apply_overrides
from infoclip.data.classes import class_list_names, load_classes, load_label_map
from infoclip.data.files import read_image, read_mask
from infoclip.data.folders import FolderDataset
from infoclip.data.transforms import PadTo, RandomCropUpTo, ResizeShortestEdge, SSDColor, seeded, training_transform
from infoclip.errors import ConfigError, DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_folders(tmp_path)


def dataset(root: Path, **options: Any) -> FolderDataset:
    return FolderDataset(root / "images", root / "masks", CLASSES, **options)


def fault(root: Path, **options: Any) -> str:
    """The one sentence of the first fault that reading every sample meets."""
    with pytest.raises(DataError) as caught:
        list(dataset(root, **options))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)


# Class lists


@pytest.mark.parametrize(
    ("name", "count"),
    [("coco_stuff_171", 171), ("coco_panoptic_133", 133), ("ade20k_150", 150), ("ade20k_847", 847),
     ("pascal_context_59", 59), ("pascal_context_459", 459), ("voc_20", 20), ("voc_20b", 59)],
)  # fmt: skip
def test_shipped_lists_are_whole(name: str, count: int) -> None:
    classes = load_classes(name)
    assert len(classes) == len(set(classes)) == count
    assert name in class_list_names()


def test_shipped_label_maps() -> None:
    stuff = load_label_map("coco_stuff_171")
    assert sorted(stuff.values()) == list(range(171))
    assert stuff[0] == 0
    assert load_classes("coco_stuff_171")[stuff[0]] == "person"
    assert load_label_map("ade20k_150") == {v: v - 1 for v in range(1, 151)}
    assert load_label_map("voc_20b")[0] == 20
    assert 255 not in load_label_map("voc_20b")
    assert 0 not in load_label_map("pascal_context_59")  # its id 0 means no label
    assert sorted(load_label_map("pascal_context_59").values()) == list(range(59))


def test_class_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("# mine\nred circle\n\n  sky, heaven \n")
    assert load_classes(tmp_path / "a.txt") == ["red circle", "sky, heaven"]
    (tmp_path / "b.json").write_text('["x", "y"]')
    assert load_classes(tmp_path / "b.json") == ["x", "y"]
    (tmp_path / "c.json").write_text('{"classes": ["x"], "source_ids": {"7": 0}}')
    assert load_classes(tmp_path / "c.json") == ["x"]
    assert load_label_map(tmp_path / "c.json") == {7: 0}


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("e.txt", "\n# nothing\n", "No class in"),
        ("e.json", "[]", "No class in"),
        ("d.txt", "a\nb\na\n", r"'a' is in .*d.txt twice \(positions 0 and 2\)"),
        ("n.json", '["a", " "]', "Class 1 in .* has no name"),
        ("m.json", '["a", 3]', "list of names"),
        ("j.json", "[", "is not JSON"),
    ],
)
def test_faulty_class_files(tmp_path: Path, file: str, content: str, sentence: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=sentence):
        load_classes(tmp_path / file)


def test_unknown_class_list_names_the_nearest() -> None:
    with pytest.raises(DataError, match="did you mean 'ade20k_150'"):
        load_classes("ade20k150")


def test_faulty_label_map(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="must be a JSON object of annotation value and class index"):
        load_label_map(tmp_path / "m.json")


# Folders


def test_sample(root: Path) -> None:
    data = dataset(root)
    assert len(data) == 7
    sample = data[2]
    assert isinstance(sample["image"], tv_tensors.Image)
    assert isinstance(sample["mask"], tv_tensors.Mask)
    assert sample["image"].shape == (3, 40, 48)
    assert sample["image"].dtype == torch.uint8
    assert sample["mask"].shape == (40, 48)
    assert sample["mask"].dtype == torch.int64
    assert sample["file"].endswith("2.png")
    expected = np.array(Image.open(root / "images/2.png"))
    assert (sample["image"].permute(1, 2, 0).numpy() == expected).all()
    assert (sample["mask"].numpy() == np.array(Image.open(root / "masks/2.png"))).all()


def test_sub_folders_pair_by_path_and_suffixes_may_differ(root: Path) -> None:
    for kind, suffix in (("images", "jpg"), ("masks", "tif")):
        (root / kind / "park").mkdir()
        Image.open(root / kind / "0.png").save(root / kind / "park" / f"0.{suffix}")
    (root / "masks" / "spare.png").write_bytes((root / "masks" / "0.png").read_bytes())
    data = dataset(root)
    assert len(data) == 8
    assert [p.name for pair in data.pairs[-1:] for p in pair] == ["0.jpg", "0.tif"]
    assert (data[7]["mask"] == data[0]["mask"]).all()


def test_mask_formats_hold_the_same_labels(root: Path) -> None:
    expected = read_mask(root / "masks/0.png")
    array = expected.numpy().astype(np.uint8)
    palette = Image.fromarray(array, mode="P")
    palette.putpalette([i * 7 % 256 for i in range(768)])
    palette.save(root / "p.png")
    Image.fromarray(array.astype(np.uint16)).save(root / "w.png")
    Image.fromarray(array.astype(np.uint16)).save(root / "w.tif")
    for name in ("p.png", "w.png", "w.tif"):
        assert torch.equal(read_mask(root / name), expected), name
    Image.fromarray(np.full((4, 4), 65535, np.uint16)).save(root / "big.tif")
    assert int(read_mask(root / "big.tif").max()) == 65535


def test_exif_rotation_is_applied_to_images(tmp_path: Path) -> None:
    array = np.zeros((8, 16, 3), np.uint8)
    array[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    Image.fromarray(array).save(tmp_path / "a.png", exif=exif)
    image = read_image(tmp_path / "a.png")
    assert image.shape == (3, 16, 8)
    assert (image[:, :8] == 255).all()
    assert (image[:, 8:] == 0).all()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_every_image_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    grey = Image.fromarray(np.full((4, 6), 255, np.uint8))
    if mode == "I;16":
        picture = Image.fromarray(np.full((4, 6), 65535, np.uint16))
    else:
        picture = grey.convert("RGB").convert(mode)
    picture.save(tmp_path / "a.tif")
    image = read_image(tmp_path / "a.tif")
    assert image.shape == (3, 4, 6)
    assert image.dtype == torch.uint8
    assert (image == 255).all()


def test_seen_classes_only(root: Path) -> None:
    whole, seen = dataset(root), dataset(root, train_classes=["water", "red circle"])
    assert seen.classes == ["water", "red circle"]
    before, after = whole[0]["mask"], seen[0]["mask"]
    expected = torch.full_like(before, 255)
    expected[before == 4], expected[before == 0] = 0, 1
    assert torch.equal(after.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))


def test_label_map_translates_and_ignores_the_rest(root: Path) -> None:
    before = dataset(root)[0]["mask"]
    after = dataset(root, label_map={0: 3, 4: 1, 200: 0})[0]["mask"]
    assert set(after.unique().tolist()) == {1, 3, 255}
    assert (after[before == 0] == 3).all()
    assert (after[before == 4] == 1).all()
    assert (after[before == 2] == 255).all()


def test_missing_mask(root: Path) -> None:
    (root / "masks/3.png").unlink()
    assert "1 of 7 images" in fault(root)
    assert "3.png" in fault(root)


def test_missing_and_empty_folder(root: Path) -> None:
    for kind in ("images", "masks"):
        (root / kind).rename(root / "away")
        assert f"There is no folder of {kind} {root / kind}" in fault(root)
        (root / kind).mkdir()
        assert f"There is no {kind[:-1]} in {root / kind}" in fault(root)
        (root / kind).rmdir()
        (root / "away").rename(root / kind)


def test_two_files_of_one_name(root: Path) -> None:
    Image.open(root / "images/0.png").save(root / "images/0.jpg")
    assert "Two images have one name" in fault(root)


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_unreadable_file(root: Path, kind: str) -> None:
    path = root / kind / "5.png"
    whole = path.read_bytes()
    for content in (b"", b"not a picture", whole[: len(whole) // 2]):
        path.write_bytes(content)
        assert f"{kind[:-1]} {path}" in fault(root)


def test_mask_of_another_size(root: Path) -> None:
    Image.fromarray(np.zeros((40, 47), np.uint8)).save(root / "masks/1.png")
    message = fault(root)
    assert "masks/1.png is 47x40" in message
    assert "48x40; expected the same size" in message


def test_mask_of_an_exif_rotated_image_names_the_cause(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(root / "images/0.png").save(root / "images/0.png", exif=exif)
    assert "EXIF rotation" in fault(root)


def test_label_out_of_range(root: Path) -> None:
    mask = np.array(Image.open(root / "masks/6.png"))
    mask[5, 5:7] = 9
    Image.fromarray(mask).save(root / "masks/6.png")
    message = fault(root)
    assert "masks/6.png holds the label 9 at 2 pixels; with 5 classes expected 0 to 4, or 255" in message


def test_colour_mask(root: Path) -> None:
    Image.open(root / "images/0.png").save(root / "masks/0.png")
    assert "is a RGB picture; expected one channel" in fault(root)


def test_class_lists_of_a_dataset(root: Path) -> None:
    assert "'sky' is not one of the 5 classes" in fault(root, train_classes=["sky"])
    assert "did you mean 'grass'" in fault(root, train_classes=["gras"])
    assert "twice" in fault(root, train_classes=["sand", "sand"])
    assert "The ignored mask value 3 is also the index of the class 'sand'" in fault(root, ignore_index=3)
    assert "sends 7 to class 5" in fault(root, label_map={7: 5})


# Transforms


def positions(height: int, width: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """An image and a mask that both say which pixel they are of (16 x 16 blocks, so that resizing keeps it)."""
    rows = torch.arange(height)[:, None].expand(height, width) // 16
    columns = torch.arange(width)[None].expand(height, width) // 16
    code = rows * 16 + columns
    image = torch.stack([rows * 16, columns * 16, torch.zeros_like(rows)]).to(torch.uint8)
    return tv_tensors.Image(image), tv_tensors.Mask(code)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(100, 200, (50, 100)), (200, 100, (100, 50)), (100, 1000, (8, 80)), (33, 47, (50, 71))],
)
def test_resize_shortest_edge(height: int, width: int, expected: tuple[int, int]) -> None:
    image, mask = positions(height, width)
    small, labels = ResizeShortestEdge(50, 101 if width < 1000 else 80)(image, mask)
    assert tuple(small.shape[-2:]) == tuple(labels.shape[-2:]) == expected
    assert isinstance(small, tv_tensors.Image)
    assert isinstance(labels, tv_tensors.Mask)
    assert labels.dtype == torch.int64


def test_sizes_are_drawn_evenly_by_the_seed(tmp_path: Path) -> None:
    image, mask = positions(100, 200)
    transform = training_transform(DataConfig(min_sizes=(32, 48, 64), crop=0, flip=False, color_jitter=False))
    seen = []
    for seed in range(300):
        sample = seeded(transform, seed, {"image": image, "mask": mask, "file": "x"})
        assert sample["image"].shape[-2:] == sample["mask"].shape[-2:]
        again = seeded(transform, seed, {"image": image, "mask": mask, "file": "x"})
        assert torch.equal(sample["image"], again["image"])
        seen.append(tuple(sample["mask"].shape))
    counts = [seen.count(size) for size in ((32, 64), (48, 96), (64, 128))]
    assert sum(counts) == 300
    assert min(counts) > 60  # 100 each on average, five standard deviations are 41
    with pytest.raises(ConfigError, match=r"data\.min_sizes"):
        apply_overrides(Config(), ["data.min_sizes=0,384"])
    with pytest.raises(ConfigError, match=r"without data\.scales"):
        apply_overrides(Config(), ["data.min_sizes=384,512", "data.scales=0.1,2"])


def test_resized_masks_are_not_shifted() -> None:
    """Twice the size and back by nearest centres is the identity; the legacy nearest rule would shift."""
    mask = tv_tensors.Mask(torch.arange(36).reshape(6, 6))
    up = ResizeShortestEdge(18)(mask)
    assert torch.equal(up[1::3, 1::3].as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor))
    assert torch.equal(ResizeShortestEdge(6)(up).as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor))


def test_image_and_mask_move_together() -> None:
    transform = training_transform(DataConfig(resize=128, crop=64, color_jitter=False, flip=True))
    flipped = 0
    for seed in range(12):
        image, mask = positions(128, 160)
        sample = seeded(transform, seed, {"image": image, "mask": mask, "file": "x"})
        assert sample["image"].shape == (3, 64, 64)
        assert sample["mask"].shape == (64, 64)
        code = sample["image"][0].long() // 16 * 16 + sample["image"][1].long() // 16
        assert torch.equal(code.as_subclass(torch.Tensor), sample["mask"].as_subclass(torch.Tensor))
        flipped += int(sample["mask"][0, 0] > sample["mask"][0, -1])
    assert 0 < flipped < 12


def test_padding_is_right_and_below_with_grey_and_no_label() -> None:
    image, mask = positions(20, 30)
    wide, labels = PadTo(40, 255)(image, mask)
    assert wide.shape == (3, 40, 40)
    assert labels.shape == (40, 40)
    assert torch.equal(wide[:, :20, :30].as_subclass(torch.Tensor), image.as_subclass(torch.Tensor))
    assert (wide[:, 20:] == 128).all()
    assert (wide[:, :, 30:] == 128).all()
    assert (labels[20:] == 255).all()
    assert (labels[:, 30:] == 255).all()


def test_the_single_category_rule_of_crops() -> None:
    """A picture whose left half is one class: crops hold both classes, unless ten tries found none."""
    mask = torch.zeros(40, 200, dtype=torch.int64)
    mask[:, 100:] = 1
    mask[:, ::7] = 255  # without a label: counts for nothing
    sample = {"image": tv_tensors.Image(torch.zeros(3, 40, 200, dtype=torch.uint8)), "mask": tv_tensors.Mask(mask)}

    def shares(max_share: float) -> list[float]:
        found = []
        for seed in range(60):
            cut = seeded(RandomCropUpTo(40, max_share), seed, sample)["mask"].as_subclass(torch.Tensor)
            counts = cut[cut != 255].unique(return_counts=True)[1]
            found.append(float(counts.max() / counts.sum()))
        return found

    plain, ruled = shares(1.0), shares(0.75)
    assert sum(s == 1.0 for s in plain) > 30
    assert sum(s < 0.75 for s in plain) < 15  # a window of 40 fits so at 20 of 161 places
    assert sum(s < 0.75 for s in ruled) > 35  # 1 - (1 - 20 / 161) ** 10 = 0.73 of 60, less four deviations
    assert shares(0.75) == ruled
    again = seeded(training_transform(DataConfig(resize=0, crop=40, crop_max_share=1.0)), 3, sample)
    first = seeded(training_transform(DataConfig(resize=0, crop=40)), 3, sample)
    assert torch.equal(again["mask"].as_subclass(torch.Tensor), first["mask"].as_subclass(torch.Tensor))


def test_crop_keeps_a_side_that_is_smaller() -> None:
    image, mask = positions(20, 90)
    window, labels = RandomCropUpTo(40)(image, mask)
    assert window.shape == (3, 20, 40)
    assert labels.shape == (20, 40)


def test_colour_distortion_leaves_masks_and_range() -> None:
    image, mask = positions(32, 32)
    changed = 0
    for seed in range(20):
        sample = seeded(SSDColor(), seed, {"image": image, "mask": mask})
        assert torch.equal(sample["mask"].as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor))
        assert sample["image"].dtype == torch.uint8
        changed += int(not torch.equal(sample["image"], image))
    assert changed >= 15  # all four steps are skipped with chance 1/16


def test_grey_stays_grey_under_colour_distortion() -> None:
    """Hue and saturation act in colour space, and channels are never permuted: grey has no colour to change."""
    grey = tv_tensors.Image(torch.full((3, 8, 8), 120, dtype=torch.uint8))
    for seed in range(20):
        out = seeded(SSDColor(), seed, {"image": grey, "mask": tv_tensors.Mask(torch.zeros(8, 8))})["image"]
        # one grey level: the HSV round trip of hue rounds in float32
        assert (out.amax(0).int() - out.amin(0).int()).max() <= 1


def test_seeded_puts_the_generator_back() -> None:
    image, mask = positions(32, 32)
    transform = training_transform(DataConfig(resize=32, crop=16))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = seeded(transform, 9, {"image": image, "mask": mask})
    assert torch.equal(torch.rand(3), expected)
    two = seeded(transform, 9, {"image": image, "mask": mask})
    assert torch.equal(one["image"], two["image"])


def test_label_map_file_reaches_the_dataset(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"0": 1}))
    assert set(dataset(root, label_map=load_label_map(path))[0]["mask"].unique().tolist()) == {1, 255}
