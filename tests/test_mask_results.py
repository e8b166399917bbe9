"""Panoptic and instance results of a model of mask proposals: from Python, as files, and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from small_models import randomize, save_small_model, small_mask_config
from torch import Tensor
from typer.testing import CliRunner

import infoclip
from infoclip.cli import app
from infoclip.config import EvalConfig
from infoclip.data.panoptic import Segment, open_panoptic, read_annotations
from infoclip.data.scenes import SCENE_CLASSES, write_scenes
from infoclip.errors import ConfigError, DataError
from infoclip.evaluate.panoptic import PanopticMetrics
from infoclip.evaluate.panoptic_run import (
    PanopticMap,
    evaluate_panoptic,
    evaluate_panoptic_folder,
    evaluate_panoptic_model,
)
from infoclip.evaluate.run import evaluate_folder
from infoclip.export import export
from infoclip.model.checkpoint import save_model
from infoclip.model.maftplus import build_mask_segmentor
from infoclip.model.maftplus.inference import predict_masks
from infoclip.predict import predict
from infoclip.segments import InstanceSegmentation, PanopticSegmentation, run_lengths

CLASSES = ["red circle", "dog, hound", "grass"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = small_mask_config(folder)
    config.eval.overlap_threshold, config.eval.instance_threshold = 0.0, 0.0  # random masks: keep what there is
    torch.manual_seed(0)
    segmentor = build_mask_segmentor(config)
    randomize(segmentor, 2)
    return save_model(segmentor, config, CLASSES, folder / "model")


@pytest.fixture(scope="module")
def model(path: Path) -> infoclip.Model:
    return infoclip.load(path, "cpu")


def picture(height: int = 40, width: int = 52, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_pictures(folder: Path, count: int = 3) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(picture(40 + i, 52, i)).save(folder / f"{i}.png")
    return folder


def run(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


# From Python


def test_tasks_of_one_picture(model: infoclip.Model) -> None:
    image = picture()
    assert model.tasks == ("semantic", "panoptic", "instance")
    semantic = model.segment(image, CLASSES)
    proposals = predict_masks(
        model.segmentor, torch.from_numpy(image).permute(2, 0, 1), model.proposals("semantic", CLASSES)[1],
        model.config.eval, model.classes,
    )  # fmt: skip
    scores = proposals.semantic()
    assert torch.equal(torch.from_numpy(semantic.labels.astype(np.int64)), scores.argmax(dim=0))
    np.testing.assert_allclose(semantic.scores, scores.amax(dim=0).numpy(), rtol=1e-5)  # float32 sums, once in parts

    panoptic = model.segment(image, CLASSES, task="panoptic", things=["red circle", "dog, hound"])
    assert panoptic.things == CLASSES[:2]
    assert panoptic.segments
    assert {s.id for s in panoptic.segments} == set(np.unique(panoptic.ids)) - {0}
    assert sum(panoptic.shares.values()) == pytest.approx(float((panoptic.ids > 0).mean()))
    assert sum(s.category == 2 for s in panoptic.segments) <= 1  # stuff is one segment
    assert [c.isthing for c in panoptic.categories] == [True, True, False]
    assert panoptic.overlay(legend=False).size == (52, 40)

    objects = model.segment(image, CLASSES, task="instance", things=["dog, hound"])
    assert len(objects.masks)
    assert set(objects.labels) == {1}
    assert (np.diff(objects.scores) <= 0).all()
    ids = objects.ids()
    first = objects.masks[0]
    assert (ids[first] == 1).all()  # the best one lies above


def test_labels_are_found_a_few_classes_at_a_time(model: infoclip.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    import infoclip.model.maftplus.inference as inference

    names = [f"{a} {b}" for a in ("red", "blue", "old") for b in ("cat", "dog", "car", "tree")]
    image = torch.from_numpy(picture(37, 90)).permute(2, 0, 1)
    found = predict_masks(model.segmentor, image, model.proposals("semantic", names)[1], EvalConfig(resize=0))
    monkeypatch.setattr(inference, "_CHUNK_BYTES", 8 * 64 * 96 * 5)  # five classes of the padded size
    for masks_first in (False, True):
        scores = found.semantic(masks_first)
        best, labels = found.labels(masks_first)
        torch.testing.assert_close(best, scores.amax(dim=0), rtol=1e-5, atol=1e-6)
        picked = scores.gather(0, labels[None])[0]  # another class only where both round to one score
        torch.testing.assert_close(picked, best, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_pictures_smaller_than_the_stride(model: infoclip.Model, task: str) -> None:
    for size in ((1, 1), (5, 3), (31, 70)):
        result = model.segment(picture(*size), CLASSES, task)
        assert result.overlay(legend=False).size == size[::-1]
        assert set(result.files("x")) == {"x.overlay.png", "x.json",
                                          {"semantic": "x.labels.png", "panoptic": "x.panoptic.png",
                                           "instance": "x.instances.png"}[task]}  # fmt: skip


def test_nothing_found_is_a_result(tmp_path: Path) -> None:
    image = picture()
    empty = PanopticSegmentation(np.zeros((40, 52), dtype=np.int32), [], CLASSES, CLASSES, image)
    none = InstanceSegmentation(np.zeros((0, 40, 52), bool), np.zeros(0, int), np.zeros(0, np.float32), CLASSES, image)
    for result, key in ((empty, "segments_info"), (none, "instances")):
        assert result.counts == result.shares == {}
        saved = result.save(tmp_path, key)
        assert json.loads(saved[2].read_text())[key] == []
        assert np.asarray(Image.open(saved[1])).max() == 0
        assert Image.open(saved[0]).width > 52  # a legend that says so


def test_run_lengths_are_cocos() -> None:
    draw = np.random.default_rng(0)
    for mask in (*(draw.random((13, 9)) < share for share in (0.1, 0.5, 0.95)), np.ones((4, 3), bool), np.eye(5) > 0):
        packed = coco_mask.frPyObjects({"size": list(mask.shape), "counts": run_lengths(mask)}, *mask.shape)
        assert np.array_equal(coco_mask.decode(packed).astype(bool), mask)


def test_an_id_that_is_listed_twice(tmp_path: Path) -> None:
    ids = torch.ones(4, 4, dtype=torch.int64)
    twice = [Segment(1, 0), Segment(1, 1)]
    for ours, theirs in ((twice, [Segment(1, 0)]), ([Segment(1, 0)], twice)):
        with pytest.raises(ValueError, match="names the id 1 twice"):
            PanopticMetrics(2).update(ids, ids, ours, theirs)
    dataset = open_panoptic(write_scenes(tmp_path, 1, 64, 0, panoptic=True))

    def answer(index: int, image: Tensor) -> PanopticMap:
        return PanopticMap(torch.ones(64, 64, dtype=torch.int64), twice)

    with pytest.raises(DataError, match=r"prediction for .* cannot be counted: .* the id 1 twice"):
        evaluate_panoptic(answer, dataset, progress=False)


def test_tasks_that_cannot_be(model: infoclip.Model, tmp_path: Path) -> None:
    plain = save_small_model(tmp_path, CLASSES)
    with pytest.raises(ConfigError, match=r"gives no panoptic results, since it has no mask proposals"):
        infoclip.load(plain, "cpu").segment(picture(), CLASSES, task="panoptic")
    with pytest.raises(ConfigError, match="expected semantic, panoptic or instance"):
        model.segment(picture(), CLASSES, task="panoptik")
    with pytest.raises(DataError, match="did you mean 'grass'"):
        model.segment(picture(), CLASSES, task="instance", things=["gras"])
    with pytest.raises(ConfigError, match="leave them out"):
        model.segment(picture(), CLASSES, "semantic", ["grass"])
    image = tmp_path / "a.png"
    Image.fromarray(picture()).save(image)
    for words in (("predict", plain, image, "--classes", "cat", "--out", tmp_path / "out", "--task", "instance"),
                  ("evaluate", plain, "--task", "panoptic", "--root", write_scenes(tmp_path / "s", 1, 64, 0,
                                                                                   panoptic=True))):  # fmt: skip
        failed = run(*words)
        assert failed.exit_code == 2
        assert "has no mask proposals" in failed.stderr
        assert failed.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_export_takes_no_mask_proposals(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model of mask proposals"):
        export(path, ["cat"], tmp_path / "out", formats=["torch"])
    assert not (tmp_path / "out").exists()


# Files


def test_predicted_folders_go_on_and_can_be_counted(path: Path, tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "pictures")
    out = tmp_path / "out"
    names = ["red circle", "dog", "grass"]
    options: dict[str, Any] = {"task": "panoptic", "things": ["red circle", "dog"], "device": "cpu"}
    done = predict(path, [folder], names, out, **options)
    assert [len(done.results), done.kept, done.faults] == [3, 0, []]
    assert {p.name for p in out.iterdir()} == {"panoptic.json"} | {
        f"{i}.{end}" for i in range(3) for end in ("overlay.png", "panoptic.png", "json")
    }
    found = read_annotations(out / "panoptic.json")
    assert [a.image_id for a in found.annotations] == ["0", "1", "2"]
    assert [(c.name, c.isthing) for c in found.categories] == [("red circle", True), ("dog", True), ("grass", False)]
    first = json.loads((out / "0.json").read_text())
    assert first["task"] == "panoptic"
    assert sum(entry["area"] for entry in first["segments_info"]) <= 40 * 52
    # it is a panoptic data set of its own, and its own perfect prediction
    dataset = open_panoptic(tmp_path, images="pictures", pngs="out", annotations="out/panoptic.json")
    assert evaluate_panoptic_folder(out, dataset, progress=False).overall.pq == 1.0

    (out / "1.panoptic.png").unlink()
    again = predict(path, [folder], names, out, **options)
    assert [len(again.results), again.kept] == [1, 2]
    assert len(read_annotations(out / "panoptic.json").annotations) == 3
    other = predict(path, [folder], names, out, task="panoptic", device="cpu")  # all of them things
    assert [len(other.results), other.kept] == [3, 0]


def test_command_line_predicts_instances(path: Path, tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "pictures", 2)
    (folder / "broken.png").write_bytes(b"x")
    words = ("predict", path, folder, "--classes", "red circle, dog, grass", "--out", tmp_path / "out", "--task",
             "instance", "--things", "dog, red circle", "--device", "cpu")  # fmt: skip
    done = run(*words)
    assert done.exit_code == 2  # one picture could not be used
    assert "broken.png" in done.stderr
    data = json.loads((tmp_path / "out/0.json").read_text())
    assert data["instances"]
    assert {entry["category"] for entry in data["instances"]} <= {"red circle", "dog"}
    best = data["instances"][0]
    mask = coco_mask.decode(coco_mask.frPyObjects(best["segmentation"], 40, 52)).astype(bool)
    assert mask.sum() == best["area"]
    colours = np.asarray(Image.open(tmp_path / "out/0.instances.png"))
    assert (colours[mask] == (1, 0, 0)).all()
    assert "2 were there already" in run(*words).stdout


# Counted


def test_a_model_is_counted_and_goes_on(path: Path, model: infoclip.Model, tmp_path: Path) -> None:
    root = write_scenes(tmp_path / "scenes", 4, 64, 1, panoptic=True)
    dataset = open_panoptic(root)
    seen = list(SCENE_CLASSES[:40])
    whole = evaluate_panoptic_model(path, dataset, seen, device="cpu", progress=False)

    def straight(index: int, image: Tensor) -> PanopticMap:
        text = model.proposals("panoptic", dataset.classes)[1]
        found = predict_masks(model.segmentor, image, text, model.config.eval, model.classes)
        return PanopticMap(*found.panoptic(dataset.things, 0.0, 0.0), found.semantic(masks_first=True).argmax(dim=0))

    plain = evaluate_panoptic(straight, dataset, seen, progress=False)
    assert (whole.overall, whole.semantic, whole.per_class) == (plain.overall, plain.semantic, plain.per_class)
    assert whole.images == whole.throughput.images == 4

    out = tmp_path / "out"
    options: dict[str, Any] = {"out": out, "name": "own", "device": "cpu", "progress": False}
    first = evaluate_panoptic_model(path, dataset, seen, **options)
    lines = (out / "own.images.jsonl").read_text().splitlines()
    assert len(lines) == 5
    cut = [*lines[:3], lines[3][: len(lines[3]) // 2]]  # stopped within the third image
    (out / "own.images.jsonl").write_text("\n".join(cut))
    second = evaluate_panoptic_model(path, dataset, seen, **options)
    assert second.throughput.images == 2
    ours, theirs = second.to_dict(), first.to_dict()
    assert ours.pop("run") != theirs.pop("run")
    assert ours == theirs
    saved = json.loads((out / "own.json").read_text())
    assert saved["overall"] == json.loads(json.dumps(theirs["overall"]))
    for broken in ('"matched": [[99, 0.7]]', '"matched": [[1]]', '"matched": 3'):
        start = lines[1].index('"matched"')
        end = lines[1].index(', "spurious"')
        (out / "own.images.jsonl").write_text("\n".join([lines[0], lines[1][:start] + broken + lines[1][end:], ""]))
        assert evaluate_panoptic_model(path, dataset, seen, **options).throughput.images == 4  # not taken
    with pytest.warns(UserWarning, match="started over"):
        evaluate_panoptic_model(path, dataset, seen, **options, overrides=["eval.overlap_threshold=0.5"])


def test_command_line_counts_a_model(path: Path, tmp_path: Path) -> None:
    root = write_scenes(tmp_path / "scenes", 2, 64, 1, panoptic=True)
    words = ("evaluate", path, "--task", "panoptic", "--root", root, "--device", "cpu", "-q", "--out", tmp_path / "out")
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert "PQ" in done.stdout
    assert (tmp_path / "out/evaluation.json").exists()
    assert "How it was measured" in (tmp_path / "out/evaluation.html").read_text()
    wrong = run(*words, "--data", "coco-panoptic")
    assert wrong.exit_code == 2
    assert wrong.stderr.count("\n") == 1
    semantic = run("evaluate", path, "--root", root, "--device", "cpu", "-q")
    assert semantic.exit_code == 0, semantic.output
    result = evaluate_folder(path, root / "images", root / "masks", root / "classes.json", device="cpu", progress=False)
    assert f"{100 * result.overall.miou:.1f}" in semantic.stdout
