"""Parity of the segmentor's parts: cost aggregation, the whole model, optimiser groups and steps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from parity_common import Case, Row
from torch import Tensor, nn

from infoclip.clip import Architecture, DenseCLIP, Tower
from infoclip.config import ModelConfig, OptimConfig
from infoclip.engine.optim import clip_gradients, group_parameters, lr_factor, set_learning_rate
from infoclip.errors import DataError
from infoclip.kernels.upsample_bce import upsample_bce
from infoclip.model.aggregator import Aggregator
from infoclip.model.inference import plain_scores, preprocess, sliding_window_scores
from infoclip.model.segmentor import CATSEG_PREFIXES, Segmentor, catseg_name

__all__ = ["check_aggregator", "check_catseg_model", "check_clip_dense", "check_optim", "check_tokenizer"]


def check_aggregator(case: Case) -> list[Row]:
    """Logits, correlation, kept classes, and every gradient of ``sum(logits * cotangent)``."""
    h = case.hyper
    pad_two = lambda dims: tuple(dims) + (0,) * (2 - len(dims))  # noqa: E731
    config = ModelConfig(
        hidden_dim=h["hidden_dim"],
        num_layers=h["num_layers"],
        num_heads=h["nheads"],
        window_size=h["window_size"],
        attention_type=h["attention_type"],
        pad_len=h["pad_len"],
        text_guidance_proj_dim=h["text_guidance_proj_dim"],
        appearance_guidance_proj_dim=h["appearance_guidance_proj_dim"],
        decoder_dims=tuple(h["decoder_dims"]),
        decoder_guidance_dims=pad_two(h["decoder_guidance_dims"]),
        decoder_guidance_proj_dims=pad_two(h["decoder_guidance_proj_dims"]),
    )
    resolution = (int(h["feature_resolution"][0]), int(h["feature_resolution"][1]))
    model = Aggregator(
        config, h["text_guidance_dim"], h["appearance_guidance_dim"], h["prompt_channel"], resolution=resolution
    )
    model.load_state_dict(case.prefixed("sd."), strict=True)
    image, text = case.leaf("in.img_feats"), case.leaf("in.text_feats")
    guidance = [case.leaf(f"in.appearance{i}") for i in range(3) if f"in.appearance{i}" in case]
    pooling = (int(h["pooling_size"][0]), int(h["pooling_size"][1]))
    logits = model(image, text, guidance, pooling=pooling)
    (logits * case.tensor("cot.logits")).sum().backward()

    with torch.no_grad():
        correlation = model.correlation(image, text)
        rows = [case.row("out.logits", logits), case.row("out.corr", correlation)]
        if "mid.corr_embed_allclasses" in case:
            rows.append(case.row("mid.corr_embed_allclasses", model.embed(correlation)))
        if "out.kept_classes" in case:
            kept = torch.zeros(correlation.shape[0], correlation.shape[2], dtype=torch.uint8)
            rows.append(case.row("out.kept_classes", kept.scatter(1, model.kept_classes(correlation), 1)))
    rows += [case.row("grad.img_feats", image.grad), case.row("grad.text_feats", text.grad)]
    rows += [case.row(f"grad.appearance{i}", g.grad) for i, g in enumerate(guidance) if f"grad.appearance{i}" in case]
    parameters = dict(model.named_parameters())
    rows += [case.row(f"grad.w.{name}", parameters[name].grad) for name in case.prefixed("grad.w.")]
    return rows


def check_optim(case: Case) -> list[Row]:
    """Groups, three clipped AdamW steps, gradient norms and learning-rate factors of both systems' training."""
    h, data = case.hyper, case.data
    schedules = {"WarmupCosineLR": "cosine", "WarmupPolyLR": "poly"}
    schedule = schedules[h.get("scheduler", "WarmupCosineLR")]
    slow = "clip_model" if case.variant == "catseg" else "backbone"
    config = OptimConfig(
        lr=h["base_lr"],
        clip_lr_multiplier=h["multiplier"],
        weight_decay=h["weight_decay"],
        betas=tuple(data["groups"][0]["betas"]),
        eps=data["groups"][0]["eps"],
    )
    initial = case.prefixed("in.param.")
    toy = _module_of(initial)
    groups = group_parameters([("", toy)], lambda name: "clip" if slow in name else "head", config)
    rates = {n: (g["lr"], g["weight_decay"]) for g in groups for n in g["param_names"]}
    rows = []
    for group in data["groups"]:
        want = torch.tensor([group["lr"], group["weight_decay"]], dtype=torch.float64)
        for name in group["params"]:
            got = torch.tensor(rates.get(name, (float("nan"),) * 2), dtype=torch.float64)
            rows.append(Row(f"data.groups.{name}", got, want))
    names = {n for g in data["groups"] for n in g["params"]}
    rows.append(Row("data.groups", torch.tensor(len(rates)), torch.tensor(len(names))))

    for g in groups:
        g.pop("param_names")
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    parameters = dict(toy.named_parameters())
    norms, rates_used = [], []
    first = data["groups"][0]["params"][0]
    steps = sorted({int(name.split(".")[0]) for name in case.prefixed("in.grad.")})
    for step in steps:
        for name, parameter in parameters.items():
            parameter.grad = case.tensor(f"in.grad.{step}.{name}").clone()
        set_learning_rate(optimizer, lr_factor(step, h["max_iter"], schedule))
        rates_used += [g["lr"] for g in optimizer.param_groups if any(p is parameters[first] for p in g["params"])]
        norms.append(clip_gradients(optimizer.param_groups, h["clip_norm"])["joint"].double())
        optimizer.step()
        rows += [case.row(f"out.param.{step}.{name}", p) for name, p in parameters.items()]
    as_double = lambda values: torch.tensor(values, dtype=torch.float64)  # noqa: E731
    rows.append(Row("data.gradient_norm", torch.stack(norms), as_double(data["gradient_norm_before_clip"])))
    rows.append(Row("data.lr_of_first_group", as_double(rates_used), as_double(data["lr_of_first_group"])))
    wanted = data["lr_multiplier"]
    factors = as_double([lr_factor(int(k), h["max_iter"], schedule) for k in wanted])
    rows.append(Row("data.lr_multiplier", factors, as_double(list(wanted.values()))))
    return rows


