"""The segmentor: names and counts of published checkpoints, behaviour in training and evaluation, and its loss."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from small_models import small_config, small_segmentor

from infoclip.clip import Architecture, DenseCLIP, Tower
from infoclip.config import ModelConfig
from infoclip.kernels.upsample_bce import upsample_bce
from infoclip.model.segmentor import Segmentor, build_segmentor

VIT_B = Architecture(512, Tower(768, 12, 12, 3072), Tower(512, 12, 8, 2048), 16, (14, 14), 77, 49408)
VIT_L = Architecture(768, Tower(1024, 24, 16, 4096), Tower(768, 12, 12, 3072), 14, (24, 24), 77, 49408)

# Keys of the published ViT-B/16 checkpoint, as patterns with shapes: C, A are the prefixes of CLIP and aggregator.
PUBLISHED = """
C positional_embedding [77,512]
C text_projection [512,512]
C logit_scale []
C token_embedding.weight [49408,512]
C ln_final.{weight,bias} [512]
C visual.class_embedding [768]
C visual.positional_embedding [197,768]
C visual.proj [768,512]
C visual.conv1.weight [768,3,16,16]
C visual.ln_pre.{weight,bias} [768]
C visual.ln_post.{weight,bias} [768]
C visual.transformer.resblocks.{0..11}.attn.{q,k,v}_proj_weight [768,768]
C visual.transformer.resblocks.{0..11}.attn.in_proj_bias [2304]
C visual.transformer.resblocks.{0..11}.attn.out_proj.weight [768,768]
C visual.transformer.resblocks.{0..11}.attn.out_proj.bias [768]
C visual.transformer.resblocks.{0..11}.{ln_1,ln_2}.{weight,bias} [768]
C visual.transformer.resblocks.{0..11}.mlp.c_fc.weight [3072,768]
C visual.transformer.resblocks.{0..11}.mlp.c_fc.bias [3072]
C visual.transformer.resblocks.{0..11}.mlp.c_proj.weight [768,3072]
C visual.transformer.resblocks.{0..11}.mlp.c_proj.bias [768]
C transformer.resblocks.{0..11}.attn.{q,k,v}_proj_weight [512,512]
C transformer.resblocks.{0..11}.attn.in_proj_bias [1536]
C transformer.resblocks.{0..11}.attn.out_proj.weight [512,512]
C transformer.resblocks.{0..11}.attn.out_proj.bias [512]
C transformer.resblocks.{0..11}.{ln_1,ln_2}.{weight,bias} [512]
C transformer.resblocks.{0..11}.mlp.c_fc.weight [2048,512]
C transformer.resblocks.{0..11}.mlp.c_fc.bias [2048]
C transformer.resblocks.{0..11}.mlp.c_proj.weight [512,2048]
C transformer.resblocks.{0..11}.mlp.c_proj.bias [512]
A conv1.weight [128,1,7,7]
A conv1.bias [128]
A guidance_projection.0.weight [128,512,3,3]
A guidance_projection.0.bias [128]
A text_guidance_projection.0.weight [128,512]
A text_guidance_projection.0.bias [128]
A decoder_guidance_projection.0.0.weight [32,256,3,3]
A decoder_guidance_projection.0.0.bias [32]
A decoder_guidance_projection.1.0.weight [16,128,3,3]
A decoder_guidance_projection.1.0.bias [16]
A layers.{0,1}.swin_block.{block_1,block_2}.{norm1,norm2}.{weight,bias} [128]
A layers.{0,1}.swin_block.{block_1,block_2}.attn.{q,k}.weight [128,256]
A layers.{0,1}.swin_block.{block_1,block_2}.attn.{v,proj}.weight [128,128]
A layers.{0,1}.swin_block.{block_1,block_2}.attn.{q,k,v,proj}.bias [128]
A layers.{0,1}.swin_block.{block_1,block_2}.mlp.fc1.weight [512,128]
A layers.{0,1}.swin_block.{block_1,block_2}.mlp.fc1.bias [512]
A layers.{0,1}.swin_block.{block_1,block_2}.mlp.fc2.weight [128,512]
A layers.{0,1}.swin_block.{block_1,block_2}.mlp.fc2.bias [128]
A layers.{0,1}.swin_block.block_2.attn_mask [4,144,144]
A layers.{0,1}.swin_block.guidance_norm.{weight,bias} [128]
A layers.{0,1}.attention.{padding_tokens,padding_guidance} [1,1,128]
A layers.{0,1}.attention.attention.{q,k}.weight [128,256]
A layers.{0,1}.attention.attention.v.weight [128,128]
A layers.{0,1}.attention.attention.{q,k,v}.bias [128]
A layers.{0,1}.attention.MLP.0.weight [512,128]
A layers.{0,1}.attention.MLP.0.bias [512]
A layers.{0,1}.attention.MLP.2.weight [128,512]
A layers.{0,1}.attention.MLP.2.bias [128]
A layers.{0,1}.attention.{norm1,norm2}.{weight,bias} [128]
A decoder1.up.weight [128,96,2,2]
A decoder1.up.bias [96]
A decoder1.conv.double_conv.0.weight [64,128,3,3]
A decoder1.conv.double_conv.{1,4}.{weight,bias} [64]
A decoder1.conv.double_conv.3.weight [64,64,3,3]
A decoder2.up.weight [64,48,2,2]
A decoder2.up.bias [48]
A decoder2.conv.double_conv.0.weight [32,64,3,3]
A decoder2.conv.double_conv.{1,4}.{weight,bias} [32]
A decoder2.conv.double_conv.3.weight [32,32,3,3]
A head.weight [1,32,3,3]
A head.bias [1]
upsample1.weight [768,256,2,2]
upsample1.bias [256]
upsample2.weight [768,128,4,4]
upsample2.bias [128]
"""


def expand(pattern: str) -> list[str]:
    found = re.search(r"\{([^}]*)\}", pattern)
    if not found:
        return [pattern]
    options = found[1].split(",")
    if ".." in found[1]:
        first, last = map(int, found[1].split(".."))
        options = [str(i) for i in range(first, last + 1)]
    return [s for o in options for s in expand(pattern[: found.start()] + o + pattern[found.end() :])]


def published_shapes() -> dict[str, tuple[int, ...]]:
    prefixes = {"C": "sem_seg_head.predictor.clip_model.", "A": "sem_seg_head.predictor.transformer."}
    shapes = {}
    for line in PUBLISHED.strip().splitlines():
        *first, pattern, shape = line.split()
        for name in expand(pattern):
            size = tuple(int(n) for n in shape.strip("[]").split(",") if n)
            shapes["".join(prefixes[f] for f in first) + name] = size
    return shapes


def on_meta(arch: Architecture, image_size: int) -> Segmentor:
    with torch.device("meta"):
        return Segmentor(DenseCLIP(arch, image_size=image_size), ModelConfig())


def test_vit_b_state_dict_is_the_published_one() -> None:
    segmentor = on_meta(VIT_B, 384)
    state = segmentor.published_state_dict()
    assert {k: tuple(v.shape) for k, v in state.items()} == published_shapes()
    assert len(state) == 484
    assert sum(v.numel() for v in state.values()) == 154_455_266
    assert sum(p.numel() for p in segmentor.parameters()) == 154_289_378


def test_vit_l_state_dict_has_the_published_counts() -> None:
    segmentor = on_meta(VIT_L, 336)
    state = segmentor.published_state_dict()
    assert len(state) == 652
    assert sum(p.numel() for p in segmentor.parameters()) == 433_726_946
    assert tuple(state["upsample2.weight"].shape) == (1024, 128, 4, 4)
    assert tuple(state["sem_seg_head.predictor.transformer.guidance_projection.0.weight"].shape) == (128, 768, 3, 3)


def test_published_tuning_learns_the_published_numbers() -> None:
    for arch, size, clip_learns, learns in ((VIT_B, 384, 20.4e6, 25.1e6), (VIT_L, 336, 64.5e6, 70.3e6)):
        segmentor = on_meta(arch, size)
        segmentor.clip.parameter_policy("attention")
        count = lambda module: sum(p.numel() for p in module.parameters() if p.requires_grad)  # noqa: E731
        assert abs(count(segmentor.clip) - clip_learns) < 0.06e6
        assert abs(count(segmentor) - learns) < 0.06e6


def test_state_dict_goes_both_ways() -> None:
    first, second = small_segmentor(), small_segmentor()
    for parameter in second.parameters():
        torch.nn.init.normal_(parameter)
    second.load_published_state_dict(first.published_state_dict())
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    without_masks = {k: v for k, v in first.published_state_dict().items() if not k.endswith("attn_mask")}
    second.load_published_state_dict(without_masks)


def test_foreign_weights_are_named() -> None:
    segmentor = small_segmentor()
    state = segmentor.published_state_dict()
    before = {k: v.clone() for k, v in state.items()}
    less = dict(state)
    del less["upsample1.bias"]
    with pytest.raises(ValueError, match=r"1 entries are missing \(upsample1.bias"):
        segmentor.load_published_state_dict(less)
    with pytest.raises(ValueError, match=r"1 are unknown \(decoder.weight"):
        segmentor.load_published_state_dict({**state, "decoder.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"upsample1.bias has shape \[3\] where \[10\] is expected"):
        segmentor.load_published_state_dict({**state, "upsample1.bias": torch.zeros(3)})
    assert all(torch.equal(v, before[k]) for k, v in segmentor.published_state_dict().items())


def test_forward_in_training_with_several_templates_and_changing_classes() -> None:
    segmentor = small_segmentor(num_templates=3)
    segmentor.clip.parameter_policy("attention")
    image = torch.randn(2, 3, 64, 64)
    segmentor.train()
    tokens = torch.randint(1, 49, (4 * 3, 16))
    text = F.normalize(segmentor.clip.encode_text(tokens), dim=-1).view(4, 3, -1)
    out = segmentor(image, text)
    assert out.logits.shape == (2, 4, 32, 32)
    assert out.dense.shape == (2, 12, 8, 8)
    assert out.text is text
    upsample_bce(out.logits, torch.randint(0, 4, (2, 50, 60))).backward()
    for name, parameter in segmentor.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    last_q = segmentor.clip.visual.transformer.resblocks[-1].attn.q_proj_weight.grad  # type: ignore[union-attr]
    assert not last_q.any()  # type: ignore[union-attr,operator]  # no attention in the last block
    segmentor.eval()
    with torch.no_grad():
        assert segmentor(image, F.normalize(torch.randn(7, 3, 12), dim=-1)).logits.shape == (2, 7, 32, 32)


def test_other_image_sizes() -> None:
    segmentor = small_segmentor().eval()
    with torch.no_grad():
        out = segmentor(torch.randn(1, 3, 40, 72), torch.randn(3, 1, 12))
    assert out.logits.shape == (1, 3, 20, 36)


def test_build_from_config(tmp_path) -> None:
    config = small_config(tmp_path)
    config.clip.templates = "imagenet"
    segmentor = build_segmentor(config)
    assert segmentor.num_templates == segmentor.aggregator.conv1.in_channels > 1
    text = segmentor.clip.text_features(["red circle", "blue square"])
    with torch.no_grad():
        assert segmentor(torch.randn(1, 3, 32, 32), text).logits.shape == (1, 2, 16, 16)
