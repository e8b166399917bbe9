"""Small models for tests: a random CLIP of a few thousand parameters and the segmentor around it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from infoclip.clip import Architecture, DenseCLIP, Tower
from infoclip.config import ClipConfig, Config, EvalConfig, ModelConfig
from infoclip.model.segmentor import Segmentor

__all__ = ["randomize", "small_clip", "small_config", "small_model_config", "small_segmentor"]


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
