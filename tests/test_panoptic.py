from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from infoclip.cli import app
from infoclip.data.panoptic import (
    Category,
    Segment,
    encode_segment_ids,
    ids_from_masks,
    match_categories,
    open_panoptic,
    panoptic_json,
    read_annotations,
    segments_info,
)
from infoclip.data.scenes import SCENE_CLASSES, render_scenes, split_classes, write_scenes
from infoclip.errors import ConfigError, DataError
from infoclip.evaluate.panoptic_run import PanopticMap, evaluate_panoptic, folder_predictor
from infoclip.report.overlay import panoptic_overlay, segment_colors
from infoclip.report.palette import palette

EXACT = 1e-12  # a few float64 operations on integer counts

# The layouts of the published data sets: where the parts lie, how images are numbered, how categories are.
COCO: dict[str, Any] = {
    "name": "coco-panoptic", "folder": "coco", "images": "val2017", "json": "annotations/panoptic_val2017.json",
    "pngs": "panoptic_val2017", "suffix": ".jpg",
    "ids": [139, 285, 632], "stems": ["000000000139", "000000000285", "000000000632"],
    "categories": [Category(1, "person", True), Category(18, "dog", True), Category(118, "floor-wood", False),
                   Category(187, "sky-other-merged", False)],
}  # fmt: skip
ADE20K: dict[str, Any] = {
    "name": "ade20k-panoptic", "folder": "ADEChallengeData2016", "images": "images/validation",
    "json": "ade20k_panoptic_val.json", "pngs": "ade20k_panoptic_val", "suffix": ".jpg",
    "ids": ["ADE_val_00000001", "ADE_val_00000002", "ADE_val_00000003"],
    "stems": ["ADE_val_00000001", "ADE_val_00000002", "ADE_val_00000003"],
    "categories": [Category(0, "wall", False), Category(7, "bed", True), Category(8, "window", True),
                   Category(9, "grass", False)],
}  # fmt: skip
LAYOUTS = [pytest.param(COCO, id="coco"), pytest.param(ADE20K, id="ade20k")]


def a_map(seed: int, height: int = 37, width: int = 53) -> tuple[NDArray[np.int64], list[dict[str, Any]]]:
    """Rectangles over each other with large ids, some pixels without one; crowd flags and categories at random."""
    draw = np.random.default_rng(seed)
    ids = np.zeros((height, width), dtype=np.int64)
    numbers = draw.choice(np.arange(1, 256**3), size=9, replace=False)
    for number in numbers:
        y, x = draw.integers(0, height - 4), draw.integers(0, width - 4)
        ids[y : y + draw.integers(4, 24), x : x + draw.integers(4, 30)] = number
    info = [{"id": int(n), "category": int(draw.integers(4)), "iscrowd": int(draw.random() < 0.15)}
            for n in numbers if (ids == n).any()]  # fmt: skip
    return ids, info


def disturbed(ids: NDArray[np.int64], info: list[dict[str, Any]], seed: int) -> tuple[NDArray[np.int64], list[Any]]:
    """What a fair model might answer: shifted by a few pixels, renumbered, now and then another category."""
    draw = np.random.default_rng(seed + 1000)
    moved = np.roll(ids, tuple(draw.integers(-2, 3, size=2)), axis=(0, 1))
    out = np.zeros_like(moved)
    entries = []
    for k, entry in enumerate(info):
        number, inside = k + 1, moved == entry["id"]
        if draw.random() < 0.15 or not inside.any():
            continue
        out[inside] = number
        category = int(draw.integers(4)) if draw.random() < 0.2 else entry["category"]
        entries.append({"id": number, "category": category, "iscrowd": 0})
    return out, entries


