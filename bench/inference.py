"""``python -m bench inference``: a picture through ViT-B/16 with random weights: time and memory, ours against plain.

Two parts, each in a process of its own. ``views``: one view of 384 pixels and 171 classes, the published size, in the
plain form (the aggregation as specified, ops by their PyTorch references), ours, and ours in bfloat16; forms take turns
and the ratio is of medians. ``vocabulary``: a picture of 640 x 640 by the published sliding window (windows of 384
and the whole picture), 847 classes in 80 prompts each, within a memory budget: seconds, and the most that was resident
beyond what the process held before the model was built. The text bank is random, of the real size: a class list is
embedded once, whatever the pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from bench.arguments import output_file
from bench.peak import give_back, reset_peak, resident

__all__ = ["main", "views", "vocabulary"]

PARTS = ("views", "vocabulary")
FORMS = {"plain": ("reference", "fp32"), "ours": ("fast", "fp32"), "ours bf16": ("fast", "bf16")}
SAME = {"fp32": 1e-4, "bf16": 5e-2}
"""Largest relative difference of the logits to the plain form's: another order of sums; 8 bits of mantissa."""
LEAST = 2.5
"""Times the plain form's speed that ours has at least, in float32."""
BUDGET = "4GB"


def _build(templates: str = "catseg") -> Any:
    from infoclip.config import apply_overrides
    from infoclip.model import build_segmentor
    from infoclip.recipes import get_recipe

    torch.manual_seed(0)
    config = apply_overrides(get_recipe("infoclip-vitb16-coco"), ["clip.pretrained=", f"clip.templates={templates}"])
    return build_segmentor(config).eval(), config


def views(classes: int, rounds: int) -> dict[str, Any]:
    """Seconds and peak of one view in each form, after a round that is not counted.

    Raises:
        RuntimeError: a form gives other logits than the plain one.
    """
    from infoclip.kernels import use_backend

    segmentor, _ = _build()
    image = torch.randn(1, 3, 384, 384)
    text = torch.nn.functional.normalize(torch.randn(classes, 1, 512), dim=-1)
    found: dict[str, Any] = {name: {"seconds": [], "peak": 0} for name in FORMS}
    plain = None
    for r in range(rounds + 1):
        for name, (mode, precision) in FORMS.items():
            segmentor.use_memory(mode)
            give_back()
            reset_peak()
            before, start = resident("VmRSS"), time.perf_counter()
            with (
                torch.inference_mode(),
                use_backend("reference") if name == "plain" else contextlib.nullcontext(),
                torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
            ):
                logits = segmentor(image, text).logits
            seconds = time.perf_counter() - start
            found[name]["peak"] = max(found[name]["peak"], resident("VmHWM") - before)
            plain = logits if plain is None else plain
            difference = float((logits.float() - plain).norm() / plain.norm())
            if difference > SAME[precision]:
                raise RuntimeError(f"{name}: the logits differ by {difference:.1e} from the plain form's")
            found[name]["difference"] = difference
            if r:
                found[name]["seconds"].append(seconds)
    base = statistics.median(found["plain"]["seconds"])
    for row in found.values():
        row["median"] = statistics.median(row["seconds"])
        row["ratio"] = base / row["median"]
    return found


def vocabulary(classes: int, side: int, budget: str, precision: str) -> dict[str, Any]:
    """Seconds and peak of one picture by sliding window within a budget, everything from building the model on."""
    from infoclip.engine.serving import plan_serving
    from infoclip.model.inference import predict_labels

    before = resident("VmRSS")
    reset_peak()
    segmentor, config = _build("imagenet")
    prompts = segmentor.num_templates
    plan = plan_serving(budget, segmentor, classes, 16, config.eval, precision)
    text = torch.nn.functional.normalize(torch.randn(classes, prompts, 512), dim=-1)
    image = torch.randint(0, 256, (3, side, side), dtype=torch.uint8)
    start = time.perf_counter()
    _, labels = predict_labels(segmentor, image, text, config.eval, plan.serving)
    seconds = time.perf_counter() - start
    return {
        "plan": str(plan), "classes": classes, "prompts": prompts, "side": side, "precision": precision,
        "budget": plan.budget, "counted": plan.total, "peak": resident("VmHWM") - before, "seconds": seconds,
        "labels": len(labels.unique()),
    }  # fmt: skip


def _in_child(arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.inference", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "the process was killed")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(argv: list[str] | None = None) -> int:
    """Print both tables; 1 when ours is less than 2.5 times as fast as the plain form, or a budget is broken."""
    parser = argparse.ArgumentParser(
        prog="python -m bench inference",
        description="A picture through ViT-B/16: time and memory, ours and the plain form (2 minutes on 2 cores).",
    )
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part (default: both)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of the views' forms (default: 3)")
    parser.add_argument("--classes", type=int, metavar="T", help="default: 171 for views, 847 for the vocabulary")
    parser.add_argument("--memory", default=BUDGET, metavar="AMOUNT", help=f"of the vocabulary (default: {BUDGET})")
    parser.add_argument("--precision", default="fp32", help="of the vocabulary: fp32 or bf16")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write the figures there")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    parts = options.part or list(PARTS)
    if options.child:
        if parts == ["views"]:
            print(json.dumps(views(options.classes or 171, options.rounds)))
        else:
            print(json.dumps(vocabulary(options.classes or 847, 640, options.memory, options.precision)))
        return 0
    from bench.harness import machine

    passed = [] if options.classes is None else ["--classes", str(options.classes)]
    result: dict[str, Any] = {"machine": machine()}
    print(result["machine"], flush=True)
    broken = []
    try:
        if "views" in parts:
            found = _in_child(["--child", "--part", "views", "--rounds", str(options.rounds), *passed])
            result["views"] = found
            print("\none view of 384 x 384, 171 classes\n" if options.classes is None else "\none view\n")
            print("| form | median s | rounds s | x plain | peak GB | logits differ by |\n|---|---|---|---|---|---|")
            for name, x in found.items():
                each = ", ".join(f"{s:.2f}" for s in x["seconds"])
                print(f"| {name} | {x['median']:.2f} | {each} | {x['ratio']:.2f} | {x['peak'] / 1e9:.2f} "
                      f"| {x['difference']:.0e} |", flush=True)  # fmt: skip
            if found["ours"]["ratio"] < LEAST:
                broken.append(
                    f"ours is {found['ours']['ratio']:.2f} times as fast as the plain form, less than {LEAST}"
                )
        if "vocabulary" in parts:
            rest = ["--memory", options.memory, "--precision", options.precision]
            x = _in_child(["--child", "--part", "vocabulary", *rest, *passed])
            result["vocabulary"] = x
            print(f"\n{x['side']} x {x['side']} by sliding window, {x['classes']} classes in {x['prompts']} prompts\n")
            print("| precision | s a picture | counted GB | resident GB | budget GB |\n|---|---|---|---|---|")
            print(f"| {x['precision']} | {x['seconds']:.1f} | {x['counted'] / 1e9:.2f} | {x['peak'] / 1e9:.2f} "
                  f"| {x['budget'] / 1e9:.2f} |\n\n{x['plan']}", flush=True)  # fmt: skip
            if x["peak"] > x["budget"]:
                broken.append(f"the vocabulary took {x['peak'] / 1e9:.2f} GB of {x['budget'] / 1e9:.2f}")
    except RuntimeError as error:
        print(f"error: {error}, so there is no table.", file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print()
    print("\n".join(f"BROKEN {fault}" for fault in broken) or "Every bound is kept.")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
