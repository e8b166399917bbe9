"""Recipes: complete, named settings. One function each; ``key=value`` on the command line changes a copy."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from infoclip.config import Config
from infoclip.errors import ConfigError
from infoclip.recipes.coco import catseg_vitb16_coco, catseg_vitl14_coco, infoclip_vitb16_coco, infoclip_vitl14_coco
from infoclip.recipes.masks import fcclip_base, fcclip_large, maftplus_base, maftplus_large
from infoclip.recipes.scenes import (
    fcclip_scenes,
    fcclip_scenes_finetune,
    maftplus_scenes,
    scenes,
    scenes_finetune,
)

__all__ = ["RECIPES", "describe_recipe", "get_recipe", "list_recipes"]

RECIPES: dict[str, Callable[[], Config]] = {
    "scenes": scenes,
    "scenes-finetune": scenes_finetune,
    "maftplus-scenes": maftplus_scenes,
    "fcclip-scenes": fcclip_scenes,
    "fcclip-scenes-finetune": fcclip_scenes_finetune,
    "infoclip-vitb16-coco": infoclip_vitb16_coco,
    "infoclip-vitl14-coco": infoclip_vitl14_coco,
    "catseg-vitb16-coco": catseg_vitb16_coco,
    "catseg-vitl14-coco": catseg_vitl14_coco,
    "maftplus-base": maftplus_base,
    "maftplus-large": maftplus_large,
    "fcclip-base": fcclip_base,
    "fcclip-large": fcclip_large,
}


def list_recipes() -> list[str]:
    """Names of all recipes."""
    return list(RECIPES)


def describe_recipe(name: str) -> str:
    """The first sentence of a recipe's docstring."""
    return (_recipe(name).__doc__ or "").strip().splitlines()[0]


def get_recipe(name: str) -> Config:
    """A fresh config of the recipe.

    Raises:
        ConfigError: an unknown name, with the nearest one.
    """
    config = _recipe(name)()
    config.name = name
    return config.validate()


def _recipe(name: str) -> Callable[[], Config]:
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(RECIPES)}."
        raise ConfigError(f"Unknown recipe '{name}'; {hint}")
    return RECIPES[name]
