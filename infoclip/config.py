"""The settings of a run: typed dataclasses, ``key=value`` overrides, and the JSON that every run leaves behind.

One recipe (``infoclip.recipes``) is one function that returns a complete :class:`Config`. Overrides name a leaf by its
dotted path (``optim.lr=1e-4``); a unique last part is enough (``lr=1e-4``). Unknown names are refused with the nearest
match, values are checked against the field's type, and combinations that cannot work raise when the config is built.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from infoclip.errors import ConfigError

__all__ = [
    "AlignConfig",
    "ClipConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "MaskConfig",
    "ModelConfig",
    "OptimConfig",
    "TrainConfig",
    "apply_overrides",
    "config_from_dict",
    "config_to_dict",
    "load_config",
    "save_config",
]

_MEMORY = ("fast", "balanced", "lean", "reference", "auto")


@dataclass
class ClipConfig:
    """The CLIP behind the segmentor (student and teacher start from the same weights)."""

    model: str = "ViT-B-16-quickgelu"
    """open_clip architecture name, the path of an open_clip model config (JSON), or a shipped CLIP: ``builtin:scenes``
    (ViT), ``builtin:scenes-convnext``."""
    pretrained: str = "openai"
    """open_clip weight tag, a local weight file, the shipped CLIP's name again, or empty for random weights."""
    tune: Literal["attention", "full", "frozen", "trunk"] = "attention"
    """What learns in CLIP: q and v projections of both towers (published), everything, nothing; of a ConvNeXt its stem
    and stages (MAFT+), or nothing (FC-CLIP; with ``trunk`` it is plain fine-tuning, by the losses of its masks)."""
    tune_positions: bool = False
    """With ``attention``: also the visual position embedding (the published code means to, but does not)."""
    dense: Literal["value-cls", "value", "attention"] = "value-cls"
    """Last visual block in dense mode: value path + class-token residual (published), value path with each token's
    own residual, or the block as trained."""
    image_size: int = 384
    """Side in pixels at which an image enters the encoder."""
    guidance_layers: tuple[int, ...] = ()
    """0-based blocks whose outputs guide the decoder; empty: one third and two thirds of the depth (published)."""
    templates: str = "catseg"
    """Prompt templates: a named set (``catseg``, ``imagenet``, ``plain``, ``maftplus``) or a text file, one a line."""


@dataclass
class ModelConfig:
    """Cost aggregation and decoder (CAT-Seg, section 3; published values)."""

    hidden_dim: int = 128
    num_layers: int = 2
    num_heads: int = 4
    window_size: int = 12
    attention_type: Literal["linear", "full"] = "linear"
    pooling_train: int = 2
    pooling_eval: int = 1
    pad_len: int = 256
    """Classes are padded to this number with a learnt token; more classes are cut to the most similar; 0: neither."""
    text_guidance_proj_dim: int = 128
    appearance_guidance_proj_dim: int = 128
    decoder_dims: tuple[int, ...] = (64, 32)
    decoder_guidance_dims: tuple[int, ...] = (256, 128)
    decoder_guidance_proj_dims: tuple[int, ...] = (32, 16)
    memory: str = "fast"
    """What a training step keeps for its backward pass, from much to little: ``fast``, ``balanced``, ``lean`` (3.0,
    0.7, 0.2 GB an image in the aggregation at the published size; the last two also compute CLIP's activations again),
    or ``reference``, its plain form (6.9 GB). A budget such as ``8GiB``, or ``auto`` for what is free, lets the planner
    choose mode, class chunk and micro-batch. Values and gradients are the same to rounding; a run can change it."""
    class_chunk: int = 0
    """Classes that are worked on at once; 0 for the memory mode's own choice. Fewer take less memory for a moment."""


