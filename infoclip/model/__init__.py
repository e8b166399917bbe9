"""The segmentor: cost aggregation and decoder on a dense CLIP, its loss, its inference and its checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infoclip.model.aggregator import Aggregator
    from infoclip.model.checkpoint import LoadedModel, load_model, save_model
    from infoclip.model.inference import predict_labels, predict_scores, preprocess
    from infoclip.model.segmentor import Segmentor, SegmentorOutput, build_segmentor

__all__ = [
    "Aggregator",
    "LoadedModel",
    "Segmentor",
    "SegmentorOutput",
    "build_segmentor",
    "load_model",
    "predict_labels",
    "predict_scores",
    "preprocess",
    "save_model",
]

_HOMES = {
    "Aggregator": "aggregator",
    "LoadedModel": "checkpoint",
    "Segmentor": "segmentor",
    "SegmentorOutput": "segmentor",
    "build_segmentor": "segmentor",
    "load_model": "checkpoint",
    "predict_labels": "inference",
    "predict_scores": "inference",
    "preprocess": "inference",
    "save_model": "checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
