"""The cost aggregation: shapes at any size, the properties it must have, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from small_models import randomize, small_model_config

from infoclip.config import ModelConfig
from infoclip.model.aggregator import Aggregator
from infoclip.model.attention import SwinBlock, window_and_shift, window_mask

D = 12  # joint width


def build(num_templates: int = 1, resolution: tuple[int, int] = (8, 8), **changes: object) -> Aggregator:
    torch.manual_seed(0)
    model = Aggregator(small_model_config(**changes), D, D, num_templates, resolution)
    return randomize(model).eval()  # type: ignore[return-value]


def inputs(b: int = 2, t: int = 5, p: int = 1, h: int = 8, w: int = 8, dtype: torch.dtype = torch.float32) -> tuple:
    generator = torch.Generator().manual_seed(b * 1000 + t * 10 + p)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    image = draw(b, D, h, w)
    return image, draw(t, p, D), [image, draw(b, 10, 2 * h, 2 * w), draw(b, 6, 4 * h, 4 * w)]


# Two orders of summation of the same float32 numbers, through some twenty layers.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def test_published_sizes_on_meta() -> None:
    with torch.device("meta"):
        model = Aggregator(ModelConfig(), 512, 512)
        dense = torch.empty(1, 512, 24, 24)
        guidance = [dense, torch.empty(1, 256, 48, 48), torch.empty(1, 128, 96, 96)]
        assert model(dense, torch.empty(171, 1, 512), guidance).shape == (1, 171, 96, 96)
        assert model(dense, torch.empty(300, 1, 512), guidance).shape == (1, 300, 96, 96)


@pytest.mark.parametrize(
    ("h", "w", "window"), [(8, 8, 4), (8, 8, 12), (4, 12, 4), (12, 8, 4), (6, 10, 4), (5, 7, 3), (1, 1, 4), (9, 2, 4)]
)
@pytest.mark.parametrize("attention_type", ["linear", "full"])
def test_any_grid(h: int, w: int, window: int, attention_type: str) -> None:
    model = build(window_size=window, attention_type=attention_type)
    image, text, guidance = inputs(h=h, w=w)
    logits = model(image, text, guidance)
    assert logits.shape == (2, 5, 4 * h, 4 * w)
    assert logits.isfinite().all()


@pytest.mark.parametrize(("t", "pad_len"), [(1, 8), (1, 0), (8, 8), (9, 8), (20, 0), (847, 256)])
def test_any_number_of_classes(t: int, pad_len: int) -> None:
    model = build(resolution=(4, 4), pad_len=pad_len)
    logits = model(*inputs(t=t, h=4, w=4))
    assert logits.shape == (2, t, 16, 16)
    dropped = (logits == -100).all(dim=(2, 3))
    kept = min(t, pad_len) if pad_len else t
    assert (~dropped).sum(dim=1).tolist() == [kept, kept]
    assert not (logits[~dropped] == -100).any()


def test_cut_keeps_the_most_similar_classes_of_each_image() -> None:
    model = build()
    image, text, guidance = inputs(t=20, p=1)
    logits = model(image, text, guidance)
    cosine = torch.einsum("bdhw,td->bthw", F.normalize(image, dim=1), F.normalize(text[:, 0], dim=-1))
    for b in range(2):
        best = set(cosine[b].amax(dim=(1, 2)).topk(8).indices.tolist())
        assert {i for i in range(20) if not (logits[b, i] == -100).all()} == best


@pytest.mark.parametrize("t", [5, 8, 13])
@pytest.mark.parametrize("attention_type", ["linear", "full"])
def test_order_of_classes_does_not_matter(t: int, attention_type: str) -> None:
    model = build(num_templates=2, attention_type=attention_type)
    image, text, guidance = inputs(t=t, p=2)
    order = torch.randperm(t, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(image, text[order], guidance), model(image, text, guidance)[:, order], **CLOSE)


@pytest.mark.parametrize("t", [5, 13])
def test_images_of_a_batch_are_independent(t: int) -> None:
    model = build()
    image, text, guidance = inputs(b=3, t=t)
    together = model(image, text, guidance)
    for b in range(3):
        alone = model(image[b : b + 1], text, [g[b : b + 1] for g in guidance])
        torch.testing.assert_close(together[b : b + 1], alone, **CLOSE)


@pytest.mark.parametrize("t", [5, 13])
def test_shared_text_equals_repeated_text(t: int) -> None:
    model = build(num_templates=3)
    image, text, guidance = inputs(t=t, p=3)
    repeated = text.expand(2, *text.shape)
    torch.testing.assert_close(model(image, text, guidance), model(image, repeated, guidance), **CLOSE)
    swapped = torch.stack([text, text.flip(0)])
    second = model(image, swapped, guidance)[1]
    torch.testing.assert_close(second, model(image, text.flip(0), guidance)[1], **CLOSE)


def test_pooling_follows_the_mode() -> None:
    model = build(pooling_train=2, pooling_eval=1)
    args = inputs()
    model.train()
    torch.testing.assert_close(model(*args), model(*args, pooling=2), rtol=0, atol=0)
    model.eval()
    torch.testing.assert_close(model(*args), model(*args, pooling=1), rtol=0, atol=0)
    assert not torch.allclose(model(*args), model(*args, pooling=2), rtol=1e-3, atol=1e-3)


def test_pooling_that_does_not_divide_drops_the_rest() -> None:
    model = build(resolution=(8, 8))
    layer = model.layers[0].attention  # type: ignore[union-attr]
    x = torch.randn(1, 16, 3, 8, 8)
    changed = x.clone()
    changed[..., 6:, :] += 1  # rows 6 and 7 are beyond the two pooled rows of 3
    same = layer(x, None, (3, 3)) - x if layer.attention.q.in_features == 16 else None
    guidance = torch.randn(1, 3, 8)
    same, other = layer(x, guidance, (3, 3)) - x, layer(changed, guidance, (3, 3)) - changed
    torch.testing.assert_close(same, other, rtol=0, atol=1e-6)  # subtracting x again rounds
    with pytest.raises(ValueError, match=r"pooling \(9, 9\) does not fit the grid \(8, 8\)"):
        model(*inputs(), pooling=9)


def test_padding_takes_part_in_attention() -> None:
    narrow, wide = build(pad_len=8), build(pad_len=16)
    wide.load_state_dict(narrow.state_dict())
    assert not torch.allclose(narrow(*inputs()), wide(*inputs()), rtol=1e-3, atol=1e-3)
    bare = build(pad_len=0)
    assert not any("padding" in name for name, _ in bare.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("t", [5, 13])
def test_autocast(dtype: torch.dtype, t: int) -> None:
    model = build()
    image, text, guidance = inputs(t=t)
    exact = model(image, text, guidance)
    image.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        logits = model(image, text, guidance)
    logits.float().square().mean().backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()
    assert logits.isfinite().all()
    assert ((logits == -100).all(dim=(2, 3)).sum(dim=1) == max(t - 8, 0)).all()
    kept = (exact != -100) & (logits != -100)
    # Half precision keeps 8 (bf16) or 11 (fp16) bits; a few dozen roundings in a row cost a few of them.
    bound = 0.1 if dtype == torch.bfloat16 else 0.02
    error = (logits.float() - exact)[kept].abs().max() / exact[kept].abs().max()
    assert error < bound


def test_whole_module_in_bfloat16() -> None:
    model = build().to(torch.bfloat16)
    image, text, guidance = inputs(t=13)
    logits = model(image.bfloat16(), text.bfloat16(), [g.bfloat16() for g in guidance])
    assert logits.dtype == torch.bfloat16
    assert ((logits == -100).all(dim=(2, 3)).sum(dim=1) == 5).all()


@pytest.mark.parametrize("mode", ["lean", "reference"])  # a graph of the others allows one backward pass, not several
def test_gradcheck(mode) -> None:
    model = build(resolution=(4, 4), window_size=2, pad_len=4).double().use_memory(mode)
    image, text, guidance = inputs(b=1, t=2, h=4, w=4, dtype=torch.float64)
    image = image.requires_grad_()
    text = text.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda i, t: model(i, t, guidance)[:, :, ::5, ::5], (image, text), fast_mode=True, atol=1e-6
    )


@pytest.mark.parametrize(
    ("h", "w", "window", "shift"),
    [(8, 8, 4, 2), (8, 12, 4, 2), (6, 10, 4, 2), (5, 7, 3, 1), (5, 7, 4, 0), (6, 6, 3, 0)],
)
def test_window_attention_against_pairs(h: int, w: int, window: int, shift: int) -> None:
    """The block against attention over explicitly listed pairs of positions."""
    torch.manual_seed(0)
    block = randomize(SwinBlock(8, 4, 2, window, shift, (h, w))).double()
    x, g = torch.randn(2, h, w, 8).double(), torch.randn(2, h, w, 4).double()
    padded = (h + -h % window, w + -w % window)
    place = {}
    for i in range(h):
        for j in range(w):
            rolled = ((i - shift) % padded[0], (j - shift) % padded[1])
            place[i, j] = (rolled[0] // window, rolled[1] // window, i < shift, j < shift)
    positions = list(place)
    allowed = torch.tensor([[place[a] == place[b] for b in positions] for a in positions])
    attn: torch.nn.Module = block.attn  # type: ignore[assignment]
    y = torch.cat([block.norm1(x), g], dim=-1).view(2, h * w, 12)
    heads = [f(y[..., : f.in_features]).view(2, h * w, 2, 4).transpose(1, 2) for f in (attn.q, attn.k, attn.v)]
    scores = heads[0] @ heads[1].transpose(-2, -1) / math.sqrt(4)
    scores = scores.masked_fill(~allowed, -math.inf)
    out = attn.proj((scores.softmax(-1) @ heads[2]).transpose(1, 2).reshape(2, h, w, 8))
    want = x + out
    want = want + block.mlp(block.norm2(want))
    # A masked pair keeps exp(-100) of its weight.
    torch.testing.assert_close(block(x, g), want, rtol=1e-10, atol=1e-10)


def test_window_rule() -> None:
    assert window_and_shift(24, 24, 12, 6) == (12, 6)
    assert window_and_shift(12, 24, 12, 6) == (12, 0)
    assert window_and_shift(8, 24, 12, 6) == (8, 0)
    assert window_mask(24, 24, 12, 0) is None
    mask = window_mask(24, 24, 12, 6)
    assert mask is not None
    assert mask.shape == (4, 144, 144)
    assert set(mask.unique().tolist()) == {-100.0, 0.0}


def test_only_shifting_blocks_keep_a_mask() -> None:
    masks = {k: tuple(v.shape) for k, v in build(num_layers=2).state_dict().items() if k.endswith("attn_mask")}
    assert masks == {f"layers.{i}.swin_block.block_2.attn_mask": (4, 16, 16) for i in range(2)}
    assert not any(k.endswith("attn_mask") for k in build(resolution=(4, 4)).state_dict())


@pytest.mark.parametrize("other", [(12, 8), (6, 10), (4, 4)])
def test_the_usual_grid_only_decides_the_stored_mask(other: tuple[int, int]) -> None:
    first, second = build(resolution=(8, 8)), build(resolution=other)
    second.load_state_dict({k: v for k, v in first.state_dict().items() if "attn_mask" not in k}, strict=False)
    args = inputs(h=other[0], w=other[1])
    torch.testing.assert_close(first(*args), second(*args), rtol=0, atol=0)


def test_without_guidance() -> None:
    config = small_model_config(decoder_guidance_dims=(0, 0), decoder_guidance_proj_dims=(0, 0))
    model = Aggregator(config, 0, 0, resolution=(8, 8))
    image, text, _ = inputs()
    assert model(image, text).shape == (2, 5, 32, 32)
    assert not any("guidance" in name for name, _ in model.named_parameters() if "padding" not in name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, t, g: (i[0], t, g), r"image_feats has shape \(12, 8, 8\); expected \[B, d, H, W\]"),
        (lambda i, t, g: (i, t[:, 0], g), r"text_feats has shape \(5, 12\)"),
        (lambda i, t, g: (i, t.expand(3, *t.shape), g), r"expected \[T, P, d\] or \[2, T, P, d\]"),
        (lambda i, t, g: (i, t[:0], g), "no class"),
        (lambda i, t, g: (i, t.repeat(1, 2, 1), g), "1 prompts a class of width 12"),
        (lambda i, t, g: (i, t[..., :6], g), "of width 12"),
        (lambda i, t, g: (i, t, g[:2]), "guidance has 2 maps; expected 3"),
        (lambda i, t, g: (i, t, [g[0], g[2], g[1]]), r"guidance\[1\] has shape"),
    ],
)
def test_wrong_shapes_are_named(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()(*change(*inputs()))


def test_impossible_widths_are_named() -> None:
    with pytest.raises(ValueError, match="hidden_dim 16 is not a multiple of num_heads 3"):
        build(num_heads=3)
    with pytest.raises(ValueError, match="multiple of 16"):
        build(decoder_dims=(24, 16))
    with pytest.raises(ValueError, match="expected fewer than 16"):
        build(decoder_guidance_proj_dims=(16, 4))
    with pytest.raises(ValueError, match="attention_type"):
        build(attention_type="cubic")
