"""What every CLIP here has, whichever encoder its images take: the text tower, prompts, and reading and writing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infoclip.clip.architecture import TextArchitecture
from infoclip.clip.layers import LayerNorm, Transformer
from infoclip.clip.weights import join_projections, split_projections, write_safetensors
from infoclip.errors import CheckpointError, ConfigError, DataError, StorageError

__all__ = ["OPENAI_MEAN", "OPENAI_STD", "TextCLIP", "first_synonym", "projections"]

# The statistics of the OpenAI training images, used by nearly every CLIP.
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

# Prompts encoded at once where no gradient is kept: bounds the memory for hundreds of classes x 80 templates.
_PROMPT_CHUNK = 512
# From so many classes on, a template's prompts are encoded apart from the others', to share what they begin with.
_ALIKE = 16


class TextCLIP(nn.Module):
    """A CLIP without its image encoder, which a subclass adds as ``visual`` before it calls :meth:`add_text_tower`.

    Args:
        arch: sizes and choices.
        tokenizer: open_clip's tokenizer, or any callable from texts to ids [M, context_length].
        templates: the prompt templates that :meth:`text_features` uses by default.
        mean, std: of the images that the weights were trained on, for pixels in 0..1.
    """

    visual: nn.Module

    def __init__(
        self,
        arch: TextArchitecture,
        tokenizer: Callable[[list[str]], Tensor] | None,
        templates: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.arch = arch
        self.embed_dim = arch.embed_dim
        self.context_length = arch.context_length
        self.tokenizer = tokenizer
        self.templates = tuple(templates)
        self.mean: tuple[float, ...] = tuple(mean)
        self.std: tuple[float, ...] = tuple(std)
        self._tokens: dict[tuple[int, tuple[str, ...], tuple[str, ...]], Tensor] = {}

    def add_text_tower(self) -> None:
        """Add the text tower's parameters, and the logit scale."""
        arch = self.arch
        width = arch.text.width
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

    def reset_text_parameters(self) -> None:
        """Random weights with the distributions that open_clip starts a training from."""
        text, layers = self.arch.text.width, self.arch.text.layers
        residual_std = text**-0.5 * (2 * layers) ** -0.5
        for block in self.transformer.resblocks:
            for weight in projections(block):
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
        for block in self.transformer.resblocks:
            nn.init.zeros_(block.attn.in_proj_bias)  # type: ignore[union-attr,arg-type]
            nn.init.zeros_(block.attn.out_proj.bias)  # type: ignore[union-attr,arg-type]
        for module in (*self.transformer.modules(), self.ln_final):
            if isinstance(module, LayerNorm):
                module.reset_parameters()
        nn.init.constant_(self.logit_scale, math.log(1 / 0.07))
        if self.logit_bias is not None:
            nn.init.zeros_(self.logit_bias)

    # Weights

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

    def frozen_copy(self) -> Self:
        """A copy that never learns: the teacher. It is in evaluation mode and needs no gradient.

        Parameters that learn are copied; those that are frozen when this is called are shared, so that choose what
        learns (:meth:`parameter_policy`) first.
        """
        memo: dict[int, Any] = {id(self.tokenizer): self.tokenizer}  # stateless and large: shared
        # What never learns here either is the same in both for good: CLIP's weights are needed once.
        memo |= {id(p): p for p in self.parameters() if not p.requires_grad}
        other = copy.deepcopy(self, memo)
        return other.requires_grad_(False).eval()

    # Text

    def encode_text(self, tokens: Tensor) -> Tensor:  # [M, L] -> [M, d]
        """Embeddings of tokenised texts, not normalised.

        The context is cut after the last token that is read: attention is causal and only the end token's output
        counts, so that what follows the longest prompt cannot matter. Token ids that are still on the CPU are cut
        there, before they travel to the device, which spares a synchronisation; and tokens that all texts begin with
        (``a photo of a``) pass the blocks once for all of them, for the same reason: causal attention makes them alike.

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
        shared = 0
        if self._cuts_context and tokens.shape[0] and not tokens.is_meta:
            tokens = tokens[:, : int(ends.max()) + 1]
            if tokens.shape[0] > 1 and tokens.device.type == "cpu":
                alike = (tokens == tokens[0]).all(dim=0).int().cumprod(0).sum()
                shared = min(int(alike), int(ends.min()))  # the token that is read is a text's own
        device = self.positional_embedding.device
        tokens, ends = tokens.to(device), ends.to(device)
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]  # [M, L, C]
        if shared:
            x, ends = self.transformer.forward_prefixed(x, shared), ends - shared
        else:
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
        by_template = tokens.transpose(0, 1)  # [P, T, L]
        size = tokens[..., 0].numel() if torch.is_grad_enabled() else _PROMPT_CHUNK
        features = torch.cat([_unit(self.encode_text(part)) for part in self._parts(by_template, size)])
        return features.unflatten(0, by_template.shape[:2]).transpose(0, 1)

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
        tokens = self.prompt_tokens(class_names, templates).transpose(0, 1)  # [P, T, L]
        parts = zip(self._parts(tokens, chunk), self._parts(gradient.transpose(0, 1), chunk), strict=True)
        for part, grad in parts:
            torch.autograd.backward(_unit(self.encode_text(part)), grad)

    def prompt_length(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> int:
        """How many tokens :meth:`encode_text` reads of the longest prompt.

        Raises:
            DataError: as :meth:`text_features`.
        """
        tokens = self.prompt_tokens(class_names, templates).flatten(0, 1)
        return int(self._read_positions(tokens).max()) + 1 if self._cuts_context else tokens.shape[1]

    @staticmethod
    def _parts(x: Tensor, size: int) -> list[Tensor]:  # [P, T, c] -> each [at most size, c]
        """In the order of templates, one template's texts at a time where they are many: they begin alike."""
        groups = x.unbind(0) if x.shape[1] >= _ALIKE else (x.flatten(0, 1),)
        return [part for group in groups for part in group.split(size)]

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


def projections(block: nn.Module) -> tuple[Tensor, ...]:
    """The q, k and v weights of a block."""
    attn: Any = block.attn
    return attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _unit(features: Tensor) -> Tensor:  # [M, d] -> [M, d] float32, or float64 as given
    return F.normalize(features.float() if features.dtype != torch.float64 else features, dim=-1)
