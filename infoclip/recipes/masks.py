"""Published settings of mask proposals: MAFT+ on COCO-Stuff and FC-CLIP on COCO panoptic (their configs).

``data.root`` names the folder that holds ``coco-stuff`` (see ``infoclip.recipes.coco``), or for FC-CLIP ``coco`` with
``train2017``, ``panoptic_train2017`` and ``annotations/panoptic_train2017.json``.
"""

from __future__ import annotations

from infoclip.config import (  # fmt: skip
    AlignConfig,
    ClipConfig,
    Config,
    DataConfig,
    EvalConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)

__all__ = ["fcclip_base", "fcclip_large", "maftplus_base", "maftplus_large"]

_BASE = {"model": "convnext_base_w_320", "pretrained": "laion_aesthetic_s13b_b82k_augreg"}
_LARGE = {"model": "convnext_large_d_320", "pretrained": "laion2b_s29b_b131k_ft_soup"}


def maftplus_base() -> Config:
    """MAFT+ with CLIP ConvNeXt-B on COCO-Stuff (published settings)."""
    return Config(
        system="maftplus",
        clip=ClipConfig(**_BASE, tune="trunk", image_size=320, templates="maftplus"),  # type: ignore[arg-type]
        model=ModelConfig(memory="balanced"),
        mask=MaskConfig(queries=100),
        align=AlignConfig(method="none"),
        data=DataConfig(
            kind="benchmark", benchmark="coco-train", classes="", resize=800, resize_max=1333, crop=0,
            color_jitter=False, batch_size=8,
        ),
        optim=OptimConfig(lr=1e-4, clip_lr_multiplier=0.1, weight_decay=2e-5, schedule="poly"),
        train=TrainConfig(steps=60_000, checkpoint_every=2500),
        eval=EvalConfig(resize=800, resize_max=1333, sliding_window=False, overlap_threshold=0.7),
    )  # fmt: skip


def maftplus_large() -> Config:
    """MAFT+ with CLIP ConvNeXt-L on COCO-Stuff (published settings)."""
    config = maftplus_base()
    config.clip.model, config.clip.pretrained = _LARGE["model"], _LARGE["pretrained"]
    config.train.steps = 55_000
    return config


def fcclip_base() -> Config:
    """FC-CLIP's settings with CLIP ConvNeXt-B on COCO panoptic."""
    return Config(
        system="fcclip",
        clip=ClipConfig(**_BASE, tune="frozen", image_size=320, templates="maftplus"),  # type: ignore[arg-type]
        model=ModelConfig(memory="balanced"),
        mask=MaskConfig(queries=250),
        align=AlignConfig(method="none"),
        data=DataConfig(
            kind="panoptic", benchmark="coco-panoptic-train", classes="", crop=1024, scales=(0.1, 2.0),
            color_jitter=False, batch_size=16,
        ),
        optim=OptimConfig(lr=1e-4, clip_lr_multiplier=0.1, weight_decay=0.05, schedule="step"),
        train=TrainConfig(steps=368_750, checkpoint_every=2500),
        eval=EvalConfig(resize=800, resize_max=1333, sliding_window=False, overlap_threshold=0.8),
    )  # fmt: skip


def fcclip_large() -> Config:
    """FC-CLIP with CLIP ConvNeXt-L on COCO panoptic (published settings)."""
    config = fcclip_base()
    config.clip.model, config.clip.pretrained = _LARGE["model"], _LARGE["pretrained"]
    return config
