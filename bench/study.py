"""Which settings make the alignment objective pay on the scenes: ``python -m bench.study GROUP... --seeds 0 1 2``.

Every run trains on seen classes only and is scored on newly drawn scenes of all 52 classes. A seed decides the training
pictures, the order of samples and the initial weights; the evaluation pictures are apart from every training picture,
and those of the choosing stage (``--stage choose``) apart from those that are reported. Results are appended to a JSONL
file, so that a stopped study goes on where it was; ``--table`` prints the mean and spread of what is there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infoclip.config import Config, apply_overrides
from infoclip.errors import InfoclipError
from infoclip.recipes import get_recipe

EVAL_SEED = {"choose": 515_151, "report": 424_242}
EVAL_IMAGES = 192

_NCE = [
    "align.estimator=infonce", "align.samples=pixel", "align.center=true", "align.lpam=cosine",
    "align.compression_weight=0",
]  # fmt: skip
_RENYI = ["align.estimator=renyi", "align.center=true", "align.lpam=cosine", "align.compression_weight=0"]
_X1 = "optim.clip_lr_multiplier=1"

GROUPS: dict[str, dict[str, list[str]]] = {
    # how hard CLIP is tuned, without alignment; the frozen encoder under the same head beside it
    "rates": {
        "frozen CLIP + head": ["align.method=none", "clip.tune=frozen"],
        "fine-tuned, x0.01": ["align.method=none", "optim.clip_lr_multiplier=0.01"],
        "fine-tuned, x0.1": ["align.method=none", "optim.clip_lr_multiplier=0.1"],
        "fine-tuned, x0.3": ["align.method=none", "optim.clip_lr_multiplier=0.3"],
        "fine-tuned, x1": ["align.method=none", _X1],
    },
    "gentle": {
        "InfoNCE 0.03, x0.1": [*_NCE, "align.transfer_weight=0.03", "optim.clip_lr_multiplier=0.1"],
        "InfoNCE 0.03, x0.3": [*_NCE, "align.transfer_weight=0.03", "optim.clip_lr_multiplier=0.3"],
        "InfoNCE 0.003, x0.1": [*_NCE, "align.transfer_weight=0.003", "optim.clip_lr_multiplier=0.1"],
        "Renyi 0.1, x0.1": [
            *_RENYI,
            "align.samples=pixel",
            "align.transfer_weight=0.1",
            "optim.clip_lr_multiplier=0.1",
        ],
    },
    "head": {
        "head 1024 images": ["align.method=none", "clip.tune=frozen", "data.train_images=1024"],
        "head 1024 images, no text guidance": [
            "align.method=none",
            "clip.tune=frozen",
            "data.train_images=1024",
            "model.text_guidance_proj_dim=0",
        ],
        "head 1024 images, 31 classes": [
            "align.method=none",
            "clip.tune=frozen",
            "data.train_images=1024",
            "data.sample_classes=0",
        ],
    },
    # the weight of the transfer term beside a CLIP tuned at the head's own rate
    "weights": {
        "InfoNCE, pixel, 0.03": [*_NCE, _X1, "align.transfer_weight=0.03"],
        "InfoNCE, pixel, 0.3": [*_NCE, _X1, "align.transfer_weight=0.3"],
        "InfoNCE, pixel, 3": [*_NCE, _X1, "align.transfer_weight=3"],
        "Renyi, pixel, 0.1": [*_RENYI, _X1, "align.samples=pixel", "align.transfer_weight=0.1"],
        "Renyi, pixel, 1": [*_RENYI, _X1, "align.samples=pixel", "align.transfer_weight=1"],
        "Renyi, class, 0.1": [*_RENYI, _X1, "align.samples=class", "align.transfer_weight=0.1"],
        "KL, 1": [_X1, "align.method=kl"],
        "KL, 10": [_X1, "align.method=kl", "align.distill_weight=10"],
    },
}


def run(name: str, overrides: Sequence[str], seed: int, stage: str) -> dict[str, Any]:
    """Train one variant with one seed and score it; figures in percent and seconds."""
    from infoclip.data.scenes import SCENE_CLASSES, render, split_classes
    from infoclip.engine.train import train
    from infoclip.evaluate.run import evaluate_model, segmentor_predictor
    from infoclip.model.checkpoint import load_model

    config: Config = apply_overrides(
        get_recipe("scenes"),
        ["train.image_every=0", "train.checkpoint_every=1000000", *overrides,
         f"train.seed={seed}", f"data.scenes_seed={seed}"],
    )  # fmt: skip
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = train(config, Path(folder) / "run", progress=False)
        seconds = time.perf_counter() - start
        segmentor = load_model(result.model_dir).segmentor
    segmentor.eval()
    images, masks = render(EVAL_IMAGES, config.clip.image_size, seed=EVAL_SEED[stage])
    dataset = [{"image": i, "mask": m, "file": ""} for i, m in zip(images, masks, strict=True)]
    seen, _ = split_classes(config.data.split)
    scores = evaluate_model(
        segmentor_predictor(segmentor, SCENE_CLASSES, config.eval), dataset, SCENE_CLASSES, seen, progress=False
    )
    return {
        "name": name, "overrides": list(overrides), "seed": seed, "stage": stage, "split": config.data.split,
        "steps": config.train.steps, "seconds": round(seconds, 1), **_figures(scores),
    }  # fmt: skip


def _figures(scores: Any) -> dict[str, float]:
    return {
        "seen": round(100 * scores.seen.miou, 2),
        "unseen": round(100 * scores.unseen.miou, 2),
        "harmonic": round(100 * scores.harmonic, 2),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a variant, mean and (smallest to largest) over its seeds."""
    lines = ["| variant | seeds | seen | unseen | harmonic | s |", "| --- | --- | --- | --- | --- | --- |"]
    for name in dict.fromkeys(r["name"] for r in rows):
        mine = [r for r in rows if r["name"] == name]
        cells = []
        for key in ("seen", "unseen", "harmonic"):
            values = [r[key] for r in mine]
            spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        seeds = ", ".join(str(r["seed"]) for r in mine)
        lines.append(f"| {name} | {seeds} | {' | '.join(cells)} | {statistics.mean(r['seconds'] for r in mine):.0f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.study", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], help=f"any of {', '.join(GROUPS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[100])
    parser.add_argument("--stage", choices=list(EVAL_SEED), default="choose")
    parser.add_argument("--file", type=Path, default=Path("runs/study.jsonl"))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings for every run")
    parser.add_argument("--only", default="", help="only variants whose name contains this")
    parser.add_argument("--table", action="store_true", help="print what the file holds and stop")
    options = parser.parse_args(arguments)
    rows = [json.loads(line) for line in options.file.read_text().splitlines()] if options.file.exists() else []
    if options.table:
        print(table([r for r in rows if r["stage"] == options.stage]))
        return 0
    options.file.parent.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for group in options.groups:
            for name, overrides in GROUPS[group].items():
                if options.only not in name:
                    continue
                overrides = [*options.set, *overrides]
                if any((r["name"], r["overrides"], r["seed"], r["stage"]) == (name, overrides, seed, options.stage)
                       for r in rows):  # fmt: skip
                    continue
                try:
                    row = run(name, overrides, seed, options.stage)
                except InfoclipError as error:
                    print(f"error: {error}", file=sys.stderr)
                    return error.exit_code
                rows.append(row)
                with options.file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{name:40s} seed {seed}: seen {row['seen']:5.1f} unseen {row['unseen']:5.1f} "
                      f"harmonic {row['harmonic']:5.1f}  {row['seconds']:.0f} s", flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
