"""Evaluation as a user runs it: stopped and started again, in several processes, with its report."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import save_small_model
from small_trees import write_tree
from typer.testing import CliRunner

from infoclip import cli, workers
from infoclip.data.ahead import in_order
from infoclip.data.classes import load_classes, overlap
from infoclip.errors import ConfigError, DataError, InfoclipError, InfoclipWarning
from infoclip.evaluate.metrics import Confusion, PairCounts, SegmentationMetrics
from infoclip.evaluate.run import SIX, evaluate_benchmarks, evaluate_folder
from infoclip.workers import Workers, run_in_processes

pytestmark = pytest.mark.filterwarnings("ignore::infoclip.errors.InfoclipWarning")

CLASSES = ["cat", "<b>dog", "zwölf\n🌲"]
IMAGES = 9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"), ["cat", "sky-other", "aeroplane"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (root / name).mkdir()
    for i in range(IMAGES):
        Image.fromarray(rng.integers(0, 255, (33, 41, 3), dtype=np.uint8)).save(root / f"images/{i}<i>.png")
        Image.fromarray(rng.choice([0, 1, 2, 255], (33, 41)).astype(np.uint8)).save(root / f"masks/{i}<i>.png")
    (root / "classes.json").write_text(json.dumps(CLASSES))
    return root


def result_of(folder: Path, name: str = "evaluation") -> dict[str, Any]:
    """The result without what differs from run to run."""
    data = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    del data["run"]
    return data


def evaluate(model: Path, data: Path, out: Path, **options: Any) -> dict[str, Any]:
    arguments = (model, data / "images", data / "masks", CLASSES)
    evaluate_folder(*arguments, device="cpu", out=out, progress=False, **options)
    return result_of(out)


def test_killed_and_started_again_gives_the_same_result(model: Path, folders: Path, tmp_path: Path) -> None:
    """SIGKILL after a few images; what is recorded is not predicted again, and the result is equal, bit for bit."""
    want = evaluate(model, folders, tmp_path / "whole")
    slow = (
        "import time, infoclip.evaluate.run as run\n"
        "real = run.segmentor_predictor\n"
        "def slowly(*a):\n"
        "    p = real(*a)\n"
        "    return lambda image: (time.sleep(0.4), p(image))[1]\n"
        "run.segmentor_predictor = slowly\n"
        "import json, sys\n"
        f"run.evaluate_folder({str(model)!r}, {str(folders / 'images')!r}, {str(folders / 'masks')!r}, {CLASSES!r},\n"
        f"    device='cpu', out={str(tmp_path / 'out')!r}, progress=False)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", slow])
    record = tmp_path / "out/evaluation.images.0.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not record.exists() or record.read_text().count("\n") < 4):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = record.read_text().count("\n") - 1
    assert 3 <= kept < IMAGES
    assert not (tmp_path / "out/evaluation.json").exists()
    with record.open("a") as file:
        file.write('{"image": 7, "file": "cut o')  # as if killed while writing
    assert evaluate(model, folders, tmp_path / "out") == want
    run = json.loads((tmp_path / "out/evaluation.json").read_text())["run"]
    assert run["throughput"]["images"] == IMAGES - kept
    assert run["environment"]["packages"]["torch"]
    lines = (tmp_path / "out/evaluation.images.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["image"] for line in lines[1:]) == list(range(IMAGES))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "evaluation.html", "evaluation.images.jsonl", "evaluation.json"
    ]  # fmt: skip


def test_records_of_something_else_are_not_taken(model: Path, folders: Path, tmp_path: Path) -> None:
    want = evaluate(model, folders, tmp_path / "out")
    with pytest.warns(InfoclipWarning, match=r"another kind \(eval\)"):
        other = evaluate(model, folders, tmp_path / "out", overrides=["eval.resize=24"])
    assert other["overall"] != want["overall"]
    path = tmp_path / "out/evaluation.images.jsonl"
    assert evaluate(model, folders, tmp_path / "out") == want
    lines = path.read_text().splitlines()
    changed = json.loads(lines[1])
    for lie in (
        {"image": IMAGES}, {"image": True}, {"cells": [10**30]}, {"cells": [16]}, {"counts": [-1]}, {"pixels": None},
        {"cells": "no"},
    ):  # fmt: skip
        path.write_text("\n".join([lines[0], json.dumps({**changed, **lie}), "[]", "{" * 99_999, *lines[2:], ""]))
        assert evaluate(model, folders, tmp_path / "out") == want
    path.write_bytes(b"\xff\xfe\0 no text at all\n" * 9)
    assert evaluate(model, folders, tmp_path / "out") == want


def test_two_processes_count_what_one_does(model: Path, folders: Path, tmp_path: Path) -> None:
    want = evaluate(model, folders, tmp_path / "one")
    assert evaluate(model, folders, tmp_path / "two", processes=2) == want
    assert (tmp_path / "two/evaluation.html").stat().st_size > 10_000
    # One of the nine is missing from the records: two processes, one of which has nothing to do.
    path = tmp_path / "two/evaluation.images.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    (tmp_path / "two/evaluation.json").unlink()
    assert evaluate(model, folders, tmp_path / "two", processes=2) == want
    run = json.loads((tmp_path / "two/evaluation.json").read_text())["run"]["throughput"]
    assert (run["images"], run["processes"]) == (1, 2)


@pytest.mark.slow
def test_torchrun_counts_what_one_process_does(model: Path, folders: Path, tmp_path: Path) -> None:
    want = evaluate(model, folders, tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command += [sys.executable, "-m", "infoclip.cli", "evaluate", str(model), "--root", str(folders), "--quiet"]
    done = subprocess.run(
        [*command, "--device", "cpu", "--out", str(tmp_path / "two")], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert result_of(tmp_path / "two") == want
    assert done.stdout.count("mACC") == 1  # the first process speaks for both


def _fail(kind: str) -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        if kind == "fault":
            raise DataError("The image x.png is damaged.")
        os.kill(os.getpid(), signal.SIGKILL)
    Workers(dist.get_rank(), 2).gather(0)  # waits for the other


@pytest.mark.parametrize(("kind", "sentence"), [("fault", "x.png is damaged"), ("kill", "Process 2 of 2.*SIGKILL")])
def test_a_process_that_fails_ends_all_with_one_sentence(kind: str, sentence: str) -> None:
    with pytest.raises(InfoclipError, match=sentence) as caught:
        run_in_processes(2, _fail, kind)
    assert "\n" not in str(caught.value)


def _deaf() -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        Path(os.environ["DEAF"]).touch()
        time.sleep(300)
    while not Path(os.environ["DEAF"]).exists():
        time.sleep(0.05)
    raise DataError("x.png is damaged.")


def test_a_process_that_does_not_listen_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As one that waits in a library's code: it would keep whoever started it for as long as it sleeps."""
    monkeypatch.setattr(workers, "_GRACE", 0.5)
    monkeypatch.setenv("DEAF", str(tmp_path / "deaf"))
    start = time.monotonic()
    with pytest.raises(DataError, match="damaged"):
        run_in_processes(2, _deaf)
    assert time.monotonic() - start < 200


