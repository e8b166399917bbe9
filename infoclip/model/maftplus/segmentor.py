"""The mask segmentor: a ConvNeXt CLIP, proposals of masks, and their classes (FC-CLIP; MAFT+).

Sizes: ``Q`` proposals, ``T`` classes, ``N`` rows of text (all synonyms, and void), ``d`` CLIP's joint width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from infoclip.config import Config, MaskConfig
from infoclip.model.maftplus.classifier import class_logits, mask_pooling
from infoclip.model.maftplus.mask_decoder import MaskDecoder, Proposals
from infoclip.model.maftplus.pixel_decoder import PixelDecoder
from infoclip.model.maftplus.transfer import ContentDependentTransfer
from infoclip.model.memory import MODES, check_memory
from infoclip.model.state import check_same_entries
from infoclip.objective.numerics import unit

if TYPE_CHECKING:
    from infoclip.clip import ConvNeXtCLIP

__all__ = [
    "PUBLISHED_PREFIXES",
    "MaskOutput",
    "MaskSegmentor",
    "Vocabulary",
    "build_mask_segmentor",
    "split_synonyms",
]

PUBLISHED_PREFIXES = {
    "clip.": "backbone.clip_model.",
    "pixel_decoder.": "sem_seg_head.pixel_decoder.",
    "mask_decoder.": "sem_seg_head.predictor.",
    "void_embedding.": "void_embedding.",
    "cdt.": "cdt.",
}
"""Our module prefixes and those of the published FC-CLIP and MAFT+ checkpoints; what follows a prefix is the same, but
that the text tower's q, k and v weights are one matrix there."""


class Vocabulary(NamedTuple):
    """Class names as text embeddings: one row for each synonym of each class."""

    rows: Tensor  # [N - 1, d], each of length 1, the mean over the templates; without void
    synonyms: tuple[int, ...]  # rows of each of the T classes
    classes: tuple[str, ...]  # the names as given, "river, stream"


class MaskOutput(NamedTuple):
    """What one forward pass gives."""

    proposals: list[Proposals]  # of [B, Q, T + 1] and [B, Q, H / 4, W / 4], after each layer; the last is the result
    clip_logits: Tensor  # [B, Q, T + 1], each proposal's classes by CLIP's own features; void last
    dense: Tensor  # [B, C5, H / 32, W / 32], CLIP's features before its visual head

    @property
    def logits(self) -> Tensor:  # [B, Q, T + 1]
        return self.proposals[-1].logits

    @property
    def masks(self) -> Tensor:  # [B, Q, H / 4, W / 4]
        return self.proposals[-1].masks


def split_synonyms(name: str) -> list[str]:
    """The synonyms of a class name: ``"river, stream,water"`` gives three.

    Raises:
        ValueError: a name or a synonym that is empty.
    """
    parts = [part.strip() for part in name.split(",")]
    if not all(parts):
        raise ValueError(f"the class name {name!r} has an empty synonym; expected names separated by commas")
    return parts


