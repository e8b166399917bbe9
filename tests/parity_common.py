"""What every parity check shares: reading a recorded case, and one row for each compared tensor.

A case is a pair of files, ``NAME.json`` and ``NAME.safetensors``; its kind is the name up to the first dot. A check is
a function ``check(case) -> list[Row]``. It reads sizes, seeds and options from the case alone, so that it also holds
for further cases of the same kind.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

try:
    import infoclip  # noqa: F401
except ImportError:  # a bare checkout: the package lies beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

__all__ = ["Case", "CaseError", "Check", "Row", "SkipCase", "load_case"]


class CaseError(Exception):
    """A case that cannot be read; the message is one sentence that names the file."""


class SkipCase(Exception):  # noqa: N818 - a decision, not an error
    """Raised by a check that does not cover a case (yet); the message says why."""


@dataclass
class Row:
    """One compared tensor. The tolerance is ``max(10 * fp64_err, 2e-6 * absmax)``: ten times what float32 itself loses
    on this tensor (another order of summation loses as much again, a few times over), and never less than 2e-6 of its
    largest value, about 16 units in the last place, for tensors whose float64 check came out near zero by luck.
    Integers and booleans must be equal.
    """

    name: str
    got: Tensor
    want: Tensor
    kind: Literal["value", "grad"] = "value"
    fp64_err: float | None = None
    absmax: float | None = None

    @property
    def scale(self) -> float:
        """Largest absolute value of the recorded tensor."""
        if self.absmax is not None:
            return self.absmax
        return self.want.double().abs().max().item() if self.want.numel() else 0.0

    @property
    def exact(self) -> bool:
        return not self.want.is_floating_point()

    @property
    def error(self) -> float:
        """Largest absolute difference; infinite for another shape or a value that is not finite."""
        if self.got.shape != self.want.shape:
            return math.inf
        if not self.want.numel():
            return 0.0
        got, want = self.got.detach().cpu(), self.want.detach().cpu()
        if self.exact:
            return float((got.to(torch.int64) != want.to(torch.int64)).sum())
        diff = (got.double() - want.double()).abs()
        same = got.double() == want.double()  # equal infinities
        worst = torch.where(same, torch.zeros_like(diff), diff).nan_to_num(nan=math.inf).max().item()
        return float(worst)

    @property
    def tolerance(self) -> float:
        return 0.0 if self.exact else max(10.0 * (self.fp64_err or 0.0), 2e-6 * self.scale)

    @property
    def is_noise(self) -> bool:
        """Whether the recorded tensor is rounding noise around zero (a relative error of it means nothing)."""
        return not self.exact and self.scale <= 10.0 * (self.fp64_err or 0.0)

    @property
    def relative(self) -> float:
        """Largest difference over the largest recorded value."""
        return self.error / self.scale if self.scale > 0 and not self.exact else self.error

    @property
    def share(self) -> float:
        """Error over tolerance; at most 1 passes."""
        return self.error / self.tolerance if self.tolerance > 0 else (0.0 if self.error == 0 else math.inf)

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance


@dataclass
class Case:
    """A recorded case: its description and its tensors."""

    name: str
    path: Path
    info: dict[str, Any]
    tensors: dict[str, Tensor] = field(repr=False)

    @property
    def kind(self) -> str:
        return self.name.partition(".")[0]

    @property
    def variant(self) -> str:
        """The name after the first dot; empty if there is none."""
        return self.name.partition(".")[2]

    @property
    def hyper(self) -> dict[str, Any]:
        return self.info.get("hyper_parameters", {})

    @property
    def data(self) -> dict[str, Any]:
        return self.info.get("data", {})

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def tensor(self, name: str) -> Tensor:
        """The recorded tensor; :class:`CaseError` if the case has none of that name."""
        if name not in self.tensors:
            raise CaseError(f"{self.path} has no tensor '{name}', which a case of the kind '{self.kind}' needs.")
        return self.tensors[name]

    def leaf(self, name: str) -> Tensor:
        """A copy of the recorded tensor that collects a gradient."""
        return self.tensor(name).clone().requires_grad_()

    def prefixed(self, prefix: str) -> dict[str, Tensor]:
        """All tensors whose name starts with ``prefix``, by the rest of their name."""
        return {k[len(prefix) :]: v for k, v in self.tensors.items() if k.startswith(prefix)}

    def row(self, name: str, got: Tensor | None, kind: Literal["value", "grad"] | None = None) -> Row:
        """The row that compares ``got`` with the recorded tensor ``name``; a missing gradient counts as zeros."""
        want = self.tensor(name)
        entry = self.info.get("tensors", {}).get(name, {})
        if got is None:
            got = torch.zeros_like(want)
        return Row(
            name,
            got.detach().clone(),  # the caller may go on to change it
            want,
            kind or ("grad" if name.startswith("grad.") else "value"),
            entry.get("fp32_vs_fp64_max_abs_err"),
            entry.get("absmax"),
        )


Check = Callable[[Case], list[Row]]


def load_case(json_path: Path) -> Case:
    """Read ``NAME.json`` and the ``NAME.safetensors`` beside it; :class:`CaseError` if either cannot be read."""
    weights = json_path.with_name(json_path.name.removesuffix(".json") + ".safetensors")
    try:
        info = json.loads(json_path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CaseError(f"Cannot read {json_path}: {error}.") from error
    if not isinstance(info, dict):
        raise CaseError(f"{json_path} is not a parity case: expected a JSON object.")
    if not weights.is_file():
        raise CaseError(f"{json_path} has no {weights.name} beside it.")
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise CaseError(f"Cannot read {weights}: {error}.") from error
    return Case(json_path.name.removesuffix(".json"), json_path, info, tensors)
