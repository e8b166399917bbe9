"""Training in two processes on the CPU: what one process computes, and how faults end both."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image
from training_data import INFOCLIP, tiny_config, weights, write_folders

from infoclip.config import Config, apply_overrides, load_config, save_config
from infoclip.data.folders import FolderDataset
from infoclip.data.loader import ResumableLoader
from infoclip.engine.log import read_events, read_log
from infoclip.engine.train import train
from infoclip.errors import InfoclipError
from infoclip.model import build_segmentor
from infoclip.workers import Workers, run_in_processes

pytestmark = pytest.mark.filterwarnings("ignore::infoclip.errors.InfoclipWarning")

# Two processes start in some five seconds each, most of it importing torch: they take as many runs as can be.
slow = pytest.mark.slow

RUNS: dict[str, list[str]] = {
    "pixel": ["train.ignored=masked", "data.batch_size=3", "train.grad_accumulation=2"],
    "batch": ["align.samples=batch", "data.batch_size=3", "data.sample_classes=0"],
    "lean": ["model.memory=lean", "data.batch_size=3", "data.crop=0", "data.resize=0"],
    "few": ["data.sample_classes=1", "clip.tune=full"],
}
"""Uneven parts, labelled pixels and classes that only one process has, both gradients of a coupled loss, recomputed
text, pictures of several sizes, fewer classes than would make two parts."""


def settings(data: Path, name: str, steps: int = 3) -> Config:
    config = tiny_config(data, INFOCLIP, steps=steps, checkpoint_every=2)
    # A second of Adam's tiny steps would make a gradient of pure rounding as large as any other.
    return apply_overrides(config, ["optim.eps=1e-3", "optim.clip_grad_norm=0", *RUNS[name]])


def stopped(config: Config, out: Path, after: int) -> None:
    """A run that ends by an interrupt; the checkpoint is that of step 2."""
    from infoclip.engine import train as module

    step = module.Run._train_step

    def counted(self: Any) -> Any:
        if self.step == after:
            raise KeyboardInterrupt
        return step(self)

    module.Run._train_step = counted  # type: ignore[method-assign]
    try:
        train(config, out, progress=False)
    except KeyboardInterrupt:
        pass
    finally:
        module.Run._train_step = step  # type: ignore[method-assign]


def short_once(config: Config, out: Path, at: int, rank: int) -> None:
    """Memory runs out in one process's forward pass."""
    import torch.distributed as dist

    from infoclip.engine import train as module

    forward, left = module.Run._forward, [1]

    def failing(self: Any, *args: Any) -> Any:
        if self.step == at and dist.get_rank() == rank and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, *args)

    module.Run._forward = failing  # type: ignore[method-assign]
    try:
        train(config, out, progress=False)
    finally:
        module.Run._forward = forward  # type: ignore[method-assign]


def caught(work: Any, *args: Any, **options: Any) -> str:
    try:
        work(*args, **options)
    except InfoclipError as error:
        return f"{type(error).__name__}: {error}{'' if error.shared else ' (of this process alone)'}"
    return ""