def test_processes_within_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="torchrun has started"):
        run_in_processes(2, _fail, "fault")


def test_all_six_in_one_command(model: Path, tmp_path: Path) -> None:
    for name in SIX:
        if name != "pas20b":  # the same folders as pas20
            write_tree(name, tmp_path)
    arguments = ["evaluate", str(model), "--data", "all", "--root", str(tmp_path), "--device", "cpu", "--quiet"]
    done = CliRunner().invoke(cli.app, [*arguments, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    for title in ("A-847", "PC-459", "A-150", "PC-59", "PAS-20", "PAS-20b"):
        assert re.search(rf"{title} .* 2 ", done.stdout), title
    assert "summary.html" in done.stdout
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert list(summary) == list(SIX)
    assert summary["a150"]["miou"] == result_of(tmp_path / "out", "a150")["overall"]["miou"]
    assert 'href="pas20b.html"' in (tmp_path / "out/summary.html").read_text()
    background = result_of(tmp_path / "out", "pas20b")["per_class"][20]
    assert (background["name"], background["seen"]) == ("background", None)
    assert result_of(tmp_path / "out", "pas20b")["per_class"][0]["seen"] is True  # aeroplane
    for faults, data in (("did you mean .a150", "a15"), ("one or more", "a150,a150"), ("one or more", ",")):
        bad = CliRunner().invoke(cli.app, ["evaluate", str(model), "--data", data, "--root", str(tmp_path)])
        assert bad.exit_code == 2
        assert re.search(faults, bad.stderr)


def test_missing_data_sets_are_named_before_anything_is_predicted(model: Path, tmp_path: Path) -> None:
    write_tree("a150", tmp_path)
    with pytest.raises(DataError, match=r"A-847 is not whole .*ADE20K_2021_17_01.* \(and 2 more of the 4") as caught:
        evaluate_benchmarks(model, ["a150", "a847", "pas20", "pc59"], tmp_path, device="cpu", progress=False)
    assert "\n" not in str(caught.value)


def test_the_report_escapes_names_and_shows_what_was_wrong(model: Path, folders: Path, tmp_path: Path) -> None:
    evaluate(model, folders, tmp_path / "out")
    text = (tmp_path / "out/evaluation.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<b>dog" not in text
    assert "&lt;b&gt;dog" in text
    assert "<i>.png" not in text
    assert "0&lt;i&gt;.png" in text
    assert "zwölf 🌲" in text
    assert text.count("<img") == 3 * 8  # four spread over the set, the four hardest of the others
    assert text.count("<details>") == 2
    for order in range(5):
        assert f"#by{order}:checked" in text


def test_classes_are_seen_by_their_names() -> None:
    trained = ["airplane", "sky-other", "dining table", "door-stuff", "wall-brick", "light"]
    names = ["aeroplane, Airplane", "sky", "diningtable", "door", "wall", "lights", "couch, sofa"]
    assert overlap(names, trained) == [True, True, True, True, False, False, False]
    assert sum(overlap(load_classes("coco_stuff_171"), load_classes("coco_stuff_171"))) == 171


def test_many_classes_are_counted_by_the_pairs_that_occur() -> None:
    """The same figures as from the whole matrix, which would take 800 MB at 10,000 classes."""
    generator = torch.Generator().manual_seed(0)
    few, many = SegmentationMetrics(50, 65535), SegmentationMetrics(10_000, 65535)
    for _ in range(3):
        prediction, target = torch.randint(0, 50, (2, 60, 80), generator=generator)
        target[:3] = 65535
        few.update(prediction, target)
        many.update(prediction * 199, torch.where(target == 65535, target, target * 199))
    assert len(many.pairs().cells) == len(few.pairs().cells)
    assert many._dense.numel() == 0
    assert many.compute() == few.compute()
    assert many.iou()[199 * 7] == few.iou()[7]
    want = [Confusion(c.true * 199, c.predicted * 199, c.pixels) for c in few.confusions(30)]
    assert many.confusions(30) == want
    assert [c for c in many.confusions(10**6, true=199)] == [c for c in many.confusions(10**6) if c.true == 199]
    with pytest.raises(ValueError, match="not those of 50 classes"):
        few.add(PairCounts(torch.tensor([51 * 50]), torch.tensor([1])))


def test_work_ahead_is_in_order_and_stops_at_the_first_fault() -> None:
    started: list[int] = []

    def work(i: int) -> int:
        started.append(i)
        if i == 5:
            raise DataError("five")
        return i

    results = in_order(work, range(1000), threads=3, ahead=4)
    assert [next(results) for _ in range(5)] == list(range(5))
    with pytest.raises(DataError, match="five"):
        list(results)
    assert max(started) < 5 + 2 * 4
