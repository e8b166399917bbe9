from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infoclip.config import Config, apply_overrides, config_from_dict, config_to_dict, load_config, save_config
from infoclip.errors import ConfigError
from infoclip.recipes import describe_recipe, get_recipe, list_recipes


@pytest.mark.parametrize("name", list_recipes())
def test_recipe_is_complete_fresh_and_survives_json(name: str, tmp_path: Path) -> None:
    config = get_recipe(name)
    assert config.name == name
    assert describe_recipe(name).endswith((".", ")"))
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config
    config.optim.lr = 123.0
    assert get_recipe(name).optim.lr != 123.0


def test_published_settings() -> None:
    """CAT-Seg's merged configs, value by value (paper section 4.1 and vitb_384.yaml, vitl_336.yaml)."""
    base, large = get_recipe("catseg-vitb16-coco"), get_recipe("catseg-vitl14-coco")
    o, m, d = base.optim, base.model, base.data
    assert (o.lr, o.clip_lr_multiplier, o.betas, o.weight_decay) == (2e-4, 0.01, (0.9, 0.999), 1e-4)
    assert (o.weight_decay_norm, o.clip_grad_norm, o.clip_grad, o.schedule, o.warmup_steps) == (
        0.0, 0.01, "joint", "cosine", 0,
    )  # fmt: skip
    assert (m.hidden_dim, m.num_layers, m.num_heads, m.window_size, m.attention_type) == (128, 2, 4, 12, "linear")
    assert (m.pooling_train, m.pooling_eval, m.pad_len) == (2, 1, 256)
    assert (m.decoder_dims, m.decoder_guidance_dims, m.decoder_guidance_proj_dims) == ((64, 32), (256, 128), (32, 16))
    assert (d.resize, d.resize_max, d.crop, d.flip, d.color_jitter) == (384, 1333, 384, True, True)
    assert (d.batch_size, d.sample_classes, d.classes, d.ignore_index) == (4, 0, "coco_stuff_171", 255)
    assert (base.train.steps, base.train.precision, base.train.ignored) == (80_000, "fp32", "negative")
    assert (base.clip.image_size, large.clip.image_size) == (384, 336)
    assert (base.clip.tune, base.clip.tune_positions, base.clip.dense) == ("attention", False, "value-cls")
    assert (base.eval.size, base.eval.window, base.eval.overlap, base.eval.sliding_window) == (640, 384, 0.333, True)
    assert base.align.method == large.align.method == "none"


@pytest.mark.parametrize("size", ["vitb16", "vitl14"])
def test_infoclip_differs_from_catseg_only_in_the_alignment(size: str) -> None:
    ours, base = get_recipe(f"infoclip-{size}-coco"), get_recipe(f"catseg-{size}-coco")
    assert ours.align.method == "infoclip"
    assert (ours.align.transfer_weight, ours.align.compression_weight, ours.align.alpha) == (1.0, 1.0, 2.0)
    assert dataclasses.replace(ours, align=base.align, name=base.name) == base


def test_scenes_recipes_differ_only_in_the_alignment() -> None:
    ours, base = get_recipe("scenes"), get_recipe("scenes-finetune")
    assert ours.align.method == "infoclip"
    assert base.align.method == "none"
    assert dataclasses.replace(ours, align=base.align, name=base.name) == base


@pytest.mark.parametrize(
    ("given_name", "near"),
    [("scene", "scenes"), ("catseg-vitb16", "catseg-vitb16-coco"), ("Infoclip-vitl14-coco", "vitl")],
)
def test_unknown_recipe_names_the_nearest(given_name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"Unknown recipe '{given_name}'; did you mean '.*{near}"):
        get_recipe(given_name)


def test_overrides_reach_their_field_and_leave_the_original() -> None:
    base = get_recipe("scenes")
    config = apply_overrides(
        base, ["optim.lr=1e-4", "num_layers=3", "betas=0.8,0.9", "flip=false", "method=kl", "steps=1_000", "root=a=b"]
    )
    assert (config.optim.lr, config.model.num_layers, config.optim.betas) == (1e-4, 3, (0.8, 0.9))
    assert (config.data.flip, config.align.method, config.train.steps) == (False, "kl", 1000)
    assert config.data.root == "a=b"
    assert base == get_recipe("scenes")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("lr", "expected key=value"),
        ("=3", "expected key=value"),
        ("learning_rat=3", "Unknown key 'learning_rat'"),
        ("optim.lrr=3", "did you mean 'optim.lr'"),
        ("batch_size=3", "ambiguous: write one of data.batch_size, eval.batch_size"),
        ("optim.lr=fast", "expected a number"),
        ("steps=1.5", "expected a whole number"),
        ("flip=maybe", "expected true or false"),
        ("method=infoclop", "did you mean 'infoclip'"),
        ("betas=0.9", "expected 2 values"),
        ("hidden_dim=30", "model.hidden_dim is 30; expected a positive multiple of model.num_heads"),
        ("steps=0", "train.steps is 0; expected at least 1"),
        ("alpha=0", "align.alpha"),
    ],
)
def test_a_wrong_override_ends_in_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        apply_overrides(get_recipe("scenes"), [override])
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_batch_of_one_has_no_batch_samples_to_compare() -> None:
    one = ["align.samples=batch", "data.batch_size=1"]
    with pytest.raises(ConfigError, match=r"align\.samples=batch compares .* data\.batch_size is 1"):
        apply_overrides(get_recipe("scenes"), one)
    apply_overrides(get_recipe("scenes"), [*one, "align.method=kl"])


def test_config_files_that_are_not_configs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Cannot read the config"):
        load_config(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("lr = 3")
    with pytest.raises(ConfigError, match="is not a config: expected JSON"):
        load_config(tmp_path / "text.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match="expected a JSON object"):
        load_config(tmp_path / "list.json")
    data = config_to_dict(Config())
    data["optim"]["learning"] = 1
    (tmp_path / "key.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=r"Unknown key 'optim\.learning'"):
        load_config(tmp_path / "key.json")


@settings(max_examples=50, deadline=None)
@given(
    lr=st.floats(1e-8, 10, allow_nan=False),
    steps=st.integers(1, 10**6),
    dims=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    center=st.booleans(),
)
def test_any_value_survives_the_command_line_and_json(
    lr: float, steps: int, dims: tuple[int, int], center: bool
) -> None:
    config = apply_overrides(
        Config(),
        [
            f"lr={lr!r}",
            f"steps={steps}",
            f"center={center}",
            f"decoder_dims={16 * dims[0]},{16 * dims[1]}",
            "decoder_guidance_proj_dims=8,8",  # below the smallest width that may come up
        ],
    )
    assert (config.optim.lr, config.train.steps, config.align.center) == (lr, steps, center)
    assert config.model.decoder_dims == (16 * dims[0], 16 * dims[1])
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
