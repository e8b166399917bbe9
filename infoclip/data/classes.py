"""Class lists: those of the benchmarks, shipped with the package, and a user's own files.

A list is a JSON file (a list of names, or an object with a ``classes`` entry) or a text file with one class a line. A
name may carry synonyms after ``", "``; the first one is used in prompts (CAT-Seg, section 4).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from infoclip.errors import DataError

__all__ = ["check_classes", "class_list_names", "load_classes", "load_label_map", "overlap", "select_classes"]

_VALUE_MINUS_ONE = ("ade20k_150", "pascal_context_459", "voc_20")
"""Benchmarks whose annotation value ``v`` is class ``v - 1`` (0 carries no label)."""


def class_list_names() -> list[str]:
    """Names of the class lists that ship with the package."""
    folder = resources.files("infoclip") / "data" / "classes"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".json"))


def load_classes(name_or_file: str | Path) -> list[str]:
    """The class names of a shipped list (``coco_stuff_171``) or of a file.

    Raises:
        DataError: no such list or file (with the nearest name), an unreadable file, an empty list, an empty name, or
            the same class twice.
    """
    text, source = _read(name_or_file)
    names: Any
    if source.endswith(".json"):
        try:
            names = json.loads(text)
        except ValueError as error:
            raise DataError(f"The class list {source} is not JSON ({error}); expected a list of names.") from error
        if isinstance(names, dict):
            names = names.get("classes")
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise DataError(f"The class list {source} must hold a JSON list of names, alone or under 'classes'.")
    else:
        names = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return check_classes(names, source)


def load_label_map(name_or_file: str | Path) -> dict[int, int]:
    """Annotation value -> class index of a shipped benchmark, or of a JSON file ``{"annotation value": class index}``.

    Values that the map does not name carry no label. For ``coco_stuff_171`` these are the values of the stuffthingmaps
    PNGs, for ``ade20k_847`` the object indices of ADE20K_2021_17_01.

    Raises:
        DataError: no such list or file, or a file of another form.
    """
    text, source = _read(name_or_file)
    name = str(name_or_file)
    try:
        data = json.loads(text)
        if name in class_list_names():
            count, ignore = len(data["classes"]), data.get("ignore")
            if name in _VALUE_MINUS_ONE:
                return {value: value - 1 for value in range(1, count + 1)}
            if name == "voc_20b":
                return {0: 20, **{value: value - 1 for value in range(1, 21)}}
            return {int(k): int(v) for k, v in data["source_ids"].items() if v != ignore}
        if isinstance(data, dict) and isinstance(data.get("source_ids"), dict):
            data = data["source_ids"]
        return {int(key): int(value) for key, value in data.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"The label map {source} must be a JSON object of annotation value and class index, such as "
            f'{{"7": 0, "11": 1}}: {error}.'
        ) from error


def check_classes(names: Sequence[str], source: str = "the class list") -> list[str]:
    """The names without surrounding blanks.

    Raises:
        DataError: an empty list, an empty name, or the same name twice; the sentence names ``source``.
    """
    clean = [name.strip() for name in names]
    if not clean:
        raise DataError(f"No class in {source}; give at least one name.")
    seen: dict[str, int] = {}
    for index, name in enumerate(clean):
        if not name:
            raise DataError(f"Class {index} in {source} has no name; remove or name it.")
        if name in seen:
            raise DataError(
                f"The class '{name}' is in {source} twice (positions {seen[name]} and {index}); remove one."
            )
        seen[name] = index
    return clean


def select_classes(classes: Sequence[str], chosen: Sequence[str]) -> list[int]:
    """Indices in ``classes`` of the names in ``chosen``.

    Raises:
        DataError: a name that is not in ``classes`` (with the nearest one).
    """
    index = {name: i for i, name in enumerate(classes)}
    out = []
    for name in chosen:
        if name not in index:
            near = difflib.get_close_matches(name, classes, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else "."
            raise DataError(f"'{name}' is not one of the {len(classes)} classes of the data{hint}")
        out.append(index[name])
    return out


def overlap(classes: Sequence[str], trained: Sequence[str]) -> list[bool]:
    """Whether each class was trained on, by its names: one of its synonyms is also one of a training class.

    Capitals, blanks, hyphens and underscores do not count ("dining table" is "diningtable"), nor do the endings
    ``-other`` and ``-stuff`` by which COCO-Stuff sets its stuff apart ("sky-other" is "sky"). Different words for one
    thing do ("sofa" is not "couch").
    """
    known = {key for name in trained for key in _keys(name)}
    return [not known.isdisjoint(_keys(name)) for name in classes]


def _keys(name: str) -> set[str]:
    plain = (synonym.strip().casefold().removesuffix("-other").removesuffix("-stuff") for synonym in name.split(", "))
    return {"".join(c for c in synonym if c not in " -_") for synonym in plain}


def _read(name_or_file: str | Path) -> tuple[str, str]:
    """Text of a shipped list or of a file, and how to call it in a message."""
    name = str(name_or_file)
    shipped = class_list_names()
    if name in shipped:
        entry = resources.files("infoclip") / "data" / "classes" / f"{name}.json"
        return entry.read_text(encoding="utf-8"), f"{name}.json"
    path = Path(name_or_file)
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except FileNotFoundError as error:
        near = difflib.get_close_matches(name, shipped, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"shipped lists are {', '.join(shipped)}."
        raise DataError(f"There is no class list '{name}', neither shipped nor as a file; {hint}") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"Cannot read the class list {path}: {reason}.") from error
