"""What a CLIP looks like: the sizes and choices that decide its parameters and its arithmetic.

The description is read from an open_clip model built on the meta device (no memory, no initialisation), so that
open_clip itself stays the authority on what a model config means.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import nn

from infoclip.clip.builtin import builtin_file
from infoclip.errors import ConfigError

if TYPE_CHECKING:
    import open_clip

__all__ = [
    "Architecture",
    "ConvNeXtArchitecture",
    "TextArchitecture",
    "Tower",
    "architecture_of",
    "build_convnext",
    "convnext_architecture_of",
    "model_config",
    "read_architecture",
    "read_convnext",
]

LOCAL_TRUNK = "local-dir:"
"""How timm names an architecture of one's own: the folder of its ``config.json``, here relative to the model config."""

Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]


@dataclass(frozen=True)
class Tower:
    """One transformer: the image encoder's or the text encoder's."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: Activation = "quick_gelu"
    eps: float = 1e-5
    layer_scale: bool = False


class TextArchitecture(Protocol):
    """What every architecture says of the text half: a plain transformer, and the joint space."""

    @property
    def embed_dim(self) -> int: ...
    @property
    def text(self) -> Tower: ...
    @property
    def context_length(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def causal(self) -> bool: ...
    @property
    def text_pool(self) -> Literal["argmax", "eos", "first", "last"]: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def text_projection(self) -> Literal["matrix", "linear", "linear_bias", "none"]: ...
    @property
    def logit_scale_shape(self) -> tuple[int, ...]: ...
    @property
    def logit_bias(self) -> bool: ...
    @property
    def quick_gelu(self) -> bool: ...


@dataclass(frozen=True)
class Architecture:
    """A CLIP with a plain vision transformer and a plain text transformer."""

    embed_dim: int
    vision: Tower
    text: Tower
    patch_size: int
    grid: tuple[int, int]
    """Rows and columns of the position embedding as trained."""
    context_length: int
    vocab_size: int
    pool: Literal["tok", "avg"] = "tok"
    """Which tokens the image's own embedding is read from: the class token, or the mean of the patches."""
    norm_after_pool: bool = False
    pre_norm: bool = True
    causal: bool = True
    text_pool: Literal["argmax", "eos", "first", "last"] = "argmax"
    eos_id: int = 2
    text_projection: Literal["matrix", "linear", "linear_bias", "none"] = "matrix"
    logit_scale_shape: tuple[int, ...] = ()
    logit_bias: bool = False

    @property
    def quick_gelu(self) -> bool:
        """Whether the towers compute QuickGELU, as the OpenAI weights need."""
        return self.vision.activation == "quick_gelu"


@dataclass(frozen=True)
class ConvNeXtArchitecture:
    """A CLIP with a ConvNeXt of timm and a plain text transformer."""

    embed_dim: int
    vision_cfg: str
    """open_clip's ``vision_cfg``, as JSON: timm itself builds the encoder from it."""
    widths: tuple[int, ...]
    """Channels of the four stages."""
    image_size: int
    """Side in pixels that the weights were trained at."""
    text: Tower
    context_length: int
    vocab_size: int
    causal: bool = True
    text_pool: Literal["argmax", "eos", "first", "last"] = "argmax"
    eos_id: int = 2
    text_projection: Literal["matrix", "linear", "linear_bias", "none"] = "matrix"
    logit_scale_shape: tuple[int, ...] = ()
    logit_bias: bool = False

    @property
    def quick_gelu(self) -> bool:
        """Whether the text tower computes QuickGELU; timm's encoders compute GELU."""
        return self.text.activation == "quick_gelu"


