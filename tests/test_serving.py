"""The memory planner of inference: what it counts, what it chooses, half precision, and pictures in one batch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import small_config, small_segmentor
from typer.testing import CliRunner

import infoclip
from infoclip.budget import parse_budget
from infoclip.cli import app
from infoclip.config import EvalConfig
from infoclip.engine import serving as planning
from infoclip.engine.serving import VIEWS, count_views, plan_serving
from infoclip.errors import ConfigError, DataError
from infoclip.model.attention import window_mask
from infoclip.model.checkpoint import save_model
from infoclip.model.footprint import meta_copy
from infoclip.model.inference import PER_PIXEL, Serving, predict_labels, predict_labels_of
from infoclip.model.segmentor import Segmentor, build_segmentor

SLIDING = EvalConfig(resize=0, size=96, window=48)


def pictures(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = small_config(tmp_path)
    torch.manual_seed(0)
    return save_model(build_segmentor(config), config, ["person", "tree"], tmp_path / "model")


def published(classes: int, prompts: int) -> Segmentor:
    """ViT-B/16 without storage."""
    from infoclip.config import apply_overrides
    from infoclip.recipes import get_recipe

    templates = "imagenet" if prompts == 80 else "catseg"
    config = apply_overrides(get_recipe("infoclip-vitb16-coco"), ["clip.pretrained=", f"clip.templates={templates}"])
    with torch.device("meta"):
        segmentor = build_segmentor(config)
    assert segmentor.num_templates == prompts
    return segmentor


# Counting


def test_847_classes_in_80_prompts_are_under_4_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the published sizes, in float32, by counted bytes: weights, text bank, a view's way, logits, score maps."""
    segmentor = published(847, 80)
    monkeypatch.setattr(planning, "budget_bytes", lambda memory, device, name: parse_budget(memory))
    plan = plan_serving("4GB", segmentor, 847, 16, EvalConfig())
    assert plan.total < 4e9
    assert plan.text == 4 * 847 * 80 * 512
    assert plan.weights > 6e8
    assert plan.serving.maps >= planning.MAPS


def test_less_is_counted_for_fewer_views_and_classes_at_once() -> None:
    segmentor = small_segmentor()
    bare = meta_copy(segmentor, segmentor.clip.tokenizer, segmentor.clip._tokens)
    sizes = {(chunk, views): count_views(bare, 8, chunk, views) for chunk in (1, 8) for views in (1, 2, 4)}
    for chunk in (1, 8):
        assert sizes[chunk, 1] < sizes[chunk, 2] < sizes[chunk, 4]
    for views in (1, 2, 4):
        assert sizes[1, views] < sizes[8, views]


