"""SIGKILL at any moment, through the command line: the resumed run ends with the bits of an uninterrupted one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_mask_training import mask_config
from training_data import tiny_config, write_folders

from infoclip.config import AlignConfig, save_config
from infoclip.engine import checkpoint as ckpt
from infoclip.engine.log import read_log

STEPS = 40


def command(config: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "infoclip.cli", "train", str(config), *more, "--out", str(out), "--quiet"]


def run(config: Path, out: Path, *more: str) -> None:
    done = subprocess.run(command(config, out, *more), capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr


def environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}


def kill_when(config: Path, out: Path, moment: Callable[[], bool], *more: str) -> None:
    """Start a run and end it with SIGKILL, workers included, as soon as the moment has come."""
    with (out.parent / "stderr.txt").open("w+") as errors:
        process = subprocess.Popen(
            command(config, out, *more),
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=environment(),
            start_new_session=True,
        )
        try:
            until = time.monotonic() + 120
            while not moment():
                errors.seek(0)
                assert process.poll() is None, f"the run ended before it could be killed: {errors.read()}"
                assert time.monotonic() < until, "the moment did not come within two minutes"
                time.sleep(0.0002)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == -signal.SIGKILL


def steps_logged(out: Path) -> int:
    path = out / "log.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def unfinished(out: Path) -> list[Path]:
    return list((out / "checkpoints").glob(".writing-step_*"))


@pytest.mark.slow
def test_killed_three_times_and_resumed_ends_with_the_same_bits(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "data")
    align = AlignConfig(method="infoclip", samples="pixel", center=True)
    config = tmp_path / "config.json"
    save_config(tiny_config(root, align, steps=STEPS, checkpoint_every=6), config)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(config, whole)

    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of the kill points: {seed}")  # shown when the test fails
    chance = random.Random(seed)
    first = chance.randrange(2, 12)
    kill_when(config, cut, lambda: steps_logged(cut) >= first)
    assert not (cut / "model").exists()

    # during a checkpoint: its temporary folder is there, and is left behind
    later = chance.randrange(13, 20)
    kill_when(config, cut, lambda: steps_logged(cut) >= later and bool(unfinished(cut)), "--resume", "workers=1")
    left = unfinished(cut)
    assert left, "the kill came after the checkpoint was complete"
    assert not (left[0] / ckpt.MARKER).exists() or not ckpt.is_complete(
        ckpt.checkpoint_path(cut / "checkpoints", STEPS)
    )

    last = chance.randrange(26, STEPS - 2)
    kill_when(config, cut, lambda: steps_logged(cut) >= last, "--resume", "workers=2")
    run(config, cut, "--resume")

    a, b = (load_file(out / "model" / "model.safetensors") for out in (whole, cut))
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    states = [ckpt.load_checkpoint(ckpt.checkpoint_path(out / "checkpoints", STEPS)) for out in (whole, cut)]
    for part in ("segmentor", "objective", "optimizer"):
        first_part, second_part = (dict(leaves(state[part])) for state in states)
        assert first_part.keys() == second_part.keys()
        assert [name for name in first_part if not torch.equal(first_part[name], second_part[name])] == []
    lines = [read_log(out / "log.jsonl") for out in (whole, cut)]
    assert [line["step"] for line in lines[1]] == list(range(1, STEPS + 1))
    assert [line["losses"] for line in lines[0]] == [line["losses"] for line in lines[1]]
    assert not unfinished(cut)


@pytest.mark.slow  # four starts of the command
def test_a_killed_run_of_masks_ends_with_the_same_bits(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    save_config(mask_config(tmp_path, steps=8, checkpoint_every=3), config)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(config, whole)
    kill_when(config, cut, lambda: steps_logged(cut) >= 2)  # before there is a checkpoint
    kill_when(config, cut, lambda: steps_logged(cut) >= 5, "--resume", "workers=1")
    run(config, cut, "--resume")
    a, b = (load_file(out / "model" / "model.safetensors") for out in (whole, cut))
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    lines = [read_log(out / "log.jsonl") for out in (whole, cut)]
    assert [line["losses"] for line in lines[0]] == [line["losses"] for line in lines[1]]


def leaves(tree: dict[str, object], prefix: str = "") -> list[tuple[str, torch.Tensor]]:
    found = []
    for key, value in tree.items():
        if isinstance(value, dict):
            found += leaves(value, f"{prefix}{key}/")
        elif isinstance(value, torch.Tensor):
            found.append((prefix + key, value))
    return found
