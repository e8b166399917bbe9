from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small_models import save_small_model
from typer.testing import CliRunner

from infoclip.cli import app
from infoclip.errors import CheckpointError, DataError, StorageError
from infoclip.predict import output_names, predict

CLASSES = ["red circle", "blue sky", "grass"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"), CLASSES)


def write_picture(path: Path, size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_three_files_for_each_picture(model: Path, tmp_path: Path) -> None:
    images = [write_picture(tmp_path / "one.png"), write_picture(tmp_path / "two.jpg", (50, 20))]
    out = tmp_path / "out"
    results = predict(model, images, CLASSES, out, device="cpu").results
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
    result = predict(model, [image], ["sand"], tmp_path / "out", device="cpu").results[0]
    assert json.loads(result.json.read_text())["classes"] == ["sand"]
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_nothing_is_written_when_nothing_can_be_done(model: Path, tmp_path: Path) -> None:
    good, out = write_picture(tmp_path / "good.png"), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    for images, classes, part in (
        ([tmp_path / "empty"], CLASSES, "no picture in the folder"),
        ([tmp_path / "x*.png"], CLASSES, "No file matches"),
        ([], CLASSES, "no picture"),
        ([good], [], "at least one"),
        ([good], ["a", "a"], "twice"),
        ([good], ["word " * 40], "context"),
    ):
        with pytest.raises(DataError, match=part):
            predict(model, images, classes, out, device="cpu")
        assert not out.exists()
    with pytest.raises(CheckpointError, match="no model at"):
        predict(tmp_path / "nothing", [good], CLASSES, out)
    assert not out.exists()


def test_a_bad_file_is_reported_and_the_rest_go_on(model: Path, tmp_path: Path) -> None:
    good = [write_picture(tmp_path / "in" / f"{name}.png") for name in ("a", "z")]
    (tmp_path / "in" / "text.png").write_text("no picture")
    (tmp_path / "in" / "cut.png").write_bytes(good[0].read_bytes()[:-300])
    (tmp_path / "in" / "notes.txt").write_text("not looked at")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    images = [tmp_path / "in", tmp_path / "in" / "a.png", tmp_path / "none.png", tmp_path / "in" / "[az].png"]
    done = predict(model, images, CLASSES, tmp_path / "out", device="cpu")
    assert [r.image for r in done.results] == good
    assert [next(n for n in ("cut", "text", "none") if f"{n}.png" in fault) for fault in done.faults] == [
        "cut", "text", "none"
    ]  # fmt: skip
    assert len(list((tmp_path / "out").iterdir())) == 6
    arguments = ["predict", str(model), str(tmp_path / "in"), "--classes", "a,b", "--out", str(tmp_path / "cli")]
    answer = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    assert answer.exit_code == 2
    assert answer.stderr.count("skipped: ") == 2
    assert "2 could not be used and were skipped; the others are in" in answer.stderr
    assert len(list((tmp_path / "cli").iterdir())) == 6
    arguments[2:3], arguments[-1] = [str(tmp_path / "in" / "cut.png")], str(tmp_path / "none")
    answer = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    assert answer.exit_code == 2
    assert "1 could not be used and was skipped; there was no other, and nothing is written." in answer.stderr
    assert not (tmp_path / "none").exists()


def test_what_is_done_is_not_done_again(model: Path, tmp_path: Path) -> None:
    images = [write_picture(tmp_path / f"{name}.png") for name in "abc"]
    out = tmp_path / "out"
    assert len(predict(model, images[:2], CLASSES, out, device="cpu").results) == 2
    before = (out / "a.json").stat().st_mtime_ns
    (out / "b.labels.png").unlink()  # as if stopped before
    done = predict(model, images, CLASSES, out, device="cpu")
    assert ([r.image.stem for r in done.results], done.kept) == (["b", "c"], 1)
    assert (out / "a.json").stat().st_mtime_ns == before
    write_picture(images[0], (60, 20))  # another picture of the same name
    (out / "c.json").write_text("{")
    done = predict(model, images, CLASSES, out, device="cpu")
    assert ([r.image.stem for r in done.results], done.kept) == (["a", "c"], 1)


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
