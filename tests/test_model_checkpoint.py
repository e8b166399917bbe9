"""Model directories: what is written is read back, wrong ones are refused, and a failed write leaves nothing."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import small_config

from infoclip import storage
from infoclip.config import Config, config_to_dict
from infoclip.errors import CheckpointError, StorageError
from infoclip.model import checkpoint
from infoclip.model.checkpoint import load_model, save_model
from infoclip.model.segmentor import Segmentor, build_segmentor

CLASSES = ["red circle", "blue sky, heaven"]


@pytest.fixture
def made(tmp_path: Path) -> tuple[Segmentor, Config]:
    config = small_config(tmp_path)
    return build_segmentor(config), config


def same(first: Segmentor, second: Segmentor) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def test_round_trip(made: tuple[Segmentor, Config], tmp_path: Path) -> None:
    segmentor, config = made
    segmentor.clip.mean, segmentor.clip.std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    save_model(segmentor, config, CLASSES, tmp_path / "run" / "model", {"step": 3})
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["model"]
    for path in (tmp_path / "run", tmp_path / "run" / "model", str(tmp_path / "run")):
        state = torch.get_rng_state()
        loaded = load_model(path)
        assert torch.equal(torch.get_rng_state(), state)
        assert same(loaded.segmentor, segmentor)
        assert loaded.classes == CLASSES
        assert loaded.extra == {"step": 3}
        assert not loaded.segmentor.training
        assert (loaded.segmentor.clip.mean, loaded.segmentor.clip.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    stored = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert stored.keys() == segmentor.published_state_dict().keys()
    assert all(v.dtype == torch.float32 for v in stored.values())


def test_directory_can_be_moved_without_the_files_its_config_named(made: tuple[Segmentor, Config], tmp_path) -> None:
    _, config = made
    (tmp_path / "prompts.txt").write_text("a {} here\nthe {} there\n")
    config.clip.templates = str(tmp_path / "prompts.txt")
    segmentor = build_segmentor(config)
    save_model(segmentor, config, CLASSES, tmp_path / "model")
    Path(config.clip.templates).unlink()
    Path(config.clip.model).unlink()
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    loaded = load_model(tmp_path / "elsewhere")
    assert loaded.segmentor.num_templates == 2
    assert same(loaded.segmentor, segmentor)
    save_model(loaded.segmentor, loaded.config, CLASSES, tmp_path / "again")
    assert same(load_model(tmp_path / "again").segmentor, segmentor)


def test_half_precision_is_stored_as_float32(made: tuple[Segmentor, Config], tmp_path: Path) -> None:
    segmentor, config = made
    save_model(segmentor.half(), config, CLASSES, tmp_path / "model")
    assert same(load_model(tmp_path / "model").segmentor, segmentor.float())


def test_replacing_a_model(made: tuple[Segmentor, Config], tmp_path: Path, monkeypatch) -> None:
    segmentor, config = made
    for exchange in (storage._exchange, lambda first, second: False):
        monkeypatch.setattr(storage, "_exchange", exchange)
        with torch.no_grad():
            segmentor.upsample1.bias.add_(1)  # type: ignore[union-attr]
        (tmp_path / "model" / "stray").parent.mkdir(exist_ok=True)
        (tmp_path / "model" / "stray").touch()
        save_model(segmentor, config, CLASSES, tmp_path / "model")
        assert same(load_model(tmp_path / "model").segmentor, segmentor)
        assert not (tmp_path / "model" / "stray").exists()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "tiny_clip.json"]


def test_full_disk_leaves_the_old_model(made: tuple[Segmentor, Config], tmp_path: Path) -> None:
    segmentor, config = made
    save_model(segmentor, config, CLASSES, tmp_path / "model")
    old = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # the kernel refuses to write further
    try:
        with pytest.raises(StorageError, match=r"Cannot write the model .*model: .*; free some space") as caught:
            save_model(segmentor, config, ["other"], tmp_path / "model")
        with pytest.raises(StorageError):
            save_model(segmentor, config, CLASSES, tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.exit_code == 1
    assert str(caught.value).count("\n") == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "tiny_clip.json"]


@pytest.mark.parametrize("failing", ["_flush", "_replace", "save_config"])
def test_any_failure_leaves_nothing(made: tuple[Segmentor, Config], tmp_path: Path, monkeypatch, failing: str) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage if hasattr(storage, failing) else checkpoint, failing, fail)
    with pytest.raises(StorageError, match="No space left on device"):
        save_model(*made, CLASSES, tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["tiny_clip.json"]


def test_place_that_cannot_be_written(made: tuple[Segmentor, Config], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="Cannot write the model"):
        save_model(*made, CLASSES, tmp_path / "file" / "model")


@pytest.fixture
def saved(made: tuple[Segmentor, Config], tmp_path: Path) -> Path:
    return save_model(*made, CLASSES, tmp_path / "model")


def refuse(path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        load_model(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", "?"))
    assert caught.value.exit_code == 2


def test_missing(saved: Path, tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", "There is no model at .*nowhere")
    refuse(saved / "model.safetensors", "is a file; give the model's directory")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "lacks model.safetensors, config.json, classes.json")
    (saved / "classes.json").unlink()
    refuse(saved, "lacks classes.json")


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_weights(saved: Path, keep: int) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refuse(saved, "damaged or not a safetensors file")


def test_other_damage(saved: Path) -> None:
    config, classes = (saved / "config.json").read_text(), (saved / "classes.json").read_text()
    (saved / "config.json").write_text(config[:50])
    refuse(saved, "holds no usable model.*expected JSON")
    (saved / "config.json").write_text(config.replace('"hidden_dim"', '"hiden_dim"'))
    refuse(saved, "did you mean 'model.hidden_dim'")
    (saved / "config.json").write_text(config)
    (saved / "classes.json").write_text("[1, 2]")
    refuse(saved, "not a class list")
    (saved / "classes.json").write_text('{"a": 1}')
    refuse(saved, "expected a JSON list")
    (saved / "classes.json").write_text(classes)
    (saved / "model.safetensors").write_text("not weights at all" * 10)
    refuse(saved, "damaged or not a safetensors file")


def test_other_architecture(saved: Path, made: tuple[Segmentor, Config]) -> None:
    data = config_to_dict(made[1])
    data["model"]["num_layers"] = 2
    (saved / "config.json").write_text(json.dumps(data))
    refuse(saved, r"does not fit .*entries are missing .*layers\.1\.")
    data["model"]["num_layers"] = 1
    data["model"]["decoder_dims"] = [32, 32]
    (saved / "config.json").write_text(json.dumps(data))
    refuse(saved, r"has shape \[.*\] where \[.*\] is expected")
    data["clip"]["model"] = "ViT-B-61"
    (saved / "config.json").write_text(json.dumps(data))
    refuse(saved, "describes a model that cannot be built")


def test_foreign_weights(saved: Path) -> None:
    save_file({"a": torch.zeros(2)}, saved / "model.safetensors")
    refuse(saved, "entries are missing")
    save_file({"a": torch.zeros(2)}, saved / "model.safetensors", metadata={"infoclip": "scenes-clip"})
    refuse(saved, "holds 'scenes-clip' weights; expected a segmentor")


def test_weights_of_the_cpu_are_written_where_they_lie() -> None:
    """No second copy of a model is made to write it; what shares memory or has another type or layout is copied."""
    from infoclip.model.checkpoint import _storable

    x = torch.randn(4, 6)
    assert _storable(x).data_ptr() == x.data_ptr()
    for other in (x[:2], x.T, x.bfloat16(), x.double()):
        y = _storable(other)
        assert y.dtype == torch.float32
        assert y.is_contiguous()
        assert y.untyped_storage().nbytes() == 4 * y.numel()
        assert y.data_ptr() != x.data_ptr()
        assert torch.equal(y, other.float())
