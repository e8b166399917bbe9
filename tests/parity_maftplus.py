"""Parity checks of MAFT+'s parts."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from parity_common import Case, Row
from torch import Tensor

from infoclip.clip.architecture import read_convnext
from infoclip.clip.convnext import ConvNeXtCLIP
from infoclip.config import MaskConfig
from infoclip.kernels.ms_deform_attn import ms_deform_attn
from infoclip.model.maftplus import (
    ContentDependentTransfer,
    MaskSegmentor,
    Vocabulary,
    class_logits,
    mask_pooling,
    sine_position,
)
from infoclip.model.maftplus.inference import (
    MaskPrediction,
    class_probabilities,
    ensemble_probabilities,
    overlapping,
    preprocess,
)
from infoclip.model.maftplus.segmentor import split_synonyms
from infoclip.objective import (
    SetCriterion,
    mask_aware_loss,
    matching_cost,
    representation_compensation,
    soft_iou,
)
from infoclip.objective.numerics import unit

__all__ = [
    "check_cdt",
    "check_fcclip_inference",
    "check_ma_loss",
    "check_maft_inference",
    "check_maft_model",
    "check_mask_pooling_cls",
    "check_matcher_criterion",
    "check_msdeform",
]


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


class _Recorded:
    """Hands out the recorded random numbers in their order."""

    def __init__(self, case: Case) -> None:
        self.draws = [case.tensor(name) for name in sorted(case.tensors) if name.startswith("rand.")]
        self.next = 0

    def __call__(self, *shape: int, device: Any = None) -> Tensor:
        draw = self.draws[self.next]
        assert draw.shape == shape, f"draw {self.next} is {list(draw.shape)}, asked for {list(shape)}"
        self.next += 1
        return draw


def check_matcher_criterion(case: Case) -> list[Row]:
    """Costs, assignments, every loss and its gradients, and those of the sum, for each of the outputs."""
    h = case.hyper
    config = MaskConfig(
        class_weight=h["cost_class"], mask_weight=h["cost_mask"], dice_weight=h["cost_dice"],
        no_object_weight=h["eos_coef"], points=h["points"], oversample=h["over"], importance=h["imp"],
    )  # fmt: skip
    weights = {"ce": h["loss_weights"]["ce"], "mask": h["loss_weights"]["mask"], "dice": h["loss_weights"]["dice"]}
    count = h["aux"] + 1
    logits = [case.leaf(f"in.pred_logits.{i}") for i in range(count)]
    mask_logits = [case.leaf(f"in.pred_masks.{i}") for i in range(count)]
    labels = [case.tensor(f"in.labels.{b}").long() for b in range(h["B"])]
    masks = [case.tensor(f"in.masks.{b}") for b in range(h["B"])]
    order = [*range(1, count), 0]  # recorded: the result first; here it comes last
    draw = _Recorded(case)
    matched: list[list[tuple[Tensor, Tensor]]] = []

    class Watched(SetCriterion):
        def match(self, *arguments: Any) -> list[tuple[Tensor, Tensor]]:
            matched.append(super().match(*arguments))
            return matched[-1]

    losses = Watched(config, draw)([(logits[i], mask_logits[i]) for i in order], labels, masks)
    rows = []
    for i, images in enumerate(case.data["indices"]):
        for b, (proposals, objects) in enumerate(images):
            for got, want, what in zip(matched[i][b], (proposals, objects), ("proposals", "objects"), strict=True):
                rows.append(Row(f"data.indices.{i}.{b}.{what}", got, torch.tensor(want, dtype=torch.int64)))
    first = 0
    for i in range(count):
        for b in range(h["B"]):
            name = f"mid.cost_matrix.{i}.{b}"
            if name in case:
                points = draw.draws[first + b]
                cost = matching_cost(logits[i][b], mask_logits[i][b], labels[b], masks[b], points, config)
                rows.append(case.row(name, cost))
        first += h["B"] + 2 * bool(sum(map(len, labels)))
    for name, loss in losses.items():
        kind = name.split("_")[1]
        plain = loss / weights[kind]
        rows.append(case.row(f"out.{name}", plain))
        which = 0 if name.count("_") == 1 else 1 + int(name.rsplit("_", 1)[1])
        leaf, field = (logits[which], "pred_logits") if kind == "ce" else (mask_logits[which], "pred_masks")
        if f"grad.{name}.{field}" in case:
            gradient = torch.autograd.grad(plain, leaf, retain_graph=True, allow_unused=True)[0]
            rows.append(case.row(f"grad.{name}.{field}", gradient))
    torch.stack(list(losses.values())).sum().backward()
    for i in range(count):
        rows += [case.row(f"grad.total.pred_logits.{i}", logits[i].grad)]
        rows += [case.row(f"grad.total.pred_masks.{i}", mask_logits[i].grad)]
    return rows


def check_fcclip_inference(case: Case) -> list[Row]:
    """FC-CLIP's inference from recorded features: scores, semantic, panoptic and instance results."""
    return _check_inference(case, transfer=False)


