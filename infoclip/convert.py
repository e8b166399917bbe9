"""Published CAT-Seg checkpoints: read key for key, and written back in the same form.

A checkpoint of the published code (``model_final.pth``) is a torch file with the weights below ``model``. Only files
that hold nothing but tensors and plain values are read (``torch.load(weights_only=True)``): no code in them runs. The
settings follow from the shapes of the weights; the few that leave no trace in them have the published values.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from infoclip.config import AlignConfig, ClipConfig, Config, DataConfig, ModelConfig, apply_overrides
from infoclip.errors import CheckpointError, ConfigError, DataError, StorageError

if TYPE_CHECKING:
    from infoclip.model.segmentor import Segmentor

__all__ = ["CatsegCheckpoint", "catseg_config", "convert_catseg", "read_catseg", "write_catseg"]

_CLIP = "sem_seg_head.predictor.clip_model."
_HEAD = "sem_seg_head.predictor.transformer."
_PREFERRED = ("ViT-B-16-quickgelu", "ViT-L-14-336-quickgelu")
"""The CLIPs of the published models, tried before the others that open_clip names."""


@dataclass
class CatsegCheckpoint:
    """What a published checkpoint holds, every entry accounted for."""

    segmentor: Segmentor
    """On the CPU, in evaluation mode."""
    config: Config
    classes: list[str]
    """COCO-Stuff's 171, which the published models were trained on, unless others were given."""
    loaded: int
    """Entries that are parameters of the model."""
    derived: list[str] = field(default_factory=list)
    """Window masks, which follow from the sizes; they are as computed here."""
    left_out: list[str] = field(default_factory=list)
    """What the file holds beside the weights: the optimiser's state, the iteration."""


def read_catseg(
    path: str | Path, overrides: Sequence[str] = (), classes: Sequence[str] | str | Path = "coco_stuff_171"
) -> CatsegCheckpoint:
    """Read a published CAT-Seg checkpoint.

    Args:
        path: ``model_final.pth``, or the same table as safetensors.
        overrides: ``key=value`` for settings that the weights cannot tell and that are not the published ones, such as
            ``clip.model=FILE.json`` for a CLIP that open_clip does not name, or ``model.num_heads=8``.
        classes: the class names that the model was trained on, a shipped list's name or a file.

    Raises:
        CheckpointError: a missing or damaged file, one that holds more than tensors and plain values, entries that are
            missing, unknown or of another shape, or weights that are not finite.
        ConfigError: an override that cannot be.
        DataError: a class list that cannot be used.
    """
    from infoclip.data.classes import check_classes, load_classes
    from infoclip.model.segmentor import build_segmentor

    path = Path(path)
    names = load_classes(classes) if isinstance(classes, (str, Path)) else check_classes(classes)
    state, left_out = _read(path)
    config = catseg_config(state, str(path), overrides)
    try:
        bare = replace(config, clip=replace(config.clip, pretrained=""))
        with torch.random.fork_rng(devices=[]):  # random weights are drawn only to be replaced
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that nothing is copied: shapes first, so that no size which does not
                # fit the file is ever allocated
                build_segmentor(bare).load_published_state_dict(state)
            segmentor = build_segmentor(bare)
        segmentor.load_published_state_dict(state)
    except ConfigError:
        raise
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is no CAT-Seg checkpoint of this kind: {_line(error)}.") from error
    own = segmentor.published_state_dict()
    derived = sorted(k for k in state if k.endswith(".attn_mask"))
    for key in derived:
        if key not in own or not torch.equal(own[key], state[key].to(own[key])):
            raise CheckpointError(f"{path} holds the window mask {key}, which does not belong to a model of its sizes.")
    for key, value in own.items():
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{path} holds numbers in {key} that are not finite; the file is damaged.")
    return CatsegCheckpoint(segmentor.eval(), config, names, len(state) - len(derived), derived, left_out)