def save_layout(root: Path, layout: dict[str, Any], panoptic: bool = True) -> list[tuple[Any, Any, Any, Any]]:
    """The files as the data set's publishers lay them out, by their own encoding of colours; returns the maps."""
    base = root / layout["folder"]
    (base / layout["images"]).mkdir(parents=True)
    (base / layout["pngs"]).mkdir(parents=True)
    (base / layout["json"]).parent.mkdir(parents=True, exist_ok=True)
    categories, images, annotations, maps = layout["categories"], [], [], []
    for i, (number, stem) in enumerate(zip(layout["ids"], layout["stems"], strict=True)):
        ids, info = a_map(i)
        colour = np.zeros((*ids.shape, 3), dtype=np.uint8)
        for shift in range(3):
            colour[..., shift] = ids // 256**shift % 256
        Image.fromarray(colour).save(base / layout["pngs"] / f"{stem}.png")
        Image.new("RGB", ids.shape[::-1], (40, 90, 30)).save(base / layout["images"] / f"{stem}{layout['suffix']}")
        height, width = ids.shape
        images.append({"id": number, "file_name": f"{stem}{layout['suffix']}", "width": width, "height": height})
        segments = [
            {"id": e["id"], "category_id": categories[e["category"]].id, "iscrowd": e["iscrowd"],
             "area": int((ids == e["id"]).sum()), "bbox": [0, 0, 1, 1]}
            for e in info
        ]  # fmt: skip
        annotations.append({"image_id": number, "file_name": f"{stem}.png", "segments_info": segments})
        maps.append((ids, info, *disturbed(ids, info, i)))
    kinds = [{"id": c.id, "name": c.name, "isthing": int(c.isthing), "supercategory": "any"} for c in categories]
    data = {"info": {}, "images": images, "annotations": annotations, "categories": kinds}
    (base / layout["json"]).write_text(json.dumps(data))
    return maps


def save_predictions(folder: Path, layout: dict[str, Any], maps: list[tuple[Any, Any, Any, Any]]) -> Path:
    (folder / "panoptic").mkdir(parents=True)
    annotations = []
    for number, stem, (_, _, ids, info) in zip(layout["ids"], layout["stems"], maps, strict=True):
        segments = [Segment(e["id"], e["category"]) for e in info]
        (folder / "panoptic" / f"{stem}.png").write_bytes(encode_segment_ids(torch.from_numpy(ids)))
        entry = {"image_id": number, "file_name": f"{stem}.png"}
        annotations.append(
            entry | {"segments_info": segments_info(torch.from_numpy(ids), segments, layout["categories"])}
        )
    (folder / "panoptic.json").write_text(json.dumps(panoptic_json([], annotations, layout["categories"])))
    return folder


def counted_by_hand(maps: list[tuple[Any, Any, Any, Any]], count: int) -> list[tuple[float, float, float] | None]:
    """PQ, SQ, RQ of each category, written down from the definition with one set of pixels for each segment."""
    result: list[tuple[float, float, float] | None] = []
    for category in range(count):
        ious, spurious, missed = [], 0, 0
        for truth, true_info, ours, our_info in maps:
            void = truth == 0
            true = [truth == e["id"] for e in true_info if e["category"] == category and not e["iscrowd"]]
            crowd = np.zeros_like(void)
            for e in [e for e in true_info if e["category"] == category and e["iscrowd"]][-1:]:
                crowd = truth == e["id"]
            left = list(range(len(true)))
            for e in our_info:
                if e["category"] != category:
                    continue
                mine = ours == e["id"]
                best = max(
                    ((mine & true[i]).sum() / ((mine & ~void) | true[i]).sum() if true else 0.0, i) for i in left
                ) if left else (0.0, -1)  # fmt: skip
                if best[0] > 0.5:
                    ious.append(best[0])
                    left.remove(best[1])
                elif (mine & (void | crowd)).sum() / mine.sum() <= 0.5:
                    spurious += 1
            missed += len(left)
        weight = len(ious) + (spurious + missed) / 2
        sq = sum(ious) / len(ious) if ious else 0.0
        result.append(None if weight == 0 else (sq * len(ious) / weight, sq, len(ious) / weight))
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts_are_read_and_counted_as_by_hand(tmp_path: Path, layout: dict[str, Any]) -> None:
    maps = save_layout(tmp_path, layout)
    dataset = open_panoptic(tmp_path, layout["name"])
    assert len(dataset) == 3
    for i, (ids, info, _, _) in enumerate(maps):
        sample = dataset[i]
        assert torch.equal(sample["panoptic"].as_subclass(Tensor), torch.from_numpy(ids))
        assert [(s.id, s.category, s.crowd) for s in sample["segments"]] == [
            (e["id"], e["category"], bool(e["iscrowd"])) for e in info
        ]
        for entry in info:
            assert set(sample["mask"][ids == entry["id"]].tolist()) == {entry["category"]}
        assert set(sample["mask"][ids == 0].tolist()) == {255}
    folder = save_predictions(tmp_path / "ours", layout, maps)
    result = evaluate_panoptic(folder_predictor(folder, dataset), dataset, progress=False)
    want = counted_by_hand(maps, 4)
    assert any(
        v is not None and 0 < v[0] < 1 for v in want
    )  # a test in which everything or nothing matches says little
    for row, value in zip(result.per_class, want, strict=True):
        got = (row.pq, row.sq, row.rq)
        assert got == ((None,) * 3 if value is None else pytest.approx(value, abs=EXACT))
    things = [v for v, c in zip(want, layout["categories"], strict=True) if v and c.isthing]
    stuff = [v for v, c in zip(want, layout["categories"], strict=True) if v and not c.isthing]
    for got_scores, values in ((result.things, things), (result.stuff, stuff), (result.overall, things + stuff)):
        means = [sum(v[k] for v in values) / len(values) for k in range(3)]
        assert [got_scores.pq, got_scores.sq, got_scores.rq] == pytest.approx(means, abs=EXACT)
    # mIoU of the maps, pixel by pixel
    truth = np.concatenate([_categories(ids, info).ravel() for ids, info, _, _ in maps])
    ours = np.concatenate([_categories(ids, info).ravel() for _, _, ids, info in maps])
    labelled = truth >= 0
    ious = [((truth == c) & (ours == c)).sum() / (((truth == c) | (ours == c)) & labelled).sum()
            for c in range(4) if (truth == c).any()]  # fmt: skip
    assert result.semantic.miou == pytest.approx(float(np.mean(ious)), abs=EXACT)


