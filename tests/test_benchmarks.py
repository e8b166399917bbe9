from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco
from small_models import small_config
from small_trees import NAMES, write_tree
from training_data import tiny_config
from typer.testing import CliRunner

from infoclip import cli
from infoclip.data.benchmarks import BENCHMARKS, convert_benchmark, find_forms, open_benchmark
from infoclip.data.files import below, decode_rle, read_image, read_label_map_mat
from infoclip.engine.train import train
from infoclip.errors import ConfigError, DataError, InfoclipWarning
from infoclip.model.checkpoint import save_model
from infoclip.model.segmentor import build_segmentor

pytestmark = pytest.mark.filterwarnings("ignore::infoclip.errors.InfoclipWarning")


def labels(name: str, root: Path, **options: Any) -> list[np.ndarray]:
    return [sample["mask"].numpy() for sample in open_benchmark(name, root, **options)]


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFOCLIP_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_original_and_converted_give_the_known_labels(name: str, tmp_path: Path) -> None:
    expected = write_tree(name, tmp_path)
    for index, got in enumerate(labels(name, tmp_path)):
        assert (got == expected[index]).all(), index
    assert [f.found for f in find_forms(name, tmp_path)] == [False, True]
    folder, made, kept = convert_benchmark(name, tmp_path, progress=False)
    assert (made, kept) == (2, 0)
    assert sorted(p.stem for p in folder.iterdir()) == sorted(NAMES[name])
    again = labels(name, tmp_path, form="converted")
    assert all((a == b).all() for a, b in zip(again, expected, strict=True))
    assert labels(name, tmp_path / BENCHMARKS[name].folder)[0].shape == expected[0].shape  # the data set's own folder


