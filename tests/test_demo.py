"""The demo, shortened to two steps a method, and its parts."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import infoclip
from infoclip import demo as module
from infoclip.demo import SYSTEMS, demo
from infoclip.errors import ConfigError, InfoclipError, NonFiniteLossError, StorageError
from infoclip.predict import predict
from infoclip.report.demo_page import table_header, table_rows, verdict

METHODS = SYSTEMS["infoclip"].methods
MASKS = SYSTEMS["maftplus"].methods
SHORT = ["eval_images=12", "train_images=4", "threads=1"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("demo") / "demo"
    (out / "infoclip").mkdir(parents=True)
    (out / "infoclip" / "stale").write_text("from an earlier demo")
    (out / ".work-999999999").mkdir()
    return out, demo(out, steps=2, overrides=SHORT, progress=False)


@pytest.mark.slow
def test_what_the_demo_leaves(done: tuple[Path, dict[str, Any]]) -> None:
    out, results = done
    left = {"scenes", "frozen", "finetune", "infoclip", "report.html", "results.json"}
    assert {p.name for p in out.iterdir()} == left  # no work folder
    assert not (out / "infoclip" / "stale").exists()
    saved = json.loads((out / "results.json").read_text())
    assert saved["methods"]["infoclip"]["mean"] == results["methods"]["infoclip"]["mean"]
    assert list(saved["methods"]) == [method.key for method in METHODS]
    for method in METHODS:
        entry = saved["methods"][method.key]
        run = entry["runs"][0]
        assert run["seed"] == 0
        assert run["evaluation"]["images"] == 12
        assert [row["name"] for row in run["evaluation"]["per_class"]][-1] == "brick"
        assert 0 <= run["unseen"] <= 100
        assert run["peak_memory_mib"] > 50  # an interpreter with torch needs more, a broken reading gives less
        assert (run["train_seconds"] > 0) == method.trains
        assert entry["config"]["train"]["steps"] == 2
    assert saved["methods"]["frozen"]["config"]["clip"]["tune"] == "frozen"
    assert saved["methods"]["finetune"]["config"]["align"]["method"] == "none"
    assert saved["methods"]["infoclip"]["config"]["align"]["method"] == "infoclip"
    assert saved["environment"]["packages"]["torch"]


@pytest.mark.slow
def test_training_and_evaluation_scenes_differ(done: tuple[Path, dict[str, Any]]) -> None:
    out, results = done
    test = json.loads(next(out.glob("scenes/eval-*/scenes.json")).read_text())
    train = json.loads(next(out.glob("scenes/seed0-*/train-attribute/scenes.json")).read_text())
    assert test["seed"] != train["seed"]
    assert test["classes"] is None  # all 52
    assert set(train["classes"]) == set(results["seen_classes"])


@pytest.mark.slow
def test_the_report_has_every_part(done: tuple[Path, dict[str, Any]]) -> None:
    text = (done[0] / "report.html").read_text(encoding="utf-8")
    for part in ("Curves", "Pictures", "Alignment maps", "Class by class", "How to repeat it", "teacher"):
        assert part in text
    assert text.count("<svg") >= 3
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text)
    for method in METHODS:
        assert method.name in text


@pytest.mark.slow
def test_the_models_of_the_demo_can_be_used(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, results = done
    for key in ("frozen", "finetune", "infoclip"):
        assert infoclip.load(out / key, device="cpu").classes == results["seen_classes"]
    Image.fromarray(np.zeros((50, 70, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    written = predict(out / "infoclip", [tmp_path / "a.png"], ["red striped circle", "grass"], tmp_path / "out").results
    assert written[0].overlay.exists()


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The other demo, of mask proposals beside InfoCLIP."""
    out = tmp_path_factory.mktemp("masks") / "demo"
    return out, demo(out, system="maftplus", steps=2, overrides=SHORT, progress=False)


