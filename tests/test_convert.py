"""Published CAT-Seg checkpoints: key for key in and out, the recorded scores from a converted file, refusals."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from parity_common import Case, load_case
from small_models import randomize, small_config
from test_segmentor import VIT_B, VIT_L, on_meta
from typer.testing import CliRunner

import infoclip
from infoclip.cli import app
from infoclip.convert import catseg_config, convert_catseg, read_catseg, write_catseg
from infoclip.errors import CheckpointError, ConfigError, DataError, StorageError
from infoclip.model.checkpoint import save_model
from infoclip.model.inference import plain_scores, preprocess
from infoclip.model.segmentor import Segmentor, build_segmentor
from infoclip.recipes import get_recipe

GOLDEN = Path(__file__).parent / "golden"
HEAD = "sem_seg_head.predictor.transformer."
MASK = f"{HEAD}layers.0.swin_block.block_2.attn_mask"


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path, list[str]]:
    """The recorded model as a checkpoint file as training leaves it, and the settings that its weights cannot tell."""
    folder = tmp_path_factory.mktemp("golden")
    case = load_case(GOLDEN / "catseg_model.json")
    h, state = case.hyper, case.prefixed("sd.")
    vision = {"image_size": h["res"], "layers": h["layers"], "width": h["width"], "patch_size": h["patch"],
              "head_width": h["width"] // h["heads"]}  # fmt: skip
    text = {"context_length": 77, "width": h["twidth"], "heads": h["theads"], "layers": h["tlayers"],
            "vocab_size": state["sem_seg_head.predictor.clip_model.token_embedding.weight"].shape[0]}  # fmt: skip
    clip = {"embed_dim": h["embed"], "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    (folder / "clip.json").write_text(json.dumps(clip))
    path = folder / "model_final.pth"
    torch.save({"model": state, "optimizer": {"state": {}, "param_groups": [{"lr": 2e-4}]}, "iteration": 79_999}, path)
    return case, path, [f"clip.model={folder / 'clip.json'}", "clip.guidance_layers=3,7"]


def test_recorded_scores_from_a_converted_checkpoint(golden: tuple[Case, Path, list[str]], tmp_path: Path) -> None:
    case, path, settings = golden
    answer = CliRunner().invoke(app, ["convert", "catseg", str(path), str(tmp_path / "model"), *settings])
    assert answer.exit_code == 0, answer.output
    assert f"{len(case.prefixed('sd.'))} entries loaded, 0 window masks checked, none left over" in answer.output
    assert "not needed: optimizer, iteration" in answer.output
    model = infoclip.load(tmp_path / "model", device="cpu")
    assert len(model.classes) == 171
    clip, h = model.segmentor.clip, case.hyper
    with torch.no_grad():
        train, test = (F.normalize(clip.encode_text(case.tensor(f"in.{s}.tokens")), dim=-1)[:, None]
                       for s in ("train", "test"))  # fmt: skip
        model.segmentor.train()
        out = model.segmentor(preprocess(case.tensor("in.train.image"), clip, padding="published"), train)
        model.segmentor.eval()
    plain = plain_scores(model.segmentor, case.tensor("in.plain.image"), test, tuple(h["plain_out"]), "published")
    rows = [case.row("mid.train.logits_lowres", out.logits), case.row("out.plain.sem_seg", plain)]
    assert [row.name for row in rows if not row.ok] == []


@pytest.mark.parametrize(
    ("arch", "side", "recipe"), [(VIT_B, 384, "catseg-vitb16-coco"), (VIT_L, 336, "catseg-vitl14-coco")]
)
def test_settings_follow_from_the_published_weights(arch, side: int, recipe: str) -> None:
    state = on_meta(arch, side).published_state_dict()
    wanted = get_recipe(recipe)
    for masks in (True, False):
        kept = {k: v for k, v in state.items() if masks or not k.endswith("attn_mask")}
        got = catseg_config(kept, "model_final.pth")
        assert (got.clip, got.model, got.eval, got.data) == (wanted.clip, wanted.model, wanted.eval, wanted.data)


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Segmentor, Path]:
    """A model folder of a small model whose settings are those that a reader takes for granted."""
    config = small_config(tmp_path)
    config.model.num_heads, config.model.pad_len = 4, 256
    config.clip.image_size = 64  # 8 x 8 patches in windows of 4: shifted windows, so that there are masks
    segmentor = build_segmentor(config)
    randomize(segmentor)
    save_model(segmentor, config, ["a", "b, c"], tmp_path / "run" / "model")
    return segmentor, tmp_path / "run"


def test_round_trip_is_exact(tiny: tuple[Segmentor, Path], tmp_path: Path) -> None:
    segmentor, run = tiny
    answer = CliRunner().invoke(app, ["convert", "to-catseg", str(run), str(tmp_path / "there" / "final.pth")])
    assert answer.exit_code == 0, answer.output
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["final.pth"]
    stored = torch.load(tmp_path / "there" / "final.pth", weights_only=True)
    wanted = segmentor.published_state_dict()
    assert list(stored) == ["model"]
    assert MASK in stored["model"]
    assert stored["model"].keys() == wanted.keys()
    assert all(torch.equal(v, wanted[k]) for k, v in stored["model"].items())

    read = convert_catseg(tmp_path / "there" / "final.pth", tmp_path / "again",
                          [f"clip.model={tmp_path / 'tiny_clip.json'}"], ["a", "b, c"])  # fmt: skip
    assert (read.loaded, read.derived, read.left_out) == (len(wanted) - 1, [MASK], [])
    back = infoclip.load(tmp_path / "again", device="cpu")
    assert back.classes == ["a", "b, c"]
    assert all(torch.equal(v, wanted[k]) for k, v in back.segmentor.published_state_dict().items())
    assert write_catseg(tmp_path / "again", tmp_path / "second.pth") == len(wanted)


def test_straight_loading(tiny: tuple[Segmentor, Path], tmp_path: Path) -> None:
    _, run = tiny
    write_catseg(run, tmp_path / "final.pth")
    with pytest.raises(ConfigError, match=r"width 16 with 3 blocks on patches of 8 at 32 px.*clip.model=FILE.json"):
        infoclip.load(tmp_path / "final.pth", device="cpu")
    (tmp_path / "known").mkdir()
    name = "infoclip-test-tiny-quickgelu"
    (tmp_path / "known" / f"{name}.json").write_text((tmp_path / "tiny_clip.json").read_text())
    open_clip.add_model_config(tmp_path / "known" / f"{name}.json")
    model = infoclip.load(tmp_path / "final.pth", device="cpu")
    assert model.config.clip.model == name
    assert len(model.classes) == 171
    image = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    reference = infoclip.load(run, device="cpu")
    reference.config.eval = model.config.eval
    got, want = model.segment(image, ["dog", "sky"]), reference.segment(image, ["dog", "sky"])
    assert np.array_equal(got.scores, want.scores)
    with pytest.raises(CheckpointError, match="is a file; give the model's directory"):
        infoclip.load(run / "model" / "model.safetensors")


def test_every_entry_must_fit(tiny: tuple[Segmentor, Path], tmp_path: Path) -> None:
    segmentor, _ = tiny
    good = segmentor.published_state_dict()
    settings = [f"clip.model={tmp_path / 'tiny_clip.json'}"]
    cases = {
        "unknown .sem_seg_head.extra": {**good, "sem_seg_head.extra": torch.zeros(1)},
        "missing .upsample1.bias": {k: v for k, v in good.items() if k != "upsample1.bias"},
        r"upsample2.bias has shape \[1\]": {**good, "upsample2.bias": torch.zeros(1)},
        "does not belong": {**good, MASK: good[MASK] + 1},
        "not finite": {**good, "upsample1.bias": good["upsample1.bias"] * float("nan")},
        "lacks .*conv1.weight": {"upsample1.bias": torch.zeros(1)},
        "conv1.weight has shape": {**good, f"{HEAD}conv1.weight": torch.zeros(3)},
        "less data than its shape": {**good, f"{HEAD}conv1.weight": torch.zeros(1).expand(10**9, 1, 7, 7)},
        "'a', which is no tensor": {"a": 1},
        "an empty table": {},
        "entries are missing": {k: v for k, v in good.items() if ".layers.0.attention." not in k},
    }
    for part, state in cases.items():
        torch.save({"model": state}, tmp_path / "bad.pth")
        with pytest.raises(CheckpointError, match=part) as caught:
            convert_catseg(tmp_path / "bad.pth", tmp_path / "out", settings)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
    # far larger sizes than the file's are refused by shape, before anything of that size is made
    huge = {**good, f"{HEAD}conv1.weight": torch.zeros(200_000, 1, 7, 7)}
    torch.save({"model": huge}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="no CAT-Seg checkpoint of this kind"):
        read_catseg(tmp_path / "bad.pth", settings)


class Runs:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_files_that_are_not_read(tiny: tuple[Segmentor, Path], tmp_path: Path) -> None:
    _, run = tiny
    good, bad = tmp_path / "good.pth", tmp_path / "bad.pth"
    write_catseg(run, good)
    contents = [good.read_bytes()[:-1000], b"", b"no checkpoint", pickle.dumps({"model": Runs(tmp_path / "ran")})]
    for content in contents:
        bad.write_bytes(content)
        with pytest.raises(CheckpointError, match="is damaged, or holds more than tensors"):
            read_catseg(bad)
    for legacy in (True, False):
        torch.save({"model": Runs(tmp_path / "ran")}, bad, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(CheckpointError, match="it can run code"):
            read_catseg(bad)
    assert not (tmp_path / "ran").exists()
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(bad, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in source.namelist():
            packed.writestr(entry, source.read(entry))
    with pytest.raises(CheckpointError, match="compressed archive"):
        read_catseg(bad)
    torch.save([torch.zeros(2)], bad)
    with pytest.raises(CheckpointError, match="holds a list"):
        read_catseg(bad)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_catseg(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_catseg(run)
    with pytest.raises(ConfigError, match="did you mean 'num_heads'"):
        read_catseg(good, ["num_head=3"])
    with pytest.raises(DataError, match="is a file; expected a folder"):
        convert_catseg(good, good)
    with pytest.raises(StorageError, match="is a folder; name a file"):
        write_catseg(run, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="Cannot write the checkpoint"):
        write_catseg(run, tmp_path / "file" / "x.pth")
