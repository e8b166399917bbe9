"""Checkpoints of a training run: complete or absent, never half.

A checkpoint is a folder ``checkpoints/step_000100`` that torch.distributed.checkpoint wrote, plus ``complete.json``
with the size of every file. It is written under a temporary name, every file is flushed to the disk, ``complete.json``
comes last, and a rename makes it appear; a folder whose ``complete.json`` is missing or does not agree is passed over.
Everything is stored as tensors (Python values as JSON in a byte tensor), so loading runs no stored code beyond the
index that torch.distributed.checkpoint keeps. These files are for continuing one's own run; weights to share are the
safetensors of ``model/``.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from infoclip.errors import CheckpointError, StorageError

__all__ = ["MARKER", "atomic_write_text", "checkpoint_path", "get_rng_state", "latest_checkpoint", "list_checkpoints",
           "load_checkpoint", "prune_checkpoints", "remove_unfinished", "save_checkpoint", "set_rng_state",
           "storage_errors"]  # fmt: skip

MARKER = "complete.json"
_TEMPORARY = ".writing-"
_JSON = "json:"


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return folder / f"step_{step:06d}"


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write ``state`` as the checkpoint of ``step`` and return its path.

    Args:
        folder: the run's ``checkpoints`` folder; made when missing.
        step: number of finished optimiser steps.
        state: nested mappings with string keys; leaves are tensors or JSON values.

    Raises:
        StorageError: the disk is full or not writable; the temporary folder is removed, earlier checkpoints stay.
    """
    final = checkpoint_path(folder, step)
    temporary = folder / f"{_TEMPORARY}{final.name}"
    try:
        with storage_errors(f"the checkpoint {final}"):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            _write(_flatten(state), temporary)
            sizes = {p.name: p.stat().st_size for p in sorted(temporary.iterdir())}
            _write_synced(temporary / MARKER, json.dumps({"step": step, "files": sizes}))
            _sync_folder(temporary)
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            _sync_folder(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that :func:`save_checkpoint` wrote, on the CPU.

    Raises:
        CheckpointError: an incomplete or damaged checkpoint.
    """
    if not is_complete(path):
        raise CheckpointError(
            f"The checkpoint {path} is incomplete or damaged; remove it and resume from an earlier one."
        )
    flat: dict[str, Tensor] = {}
    try:
        reader = dcp.FileSystemReader(path)
        for key, entry in reader.read_metadata().state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise CheckpointError(
                    f"The checkpoint {path} holds {key}, which is not a tensor; it is not of this program."
                )
            flat[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
        with _quiet():
            dcp.load(flat, storage_reader=reader, no_dist=True)
    except (CheckpointError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch's CheckpointException is not an Exception
        raise CheckpointError(f"The checkpoint {path} cannot be read: {_reason(error)}.") from error
    return _unflatten(flat)


def is_complete(path: Path) -> bool:
    """Whether the marker is there and every file has the size it names."""
    try:
        sizes = json.loads((path / MARKER).read_text(encoding="utf-8"))["files"]
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the complete checkpoints, oldest first."""
    found = []
    for path in folder.glob("step_*"):
        number = path.name.removeprefix("step_")
        if number.isdigit() and is_complete(path):
            found.append((int(number), path))
    return sorted(found)


def latest_checkpoint(folder: Path) -> tuple[int, Path] | None:
    """(step, path) of the newest complete checkpoint, or None."""
    found = list_checkpoints(folder)
    return found[-1] if found else None


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` complete checkpoints."""
    for _, path in list_checkpoints(folder)[:-keep]:
        gone = folder / f"{_TEMPORARY}old-{path.name}"
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)  # first out of sight, so that a kill leaves no half-removed checkpoint
        shutil.rmtree(gone, ignore_errors=True)


def remove_unfinished(out: Path) -> None:
    """Remove what a killed run left under temporary names in its folder and among its checkpoints."""
    for path in [*out.glob(".*.tmp"), *(out / "checkpoints").glob(f"{_TEMPORARY}*")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a small text file under a temporary name and rename it.

    Raises:
        StorageError: the disk is full or not writable; an earlier file stays as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with storage_errors(str(path)):
            _write_synced(temporary, text)
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def get_rng_state() -> dict[str, Any]:
    """States of torch's, Python's and (when loaded) CUDA's generators; numpy's is not used in training."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": [version, list(words), gauss]}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = {str(i): s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put the generators where :func:`get_rng_state` saw them."""
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    cuda = state.get("cuda", {})
    if cuda and torch.cuda.is_available() and torch.cuda.device_count() == len(cuda):
        torch.cuda.set_rng_state_all([cuda[str(i)] for i in range(len(cuda))])


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn a failed write into a :class:`StorageError` that names ``what`` and the reason."""
    try:
        yield
    except (StorageError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch's CheckpointException is not an Exception
        cause = _cause(error)
        if isinstance(cause, OSError):
            hint = "free some space" if cause.errno == errno.ENOSPC else "check the folder's permissions"
            if cause.errno == errno.EDQUOT:
                hint = "raise the quota or free some space"
            raise StorageError(
                f"Cannot write {what}: {cause.strerror or cause}; {hint} and run again "
                "(--resume continues from the last complete checkpoint)."
            ) from error
        if isinstance(cause, RuntimeError) and "inline_container" in str(cause):  # torch.save's own writer
            raise StorageError(f"Cannot write {what}: {_reason(cause)}; is the disk full?") from error
        raise


def _write(flat: dict[str, Tensor], path: Path) -> None:
    with _quiet():
        writer = dcp.FileSystemWriter(path, single_file_per_rank=True, sync_files=True, thread_count=1)
        dcp.save(flat, storage_writer=writer, no_dist=True)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is.*")
        warnings.filterwarnings("ignore", message=".*TypedStorage is deprecated.*")
        yield


def _flatten(state: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Leaves by path; JSON values (also empty mappings) become byte tensors under ``json:``."""
    flat: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(key, str) or "/" in key or key.startswith(_JSON):
            raise ValueError(f"a checkpoint key must be a string without '/', not {key!r}")
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}/"))
        elif isinstance(value, Tensor):
            flat[prefix + key] = value.detach()
        else:
            data = bytearray(json.dumps(value).encode())
            flat[f"{prefix}{_JSON}{key}"] = torch.frombuffer(data, dtype=torch.uint8).clone()
    return flat


def _unflatten(flat: Mapping[str, Tensor]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for path, tensor in flat.items():
        *parents, last = path.split("/")
        node = state
        for part in parents:
            node = node.setdefault(part, {})
        if last.startswith(_JSON):
            node[last.removeprefix(_JSON)] = json.loads(bytes(tensor.numpy().tobytes()).decode())
        else:
            node[last] = tensor
    return state


def _cause(error: BaseException) -> BaseException:
    """What began it: the error of the first rank in a torch CheckpointException, and an OSError that it hides.

    A full disk first raises an OSError and then, while the file is closed, a RuntimeError of torch.save.
    """
    failures = getattr(error, "failures", None)
    if failures:
        first = next(iter(failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError):
            return link
        link = link.__cause__ or link.__context__
    return error


def _reason(error: BaseException) -> str:
    cause = _cause(error)
    return str(cause).splitlines()[0] if str(cause) else type(cause).__name__


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
