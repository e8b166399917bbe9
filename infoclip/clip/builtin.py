"""The tiny CLIPs that ship with the package, and the word tokenizer that belongs to them.

``builtin:scenes`` is the output of ``infoclip pretrain scenes`` as it stands, ``builtin:scenes-convnext`` that of
``infoclip pretrain scenes-convnext``: an open_clip model config (with timm's config of a ConvNeXt beside it), weights
as float16 safetensors in open_clip's layout, the vocabulary, how it was made and the log of the training.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from infoclip.errors import CheckpointError, ConfigError, InfoclipWarning

if TYPE_CHECKING:
    import open_clip

__all__ = ["ASSETS", "PREFIX", "BuiltinClip", "WordTokenizer", "builtin_file", "builtin_scenes", "read_scenes_clip"]

_FOLDER = Path(__file__).resolve().parent.parent / "assets"

ASSETS = {"scenes": _FOLDER / "scenes_clip", "scenes-convnext": _FOLDER / "scenes_convnext"}
"""Folders of the shipped checkpoints."""

PREFIX = "builtin:"
"""What the names of shipped checkpoints begin with in settings."""

PAD, UNKNOWN, START, END = "<pad>", "<unk>", "<start>", "<end>"


class WordTokenizer:
    """Texts to ids, one id a word: start, words, end, padding.

    Words are runs of letters and digits in lower case; everything else separates them. The end token has the largest id
    of the vocabulary, so that CLIP's arg-max pooling reads its position. A word that the vocabulary lacks becomes
    ``<unk>``, with one warning for each such word.

    Args:
        vocabulary: all entries by id: ``<pad>`` first, ``<end>`` last, ``<unk>`` and ``<start>`` among them.
        context_length: number of ids that a text is padded to.

    Raises:
        ValueError: a vocabulary of another form.
    """

    def __init__(self, vocabulary: Sequence[str], context_length: int) -> None:
        words = list(vocabulary)
        if len(words) < 4 or words[0] != PAD or words[-1] != END or len(set(words)) != len(words):
            raise ValueError(f"expected different words from {PAD} to {END}, given {len(words)} words")
        if UNKNOWN not in words or START not in words:
            raise ValueError(f"expected {UNKNOWN} and {START} in the vocabulary")
        self.vocabulary = tuple(words)
        self.context_length = context_length
        self.vocab_size = len(words)
        self._ids = {word: index for index, word in enumerate(words)}
        self._warned: set[str] = set()

    @staticmethod
    def words(text: str) -> list[str]:
        """The words of a text as the tokenizer reads them."""
        return re.findall(r"[^\W_]+", text.lower())

    def encode(self, text: str) -> list[int]:
        """Ids of the words, without start and end."""
        words = self.words(text)
        special = (PAD, UNKNOWN, START, END)
        unknown = [w for w in dict.fromkeys(words) if w not in self._ids and w not in self._warned]
        if unknown:
            self._warned.update(unknown)
            names = ", ".join(f"'{word}'" for word in unknown)
            known = ", ".join(word for word in self.vocabulary if word not in special)
            warnings.warn(
                f"The small CLIP of the scenes has never read {names}; what it knows is: {known}.", InfoclipWarning, 2
            )
        return [self._ids.get(word, self._ids[UNKNOWN]) for word in words]

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Ids [M, context_length] int64.

        Raises:
            ValueError: a text that is longer than the context.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        length = context_length or self.context_length
        ids = torch.full((len(texts), length), self._ids[PAD], dtype=torch.int64)
        for row, text in enumerate(texts):
            tokens = [self._ids[START], *self.encode(text), self._ids[END]]
            if len(tokens) > length:
                raise ValueError(f"expected at most {length - 2} words, given {len(tokens) - 2}: '{text}'")
            ids[row, : len(tokens)] = torch.tensor(tokens)
        return ids


class BuiltinClip(NamedTuple):
    """A CLIP, its tokenizer, and the statistics of its pixels in 0..1."""

    model: open_clip.CLIP
    tokenizer: WordTokenizer
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def builtin_file(name: str, file: str) -> str:
    """The path of a shipped CLIP's file where ``name`` is ``builtin:NAME``; any other name as it is.

    Raises:
        ConfigError: no such CLIP.
    """
    if not name.startswith(PREFIX):
        return name
    if name.removeprefix(PREFIX) not in ASSETS:
        known = " and ".join(PREFIX + key for key in ASSETS)
        raise ConfigError(f"There is no built-in CLIP '{name}'; the built-in ones are {known}.")
    return str(ASSETS[name.removeprefix(PREFIX)] / file)


def builtin_scenes(name: str = "scenes") -> BuiltinClip:
    """A shipped CLIP of the scenes, float32, in evaluation mode: ``scenes`` (ViT) or ``scenes-convnext``.

    Raises:
        CheckpointError: the package's files are missing or damaged.
    """
    return read_scenes_clip(ASSETS[name])


def read_scenes_clip(directory: str | Path) -> BuiltinClip:
    """Load a folder that ``infoclip pretrain scenes`` or ``scenes-convnext`` wrote.

    Raises:
        CheckpointError: a file is missing or damaged, or the files do not belong together.
    """
    import open_clip
    from safetensors.torch import load_file

    from infoclip.clip.architecture import model_config

    directory = Path(directory)
    try:
        (directory / "config.json").stat()  # a missing one is named as such
        config, preprocess = model_config(str(directory / "config.json"))
        vocabulary = json.loads((directory / "vocabulary.json").read_text(encoding="utf-8"))
        state = load_file(directory / "model.safetensors")
        with torch.random.fork_rng(devices=[]):  # building draws weights; the caller's generator is left alone
            model = open_clip.CLIP(**config)
        model.load_state_dict({key: value.float() for key, value in state.items()})
        tokenizer = WordTokenizer(vocabulary, model.context_length)
        if tokenizer.vocab_size != model.vocab_size:
            raise ValueError(f"{tokenizer.vocab_size} words for {model.vocab_size} embeddings")
        mean, std = (tuple(float(x) for x in preprocess[key]) for key in ("mean", "std"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{error.filename} is missing: {directory} is no complete CLIP of the scenes; "
            "'infoclip pretrain scenes --out FOLDER' makes one, reinstalling the package mends the shipped one."
        ) from error
    except Exception as error:  # safetensors, JSON, torch and open_clip each have their own classes
        text = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{directory} does not hold a CLIP of the scenes: {text}.") from error
    return BuiltinClip(model.eval(), tokenizer, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))
