"""Parity checks of the objective: InfoSAM's relation and distillation losses, MAFT+'s compensation loss."""

from __future__ import annotations

import torch
from parity_common import Case, Row
from torch import Tensor

from infoclip.objective import (
    LPAM,
    compression_loss,
    renyi_entropy,
    representation_compensation,
    strip_pool,
    transfer_loss,
)

# InfoSAM's relation module has one mask token where LPAM has texts, and an image feature where LPAM has pixels.
_LPAM_NAMES = {
    "layer_norm_mask": "norm_text",
    "layer_norm_feat": "norm_pixel",
    "query_proj": "query",
    "key_proj": "key",
}


def _relation_module(case: Case) -> LPAM:
    module = LPAM(int(case.hyper["dim"]))
    state = {}
    for key, value in case.prefixed("sd.").items():
        head, _, last = key.partition(".")
        state[f"{_LPAM_NAMES[head]}.{last}"] = value
    module.load_state_dict(state)
    return module


def _weight_rows(case: Case, prefix: str, module: LPAM) -> list[Row]:
    rows = []
    for name in case.prefixed(prefix):
        head, _, last = name.partition(".")
        rows.append(case.row(prefix + name, module.get_parameter(f"{_LPAM_NAMES[head]}.{last}").grad))
    return rows


def _relation(module: LPAM, feat: Tensor, mask: Tensor) -> Tensor:  # [B, n, d], [B, 1, d] -> [B, n]
    return module(feat, mask).squeeze(-1)


def check_renyi_infosam(case: Case) -> list[Row]:
    """Losses over the batch (each image's map is one sample), and the relation module."""
    rows = []

    norm_f = case.leaf("in.norm_f_t")
    value = -renyi_entropy(norm_f)
    value.backward()
    rows += [
        case.row("out.log2_frobenius_sq_of_normalised_gram", value),
        case.row("grad.log2_frobenius.norm_f", norm_f.grad),
    ]

    z1, z2, norm_f = case.leaf("in.z1"), case.leaf("in.z2"), case.leaf("in.norm_f_t")
    value = compression_loss(norm_f, z1.flatten(1), z2.flatten(1))
    value.backward()
    rows.append(case.row("out.relation_loss", value))
    rows += [
        case.row(f"grad.relation_loss.{name}", leaf.grad) for name, leaf in (("z1", z1), ("z2", z2), ("norm_f", norm_f))
    ]

    teacher, student = case.leaf("in.norm_f_t"), case.leaf("in.norm_f_s")
    value = transfer_loss(student, teacher)
    value.backward()
    rows += [
        case.row("out.distill_loss", value),
        case.row("grad.distill_loss.norm_f_t", teacher.grad),
        case.row("grad.distill_loss.norm_f_s", student.grad),
    ]

    module = _relation_module(case)
    feat, mask = case.leaf("in.feat_t"), case.leaf("in.mask_t")
    out = _relation(module, feat, mask)
    (out * case.tensor("cot.relation")).sum().backward()
    rows += [
        case.row("out.relation", out),
        case.row("grad.relation.feat", feat.grad),
        case.row("grad.relation.mask", mask.grad),
        *_weight_rows(case, "grad.relation.w.", module),
    ]

    module = _relation_module(case)
    leaves = {name: case.leaf(f"in.{name}") for name in ("feat_t", "mask_t", "feat_s", "mask_s")}
    teacher = _relation(module, leaves["feat_t"], leaves["mask_t"])
    student = _relation(module, leaves["feat_s"], leaves["mask_s"])
    inputs = leaves["feat_t"].flatten(1), leaves["mask_t"].flatten(1)
    total = float(case.hyper["alpha"]) * compression_loss(teacher, *inputs)
    total = total + float(case.hyper["beta"]) * transfer_loss(student, teacher)
    total.backward()
    rows.append(case.row("out.total", total))
    rows += [case.row(f"grad.total.{name}", leaf.grad) for name, leaf in leaves.items()]
    return rows + _weight_rows(case, "grad.total.w.", module)


def check_rc(case: Case) -> list[Row]:
    """Compensation loss of maps of every proportion, and of a list of maps."""
    scales = tuple(case.hyper["spp_scales"])
    names = list(case.data["order"])
    rows = []
    for name in names:
        a, b = case.leaf(f"in.{name}.a"), case.leaf(f"in.{name}.b")
        loss = representation_compensation(a, b, scales=scales)
        loss.backward()
        rows += [
            case.row(f"out.{name}.loss", loss),
            case.row(f"out.embed_{name}", strip_pool(a, scales)),
            case.row(f"grad.{name}.a", a.grad),
            case.row(f"grad.{name}.b", b.grad),
        ]
    if "out.multi.loss" in case:
        maps = [[case.tensor(f"in.{name}.{side}") for name in names] for side in "ab"]
        rows.append(case.row("out.multi.loss", representation_compensation(*maps, scales=scales)))
    for name in names:
        a, b = case.tensor(f"in.{name}.a"), case.tensor(f"in.{name}.b")
        if f"out.{name}.loss_frobenius_pow" in case:
            value = representation_compensation(a, b, scales=scales, prepare=torch.square, difference=_frobenius)
            rows.append(case.row(f"out.{name}.loss_frobenius_pow", value))
        if f"out.{name}.loss_l1_none" in case:
            value = representation_compensation(a, b, scales=scales, prepare=lambda x: x, difference=_l1)
            rows.append(case.row(f"out.{name}.loss_l1_none", value))
    return rows


def _frobenius(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a - b, dim=-1).mean()


def _l1(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().sum(dim=-1).mean()