def check_maft_inference(case: Case) -> list[Row]:
    """The same of MAFT+, with its content-dependent transfer."""
    return _check_inference(case, transfer=True)


def _check_inference(case: Case, transfer: bool) -> list[Row]:
    h = case.hyper
    synonyms = [len(split_synonyms(name)) for name in h["test"]]
    raw = unit(case.tensor("in.text_raw")).unflatten(0, (sum(synonyms), -1))  # [N - 1, P, d]
    text = torch.cat((unit(raw.mean(dim=1)), unit(case.tensor("in.void_embedding"))))
    dense, masks = case.tensor("in.clip_vis_dense"), case.tensor("in.pred_masks")
    project = case.tensor("in.head_weight").mT
    embedded = mask_pooling(dense, masks)
    used = text
    if transfer:
        cdt = ContentDependentTransfer(h["D"], _heads(h), panoptic=h["panoptic_on"])
        cdt.load_state_dict(case.prefixed("sd.cdt."))
        with torch.no_grad():
            used = cdt((dense.permute(0, 2, 3, 1) @ project).permute(0, 3, 1, 2), text)
    out = class_logits(embedded @ project, used, synonyms, case.tensor("in.logit_scale"))
    rows = [case.row("out.text_classifier_with_void", text), case.row("mid.text_used", used)]
    rows += [case.row("mid.pooled_embed", embedded @ project), case.row("mid.out_vocab_logits", out)]
    if transfer:
        scores = class_probabilities(out, case.tensor("in.pred_logits"))[0]
    else:
        valid = None
        if h["ensemble_on_valid_mask"]:
            shown = torch.nn.functional.interpolate(masks, size=dense.shape[2:], mode="bilinear")
            valid = (shown > 0).flatten(2).any(dim=-1)
        seen = overlapping(h["test"], h["train_classes"])
        rows.append(Row("data.overlap", seen.long(), torch.tensor(case.data["category_overlapping_mask"])))
        scores = ensemble_probabilities(
            out, case.tensor("in.pred_logits"), seen, h["alpha"], h["beta"], valid
        )[0]  # fmt: skip
    rows.append(case.row("out.0.mask_cls_log_probs", scores))
    size = (h["img"][0], h["img"][1])
    padded = tuple(side + -side % h["size_divisibility"] for side in size)
    prediction = MaskPrediction(scores, masks[0], padded, size, (h["out"][0], h["out"][1]))  # type: ignore[arg-type]
    rows.append(case.row("out.0.sem_seg", prediction.semantic(masks_first=h["panoptic_on"])))
    if "out.0.panoptic_map" in case:
        found, segments = prediction.panoptic(h["things"], h["thr"], h["ov"])
        rows.append(case.row("out.0.panoptic_map", found))
        want = torch.tensor([[s["id"], s["category_id"], s["isthing"]] for s in case.data["segments_info.0"]])
        got = torch.tensor([[s.id, s.category, s.category in h["things"]] for s in segments])
        rows.append(Row("data.segments", got, want))
    if "out.0.instance_scores" in case:
        found = prediction.instances(h["things"], h["topk"])
        order = case.tensor("out.0.instance_scores").argsort(descending=True)
        for name, got in (("masks", found.masks.to(torch.uint8)), ("classes", found.classes), ("scores", found.scores)):
            back = torch.empty_like(got)
            back[order] = got
            rows.append(case.row(f"out.0.instance_{name}", back))
    return rows


