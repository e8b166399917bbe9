"""``python -m bench plan``: is a training step within the memory that its plan was made for?

Each case is a process of its own that trains one step of the published ViT-B/16 model (random weights and images) under
a budget. What it took is the most that was resident beyond what the process held before the model was built. The
command fails when a case took more than its budget.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infoclip.budget import format_bytes, parse_budget

__all__ = ["CASES", "Case", "main", "run_case"]


@dataclass(frozen=True)
class Case:
    classes: int
    batch: int
    budget: str


CASES = (
    Case(20, 2, "1600MiB"),
    Case(20, 2, "3GiB"),
    Case(171, 2, "1700MiB"),
    Case(171, 2, "3GiB"),
    Case(171, 2, "8GiB"),
    Case(847, 1, "1800MiB"),
    Case(847, 1, "3GiB"),
)


def run_case(case: Case, overrides: list[str], steps: int = 1) -> dict[str, Any]:
    """Train in this process and say what was planned and taken."""
    import numpy as np
    import psutil
    from PIL import Image

    from infoclip.config import apply_overrides
    from infoclip.engine.environment import peak_memory_mib
    from infoclip.engine.log import read_events
    from infoclip.engine.train import train
    from infoclip.recipes import get_recipe

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random = np.random.default_rng(0)
        for kind in ("images", "masks"):
            (folder / kind).mkdir()
        for i in range(case.batch):
            pixels = random.integers(0, 256, (384, 384, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"images/{i}.png")
            labels = random.integers(0, min(case.classes, 200), (384, 384), dtype=np.uint8)
            Image.fromarray(labels).save(folder / f"masks/{i}.png")
        (folder / "classes.txt").write_text("\n".join(f"kind of thing {i}" for i in range(case.classes)) + "\n")
        config = apply_overrides(
            get_recipe("infoclip-vitb16-coco"),
            [
                "clip.pretrained=", "data.kind=folders", "data.images=images", "data.masks=masks", "data.workers=0",
                f"data.root={folder}", f"data.classes={folder / 'classes.txt'}", f"data.batch_size={case.batch}",
                "align.samples=pixel", f"model.memory={case.budget}", f"train.steps={steps}", "train.log_every=1",
                "train.image_every=0", "train.device=cpu", *overrides,
            ],
        )  # fmt: skip
        before, start = psutil.Process().memory_info().rss, time.perf_counter()
        train(config, folder / "run", progress=False)
        seconds = time.perf_counter() - start
        events = read_events(folder / "run" / "log.jsonl")
    plan = events[0]
    return {
        "settings": plan["settings"],
        "counted": plan["total"],
        "parts": plan["footprint"],
        "measured": int(peak_memory_mib("cpu") * 2**20) - before,
        "events": [event["event"] for event in events[1:]],
        "seconds": seconds,
    }


def _in_child(case: Case, overrides: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.plan", "--case", json.dumps([case.classes, case.batch, case.budget])]
    done = subprocess.run([*command, *overrides], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "the process was killed")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    """Print the sweep; 1 when a budget is broken."""
    parser = argparse.ArgumentParser(
        prog="python -m bench plan",
        description="One training step of the published model under each budget, in a process of its own.",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings to change in every case")
    parser.add_argument("--classes", type=int, metavar="T", help="only the cases with so many classes")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.case:
        print(json.dumps(run_case(Case(*json.loads(options.case)), options.overrides)))
        return 0
    from bench.harness import machine

    print(f"{machine()}\n\nViT-B/16, 384 px, float32, one step\n", flush=True)
    print("| classes | batch | budget | mode | classes at once | micro-batch | counted | with allowance | resident |")
    print("|---|---|---|---|---|---|---|---|---|")
    broken = []
    for case in CASES:
        if options.classes not in (None, case.classes):
            continue
        try:
            found = _in_child(case, options.overrides)
        except RuntimeError as error:
            broken.append(f"{case.classes} classes, {case.budget}: {error}")
            continue
        s = found["settings"]
        print(
            f"| {case.classes} | {case.batch} | {case.budget} | {s['mode']} | {s['chunk']} | {s['micro_batch']} "
            f"| {format_bytes(sum(found['parts'].values()))} | {format_bytes(found['counted'])} "
            f"| {format_bytes(found['measured'])} |",
            flush=True,
        )
        if found["measured"] > parse_budget(case.budget):
            broken.append(f"{case.classes} classes: {format_bytes(found['measured'])} of {case.budget}")
    print()
    print("\n".join(f"BROKEN {fault}" for fault in broken) or "Every budget is kept.")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
