"""Training in several processes, one a GPU (NCCL) or on CPUs (gloo): the step that one process would take.

A batch is the run's, whatever the number of processes: each takes a stretch of it (:meth:`Workers.part`) and its losses
with the weight of what it took, so that the processes' gradients add up to the batch's. Prompts are shared in the same
way, since the text tower is half of a step's arithmetic and the same for all images.

Why no DistributedDataParallel: it hooks the backward pass of one ``forward``, and a step here has several
(micro-batches, then the text tower at a leaf of its own, in ``balanced`` and ``lean`` chunk by chunk), of which each
process sees other parameters; it would reduce after each or miss some. One sum after the last pass works with all
memory modes, whatever their graph, and always adds in the same order. What it gives up is hiding the exchange behind
the backward pass: the learnt parameters of CAT-Seg's ViT-B/16 are 0.1 GB.

Every exchange on tensors is preceded by a short one on the CPU in which each process says that all is well. A process
with a fault (a damaged file, a full disk, no memory) says so at its next one instead. All of them learn it there and
end with the same error, or repeat the step with leaner settings, and none waits for a sum that the faulty one never
joins.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from infoclip.errors import ConfigError, InfoclipError
from infoclip.workers import Workers, reached

if TYPE_CHECKING:
    from infoclip.data.objects import Objects

__all__ = ["Ranks", "SharedShortageError", "WholeBatch"]

R = TypeVar("R")

_BUCKET = 32 * 2**20
"""Bytes that are summed at once: few exchanges, and little memory beside the gradients."""


class SharedShortageError(RuntimeError):
    """Memory ran out in a process of the run; the message says in which."""


@dataclass(frozen=True)
class WholeBatch:
    """What a process knows of the images that it does not have."""

    labelled: int
    """Pixels with a label, of all processes; 0 if not wanted."""
    objects: list[Objects]
    """Of every image of the batch; empty if not wanted."""


class Ranks:
    """The processes of one training; alone, every method does its part without an exchange.

    Args:
        workers: this process's place (:func:`infoclip.workers.joined`).
        batch: images of a whole batch.
    """

    def __init__(self, workers: Workers | None = None, batch: int = 1) -> None:
        self.workers = workers or Workers()
        self.count, self.first, self.batch = self.workers.count, self.workers.first, batch
        self.here = int(os.environ.get("LOCAL_WORLD_SIZE", self.count))
        """Processes on this machine."""
        self.group: Any = None  # the default group, gloo, also for tensors

    def compute_on(self, device: torch.device) -> None:
        """Choose how tensors are exchanged: by NCCL where each process has a GPU of its own, else by gloo.

        Raises:
            ConfigError: fewer images than processes.
        """
        if self.count > self.batch:
            raise ConfigError(
                f"data.batch_size is {self.batch}, the batch that all processes share, and there are {self.count}; "
                f"start at most {self.batch}, or raise data.batch_size."
            )
        own = device.type == "cuda" and self.here <= torch.cuda.device_count()
        if self.count > 1 and all(self.gather(own)):
            import torch.distributed as dist

            self.group = dist.new_group(backend="nccl")

    @property
    def part(self) -> slice:
        """This process's images of a batch."""
        return self.workers.part(self.batch)

    @property
    def most(self) -> int:
        """Images of the process that takes the most."""
        return -(-self.batch // self.count)

    # Faults

    @contextmanager
    def together(self) -> Iterator[None]:
        """A fault of any process in here ends all of them with the same error.

        All leave it through :meth:`agree`, so that a fault after the last exchange is heard too.
        """
        try:
            yield
            self.agree()
        except InfoclipError as error:
            if error.shared:
                raise
            self.agree(error)

    def agree(self, fault: InfoclipError | str | None = None) -> None:
        """Say that all is well here, or what is not, and learn the same of the others.

        Args:
            fault: what ends the run, or what memory ran out on.

        Raises:
            InfoclipError: the first process's that had one; its ``shared`` is set.
            SharedShortageError: memory ran out somewhere.
        """
        if self.count == 1:
            if isinstance(fault, InfoclipError):
                raise fault
            said: list[InfoclipError | str | None] = [fault]
        elif not int(self.workers.largest(torch.tensor([fault is not None], dtype=torch.int32))):
            return
        else:
            said = self.workers.gather(fault)
        for error in said:
            if isinstance(error, InfoclipError):
                error.shared = True
                raise error
        for number, text in enumerate(said, 1):
            if text is not None:
                raise SharedShortageError(str(text) if self.count == 1 else f"process {number} of {self.count}: {text}")

    # Values on the CPU

    def gather(self, value: R) -> list[R]:
        """Every process's value by rank."""
        self.agree()
        return self.workers.gather(value)

    def broadcast(self, value: R) -> R:
        """The first process's value."""
        self.agree()
        return self.workers.broadcast(value)

    def by_first(self, work: Callable[[], R]) -> R | None:
        """``work()`` in the first process, which the others wait for; None in those."""
        value = work() if self.first else None
        self.agree()
        return value

    def in_turn(self, work: Callable[[], R]) -> R:
        """``work()``, which returns something, in the first process, then in the others, which find what it wrote."""
        value = self.by_first(work)
        return work() if value is None else value

    def complete(
        self, batches: Sequence[dict[str, Any]], ignore: int, of: Mapping[str, bool]
    ) -> tuple[list[WholeBatch], Tensor | None]:
        """What a step must know of the other processes' images. The batches' pictures are brought to one size.

        Args:
            batches: this process's parts of a step's batches (:class:`~infoclip.data.loader.ResumableLoader`); padded
                in place as the loader pads, where another process has larger pictures.
            ignore: label of pixels without one.
            of: which of ``sizes``, ``labelled``, ``present`` and ``objects`` are wanted.

        Returns:
            Of each batch what it is with the others' parts, and the sorted labels that occur (None if not wanted).
        """
        from infoclip.data.loader import pad_to
        from infoclip.data.transforms import PAD_VALUE

        masks = [batch["mask"] for batch in batches]
        mine = (
            [tuple(mask.shape[-2:]) for mask in masks],
            [int((mask != ignore).sum()) if of["labelled"] else 0 for mask in masks],
            torch.cat([mask.unique() for mask in masks]).unique().tolist() if of["present"] else [],
            [batch["objects"] if of["objects"] else [] for batch in batches],
        )
        every = self.gather(mine) if any(of.values()) else [mine]
        wholes = []
        for i, batch in enumerate(batches):
            height, width = (max(sizes[i][axis] for sizes, *_ in every) for axis in (0, 1))
            for key, fill in (("image", PAD_VALUE), ("mask", ignore), ("map", ignore)):
                if key in batch:
                    batch[key] = pad_to(batch[key], height, width, fill)
            objects = [x for *_, lists in every for x in lists[i]]
            wholes.append(WholeBatch(sum(counts[i] for _, counts, *_ in every), objects))
        present = torch.tensor(sorted({x for _, _, labels, _ in every for x in labels}), dtype=torch.int64)
        return wholes, present if of["present"] else None

    # Tensors

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        self.agree()
        self._sum(tensor)
        return tensor

    def joined_rows(self, own: Tensor | None, where: slice, shape: Sequence[int], device: torch.device) -> Tensor:
        """A tensor of ``shape``, float32, whose rows ``where`` are this process's and the rest the others'."""
        full = torch.zeros(tuple(shape), device=device)
        if own is not None:
            full[where] = own
        return self.total(full)

    def whole_batch(self, own: Tensor) -> Tensor:  # [b, ...] -> [B, ...]
        """The rows of all processes, for a loss that compares the images of a batch and that each process computes.

        Gradients reach this process's own rows, times B / b: with the share b / B, by which a process weighs its
        losses, what comes back is the loss's gradient at these rows, and that of everything shared adds up to one.
        """
        if self.count == 1:
            return own
        self.agree()
        return _WholeBatch.apply(own, self)

    def add_up(self, parameters: Sequence[nn.Parameter], losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sum the parameters' gradients over the processes, in place; returns the losses' sums, [] each by name.

        A parameter has a gradient afterwards if it had one in any process.
        """
        if self.count == 1:
            return dict(losses)
        self.agree()
        there = self.workers.largest(torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8))
        names = sorted(losses)
        values = torch.stack([losses[name].detach().float() for name in names])
        gradients = [values]
        for parameter, used in zip(parameters, there.tolist(), strict=True):
            if used:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            flat = torch.cat([x.reshape(-1) for x in bucket])
            self._sum(flat)
            sums = flat.split([x.numel() for x in bucket])
            torch._foreach_copy_(bucket, [x.view_as(y) for x, y in zip(sums, bucket, strict=True)])
        return dict(zip(names, values.unbind(), strict=True))

    def same_weights(self, *modules: nn.Module | None) -> None:
        """The first process's parameters and buffers in all, where another CPU may have drawn or read otherwise."""
        if self.count == 1:
            return
        import torch.distributed as dist

        self.agree()
        for module in modules:
            if module is not None:
                for tensor in (*module.parameters(), *module.buffers()):
                    with reached(), torch.no_grad():
                        value = tensor.detach().contiguous()
                        dist.broadcast(value, 0, group=self.group)
                        tensor.copy_(value)

    def _sum(self, tensor: Tensor) -> None:
        if self.count > 1:
            import torch.distributed as dist

            with reached():
                dist.all_reduce(tensor, group=self.group)


class _WholeBatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, ranks: Ranks) -> Tensor:
        ctx.part, ctx.share = ranks.part, len(own) / ranks.batch
        full = own.new_zeros(ranks.batch, *own.shape[1:])
        full[ranks.part] = own
        ranks._sum(full)
        return full

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0][ctx.part] / ctx.share, None


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Stretches of one type and of some size, in the order given."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        size = sum(x.numel() * x.element_size() for x in bucket)
        if bucket and (tensor.dtype != bucket[0].dtype or size + tensor.numel() * tensor.element_size() > _BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    yield bucket
