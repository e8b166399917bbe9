"""Several processes that share one piece of work, started here or by ``torchrun``.

What they exchange through this module are small objects on the CPU (counts, names, faults), so that the backend is gloo
whatever the model runs on; the gradients of a training go over :mod:`infoclip.engine.distributed`.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from infoclip.errors import ConfigError, InfoclipError, InfoclipWarning, LostProcessError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Workers", "joined", "run_in_processes"]

R = TypeVar("R")

_PATIENCE = timedelta(days=7)
"""How long a process waits for the others at the end; one that died is noticed by whoever started it."""
_GRACE = 10.0
"""Seconds that a process has to end after it was asked to."""


@dataclass(frozen=True)
class Workers:
    """This process's place among those that share the work."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process reads and writes what is shared."""
        return self.rank == 0

    def broadcast(self, value: R) -> R:
        """The first process's value, in every process."""
        if self.count == 1:
            return value
        import torch.distributed as dist

        box = [value]
        with reached():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: R) -> list[R]:
        """Every process's value by rank, in every process."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        with reached():
            dist.all_gather_object(values, value)
        return values

    def largest(self, values: Tensor) -> Tensor:  # [n] on the CPU -> [n]
        """The largest of every process's values, element by element, in place; sooner than :meth:`gather`."""
        if self.count > 1:
            import torch.distributed as dist

            with reached():
                dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def part(self, total: int) -> slice:
        """This process's stretch of ``total`` items that all share; sizes differ by one at most."""
        return slice(total * self.rank // self.count, total * (self.rank + 1) // self.count)

    def device(self, name: str) -> str:
        """The device of this process: with several GPUs one each, going round where there are more processes."""
        import torch

        if self.count == 1 or name not in ("auto", "cuda") or not torch.cuda.is_available():
            return name
        return f"cuda:{int(os.environ.get('LOCAL_RANK', self.rank)) % torch.cuda.device_count()}"


@contextmanager
def reached() -> Iterator[None]:
    """Around an exchange: where another process has ended, one sentence in place of its backend's words."""
    try:
        yield
    except RuntimeError as error:  # gloo: a closed connection; NCCL: DistBackendError
        raise LostProcessError(
            "Another process of this run has ended (stopped from outside, or out of memory?); the same command goes on "
            "where it was (training: with --resume)."
        ) from error


@contextmanager
def joined() -> Iterator[Workers]:
    """The processes of this run: those of ``torchrun`` or of :func:`run_in_processes`, else this one alone."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        yield Workers(dist.get_rank(), dist.get_world_size())
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo", timeout=_PATIENCE)
        try:
            yield Workers(dist.get_rank(), dist.get_world_size())
        finally:
            dist.destroy_process_group()
    else:
        yield Workers()


def run_in_processes(count: int, work: Callable[..., R], *args: Any, heard: bool = False, **options: Any) -> R:
    """``work(*args, **options)`` in ``count`` new processes that are :func:`joined`; the first one's answer.

    Each gets its share of the CPU's cores as threads, unless ``OMP_NUM_THREADS`` says how many.

    Args:
        heard: show the first process's warnings; otherwise what is to be said was said before.

    Raises:
        ConfigError: within ``torchrun``, which has started its processes already.
        InfoclipError: what the first failing process raised, or that one was killed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("torchrun has started the processes already; leave --processes out.")
    from torch.multiprocessing.spawn import ProcessExitedException, start_processes

    with tempfile.TemporaryDirectory(prefix="infoclip-") as folder:
        context = start_processes(
            _work, (count, folder, work, args, options, heard), nprocs=count, join=False, start_method="spawn"
        )
        assert context is not None
        log = logging.getLogger("torch.multiprocessing.spawn")  # tells of every process that it ends
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            while not context.join(grace_period=_GRACE):
                pass
        except ProcessExitedException as error:
            failed = _answers(Path(folder), range(count), ok=False)
            cause = next((e for e in failed if not isinstance(e, LostProcessError)), None)
            if cause is not None:
                raise cause from None
            # The one that was killed may not be the first that was seen to end; those ended above have SIGTERM.
            codes = [process.exitcode or 0 for process in context.processes]
            index = next((i for i, code in enumerate(codes) if code < 0 and code != -signal.SIGTERM), error.error_index)
            if codes[index] >= 0 and failed:
                raise failed[0] from None
            name = signal.Signals(-codes[index]).name if codes[index] < 0 else f"exit code {codes[index]}"
            raise InfoclipError(
                f"Process {index + 1} of {count} was stopped from outside ({name}); out of memory? "
                "The same command goes on where it was stopped (evaluate: with --out; train: with --resume)."
            ) from None
        finally:
            log.setLevel(level)
            for process in context.processes:
                process.terminate()
            for process in context.processes:
                process.join(_GRACE)
                if process.is_alive():  # one that waits for another in a library's code does not look at signals
                    process.kill()
        return _answers(Path(folder), range(1), ok=True)[0]


def _answers(folder: Path, ranks: range, ok: bool) -> list[Any]:
    found = []
    for rank in ranks:
        path = folder / f"answer-{rank}"
        if path.is_file():
            good, value = pickle.loads(path.read_bytes())  # our own process wrote it, in a folder of ours alone
            if good is ok:
                found.append(value)
    return found


def _work(rank: int, count: int, folder: str, work: Callable[..., Any], args: Any, options: Any, heard: bool) -> None:
    import torch
    import torch.distributed as dist

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    os.environ["LOCAL_RANK"] = str(rank)
    if heard and rank == 0:
        from infoclip.cli import show_warning

        warnings.showwarning = show_warning
    else:
        warnings.simplefilter("ignore", InfoclipWarning)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count, timeout=_PATIENCE
    )
    code, answer = 0, (True, None)
    try:
        value = work(*args, **options)
        if rank == 0:
            answer = (True, value)
    except InfoclipError as error:
        code, answer = 3, (False, error)  # type: ignore[assignment]
    temporary = Path(folder, f".answer-{rank}")
    temporary.write_bytes(pickle.dumps(answer))
    temporary.rename(Path(folder, f"answer-{rank}"))
    if code:
        os._exit(code)  # at once: the others wait for this one
    dist.destroy_process_group()
