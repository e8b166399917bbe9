"""The demo's settings: generated scenes, the shipped tiny CLIP, minutes on two CPU cores."""

from __future__ import annotations

from infoclip.config import (
    AlignConfig,
    ClipConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)

__all__ = ["scenes", "scenes_finetune"]


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
