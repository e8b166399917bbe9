"""Parity of the CLIP part with recorded numbers: the check that ``tests/parity.py`` runs for ``clip_dense``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def check_clip_dense(tensors: Mapping[str, Tensor], meta: Mapping[str, Any], contrast: bool = False) -> list[Row]:
    """Run a ``clip_dense`` case.

    Args:
        tensors: the case's tensors.
        meta: the case's JSON; all sizes are read from its ``hyper_parameters``.
        contrast: only the outputs of the published code's unused sibling (each token's own residual in the last block).

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

    names = [key for key in tensors if key.split(".")[0] in (("modelpy",) if contrast else ("out", "mid", "grad"))]
    return [(name, got[name].detach(), tensors[name]) for name in sorted(names)]


def _gradients(clip: DenseCLIP, prefix: str) -> dict[str, Tensor]:
    return {prefix + name: p.grad.clone() for name, p in clip.named_parameters() if p.grad is not None}