@pytest.mark.slow  # four processes
def test_what_the_demo_of_masks_leaves(masks: tuple[Path, dict[str, Any]]) -> None:
    out, results = masks
    left = {"scenes", "fcclip", "finetune", "maftplus", "infoclip", "report.html", "results.json", "pictures.png"}
    assert {p.name for p in out.iterdir()} == left
    saved = json.loads((out / "results.json").read_text())["methods"]
    assert list(saved) == [method.key for method in MASKS]
    tuned = [saved[key]["config"]["clip"]["tune"] for key in ("fcclip", "finetune", "maftplus")]
    assert tuned == ["frozen", "trunk", "trunk"]
    assert [saved[key]["config"]["system"] for key in saved] == ["fcclip", "fcclip", "maftplus", "catseg"]
    for key in ("fcclip", "finetune", "maftplus"):
        run = saved[key]["runs"][0]
        assert run["evaluation"]["images"] == 12
        assert 0 <= run["pq_unseen"] <= 100
        assert run["pq_seen"] == pytest.approx(100 * run["evaluation"]["seen"]["pq"])
    assert "pq_seen" not in saved["infoclip"]["runs"][0]  # it gives labels alone
    rows = dict(table_rows(results))
    assert table_header(results)[4:7] == ["PQ seen", "PQ unseen", "PQ harmonic"]
    assert [cell for cell, _ in rows["InfoCLIP"]][3:6] == ["-", "-", "-"]
    assert not any(best for _, best in rows["InfoCLIP"][3:6])
    assert "panoptic quality by" in verdict(results)
    text = (out / "report.html").read_text(encoding="utf-8")
    for part in (
        "Curves",
        "Pictures",
        "Segments and instances",
        "Class by class",
        "Loss: mask aware",
        "Panoptic quality",
    ):
        assert part in text
    assert Image.open(out / "pictures.png").width > 800
    model = infoclip.load(out / "maftplus", device="cpu")
    found = model.segment(np.zeros((50, 70, 3), dtype=np.uint8), ["red striped circle", "grass"], task="panoptic")
    assert found.overlay().width >= 70


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected one or more different"):
        demo(tmp_path, seeds=[1, 1])
    with pytest.raises(ConfigError, match="expected infoclip or maftplus"):
        demo(tmp_path, system="catseg")
    with pytest.raises(ConfigError, match="Unknown split"):
        demo(tmp_path, split="colour")
    with pytest.raises(ConfigError, match="did you mean"):
        demo(tmp_path, overrides=["eval_image=3"])
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Cannot write the demo"):
        demo(tmp_path / "file")


def test_each_seed_has_scenes_of_its_own(tmp_path: Path) -> None:
    one, two = (module._config(METHODS[2], seed, "composition", None, [], tmp_path) for seed in (0, 1))
    assert one.data.root != two.data.root
    assert (one.train.seed, two.train.seed) == (0, 1)
    assert one.data.scenes_seed != two.data.scenes_seed
    assert one.data.split == "composition"


# Results without running anything


def results_of(unseen: dict[str, list[float]]) -> dict[str, Any]:
    """The summary of made-up runs: method -> unseen mIoU for each seed; seen stays at 40."""
    runs, jobs = [], []
    for seed in range(len(unseen["infoclip"])):
        for method in METHODS:
            value = unseen.get(method.key, unseen["finetune"])[seed]
            runs.append({"seed": seed, "method": method.key, "seen": 40.0, "unseen": value,
                         "harmonic": 2 * 40 * value / (40 + value), "train_seconds": 10.0 + seed,
                         "peak_memory_mib": 500.0, "evaluation": {}})  # fmt: skip
            jobs.append((seed, method, module._config(method, seed, "attribute", None, [], Path())))
    return module._summary("infoclip", runs, jobs, "attribute", 1.0)


def test_mean_spread_and_gain() -> None:
    results = results_of({"finetune": [20.0, 22.0, 24.0], "infoclip": [23.0, 22.5, 23.0]})
    plain = results["methods"]["finetune"]
    assert plain["mean"]["unseen"] == pytest.approx(22.0, abs=1e-9)
    assert plain["std"]["unseen"] == pytest.approx(2.0, abs=1e-9)  # sample standard deviation
    assert [g["unseen"] for g in results["gain_over_finetune"]] == [3.0, 0.5, -1.0]
    assert results["seeds"] == [0, 1, 2]
    text = verdict(results)
    assert "+0.8 points (better in 2 of 3 seeds)" in text
    rows = dict(table_rows(results))
    assert rows["InfoCLIP"][1] == ("22.8 ± 0.3", True)
    assert rows["Fine-tuned, no alignment"][1] == ("22.0 ± 2.0", False)
    assert rows["Frozen CLIP, zero-shot"][3] == ("-", False)


