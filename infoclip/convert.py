"""Published checkpoints of CAT-Seg, FC-CLIP and MAFT+: read key for key, and written back in the same form.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from infoclip.config import (
    AlignConfig,
    ClipConfig,
    Config,
    DataConfig,
    EvalConfig,
    MaskConfig,
    ModelConfig,
    apply_overrides,
)
from infoclip.errors import CheckpointError, ConfigError, DataError, StorageError

if TYPE_CHECKING:
    from infoclip.model.checkpoint import LoadedModel
    from infoclip.model.maftplus import MaskSegmentor
    from infoclip.model.segmentor import Segmentor

__all__ = ["PublishedCheckpoint", "catseg_config", "convert_catseg", "convert_masks", "mask_config", "read_catseg",
           "read_masks", "read_published", "write_catseg", "write_masks"]  # fmt: skip

_CLIP = "sem_seg_head.predictor.clip_model."
_HEAD = "sem_seg_head.predictor.transformer."
_PREFERRED = ("ViT-B-16-quickgelu", "ViT-L-14-336-quickgelu")
"""The CLIPs of the published models, tried before the others that open_clip names."""


_MASK_CLIP, _TEACHER = "backbone.clip_model.", "backbone_t.clip_model."
_PIXEL, _MASK = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
_LAYERS = rf"{re.escape(_MASK)}transformer_ffn_layers\.(\d+)\."
_ENCODER = rf"{re.escape(_PIXEL)}transformer\.encoder\.layers\.(\d+)\."
_EMPTY = "criterion.empty_weight"
_TRAINED = {171: "coco_stuff_171", 133: "coco_panoptic_133"}
"""Class lists of the published models, by their number."""
_CONVNEXTS = ("convnext_base_w_320", "convnext_large_d_320")
"""The CLIPs of the published mask models, tried before the others that open_clip names."""


@dataclass
class PublishedCheckpoint:
    """What a published checkpoint holds, every entry accounted for."""

    segmentor: Segmentor | MaskSegmentor
    """On the CPU, in evaluation mode."""
    config: Config
    classes: list[str]
    """COCO-Stuff's 171, which the published models of CAT-Seg and MAFT+ were trained on, unless others were given."""
    loaded: int
    """Entries that are parameters of the model."""
    derived: list[str] = field(default_factory=list)
    """What follows from the rest, and was checked: window masks (CAT-Seg); the weights of the classes in the loss, and
    the frozen CLIP where it is what the tuned one started from (MAFT+)."""
    left_out: list[str] = field(default_factory=list)
    """What the file holds beside the weights: the optimiser's state, the iteration."""


def read_catseg(
    path: str | Path, overrides: Sequence[str] = (), classes: Sequence[str] | str | Path = "coco_stuff_171"
) -> PublishedCheckpoint:
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
    path = Path(path)
    names = _names(classes)
    return _catseg(path, *_read(path, "CAT-Seg"), overrides, names)


def _catseg(
    path: Path, state: dict[str, Tensor], left_out: list[str], overrides: Sequence[str], names: list[str]
) -> PublishedCheckpoint:
    config = catseg_config(state, str(path), overrides)
    segmentor: Any = _build(config, state, path, "CAT-Seg")
    own = segmentor.published_state_dict()
    derived = sorted(k for k in state if k.endswith(".attn_mask"))
    for key in derived:
        if key not in own or not torch.equal(own[key], state[key].to(own[key])):
            raise CheckpointError(f"{path} holds the window mask {key}, which does not belong to a model of its sizes.")
    _check_finite(own, path)
    return PublishedCheckpoint(segmentor.eval(), config, names, len(state) - len(derived), derived, left_out)


def convert_catseg(
    path: str | Path,
    out: str | Path,
    overrides: Sequence[str] = (),
    classes: Sequence[str] | str | Path = "coco_stuff_171",
) -> PublishedCheckpoint:
    """Write a published CAT-Seg checkpoint as a model directory; arguments and errors as :func:`read_catseg`'s.

    Raises:
        StorageError: the directory cannot be written; one that is there already is then as it was.
        DataError: ``out`` is a file.
    """
    _check_out(out)
    return _save(read_catseg(path, overrides, classes), path, out)


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
    out = _check_file(out)
    return _write_file(_of_system(model, "catseg").segmentor.published_state_dict(), out)


