"""Prediction on a local Ray cluster; a process of its own each, for Ray starts once in one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from small_models import save_small_model
from typer.testing import CliRunner

from infoclip.cli import app
from infoclip.errors import ConfigError, InfoclipError
from infoclip.predict import predict

CLASSES = ["red circle", "blue sky"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_small_model(tmp_path, CLASSES)


def write_pictures(folder: Path, count: int) -> None:
    folder.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (480, 640, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")


def ray_workers(below: psutil.Process) -> list[psutil.Process]:
    found = []
    for process in below.children(recursive=True):
        try:
            if "MapWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow  # Ray starts a cluster, and two workers that import torch: about half a minute, more with one killed
def test_a_killed_worker_loses_and_doubles_nothing(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    count, out = 60, tmp_path / "out"
    write_pictures(tmp_path / "in", count)
    (tmp_path / "in" / "bad.png").write_text("no picture")
    command = [sys.executable, "-m", "infoclip.cli", "predict", str(model), str(tmp_path / "in"), "--out", str(out),
               "--classes", ", ".join(CLASSES), "--device", "cpu", "--engine", "ray", "--workers", "2"]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as run:
        killed: list[int] = []

        def kill() -> None:
            while run.poll() is None:
                if len(list(out.glob("*.json"))) >= 3:
                    for worker in ray_workers(psutil.Process(run.pid))[:1]:
                        worker.kill()
                        killed.append(worker.pid)
                        return
                time.sleep(0.05)

        thread = threading.Thread(target=kill)
        thread.start()
        output, errors = run.communicate(timeout=300)
        thread.join()
    assert killed, "no worker was found while pictures were left"
    assert run.returncode == 2, errors  # the picture that cannot be used
    assert errors.count("skipped: ") == 1
    assert f"and {count - 20} more" in output
    assert sorted(p.name for p in out.iterdir()) == sorted(
        f"{i:03}.{kind}" for i in range(count) for kind in ("json", "labels.png", "overlay.png")
    )
    again = predict(model, [tmp_path / "in"], CLASSES, tmp_path / "local", device="cpu")
    for result in again.results:
        other = out / result.labels.name
        with Image.open(result.labels) as one, Image.open(other) as two:
            # other thread counts round otherwise, which turns a pixel whose two scores are equal to 1e-6
            assert np.mean(np.asarray(one) != np.asarray(two)) < 1e-3
        assert json.loads((out / result.json.name).read_text())["image"] == str(result.image)


def test_what_ray_cannot_do(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path / "in", 1)
    with pytest.raises(ConfigError, match="'spark'; expected local or ray"):
        predict(model, [tmp_path / "in"], CLASSES, tmp_path / "out", engine="spark")
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = ["predict", str(model), str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--classes", "a"]
    answer = CliRunner().invoke(app, [*arguments, "--engine", "ray"])
    assert answer.exit_code == 2
    assert "infoclip[ray]" in answer.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["{}", "ray://{}"])
def test_an_address_where_nobody_listens_is_told_at_once(model: Path, tmp_path: Path, form: str) -> None:
    pytest.importorskip("ray")
    write_pictures(tmp_path / "in", 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound and not listening: nobody else can take the port meanwhile
        address = form.format(f"127.0.0.1:{free.getsockname()[1]}")
        arguments = ["predict", str(model), str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--classes", "a"]
        begun = time.monotonic()
        answer = CliRunner().invoke(app, [*arguments, "--engine", "ray", "--address", address])
    assert answer.exit_code == 2
    assert f"No Ray cluster answers at '{address}' (Connection refused); start one, or leave it out." in answer.stderr
    assert time.monotonic() - begun < 60  # Ray is imported, and not asked
    assert not (tmp_path / "out").exists()


def test_ray_that_cannot_is_one_sentence(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray, data = pytest.importorskip("ray"), pytest.importorskip("ray.data")

    class Broken:
        def map_batches(self, *_: object, **__: object) -> Broken:
            return self

        def iter_rows(self) -> None:
            raise ray.exceptions.RayError("The actor died.\nIt was cancelled.")

    def refused(**_: object) -> None:
        raise ConnectionError("Failed to connect.\nMore of it.")

    write_pictures(tmp_path / "in", 1)
    arguments = ["predict", str(model), str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--classes", "a",
                 "--engine", "ray"]  # fmt: skip
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setattr(ray, "init", refused)
    answer = CliRunner().invoke(app, [*arguments, "--address", "auto"])
    assert answer.exit_code == 2
    assert (
        "No Ray cluster answers at 'auto' (Failed to connect); start one, set RAY_AUTH_MODE=token if it asks for Ray's "
        "token, or leave it out." in answer.stderr
    )
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(data, "from_items", lambda *_, **__: Broken())
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 2
    assert "The Ray cluster gave up (The actor died); what is written stays" in answer.stderr


def test_a_worker_takes_the_callers_relative_paths_and_tells_a_fault(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infoclip.ray_engine import _Worker

    write_pictures(tmp_path / "in", 1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # where a cluster's workers start is the cluster's choice
    step = json.dumps(["in/000.png", "000", {"task": "semantic"}])
    (made,) = _Worker("model", CLASSES, "out", "cpu", str(tmp_path), {})({"step": [step]})["result"]
    assert made.labels == Path("out/000.labels.png")
    assert (tmp_path / "out/000.json").is_file()
    faults = _Worker("absent", CLASSES, "out", "cpu", str(tmp_path), {})({"step": [step, step]})["result"]
    assert [type(fault) for fault in faults] == [InfoclipError] * 2
    assert "absent" in str(faults[0])
