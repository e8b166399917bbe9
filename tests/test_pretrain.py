"""Pretraining of the scenes' CLIP, its checkpoint and tokenizer, and what the shipped one can do."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infoclip import pretrain as P
from infoclip.clip import DenseCLIP, load_clip
from infoclip.clip.builtin import ASSETS, BuiltinClip, WordTokenizer, builtin_scenes, read_scenes_clip
from infoclip.clip.templates import resolve_templates
from infoclip.config import ClipConfig
from infoclip.data.scenes import OBJECT_CLASSES, SCENE_CLASSES, render_scenes
from infoclip.errors import CheckpointError, ConfigError, DataError, InfoclipWarning, NonFiniteLossError, StorageError

ASSET = ASSETS["scenes"]
TINY = P.PretrainConfig(steps=4, batch_size=16, eval_every=2, eval_images=4, large_share=0.25)


@pytest.fixture(scope="module")
def shipped() -> BuiltinClip:
    return builtin_scenes()


@pytest.fixture(scope="module")
def shipped_dense(shipped: BuiltinClip) -> DenseCLIP:
    return DenseCLIP.from_open_clip(
        shipped.model, dense="value", tokenizer=shipped.tokenizer, mean=shipped.mean, std=shipped.std
    ).eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrain") / "clip"
    P.pretrain_scenes(out, config=TINY, progress=False)
    return out


# Tokenizer


def _tokenizer() -> WordTokenizer:
    return WordTokenizer(P.scenes_vocabulary(), P.CONTEXT)


def test_tokens_of_a_caption() -> None:
    tokenizer = _tokenizer()
    ids = tokenizer(["A photo of a red-striped CIRCLE, on grass.", "sand"])
    assert ids.shape == (2, P.CONTEXT)
    assert ids.dtype == torch.int64
    words = [tokenizer.vocabulary[i] for i in ids[0].tolist()]
    expected = ["<start>", "a", "photo", "of", "a", "red", "striped", "circle", "on", "grass", "<end>"]
    assert words == expected + ["<pad>"] * (P.CONTEXT - len(expected))
    end = tokenizer.vocab_size - 1
    assert (ids == end).int().argmax(dim=1).tolist() == ids.argmax(dim=1).tolist()  # CLIP's pooling finds the end
    assert len(tokenizer.encode("a photo of sand")) == 4


def test_every_word_of_captions_and_common_templates_is_known() -> None:
    tokenizer = _tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("catseg", "plain", "scenes", "maftplus"):
            tokenizer([t.format(c) for t in resolve_templates(name) for c in SCENE_CLASSES])


def test_unknown_words_are_read_as_such_and_named_once() -> None:
    tokenizer = _tokenizer()
    with pytest.warns(InfoclipWarning, match=r"never read 'sky', 'zebra'; what it knows is: .*circle"):
        ids = tokenizer(["blue sky zebra"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer(["zebra sky"])
    assert ids[0, 2] == tokenizer.vocabulary.index("<unk>")
    assert ids[0, 1] == tokenizer.vocabulary.index("blue")


def test_tokenizer_refuses() -> None:
    tokenizer = _tokenizer()
    with pytest.raises(ValueError, match="at most 30 words, given 31"):
        tokenizer(["red " * 31])
    assert tokenizer(["red " * 30]).shape == (1, 32)
    for words in (["a", "<end>"], ["<pad>", "<unk>", "a", "<start>"], ["<pad>", "a", "a", "<end>"]):
        with pytest.raises(ValueError, match="expected"):
            WordTokenizer(words, 8)


# Losses


def test_contrastive_loss_is_clips() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(6, 5, generator=g), torch.randn(6, 5, generator=g)
    # open_clip's own loss on the same embeddings; 1e-6 covers another order of float32 sums.
    expected = open_clip.ClipLoss()(F.normalize(a, dim=1), F.normalize(b, dim=1), torch.tensor(7.0))
    assert torch.allclose(P.contrastive_loss(a, b, torch.tensor(7.0)), expected, atol=1e-6)


def test_phrase_patch_loss_by_hand() -> None:
    """Two patches, three orthogonal phrases: shares are soft-max values that can be written down."""
    phrases = torch.eye(3)
    patches = torch.tensor([[[2.0, 0, 0], [0, 3, 0]]])  # patch 0 shows phrase 0, patch 1 phrase 1; length is no matter
    named = torch.tensor([[True, True, False]])
    scale = torch.tensor(4.0)
    z = math.exp(4) + 2
    high, low = math.exp(4) / z, 1 / z
    consistent, coverage = P.phrase_patch_loss(patches, phrases, named, scale, 1)
    assert float(consistent) == pytest.approx(-math.log(high + low), rel=1e-5)
    assert float(coverage) == pytest.approx(-math.log(high), rel=1e-5)
    _, coverage = P.phrase_patch_loss(patches, phrases, named, scale, 2)
    assert float(coverage) == pytest.approx(-math.log((high + low) / 2), rel=1e-5)


def test_phrase_patch_loss_tells_local_from_leaking_patches() -> None:
    """Four patches, one on the object: naming the ground on the ground costs less than naming the object everywhere."""
    phrases = torch.eye(4)
    named = torch.tensor([[True, False, False, True]])  # object 0 on ground 3
    local = torch.stack([phrases[0], phrases[3], phrases[3], phrases[3]])[None]
    leaking = phrases[[0, 0, 0, 0]][None]
    absent = phrases[[0, 1, 3, 3]][None]
    scale = torch.tensor(10.0)

    def total(x: Tensor) -> float:
        return float(sum(P.phrase_patch_loss(x, phrases, named, scale, 1)))

    assert total(local) < total(leaking)
    assert total(local) < total(absent)


# Model and data


def test_fresh_model_is_open_clips_own_class() -> None:
    clip = P._new_clip(0)
    model = open_clip.CLIP(**P.scenes_model_config()["model_cfg"])
    model.load_state_dict(clip.stock_state_dict())
    image = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pooled, patches = P.encode_pictures(clip, image, (0, 0), "value")
        # What is trained is what open_clip and DenseCLIP compute; 1e-5 covers float32 sums in another order.
        assert torch.allclose(pooled, model.encode_image(image), atol=1e-5)
        assert patches is not None
        assert torch.allclose(patches.transpose(1, 2).unflatten(2, (12, 12)), clip.encode_image(image).dense, atol=1e-5)
        tokens = clip.tokenize(["a red plain cross"])
        assert torch.allclose(clip.encode_text(tokens), model.encode_text(tokens), atol=1e-5)


def test_small_pictures_use_a_window_of_the_positions() -> None:
    clip = P._new_clip(0)
    image = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        here, there = P._tokens(clip, image, (0, 0)), P._tokens(clip, image, (4, 3))
        whole = P._tokens(clip, torch.zeros(1, 3, 96, 96), (0, 0))
    grid = whole[:, 1:].unflatten(1, (12, 12))
    assert torch.allclose(here[:, 1:].unflatten(1, (8, 8)), grid[:, :8, :8], atol=1e-6)
    assert torch.allclose(there[:, 1:].unflatten(1, (8, 8)), grid[:, 4:, 3:11], atol=1e-6)


def test_parts_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = P._new_clip(0)
    image = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = P.encode_pictures(clip, image, (1, 2), "value")
        monkeypatch.setattr(P, "_CHUNK", 2 * 64)
        parts = P.encode_pictures(clip, image, (1, 2), "value")
    for a, b in zip(whole, parts, strict=True):
        assert torch.allclose(a, b, atol=1e-5)  # float32 sums over other batch sizes


def test_batches_follow_the_curriculum_and_the_captions() -> None:
    config = P.PretrainConfig(steps=100, batch_size=64)
    tokenizer = _tokenizer()
    first, middle, last = (P.TrainingBatch(config, step, tokenizer) for step in (0, 80, 99))
    counts = [(b.scenes.objects >= 0).sum(dim=1) for b in (first, middle, last)]
    assert int(counts[0].max()) == 1
    assert int(counts[1].max()) == 3
    assert int(counts[2].max()) == 4
    assert all(int(c.min()) == 0 for c in counts)
    assert first.images.shape[-1] == middle.images.shape[-1] == 64
    assert last.images.shape[-1] == 96
    for i, text in enumerate(middle.texts):  # a phrase counts as named exactly where the caption names it
        assert [n for n, k in zip(SCENE_CLASSES, middle.named[i].tolist(), strict=True) if k] == [
            name for name in SCENE_CLASSES if name in text
        ]
    again = P.TrainingBatch(config, 80, tokenizer)
    assert torch.equal(again.images, middle.images)
    assert torch.equal(again.tokens, middle.tokens)
    other = P.TrainingBatch(P.PretrainConfig(steps=100, batch_size=64, seed=1), 80, tokenizer)
    assert not torch.equal(other.images, middle.images)


# Checkpoint


def test_a_few_steps_write_a_complete_checkpoint(made: Path) -> None:
    assert sorted(p.name for p in made.iterdir()) == [
        "PROVENANCE.json", "config.json", "log.jsonl", "model.safetensors", "vocabulary.json",
    ]  # fmt: skip
    assert (made / "model.safetensors").stat().st_size < 6 * 2**20
    assert not list(made.parent.glob("*.partial"))
    log = [json.loads(line) for line in (made / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in log if "accuracy" in e] == [2, 4]
    assert {"contrastive", "consistent", "coverage"} <= set(log[1])
    provenance = json.loads((made / "PROVENANCE.json").read_text())
    assert provenance["config"]["steps"] == 4
    assert provenance["metrics"]["accuracy"] == log[-1]["accuracy"]
    clip = read_scenes_clip(made)
    assert isinstance(clip.model, open_clip.CLIP)
    assert not clip.model.training
    assert clip.tokenizer.vocab_size == clip.model.vocab_size


def test_same_seed_same_checkpoint(made: Path, tmp_path: Path) -> None:
    P.pretrain_scenes(tmp_path / "again", config=TINY, progress=False)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()


def test_figures_are_those_of_the_written_weights(made: Path) -> None:
    stored = read_scenes_clip(made)
    clip = DenseCLIP.from_open_clip(
        stored.model, dense="value", tokenizer=stored.tokenizer, mean=stored.mean, std=stored.std
    )
    found = P.evaluate_scenes_clip(clip.eval(), P.EvaluationSets(TINY.eval_images, TINY.eval_seed))
    metrics = json.loads((made / "PROVENANCE.json").read_text())["metrics"]
    for key, value in found.items():
        # Four pictures of a hardly trained model: another attention kernel may flip a few pixels of 36,864.
        assert value == pytest.approx(metrics[key], abs=1.0), key
    assert clip.dense == "value"


def test_training_refuses_what_cannot_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="steps is 0"):
        P.pretrain_scenes(tmp_path / "a", steps=0)
    with pytest.raises(ConfigError, match="patch_mode"):
        P.pretrain_scenes(tmp_path / "a", config=P.PretrainConfig(patch_mode="x"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/note").write_text("mine")
    with pytest.raises(DataError, match="already holds files"):
        P.pretrain_scenes(tmp_path / "full")
    with pytest.raises(DataError, match="is a file"):
        P.pretrain_scenes(tmp_path / "full/note")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(P, "contrastive_loss", lambda *_: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(NonFiniteLossError, match="step 0"):
        P.pretrain_scenes(tmp_path / "a", config=TINY, progress=False)
    monkeypatch.undo()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(P, "_save", full)
    with pytest.raises(StorageError, match="No space left"):
        P.pretrain_scenes(tmp_path / "a", config=P.PretrainConfig(steps=1, batch_size=4, eval_images=2), progress=False)
    assert list(tmp_path.iterdir()) == []


def test_damaged_checkpoints_are_refused(made: Path, tmp_path: Path) -> None:
    for name, content in (
        ("model.safetensors", b"short"),
        ("config.json", b"{}"),
        ("vocabulary.json", b'["<pad>", "<unk>", "<start>", "<end>"]'),
        ("vocabulary.json", None),
    ):
        folder = tmp_path / f"{name}-{content is None}"
        folder.mkdir()
        for file in made.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="CLIP of the scenes"):
            read_scenes_clip(folder)


# The shipped checkpoint


def test_shipped_checkpoint_is_one_default_run() -> None:
    provenance = json.loads((ASSET / "PROVENANCE.json").read_text())
    assert provenance["command"] == "infoclip pretrain scenes --out DIR --seed 0"
    assert provenance["config"] == vars(P.PretrainConfig())
    assert json.loads((ASSET / "config.json").read_text()) == P.scenes_model_config()
    assert json.loads((ASSET / "vocabulary.json").read_text()) == P.scenes_vocabulary()
    log = [json.loads(line) for line in (ASSET / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == provenance["config"]["steps"]
    assert {k: log[-1][k] for k in provenance["metrics"]} == provenance["metrics"]
    assert sum(p.stat().st_size for p in ASSET.iterdir()) < 6 * 2**20


def test_shipped_clip_knows_scenes_it_never_saw(shipped_dense: DenseCLIP) -> None:
    """Pictures of another seed than training and selection used; thresholds well below what was measured."""
    found = P.evaluate_scenes_clip(shipped_dense, P.EvaluationSets(48, seed=123_456_789), ("value", "value-cls"))
    assert found["accuracy"] > 80
    assert found["value/object_miou"] > 40
    assert found["value/background_recall"] > 90
    assert found["value/background_miou"] > 85


def test_figures_need_the_trained_weights(shipped_dense: DenseCLIP) -> None:
    """The negative control of the test above: the same evaluation on shuffled texts finds nothing."""

    class Shuffled(DenseCLIP):
        def text_features(self, class_names, templates=None):  # type: ignore[no-untyped-def]
            return super().text_features([*class_names[7:], *class_names[:7]], templates)

    clip = shipped_dense.frozen_copy()
    clip.__class__ = Shuffled
    found = P.evaluate_scenes_clip(clip, P.EvaluationSets(32, seed=123_456_789))
    assert found["accuracy"] < 20
    assert found["value/object_miou"] < 10


def test_builtin_name_loads_the_shipped_weights(shipped: BuiltinClip) -> None:
    clip = load_clip(
        ClipConfig(
            model="builtin:scenes", pretrained="builtin:scenes", dense="value", image_size=96, templates="scenes"
        )
    )
    scenes = render_scenes(4, 96, (1, 1), seed=5)
    image = P.normalise(scenes.images)
    with torch.no_grad():
        assert torch.allclose(clip.encode_global(image), shipped.model.encode_image(image), atol=1e-5)
        text = clip.text_features(list(OBJECT_CLASSES))
        assert text.shape == (48, 1, 128)
    assert clip.mean == pytest.approx(P.MEAN)


def test_building_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    builtin_scenes()
    assert torch.equal(state, torch.get_rng_state())
