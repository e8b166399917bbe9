"""Prompt templates: texts with ``{}`` in the place of the class name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from infoclip.errors import ConfigError

__all__ = ["TEMPLATES", "resolve_templates"]

_SIZES = ("small", "medium", "large")


def _imagenet() -> tuple[str, ...]:
    """The 80 templates of CLIP's ImageNet evaluation, which open_clip ships as functions."""
    import open_clip

    return tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)


class _Templates(Mapping[str, tuple[str, ...]]):
    """Named sets; those that come from open_clip are made when first asked for."""

    def __init__(self, sets: dict[str, tuple[str, ...] | Callable[[], tuple[str, ...]]]) -> None:
        self._sets = sets

    def __getitem__(self, name: str) -> tuple[str, ...]:
        value = self._sets[name]
        if callable(value):
            value = self._sets[name] = value()
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._sets)

    def __len__(self) -> int:
        return len(self._sets)


TEMPLATES: Mapping[str, tuple[str, ...]] = _Templates(
    {
        # CAT-Seg's single template: capital A, no full stop.
        "catseg": ("A photo of a {} in the scene",),
        "imagenet": _imagenet,
        "plain": ("{}",),
        # The 14 templates of MAFT+ (and FC-CLIP).
        "maftplus": (
            "a photo of a {}.",
            "This is a photo of a {}",
            "There is a {} in the scene",
            "There is the {} in the scene",
            "a photo of a {} in the scene",
            *(f"a photo of a {size} {{}}." for size in _SIZES),
            *(f"This is a photo of a {size} {{}}." for size in _SIZES),
            *(f"There is a {size} {{}} in the scene." for size in _SIZES),
        ),
        "scenes": ("a photo of {}",),
    }
)


def resolve_templates(name_or_file: str) -> tuple[str, ...]:
    """The templates of a named set, or of a text file with one template a line (empty lines are skipped).

    Raises:
        ConfigError: neither a named set (with the nearest match) nor a readable file, or a line without ``{}``.
    """
    if name_or_file in TEMPLATES:
        return TEMPLATES[name_or_file]
    path = Path(name_or_file)
    if not path.is_file():
        near = difflib.get_close_matches(name_or_file, list(TEMPLATES), n=1)
        hint = f"; did you mean '{near[0]}'?" if near else f"; expected one of {', '.join(TEMPLATES)}, or a file."
        raise ConfigError(f"Unknown prompt templates '{name_or_file}'{hint}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the prompt templates {path}: {error}.") from error
    templates = tuple(line.strip() for line in lines if line.strip())
    for template in templates:
        if "{}" not in template:
            raise ConfigError(f"{path}: the template '{template}' has no {{}} where the class name goes.")
    if not templates:
        raise ConfigError(f"{path} holds no prompt templates; expected one a line, each with {{}}.")
    return templates