def model_config(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the open_clip model config of an architecture name or of a JSON file.

    Args:
        name: a name of ``open_clip.list_models()``, the path of a JSON file in the layout of open_clip's
            ``model_configs`` (also the hub's ``open_clip_config.json``, with ``model_cfg`` and ``preprocess_cfg``), or
            the ``builtin:NAME`` of a shipped CLIP.

    Returns:
        The model config, and the preprocessing config (``mean``, ``std``; empty where none is given).

    Raises:
        ConfigError: an unknown name (with the nearest match), or a file that is no model config.
    """
    name = builtin_file(name, "config.json")
    if name.endswith(".json"):
        return _read_json(Path(name))
    import open_clip

    config = open_clip.get_model_config(name) if ":" not in name else None
    if config is None:
        near = difflib.get_close_matches(name, open_clip.list_models(), n=1, cutoff=0.4)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        raise ConfigError(f"Unknown CLIP architecture '{name}'{hint}")
    return config, {}


def _read_json(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read the CLIP model config {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not a CLIP model config: expected JSON, found {error}.") from error
    preprocess = data.get("preprocess_cfg", {}) if isinstance(data, dict) else {}
    config = data.get("model_cfg", data) if isinstance(data, dict) else None
    if not isinstance(config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= set(config):
        raise ConfigError(f"{path} is not a CLIP model config: expected embed_dim, vision_cfg and text_cfg.")
    trunk = config["vision_cfg"].get("timm_model_name") if isinstance(config["vision_cfg"], dict) else None
    if isinstance(trunk, str) and trunk.startswith(LOCAL_TRUNK):
        folder = path.parent / trunk.removeprefix(LOCAL_TRUNK)  # an absolute folder stays what it is
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{path} names the image encoder '{trunk}', but there is no {folder / 'config.json'}.")
        config = {
            **config,
            "vision_cfg": {**config["vision_cfg"], "timm_model_name": f"{LOCAL_TRUNK}{folder.resolve()}"},
        }
    return config, preprocess


def read_architecture(config: dict[str, Any], name: str) -> Architecture:
    """The architecture that an open_clip model config describes.

    Raises:
        ConfigError: the config asks for something else than the two plain transformers (a ResNet, a timm or Hugging
            Face tower, attention pooling, layer scale, ...), or open_clip rejects it.
    """

    if "timm_model_name" in config["vision_cfg"]:
        raise _unsupported(name, "a timm image encoder")
    return architecture_of(_on_meta(config, name), name)


def read_convnext(config: dict[str, Any], name: str) -> ConvNeXtArchitecture:
    """The architecture that an open_clip model config with a ConvNeXt of timm describes.

    Raises:
        ConfigError: another image encoder, or a text tower that is no plain transformer, or open_clip rejects it.
    """
    if "timm_model_name" not in config["vision_cfg"]:
        raise _unsupported(name, "no image encoder of timm", _CONVNEXT)
    return convnext_architecture_of(_on_meta(config, name), config["vision_cfg"], name)


def _on_meta(config: dict[str, Any], name: str) -> open_clip.CLIP:
    import open_clip

    if config.get("custom_text") or "hf_model_name" in config["text_cfg"] or "multimodal_cfg" in config:
        raise _unsupported(name, "a text tower of its own kind")
    try:
        with torch.device("meta"):
            return open_clip.CLIP(**{key: value for key, value in config.items() if key != "custom_text"})
    except (TypeError, ValueError, AssertionError, KeyError, RuntimeError, ZeroDivisionError) as error:
        raise ConfigError(f"open_clip cannot build the CLIP model config '{name}': {error}.") from error


def build_convnext(vision_cfg: dict[str, Any], embed_dim: int) -> Any:
    """open_clip's timm adapter (``trunk`` and ``head``) for a ``vision_cfg``, with random weights."""
    from open_clip.model import CLIPVisionCfg
    from open_clip.timm_model import TimmModel

    cfg = CLIPVisionCfg(**vision_cfg)
    return TimmModel(
        cfg.timm_model_name,
        embed_dim,
        image_size=cfg.image_size,
        pool=cfg.timm_pool,
        proj=cfg.timm_proj,
        proj_bias=cfg.timm_proj_bias,
        drop=cfg.timm_drop,
        drop_path=cfg.timm_drop_path,
        pretrained=False,  # the weights are CLIP's own
    )


def convnext_architecture_of(
    model: open_clip.CLIP, vision_cfg: dict[str, Any], name: str = "the model"
) -> ConvNeXtArchitecture:
    """The architecture of an open_clip model whose image encoder was built from ``vision_cfg``.

    Raises:
        ConfigError: an image encoder that is no ConvNeXt at strides 4, 8, 16 and 32 (or less, dilated) with a linear or
            MLP head.
    """
    from open_clip.timm_model import TimmModel
    from timm.models.convnext import ConvNeXt

    visual: Any = model.visual
    if not isinstance(visual, TimmModel) or not isinstance(visual.trunk, ConvNeXt):
        kind = type(getattr(visual, "trunk", visual)).__name__
        raise _unsupported(name, f"a {kind} image encoder", _CONVNEXT)
    trunk: Any = visual.trunk
    strides = [info["reduction"] for info in trunk.feature_info]
    if strides[0] != 4 or sorted(strides) != strides or strides[-1] > 32:
        raise _unsupported(name, f"maps at strides {strides}", _CONVNEXT)
    norm = getattr(trunk.head, "norm", None)
    plain = isinstance(trunk.head.fc, nn.Identity) and not getattr(trunk.head, "hidden_size", None)
    if not plain or not isinstance(norm, (nn.LayerNorm, type(None))) or not len(visual.head):
        raise _unsupported(name, "a head of its own kind", _CONVNEXT)
    return ConvNeXtArchitecture(
        widths=tuple(int(info["num_chs"]) for info in trunk.feature_info),
        vision_cfg=json.dumps(vision_cfg, sort_keys=True),
        image_size=int(visual.image_size[0]),
        embed_dim=[int(m.out_features) for m in visual.head.modules() if isinstance(m, nn.Linear)][-1],
        **_text_half(model, name),
    )


def architecture_of(model: open_clip.CLIP, name: str = "the model") -> Architecture:
    """The architecture of an open_clip model.

    Raises:
        ConfigError: a model that is not two plain transformers.
    """
    from open_clip import CLIP
    from open_clip.transformer import VisionTransformer

    if not isinstance(model, CLIP):
        raise _unsupported(name, f"the class {type(model).__name__}")
    visual = model.visual
    if not isinstance(visual, VisionTransformer):
        raise _unsupported(name, f"a {type(visual).__name__} image encoder")
    if visual.attn_pool is not None:
        raise _unsupported(name, "attention pooling")
    if visual.pool_type not in ("tok", "avg"):
        raise _unsupported(name, f"the image pooling '{visual.pool_type}'")
    if visual.patch_size[0] != visual.patch_size[1]:
        raise _unsupported(name, "patches that are not square")
    return Architecture(
        embed_dim=int(visual.output_dim),
        vision=_tower(visual.transformer, name),
        patch_size=int(visual.patch_size[0]),
        grid=(int(visual.grid_size[0]), int(visual.grid_size[1])),
        pool=visual.pool_type,
        norm_after_pool=bool(visual.final_ln_after_pool),
        pre_norm=not isinstance(visual.ln_pre, nn.Identity),
        **_text_half(model, name),
    )


def _text_half(model: open_clip.CLIP, name: str) -> dict[str, Any]:
    """The fields of :class:`TextArchitecture`, but for the joint width."""
    if model.text_pool_type not in ("argmax", "eos", "first", "last"):
        raise _unsupported(name, f"the text pooling '{model.text_pool_type}'")
    projection = "matrix"
    if model.text_projection is None:
        projection = "none"
    elif isinstance(model.text_projection, nn.Linear):
        projection = "linear" if model.text_projection.bias is None else "linear_bias"
    return {
        "text": _tower(model.transformer, name),
        "context_length": int(model.context_length),
        "vocab_size": int(model.vocab_size),
        "causal": model.attn_mask is not None,
        "text_pool": model.text_pool_type,
        "eos_id": int(model.text_eos_id),
        "text_projection": projection,
        "logit_scale_shape": tuple(model.logit_scale.shape),
        "logit_bias": model.logit_bias is not None,
    }


def _tower(transformer: Any, name: str) -> Tower:
    from open_clip.transformer import LayerScale, QuickGELU, ResidualAttentionBlock

    block = transformer.resblocks[0]
    if not isinstance(block, ResidualAttentionBlock):
        raise _unsupported(name, "other blocks than the plain residual attention block")
    gelu = block.mlp.gelu
    activation: Activation
    if isinstance(gelu, QuickGELU):
        activation = "quick_gelu"
    elif isinstance(gelu, nn.GELU):
        activation = "gelu_tanh" if gelu.approximate == "tanh" else "gelu"
    else:
        raise _unsupported(name, f"the activation {type(gelu).__name__}")
    return Tower(
        width=int(transformer.width),
        layers=len(transformer.resblocks),
        heads=int(block.attn.num_heads),
        mlp_width=int(block.mlp.c_fc.out_features),
        activation=activation,
        eps=float(block.ln_1.eps),
        layer_scale=isinstance(block.ls_1, LayerScale),
    )


_VIT = "a plain ViT such as ViT-B-16-quickgelu"
_CONVNEXT = "a ConvNeXt such as convnext_base_w_320"


def _unsupported(name: str, what: str, expected: str = _VIT) -> ConfigError:
    return ConfigError(f"The CLIP architecture '{name}' has {what}; expected {expected}.")