def _categories(ids: NDArray[np.int64], info: list[dict[str, Any]]) -> NDArray[np.int64]:
    out = np.full_like(ids, -1)
    for entry in info:
        out[ids == entry["id"]] = entry["category"]
    return out


def test_coco_names_become_words_and_a_list_replaces_them(tmp_path: Path) -> None:
    save_layout(tmp_path, COCO)
    dataset = open_panoptic(tmp_path, "coco-panoptic")
    assert dataset.classes == ["person", "dog", "floor wood", "sky"]
    assert dataset.things == [0, 1]
    other = open_panoptic(tmp_path / "coco", "coco-panoptic", classes=["man", "hound", "wood floor", "sky"])
    assert other.classes[2] == "wood floor"
    seen = open_panoptic(tmp_path, "coco-panoptic", train_classes=["sky", "dog"])
    sample = seen[0]
    assert {s.category for s in sample["segments"]} <= {0, 1}
    assert {int(v) for v in sample["panoptic"].unique()} - {0} == {s.id for s in sample["segments"]}
    assert seen.things == [1]
    with pytest.raises(DataError, match=r"3 names and .* 4 categories"):
        open_panoptic(tmp_path, "coco-panoptic", classes=["a", "b", "c"])


def test_scenes_are_a_panoptic_data_set(tmp_path: Path) -> None:
    root = write_scenes(tmp_path, 5, 64, 3, panoptic=True)
    dataset = open_panoptic(root)
    assert dataset.classes == list(SCENE_CLASSES)
    assert dataset.things == list(range(48))
    scenes = render_scenes(5, 64, (1, 4), 3)
    for i in range(5):
        sample = dataset[i]
        assert torch.equal(sample["panoptic"].as_subclass(Tensor), scenes.instances[i])
        assert torch.equal(sample["mask"].as_subclass(Tensor), scenes.masks[i])

    def perfect(index: int, image: Tensor) -> PanopticMap:
        return PanopticMap(scenes.instances[index], dataset[index]["segments"], semantic=scenes.masks[index])

    seen, unseen = split_classes("attribute")
    result = evaluate_panoptic(perfect, dataset, seen, progress=False)
    assert result.overall.pq == result.seen.pq == result.unseen.pq == 1.0
    assert result.harmonic == result.semantic_harmonic == 1.0
    assert result.things.categories + result.stuff.categories == sum(row.pq is not None for row in result.per_class)
    assert {row.name for row in result.per_class if row.seen is False} == set(unseen)
    path = result.save(tmp_path / "result")
    assert json.loads(path.read_text())["overall"]["pq"] == 1.0

    def empty(index: int, image: Tensor) -> PanopticMap:
        return PanopticMap(torch.zeros(64, 64, dtype=torch.int64), [])

    nothing = evaluate_panoptic(empty, dataset, progress=False)  # an empty prediction is a score of 0, not a fault
    assert nothing.overall.pq == nothing.semantic.miou == 0.0
    assert math.isnan(nothing.seen.pq)
    assert "PQ" in [str(column.header) for column in nothing.summary_table().columns]


