"""What others wrote: names of any kind and number, links, files that lie. Each is used or refused, within bounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from fuzz import KINDS, fuzz
from PIL import Image
from safetensors.torch import load_file, save_file
from small_models import save_small_model
from small_trees import write_tree
from typer.testing import CliRunner

from infoclip import cli
from infoclip.data.benchmarks import find_forms
from infoclip.data.files import is_file, read_image, read_label_map_mat, read_mask
from infoclip.data.folders import FolderDataset
from infoclip.errors import CheckpointError, DataError, StorageError
from infoclip.model.checkpoint import load_model


def picture(path: Path, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"), ["cat"])


def test_damaged_and_lying_inputs_of_every_kind() -> None:
    """A few hundred inputs; ``make fuzz`` runs thousands."""
    outcomes = fuzz(300, seconds=240.0)
    assert [fault for o in outcomes for fault in o.faults] == []
    assert [o.kind for o in outcomes] == [k.name for k in KINDS]
    assert sum(o.used + o.refused for o in outcomes) >= 250
    assert all(o.used + o.refused > 0 for o in outcomes)
    assert sum(o.used for o in outcomes) >= 30


def test_the_fuzz_run_notices_what_it_looks_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A traceback, a hang, a message of two lines, a file beside OUT: each planted, each found."""
    import signal
    import time

    import fuzz as module

    from infoclip.errors import InfoclipError

    def use(file: Path, work: Path) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise KeyError("a bug")
        if len(calls) == 2:
            while True:
                calls[0] += 1
        if len(calls) == 3:
            error = InfoclipError("x")
            error.args = ("two\nlines",)
            raise error
        (work / "stray.txt").write_text("x")

    calls: list[int] = []
    monkeypatch.setattr(module, "SECONDS", 1)
    monkeypatch.setattr(module, "KINDS", [module.Kind("planted", 1, ".bin", lambda _: [b"x"], use)])
    monkeypatch.setenv("INFOCLIP_CACHE", str(tmp_path))  # put back afterwards
    before, handler = Path.cwd(), signal.getsignal(signal.SIGPROF)
    try:
        faults = module.run_kind("planted", 4, 0, time.monotonic() + 60).faults
    finally:
        os.chdir(before)
        signal.signal(signal.SIGPROF, handler)
    for part, fault in zip(("KeyError", "TimeoutError", "not one line", "wrote"), faults, strict=True):
        assert part in fault


def test_names_with_line_breaks_and_markup_stay_in_their_sentence(tmp_path: Path) -> None:
    name = "a\nTraceback (most recent call last):\x1b[31m <b>"
    error = DataError(f"The class '{name}' cannot be used.")
    assert len(str(error).splitlines()) == 1
    assert "\x1b" not in str(error)
    assert "ü 🌲" in str(StorageError("ü 🌲"))
    path = tmp_path / "a\nb[bold].png"
    path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"a\\nb\[bold\]\.png") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def test_what_a_file_is_called_does_not_decide_what_it_is(tmp_path: Path) -> None:
    """A PNG called .jpg is read; text, a GIF, an EPS program called .png are refused; an RGB mask is no mask."""
    png = picture(tmp_path / "a.png")
    lying = tmp_path / "b.jpg"
    lying.write_bytes(png.read_bytes())
    assert torch.equal(read_image(lying), read_image(png))
    for content in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"GIF89a" + b"\1\0\1\0" + b"\0" * 30, b""):
        (tmp_path / "c.png").write_bytes(content)
        with pytest.raises(DataError, match="not a picture in a known format"):
            read_image(tmp_path / "c.png")
    with pytest.raises(DataError, match="RGB picture; expected one channel"):
        read_mask(png)
    whole = png.read_bytes()
    for length in (40, len(whole) // 2, len(whole) - 60):
        (tmp_path / "d.png").write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"d\.png"):
            read_image(tmp_path / "d.png")


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    for kind in ("images", "masks"):
        picture(tmp_path / kind / "a.png", mode="RGB" if kind == "images" else "L")
        (tmp_path / kind / "again").symlink_to(tmp_path / kind, target_is_directory=True)
        (tmp_path / kind / "b.txt").symlink_to(tmp_path / kind / "b.txt")
    assert len(FolderDataset(tmp_path / "images", tmp_path / "masks", ["x"])) == 1
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(DataError, match="There is no folder"):
        FolderDataset(tmp_path / "loop", tmp_path / "masks", ["x"])