def test_every_class_of_a_list_can_be_written_converted() -> None:
    for benchmark in BENCHMARKS.values():
        assert benchmark.ignore <= (65535 if benchmark.suffix == ".tif" else 255)
        assert benchmark.get


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_a_conversion_that_was_stopped_goes_on(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from infoclip.data import benchmarks

    expected = write_tree(name, tmp_path)
    write, calls = benchmarks._write_picture, []

    def stopping(path: Path, *rest: Any) -> None:
        if path.stem == NAMES[name][1] and "cache" not in path.parts:
            raise KeyboardInterrupt
        calls.append(path)
        write(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(benchmarks, "_write_picture", stopping)
        with pytest.raises(KeyboardInterrupt):
            convert_benchmark(name, tmp_path, progress=False)
    assert len(find_forms(name, tmp_path)[0].pairs) == 1
    assert len(labels(name, tmp_path)) == 2  # half a conversion is passed over for the whole original
    assert convert_benchmark(name, tmp_path, progress=False)[1:] == (1, 1)
    got = labels(name, tmp_path, form="converted")
    assert all((a == b).all() for a, b in zip(got, expected, strict=True))
    assert not list(tmp_path.rglob("*.tmp"))


def test_large_images_of_a847_are_brought_to_the_published_size(tmp_path: Path) -> None:
    """Both sides over 512: the shorter becomes 512, labels by the nearest pixel as OpenCV takes it (floor)."""
    expected = write_tree("a847", tmp_path, (600, 900))
    sample = open_benchmark("a847", tmp_path)[0]
    assert sample["image"].shape == (3, 512, 768)
    rows, columns = np.floor(np.arange(512) * 600 / 512).astype(int), np.floor(np.arange(768) * 900 / 768).astype(int)
    assert (sample["mask"].numpy() == expected[0][rows][:, columns]).mean() > 0.999  # float32 against float64 scale
    convert_benchmark("a847", tmp_path, progress=False)
    again = open_benchmark("a847", tmp_path, form="converted")[0]
    assert (again["mask"] == sample["mask"]).all()
    for path in (tmp_path / "ADE20K_2021_17_01/images_detectron2/validation").iterdir():
        path.unlink()
    (tmp_path / "ADE20K_2021_17_01/images_detectron2/validation").rmdir()
    third = open_benchmark("a847", tmp_path, form="converted")[0]  # original images beside converted masks
    assert torch.equal(third["image"].as_subclass(torch.Tensor), sample["image"].as_subclass(torch.Tensor))


def test_a_part_is_read_with_a_warning_and_nothing_is_refused(tmp_path: Path) -> None:
    write_tree("a150", tmp_path)
    with pytest.warns(InfoclipWarning, match="2 of its 2,000 images"):
        open_benchmark("a150", tmp_path)
    with pytest.raises(DataError, match=r"A-847 is not whole .* missing folder"):
        open_benchmark("a847", tmp_path)
    (tmp_path / "ADEChallengeData2016/annotations/validation/ADE_val_00000002.png").unlink()
    with pytest.raises(DataError, match=r"1 of 2 masks .*ADE_val_00000002"):
        open_benchmark("a150", tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'a150'"):
        open_benchmark("a15", tmp_path)


def test_values_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    write_tree("a150", tmp_path)
    path = tmp_path / "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png"
    Image.fromarray(np.full((40, 56), 200, np.uint8)).save(path)
    with pytest.raises(DataError, match="label 200"):
        labels("a150", tmp_path)


def test_masks_of_pc59_are_unpacked_once(tmp_path: Path) -> None:
    expected = write_tree("pc59", tmp_path)
    labels("pc59", tmp_path)
    cached = sorted((tmp_path / "cache/data").rglob("*.png"))
    assert [p.stem for p in cached] == list(NAMES["pc59"])
    before = [p.stat().st_mtime_ns for p in cached]
    assert (labels("pc59", tmp_path)[1] == expected[1]).all()
    assert [p.stat().st_mtime_ns for p in cached] == before


# What others wrote


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "a/../../b", "..\\x", "C:/x", " "])
def test_lists_may_not_lead_out_of_their_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="outside"):
        below(tmp_path, f"{name}", "list.txt")
    write_tree("pas20", tmp_path)
    (tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").write_text(f"{name}\n2007_000033\n")
    if name.strip():
        with pytest.raises(DataError, match="outside"):
            open_benchmark("pas20", tmp_path)


@pytest.mark.parametrize("change", ["file_name", "height", "size", "counts", "runs", "category_id", "images", "text"])
def test_a_lying_json_of_pc59_is_one_sentence(change: str, tmp_path: Path) -> None:
    write_tree("pc59", tmp_path)
    path = tmp_path / "VOCdevkit/VOC2010/trainval_merged.json"
    data = json.loads(path.read_text())
    entry = data["annos_segmentation"][0]
    if change == "file_name":
        data["images"][0]["file_name"] = "../../../x.jpg"
    elif change == "height":
        data["images"][0]["height"] = 10**9
    elif change == "size":
        entry["segmentation"]["size"] = [10**6, 10**6]
    elif change == "counts":
        entry["segmentation"]["counts"] = "ooooooooooooooo"
    elif change == "runs":
        entry["segmentation"]["counts"] = [1, 2, 10**12]
    elif change == "category_id":
        entry["category_id"] = None
    elif change == "images":
        data["images"] = {}
    path.write_text("{" * 200_000 if change == "text" else json.dumps(data))
    with pytest.raises(DataError) as caught:
        labels("pc59", tmp_path)
    assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**31))