def test_the_verdict_does_not_flatter() -> None:
    results = results_of({"finetune": [24.0], "infoclip": [21.0]})
    assert "by \N{MINUS SIGN}3.0 points" in verdict(results)
    assert not dict(table_rows(results))["InfoCLIP"][1][1]


def test_a_figure_that_could_not_be_measured_is_never_the_best() -> None:
    results = results_of({"zero-shot": [math.nan], "finetune": [24.0], "infoclip": [21.0]})
    rows = dict(table_rows(results))
    assert rows["Frozen CLIP, zero-shot"][1] == ("nan", False)
    assert rows["Fine-tuned, no alignment"][1] == ("24.0", True)


# Files and processes


def test_parts_are_exchanged(tmp_path: Path) -> None:
    work, out = tmp_path / "out" / ".work-1", tmp_path / "out"
    for seed in (3, 4):
        for key in ("frozen", "finetune", "infoclip"):
            (work / str(seed) / key).mkdir(parents=True)
            (work / str(seed) / key / "mark").write_text(f"{seed} {key}")
    (out / "infoclip").mkdir()
    (out / "infoclip" / "mark").write_text("old")
    (out / "seeds" / "9").mkdir(parents=True)
    for name in ("report.html", "results.json"):
        (work / name).write_text("new")
    module._put_in_place(SYSTEMS["infoclip"], work, out, [3, 4])
    assert (out / "infoclip" / "mark").read_text() == "3 infoclip"
    assert (out / "seeds" / "4" / "frozen" / "mark").read_text() == "4 frozen"
    assert not (out / "seeds" / "9").exists()
    assert (out / "report.html").read_text() == "new"


def test_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead, alive = tmp_path / f".work-{gone.pid}", tmp_path / f".work-{os.getppid()}"
    for folder in (dead, alive):
        folder.mkdir()
    module._remove_leftovers(tmp_path)
    assert not dead.exists()
    assert alive.exists()


def test_an_error_of_the_process_arrives_as_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = module._config(METHODS[2], 0, "attribute", 1, SHORT, tmp_path)

    def process(message: dict[str, Any] | None) -> Any:
        def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
            if message is not None:
                job = json.loads(Path(command[-1]).read_text())
                Path(job["result"]).write_text(json.dumps(message))
            return subprocess.CompletedProcess(command, -9)

        return run

    error = {"error": {"type": "NonFiniteLossError", "message": "The loss is nan at step 3."}}
    monkeypatch.setattr(module.subprocess, "run", process(error))
    with pytest.raises(NonFiniteLossError, match="at step 3"):
        module._run_job(0, METHODS[2], config, tmp_path, tmp_path, False)
    (tmp_path / "0" / "finetune.result.json").unlink()
    monkeypatch.setattr(module.subprocess, "run", process(None))
    with pytest.raises(InfoclipError, match="ended with code -9 and no result"):
        module._run_job(0, METHODS[2], config, tmp_path, tmp_path, False)


def test_the_process_reports_a_mistake_instead_of_a_traceback(tmp_path: Path) -> None:
    config = module._config(METHODS[2], 0, "attribute", 1, [*SHORT, "clip.pretrained=/nowhere.safetensors"], tmp_path)
    with pytest.raises(InfoclipError, match="nowhere"):
        module._run_job(0, METHODS[2], config, tmp_path, tmp_path, False)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's process status")
def test_peak_memory_is_not_that_of_the_parent() -> None:
    ballast = np.ones(60_000_000)  # 480 MB that a child's ru_maxrss would start from
    code = "import sys; sys.path.insert(0, sys.argv[1]); from infoclip.demo import _peak_memory_mib as p; print(p(0.0))"
    root = str(Path(module.__file__).resolve().parents[1])
    out = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True, check=True)
    import psutil

    own = psutil.Process().memory_info().rss / 2**20
    assert ballast.sum() > 0
    assert 20 < float(out.stdout) < own
