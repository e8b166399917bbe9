"""CLIP with dense image embeddings: one joint embedding for each patch, at any resolution (CAT-Seg, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infoclip.clip.architecture import Architecture, architecture_of
from infoclip.clip.layers import LayerNorm, Transformer
from infoclip.clip.templates import TEMPLATES
from infoclip.clip.text import OPENAI_MEAN, OPENAI_STD, TextCLIP, projections
from infoclip.errors import ConfigError
from infoclip.model.memory import region

if TYPE_CHECKING:
    import open_clip

__all__ = ["DenseCLIP", "DenseMode", "ImageFeatures", "VisionTower"]

DenseMode = Literal["value-cls", "value", "attention"]
TunePolicy = Literal["attention", "full", "frozen", "trunk"]


class ImageFeatures(NamedTuple):
    """What :meth:`DenseCLIP.encode_image` gives."""

    dense: Tensor  # [B, d, h, w], the joint embedding of each patch, not normalised
    guidance: tuple[Tensor, ...]  # each [B, width, h, w], block outputs without the class token


class VisionTower(nn.Module):
    """The vision transformer; tokens are batch first, the class token is at index 0."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        width = arch.vision.width
        self.grid = arch.grid
        self.patch_size = arch.patch_size
        self.pool = arch.pool
        self.norm_after_pool = arch.norm_after_pool
        self.recompute: str | None = None
        """What dense encoding keeps of a block for the backward pass (:func:`infoclip.model.memory.region`): None for
        everything."""
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(arch.grid[0] * arch.grid[1] + 1, width))
        self.proj = nn.Parameter(torch.empty(width, arch.embed_dim))
        self.conv1 = nn.Conv2d(3, width, arch.patch_size, stride=arch.patch_size, bias=False)
        self.ln_pre = LayerNorm(width, eps=arch.vision.eps) if arch.pre_norm else nn.Identity()
        self.transformer = Transformer(arch.vision)
        self.ln_post = LayerNorm(width, eps=arch.vision.eps)

    def positions(self, height: int, width: int) -> Tensor:  # -> [1 + height * width, C]
        """The position embedding for a grid: the trained one, or resized bicubically (class token's row kept).

        The scale is that of the two sizes (``align_corners=False``, no antialiasing), as published; rows and columns
        are scaled each by their own factor, so that grids that are not square are right too.
        """
        if (height, width) == self.grid:
            return self.positional_embedding
        patches = self.positional_embedding[1:].unflatten(0, self.grid).permute(2, 0, 1)[None]  # [1, C, gh, gw]
        patches = F.interpolate(patches, size=(height, width), mode="bicubic", align_corners=False)
        return torch.cat([self.positional_embedding[:1], patches[0].flatten(1).T])

    def embed(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:  # [B, 3, H, W]
        """Patches with class token and positions, [B, 1 + h * w, C], and the grid (h, w).

        Raises:
            ValueError: an image that is not [B, 3, H, W] with sides that are multiples of the patch.
        """
        patch = self.patch_size
        if image.ndim != 4 or image.shape[1] != 3 or image.shape[2] % patch or image.shape[3] % patch:
            raise ValueError(
                f"expected an image [B, 3, H, W] with H and W multiples of the patch ({patch}), "
                f"given {list(image.shape)}"
            )
        grid = (image.shape[2] // patch, image.shape[3] // patch)
        if 0 in grid:
            raise ValueError(f"expected an image of at least one patch ({patch} x {patch}), given {list(image.shape)}")
        x = self.conv1(image).flatten(2).transpose(1, 2)  # [B, n, C]
        positions = self.positions(*grid)
        # Under autocast the sum is float32 again: the residual stream keeps full precision.
        token = (self.class_embedding + positions[0]).expand(x.shape[0], 1, -1)
        x = torch.cat([token, (x + positions[1:]).to(token.dtype)], dim=1)
        return self.ln_pre(x), grid

    def dense_tokens(self, image: Tensor, mode: DenseMode, keep: Sequence[int] = ()) -> tuple[Tensor, list[Tensor]]:
        """Every token in the joint space, and the outputs of some blocks.

        Args:
            image: normalised, [B, 3, H, W].
            mode: how the last block runs, see :class:`DenseCLIP`.
            keep: 0-based blocks whose outputs are wanted.

        Returns:
            Tokens [B, 1 + h * w, d], class token at index 0, not normalised, and one [B, 1 + h * w, C] for each entry
            of ``keep``.
        """
        x, _ = self.embed(image)
        blocks = self.transformer.resblocks
        outputs: dict[int, Tensor] = {}
        for i, block in enumerate(blocks):
            run: Callable[..., Tensor] = block
            if i == len(blocks) - 1 and mode != "attention":
                value_path: Any = block.forward_value
                run = partial(value_path, class_residual=mode == "value-cls")
            learns = x.requires_grad or any(p.requires_grad for p in block.parameters())
            x = region(self.recompute, run, x) if self.recompute and learns else run(x)
            if i in keep:
                outputs[i] = x
        return self.ln_post(x) @ self.proj, [outputs[i] for i in keep]

    def forward(self, image: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, d]
        """The image's own embedding, from the class token or the mean of the patches, not normalised."""
        x, _ = self.embed(image)
        x = self.transformer(x)
        if not self.norm_after_pool:
            x = self.ln_post(x)
        x = x[:, 0] if self.pool == "tok" else x[:, 1:].mean(dim=1)
        if self.norm_after_pool:
            x = self.ln_post(x)
        return x @ self.proj


class DenseCLIP(TextCLIP):
    """A CLIP whose image encoder also gives one joint embedding for each patch.

    Dense mode changes the last visual block (CAT-Seg, section 3.1; the idea of MaskCLIP):

    - ``value-cls`` (published): attention gives way to the value path, ``out_proj(v)``, and the residual that is added
      is the class token's alone, broadcast to all tokens. q and k of this block get a gradient of exactly zero.
    - ``value``: the value path with each token's own residual.
    - ``attention``: the block as it was trained.

    ``ln_post`` and ``proj`` then act on every token. Parameter names are those that CAT-Seg's checkpoints have below
    ``sem_seg_head.predictor.clip_model.``.

    Args:
        arch: sizes and choices of both towers.
        image_size: side in pixels at which images enter the encoder; 0 takes the one the positions were trained at.
        dense: see above.
        guidance_layers: 0-based blocks whose outputs guide the decoder; empty takes ``depth // 3 - 1`` and
            ``2 * depth // 3 - 1``, which are the published 3, 7 (of 12) and 7, 15 (of 24).
        tokenizer: open_clip's tokenizer, or any callable from texts to ids [M, context_length].
        templates: the prompt templates that :meth:`text_features` uses by default.
        mean, std: of the images that the weights were trained on, for pixels in 0..1.

    Raises:
        ConfigError: an image size that is not a multiple of the patch, or guidance layers that do not exist.
    """

    def __init__(
        self,
        arch: Architecture,
        *,
        image_size: int = 0,
        dense: DenseMode = "value-cls",
        guidance_layers: Sequence[int] = (),
        tokenizer: Callable[[list[str]], Tensor] | None = None,
        templates: Sequence[str] = TEMPLATES["catseg"],
        mean: Sequence[float] = OPENAI_MEAN,
        std: Sequence[float] = OPENAI_STD,
    ) -> None:
        super().__init__(arch, tokenizer, templates, mean, std)
        self.arch: Architecture = arch
        self.vision_width = arch.vision.width
        self.patch_size = arch.patch_size
        self.image_size = image_size or arch.grid[0] * arch.patch_size
        self.dense: DenseMode = dense
        self.guidance_layers = _guidance_layers(arch.vision.layers, tuple(guidance_layers), dense)
        if self.image_size % arch.patch_size:
            raise ConfigError(
                f"clip.image_size is {self.image_size}; expected a multiple of the patch size {arch.patch_size}."
            )
        if dense not in ("value-cls", "value", "attention"):
            raise ConfigError(f"clip.dense is {dense!r}; expected value-cls, value or attention.")

        self.visual: VisionTower = VisionTower(arch)
        self.add_text_tower()

    # Construction and weights

    @classmethod
    def from_open_clip(cls, model: open_clip.CLIP, **options: Any) -> DenseCLIP:
        """A DenseCLIP with a copy of an open_clip model's weights; ``options`` as the constructor's.

        Raises:
            ConfigError: a model that is not two plain transformers.
        """
        with torch.device("meta"):
            clip = cls(architecture_of(model), **options)
        clip.load_stock_state_dict(model.state_dict(), source="the open_clip model")
        return clip

    def reset_parameters(self) -> None:
        """Random weights with the distributions that open_clip starts a training from."""
        width = self.vision_width
        for name in ("class_embedding", "positional_embedding", "proj"):
            nn.init.normal_(getattr(self.visual, name), std=width**-0.5)
        self.visual.conv1.reset_parameters()
        for block in self.visual.transformer.resblocks:
            for weight in projections(block):
                # Xavier for the joint [3C, C] matrix.
                bound = math.sqrt(6 / (4 * width))
                nn.init.uniform_(weight, -bound, bound)
            for linear in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):  # type: ignore[union-attr]
                linear.reset_parameters()  # type: ignore[union-attr,operator]
            nn.init.zeros_(block.attn.in_proj_bias)  # type: ignore[union-attr,arg-type]
            nn.init.zeros_(block.attn.out_proj.bias)  # type: ignore[union-attr,arg-type]
        for module in self.visual.modules():
            if isinstance(module, LayerNorm):
                module.reset_parameters()
        self.reset_text_parameters()

    def parameter_policy(self, tune: TunePolicy = "attention", tune_positions: bool = False) -> list[str]:
        """Choose what learns, by setting ``requires_grad`` of every parameter.

        ``attention`` (published): the q and v projection weights of both towers, and with ``tune_positions`` the visual
        position embedding (the published code means to train it, but does not). ``full``: all but the logit scale and
        bias, which no dense output depends on. ``frozen``: nothing.

        Returns:
            The names of the parameters that learn.

        Raises:
            ConfigError: another policy.
        """
        if tune not in ("attention", "full", "frozen"):
            raise ConfigError(f"clip.tune is {tune!r}; expected attention, full or frozen.")
        for name, parameter in self.named_parameters():
            if tune == "attention":
                learns = name.endswith(("attn.q_proj_weight", "attn.v_proj_weight"))
                learns |= tune_positions and name == "visual.positional_embedding"
            else:
                learns = tune == "full" and name not in ("logit_scale", "logit_bias")
            parameter.requires_grad_(learns)
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    # Images

    def encode_image(self, image: Tensor) -> ImageFeatures:  # [B, 3, H, W]
        """Dense embeddings and guidance of normalised images, at any resolution.

        Args:
            image: [B, 3, H, W], normalised with ``mean`` and ``std``; H and W are multiples of the patch.

        Returns:
            ``dense`` [B, d, h, w], not normalised, and ``guidance``, one [B, width, h, w] for each guidance layer.

        Raises:
            ValueError: another shape.
        """
        tokens, hidden = self.visual.dense_tokens(image, self.dense, self.guidance_layers)
        grid = (image.shape[2] // self.patch_size, image.shape[3] // self.patch_size)
        return ImageFeatures(_as_map(tokens, grid), tuple(_as_map(x, grid) for x in hidden))

    def encode_global(self, image: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, d]
        """CLIP's own embedding of whole images (the block as trained, pooled as trained), not normalised.

        Raises:
            ValueError: another shape than [B, 3, H, W] with sides that are multiples of the patch.
        """
        return self.visual(image)


def _guidance_layers(depth: int, layers: tuple[int, ...], dense: str) -> tuple[int, ...]:
    given = layers or (max(depth // 3 - 1, 0), max(2 * depth // 3 - 1, 0))
    # In the value modes the last block's output is not a hidden state of the trained CLIP.
    top = depth if dense == "attention" else depth - 1
    if any(i < 0 or i >= top for i in given):
        raise ConfigError(
            f"clip.guidance_layers is {given}; expected blocks from 0 to {top - 1} of this {depth}-block encoder."
        )
    return tuple(given)


def _as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:  # [B, 1 + n, C] -> [B, C, h, w]
    return tokens[:, 1:].transpose(1, 2).unflatten(2, grid)