def _heads(h: dict[str, Any]) -> int:
    return int(h.get("cdt_heads", h.get("heads", 2)))


def check_maft_model(case: Case) -> list[Row]:
    """A whole MAFT+: losses and gradients of a training step, and semantic inference."""
    h = case.hyper
    segmentor, teacher = _maft_model(case)
    images = case.tensor("in.train.images")
    labels = [case.tensor(f"in.train.labels.{i}").long() for i in range(len(images))]
    masks = [case.tensor(f"in.train.masks.{i}") for i in range(len(images))]
    pixels = preprocess(images, segmentor.clip)
    padding = (0, pixels.shape[-1] - images.shape[-1], 0, pixels.shape[-2] - images.shape[-2])
    masks = [torch.nn.functional.pad(mask, padding) for mask in masks]
    vocabulary = _vocabulary(segmentor, case, "train")
    segmentor.clip.parameter_policy("trunk")
    segmentor.train()

    out = segmentor(pixels, vocabulary)
    with torch.no_grad():
        frozen = teacher.encode_image(pixels)
    losses = SetCriterion(segmentor.config, _Recorded(case))(out.proposals, labels, masks)
    weights = h["loss_weights"]
    losses["ranking_loss"] = weights["ma(ranking)"] * mask_aware_loss(out.clip_logits, out.masks, labels, masks)
    losses["rc_loss"] = weights["rc"] * representation_compensation(out.dense, frozen.dense)
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    rows = [case.row(f"out.train.{name}", value) for name, value in losses.items()]
    rows.append(case.row("out.train.total", total))

    with torch.no_grad():
        features = segmentor.clip.encode_image(pixels)
        mask_features, levels = segmentor.pixel_decoder(features[:4])
        text = segmentor.text_classifier(vocabulary)
        embedded = segmentor.transfer_features(features.dense)
        mids = {
            "res2": features.res2[:1, :6], "res5": features.res5, "clip_vis_dense": features.dense,
            "clip_vis_dense_teacher": frozen.dense, "mask_features": mask_features[:1, :6],
            "multi_scale_0": levels[0], "multi_scale_1": levels[1], "multi_scale_2": levels[2][:1, :6],
            "text_classifier": text, "cdt_in": embedded, "cdt_out": segmentor.cdt(embedded, text),
            "pred_logits": out.logits, "pred_masks": out.masks, "out_vocab_logits": out.clip_logits,
        }  # fmt: skip
    mids |= {f"aux{i}.pred_logits": p.logits for i, p in enumerate(out.proposals[:-1])}
    rows += [case.row(f"mid.train.{name}", value) for name, value in mids.items() if f"mid.train.{name}" in case]

    found = _published_gradients(segmentor)
    rows += [case.row(name, found[name[5:]]) for name in case.tensors if name.startswith("grad.")]
    learning = {name for name, parameter in found.items() if parameter is not None}
    wanted = set(case.data["with_grad"])
    rows.append(Row("data.with_grad", torch.tensor(len(learning ^ wanted)), torch.tensor(0)))

    test = case.tensor("in.test.image")
    vocabulary = _vocabulary(segmentor.eval(), case, "test")
    with torch.no_grad():
        pixels = preprocess(test[None], segmentor.clip)
        out = segmentor(pixels, vocabulary)
        rows.append(case.row("mid.test.text_classifier", segmentor.text_classifier(vocabulary)))
    rows += [case.row("mid.test.pred_logits", out.logits), case.row("mid.test.pred_masks", out.masks)]
    scores = class_probabilities(out.clip_logits, out.logits)[0]
    prediction = MaskPrediction(scores, out.masks[0], pixels.shape[2:], test.shape[1:], tuple(h["out"]))
    rows.append(case.row("out.test.sem_seg", prediction.semantic()))
    return rows