def test_ids_survive_the_three_bytes() -> None:
    ids = torch.tensor([[0, 1, 255], [256, 65536, 256**3 - 1]])
    import io

    colours = np.asarray(Image.open(io.BytesIO(encode_segment_ids(ids)))).astype(np.int64)
    assert np.array_equal(colours @ np.array([1, 256, 65536]), ids.numpy())
    for wrong in (-1, 256**3):
        with pytest.raises(ValueError, match="segment ids"):
            encode_segment_ids(torch.tensor([[wrong]]))


def test_masks_that_overlap_are_no_panoptic_map() -> None:
    masks = torch.zeros(3, 4, 5, dtype=torch.bool)
    masks[0, :2], masks[2, 2:] = True, True
    assert ids_from_masks(masks).unique().tolist() == [1, 3]
    masks[1, 1, 4] = True
    with pytest.raises(DataError, match=r"masks 0 and 1 overlap .first at row 1, column 4"):
        ids_from_masks(masks)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda d: d["annotations"][0]["segments_info"].extend(d["annotations"][0]["segments_info"]), "twice; ids"),
        (lambda d: d["annotations"].append(d["annotations"][0]), "image 139 twice"),
        (lambda d: d["annotations"][0]["segments_info"][0].update(id=0), "the id 0; expected 1 to 16,777,215"),
        (lambda d: d["annotations"][0]["segments_info"][0].update(category_id=99), "unknown category 99"),
        (lambda d: d["annotations"][0]["segments_info"][0].pop("category_id"), "no usable category_id"),
        (lambda d: d["annotations"][0].update(image_id=7), "not among its images"),
        (lambda d: d["categories"].append(d["categories"][0]), "category id 1 twice"),
        (lambda d: d["categories"][1].pop("isthing"), "'dog' .* does not say whether it is a thing"),
        (lambda d: d.pop("annotations"), "no list of annotations"),
        (lambda d: d.pop("images"), "names no images"),
        (lambda d: d.update(annotations=[]), "no annotation"),
    ],
)  # fmt: skip
def test_annotations_that_cannot_be(tmp_path: Path, change: Any, part: str) -> None:
    save_layout(tmp_path, COCO)
    path = tmp_path / "coco/annotations/panoptic_val2017.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(DataError, match=part):
        open_panoptic(tmp_path, "coco-panoptic")


def test_png_and_json_that_do_not_belong_together(tmp_path: Path) -> None:
    maps = save_layout(tmp_path, COCO)
    pngs = tmp_path / "coco/panoptic_val2017"
    (pngs / "000000000139.png").write_bytes(encode_segment_ids(torch.from_numpy(np.where(maps[0][0] == 0, 5, 0))))
    Image.new("L", (53, 37)).save(pngs / "000000000285.png")
    Image.new("RGB", (20, 10)).save(pngs / "000000000632.png")
    dataset = open_panoptic(tmp_path, "coco-panoptic")
    for index, part in ((0, "the segment 5, which its segments_info does not name"), (1, "a L picture"), (2, "20x10")):
        with pytest.raises(DataError, match=part):
            dataset[index]
    (pngs / "000000000139.png").write_bytes(encode_segment_ids(torch.zeros(37, 53, dtype=torch.int64)))
    with pytest.raises(DataError, match="no pixel of the segment"):
        dataset[0]
    (pngs / "000000000139.png").unlink()
    with pytest.raises(DataError, match="There is no panoptic map"):
        dataset[0]


def test_predictions_that_do_not_fit_the_truth(tmp_path: Path) -> None:
    maps = save_layout(tmp_path, COCO)
    dataset = open_panoptic(tmp_path, "coco-panoptic")
    folder = save_predictions(tmp_path / "ours", COCO, maps)
    path = folder / "panoptic.json"
    data = json.loads(path.read_text())
    swapped = json.loads(path.read_text())
    swapped["categories"][1]["isthing"] = 0
    path.write_text(json.dumps(swapped))
    with pytest.raises(DataError, match="'dog' is stuff there and a thing in the ground truth"):
        folder_predictor(folder, dataset)
    path.write_text(json.dumps(data | {"categories": data["categories"][:3]}))
    with pytest.raises(DataError, match=r"'sky-other-merged' .id 187. is missing"):
        folder_predictor(folder, dataset)
    path.write_text(json.dumps(data | {"annotations": data["annotations"][1:]}))
    with pytest.raises(DataError, match=r"no prediction for 1 of 3 images .first: image 139"):
        folder_predictor(folder, dataset)
    categories = COCO["categories"]
    with pytest.raises(DataError, match="knows no 'cat'"):
        match_categories([*categories, Category(3, "cat", True)], categories, "ours")
    del data["categories"]  # panopticapi's files of predictions may hold the annotations alone
    path.write_text(json.dumps(data))
    assert evaluate_panoptic(folder_predictor(path, dataset), dataset, progress=False).images == 3

    def small(index: int, image: Tensor) -> PanopticMap:
        return PanopticMap(torch.zeros(3, 3), [])

    with pytest.raises(DataError, match="3x3 pixels, the image 53x37"):
        evaluate_panoptic(small, dataset, progress=False)