@dataclass
class MaskConfig:
    """Mask proposals and their classes (FC-CLIP, MAFT+; published values). Only for these two systems."""

    queries: int = 100
    channels: int = 256
    attention_heads: int = 8
    encoder_layers: int = 6
    encoder_ffn_dim: int = 1024
    num_points: int = 4
    """Points that a head samples on each level."""
    decoder_layers: int = 9
    decoder_ffn_dim: int = 2048
    panoptic: bool = False
    """MAFT+ only: the panoptic variant of the content-dependent transfer."""
    transfer_heads: int = 8
    transfer_features: Literal["pixel", "reinterpreted"] = "pixel"
    """What the transfer reads: each pixel's embedding, or (published) those of rows that mix channels and pixels, since
    the published code takes a map [C, h, w] for [h * w, C] without exchanging its axes. Published weights need the
    latter."""
    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    no_object_weight: float = 0.1
    """Of proposals without an object in the classification loss."""
    points: int = 12544
    """Points at which a mask is compared with an object."""
    oversample: float = 3.0
    importance: float = 0.75
    """Share of the points that are the most uncertain of ``oversample`` times as many."""
    mask_aware_weight: float = 1.0
    compensation_weight: float = 0.1
    compensation_kernel: Literal["square", "width"] = "square"
    """Side that the pooling of the compensation loss divides: of the squared map, or (published) the map's width, which
    gives tall images more cells than wide ones."""
    student_drop_path: bool = False
    """Stochastic depth in the tuned CLIP. The published code means to have it, but switches it off in its first step
    and on again after its first evaluation."""
    teacher_drop_path: bool = False
    """Stochastic depth in the frozen CLIP, whose features are then noisy (published)."""


@dataclass
class AlignConfig:
    """The alignment objective beside the segmentation loss (InfoCLIP, section 3)."""

    method: Literal["none", "infoclip", "kl", "maft", "maftplus"] = "infoclip"
    estimator: Literal["renyi", "infonce"] = "renyi"
    alpha: float = 2.0
    """Order of the matrix-based Renyi entropy; 2 needs no eigenvalues."""
    samples: Literal["batch", "pixel", "class"] = "batch"
    """What is one sample of a Gram matrix: an image's map (needs two or more), a pixel's row, a class's column."""
    center: bool = False
    """Subtract the mean over the samples from the alignment maps before the Gram matrices."""
    transfer_weight: float = 1.0
    compression_weight: float = 1.0
    distill_weight: float = 1.0
    """Weight of the ``kl``, ``maft`` and ``maftplus`` baselines."""
    temperature: float = 0.1
    """Of InfoNCE, and of the softmax over classes in ``kl``."""
    lpam: Literal["learnt", "cosine"] = "learnt"
    """The alignment module: learnt (published), or fixed to the cosine map (nothing learns from L_c then: left out)."""
    lpam_init: Literal["default", "cosine"] = "default"
    """``cosine`` starts the key projection at zero and does not centre the embeddings, so that the first map is exactly
    the cosine map."""
    transfer_to_lpam: Literal["both", "teacher", "student", "none"] = "both"
    """Through which maps L_d teaches the alignment module: both (published), one of them, or neither."""
    start_step: int = 0
    """The objective is off before this step, so that the head can learn first."""
    ramp_steps: int = 0
    """After ``start_step`` the weights rise linearly over this many steps."""


@dataclass
class DataConfig:
    """Training data: generated scenes, a folder of images and a folder of masks, a data set of the papers, or panoptic
    annotations."""

    kind: Literal["scenes", "folders", "benchmark", "panoptic"] = "folders"
    benchmark: str = "coco-train"
    """Benchmark, panoptic: its name (``infoclip data list``), read from its published folders below ``root``; images,
    masks, classes and label map then come from it. Empty for panoptic annotations of one's own."""
    root: str = ""
    """Folder below which images, masks and the class list are; scenes are written there when missing."""
    images: str = "images/train2017"
    masks: str = "annotations/train2017"
    annotations: str = "panoptic.json"
    """Panoptic only, of one's own: the JSON file in panopticapi's layout; ``masks`` is the folder of its PNGs."""
    classes: str = "coco_stuff_171"
    """A named class list of the package, or a file: one class a line, or JSON. Panoptic: a name for each category, in
    the order of their ids; empty: the categories' own."""
    train_classes: str = ""
    """Classes to train on, as a class list inside ``classes``; pixels of others become ``ignore_index``; empty: all."""
    label_map: str = ""
    """Folders only: annotation value -> class, a shipped benchmark's name or a JSON file; empty: values are indices."""
    ignore_index: int = 255
    split: Literal["attribute", "composition"] = "attribute"
    """Scenes only: how classes are divided into seen and unseen."""
    train_images: int = 128
    """Scenes only: number of generated training images."""
    eval_images: int = 128
    """Scenes only: number of generated evaluation images."""
    scenes_seed: int = 0
    """Scenes only: seed of the generated images (apart from ``train.seed``)."""
    resize: int = 384
    """Shortest side after resizing; 0 keeps the size."""
    min_sizes: tuple[int, ...] = ()
    """In place of ``resize``: shortest sides of which each image draws one (detectron2's MIN_SIZE_TRAIN, sampled by
    ``choice``; the published trainings name one size)."""
    resize_max: int = 1333
    crop: int = 384
    """Side of the random crop; 0 for none."""
    scales: tuple[float, ...] = ()
    """Two factors: in place of ``resize``, an image is fitted into a square of ``crop`` times a number between them
    (large-scale jitter; FC-CLIP 0.1 and 2)."""
    crop_max_share: float = 1.0
    """Below 1: crops hold two classes or more, none with this share of the labelled pixels (ten tries); 1 (published):
    any crop."""
    flip: bool = True
    color_jitter: bool = True
    """SSD photometric distortion."""
    sample_classes: int = 0
    """Classes a step sees: those in the batch and random others up to this number; 0 for all (published)."""
    batch_size: int = 4
    workers: int = 4


