"""FC-CLIP's and MAFT+'s models (Yu et al., NeurIPS 2023; Jiao et al., ECCV 2024): mask proposals on a ConvNeXt CLIP,
classified by its text."""

from infoclip.model.maftplus.classifier import class_logits, mask_pooling
from infoclip.model.maftplus.mask_decoder import MaskDecoder, Proposals
from infoclip.model.maftplus.pixel_decoder import PixelDecoder
from infoclip.model.maftplus.segmentor import MaskOutput, MaskSegmentor, Vocabulary, build_mask_segmentor
from infoclip.model.maftplus.transfer import ContentDependentTransfer, sine_position

__all__ = [
    "ContentDependentTransfer",
    "MaskDecoder",
    "MaskOutput",
    "MaskSegmentor",
    "PixelDecoder",
    "Proposals",
    "Vocabulary",
    "build_mask_segmentor",
    "class_logits",
    "mask_pooling",
    "sine_position",
]