def test_a_missing_data_set_is_named_with_the_folder_where_it_was_looked_for(tmp_path: Path) -> None:
    missing = find_forms("a150", tmp_path)[1].missing
    assert missing[0] == f"folder {tmp_path / 'ADEChallengeData2016/images/validation'}"
    write_tree("a150", tmp_path)
    base = tmp_path / "ADEChallengeData2016"
    assert find_forms("a150", base)[1].found  # the data set's own folder
    (base / "annotations/validation").rename(base / "elsewhere")
    assert find_forms("a150", base)[1].missing == [f"folder {base / 'annotations/validation'}"]


_THOUSANDS = """
import json, resource, sys
from pathlib import Path
import infoclip.cli
from typer.testing import CliRunner
call = lambda *a: CliRunner().invoke(infoclip.cli.app, [str(x) for x in a])
model, root = sys.argv[1:]
root = Path(root)
warm = call("predict", model, root / "images", "--classes", "a,b", "--out", root / "warm", "--device", "cpu")
assert warm.exit_code == 0, warm.output
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
done = call("predict", model, root / "images", "--classes-file", root / "classes.json", "--out", root / "out",
            "--device", "cpu")
assert done.exit_code == 0, done.output
done = call("evaluate", model, "--root", root, "--ignore-index", 65535, "--out", root / "report", "--device", "cpu",
            "--quiet", "--per-class", "sliding_window=true", "size=320", "window=192")
assert done.exit_code == 0, done.output
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_ten_thousand_names_in_bounded_memory(model: Path, tmp_path: Path) -> None:
    """Their scores at the size of the picture alone would take 4.1 GB, the confusion matrix 0.8 GB."""
    names = [f"thing {i}" for i in range(9_998)] + ["<script>x", "zwölf\n🌲"]
    size = (320, 320)
    picture(tmp_path / "images/a.png", size)
    (tmp_path / "masks").mkdir()
    mask = np.random.default_rng(0).integers(0, 10_000, size).astype(np.uint16)
    Image.fromarray(mask).save(tmp_path / "masks/a.png")
    (tmp_path / "classes.json").write_text(json.dumps(names))
    done = subprocess.run([sys.executable, "-c", _THOUSANDS, str(model), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    # The text of 10,000 prompts, the logits of one view (14 MB), 256 MiB of score maps, and the report.
    assert float(done.stdout.split()[-1]) < 1200
    result = json.loads((tmp_path / "report/evaluation.json").read_text(encoding="utf-8"))
    assert len(result["per_class"]) == 10_000
    text = (tmp_path / "report/evaluation.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;x" in text
    assert len(text) < 20e6
    info = json.loads((tmp_path / "out/a.json").read_text(encoding="utf-8"))
    assert info["classes"] == names
    with Image.open(tmp_path / "out/a.labels.png") as labels:
        assert np.asarray(labels).max() < 10_000


def test_a_report_of_predictions_shows_names_as_text(model: Path, tmp_path: Path) -> None:
    picture(tmp_path / "<img src=x>.png")
    arguments = ["predict", str(model), str(tmp_path), "--classes", "<b>cat,zwölf 🌲", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(cli.app, [*arguments, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out/<img src=x>.overlay.png").exists()


def test_what_the_long_fuzz_run_found(model: Path, tmp_path: Path) -> None:
    """Five of its 5,600 inputs ended in a traceback: three causes."""
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    for mean in ("[0.5, 0.5", "[0.5, 0.5]", '"abc"', "null"):
        metadata = {"infoclip": "infoclip-segmentor", "mean": mean, "std": "[1, 1, 1]"}
        save_file(load_file(weights), weights, metadata=metadata)
        with pytest.raises(CheckpointError, match="no list of three numbers"):
            load_model(model)
    weights.write_bytes(content)
    assert not is_file(tmp_path / ("x" * 300 + ".jpg"))
    scipy.io.savemat(tmp_path / "a.mat", {"LabelMap": np.ones((2, 2), np.uint8)})
    raw = bytearray((tmp_path / "a.mat").read_bytes())
    raw[128 + 16] = 77  # the class of the array: none that MATLAB has
    (tmp_path / "a.mat").write_bytes(raw)
    with pytest.raises(DataError, match="damaged"):
        read_label_map_mat(tmp_path / "a.mat")
