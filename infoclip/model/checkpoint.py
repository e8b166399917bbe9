"""A model directory: ``config.json``, ``model.safetensors`` (published names, float32) and ``classes.json``.

It is complete or not there: written beside its place, flushed to the disk, and renamed; a directory that is replaced
changes in one step. What a config names by path (templates, a CLIP architecture) is copied in, so that the directory
can be moved.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from infoclip.config import ClipConfig, Config, load_config, save_config
from infoclip.data.files import is_file
from infoclip.errors import CheckpointError, ConfigError
from infoclip.model.segmentor import Segmentor, build_model
from infoclip.storage import new_directory

if TYPE_CHECKING:
    from infoclip.model.maftplus import MaskSegmentor

__all__ = ["LoadedModel", "find_model", "load_model", "save_model"]

WEIGHTS, CONFIG, CLASSES, EXTRA = "model.safetensors", "config.json", "classes.json", "extra.json"
TEMPLATES, ARCHITECTURE, TRUNK, VOCABULARY = "templates.txt", "clip.json", "trunk", "vocabulary.json"
FORMAT = "infoclip-segmentor"


@dataclass
class LoadedModel:
    """A model directory's content; ``segmentor`` is in evaluation mode on the CPU."""

    segmentor: Segmentor | MaskSegmentor
    config: Config
    classes: list[str]
    extra: dict[str, Any]


