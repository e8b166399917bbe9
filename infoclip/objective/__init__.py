"""The alignment objective: LPAM, mutual information (matrix-based Renyi or InfoNCE), distillation baselines."""

from infoclip.kernels.renyi_mutual_information import (
    compression_loss,
    normalized_gram,
    renyi_entropy,
    renyi_joint_entropy,
    renyi_mutual_information,
    transfer_loss,
)
from infoclip.objective.alignment import AlignmentObjective, AlignmentOutput, Embeddings
from infoclip.objective.baselines import kl_distillation, pooled_distillation, representation_compensation, strip_pool
from infoclip.objective.infonce import InfoNCE, infonce
from infoclip.objective.lpam import LPAM, cosine_map
from infoclip.objective.mask_aware import mask_aware_loss, soft_iou
from infoclip.objective.set_criterion import SetCriterion, hungarian_match, matching_cost, sample_points

__all__ = [
    "LPAM",
    "AlignmentObjective",
    "AlignmentOutput",
    "Embeddings",
    "InfoNCE",
    "SetCriterion",
    "compression_loss",
    "cosine_map",
    "hungarian_match",
    "infonce",
    "kl_distillation",
    "mask_aware_loss",
    "matching_cost",
    "normalized_gram",
    "pooled_distillation",
    "renyi_entropy",
    "renyi_joint_entropy",
    "renyi_mutual_information",
    "representation_compensation",
    "sample_points",
    "soft_iou",
    "strip_pool",
    "transfer_loss",
]