def convert_catseg(
    path: str | Path,
    out: str | Path,
    overrides: Sequence[str] = (),
    classes: Sequence[str] | str | Path = "coco_stuff_171",
) -> CatsegCheckpoint:
    """Write a published CAT-Seg checkpoint as a model directory; arguments and errors as :func:`read_catseg`'s.

    Raises:
        StorageError: the directory cannot be written; one that is there already is then as it was.
        DataError: ``out`` is a file.
    """
    from infoclip.model.checkpoint import save_model

    if Path(out).is_file():
        raise DataError(f"{out} is a file; expected a folder for the model.")
    read = read_catseg(path, overrides, classes)
    save_model(read.segmentor, read.config, read.classes, out, {"converted_from": Path(path).name})
    return read


def write_catseg(model: str | Path, out: str | Path) -> int:
    """Write a model in the published form: a torch file that the published code loads, window masks included.

    Args:
        model: a run or model directory.
        out: the file, such as ``model_final.pth``; it appears when it is complete.

    Returns:
        How many entries were written.

    Raises:
        CheckpointError: no usable model.
        StorageError: the file cannot be written.
    """
    from infoclip.model.checkpoint import load_model

    out = Path(out)
    if out.is_dir():
        raise StorageError(f"{out} is a folder; name a file such as {out / 'model_final.pth'}.")
    state = {k: v.contiguous() for k, v in load_model(model).segmentor.published_state_dict().items()}
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save({"model": state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(out)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = error.strerror if isinstance(error, OSError) and error.strerror else _line(error)
        raise StorageError(f"Cannot write the checkpoint {out}: {reason}; free some space and run again.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return len(state)


def catseg_config(state: Mapping[str, Tensor], source: str, overrides: Sequence[str] = ()) -> Config:
    """The settings that a CAT-Seg state dict shows by its shapes, with ``overrides`` on top.

    Attention heads, the kind of class attention, ``pad_len``, guidance blocks and the poolings leave no trace in the
    weights: they are the published ones. The window and the image's side follow from the stored window mask where it is
    there (a mask of [M, w*w, w*w] belongs to windows of side w on a grid of side w * sqrt(M)).

    Raises:
        CheckpointError: entries are missing or have no shape that a CAT-Seg model can have.
        ConfigError: an override that cannot be, or a CLIP that open_clip does not name and no override describes.
    """

    def shape(key: str, dims: int) -> tuple[int, ...]:
        if key not in state:
            raise CheckpointError(f"{source} is no CAT-Seg checkpoint: it lacks {key}.")
        sizes = tuple(state[key].shape)
        if len(sizes) != dims or 0 in sizes:
            raise CheckpointError(f"{source} is no CAT-Seg checkpoint: {key} has shape {list(sizes)}.")
        return sizes

    def width(key: str, dims: int, axis: int = 0) -> int:
        return shape(key, dims)[axis] if key in state else 0

    hidden, prompts = shape(f"{_HEAD}conv1.weight", 4)[:2]
    layers = _count(state, rf"{re.escape(_HEAD)}layers\.(\d+)\.")
    model = ModelConfig(
        hidden_dim=hidden,
        num_layers=layers,
        pad_len=256 if f"{_HEAD}layers.0.attention.padding_tokens" in state else 0,
        text_guidance_proj_dim=width(f"{_HEAD}text_guidance_projection.0.weight", 2),
        appearance_guidance_proj_dim=width(f"{_HEAD}guidance_projection.0.weight", 4),
        decoder_dims=tuple(shape(f"{_HEAD}decoder{i}.conv.double_conv.0.weight", 4)[0] for i in (1, 2)),
        decoder_guidance_dims=tuple(width(f"upsample{i}.weight", 4, 1) for i in (1, 2)),
        decoder_guidance_proj_dims=tuple(width(f"{_HEAD}decoder_guidance_projection.{i}.0.weight", 4) for i in (0, 1)),
    )
    patch = shape(f"{_CLIP}visual.conv1.weight", 4)[-1]
    side = 24
    mask = next((k for k in state if k.startswith(_HEAD) and k.endswith(".attn_mask")), None)
    if mask is not None:
        windows, area, _ = shape(mask, 3)
        model.window_size = math.isqrt(area)
        side = model.window_size * math.isqrt(windows)
    templates = {1: "catseg", 80: "imagenet"}.get(prompts, "")
    name = _clip_name(state, shape)
    config = Config(
        name="catseg",
        clip=ClipConfig(model=name, pretrained="openai", image_size=side * patch, templates=templates),
        model=model,
        align=AlignConfig(method="none"),
        data=DataConfig(kind="benchmark", benchmark="coco-train"),
    )
    config = apply_overrides(config, list(overrides))
    if not config.clip.model:
        raise ConfigError(
            f"The CLIP in {source} ({_describe(state, shape)}) is none that open_clip names; describe it with "
            "clip.model=FILE.json, a model config as open_clip's."
        )
    if not config.clip.templates:
        raise ConfigError(f"{source} takes {prompts} prompts a class; name them with clip.templates=FILE, one a line.")
    return config


def _read(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The weights, by name, and the names of what else the file holds."""
    from infoclip.clip.weights import read_tensor_file

    table = read_tensor_file(path, "CAT-Seg checkpoint")
    inner = next((key for key in ("model", "state_dict") if isinstance(table.get(key), dict)), None)
    left_out = [str(key) for key in table if key != inner] if inner is not None else []
    state = table if inner is None else table[inner]
    foreign = next(
        (key for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)), None
    )
    if not state or foreign is not None:
        found = "an empty table" if not state else f"{str(foreign)[:60]!r}, which is no tensor"
        raise CheckpointError(f"{path} is no CAT-Seg checkpoint: expected a table of tensors by name, found {found}.")
    for key, value in state.items():
        if value.layout != torch.strided or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(f"{path} holds the tensor {key} with less data than its shape states.")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state, left_out


def _clip_name(state: Mapping[str, Tensor], shape: Any) -> str:
    """The open_clip architecture with QuickGELU (as OpenAI's weights have it) of these sizes, or nothing."""
    import open_clip

    wanted = _clip_sizes(state, shape)
    others = [name for name in open_clip.list_models() if name.endswith("-quickgelu") and name not in _PREFERRED]
    for name in (*_PREFERRED, *others):
        config = open_clip.get_model_config(name)
        vision, text = config["vision_cfg"], config["text_cfg"]
        if not isinstance(vision.get("layers"), int) or "hf_model_name" in text:
            continue
        sizes = (config["embed_dim"], vision["width"], vision["layers"], vision.get("patch_size"), vision["image_size"],
                 text["width"], text["layers"], text["context_length"], text["vocab_size"])  # fmt: skip
        if sizes == wanted:
            return str(name)
    return ""


def _clip_sizes(state: Mapping[str, Tensor], shape: Any) -> tuple[int, ...]:
    width, _, _, patch = shape(f"{_CLIP}visual.conv1.weight", 4)
    tokens = shape(f"{_CLIP}visual.positional_embedding", 2)[0]
    context, text_width = shape(f"{_CLIP}positional_embedding", 2)
    resblocks = r"transformer\.resblocks\.(\d+)\."
    return (
        shape(f"{_CLIP}visual.proj", 2)[1],
        width,
        _count(state, rf"{re.escape(_CLIP)}visual\.{resblocks}"),
        patch,
        math.isqrt(max(0, tokens - 1)) * patch,
        text_width,
        _count(state, rf"{re.escape(_CLIP)}{resblocks}"),
        context,
        shape(f"{_CLIP}token_embedding.weight", 2)[0],
    )


def _describe(state: Mapping[str, Tensor], shape: Any) -> str:
    embed, width, layers, patch, size, text_width, text_layers, _, _ = _clip_sizes(state, shape)
    return (
        f"image encoder of width {width} with {layers} blocks on patches of {patch} at {size} px, text encoder of "
        f"width {text_width} with {text_layers}, joint width {embed}"
    )


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many blocks the keys that begin like the pattern belong to; a gap shows later, as missing entries."""
    return len({match.group(1) for match in (re.match(pattern, key) for key in state) if match})


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
