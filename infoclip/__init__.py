"""InfoCLIP: fine-tune CLIP into open-vocabulary semantic segmentation.

``infoclip.load(path)`` gives a trained model; ``model.segment(image, classes)`` segments a picture. Importing this
package builds nothing and touches no GPU: every public name is fetched at its first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "AlignmentObjective": "infoclip.objective",
    "Config": "infoclip.config",
    "DenseCLIP": "infoclip.clip",
    "InfoclipError": "infoclip.errors",
    "Model": "infoclip.api",
    "Segmentation": "infoclip.api",
    "Segmentor": "infoclip.model",
    "build_segmentor": "infoclip.model",
    "get_recipe": "infoclip.recipes",
    "list_recipes": "infoclip.recipes",
    "load": "infoclip.api",
    "load_clip": "infoclip.clip",
    "train": "infoclip.engine.train",
}

__all__ = [
    "AlignmentObjective",
    "Config",
    "DenseCLIP",
    "InfoclipError",
    "Model",
    "Segmentation",
    "Segmentor",
    "__version__",
    "build_segmentor",
    "get_recipe",
    "list_recipes",
    "load",
    "load_clip",
    "train",
]

if TYPE_CHECKING:
    from infoclip.api import Model, Segmentation, load
    from infoclip.clip import DenseCLIP, load_clip
    from infoclip.config import Config
    from infoclip.engine.train import train
    from infoclip.errors import InfoclipError
    from infoclip.model import Segmentor, build_segmentor
    from infoclip.objective import AlignmentObjective
    from infoclip.recipes import get_recipe, list_recipes


def __getattr__(name: str) -> Any:
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module 'infoclip' has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