def _module_of(parameters: dict[str, Tensor]) -> nn.Module:
    """A module with these parameters, whose layers are of the kind that name and shape tell."""
    root = nn.Module()
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in parameters.items():
        path, _, leaf = name.rpartition(".")
        layers.setdefault(path, {})[leaf] = value
    for path, tensors in layers.items():
        weight = tensors.get("weight")
        last = path.rpartition(".")[2]
        layer: nn.Module = nn.Module()
        if weight is not None and weight.dim() == 4:
            layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], bias="bias" in tensors)
        elif weight is not None and weight.dim() == 2:
            embeds = ("emb" in last or "query" in last) and "bias" not in tensors
            make = nn.Embedding if embeds else nn.Linear
            layer = make(*weight.shape) if embeds else nn.Linear(weight.shape[1], weight.shape[0], "bias" in tensors)
        elif weight is not None and weight.dim() == 1:
            width = weight.shape[0]
            layer = nn.GroupNorm(1, width) if last.startswith("gn") else nn.LayerNorm(width)
        node = root
        *parents, leaf = path.split(".") if path else [""]
        for part in parents:
            if part not in dict(node.named_children()):
                node.add_module(part, nn.Module())
            node = node.get_submodule(part)
        if leaf and leaf not in dict(node.named_children()):
            node.add_module(leaf, layer)
        node = node.get_submodule(leaf) if leaf else node
        for key, value in tensors.items():
            node.register_parameter(key, nn.Parameter(value.clone()))
    return root


def check_catseg_model(case: Case) -> list[Row]:
    """Training loss and gradients, plain and sliding-window inference of the complete model."""
    h = case.hyper
    segmentor = _segmentor_of(case)
    clip = segmentor.clip

    tokens = {split: case.tensor(f"in.{split}.tokens") for split in ("train", "test")}
    text = F.normalize(clip.encode_text(tokens["train"]), dim=-1)[:, None]  # [T, 1, d]
    segmentor.train()
    out = segmentor(preprocess(case.tensor("in.train.image"), clip, padding="published"), text)
    target = case.tensor("in.train.sem_seg").long()
    loss = upsample_bce(out.logits, target, ignore_index=h["ignore_value"], ignored="negative")
    loss.backward()
    rows = [case.row("out.train.loss_sem_seg", loss)]
    if "mid.train.logits_lowres" in case:
        rows.append(case.row("mid.train.logits_lowres", out.logits))
    if "mid.train.text" in case:
        rows.append(case.row("mid.train.text", text.expand(out.logits.shape[0], *text.shape)))
    grads = {catseg_name(name): p.grad for name, p in segmentor.named_parameters()}
    rows += [case.row(f"grad.{name}", grads[name]) for name in case.prefixed("grad.")]
    if "trainable_parameters" in case.data:
        learns = {catseg_name(name): p.requires_grad for name, p in segmentor.named_parameters()}
        wanted = torch.tensor([name in case.data["trainable_parameters"] for name in learns])
        rows.append(Row("data.trainable_parameters", torch.tensor(list(learns.values())), wanted))

    with torch.no_grad():
        text = F.normalize(clip.encode_text(tokens["test"]), dim=-1)[:, None]
    if "in.plain.image" in case:
        got = plain_scores(segmentor, case.tensor("in.plain.image"), text, tuple(h["plain_out"]), padding="published")
        rows.append(case.row("out.plain.sem_seg", got))
    if "in.slide.image" in case:
        sliding = h["sliding"]
        got = sliding_window_scores(
            segmentor,
            case.tensor("in.slide.image"),
            text,
            tuple(h["slide_out"]),
            size=int(sliding["out_res"][0]),
            window=int(sliding["kernel"]),
            overlap=float(sliding["overlap"]),
            batch_size=5,
        )
        rows.append(case.row("out.slide.sem_seg", got))
    return rows


