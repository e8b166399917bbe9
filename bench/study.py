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

# What InfoCLIP's row of the recipe "scenes" is made of, so that each variant names only what it changes.
_NONE = ["align.method=none"]
_RENYI = ["align.estimator=renyi", "align.center=true", "align.samples=class", "align.transfer_weight=0.1"]
_LEARNT = ["align.lpam=learnt", "align.lpam_init=cosine"]

GROUPS: dict[str, dict[str, list[str]]] = {
    # how hard CLIP is tuned, without alignment; the frozen encoder under the same head beside it
    "rates": {
        "frozen CLIP + head": [*_NONE, "clip.tune=frozen", "clip.tune_positions=false"],
        "fine-tuned, x0.01": [*_NONE, "optim.clip_lr_multiplier=0.01"],
        "fine-tuned, x0.1": [*_NONE, "optim.clip_lr_multiplier=0.1"],
        "fine-tuned, x0.3": [*_NONE, "optim.clip_lr_multiplier=0.3"],
        "fine-tuned, x1": [*_NONE, "optim.clip_lr_multiplier=1"],
    },
    # the estimator, what a sample is, weight and temperature
    "estimators": {
        f"InfoNCE, {samples}, tau {tau}, weight {weight}": [
            f"align.samples={samples}", f"align.temperature={tau}", f"align.transfer_weight={weight}"
        ]
        for samples, tau, weight in (
            ("pixel", 0.1, 0.03), ("pixel", 0.1, 0.3), ("pixel", 0.03, 0.03), ("pixel", 0.03, 0.1),
            ("pixel", 0.01, 0.03), ("pixel", 0.01, 0.1), ("pixel", 0.01, 0.3),
            ("class", 0.01, 0.1), ("class", 0.03, 0.3),
        )
    }
    | {
        f"Renyi, {samples}, weight {weight}": [
            *_RENYI, f"align.samples={samples}", f"align.transfer_weight={weight}"
        ]
        for samples, weight in (("pixel", 0.03), ("pixel", 0.3), ("class", 0.1), ("class", 0.3), ("batch", 0.1))
    },
    # weights of the other objectives
    "weights": {
        **{
            f"KL, tau {tau}, weight {weight}": [
                "align.method=kl", f"align.temperature={tau}", f"align.distill_weight={weight}"
            ]
            for tau, weight in ((0.1, 3), (0.1, 10), (0.1, 30), (0.1, 100), (0.01, 1))
        },
        **{f"MAFT, weight {w}": ["align.method=maft", f"align.distill_weight={w}"] for w in (1, 10, 100, 1000)},
        **{f"MAFT+, weight {w}": ["align.method=maftplus", f"align.distill_weight={w}"] for w in (0.1, 1, 10, 30)},
        **{f"L_c alone, weight {w}": [*_LEARNT, "align.transfer_weight=0", f"align.compression_weight={w}"]
           for w in (0.03, 0.3)},
    },
    # the paper's ablation, and its rivals; weights were chosen per method on the choosing seed
    "ablation": {
        "fine-tuned": _NONE,
        "fine-tuned, its best rate (x0.01)": [*_NONE, "optim.clip_lr_multiplier=0.01"],
        "frozen CLIP + head": [*_NONE, "clip.tune=frozen", "clip.tune_positions=false"],
        "L_c alone": [*_LEARNT, "align.transfer_weight=0", "align.compression_weight=0.1"],
        "L_d alone, cosine map": ["align.compression_weight=0"],
        "L_d alone, learnt LPAM": [*_LEARNT, "align.compression_weight=0"],
        "L_c and L_d, learnt LPAM": [*_LEARNT, "align.compression_weight=0.1"],
        "L_d by Renyi, cosine map": [*_RENYI, "align.compression_weight=0"],
        "L_c and L_d by Renyi, learnt LPAM": [*_RENYI, *_LEARNT, "align.compression_weight=0.1"],
        "KL": ["align.method=kl", "align.distill_weight=100", "align.temperature=0.1"],
        "MAFT": ["align.method=maft", "align.distill_weight=1000"],
        "MAFT+": ["align.method=maftplus", "align.distill_weight=30"],
    },
}  # fmt: skip


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