def read_published(path: str | Path) -> PublishedCheckpoint:
    """Read a published checkpoint of any of the three systems, told by the names of its entries; for settings that the
    weights cannot tell see :func:`read_catseg` and :func:`read_masks`, whose errors it raises."""
    path = Path(path)
    state, left_out = _read(path, "CAT-Seg, FC-CLIP or MAFT+")
    if (system := _system(state)) == "catseg":
        return _catseg(path, state, left_out, (), _names("coco_stuff_171"))
    return _masks(path, system, state, left_out, (), None)


def read_masks(
    path: str | Path,
    system: str,
    overrides: Sequence[str] = (),
    classes: Sequence[str] | str | Path = "",
) -> PublishedCheckpoint:
    """Read a published checkpoint of FC-CLIP or MAFT+; arguments and errors as :func:`read_catseg`'s.

    MAFT+'s files hold CLIP twice. The second is the frozen one, which training alone needs: its entries must be those
    of the tuned one's architecture, and are not kept.

    Args:
        system: ``fcclip`` or ``maftplus``; a checkpoint of the other is refused.
        classes: empty for COCO-Stuff's 171 or COCO panoptic's 133, whichever the file's loss was made for.
    """
    path = Path(path)
    names = _names(classes) if classes else None
    return _masks(path, system, *_read(path, _TITLES[system]), overrides, names)


def _masks(
    path: Path,
    system: str,
    state: dict[str, Tensor],
    left_out: list[str],
    overrides: Sequence[str],
    names: list[str] | None,
) -> PublishedCheckpoint:
    kind = _TITLES[system]
    if (found := _system(state)) != system:
        raise CheckpointError(f"{path} is a checkpoint of {_TITLES[found]}, not of {kind}; convert it as such.")
    teacher = {k.removeprefix(_TEACHER): v for k, v in state.items() if k.startswith(_TEACHER)}
    weight = state.get(_EMPTY)
    derived = [_EMPTY] * (weight is not None) + [_TEACHER + k for k in teacher]
    own = {k: v for k, v in state.items() if k not in set(derived)}
    config = mask_config(own, system, str(path), overrides)
    segmentor: Any = _build(config, own, path, kind)
    _check_finite(segmentor.published_state_dict(), path)
    if teacher:
        stock = {k.removeprefix(_MASK_CLIP): v for k, v in own.items() if k.startswith(_MASK_CLIP)}
        wrong = next((k for k in (stock.keys() | teacher.keys()) if k not in stock or k not in teacher
                      or stock[k].shape != teacher[k].shape), None)  # fmt: skip
        if wrong is not None:
            raise CheckpointError(f"{path} is no {kind} checkpoint of this kind: its two CLIPs differ at {wrong}.")
        _check_finite({_TEACHER + k: v for k, v in teacher.items()}, path)
    if weight is not None:
        wanted = torch.ones(weight.shape)
        if weight.ndim != 1 or len(weight) < 2 or not torch.equal(weight[:-1].float(), wanted[:-1]):
            raise CheckpointError(f"{path} weighs classes in its loss ({_EMPTY}), which is not done here.")
        config.mask.no_object_weight = round(float(weight[-1]), 6)
        config.validate()
    count = len(weight) - 1 if weight is not None else 133 if system == "fcclip" else 171
    if names is None:
        if count not in _TRAINED:
            raise ConfigError(f"{path} was trained on {count} classes of its own; name them with --classes FILE.")
        names = _names(_TRAINED[count])
    if len(names) != count:
        raise DataError(f"The class list has {len(names)} names and {path} was trained on {count} classes.")
    return PublishedCheckpoint(segmentor.eval(), config, names, len(own), sorted(derived), left_out)


def convert_masks(
    path: str | Path,
    out: str | Path,
    system: str,
    overrides: Sequence[str] = (),
    classes: Sequence[str] | str | Path = "",
) -> PublishedCheckpoint:
    """Write a published checkpoint of FC-CLIP or MAFT+ as a model directory; arguments and errors as
    :func:`read_masks`'s and :func:`convert_catseg`'s."""
    _check_out(out)
    return _save(read_masks(path, system, overrides, classes), path, out)


