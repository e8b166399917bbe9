"""``python -m bench curves``: the same training in the published code's form and in ours, one curve over the other.

The demo's recipe (generated scenes, the shipped tiny CLIP, InfoCLIP's objective) is trained from one seed in each form:
``plain`` is the specification (aggregation as published, ops by their PyTorch references, the whole text context), the
others are memory modes, ``bf16`` the fast one under autocast. Roundings are all that may differ, and training amplifies
them: losses of the first steps agree to rounding, later ones as those of two runs whose weights differ in the last bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.arguments import output_file
from bench.step import MODES, plain_code

__all__ = ["curve", "main"]

FORMS = (*MODES, "bf16")
FIRST = {"bf16": 1}
"""Steps in which no more than roundings have come together: of half precision the first alone, else ten."""
SAME = {"bf16": 3e-2}
"""Largest relative difference of the loss in them: 8 bits of mantissa; else 1e-3, float32's."""


def curve(form: str, steps: int, overrides: list[str]) -> list[float]:
    """The loss of every step of a training in this form.

    Raises:
        infoclip.errors.InfoclipError: settings that cannot work.
    """
    from infoclip.config import apply_overrides
    from infoclip.engine.log import read_log
    from infoclip.engine.train import train
    from infoclip.recipes import get_recipe

    mode = {"plain": "reference", "bf16": "fast"}.get(form, form)
    code = plain_code() if form == "plain" else contextlib.nullcontext()
    with tempfile.TemporaryDirectory(prefix="infoclip-bench-") as name, code:
        config = apply_overrides(
            get_recipe("scenes"),
            [f"train.steps={steps}", "train.log_every=1", "train.image_every=0", f"train.checkpoint_every={steps}",
             f"train.precision={'bf16' if form == 'bf16' else 'fp32'}", f"data.root={name}/scenes",
             *overrides, f"model.memory={mode}"],
        )  # fmt: skip
        train(config, Path(name) / "run")
        return [float(line["loss"]) for line in read_log(Path(name) / "run" / "log.jsonl")]


def apart(losses: list[float], base: list[float]) -> list[float]:
    """Relative difference, step by step."""
    return [abs(x - y) / max(abs(y), 1e-12) for x, y in zip(losses, base, strict=True)]


def draw(curves: dict[str, list[float]], file: Path) -> list[Path]:
    """Losses over each other, and below how far each is from the first one's, as PNG and SVG."""
    from matplotlib.figure import Figure

    from bench.report import save
    from infoclip.report.curves import SERIES_COLORS, quiet_axes

    figure = Figure(figsize=(7.0, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    base = next(iter(curves))
    for i, (form, losses) in enumerate(curves.items()):
        steps = range(1, len(losses) + 1)
        # The first is broad and pale: where the others cover it, it still shows on both sides.
        wide = {"linewidth": 5.0, "alpha": 0.55} if i == 0 else {"linewidth": 1.1}
        above.plot(steps, losses, label=form, color=SERIES_COLORS[i % len(SERIES_COLORS)], **wide)
        if i:
            below.plot(steps, apart(losses, curves[base]), color=SERIES_COLORS[i % len(SERIES_COLORS)], linewidth=1.1)
    above.set_ylabel("loss")
    above.legend(frameon=False)
    below.set_yscale("log")
    below.set_ylabel(f"relative difference\nto {base}")
    below.set_xlabel("step")
    for axis in (above, below):
        quiet_axes(axis)
    return save(figure, file)


def main(argv: list[str] | None = None) -> int:
    """Print the comparison and draw it; 1 when first losses differ by more than roundings."""
    from bench.harness import machine
    from infoclip.errors import InfoclipError

    parser = argparse.ArgumentParser(
        prog="python -m bench curves",
        description="The demo's training in several forms from one seed, their losses over each other.",
    )
    parser.add_argument("--forms", default="plain,fast", help=f"some of {', '.join(FORMS)}; the first is the base")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="of each training (default: 200)")
    parser.add_argument("--out", type=output_file, metavar="FILE", help="the picture, as FILE.png and FILE.svg")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write the losses as JSON")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the recipe to change")
    options = parser.parse_args(argv)
    forms = [form.strip() for form in options.forms.split(",") if form.strip()]
    if len(forms) < 2 or set(forms) - set(FORMS) or len(set(forms)) < len(forms):
        parser.error(f"--forms {options.forms}: expected two or more of {', '.join(FORMS)}, each once")
    if options.steps < 1:
        parser.error(f"--steps: expected at least 1, got {options.steps}")
    curves: dict[str, list[float]] = {}
    try:
        for form in forms:
            print(f"{form}: {options.steps} steps", file=sys.stderr)
            curves[form] = curve(form, options.steps, options.overrides)
    except InfoclipError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    line = machine()
    print(f"{line}\n\nInfoCLIP on scenes, {options.steps} steps from one seed, beside {forms[0]}\n")
    print("| form | last loss | furthest apart at first | in steps | in all | median |")
    print("|---|---|---|---|---|---|")
    wrong = []
    rows: list[dict[str, Any]] = []
    for form, losses in curves.items():
        far = apart(losses, curves[forms[0]])
        last = min(FIRST.get(form, 10), options.steps)
        first = max(far[:last])
        middle = statistics.median(far)
        rows.append({"form": form, "losses": losses, "first": first, "most": max(far), "median": middle})
        print(f"| {form} | {losses[-1]:.4f} | {first:.1e} | 1 to {last} | {max(far):.1e} | {middle:.1e} |")
        if not first <= SAME.get(form, 1e-3):
            wrong.append(f"{form} is not {forms[0]}: a loss of the first steps is {first:.1e} away")
    if options.json:
        options.json.write_text(json.dumps({"machine": line, "steps": options.steps, "rows": rows}, indent=1) + "\n")
    if options.out:
        for file in draw(curves, options.out):
            print(f"{file}")
    for fault in wrong:
        print(fault, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
