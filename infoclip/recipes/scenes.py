"""The demos' settings: generated scenes, the shipped tiny CLIPs, minutes on two CPU cores."""

from __future__ import annotations

from infoclip.config import (
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

__all__ = ["fcclip_scenes", "fcclip_scenes_finetune", "maftplus_scenes", "scenes", "scenes_finetune"]


def scenes() -> Config:
    """InfoCLIP on generated scenes with the shipped tiny CLIP (the demo)."""
    return Config(
        clip=ClipConfig(
            model="builtin:scenes",
            pretrained="builtin:scenes",
            tune="attention",
            tune_positions=True,
            dense="value",  # the path that the shipped CLIP's patches were trained with
            image_size=96,
            templates="scenes",
        ),
        model=ModelConfig(
            hidden_dim=32,
            num_layers=2,
            num_heads=4,
            window_size=6,
            pad_len=0,
            text_guidance_proj_dim=0,  # a few dozen seen names are memorised through it; unseen ones pay
            appearance_guidance_proj_dim=32,
            decoder_dims=(32, 16),
            decoder_guidance_dims=(32, 16),
            decoder_guidance_proj_dims=(16, 8),
        ),
        align=AlignConfig(
            method="infoclip",
            estimator="infonce",
            samples="pixel",
            center=True,
            transfer_weight=0.1,
            compression_weight=0.0,
            # at 0.1 the estimator goes on pushing the pixels of one object apart after each has found its teacher row
            temperature=0.01,
            lpam="cosine",
        ),
        data=DataConfig(
            kind="scenes",
            images="images",
            masks="masks",
            classes="",
            resize=0,
            crop=0,
            color_jitter=False,
            sample_classes=16,
            train_images=1024,
            batch_size=4,
            workers=0,
        ),
        # One norm for each of head, CLIP and alignment module: jointly, the alignment's gradient starves the head.
        optim=OptimConfig(lr=2e-3, clip_lr_multiplier=1.0, clip_grad="group"),
        train=TrainConfig(steps=400, ignored="masked", checkpoint_every=100, log_every=10, image_every=100),
        eval=EvalConfig(resize=96, sliding_window=False, size=96, window=96, batch_size=8),
    )


def scenes_finetune() -> Config:
    """Plain fine-tuning on the same scenes, without alignment: what InfoCLIP is compared with."""
    config = scenes()
    config.align = AlignConfig(method="none")
    return config


def fcclip_scenes() -> Config:
    """FC-CLIP on generated scenes: mask proposals on the shipped tiny CLIP with a ConvNeXt, which stays as it is."""
    name = "builtin:scenes-convnext"
    return Config(
        system="fcclip",
        clip=ClipConfig(model=name, pretrained=name, tune="frozen", image_size=96, templates="scenes"),
        mask=MaskConfig(
            queries=16,  # a scene has at most 5 segments
            channels=64,
            attention_heads=4,
            encoder_layers=2,
            encoder_ffn_dim=128,
            decoder_layers=3,
            decoder_ffn_dim=128,
            panoptic=True,
            transfer_heads=4,
            points=576,
        ),
        align=AlignConfig(method="none"),
        data=DataConfig(
            kind="scenes",
            images="images",
            masks="masks",
            classes="",
            resize=0,
            crop=0,
            color_jitter=False,
            train_images=1024,
            batch_size=8,
            workers=0,
        ),
        optim=OptimConfig(lr=1e-3, clip_lr_multiplier=0.1, weight_decay=0.05, clip_grad_norm=0.1, warmup_steps=10),
        train=TrainConfig(steps=300, checkpoint_every=100, log_every=10, image_every=100),
        eval=EvalConfig(resize=0, sliding_window=False, overlap_threshold=0.7),
    )


def fcclip_scenes_finetune() -> Config:
    """Plain fine-tuning of FC-CLIP's CLIP on the same scenes: what MAFT+ is compared with."""
    config = fcclip_scenes()
    config.clip.tune = "trunk"
    return config


def maftplus_scenes() -> Config:
    """MAFT+ on generated scenes with the shipped tiny CLIP with a ConvNeXt (the demo)."""
    config = fcclip_scenes_finetune()
    config.system = "maftplus"
    return config