def write_masks(model: str | Path, out: str | Path, system: str) -> int:
    """Write a model of FC-CLIP or MAFT+ in the published form; arguments and errors as :func:`write_catseg`'s.

    MAFT+'s published code wants the frozen CLIP too, which no result depends on: the tuned one's weights are written
    there again. To train on with the published code, put the original CLIP's in their place.

    Raises:
        ConfigError: a model of another system.
    """
    out = _check_file(out)
    loaded = _of_system(model, system)
    state = loaded.segmentor.published_state_dict()
    weight = torch.ones(len(loaded.classes) + 1)
    weight[-1] = loaded.config.mask.no_object_weight
    state[_EMPTY] = weight
    if system == "maftplus":
        clip = {k.removeprefix(_MASK_CLIP): v for k, v in state.items() if k.startswith(_MASK_CLIP)}
        state |= {_TEACHER + k: v for k, v in clip.items()}
    return _write_file(state, out)


def mask_config(state: Mapping[str, Tensor], system: str, source: str, overrides: Sequence[str] = ()) -> Config:
    """The settings that a state dict of FC-CLIP or MAFT+ shows by its shapes, with ``overrides`` on top.

    The numbers of heads leave no trace in the weights, but for the product with the sampled points; neither does
    whether MAFT+ is of the panoptic variant (``mask.panoptic=true``). They have the published values.

    Raises:
        CheckpointError, ConfigError: as :func:`catseg_config`'s.
    """
    kind, shape = _TITLES[system], _shapes(state, source, _TITLES[system])
    queries, channels = shape(f"{_MASK}query_feat.weight", 2)
    offsets = shape(f"{_PIXEL}transformer.encoder.layers.0.self_attn.sampling_offsets.weight", 2)[0]
    levels = shape(f"{_PIXEL}transformer.level_embed", 2)[0]
    heads = MaskConfig().attention_heads
    if levels != 3 or offsets % (2 * levels * heads):
        raise CheckpointError(f"{source} is no {kind} checkpoint of this kind: its deformable attention has {levels} "
                              f"levels and {offsets} offsets.")  # fmt: skip
    mask = MaskConfig(
        queries=queries,
        channels=channels,
        encoder_layers=_count(state, _ENCODER),
        encoder_ffn_dim=shape(f"{_PIXEL}transformer.encoder.layers.0.linear1.weight", 2)[0],
        num_points=offsets // (2 * levels * heads),
        decoder_layers=_count(state, _LAYERS),
        decoder_ffn_dim=shape(f"{_MASK}transformer_ffn_layers.0.linear1.weight", 2)[0],
        transfer_features="reinterpreted",  # as the published code reads the map
        compensation_kernel="width",
    )
    config = Config(
        name=system,
        system=system,  # type: ignore[arg-type]
        clip=ClipConfig(
            model=_convnext_name(state),
            pretrained="",
            tune="trunk" if system == "maftplus" else "frozen",
            image_size=320,
            templates="maftplus",
        ),
        mask=mask,
        align=AlignConfig(method="none"),
        data=DataConfig(kind="benchmark", benchmark="coco-train", classes=""),
        eval=EvalConfig(resize=800, resize_max=1333, sliding_window=False,
                        overlap_threshold=0.7 if system == "maftplus" else 0.8),
    )  # fmt: skip
    config = apply_overrides(config, list(overrides))
    if not config.clip.model:
        width = shape(f"{_MASK_CLIP}visual.trunk.stem.0.weight", 4)[0]
        raise ConfigError(
            f"The CLIP in {source} (a ConvNeXt that starts at width {width}) is none that open_clip names; describe it "
            "with clip.model=FILE.json, a model config as open_clip's."
        )
    return config


# What the systems share

_TITLES = {"catseg": "CAT-Seg", "fcclip": "FC-CLIP", "maftplus": "MAFT+"}


def _system(state: Mapping[str, Tensor]) -> str:
    if not any(key.startswith(_MASK_CLIP) for key in state):
        return "catseg"
    return "maftplus" if any(key.startswith("cdt.") for key in state) else "fcclip"


def _names(classes: Sequence[str] | str | Path) -> list[str]:
    from infoclip.data.classes import check_classes, load_classes

    return load_classes(classes) if isinstance(classes, (str, Path)) else check_classes(classes)


def _build(config: Config, state: dict[str, Tensor], path: Path, kind: str) -> Segmentor | MaskSegmentor:
    """The model of a config with the weights of a file."""
    from infoclip.model.segmentor import build_model

    try:
        bare = replace(config, clip=replace(config.clip, pretrained=""))
        with torch.random.fork_rng(devices=[]):  # random weights are drawn only to be replaced
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that nothing is copied: shapes first, so that no size which does not
                # fit the file is ever allocated
                build_model(bare).load_published_state_dict(state)
            segmentor = build_model(bare)
        segmentor.load_published_state_dict(state)
    except ConfigError:
        raise
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is no {kind} checkpoint of this kind: {_line(error)}.") from error
    return segmentor


