"""Parity of the CLIP part with recorded reference numbers: the check that ``tests/parity.py`` runs for ``clip_dense``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from infoclip.clip import Architecture, DenseCLIP, Tower

Row = tuple[str, Tensor, Tensor]


def clip_of(hyper: Mapping[str, Any], state: Mapping[str, Tensor]) -> DenseCLIP:
    """The DenseCLIP that a case's hyper-parameters describe, with its weights (keys as recorded)."""
    ratio, eps = int(hyper.get("mlp_ratio", 4)), float(hyper.get("layernorm_eps", 1e-5))
    vision_heads = int(hyper.get("vision_heads", hyper["heads"]))
    text_heads = int(hyper.get("text_heads", hyper["theads"]))
    width, text_width, side = int(hyper["width"]), int(hyper["twidth"]), int(hyper["res"]) // int(hyper["patch"])
    arch = Architecture(
        embed_dim=int(hyper["embed"]),
        vision=Tower(width, int(hyper["layers"]), vision_heads, ratio * width, "quick_gelu", eps),
        text=Tower(text_width, int(hyper["tlayers"]), text_heads, ratio * text_width, "quick_gelu", eps),
        patch_size=int(hyper["patch"]),
        grid=(side, side),
        context_length=int(hyper["ctx"]),
        vocab_size=int(hyper["vocab"]),
    )
    clip = DenseCLIP(arch)
    clip.load_stock_state_dict(state, source="the recorded state dict")
    return clip


def check_clip_dense(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> list[Row]:
    """Run a ``clip_dense`` case.

    Args:
        tensors: the case's tensors.
        meta: the case's JSON; all sizes are read from its ``hyper_parameters``.

    Returns:
        (name, got, wanted) for every recorded output, intermediate and gradient.
    """
    state = {key.removeprefix("sd."): value for key, value in tensors.items() if key.startswith("sd.")}
    clip = clip_of(meta["hyper_parameters"], state)
    got: dict[str, Tensor] = {}
    depth = clip.arch.vision.layers

    for tag in sorted({key.removeprefix("in.image_") for key in tensors if key.startswith("in.image_")}):
        clip.zero_grad(set_to_none=True)
        image = tensors[f"in.image_{tag}"].clone().requires_grad_()
        h, w = (side // clip.patch_size for side in image.shape[2:])
        dense, hidden = clip.visual.dense_tokens(image, "value-cls", range(depth))
        got[f"out.{tag}.dense"] = dense
        got[f"out.{tag}.cls"] = clip.encode_global(image)
        got[f"mid.{tag}.resized_pos_embed"] = clip.visual.positions(h, w)
        got |= {f"mid.{tag}.block{i}": x.transpose(0, 1) for i, x in enumerate(hidden[:-1])}
        got[f"modelpy.out.{tag}.dense"] = clip.visual.dense_tokens(image, "value")[0]
        if f"cot.{tag}" in tensors:
            (dense * tensors[f"cot.{tag}"]).sum().backward()
            got |= _gradients(clip, f"grad.{tag}.")
            assert image.grad is not None
            got[f"grad.{tag}.image"] = image.grad

    clip.zero_grad(set_to_none=True)
    text = clip.encode_text(tensors["in.token_ids"])
    got["out.text"] = text
    (text * tensors["cot.text"]).sum().backward()
    got |= _gradients(clip, "grad.text.")

    names = [key for key in tensors if key.split(".")[0] in ("out", "mid", "grad", "modelpy")]
    return [(name, got[name].detach(), tensors[name]) for name in sorted(names)]


def _gradients(clip: DenseCLIP, prefix: str) -> dict[str, Tensor]:
    return {prefix + name: p.grad.clone() for name, p in clip.named_parameters() if p.grad is not None}


def tolerance(entry: Mapping[str, Any]) -> float:
    """Largest absolute difference: ten times the reference's own distance from float64, or 2e-6 of the maximum.

    Entries without a recorded distance (the ``modelpy.*`` contrast) are allowed 5e-6 of the maximum: the recorded
    distances of the same kind of tensor are up to 1e-6 of it, and two float32 paths may lie on either side.
    """
    distance = entry.get("fp32_vs_fp64_max_abs_err")
    if distance is None:
        return 5e-6 * float(entry["absmax"])
    return max(10 * float(distance), 2e-6 * float(entry["absmax"]))


def rows_failing(rows: list[Row], meta: Mapping[str, Any]) -> list[str]:
    """One line for each row outside its tolerance."""
    lines = []
    for name, got, want in rows:
        error = float((got - want).abs().max()) if got.shape == want.shape else float("inf")
        if not error <= tolerance(meta["tensors"][name]):
            lines.append(f"{name}: {error:.3g} > {tolerance(meta['tensors'][name]):.3g}")
    return lines


def load_case(stem: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON of a recorded case, by its path without suffix."""
    import json
    from pathlib import Path

    from safetensors.torch import load_file

    return load_file(f"{stem}.safetensors"), json.loads(Path(f"{stem}.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    import sys

    torch.set_num_threads(1)
    tensors, meta = load_case(sys.argv[1])
    rows = check_clip_dense(tensors, meta)
    failing = rows_failing(rows, meta)
    print("\n".join(failing) if failing else f"{len(rows)} rows within tolerance")
    sys.exit(bool(failing))
