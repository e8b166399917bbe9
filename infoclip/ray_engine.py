"""Prediction on a Ray cluster, of this machine or of many: the same files as ``predict`` in one process writes.

Ray Data hands the pictures to workers that hold the model each. A worker that dies is replaced and its pictures are
given out again; a picture's files appear whole and under one name, so that doing it twice changes nothing. Model,
pictures and output folder must be reachable by the same paths on every machine of the cluster.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from infoclip.errors import ConfigError, InfoclipError
from infoclip.predict import Prediction, Step, predict_steps

__all__ = ["predict_all"]

_BATCH = 4
"""Pictures that a worker takes at once: few, so that the last worker is not waited for long."""


def predict_all(
    steps: Sequence[Step],
    model_path: str | Path,
    classes: Sequence[str],
    out: Path,
    *,
    device: str = "auto",
    workers: int = 0,
    address: str | None = None,
    loading: dict[str, Any] | None = None,
) -> Iterator[Prediction | str]:
    """A result, or a sentence, for each picture as it is done. The arguments are those of :func:`predict`,
    and ``loading`` are each worker's of :func:`infoclip.api.load`.

    A cluster that this call started ends with it; one that runs already is left as it was.

    Raises:
        ConfigError: Ray is not installed, the address does not answer, or the cluster has no GPU for ``cuda``.
        InfoclipError: Ray gave up on the work: its workers cannot start, say, or die again and again.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its C++ logs notes on restarts as errors
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError("The engine ray needs its package: pip install 'infoclip[ray]'.") from error
    started = not ray.is_initialized()
    if started:
        # an address given, or in RAY_ADDRESS, is one that runs; otherwise a cluster of this machine alone
        running = address or os.environ.get("RAY_ADDRESS") or "local"
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if running == "local":
            options["include_dashboard"] = False
        _knock(running)
        try:
            with _hidden_stderr():  # one line that the log level was set
                ray.init(address=running, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            token = "" if "RAY_AUTH_MODE" in os.environ else ", set RAY_AUTH_MODE=token if it asks for Ray's token"
            raise _no_cluster(running, first.rstrip("."), token) from error
    context = ray.data.DataContext.get_current()
    shown, context.enable_progress_bars = context.enable_progress_bars, False
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # what ends the run is said once, by this package
    try:
        found = ray.cluster_resources()
        gpus, cpus = int(found.get("GPU", 0)), int(found.get("CPU", 1))
        if device.startswith("cuda") and not gpus:
            raise ConfigError(f"The device is '{device}', but the Ray cluster has no GPU; use cpu.")
        on_gpu = gpus > 0 and device != "cpu"
        count = workers or (gpus if on_gpu else max(1, cpus // 4))
        shares: dict[str, Any] = {"num_gpus": 1} if on_gpu else {"num_cpus": max(1, cpus // count)}
        rows = ray.data.from_items(
            [{"step": json.dumps(step)} for step in steps], override_num_blocks=max(1, -(-len(steps) // _BATCH))
        )
        done = rows.map_batches(
            _Worker,
            fn_constructor_args=(
                str(model_path),
                list(classes),
                str(out),
                "cuda" if on_gpu else "cpu",
                str(Path.cwd()),
                loading or {},
            ),
            batch_size=_BATCH,
            compute=ray.data.ActorPoolStrategy(size=count),
            **shares,
        )
        for row in done.iter_rows():
            result = row["result"]
            if isinstance(result, InfoclipError):
                raise result
            yield result
    except ray.exceptions.RayError as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise InfoclipError(
            f"The Ray cluster gave up ({first.rstrip('.:')}); what is written stays, and the same command goes on."
        ) from error
    finally:
        context.enable_progress_bars = shown
        logger.setLevel(level)
        if started:
            ray.shutdown()


def _knock(address: str) -> None:
    """Refuse HOST:PORT, or ray://HOST:PORT, where nobody listens: Ray itself asks for more than a minute.

    Raises:
        ConfigError: no answer within ten seconds.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto", "local" or a name of Ray's
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise _no_cluster(address, reason) from error


def _no_cluster(address: str, reason: str, advice: str = "") -> ConfigError:
    return ConfigError(f"No Ray cluster answers at '{address}' ({reason}); start one{advice}, or leave it out.")


@contextlib.contextmanager
def _hidden_stderr() -> Iterator[None]:
    """What C++ prints meanwhile; exceptions come through."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


class _Worker:
    """A process of the cluster with the model in it."""

    def __init__(
        self, model_path: str, classes: list[str], out: str, device: str, folder: str, options: dict[str, Any]
    ) -> None:
        import torch

        from infoclip.api import load

        self.classes, self.out = classes, Path(out)
        # Relative paths are those of the caller; a cluster's workers start where the cluster did.
        with contextlib.suppress(OSError):
            os.chdir(folder)
        threads = os.environ.get("OMP_NUM_THREADS", "")  # Ray says with it how many CPUs this worker may use
        if threads.isdigit() and int(threads):
            torch.set_num_threads(int(threads))
        self.fault: InfoclipError | None = None
        try:
            self.model = load(model_path, device, **options)
        except InfoclipError as error:  # raised in here, it would make Ray start another worker, again and again
            self.fault = InfoclipError(f"A worker of the Ray cluster, on {platform.node()}: {error}")

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        made: list[Any] = []
        if self.fault is not None:
            return {"result": [self.fault] * len(batch["step"])}
        steps = [tuple(json.loads(step)) for step in batch["step"]]
        try:
            made += predict_steps(self.model, self.classes, self.out, steps)
        except InfoclipError as error:  # a full disk: the run ends, as in one process
            made.append(error)
        return {"result": made}
