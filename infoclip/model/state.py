"""What is checked of every state dict before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

__all__ = ["check_same_entries"]


def check_same_entries(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Refuse weights of another architecture.

    Raises:
        ValueError: entries that are missing, unknown or of another shape; the message names the first of each.
    """
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    faults = []
    if missing:
        faults.append(f"{len(missing)} entries are missing ({missing[0]}, ...)")
    if unknown:
        faults.append(f"{len(unknown)} are unknown ({unknown[0]}, ...)")
    if shapes:
        key = shapes[0]
        faults.append(f"{key} has shape {list(state[key].shape)} where {list(own[key].shape)} is expected")
    if faults:
        raise ValueError("the weights are of another architecture: " + "; ".join(faults))
