"""Tokens, prompts, the context cut and the text bank."""

from __future__ import annotations

import warnings
from pathlib import Path

import open_clip
import pytest
import torch
from parity_common import load_case
from safetensors.torch import load_file, save_file

from infoclip.clip import TEMPLATES, Architecture, DenseCLIP, TextBank, Tower, resolve_templates, text_cache_dir
from infoclip.errors import ConfigError, DataError, InfoclipWarning

GOLDEN = Path(__file__).parent / "golden"


def text_clip(tokenizer: object = None, vocabulary: int = 49408, context: int = 24, seed: int = 0) -> DenseCLIP:
    """A narrow CLIP with open_clip's tokenizer."""
    arch = Architecture(
        embed_dim=12,
        vision=Tower(16, 3, 2, 32),
        text=Tower(16, 2, 2, 32),
        patch_size=8,
        grid=(2, 2),
        context_length=context,
        vocab_size=vocabulary,
    )
    tokenizer = tokenizer or open_clip.tokenizer.SimpleTokenizer(context_length=context)
    clip = DenseCLIP(arch, tokenizer=tokenizer)  # type: ignore[arg-type]
    torch.manual_seed(seed)
    clip.reset_parameters()
    with torch.no_grad():
        for name, parameter in clip.named_parameters():
            if (not name.startswith("visual.") and parameter.ndim < 2) or name == "positional_embedding":
                parameter.add_(0.3 * torch.randn_like(parameter))
    return clip


# Tokens


def test_tokens_are_those_of_both_published_tokenizers() -> None:
    case = load_case(GOLDEN / "tokenizer.json")
    clip = text_clip(context=case.hyper["context_length"])
    refused = [i for i, error in enumerate(case.data["catseg_errors"]) if error]
    assert refused
    texts = case.data["texts"]
    kept = [i for i in range(len(texts)) if i not in refused]
    tokens = clip.tokenize([texts[i] for i in kept])
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens.int(), case.tensors["out.openclip_ids"][kept])
    same = [n for n, i in enumerate(kept) if i not in case.data["differs_between_peers"]]
    assert torch.equal(tokens[same].int(), case.tensors["out.catseg_ids"][[kept[n] for n in same]])
    for i in refused:
        with pytest.raises(DataError, match=r"The text 'word word .*\.\.\.' has \d+ tokens, .* context holds 77"):
            clip.tokenize([texts[i]])


def test_the_longest_text_that_fits_is_kept_whole() -> None:
    clip = text_clip(context=8)
    tokens = clip.tokenize(["dog " * 6])
    assert tokens[0].argmax() == 7
    assert len(set(tokens[0, 1:7].tolist())) == 1
    with pytest.raises(DataError, match="has 9 tokens, but this CLIP's context holds 8"):
        clip.tokenize(["cat", "dog " * 7])


