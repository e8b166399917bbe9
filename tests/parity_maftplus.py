"""Parity checks of MAFT+'s parts."""

from __future__ import annotations

import torch
from parity_common import Case, Row

from infoclip.kernels.ms_deform_attn import ms_deform_attn
from infoclip.model.maftplus import ContentDependentTransfer, class_logits, mask_pooling, sine_position
from infoclip.objective import mask_aware_loss, soft_iou

__all__ = ["check_cdt", "check_ma_loss", "check_mask_pooling_cls", "check_msdeform"]


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


def check_cdt(case: Case) -> list[Row]:
    """Content-dependent transfer: position, values, and the gradients of both inputs and of every weight."""
    hyper = case.hyper
    module = ContentDependentTransfer(hyper["d"], hyper["heads"], panoptic=hyper["panoptic_on"])
    module.load_state_dict(case.prefixed("sd."))
    features, text = case.leaf("in.img_feat"), case.leaf("in.text")
    out = module(features, text)
    (out * case.tensor("cot.out")).sum().backward()
    position = sine_position(*features.shape[1:]).expand_as(features)
    rows = [case.row("mid.pos", position), case.row("out.text", out)]
    rows += [case.row("grad.img_feat", features.grad), case.row("grad.text", text.grad)]
    return rows + [case.row(f"grad.w.{key}", weight.grad) for key, weight in module.named_parameters()]


def check_ma_loss(case: Case) -> list[Row]:
    """The mask-aware loss, and the overlaps that it is made of."""
    logits, mask_logits = case.leaf("in.cls"), case.leaf("in.mask_logits")
    labels = [case.tensor(f"in.labels.{i}").long() for i in range(len(logits))]
    masks = [case.tensor(f"in.masks.{i}") for i in range(len(logits))]
    loss = mask_aware_loss(logits, mask_logits, labels, masks)
    loss.backward()
    iou = torch.cat([soft_iou(mask_logits[i], mask) for i, mask in enumerate(masks)])
    return [case.row("out.loss", loss), case.row("grad.cls", logits.grad), case.row("out.iou", iou)]


def check_mask_pooling_cls(case: Case) -> list[Row]:
    """Mask pooling, and the class logits with a text classifier for all images and with one for each."""
    features = case.leaf("in.x")
    pooled = mask_pooling(features, case.tensor("in.mask_logits"))
    (pooled * case.tensor("cot.pooled")).sum().backward()
    rows = [case.row("out.pooled", pooled), case.row("grad.pool.x", features.grad)]
    for which in ("shared", "perimage"):
        for scale, recorded in (("s1", "logit_scale_s1"), ("clamped", "logit_scale_clamped")):
            leaves = {"x": case.leaf("in.embed"), "text": case.leaf(f"in.text_{which}")}
            leaves["logit_scale"] = torch.tensor(case.hyper[recorded], requires_grad=True)
            out = class_logits(leaves["x"], leaves["text"], case.hyper["num_templates"], leaves["logit_scale"])
            (out * case.tensor("cot.logits")).sum().backward()
            rows.append(case.row(f"out.logits.{which}.{scale}", out))
            rows += [case.row(f"grad.logits.{which}.{scale}.{name}", leaf.grad) for name, leaf in leaves.items()]
    return rows
