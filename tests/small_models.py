"""Small models for tests: a random CLIP of a few thousand parameters and the segmentor around it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from infoclip.clip import Architecture, DenseCLIP, Tower, load_convnext_clip
from infoclip.config import AlignConfig, ClipConfig, Config, EvalConfig, MaskConfig, ModelConfig
from infoclip.model.checkpoint import save_model
from infoclip.model.maftplus import MaskSegmentor
from infoclip.model.segmentor import Segmentor, build_segmentor

__all__ = [
    "randomize",
    "small_clip",
    "small_config",
    "small_mask_config",
    "small_mask_segmentor",
    "small_model_config",
    "small_segmentor",
]


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Parameters far from their initial values, so that no term is zero (padding tokens start at zero)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            parameter.add_(0.2 * noise)
    return module


def small_clip(image_size: int = 64) -> DenseCLIP:
    """A CLIP with 3 visual blocks of width 16 on patches of 8 pixels, joint width 12, and a vocabulary of 50."""
    arch = Architecture(
        embed_dim=12,
        vision=Tower(16, 3, 2, 32),
        text=Tower(16, 2, 2, 32),
        patch_size=8,
        grid=(image_size // 8, image_size // 8),
        context_length=16,
        vocab_size=50,
    )
    torch.manual_seed(0)
    clip = DenseCLIP(arch, image_size=image_size)
    clip.reset_parameters()
    return clip


def small_model_config(**changes: object) -> ModelConfig:
    """A narrow cost aggregation: one layer of width 16, window 4, decoder 32 and 16."""
    values: dict[str, object] = {
        "hidden_dim": 16,
        "num_layers": 1,
        "num_heads": 2,
        "window_size": 4,
        "pad_len": 8,
        "text_guidance_proj_dim": 8,
        "appearance_guidance_proj_dim": 8,
        "decoder_dims": (32, 16),
        "decoder_guidance_dims": (10, 6),
        "decoder_guidance_proj_dims": (8, 4),
    }
    return ModelConfig(**{**values, **changes})  # type: ignore[arg-type]


def small_segmentor(num_templates: int = 1, image_size: int = 64, **changes: object) -> Segmentor:
    """The segmentor on :func:`small_clip`."""
    clip = small_clip(image_size)
    segmentor = Segmentor(clip, small_model_config(**changes), num_templates)
    randomize(segmentor)
    return segmentor


def small_config(folder: Path) -> Config:
    """A complete config of a small model with random weights; its CLIP's architecture is a file in ``folder``."""
    architecture = {
        "embed_dim": 12,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 3, "width": 16, "patch_size": 8, "head_width": 8, "mlp_ratio": 2.0},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    path = folder / "tiny_clip.json"
    path.write_text(json.dumps(architecture), encoding="utf-8")
    return Config(
        name="small",
        clip=ClipConfig(model=str(path), pretrained="", image_size=32),
        model=small_model_config(),
        eval=EvalConfig(resize=0, sliding_window=False),
    )


def small_mask_config(folder: Path, system: str = "maftplus", **changes: object) -> Config:
    """A complete config of a small mask segmentor with random weights; its CLIP's files are in ``folder``."""
    arguments = {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32], "conv_mlp": False}
    trunk = {"architecture": "convnext_atto", "pretrained_cfg": {}, "model_args": arguments}
    (folder / "trunk").mkdir(exist_ok=True)
    (folder / "trunk" / "config.json").write_text(json.dumps(trunk), encoding="utf-8")
    architecture = {
        "embed_dim": 16,
        "vision_cfg": {"timm_model_name": "local-dir:trunk", "timm_proj": "mlp", "timm_pool": "", "timm_drop_path": 0.1,
                       "image_size": 64},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }  # fmt: skip
    path = folder / "tiny_convnext.json"
    path.write_text(json.dumps(architecture), encoding="utf-8")
    values: dict[str, object] = {
        "queries": 6, "channels": 32, "attention_heads": 4, "encoder_layers": 1, "encoder_ffn_dim": 32,
        "decoder_layers": 3, "decoder_ffn_dim": 32, "transfer_heads": 2, "points": 64,
    }  # fmt: skip
    tune = "trunk" if system == "maftplus" else "frozen"
    return Config(
        name="small-mask",
        system=system,  # type: ignore[arg-type]
        clip=ClipConfig(model=str(path), pretrained="", image_size=64, templates="plain", tune=tune),  # type: ignore[arg-type]
        mask=MaskConfig(**{**values, **changes}),  # type: ignore[arg-type]
        align=AlignConfig(method="none"),
        eval=EvalConfig(resize=0, sliding_window=False),
    )


def small_mask_segmentor(transfer: bool = True, **changes: object) -> MaskSegmentor:
    """A small mask segmentor with weights far from their initial values."""
    with tempfile.TemporaryDirectory() as folder:
        config = small_mask_config(Path(folder), **changes)
        torch.manual_seed(0)
        segmentor = MaskSegmentor(load_convnext_clip(config.clip), config.mask, transfer=transfer)
    randomize(segmentor)
    return segmentor


def save_small_model(folder: Path, classes: Sequence[str]) -> Path:
    """A model folder ``folder/model`` of :func:`small_config`, the same weights every time."""
    config = small_config(folder)
    torch.manual_seed(0)
    return save_model(build_segmentor(config), config, classes, folder / "model")
