from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import small_config

import infoclip
from infoclip.api import Model, write_files
from infoclip.errors import CheckpointError, ConfigError, DataError, StorageError
from infoclip.model.checkpoint import save_model
from infoclip.model.segmentor import build_segmentor

CLASSES = ["red circle", "blue sky", "grass"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    config = small_config(root)
    torch.manual_seed(0)
    save_model(build_segmentor(config), config, CLASSES, root / "run" / "model")
    return root / "run"


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return infoclip.load(folder, device="cpu")


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (37, 51, 3), dtype=np.uint8)


def test_every_form_of_a_picture_gives_the_same_labels(model: Model, pixels: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png")
    before = pixels.copy()
    forms: list[Any] = [
        pixels,
        torch.from_numpy(pixels).permute(2, 0, 1),
        Image.fromarray(pixels),
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
    ]
    results = [model.segment(form, CLASSES) for form in forms]
    first = results[0]
    assert first.labels.shape == first.scores.shape == (37, 51)
    assert first.labels.dtype == np.uint16
    assert first.scores.dtype == np.float32
    assert int(first.labels.max()) < 3
    assert 0 <= float(first.scores.min()) <= float(first.scores.max()) <= 1
    for other in results[1:]:
        assert np.array_equal(other.labels, first.labels)
        assert np.array_equal(other.image, pixels)
    assert np.array_equal(pixels, before)


def test_a_picture_is_turned_upright(model: Model, pixels: np.ndarray) -> None:
    picture = Image.fromarray(pixels)
    exif = picture.getexif()
    exif[0x0112] = 6  # to be rotated by 90 degrees clockwise
    picture.info["exif"] = exif.tobytes()
    result = model.segment(picture, CLASSES)
    assert result.labels.shape == (51, 37)
    assert np.array_equal(result.image, np.rot90(pixels, -1))


def test_class_order_only_renumbers(model: Model, pixels: np.ndarray) -> None:
    one, other = model.segment(pixels, CLASSES), model.segment(pixels, CLASSES[::-1])
    # Class attention sums over classes in another order; labels may differ where two scores are equal to rounding.
    agree = np.array([CLASSES[i] for i in one.labels.flat]) == np.array([CLASSES[::-1][i] for i in other.labels.flat])
    assert agree.mean() > 0.995
    assert other.classes == CLASSES[::-1]


def test_the_training_classes_are_the_default(model: Model, pixels: np.ndarray) -> None:
    assert model.segment(pixels).classes == CLASSES
    assert "3 classes" in repr(model)


def test_changed_classes_are_used(model: Model, pixels: np.ndarray) -> None:
    first = model.segment(pixels, ["cat", "dog"])
    second = model.segment(pixels, ["sand", "dog"])
    assert second.classes == ["sand", "dog"]
    assert not np.array_equal(first.scores, second.scores)


def test_the_class_list_travels_with_the_files(model: Model, pixels: np.ndarray, tmp_path: Path) -> None:
    result = model.segment(pixels, [" red circle ", "blue sky", "Wiese, Gräser"])
    paths = result.save(tmp_path / "new" / "folder", "a")
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "a.json",
        "a.labels.png",
        "a.overlay.png",
    ]
    assert all(p.exists() for p in paths)
    info = json.loads((tmp_path / "new" / "folder" / "a.json").read_text(encoding="utf-8"))
    assert info["classes"] == ["red circle", "blue sky", "Wiese, Gräser"]
    assert (info["width"], info["height"]) == (51, 37)
    assert sum(entry["share"] for entry in info["found"]) == pytest.approx(1, abs=3e-6)  # rounded to six digits
    assert sum(result.shares.values()) == pytest.approx(1, abs=1e-9)
    with Image.open(tmp_path / "new" / "folder" / "a.labels.png") as labels:
        assert labels.mode == "L"
        assert np.array_equal(np.asarray(labels), result.labels)


def test_many_classes_need_16_bits(model: Model, pixels: np.ndarray, tmp_path: Path) -> None:
    for count, mode in ((255, "L"), (256, "I;16")):
        result = model.segment(pixels[:8, :8], [f"thing {i}" for i in range(count)])
        result.save(tmp_path, str(count))
        with Image.open(tmp_path / f"{count}.labels.png") as labels:
            assert labels.mode == mode
            assert np.array_equal(np.asarray(labels), result.labels)


@pytest.mark.parametrize(
    ("classes", "part"),
    [
        ([], "at least one"),
        (["cat", "dog", "cat"], "'cat' is in the class list twice"),
        (["cat", "cat "], "twice"),
        (["cat", " "], "no name"),
        (["word " * 40], "The class 'word"),
        ([str(i) for i in range(65536)], "65536 names; expected at most 65535"),
    ],
)
def test_class_lists_that_cannot_be_used(model: Model, pixels: np.ndarray, classes: list[str], part: str) -> None:
    with pytest.raises(DataError, match=part) as error:
        model.segment(pixels, classes)
    assert str(error.value).count("\n") == 0
    assert len(str(error.value)) < 500


def test_classes_of_a_wrong_type(model: Model, pixels: np.ndarray) -> None:
    with pytest.raises(TypeError, match="single string"):
        model.segment(pixels, "cat")
    with pytest.raises(TypeError, match="expected names"):
        model.segment(pixels, ["cat", 3])  # type: ignore[list-item]


def test_pictures_that_cannot_be_used(model: Model, pixels: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    for path, part in ((tmp_path / "none.png", "no image"), (tmp_path / "text.png", "text.png")):
        with pytest.raises(DataError, match=part):
            model.segment(path, CLASSES)
    wrong: list[tuple[Any, type[Exception]]] = [
        (pixels.astype(np.float32), TypeError),
        (pixels[..., 0], ValueError),
        (pixels.transpose(2, 0, 1), ValueError),
        (pixels[:0], ValueError),
        (torch.from_numpy(pixels), ValueError),
        (torch.from_numpy(pixels).permute(2, 0, 1).float(), TypeError),
        (b"bytes", TypeError),
        (None, TypeError),
    ]
    for image, kind in wrong:
        with pytest.raises(kind):
            model.segment(image, CLASSES)


def test_places_and_devices_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model at"):
        infoclip.load(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="expected auto, cpu or cuda"):
        infoclip.load(folder, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            infoclip.load(folder, device="cuda")


def test_files_appear_together_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("old")
    write = Path.write_bytes

    def fail(self: Path, data: Any) -> int:
        if self.name == "b":
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(StorageError, match="No space left on device; free some space"):
        write_files(tmp_path, {"a": b"new", "b": b"new"})
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"
