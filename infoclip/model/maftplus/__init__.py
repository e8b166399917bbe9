"""Parts of MAFT+ (Jiao et al., ECCV 2024): content-dependent transfer, mask pooling, and scores of classes."""

from infoclip.model.maftplus.classifier import class_logits, mask_pooling
from infoclip.model.maftplus.transfer import ContentDependentTransfer, sine_position

__all__ = ["ContentDependentTransfer", "class_logits", "mask_pooling", "sine_position"]