def _segmentor_of(case: Case) -> Segmentor:
    """The segmentor that a ``catseg_model`` case describes, with its weights and what learns of them."""
    h, agg = case.hyper, case.hyper["agg"]
    state = case.prefixed("sd.")
    prefix = CATSEG_PREFIXES["clip."]
    vision, text = (
        max(int(k.split("resblocks.")[1].split(".")[0]) for k in state if k.startswith(f"{prefix}{tower}resblocks."))
        + 1
        for tower in ("visual.transformer.", "transformer.")
    )
    context, _ = state[prefix + "positional_embedding"].shape
    arch = Architecture(
        embed_dim=h["embed"],
        vision=Tower(h["width"], vision, h["heads"], 4 * h["width"], "quick_gelu", 1e-5),
        text=Tower(h["twidth"], text, h["theads"], 4 * h["twidth"], "quick_gelu", 1e-5),
        patch_size=h["patch"],
        grid=(h["res"] // h["patch"],) * 2,
        context_length=context,
        vocab_size=state[prefix + "token_embedding.weight"].shape[0],
    )
    clip = DenseCLIP(
        arch,
        image_size=int(h["clip_resolution"][0]),
        guidance_layers=tuple(h["guidance_blocks"]),
        mean=[m / 255 for m in h["clip_pixel_mean"]],
        std=[s / 255 for s in h["clip_pixel_std"]],
    )
    clip.parameter_policy("attention")
    config = ModelConfig(
        hidden_dim=agg["hidden_dims"],
        num_layers=agg["num_layers"],
        num_heads=agg["num_heads"],
        window_size=agg["window_sizes"],
        attention_type=agg["attention_type"],
        pooling_train=int(h["pool_train"][0]),
        pooling_eval=int(h["pool_test"][0]),
        pad_len=h["pad_len"],
        text_guidance_proj_dim=agg["text_guidance_proj_dim"],
        appearance_guidance_proj_dim=agg["appearance_guidance_proj_dim"],
        decoder_dims=tuple(agg["decoder_dims"]),
        decoder_guidance_dims=tuple(h["up"]),
        decoder_guidance_proj_dims=tuple(agg["decoder_guidance_proj_dims"]),
    )
    prompts = state[CATSEG_PREFIXES["aggregator."] + "conv1.weight"].shape[1]
    segmentor = Segmentor(clip, config, num_templates=prompts)
    segmentor.load_published_state_dict(state)
    return segmentor


def check_clip_dense(case: Case) -> list[Row]:
    """Outputs, hidden states and gradients of both CLIP towers."""
    from parity_clip import check_clip_dense as compare

    return [case.row(name, got) for name, got, _ in compare(case.tensors, case.info)]


def check_tokenizer(case: Case) -> list[Row]:
    """Token ids of every text: CAT-Seg's, and a refusal where CAT-Seg refuses (too long).

    Where the two recorded tokenizers differ although neither refuses (special strings written out in a text), the ids
    are open_clip's, whose vocabulary object is used.
    """
    from open_clip.tokenizer import SimpleTokenizer

    h, data = case.hyper, case.data
    arch = Architecture(8, Tower(8, 2, 1, 8), Tower(8, 1, 1, 8), 4, (1, 1), h["context_length"], h["vocab"])
    clip = DenseCLIP(arch, guidance_layers=(0, 0), tokenizer=SimpleTokenizer(context_length=h["context_length"]))
    catseg, openclip = case.tensor("out.catseg_ids"), case.tensor("out.openclip_ids")
    rows = []
    for i, (text, fault) in enumerate(zip(data["texts"], data["catseg_errors"], strict=True)):
        want = openclip[i] if i in data["differs_between_peers"] and not fault else catseg[i]
        try:
            got = clip.tokenize([text])[0]
        except DataError:
            got = torch.full_like(want, -1)  # how a refusal is recorded
        rows.append(Row(f"ids {i}: {text[:30]!r}", got, want))
    return rows
