from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import save_small_model
from typer.testing import CliRunner

import infoclip.export
from infoclip import load
from infoclip.cli import app
from infoclip.errors import CheckpointError, ConfigError, DataError
from infoclip.export import TOLERANCE, export
from infoclip.model.inference import preprocess

CLASSES = ["red circle", "ciel bleu, ciel", "<b>grass</b>"]
# more than pad_len of small_config (8): the cut to the most similar classes is in the graph
MANY = [f"thing {i}" for i in range(11)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"), CLASSES)


@pytest.mark.parametrize("names", [CLASSES, MANY], ids=["few", "cut"])
def test_both_files_give_the_scores_of_the_model(model: Path, tmp_path: Path, names: list[str]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    done = export(model, names, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["export.json", "model.onnx", "model.pt2"]
    assert set(done.differences) == {"torch", "onnx"}
    assert max(done.differences.values()) <= TOLERANCE
    eager = load(model, "cpu")
    _, text = eager.embed(names)
    side = eager.segmentor.clip.image_size
    pictures = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(7)) * 255
    with torch.no_grad():
        want = eager.segmentor(preprocess(pictures, eager.segmentor.clip), text).logits.sigmoid()
        program = torch.export.load(done.files["torch"]).module()
        # float32 sums of a few thousand terms in another order, scores in 0..1
        assert torch.allclose(program(pictures), want, rtol=0, atol=1e-5)
    session = onnxruntime.InferenceSession(str(done.files["onnx"]), providers=["CPUExecutionProvider"])
    (found,) = session.run(["scores"], {"image": pictures.numpy()})
    assert np.allclose(found, want.numpy(), rtol=0, atol=1e-5)
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == names
    described = json.loads((tmp_path / "out" / "export.json").read_text(encoding="utf-8"))
    assert described["classes"] == names
    assert described["output"]["shape"] == ["batch", *want.shape[1:]]


def test_the_torch_file_runs_without_infoclip(model: Path, tmp_path: Path) -> None:
    file = export(model, CLASSES, tmp_path / "out", formats=["torch"]).files["torch"]
    code = (
        "import sys, torch; program = torch.export.load(sys.argv[1]).module();"
        "scores = program(torch.zeros(1, 3, 32, 32)); assert 'infoclip' not in sys.modules; print(tuple(scores.shape))"
    )
    done = subprocess.run([sys.executable, "-c", code, file], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(1, 3, 16, 16)"


def test_a_difference_writes_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = infoclip.export._run_torch
    monkeypatch.setattr(infoclip.export, "_run_torch", lambda path, x: [y + 2 * TOLERANCE for y in run(path, x)])
    with pytest.raises(ConfigError, match="differ from the model's"):
        export(model, CLASSES, tmp_path / "out", formats=["torch"])
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="no earlier export"):
        export(model, CLASSES, tmp_path / "mine")
    with pytest.raises(ConfigError, match="'tflite'; expected some of torch, onnx"):
        export(model, CLASSES, tmp_path / "out", formats=["tflite"])
    with pytest.raises(DataError, match="twice"):
        export(model, ["a", "a"], tmp_path / "out", formats=["torch"])
    with pytest.raises(CheckpointError, match="no model at"):
        export(tmp_path / "nothing", CLASSES, tmp_path / "out", formats=["torch"])
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"infoclip\[export\]"):
        export(model, CLASSES, tmp_path / "out", formats=["onnx"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]


def test_command(model: Path, tmp_path: Path) -> None:
    arguments = ["export", str(model), "--out", str(tmp_path / "out"), "--format", "torch"]
    answer = CliRunner().invoke(app, [*arguments, "--classes", "a, b"])
    assert answer.exit_code == 0, answer.stderr
    assert "model.pt2" in answer.stdout
    assert "scores within" in answer.stdout
    answer = CliRunner().invoke(app, [*arguments, "--classes", "a, b, c"])  # again: the earlier export is replaced
    assert answer.exit_code == 0, answer.stderr
    assert json.loads((tmp_path / "out" / "export.json").read_text())["classes"] == ["a", "b", "c"]
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 2
    assert answer.stderr.startswith("error: Name the classes")
