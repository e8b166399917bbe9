"""A wheel built from a source archive works with the source tree hidden."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

CODE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
sys.path.insert(0, sys.argv[1])
import infoclip, torch
from infoclip import native
from infoclip.kernels.cost_volume import cost_volume
from infoclip.data.classes import load_classes
assert infoclip.__file__.startswith(sys.argv[1]), infoclip.__file__
assert cost_volume.__code__.co_filename.startswith(sys.argv[1]), cost_volume.__code__.co_filename
assert native.build_info()["cuda"] is False
assert "without CUDA" in native.why_not("cuda")
image, text = torch.randn(2, 33, 16), torch.randn(5, 2, 16)
difference = cost_volume(image, text, backend="native") - cost_volume(image, text, backend="reference")
assert difference.abs().max() < 1e-6
from infoclip.clip import load_convnext_clip
from infoclip.config import ClipConfig
name = "builtin:scenes-convnext"
clip = load_convnext_clip(ClipConfig(model=name, pretrained=name, tune="frozen", templates="scenes"))
assert clip.encode_image(torch.zeros(1, 3, 96, 96)).dense.shape == (1, 160, 12, 12)
print(len(load_classes("ade20k_150")))
"""


def run(*command: str, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"INFOCLIP_CUDA": "0"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.mark.slow
def test_wheel_from_sdist_runs_with_the_source_hidden(tmp_path):
    pytest.importorskip("build")
    work = tmp_path / "tree"
    work.mkdir()
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=False,
    )  # fmt: skip
    if files.returncode:
        pytest.skip("not a git checkout")
    for name in files.stdout.decode().split("\0"):
        if name and not name.startswith("tests/") and (ROOT / name).is_file():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_bytes((ROOT / name).read_bytes())
    python = sys.executable
    run(python, "-m", "build", "--no-isolation", "--sdist", "--outdir", str(tmp_path / "dist"), str(work), cwd=tmp_path)
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    run(
        python,
        "-m",
        "build",
        "--no-isolation",
        "--wheel",
        "--outdir",
        str(tmp_path / "dist"),
        str(source),
        cwd=tmp_path,
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"infoclip/py.typed", "infoclip/kernels/cost_volume/op.py", "infoclip/data/classes/ade20k_150.json"} <= names
    for folder in ("scenes_clip", "scenes_convnext"):
        assert f"infoclip/assets/{folder}/model.safetensors" in names
    assert any(name.startswith("infoclip/_C.") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "bench/", "kernels/", "csrc/"))]
    target = tmp_path / "site"
    run(
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
        cwd=tmp_path,
    )
    assert run(python, "-c", CODE, str(target), cwd=tmp_path).strip() == "150"