@dataclass
class OptimConfig:
    """AdamW, groups and schedule (published values)."""

    lr: float = 2e-4
    clip_lr_multiplier: float = 0.01
    lpam_lr_multiplier: float = 1.0
    weight_decay: float = 1e-4
    weight_decay_norm: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_grad_norm: float = 0.01
    """Largest gradient norm; 0 for no clipping."""
    clip_grad: Literal["joint", "group"] = "joint"
    """One norm over all parameters (published), or one for each of head, CLIP and alignment module."""
    schedule: Literal["cosine", "poly", "step", "constant"] = "cosine"
    """To zero by a cosine (CAT-Seg) or as ``(1 - t) ** 0.9`` (MAFT+); a tenth after 8/9 and a hundredth after 26/27 of
    the steps (FC-CLIP); or none."""
    warmup_steps: int = 0


@dataclass
class TrainConfig:
    steps: int = 80_000
    grad_accumulation: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    ignored: Literal["negative", "masked"] = "negative"
    """Pixels labelled ``ignore_index``: negatives of every class (published), or left out."""
    seed: int = 0
    device: str = "auto"
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    log_every: int = 20
    image_every: int = 2000


@dataclass
class EvalConfig:
    """How a whole image is segmented (published values)."""

    resize: int = 640
    """Shortest side to which an image is resized before anything else; 0 keeps its size."""
    resize_max: int = 2560
    """The longest side may not become longer than this."""
    sliding_window: bool = True
    """Windows and the whole image, averaged; otherwise the whole image alone."""
    size: int = 640
    """Side to which an image is squashed for the sliding window."""
    window: int = 384
    overlap: float = 0.333
    batch_size: int = 1
    """Windows that go through the model at once."""
    padding: Literal["none", "published"] = "none"
    """Without sliding window: ``published`` pads images to a multiple of 32 and, like the published code, never takes
    the padding off again, so that labels are slightly squeezed."""
    object_threshold: float = 0.0
    """Mask proposals only, as are the next: least score of a proposal in a panoptic map (MAFT+: 0.2)."""
    overlap_threshold: float = 0.8
    """Least share of a proposal's own pixels that it must win in a panoptic map (MAFT+: 0.7)."""
    instances: int = 100
    """Most instances of a picture."""
    instance_threshold: float = 0.3
    """Instances with a smaller score are left out of pictures and files; the published evaluation keeps all (0)."""
    ensemble_alpha: float = 0.4
    """FC-CLIP: weight of CLIP's own score against the decoder's for seen classes."""
    ensemble_beta: float = 0.8
    """The same for unseen classes."""
    ensemble_on_valid_mask: bool = False
    """FC-CLIP: proposals that are empty on CLIP's map keep the decoder's score alone."""


