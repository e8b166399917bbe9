"""Dense CLIP on open_clip's models: per-patch embeddings, guidance, text bank, templates, and what is tuned."""

from __future__ import annotations

from infoclip.clip.architecture import Architecture, ConvNeXtArchitecture, Tower
from infoclip.clip.convnext import ConvNeXtCLIP, ConvNeXtFeatures
from infoclip.clip.dense import DenseCLIP, DenseMode, ImageFeatures
from infoclip.clip.load import load_clip, load_convnext_clip
from infoclip.clip.templates import TEMPLATES, resolve_templates
from infoclip.clip.text_bank import TextBank, text_cache_dir

__all__ = [
    "TEMPLATES",
    "Architecture",
    "ConvNeXtArchitecture",
    "ConvNeXtCLIP",
    "ConvNeXtFeatures",
    "DenseCLIP",
    "DenseMode",
    "ImageFeatures",
    "TextBank",
    "Tower",
    "load_clip",
    "load_convnext_clip",
    "resolve_templates",
    "text_cache_dir",
]