def _maft_model(case: Case) -> tuple[MaskSegmentor, ConvNeXtCLIP]:
    """The recorded model, and its frozen CLIP."""
    h = case.hyper
    with tempfile.TemporaryDirectory() as folder:
        arguments = {"depths": h["depths"], "dims": h["dims"], "conv_mlp": False}
        described = {"architecture": "convnext_atto", "pretrained_cfg": {}, "model_args": arguments}
        (Path(folder) / "config.json").write_text(json.dumps(described), encoding="utf-8")
        config = {
            "embed_dim": h["embed"],
            "vision_cfg": {"timm_model_name": f"local-dir:{folder}", "timm_proj": h["proj"], "timm_pool": "",
                           "timm_drop_path": h["drop_path"], "image_size": 96},
            "text_cfg": {"context_length": 77, "vocab_size": len(case.data["bpe_ids"]), "width": h["tw"],
                         "heads": h["text_heads"], "layers": h["tl"]},
        }  # fmt: skip
        arch = read_convnext(config, case.name)
        student, teacher = (ConvNeXtCLIP(arch, templates=h["templates"]) for _ in range(2))
    state = case.prefixed("sd.")
    prefix = "backbone_t.clip_model."
    recorded = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    backbone = "backbone.clip_model."
    own = {key.removeprefix(backbone): value for key, value in state.items() if key.startswith(backbone)}
    teacher.load_stock_state_dict({**own, **recorded})
    mask = MaskConfig(
        queries=h["Q"], channels=h["conv_dim"], attention_heads=h["nheads"], encoder_layers=h["enc_layers"],
        encoder_ffn_dim=h["enc_ff"], num_points=h["n_points"], decoder_layers=h["dec_layers"],
        decoder_ffn_dim=h["dec_ff"], transfer_heads=h["cdt_heads"], points=h["points"],
        class_weight=h["loss_weights"]["ce"], mask_weight=h["loss_weights"]["mask"],
        dice_weight=h["loss_weights"]["dice"], no_object_weight=h["eos_coef"], oversample=h["oversample_ratio"],
        importance=h["importance_sample_ratio"], transfer_features="reinterpreted",
    )  # fmt: skip
    segmentor = MaskSegmentor(student, mask, transfer=True)
    segmentor.load_published_state_dict(
        {k: v for k, v in state.items() if not k.startswith(("backbone_t.", "criterion."))}
    )
    return segmentor, teacher.requires_grad_(False).eval()


def _vocabulary(segmentor: MaskSegmentor, case: Case, which: str) -> Vocabulary:
    counts = case.data[f"{which}_num_templates"]
    with torch.no_grad():
        features = unit(segmentor.clip.encode_text(case.tensor(f"in.{which}.tokens").long()))
    rows = unit(features.unflatten(0, (sum(counts), -1)).mean(dim=1))
    return Vocabulary(rows, tuple(counts), tuple(case.hyper[which]))


def _published_gradients(segmentor: MaskSegmentor) -> dict[str, Tensor | None]:
    names = {p.data_ptr(): k for k, p in segmentor.named_parameters()}
    own = {k: segmentor.get_parameter(names[v.data_ptr()]).grad for k, v in segmentor.published_state_dict().items()
           if v.data_ptr() in names}  # fmt: skip
    return own
