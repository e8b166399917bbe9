"""Published settings on COCO-Stuff: CAT-Seg (section 4.1 and its configs), and InfoCLIP on top of it.

``data.root`` names the folder that holds ``coco-stuff`` (or that folder itself), with ``images/train2017`` and the
stuffthingmaps PNGs in ``annotations/train2017`` or converted masks in ``annotations_detectron2/train2017``.
"""

from __future__ import annotations

from infoclip.config import AlignConfig, ClipConfig, Config, DataConfig, TrainConfig

__all__ = ["catseg_vitb16_coco", "catseg_vitl14_coco", "infoclip_vitb16_coco", "infoclip_vitl14_coco"]


def catseg_vitb16_coco() -> Config:
    """CAT-Seg with CLIP ViT-B/16 at 384 px on COCO-Stuff (published settings)."""
    return Config(
        clip=ClipConfig(model="ViT-B-16-quickgelu", pretrained="openai", image_size=384),
        align=AlignConfig(method="none"),
        data=DataConfig(kind="benchmark", benchmark="coco-train"),
        train=TrainConfig(checkpoint_every=2500),
    )


def catseg_vitl14_coco() -> Config:
    """CAT-Seg with CLIP ViT-L/14 at 336 px on COCO-Stuff (published settings)."""
    config = catseg_vitb16_coco()
    config.clip = ClipConfig(model="ViT-L-14-336-quickgelu", pretrained="openai", image_size=336)
    return config


def infoclip_vitb16_coco() -> Config:
    """InfoCLIP with CLIP ViT-B/16 at 384 px on COCO-Stuff (published settings)."""
    config = catseg_vitb16_coco()
    config.align = AlignConfig()
    return config


def infoclip_vitl14_coco() -> Config:
    """InfoCLIP with CLIP ViT-L/14 at 336 px on COCO-Stuff (published settings)."""
    config = catseg_vitl14_coco()
    config.align = AlignConfig()
    return config
