"""The text bank: class names in prompts, embedded once for a frozen text tower and anew for one that learns."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from infoclip.clip.templates import resolve_templates
from infoclip.clip.text import TextCLIP
from infoclip.clip.weights import write_safetensors
from infoclip.errors import InfoclipWarning

__all__ = ["TextBank", "text_cache_dir"]


def text_cache_dir() -> Path:
    """Where a frozen tower's embeddings are kept: ``$INFOCLIP_CACHE``, else the user's cache folder."""
    chosen = os.environ.get("INFOCLIP_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "infoclip"


# Lists kept in memory at a time: seen, unseen and all classes, with room for one more.
_KEPT = 4


class TextBank:
    """Class names x templates -> L2-normalised embeddings [T, P, d].

    While anything in the text tower learns, every call computes the embeddings and lets the gradient through. For a
    frozen tower they are kept, in memory and (with ``cache_dir``) on disk, under a hash of everything they depend on:
    the text tower's weights and architecture, the templates, the class names and their token ids. A changed class
    list or weight thus never meets a stale entry (the published code keeps the first list it sees). Weights are hashed
    again when a parameter was replaced or changed in place; a change through ``parameter.data`` goes unseen.

    Args:
        clip: the model whose text tower is used; its weights may change later.
        templates: the prompt templates, or the name of a set.
        cache_dir: where embeddings are kept as safetensors; None for memory only. A damaged file is rebuilt with a
            warning; a folder that cannot be written costs a warning, not the run.
    """

    def __init__(
        self, clip: TextCLIP, templates: Sequence[str] | str | None = None, cache_dir: Path | str | None = None
    ) -> None:
        self.clip = clip
        if isinstance(templates, str):
            templates = resolve_templates(templates)
        self.templates = clip.templates if templates is None else tuple(templates)
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self._kept: OrderedDict[tuple[str, int, tuple[str, ...]], Tensor] = OrderedDict()
        self._weights: tuple[tuple[tuple[int, int], ...], str] | None = None

    def __call__(self, class_names: Sequence[str]) -> Tensor:  # -> [T, P, d]
        """Embeddings of the classes, float32 on the model's device. Do not change the result in place.

        Raises:
            DataError: no classes, an empty name, or a name that does not fit the context.
        """
        if not self.clip.text_frozen:
            return self.clip.text_features(class_names, self.templates)
        kept = (self._weights_hash(), id(self.clip.tokenizer), tuple(class_names))
        features = self._kept.get(kept)
        key = "" if features is not None or self.cache_dir is None else self.key(class_names)
        if features is None and key:
            features = self._read(key, class_names)
        if features is None:
            # Kept tensors must serve training and evaluation alike, so they are made outside inference mode, without
            # a graph, and in full precision whatever the caller's autocast.
            device = self.clip.positional_embedding.device
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
                features = self.clip.text_features(class_names, self.templates)
            self._write(key, features)
        features = features.to(self.clip.positional_embedding.device)
        self._kept[kept] = features
        self._kept.move_to_end(kept)
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return features

    def key(self, class_names: Sequence[str]) -> str:
        """The content hash that the embeddings of a class list are kept under."""
        tokens = self.clip.prompt_tokens(class_names, self.templates)
        digest = hashlib.sha256(self._weights_hash().encode())
        digest.update(repr((tuple(class_names), self.templates)).encode())
        digest.update(tokens.numpy().tobytes())
        return digest.hexdigest()

    def _weights_hash(self) -> str:
        parameters = self.clip.text_parameters()
        # Every in-place change of a parameter raises its version, so that the hash need not be computed each time.
        state = tuple((p.data_ptr(), p._version) for p in parameters.values())
        if self._weights is None or self._weights[0] != state:
            digest = hashlib.sha256()
            arch = self.clip.arch
            digest.update(repr((asdict(arch.text), arch.causal, arch.text_pool, arch.eos_id)).encode())
            for name, parameter in parameters.items():
                digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
                digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
            self._weights = (state, digest.hexdigest())
        return self._weights[1]

    def _path(self, key: str) -> Path:
        assert self.cache_dir is not None
        return self.cache_dir / f"text-{key[:32]}.safetensors"

    def _read(self, key: str, class_names: Sequence[str]) -> Tensor | None:
        if self.cache_dir is None or not self._path(key).is_file():
            return None
        from safetensors import SafetensorError, safe_open

        path = self._path(key)
        expected = (len(class_names), len(self.templates), self.clip.embed_dim)
        try:
            with safe_open(path, framework="pt") as file:
                features = file.get_tensor("features")
                stored = (file.metadata() or {}).get("key")
            if stored == key and tuple(features.shape) == expected and bool(features.isfinite().all()):
                return features
            reason = "it does not hold what its name says"
        except (SafetensorError, OSError) as error:
            reason = str(error)
        warnings.warn(f"The cached text embeddings {path} are damaged ({reason}) and are rebuilt.", InfoclipWarning, 3)
        return None

    def _write(self, key: str, features: Tensor) -> None:
        if self.cache_dir is None:
            return
        try:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            write_safetensors({"features": features}, self._path(key), {"key": key})
        except OSError as error:
            warnings.warn(f"The text embeddings cannot be kept in {self.cache_dir}: {error}.", InfoclipWarning, 3)
