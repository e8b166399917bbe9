"""``python -m bench step``: a whole training step of a published recipe, timed against the plain form in one run.

The step is the trainer's own: CLIP student and frozen teacher, text, cost aggregation, segmentation loss, InfoCLIP's
objective, backward, clipping, AdamW; random weights and one batch of noise, so that reading data is not in it. The
plain form is the published code's way: the aggregation as specified (``reference``), ops by their PyTorch references,
the whole text context of 77 tokens. Of MAFT+ the step is CLIP student and teacher, both decoders, matching, criterion,
mask-aware and compensation loss; its plain form also takes the published code's second, identical pass through the
student, and resizes every proposal to the picture for the overlaps. Weights stay as they are (learning rates of 0, the
same arithmetic), so that every form must give the same loss. Forms take turns; the ratio is of medians. ``compiled``
is the plain form through ``torch.compile``.

The floor is what the step's matrix products and convolutions take at the machine's measured matrix rate, in the form
that has the fewest (``fast``), counted by torch's dispatcher.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.arguments import output_file
from bench.peak import give_back, reset_peak, resident

__all__ = ["Form", "main", "plain_code", "time_steps"]

MODES = ("plain", "fast", "balanced", "lean")
FORMS = (*MODES, "compiled")
RECIPES = {
    "vitb16": "infoclip-vitb16-coco",
    "vitl14": "infoclip-vitl14-coco",
    "maftplus-base": "maftplus-base",
    "maftplus-large": "maftplus-large",
}
SIZE = (800, 1216)
"""Height and width of MAFT+'s pictures, as published for a photo of 2 to 3; a ``data.crop`` takes its place."""
OBJECTS = 8
"""Classes in a picture of MAFT+'s, each of which is one object."""
SAME = {"float32": 1e-4, "bfloat16": 3e-2}
"""Largest relative difference of the loss to the plain float32 form's: another order of sums; 8 bits of mantissa."""


@dataclass
class Form:
    """Of one form of the step: seconds a round, peak bytes beyond what was there before, and the loss."""

    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    loss: float = float("nan")

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def build(recipe: str, classes: int, batch: int, device: str, folder: Path, overrides: list[str]) -> Any:
    """The trainer of a recipe on one batch of noise, its weights held still."""
    from infoclip.config import apply_overrides
    from infoclip.data.classes import load_classes
    from infoclip.engine.train import build_run
    from infoclip.recipes import get_recipe

    names = load_classes("coco_stuff_171")[:classes]
    names += [f"thing {i}" for i in range(classes - len(names))]
    # one map a picture: samples=batch compares pictures, of which one has nothing to be told from
    base = get_recipe(recipe)
    masks = base.system != "catseg"
    samples = ["align.samples=pixel"] if batch == 1 and not masks else []
    if masks:
        samples = ["data.resize=0", "data.scales=", "data.crop=0", "data.flip=false"]
    config = apply_overrides(
        base,
        ["clip.pretrained=", "data.kind=folders", f"data.root={folder}", "data.images=images", "data.masks=masks",
         f"data.classes={folder / 'names.json'}",
         f"data.batch_size={batch}", "data.workers=0", f"train.device={device}", *samples, *overrides],
    )  # fmt: skip
    if masks:
        _write_data(folder, names, (config.data.crop, config.data.crop) if config.data.crop else SIZE, OBJECTS)
    else:
        _write_data(folder, names, (config.clip.image_size, config.clip.image_size), 255)
    run = build_run(config, folder / "run", torch.device(device))
    assert run.loader is not None
    run.loader = itertools.repeat(next(run.loader))  # type: ignore[assignment]
    for group in run.optimizer.param_groups:
        group["initial_lr"] = group["lr"] = 0.0
        group["weight_decay"] = 0.0
    run.data_wait = 0.0
    run.step = run.config.align.start_step + run.config.align.ramp_steps  # the objective at its full weight
    return run