class MaskSegmentor(nn.Module):
    """FC-CLIP's model, and with a content-dependent transfer MAFT+'s.

    In: a normalised image whose sides are multiples of 32 (:func:`infoclip.model.maftplus.inference.preprocess` makes
    it), and a :class:`Vocabulary` from :meth:`vocabulary`, for any class names. Out: :class:`MaskOutput`. What a user
    wants from an image (class scores, a panoptic map, instances) is in ``infoclip.model.maftplus.inference``.

    With the transfer, the decoders see CLIP's features without passing a gradient to them: CLIP learns from
    ``clip_logits`` and ``dense`` alone (mask-aware loss, representation compensation). One pass through CLIP serves
    both; the published code makes three. Without it, a CLIP that learns does so through the decoders (plain
    fine-tuning), and ``clip_logits`` pass no gradient.

    Args:
        clip: the CLIP with its ConvNeXt.
        config: sizes.
        transfer: content-dependent transfer (MAFT+); without it (FC-CLIP) all images share one text classifier.
    """

    def __init__(self, clip: ConvNeXtCLIP, config: MaskConfig, *, transfer: bool) -> None:
        super().__init__()
        self.clip, self.config = clip, config
        self.pixel_decoder = PixelDecoder(config, clip.widths)
        self.mask_decoder = MaskDecoder(config, clip.embed_dim)
        self.void_embedding = nn.Embedding(1, clip.embed_dim)
        self.cdt = (
            ContentDependentTransfer(clip.embed_dim, config.transfer_heads, panoptic=config.panoptic)
            if transfer
            else None
        )

    def use_memory(self, mode: str, class_chunk: int = 0) -> MaskSegmentor:
        """Choose what the backward pass finds of CLIP's blocks and of the decoders' layers, and what it computes again
        (:mod:`infoclip.model.memory`). Classes are not worked on one by one here: the chunk changes nothing.

        Raises:
            ValueError: another mode, or a negative chunk.
        """
        check_memory(mode, class_chunk)
        self.clip.memory = self.pixel_decoder.memory = self.mask_decoder.memory = mode
        return self

    def vocabulary(
        self,
        classes: Sequence[str],
        templates: Sequence[str] | None = None,
        embed: Callable[[Sequence[str]], Tensor] | None = None,
    ) -> Vocabulary:
        """The text of class names; ``"river, stream"`` is one class with two synonyms. No gradient reaches the text.

        Args:
            templates: prompt templates; by default CLIP's own.
            embed: from names to embeddings [N, P, d] in place of CLIP's text tower and ``templates``: a
                :class:`~infoclip.clip.TextBank`, which keeps them.

        Raises:
            infoclip.errors.DataError: no class, an empty name, or one that does not fit the context.
        """
        from infoclip.errors import DataError

        try:
            parts = [split_synonyms(name) for name in classes]
        except ValueError as error:
            raise DataError(f"The class list cannot be used: {error}.") from error
        flat = [part for names in parts for part in names]
        with torch.no_grad():
            features = embed(flat) if embed is not None else self.clip.text_features(flat, templates)  # [N - 1, P, d]
        return Vocabulary(unit(features.mean(dim=1)), tuple(map(len, parts)), tuple(classes))

    def text_classifier(self, vocabulary: Vocabulary) -> Tensor:  # -> [N, d]
        """The rows of the vocabulary, and the learnt one of void."""
        return torch.cat((vocabulary.rows.detach(), unit(self.void_embedding.weight)))

    def forward(
        self,
        image: Tensor,  # [B, 3, H, W], normalised, H and W multiples of 32
        vocabulary: Vocabulary,
    ) -> MaskOutput:
        """Proposals of masks and both scores of their classes.

        Raises:
            ValueError: shapes that do not go together.
        """
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.clip.visual.parameters())
        with torch.set_grad_enabled(learns):
            features = self.clip.encode_image(image)
        text = self.text_classifier(vocabulary)
        seen = features if self.cdt is None else features.detached()
        mask_features, levels = self.pixel_decoder(seen[:4])
        proposals = self.mask_decoder(levels, mask_features, text, vocabulary.synonyms)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.cdt is not None):
            clip_logits = self.classify(features.dense, proposals[-1].masks, text, vocabulary.synonyms)
        return MaskOutput(proposals, clip_logits, features.dense)

    def classify(
        self,
        dense: Tensor,  # [B, C5, h, w]
        masks: Tensor,  # [B, Q, H, W] mask logits
        text: Tensor,  # [N, d]
        synonyms: Sequence[int],
    ) -> Tensor:  # [B, Q, T + 1]
        """Classes of masks by CLIP's own features under them."""
        embeddings = self.clip.embed(mask_pooling(dense, masks))
        if self.cdt is not None:
            text = self.cdt(self.transfer_features(dense), text)  # [B, N, d]
        return class_logits(embeddings, text, synonyms, self.clip.logit_scale)

    def transfer_features(self, dense: Tensor) -> Tensor:  # [B, C5, h, w] -> [B, d, h, w]
        """What the content-dependent transfer reads (``mask.transfer_features``)."""
        if self.config.transfer_features == "pixel":
            return self.clip.embed_map(dense)
        batch, channels, height, width = dense.shape
        return self.clip.embed(dense.reshape(batch, height, width, channels)).permute(0, 3, 1, 2)

    def published_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names of published checkpoints, the text tower's projections joined."""
        own = {_published(k): v.detach() for k, v in self.state_dict().items()}
        clip = {PUBLISHED_PREFIXES["clip."] + k: v for k, v in self.clip.stock_state_dict().items()}
        return {k: v for k, v in own.items() if not k.startswith(PUBLISHED_PREFIXES["clip."])} | clip

    def load_published_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load weights under published names, those of :meth:`published_state_dict` and no others.

        Raises:
            ValueError: entries that are missing, unknown or of another shape; the message names the first of each.
        """
        check_same_entries(self.published_state_dict(), state)
        prefix = PUBLISHED_PREFIXES["clip."]
        self.clip.load_stock_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        rest = {k: state[_published(k)] for k in self.state_dict() if not k.startswith("clip.")}
        self.load_state_dict(rest, strict=False)


def build_mask_segmentor(config: Config) -> MaskSegmentor:
    """The mask segmentor that a config describes, with CLIP's weights loaded and its tuning policy set.

    Raises:
        ConfigError: another system, a CLIP that does not exist or has no ConvNeXt, or a template set that does not.
        CheckpointError: CLIP weights that do not fit.
    """
    from infoclip.clip import load_convnext_clip
    from infoclip.errors import ConfigError

    if config.system == "catseg":
        raise ConfigError("system is 'catseg'; expected fcclip or maftplus for a model of mask proposals.")
    clip = load_convnext_clip(config.clip, drop_path=config.mask.student_drop_path)
    try:
        segmentor = MaskSegmentor(clip, config.mask, transfer=config.system == "maftplus")
        mode = config.model.memory
        return segmentor.use_memory(mode if mode in MODES else "fast", config.model.class_chunk)
    except ValueError as error:
        raise ConfigError(f"These model settings do not go together: {error}.") from error


def _published(key: str) -> str:
    for ours, theirs in PUBLISHED_PREFIXES.items():
        if key.startswith(ours):
            return theirs + key[len(ours) :]
    raise ValueError(f"the key {key!r} starts with none of {', '.join(PUBLISHED_PREFIXES)}")
