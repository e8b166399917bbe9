"""State dicts: open_clip's layout (joint ``in_proj_weight``) and CAT-Seg's (separate q, k, v), and reading files."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infoclip.errors import CheckpointError

__all__ = ["StoredWeights", "join_projections", "read_tensor_file", "read_weights", "split_projections",
           "write_safetensors"]  # fmt: skip

_JOINT = "attn.in_proj_weight"
_SEPARATE = tuple(f"attn.{part}_proj_weight" for part in "qkv")
# Scalars that the OpenAI archives keep among the weights; they only repeat the architecture.
_OPENAI_SCALARS = ("input_resolution", "context_length", "vocab_size")


def split_projections(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's layout to CAT-Seg's: ``in_proj_weight`` [3C, C] becomes q, k and v [C, C]; the rest stays."""
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith(_JOINT) and value.ndim == 2 and value.shape[0] % 3 == 0:
            prefix = key.removesuffix(_JOINT)
            for name, part in zip(_SEPARATE, value.chunk(3), strict=True):
                result[prefix + name] = part
        else:
            result[key] = value
    return result


def join_projections(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The exact inverse of :func:`split_projections`."""
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith(_SEPARATE[0]):
            prefix = key.removesuffix(_SEPARATE[0])
            result[prefix + _JOINT] = torch.cat([state[prefix + name] for name in _SEPARATE])
        elif not key.endswith(_SEPARATE[1:]):
            result[key] = value
    return result


@dataclass
class StoredWeights:
    """A weight file's content."""

    state: dict[str, Tensor]
    quick_gelu: bool | None
    """Which activation the weights were trained with, where the file tells; None where it does not."""


def read_weights(path: Path) -> StoredWeights:
    """Read a CLIP weight file without running code from it.

    Safetensors, state dicts saved by torch (plain, or below ``state_dict`` as open_clip's training leaves them) and the
    OpenAI archives (TorchScript) are understood. The activation is known for the OpenAI archives, for safetensors
    files whose metadata has ``quick_gelu``, and beside an ``open_clip_config.json``; no other file tells it.

    Raises:
        CheckpointError: a missing, damaged or foreign file.
    """
    _check_file(path, "CLIP weight file")
    quick_gelu: bool | None = None
    data: Any
    if path.suffix == ".safetensors":
        data, quick_gelu = _read_safetensors(path)
    elif _is_torchscript(path):
        data, quick_gelu = _read_torchscript(path), True
    else:
        data = _read_torch(path)
    if isinstance(data, dict) and isinstance(data.get("state_dict"), dict):
        data = data["state_dict"]
    if not isinstance(data, dict) or not data or not all(isinstance(v, Tensor) for v in data.values()):
        raise CheckpointError(f"{path} holds no state dict: expected a table of tensors by parameter name.")
    state: dict[str, Tensor] = dict(data)
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    if all(key in state for key in _OPENAI_SCALARS):
        quick_gelu = True
    for key in _OPENAI_SCALARS:
        state.pop(key, None)
    beside = path.parent / "open_clip_config.json"
    if quick_gelu is None and beside.is_file():
        quick_gelu = _quick_gelu_of(beside)
    return StoredWeights(state, quick_gelu)


def read_tensor_file(path: Path, kind: str) -> dict[Any, Any]:
    """The table in a safetensors file or a torch file, without running code from it.

    Args:
        kind: what the file is expected to be, for messages.

    Raises:
        CheckpointError: a missing or damaged file, or one that holds more than tensors and plain values.
    """
    _check_file(path, kind)
    data = _read_safetensors(path)[0] if path.suffix == ".safetensors" else _read_torch(path)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}: expected a table of tensors by name.")
    return data


def write_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file at once or not at all.

    Raises:
        OSError: the file cannot be written; nothing half-written is left.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # several processes may write the same file
    try:
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, temporary, metadata)
        temporary.chmod(0o644)  # safetensors writes for the owner alone
        temporary.replace(path)
    except SafetensorError as error:  # how the library reports a full disk
        raise OSError(str(error)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _check_file(path: Path, kind: str) -> None:
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: expected a {kind} (.safetensors or a torch file).")
    if not path.is_file():
        raise CheckpointError(f"The {kind} {path} does not exist.")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], bool | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}.") from error
    stored = metadata.get("quick_gelu", "").lower()
    return state, {"true": True, "false": False}.get(stored)


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def _read_torchscript(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Loading an archive builds its modules and runs none of their methods; pickled Python objects cannot occur.
            return dict(torch.jit.load(str(path), map_location="cpu").state_dict())
    except RuntimeError as error:
        raise CheckpointError(f"{path} is a damaged TorchScript archive: {_first_line(error)}.") from error


def _read_torch(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:  # torch stores its records as they are; a packed one may be a bomb
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        packed = False  # the older format is no archive
    if packed:
        raise CheckpointError(f"{path} is a compressed archive: expected a file as torch.save writes it.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its opcodes lead to
        raise CheckpointError(
            f"{path} is damaged, or holds more than tensors and plain values, which is not read since it can run code: "
            "expected .safetensors or a torch state dict."
        ) from error


def _quick_gelu_of(path: Path) -> bool | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return bool(data.get("model_cfg", data).get("quick_gelu", False))
    except (OSError, ValueError, AttributeError):
        return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