def test_rle_is_decoded_as_pycocotools_does(height: int, width: int, share: float, seed: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < share
    code = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    got = decode_rle({"size": [height, width], "counts": code["counts"].decode()}, height, width, "x")
    assert (got == mask).all()


@pytest.mark.parametrize("counts", ["P", "0P", "PPPPPPP0", "", "é0", 7, None, "000", [5, 12], [-1, 17], [True, 15]])
def test_rle_codes_that_would_lead_a_decoder_astray(counts: Any) -> None:
    with pytest.raises(DataError, match="is damaged"):
        decode_rle({"size": [4, 4], "counts": counts}, 4, 4, "x")


def test_matlab_files_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "a.mat"
    scipy.io.savemat(path, {"LabelMap": np.ones((40, 50), np.uint16)}, do_compression=True)
    whole = path.read_bytes()
    bomb = zlib.compress(b"\0" * 900_000_000, 9)
    for content in (
        b"",
        whole[:100],
        whole[:-20],
        whole[:128] + struct.pack("<II", 15, len(bomb)) + bomb,
        whole[:128] + struct.pack("<II", 14, 2**31) + b"\0" * 64,
        b"MATLAB 7.3 MAT-file".ljust(126) + b"IM" + b"\x89HDF",
    ):
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            read_label_map_mat(path)
        assert "\n" not in str(caught.value)
    for value in (np.ones((2, 2, 2)), np.array(["a"]), np.full((3, 3), 0.5), np.zeros((0, 3))):
        scipy.io.savemat(path, {"LabelMap": value})
        with pytest.raises(DataError):
            read_label_map_mat(path)


@pytest.mark.filterwarnings("error")
def test_a_decompression_bomb_is_refused_from_its_head(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    data = struct.pack(">I", 2**20) + b"IDAT" + b"\0" * 1000
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data)
    with pytest.raises(DataError, match="100,000,000 pixels"):
        read_image(path)
    Image.new("L", (12_000, 9_000)).save(path)  # over our limit, below Pillow's
    with pytest.raises(DataError, match="12000 x 9000"):
        read_image(path)


def test_a_link_that_leads_to_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.symlink_to(path)
    with pytest.raises(DataError, match=r"a\.png"):
        read_image(path)
    write_tree("a847", tmp_path)
    folder = tmp_path / "ADE20K_2021_17_01/images/ADE/validation"
    (folder / "urban" / "again").symlink_to(folder, target_is_directory=True)
    assert len(open_benchmark("a847", tmp_path)) == 2


# The command line


def test_check_says_what_is_there_and_what_is_wrong(tmp_path: Path) -> None:
    write_tree("a150", tmp_path)
    picture = tmp_path / "check.png"
    good = call("data", "check", "a150", "--root", tmp_path, "--out", picture, "--quiet")
    assert good.exit_code == 0, good.output
    assert "A-150, original: 2 pairs (of 2,000)" in good.stdout
    assert "2 pairs can be used, 0 cannot" in good.stdout
    assert Image.open(picture).width > 1000
    base = tmp_path / "ADEChallengeData2016"
    Image.new("L", (3, 3)).save(base / "annotations/validation/ADE_val_00000001.png")
    bad = call("data", "check", "a150", "--root", tmp_path, "--out", picture, "--quiet")
    assert bad.exit_code == 2
    assert "is 3x3 pixels, its image" in bad.stdout
    assert "1 pairs cannot be used" in bad.stderr
    nothing = call("data", "check", "pas20", "--root", tmp_path, "--quiet")
    assert nothing.exit_code == 2
    assert "to be had from" in nothing.stdout
    assert "host.robots.ox.ac.uk" in nothing.stdout
    assert "a847" in call("data", "list").stdout


def test_check_of_own_folders(tmp_path: Path) -> None:
    from training_data import write_folders

    root = write_folders(tmp_path / "mine")
    arguments = ("data", "check", "--root", root, "--classes", root / "classes.txt", "--quiet")
    result = call(*arguments, "--out", tmp_path / "c.png")
    assert result.exit_code == 0, result.output
    assert "7 pairs can be used, 0 cannot" in result.stdout
    (root / "images/3.png").write_bytes(b"no picture")
    assert call(*arguments, "--out", tmp_path / "c.png").exit_code == 2


def test_convert_evaluate_and_train_from_the_command_line(tmp_path: Path) -> None:
    write_tree("pas20b", tmp_path)
    config = small_config(tmp_path)
    torch.manual_seed(0)
    save_model(build_segmentor(config), config, ["aeroplane", "sky"], tmp_path / "model")
    scores = []
    for _ in range(2):  # from the original, then from the converted masks
        result = call("evaluate", tmp_path / "model", "--data", "pas20b", "--root", tmp_path, "--out",
                      tmp_path / "o", "--quiet")  # fmt: skip
        assert result.exit_code == 0, result.output
        data = json.loads((tmp_path / "o/pas20b.json").read_text())
        assert len(data["per_class"]) == 21
        assert data["per_class"][20]["name"] == "background"
        assert data["per_class"][20]["pixels"] > 0
        scores.append(data["overall"])
        assert call("data", "convert", "pas20b", "--root", tmp_path, "--quiet").exit_code == 0
    assert scores[0] == scores[1]


def test_training_reads_coco_stuff_in_either_form(tmp_path: Path) -> None:
    write_tree("coco-train", tmp_path)
    config = tiny_config(tmp_path, steps=1)
    config.data.kind, config.data.benchmark = "benchmark", "coco-train"
    losses = [train(config, tmp_path / "a", progress=False).losses]
    convert_benchmark("coco-train", tmp_path, progress=False)
    config.data.root = str(tmp_path / "coco-stuff")
    losses.append(train(config, tmp_path / "b", progress=False).losses)
    assert losses[0] == losses[1]
