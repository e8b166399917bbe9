"""Several processes that share one evaluation, started here or by ``torchrun``.

They exchange counts and names, small objects on the CPU, so that the backend is gloo whatever the model runs on.
"""

from __future__ import annotations

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
from typing import Any, TypeVar

from infoclip.errors import ConfigError, InfoclipError, InfoclipWarning

__all__ = ["Workers", "joined", "run_in_processes"]

R = TypeVar("R")

_PATIENCE = timedelta(days=7)
"""How long a process waits for the others at the end; one that died is noticed by whoever started it."""


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
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: R) -> list[R]:
        """Every process's value by rank, in every process."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def device(self, name: str) -> str:
        """The device of this process: with several GPUs one each, going round where there are more processes."""
        import torch

        if self.count == 1 or name not in ("auto", "cuda") or not torch.cuda.is_available():
            return name
        return f"cuda:{int(os.environ.get('LOCAL_RANK', self.rank)) % torch.cuda.device_count()}"


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


def run_in_processes(count: int, work: Callable[..., R], *args: Any, **options: Any) -> R:
    """``work(*args, **options)`` in ``count`` new processes that are :func:`joined`; the first one's answer.

    Each gets its share of the CPU's cores as threads, unless ``OMP_NUM_THREADS`` says how many.

    Raises:
        ConfigError: within ``torchrun``, which has started its processes already.
        InfoclipError: what the first failing process raised, or that one was killed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("torchrun has started the processes already; leave --processes out.")
    from torch.multiprocessing.spawn import ProcessExitedException, start_processes

    with tempfile.TemporaryDirectory(prefix="infoclip-") as folder:
        context = start_processes(
            _work, (count, folder, work, args, options), nprocs=count, join=False, start_method="spawn"
        )
        assert context is not None
        try:
            while not context.join():
                pass
        except ProcessExitedException as error:
            failed = _answers(Path(folder), range(count), ok=False)
            if failed:
                raise failed[0] from None
            name = signal.Signals(-error.exit_code).name if error.exit_code < 0 else f"exit code {error.exit_code}"
            raise InfoclipError(
                f"Process {error.error_index + 1} of {count} was stopped from outside ({name}); out of memory? "
                "With --out, the same command goes on where it was stopped."
            ) from None
        finally:
            for process in context.processes:
                process.terminate()
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


def _work(rank: int, count: int, folder: str, work: Callable[..., Any], args: Any, options: Any) -> None:
    import torch
    import torch.distributed as dist

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    os.environ["LOCAL_RANK"] = str(rank)
    warnings.simplefilter("ignore", InfoclipWarning)  # what is to be said was said before the processes started
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