def test_a_wider_budget_gives_more_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU; the meta device stands for one."""
    segmentor = small_segmentor()
    segmentor = meta_copy(segmentor, segmentor.clip.tokenizer, segmentor.clip._tokens)
    monkeypatch.setattr(planning, "budget_bytes", lambda memory, device, name: parse_budget(memory))
    wide = plan_serving("64GiB", segmentor, 8, 8, SLIDING)
    assert (wide.serving.views, wide.serving.class_chunk) == (VIEWS[0], 8)
    assert wide.pictures == 1  # a picture has ten views
    assert plan_serving("64GiB", segmentor, 8, 8, EvalConfig(sliding_window=False)).pictures == VIEWS[0]
    with pytest.raises(ConfigError, match=r"--memory is 64MiB, but this model with 8 classes needs \d+MiB") as no:
        plan_serving("64MiB", segmentor, 8, 8, SLIDING)
    least = str(no.value).split("needs ")[1].split(";")[0]
    tight = plan_serving(least, segmentor, 8, 8, SLIDING)
    assert tight.total <= parse_budget(least) < wide.total
    assert tight.serving.maps < wide.serving.maps
    with pytest.raises(ConfigError, match="for each of 4 processes"):
        plan_serving("64MiB", segmentor, 8, 8, SLIDING, share=4)


# The result


@pytest.mark.parametrize("sliding", [True, False])
def test_pictures_together_give_what_each_gives(sliding: bool) -> None:
    segmentor = small_segmentor()
    config = EvalConfig(resize=0, size=96, window=48, sliding_window=sliding)
    images, text = pictures((40, 70), (64, 64), (31, 50)), torch.randn(5, 1, 12)
    together = predict_labels_of(segmentor, images, text, config, Serving(views=4, class_chunk=2, maps=2**22))
    for image, (best, labels) in zip(images, together, strict=True):
        want, wanted = predict_labels(segmentor, image, text, config)
        torch.testing.assert_close(best, want, rtol=1e-5, atol=1e-5)  # matrix products of another size
        assert (labels == wanted).float().mean() > 0.999
    assert segmentor.aggregator.class_chunk == 0


def test_half_precision_is_close_and_named(tmp_path: Path) -> None:
    segmentor = small_segmentor()
    (image,), text = pictures((40, 70)), torch.randn(5, 1, 12)
    want = predict_labels(segmentor, image, text, SLIDING)[0]
    half = predict_labels(segmentor, image, text, SLIDING, Serving(precision="bf16"))[0]
    assert half.dtype == torch.float32
    assert not torch.equal(half, want)
    torch.testing.assert_close(half, want, rtol=0.05, atol=0.02)  # eight bits of mantissa, several layers
    for precision, words in (("fp16", "fp16 is for GPUs; on a CPU take bf16"), ("fp8", "expected fp32, bf16, fp16")):
        with pytest.raises(ConfigError, match=words):
            predict_labels(segmentor, image, text, SLIDING, Serving(precision=precision))


def test_training_goes_on_after_inference() -> None:
    """Nothing that inference leaves in a cache is a tensor that a backward pass refuses."""
    window_mask.cache_clear()
    segmentor = small_segmentor()
    (image,), text = pictures((40, 70)), torch.randn(5, 1, 12)
    best, labels = predict_labels(segmentor, image, text, SLIDING)
    assert not best.is_inference()
    assert not labels.is_inference()
    assert predict_labels(segmentor.train(), image, text, SLIDING)[1].shape == (40, 70)
    side = segmentor.clip.image_size
    segmentor(torch.randn(1, 3, side, side), text).logits.sum().backward()
    assert any(p.grad is not None for p in segmentor.aggregator.parameters())


def test_a_picture_that_the_budget_has_no_room_for_is_refused_before_it_is_computed() -> None:
    segmentor, text = small_segmentor(), torch.randn(5, 1, 12)
    image, large = pictures((40, 70), (400, 700))
    serving = Serving(maps=PER_PIXEL * 40 * 70 + 2**18)
    assert predict_labels(segmentor, image, text, SLIDING, serving)[1].shape == (40, 70)
    with pytest.raises(DataError, match=r"700 x 400 pixels takes \d+MiB more than the memory budget leaves"):
        predict_labels(segmentor, large, text, SLIDING, serving)


# The commands


def test_predict_and_evaluate_within_a_budget(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(random.integers(0, 256, (40 + i, 60, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "3.png").write_bytes(b"no picture")
    words = ["predict", str(model), str(folder), "--classes", "cat, dog", "--device", "cpu"]
    plain = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "plain")])
    asked = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "asked"), "--memory", "1GiB"])
    assert plain.exit_code == asked.exit_code == 2  # the one that is no picture
    assert "memory plan: 1 view of 1 picture at once" in asked.output
    for i in range(3):
        one, other = (json.loads((tmp_path / name / f"{i}.json").read_text()) for name in ("plain", "asked"))
        assert one["found"] == other["found"]
    half = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "asked"), "--precision", "bf16"])
    assert half.exit_code == 2
    assert json.loads((tmp_path / "asked/0.json").read_text())["precision"] == "bf16"  # not taken for the same
    for value, words_ in (("4", "no unit; write 4GiB"), ("1MiB", "needs"), ("lean", "is no amount")):
        answer = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "no"), "--memory", value])
        assert answer.exit_code == 2
        assert words_ in answer.output
        assert not (tmp_path / "no").exists()


@pytest.mark.slow  # a process that loads torch and a model of 60 MB: some 15 s
def test_a_process_keeps_its_budget(tmp_path: Path) -> None:
    """Resident memory beyond what the imports took, for a real model directory, pictures read, labels written."""
    program = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from pathlib import Path
import numpy, psutil, torch
from PIL import Image
from bench.peak import give_back, reset_peak, resident
from infoclip.predict import predict
import infoclip.engine.serving
folder = Path({str(tmp_path)!r})
Image.fromarray(numpy.zeros((960, 1280, 3), dtype=numpy.uint8)).save(folder / "a.png")
before = resident("VmRSS")
reset_peak()
done = predict(folder / "model", [folder / "a.png"], ["cat", "dog"], folder / "out", device="cpu", memory=sys.argv[1])
print(json.dumps([len(done.results), resident("VmHWM") - before, done.plan.total]))
"""
    config = small_config(tmp_path)
    save_model(build_segmentor(config), config, ["person", "tree"], tmp_path / "model")
    answer = subprocess.run([sys.executable, "-c", program, "400MiB"], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    results, took, counted = json.loads(answer.stdout.splitlines()[-1])
    assert results == 1
    assert took <= counted <= 400 * 2**20
    assert took > 960 * 1280 * 30  # it did something


def test_the_api_names_a_wrong_budget_before_it_reads(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--memory.*no unit"):
        infoclip.load(tmp_path / "nothing", device="cpu", memory="4")
