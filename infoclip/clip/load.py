"""Building a :class:`DenseCLIP` from settings: architecture, weights, and what learns."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from infoclip.clip.architecture import (
    Architecture,
    TextArchitecture,
    model_config,
    read_architecture,
    read_convnext,
)
from infoclip.clip.builtin import PREFIX, builtin_file
from infoclip.clip.convnext import ConvNeXtCLIP
from infoclip.clip.dense import DenseCLIP
from infoclip.clip.templates import resolve_templates
from infoclip.clip.text import OPENAI_MEAN, OPENAI_STD
from infoclip.clip.weights import StoredWeights, read_weights
from infoclip.config import ClipConfig
from infoclip.errors import CheckpointError, ConfigError

__all__ = ["load_clip", "load_convnext_clip"]


def load_clip(config: ClipConfig) -> DenseCLIP:
    """Build the CLIP that the settings name, with its weights and its tuning policy.

    ``config.model`` is an open_clip architecture, the path of an open_clip model config (JSON) or the name of a shipped
    CLIP, ``builtin:scenes``; ``config.pretrained`` is one of that architecture's tags in open_clip, a local weight
    file, that name again, or empty for random weights (drawn from torch's global generator).

    Raises:
        ConfigError: an unknown architecture, an unsupported one, or weights trained with the other activation
            (QuickGELU or GELU; a tag tells it, a local file not always, see
            :func:`~infoclip.clip.weights.read_weights`).
        CheckpointError: weights that cannot be found, downloaded or read, or that belong to another architecture.
    """
    options: dict[str, Any] = {
        "image_size": config.image_size,
        "dense": config.dense,
        "guidance_layers": config.guidance_layers,
        "templates": resolve_templates(config.templates),
    }
    config = _with_files(config)
    model, preprocess = model_config(config.model)
    arch = read_architecture(model, config.model)
    stored, more = _weights_of(config, model, arch, preprocess)
    clip = _build(arch, config, stored, options | more)
    clip.parameter_policy(config.tune, config.tune_positions)
    return clip


def load_convnext_clip(config: ClipConfig, **options: Any) -> ConvNeXtCLIP:
    """Build the CLIP with a ConvNeXt that the settings name, with its weights and its tuning policy.

    ``config.model`` and ``config.pretrained`` are as :func:`load_clip`'s; the shipped one is
    ``builtin:scenes-convnext``. A model config (JSON) may describe any ConvNeXt of timm: a name that timm knows as
    ``timm_model_name``, or ``local-dir:FOLDER`` beside a ``config.json`` of timm (``{"architecture": "convnext_atto",
    "pretrained_cfg": {}, "model_args": {"depths": [...], "dims": [...]}}``); the folder may be relative to the model
    config.

    Args:
        options: ``drop_path`` of :class:`~infoclip.clip.convnext.ConvNeXtCLIP`.

    Raises:
        ConfigError, CheckpointError: as :func:`load_clip`, and for a CLIP with another image encoder.
    """
    config = _with_files(config)
    model, preprocess = model_config(config.model)
    arch = read_convnext(model, config.model)
    stored, more = _weights_of(config, model, arch, preprocess)
    options |= {"templates": resolve_templates(config.templates), **more}
    if stored is None:
        clip = ConvNeXtCLIP(arch, **options)
        clip.reset_parameters()
    else:
        with torch.device("meta"):
            clip = ConvNeXtCLIP(arch, **options)
        clip.load_stock_state_dict(stored.state, source=f"'{config.pretrained}' for {config.model}")
    clip.parameter_policy(config.tune, config.tune_positions)
    return clip


def _with_files(config: ClipConfig) -> ClipConfig:
    """The settings with the files of a shipped CLIP in the place of its name."""
    pretrained = builtin_file(config.pretrained, "model.safetensors")
    if config.pretrained.startswith(PREFIX) and config.model != config.pretrained:
        raise ConfigError(
            f"The weights {config.pretrained} do not belong to the architecture '{config.model}'; "
            f"use clip.model={config.pretrained}."
        )
    return dataclasses.replace(config, model=builtin_file(config.model, "config.json"), pretrained=pretrained)


def _weights_of(
    config: ClipConfig, model: dict[str, Any], arch: TextArchitecture, preprocess: dict[str, Any]
) -> tuple[StoredWeights | None, dict[str, Any]]:
    """The weights that the settings name (None for random ones), and what goes with them: tokenizer, mean and std."""
    stored: StoredWeights | None = None
    if config.pretrained:
        tag = _tag_config(config.model, config.pretrained)
        if tag:
            _check_activation(bool(tag.get("quick_gelu", False)), arch, config)
            preprocess = {"mean": tag.get("mean"), "std": tag.get("std")}
            path = _download(tag, config)
        else:
            path = Path(config.pretrained).expanduser()
            if not path.exists():
                raise CheckpointError(_not_found(config))
        stored = read_weights(path)
        if not tag and stored.quick_gelu is not None:
            _check_activation(stored.quick_gelu, arch, config)
    return stored, {
        "tokenizer": _tokenizer(config.model, model["text_cfg"], arch),
        "mean": preprocess.get("mean") or OPENAI_MEAN,
        "std": preprocess.get("std") or OPENAI_STD,
    }


def _build(arch: Architecture, config: ClipConfig, stored: StoredWeights | None, options: dict[str, Any]) -> DenseCLIP:
    if stored is None:
        clip = DenseCLIP(arch, **options)
        clip.reset_parameters()
        return clip
    with torch.device("meta"):  # the file's tensors become the parameters: nothing is initialised in vain
        clip = DenseCLIP(arch, **options)
    clip.load_stock_state_dict(stored.state, source=f"'{config.pretrained}' for {config.model}")
    return clip


def _tag_config(model: str, name: str) -> dict[str, Any]:
    """open_clip's entry for a weight tag, empty for an unknown one.

    A ``-quickgelu`` architecture also sees the tags of its plain sibling, so that a mismatch can be named as such.
    """
    from open_clip import pretrained

    for candidate in (model, model.removesuffix("-quickgelu")):
        entry = pretrained.get_pretrained_cfg(candidate, name)
        if entry:
            return dict(entry)
    return {}


def _check_activation(weights_quick: bool, arch: TextArchitecture, config: ClipConfig) -> None:
    if weights_quick == arch.quick_gelu:
        return
    import open_clip

    names = {True: "QuickGELU", False: "GELU"}
    plain = config.model.removesuffix("-quickgelu")
    right = plain + "-quickgelu" if weights_quick else plain
    if right in open_clip.list_models() and right != config.model:
        advice = f"use clip.model={right}"
    else:
        advice = f"use a model config with quick_gelu set to {str(weights_quick).lower()}"
    raise ConfigError(
        f"The weights '{config.pretrained}' were trained with {names[weights_quick]}, but {config.model} computes "
        f"{names[arch.quick_gelu]}; {advice}."
    )


def _download(tag: dict[str, Any], config: ClipConfig) -> Path:
    """The weight file of a tag: from the local caches, else from the network."""
    from open_clip import pretrained

    cached = _cached(tag)
    if cached is not None:
        return cached
    try:
        if not _has_network():
            raise OSError("no network")
        return Path(pretrained.download_pretrained(tag))
    except Exception as error:  # the hub client raises a family of its own, besides OSError and RuntimeError
        raise CheckpointError(
            f"Cannot download the weights '{config.pretrained}' of {config.model} ({_reason(error)}); "
            "fetch them where there is a network and pass the file: clip.pretrained=PATH."
        ) from error


def _cached(tag: dict[str, Any]) -> Path | None:
    """The file that an earlier download from the hub left; found without asking the network."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    repository, name = os.path.split(tag.get("hf_hub", ""))
    if not repository or not Path(HF_HUB_CACHE).is_dir():
        return None
    names = [f"{Path(name).stem}.safetensors", name] if name else [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]
    found = (try_to_load_from_cache(repository, candidate) for candidate in names)
    return next((Path(path) for path in found if isinstance(path, str)), None)


def _has_network() -> bool:
    """Whether the hub's name resolves: asked first, because its client retries for most of a minute without one."""
    if urllib.request.getproxies():
        return True
    from huggingface_hub.constants import ENDPOINT

    try:
        socket.getaddrinfo(urlsplit(ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:120] if lines else type(error).__name__


def _not_found(config: ClipConfig) -> str:
    from open_clip import pretrained

    tags = pretrained.list_pretrained_tags_by_model(config.model)
    near = difflib.get_close_matches(config.pretrained, tags, n=1)
    if near:
        return f"Unknown weights '{config.pretrained}' for {config.model}; did you mean '{near[0]}'?"
    known = f"one of {', '.join(tags)}" if tags else "no tag (open_clip has none for it)"
    return (
        f"'{config.pretrained}' is neither a weight file nor weights that open_clip knows for {config.model}: "
        f"expected {known}, or the path of a file."
    )


def _tokenizer(model: str, text: dict[str, Any], arch: TextArchitecture) -> Callable[[list[str]], Tensor]:
    """The tokenizer that belongs to a model config: words where a ``vocabulary.json`` lies beside the file."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    vocabulary = Path(model).with_name("vocabulary.json")
    if model.endswith(".json") and vocabulary.is_file():
        from infoclip.clip.builtin import WordTokenizer

        try:
            return WordTokenizer(json.loads(vocabulary.read_text(encoding="utf-8")), arch.context_length)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{vocabulary} is not a vocabulary: {_reason(error)}.") from error
    options = dict(text.get("tokenizer_kwargs") or {})
    name = text.get("hf_tokenizer_name")
    if not name:
        return SimpleTokenizer(context_length=arch.context_length, **options)
    try:
        mode = text.get("tokenizer_mode")
        return HFTokenizer(name, context_length=arch.context_length, tokenizer_mode=mode, **options)
    except Exception as error:
        raise CheckpointError(
            f"Cannot load the tokenizer '{name}' that this CLIP needs ({type(error).__name__}); "
            "it comes from the Hugging Face hub, so fetch it once where there is a network."
        ) from error
