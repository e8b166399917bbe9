"""Dense zero-shot CLIP: each pixel gets the class whose text is nearest to its patch, without any training.

The baseline that fine-tuning has to beat: cosine of the dense image embedding with every class's text embedding, mean
over the prompts, resized bilinearly to the picture, arg max over classes (MaskCLIP, section 3.2, without its
refinements).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from infoclip.clip import DenseCLIP
from infoclip.model.inference import preprocess

__all__ = ["zero_shot_scores"]


@torch.no_grad()
def zero_shot_scores(
    clip: DenseCLIP,
    image: Tensor,  # [3, H, W] uint8, RGB
    text: Tensor,  # [T, P, d], L2-normalised
) -> Tensor:  # [T, H, W] float32
    """Cosine similarity, -1..1, of every pixel with every class.

    Raises:
        TypeError: an image that is not uint8.
        ValueError: another shape.
    """
    if image.dtype != torch.uint8:
        raise TypeError(f"image has dtype {image.dtype}; expected uint8")
    height, width = image.shape[-2:]
    pixels = preprocess(image.to(text.device), clip)[None]
    dense = F.normalize(clip.encode_image(pixels).dense.float(), dim=1)  # [1, d, h, w]
    prototypes = F.normalize(text.float().mean(dim=1), dim=-1)  # [T, d]
    scores = torch.einsum("bdhw,td->bthw", dense, prototypes)
    return F.interpolate(scores, size=(height, width), mode="bilinear", align_corners=False)[0]