@dataclass
class Config:
    """Everything that decides a run's result."""

    name: str = "custom"
    system: Literal["catseg", "fcclip", "maftplus"] = "catseg"
    """Cost aggregation on a ViT (CAT-Seg, InfoCLIP), or mask proposals on a ConvNeXt, frozen (FC-CLIP) or tuned with
    its text (MAFT+)."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def validate(self) -> Config:
        """Return self, or raise :class:`ConfigError` naming the first setting that cannot work."""
        m = self.model
        _require(
            m.hidden_dim > 0 and m.hidden_dim % m.num_heads == 0,
            "model.hidden_dim",
            m.hidden_dim,
            f"a positive multiple of model.num_heads ({m.num_heads})",
        )
        _require(
            len(m.decoder_dims) == len(m.decoder_guidance_dims) == len(m.decoder_guidance_proj_dims) == 2,
            "model.decoder_dims",
            m.decoder_dims,
            "two entries, as decoder_guidance_dims and ..._proj_dims",
        )
        _require(
            all(d % 16 == 0 for d in m.decoder_dims),
            "model.decoder_dims",
            m.decoder_dims,
            "multiples of 16 (the width of a normalisation group)",
        )
        for name, narrow, wide in zip(
            ("first", "second"), m.decoder_guidance_proj_dims, (m.hidden_dim, m.decoder_dims[0]), strict=True
        ):
            _require(
                0 <= narrow < wide,
                "model.decoder_guidance_proj_dims",
                m.decoder_guidance_proj_dims,
                f"the {name} below the {wide} channels that it joins",
            )
        _require(m.pooling_train >= 1 and m.pooling_eval >= 1, "model.pooling_train", m.pooling_train, "at least 1")
        if m.memory not in _MEMORY:
            from infoclip.budget import parse_budget

            if not any(character.isdigit() for character in m.memory):
                near = difflib.get_close_matches(m.memory, _MEMORY, n=1)
                hint = f"; did you mean '{near[0]}'?" if near else "."
                raise ConfigError(
                    f"model.memory is '{m.memory}'; expected one of {', '.join(_MEMORY)} or a budget such as 8GiB{hint}"
                )
            try:
                parse_budget(m.memory)
            except ValueError as error:
                raise ConfigError(f"model.memory: {error}.") from error
        _require(m.class_chunk >= 0, "model.class_chunk", m.class_chunk, "0 or more")
        _require(m.pad_len >= 0, "model.pad_len", m.pad_len, "0 or more")
        self._validate_mask()
        if self.align.method == "infoclip" and self.align.samples == "batch" and self.data.batch_size == 1:
            raise ConfigError(
                "align.samples=batch compares the pictures of a batch, and data.batch_size is 1; "
                "set data.batch_size to 2 or more, or align.samples=pixel."
            )
        _require(self.align.alpha > 0, "align.alpha", self.align.alpha, "greater than 0")
        _require(self.align.start_step >= 0, "align.start_step", self.align.start_step, "0 or more")
        _require(self.align.ramp_steps >= 0, "align.ramp_steps", self.align.ramp_steps, "0 or more")
        _require(self.align.temperature > 0, "align.temperature", self.align.temperature, "greater than 0")
        _require(self.train.steps >= 1, "train.steps", self.train.steps, "at least 1")
        _require(
            self.train.grad_accumulation >= 1, "train.grad_accumulation", self.train.grad_accumulation, "at least 1"
        )
        _require(self.train.checkpoint_every >= 1, "train.checkpoint_every", self.train.checkpoint_every, "at least 1")
        _require(self.train.keep_checkpoints >= 1, "train.keep_checkpoints", self.train.keep_checkpoints, "at least 1")
        _require(self.train.log_every >= 1, "train.log_every", self.train.log_every, "at least 1")
        _require(self.data.batch_size >= 1, "data.batch_size", self.data.batch_size, "at least 1")
        _require(
            0 < self.data.crop_max_share <= 1, "data.crop_max_share", self.data.crop_max_share, "above 0, at most 1"
        )
        _require(self.data.workers >= 0, "data.workers", self.data.workers, "0 or more")
        _require(self.optim.lr > 0, "optim.lr", self.optim.lr, "greater than 0")
        sizes, scales = self.data.min_sizes, self.data.scales
        _require(
            not sizes or (min(sizes) > 0 and not scales), "data.min_sizes", sizes, "sizes above 0, without data.scales"
        )
        _require(
            not scales or (len(scales) == 2 and 0 < scales[0] <= scales[1] and self.data.crop > 0),
            "data.scales",
            scales,
            "two factors above 0, the smaller first, with a data.crop, or none",
        )
        _require(0 <= self.eval.overlap < 1, "eval.overlap", self.eval.overlap, "at least 0 and below 1")
        _require(self.eval.resize >= 0, "eval.resize", self.eval.resize, "0 or more")
        _require(self.eval.resize_max >= 1, "eval.resize_max", self.eval.resize_max, "at least 1")
        _require(self.eval.size >= 1, "eval.size", self.eval.size, "at least 1")
        _require(self.eval.window >= 1, "eval.window", self.eval.window, "at least 1")
        _require(self.eval.batch_size >= 1, "eval.batch_size", self.eval.batch_size, "at least 1")
        _require(self.clip.image_size > 0, "clip.image_size", self.clip.image_size, "greater than 0")
        return self

    def _validate_mask(self) -> None:
        k = self.mask
        for name in ("queries", "attention_heads", "encoder_layers", "encoder_ffn_dim", "num_points", "decoder_layers",
                     "decoder_ffn_dim", "transfer_heads", "points"):  # fmt: skip
            _require(getattr(k, name) >= 1, f"mask.{name}", getattr(k, name), "at least 1")
        _require(
            k.channels >= 32 and k.channels % 32 == 0 and k.channels % k.attention_heads == 0,
            "mask.channels",
            k.channels,
            f"a multiple of 32 (the normalisation groups) and of mask.attention_heads ({k.attention_heads})",
        )
        _require(k.oversample >= 1, "mask.oversample", k.oversample, "at least 1")
        _require(0 <= k.importance <= 1, "mask.importance", k.importance, "0 to 1")
        _require(k.no_object_weight > 0, "mask.no_object_weight", k.no_object_weight, "greater than 0")
        for name in ("class_weight", "mask_weight", "dice_weight", "mask_aware_weight", "compensation_weight"):
            _require(getattr(k, name) >= 0, f"mask.{name}", getattr(k, name), "0 or more")
        _require(0 <= self.eval.object_threshold <= 1, "eval.object_threshold", self.eval.object_threshold, "0 to 1")
        _require(0 <= self.eval.overlap_threshold <= 1, "eval.overlap_threshold", self.eval.overlap_threshold, "0 to 1")
        threshold = self.eval.instance_threshold
        _require(0 <= threshold <= 1, "eval.instance_threshold", threshold, "0 to 1")
        _require(self.eval.instances >= 1, "eval.instances", self.eval.instances, "at least 1")
        for name in ("ensemble_alpha", "ensemble_beta"):
            _require(0 <= getattr(self.eval, name) <= 1, f"eval.{name}", getattr(self.eval, name), "0 to 1")
        if self.system == "catseg":
            _require(self.clip.tune != "trunk", "clip.tune", self.clip.tune, "attention, full or frozen")
            return
        _require(self.align.method == "none", "align.method", self.align.method, f"none for system={self.system}")
        _require(
            self.clip.tune in ("trunk", "frozen"),
            "clip.tune",
            self.clip.tune,
            f"trunk or frozen for system={self.system}",
        )
        classes = self.data.sample_classes
        _require(classes == 0, "data.sample_classes", classes, "0 with mask proposals")
        _require(not self.eval.sliding_window, "eval.sliding_window", True, "false with mask proposals")


def _require(ok: bool, key: str, value: Any, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{key} is {value!r}; expected {expected}.")


def config_to_dict(config: Config) -> dict[str, Any]:
    """Plain dict of the config, ready for JSON."""
    return dataclasses.asdict(config)


def config_from_dict(data: dict[str, Any]) -> Config:
    """Config from :func:`config_to_dict`'s dict; unknown keys and wrong types raise :class:`ConfigError`."""
    return _build(Config, data, "").validate()


