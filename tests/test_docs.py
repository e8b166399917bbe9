"""Every command of the guides, run on small copies of the data with a small CLIP."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_models import small_config, small_mask_config
from small_trees import NAMES, write_tree
from training_data import write_folders, write_panoptic
from typer.testing import CliRunner

from infoclip.cli import app
from infoclip.convert import write_masks
from infoclip.data.classes import load_classes
from infoclip.model.checkpoint import save_model
from infoclip.model.maftplus import build_mask_segmentor
from infoclip.model.segmentor import build_segmentor

DOCS = Path(__file__).parent.parent / "docs"
PAGES = ["train-coco-stuff", "evaluate-benchmarks", "own-data", "published-weights", "predict-and-export", "small-gpu",
         "many-gpus"]  # fmt: skip
TINY = [
    "clip.image_size=32", "model.hidden_dim=16", "model.num_layers=1", "model.num_heads=2", "model.window_size=2",
    "model.text_guidance_proj_dim=16", "model.appearance_guidance_proj_dim=16", "model.decoder_dims=16,16",
    "model.decoder_guidance_dims=16,16", "model.decoder_guidance_proj_dims=8,8", "data.resize=36", "data.crop=32",
    "data.workers=0", "train.steps=2", "train.threads=1", "train.device=cpu", "clip.pretrained=",
]  # fmt: skip
"""Stands for the published sizes and weights; the last word on a key counts."""
TINY_MASKS = [
    "clip.image_size=64", "clip.templates=plain", "mask.queries=6", "mask.channels=32", "mask.attention_heads=4",
    "mask.encoder_layers=1", "mask.encoder_ffn_dim=32", "mask.decoder_layers=3", "mask.decoder_ffn_dim=32",
    "mask.transfer_heads=2", "mask.points=64", "data.resize=48", "data.resize_max=64", "data.batch_size=2",
    "data.workers=0", "train.steps=2", "train.threads=1", "train.device=cpu", "clip.pretrained=",
]  # fmt: skip
"""The same for the recipes of MAFT+ and FC-CLIP."""


def commands(page: str) -> list[str]:
    """The lines of a page that call ``infoclip``, on its own or in the processes of ``torchrun``."""
    return re.findall(
        r"^    ((?:torchrun .* -m )?infoclip .*)$", (DOCS / f"{page}.md").read_text(encoding="utf-8"), re.MULTILINE
    )


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a run, a published checkpoint, pictures and all data sets; /data is in it."""
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        write_tree(name, tmp_path / "data")
    write_folders(tmp_path / "data/mine")
    (tmp_path / "data/mine/names.txt").write_text((tmp_path / "data/mine/classes.txt").read_text())
    for path in ("photo.jpg", "data/photos/1.jpg", "data/photos/2.png", "data/more/3.jpg"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 30), 60).convert("RGB").save(path)
    panoptic = ("train2017", "panoptic_train2017", "annotations/panoptic_train2017.json")
    write_panoptic(tmp_path / "data/coco", places=panoptic)
    config = small_config(tmp_path)
    torch.manual_seed(0)
    segmentor = build_segmentor(config)
    save_model(segmentor, config, ["person", "tree"], tmp_path / "runs/b16/model")
    torch.save({"model": segmentor.published_state_dict()}, "model_final.pth")
    for system, names in (("maftplus", "coco_stuff_171"), ("fcclip", "coco_panoptic_133")):
        config = small_mask_config(tmp_path, system, attention_heads=8, transfer_features="reinterpreted")
        save_model(build_mask_segmentor(config), config, load_classes(names), tmp_path / system / "model")
        write_masks(tmp_path / system, f"{system}_l.pth", system)
    _small_published(monkeypatch)
    return tmp_path


def _small_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published files stand for those of ViT-B/16 and ConvNeXt-L: a small CLIP is in no list of open_clip's."""
    import infoclip.convert as convert

    read, found = convert._catseg, convert.mask_config

    def with_clip(path, state, left_out, overrides, names):  # type: ignore[no-untyped-def]
        known = ["clip.model=tiny_clip.json", "model.num_heads=2", "model.pad_len=8"]
        return read(path, state, left_out, [*known, *overrides], names)

    def with_convnext(state, system, source, overrides=()):  # type: ignore[no-untyped-def]
        known = ["clip.model=tiny_convnext.json", "clip.templates=plain", "mask.transfer_heads=2"]
        return found(state, system, source, [*known, *overrides])

    monkeypatch.setattr(convert, "_catseg", with_clip)
    monkeypatch.setattr(convert, "mask_config", with_convnext)


def run(line: str, place: Path) -> str:
    words = [word.replace("/data", str(place / "data")) for word in shlex.split(line)]
    for option in {"--processes", "--nproc_per_node"} & set(words):
        words[words.index(option) + 1] = "2"  # of a machine of two cores
    launcher, words = words[: words.index("infoclip")], words[words.index("infoclip") + 1 :]
    if words[0] == "train" and not words[1].endswith(".json"):
        words = [word for word in words if not word.startswith("clip.pretrained=")]
        masks = words[1].startswith(("maftplus", "fcclip"))
        words[2:2] = [*TINY_MASKS, "clip.model=tiny_convnext.json"] if masks else [*TINY, "clip.model=tiny_clip.json"]
        if words[1].startswith("fcclip"):
            words[2:2] = ["data.crop=64"]  # the recipe's is 1024; MAFT+'s has none
    if words[0] == "data" and words[1] == "check":
        words += ["--quiet"]
    if launcher:
        launcher[:1] = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        done = subprocess.run([*launcher, "infoclip", *words], capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        return done.stdout
    answer = CliRunner().invoke(app, words)
    assert answer.exit_code == 0, f"{line}\n{answer.output}\n{answer.stderr}\n{answer.exception!r}"
    return answer.output


@pytest.mark.slow  # some forty commands; predict on Ray and export take 20 to 40 s each
@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page(place: Path, page: str) -> None:
    lines = commands(page)
    assert lines
    if page == "train-coco-stuff":
        shutil.rmtree("runs")  # it makes the run that the other pages use
    for line in lines:
        if "--engine ray" in line:
            pytest.importorskip("ray")
        run(line, place)


@pytest.mark.parametrize("page", PAGES)
def test_no_command_hides_in_a_sentence(page: str) -> None:
    """One that is shown within a line is not run above: only the name of a command may stand there."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    inline = re.findall(r"`infoclip ([^`]*)`", text)
    assert [words for words in inline if len(words.split()) > 2] == []


def test_the_index_names_every_page() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    pages = {p.name for p in DOCS.glob("*.md")} - {"README.md"}
    assert pages == set(re.findall(r"\(([a-z0-9-]+\.md)\)", index))
    assert {f"{page}.md" for page in PAGES} == pages - {"study.md"}
    for path in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            assert (path.parent / link).exists(), f"{path.name} links to {link}"


def test_published_numbers_are_marked() -> None:
    text = (DOCS / "evaluate-benchmarks.md").read_text(encoding="utf-8")
    assert "**Published, not measured here**" in text
