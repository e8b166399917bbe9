"""A folder of random images and masks, a CLIP of a few thousand weights, and the settings of a run of seconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from infoclip.config import AlignConfig, ClipConfig, Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from infoclip.data.panoptic import encode_segment_ids

__all__ = ["CATEGORIES", "CLASSES", "INFOCLIP", "tiny_config", "weights", "write_folders", "write_panoptic"]

CLASSES = ["red circle", "blue square", "grass", "sand", "water"]

CATEGORIES = [
    {"id": 1, "name": "person", "isthing": 1},
    {"id": 18, "name": "dog", "isthing": 1},
    {"id": 92, "name": "sky-other-merged", "isthing": 0},
]

_CLIP = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


INFOCLIP = AlignConfig(method="infoclip", samples="pixel", center=True)


def weights(out: Path) -> dict[str, Tensor]:
    """The model that a run left."""
    return load_file(out / "model" / "model.safetensors")


def write_folders(root: Path, count: int = 7, size: tuple[int, int] = (40, 48)) -> Path:
    """``root/images``, ``root/masks`` (with some ignored pixels) and ``root/classes.txt``."""
    random = np.random.default_rng(0)
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / f"images/{i}.png")
        mask = random.integers(0, len(CLASSES), size, dtype=np.uint8)
        mask[:3] = 255
        Image.fromarray(mask).save(root / f"masks/{i}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root


def tiny_config(root: Path, align: AlignConfig | None = None, **train: object) -> Config:
    """Settings over :func:`write_folders`'s data that exercise class sampling, augmentation and tuned text."""
    clip = root / "clip.json"
    clip.write_text(json.dumps(_CLIP))
    values: dict[str, object] = {
        "steps": 8, "checkpoint_every": 3, "log_every": 1, "image_every": 0, "threads": 1, "device": "cpu",
    }  # fmt: skip
    return Config(
        name="tiny",
        clip=ClipConfig(model=str(clip), pretrained="", image_size=32),
        model=ModelConfig(
            hidden_dim=16, num_layers=1, num_heads=2, window_size=2, pad_len=0, text_guidance_proj_dim=16,
            appearance_guidance_proj_dim=16, decoder_dims=(16, 16), decoder_guidance_dims=(16, 16),
            decoder_guidance_proj_dims=(8, 8),
        ),
        align=align or AlignConfig(method="none"),
        data=DataConfig(
            root=str(root), images="images", masks="masks", classes=str(root / "classes.txt"), resize=36, crop=32,
            sample_classes=4, batch_size=2, workers=0,
        ),
        optim=OptimConfig(lr=1e-3, clip_lr_multiplier=0.1),
        train=TrainConfig(**{**values, **train}),  # type: ignore[arg-type]
    )  # fmt: skip


def write_panoptic(
    root: Path,
    count: int = 5,
    size: tuple[int, int] = (40, 56),
    places: tuple[str, str, str] = ("images", "panoptic", "panoptic.json"),
) -> Path:
    """Pictures whose red channel shows the segment: sky above, two persons, a dog (in every second one), a crowd.

    ``places``: where the pictures, the PNGs and the JSON go below ``root``.
    """
    images, maps, listing = (root / place for place in places)
    for folder in (images, maps, listing.parent):
        folder.mkdir(parents=True, exist_ok=True)
    pictures, annotations = [], []
    random = np.random.default_rng(0)
    for i in range(count):
        ids = torch.zeros(size, dtype=torch.int64)
        ids[:10], ids[12:30, 2:12], ids[12:34, 16:24] = 255, 70_000, 3
        segments = [(255, 92, 0), (70_000, 1, 0), (3, 1, 0)]
        if i % 2:
            ids[20:36, 28:36] = 9
            segments.append((9, 18, 0))
        ids[30:, 44:] = 77
        segments.append((77, 1, 1))
        pixels = random.integers(0, 256, (*size, 3), dtype=np.uint8)
        pixels[..., 0] = (ids % 251).numpy()
        Image.fromarray(pixels).save(images / f"{i}.png")
        (maps / f"{i}.png").write_bytes(encode_segment_ids(ids))
        pictures.append({"id": i, "file_name": f"{i}.png"})
        listed = [{"id": a, "category_id": b, "iscrowd": c} for a, b, c in segments]
        annotations.append({"image_id": i, "file_name": f"{i}.png", "segments_info": listed})
    data = {"images": pictures, "annotations": annotations, "categories": CATEGORIES}
    listing.write_text(json.dumps(data))
    return root