def save_config(config: Config, path: str | Path) -> None:
    """Write the config as JSON."""
    Path(path).write_text(json.dumps(config_to_dict(config), indent=2) + "\n", encoding="utf-8")


def load_config(path: str | Path) -> Config:
    """Read a config that :func:`save_config` wrote."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read the config {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not a config: expected JSON, found {error}.") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is not a config: expected a JSON object.")
    return config_from_dict(data)


def apply_overrides(config: Config, overrides: list[str]) -> Config:
    """A copy of ``config`` with ``key=value`` strings applied.

    Raises:
        ConfigError: a string without ``=``, an unknown or ambiguous key (with the nearest match), a value of the
            wrong type, or settings that do not go together.
    """
    data = config_to_dict(config)
    leaves = dict(_leaves(Config, ""))
    for item in overrides:
        key, sep, text = item.partition("=")
        if not sep or not key:
            raise ConfigError(f"'{item}' is not an override: expected key=value, such as optim.lr=1e-4.")
        path = _resolve(key.strip(), list(leaves))
        node = data
        *parents, last = path.split(".")
        for part in parents:
            node = node[part]
        node[last] = _parse(text.strip(), leaves[path], path)
    return config_from_dict(data)


def _leaves(cls: type, prefix: str) -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kind = hints[f.name]
        if dataclasses.is_dataclass(kind):
            yield from _leaves(typing.cast(type, kind), f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", kind


def _resolve(key: str, names: list[str]) -> str:
    if key in names:
        return key
    ends = [n for n in names if n.endswith("." + key)]
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise ConfigError(f"The key '{key}' is ambiguous: write one of {', '.join(sorted(ends))}.")
    near = difflib.get_close_matches(key, names + [n.rsplit(".", 1)[-1] for n in names], n=1, cutoff=0.5)
    hint = f"; did you mean '{near[0]}'?" if near else "; 'infoclip recipes NAME' lists the keys."
    raise ConfigError(f"Unknown key '{key}'{hint}")


def _parse(text: str, kind: Any, path: str) -> Any:
    """The value that ``text`` names for a field of type ``kind``, still to be checked by :func:`_check`."""
    if kind is str or typing.get_origin(kind) is Literal:
        return text
    if kind is bool:
        values = {
            "true": True,
            "1": True,
            "yes": True,
            "on": True,
            "false": False,
            "0": False,
            "no": False,
            "off": False,
        }
        if text.lower() not in values:
            raise ConfigError(f"{path} is '{text}'; expected true or false.")
        return values[text.lower()]
    try:
        if kind is int:
            return int(text.replace("_", ""))
        if kind is float:
            return float(text)
        if typing.get_origin(kind) is tuple:
            item = typing.get_args(kind)[0]
            parts = [p for p in text.strip("()[] ").replace(" ", "").split(",") if p]
            return [_parse(p, item, path) for p in parts]
    except ValueError as error:
        raise ConfigError(f"{path} is '{text}'; expected {_describe(kind)}.") from error
    raise TypeError(f"{path}: no parser for the field type {kind}")


def _describe(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if origin is tuple:
        return f"values of type {typing.get_args(kind)[0].__name__} separated by commas"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, str(kind))


def _build(cls: Any, data: Any, prefix: str) -> Any:
    if not isinstance(data, dict):
        raise ConfigError(f"{prefix.rstrip('.') or 'the config'} is {data!r}; expected a table of settings.")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key in data:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            raise ConfigError(
                f"Unknown key '{prefix}{key}'" + (f"; did you mean '{prefix}{near[0]}'?" if near else ".")
            )
    values = {}
    for key, value in data.items():
        kind = hints[key]
        if dataclasses.is_dataclass(kind):
            values[key] = _build(kind, value, f"{prefix}{key}.")
        else:
            values[key] = _check(value, kind, f"{prefix}{key}")
    return cls(**values)


def _check(value: Any, kind: Any, path: str) -> Any:
    origin = typing.get_origin(kind)
    if origin is Literal:
        options = typing.get_args(kind)
        if value in options:
            return value
        near = difflib.get_close_matches(str(value), [str(o) for o in options], n=1)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        raise ConfigError(f"{path} is '{value}'; expected one of {', '.join(map(str, options))}{hint}")
    if origin is tuple:
        args = typing.get_args(kind)
        if isinstance(value, (list, tuple)):
            fixed = len(args) if Ellipsis not in args else None
            if fixed is None or len(value) == fixed:
                return tuple(_check(v, args[0], path) for v in value)
            raise ConfigError(f"{path} is {value!r}; expected {fixed} values.")
    elif origin in (typing.Union, types.UnionType):
        raise TypeError(f"{path}: unions are not used in configs")
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif (kind is int and isinstance(value, int) and not isinstance(value, bool)) or (
        kind in (bool, str) and isinstance(value, kind)
    ):
        return value
    raise ConfigError(f"{path} is {value!r}; expected {_describe(kind)}.")