def _write_data(folder: Path, names: list[str], size: tuple[int, int], present: int) -> None:
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "names.json").write_text(json.dumps(names))
    for i in range(4):
        pixels = random.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{i}.png")
        blocks = random.integers(0, min(len(names), present), (8, 8), dtype=np.uint8)
        mask = blocks.repeat(-(-size[0] // 8), axis=0).repeat(-(-size[1] // 8), axis=1)[: size[0], : size[1]]
        Image.fromarray(mask).save(folder / f"masks/{i}.png")


@contextlib.contextmanager
def _as(run: Any, mode: str, dtype: str) -> Iterator[None]:
    """The trainer in a form and a precision."""
    from infoclip.engine.planner import Settings

    run.config = dataclasses.replace(
        run.config,
        train=dataclasses.replace(run.config.train, precision="bf16" if dtype == "bfloat16" else "fp32"),
    )
    with contextlib.ExitStack() as stack:
        if mode in ("plain", "compiled"):
            stack.enter_context(plain_code())
        if mode == "compiled":
            stack.enter_context(mock.patch.object(run.segmentor, "forward", _compiled(run.segmentor)))
        form = "reference" if mode in ("plain", "compiled") else mode
        run._use(Settings(form, 0, run.config.data.batch_size))
        yield


@functools.lru_cache(maxsize=1)
def _compiled(segmentor: torch.nn.Module) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(segmentor.forward, dynamic=False)
    return compiled


def least_operations(run: Any) -> int:
    """Of a step in the form that has the fewest: matrix products, attention and convolutions, both passes."""
    from bench.bounds import counted_flops
    from infoclip.kernels import use_backend

    with _as(run, "fast", "float32"), use_backend("reference"), counted_flops() as counter:
        run._train_step()
    count: int = counter.get_total_flops()
    return count


def matrix_rate(device: str, dtype: str) -> float:
    """FLOP/s: of several products and a convolution the best median."""
    from bench.harness import DTYPES, calibrated
    from bench.measure import FORMS as PRODUCTS

    best = 0.0
    for make in PRODUCTS.values():
        product, operations = make(device, DTYPES[dtype])
        product, rounds = calibrated(product, device, budget=0.5)
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            product()
            seconds.append(time.perf_counter() - start)
        best = max(best, operations / statistics.median(seconds))
    return best


@contextlib.contextmanager
def plain_code() -> Iterator[None]:
    """Beside the memory mode ``reference``: ops by their references, and what the published code does in vain."""
    from infoclip.clip import ConvNeXtCLIP, DenseCLIP
    from infoclip.kernels import use_backend

    with (
        use_backend("reference"),
        mock.patch.object(DenseCLIP, "_cuts_context", False),
        mock.patch.object(ConvNeXtCLIP, "encode_image", _twice(ConvNeXtCLIP.encode_image)),
        mock.patch("infoclip.objective.mask_aware.soft_iou", _resized_iou),
    ):
        yield


def _twice(encode: Callable[..., Any]) -> Callable[..., Any]:
    """The published code's passes through the tuned CLIP: one for the decoders, one more for the other losses."""

    def passes(clip: Any, image: torch.Tensor) -> Any:
        if torch.is_grad_enabled():
            encode(clip, image)
        return encode(clip, image)

    return passes


@torch.no_grad()
def _resized_iou(mask_logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:  # [Q, h, w], [n, H, W] -> [n, Q]
    """The published form of ``soft_iou``: every proposal at the size of the picture."""
    proposals = mask_logits.float().sigmoid()[None]
    large = torch.nn.functional.interpolate(proposals, size=masks.shape[1:], mode="bilinear")[0].flatten(1)
    objects = masks.to(large.dtype).flatten(1)
    common = objects @ large.mT
    return common / (objects.sum(dim=1)[:, None] + large.sum(dim=1) - common + 1e-7)


def time_steps(run: Any, modes: list[str], dtype: str, rounds: int, shown: bool = True) -> dict[str, Form]:
    """Every form's step, ``rounds`` times in turn, after one of each that is not counted.

    Raises:
        RuntimeError: a form's loss differs from the first one's by more than its precision's roundings.
    """
    from infoclip.progress import tracked

    cuda = run.device.type == "cuda"
    found = {mode: Form() for mode in modes}
    order = [(r, mode) for r in range(rounds + 1) for mode in modes]
    for r, mode in tracked(order, "training steps", shown, total=len(order)):
        run.sums, run.counts = {}, {}
        run.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            give_back()
            reset_peak()
            before = resident("VmRSS")
        with _as(run, mode, dtype):
            start = time.perf_counter()
            run._train_step()
            if cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        form = found[mode]
        form.loss = float(run.sums["loss"])
        form.peak = max(form.peak, (torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")) - before)
        if r:
            form.seconds.append(seconds)
        first = found[modes[0]].loss
        if not abs(form.loss - first) <= SAME[dtype] * abs(first):
            raise RuntimeError(f"{mode}: the loss is {form.loss:.6g}, that of {modes[0]} {first:.6g}")
    return found


def rows(found: dict[str, Form], batch: int, floor: float) -> list[dict[str, Any]]:
    """A row a form; the ratio and the least ratio that the rounds allow are to the first. ``floor`` in seconds."""
    base = next(iter(found.values()))
    return [
        {
            "mode": mode, "median_s": x.median, "seconds": x.seconds, "images_per_second": batch / x.median,
            "ratio": base.median / x.median, "least_ratio": min(base.seconds) / max(x.seconds),
            "of_the_floor": floor / x.median, "peak_bytes": x.peak, "loss": x.loss,
        }
        for mode, x in found.items()
    ]  # fmt: skip


def show(table: list[dict[str, Any]]) -> None:
    print(
        f"| form | median s | rounds s | images/s | x {table[0]['mode']} (at least) | of the floor | peak GB | loss |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for x in table:
        each = ", ".join(f"{seconds:.2f}" for seconds in x["seconds"])
        print(
            f"| {x['mode']} | {x['median_s']:.2f} | {each} | {x['images_per_second']:.3g} "
            f"| {x['ratio']:.2f} ({x['least_ratio']:.2f}) | {x['of_the_floor']:.0%} "
            f"| {x['peak_bytes'] / 1e9:.2f} | {x['loss']:.5f} |"
        )


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 when a form gives another loss."""
    from bench.harness import machine

    parser = argparse.ArgumentParser(
        prog="python -m bench step",
        description="A whole training step, in the published code's form and in ours, timed in one run. On two CPU "
        "cores a round of all forms takes two minutes at 171 classes, and the plain form some 15 GB. MAFT+'s pictures "
        f"have {SIZE[0]} x {SIZE[1]} pixels, or those of a square data.crop.",
    )
    parser.add_argument("--modes", default=",".join(MODES), help=f"some of {', '.join(FORMS)}; the first is the base")
    parser.add_argument("--model", choices=RECIPES, default="vitb16", help="the recipe's CLIP (default: vitb16)")
    parser.add_argument("--classes", type=int, default=171, metavar="T", help="default: 171")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="images a step (default: 1)")
    parser.add_argument("--dtype", choices=tuple(SAME), default="float32", help="bfloat16: autocast")
    parser.add_argument("--rounds", type=int, default=3, metavar="R", help="counted rounds (default: 3)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write the table as JSON")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the recipe to change")
    options = parser.parse_args(argv)
    modes = [mode.strip() for mode in options.modes.split(",") if mode.strip()]
    if not modes or set(modes) - set(FORMS) or len(set(modes)) < len(modes):
        parser.error(f"--modes {options.modes}: expected some of {', '.join(FORMS)}, each once")
    if "compiled" in modes and options.model.startswith("maftplus"):
        parser.error("--modes compiled: expected vitb16 or vitl14; the mask decoder reads values back from the device")
    for name in ("classes", "batch", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    from infoclip.errors import InfoclipError

    with tempfile.TemporaryDirectory(prefix="infoclip-bench-") as folder:
        try:
            run = build(
                RECIPES[options.model], options.classes, options.batch, options.device, Path(folder), options.overrides
            )
            rate = matrix_rate(options.device, options.dtype)
            found = time_steps(run, modes, options.dtype, options.rounds)
            operations = least_operations(run)
        except InfoclipError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        except RuntimeError as error:
            print(f"error: {error}, so there is no table.", file=sys.stderr)
            return 1
    line = machine()
    table = rows(found, options.batch, operations / rate)
    side = run.config.clip.image_size if run.config.system == "catseg" else run.config.data.crop
    size = (side, side) if side else SIZE
    what = f"{options.model}, {size[0]} x {size[1]} px, {options.classes} classes, batch {options.batch}"
    what += f", {options.dtype} on {options.device}"
    print(f"{line}\n\nwhole training step, {what}")
    print(f"{operations / 1e9:,.4g} GFLOP at {rate / 1e9:,.0f} GFLOP/s: floor {operations / rate:.3g} s\n")
    show(table)
    if options.json:
        text = json.dumps(
            {"machine": line, "case": what, "operations": operations, "rate": rate, "rows": table}, indent=1
        )
        options.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