def save_model(
    segmentor: Segmentor | MaskSegmentor,
    config: Config,
    classes: Sequence[str],
    directory: str | Path,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write a model directory; one that is there already is replaced in one step.

    Args:
        classes: the class names that the model was trained on.
        extra: anything that JSON can hold, kept in ``extra.json``.

    Returns:
        The directory.

    Raises:
        StorageError: writing failed (full disk, missing permission); an existing directory is then as it was, and
            nothing else is left.
    """
    target = Path(directory).absolute()
    with new_directory(target, "the model", (SafetensorError,)) as temporary:
        _write(segmentor, config, list(classes), temporary, extra)
    return target


def load_model(path: str | Path) -> LoadedModel:
    """Read a model directory, or the ``model`` directory of a run.

    The CLIP's own weights come from the directory: nothing is downloaded.

    Raises:
        CheckpointError: no model there, or one that is incomplete, damaged, foreign or of another architecture than its
            config says.
    """
    directory = find_model(Path(path))
    try:
        config = load_config(directory / CONFIG)
    except ConfigError as error:
        raise CheckpointError(f"{directory} holds no usable model: {error}") from error
    classes = _read_classes(directory / CLASSES)
    state, metadata = _read_weights(directory / WEIGHTS)
    extra = _read_json(directory / EXTRA, dict) if (directory / EXTRA).exists() else {}
    clip = _with_copies(config.clip, directory)
    config = dataclasses.replace(config, clip=clip)
    bare = dataclasses.replace(config, clip=dataclasses.replace(clip, pretrained=""))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing is copied, which is the point
            # Without storage first: a config that lies asks for any amount of memory.
            with torch.device("meta"):
                build_model(bare).load_published_state_dict(state)
        with torch.random.fork_rng(devices=[]):  # random weights are drawn only to be replaced
            segmentor = build_model(bare)
        segmentor.load_published_state_dict(state)
    except (ConfigError, ArithmeticError, AssertionError, AttributeError, IndexError, MemoryError, RuntimeError,
            TypeError) as error:  # fmt: skip
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise CheckpointError(f"{directory / CONFIG} describes a model that cannot be built: {reason[0]}") from error
    except ValueError as error:
        raise CheckpointError(
            f"{directory / WEIGHTS} does not fit {directory / CONFIG}: {error}; use the config and the weights of one"
            " and the same run."
        ) from error
    if "mean" in metadata and "std" in metadata:  # they go with CLIP's own weights, which are not read here
        segmentor.clip.mean, segmentor.clip.std = (
            _three(metadata[key], directory / WEIGHTS) for key in ("mean", "std")
        )
    segmentor.eval()
    return LoadedModel(segmentor, config, classes, extra)


def _write(
    segmentor: Segmentor | MaskSegmentor, config: Config, classes: list[str], directory: Path, extra: Any
) -> None:
    clip = dataclasses.replace(config.clip)
    if is_file(Path(clip.templates)):
        shutil.copyfile(clip.templates, directory / TEMPLATES)
        clip.templates = TEMPLATES
    if is_file(Path(clip.model)):
        _copy_architecture(Path(clip.model), directory)
        clip.model = ARCHITECTURE
    save_config(dataclasses.replace(config, clip=clip), directory / CONFIG)
    (directory / CLASSES).write_text(json.dumps(classes, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if extra is not None:
        (directory / EXTRA).write_text(json.dumps(extra, indent=1) + "\n", encoding="utf-8")
    state = {k: _storable(v) for k, v in segmentor.published_state_dict().items()}
    pixels = {"mean": json.dumps(list(segmentor.clip.mean)), "std": json.dumps(list(segmentor.clip.std))}
    save_file(state, directory / WEIGHTS, metadata={"format": "pt", "infoclip": FORMAT, **pixels})
    (directory / WEIGHTS).chmod(0o644)  # safetensors writes for the owner alone


def _copy_architecture(model: Path, directory: Path) -> None:
    """A model config (JSON), and what it needs beside it: a vocabulary of words, a trunk that it names by path."""
    from infoclip.clip.architecture import LOCAL_TRUNK

    described = json.loads(model.read_text(encoding="utf-8"))
    vision = described.get("model_cfg", described)["vision_cfg"]
    trunk = vision.get("timm_model_name") or ""
    if trunk.startswith(LOCAL_TRUNK):
        (directory / TRUNK).mkdir()
        source = model.parent / trunk.removeprefix(LOCAL_TRUNK) / "config.json"
        shutil.copyfile(source, directory / TRUNK / "config.json")
        vision["timm_model_name"] = f"{LOCAL_TRUNK}{TRUNK}"
    (directory / ARCHITECTURE).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    vocabulary = model.with_name(VOCABULARY)
    if vocabulary.is_file():
        shutil.copyfile(vocabulary, directory / VOCABULARY)


def _storable(tensor: Tensor) -> Tensor:
    """As the file holds it: itself where it is that already, so that writing a model of the CPU takes no memory."""
    tensor = tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype).contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()  # no memory shared between entries


def _with_copies(clip: ClipConfig, directory: Path) -> ClipConfig:
    """The settings with the copies that :func:`_write` made in the directory."""
    clip = dataclasses.replace(clip)
    if clip.templates == TEMPLATES:
        clip.templates = str(directory / TEMPLATES)
    if clip.model == ARCHITECTURE:
        clip.model = str(directory / ARCHITECTURE)
    return clip


def find_model(path: Path) -> Path:
    """The model directory that a path means."""
    if not path.exists():
        raise CheckpointError(f"There is no model at {path}; give a run's directory or its 'model' directory.")
    if path.is_file():
        raise CheckpointError(f"{path} is a file; give the model's directory, which holds {CONFIG} and {WEIGHTS}.")
    directory = path
    with contextlib.suppress(OSError):
        if not (path / WEIGHTS).exists() and (path / "model").is_dir():
            directory = path / "model"
    missing = [name for name in (WEIGHTS, CONFIG, CLASSES) if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{directory} is no model: it lacks {', '.join(missing)}; give the directory of a finished run or its"
            " 'model' directory."
        )
    return directory


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged or not a safetensors file ({error}); copy it again or train again."
        ) from error
    if metadata.get("infoclip") not in (FORMAT, None):
        raise CheckpointError(f"{path} holds '{metadata['infoclip']}' weights; expected a segmentor ('{FORMAT}').")
    return state, metadata


def _three(text: str, path: Path) -> tuple[float, float, float]:
    """A mean or standard deviation of red, green and blue from the weights' metadata."""
    try:
        red, green, blue = (float(x) for x in json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged: its mean or std is no list of three numbers; copy it again."
        ) from error
    return red, green, blue


def _read_classes(path: Path) -> list[str]:
    classes = _read_json(path, list)
    if not all(isinstance(name, str) for name in classes):
        raise CheckpointError(f"{path} is not a class list; expected a JSON list of names.")
    return classes


def _read_json(path: Path, kind: type) -> Any:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Cannot read {path}: {error}; copy the model again or train again.") from error
    if not isinstance(data, kind):
        raise CheckpointError(f"{path} is not what a model directory holds; expected a JSON {kind.__name__}.")
    return data
