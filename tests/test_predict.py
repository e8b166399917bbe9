from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small_models import small_config

from infoclip.errors import CheckpointError, DataError, StorageError
from infoclip.model.checkpoint import save_model
from infoclip.model.segmentor import build_segmentor
from infoclip.predict import output_names, predict

CLASSES = ["red circle", "blue sky", "grass"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    config = small_config(root)
    torch.manual_seed(0)
    return save_model(build_segmentor(config), config, CLASSES, root / "model")


def write_picture(path: Path, size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_three_files_for_each_picture(model: Path, tmp_path: Path) -> None:
    images = [write_picture(tmp_path / "one.png"), write_picture(tmp_path / "two.jpg", (50, 20))]
    out = tmp_path / "out"
    results = predict(model, images, CLASSES, out, device="cpu")
    assert sorted(p.name for p in out.iterdir()) == sorted(
        f"{stem}.{kind}" for stem in ("one", "two") for kind in ("overlay.png", "labels.png", "json")
    )
    for result, image, size in zip(results, images, [(40, 30), (50, 20)], strict=True):
        info = json.loads(result.json.read_text(encoding="utf-8"))
        assert info["image"] == str(image)
        assert info["model"] == str(model)
        assert info["classes"] == CLASSES
        assert (info["width"], info["height"]) == size
        assert (result.labels.name, result.overlay.name) == (info["labels"], info["overlay"])
        with Image.open(result.labels) as labels, Image.open(result.overlay) as overlay:
            assert labels.size == size
            assert overlay.width > size[0]  # there is a legend
        assert sum(result.shares.values()) == pytest.approx(1, abs=1e-9)


def test_again_replaces_the_files(model: Path, tmp_path: Path) -> None:
    image = write_picture(tmp_path / "one.png")
    predict(model, [image], CLASSES, tmp_path / "out", device="cpu")
    result = predict(model, [image], ["sand"], tmp_path / "out", device="cpu")[0]
    assert json.loads(result.json.read_text())["classes"] == ["sand"]
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_nothing_is_written_when_something_is_wrong(model: Path, tmp_path: Path) -> None:
    good, out = write_picture(tmp_path / "good.png"), tmp_path / "out"
    (tmp_path / "text.png").write_text("no picture")
    cut = tmp_path / "cut.png"
    cut.write_bytes(good.read_bytes()[:-300])
    for images, classes, kind, part in (
        ([good, tmp_path / "none.png"], CLASSES, DataError, "There is no image .*none.png"),
        ([good, tmp_path / "text.png"], CLASSES, DataError, "Cannot read the image .*text.png"),
        ([good, cut], CLASSES, DataError, "Cannot read the image .*cut.png"),
        ([good, tmp_path], CLASSES, DataError, "is a folder"),
        ([], CLASSES, DataError, "no picture"),
        ([good], [], DataError, "at least one"),
        ([good], ["a", "a"], DataError, "twice"),
        ([good], ["word " * 40], DataError, "context"),
    ):
        with pytest.raises(kind, match=part):
            predict(model, images, classes, out, device="cpu")
        assert not out.exists()
    with pytest.raises(CheckpointError, match="no model at"):
        predict(tmp_path / "nothing", [good], CLASSES, out)
    assert not out.exists()


def test_a_place_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    image = write_picture(tmp_path / "one.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Cannot write to"):
        predict(model, [image], CLASSES, tmp_path / "file" / "out", device="cpu")


def test_names_of_alike_pictures() -> None:
    def names(*paths: str) -> list[str]:
        return output_names([Path(p) for p in paths])

    assert names("/x/cat.jpg", "/y/dog.png") == ["cat", "dog"]
    assert names("/x/cat.jpg", "/y/cat.jpg") == ["x_cat", "y_cat"]
    assert names("/x/cat.jpg", "/x/cat.png") == ["cat_jpg", "cat_png"]
    assert names("/x/cat.jpg", "/x/cat.png", "/y/cat.jpg") == ["x_cat_jpg", "x_cat_png", "y_cat_jpg"]
    assert names("/x/cat.jpg", "/x/cat.jpg") == ["cat", "cat-2"]
    assert names("/a/x/cat.jpg", "/b/x/cat.jpg") == ["x_cat_jpg", "x_cat_jpg-2"]


@given(st.lists(st.tuples(st.sampled_from(["x", "y"]), st.sampled_from(["a", "A", "a-2", "x_a", "a_png"]),
                          st.sampled_from(["png", "jpg"])), max_size=9))  # fmt: skip
def test_names_are_never_alike(parts: list[tuple[str, str, str]]) -> None:
    paths = [Path(f"/{folder}/{stem}.{suffix}") for folder, stem, suffix in parts]
    names = output_names(paths)
    assert len({name.lower() for name in names}) == len(paths)
    assert all(path.stem in name for path, name in zip(paths, names, strict=True))
