"""Compare the code with recorded numbers: ``python tests/parity.py DIR``.

Runs every case (``NAME.json`` with ``NAME.safetensors``) found in DIR, prints a row a case, and exits with 1 if any
case fails, with 2 if DIR holds no case or one that cannot be read. ``--verbose`` also lists every tensor that fails
and the worst ones that pass.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from parity_common import Case, CaseError, Check, Row, SkipCase, load_case

KINDS: dict[str, str] = {
    "clip_dense": "parity_model:check_clip_dense",
    "tokenizer": "parity_model:check_tokenizer",
    "aggregator": "parity_model:check_aggregator",
    "catseg_model": "parity_model:check_catseg_model",
    "optim": "parity_model:check_optim",
    "renyi_infosam": "parity_objective:check_renyi_infosam",
    "rc": "parity_objective:check_rc",
    "metrics": "parity_metrics:check_metrics",
    "msdeform": "parity_maftplus:check_msdeform",
    "cdt": "parity_maftplus:check_cdt",
    "ma_loss": "parity_maftplus:check_ma_loss",
    "mask_pooling_cls": "parity_maftplus:check_mask_pooling_cls",
    "matcher_criterion": "parity_maftplus:check_matcher_criterion",
    "fcclip_inference": "parity_maftplus:check_fcclip_inference",
    "maft_inference": "parity_maftplus:check_maft_inference",
    "maft_model": "parity_maftplus:check_maft_model",
}
"""Check of each kind of case, as ``module:function`` (imported when a case of the kind is met)."""


def find_check(kind: str) -> Check:
    """The check of a kind of case; :class:`SkipCase` where there is none."""
    if kind not in KINDS:
        raise SkipCase("not built yet")
    module, _, function = KINDS[kind].partition(":")
    return getattr(importlib.import_module(module), function)


def worst_relative(rows: Sequence[Row], kind: str) -> str:
    """The worst relative error of a kind of row; tensors that are only rounding noise have none."""
    found = [r.relative for r in rows if r.kind == kind and not r.is_noise]
    return f"{max(found):.1e}" if found else "-"


def run_case(case: Case) -> tuple[str, list[Row], str]:
    """Result (``pass``, ``FAIL`` or ``skipped``), compared tensors, and a remark."""
    try:
        rows = find_check(case.kind)(case)
    except SkipCase as reason:
        return "skipped", [], str(reason)
    except CaseError:
        raise
    except Exception as error:
        traceback.print_exc()
        return "FAIL", [], f"{type(error).__name__}: {error}"
    if not rows:
        return "FAIL", [], "the check compared nothing"
    failed = [r for r in rows if not r.ok]
    remark = f"{failed[0].name}: error {failed[0].error:.2e} over {failed[0].tolerance:.2e}" if failed else ""
    if len(failed) > 1:
        remark += f" (and {len(failed) - 1} more)"
    return ("FAIL" if failed else "pass"), rows, remark


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases of a folder; returns the exit code."""
    parser = argparse.ArgumentParser(prog="parity.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path, metavar="DIR", help="folder with NAME.json and NAME.safetensors")
    parser.add_argument("--only", default="", metavar="PREFIX", help="only cases whose name starts with PREFIX")
    parser.add_argument("-v", "--verbose", action="store_true", help="list failing tensors and the worst passing ones")
    parser.add_argument("--device", default="cpu", help="where to compute (default: cpu, as recorded)")
    options = parser.parse_args(arguments)
    try:
        torch.zeros(1, device=options.device)
    except (RuntimeError, AssertionError) as error:
        print(f"error: cannot compute on '{options.device}': {str(error).partition(chr(10))[0]}", file=sys.stderr)
        return 2
    # TensorFloat-32, the default of CUDA convolutions, keeps 11 bits: far less than the recorded tolerances.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    paths = sorted(p for p in options.directory.glob("*.json") if p.name.startswith(options.only))
    if not paths:
        what = f"{options.directory} is not a folder" if not options.directory.is_dir() else "no parity case found"
        print(f"error: {what}; expected NAME.json and NAME.safetensors in {options.directory}.", file=sys.stderr)
        return 2
    print(f"{'case':<34} {'tensors':>7} {'values':>8} {'grads':>8} {'err/tol':>8} {'s':>6}  result")
    counts = {"pass": 0, "FAIL": 0, "skipped": 0}
    for path in paths:
        start = time.perf_counter()
        try:
            case = load_case(path)
            # Sums over many terms depend on how threads cut them: as many threads as when the case was recorded.
            torch.set_num_threads(int(case.info.get("made_with", {}).get("threads", torch.get_num_threads())))
            case.tensors = {name: tensor.to(options.device) for name, tensor in case.tensors.items()}
            with torch.device(options.device):  # models that a check builds are built there
                result, rows, remark = run_case(case)
        except CaseError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        counts[result] += 1
        if rows:
            share = f"{max(r.share for r in rows):.2g}"
            middle = f"{len(rows):>7} {worst_relative(rows, 'value'):>8} {worst_relative(rows, 'grad'):>8} {share:>8}"
        else:
            middle = f"{'-':>7} {'-':>8} {'-':>8} {'-':>8}"
        seconds = time.perf_counter() - start
        print(f"{case.name:<34} {middle} {seconds:>6.1f}  {result}{': ' + remark if remark else ''}", flush=True)
        if options.verbose:
            for row in sorted(rows, key=lambda r: -r.share)[: max(3, sum(not r.ok for r in rows))]:
                print(
                    f"    {'ok  ' if row.ok else 'FAIL'} {row.name}: error {row.error:.2e}, {row.tolerance:.2e} allowed"
                )
    print(f"{counts['pass']} passed, {counts['FAIL']} failed, {counts['skipped']} skipped")
    return 1 if counts["FAIL"] else 0


if __name__ == "__main__":
    sys.exit(main())