def run(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_command_line(tmp_path: Path) -> None:
    maps = save_layout(tmp_path, ADE20K)
    folder = save_predictions(tmp_path / "ours", ADE20K, maps)
    out, trained = tmp_path / "counted", tmp_path / "seen.txt"
    trained.write_text("wall\nbed\n")
    where = ("--task", "panoptic", "--data", "ade20k-panoptic", "--root", tmp_path, "-q")
    done = run("evaluate", folder, *where, "--out", out, "--seen", trained, "--per-class")
    assert done.exit_code == 0, done.output
    result = json.loads((out / "evaluation.json").read_text())
    assert f"{100 * result['overall']['pq']:.1f}" in done.output
    assert [row["seen"] for row in result["per_class"]] == [True, True, False, False]
    assert done.output.rstrip().endswith(str(out / "evaluation.html"))
    page = (out / "evaluation.html").read_text()
    assert page.count('class="card panel') == result["images"]
    assert page.count("<figure>") == 3 * result["images"]
    for word in ("thing, seen", "stuff, unseen", "found / spurious / missed", "harmonic mean"):
        assert word in page
    assert f"<h1>{'evaluation'}: {100 * result['overall']['pq']:.1f} PQ</h1>" in page
    wrong = tmp_path / "wrong.txt"
    wrong.write_text("walls\n")
    for words, part in (
        (("evaluate", folder, *where, "--seen", wrong), "did you mean 'wall'"),
        (("evaluate", tmp_path / "nowhere", *where), "There are no predictions"),
        (("evaluate", tmp_path / "ADEChallengeData2016", *where), "holds no panoptic.json"),
        (("evaluate", folder, "sliding_window=false", *where), "a setting of a model"),
        (("evaluate", folder, "--task", "panoptik"), "expected semantic or panoptic"),
    ):
        failed = run(*words)
        assert failed.exit_code == 2
        assert part in failed.stderr
        assert failed.stderr.count("\n") == 1
    checked = run("data", "check", "ade20k-panoptic", "--root", tmp_path, "--out", tmp_path / "check.png", "-q")
    assert checked.exit_code == 0, checked.output
    assert "3 pairs can be used" in checked.output
    assert (tmp_path / "check.png").stat().st_size > 1000
    assert "ade20k-panoptic" in run("data", "list").output


def test_instances_of_one_class_have_their_own_colours() -> None:
    ids = np.zeros((40, 60), dtype=np.int64)
    ids[5:20, 5:20], ids[5:20, 30:50], ids[30:38] = 7, 9, 300
    image = np.full((40, 60, 3), 120, dtype=np.uint8)
    segments = [Segment(7, 1), Segment(9, 1), Segment(300, 0)]
    plain = np.asarray(panoptic_overlay(image, ids, segments, ["ground", "disc"], legend=False))
    assert plain.shape == image.shape
    colours = {number: {tuple(c) for c in plain[ids == number]} for number in (7, 9, 300)}
    assert all(len(found) == 1 for found in colours.values())
    assert len(set.union(*colours.values())) == 3
    more = [Segment(i, 1) for i in range(1, 40)]
    shades = segment_colors([Segment(300, 0), *more])
    assert len({tuple(c) for c in shades.tolist()}) == 40
    assert np.array_equal(shades[:2], palette(2))  # the first of a class has the class's own
    assert np.ptp(plain[0, 59]) == 0  # void stays grey
    assert panoptic_overlay(image, ids, segments, ["ground", "disc"]).width > 60


def test_data_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'coco-panoptic'"):
        open_panoptic(tmp_path, "coco-panoptik")
    with pytest.raises(DataError, match="COCO panoptic val2017 is not whole: missing folder"):
        open_panoptic(tmp_path, "coco-panoptic")
    (tmp_path / "x.json").write_text("[1")
    with pytest.raises(DataError, match="not JSON"):
        read_annotations(tmp_path / "x.json")
    with pytest.raises(DataError, match="check the path"):
        read_annotations(tmp_path / "y.json")
