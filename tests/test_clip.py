"""The dense CLIP: against open_clip, against recorded numbers, and by its properties at tiny sizes."""

from __future__ import annotations

import copy
import dataclasses
import json
import socket
import zipfile
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from parity_clip import check_clip_dense
from parity_common import load_case
from safetensors.torch import save_file
from torch.nn import functional as F

from infoclip.clip import Architecture, DenseCLIP, Tower, load_clip
from infoclip.clip.architecture import architecture_of, model_config, read_architecture
from infoclip.clip.weights import join_projections, read_weights, split_projections
from infoclip.config import ClipConfig
from infoclip.errors import CheckpointError, ConfigError, StorageError

GOLDEN = Path(__file__).parent / "golden"
# float32 sums of a few hundred terms in another order differ by some units in the last place (6e-8 each).
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def tiny_config(**vision: Any) -> dict[str, Any]:
    """An open_clip model config: 3 visual blocks of width 24 on 4 x 4 patches, joint width 20."""
    return {
        "embed_dim": 20,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": 32,
            "patch_size": 8,
            "width": 24,
            "layers": 3,
            "head_width": 12,
            "mlp_ratio": 2.0,
            **vision,
        },
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }


def tiny_open_clip(seed: int = 0, text: dict[str, Any] | None = None, **vision: Any) -> open_clip.CLIP:
    """The open_clip model of :func:`tiny_config`, its weights far from their initial values."""
    config = tiny_config(**vision)
    config["text_cfg"] |= {"vocab_size": 60} | (text or {})
    torch.manual_seed(seed)
    model = open_clip.CLIP(**config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def images(height: int = 32, width: int = 32, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def write_config(folder: Path, config: dict[str, Any] | None = None) -> Path:
    path = folder / "tiny.json"
    path.write_text(json.dumps(tiny_config() if config is None else config), encoding="utf-8")
    return path


# Against recorded numbers


def test_contrast_of_the_two_residuals() -> None:
    """The mode ``value`` is the recorded sibling with the full residual, and differs from the published mode."""
    case = load_case(GOLDEN / "clip_dense.json")
    rows = check_clip_dense(case.tensors, case.info, contrast=True)
    assert len(rows) == 2
    for name, got, want in rows:
        # No float64 distance is recorded for these; those of their likes are 1e-6 of the maximum on either side.
        assert (got - want).abs().max() <= 5e-6 * want.abs().max(), name
        assert (case.tensors[name.removeprefix("modelpy.")] - want).abs().max() > 0.1 * want.abs().max()


def test_parity_notices_a_wrong_weight() -> None:
    case = load_case(GOLDEN / "clip_dense.json")
    key = "sd.visual.transformer.resblocks.1.attn.v_proj_weight"
    case.tensors[key] = case.tensors[key].clone()
    case.tensors[key][0, 0] += 1e-2
    rows = [case.row(name, got) for name, got, _ in check_clip_dense(case.tensors, case.info)]
    wrong = {row.name for row in rows if not row.ok}
    assert "out.up.dense" in wrong
    assert "out.text" not in wrong


# Against open_clip


@pytest.mark.parametrize(
    "vision",
    [
        {},
        {"pool_type": "avg"},
        {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True},
        {"ls_init_value": 0.5},
        {"act_kwargs": {}, "norm_kwargs": {"eps": 1e-3}},
        {"image_size": [24, 40]},
    ],
    ids=["token", "average", "norm after pool", "layer scale", "eps", "oblong"],
)
@pytest.mark.parametrize("quick", [True, False])
def test_global_embedding_equals_open_clip(vision: dict[str, Any], quick: bool) -> None:
    torch.manual_seed(0)
    model = open_clip.CLIP(**(tiny_config(**vision) | {"quick_gelu": quick}))
    clip = DenseCLIP.from_open_clip(model)
    image = images(24, 40) if "image_size" in vision else images()
    with torch.no_grad():
        torch.testing.assert_close(clip.encode_global(image), model.encode_image(image), **CLOSE)


def test_global_embedding_at_another_resolution_equals_open_clip_with_resized_positions() -> None:
    model = tiny_open_clip(pool_type="avg")
    clip = DenseCLIP.from_open_clip(model)
    other = tiny_open_clip(pool_type="avg", image_size=[48, 24])
    state = model.state_dict() | {"visual.positional_embedding": clip.visual.positions(6, 3).detach()}
    other.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(clip.encode_global(images(48, 24)), other.encode_image(images(48, 24)), **CLOSE)


@pytest.mark.parametrize(
    "text",
    [
        {},
        {"pool_type": "eos", "eos_id": 59},
        {"pool_type": "first"},
        {"pool_type": "last"},
        {"pool_type": "last", "no_causal_mask": True},
        {"proj_bias": True},
        {"ls_init_value": 0.5},
    ],
    ids=["argmax", "eos", "first", "last", "bidirectional", "biased projection", "layer scale"],
)
def test_text_equals_open_clip(text: dict[str, Any]) -> None:
    model = tiny_open_clip(text=text)
    clip = DenseCLIP.from_open_clip(model)
    tokens = token_ids(clip.context_length)
    with torch.no_grad():
        torch.testing.assert_close(clip.encode_text(tokens), model.encode_text(tokens), **CLOSE)


def token_ids(context: int, lengths: tuple[int, ...] = (5, 9, 3)) -> torch.Tensor:
    """Start, some words, end token (the largest id, 59), padding."""
    ids = torch.zeros(len(lengths), context, dtype=torch.int64)
    generator = torch.Generator().manual_seed(2)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(1, 58, (length,), generator=generator)
        ids[row, 0], ids[row, length - 1] = 58, 59
    return ids


def test_trained_dense_mode_agrees_with_open_clip() -> None:
    """With average pooling, the mean of the dense embeddings of the untouched block is the image's embedding."""
    model = tiny_open_clip(pool_type="avg")
    clip = DenseCLIP.from_open_clip(model, dense="attention", guidance_layers=(0, 2))
    with torch.no_grad():
        features = clip.encode_image(images())
        torch.testing.assert_close(features.dense.mean(dim=(2, 3)), model.encode_image(images()), **CLOSE)
        hidden = model.forward_intermediates(images(), image_indices=[0, 2])["image_intermediates"]
    for got, want in zip(features.guidance, hidden, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


def test_state_dict_round_trip_is_exact() -> None:
    model = tiny_open_clip(ls_init_value=0.1)
    clip = DenseCLIP.from_open_clip(model)
    state, stock = model.state_dict(), clip.stock_state_dict()
    assert list(sorted(stock)) == sorted(state)
    assert all(torch.equal(stock[key], state[key]) for key in state)
    other = tiny_open_clip(seed=1, ls_init_value=0.1)
    other.load_state_dict(stock)
    again = DenseCLIP.from_open_clip(other)
    assert all(torch.equal(a, b) for a, b in zip(clip.state_dict().values(), again.state_dict().values(), strict=True))
    separate = split_projections(state)
    assert not any("in_proj_weight" in key for key in separate)
    assert set(join_projections(separate)) == set(state)


def test_weights_are_copied_not_shared() -> None:
    model = tiny_open_clip()
    clip = DenseCLIP.from_open_clip(model)
    before = clip.visual.proj.detach().clone()
    with torch.no_grad():
        model.visual.proj.zero_()
        model.visual.transformer.resblocks[0].attn.in_proj_weight.zero_()
    assert torch.equal(clip.visual.proj, before)
    assert clip.visual.transformer.resblocks[0].attn.q_proj_weight.abs().sum() > 0


def test_parameter_names_are_catsegs() -> None:
    names = set(DenseCLIP.from_open_clip(tiny_open_clip()).state_dict())
    case = load_case(GOLDEN / "clip_dense.json")
    recorded = {name.removeprefix("sd.") for name in case.tensors if name.startswith("sd.")}
    assert {n for n in names if ".2." not in n} == {n for n in recorded if ".2." not in n and ".3." not in n}


def test_random_weights_have_open_clips_distribution() -> None:
    """Standard deviations of large tensors agree with those of a fresh open_clip model."""
    config = tiny_config(width=96, head_width=32)
    config["text_cfg"] |= {"width": 64, "vocab_size": 300}
    torch.manual_seed(3)
    stock = open_clip.CLIP(**config).state_dict()
    clip = DenseCLIP(read_architecture(config, "tiny"))
    clip.reset_parameters()
    for key, value in clip.stock_state_dict().items():
        assert value.isfinite().all(), key
        if value.numel() >= 1000:
            # The deviation of 1000 draws is known to 1 / sqrt(2000) = 2.2 %: 12 % is more than five times that.
            assert abs(value.std() / stock[key].std() - 1) < 0.12, key
        elif value.std(correction=0) == 0 or stock[key].std(correction=0) == 0:
            torch.testing.assert_close(value, stock[key])


# Dense images


@pytest.mark.parametrize("mode", ["value-cls", "value", "attention"])
@pytest.mark.parametrize("size", [(32, 32), (48, 48), (16, 40), (8, 8)])
def test_any_resolution(mode: Any, size: tuple[int, int]) -> None:
    clip = DenseCLIP.from_open_clip(tiny_open_clip(), dense=mode)
    features = clip.encode_image(images(*size))
    grid = (size[0] // 8, size[1] // 8)
    assert features.dense.shape == (2, 20, *grid)
    assert [g.shape for g in features.guidance] == [(2, 24, *grid)] * 2
    assert features.dense.isfinite().all()


def test_rows_and_columns_are_not_exchanged() -> None:
    """A change in the top right patch shows there first: in the value path patches only meet in earlier blocks."""
    clip = DenseCLIP.from_open_clip(tiny_open_clip(layers=1), dense="attention")
    image = images(16, 40)
    changed = image.clone()
    changed[:, :, :8, -8:] += 1
    with torch.no_grad():
        difference = (clip.visual.dense_tokens(changed, "value")[0] - clip.visual.dense_tokens(image, "value")[0])[
            :, 1:
        ]
    moved = difference.abs().sum(dim=(0, 2)).unflatten(0, (2, 5)) > 0
    want = torch.zeros(2, 5, dtype=torch.bool)
    want[0, -1] = True
    assert torch.equal(moved, want)


def test_positions_of_an_oblong_grid() -> None:
    """Each axis is resized by itself: an embedding that only depends on the row keeps doing so."""
    clip = DenseCLIP.from_open_clip(tiny_open_clip())
    with torch.no_grad():
        rows = torch.arange(4.0)[:, None].expand(4, 4).reshape(16, 1).expand(16, 24)
        clip.visual.positional_embedding[1:] = rows
    assert clip.visual.positions(4, 4) is clip.visual.positional_embedding
    resized = clip.visual.positions(8, 2)
    assert torch.equal(resized[0], clip.visual.positional_embedding[0])
    grid = resized[1:].unflatten(0, (8, 2))
    torch.testing.assert_close(grid[:, 0], grid[:, 1])
    want = F.interpolate(torch.arange(4.0)[None, None, :, None], size=(8, 1), mode="bicubic", align_corners=False)
    torch.testing.assert_close(grid[:, 0, 0], want[0, 0, :, 0])


@pytest.mark.parametrize("shape", [(2, 3, 30, 32), (3, 32, 32), (2, 1, 32, 32), (2, 3, 0, 32)])
def test_wrong_image_shapes_are_refused(shape: tuple[int, ...]) -> None:
    clip = DenseCLIP.from_open_clip(tiny_open_clip())
    with pytest.raises(ValueError, match=r"expected an image"):
        clip.encode_image(torch.zeros(shape))


def test_published_mode_uses_the_class_token_as_only_residual() -> None:
    """The last block written out."""
    clip = DenseCLIP.from_open_clip(tiny_open_clip())
    with torch.no_grad():
        hidden = clip.visual.dense_tokens(images(), "value-cls", keep=(1,))[1][0]
        block = clip.visual.transformer.resblocks[2]
        bias = block.attn.in_proj_bias[48:]
        value = block.attn.out_proj(F.linear(block.ln_1(hidden), block.attn.v_proj_weight, bias))
        tokens = value + hidden[:, :1]
        tokens = tokens + block.mlp(block.ln_2(tokens))
        want = clip.visual.ln_post(tokens) @ clip.visual.proj
        got = clip.encode_image(images()).dense
    torch.testing.assert_close(got, want[:, 1:].transpose(1, 2).unflatten(2, (4, 4)), **CLOSE)


def test_last_block_has_zero_gradient_for_query_and_key() -> None:
    clip = DenseCLIP.from_open_clip(tiny_open_clip())
    clip.parameter_policy("full")
    clip.encode_image(images()).dense.square().sum().backward()
    attn = clip.visual.transformer.resblocks[-1].attn
    for weight in (attn.q_proj_weight, attn.k_proj_weight):
        assert weight.grad is not None
        assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(attn.in_proj_bias.grad[:48], torch.zeros(48))
    assert attn.v_proj_weight.grad.abs().sum() > 0
    assert clip.visual.transformer.resblocks[0].attn.q_proj_weight.grad.abs().sum() > 0


def test_bf16_autocast_normalises_in_float32() -> None:
    clip = DenseCLIP.from_open_clip(tiny_open_clip())
    seen = []
    clip.visual.ln_post.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out.dtype)))
    with torch.no_grad():
        want = clip.encode_image(images()).dense
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = clip.encode_image(images()).dense
    assert seen[1] == (torch.float32, torch.float32)  # the residual stream keeps its digits
    # bfloat16 has 8 bits: products are good to 2^-9, and some tens of them in a row are summed.
    assert (got.float() - want).norm() < 0.03 * want.norm()
    half = torch.randn(4, 24, dtype=torch.bfloat16) + 50
    exact = F.layer_norm(half.float(), (24,), clip.visual.ln_post.weight, clip.visual.ln_post.bias, 1e-5)
    assert torch.equal(clip.visual.ln_post(half), exact.bfloat16())


@pytest.mark.parametrize("mode", ["value-cls", "value", "attention"])
def test_meta_tensors_and_whole_graphs(mode: Any) -> None:
    """Costs can be counted on meta tensors, and the compiler takes each encoder as one graph."""
    clip = DenseCLIP.from_open_clip(tiny_open_clip(), dense=mode)
    abstract = copy.deepcopy(clip).to("meta")
    assert abstract.encode_image(torch.empty(1, 3, 48, 32, device="meta")).dense.shape == (1, 20, 6, 4)
    clip.parameter_policy("attention")
    dense = torch.compile(lambda image: clip.encode_image(image).dense, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(dense(images()), clip.encode_image(images()).dense, **CLOSE)
    dense(images()).sum().backward()
    weight = clip.visual.transformer.resblocks[-1].attn.q_proj_weight
    assert weight.grad is not None
    assert (weight.grad.abs().sum() == 0) == (mode != "attention")


def test_double_precision_stays_double() -> None:
    clip = DenseCLIP.from_open_clip(tiny_open_clip()).double()
    with torch.no_grad():
        double = clip.encode_image(images().double()).dense
        single = clip.float().encode_image(images()).dense
    assert double.dtype == torch.float64
    assert 0 < (double - single).abs().max() < 1e-4


# What learns


@pytest.mark.parametrize(
    ("name", "vision_blocks", "text_blocks", "trainable"),
    [("ViT-B-16-quickgelu", 12, 12, 20_447_232), ("ViT-L-14-336-quickgelu", 24, 12, 64_487_424)],
)
def test_published_policy_trains_queries_and_values(
    name: str, vision_blocks: int, text_blocks: int, trainable: int
) -> None:
    """12 + 12 weights for each of q and v in ViT-B/16: 20.4 M parameters; 64.5 M in ViT-L/14."""
    with torch.device("meta"):
        clip = DenseCLIP(read_architecture(model_config(name)[0], name), image_size=336)
    names = clip.parameter_policy("attention")
    for part in ("q", "v"):
        found = [n for n in names if n.endswith(f"attn.{part}_proj_weight")]
        assert len([n for n in found if n.startswith("visual.")]) == vision_blocks
        assert len([n for n in found if not n.startswith("visual.")]) == text_blocks
    assert len(names) == 2 * (vision_blocks + text_blocks)
    # B: 24 of 768^2 and 24 of 512^2; L: 48 of 1024^2 and 24 of 768^2.
    assert sum(p.numel() for p in clip.parameters() if p.requires_grad) == trainable
    assert clip.guidance_layers == ((3, 7) if vision_blocks == 12 else (7, 15))
    assert (clip.embed_dim, clip.vision_width) == ((512, 768) if vision_blocks == 12 else (768, 1024))


def test_policies() -> None:
    clip = DenseCLIP.from_open_clip(tiny_open_clip())
    assert "visual.positional_embedding" in clip.parameter_policy("attention", tune_positions=True)
    assert not clip.text_frozen
    full = clip.parameter_policy("full")
    assert {n for n, _ in clip.named_parameters()} - set(full) == {"logit_scale"}
    clip.encode_image(images()).dense.sum().backward()
    clip.encode_text(token_ids(16)).sum().backward()
    assert all(p.grad is not None for p in clip.parameters() if p.requires_grad)
    assert clip.parameter_policy("frozen") == []
    assert clip.text_frozen
    assert not clip.encode_image(images()).dense.requires_grad
    with pytest.raises(ConfigError, match="attention, full or frozen"):
        clip.parameter_policy("everything")  # type: ignore[arg-type]


def test_frozen_copy_is_independent() -> None:
    clip = DenseCLIP.from_open_clip(tiny_open_clip(), tokenizer=open_clip.get_tokenizer("ViT-B-16")).train()
    clip.parameter_policy("full")
    clip.encode_image(images()).dense.sum().backward()
    teacher = clip.frozen_copy()
    want = teacher.encode_image(images()).dense
    assert not want.requires_grad
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert not teacher.training
    assert clip.training
    assert teacher.tokenizer is clip.tokenizer
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.zero_()
    assert torch.equal(teacher.encode_image(images()).dense, want)
    assert want.abs().sum() > 0


# Building and loading


def tiny_settings(folder: Path, **changes: Any) -> ClipConfig:
    return ClipConfig(**({"model": str(write_config(folder)), "pretrained": "", "image_size": 32} | changes))


def test_config_file_with_random_weights(tmp_path: Path) -> None:
    torch.manual_seed(5)
    clip = load_clip(tiny_settings(tmp_path, image_size=48))
    torch.manual_seed(5)
    again = load_clip(tiny_settings(tmp_path, image_size=48))
    assert all(torch.equal(a, b) for a, b in zip(clip.parameters(), again.parameters(), strict=True))
    assert (clip.image_size, clip.patch_size, clip.context_length) == (48, 8, 16)
    assert clip.guidance_layers == (0, 1)
    assert clip.arch.quick_gelu
    assert clip.mean == pytest.approx(open_clip.OPENAI_DATASET_MEAN)
    assert sum(p.requires_grad for p in clip.parameters()) == 2 * (3 + 2)
    assert clip.text_features(["cat", "sea, ocean"]).shape == (2, 1, 20)


def test_hub_layout_of_the_config_brings_its_statistics(tmp_path: Path) -> None:
    path = write_config(
        tmp_path, {"model_cfg": tiny_config(), "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    )
    clip = load_clip(ClipConfig(model=str(path), pretrained="", image_size=32))
    assert (clip.mean, clip.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def save_openai_archive(state: dict[str, torch.Tensor], path: Path) -> None:
    """A TorchScript archive with CLIP's parameters, as the OpenAI files are."""

    class Holder(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    root = Holder()
    for key, value in state.items():
        *parents, last = key.split(".")
        module: torch.nn.Module = root
        for name in parents:
            if name not in dict(module.named_children()):
                module.add_module(name, Holder())
            module = module.get_submodule(name)
        module.register_buffer(last, value.half() if value.ndim > 1 else value)
    for key, number in (("input_resolution", 32), ("context_length", 16), ("vocab_size", 49408)):
        root.register_buffer(key, torch.tensor(number))
    torch.jit.save(torch.jit.trace(root, torch.zeros(1)), str(path))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["safetensors", "pt", "training", "openai", "separate"])
def test_local_files(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = open_clip.CLIP(**tiny_config())
    state = {key: value.half().float() for key, value in model.state_dict().items()}
    path = tmp_path / ("weights.safetensors" if kind in ("safetensors", "separate") else "weights.pt")
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "separate":
        save_file({k: v.clone() for k, v in split_projections(state).items()}, path)
    elif kind == "pt":
        torch.save({key: value.half() for key, value in state.items()}, path)
    elif kind == "training":
        torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    else:
        save_openai_archive(state, path)
        assert read_weights(path).quick_gelu is True
    clip = load_clip(tiny_settings(tmp_path, pretrained=str(path)))
    stock = clip.stock_state_dict()
    assert all(torch.equal(stock[key], state[key]) for key in state)
    assert all(value.dtype == torch.float32 for value in stock.values())
    assert sum(p.requires_grad for p in clip.parameters()) == 10


def test_saved_weights_know_their_activation(tmp_path: Path) -> None:
    clip = load_clip(tiny_settings(tmp_path))
    path = tmp_path / "saved.safetensors"
    clip.save_stock(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved.safetensors", "tiny.json"]
    again = load_clip(tiny_settings(tmp_path, pretrained=str(path)))
    assert all(torch.equal(a, b) for a, b in zip(clip.parameters(), again.parameters(), strict=True))
    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps(tiny_config() | {"quick_gelu": False}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"trained with QuickGELU, but .* computes GELU; use a model config with"):
        load_clip(tiny_settings(tmp_path, model=str(plain), pretrained=str(path)))
    with pytest.raises(StorageError, match="Cannot write"):
        clip.save_stock(tmp_path / "nowhere" / "saved.safetensors")


@pytest.mark.parametrize(
    ("model", "tag", "right"),
    [
        ("ViT-B-16", "openai", "ViT-B-16-quickgelu"),
        ("ViT-L-14-336", "openai", "ViT-L-14-336-quickgelu"),
        ("ViT-B-16", "metaclip_400m", "ViT-B-16-quickgelu"),
        ("ViT-B-16", "dfn2b", "ViT-B-16-quickgelu"),
        ("ViT-B-16-quickgelu", "laion2b_s34b_b88k", "ViT-B-16"),
    ],
)
def test_activation_mismatch_is_refused(model: str, tag: str, right: str) -> None:
    with pytest.raises(ConfigError, match=f"use clip.model={right}\\.$"):
        load_clip(ClipConfig(model=model, pretrained=tag))


def test_activation_mismatch_of_local_files(tmp_path: Path) -> None:
    model = open_clip.CLIP(**tiny_config())
    path = tmp_path / "weights.pt"
    torch.save(model.state_dict(), path)
    load_clip(tiny_settings(tmp_path, pretrained=str(path)))  # a plain file does not tell
    beside = tmp_path / "open_clip_config.json"
    beside.write_text(json.dumps({"model_cfg": {"quick_gelu": False}}), encoding="utf-8")
    with pytest.raises(ConfigError, match="trained with GELU"):
        load_clip(tiny_settings(tmp_path, pretrained=str(path)))
    scalars = {key: torch.tensor(1) for key in ("input_resolution", "context_length", "vocab_size")}
    torch.save(dict(model.state_dict()) | scalars, path)  # an OpenAI state dict: QuickGELU whatever lies beside
    load_clip(tiny_settings(tmp_path, pretrained=str(path)))


def test_failed_download_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with pytest.raises(CheckpointError, match=r"^Cannot download the weights 'openai' of ViT-B-16-quickgelu .*PATH\.$"):
        load_clip(ClipConfig())
    monkeypatch.setattr("infoclip.clip.load._has_network", lambda: True)
    monkeypatch.setattr("open_clip.pretrained.download_pretrained", unreachable)
    with pytest.raises(CheckpointError, match="Name or service not known"):
        load_clip(ClipConfig())


def test_downloaded_weights_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tag's file goes through the same reader; its statistics are the tag's."""
    name = "ViT-tiny-quickgelu"
    torch.manual_seed(0)
    path = tmp_path / "downloaded.safetensors"
    model = open_clip.CLIP(**tiny_config())
    save_file(dict(model.state_dict()), path)
    tag = {"hf_hub": "someone/tiny/", "quick_gelu": True, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    monkeypatch.setattr("open_clip.get_model_config", lambda n: tiny_config() if n == name else None)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {"mine": tag})
    monkeypatch.setattr("infoclip.clip.load._has_network", lambda: True)
    monkeypatch.setattr("open_clip.pretrained.download_pretrained", lambda entry: str(path))
    clip = load_clip(ClipConfig(model=name, pretrained="mine", image_size=32))
    assert torch.equal(clip.visual.proj, model.visual.proj)
    assert clip.mean == (0.5, 0.5, 0.5)


def broken_states() -> dict[str, Any]:
    state = dict(open_clip.CLIP(**tiny_config()).state_dict())
    wide = dict(open_clip.CLIP(**tiny_config(width=36)).state_dict())
    missing = {key: value for key, value in state.items() if key != "visual.proj"}
    return {
        "wide": (wide, "another architecture"),
        "missing": (missing, r"without visual\.proj"),
        "unknown": (state | {"extra.weight": torch.zeros(1)}, r"unknown extra\.weight"),
        "deep": (dict(open_clip.CLIP(**tiny_config(layers=4)).state_dict()), "unknown visual.transformer.resblocks.3"),
        "foreign": ({"conv.weight": torch.zeros(2)}, "without .* and .* more and with the unknown conv.weight"),
        "empty": ({}, "holds no state dict"),
        "numbers": ({"a": 3}, "holds no state dict"),
    }


@pytest.mark.parametrize("kind", ["wide", "missing", "unknown", "deep", "foreign", "empty", "numbers"])
def test_weights_of_another_architecture(kind: str, tmp_path: Path) -> None:
    state, message = broken_states()[kind]
    path = tmp_path / "weights.pt"
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=message) as error:
        load_clip(tiny_settings(tmp_path, pretrained=str(path)))
    assert "weights.pt" in str(error.value)
    assert "\n" not in str(error.value)


def test_refused_weights_change_nothing() -> None:
    clip = DenseCLIP.from_open_clip(tiny_open_clip())
    before = copy.deepcopy(clip.state_dict())
    wrong = tiny_open_clip(seed=1).state_dict()
    wrong["visual.ln_post.weight"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"visual\.ln_post\.weight is \[3\] there and \[24\] here"):
        clip.load_stock_state_dict(wrong)
    assert all(torch.equal(clip.state_dict()[key], before[key]) for key in before)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "archive.pt"])
def test_damaged_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "archive.pt":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/constants.pkl", b"no pickle")
    else:
        path.write_bytes(b"\x10" * 200)
    with pytest.raises(CheckpointError, match="damaged"):
        load_clip(tiny_settings(tmp_path, pretrained=str(path)))


class Payload:
    """Would create a file when unpickled by a loader that runs code."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.target, "w"))


def test_weight_files_run_no_code(tmp_path: Path) -> None:
    path, target = tmp_path / "weights.pt", tmp_path / "ran"
    torch.save({"weights": Payload(str(target))}, path)
    with pytest.raises(CheckpointError, match="more than tensors and plain values"):
        load_clip(tiny_settings(tmp_path, pretrained=str(path)))
    assert not target.exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "ViT-B-17"}, ConfigError, "did you mean 'ViT-B-16'"),
        ({"model": "RN50"}, ConfigError, "ModifiedResNet"),
        ({"model": "convnext_base_w"}, ConfigError, "timm image encoder"),
        ({"model": "roberta-ViT-B-32"}, ConfigError, "text tower of its own kind"),
        ({"model": "coca_ViT-B-32"}, ConfigError, "text tower of its own kind"),
        ({"model": "missing.json"}, ConfigError, "Cannot read the CLIP model config missing.json"),
        ({"model": "builtin:other"}, ConfigError, "built-in ones are builtin:scenes and builtin:scenes-convnext"),
        ({"model": "ViT-B-16", "pretrained": "builtin:scenes"}, ConfigError, "use clip.model=builtin:scenes"),
        ({"model": "ViT-B-16-quickgelu", "pretrained": "opanai"}, CheckpointError, "did you mean 'openai'"),
        ({"model": "ViT-B-16", "pretrained": "/no/file.pt"}, CheckpointError, "neither a weight file nor"),
        ({"pretrained": "/no/file.pt"}, CheckpointError, "no tag"),
        ({"image_size": 33}, ConfigError, "multiple of the patch size 8"),
        ({"guidance_layers": (2,)}, ConfigError, "blocks from 0 to 1"),
        ({"guidance_layers": (-1,)}, ConfigError, "blocks from 0 to 1"),
        ({"templates": "catsag"}, ConfigError, "did you mean 'catseg'"),
        ({"dense": "values"}, ConfigError, "value-cls, value or attention"),
    ],
)
def test_wrong_settings(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_settings(tmp_path, **changes)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message) as caught:
        load_clip(settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"embed_dim": 3}'])
def test_files_that_are_no_model_config(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="is not a CLIP model config"):
        load_clip(ClipConfig(model=str(path), pretrained=""))
    path.write_text(json.dumps(tiny_config(breadth=3)), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"open_clip cannot build .*breadth"):
        load_clip(ClipConfig(model=str(path), pretrained=""))


def test_folder_of_a_pretrained_scenes_clip_brings_its_words(tmp_path: Path) -> None:
    """``model=FOLDER/config.json`` with a ``vocabulary.json`` beside it reads words, not open_clip's pieces."""
    config = tiny_config()
    words = ["<pad>", "<unk>", "<start>", "red", "circle", "<end>"]
    config["text_cfg"] |= {"vocab_size": len(words)}
    path = write_config(tmp_path, config)
    (tmp_path / "vocabulary.json").write_text(json.dumps(words), encoding="utf-8")
    clip = load_clip(ClipConfig(model=str(path), pretrained="", image_size=32, templates="plain"))
    assert clip.prompt_tokens(["red circle"])[0, 0].tolist()[:5] == [2, 3, 4, 5, 0]
    (tmp_path / "vocabulary.json").write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(CheckpointError, match="is not a vocabulary"):
        load_clip(ClipConfig(model=str(path), pretrained="", image_size=32))


def test_shipped_clip_loads() -> None:
    clip = load_clip(
        ClipConfig(model="builtin:scenes", pretrained="builtin:scenes", image_size=96, templates="scenes", tune="full")
    )
    assert clip.arch.pool == "avg"
    random = load_clip(ClipConfig(model="builtin:scenes", pretrained="", image_size=96, templates="scenes"))
    assert random.arch == clip.arch
    assert not torch.equal(random.visual.proj, clip.visual.proj)
    assert torch.equal(random.tokenize(["red circle"]), clip.tokenize(["red circle"]))


def test_every_plain_vit_of_open_clip_can_be_described() -> None:
    """All ViT configs that open_clip builds from its own transformers, on the meta device."""
    described = []
    for name in ("ViT-B-16", "ViT-B-32-quickgelu", "ViT-L-14-336", "ViT-H-14-CLIPA", "ViT-M-16-alt",
                 "ViT-L-14-worldwide"):  # fmt: skip
        config = model_config(name)[0]
        arch = read_architecture(config, name)
        with torch.device("meta"):
            model = open_clip.CLIP(**config)
            clip = DenseCLIP(arch)
        assert architecture_of(model) == arch
        ours = join_projections(clip.state_dict())
        theirs = model.state_dict()
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
        described.append(arch)
    assert [a.quick_gelu for a in described[:3]] == [False, True, False]
    assert (described[3].pool, described[3].norm_after_pool, described[3].causal) == ("avg", True, False)
    assert described[4].vision.layer_scale
    assert (described[5].text_pool, described[5].eos_id) == ("eos", 1)


def test_nothing_is_left_uninitialised() -> None:
    """A description of every branch: fill with NaN, reset, and no NaN is left."""
    tower = Tower(16, 2, 2, 32, "gelu_tanh", layer_scale=True)
    arch = Architecture(12, tower, tower, 8, (2, 3), 10, 20, text_projection="linear_bias", logit_bias=True)
    clip = DenseCLIP(dataclasses.replace(arch), guidance_layers=(0,))
    with torch.no_grad():
        for name, parameter in clip.named_parameters():
            if "ls_" not in name:
                parameter.fill_(torch.nan)
    clip.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in clip.parameters())