def test_long_class_name_is_named() -> None:
    clip = text_clip(context=12)
    with pytest.raises(DataError, match=r"^The class 'very long name of a dog' cannot be used: The text 'A photo of"):
        clip.text_features(["cat", "very long name of a dog"])
    assert clip.text_features(["cat, very long name of a dog that is never read"]).shape == (1, 1, 12)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [([], DataError, "class list is empty"), (["cat", " "], DataError, "empty name"), ("cat", TypeError, "list")],
)
def test_wrong_class_lists(names: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        text_clip().text_features(names)


def test_other_tokenizers() -> None:
    class Words:
        """One id a word, and no way to count beforehand."""

        def __call__(self, texts: list[str]) -> torch.Tensor:
            rows = torch.zeros(len(texts), 24, dtype=torch.int64)
            for row, text in zip(rows, texts, strict=True):
                words = text.split()
                if len(words) > 22:
                    raise ValueError("expected at most 22 words")
                row[: len(words) + 2] = torch.tensor([1, *range(2, 2 + len(words)), 40])
            return rows

    clip = text_clip(Words(), vocabulary=41)
    assert clip.tokenize(["a b"]).tolist()[0][:5] == [1, 2, 3, 40, 0]
    with pytest.raises(DataError, match="at most 22 words"):
        clip.tokenize(["a " * 23])
    assert clip.tokenize([]).shape == (0, 24)
    with pytest.raises(DataError, match="vocabulary has 40 entries"):
        text_clip(Words(), vocabulary=40).tokenize(["a"])
    clip.tokenizer = None
    with pytest.raises(ConfigError, match="no tokenizer"):
        clip.tokenize(["a"])
    with pytest.raises(TypeError, match="single string"):
        clip.tokenize("a")  # type: ignore[arg-type]


# The context cut


@pytest.mark.parametrize("lengths", [(3, 5, 4), (24, 3, 3), (2, 2, 2)])
def test_context_cut_is_exact(lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients with and without the cut; the padding holds other ids, which must not matter either."""
    clip = text_clip(vocabulary=60)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 58, (3, 24), generator=generator)
    for row, length in enumerate(lengths):
        tokens[row, length - 1] = 59
    weight = torch.randn(3, 12, generator=generator)

    def run() -> list[torch.Tensor]:
        clip.zero_grad(set_to_none=True)
        out = clip.encode_text(tokens)
        (out * weight).sum().backward()
        return [out.detach(), *(p.grad for p in clip.text_parameters().values() if p.grad is not None)]

    cut = run()
    seen: list[int] = []
    clip.transformer.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    run()
    monkeypatch.setattr(DenseCLIP, "_cuts_context", False)
    whole = run()
    assert seen == [max(lengths), 24]
    assert len(cut) == len(whole) == 1 + len(clip.text_parameters())
    for got, want in zip(cut, whole, strict=True):
        # The same products; matrix products over fewer rows may group their sums differently.
        assert (got - want).abs().max() <= 2e-6 * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("templates", [["a photo of a {} here"], ["a photo of a {}", "the {} of the"]])
def test_what_prompts_begin_with_is_computed_once_and_changes_nothing(
    templates: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = text_clip().double()
    names = [f"thing {'of a ' * (i % 4)}number {i}" for i in range(17)]
    tokens = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, *rest: (tokens.append(x[..., 0].numel()), linear(x, *rest))[1]
    )
    found = []
    for apart in (False, True):
        monkeypatch.setattr(DenseCLIP, "_cuts_context", not apart)
        clip.zero_grad()
        tokens.clear()
        features = clip.text_features(names, templates)
        count = max(tokens)
        weights = torch.linspace(-1, 1, features.numel(), dtype=torch.float64).view(features.shape)
        (features * weights).sum().backward()
        gradients = [p.grad for p in clip.text_parameters().values()]
        clip.zero_grad()
        clip.text_backward(names, weights, templates)
        assert all(
            torch.allclose(a, p.grad, rtol=1e-11, atol=1e-13)
            for a, p in zip(gradients, clip.text_parameters().values(), strict=True)
        )
        found.append([count, features, *gradients])
    assert found[0][0] < 0.8 * found[1][0]
    for once, each in zip(found[0][1:], found[1][1:], strict=True):
        # float64 in another order of summation; key biases have a gradient of exactly zero, hence the floor
        assert (once - each).norm() <= 1e-11 * each.norm() + 1e-13


def test_wrong_tokens_are_refused() -> None:
    clip = text_clip(vocabulary=60)
    for bad in (torch.zeros(3, dtype=torch.int64), torch.zeros(2, 5)):
        with pytest.raises(ValueError, match="expected token ids"):
            clip.encode_text(bad)
    with pytest.raises(ValueError, match="expected at most 24 tokens in a text, given 25"):
        clip.encode_text(torch.zeros(1, 25, dtype=torch.int64))
    assert clip.encode_text(torch.zeros(0, 24, dtype=torch.int64)).shape == (0, 12)


def test_causal_mask_hides_the_future_and_only_the_future() -> None:
    clip = text_clip(vocabulary=60)
    tokens = torch.randint(1, 50, (1, 10), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 6] = 55
    with torch.no_grad():
        outputs = [
            clip.transformer(clip.token_embedding(t) + clip.positional_embedding[:10], causal=True)
            for t in (tokens, changed)
        ]
    moved = (outputs[0] - outputs[1]).abs().sum(dim=-1)[0] > 0
    assert moved.tolist() == [False] * 6 + [True] * 4


# Prompts


def test_text_features_are_the_normalised_prompts() -> None:
    clip = text_clip()
    templates = ("a {}", "the {} here", "{}")
    names = ["cat", "sea, ocean", "red car"]
    features = clip.text_features(names, templates)
    assert features.shape == (3, 3, 12)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(3, 3))
    want = clip.encode_text(clip.tokenize(["the sea here"]))[0]
    torch.testing.assert_close(features[1, 1], want / want.norm())
    features.sum().backward()
    assert clip.token_embedding.weight.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(clip.text_features(names, templates), features)


def test_chunks_without_gradient_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = text_clip()
    names = ["cat", "dog", "a much longer name", "sea", "x"]
    whole = clip.text_features(names).detach()
    monkeypatch.setattr("infoclip.clip.text._PROMPT_CHUNK", 2)
    with torch.no_grad():
        torch.testing.assert_close(clip.text_features(names), whole)


def test_named_templates() -> None:
    assert TEMPLATES["catseg"] == ("A photo of a {} in the scene",)
    assert TEMPLATES["plain"] == ("{}",)
    assert {name: len(TEMPLATES[name]) for name in ("imagenet", "maftplus")} == {"imagenet": 80, "maftplus": 14}
    for template, function in zip(TEMPLATES["imagenet"], open_clip.OPENAI_IMAGENET_TEMPLATES, strict=True):
        assert template.replace("{}", "cat") == function("cat")
    for templates in TEMPLATES.values():
        assert len(set(templates)) == len(templates)
        assert all(template.count("{}") == 1 for template in templates)
    assert resolve_templates("maftplus") is TEMPLATES["maftplus"]


def test_templates_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("a {}\n\n  the {} there \n", encoding="utf-8")
    assert resolve_templates(str(path)) == ("a {}", "the {} there")
    path.write_text("a {}\nno place\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"mine\.txt: the template 'no place' has no \{\}"):
        resolve_templates(str(path))
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="no prompt templates"):
        resolve_templates(str(path))
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="Cannot read"):
        resolve_templates(str(path))
    with pytest.raises(ConfigError, match="did you mean 'imagenet'"):
        resolve_templates("imagenets")
    with pytest.raises(ConfigError, match="or a file"):
        resolve_templates("zzz")


# The text bank


@pytest.fixture
def frozen() -> DenseCLIP:
    clip = text_clip()
    clip.parameter_policy("frozen")
    return clip


class Counter:
    """How often the text tower runs."""

    def __init__(self, clip: DenseCLIP) -> None:
        self.count = 0
        clip.ln_final.register_forward_hook(self)

    def __call__(self, *args: object) -> None:
        self.count += 1


def test_frozen_text_is_computed_once(frozen: DenseCLIP, tmp_path: Path) -> None:
    counter = Counter(frozen)
    bank = TextBank(frozen, ("a {}", "{}"), tmp_path / "cache")
    first = bank(["cat", "dog"])
    assert not first.requires_grad
    assert bank(["cat", "dog"]) is first
    assert counter.count == 1
    assert torch.equal(first, frozen.text_features(["cat", "dog"], ("a {}", "{}")))
    again = TextBank(frozen, ("a {}", "{}"), tmp_path / "cache")
    count = counter.count
    assert torch.equal(again(["cat", "dog"]), first)
    assert counter.count == count  # read from disk
    (file,) = (tmp_path / "cache").iterdir()  # and no temporary file is left
    assert torch.equal(load_file(file)["features"], first)


def test_no_stale_entry(frozen: DenseCLIP, tmp_path: Path) -> None:
    """Another class list, order, template or weight never meets an older entry."""
    bank = TextBank(frozen, ("a {}",), tmp_path)
    train = bank(["cat", "dog"])
    test = bank(["cat", "dog", "sea"])
    assert test.shape[0] == 3
    assert torch.equal(bank(["dog", "cat"]), train.flip(0)) or torch.allclose(bank(["dog", "cat"]), train.flip(0))
    assert not torch.allclose(TextBank(frozen, ("the {}",), tmp_path)(["cat", "dog"]), train)
    keys = {bank.key(["cat", "dog"]), bank.key(["dog", "cat"]), TextBank(frozen, ("the {}",)).key(["cat", "dog"])}
    assert len(keys) == 3
    with torch.no_grad():
        frozen.text_projection.mul_(torch.linspace(0.5, 2, 12))  # type: ignore[union-attr]
    changed = bank(["cat", "dog"])
    assert not torch.allclose(changed, train)
    torch.testing.assert_close(changed, frozen.text_features(["cat", "dog"], ("a {}",)))
    with torch.no_grad():
        frozen.text_projection.mul_(1 / torch.linspace(0.5, 2, 12))  # type: ignore[union-attr]
        frozen.visual.proj.zero_()  # no text depends on it
    torch.testing.assert_close(bank(["cat", "dog"]), train)
    other = text_clip(seed=1)
    other.parameter_policy("frozen")
    assert not torch.allclose(TextBank(other, ("a {}",), tmp_path)(["cat", "dog"]), train)


def test_learning_text_is_never_kept(tmp_path: Path) -> None:
    clip = text_clip()
    clip.parameter_policy("attention")
    bank = TextBank(clip, None, tmp_path)
    first = bank(["cat"])
    assert first.requires_grad
    with torch.no_grad():
        clip.transformer.resblocks[0].attn.v_proj_weight.add_(0.5)
    assert not torch.allclose(bank(["cat"]), first)
    assert not list(tmp_path.iterdir())
    clip.parameter_policy("frozen")
    assert torch.equal(bank(["cat"]), clip.text_features(["cat"]))


@pytest.mark.parametrize("damage", ["bytes", "truncated", "shape", "nan", "other key"])
def test_damaged_cache_is_rebuilt(damage: str, frozen: DenseCLIP, tmp_path: Path) -> None:
    bank = TextBank(frozen, ("a {}",), tmp_path)
    want, key = bank(["cat", "dog"]), bank.key(["cat", "dog"])
    (file,) = tmp_path.iterdir()
    if damage == "bytes":
        file.write_bytes(b"not a tensor file")
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-8])
    else:
        bad = {"shape": want[:1], "nan": want * torch.nan, "other key": want}[damage].clone()
        save_file({"features": bad}, file, metadata={"key": "0" if damage == "other key" else key})
    with pytest.warns(InfoclipWarning, match="damaged .* rebuilt"):
        got = TextBank(frozen, ("a {}",), tmp_path)(["cat", "dog"])
    assert torch.equal(got, want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(TextBank(frozen, ("a {}",), tmp_path)(["cat", "dog"]), want)


def test_place_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INFOCLIP_CACHE", str(tmp_path / "mine"))
    assert text_cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("INFOCLIP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert text_cache_dir() == tmp_path / "infoclip"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert text_cache_dir() == tmp_path / ".cache" / "infoclip"


def test_zero_shot_takes_its_text_from_the_cache(
    frozen: DenseCLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infoclip.evaluate.run import zero_shot_predictor

    monkeypatch.setenv("INFOCLIP_CACHE", str(tmp_path))
    image = torch.randint(256, (3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    first = zero_shot_predictor(frozen, ["cat", "dog"])(image)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(frozen, "text_features", lambda *_: pytest.fail("the text was embedded again"))
    assert torch.equal(zero_shot_predictor(frozen, ["cat", "dog"])(image), first)


def test_unwritable_cache_costs_a_warning(frozen: DenseCLIP, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.warns(InfoclipWarning, match="cannot be kept"):
        features = TextBank(frozen, None, tmp_path / "file")(["cat"])
    assert torch.equal(features, frozen.text_features(["cat"]))


def test_kept_text_serves_training_after_inference_and_autocast(frozen: DenseCLIP) -> None:
    bank = TextBank(frozen)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        kept = bank(["cat", "dog"])
    weight = torch.ones(12, requires_grad=True)
    (bank(["cat", "dog"]) * weight).sum().backward()
    assert weight.grad is not None
    assert torch.equal(kept, frozen.text_features(["cat", "dog"]))


def test_memory_is_bounded(frozen: DenseCLIP) -> None:
    bank = TextBank(frozen)
    for i in range(7):
        bank([f"class {i}"])
    assert len(bank._kept) == 4
    assert torch.equal(bank(["class 0"]), frozen.text_features(["class 0"]))