def _check_finite(state: Mapping[str, Tensor], path: Path) -> None:
    for key, value in state.items():
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{path} holds numbers in {key} that are not finite; the file is damaged.")


def _check_out(out: str | Path) -> None:
    if Path(out).is_file():
        raise DataError(f"{out} is a file; expected a folder for the model.")


def _check_file(out: str | Path) -> Path:
    out = Path(out)
    if out.is_dir():
        raise StorageError(f"{out} is a folder; name a file such as {out / 'model_final.pth'}.")
    return out


def _save(read: PublishedCheckpoint, path: str | Path, out: str | Path) -> PublishedCheckpoint:
    from infoclip.model.checkpoint import save_model

    save_model(read.segmentor, read.config, read.classes, out, {"converted_from": Path(path).name})
    return read


def _of_system(model: str | Path, system: str) -> LoadedModel:
    from infoclip.model.checkpoint import load_model

    loaded = load_model(model)
    if loaded.config.system != system:
        raise ConfigError(
            f"{model} is a model of {_TITLES[loaded.config.system]}, not of {_TITLES[system]}; use "
            f"'infoclip convert to-{loaded.config.system}'."
        )
    return loaded


def _write_file(state: Mapping[str, Tensor], out: Path) -> int:
    """Write a torch file with the entries below ``model``, whole or not at all."""
    state = {k: v.contiguous() for k, v in state.items()}
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

    shape = _shapes(state, source, "CAT-Seg")

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


def _shapes(state: Mapping[str, Tensor], source: str, kind: str) -> Callable[[str, int], tuple[int, ...]]:
    """From a key and its number of dimensions to its sizes; what is not so is refused."""

    def shape(key: str, dims: int) -> tuple[int, ...]:
        if key not in state:
            raise CheckpointError(f"{source} is no {kind} checkpoint: it lacks {key}.")
        sizes = tuple(state[key].shape)
        if len(sizes) != dims or 0 in sizes:
            raise CheckpointError(f"{source} is no {kind} checkpoint: {key} has shape {list(sizes)}.")
        return sizes

    return shape


def _read(path: Path, kind: str) -> tuple[dict[str, Tensor], list[str]]:
    """The weights, by name, and the names of what else the file holds."""
    from infoclip.clip.weights import read_tensor_file

    table = read_tensor_file(path, f"{kind} checkpoint")
    inner = next((key for key in ("model", "state_dict") if isinstance(table.get(key), dict)), None)
    left_out = [str(key) for key in table if key != inner] if inner is not None else []
    state = table if inner is None else table[inner]
    foreign = next(
        (key for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)), None
    )
    if not state or foreign is not None:
        found = "an empty table" if not state else f"{str(foreign)[:60]!r}, which is no tensor"
        raise CheckpointError(f"{path} is no {kind} checkpoint: expected a table of tensors by name, found {found}.")
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


def _convnext_name(state: Mapping[str, Tensor]) -> str:
    """The open_clip architecture with a ConvNeXt whose entries have these names and shapes, or nothing."""
    import open_clip

    from infoclip.clip import ConvNeXtCLIP
    from infoclip.clip.architecture import model_config, read_convnext

    given = {k.removeprefix(_MASK_CLIP): v.shape for k, v in state.items() if k.startswith(_MASK_CLIP)}
    names = ("positional_embedding", "token_embedding.weight", "text_projection")
    text = [tuple(given.get(name, ())) for name in names]
    others = [name for name in open_clip.list_models() if "convnext" in name and name not in _CONVNEXTS]
    for name in (*_CONVNEXTS, *others):
        config = model_config(name)[0]
        length, words, width = (config["text_cfg"].get(name) for name in ("context_length", "vocab_size", "width"))
        if text != [(length, width), (words, width), (width, config["embed_dim"])]:
            continue  # at a glance: to build one takes a second
        try:
            with torch.device("meta"):
                clip = ConvNeXtCLIP(read_convnext(config, name))
        except ConfigError:
            continue
        if {k: v.shape for k, v in clip.stock_state_dict().items()} == given:
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
