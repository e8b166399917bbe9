"""The segmentor: dense CLIP, guidance up-samplers and cost aggregation as one model."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from infoclip.config import Config, ModelConfig
from infoclip.model.aggregator import Aggregator
from infoclip.model.attention import SwinBlock
from infoclip.model.state import check_same_entries

if TYPE_CHECKING:
    from infoclip.clip import DenseCLIP
    from infoclip.model.maftplus import MaskSegmentor

__all__ = ["CATSEG_PREFIXES", "Segmentor", "SegmentorOutput", "build_model", "build_segmentor", "catseg_name"]

CATSEG_PREFIXES = {
    "clip.": "sem_seg_head.predictor.clip_model.",
    "aggregator.": "sem_seg_head.predictor.transformer.",
    "upsample1.": "upsample1.",
    "upsample2.": "upsample2.",
}
"""Our module prefixes and those of published CAT-Seg checkpoints; what follows a prefix is the same on both sides."""


class SegmentorOutput(NamedTuple):
    """What one forward pass gives: the logits, and the embeddings that the alignment objective needs."""

    logits: Tensor  # [B, T, 4h, 4w]
    dense: Tensor  # [B, d, h, w], not normalised
    text: Tensor  # [T, P, d] or [B, T, P, d], as given


class Segmentor(nn.Module):
    """CAT-Seg's model: CLIP embeddings and guidance into the cost aggregation (CAT-Seg, section 3).

    Args:
        clip: the dense CLIP (the student).
        config: cost aggregation and decoder.
        num_templates: prompt templates a class, P.
    """

    def __init__(self, clip: DenseCLIP, config: ModelConfig, num_templates: int = 1) -> None:
        super().__init__()
        self.clip = clip
        self.config = config
        self.num_templates = num_templates
        side = clip.image_size // clip.patch_size
        self.aggregator = Aggregator(config, clip.embed_dim, clip.embed_dim, num_templates, (side, side))
        width, (first, second) = clip.vision_width, config.decoder_guidance_dims
        guided = first > 0 and second > 0
        self.upsample1 = nn.ConvTranspose2d(width, first, kernel_size=2, stride=2) if guided else None
        self.upsample2 = nn.ConvTranspose2d(width, second, kernel_size=4, stride=4) if guided else None

        self.use_memory(self.aggregator.memory, config.class_chunk)

    def use_memory(self, mode: str, class_chunk: int = 0) -> Segmentor:
        """Choose what the backward pass finds: :meth:`Aggregator.use_memory`, and the blocks of CLIP's image tower.

        ``fast`` and ``reference`` keep CLIP's activations; ``balanced`` keeps its attention outputs and ``lean`` the
        inputs of its blocks, and the rest is computed again.

        Raises:
            ValueError: another mode, or a negative chunk.
        """
        self.aggregator.use_memory(mode, class_chunk)
        self.clip.visual.recompute = {"balanced": "attention", "lean": "lean"}.get(mode)
        return self

    def forward(
        self,
        image: Tensor,  # [B, 3, S, S], normalised
        text: Tensor,  # [T, P, d] or [B, T, P, d]
    ) -> SegmentorOutput:
        """Logits at four times the patch grid.

        Raises:
            ValueError: shapes that do not go together.
        """
        features = self.clip.encode_image(image)
        guidance = [features.dense]
        if self.upsample1 is not None and self.upsample2 is not None:
            if len(features.guidance) != 2:
                raise ValueError(f"the encoder gave {len(features.guidance)} guidance maps; expected 2")
            guidance += [self.upsample1(features.guidance[0]), self.upsample2(features.guidance[1])]
        return SegmentorOutput(self.aggregator(features.dense, text, guidance), features.dense, text)

    def published_state_dict(self) -> dict[str, Tensor]:
        """The state dict under the names of published CAT-Seg checkpoints, key for key."""
        return {catseg_name(k): v for k, v in self.state_dict().items()}

    def load_published_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load weights under CAT-Seg names. The window masks (``attn_mask``) are derived and need not be there.

        Raises:
            ValueError: entries that are missing, unknown or of another shape; the message names the first of each.
        """
        own = {k: v for k, v in self.published_state_dict().items() if not k.endswith(".attn_mask")}
        state = {k: v for k, v in state.items() if not k.endswith(".attn_mask")}
        check_same_entries(own, state)
        back = {theirs: ours for ours, theirs in CATSEG_PREFIXES.items()}
        self.load_state_dict({_rename(k, back): v for k, v in state.items()}, strict=False)
        for module in self.modules():
            if isinstance(module, SwinBlock):
                module.reset_mask()


def build_segmentor(config: Config) -> Segmentor:
    """The segmentor that a config describes, with CLIP's weights loaded and its tuning policy set.

    Raises:
        ConfigError: another system, a CLIP or a template set that does not exist.
        CheckpointError: CLIP weights that do not fit.
    """
    from infoclip.clip import load_clip
    from infoclip.clip.templates import resolve_templates
    from infoclip.errors import ConfigError

    if config.system != "catseg":
        raise ConfigError(f"system is '{config.system}'; expected catseg for a model of cost aggregation.")
    clip = load_clip(config.clip)
    return Segmentor(clip, config.model, num_templates=len(resolve_templates(config.clip.templates)))


def build_model(config: Config) -> Segmentor | MaskSegmentor:
    """The model of whichever system a config describes.

    Raises:
        ConfigError, CheckpointError: as :func:`build_segmentor` and
            :func:`~infoclip.model.maftplus.build_mask_segmentor`.
    """
    if config.system == "catseg":
        return build_segmentor(config)
    from infoclip.model.maftplus import build_mask_segmentor

    return build_mask_segmentor(config)


def catseg_name(name: str) -> str:
    """The CAT-Seg name of one of the segmentor's parameters or buffers."""
    return _rename(name, CATSEG_PREFIXES)


def _rename(key: str, prefixes: dict[str, str]) -> str:
    for old, new in prefixes.items():
        if key.startswith(old):
            return new + key[len(old) :]
    raise ValueError(f"the key {key!r} starts with none of {', '.join(prefixes)}")
