"""An endless loader that can be stopped at any batch and continued exactly.

The order of the samples and the augmentation of each depend only on the seed and on the sample's number since the
start of training, never on the number of workers or on how far they had read ahead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from infoclip.data.objects import find_objects
from infoclip.data.transforms import PAD_VALUE, derive_seed, seeded
from infoclip.errors import DataError, InfoclipError

__all__ = ["ResumableLoader", "pad_to"]


class ResumableLoader:
    """Endless batches of shuffled epochs, as an iterator.

    A batch is ``{"image": uint8 [B, 3, H, W], "mask": int64 [B, H, W], "files": list[str]}``; pictures of different
    sizes are padded right and below to the largest (grey 128, ``ignore_index``). With ``objects`` it also holds
    ``"map"``, int64 [B, H, W], and ``"objects"``, B :class:`~infoclip.data.objects.Objects` that say which of the map's
    values are objects.

    Args:
        dataset: maps an index to a sample (see :class:`~infoclip.data.folders.FolderDataset`).
        batch_size: samples a batch; a batch may hold the end of one epoch and the start of the next.
        seed: of order and augmentation.
        workers: processes that read ahead; 0 reads in this process.
        transform: augmentation of ``(image, mask)``.
        ignore_index: label of padded pixels.
        pin_memory: page-locked batches, for copies to CUDA that overlap.
        objects: list each picture's objects, as training by masks needs them.
        part: of every batch only these, where several processes share it; samples, their order and their augmentation
            are those of the whole batch.

    Raises:
        DataError: an empty dataset; while iterating, whatever fault the dataset finds, also from a worker.
    """

    def __init__(
        self,
        dataset: Dataset[dict[str, Any]],
        batch_size: int,
        seed: int = 0,
        workers: int = 0,
        transform: Callable[..., Any] | None = None,
        ignore_index: int = 255,
        pin_memory: bool = False,
        objects: bool = False,
        part: slice | None = None,
    ) -> None:
        self._size = len(dataset)  # type: ignore[arg-type]
        if self._size == 0:
            raise DataError("The training data is empty; expected at least one image.")
        self._dataset = _Numbered(dataset, seed, transform)
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self._ignore_index, self._pin_memory, self._objects = ignore_index, pin_memory, objects
        self._part = part or slice(None)
        self._consumed = 0
        self._iterator: Iterator[Any] | None = None

    def __iter__(self) -> ResumableLoader:
        return self

    def __next__(self) -> dict[str, Any]:
        if self._iterator is None:
            self.start()
        assert self._iterator is not None
        batch = next(self._iterator)
        if isinstance(batch, InfoclipError):
            raise batch
        self._consumed += self.batch_size
        return batch

    @property
    def consumed(self) -> int:
        """Samples handed out since the start of training."""
        return self._consumed

    def start(self) -> None:
        """Start the workers now (before threads that a fork should not copy)."""
        self.close()
        order = _Order(self._size, self.batch_size, self.seed, self._consumed, self._part)
        loader: DataLoader[Any] = DataLoader(
            self._dataset,
            batch_sampler=order,
            num_workers=self.workers,
            collate_fn=_Collate(self._ignore_index, self._objects),
            pin_memory=self._pin_memory,
            # fork keeps the start short; workers never touch CUDA
            multiprocessing_context="fork" if self.workers and sys.platform == "linux" else None,
            # the order is drawn from its own generators; this one keeps DataLoader off the global one
            generator=torch.Generator().manual_seed(self.seed),
        )
        self._iterator = iter(loader)

    def close(self) -> None:
        """Stop the workers."""
        iterator, self._iterator = self._iterator, None
        shutdown = getattr(iterator, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()

    def state_dict(self) -> dict[str, int]:
        """Where the loader stands: what was handed out, not what workers have read ahead."""
        return {"consumed": self._consumed, "seed": self.seed, "batch_size": self.batch_size, "size": self._size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the state's last batch.

        Raises:
            DataError: the state belongs to a dataset of another size, another seed or batch size.
        """
        for key, mine in (("size", self._size), ("seed", self.seed), ("batch_size", self.batch_size)):
            if int(state[key]) != mine:
                what = {"size": "number of images", "seed": "seed", "batch_size": "batch size"}[key]
                raise DataError(
                    f"The {what} was {int(state[key])} when this run was saved and is {mine} now; "
                    "continue with the same data and settings, or start a new run."
                )
        self.close()
        self._consumed = int(state["consumed"])


class _Numbered(Dataset[Any]):
    """Sample by (global number, index in the dataset), augmented by its number; a user's fault comes back as a value.

    DataLoader rebuilds a worker's exception with the traceback as its text; a value arrives whole.
    """

    def __init__(self, dataset: Dataset[dict[str, Any]], seed: int, transform: Callable[..., Any] | None) -> None:
        self.dataset, self.seed, self.transform = dataset, seed, transform

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any] | InfoclipError:
        number, index = key
        try:
            sample = self.dataset[index]
        except InfoclipError as error:
            return error
        if self.transform is None:
            return sample
        return seeded(self.transform, derive_seed(self.seed, "sample", number), sample)


class _Order(Sampler[list[tuple[int, int]]]):
    """Endless batches of (global number, dataset index) from sample ``start`` on; of each its ``part``."""

    def __init__(self, size: int, batch_size: int, seed: int, start: int, part: slice) -> None:
        self.size, self.batch_size, self.seed, self.start, self.part = size, batch_size, seed, start, part

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        number, epoch, order = self.start, -1, torch.empty(0, dtype=torch.int64)
        while True:
            batch = []
            for _ in range(self.batch_size):
                if number // self.size != epoch:
                    epoch = number // self.size
                    generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", epoch))
                    order = torch.randperm(self.size, generator=generator)
                batch.append((number, int(order[number % self.size])))
                number += 1
            yield batch[self.part]


class _Collate:
    def __init__(self, ignore_index: int, objects: bool) -> None:
        self.ignore_index, self.objects = ignore_index, objects

    def __call__(self, samples: list[dict[str, Any] | InfoclipError]) -> dict[str, Any] | InfoclipError:
        good: list[dict[str, Any]] = []
        for sample in samples:
            if isinstance(sample, InfoclipError):
                return sample
            good.append(sample)
        batch: dict[str, Any] = {
            "image": _stack([s["image"] for s in good], PAD_VALUE),
            "mask": _stack([s["mask"] for s in good], self.ignore_index),
            "files": [s["file"] for s in good],
        }
        if self.objects:
            found = [find_objects(s, self.ignore_index) for s in good]
            batch["map"] = _stack([ids for ids, _ in found], self.ignore_index)
            batch["objects"] = [objects for _, objects in found]
        return batch


def _stack(tensors: list[Tensor], fill: int) -> Tensor:  # B x [..., H, W] -> [B, ..., Hmax, Wmax]
    plain = [t.as_subclass(Tensor) for t in tensors]
    height, width = max(t.shape[-2] for t in plain), max(t.shape[-1] for t in plain)
    return torch.stack([pad_to(t, height, width, fill) for t in plain])


def pad_to(x: Tensor, height: int, width: int, fill: int) -> Tensor:  # [..., h, w] -> [..., height, width]
    """Padded right and below; itself where there is nothing to pad."""
    if x.shape[-2:] == (height, width):
        return x
    return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]), value=fill)
