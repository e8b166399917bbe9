"""CLIP with dense image embeddings: one joint embedding for each patch, at any resolution (CAT-Seg, section 3.1)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infoclip.clip.architecture import Architecture, architecture_of
from infoclip.clip.layers import LayerNorm, Transformer
from infoclip.clip.templates import TEMPLATES
from infoclip.clip.weights import join_projections, split_projections, write_safetensors
from infoclip.errors import CheckpointError, ConfigError, DataError, StorageError
from infoclip.model.memory import region

if TYPE_CHECKING:
    import open_clip

__all__ = ["DenseCLIP", "DenseMode", "ImageFeatures", "VisionTower", "first_synonym"]

DenseMode = Literal["value-cls", "value", "attention"]
TunePolicy = Literal["attention", "full", "frozen"]

# The statistics of the OpenAI training images, used by nearly every CLIP.
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

# Prompts encoded at once where no gradient is kept: bounds the memory for hundreds of classes x 80 templates.
_PROMPT_CHUNK = 512


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


class DenseCLIP(nn.Module):
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
        super().__init__()
        self.arch = arch
        self.embed_dim = arch.embed_dim
        self.vision_width = arch.vision.width
        self.patch_size = arch.patch_size
        self.context_length = arch.context_length
        self.image_size = image_size or arch.grid[0] * arch.patch_size
        self.dense: DenseMode = dense
        self.guidance_layers = _guidance_layers(arch.vision.layers, tuple(guidance_layers), dense)
        self.tokenizer = tokenizer
        self.templates = tuple(templates)
        self.mean: tuple[float, ...] = tuple(mean)
        self.std: tuple[float, ...] = tuple(std)
        self._tokens: dict[tuple[int, tuple[str, ...], tuple[str, ...]], Tensor] = {}
        if self.image_size % arch.patch_size:
            raise ConfigError(
                f"clip.image_size is {self.image_size}; expected a multiple of the patch size {arch.patch_size}."
            )
        if dense not in ("value-cls", "value", "attention"):
            raise ConfigError(f"clip.dense is {dense!r}; expected value-cls, value or attention.")

        width = arch.text.width
        self.visual = VisionTower(arch)
        self.transformer = Transformer(arch.text)
        self.positional_embedding = nn.Parameter(torch.empty(arch.context_length, width))
        self.token_embedding = nn.Embedding(arch.vocab_size, width)
        self.ln_final = LayerNorm(width, eps=arch.text.eps)
        self.text_projection: nn.Parameter | nn.Linear | None
        if arch.text_projection == "matrix":
            self.text_projection = nn.Parameter(torch.empty(width, arch.embed_dim))
        elif arch.text_projection == "none":
            self.text_projection = None
        else:
            self.text_projection = nn.Linear(width, arch.embed_dim, bias=arch.text_projection == "linear_bias")
        self.logit_scale = nn.Parameter(torch.empty(arch.logit_scale_shape))
        self.logit_bias = nn.Parameter(torch.empty(arch.logit_scale_shape)) if arch.logit_bias else None

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
            for weight in _projections(block):
                # Xavier for the joint [3C, C] matrix.
                bound = math.sqrt(6 / (4 * width))
                nn.init.uniform_(weight, -bound, bound)
            for linear in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):  # type: ignore[union-attr]
                linear.reset_parameters()  # type: ignore[union-attr,operator]

        text, layers = self.arch.text.width, self.arch.text.layers
        residual_std = text**-0.5 * (2 * layers) ** -0.5
        for block in self.transformer.resblocks:
            for weight in _projections(block):
                nn.init.normal_(weight, std=text**-0.5)
            for linear, std in (
                (block.attn.out_proj, residual_std),  # type: ignore[union-attr]
                (block.mlp.c_fc, (2 * text) ** -0.5),  # type: ignore[union-attr]
                (block.mlp.c_proj, residual_std),  # type: ignore[union-attr]
            ):
                linear.reset_parameters()  # type: ignore[union-attr,operator]
                nn.init.normal_(linear.weight, std=std)  # type: ignore[union-attr,arg-type]
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        if isinstance(self.text_projection, nn.Linear):
            self.text_projection.reset_parameters()
            nn.init.normal_(self.text_projection.weight, std=text**-0.5)
        elif self.text_projection is not None:
            nn.init.normal_(self.text_projection, std=text**-0.5)
        for block in (*self.visual.transformer.resblocks, *self.transformer.resblocks):
            nn.init.zeros_(block.attn.in_proj_bias)
            nn.init.zeros_(block.attn.out_proj.bias)
        for module in self.modules():
            if isinstance(module, LayerNorm):
                module.reset_parameters()
        nn.init.constant_(self.logit_scale, math.log(1 / 0.07))
        if self.logit_bias is not None:
            nn.init.zeros_(self.logit_bias)

    def stock_state_dict(self) -> dict[str, Tensor]:
        """The weights in open_clip's layout: ``load_state_dict`` of the open_clip model takes them as they are."""
        return join_projections({key: value.detach() for key, value in self.state_dict().items()})

    def load_stock_state_dict(self, state: Mapping[str, Tensor], source: str = "the state dict") -> None:
        """Copy weights in open_clip's layout (or CAT-Seg's, with separate q, k and v) into this model, as float32.

        Args:
            state: every parameter of the architecture and nothing else.
            source: the weights' name for error messages.

        Raises:
            CheckpointError: keys that are missing or unknown, or shapes of another architecture; nothing is changed.
        """
        given = split_projections(state)
        own = self.state_dict()
        if "logit_scale" in given and given["logit_scale"].numel() == own["logit_scale"].numel():
            given["logit_scale"] = given["logit_scale"].reshape(own["logit_scale"].shape)
        missing = [key for key in own if key not in given]
        unknown = [key for key in given if key not in own]
        if missing or unknown:
            parts = [f"without {_some(missing)}"] * bool(missing) + [f"with the unknown {_some(unknown)}"] * bool(
                unknown
            )
            raise CheckpointError(
                f"{source} does not hold the weights of this CLIP architecture: it comes {' and '.join(parts)}; "
                "choose the clip.model that the weights belong to."
            )
        for key, value in own.items():
            if value.shape != given[key].shape:
                raise CheckpointError(
                    f"{source} is of another architecture: {key} is {list(given[key].shape)} there and "
                    f"{list(value.shape)} here; choose the clip.model that the weights belong to."
                )
        new = {key: given[key].detach().to(torch.float32, copy=True).contiguous() for key in own}
        self.load_state_dict(new, assign=any(value.is_meta for value in own.values()))
        self._tokens.clear()

    def save_stock(self, path: str | Path) -> None:
        """Write :meth:`stock_state_dict` as safetensors, at once or not at all, with the activation in the metadata.

        Raises:
            StorageError: the file cannot be written.
        """
        metadata = {"format": "pt", "quick_gelu": str(self.arch.quick_gelu).lower()}
        try:
            write_safetensors(self.stock_state_dict(), Path(path), metadata)
        except OSError as error:
            raise StorageError(f"Cannot write the CLIP weights to {path}: {error.strerror or error}.") from error

    def frozen_copy(self) -> DenseCLIP:
        """A copy that never learns: the teacher. It is in evaluation mode and needs no gradient.

        Parameters that learn are copied; those that are frozen when this is called are shared, so that choose what
        learns (:meth:`parameter_policy`) first.
        """
        memo: dict[int, Any] = {id(self.tokenizer): self.tokenizer}  # stateless and large: shared
        # What never learns here either is the same in both for good: CLIP's weights are needed once.
        memo |= {id(p): p for p in self.parameters() if not p.requires_grad}
        other = copy.deepcopy(self, memo)
        return other.requires_grad_(False).eval()

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

    # Text

    def encode_text(self, tokens: Tensor) -> Tensor:  # [M, L] -> [M, d]
        """Embeddings of tokenised texts, not normalised.

        The context is cut after the last token that is read: attention is causal and only the end token's output
        counts, so that what follows the longest prompt cannot matter. Token ids that are still on the CPU are cut
        there, before they travel to the device, which spares a synchronisation.

        Args:
            tokens: int64 ids, [M, L], L at most ``context_length``.

        Raises:
            ValueError: another shape, or more tokens than the context holds.
        """
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ValueError(f"expected token ids [M, L], given {list(tokens.shape)} of {tokens.dtype}")
        if tokens.shape[1] > self.context_length:
            raise ValueError(f"expected at most {self.context_length} tokens in a text, given {tokens.shape[1]}")
        ends = self._read_positions(tokens)  # [M]
        if self._cuts_context and tokens.shape[0] and not tokens.is_meta:
            tokens = tokens[:, : int(ends.max()) + 1]
        device = self.positional_embedding.device
        tokens, ends = tokens.to(device), ends.to(device)
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]  # [M, L, C]
        x = self.transformer(x, causal=self.arch.causal)
        # Normalising after the choice of the token gives the same values as before it, for one token in place of L.
        x = self.ln_final(x[torch.arange(x.shape[0], device=device), ends])
        if isinstance(self.text_projection, nn.Linear):
            return self.text_projection(x)
        return x if self.text_projection is None else x @ self.text_projection

    @property
    def _cuts_context(self) -> bool:
        return self.arch.causal and self.arch.text_pool in ("argmax", "eos", "first")

    def _read_positions(self, tokens: Tensor) -> Tensor:  # [M, L] -> [M]
        """Where each text's embedding is read."""
        pool = self.arch.text_pool
        if pool == "argmax":  # the end token has the largest id
            return tokens.argmax(dim=-1)
        if pool == "eos":
            return (tokens == self.arch.eos_id).int().argmax(dim=-1)
        return torch.full_like(tokens[:, 0], 0 if pool == "first" else tokens.shape[1] - 1)

    def tokenize(self, texts: list[str]) -> Tensor:  # -> [M, context_length]
        """Token ids of texts, int64 on the CPU, with start and end token, padded with 0.

        Unlike open_clip's tokenizer, which cuts, and like the published one, a text longer than the context is refused.

        Raises:
            DataError: a text that is longer than the context, or that needs tokens outside this model's vocabulary.
            TypeError: a single string in place of a list.
        """
        if isinstance(texts, str):
            raise TypeError("expected a list of texts, given a single string")
        if self.tokenizer is None:
            raise ConfigError("This CLIP has no tokenizer; give DenseCLIP one to encode class names.")
        if not texts:
            return torch.zeros(0, self.context_length, dtype=torch.int64)
        rows = self._token_rows(texts)
        lengths = [self._token_count(text) for text in texts] if rows is None else [len(row) for row in rows]
        for text, length in zip(texts, lengths, strict=True):
            if length > self.context_length:
                raise DataError(
                    f"The text '{_shorten(text)}' has {length} tokens, but this CLIP's context holds "
                    f"{self.context_length}; shorten the class name or the prompt template."
                )
        if rows is None:
            try:
                tokens = self.tokenizer(list(texts)).long()
            except ValueError as error:
                raise DataError(f"Cannot tokenise the texts: {error}.") from error
        else:
            tokens = torch.zeros(len(rows), self.context_length, dtype=torch.int64)
            for i, row in enumerate(rows):
                tokens[i, : len(row)] = torch.tensor(row)
        if int(tokens.max()) >= self.arch.vocab_size:
            raise DataError(
                f"The tokenizer gives id {int(tokens.max())}, but this CLIP's vocabulary has {self.arch.vocab_size} "
                "entries; the architecture needs a tokenizer of its own."
            )
        return tokens

    def _token_rows(self, texts: Sequence[str]) -> list[list[int]] | None:
        """Ids without padding from open_clip's own tokenizer, each text read once; None for other tokenizers."""
        from open_clip.tokenizer import SimpleTokenizer

        tokenizer = self.tokenizer
        if not isinstance(tokenizer, SimpleTokenizer) or tokenizer.reduction_fn is not None:
            return None
        return [[tokenizer.sot_token_id, *tokenizer.encode(text), tokenizer.eot_token_id] for text in texts]

    def _token_count(self, text: str) -> int:
        """Tokens of a text with its start and end token; 0 where the tokenizer cannot tell (it must then refuse)."""
        inner = getattr(self.tokenizer, "tokenizer", None)  # Hugging Face tokenizers as open_clip wraps them
        if inner is not None and callable(inner):
            return len(inner(self.tokenizer.clean_fn(text)).input_ids)  # type: ignore[union-attr]
        encode = getattr(self.tokenizer, "encode", None)
        return len(encode(text)) + 2 if encode is not None else 0

    def text_features(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> Tensor:
        """Embeddings of classes in prompts, [T, P, d], each of length 1; differentiable in the text tower.

        Args:
            class_names: T names; of ``"sofa, couch"`` only the first synonym is used, as published.
            templates: P texts with ``{}``; by default the model's own.

        Raises:
            DataError: no classes, an empty name, or a name that does not fit the context.
        """
        tokens = self.prompt_tokens(class_names, templates)  # [T, P, L]
        flat = tokens.flatten(0, 1)
        chunks = flat.split(_PROMPT_CHUNK) if not torch.is_grad_enabled() else (flat,)
        features = torch.cat([self.encode_text(chunk) for chunk in chunks])
        return F.normalize(features.float() if features.dtype != torch.float64 else features, dim=-1).unflatten(
            0, tokens.shape[:2]
        )

    def text_backward(
        self,
        class_names: Sequence[str],
        gradient: Tensor,  # [T, P, d]
        templates: Sequence[str] | None = None,
        chunk: int = 16,
    ) -> None:
        """Add to the parameters' gradients what ``gradient`` of :meth:`text_features` gives them.

        The features are computed again, ``chunk`` prompts at a time, so that a pass over the class names under
        ``torch.no_grad`` before needs to keep nothing.

        Raises:
            DataError: as :meth:`text_features`.
        """
        tokens = self.prompt_tokens(class_names, templates).flatten(0, 1)
        for part, grad in zip(tokens.split(chunk), gradient.flatten(0, 1).split(chunk), strict=True):
            features = self.encode_text(part)
            features = F.normalize(features.float() if features.dtype != torch.float64 else features, dim=-1)
            torch.autograd.backward(features, grad)

    def prompt_tokens(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> Tensor:
        """Token ids [T, P, context_length] of every class in every template; kept for the last few class lists.

        Raises:
            DataError: as :meth:`text_features`.
        """
        templates = self.templates if templates is None else tuple(templates)
        if isinstance(class_names, str):
            raise TypeError("expected a list of class names, given a single string")
        key = (id(self.tokenizer), tuple(class_names), tuple(templates))
        if not key[1]:
            raise DataError("The class list is empty; name at least one class.")
        if not key[2]:
            raise DataError("The list of prompt templates is empty; give at least one text with {}.")
        if key not in self._tokens:
            rows = []
            for name in key[1]:
                synonym = first_synonym(name)
                if not synonym:
                    raise DataError(f"The class list has an empty name ({name!r}); every class needs one.")
                try:
                    rows.append(self.tokenize([template.replace("{}", synonym) for template in key[2]]))
                except DataError as error:
                    raise DataError(f"The class '{_shorten(name)}' cannot be used: {error}") from error
            while len(self._tokens) >= 4:
                self._tokens.pop(next(iter(self._tokens)))
            self._tokens[key] = torch.stack(rows)
        return self._tokens[key]

    def text_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that text embeddings depend on, by name."""
        unused = ("visual.", "logit_scale", "logit_bias")
        return {name: p for name, p in self.named_parameters() if not name.startswith(unused)}

    @property
    def text_frozen(self) -> bool:
        """Whether nothing in the text tower learns, so that text embeddings may be kept."""
        return not any(p.requires_grad for p in self.text_parameters().values())


def first_synonym(name: str) -> str:
    """The part of a class name before the first ``", "``, which alone is used in prompts."""
    return name.split(", ")[0].strip()


def _guidance_layers(depth: int, layers: tuple[int, ...], dense: str) -> tuple[int, ...]:
    given = layers or (max(depth // 3 - 1, 0), max(2 * depth // 3 - 1, 0))
    # In the value modes the last block's output is not a hidden state of the trained CLIP.
    top = depth if dense == "attention" else depth - 1
    if any(i < 0 or i >= top for i in given):
        raise ConfigError(
            f"clip.guidance_layers is {given}; expected blocks from 0 to {top - 1} of this {depth}-block encoder."
        )
    return tuple(given)


def _projections(block: nn.Module) -> tuple[Tensor, ...]:
    attn: Any = block.attn
    return attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight


def _as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:  # [B, 1 + n, C] -> [B, C, h, w]
    return tokens[:, 1:].transpose(1, 2).unflatten(2, grid)


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
