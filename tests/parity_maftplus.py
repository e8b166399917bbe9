"""Parity of MAFT+'s parts: multi-scale deformable attention."""

from __future__ import annotations

from parity_common import Case, Row

from infoclip.kernels.ms_deform_attn import ms_deform_attn

__all__ = ["check_msdeform"]


def check_msdeform(case: Case) -> list[Row]:
    """The attention's core, value and gradients, as ``auto`` runs it and by the reference."""
    rows = []
    for backend in ("auto", "reference"):
        names = {"value": "value", "locations": "sampling_locations", "weights": "attention_weights"}
        leaves = {ours: case.leaf(f"in.{theirs}") for ours, theirs in names.items()}
        out = ms_deform_attn(**leaves, shapes=case.tensor("in.spatial_shapes"), backend=backend)
        (out * case.tensor("cot.output")).sum().backward()
        rows.append(case.row("out.output", out))
        rows += [case.row(f"grad.{theirs}", leaves[ours].grad) for ours, theirs in names.items()]
    return rows