def every_run(data: Path, out: Path) -> dict[str, Any]:
    """All that a pair of processes is asked; the first one's answer."""
    import torch.distributed as dist

    for name in RUNS:
        train(settings(data, name), out / name, progress=False)
    stopped(settings(data, "pixel"), out / "cut", 2)
    short_once(settings(data, "pixel"), out / "short", 1, rank=1)
    train(settings(data, "pixel"), out / "alone-cut", resume=True, progress=False)  # one process began it
    said = {
        "batch": caught(train, apply_overrides(settings(data, "few"), ["data.batch_size=1"]), out / "x"),
        "folder": caught(train, settings(data, "pixel"), out / "pixel"),
        "damaged": caught(train, settings(data.parent / "damaged", "pixel"), out / "damaged"),
        "memory": caught(train, apply_overrides(settings(data, "few"), ["model.memory=1MiB"]), out / "y"),
        "finite": caught(train, apply_overrides(settings(data, "pixel"), ["optim.lr=1e30"]), out / "z"),
    }
    every: list[Any] = [None, None]
    dist.all_gather_object(every, said)
    return {"said": every}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    data = write_folders(folder / "data")
    for i, size in enumerate(((36, 60), (64, 40), (48, 48))):  # beside 48 x 40
        for name in ("images", "masks"):
            path = data / name / f"{i}.png"
            with Image.open(path) as image:
                image.resize(size, Image.Resampling.NEAREST).save(path)
    damaged = write_folders(folder / "damaged")
    (damaged / "images/3.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def answers(place: Path) -> dict[str, Any]:
    """What one process leaves in ``one``, and two in ``two``."""
    for name in RUNS:
        train(settings(place / "data", name), place / "one" / name, progress=False)
    stopped(settings(place / "data", "pixel"), place / "two/alone-cut", 2)
    return run_in_processes(2, every_run, place / "data", place / "two")


def assert_close(a: Path, b: Path) -> None:
    """The steps moved all parameters by the same vector, but for a hundredth of its length.

    A batch taken apart adds up in another order, in one process as in two, and where a ReLU's input is rounding alone
    the order decides whether it lets a gradient through: 3e-5 of the first gradient on these data, in every memory
    mode, which the later steps grow. A wrong share or a part counted twice changes the gradient by a tenth and more.
    """
    config = load_config(a / "config.json")
    torch.manual_seed(config.train.seed)
    start = build_segmentor(config).published_state_dict()
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    learnt = [name for name in first if first[name].is_floating_point()]
    moved = sum(float((first[name].double() - start[name].double()).square().sum()) for name in learnt)
    apart = sum(float((first[name].double() - second[name].double()).square().sum()) for name in learnt)
    assert moved > 0
    print(f"relative difference {(apart / moved) ** 0.5:.1e}")
    assert apart <= 1e-4 * moved, (apart / moved) ** 0.5


@slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_compute_what_one_does(answers: dict[str, Any], place: Path, name: str) -> None:
    assert_close(place / "one" / name, place / "two" / name)
    lines = [read_log(place / kind / name / "log.jsonl") for kind in ("one", "two")]
    assert [line["step"] for line in lines[1]] == [1, 2, 3]
    for one, two in zip(*lines, strict=True):
        assert two["losses"].keys() == one["losses"].keys()
        # losses of 0.1 to 3 in float32, whose parameters agree as above
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-4, abs=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


@slow
@pytest.mark.parametrize("begun", ["cut", "alone-cut"])
def test_a_run_goes_on_with_another_number_of_processes(answers: dict[str, Any], place: Path, begun: str) -> None:
    if begun == "cut":
        train(settings(place / "data", "pixel"), place / "two/cut", resume=True, progress=False)
    assert_close(place / "one/pixel", place / "two" / begun)
    assert [line["step"] for line in read_log(place / "two" / begun / "log.jsonl")] == [1, 2, 3]


@slow
def test_memory_that_runs_out_in_one_process_lowers_both(answers: dict[str, Any], place: Path) -> None:
    (event,) = read_events(place / "two/short/log.jsonl")
    assert event["step"] == 2
    assert event["settings"]["mode"] == "balanced"
    assert event["shortage"] == "process 2 of 2: CUDA out of memory."
    assert_close(place / "one/pixel", place / "two/short")


@slow
@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (
            "batch",
            "ConfigError: data.batch_size is 1, the batch that all processes share.* 2; start at most 1",
        ),
        ("folder", "ConfigError: .*already holds a run"),
        ("damaged", "DataError: .*3.png"),
        ("memory", "ConfigError: model.memory is 1MiB, but the leanest step"),
        ("finite", r"NonFiniteLossError: .* at step 2, batch (\S+.png, ){5}\S+.png; there is no checkpoint yet"),
    ],
)
def test_a_fault_ends_both_with_the_same_sentence(answers: dict[str, Any], kind: str, sentence: str) -> None:
    first, second = (said[kind] for said in answers["said"])
    assert re.match(sentence, first), first
    assert second == first


@slow
def test_torchrun_says_a_fault_once(place: Path, tmp_path: Path) -> None:
    save_config(settings(place / "damaged", "pixel"), tmp_path / "config.json")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "infoclip"]
    done = subprocess.run(
        [*command, "train", str(tmp_path / "config.json"), "--out", str(tmp_path / "run")],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        f"error: Cannot read the image {place / 'damaged/images/3.png'}: it is not a picture in a known format; "
        "replace or remove it."
    ]
    assert not (tmp_path / "run/model").exists()


@slow  # one that is killed: test_evaluate.py
def test_an_interrupt_ends_all(place: Path, tmp_path: Path) -> None:
    save_config(apply_overrides(settings(place / "data", "few"), ["train.steps=100000"]), tmp_path / "config.json")
    out = tmp_path / "run"
    command = [sys.executable, "-m", "infoclip", "train", str(tmp_path / "config.json"), "--out", str(out)]
    with subprocess.Popen(
        [*command, "--processes", "2", "--quiet"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        # A shell has what it starts in the background ignore the interrupt, and all below it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as run:  # fmt: skip
        try:
            until, log = time.monotonic() + 300, out / "log.jsonl"
            while not log.exists() or log.read_bytes().count(b"\n") < 3:
                assert run.poll() is None, run.communicate()[1]
                assert time.monotonic() < until, "no step in five minutes"
                time.sleep(0.05)
            below = psutil.Process(run.pid).children(recursive=True)
            assert sum("spawn_main" in " ".join(process.cmdline()) for process in below) == 2
            os.killpg(run.pid, signal.SIGINT)  # as a terminal's Ctrl-C does
            _, errors = run.communicate(timeout=120)
        except BaseException:
            os.killpg(run.pid, signal.SIGKILL)
            raise
    assert run.returncode == 130, errors
    sentence = rf"error: interrupted; the same command with --resume continues {out} from its newest checkpoint\."
    assert re.fullmatch(sentence, errors.strip()), errors
    assert not psutil.wait_procs(below, timeout=30)[1]


def test_parts_of_a_batch_are_the_whole_batch(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "data")
    dataset = FolderDataset(root / "images", root / "masks", ["a", "b", "c", "d", "e"])
    whole = ResumableLoader(dataset, 5, seed=3)
    parts = [ResumableLoader(dataset, 5, seed=3, part=Workers(rank, 3).part(5)) for rank in range(3)]
    for _ in range(4):
        batch, pieces = next(whole), [next(part) for part in parts]
        assert [len(piece["files"]) for piece in pieces] == [1, 2, 2]
        for key in ("image", "mask"):
            assert torch.equal(torch.cat([piece[key] for piece in pieces]), batch[key])
        assert [name for piece in pieces for name in piece["files"]] == batch["files"]
    assert {part.consumed for part in parts} == {whole.consumed}
