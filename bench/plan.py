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

from bench.arguments import output_file
from infoclip.budget import format_bytes

__all__ = ["CASES", "Case", "main", "run_case"]


@dataclass(frozen=True)
class Case:
    classes: int
    batch: int
    budget: str


CASES = (
    Case(20, 2, "1600MiB"),
    Case(20, 2, "3GiB"),
    Case(20, 2, "auto"),
    Case(171, 2, "1800MiB"),
    Case(171, 2, "3GiB"),
    Case(171, 2, "auto"),
    Case(847, 1, "2GiB"),
    Case(847, 1, "3GiB"),
    Case(847, 1, "auto"),
)
SECONDS = {20: 35, 171: 75, 847: 75}
"""About what a case takes on two cores, its process and its plan included."""
LIMIT = 600
"""Seconds after which a case is stopped and counts as broken."""


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
            depth = np.uint8 if case.classes < 255 else np.uint16
            labels = random.integers(0, case.classes, (384, 384), dtype=depth)
            Image.fromarray(labels).save(folder / f"masks/{i}.png")
        (folder / "classes.txt").write_text("\n".join(f"kind of thing {i}" for i in range(case.classes)) + "\n")
        config = apply_overrides(
            get_recipe("infoclip-vitb16-coco"),
            [
                "clip.pretrained=", "data.kind=folders", "data.images=images", "data.masks=masks", "data.workers=0",
                f"data.root={folder}", f"data.classes={folder / 'classes.txt'}", f"data.batch_size={case.batch}",
                "align.samples=pixel", f"model.memory={case.budget}", f"train.steps={steps}", "train.log_every=1",
                f"data.ignore_index={255 if case.classes < 255 else 65535}", "train.image_every=0", "train.device=cpu",
                *overrides,
            ],
        )  # fmt: skip
        before, start = psutil.Process().memory_info().rss, time.perf_counter()
        train(config, folder / "run", progress=False)
        seconds = time.perf_counter() - start
        events = read_events(folder / "run" / "log.jsonl")
    plan = events[0]
    return {
        "settings": plan["settings"],
        "budget": plan["budget"],
        "counted": plan["total"],
        "parts": plan["footprint"],
        "measured": int(peak_memory_mib("cpu") * 2**20) - before,
        "events": [event["event"] for event in events[1:]],
        "seconds": seconds,
    }


def _in_child(case: Case, overrides: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.plan", "--case", json.dumps([case.classes, case.batch, case.budget])]
    try:
        done = subprocess.run([*command, *overrides], capture_output=True, text=True, check=False, timeout=LIMIT)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"not done after {LIMIT} s") from error
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
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="also write the figures there, beside those it holds"
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.case:
        print(json.dumps(run_case(Case(*json.loads(options.case)), options.overrides)))
        return 0
    from bench.harness import machine

    cases = [case for case in CASES if options.classes in (None, case.classes)]
    minutes = sum(SECONDS[case.classes] for case in cases) / 60
    print(f"{len(cases)} cases, about {minutes:.0f} minutes on two cores", file=sys.stderr)
    print(f"{machine()}\n\nViT-B/16, 384 px, float32, one step\n", flush=True)
    print("| classes | batch | budget | mode | classes at once | micro-batch | counted | with allowance | resident |")
    print("|---|---|---|---|---|---|---|---|---|")
    broken = []
    rows = json.loads(options.json.read_text())["rows"] if options.json and options.json.exists() else []
    for case in cases:
        try:
            found = _in_child(case, options.overrides)
        except RuntimeError as error:
            broken.append(f"{case.classes} classes, {case.budget}: {error}")
            continue
        s = found["settings"]
        print(
            f"| {case.classes} | {case.batch} | {case.budget} | {s['mode']} | {s['chunk']} | {s['micro_batch']} "
            f"| {format_bytes(found['counted'] - found['parts']['allowance'])} | {format_bytes(found['counted'])} "
            f"| {format_bytes(found['measured'])} |",
            flush=True,
        )
        rows = [row for row in rows if (row["classes"], row["asked"]) != (case.classes, case.budget)]
        rows.append({"classes": case.classes, "batch": case.batch, "asked": case.budget, **found})
        if found["measured"] > found["budget"]:
            broken.append(f"{case.classes} classes: {format_bytes(found['measured'])} of {case.budget}")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    print()
    print("\n".join(f"BROKEN {fault}" for fault in broken) or "Every budget is kept.")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
